"""Closed segments that were not walked at start are verified, chunk by chunk, before anything of them is served."""

from __future__ import annotations

from dledger.core.types import HEADER_BYTES
from dledger.store.faults import EntryDamaged, FaultyRange
from dledger.store.rows import ROW_BYTES, Row, read_row
from dledger.store.segments import Segment
from dledger.store.walk import READ_AHEAD, FrameReader

CHUNK_BYTES = READ_AHEAD


def chunks_of(offset: int, nbytes: int) -> tuple[int, int]:
    """First and last chunk of a range within a segment."""
    return offset // CHUNK_BYTES, (offset + max(nbytes, 1) - 1) // CHUNK_BYTES


def is_verified(segment: Segment, first: int, last: int) -> bool:
    """Whether no frame in these chunks waits for its verification."""
    return segment.unverified is None or not any(segment.unverified[first : last + 1])


def verify_chunks(segment: Segment, first: int, last: int, end: int) -> None:
    """Verify every frame that touches these chunks: checksums, positions, indices and the chain between them.

    `end` is the position behind the segment's last entry. Blocks. Raises EntryDamaged.
    """
    start = segment.base + first * CHUNK_BYTES
    stop = min(segment.base + (last + 1) * CHUNK_BYTES, end)
    row = _row_at(segment, start)
    position, index, prev_crc = segment.base, segment.first_index, None
    if row is not None:
        before = segment.row(row.index - 1) if row.index > segment.first_index else None
        position, index, prev_crc = row.position, row.index, before.head_crc if before is not None else None
    reader = FrameReader(segment)
    while position < stop:
        entry = reader.entry_at(position - segment.base)
        known = segment.row(index)
        if (
            entry is None
            or entry.index != index
            or (prev_crc is not None and entry.prev_crc != prev_crc)
            or (known is not None and known.head_crc != entry.head_crc)
        ):
            raise EntryDamaged(
                FaultyRange(
                    index,
                    index,
                    position,
                    known.end if known is not None else None,
                    prev_crc or 0,
                    known.head_crc if known is not None else None,
                    f"damaged in segment {segment.file.path}",
                )
            )
        position, index, prev_crc = entry.end, index + 1, entry.head_crc
    unverified = segment.unverified
    if unverified is not None:
        unverified[first : last + 1] = bytes(min(last + 1, len(unverified)) - first)
        if not any(unverified):
            segment.unverified = None


def _row_at(segment: Segment, position: int) -> Row | None:
    """The side row of the entry that `position` lies in, or of the last one before it; None to begin at the start."""
    low, high = 0, segment.rows.size() // ROW_BYTES
    found: Row | None = None
    while low < high:
        middle = (low + high) // 2
        row = read_row(segment.rows, middle)
        if row is None or row.index != segment.first_index + middle:
            return None
        if row.position <= position:
            found, low = row, middle + 1
        else:
            high = middle
    return found if found is not None and found.position + HEADER_BYTES <= segment.end else None
