"""Frames: what is packed is read back, and no damaged byte gets through."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dledger.core.types import (
    BODY_BYTES_MAX,
    FRAME_MAGIC,
    HEADER_BYTES,
    BadFrame,
    Entry,
    EntryType,
    frame_entry,
    next_position,
    parse_entry,
    unpack_header,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**63 - 1)


def an_entry(body: bytes = b"some body") -> Entry:
    return frame_entry(7, 3, 4096, EntryType.DATA, 2, (body[:4], memoryview(body)[4:]), 0xABCD, 5)


def test_the_header_has_the_documented_layout() -> None:
    entry = an_entry()
    magic, head, body, prev, index, term, position, length, count, kind, flags, hint, version = struct.unpack(
        "<IIIIQQQIHBBQH6x", entry.frame[:HEADER_BYTES]
    )
    assert (magic, prev, index, term, position, length) == (FRAME_MAGIC, 0xABCD, 7, 3, 4096, 9)
    assert (count, kind, flags, hint, version) == (2, EntryType.DATA, 0, 5, 1)
    assert body == crc32(b"some body") and head == crc32(entry.frame[8:HEADER_BYTES]) == entry.head_crc
    assert entry.end == 4096 + HEADER_BYTES + 9 and bytes(entry.body) == b"some body"


@given(index=u64, term=u64, position=st.integers(0, 2**62), prev=u32, hint=u64, body=st.binary(max_size=300))
def test_what_is_framed_is_read_back(index: int, term: int, position: int, prev: int, hint: int, body: bytes) -> None:
    entry = frame_entry(index, term, position, EntryType.NOOP, 0, (body,), prev, hint)
    assert parse_entry(b"junk" + entry.frame + b"junk", 4) == entry


@given(st.integers(0, len(an_entry().frame) - 1), st.integers(1, 255))
def test_no_flipped_byte_gets_through(at: int, flip: int) -> None:
    frame = bytearray(an_entry().frame)
    frame[at] ^= flip
    with pytest.raises(BadFrame):
        parse_entry(frame)


@given(st.integers(0, len(an_entry().frame) - 1))
def test_no_torn_frame_gets_through(kept: int) -> None:
    with pytest.raises(BadFrame):
        parse_entry(an_entry().frame[:kept])


def _resealed(offset: int, layout: str, value: int) -> bytes:
    """The frame with a changed field and a header checksum that fits again."""
    frame = bytearray(an_entry().frame)
    struct.pack_into(layout, frame, offset, value)
    struct.pack_into("<I", frame, 4, crc32(frame[8:HEADER_BYTES]))
    return bytes(frame)


def test_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(BadFrame, match="newer"):
        unpack_header(_resealed(56, "<H", 2))


def test_an_impossible_length_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BadFrame, match="limit"):
        unpack_header(_resealed(40, "<I", BODY_BYTES_MAX + 1))


@pytest.mark.parametrize(("count", "body"), [(70_000, b""), (1, bytes(BODY_BYTES_MAX + 1))])
def test_an_entry_over_the_limit_is_not_framed(count: int, body: bytes) -> None:
    with pytest.raises(ValueError, match="over the limit"):
        frame_entry(1, 1, 0, EntryType.DATA, count, (body,), 0, 0)


@pytest.mark.parametrize(
    ("end", "length", "position"),
    [(0, 100, 0), (0, 1000, 0), (1, 1000, 1000), (900, 100, 900), (901, 100, 1000), (1000, 1, 1000), (2999, 2, 3000)],
)
def test_a_frame_never_crosses_a_segment_end(end: int, length: int, position: int) -> None:
    assert next_position(end, length, 1000) == position


@given(st.integers(0, 10**12), st.integers(1, 4096))
def test_the_next_position_is_the_first_that_fits(end: int, length: int) -> None:
    position = next_position(end, length, 4096)
    assert position >= end and position // 4096 == (position + length - 1) // 4096
    assert position == end or (position % 4096 == 0 and position - end < length)


def test_a_frame_larger_than_a_segment_has_no_place() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        next_position(0, 1001, 1000)
