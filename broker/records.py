"""Message records as they lie in the log (store.md 2): what the send and dispatch paths need of them.

Encoding in general is remoting.message_codec's; here are the layout constants of the hot paths, the properties string
read without building a dict, and records decoded without touching their properties.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from remoting.message import java_hash

MAGIC_V1: Final = 0xDAA320A7
MAGIC_V2: Final = 0xDAA320AB
SYS_MULTI_TAGS: Final = 2
SYS_TRANSACTION_MASK: Final = 12
SYS_TRANSACTION_PREPARED: Final = 4
SYS_BORN_IPV6: Final = 16
SYS_STORE_IPV6: Final = 32

HEAD: Final = struct.Struct(">IIIiiqqiq8sq8siqi")
"""Everything before the body where both hosts are IPv4: 88 bytes."""
HEAD_BYTES: Final = 88
V1_OVERHEAD_BYTES: Final = 91
"""A V1 record with IPv4 hosts without its body, topic and properties."""
MAX_V1_TOPIC_BYTES: Final = 127
UNIT: Final = struct.Struct(">qiq")
UNIT_BYTES: Final = 20

_BEFORE_HOSTS = struct.Struct(">IIIiiqqiq")
_INT64 = struct.Struct(">q")
_AFTER_HOSTS = struct.Struct(">iqi")
_UINT16 = struct.Struct(">H")

_TAGS = b"TAGS\x01"
_KEYS = b"KEYS\x01"


class RecordError(ValueError):
    """Bytes that are no message record, or no batch body."""


class Record(NamedTuple):
    """A decoded record, for the rare paths (send-back, delayed delivery, duplicate checks)."""

    size: int
    body_crc: int
    queue_id: int
    flag: int
    queue_offset: int
    physical_offset: int
    sys_flag: int
    born_timestamp: int
    born_host: bytes
    store_timestamp: int
    store_host: bytes
    reconsume_times: int
    prepared_offset: int
    body: bytes
    topic: bytes
    properties: bytes


def decode_record(data: bytes | memoryview, start: int = 0) -> Record:
    """One record. Raises RecordError where `data` holds none at `start`."""
    try:
        size, magic, body_crc, queue_id, flag, queue_offset, physical_offset, sys_flag, born_timestamp = (
            _BEFORE_HOSTS.unpack_from(data, start)
        )
        if magic not in (MAGIC_V1, MAGIC_V2) or start + size > len(data):
            raise RecordError(f"no message record at {start}")
        at = start + 48
        born_end = at + (20 if sys_flag & SYS_BORN_IPV6 else 8)
        born_host = bytes(data[at:born_end])
        (store_timestamp,) = _INT64.unpack_from(data, born_end)
        at = born_end + 8
        store_end = at + (20 if sys_flag & SYS_STORE_IPV6 else 8)
        store_host = bytes(data[at:store_end])
        reconsume_times, prepared_offset, body_length = _AFTER_HOSTS.unpack_from(data, store_end)
        at = store_end + 16
        body = bytes(data[at : at + body_length])
        at += body_length
        if magic == MAGIC_V1:
            topic_length = data[at]
            at += 1
        else:
            (topic_length,) = _UINT16.unpack_from(data, at)
            at += 2
        topic = bytes(data[at : at + topic_length])
        at += topic_length
        (properties_length,) = _UINT16.unpack_from(data, at)
        at += 2
        properties = bytes(data[at : at + properties_length])
        at += properties_length
    except (struct.error, IndexError) as error:
        raise RecordError(f"no message record at {start}: {error}") from error
    if at != start + size:
        raise RecordError(f"message record at {start} says {size} bytes and has {at - start}")
    return Record(
        size,
        body_crc,
        queue_id,
        flag,
        queue_offset,
        physical_offset,
        sys_flag,
        born_timestamp,
        born_host,
        store_timestamp,
        store_host,
        reconsume_times,
        prepared_offset,
        body,
        topic,
        properties,
    )


def store_timestamp_of(head: bytes | memoryview) -> int:
    """Store time (ms) from the first 76 bytes of a record."""
    at = 68 if head[39] & SYS_BORN_IPV6 else 56
    value: int = _INT64.unpack_from(head, at)[0]
    return value


STORE_TIMESTAMP_END: Final = 76


def find_property(data: bytes, name: bytes, start: int = 0, end: int | None = None) -> bytes | None:
    """Value of a property in the property string data[start:end]; `name` ends in 0x01. The last duplicate wins."""
    if end is None:
        end = len(data)
    limit = end
    while True:
        at = data.rfind(name, start, limit)
        if at < 0:
            return None
        if at == start or data[at - 1] == 2:
            value_start = at + len(name)
            value_end = data.find(b"\x02", value_start, end)
            return data[value_start : end if value_end < 0 else value_end] or None
        limit = at + len(name) - 1


def properties_dict(properties: bytes) -> dict[bytes, bytes]:
    """All pairs (store.md 3): pieces without 0x01, with an empty name or an empty value are dropped."""
    result: dict[bytes, bytes] = {}
    for piece in properties.split(b"\x02"):
        name, separator, value = piece.partition(b"\x01")
        if separator and name and value:
            result[name] = value
    return result


def join_properties(pairs: dict[bytes, bytes]) -> bytes:
    return b"".join([name + b"\x01" + value + b"\x02" for name, value in pairs.items()])


def int_or_zero(text: bytes | None) -> int:
    """The number in a property; 0 where there is none."""
    if not text:
        return 0
    try:
        return int(text)
    except ValueError:
        return 0


def are_ordinary(properties: bytes) -> bool:
    """Whether a send with these properties needs none of the careful way's looks at them."""
    return (
        b"DELAY\x01" not in properties
        and b"TRAN_MSG\x01" not in properties
        and b"TIMER_DEL" not in properties
        and b"POP_CK\x01" not in properties
    )


