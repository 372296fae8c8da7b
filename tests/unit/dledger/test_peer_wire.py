"""Bytes between members: every message round-trips however it is cut, nothing foreign gets through."""

from __future__ import annotations

from itertools import pairwise

import cbor2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dledger.core.messages import Append, AppendReply, Message, PreVote, PreVoteReply, TimeoutNow, Vote, VoteReply
from dledger.core.types import EntryType, frame_entry, next_position
from dledger.wire import _RAFT_KINDS as RAFT_KINDS
from dledger.wire import (
    KIND_APP,
    KIND_HELLO,
    KIND_TRIM_WANTED,
    MESSAGE_BYTES_MAX,
    Hello,
    MessageReader,
    Received,
    WireError,
    decode_hello,
    decode_raft,
    decode_trim_wanted,
    encode,
    encode_raft,
    encode_trim_wanted,
    is_proof,
    prove,
)


def entries(*bodies: bytes) -> list:  # type: ignore[type-arg]
    found = []
    end, crc = 0, 0
    for index, body in enumerate(bodies, 1):
        position = next_position(end, 64 + len(body), 65_536)
        entry = frame_entry(index, 2, position, EntryType.DATA, 1, [body], crc, 0)
        end, crc = entry.end, entry.head_crc
        found.append(entry)
    return found


MESSAGES: list[Message] = [
    PreVote(7, 100, 6, 0),
    PreVoteReply(7, 8, True, False, True),
    Vote(8, 2**40, 7, 2**47),
    VoteReply(8, False, False),
    Append(8, 0, 0, 0, 0, 1, []),
    Append(8, 0, 0, 0, 5, 2, entries(b"", b"abc", b"d" * 3000)),
    AppendReply(8, 9, True, 11, 10, 0, 0),
    AppendReply(8, 9, False, 0, 0, 7, 6),
    TimeoutNow(8, 99),
]


@given(
    st.lists(st.sampled_from(range(len(MESSAGES))), min_size=1, max_size=8),
    st.lists(st.integers(0, 1 << 16), max_size=30),
    st.sampled_from([1, 7, 1 << 20]),
)
def test_messages_cut_anywhere_come_out_whole(which: list[int], cuts: list[int], step: int) -> None:
    sent = [MESSAGES[number] for number in which]
    stream = b"".join(b"".join(encode_raft(message)) for message in sent)
    edges = sorted({0, len(stream), *(cut % len(stream) for cut in cuts), *range(0, len(stream), step)})
    reader = MessageReader(MESSAGE_BYTES_MAX)
    received: list[Message] = []
    for start, end in pairwise(edges):
        received.extend(decode_raft(each) for each in reader.feed(stream[start:end]))
    assert received == sent


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_incomplete_but_never_believed(data: bytes) -> None:
    try:
        for received in MessageReader().feed(data):
            decode_raft(received)
    except WireError:
        return


def test_length_beyond_the_limit_is_refused_before_anything_is_kept() -> None:
    with pytest.raises(WireError, match="4294967295 bytes"):
        MessageReader().feed(b"\xff\xff\xff\xff")
    for hostile in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0\0\0\0"):
        with pytest.raises(WireError):
            MessageReader().feed(hostile)


@pytest.mark.parametrize(
    "fields", [[], [1] * 5, [1, 2, 3, 4, 5, "6"], [1, 2, 3, 4, 5, True], [1, 2, 3, 4, 5, 6, 7], [-1.5] * 6]
)
def test_wrong_fields_are_refused(fields: list[object]) -> None:
    with pytest.raises(WireError, match="wrong fields"):
        decode_raft(Received(5, fields, memoryview(b"")))


