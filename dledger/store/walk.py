"""One pass over the segments, frame by frame: which entries are intact, and where a hole is (raft.md 4.6).

The walk knows the identity of the last good entry. A frame that continues it is taken; anything else opens a hole, and
the walk looks for the next frame it can believe. A frame behind a hole is believed when its side row says the same, or
when there is no row and the frames after it go on from it. Where intact frames contradict each other, one side is an
older copy: `dledger.store.survey` tells from behind which, as a frame proves what lies before it by its checksum and
never what lies behind. Whatever neither a side row nor the survey confirms before the hole belongs to it too.

The walk judges nothing: `dledger.store.recovery` decides with the evidence what is damage and what a torn tail.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from attrs import define, field, frozen

from dledger.core.types import HEADER_BYTES, BadFrame, Entry, Header, next_position, parse_entry, unpack_header
from dledger.errors import LogDamaged
from dledger.store.faults import FaultyRange
from dledger.store.rows import ROW_BYTES, Row, last_row, row_of, suppress_disk_full, unpack_row
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
    """Damage for certain: the disk does not give some of the bytes back, or the log lacks its first segment."""
    is_missing: bool = False
    """There is no file."""


@define
class Completion:
    """Side rows to be written where no fault reaches back to their segment."""

    segment: Segment
    taken: dict[int, bytes]
    there: bytes


@frozen
class Standing:
    """What the believed first frame of the following segment says about a segment (see `dledger.store.survey`)."""

    frames: bool = False
    """The frames lead to it: they are of the log, all that are intact."""
    rows: bool = False
    """The side rows lead to it."""
    is_superseded: bool = False
    """Neither does, and nothing is damaged: the file is an older copy or another log's."""


UNPROVEN = Standing()


@define
class Walk:
    """State of the walk."""

    last: LastEntry
    segment_bytes: int
    durable_mark: int = 0
    hint_is_evidence: bool = False
    is_cache_kept: bool = False
    rows_evidence: dict[int, int] = field(factory=dict)
    """Last entry that the side rows of a segment tell of, by the segment's start."""
    commit_hint: int = 0
    entries: int = 0
    hole: Hole | None = None
    faults: list[FaultyRange] = field(factory=list)
    before: list[LastEntry] = field(factory=list)
    """What lies before each fault."""
    unreadable: list[bool] = field(factory=list)
    """Of each fault, as of its `Hole`."""
    dirty_gaps: list[int] = field(factory=list)
    """Ends of entries behind which their segment should hold nothing but zeros."""
    completions: list[Completion] = field(factory=list)
    _base: int = -1
    _segment_starts: list[LastEntry] = field(factory=list)
    _confirmed: LastEntry = field(factory=LastEntry)

    def __attrs_post_init__(self) -> None:
        self._confirmed = self.last  # the base record's

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
            self._segment_starts.append(self.last)
        if self.hole is not None:  # nothing is missing: only the gap at the end of the segment before is not clean
            self.dirty_gaps.append(self.hole.before.end)
            self.hole = None
        self.last = last
        self.commit_hint = max(self.commit_hint, commit_hint)
        if confirmed:
            self._confirmed = last

    def open_hole(self, reason: str, *, contradicts: bool, unreadable: bool = False, is_missing: bool = False) -> None:
        if self.hole is None:
            self.hole = Hole(self.last, reason, contradicts, unreadable, is_missing)

    @property
    def front_is_confirmed(self) -> bool:
        """Whether what lies before the hole is as good as proven and seems to be all there was."""
        hole = self.hole
        return hole is not None and hole.contradicts and not hole.is_missing and hole.before == self._confirmed

    def close_hole(self, entry: Entry, *, proven: bool) -> bool:
        """Take `entry` as the end of the hole; False where it cannot be that.

        Whatever contradicts a `proven` entry gives way to it, however far back.
        """
        hole = self.hole
        assert hole is not None
        before = hole.before
        is_within = before.end > entry.position - entry.position % self.segment_bytes
        if (hole.contradicts or not is_within) and before.index < self.evidence:
            before = self._confirmed
            starts = self._segment_starts if proven else self._segment_starts[-1:]
            for start in reversed(starts):
                if _has_room(before, entry):
                    break
                before = min(before, start, key=_index)  # all of that segment is another log's
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
        self.last = before
        self._confirmed = min(self._confirmed, before, key=_index)
        while self._segment_starts and self._segment_starts[-1].index > before.index:
            self._segment_starts.pop()
        return True


def _index(entry: LastEntry) -> int:
    return entry.index


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


