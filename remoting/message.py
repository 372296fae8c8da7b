"""Messages, queues, property strings, message ids and Java's string hash (store.md 2, 3, 4 and 6)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

import msgspec

from remoting.errors import BodyError

# sysFlag bits of a message.
SYSFLAG_COMPRESSED: Final = 1
SYSFLAG_MULTI_TAGS: Final = 2
SYSFLAG_TRANSACTION_MASK: Final = 12
SYSFLAG_NOT_TRANSACTION: Final = 0
SYSFLAG_PREPARED: Final = 4
SYSFLAG_COMMIT: Final = 8
SYSFLAG_ROLLBACK: Final = 12
SYSFLAG_BORN_HOST_V6: Final = 16
SYSFLAG_STORE_HOST_V6: Final = 32
SYSFLAG_NEED_UNWRAP: Final = 64
SYSFLAG_INNER_BATCH: Final = 128
SYSFLAG_COMPRESSION_MASK: Final = 0x700
SYSFLAG_LZ4: Final = 0x100
SYSFLAG_ZSTD: Final = 0x200
SYSFLAG_ZLIB: Final = 0x300

PROPERTY_KEYS: Final = "KEYS"
PROPERTY_TAGS: Final = "TAGS"
PROPERTY_WAIT: Final = "WAIT"
PROPERTY_UNIQ_KEY: Final = "UNIQ_KEY"
PROPERTY_DELAY: Final = "DELAY"
PROPERTY_RETRY_TOPIC: Final = "RETRY_TOPIC"
PROPERTY_ORIGIN_MESSAGE_ID: Final = "ORIGIN_MESSAGE_ID"
PROPERTY_REAL_TOPIC: Final = "REAL_TOPIC"
PROPERTY_REAL_QID: Final = "REAL_QID"
PROPERTY_TRAN_MSG: Final = "TRAN_MSG"
PROPERTY_PGROUP: Final = "PGROUP"
PROPERTY_RECONSUME_TIME: Final = "RECONSUME_TIME"
PROPERTY_MAX_RECONSUME_TIMES: Final = "MAX_RECONSUME_TIMES"
PROPERTY_CLUSTER: Final = "CLUSTER"
PROPERTY_MSG_REGION: Final = "MSG_REGION"
PROPERTY_TRACE_ON: Final = "TRACE_ON"
PROPERTY_MIN_OFFSET: Final = "MIN_OFFSET"
PROPERTY_MAX_OFFSET: Final = "MAX_OFFSET"
PROPERTY_CONSUME_START_TIME: Final = "CONSUME_START_TIME"
PROPERTY_SHARDING_KEY: Final = "__SHARDINGKEY"
PROPERTY_DLQ_ORIGIN_TOPIC: Final = "DLQ_ORIGIN_TOPIC"
PROPERTY_DLQ_ORIGIN_MESSAGE_ID: Final = "DLQ_ORIGIN_MESSAGE_ID"
PROPERTY_MSG_TYPE: Final = "MSG_TYPE"
PROPERTY_CORRELATION_ID: Final = "CORRELATION_ID"
PROPERTY_TIMER_DELAY_SEC: Final = "TIMER_DELAY_SEC"
PROPERTY_TIMER_DELAY_MS: Final = "TIMER_DELAY_MS"
PROPERTY_TIMER_DELIVER_MS: Final = "TIMER_DELIVER_MS"
PROPERTY_INNER_NUM: Final = "INNER_NUM"
PROPERTY_POP_CK: Final = "POP_CK"

RESERVED_PROPERTIES: Final = frozenset(
    {
        PROPERTY_KEYS,
        PROPERTY_TAGS,
        PROPERTY_WAIT,
        PROPERTY_DELAY,
        PROPERTY_RETRY_TOPIC,
        PROPERTY_REAL_TOPIC,
        PROPERTY_REAL_QID,
        PROPERTY_TRAN_MSG,
        PROPERTY_PGROUP,
        PROPERTY_MIN_OFFSET,
        PROPERTY_MAX_OFFSET,
        "BUYER_ID",
        PROPERTY_ORIGIN_MESSAGE_ID,
        "TRANSFER_FLAG",
        "CORRECTION_FLAG",
        "MQ2_FLAG",
        PROPERTY_RECONSUME_TIME,
        PROPERTY_MSG_REGION,
        PROPERTY_TRACE_ON,
        PROPERTY_UNIQ_KEY,
        "EXTEND_UNIQ_INFO",
        PROPERTY_MAX_RECONSUME_TIMES,
        PROPERTY_CONSUME_START_TIME,
        PROPERTY_POP_CK,
        "POP_CK_OFFSET",
        "1ST_POP_TIME",
        "TRAN_PREPARED_QUEUE_OFFSET",
        "DUP_INFO",
        "INSTANCE_ID",
        PROPERTY_CORRELATION_ID,
        "REPLY_TO_CLIENT",
        "TTL",
        "ARRIVE_TIME",
        "PUSH_REPLY_TIME",
        PROPERTY_CLUSTER,
        PROPERTY_MSG_TYPE,
    }
)
"""Names an application must not set itself."""

NAME_VALUE_SEPARATOR: Final = "\x01"
PROPERTY_SEPARATOR: Final = "\x02"
PROPERTIES_LIMIT_BYTES: Final = 32_767


class MessageQueue(msgspec.Struct, frozen=True, order=True, rename="camel"):
    """One queue of a topic. Ordered by topic, broker name, queue id, as rebalance needs it."""

    topic: str
    broker_name: str
    queue_id: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.broker_name}/{self.queue_id}"


class Message(msgspec.Struct, kw_only=True):
    """What a producer sends. `properties` holds tags and keys too, under their property names."""

    topic: str
    body: bytes
    flag: int = 0
    properties: dict[str, str] = {}

    @property
    def tags(self) -> str:
        return self.properties.get(PROPERTY_TAGS, "")

    @property
    def keys(self) -> str:
        return self.properties.get(PROPERTY_KEYS, "")

    @property
    def unique_key(self) -> str:
        return self.properties.get(PROPERTY_UNIQ_KEY, "")


class MessageExt(Message, kw_only=True):
    """A stored message. Times are milliseconds since the epoch, hosts "address:port"."""

    queue_id: int = 0
    queue_offset: int = 0
    physical_offset: int = 0
    store_size: int = 0
    sys_flag: int = 0
    body_crc: int = 0
    born_timestamp: int = 0
    born_host: str = ""
    store_timestamp: int = 0
    store_host: str = ""
    reconsume_times: int = 0
    prepared_transaction_offset: int = 0
    offset_message_id: str = ""
    broker_name: str = ""

    @property
    def message_id(self) -> str:
        """The client's own id where the message has one, else the broker's."""
        return self.properties.get(PROPERTY_UNIQ_KEY) or self.offset_message_id


# ------------------------------------------------------------------------------------------------------ properties


def properties_to_string(properties: Mapping[str, str]) -> str:
    """The text form, with a separator after the last pair as 5.x writes it. Empty values are left out."""
    return "".join(f"{name}\x01{value}\x02" for name, value in properties.items() if name and value)


def string_to_properties(text: str) -> dict[str, str]:
    """Reads the text form of any client: pieces without a name or a value are dropped, later duplicates win."""
    properties: dict[str, str] = {}
    for piece in text.split(PROPERTY_SEPARATOR):
        name, _, value = piece.partition(NAME_VALUE_SEPARATOR)
        if name and value:
            properties[name] = value
    return properties


def property_of(text: str, name: str) -> str | None:
    """One property of the text form without reading the others; the last one where it is there twice."""
    marker = f"\x02{name}\x01"
    start = text.rfind(marker)
    if start >= 0:
        start += len(marker)
    elif text.startswith(marker[1:]):
        start = len(marker) - 1
    else:
        return None
    end = text.find("\x02", start)
    value = text[start:] if end < 0 else text[start:end]
    if not value:
        # An empty value is no value: an earlier pair of that name counts, as in the full reading.
        return string_to_properties(text).get(name)
    return value


# ---------------------------------------------------------------------------------------------------------- hashes


def java_hash(text: str) -> int:
    """`String.hashCode()`: over UTF-16 units, wrapping at 32 bits, signed."""
    value = 0
    if text.isascii():
        for byte in text.encode():
            value = (value * 31 + byte) & 0xFFFFFFFF
    else:
        encoded = text.encode("utf-16-be", "surrogatepass")
        for (unit,) in struct.iter_unpack(">H", encoded):
            value = (value * 31 + unit) & 0xFFFFFFFF
    return value - 0x1_0000_0000 if value & 0x8000_0000 else value


@lru_cache(maxsize=4096)
def tags_code(tag: str | None) -> int:
    """The code kept in a consume-queue unit: 0 for no tag, else the signed hash of the whole TAGS text."""
    return java_hash(tag) if tag else 0


def index_key_hash(key: str) -> int:
    """The hash of an index file entry: the absolute value, and 0 where Java's has none. `key` is "topic#key"."""
    value = abs(java_hash(key))
    return 0 if value > 0x7FFFFFFF else value


