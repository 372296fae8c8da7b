"""A raft group in memory, for tests and benchmarks of the broker: proposals wait for the test to commit or cut them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import define

from dledger.core.types import HEADER_BYTES, Role
from dledger.errors import DiskFull, NotLeader, Overloaded, TooLarge

BATCH_BYTES = 256 * 1024
BATCH_RECORDS = 1024
ENTRY_BYTES = 4 * 1024 * 1024 + 256 * 1024


@define
class MemoryEntry:
    """Stands for a DATA entry; what a state machine sees of it."""

    index: int
    term: int
    position: int
    count: int
    body: memoryview
    staged: Any = None

    @property
    def body_position(self) -> int:
        return self.position + HEADER_BYTES


class MemoryGroup:
    """The facade of dledger.group.RaftGroup without replication. `machine` is told what the test decides."""

    def __init__(self, machine: Any, *, batch_records: int = BATCH_RECORDS, leading: bool = True) -> None:
        self.machine = machine
        self.node_id = "n0"
        self.leader_id: str | None = "n0" if leading else "n1"
        self.term = 1
        self.is_ready_leader = leading
        self.is_serving = True
        self.first_position = 0
        self.committed_position = 0
        self.full = False
        """True: `reserve` raises Overloaded."""
        self.disk_full = False
        """True: `reserve` raises DiskFull."""
        self.reads: list[Callable[[str | None], None]] = []
        """Reads that wait for `settle_reads`, where `holds_reads`; else they are confirmed at once."""
        self.holds_reads = False
        self.entries: list[MemoryEntry] = []
        self.commit_index = 0
        self.turns = 0
        self.checkpoints: list[tuple[int, bytes]] = []
        self._log = bytearray()
        self._batch_records = batch_records
        self._parts: list[bytes] = []
        self._batch_position = 0
        self._batch_end = 0
        self._staged: Any = None

    # ------------------------------------------------------------------------------------------ the facade's proposals

    @property
    def role(self) -> Role:
        return Role.LEADER if self.is_ready_leader else Role.FOLLOWER

    @property
    def end_position(self) -> int:
        return len(self._log)

    def reserve(self, record_bytes: int) -> int:
        if self._parts:
            used = self._batch_end - self._batch_position
            if used + record_bytes <= BATCH_BYTES and len(self._parts) < self._batch_records:
                return self._batch_end
            self.seal()
        self._check(record_bytes)
        self._batch_position = len(self._log)
        self._batch_end = self._batch_position + HEADER_BYTES
        self._staged = None
        return self._batch_end

    def _check(self, nbytes: int) -> None:
        if not self.is_ready_leader:
            raise NotLeader(self.leader_id)
        if self.full:
            raise Overloaded("full")
        if self.disk_full:
            raise DiskFull("full")
        if nbytes > ENTRY_BYTES:
            raise TooLarge(f"{nbytes} bytes")

    def add_records(self, records: Sequence[bytes]) -> None:
        for record in records:
            self.add_record(record)

    def add_record(self, record: bytes) -> None:
        self._parts.append(record)
        self._batch_end += len(record)

    def open_staged(self) -> Any | None:
        return self._staged

    def set_open_staged(self, staged: Any) -> None:
        self._staged = staged

    def seal(self) -> None:
        if self._parts:
            count = len(self._parts)
            parts, self._parts = self._parts, []
            staged, self._staged = self._staged, None
            self._append(count, b"".join(parts), staged)

    def position_for(self, total_bytes: int) -> int:
        self.seal()
        self._check(total_bytes)
        return len(self._log) + HEADER_BYTES

    def propose(self, *, records: Sequence[bytes] = (), ops: bytes = b"", staged: Any) -> int:
        self.seal()
        return self._append(len(records), b"".join((*records, ops)), staged)

    def _append(self, count: int, body: bytes, staged: Any) -> int:
        position = len(self._log)
        self._log += bytes(HEADER_BYTES)
        self._log += body
        index = len(self.entries) + 1
        self.entries.append(MemoryEntry(index, self.term, position, count, memoryview(body), staged))
        return index

    def wake(self) -> None:
        pass

    def read_index(self, told: Callable[[str | None], None]) -> None:
        if self.holds_reads:
            self.reads.append(told)
        else:
            told(None if self.is_ready_leader else "not leader")

    # -------------------------------------------------------------------------------------------- what the test decides

    def settle_reads(self, reason: str | None = None) -> None:
        """A quorum has confirmed what waits; or, with a reason, it has not. Then the turn ends."""
        reads, self.reads = self.reads, []
        for told in reads:
            told(reason)
        self.turn()

    def commit(self, entries: int | None = None) -> None:
        """Commit the next `entries` entries (all when None), then end the turn."""
        self.seal()
        last = len(self.entries) if entries is None else min(len(self.entries), self.commit_index + entries)
        while self.commit_index < last:
            entry = self.entries[self.commit_index]
            self.commit_index += 1
            self.machine.apply(entry.index, entry.term, entry.staged)
        # As the driver does it: what is applied can be read when all of it is.
        if last:
            entry = self.entries[last - 1]
            self.committed_position = entry.body_position + len(entry.body)
        self.turn()

    def turn(self) -> None:
        """The end of a driver turn."""
        self.turns += 1
        self.machine.turn_done()

    def cut(self, entries: int | None = None) -> None:
        """Discard the newest `entries` uncommitted entries (all when None), newest first."""
        self.seal()
        count = len(self.entries) - self.commit_index
        for _ in range(count if entries is None else min(entries, count)):
            entry = self.entries.pop()
            del self._log[entry.position :]
            self.machine.discard(entry.staged)
        self.turn()

    def orphan_all(self) -> None:
        """Tell every waiter that the outcome is unknown."""
        self.seal()
        for entry in self.entries[self.commit_index :]:
            self.machine.orphan(entry.staged)
        self.turn()

    def receive(self, entry: MemoryEntry) -> None:
        """As a follower: take over an entry of another group's log, byte for byte, and stage it."""
        if entry.position != len(self._log):
            raise ValueError(f"entry at {entry.position} does not follow {len(self._log)}")
        self._log += bytes(HEADER_BYTES)
        self._log += entry.body
        copy = MemoryEntry(entry.index, entry.term, entry.position, entry.count, entry.body)
        copy.staged = self.machine.stage(copy)
        self.entries.append(copy)

    def lead(self, *, term: int | None = None) -> None:
        """Become the ready leader."""
        self.term = self.term + 1 if term is None else term
        self.is_ready_leader = True
        self.leader_id = self.node_id
        self.machine.role_changed(Role.LEADER, self.term, self.node_id, True)

    def follow(self, leader_id: str | None = "n1") -> None:
        self.is_ready_leader = False
        self.leader_id = leader_id
        self.machine.role_changed(Role.FOLLOWER, self.term, leader_id, False)

    # ---------------------------------------------------------------------------------------------------------- reading

    def read(self, physical_offset: int, nbytes: int) -> memoryview | None:
        if physical_offset < self.first_position or physical_offset + nbytes > self.committed_position:
            return None
        return memoryview(bytes(self._log[physical_offset : physical_offset + nbytes]))

    def read_cached(self, physical_offset: int, nbytes: int) -> bytes | None:
        data = self.read(physical_offset, nbytes)
        return bytes(data) if data is not None else None

    async def read_cold(self, physical_offset: int, nbytes: int) -> bytes | None:
        data = self.read(physical_offset, nbytes)
        return bytes(data) if data is not None else None

    def is_hot(self, physical_offset: int) -> bool:
        return True

    def kick(self) -> None:
        """The test says when entries are committed."""

    def send_app(self, peer_id: str, payload: bytes) -> bool:
        return False

    def save_checkpoint(self, index: int, blob: bytes) -> bool:
        if self.is_serving:
            self.checkpoints.append((index, blob))
        return self.is_serving


class MemoryConnection:
    """A connection that keeps what is written to it."""

    def __init__(self, peer: tuple[str, int] = ("10.0.0.5", 50001)) -> None:
        self.peer = peer
        self.attributes: dict[str, Any] = {}
        self.written: list[bytes] = []
        self.flushes = 0

    @property
    def peer_text(self) -> str:
        return f"{self.peer[0]}:{self.peer[1]}"

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def flush(self) -> None:
        self.flushes += 1

    def take(self) -> bytes:
        """Everything written so far; empty afterwards."""
        data = b"".join(self.written)
        self.written.clear()
        return data