class SegmentRows:
    """What the side rows of a segment say about its entries."""

    def __init__(self, segment: Segment) -> None:
        self.data, _ = read_around(segment.rows, segment.rows.size(), 0)
        self.first_index = 0
        row = last_row(segment.rows)
        self.last_index = row.index if row is not None else 0
        self._by_position: list[tuple[int, int, int, int]] | None = None
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
        """Whether some row puts another entry on these bytes, or has this one elsewhere."""
        if self._by_position is None:
            found = (unpack_row(self.data, offset) for offset in range(0, len(self.data), ROW_BYTES))
            self._by_position = sorted((row.position, row.end, row.index, row.head_crc) for row in found if row)
        rows = self._by_position
        number = bisect_left(rows, (entry.end, 0, 0, 0))
        if number < len(rows) and rows[number][2] <= entry.index:
            return True
        if number == 0:
            return False
        position, end, index, head_crc = rows[number - 1]
        if end <= entry.position:
            return index >= entry.index
        return (position, head_crc) != (entry.position, entry.head_crc)

    def forget(self) -> None:
        self.data, self.first_index, self._by_position = b"", 0, []


def walk_segment(segment: Segment, standing: Standing, walk: Walk) -> None:
    """Verify every frame of a segment, sync what is good, and note the side rows that it should have."""
    reader = FrameReader(segment)
    rows = SegmentRows(segment)
    taken: dict[int, bytes] = {}
    if standing.is_superseded:
        walk.open_hole("an older copy or another log's segment", contradicts=True)
        _finish(segment, rows, taken, False, walk)
        return
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
                if not standing.rows and (standing.frames or verdict.term < entry.term):
                    rows.forget()  # an older copy of the rows: the frames are right
                    walk.rows_evidence.pop(segment.base, None)
                    verdict = None
                else:
                    walk.open_hole("the side rows tell of another entry there", contradicts=True)
                    is_foreign, entry = True, None
        else:
            if walk.hole is None and not _open_hole(segment, offset, entry, walk):
                break
            if entry is not None and not standing.frames:
                told = max((index for base, index in walk.rows_evidence.items() if base < segment.base), default=0)
                is_foreign = is_foreign or entry.index <= max(walk.last.index + 1, told)
            entry = None
        if entry is None:
            is_whole = False
            entry = _find_end(reader, rows, offset, is_foreign, standing, walk)
            if entry is None:
                break
            offset = entry.position - segment.base
            row = row_of(entry)
            verdict = rows.about(entry, row)
        elif walk.hole is not None and not taken:
            is_whole = True  # the hole was a gap that is not clean, nothing is missing
        last = LastEntry(entry.index, entry.term, entry.head_crc, entry.end)
        walk.take(segment, last, entry.commit_hint, confirmed=verdict is True or standing.frames)
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


def _find_end(
    reader: FrameReader, rows: SegmentRows, offset: int, is_foreign: bool, standing: Standing, walk: Walk
) -> Entry | None:
    for entry in reader.entries_behind(offset):
        if rows.deny(entry):
            if standing.rows or not standing.frames:
                continue
            rows.forget()  # the frames are proven, those rows are not theirs
        agreed = rows.about(entry, row_of(entry)) is True
        if not agreed and (is_foreign or not reader.leads_on(entry)):
            continue
        is_proven = standing.frames or (agreed and standing.rows)
        if not is_proven and walk.front_is_confirmed and not (agreed and rows.last_index >= walk.durable_mark):
            continue  # nobody vouches for it, and what it contradicts is whole
        if walk.close_hole(entry, proven=is_proven):
            return entry
    return None


def _finish(segment: Segment, rows: SegmentRows, taken: dict[int, bytes], is_whole: bool, walk: Walk) -> None:
    if taken:
        segment.file.sync_now()
    if not is_whole:
        segment.known = taken
        segment.first_index = rows.first_index or next(iter(taken), walk.last.index + 1)
    elif taken:
        segment.first_index = next(iter(taken))
        walk.completions.append(Completion(segment, taken, rows.data))


def complete_rows(walk: Walk, faults: Sequence[FaultyRange], end: LastEntry) -> None:
    """Write the side rows of segments that turned out to be the log's: only now, for the old ones are evidence.

    None for entries behind `end`, which are going to be cut.
    """
    for each in walk.completions:
        taken = {index: row for index, row in each.taken.items() if index <= end.index}
        if not taken:
            continue
        last = max(taken)
        # Rows of a fault right behind the segment's frames are in its file, and tell that it is no older copy.
        if any(fault.first_index <= last + 1 and min(taken) <= (fault.last_index or last) for fault in faults):
            each.segment.known = taken
            continue
        keep_rows(each.segment, taken, each.there)
        tells_of = walk.rows_evidence.get(each.segment.base, 0)
        if (tells_of <= last or last < end.index) and each.segment.rows.size() > len(taken) * ROW_BYTES:
            each.segment.rows.truncate(len(taken) * ROW_BYTES)


def keep_rows(segment: Segment, taken: dict[int, bytes], there: bytes) -> None:
    """Make `taken`, every entry of a segment, its side rows."""
    segment.first_index = next(iter(taken))
    segment.known = None
    wanted = b"".join(taken.values())
    if there[: len(wanted)] != wanted:
        with suppress_disk_full():
            segment.rows.pwrite(wanted, 0)