# ------------------------------------------------------------------------------------------------------------- ids


@lru_cache(maxsize=1024)
def host_to_bytes(host: str, port: int) -> bytes:
    """Address (4 or 16 bytes) and int32 port. Raises ValueError where `host` is no IP address."""
    return ip_address(host.partition("%")[0]).packed + port.to_bytes(4)


@lru_cache(maxsize=1024)
def bytes_to_host(packed: bytes) -> str:
    """ "address:port" (IPv6 in brackets) of 8 or 20 bytes. Raises BodyError."""
    port = int.from_bytes(packed[-4:])
    if len(packed) == 8:
        return f"{packed[0]}.{packed[1]}.{packed[2]}.{packed[3]}:{port}"
    if len(packed) == 20:
        return f"[{ip_address(packed[:16])}]:{port}"
    raise BodyError(f"a host has 8 or 20 bytes, not {len(packed)}")


def offset_msg_id(host_port_bytes: bytes, physical_offset: int) -> str:
    """The broker's message id: where to ask, and the position in the log."""
    return (host_port_bytes + physical_offset.to_bytes(8)).hex().upper()


def parse_offset_msg_id(text: str) -> tuple[str, int, int]:
    """(host, port, physical offset) of an offsetMsgId. Raises ValueError."""
    raw = bytes.fromhex(text)
    if len(raw) not in (16, 28) or len(text) != 2 * len(raw):
        raise ValueError(f"no message id: {text!r}")
    host = str(ip_address(raw[:-12]))
    port = int.from_bytes(raw[-12:-8])
    if port > 65_535:
        raise ValueError(f"no message id of a broker: {text!r}")
    return host, port, int.from_bytes(raw[-8:])


