"""What a log consists of after a stop of whatever kind (raft.md 4.6).

Closed segments are trusted when their side rows are complete and the next segment continues their chain; every read
verifies again. The rest is walked frame by frame (`dledger.store.walk`). At a hole there are two cases:

* Evidence that its first entry once was on stable storage (a side row, the durable mark in the meta slot, with sync
  flush a later frame's commit hint), bytes that the disk does not give back, a log without its first segment, or an
  intact frame behind it after a mere kill of the process, which leaves every write before its last one whole: the
  entries are *damaged*. Nothing is cut and everything intact is kept; the range is reported, for this node may have
  acknowledged the entries.
* No evidence: a *torn tail* of writes nobody was promised. It is overwritten with zeros and synced, also when intact
  frames follow it after a power loss, which may persist pages in any order.

Whatever is kept is synced before anybody builds on it: after a mere kill of the process it may be only in the page
cache. So everything found is durable afterwards.
"""

from __future__ import annotations

from attrs import field, frozen

from dledger.core.types import HEADER_BYTES, BadFrame, unpack_header
from dledger.errors import LogDamaged
from dledger.store.base import BaseRecord, read_base
from dledger.store.faults import FaultyRange, clear_suspects, read_suspects
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER
from dledger.store.rows import ROW_BYTES, last_row, read_row
from dledger.store.segments import (
    Segment,
    last_row_at,
    open_segment,
    read_around,
    remove_segments,
    retire_all,
    row_bases,
    segment_bases,
    segment_name,
)
from dledger.store.survey import Survey, row_fits_frame
from dledger.store.walk import READ_AHEAD, LastEntry, Walk, complete_rows, keep_rows, walk_segment
from runtime.model import Files

__all__ = ["LastEntry", "RecoveredLog", "recover_log"]


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


def recover_log(
    files: Files,
    folder: str,
    segment_bytes: int,
    durable_index: int,
    *,
    hint_is_evidence: bool = False,
    is_cache_kept: bool = False,
) -> RecoveredLog:
    """Load a log; `durable_index` is the mark in the meta slot, the others are of `StoreOptions`. Blocks; run it in a
    thread.

    Damage is reported in `faults`; so is the beginning of a trimmed log whose base record is lost, for the peers have
    either the entries or a newer beginning. Raises LogDamaged where it cannot be told what belongs to the log: a newer
    frame version. Raises OSError where the folder cannot be used.
    """
    base = read_base(files, folder) or BaseRecord()
    segments = _open_all(files, folder, segment_bytes, base)
    try:
        return _recover(files, folder, segment_bytes, base, segments, durable_index, hint_is_evidence, is_cache_kept)
    except (LogDamaged, OSError):
        retire_all(segments)
        raise


def _recover(
    files: Files,
    folder: str,
    segment_bytes: int,
    base: BaseRecord,
    segments: list[Segment],
    durable_index: int,
    hint_is_evidence: bool,
    is_cache_kept: bool,
) -> RecoveredLog:
    first_base = base.first_base(segment_bytes)
    walk = Walk(
        LastEntry(base.index, base.term, base.head_crc, base.position),
        segment_bytes,
        durable_index,
        hint_is_evidence,
        is_cache_kept,
        _rows_evidence(files, folder, segments, first_base),
    )
    start = walk.last
    suspects = read_suspects(files, folder)
    survey = Survey(segments, durable_index)
    expected = first_base
    for number, segment in enumerate(segments):
        following = segments[number + 1] if number + 1 < len(segments) else None
        if segment.base != expected:
            reason = f"segment {segment_name(expected)} is missing"
            if number == 0 and not base.index:
                reason += ", and no record says that it was trimmed"
            # No cut removes the first segment, and a trim leaves its record first: evidence enough.
            walk.open_hole(reason, contradicts=True, unreadable=number == 0, is_missing=True)
        expected = segment.end
        if segment.base in suspects or not _is_complete(segment, following, walk):
            walk_segment(segment, survey.standing(number), walk)
    faults, end, is_open = _judge(walk)
    complete_rows(walk, faults, end)
    for gap in walk.dirty_gaps:
        if gap < end.end:
            _clean(segments, gap)
    cut = 0
    if is_open:
        faults.append(_open_fault(walk, end))
    else:
        cut = _cut_tail(files, folder, segments, end, has_faults=bool(faults))
    if not faults and suspects:
        clear_suspects(files, folder)
    return RecoveredLog(
        segments=segments,
        last=end if end.index != start.index or start.index else LastEntry(end=first_base),
        commit_hint=min(walk.commit_hint, end.index),
        entries_walked=walk.entries,
        bytes_cut=cut,
        faults=faults,
        base=base,
    )


def _open_all(files: Files, folder: str, segment_bytes: int, base: BaseRecord) -> list[Segment]:
    for name in files.listdir(f"{folder}/{LOG_FOLDER}"):
        if name.endswith((".new", ".repair")):  # a creation or a repair that was cut short
            files.unlink(f"{folder}/{LOG_FOLDER}/{name}")
    for sub in (LOG_FOLDER, ROWS_FOLDER):
        if not files.exists(f"{folder}/{sub}"):
            files.make_dirs(f"{folder}/{sub}")  # rows can be had again from the frames; the walk does it
    first_base = base.first_base(segment_bytes)
    bases = segment_bases(files, folder)
    there = sorted({*bases, *row_bases(files, folder)})
    for each in there:
        if each % segment_bytes:
            raise LogDamaged(f"segment {segment_name(each)} does not begin at a multiple of {segment_bytes}")
    if below := [each for each in there if each < first_base]:
        remove_segments(files, folder, below)  # a trim that was cut short
    segments: list[Segment] = []
    try:
        for each in bases:
            if each >= first_base:
                segments.append(open_segment(files, folder, each, segment_bytes))
    except OSError:
        retire_all(segments)
        raise
    return segments


