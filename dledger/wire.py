"""The bytes between two members of a group.

Message: u32 length of what follows | u8 kind | u16 header length | header: one cbor2 array | raw bytes. The raw
bytes of an Append are the frames as they lie on disk, of an App message the payload; they never pass through cbor2.

The first three messages of a connection are the handshake: Hello of the dialling node, Welcome of the accepting one,
Proof of the dialling one. With a shared secret, Welcome and Proof carry an HMAC over both nonces and both identities.

Versions. A node tells the oldest and the newest version it speaks; a connection uses the newest that both do.

1   Raft messages, App, Ping and Pong.
2   AppendReply carries `disk_ok`; SegmentsOffer; Fetch and Fetched (see `dledger.fetch`); TrimWanted.

A node of version 1 takes no hello but one that begins with a 1, and passes over what follows the nonce: that is where
the newest version goes. Nothing that came with version 2 is sent to it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any
from zlib import crc32

import cbor2
import msgspec

from dledger.core.messages import (
    FIELDS_IN_VERSION_1,
    Append,
    AppendReply,
    Message,
    PreVote,
    PreVoteReply,
    SegmentsOffer,
    TimeoutNow,
    Vote,
    VoteReply,
)
from dledger.core.types import BODY_BYTES_MAX, BadFrame, Buffer, Entry, parse_entry

PROTOCOL_VERSION = 2
PROTOCOL_VERSION_MIN = 1
NONCE_BYTES = 16
HANDSHAKE_BYTES_MAX = 4096
APP_BYTES_MAX = BODY_BYTES_MAX + 1024 * 1024
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
NUMBER_MAX = (1 << 63) - 1
_HELLO_FIELDS_1 = 10

KIND_APP = 16
KIND_PING = 17
KIND_PONG = 18
KIND_FETCH = 19
KIND_FETCHED = 20
KIND_TRIM_WANTED = 21
KIND_HELLO = 32
KIND_WELCOME = 33
KIND_PROOF = 34
KIND_REFUSED = 35

_PREFIX = struct.Struct("<IBH")
_LENGTH = struct.Struct("<I")
_PREFIX_BYTES = _PREFIX.size
_LENGTH_BYTES = _LENGTH.size
_dumps = cbor2.dumps
_loads = cbor2.loads

_RAFT_KINDS: dict[type[Any], int] = {
    PreVote: 1,
    PreVoteReply: 2,
    Vote: 3,
    VoteReply: 4,
    Append: 5,
    AppendReply: 6,
    TimeoutNow: 7,
    SegmentsOffer: 8,
}
_RAFT_TYPES = {kind: message_type for message_type, kind in _RAFT_KINDS.items()}
_KIND_APPEND = _RAFT_KINDS[Append]
_SIGNATURES: dict[int, tuple[type[Any], ...]] = {
    _RAFT_KINDS[PreVote]: (int, int, int, int),
    _RAFT_KINDS[PreVoteReply]: (int, int, bool, bool, bool, bool),
    _RAFT_KINDS[Vote]: (int, int, int, int),
    _RAFT_KINDS[VoteReply]: (int, bool, bool),
    _KIND_APPEND: (int, int, int, int, int, int),
    _RAFT_KINDS[AppendReply]: (int, int, bool, int, int, int, int, bool),
    _RAFT_KINDS[TimeoutNow]: (int, int),
    _RAFT_KINDS[SegmentsOffer]: (int, int, int, int),
}
_SIGNATURES_1 = {
    _RAFT_KINDS[grown]: _SIGNATURES[_RAFT_KINDS[grown]][:count] for grown, count in FIELDS_IN_VERSION_1.items()
}


class WireError(Exception):
    """Bytes that are no message of this protocol. The connection cannot be used further."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Who is calling, and whom they believe they have reached. `version` is the oldest one they speak."""

    version: int
    cluster: str
    cluster_uuid: str
    group: str
    group_uuid: str
    node_id: str
    to: str
    boot: str
    segment_bytes: int
    nonce: bytes
    version_max: int = 1
    """The newest one; version 1 did not tell."""


class FetchKind(IntEnum):
    """What a node may ask of another one's disk."""

    ENTRIES = 1
    """first: index; last: index; number: head_crc of the entry before the first, which the answer must continue."""
    MANIFEST = 2
    """What closed segments and committed entries there are, as a whole; no arguments."""
    CHUNK = 3
    """first: base of a segment; last: offset in it; number: bytes. 0 bytes: none before `first` is wanted any more."""
    CHECKPOINT = 4
    """first: offset in the file; last: bytes; number: 0, or the identity that the first answer told."""


