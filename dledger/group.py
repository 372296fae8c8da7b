"""A raft group as the broker sees it: the open batch, committed bytes to read, one service to run.

group = RaftGroup(env, config, machine, log)
await nursery.start(group.run)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from dledger.config import GroupConfig
from dledger.core.types import HEADER_BYTES, Role
from dledger.errors import NotLeader, Overloaded, TooLarge
from dledger.machine import EntryView, GroupStatistics, StateMachine
from runtime.logs import Logger
from runtime.model import Env, Listener

__all__ = ["EntryView", "GroupStatistics", "NotLeader", "Overloaded", "RaftGroup", "Role", "StateMachine", "TooLarge"]


class RaftGroup:
    """One member of a raft group. All methods are for the trio thread; the synchronous ones never block."""

    def __init__(
        self, env: Env, config: GroupConfig, machine: StateMachine, log: Logger, *, listener: Listener | None = None
    ) -> None:
        """`listener`, when given, is used instead of listening on the configured address (tests; socket activation)."""
        self.config = config
        self.machine = machine
        self.node_id = config.node_id
        self.group_uuid = config.group_uuid
        self._env = env
        self._log = log
        self._listener = listener

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover the log, replay it, listen, take part. `started()` once recovered and listening. Returns after
        `stop_gracefully`. Raises LedgerError with one sentence where the node cannot or must not serve.
        """
        task_status.started()
        await trio.sleep_forever()

    @property
    def role(self) -> Role:
        return Role.FOLLOWER

    @property
    def term(self) -> int:
        return 0

    @property
    def leader_id(self) -> str | None:
        return None

    @property
    def is_ready_leader(self) -> bool:
        """Leads, and the no-op of its term is applied; False while leadership is being handed over."""
        return False

    @property
    def first_position(self) -> int:
        return 0

    @property
    def committed_position(self) -> int:
        """End of what is applied: reads end here."""
        return 0

    @property
    def end_position(self) -> int:
        """End of the log, uncommitted entries included."""
        return 0

    def statistics(self) -> GroupStatistics:
        return GroupStatistics(
            node_id=self.node_id,
            role=self.role,
            term=self.term,
            leader_id=self.leader_id,
            ready=False,
            recovering=False,
            flush=self.config.flush,
            first_index=1,
            last_index=0,
            written_index=0,
            durable_index=0,
            commit_index=0,
            applied_index=0,
            first_position=0,
            committed_position=0,
            end_position=0,
            acknowledged={},
            lag_bytes={},
            connected={},
            waiting_records=0,
            disk_ok=True,
            loop_saturation=0.0,
            counters={},
        )

    # The open batch: leader only, between two awaits.

    def reserve(self, record_bytes: int) -> int:
        """Physical offset that the next record, of this size, will get; `add_record` must follow before any await.

        Raises NotLeader, Overloaded (nothing was logged) or TooLarge.
        """
        raise NotLeader(self.leader_id)

    def add_record(self, record: bytes) -> None:
        """Put the reserved record into the open batch."""
        raise NotLeader(self.leader_id)

    def open_staged(self) -> Any | None:
        """What `set_open_staged` stored for the batch that is open now, else None. Ask after `reserve`."""
        return None

    def set_open_staged(self, staged: Any) -> None:
        """Keep the caller's rows and waiters of the open batch; they come back in apply, discard or orphan."""
        raise NotLeader(self.leader_id)

    def seal(self) -> None:
        """Make one entry of the open batch now. Otherwise the driver does, in its turn."""

    def propose(self, *, records: Sequence[bytes] = (), ops: bytes = b"", staged: Any) -> int:
        """One DATA entry of its own: records encoded for `position_for(total)`, then the ops tail. Returns its index.

        `position_for` must have been called for the same total in the same step when there are records.
        """
        raise NotLeader(self.leader_id)

    def position_for(self, total_bytes: int) -> int:
        """Physical offset of the first byte of the next entry of its own, of a body of `total_bytes` (ops included).
        Seals the open batch. Raises as `reserve`.
        """
        raise NotLeader(self.leader_id)

    def wake(self) -> None:
        """Schedule a driver turn."""

    # Reading, bounded by what is applied.

    def read(self, physical_offset: int, nbytes: int) -> memoryview | None:
        """Bytes of the log without a copy. None where they are not all between first and committed position, or
        cross a segment's end."""
        return None

    async def read_cold(self, physical_offset: int, nbytes: int) -> bytes | None:
        """As `read`, in a thread where the bytes are not in memory. Checkpoint."""
        await trio.lowlevel.checkpoint()
        return None

    def is_hot(self, physical_offset: int) -> bool:
        """Whether `read` there surely does not wait for a disk."""
        return False

    # Other duties.

    def send_app(self, peer_id: str, payload: bytes) -> bool:
        """Send over the authenticated peer stream; may get lost. False when not connected or the queue is full."""
        return False

    def transfer_leadership(self, target: str | None = None) -> None:
        """Hand leadership over (to the most advanced peer when None). Does nothing on a follower."""

    async def stop_gracefully(self) -> None:
        """Final sync, clean-stop mark, and `run` returns. Does not transfer leadership. Checkpoint."""
        await trio.lowlevel.checkpoint()

    def save_checkpoint(self, index: int, blob: bytes) -> None:
        """Keep `blob`, the state machine's tables after entry `index`; the next start hands it to `restore`.

        Replaces the previous one atomically. Waits for the disk, so call it in a thread (`env.run_in_thread`).
        """
        raise ValueError("the group has not started")


BODY_OFFSET = HEADER_BYTES
"""From an entry's position to the physical offset of the first byte of its body."""