def test_unknown_kind_header_and_trailing_bytes_are_refused() -> None:
    with pytest.raises(WireError, match="unknown kind"):
        decode_raft(Received(99, [], memoryview(b"")))
    with pytest.raises(WireError, match="bytes behind it"):
        decode_raft(Received(7, [1, 2], memoryview(b"x")))
    with pytest.raises(WireError, match="longer than its message"):
        MessageReader().feed(b"\x04\0\0\0\x07\xff\x00\x80")
    with pytest.raises(WireError, match="no array"):
        MessageReader().feed(b"\x04\0\0\0\x07\x01\x00\x01")
    with pytest.raises(WireError, match="unreadable header"):
        MessageReader().feed(b"\x04\0\0\0\x07\x01\x00\xff")


@given(st.integers(0, 64 + 64 + 3 + 64 + 3000 - 1))
def test_damaged_entry_is_refused_wherever_the_damage_is(offset: int) -> None:
    message = MESSAGES[5]
    header, *frames = encode_raft(message)
    raw = bytearray(b"".join(frames))
    raw[offset % len(raw)] ^= 0x10
    (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(bytes(header) + bytes(raw))
    with pytest.raises(WireError, match="damaged entry"):
        decode_raft(received)


def test_app_payload_passes_untouched() -> None:
    payload = bytes(range(256)) * 10
    (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(b"".join(encode(KIND_APP, (), payload)))
    assert (received.kind, received.fields, bytes(received.raw)) == (KIND_APP, [], payload)


def hello(node: str = "n0", nonce: bytes = bytes(16)) -> Hello:
    return Hello(1, "c", "cu", "g", "gu", node, "n1", "boot", 65_536, nonce)


def test_a_wish_for_a_trim_is_read_back_or_refused() -> None:
    (received,) = MessageReader().feed(b"".join(map(bytes, encode_trim_wanted(5 << 30))))
    assert (received.kind, decode_trim_wanted(received)) == (KIND_TRIM_WANTED, 5 << 30)
    wrong: list[list[object]] = [[], [1, 2], ["1"], [-1], [1 << 63], [True]]
    for fields in wrong:
        with pytest.raises(WireError, match="wish for a trim"):
            decode_trim_wanted(Received(KIND_TRIM_WANTED, fields, memoryview(b"")))
    with pytest.raises(WireError, match="wish for a trim"):
        decode_trim_wanted(Received(KIND_TRIM_WANTED, [1], memoryview(b"x")))


def test_hello_is_read_back_or_refused() -> None:
    fields = cbor2.loads(cbor2.dumps([1, "c", "cu", "g", "gu", "n0", "n1", "boot", 65_536, bytes(16)]))
    assert decode_hello(Received(KIND_HELLO, fields, memoryview(b""))) == hello()
    for bad in ([], fields[:-1], [*fields[:-1], 5], ["1", *fields[1:]]):
        with pytest.raises(WireError):
            decode_hello(Received(KIND_HELLO, bad, memoryview(b"")))


def test_proof_depends_on_secret_role_and_both_nonces() -> None:
    shown = prove(b"secret", b"dial", hello(), hello("n1"))
    assert is_proof(prove(b"secret", b"dial", hello(), hello("n1")), shown)
    for other in (
        prove(b"other", b"dial", hello(), hello("n1")),
        prove(b"secret", b"accept", hello(), hello("n1")),
        prove(b"secret", b"dial", hello(nonce=b"1" * 16), hello("n1")),
        prove(b"secret", b"dial", hello(), hello("n1", b"1" * 16)),
        b"",
        None,
        "text",
    ):
        assert not is_proof(shown, other)
    assert prove(None, b"dial", hello(), hello()) == b""


@pytest.mark.parametrize("number", [-1, 2**63, 2**64, 2**200])
def test_numbers_that_no_slot_can_hold_are_refused(number: int) -> None:
    for message in MESSAGES:
        if type(message) is Append:
            continue
        fields = [number if type(field) is int else field for field in msgspec.structs.astuple(message)]
        received = MessageReader().feed(b"".join(encode(RAFT_KINDS[type(message)], fields)))
        with pytest.raises(WireError, match="out of range"):
            decode_raft(received[0])
    with pytest.raises(WireError, match="out of range"):
        decode_raft(Received(RAFT_KINDS[Append], [1, 0, 0, 0, 0, number], memoryview(b"")))
