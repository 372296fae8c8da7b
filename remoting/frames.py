"""Cutting frames out of a byte stream, and the typed fast paths for the two hot headers (send and pull).

Nothing here performs I/O. A frame is a plain tuple, because one is made per message.
"""

from __future__ import annotations

import struct
from typing import Annotated, TypeAlias

import msgspec

from remoting.codes import (
    DEFAULT_REGION,
    FRAME_LIMIT_BYTES,
    SERIALIZE_JSON,
    SERIALIZE_ROCKETMQ,
    VERSION,
    RequestCode,
)
from remoting.command import Command, Int32, decode_header
from remoting.errors import HeaderError, RemoteProtocolError
from remoting.headers import optional, require

Frame: TypeAlias = tuple[int, bytes, bytes]
"""(serialize type, header, body)."""

_PREFIX = struct.Struct(">II")
_PREFIX_BYTES = 8
_unpack_prefix = _PREFIX.unpack_from

_HTTP_WORDS = (b"GET ", b"POST", b"PUT ", b"HEAD", b"DELE", b"OPTI", b"PATC", b"TRAC", b"CONN", b"PRI ", b"HTTP")


def describe_stranger(first_bytes: bytes) -> str:
    """What the first bytes of a connection look like that are no frame; for the one log line before closing."""
    if first_bytes[:1] == b"\x16":
        return "TLS hello on a plain-text port"
    if first_bytes[:4] in _HTTP_WORDS:
        return "HTTP request on a RocketMQ port"
    if first_bytes[:5] == b"PROXY" or first_bytes[:4] == b"\r\n\r\n":
        return "PROXY protocol header, which is not enabled"
    return "bytes that are no RocketMQ frame"


