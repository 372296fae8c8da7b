"""The state machine's tables as of one entry, so that a start need not replay the whole log.

The last two are kept: a damaged one costs a longer replay, not the tables. Beside the tables stand the CONFIG entry in
force at that entry, because the log that held it may be trimmed, and how far the log was given up by then, because a
start does not read the TRIM entries that the tables cover.

Version 3, little endian: magic u32 | version u16 | u16 | index u64 | blob length u64 | blob crc u32 |
config index u64 | config length u32 | config crc u32 | trimmed u64 | header crc u32, then the config and the blob.
Version 2 does not have the trimmed position, version 1 nor the config fields.
"""

from __future__ import annotations

import struct
from zlib import crc32

from attrs import frozen

from dledger.store.format import CHECKPOINT_FILE
from runtime.model import Files

CHECKPOINT_MAGIC = 0x51524350
CHECKPOINT_VERSION = 3
CHECKPOINT_FILES = (CHECKPOINT_FILE, f"{CHECKPOINT_FILE}.1")
"""Newest first."""

_PREFIX = struct.Struct("<IHH")
_HEADER_1 = struct.Struct("<IHHQQII")
_HEADER_2 = struct.Struct("<IHHQQIQIII")
_HEADER = struct.Struct("<IHHQQIQIIQI")
_HEADERS = {1: _HEADER_1, 2: _HEADER_2, CHECKPOINT_VERSION: _HEADER}


@frozen
class Checkpoint:
    """Tables after entry `index`; `config` is the encoded membership in force there, empty where none is known."""

    index: int
    blob: bytes
    config: bytes = b""
    config_index: int = 0
    trimmed_position: int = 0
    """Byte before which TRIM entries up to `index` gave the log up; 0 also where an older version did not tell."""


@frozen
class Stock:
    """The checkpoints there are."""

    newest: Checkpoint | None
    """The newest one that can be read."""
    covered: tuple[int, int]
    """Entries that the older and the newer file cover; 0 for one that is not there, or cannot be read."""
    dropped: list[int]
    """What those covered that were removed."""


def pack_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The file's content."""
    covered = _HEADER.pack(
        CHECKPOINT_MAGIC,
        CHECKPOINT_VERSION,
        0,
        checkpoint.index,
        len(checkpoint.blob),
        crc32(checkpoint.blob),
        checkpoint.config_index,
        len(checkpoint.config),
        crc32(checkpoint.config),
        checkpoint.trimmed_position,
        0,
    )[:-4]
    return b"".join((covered, crc32(covered).to_bytes(4, "little"), checkpoint.config, checkpoint.blob))


def unpack_checkpoint(data: bytes) -> Checkpoint | None:
    """None for content that is damaged or of a newer version."""
    if len(data) < _HEADER_1.size:
        return None
    magic, version, _ = _PREFIX.unpack_from(data)
    header = _HEADERS.get(version)
    if magic != CHECKPOINT_MAGIC or header is None or len(data) < header.size:
        return None
    if int.from_bytes(data[header.size - 4 : header.size], "little") != crc32(data[: header.size - 4]):
        return None
    index, blob_len, blob_crc, *rest = header.unpack_from(data)[3:-1]
    config_index, config_len, config_crc, trimmed = (*rest, 0, 0, 0, 0)[:4]
    config = data[header.size : header.size + config_len]
    blob = data[header.size + config_len :]
    if len(blob) != blob_len or crc32(blob) != blob_crc or crc32(config) != config_crc:
        return None
    return Checkpoint(index, blob, config, config_index, trimmed)


def write_checkpoint(
    files: Files,
    folder: str,
    index: int,
    blob: bytes,
    *,
    config: bytes = b"",
    config_index: int = 0,
    trimmed_position: int = 0,
) -> None:
    """Atomic: afterwards the new one is there and the last readable one before it. Waits for the disk."""
    newest, older = (f"{folder}/{name}" for name in CHECKPOINT_FILES)
    if _read(files, newest) is not None:  # a damaged one must not push out the good one
        files.rename(newest, older)
    files.write_atomic(newest, pack_checkpoint(Checkpoint(index, blob, config, config_index, trimmed_position)))


def read_checkpoint(files: Files, folder: str, *, up_to: int | None = None) -> Checkpoint | None:
    """The newest readable one, of those not behind entry `up_to`; None where there is none."""
    for name in CHECKPOINT_FILES:
        found = _read(files, f"{folder}/{name}")
        if found is not None and (up_to is None or found.index <= up_to):
            return found
    return None


def take_stock(files: Files, folder: str, *, last_index: int) -> Stock:
    """What a start finds; each file is read once. Those that cover more than the log holds are removed: a log that lost
    its end must not meet them again once it has grown past it, maybe with other entries. Waits for the disk then."""
    newest: Checkpoint | None = None
    covered: list[int] = []
    dropped: list[int] = []
    for name in CHECKPOINT_FILES:
        found = _read(files, f"{folder}/{name}")
        if found is not None and found.index > last_index:
            files.unlink(f"{folder}/{name}")
            dropped.append(found.index)
            found = None
        covered.append(found.index if found is not None else 0)
        newest = newest or found
    if dropped:
        files.sync_dir(folder)
    return Stock(newest, (covered[1], covered[0]), dropped)


def _read(files: Files, path: str) -> Checkpoint | None:
    try:
        return unpack_checkpoint(files.read_bytes(path))
    except OSError:
        return None
