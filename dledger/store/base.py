"""What lay before the first retained entry: the identity of the last entry that a trim removed.

Kept in two files, so that one damaged sector cannot make a trimmed log look like a log with a hole. Both are written
before the first segment is removed. Record, little endian: magic u32 | version u32 | index u64 | term u64 |
position u64 | head_crc u32 | crc u32.
"""

from __future__ import annotations

import struct
from zlib import crc32

from attrs import frozen

from dledger.errors import LogDamaged
from runtime.model import Files

BASE_FILES = ("base", "base.1")
BASE_MAGIC = 0x51524241
BASE_VERSION = 1

_RECORD = struct.Struct("<IIQQQII")


@frozen
class BaseRecord:
    """Identity of the last removed entry; all zero where nothing was removed."""

    index: int = 0
    term: int = 0
    head_crc: int = 0
    position: int = 0
    """Where that entry ended. The log goes on at the next segment."""

    def first_base(self, segment_bytes: int) -> int:
        """Start of the first retained segment."""
        return -(-self.position // segment_bytes) * segment_bytes


def pack_base(base: BaseRecord) -> bytes:
    covered = _RECORD.pack(BASE_MAGIC, BASE_VERSION, base.index, base.term, base.position, base.head_crc, 0)[:-4]
    return covered + crc32(covered).to_bytes(4, "little")


def unpack_base(data: bytes) -> BaseRecord | None:
    """None for a record that is damaged. Raises LogDamaged for one of a newer version."""
    if len(data) < _RECORD.size:
        return None
    magic, version, index, term, position, head_crc, crc = _RECORD.unpack_from(data)
    if magic != BASE_MAGIC or crc != crc32(data[: _RECORD.size - 4]):
        return None
    if version > BASE_VERSION:
        raise LogDamaged(f"the log's base record has version {version}, newer than this program knows ({BASE_VERSION})")
    return BaseRecord(index, term, head_crc, position)


def write_base(files: Files, folder: str, base: BaseRecord) -> None:
    """Atomic, file by file. Waits for the disk."""
    for name in reversed(BASE_FILES):
        files.write_atomic(f"{folder}/{name}", pack_base(base))


def read_base(files: Files, folder: str) -> BaseRecord | None:
    """The newest readable record; None where there is none."""
    found = BaseRecord()
    for name in BASE_FILES:
        try:
            record = unpack_base(files.read_bytes(f"{folder}/{name}"))
        except OSError:
            continue
        if record is not None and record.position > found.position:
            found = record
    return found if found.index else None