class FrameReader:
    """Cuts frames out of the bytes of one connection.

    A length is judged as soon as its four bytes are there; nothing is collected for a frame that would be refused.
    """

    __slots__ = ("_limit", "_needed", "_pending", "_ready", "_seen_frame")

    def __init__(self, limit_bytes: int = FRAME_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._pending = bytearray()
        self._needed = _PREFIX_BYTES
        self._seen_frame = False
        self._ready: list[Frame] = []

    @property
    def pending_bytes(self) -> int:
        """Bytes held of a frame that is not complete yet."""
        return len(self._pending)

    def feed(self, data: bytes) -> None:
        """Take the bytes of one read; `take` then has the frames they complete. Raises as `cut`."""
        self._ready += self.cut(data)

    def take(self) -> list[Frame]:
        """Every complete frame not taken yet, in order."""
        ready = self._ready
        self._ready = []
        return ready

    def cut(self, data: bytes) -> list[Frame]:
        """`feed` and `take` in one: the frames completed by the bytes of one read, in order.

        Raises RemoteProtocolError on a length over the limit or a header length that does not fit; the reader must
        not be used afterwards. Frames cut before the bad one in the same read are in the error's `frames`.
        """
        pending = self._pending
        if pending:
            pending += data
            if len(pending) < self._needed:
                if self._needed == _PREFIX_BYTES:
                    self._judge_start(bytes(pending))
                return []
            data = bytes(pending)
            self._pending = bytearray()
        frames: list[Frame] = []
        append = frames.append
        position = 0
        available = len(data)
        limit = self._limit
        while available - position >= 8:
            total, mixed = _unpack_prefix(data, position)
            header_length = mixed & 0xFFFFFF
            if total > limit or header_length + 4 > total:
                raise self._refusal(data[position : position + 16], total, header_length, frames)
            end = position + 4 + total
            if end > available:
                self._needed = end - position
                break
            header_end = position + 8 + header_length
            append((mixed >> 24, data[position + 8 : header_end], data[header_end:end]))
            position = end
        else:
            self._needed = _PREFIX_BYTES
            if position < available:
                self._judge_start(data[position:], frames)
        if frames:
            self._seen_frame = True
        if position < available:
            # Copied once; a large frame then grows in place until it is complete.
            self._pending = bytearray(memoryview(data)[position:])
        return frames

    def _judge_start(self, start: bytes, frames: list[Frame] | None = None) -> None:
        """Refuse by the first bytes of a length alone, so that seven bytes of garbage are not waited out."""
        if int.from_bytes(start[:4].ljust(4, b"\0")) > self._limit:
            raise self._refusal(start, int.from_bytes(start[:4].ljust(4, b"\0")), 0, frames or [])

    def _refusal(self, start: bytes, total: int, header_length: int, frames: list[Frame]) -> RemoteProtocolError:
        if not self._seen_frame and not frames and start[:1] > b"\x01":
            text = describe_stranger(start)
        elif total > self._limit:
            text = f"frame length {total} is over the limit of {self._limit}"
        else:
            text = f"header length {header_length} does not fit a frame of {total} bytes"
        return RefusedFrame(text, frames)


class RefusedFrame(RemoteProtocolError):
    """Bytes that cannot be a frame; `frames` were complete before them in the same read."""

    def __init__(self, text: str, frames: list[Frame]) -> None:
        super().__init__(text)
        self.frames = frames


def decode_frame(frame: Frame) -> Command:
    """Any frame as a Command. Raises RemoteProtocolError on a header that cannot be read."""
    return decode_header(frame[0], frame[1], frame[2])


class _CodeOnly(msgspec.Struct):
    code: Int32


_decode_code = msgspec.json.Decoder(_CodeOnly).decode
_KNOWN_STARTS = {f'{{"code":{code},"'.encode()[:12]: int(code) for code in RequestCode if code < 1000}
"""The first twelve bytes of a header as most clients write it, member `code` first; longer codes do not fit in."""
_unpack_code = struct.Struct(">h").unpack_from


def peek_code(frame: Frame) -> int:
    """The code of a frame without decoding the rest. Raises RemoteProtocolError on garbage."""
    header = frame[1]
    serialize = frame[0]
    if serialize == SERIALIZE_JSON:
        known = _KNOWN_STARTS.get(header[:12])
        if known is not None:
            return known
        if header[:8] == b'{"code":':
            comma = header.find(b",", 8, 20)
            if comma > 0:
                try:
                    return int(header[8:comma])
                except ValueError:
                    pass
        try:
            return _decode_code(header).code
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return decode_frame(frame).code
    if serialize == SERIALIZE_ROCKETMQ and len(header) >= 2:
        code: int = _unpack_code(header)[0]
        return code
    raise RemoteProtocolError(f"unknown serialization {serialize}")


# ---------------------------------------------------------------------------------------------------------- send


class SendHeader(msgspec.Struct, gc=False):
    """A send request's header, whichever names it came under. The first four are the command's own members."""

    producer_group: str
    topic: str
    default_topic: str
    default_topic_queue_nums: int
    queue_id: int
    sys_flag: int
    born_timestamp: int
    message_flag: int
    properties: str = ""
    reconsume_times: int = 0
    unit_mode: bool = False
    max_reconsume_times: int | None = None
    batch: bool = False
    broker_name: str = ""
    code: int = 0
    opaque: int = 0
    flag: int = 0
    version: int = 0


Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _ShortNames(SendHeader, gc=False):
    """extFields of codes 310, 320 and 325."""

    producer_group: str = msgspec.field(name="a")
    topic: str = msgspec.field(name="b")
    default_topic: str = msgspec.field(name="c")
    default_topic_queue_nums: Int32 = msgspec.field(name="d")
    queue_id: Int32 = msgspec.field(name="e")
    sys_flag: Int32 = msgspec.field(name="f")
    born_timestamp: Int64 = msgspec.field(name="g")
    message_flag: Int32 = msgspec.field(name="h")
    properties: str = msgspec.field(name="i", default="")
    reconsume_times: Int32 = msgspec.field(name="j", default=0)
    unit_mode: bool = msgspec.field(name="k", default=False)
    max_reconsume_times: Int32 | None = msgspec.field(name="l", default=None)
    batch: bool = msgspec.field(name="m", default=False)
    broker_name: str = msgspec.field(name="n", default="")
    # Overwritten after decoding, so it does not matter what a peer sends under these names.
    code: int = msgspec.field(name=" code", default=0)
    opaque: int = msgspec.field(name=" opaque", default=0)
    flag: int = msgspec.field(name=" flag", default=0)
    version: int = msgspec.field(name=" version", default=0)


class _LongNames(SendHeader, gc=False):
    """extFields of codes 10 and 324."""

    producer_group: str = msgspec.field(name="producerGroup")
    topic: str = msgspec.field(name="topic")
    default_topic: str = msgspec.field(name="defaultTopic")
    default_topic_queue_nums: Int32 = msgspec.field(name="defaultTopicQueueNums")
    queue_id: Int32 = msgspec.field(name="queueId")
    sys_flag: Int32 = msgspec.field(name="sysFlag")
    born_timestamp: Int64 = msgspec.field(name="bornTimestamp")
    message_flag: Int32 = msgspec.field(name="flag")
    properties: str = msgspec.field(name="properties", default="")
    reconsume_times: Int32 = msgspec.field(name="reconsumeTimes", default=0)
    unit_mode: bool = msgspec.field(name="unitMode", default=False)
    max_reconsume_times: Int32 | None = msgspec.field(name="maxReconsumeTimes", default=None)
    batch: bool = msgspec.field(name="batch", default=False)
    broker_name: str = msgspec.field(name="bname", default="")
    code: int = msgspec.field(name=" code", default=0)
    opaque: int = msgspec.field(name=" opaque", default=0)
    flag: int = msgspec.field(name=" flag", default=0)
    version: int = msgspec.field(name=" version", default=0)


class _ShortEnvelope(msgspec.Struct, gc=False):
    code: Int32
    extFields: _ShortNames
    opaque: Int32 = 0
    flag: Int32 = 0
    version: Int32 = 0


class _LongEnvelope(msgspec.Struct, gc=False):
    code: Int32
    extFields: _LongNames
    opaque: Int32 = 0
    flag: Int32 = 0
    version: Int32 = 0


_decode_short = msgspec.json.Decoder(_ShortEnvelope, strict=False).decode
_decode_long = msgspec.json.Decoder(_LongEnvelope, strict=False).decode
_LONG_NAME_STARTS = (b'{"code":10,', b'{"code":324')
_BATCH_CODE = int(RequestCode.SEND_BATCH_MESSAGE)


def decode_send_v2(frame: Frame) -> SendHeader:
    """The header of a send request (codes 10, 310, 320, 324, 325), letters or long names.

    Raises HeaderError where a required field is missing or unreadable, RemoteProtocolError where the header is none.
    """
    header = frame[1]
    if frame[0] == SERIALIZE_JSON:
        try:
            envelope = _decode_long(header) if header.startswith(_LONG_NAME_STARTS) else _decode_short(header)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return _decode_send_slowly(frame)
        result = envelope.extFields
        result.code = envelope.code
        result.opaque = envelope.opaque
        result.flag = envelope.flag
        result.version = envelope.version
        if envelope.code == _BATCH_CODE:
            result.batch = True
        return result
    return _decode_send_slowly(frame)


def _decode_send_slowly(frame: Frame) -> SendHeader:
    command = decode_frame(frame)
    return send_header_of(command)


def send_header_of(command: Command) -> SendHeader:
    """The send header held in an already decoded command. Raises HeaderError."""
    ext = command.ext
    if "a" in ext and "b" in ext:
        names = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n")
    else:
        names = (
            "producerGroup",
            "topic",
            "defaultTopic",
            "defaultTopicQueueNums",
            "queueId",
            "sysFlag",
            "bornTimestamp",
            "flag",
            "properties",
            "reconsumeTimes",
            "unitMode",
            "maxReconsumeTimes",
            "batch",
            "bname",
        )
    group, topic, template, template_queues, queue, sys_flag, born, flag, props, times, unit, limit, batch, broker = (
        names
    )
    # Batches of Go 2.1.1 and older leave the template empty, and its queue number empty or absent.
    return SendHeader(
        require(ext, group, str),
        require(ext, topic, str),
        ext.get(template, ""),
        optional(ext, template_queues, int, 0) if ext.get(template_queues) else 0,
        require(ext, queue, int, bits=32),
        require(ext, sys_flag, int, bits=32),
        require(ext, born, int),
        require(ext, flag, int, bits=32),
        ext.get(props, ""),
        optional(ext, times, int, 0),
        optional(ext, unit, bool, False),
        optional(ext, limit, int, None),
        optional(ext, batch, bool, False) or command.code == _BATCH_CODE,
        ext.get(broker, ""),
        command.code,
        command.opaque,
        command.flag,
        command.version,
    )


# ---------------------------------------------------------------------------------------------------------- pull


class PullHeader(msgspec.Struct, gc=False):
    """Header of PULL_MESSAGE and LITE_PULL_MESSAGE. The last five are the command's own members."""

    consumer_group: str = msgspec.field(name="consumerGroup")
    topic: str
    queue_id: Int32 = msgspec.field(name="queueId")
    queue_offset: Int64 = msgspec.field(name="queueOffset")
    max_msg_nums: Int32 = msgspec.field(name="maxMsgNums")
    sys_flag: Int32 = msgspec.field(name="sysFlag")
    commit_offset: Int64 = msgspec.field(name="commitOffset", default=0)
    suspend_timeout_ms: Int64 = msgspec.field(name="suspendTimeoutMillis", default=0)
    subscription: str | None = None
    sub_version: Int64 = msgspec.field(name="subVersion", default=0)
    expression_type: str | None = msgspec.field(name="expressionType", default=None)
    max_msg_bytes: Int32 | None = msgspec.field(name="maxMsgBytes", default=None)
    code: int = msgspec.field(name=" code", default=0)
    opaque: int = msgspec.field(name=" opaque", default=0)
    flag: int = msgspec.field(name=" flag", default=0)
    version: int = msgspec.field(name=" version", default=0)
    serialize: int = msgspec.field(name=" serialize", default=0)


class _PullEnvelope(msgspec.Struct, gc=False):
    code: Int32
    extFields: PullHeader
    opaque: Int32 = 0
    flag: Int32 = 0
    version: Int32 = 0


_decode_pull = msgspec.json.Decoder(_PullEnvelope, strict=False).decode


def decode_pull(frame: Frame) -> PullHeader:
    """The header of a pull request. Raises HeaderError or RemoteProtocolError as `decode_send_v2`."""
    if frame[0] == SERIALIZE_JSON:
        try:
            envelope = _decode_pull(frame[1])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return pull_header_of(decode_frame(frame))
        result = envelope.extFields
        result.code = envelope.code
        result.opaque = envelope.opaque
        result.flag = envelope.flag
        result.version = envelope.version
        return result
    return pull_header_of(decode_frame(frame))


def pull_header_of(command: Command) -> PullHeader:
    """The pull header held in an already decoded command. Raises HeaderError."""
    ext = command.ext
    return PullHeader(
        require(ext, "consumerGroup", str),
        require(ext, "topic", str),
        require(ext, "queueId", int, bits=32),
        require(ext, "queueOffset", int),
        require(ext, "maxMsgNums", int, bits=32),
        require(ext, "sysFlag", int, bits=32),
        optional(ext, "commitOffset", int, 0),
        optional(ext, "suspendTimeoutMillis", int, 0),
        ext.get("subscription"),
        optional(ext, "subVersion", int, 0),
        ext.get("expressionType"),
        optional(ext, "maxMsgBytes", int, None),
        command.code,
        command.opaque,
        command.flag,
        command.version,
        command.serialize,
    )


# ------------------------------------------------------------------------------------------------------- answers

_SEND_TAIL = (
    f'"TRACE_ON":"true","MSG_REGION":"{DEFAULT_REGION}"}},"flag":1,"language":"JAVA","version":{VERSION},"opaque":'
)
_pack_prefix = _PREFIX.pack
_PREFIXES = tuple(_PREFIX.pack(length + 4, length) for length in range(1024))
"""Of frames without a body, by the length of the header."""
_encode_json = msgspec.json.Encoder().encode


def format_send_response(opaque: int, msg_id: str, queue_id: int, queue_offset: int, transaction_id: str = "") -> bytes:
    """The frame that acknowledges a send. `transaction_id` is the message's UNIQ_KEY ("" leaves the field out)."""
    if transaction_id.isalnum() and transaction_id.isascii():
        transaction = f'"transactionId":"{transaction_id}",'
    else:
        transaction = f'"transactionId":{_encode_json(transaction_id).decode()},' if transaction_id else ""
    header = (
        f'{{"code":0,"extFields":{{"queueId":"{queue_id}","msgId":"{msg_id}","queueOffset":"{queue_offset}",'
        f"{transaction}{_SEND_TAIL}{opaque}}}"
    ).encode()
    length = len(header)
    return (_PREFIXES[length] if length < 1024 else _pack_prefix(length + 4, length)) + header


def format_pull_response_head(
    opaque: int,
    code: int,
    remark: str,
    next_begin_offset: int,
    min_offset: int,
    max_offset: int,
    body_length: int,
    suggest_which_broker_id: int = 0,
) -> bytes:
    """Everything of a pull answer but its body, which follows as it lies in the log. `remark` must be plain ASCII."""
    header = (
        f'{{"code":{code},"extFields":{{"suggestWhichBrokerId":"{suggest_which_broker_id}","nextBeginOffset":'
        f'"{next_begin_offset}","minOffset":"{min_offset}","maxOffset":"{max_offset}","offsetDelta":"0",'
        f'"topicSysFlag":"0","groupSysFlag":"0"}},"flag":1,"language":"JAVA","remark":"{remark}",'
        f'"version":{VERSION},"opaque":{opaque}}}'
    ).encode()
    length = len(header)
    return _pack_prefix(4 + length + body_length, length) + header


__all__ = [
    "Frame",
    "FrameReader",
    "HeaderError",
    "PullHeader",
    "RefusedFrame",
    "SendHeader",
    "decode_frame",
    "decode_pull",
    "decode_send_v2",
    "describe_stranger",
    "format_pull_response_head",
    "format_send_response",
    "peek_code",
    "pull_header_of",
    "send_header_of",
]
