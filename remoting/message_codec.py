"""The stored form of a message, V1 and V2, IPv4 and IPv6, and the body of a batch send (store.md 2 and 7).

Positions in a record with an IPv4 born host are constants here, because readers of the log touch single fields.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from remoting.errors import BodyError
from remoting.message import (
    SYSFLAG_BORN_HOST_V6,
    SYSFLAG_STORE_HOST_V6,
    Message,
    MessageExt,
    bytes_to_host,
    offset_msg_id,
    properties_to_string,
    string_to_properties,
)

MAGIC_V1: Final = -626_843_481
MAGIC_V2: Final = -626_843_477
MAGIC_BLANK: Final = -875_286_124

TOTAL_SIZE_POSITION: Final = 0
MAGIC_POSITION: Final = 4
BODY_CRC_POSITION: Final = 8
QUEUE_ID_POSITION: Final = 12
FLAG_POSITION: Final = 16
QUEUE_OFFSET_POSITION: Final = 20
PHYSICAL_OFFSET_POSITION: Final = 28
SYS_FLAG_POSITION: Final = 36
BORN_TIMESTAMP_POSITION: Final = 40
BORN_HOST_POSITION: Final = 48
STORE_TIMESTAMP_POSITION: Final = 56
"""68 with an IPv6 born host."""

FIXED_BYTES_V4: Final = 91
"""A V1 record with both hosts IPv4, without body, topic and properties."""
TOPIC_LIMIT_V1: Final = 127

_HEAD = struct.Struct(">iiiiiqqiq")
_TAIL = struct.Struct(">iqi")
_LONG = struct.Struct(">q")
_SHORT = struct.Struct(">h")
_BATCH_HEAD = struct.Struct(">iiiii")
_unpack_batch_head = struct.Struct(">i8xii").unpack_from
"""Size, flag, body length: magic and CRC of a batch item are zeros."""
_unpack_short = _SHORT.unpack_from

# Everything up to the body, both hosts IPv4, in one go.
_HEAD_V4 = struct.Struct(">IiIiiqqiq8sq8siqi")
_pack_head_v4 = _HEAD_V4.pack
# The same with what stands between physical offset and body length in one piece: hosts of 8 or 20 bytes.
_TEMPLATE_HEADS = {fixed: struct.Struct(f">IiIiiqq{fixed}si") for fixed in (48, 60, 72)}
_INT_AND_LONG = struct.Struct(">iq")
_crc32 = zlib.crc32
_LENGTH_BYTES: Final = tuple(n.to_bytes(1) for n in range(256))


def body_crc(body: bytes | memoryview) -> int:
    """CRC-32 with the top bit cleared (remoting.md 9)."""
    return _crc32(body) & 0x7FFFFFFF


def record_size(
    body_length: int,
    topic_length: int,
    properties_length: int,
    *,
    born_v6: bool = False,
    store_v6: bool = False,
) -> int:
    """Bytes of the stored record; lengths are bytes of the UTF-8 forms."""
    size = FIXED_BYTES_V4 + body_length + topic_length + properties_length
    if topic_length > TOPIC_LIMIT_V1:
        size += 1
    if born_v6:
        size += 12
    if store_v6:
        size += 12
    return size


def _with_host_bits(sys_flag: int, born_host: bytes, store_host: bytes) -> int:
    sys_flag &= ~(SYSFLAG_BORN_HOST_V6 | SYSFLAG_STORE_HOST_V6)
    if len(born_host) == 20:
        sys_flag |= SYSFLAG_BORN_HOST_V6
    if len(store_host) == 20:
        sys_flag |= SYSFLAG_STORE_HOST_V6
    return sys_flag


def encode_record(
    queue_id: int,
    flag: int,
    queue_offset: int,
    physical_offset: int,
    sys_flag: int,
    born_timestamp: int,
    born_host: bytes,
    store_timestamp: int,
    store_host: bytes,
    reconsume_times: int,
    prepared_offset: int,
    body: bytes | memoryview,
    topic: bytes,
    properties: bytes,
) -> bytes:
    """The stored form of one message.

    Hosts are 8 bytes (IPv4) or 20 (IPv6), address and int32 port; the IPv6 bits of `sys_flag` are set or cleared to
    match. Topics over 127 bytes get the V2 layout. Raises struct.error for numbers that do not fit their field.
    """
    topic_length = len(topic)
    body_length = len(body)
    properties_length = len(properties)
    if topic_length <= 127 and len(born_host) == 8 and len(store_host) == 8:
        return b"".join(
            (
                _pack_head_v4(
                    91 + body_length + topic_length + properties_length,
                    MAGIC_V1,
                    _crc32(body) & 0x7FFFFFFF,
                    queue_id,
                    flag,
                    queue_offset,
                    physical_offset,
                    sys_flag & -49,
                    born_timestamp,
                    born_host,
                    store_timestamp,
                    store_host,
                    reconsume_times,
                    prepared_offset,
                    body_length,
                ),
                body,
                _LENGTH_BYTES[topic_length],
                topic,
                properties_length.to_bytes(2),
                properties,
            )
        )
    sys_flag = _with_host_bits(sys_flag, born_host, store_host)
    if topic_length <= TOPIC_LIMIT_V1:
        magic, topic_head = MAGIC_V1, _LENGTH_BYTES[topic_length]
    else:
        magic, topic_head = MAGIC_V2, _SHORT.pack(topic_length)
    size = 75 + len(born_host) + len(store_host) + body_length + len(topic_head) - 1 + topic_length + properties_length
    return b"".join(
        (
            _HEAD.pack(
                size, magic, body_crc(body), queue_id, flag, queue_offset, physical_offset, sys_flag, born_timestamp
            ),
            born_host,
            _LONG.pack(store_timestamp),
            store_host,
            _TAIL.pack(reconsume_times, prepared_offset, body_length),
            body,
            topic_head,
            topic,
            _SHORT.pack(properties_length),
            properties,
        )
    )


class RecordTemplate:
    """What the records of one batch have in common, encoded once; arguments as for `encode_record`.

    A record is `pack_head(size, magic, body crc, queue id, flag, queue offset, physical offset, fixed, body length)`,
    the body, `topic`, the length of the properties as an unsigned short, and the properties.
    """

    __slots__ = ("fixed", "magic", "pack_head", "topic")

    def __init__(
        self,
        sys_flag: int,
        born_timestamp: int,
        born_host: bytes,
        store_timestamp: int,
        store_host: bytes,
        reconsume_times: int,
        topic: bytes,
    ) -> None:
        topic_length = len(topic)
        self.fixed = b"".join(
            (
                _INT_AND_LONG.pack(_with_host_bits(sys_flag, born_host, store_host), born_timestamp),
                born_host,
                _LONG.pack(store_timestamp),
                store_host,
                _INT_AND_LONG.pack(reconsume_times, 0),
            )
        )
        self.pack_head = _TEMPLATE_HEADS[len(self.fixed)].pack
        if topic_length <= TOPIC_LIMIT_V1:
            self.magic, self.topic = MAGIC_V1, _LENGTH_BYTES[topic_length] + topic
        else:
            self.magic, self.topic = MAGIC_V2, _SHORT.pack(topic_length) + topic


def decode_stored(buffer: bytes | memoryview, offset: int = 0, *, check_crc: bool = False) -> MessageExt:
    """The message at `offset`. Raises BodyError where there is none, or, with `check_crc`, a damaged body."""
    view = memoryview(buffer)
    try:
        (
            size,
            magic,
            crc,
            queue_id,
            flag,
            queue_offset,
            physical_offset,
            sys_flag,
            born_timestamp,
        ) = _HEAD.unpack_from(view, offset)
        if magic not in (MAGIC_V1, MAGIC_V2):
            raise BodyError(f"no message at {offset}: magic {magic & 0xFFFFFFFF:08x}")
        end = offset + size
        if size < FIXED_BYTES_V4 or end > len(view):
            raise BodyError(f"message at {offset} of {size} bytes runs past the buffer")
        position = offset + BORN_HOST_POSITION
        born_end = position + (20 if sys_flag & SYSFLAG_BORN_HOST_V6 else 8)
        born_host = bytes(view[position:born_end])
        (store_timestamp,) = _LONG.unpack_from(view, born_end)
        position = born_end + 8
        store_end = position + (20 if sys_flag & SYSFLAG_STORE_HOST_V6 else 8)
        store_host = bytes(view[position:store_end])
        reconsume_times, prepared_offset, body_length = _TAIL.unpack_from(view, store_end)
        body_start = store_end + 16
        body_end = body_start + body_length
        if body_length < 0 or body_end >= end:
            raise BodyError(f"body of the message at {offset} runs past it")
        body = bytes(view[body_start:body_end])
        if magic == MAGIC_V1:
            topic_start = body_end + 1
            topic_end = topic_start + view[body_end]
        else:
            topic_start = body_end + 2
            topic_end = topic_start + _SHORT.unpack_from(view, body_end)[0]
        if topic_end + 2 > end or topic_end < topic_start:
            raise BodyError(f"topic of the message at {offset} runs past it")
        (properties_length,) = _SHORT.unpack_from(view, topic_end)
        properties_end = topic_end + 2 + properties_length
        if properties_length < 0 or properties_end > end:
            raise BodyError(f"properties of the message at {offset} run past it")
        topic = str(view[topic_start:topic_end], "utf-8")
        properties = str(view[topic_end + 2 : properties_end], "utf-8", "replace")
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise BodyError(f"message at {offset} cannot be read: {error}") from error
    if check_crc and body_crc(body) != crc:
        raise BodyError(f"message at {offset}: body does not match its checksum")
    return MessageExt(
        topic=topic,
        body=body,
        flag=flag,
        properties=string_to_properties(properties),
        queue_id=queue_id,
        queue_offset=queue_offset,
        physical_offset=physical_offset,
        store_size=size,
        sys_flag=sys_flag,
        body_crc=crc,
        born_timestamp=born_timestamp,
        born_host=bytes_to_host(born_host),
        store_timestamp=store_timestamp,
        store_host=bytes_to_host(store_host),
        reconsume_times=reconsume_times,
        prepared_transaction_offset=prepared_offset,
        offset_message_id=offset_msg_id(store_host, physical_offset & 0xFFFFFFFFFFFFFFFF),
    )


def decode_stored_many(buffer: bytes | memoryview, *, check_crc: bool = False) -> list[MessageExt]:
    """Messages back to back, as in a pull answer. Raises BodyError."""
    messages: list[MessageExt] = []
    position = 0
    end = len(buffer)
    while position < end:
        message = decode_stored(buffer, position, check_crc=check_crc)
        messages.append(message)
        position += message.store_size
    return messages


# ---------------------------------------------------------------------------------------------------------- batches


def encode_batch_item(flag: int, body: bytes, properties: bytes) -> bytes:
    """One message of a batch body. Raises BodyError where the properties are over 32,767 bytes."""
    if len(properties) > 32_767:
        raise BodyError(f"properties of {len(properties)} bytes are over the limit of 32767")
    size = 22 + len(body) + len(properties)
    return b"".join((_BATCH_HEAD.pack(size, 0, 0, flag, len(body)), body, _SHORT.pack(len(properties)), properties))


def encode_batch(messages: Iterable[Message]) -> bytes:
    """The body of SEND_BATCH_MESSAGE."""
    return b"".join(
        encode_batch_item(message.flag, message.body, properties_to_string(message.properties).encode())
        for message in messages
    )


def iter_batch(body: bytes | memoryview) -> Iterator[tuple[int, bytes, bytes]]:
    """(flag, body, properties bytes) of each message. Raises BodyError on the first that does not add up."""
    data = bytes(body) if isinstance(body, memoryview) else body
    position = 0
    end = len(data)
    while position < end:
        try:
            size, flag, body_length = _unpack_batch_head(data, position)
            body_start = position + 20
            properties_start = body_start + body_length + 2
            next_position = position + size
            if body_length < 0 or next_position > end or properties_start > next_position:
                raise BodyError(f"batch item at {position} of {size} bytes does not fit")
            (properties_length,) = _unpack_short(data, properties_start - 2)
        except struct.error as error:
            raise BodyError(f"batch item at {position} is cut short") from error
        properties_end = properties_start + properties_length
        if properties_length < 0 or properties_end > next_position:
            raise BodyError(f"properties of the batch item at {position} do not fit")
        yield flag, data[body_start : properties_start - 2], data[properties_start:properties_end]
        position = next_position
