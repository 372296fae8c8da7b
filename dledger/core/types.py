"""What the replicated log is made of: entries, their frames, roles and the state that must survive a restart.

One Raft entry is one batch. On disk and between peers it is a *frame*: a 64-byte header and the body, byte for byte the
same on all replicas. This module is the only place that knows the header's layout.

Frame header, little endian, 64 bytes:

    magic u32 | head_crc u32 | body_crc u32 | prev_crc u32 | index u64 | term u64 | position u64 | body_len u32 |
    count u16 | type u8 | flags u8 | commit_hint u64 | version u16 | 6 zero bytes

`head_crc` covers the header from byte 8 on (so also `body_crc`), `prev_crc` is the predecessor's `head_crc`: frames
form a chain, and two logs whose frames at one index have the same `head_crc` agree in every byte before it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from zlib import crc32

import msgspec
from attrs import frozen

Buffer = bytes | bytearray | memoryview

FRAME_MAGIC = 0x51524C47
FRAME_VERSION = 1
HEADER_BYTES = 64
BODY_BYTES_MAX = 4 * 1024 * 1024 + 256 * 1024
"""Largest body of a frame: the largest stored message (4 MiB + 64 KiB) with room for a META tail."""
COUNT_MAX = 0xFFFF

_HEADER = struct.Struct("<IIIIQQQIHBBQH6x")
_HEADER_AFTER_CRC = struct.Struct("<IIQQQIHBBQH6x")
_MAGIC_AND_CRC = struct.Struct("<II")
assert _HEADER.size == HEADER_BYTES


class Role(IntEnum):
    """What a node is in its current term."""

    FOLLOWER = 0
    PRE_CANDIDATE = 1
    CANDIDATE = 2
    LEADER = 3


class EntryType(IntEnum):
    """What the body of an entry holds."""

    DATA = 1
    NOOP = 2
    CONFIG = 3
    """Members in force from here on (`membership.py`)."""
    TRIM = 4
    """The log may be forgotten before a position: u64 position | u8 flags, 1 = forced."""


class BadFrame(ValueError):
    """Bytes that are not a whole, intact frame. The message says what is wrong with them."""


@frozen
class HardState:
    """Term and vote: synced to stable storage before any message that depends on them leaves (Raft 5.1, figure 2)."""

    term: int = 0
    vote: str | None = None


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of the log. `frame` is header and body as on disk; `end` is the position after its last byte."""

    index: int
    term: int
    position: int
    end: int
    type: int
    count: int
    frame: bytes
    head_crc: int
    prev_crc: int
    commit_hint: int

    @property
    def body(self) -> memoryview:
        """The bytes behind the header; the first one lies at physical offset `position + HEADER_BYTES`."""
        return memoryview(self.frame)[HEADER_BYTES:]


class Header(msgspec.Struct, frozen=True, gc=False):
    """A frame's header as read, its own checksum already verified."""

    index: int
    term: int
    position: int
    body_len: int
    type: int
    count: int
    flags: int
    head_crc: int
    body_crc: int
    prev_crc: int
    commit_hint: int
    version: int

    @property
    def end(self) -> int:
        return self.position + HEADER_BYTES + self.body_len


def frame_entry(
    index: int,
    term: int,
    position: int,
    type: int,
    count: int,
    body_parts: Sequence[Buffer],
    prev_crc: int,
    commit_hint: int,
) -> Entry:
    """Frame one entry. The parts of the body are copied exactly once, into the frame.

    `position` is the byte of the log where the frame begins (see `next_position`), `prev_crc` the predecessor's
    `head_crc` (0 before the first entry), `commit_hint` the leader's commit index at this moment. Raises ValueError
    when the body passes BODY_BYTES_MAX or `count` does not fit.
    """
    body_len = 0
    body_crc = 0
    for part in body_parts:
        body_len += len(part)
        body_crc = crc32(part, body_crc)
    if body_len > BODY_BYTES_MAX or count > COUNT_MAX:
        raise ValueError(f"entry of {body_len} bytes and {count} records is over the limit")
    covered = _HEADER_AFTER_CRC.pack(
        body_crc, prev_crc, index, term, position, body_len, count, type, 0, commit_hint, FRAME_VERSION
    )
    head_crc = crc32(covered)
    frame = b"".join((_MAGIC_AND_CRC.pack(FRAME_MAGIC, head_crc), covered, *body_parts))
    return Entry(
        index,
        term,
        position,
        position + HEADER_BYTES + body_len,
        type,
        count,
        frame,
        head_crc,
        prev_crc,
        commit_hint,
    )


def unpack_header(buffer: Buffer, offset: int = 0) -> Header:
    """Read and verify the header at `offset`. Raises BadFrame when it is short, foreign, newer than us or damaged."""
    if len(buffer) - offset < HEADER_BYTES:
        raise BadFrame("frame header is cut short")
    (
        magic,
        head_crc,
        body_crc,
        prev_crc,
        index,
        term,
        position,
        body_len,
        count,
        entry_type,
        flags,
        commit_hint,
        version,
    ) = _HEADER.unpack_from(buffer, offset)
    if magic != FRAME_MAGIC:
        raise BadFrame("no frame begins here")
    if crc32(memoryview(buffer)[offset + 8 : offset + HEADER_BYTES]) != head_crc:
        raise BadFrame("frame header fails its checksum")
    if version > FRAME_VERSION:
        raise BadFrame(f"frame version {version} is newer than this program knows ({FRAME_VERSION})")
    if body_len > BODY_BYTES_MAX:
        raise BadFrame(f"frame body of {body_len} bytes is over the limit")
    return Header(
        index,
        term,
        position,
        body_len,
        entry_type,
        count,
        flags,
        head_crc,
        body_crc,
        prev_crc,
        commit_hint,
        version,
    )


def parse_entry(buffer: Buffer, offset: int = 0, *, check_body: bool = True) -> Entry:
    """Read one whole frame at `offset` and copy it out. Raises BadFrame when any byte of it is missing or damaged.

    `check_body=False` skips the body's checksum, for bytes that this process verified before.
    """
    header = unpack_header(buffer, offset)
    frame_end = offset + HEADER_BYTES + header.body_len
    if len(buffer) < frame_end:
        raise BadFrame("frame body is cut short")
    frame = bytes(memoryview(buffer)[offset:frame_end])
    if check_body and crc32(memoryview(frame)[HEADER_BYTES:]) != header.body_crc:
        raise BadFrame("frame body fails its checksum")
    return Entry(
        header.index,
        header.term,
        header.position,
        header.end,
        header.type,
        header.count,
        frame,
        header.head_crc,
        header.prev_crc,
        header.commit_hint,
    )


def next_position(end: int, frame_len: int, segment_bytes: int) -> int:
    """Where a frame of `frame_len` bytes goes when the log ends at `end`.

    An entry never crosses the end of a segment: what does not fit begins the next segment, and the gap stays zeros.
    Raises ValueError when no segment could hold it.
    """
    if frame_len > segment_bytes:
        raise ValueError(f"a frame of {frame_len} bytes does not fit a segment of {segment_bytes}")
    used = end % segment_bytes
    if used + frame_len <= segment_bytes:
        return end
    return end - used + segment_bytes
