"""The note of a node that gave up a part of its log on its own: kept until the group has given it up, too.

Record, little endian: magic u32 | version u32 | position u64 | crc u32. Atomically replaced, and removed when the debt
is paid. A note that cannot be read stands for the whole of what is gone from the log: it was there for a reason.
"""

from __future__ import annotations

import struct
from zlib import crc32

from runtime.model import Files

LONE_TRIM_FILE = "trimmed-alone"
_MAGIC = 0x51524C54
_VERSION = 1
_RECORD = struct.Struct("<IIQI")


def write_lone_trim(files: Files, folder: str, position: int) -> None:
    """Note that the log before byte `position` goes without the group's word. Waits for the disk. Raises OSError."""
    covered = _RECORD.pack(_MAGIC, _VERSION, position, 0)[:-4]
    files.write_atomic(f"{folder}/{LONE_TRIM_FILE}", covered + crc32(covered).to_bytes(4, "little"))


def read_lone_trim(files: Files, folder: str, first_position: int) -> int | None:
    """The byte before which the log was given up alone, as far as it is gone: none of it lies behind `first_position`,
    where the log begins now. None without a note."""
    path = f"{folder}/{LONE_TRIM_FILE}"
    if not files.exists(path):
        return None
    data = files.read_bytes(path)
    if len(data) != _RECORD.size:
        return first_position
    magic, version, position, crc = _RECORD.unpack(data)
    if magic != _MAGIC or version != _VERSION or crc != crc32(data[:-4]):
        return first_position
    return min(int(position), first_position)


def drop_lone_trim(files: Files, folder: str) -> None:
    """The group has trimmed as much. Waits for the disk. Raises OSError."""
    path = f"{folder}/{LONE_TRIM_FILE}"
    if files.exists(path):
        files.unlink(path)
        files.sync_dir(folder)
