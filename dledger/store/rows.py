"""Side rows: one 40-byte row per entry, so that an index leads to its bytes without a scan.

Row, little endian: index u64 | term u64 | position u64 | frame length u32 | head_crc u32 | crc u32 | mark u32.
The mark is not zero for a CONFIG entry: those are found without reading the frames.
One file per segment. A row is written only after its frame has been synced, so it also is evidence that the
entry was once on stable storage and must not be cut as a torn tail (raft.md 4.6).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import msgspec

from dledger.core.types import Entry, EntryType
from runtime.model import File

ROW_BYTES = 40
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_ROW = struct.Struct("<QQQIII4x")
_COVERED = struct.Struct("<QQQII")
_UNMARKED = bytes(4)
_MARKED = b"\xff" * 4
_CONFIG = int(EntryType.CONFIG)
assert _ROW.size == ROW_BYTES


class Row(msgspec.Struct, frozen=True, gc=False):
    """Where an entry lies, and its identity."""

    index: int
    term: int
    position: int
    length: int
    head_crc: int

    @property
    def end(self) -> int:
        return self.position + self.length


def row_of(entry: Entry) -> bytes:
    covered = _COVERED.pack(entry.index, entry.term, entry.position, len(entry.frame), entry.head_crc)
    return covered + crc32(covered).to_bytes(4, "little") + (_MARKED if entry.type == _CONFIG else _UNMARKED)


def marked_rows(data: bytes, first_index: int) -> list[int] | None:
    """Indices of the rows marked as CONFIG in a file's content; None where some row is not the one that belongs there.

    Compares whole columns, so that a start can afford it for every segment behind its checkpoint.
    """
    count = len(data) // ROW_BYTES
    words = memoryview(data)[: count * ROW_BYTES].cast("Q")
    if words[0 :: ROW_BYTES // 8].tolist() != list(range(first_index, first_index + count)):
        return None
    marks = words[4 :: ROW_BYTES // 8].tolist()
    if not marks or max(marks) >> 32 == 0:
        return []
    return [first_index + number for number, word in enumerate(marks) if word >> 32]


def unpack_row(data: bytes, offset: int = 0) -> Row | None:
    """None for a row that is damaged, zeroed or cut short."""
    if len(data) - offset < ROW_BYTES:
        return None
    index, term, position, length, head_crc, crc = _ROW.unpack_from(data, offset)
    if index == 0 or crc32(data[offset : offset + ROW_BYTES - 8]) != crc:
        return None
    return Row(index, term, position, length, head_crc)


def read_row(file: File, number: int) -> Row | None:
    """The row with that number in a file, counted from 0."""
    return unpack_row(_read(file, ROW_BYTES, number * ROW_BYTES))


def read_rows(file: File) -> dict[int, tuple[int, Row]]:
    """Every readable row of a file with its number, by entry index."""
    data = _read(file, file.size(), 0)
    found: dict[int, tuple[int, Row]] = {}
    for number in range(len(data) // ROW_BYTES):
        row = unpack_row(data, number * ROW_BYTES)
        if row is not None:
            found[row.index] = (number, row)
    return found


def _read(file: File, nbytes: int, offset: int) -> bytes:
    """Rows that the disk does not give back are as good as damaged: the frames are walked instead."""
    try:
        return file.pread(nbytes, offset)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


def last_row(file: File) -> Row | None:
    """The last readable row of a file, whatever lies behind or before it."""
    chunk_rows = 1024
    count = file.size() // ROW_BYTES
    while count > 0:
        first = max(0, count - chunk_rows)
        data = _read(file, (count - first) * ROW_BYTES, first * ROW_BYTES)
        for number in range(len(data) // ROW_BYTES - 1, -1, -1):
            row = unpack_row(data, number * ROW_BYTES)
            if row is not None:
                return row
        count = first
    return None


@contextmanager
def suppress_disk_full() -> Iterator[None]:
    """For rows that a full disk may keep from being written: the frames count, and are walked without them."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
