"""What the records of one entry do to the pending side of the tables (design 2: committed + pending).

On the leader the send path stages its records one by one as it encodes them; followers, and every node at its start,
stage whole entries from their bytes: both must arrive at the same tables.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from broker.dedup import DedupWindow, dedup_key
from broker.delay import DelayProgress
from broker.key_index import topic_seed
from broker.records import (
    MAGIC_V1,
    SYS_BORN_IPV6,
    SYS_STORE_IPV6,
    UNIT,
    Facts,
    PropertyFacts,
    decode_record,
    find_property,
)
from broker.tables import InvariantBroken
from remoting.codes import SCHEDULE_TOPIC

if TYPE_CHECKING:
    from broker.answers import Done, SendWaiter
    from broker.consume_queue import QueueState, QueueTable

_unpack_head = struct.Struct(">IIIi4xqqi16xq8xi8xi").unpack_from
"""Size, magic, body crc, queue id, queue offset, physical offset, sysFlag, store time, reconsume times, body length."""
_pack_unit = UNIT.pack
_crc32 = zlib.crc32
_IPV6_BITS = SYS_BORN_IPV6 | SYS_STORE_IPV6
_SCHEDULE = SCHEDULE_TOPIC.encode()


class Staged:
    """What one entry does, from its staging to its apply or discard."""

    __slots__ = (
        "by_queue",
        "callbacks",
        "count",
        "covered",
        "dedup_keys",
        "hashes",
        "is_orphan",
        "ops",
        "positions",
        "removed",
        "start",
        "store_ms",
        "waiters",
    )

    def __init__(self, start: int) -> None:
        self.start = start
        """Physical offset of the first record."""
        self.by_queue: dict[QueueState, list[bytes]] = {}
        """ConsumeQueue units per queue, in log order."""
        self.count = 0
        self.store_ms = 0
        self.dedup_keys: list[int] = []
        self.hashes: list[int] = []
        self.positions: list[int] = []
        """Key index rows: two columns."""
        self.waiters: list[SendWaiter] = []
        self.callbacks: list[Done] = []
        self.ops: list[list[Any]] = []
        self.removed: list[list[QueueState]] = []
        """Per staged "topic_del": the queues it took out of the pending view."""
        self.is_orphan = False
        """Who waited for it has been told that the outcome is unknown; nobody is to wait for it any more."""
        self.covered = False
        """The tables already hold this entry (checkpoint); only what is kept in files is made from it again."""


class Staging:
    """Moves queues, dedup window and key index rows on by the records of an entry. One per node."""

    def __init__(
        self, queues: QueueTable, dedup: DedupWindow, facts: PropertyFacts, wall_ms: Callable[[], int]
    ) -> None:
        self._queues = queues
        self._dedup = dedup
        self._facts = facts
        self._wall_ms = wall_ms
        self.last_store_ms = 0
        """Store time of the newest staged record; the next one is not earlier."""

    def next_store_ms(self) -> int:
        """Store time of a record made now: never before the last one's."""
        now = self._wall_ms()
        if now > self.last_store_ms:
            self.last_store_ms = now
            return now
        return self.last_store_ms

    # ------------------------------------------------------------------------------------- records of an own entry

    def stage_record(
        self, staged: Staged, queue: QueueState, physical_offset: int, size: int, tags_code: int, store_ms: int
    ) -> int:
        """Stage one record of an own entry; returns the queue offset it has. Keys are added with `stage_keys`."""
        queue_offset = queue.next_offset
        queue.next_offset = queue_offset + 1
        units = staged.by_queue.get(queue)
        if units is None:
            units = staged.by_queue[queue] = []
        units.append(_pack_unit(physical_offset, size, tags_code))
        staged.count += 1
        staged.store_ms = store_ms
        return queue_offset

    def stage_keys(self, staged: Staged, topic: bytes, properties: bytes, physical_offset: int) -> None:
        """Key index rows of one record."""
        seed = topic_seed(topic)
        unique = find_property(properties, b"UNIQ_KEY\x01")
        if unique is not None:
            staged.hashes.append(_crc32(unique, seed))
            staged.positions.append(physical_offset)
        words = find_property(properties, b"KEYS\x01")
        if words is not None:
            for word in words.split():
                staged.hashes.append(_crc32(word, seed))
                staged.positions.append(physical_offset)

    def tags_code_of(self, topic: bytes, queue_id: int, properties: bytes, store_ms: int) -> int:
        """The tags code of a unit: hash of TAGS, or the delivery time in the schedule topic."""
        if topic == _SCHEDULE:
            return DelayProgress.due_ms(queue_id + 1, store_ms)
        tag = find_property(properties, b"TAGS\x01")
        return self._facts.tag_codes.of(tag) if tag is not None else 0

    def stage_dedup(self, staged: Staged, topic: bytes, unique: bytes, body_crc: int, physical_offset: int) -> None:
        """A client's own message enters the window."""
        if self._dedup.enabled:
            key = dedup_key(topic_seed(topic), unique, body_crc)
            staged.dedup_keys += self._dedup.enter([key], [physical_offset])

    # -------------------------------------------------------------------------------------- entries from their bytes

    def _key_and_facts(self, properties: bytes) -> tuple[bytes, Facts]:
        found = self._facts.keyed(properties)
        if found is not None:
            return found
        return find_property(properties, b"UNIQ_KEY\x01") or b"", self._facts.of(properties)

    def stage_records(self, staged: Staged, count: int, data: bytes, base: int) -> int:
        """Hot: every record of every follower comes through here. Returns where the records end."""
        by_queue = staged.by_queue
        targets: dict[tuple[bytes, int], tuple[QueueState, list[bytes]]] = {}
        topic, queue_id = b"", -1
        before, before_bytes, behind, behind_bytes, shape_facts = self._facts.shape
        dedup_keys: list[int] = []
        dedup_positions: list[int] = []
        add_dedup_key = dedup_keys.append
        add_dedup_position = dedup_positions.append
        add_hash = staged.hashes.append
        add_position = staged.positions.append
        at = 0
        store_ms = self.last_store_ms
        for _ in range(count):
            size, magic, body_crc, to_queue, queue_offset, physical, sys_flag, store_ms, reconsumed, body_length = (
                _unpack_head(data, at)
            )
            end = at + size
            if magic == MAGIC_V1 and not sys_flag & _IPV6_BITS:
                topic_start = at + 89 + body_length
                topic_end = topic_start + data[topic_start - 1]
                to_topic = data[topic_start:topic_end]
            else:
                record = decode_record(data, at)
                to_topic, store_ms, reconsumed = record.topic, record.store_timestamp, record.reconsume_times
                topic_end = end - len(record.properties) - 2
            if to_queue != queue_id or to_topic != topic:
                topic, queue_id = to_topic, to_queue
                target = targets.get((topic, queue_id))
                if target is None:
                    queue = self._queues.pending_queue(topic, queue_id)
                    target = targets[topic, queue_id] = queue, by_queue.setdefault(queue, [])
                queue, units = target
            if (queue_offset != queue.next_offset or physical != base + at) and not (
                staged.covered and physical == base + at and self._queues.adopt(queue, queue_offset)
            ):
                raise InvariantBroken(
                    f"record at {base + at} says queue offset {queue_offset} at {physical} where {queue.topic} "
                    f"{queue_id} is at {queue.next_offset}"
                )
            queue.next_offset = queue_offset + 1

            start = topic_end + 2
            key_start = start + before_bytes
            key_end = end + behind_bytes
            unique = data[key_start:key_end]
            if data[start:key_start] == before and data[key_end:end] == behind and unique.isalnum():
                tags_code, words, _is_ordinary = shape_facts
            else:
                unique, (tags_code, words, _is_ordinary) = self._key_and_facts(data[start:end])
                before, before_bytes, behind, behind_bytes, shape_facts = self._facts.shape
            if queue.is_schedule:
                tags_code = DelayProgress.due_ms(queue_id + 1, store_ms)
            if unique:
                key_hash = _crc32(unique, queue.index_seed)
                add_hash(key_hash)
                add_position(physical)
                if not reconsumed:
                    add_dedup_key(key_hash << 31 | body_crc)  # dedup_key, in place
                    add_dedup_position(physical)
            for word in words:
                add_hash(_crc32(word, queue.index_seed))
                add_position(physical)
            units.append(_pack_unit(physical, size, tags_code))
            at = end
        # Only what clients send is deduplicated; entries with operations hold deliveries, whose keys are in use.
        if self._dedup.enabled and at == len(data):
            staged.dedup_keys = self._dedup.enter(dedup_keys, dedup_positions)
        staged.count = count
        staged.store_ms = store_ms
        if store_ms > self.last_store_ms:
            self.last_store_ms = store_ms
        return at
