"""One pass over the segments, frame by frame: which entries are intact, and where a hole is (raft.md 4.6).

The walk knows the identity of the last good entry. A frame that continues it is taken; anything else opens a hole, and
the walk looks for the next frame it can believe. A frame behind a hole is believed when its side row says the same, or
when there is no row and the frames after it go on from it. Where intact frames contradict each other, one side is an
older copy: then what no side row confirms before the hole belongs to it too.

The walk judges nothing: `dledger.store.recovery` decides with the evidence what is damage and what a torn tail.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from attrs import define, field, frozen

from dledger.core.types import HEADER_BYTES, BadFrame, Entry, Header, next_position, parse_entry, unpack_header
from dledger.errors import LogDamaged
from dledger.store.faults import FaultyRange
from dledger.store.rows import ROW_BYTES, Row, row_of, suppress_disk_full, unpack_row
from dledger.store.segments import Segment, read_around

READ_AHEAD = 1 << 20
_MAGIC = b"GLRQ"  # FRAME_MAGIC as it lies on disk
_NEWER = "is newer than this program knows"


@frozen
class LastEntry:
    """Identity of the last entry of a log; all zero before the first."""

    index: int = 0
    term: int = 0
    head_crc: int = 0
    end: int = 0


@define
class Hole:
    """Bytes behind `before` that are not its continuation."""

    before: LastEntry
    reason: str
    contradicts: bool
    """No bytes are damaged there: an end too early, or another log's frames."""
    unreadable: bool = False


@define
class Walk:
    """State of the walk."""

    last: LastEntry
    segment_bytes: int
    durable_mark: int = 0
    hint_is_evidence: bool = False
    rows_evidence: dict[int, int] = field(factory=dict)
    """Last entry that the side rows of a segment tell of, by the segment's start."""
    commit_hint: int = 0
    entries: int = 0
    hole: Hole | None = None
    faults: list[FaultyRange] = field(factory=list)
    before: list[LastEntry] = field(factory=list)
    """What lies before each fault."""
    unreadable: list[bool] = field(factory=list)
    dirty_gaps: list[int] = field(factory=list)
    """Ends of entries behind which their segment should hold nothing but zeros."""
    _base: int = -1
    _segment_start: LastEntry = field(factory=LastEntry)
    _confirmed: LastEntry = field(factory=LastEntry)

    @property
    def evidence(self) -> int:
        """Every entry up to here was once on stable storage."""
        hint = self.commit_hint if self.hint_is_evidence else 0
        return max(self.durable_mark, hint, *self.rows_evidence.values(), 0)

    def is_next(self, head: Entry | Header) -> bool:
        """Whether a frame continues the last entry."""
        last = self.last
        return (
            head.index == last.index + 1
            and head.prev_crc == last.head_crc
            and head.term >= last.term
            and head.position == next_position(last.end, head.end - head.position, self.segment_bytes)
        )

    def take(self, segment: Segment, last: LastEntry, commit_hint: int, *, confirmed: bool) -> None:
        """Go on behind an entry."""
        if self._base != segment.base:
            self._base = segment.base
            self._segment_start = self._confirmed = self.last
        if self.hole is not None:  # nothing is missing: only the gap at the end of the segment before is not clean
            self.dirty_gaps.append(self.hole.before.end)
            self.hole = None
        self.last = last
        self.commit_hint = max(self.commit_hint, commit_hint)
        if confirmed:
            self._confirmed = last

    def open_hole(self, reason: str, *, contradicts: bool, unreadable: bool = False) -> None:
        if self.hole is None:
            self.hole = Hole(self.last, reason, contradicts, unreadable)

    def close_hole(self, entry: Entry) -> bool:
        """Take `entry` as the end of the hole; False where it cannot be that."""
        hole = self.hole
        assert hole is not None
        before = hole.before
        if hole.contradicts and before.index < self.evidence:
            before = self._confirmed
            if not _has_room(before, entry):
                before = self._segment_start  # nothing is missing in between: all of that segment is another log's
        faults, unreadable = len(self.faults), hole.unreadable
        while faults and before.index <= (self.faults[faults - 1].last_index or 0):
            faults -= 1  # the contradiction reaches back to an earlier hole: both are one
            before = self.before[faults]
            unreadable = unreadable or self.unreadable[faults]
        if not _has_room(before, entry):
            return False
        del self.faults[faults:], self.before[faults:], self.unreadable[faults:]
        self.faults.append(
            FaultyRange(
                before.index + 1,
                entry.index - 1,
                before.end,
                entry.position,
                before.head_crc,
                entry.prev_crc,
                hole.reason,
            )
        )
        self.before.append(before)
        self.unreadable.append(unreadable)
        self.hole = None
        return True


