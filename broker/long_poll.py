"""Pulls that wait for messages (semantics.md 4.4): one table, one sweep, no task or timer per request.

A parked pull is woken when a message is dispatched to its queue and the tag may match, or by the sweep when its time is
up. Waking runs the pull once more, which then answers whatever it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from broker.records import UNIT

PARKED_MAX: Final = 100_000
"""Pulls held at once; one more is answered at once instead."""

SWEEP_INTERVAL_S: Final = 1.0
SUSPEND_MAX_MS: Final = 30_000
"""Older Go clients send nanoseconds; their answer must come before their own 30 s are over."""


class Parked:
    """One held pull. `codes` are the tag hashes it wants, None for all."""

    __slots__ = ("codes", "conn", "deadline", "header", "keep_offset", "offset")

    def __init__(
        self, conn: Any, header: Any, deadline: float, offset: int, codes: frozenset[int] | None, keep_offset: bool
    ) -> None:
        self.conn = conn
        self.header = header
        self.deadline = deadline
        self.offset = offset
        self.codes = codes
        self.keep_offset = keep_offset
        """The offset lies above what this node has committed: only its own time or a later offset ends the wait."""


class LongPollTable:
    """`wake(parked, expired)` is the pull processor's second pass; it must not park again unless it calls `park`."""

    def __init__(self, wake: Callable[[Parked, bool], None]) -> None:
        self._wake = wake
        self._queues: dict[tuple[str, int], list[Parked]] = {}
        self._notified: list[Parked] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def park(self, topic: str, queue_id: int, parked: Parked) -> bool:
        """Hold a pull. False when the table is full: answer it now."""
        if self._count >= PARKED_MAX:
            return False
        key = (topic, queue_id)
        held = self._queues.get(key)
        if held is None:
            self._queues[key] = [parked]
        else:
            held.append(parked)
        self._count += 1
        return True

    def notify(self, topic: str, queue_id: int, max_offset: int, units: bytes) -> None:
        """Messages up to `max_offset` (exclusive) are committed; `units` are the newest ones' own.

        The pulls that wait for them are taken out here and answered by `wake_notified`, at the end of the turn: then
        the messages can be read, and several entries of one turn cost one answer.
        """
        key = (topic, queue_id)
        held = self._queues.pop(key, None)
        if held is None:
            return
        keep = []
        codes: frozenset[int] | None = None
        for parked in held:
            if parked.offset >= max_offset:
                keep.append(parked)
                continue
            if parked.codes is not None:
                if codes is None:
                    codes = frozenset(tags_code & 0xFFFFFFFF for _at, _size, tags_code in UNIT.iter_unpack(units))
                if parked.codes.isdisjoint(codes):
                    keep.append(parked)
                    continue
            self._notified.append(parked)
        self._put_back(key, keep)

    def wake_notified(self) -> None:
        """Answer what `notify` took out."""
        if self._notified:
            notified, self._notified = self._notified, []
            for parked in notified:
                self._release(parked)

    def wake_all(self) -> None:
        """Look again for every held pull: this node has become a ready leader and knows now what is out of range."""
        queues, self._queues = self._queues, {}
        for held in queues.values():
            for parked in held:
                self._release(parked)

    def drop_queue_of(self, topic: str) -> None:
        """A topic was deleted: let its pulls find out."""
        for key in [key for key in self._queues if key[0] == topic]:
            for parked in self._queues.pop(key):
                self._release(parked)

    def sweep(self, now: float) -> None:
        """End the waits that are over, and forget those whose connection is gone."""
        for key in list(self._queues):
            held = self._queues[key]
            if all(parked.deadline > now and parked.conn.closed_reason is None for parked in held):
                continue
            del self._queues[key]
            keep = []
            for parked in held:
                if parked.conn.closed_reason is not None:
                    self._count -= 1
                elif parked.deadline <= now:
                    self._count -= 1
                    self._wake(parked, True)
                else:
                    keep.append(parked)
            self._put_back(key, keep)

    def _release(self, parked: Parked) -> None:
        self._count -= 1
        if parked.conn.closed_reason is None:
            self._wake(parked, False)

    def _put_back(self, key: tuple[str, int], keep: list[Parked]) -> None:
        if keep:
            # A woken pull may have parked itself again meanwhile.
            self._queues.setdefault(key, []).extend(keep)
