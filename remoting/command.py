"""A decoded command and its two encodings, JSON and ROCKETMQ (remoting.md 1)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from remoting.codes import (
    FLAG_ONEWAY,
    FLAG_RESPONSE,
    FRAME_LIMIT_BYTES,
    LANGUAGE_CODES,
    LANGUAGE_NAMES,
    SERIALIZE_JSON,
    SERIALIZE_ROCKETMQ,
    VERSION,
)
from remoting.errors import RemoteProtocolError

_LENGTHS = struct.Struct(">II")
_BINARY_HEAD = struct.Struct(">hBhiii")
_KEY_LENGTH = struct.Struct(">h")
_VALUE_LENGTH = struct.Struct(">i")
_HEADER_LIMIT = 0xFFFFFF


# Numbers of the header are Java ints: what is outside could not be echoed to the peer.
Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]


class Command(msgspec.Struct):
    """A request or a response. `ext` values are text, whatever the peer wrote; `serialize` is 0 JSON, 1 ROCKETMQ."""

    code: int
    opaque: int
    flag: int = 0
    version: int = 0
    language: str = "JAVA"
    remark: str | None = None
    ext: dict[str, str] = {}
    body: bytes | memoryview = b""
    serialize: int = 0

    @property
    def is_response(self) -> bool:
        return self.flag & FLAG_RESPONSE != 0

    @property
    def is_oneway(self) -> bool:
        return self.flag & FLAG_ONEWAY != 0


class _JsonHeader(msgspec.Struct, omit_defaults=True):
    """Members in the order fastjson writes them. `code` and the numbers have no default so that they are written."""

    code: int
    flag: int
    opaque: int
    version: int
    extFields: dict[str, str] | None = None
    language: str | None = None
    remark: str | None = None
    serializeTypeCurrentRPC: str | None = None


class _PlainJsonHeader(msgspec.Struct):
    """The usual form: every extFields value is text."""

    code: Int32
    opaque: Int32 = 0
    flag: Int32 = 0
    version: Int32 = 0
    language: str = "JAVA"
    remark: str | None = None
    extFields: dict[str, str] | None = None


class _LooseJsonHeader(msgspec.Struct):
    """What else is met: numbers and booleans as values (Node), null members, quoted numbers."""

    code: Int32
    opaque: Int32 | None = 0
    flag: Int32 | None = 0
    version: Int32 | None = 0
    language: Any = None
    remark: Any = None
    extFields: dict[str, Any] | None = None


_decode_plain = msgspec.json.Decoder(_PlainJsonHeader).decode
_decode_loose = msgspec.json.Decoder(_LooseJsonHeader, strict=False).decode
_encode_json = msgspec.json.Encoder().encode


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, dict | list):
        return _encode_json(value).decode()
    return str(value)


def _frame(serialize: int, header: bytes, body: bytes | memoryview) -> bytes:
    header_length = len(header)
    if header_length > _HEADER_LIMIT:
        raise RemoteProtocolError(f"header of {header_length} bytes does not fit a frame")
    total = 4 + header_length + len(body)
    if total > FRAME_LIMIT_BYTES:
        raise RemoteProtocolError(f"frame of {total} bytes is over the limit of {FRAME_LIMIT_BYTES}")
    return b"".join((_LENGTHS.pack(total, serialize << 24 | header_length), header, body))


def _encode_binary_header(command: Command) -> bytes:
    parts: list[bytes] = []
    for key, value in command.ext.items():
        key_bytes = key.encode()
        value_bytes = value.encode()
        parts += (_KEY_LENGTH.pack(len(key_bytes)), key_bytes, _VALUE_LENGTH.pack(len(value_bytes)), value_bytes)
    block = b"".join(parts)
    remark = (command.remark or "").encode()
    # Codes above 32,767 do not survive the int16: the peer sees them truncated, as with the Java classes.
    head = _BINARY_HEAD.pack(
        (command.code + 0x8000 & 0xFFFF) - 0x8000,
        LANGUAGE_CODES.get(command.language, LANGUAGE_CODES["OTHER"]),
        command.version,
        command.opaque,
        command.flag,
        len(remark),
    )
    return b"".join((head, remark, _VALUE_LENGTH.pack(len(block)), block))


def encode_command(command: Command) -> bytes:
    """The whole frame, in the command's own serialization. Raises RemoteProtocolError when it is over 16 MiB."""
    if command.serialize == SERIALIZE_ROCKETMQ:
        return _frame(SERIALIZE_ROCKETMQ, _encode_binary_header(command), command.body)
    header = _JsonHeader(
        command.code,
        command.flag,
        command.opaque,
        command.version,
        command.ext or None,
        command.language,
        command.remark,
        "JSON",
    )
    return _frame(SERIALIZE_JSON, _encode_json(header), command.body)