class FetchStatus(IntEnum):
    """How a fetch ended."""

    OK = 0
    ABSENT = 1
    """A definite no: this node's log is whole there, and has never had such entries, or has cut them."""
    GONE = 2
    """Trimmed. A newer part of the log, or a checkpoint, stands in its place."""
    DAMAGED = 3
    """This node waits for a repair of the same entries itself."""
    UNSURE = 4
    """Not here, but this node may have forgotten it (a power loss, a blank folder, damage at the end)."""
    BUSY = 5
    """Not now: too much is asked at once, or the node is starting."""


class Fetch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A question. `id` is the asking node's; it names the answer."""

    id: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
    kind: FetchKind
    first: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0
    last: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0
    number: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0


class Fetched(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A piece of an answer; its bytes follow raw. Of a long answer each piece but the last has `more`."""

    id: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
    status: FetchStatus
    more: bool = False
    crc: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)] = 0
    """crc32 of this piece."""
    total: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0
    """Checkpoint: size of the file."""
    identity: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0
    """Checkpoint: changes when the file does."""
    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""


def encode(kind: int, fields: Sequence[Any], raw: Buffer = b"") -> list[Buffer]:
    """One message as parts to send back to back."""
    header = _dumps(fields)
    prefix = _PREFIX.pack(_PREFIX_BYTES - _LENGTH_BYTES + len(header) + len(raw), kind, len(header))
    return [prefix + header, raw] if raw else [prefix + header]


def encode_raft(message: Message, version: int = PROTOCOL_VERSION) -> list[Buffer]:
    """A Raft message as parts, as the peer's protocol `version` has it; the frames of an Append are not copied."""
    if type(message) is Append:
        header = _dumps(
            (message.term, message.prev_index, message.prev_term, message.prev_crc, message.commit, message.seq)
        )
        frames = [entry.frame for entry in message.entries]
        nbytes = sum(map(len, frames))
        parts: list[Buffer] = [
            _PREFIX.pack(_PREFIX_BYTES - _LENGTH_BYTES + len(header) + nbytes, _KIND_APPEND, len(header)) + header
        ]
        parts.extend(frames)
        return parts
    fields = msgspec.structs.astuple(message)
    if version == 1:
        fields = fields[: FIELDS_IN_VERSION_1.get(type(message))]
        if type(message) is SegmentsOffer:
            # The nearest thing that version 1 knows: a heartbeat behind entries that the peer does not have. It hears
            # its leader, and answers that it lacks the predecessor.
            return encode_raft(Append(message.term, max(message.first_index - 1, 1), 0, 0, message.commit, message.seq))
    return encode(_RAFT_KINDS[type(message)], fields)


def encode_trim_wanted(position: int) -> list[Buffer]:
    """To the leader: the sender's disk is nearly full, and needs the log to be given up before this byte."""
    return encode(KIND_TRIM_WANTED, (position,))


def encode_fetch(fetch: Fetch) -> list[Buffer]:
    """A question to a peer's disk."""
    return encode(KIND_FETCH, msgspec.structs.astuple(fetch))


def encode_fetched(fetched: Fetched, raw: Buffer = b"") -> list[Buffer]:
    """A piece of an answer."""
    return encode(KIND_FETCHED, msgspec.structs.astuple(fetched), raw)


class Received(msgspec.Struct, frozen=True, gc=False):
    """One message as it came, its header decoded."""

    kind: int
    fields: list[Any]
    raw: memoryview


class MessageReader:
    """Cuts messages out of a byte stream, without any I/O. `limit` bounds what one message may make us keep."""

    def __init__(self, limit: int = HANDSHAKE_BYTES_MAX) -> None:
        self.limit = limit
        self._buffer: bytes | bytearray = b""
        self._needed = _LENGTH_BYTES

    def feed(self, data: bytes) -> list[Received]:
        """Take the next bytes in; returns the messages that are complete now. Raises WireError."""
        if self._buffer:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            self._buffer += data
        else:
            self._buffer = data
        if len(self._buffer) < self._needed:
            return []
        return self._take()

    def _take(self) -> list[Received]:
        buffer = self._buffer
        view = memoryview(buffer)
        total = len(buffer)
        offset = 0
        found: list[Received] = []
        self._needed = _LENGTH_BYTES
        while total - offset >= _LENGTH_BYTES:
            (length,) = _LENGTH.unpack_from(buffer, offset)
            if length > self.limit or length < _PREFIX_BYTES - _LENGTH_BYTES:
                raise WireError(f"a message of {length} bytes")
            if total - offset - _LENGTH_BYTES < length:
                self._needed = _LENGTH_BYTES + length
                break
            _, kind, header_len = _PREFIX.unpack_from(buffer, offset)
            header_start = offset + _PREFIX_BYTES
            end = offset + _LENGTH_BYTES + length
            if header_start + header_len > end:
                raise WireError("a header longer than its message")
            try:
                fields = _loads(view[header_start : header_start + header_len])
            except (cbor2.CBORDecodeError, ValueError, TypeError) as error:
                raise WireError(f"an unreadable header: {error}") from error
            if type(fields) is not list:
                raise WireError("a header that is no array")
            found.append(Received(kind, fields, view[header_start + header_len : end]))
            offset = end
        # A new object for the rest: the views handed out still hold the old one.
        self._buffer = bytes(view[offset:]) if offset < total else b""
        return found


def decode_raft(received: Received) -> Message:
    """A Raft message, every frame of it verified. Raises WireError."""
    kind, fields = received.kind, received.fields
    signature = _SIGNATURES.get(kind)
    if signature is None:
        raise WireError(f"a message of unknown kind {kind}")
    types = tuple(map(type, fields))
    if types != signature and types != _SIGNATURES_1.get(kind):
        raise WireError(f"a message of kind {kind} with wrong fields")
    if min(fields) < 0 or max(fields) > NUMBER_MAX:  # a term that no meta slot can hold must not be adopted
        raise WireError(f"a message of kind {kind} with a number out of range")
    if kind != _KIND_APPEND:
        if received.raw:
            raise WireError(f"a message of kind {kind} with bytes behind it")
        message: Message = _RAFT_TYPES[kind](*fields)
        return message
    raw = received.raw
    entries: list[Entry] = []
    offset = 0
    try:
        while offset < len(raw):
            entry = parse_entry(raw, offset)
            entries.append(entry)
            offset += len(entry.frame)
    except BadFrame as error:
        raise WireError(f"a damaged entry: {error}") from error
    return Append(fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], entries)


