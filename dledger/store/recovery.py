"""What a log consists of after a stop of whatever kind (raft.md 4.6).

Closed segments are trusted when their side rows are complete and the next segment continues their chain; every read
verifies again. The rest is walked frame by frame: header, body, position, index, and the chain of `prev_crc`. At the
first bad frame there are two cases:

* Evidence that this entry once was on stable storage (a side row, the durable mark in the meta slot): the bytes are
  *damaged*. Nothing is cut; the node refuses to serve, for it may have acknowledged the entry.
* No evidence: a *torn tail* of writes nobody was promised. It is overwritten with zeros and synced, also when intact
  frames follow it, because a power loss may persist pages in any order.

Whatever is kept is synced before anybody builds on it: after a mere kill of the process it may be only in the page
cache. So everything found is durable afterwards.
"""

from __future__ import annotations

from itertools import pairwise

from attrs import define, field, frozen

from dledger.core.types import HEADER_BYTES, BadFrame, Entry, next_position, parse_entry, unpack_header
from dledger.errors import LogDamaged
from dledger.store.base import BaseRecord
from dledger.store.faults import FaultyRange
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER
from dledger.store.rows import ROW_BYTES, Row, last_row, pack_row, read_row, suppress_disk_full
from dledger.store.segments import Segment, open_segment, remove_segment, segment_bases, segment_name
from runtime.model import Files

_READ_AHEAD = 1 << 20


@frozen
class LastEntry:
    """Identity of the last entry of a log; all zero before the first."""

    index: int = 0
    term: int = 0
    head_crc: int = 0
    end: int = 0


@frozen(kw_only=True)
class RecoveredLog:
    """What the folder holds, all of it on stable storage."""

    segments: list[Segment]
    """Ascending; the last one may be an empty spare."""
    last: LastEntry
    commit_hint: int
    """Entries up to here are committed for certain."""
    entries_walked: int
    bytes_cut: int
    faults: list[FaultyRange] = field(factory=list)
    """Damaged or missing ranges, ascending; only the last one may have an open end. Empty: the log may be served."""
    base: BaseRecord = field(factory=BaseRecord)
    """What lay before the first retained entry."""


@define
class _Walk:
    """State of the walk: the identity that the next frame must continue."""

    last: LastEntry
    chain_known: bool
    """False before the first entry of a log whose head was trimmed: its chain is taken as it is."""
    commit_hint: int = 0
    entries: int = 0


def recover_log(files: Files, folder: str, segment_bytes: int, durable_index: int) -> RecoveredLog:
    """Load a log; `durable_index` is the mark in the meta slot. Blocks; run it in a thread. Raises LogDamaged."""
    segments = _open_all(files, folder, segment_bytes)
    if not segments:
        if durable_index:
            raise LogDamaged(f"the log is empty, but entries up to {durable_index} were once on stable storage")
        return RecoveredLog(segments=[], last=LastEntry(), commit_hint=0, entries_walked=0, bytes_cut=0)
    base = segments[0].base
    walk = _Walk(LastEntry(end=base), chain_known=base == 0)
    tail_number = 0
    for number, segment in enumerate(segments):
        tail_number = number
        following = segments[number + 1] if number + 1 < len(segments) else None
        if following is not None and _is_complete(segment, following, walk):
            continue
        _walk_segment(segment, walk)
        if following is None or segment.nonzero_from(max(walk.last.end - segment.base, 0)) is not None:
            break
        if not _continues(following, walk):
            break
    evidence = max([durable_index, *(_rows_evidence(segment) for segment in segments[tail_number:])])
    if evidence > walk.last.index:
        raise LogDamaged(
            f"entry {walk.last.index + 1} at position {walk.last.end} is damaged or missing, although entries up to"
            f" {evidence} were once on stable storage; refusing to serve (copy the data folder of a healthy peer)"
        )
    cut = _cut_tail(files, folder, segments, tail_number, walk.last)
    return RecoveredLog(
        segments=segments,
        last=walk.last if walk.last.index else LastEntry(end=base),
        commit_hint=min(walk.commit_hint, walk.last.index),
        entries_walked=walk.entries,
        bytes_cut=cut,
    )


def _open_all(files: Files, folder: str, segment_bytes: int) -> list[Segment]:
    bases = segment_bases(files, folder)
    for base, following in pairwise(bases):
        if following != base + segment_bytes:
            raise LogDamaged(f"segment {segment_name(base + segment_bytes)} is missing")
    if bases and bases[0] % segment_bytes:
        raise LogDamaged(f"segment {segment_name(bases[0])} does not begin at a multiple of {segment_bytes}")
    for name in files.listdir(f"{folder}/{LOG_FOLDER}"):
        if name.endswith(".new"):  # a segment whose creation was cut short
            files.unlink(f"{folder}/{LOG_FOLDER}/{name}")
    if bases and not files.exists(f"{folder}/{ROWS_FOLDER}"):
        files.make_dirs(f"{folder}/{ROWS_FOLDER}")  # rows can be had again from the frames; the walk does it
    return [open_segment(files, folder, base, segment_bytes) for base in bases]


