"""The batch a leader is filling: many small proposals become one entry.

Everything here is synchronous and happens between two awaits of whoever calls, so an offset that was handed out is the
offset of the record, and nothing else can get in between. Costs are per batch, except for `reserve` and `add_record`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dledger.core.types import HEADER_BYTES, Entry, EntryType, frame_entry, next_position
from dledger.errors import NotLeader, Overloaded, TooLarge

BATCH_BYTES_MAX = 256 * 1024
BATCH_RECORDS_MAX = 1024


class Proposal:
    """An entry of this leader, and what the state machine keeps for it until it is committed, refused or cut."""

    __slots__ = ("entry", "staged")

    def __init__(self, entry: Entry, staged: Any) -> None:
        self.entry = entry
        self.staged = staged


class OpenBatch:
    """Where the next entries of the leader take shape. Closed (`leading` False) unless this node leads."""

    __slots__ = (
        "_check_room",
        "_end",
        "_entry_bytes_max",
        "_limit",
        "_parts",
        "_position",
        "_reserved",
        "_segment_bytes",
        "_wake",
        "commit_index",
        "leader_id",
        "leading",
        "log_end",
        "next_index",
        "prev_crc",
        "sealed",
        "staged",
        "term",
    )

    def __init__(self) -> None:
        self._segment_bytes = 0
        self._entry_bytes_max = 0
        self._check_room: Callable[[], Overloaded | None] = _no_reason
        self._wake: Callable[[], object] = _no_reason
        self.leading = False
        self.leader_id: str | None = None
        self.term = 0
        self.next_index = 0
        self.log_end = 0
        self.prev_crc = 0
        self.commit_index = 0
        self.sealed: list[Proposal] = []
        self.staged: Any = None
        self._parts: list[bytes] = []
        self._position = 0
        self._end = 0
        self._limit = 0
        self._reserved = -1

    def bind(
        self,
        segment_bytes: int,
        entry_bytes_max: int,
        check_room: Callable[[], Overloaded | None],
        wake: Callable[[], object],
    ) -> None:
        """`check_room` says why no further batch can be opened now, or None; `wake` schedules a driver turn."""
        self._segment_bytes = segment_bytes
        self._entry_bytes_max = entry_bytes_max
        self._check_room = check_room
        self._wake = wake

    def lead(self, term: int, next_index: int, log_end: int, prev_crc: int) -> None:
        """Take proposals of `term`, behind the entry that ends at `log_end`."""
        self.leading = True
        self.term = term
        self.next_index = next_index
        self.log_end = log_end
        self.prev_crc = prev_crc

    def stop(self, leader_id: str | None) -> list[Any]:
        """Take no more proposals; returns what was staged for those that never reached the log, newest first."""
        undo = [proposal.staged for proposal in reversed(self.sealed)]
        if self._parts:
            undo.insert(0, self.staged)
        self.leading = False
        self.leader_id = leader_id
        self.sealed = []
        self._clear()
        return undo

    @property
    def is_empty(self) -> bool:
        """Nothing open and nothing sealed."""
        return not self._parts and not self.sealed

    def reserve(self, record_bytes: int) -> int:
        """Physical offset that the next record, of this size, will get; `add_record` must follow before any await.

        Raises NotLeader, Overloaded (nothing was logged) or TooLarge.
        """
        if self._parts:
            end = self._end
            if end + record_bytes <= self._limit and len(self._parts) < BATCH_RECORDS_MAX:
                self._reserved = record_bytes
                return end
            self.seal()
        return self._open(record_bytes)

    def _open(self, record_bytes: int) -> int:
        position = self._next_position(record_bytes)
        self._position = position
        self._end = position + HEADER_BYTES
        segment_end = position - position % self._segment_bytes + self._segment_bytes
        self._limit = min(self._end + max(BATCH_BYTES_MAX, record_bytes), segment_end)
        self._reserved = record_bytes
        self.staged = None
        self._wake()
        return self._end

    def _next_position(self, body_bytes: int) -> int:
        if not self.leading:
            raise NotLeader(self.leader_id)
        if body_bytes > self._entry_bytes_max:
            raise TooLarge(f"{body_bytes} bytes; an entry holds at most {self._entry_bytes_max}")
        full = self._check_room()
        if full is not None:
            raise full
        return next_position(self.log_end, HEADER_BYTES + body_bytes, self._segment_bytes)

    def add_record(self, record: bytes) -> None:
        """Exactly the reserved record."""
        nbytes = len(record)
        if nbytes != self._reserved:
            raise ValueError(f"a record of {nbytes} bytes where {self._reserved} were reserved")
        self._reserved = -1
        self._parts.append(record)
        self._end += nbytes

    def add_records(self, records: Sequence[bytes]) -> None:
        """Several records, together as long as what was reserved: they share an entry, whatever else is in it."""
        nbytes = sum(map(len, records))
        if nbytes != self._reserved:
            raise ValueError(f"records of {nbytes} bytes where {self._reserved} were reserved")
        self._reserved = -1
        self._parts.extend(records)
        self._end += nbytes

    def seal(self) -> None:
        """Make one entry of the open batch, if there is any record in it."""
        parts = self._parts
        if parts:
            count = len(parts)
            self._frame(self._position, count, parts if count < 4 else [b"".join(parts)], self.staged)
            self._clear()

    def position_for(self, total_bytes: int) -> int:
        """Physical offset of the first byte of the next entry of its own. Seals. Raises as `reserve`."""
        self.seal()
        return self._next_position(total_bytes) + HEADER_BYTES

    def propose(self, records: Sequence[bytes], ops: bytes, staged: Any) -> int:
        """Seal, then frame one entry of its own; returns its index. Raises as `reserve`."""
        self.seal()
        position = self._next_position(sum(map(len, records)) + len(ops))
        self._frame(position, len(records), [*records, ops], staged)
        self._wake()
        return self.next_index - 1

    def _frame(self, position: int, count: int, parts: Sequence[bytes], staged: Any) -> None:
        entry = frame_entry(
            self.next_index, self.term, position, EntryType.DATA, count, parts, self.prev_crc, self.commit_index
        )
        self.next_index += 1
        self.log_end = entry.end
        self.prev_crc = entry.head_crc
        self.sealed.append(Proposal(entry, staged))

    def take_sealed(self) -> list[Proposal]:
        """Seal, and hand over what is to be proposed, oldest first."""
        self.seal()
        sealed, self.sealed = self.sealed, []
        return sealed

    def _clear(self) -> None:
        self._parts = []
        self._reserved = -1
        self.staged = None


def _no_reason() -> None:
    return None