def _has_room(before: LastEntry, entry: Entry) -> bool:
    """Whether at least one entry is missing between the two, and whether so many could lie there."""
    missing = entry.index - before.index - 1
    return missing >= 1 and entry.position - before.end >= missing * HEADER_BYTES and entry.term >= before.term


class FrameReader:
    """Frames of one segment, read ahead."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._window = b""
        self._start = 0
        self.is_readable = True

    def entry_at(self, offset: int) -> Entry | None:
        """The intact frame that begins at `offset` and says so. Raises LogDamaged for a newer version's frame."""
        entry = _parse(self._window, offset - self._start) if self._start <= offset else None
        if entry is None:  # maybe only because the window ends: look again at the bytes themselves
            self._window, self._start = self._read(READ_AHEAD, offset), offset
            entry = _parse(self._window, 0)
            if entry is None:
                length = _frame_length(self._window)
                if length > len(self._window):
                    self._window = self._read(length, offset)
                    entry = _parse(self._window, 0)
        if entry is None or entry.position != self._segment.base + offset:
            return None
        return entry

    def entries_behind(self, offset: int) -> Iterator[Entry]:
        """Every intact frame at or behind `offset` that says it lies where it does. Overlapping ones too."""
        base, nbytes = self._segment.base, self._segment.nbytes
        while offset < nbytes:
            window = self._read(READ_AHEAD + len(_MAGIC) - 1, offset)
            found = window.find(_MAGIC)
            while found >= 0:
                entry = self.entry_at(offset + found)
                if entry is not None and entry.position == base + offset + found:
                    yield entry
                found = window.find(_MAGIC, found + 1)
            offset += READ_AHEAD

    def leads_on(self, entry: Entry) -> bool:
        """Whether the bytes behind a frame belong to it: its successor, or nothing."""
        offset = entry.end - self._segment.base
        head = self._read(HEADER_BYTES, offset)
        if not head.strip(b"\0"):
            return True
        following = self.entry_at(offset)
        return following is not None and following.prev_crc == entry.head_crc and following.index == entry.index + 1

    def _read(self, nbytes: int, offset: int) -> bytes:
        data, readable = read_around(self._segment.file, min(nbytes, self._segment.nbytes - offset), offset)
        self.is_readable = self.is_readable and readable
        return data


def _parse(window: bytes, offset: int) -> Entry | None:
    try:
        return parse_entry(window, offset)
    except BadFrame as error:
        if _NEWER in str(error):
            raise LogDamaged(str(error)) from error
        return None


def _frame_length(window: bytes) -> int:
    try:
        return HEADER_BYTES + unpack_header(window).body_len
    except BadFrame:
        return 0


def frame_at_start(segment: Segment) -> Entry | None:
    """The first frame of a segment, where it is intact."""
    return FrameReader(segment).entry_at(0)