_UNIQ_TAIL: Final = struct.Struct(">iH")


class UniqKeyGenerator:
    """Makes UNIQ_KEYs: ip, pid, salt, milliseconds since the start of the month, counter.

    The salt stands where Java puts the hash of the class loader; it keeps two clients of one process apart. The
    counter has 16 bits, so the time is pushed on where more than 65,536 ids are asked for within a millisecond.
    """

    __slots__ = ("_counter", "_head", "_last_ms", "_month_start_ms", "_next_month_ms", "_wrapped_ms")

    def __init__(self, address: bytes, pid: int, salt: bytes) -> None:
        """`address` has 4 or 16 bytes, `salt` 4."""
        if len(address) not in (4, 16) or len(salt) != 4:
            raise ValueError("address has 4 or 16 bytes, salt has 4")
        self._head = (address + (pid & 0xFFFF).to_bytes(2) + salt).hex().upper()
        self._counter = 0
        self._last_ms = 0
        self._wrapped_ms = -1
        self._month_start_ms = 0
        self._next_month_ms = -1

    def next(self, wall_ms: int) -> str:
        """A new id. `wall_ms` is the wall clock, in milliseconds since the epoch."""
        counter = self._counter
        self._counter = (counter + 1) & 0xFFFF
        now = max(wall_ms, self._last_ms)
        if counter == 0:
            if now <= self._wrapped_ms:
                now = self._wrapped_ms + 1
            self._wrapped_ms = now
        self._last_ms = now
        if now >= self._next_month_ms or now < self._month_start_ms:
            self._month_start_ms, self._next_month_ms = month_bounds_ms(now)
        elapsed = now - self._month_start_ms
        return f"{self._head}{elapsed:08X}{counter:04X}"


def month_bounds_ms(wall_ms: int) -> tuple[int, int]:
    """First millisecond of the month (UTC) that holds `wall_ms`, and of the next one."""
    # Days to civil date, after the shifted-March calendar: exact for all dates, without the datetime module.
    days = wall_ms // 86_400_000 + 719_468
    era_day = days % 146_097
    year_of_era = (era_day - era_day // 1_460 + era_day // 36_524 - era_day // 146_096) // 365
    day_of_year = era_day - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month_index = (5 * day_of_year + 2) // 153
    day_of_month = day_of_year - (153 * month_index + 2) // 5
    leap = (year_of_era + 1) % 4 == 0 and ((year_of_era + 1) % 100 != 0 or (year_of_era + 1) % 400 == 0)
    lengths = (31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 29 if leap else 28)
    start = (wall_ms // 86_400_000 - day_of_month) * 86_400_000
    return start, start + lengths[month_index] * 86_400_000


def unique_key_time_ms(unique_key: str, wall_ms: int) -> int | None:
    """The wall time in a UNIQ_KEY as Java and this client write it, taken to lie within the last month; else None."""
    try:
        raw = bytes.fromhex(unique_key)
    except ValueError:
        return None
    if len(raw) not in (16, 28):
        return None
    elapsed: int = _UNIQ_TAIL.unpack(raw[-6:])[0]
    start, _ = month_bounds_ms(wall_ms)
    made = start + elapsed
    if made >= wall_ms + 86_400_000:
        made = month_bounds_ms(start - 1)[0] + elapsed
    return made
