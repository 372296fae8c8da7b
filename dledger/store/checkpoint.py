"""The state machine's tables as of one entry, so that a start need not replay the whole log."""

from __future__ import annotations

import struct
from zlib import crc32

from dledger.store.format import CHECKPOINT_FILE
from runtime.model import Files

CHECKPOINT_MAGIC = 0x51524350
CHECKPOINT_VERSION = 1

_HEADER = struct.Struct("<IHHQQII")


def write_checkpoint(files: Files, folder: str, index: int, blob: bytes) -> None:
    """Atomic: afterwards the old or the new one is there. Waits for the disk."""
    covered = _HEADER.pack(CHECKPOINT_MAGIC, CHECKPOINT_VERSION, 0, index, len(blob), crc32(blob), 0)[:-4]
    header = covered + crc32(covered).to_bytes(4, "little")
    files.write_atomic(f"{folder}/{CHECKPOINT_FILE}", header + blob)


def read_checkpoint(files: Files, folder: str) -> tuple[int, bytes] | None:
    """(index, blob), or None where there is none or it is unreadable: the log holds everything it held."""
    try:
        data = files.read_bytes(f"{folder}/{CHECKPOINT_FILE}")
    except FileNotFoundError:
        return None
    if len(data) < _HEADER.size:
        return None
    magic, version, _, index, length, blob_crc, header_crc = _HEADER.unpack_from(data)
    blob = data[_HEADER.size :]
    if (
        magic != CHECKPOINT_MAGIC
        or version > CHECKPOINT_VERSION
        or header_crc != crc32(data[: _HEADER.size - 4])
        or length != len(blob)
        or blob_crc != crc32(blob)
    ):
        return None
    return index, blob