def _is_complete(segment: Segment, following: Segment, walk: _Walk) -> bool:
    """Whether a closed segment's rows cover it and the next segment's first frame continues from the last row."""
    try:
        head = unpack_header(following.file.pread(HEADER_BYTES, 0))
    except BadFrame:
        return False
    count = segment.rows.size() // ROW_BYTES
    first, last = read_row(segment.rows, 0), read_row(segment.rows, count - 1) if count else None
    if first is None or last is None:
        return False
    complete = (
        (first.index == walk.last.index + 1 or not walk.chain_known)
        and first.position == segment.base
        and last.index == first.index + count - 1
        and head.index == last.index + 1
        and head.prev_crc == last.head_crc
        and head.position == following.base
        and _row_fits_frame(segment, last)
    )
    if complete:
        segment.first_index = first.index
        walk.last = LastEntry(last.index, last.term, last.head_crc, last.end)
        walk.chain_known = True
        walk.commit_hint = max(walk.commit_hint, head.commit_hint)
    return complete


def _row_fits_frame(segment: Segment, row: Row) -> bool:
    try:
        entry = parse_entry(segment.file.pread(row.length, row.position - segment.base))
    except BadFrame:
        return False
    return entry.head_crc == row.head_crc and entry.index == row.index and entry.position == row.position


def _walk_segment(segment: Segment, walk: _Walk) -> None:
    """Verify frame after frame, sync what is good, and complete the side rows."""
    rows: list[bytes] = []
    offset = 0
    window = b""
    window_start = 0
    while True:
        in_window = offset - window_start
        entry = _entry_at(window, in_window)
        if entry is None:  # maybe only because the window ends: look again at the bytes themselves
            window, window_start = segment.file.pread(_READ_AHEAD, offset), offset
            entry = _entry_at(window, 0)
            if entry is None:
                window = segment.file.pread(_frame_length(window), offset)
                entry = _entry_at(window, 0)
        if entry is None or not _is_next(entry, segment.base + offset, segment.nbytes, walk):
            break
        if not rows:
            segment.first_index = entry.index
        rows.append(pack_row(entry.index, entry.term, entry.position, len(entry.frame), entry.head_crc))
        walk.last = LastEntry(entry.index, entry.term, entry.head_crc, entry.end)
        walk.chain_known = True
        walk.commit_hint = max(walk.commit_hint, entry.commit_hint)
        walk.entries += 1
        offset += len(entry.frame)
    if rows:
        segment.file.sync_now()
        for first in range(0, len(rows), 4096):
            _write_missing_rows(segment, first, b"".join(rows[first : first + 4096]))
        if segment.rows.size() > len(rows) * ROW_BYTES and _rows_evidence(segment) <= walk.last.index:
            segment.rows.truncate(len(rows) * ROW_BYTES)


def _write_missing_rows(segment: Segment, first: int, rows: bytes) -> None:
    offset = first * ROW_BYTES
    if segment.rows.pread(len(rows), offset) != rows:
        with suppress_disk_full():
            segment.rows.pwrite(rows, offset)


def _entry_at(window: bytes, offset: int) -> Entry | None:
    try:
        return parse_entry(window, offset)
    except BadFrame:
        return None


def _frame_length(window: bytes) -> int:
    try:
        return HEADER_BYTES + unpack_header(window).body_len
    except BadFrame:
        return 0


def _is_next(entry: Entry, position: int, segment_bytes: int, walk: _Walk) -> bool:
    if entry.position != position:
        return False
    if not walk.chain_known:
        return True
    last = walk.last
    return (
        entry.index == last.index + 1
        and entry.prev_crc == last.head_crc
        and entry.term >= last.term
        and position == next_position(last.end, len(entry.frame), segment_bytes)
    )


def _continues(following: Segment, walk: _Walk) -> bool:
    """Whether the next segment's first frame is intact and continues the chain."""
    head = following.file.pread(HEADER_BYTES, 0)
    entry = _entry_at(following.file.pread(_frame_length(head), 0), 0)
    return entry is not None and _is_next(entry, following.base, following.nbytes, walk)


def _rows_evidence(segment: Segment) -> int:
    row = last_row(segment.rows)
    return row.index if row is not None else 0


def _cut_tail(files: Files, folder: str, segments: list[Segment], tail_number: int, last: LastEntry) -> int:
    """Zero what lies behind the last entry; keep at most one clean spare segment. Returns the bytes cut."""
    tail = segments[tail_number]
    start = max(last.end - tail.base, 0)
    cut = 0
    if (first := tail.nonzero_from(start)) is not None:
        cut = _zero_chunks(tail, first)
        tail.file.sync_now()
    later = segments[tail_number + 1 :]
    dropped = [segment for number, segment in enumerate(later) if number > 0 or segment.nonzero_from(0) is not None]
    if dropped:
        for segment in reversed(dropped):
            cut += segment.nbytes
            segments.remove(segment)
            remove_segment(files, folder, segment)
        files.sync_dir(f"{folder}/{ROWS_FOLDER}")
        files.sync_dir(f"{folder}/{LOG_FOLDER}")
    return cut


def _zero_chunks(segment: Segment, first: int) -> int:
    """Overwrite every chunk that is not zero, front to back only in the search, and tell how many bytes that were."""
    found: list[tuple[int, int]] = []
    offset: int | None = first
    while offset is not None:
        end = min(offset - offset % _READ_AHEAD + _READ_AHEAD, segment.nbytes)
        found.append((offset, end))
        offset = segment.nonzero_from(end)
    for start, end in reversed(found):
        segment.zero(start, end)
    return sum(end - start for start, end in found)