def decode_trim_wanted(received: Received) -> int:
    """The byte of the log. Raises WireError."""
    fields = received.fields
    if received.raw or len(fields) != 1 or type(fields[0]) is not int or not 0 <= fields[0] <= NUMBER_MAX:
        raise WireError("an unreadable wish for a trim")
    return fields[0]


def decode_fetch(received: Received) -> Fetch:
    """Raises WireError."""
    if received.raw:
        raise WireError("a fetch with bytes behind it")
    try:
        return msgspec.convert(received.fields, Fetch)
    except msgspec.ValidationError as error:
        raise WireError(f"an unreadable fetch: {error}") from error


def decode_fetched(received: Received) -> Fetched:
    """A piece of an answer, its bytes verified. Raises WireError."""
    try:
        fetched = msgspec.convert(received.fields, Fetched)
    except msgspec.ValidationError as error:
        raise WireError(f"an unreadable answer to a fetch: {error}") from error
    if crc32(received.raw) != fetched.crc:
        raise WireError("the bytes of an answer to a fetch fail their checksum")
    return fetched


def decode_hello(received: Received) -> Hello:
    """Raises WireError."""
    try:
        return msgspec.convert(received.fields, Hello)
    except msgspec.ValidationError as error:
        raise WireError(f"an unreadable hello: {error}") from error


def hello_fields(hello: Hello, version: int = PROTOCOL_VERSION) -> tuple[object, ...]:
    """What a hello consists of in a protocol version."""
    fields = msgspec.structs.astuple(hello)
    return fields[:_HELLO_FIELDS_1] if version == 1 else fields


def agree_version(one: Hello, other: Hello) -> int | None:
    """The newest version that both speak, or None."""
    newest = min(one.version_max, other.version_max)
    return newest if newest >= max(one.version, other.version) else None


def prove(secret: bytes | None, role: bytes, hello: Hello, welcome: Hello, version: int = PROTOCOL_VERSION) -> bytes:
    """What the node in `role` (b"dial" or b"accept") shows to prove that it knows the secret; empty without one.

    Covers what both told in the agreed `version`, so that nobody in between can talk two newer nodes down.
    """
    if secret is None:
        return b""
    text = cbor2.dumps([role, hello_fields(hello, version), hello_fields(welcome, version)])
    return hmac.new(secret, text, hashlib.sha256).digest()


def is_proof(expected: bytes, shown: object) -> bool:
    return isinstance(shown, bytes) and hmac.compare_digest(expected, shown)
