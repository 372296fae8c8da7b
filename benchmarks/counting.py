"""The smallest state machine over a raft group: it counts records, and calls whoever waits for them."""

from __future__ import annotations

from typing import Any

from dledger.core.types import Role
from dledger.machine import EntryView


class CountingMachine:
    """The leader's batches carry (records, a callable that is told how many were applied, or None)."""

    def __init__(self) -> None:
        self.applied = 0
        self.entries = 0

    def stage(self, entry: EntryView) -> Any:
        return (entry.count, None)

    def apply(self, index: int, term: int, staged: Any) -> None:
        count, waiter = staged
        self.applied += count
        self.entries += 1
        if waiter is not None:
            waiter(count)

    def discard(self, staged: Any) -> None:
        """An old leader's rest: nobody waits for it here."""

    def orphan(self, staged: Any) -> None:
        """As `discard`."""

    def role_changed(self, role: Role, term: int, leader_id: str | None, ready: bool) -> None:
        return

    def app_message(self, peer_id: str, payload: bytes) -> None:
        return

    def turn_done(self) -> None:
        return

    def restore(self, checkpoint: bytes | None, *, first_index: int, first_position: int) -> int:
        return first_index - 1

    def stopped(self) -> None:
        return

    def trim(self, first_position: int) -> None:
        return

    def trim_floor(self) -> int:
        return 1 << 62

    def store_time_ms(self, entry: EntryView) -> int | None:
        return None

    def checkpoint_soon(self) -> None:
        return