def encode_request(
    code: int,
    opaque: int,
    ext: Mapping[str, str] | None = None,
    body: bytes = b"",
    *,
    oneway: bool = False,
    version: int = VERSION,
    language: str = "PYTHON",
) -> bytes:
    """A request frame in JSON."""
    flag = FLAG_ONEWAY if oneway else 0
    header = _JsonHeader(code, flag, opaque, version, dict(ext) if ext else None, language, None, "JSON")
    return _frame(SERIALIZE_JSON, _encode_json(header), body)


def encode_response(
    request: Command | int,
    code: int,
    ext: Mapping[str, object] | None = None,
    body: bytes | memoryview = b"",
    remark: str | None = None,
    *,
    serialize: int | None = None,
    version: int = VERSION,
) -> bytes:
    """A response frame.

    `request` is the request itself (answered in its own serialization) or its opaque (answered in JSON). Values of
    `ext` become text: None is left out, booleans are `true` and `false`.
    """
    if isinstance(request, Command):
        opaque = request.opaque
        if serialize is None:
            serialize = request.serialize
    else:
        opaque = request
    fields = {key: _text(value) for key, value in ext.items() if value is not None} if ext is not None else None
    if serialize == SERIALIZE_ROCKETMQ:
        command = Command(code, opaque, FLAG_RESPONSE, version, "JAVA", remark, fields or {}, b"", SERIALIZE_ROCKETMQ)
        return _frame(SERIALIZE_ROCKETMQ, _encode_binary_header(command), body)
    header = _JsonHeader(code, FLAG_RESPONSE, opaque, version, fields, "JAVA", remark, "JSON")
    return _frame(SERIALIZE_JSON, _encode_json(header), body)


def decode_header(serialize: int, header: bytes, body: bytes | memoryview = b"") -> Command:
    """A command from the two parts of a frame. Raises RemoteProtocolError on garbage."""
    if serialize == SERIALIZE_JSON:
        return _decode_json_header(header, body)
    if serialize == SERIALIZE_ROCKETMQ:
        return _decode_binary_header(header, body)
    raise RemoteProtocolError(f"unknown serialization {serialize}")


def _decode_json_header(header: bytes, body: bytes | memoryview) -> Command:
    try:
        plain = _decode_plain(header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _decode_odd_json_header(header, body)
    return Command(
        plain.code,
        plain.opaque,
        plain.flag,
        plain.version,
        plain.language,
        plain.remark,
        plain.extFields or {},
        body,
        SERIALIZE_JSON,
    )


def _decode_odd_json_header(header: bytes, body: bytes | memoryview) -> Command:
    try:
        loose = _decode_loose(header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"JSON header cannot be read: {error}") from error
    fields = loose.extFields or {}
    return Command(
        loose.code,
        loose.opaque or 0,
        loose.flag or 0,
        loose.version or 0,
        loose.language if isinstance(loose.language, str) else "OTHER",
        None if loose.remark is None else _text(loose.remark),
        {key: _text(value) for key, value in fields.items() if value is not None},
        body,
        SERIALIZE_JSON,
    )


def _decode_binary_header(header: bytes, body: bytes | memoryview) -> Command:
    try:
        code, language, version, opaque, flag, remark_length = _BINARY_HEAD.unpack_from(header)
        end = len(header)
        position = _BINARY_HEAD.size
        remark: str | None = None
        if remark_length > 0:
            if position + remark_length > end:
                raise RemoteProtocolError("remark runs past the ROCKETMQ header")
            remark = header[position : position + remark_length].decode()
            position += remark_length
        fields: dict[str, str] = {}
        (block_length,) = _VALUE_LENGTH.unpack_from(header, position)
        position += 4
        if block_length < 0 or position + block_length > end:
            raise RemoteProtocolError("fields run past the ROCKETMQ header")
        stop = position + block_length
        while position < stop:
            (key_length,) = _KEY_LENGTH.unpack_from(header, position)
            position += 2
            key_end = position + key_length
            if key_length < 0 or key_end + 4 > stop:
                raise RemoteProtocolError("field name runs past the ROCKETMQ header")
            (value_length,) = _VALUE_LENGTH.unpack_from(header, key_end)
            value_end = key_end + 4 + value_length
            if value_length < 0 or value_end > stop:
                raise RemoteProtocolError("field value runs past the ROCKETMQ header")
            # A zero-length key or value reads back as null: no field.
            if key_length and value_length:
                fields[header[position:key_end].decode()] = header[key_end + 4 : value_end].decode()
            position = value_end
    except (struct.error, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"ROCKETMQ header cannot be read: {error}") from error
    return Command(
        code,
        opaque,
        flag,
        version,
        LANGUAGE_NAMES.get(language, "OTHER"),
        remark,
        fields,
        body,
        SERIALIZE_ROCKETMQ,
    )
