"""Which segments belong to the log, told from the end of it to its beginning (raft.md 4.6).

A frame's `prev_crc` proves the entry before it, and through that entry's own checksum everything before; what follows
an entry is proven by nothing in it. So where files contradict each other, the first frame of a segment that is
believed says which entry the segment before must end with: frames or side rows that end so are the log's, and a file
whose end is not damaged and is another entry is an older copy, or another log's, with its side rows too.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from dledger.core.types import HEADER_BYTES, BadFrame, parse_entry
from dledger.store.rows import Row, last_row, read_row
from dledger.store.segments import Segment, read_around
from dledger.store.walk import UNPROVEN, FrameReader, SegmentRows, Standing, frame_at_start


@frozen
class _Link:
    """The entry that a segment must end with."""

    index: int
    head_crc: int
    is_strong: bool
    """What says so has its own witness, and may prove others wrong."""


class Survey:
    """Standings of segments, ascending; found out at the first question, as only damage asks."""

    def __init__(self, segments: Sequence[Segment], durable_mark: int) -> None:
        self._segments = segments
        self._durable_mark = durable_mark
        self._standings: dict[int, Standing] = {}

    def standing(self, number: int) -> Standing:
        """Of the segment with that number. Blocks: reads it and those behind it, unless their ends are enough."""
        if number == len(self._segments) - 1:
            return UNPROVEN  # nothing follows: the log in use, at nearly every start
        if number not in self._standings:
            self._look_back_to(number)
        return self._standings[number]

    def _look_back_to(self, first: int) -> None:
        link: _Link | None = None
        start = 0
        for number in range(len(self._segments) - 1, first - 1, -1):
            segment = self._segments[number]
            if segment.end != start:
                link = None
            standing = self._standings[number] = _standing(segment, link) if link is not None else UNPROVEN
            if number > first:
                is_strong = link is not None and link.is_strong
                last = last_row(segment.rows) if link is None else None
                link = _link_before(segment, standing, is_strong=is_strong)
                if link is not None and last is not None and last.index < self._durable_mark:
                    link = _Link(link.index, link.head_crc, is_strong=False)  # not the end of the log
            start = segment.base


def _standing(segment: Segment, link: _Link) -> Standing:
    last = last_row(segment.rows)
    fits = last is not None and row_fits_frame(segment, last)
    rows = last is not None and (last.index, last.head_crc) == (link.index, link.head_crc)
    if rows and fits:
        return Standing(frames=True, rows=True)
    if last is not None and not fits and not link.is_strong:
        return Standing(rows=rows)  # a witness without its own does not outvote the rows
    # Rows that are merely behind, as a power loss leaves them, spare most of the reading.
    start = last.end - segment.base if last is not None and fits and last.index < link.index else 0
    frames, is_whole = _ends_with(segment, link, start)
    return Standing(frames, rows, is_superseded=link.is_strong and is_whole and not frames and not rows)


def _ends_with(segment: Segment, link: _Link, offset: int) -> tuple[bool, bool]:
    """Whether a segment's frames from `offset` on lead to that entry, and whether only zeros lie behind them."""
    reader = FrameReader(segment)
    found = False
    while offset + HEADER_BYTES <= segment.nbytes:
        entry = reader.entry_at(offset) or next(reader.entries_behind(offset), None)
        if entry is None:
            break
        found = found or (entry.index, entry.head_crc) == (link.index, link.head_crc)
        offset = entry.end - segment.base
    was_readable, segment.is_readable = segment.is_readable, True
    is_whole = segment.nonzero_from(offset) is None and segment.is_readable and reader.is_readable
    segment.is_readable = segment.is_readable and was_readable
    return found, is_whole


def _link_before(segment: Segment, standing: Standing, *, is_strong: bool) -> _Link | None:
    """The entry before a segment, as far as the segment is believed."""
    first = frame_at_start(segment)
    if first is None or standing.is_superseded:
        return None
    row = read_row(segment.rows, 0)
    agreed = row is not None and (row.index, row.position, row.head_crc) == (
        first.index,
        first.position,
        first.head_crc,
    )
    if not agreed and not standing.frames and (standing.rows or SegmentRows(segment).deny(first)):
        return None
    return _Link(first.index - 1, first.prev_crc, agreed or (standing.frames and is_strong))


def row_fits_frame(segment: Segment, row: Row) -> bool:
    """Whether the entry that a side row tells of lies there, intact."""
    offset = row.position - segment.base
    if not 0 <= offset <= segment.nbytes - row.length:
        return False
    try:
        entry = parse_entry(read_around(segment.file, row.length, offset)[0])
    except BadFrame:
        return False
    return entry.head_crc == row.head_crc and entry.index == row.index and entry.position == row.position