def _rows_evidence(files: Files, folder: str, segments: list[Segment], first_base: int) -> dict[int, int]:
    evidence: dict[int, int] = {}
    open_bases = {segment.base for segment in segments}
    for segment in segments:
        row = last_row(segment.rows)
        if row is not None:
            evidence[segment.base] = row.index
    for base in row_bases(files, folder):
        if base in open_bases or base < first_base:
            continue
        row = last_row_at(files, folder, base)
        if row is not None:  # rows go before their segment: this one was not removed in order
            evidence[base] = row.index
    return evidence


def _is_complete(segment: Segment, following: Segment | None, walk: Walk) -> bool:
    """Take a closed segment at its word: its rows cover it and the next segment's first frame goes on from the last."""
    if following is None or following.base != segment.end or walk.hole is not None:
        return False
    try:
        start = unpack_header(read_around(segment.file, HEADER_BYTES, 0)[0])
        head = unpack_header(read_around(following.file, HEADER_BYTES, 0)[0])
    except BadFrame:
        return False
    count = segment.rows.size() // ROW_BYTES
    first, last = read_row(segment.rows, 0), read_row(segment.rows, count - 1) if count else None
    if first is None or last is None:
        return False
    complete = (
        walk.is_next(start)
        and (first.index, first.position, first.head_crc) == (start.index, start.position, start.head_crc)
        and last.index == first.index + count - 1
        and head.index == last.index + 1
        and head.prev_crc == last.head_crc
        and head.position == following.base
        and row_fits_frame(segment, last)
    )
    if complete:
        segment.first_index = first.index
        segment.unverified = bytearray(b"\1") * -(-segment.nbytes // READ_AHEAD)
        end = LastEntry(last.index, last.term, last.head_crc, last.end)
        walk.take(segment, end, head.commit_hint, confirmed=True)
    return complete


def _judge(walk: Walk) -> tuple[list[FaultyRange], LastEntry, bool]:
    """(faults with two ends, the log's last entry, whether behind it there is damage) by the evidence there is."""
    evidence = walk.evidence
    for number, fault in enumerate(walk.faults):
        if fault.first_index > evidence and not (walk.unreadable[number] or walk.is_cache_kept):
            return walk.faults[:number], walk.before[number], False
    unreadable = walk.hole is not None and walk.hole.unreadable
    return walk.faults, walk.last, walk.last.index < evidence or unreadable


def _open_fault(walk: Walk, end: LastEntry) -> FaultyRange:
    return FaultyRange(
        end.index + 1,
        max(walk.evidence, end.index + 1),
        end.end,
        None,
        end.head_crc,
        None,
        walk.hole.reason if walk.hole is not None else "the log ends too early",
    )


def _clean(segments: list[Segment], gap: int) -> None:
    for segment in segments:
        if segment.base < gap < segment.end:
            zero_rest(segment, gap - segment.base)
            return


def _cut_tail(files: Files, folder: str, segments: list[Segment], last: LastEntry, *, has_faults: bool) -> int:
    """Zero what lies behind the last entry; keep at most one clean spare segment. Returns the bytes cut."""
    if not segments:
        return 0
    tail_number = max(0, *(number for number, segment in enumerate(segments) if segment.base < last.end), 0)
    tail = segments[tail_number]
    cut = zero_rest(tail, max(last.end - tail.base, 0))
    dropped: list[Segment] = []
    for number, segment in enumerate(segments[tail_number + 1 :]):
        used = segment.used_from(0)
        if number > 0 or used or segment.base != tail.end:
            cut += used
            dropped.append(segment)
        else:
            segment.first_index, segment.known, segment.unverified = 0, None, None
            segment.rows.truncate(0)
    if tail.known is not None:
        kept = {index: row for index, row in tail.known.items() if index <= last.index}
        if has_faults:
            tail.known = kept
        elif kept:
            keep_rows(tail, kept, b"")
        else:
            tail.first_index, tail.known = 0, None
    if not has_faults:
        rows = last.index + 1 - tail.first_index if tail.first_index else 0
        if tail.rows.size() > rows * ROW_BYTES:
            tail.rows.truncate(rows * ROW_BYTES)
    for segment in dropped:
        segment.close()
        segments.remove(segment)
    bases = {segment.base for segment in segments}
    alone = {base for base in row_bases(files, folder) if base > tail.base and base not in bases}
    if extra := sorted({segment.base for segment in dropped} | alone):
        remove_segments(files, folder, extra)
    return cut


def zero_rest(segment: Segment, offset: int) -> int:
    """Overwrite a segment from `offset` on with zeros, on stable storage. Returns how many bytes were not zero there.

    From the back to the front, so that a crash in between leaves a clean prefix and a torn tail.
    """
    used = segment.used_from(offset)
    if used:
        segment.zero(offset, segment.nbytes)
        segment.file.sync_now()
    return used