class TagCodes:
    """Java's String.hashCode of a tag, remembered for the few tags in use (store.md 4)."""

    __slots__ = ("known",)
    LIMIT: Final = 8_192

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}

    def of(self, tag: bytes) -> int:
        code = self.known.get(tag)
        if code is None:
            if len(self.known) >= self.LIMIT:
                self.known.clear()
            code = self.known[tag] = java_hash(tag.decode("utf-8", "replace"))
        return code


Facts = tuple[int, list[bytes], bool]
"""(tags code, words of KEYS, whether a send with these properties is an ordinary one)."""


Shape = tuple[bytes, int, bytes, int, Facts]
"""A property string around the value of its UNIQ_KEY: (what is before it, its length; what is behind it, minus its
length; facts). Where both stand, and between them letters and digits only, those are the key, and the facts apply."""


class PropertyFacts:
    """What property strings mean, remembered: but for their UNIQ_KEY most messages of a producer have the same ones."""

    __slots__ = ("known", "shape", "tag_codes")
    LIMIT: Final = 4_096
    LONGEST_BYTES: Final = 512

    def __init__(self) -> None:
        self.known: dict[bytes, Facts] = {}
        self.tag_codes = TagCodes()
        self.shape: Shape = (b"none", 1, b"", -1, (0, [], False))
        """Of the last property string that `keyed` was asked for; the hot paths try it in place, and ask only then."""

    def keyed(self, properties: bytes) -> tuple[bytes, Facts] | None:
        """UNIQ_KEY and facts of a property string as clients write it; None where it has no key or no closing 0x02."""
        found = properties.rfind(b"UNIQ_KEY\x01")
        value_end = properties.find(b"\x02", found)
        if found < 0 or value_end < 0 or (found and properties[found - 1] != 2) or properties[-1] != 2:
            return None
        value_start = found + 9
        unique = properties[value_start:value_end]
        facts = self.of(properties[:found] + properties[value_end + 1 :])
        if unique.isalnum():
            before, behind = properties[:value_start], properties[value_end:]
            self.shape = (before, value_start, behind, -len(behind), facts)
        return unique, facts

    def of(self, rest: bytes) -> Facts:
        """The facts of a property string (without its UNIQ_KEY, so that it is met again)."""
        facts = self.known.get(rest)
        return self._learn(rest) if facts is None else facts

    def _learn(self, rest: bytes) -> Facts:
        tag = find_property(rest, _TAGS)
        words = find_property(rest, _KEYS)
        facts = (
            self.tag_codes.of(tag) if tag is not None else 0,
            words.split() if words is not None else [],
            are_ordinary(rest),
        )
        if len(rest) <= self.LONGEST_BYTES:
            if len(self.known) >= self.LIMIT:
                self.known.clear()
            self.known[rest] = facts
        return facts