class _SegmentRows:
    """What the side rows of a segment say about its entries."""

    def __init__(self, segment: Segment) -> None:
        self.data, _ = read_around(segment.rows, segment.rows.size(), 0)
        self.first_index = 0
        self._by_position: list[tuple[int, int, int]] | None = None
        for number in range(len(self.data) // ROW_BYTES):
            row = unpack_row(self.data, number * ROW_BYTES)
            if row is not None:
                self.first_index = row.index - number
                break

    def about(self, entry: Entry, packed: bytes) -> Row | bool | None:
        """True where the row agrees, the other row where it does not, None where there is none."""
        offset = (entry.index - self.first_index) * ROW_BYTES
        if offset < 0 or not self.first_index:
            return None
        if self.data[offset : offset + ROW_BYTES] == packed:
            return True
        row = unpack_row(self.data, offset)
        if row is None or row.index != entry.index:
            return None
        return True if (row.head_crc, row.position) == (entry.head_crc, entry.position) else row

    def deny(self, entry: Entry) -> bool:
        """Whether some row puts another entry on these bytes."""
        if self._by_position is None:
            found = (unpack_row(self.data, offset) for offset in range(0, len(self.data), ROW_BYTES))
            self._by_position = sorted((row.position, row.end, row.head_crc) for row in found if row is not None)
        number = bisect_left(self._by_position, (entry.end, 0, 0))
        if number == 0:
            return False
        position, end, head_crc = self._by_position[number - 1]
        return end > entry.position and (position, head_crc) != (entry.position, entry.head_crc)

    def forget(self) -> None:
        self.data, self.first_index, self._by_position = b"", 0, []


def walk_segment(segment: Segment, following: Segment | None, walk: Walk) -> None:
    """Verify every frame of a segment, sync what is good, and complete its side rows where that is possible."""
    reader = FrameReader(segment)
    rows = _SegmentRows(segment)
    taken: dict[int, bytes] = {}
    is_whole = walk.hole is None
    offset = 0
    is_foreign = False
    while offset + HEADER_BYTES <= segment.nbytes:
        entry = reader.entry_at(offset)
        row = b""
        verdict: Row | bool | None = None
        if entry is not None and walk.is_next(entry):
            row = row_of(entry)
            verdict = rows.about(entry, row)
            if isinstance(verdict, Row):
                if verdict.term < entry.term or _chain_leads_on(reader, entry, following, walk):
                    rows.forget()  # an older copy of the rows: the frames are right
                    walk.rows_evidence.pop(segment.base, None)
                    verdict = None
                else:
                    walk.open_hole("the side rows tell of another entry there", contradicts=True)
                    is_foreign, entry = True, None
        else:
            if walk.hole is None:
                if not _open_hole(segment, offset, entry, walk):
                    break
                is_foreign = entry is not None and entry.index <= walk.last.index + 1
            entry = None
        if entry is None:
            is_whole = False
            entry = _find_end(reader, rows, offset, is_foreign, walk)
            if entry is None:
                break
            offset = entry.position - segment.base
            row = row_of(entry)
            verdict = rows.about(entry, row)
        elif walk.hole is not None and not taken:
            is_whole = True  # the hole was a gap that is not clean, nothing is missing
        last = LastEntry(entry.index, entry.term, entry.head_crc, entry.end)
        walk.take(segment, last, entry.commit_hint, confirmed=verdict is True)
        walk.entries += 1
        taken[entry.index] = row
        offset = entry.end - segment.base
    if walk.hole is not None and not reader.is_readable:
        walk.hole.unreadable = True
    segment.is_readable = segment.is_readable and reader.is_readable
    _finish(segment, rows, taken, is_whole and walk.hole is None, walk)


def _open_hole(segment: Segment, offset: int, entry: Entry | None, walk: Walk) -> bool:
    """Open a hole where the bytes at `offset` are not the next entry; False where the segment's frames just end."""
    if entry is not None:
        walk.open_hole("entries of another log or an older copy follow", contradicts=True)
        return True
    was_readable, segment.is_readable = segment.is_readable, True
    nonzero = segment.nonzero_from(offset)
    is_readable, segment.is_readable = segment.is_readable, segment.is_readable and was_readable
    if nonzero is None and is_readable:
        return False
    walk.open_hole("the entry is damaged", contradicts=False, unreadable=not is_readable)
    return True


def _find_end(reader: FrameReader, rows: _SegmentRows, offset: int, is_foreign: bool, walk: Walk) -> Entry | None:
    for entry in reader.entries_behind(offset):
        if rows.deny(entry):
            continue
        if rows.about(entry, row_of(entry)) is not True and (is_foreign or not reader.leads_on(entry)):
            continue
        if walk.close_hole(entry):
            return entry
    return None


def _chain_leads_on(reader: FrameReader, entry: Entry, following: Segment | None, walk: Walk) -> bool:
    """Whether the frames from `entry` on form a chain into the next segment, one that its own side rows do not deny:
    two older copies in a row lead on, too."""
    if following is None or (head := frame_at_start(following)) is None:
        return False
    if _is_denied(following, head):
        return False
    current: Entry | None = entry
    while current is not None:
        if head.prev_crc == current.head_crc and head.index == current.index + 1:
            return True
        after = reader.entry_at(current.end % walk.segment_bytes) if current.end % walk.segment_bytes else None
        current = after if after is not None and after.prev_crc == current.head_crc else None
    return False


def _is_denied(segment: Segment, head: Entry) -> bool:
    """Whether side rows tell of other entries than the frames from `head`, the first one, on."""
    reader, rows = FrameReader(segment), _SegmentRows(segment)
    current: Entry | None = head
    while current is not None:
        if isinstance(rows.about(current, row_of(current)), Row) or rows.deny(current):
            return True
        offset = current.end - segment.base
        after = reader.entry_at(offset) if offset < segment.nbytes else None
        current = after if after is not None and after.prev_crc == current.head_crc else None
    return False


def _finish(segment: Segment, rows: _SegmentRows, taken: dict[int, bytes], is_whole: bool, walk: Walk) -> None:
    if taken:
        segment.file.sync_now()
    if not is_whole:
        segment.known = taken
        segment.first_index = rows.first_index or next(iter(taken), walk.last.index + 1)
    elif taken:
        keep_rows(segment, taken, rows.data)
        if len(rows.data) > len(taken) * ROW_BYTES and walk.rows_evidence.get(segment.base, 0) <= walk.last.index:
            segment.rows.truncate(len(taken) * ROW_BYTES)


def keep_rows(segment: Segment, taken: dict[int, bytes], there: bytes) -> None:
    """Make `taken`, every entry of a segment, its side rows."""
    segment.first_index = next(iter(taken))
    segment.known = None
    wanted = b"".join(taken.values())
    if there[: len(wanted)] != wanted:
        with suppress_disk_full():
            segment.rows.pwrite(wanted, 0)
