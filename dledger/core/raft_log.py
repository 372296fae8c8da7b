"""The log as the state machine sees it: where it ends, how far it is written, synced and committed, and Raft's rules
for comparing it with a leader's (Raft 5.3).

A `LogView` shows what earlier steps have left; `RaftLog` adds what the step under way has decided. It changes nothing
but itself: effects are the business of `raft.py`, which asks the questions.
"""

from __future__ import annotations

from collections.abc import Sequence

from dledger.core.errors import PromiseBroken
from dledger.core.log import LogView
from dledger.core.messages import Append
from dledger.core.types import Entry, next_position

UNKNOWN_POSITION = -1


class RaftLog:
    """One node's log. Attributes are for reading, but for `commit_index`, which whoever counts moves.

    `view` is the log as recovered, all of it on stable storage. `commit_index` may name an entry that is committed for
    sure; only what is committed is ever trimmed.
    """

    __slots__ = (
        "_segment_bytes",
        "commit_index",
        "durable_index",
        "last_crc",
        "last_index",
        "last_term",
        "position_end",
        "view",
        "written_index",
    )

    def __init__(self, view: LogView, commit_index: int, segment_bytes: int) -> None:
        self.view = view
        self._segment_bytes = segment_bytes
        self.last_index = view.last_index
        self.last_term = view.last_term
        crc = view.head_crc_at(view.last_index)
        self.last_crc = 0 if crc is None else crc
        self.position_end = view.position_end
        self.written_index = self.last_index
        self.durable_index = self.last_index
        self.commit_index = min(max(commit_index, view.first_index - 1), self.last_index)

    @property
    def first_index(self) -> int:
        """First retained entry, as in `LogView`."""
        return self.view.first_index

    def term_at(self, index: int) -> int | None:
        """As the view, which shows appended entries only after their step; of the last one during that step too."""
        if index == self.last_index:
            return self.last_term
        return None if index > self.last_index else self.view.term_at(index)

    def last_not_above(self, index: int, term: int) -> tuple[int, int]:
        """Our last entry at or below `index` whose term is at or below `term`: the hint of either side (raft.md 4.4).

        Terms never fall along a log, so this is a binary search.
        """
        low = self.view.first_index - 1
        high = min(index, self.last_index)
        if high <= low:
            high_term = self.term_at(max(high, low))
            return max(high, 0), 0 if high_term is None else high_term
        while low < high:
            middle = (low + high + 1) // 2
            middle_term = self.term_at(middle)
            if middle_term is not None and middle_term <= term:
                low = middle
            else:
                high = middle - 1
        low_term = self.term_at(low)
        return low, 0 if low_term is None else low_term

    def has_predecessor(self, message: Append) -> bool:
        """Do we hold the very entry before the leader's? (Raft 5.3, consistency check)

        Raises PromiseBroken where it contradicts what is committed or what is intact.
        """
        index = message.prev_index
        term: int | None = self.last_term
        crc: int | None = self.last_crc
        if index != self.last_index:
            if index > self.last_index:
                return False
            if index < self.view.first_index - 1:
                # Purged here, hence committed: no conflict and nothing to delete (openraft#511).
                return True
            term, crc = self.view.term_at(index), self.view.head_crc_at(index)
        if term != message.prev_term:
            if index <= self.commit_index:
                raise PromiseBroken(
                    f"committed entry {index} has term {term} here and {message.prev_term} at the leader"
                )
            return False
        if crc != message.prev_crc:
            raise PromiseBroken(f"entry {index} of term {term} differs from the leader's: one of the two is damaged")
        return True

    def compare(self, entries: Sequence[Entry]) -> tuple[int, bool]:
        """How many of the leader's entries are here already, and whether the next one is another than ours, which then
        has to be cut: never without a true conflict (Raft 5.3; a late message shortens nothing).

        Raises PromiseBroken for an entry of equal term and another checksum: that is damage and not a conflict.
        """
        known = 0
        for entry in entries:
            index = entry.index
            if index > self.last_index:
                break
            term = self.term_at(index)
            if term is None and index < self.view.first_index:
                known += 1
                continue
            if term != entry.term:
                return known, True
            crc = self.last_crc if index == self.last_index else self.view.head_crc_at(index)
            if crc != entry.head_crc:
                raise PromiseBroken(
                    f"entry {index} of term {term} differs from the leader's: one of the two is damaged"
                )
            known += 1
        return known, False

    def cut(self, from_index: int) -> None:
        """Forget `from_index` and all behind it. Raises PromiseBroken where that would take back what is committed."""
        if from_index <= self.commit_index:
            raise PromiseBroken(f"asked to cut committed entry {from_index}; the commit index is {self.commit_index}")
        view, keep = self.view, from_index - 1
        term, crc = view.term_at(keep), view.head_crc_at(keep)
        if term is None or crc is None:
            raise PromiseBroken(f"asked to cut at {from_index}, before the first retained entry")
        kept = view.entries(keep, 1) if keep >= view.first_index else ()
        self.last_index, self.last_term, self.last_crc = keep, term, crc
        self.position_end = kept[0].end if kept else UNKNOWN_POSITION if keep else 0
        self.written_index = min(self.written_index, keep)
        self.durable_index = min(self.durable_index, keep)

    def append(self, entries: Sequence[Entry]) -> None:
        """These follow our last entry. Raises PromiseBroken where they lie elsewhere on disk than our log ends."""
        first, last = entries[0], entries[-1]
        if self.position_end != UNKNOWN_POSITION and first.position != next_position(
            self.position_end, len(first.frame), self._segment_bytes
        ):
            raise PromiseBroken(
                f"entry {first.index} claims position {first.position}; our log ends at {self.position_end}"
            )
        self.last_index, self.last_term, self.last_crc = last.index, last.term, last.head_crc
        self.position_end = last.end

    def note_mark(self, index: int, term: int, is_durable: bool) -> bool:
        """The disk has come to entry `index` of `term`. False for one that no longer counts."""
        if self.term_at(index) != term:
            # The entry was cut after the write began (raft.md 4.4).
            return False
        if index > self.written_index:
            self.written_index = index
        if is_durable and index > self.durable_index:
            self.durable_index = index
        return True
