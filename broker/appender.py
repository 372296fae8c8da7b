"""One message into the open batch, the careful way: any topic, any host, with or without a key.

The straight way of ordinary sends and a client's batches (`processors.send`, `processors.send_batch`) do the same by
themselves, for many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import define

from broker.records import Facts, find_property, join_properties
from remoting.bodies import TopicConfig
from remoting.codes import PERM_READ_WRITE, SCHEDULE_TOPIC
from remoting.message import UniqKeyGenerator
from remoting.message_codec import encode_record, record_size

if TYPE_CHECKING:
    from broker.staging import Staged
    from broker.state import BrokerState

_SCHEDULE: Final = SCHEDULE_TOPIC.encode()


@define
class Target:
    """Where a checked message goes: after retry limit, delay and random queue are decided."""

    topic: bytes
    queue_id: int
    properties: bytes
    answer_queue_id: int


def delayed(topic: bytes, queue_id: int, level: int, pairs: dict[bytes, bytes]) -> Target:
    """A message of a delay level, which goes to its real topic when it is due (semantics.md 3.1)."""
    pairs[b"DELAY"] = b"%d" % level
    pairs[b"REAL_TOPIC"] = topic
    pairs[b"REAL_QID"] = b"%d" % queue_id
    return Target(_SCHEDULE, level - 1, join_properties(pairs), queue_id)


def one_queue_topic(name: str) -> TopicConfig:
    """What dead letters of a group go to."""
    return TopicConfig(topic_name=name, read_queue_nums=1, write_queue_nums=1, perm=PERM_READ_WRITE)


class Appender:
    """One per node: completes what clients send, and appends it."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._store_host = state.store_host
        self._facts = state.facts
        config = state.config
        self.suffix = (
            f"CLUSTER\x01{config.cluster}\x02MSG_REGION\x01{config.region_id}\x02"
            f"TRACE_ON\x01{'true' if config.trace_on else 'false'}\x02"
        ).encode()
        """What every stored message's properties end in."""
        ids = state.env.ids
        self._unique_keys = UniqKeyGenerator(state.store_host[:-4], ids.pid, ids.salt(4))
        self._wall_ms = state.env.clock.wall_ms

    def keyed(self, properties: bytes) -> tuple[bytes, bytes, Facts]:
        """Properties as `complete` makes them, their UNIQ_KEY, and what they mean."""
        found = self._facts.keyed(properties)
        if found is not None:
            return properties, *found
        properties, unique, rest = self.complete(properties)
        return properties, unique, self._facts.of(rest)

    def complete(self, properties: bytes) -> tuple[bytes, bytes, bytes]:
        """Properties with a closing 0x02 and a UNIQ_KEY, that key, and the properties without a key made here."""
        if properties and properties[-1] != 2:
            properties += b"\x02"
        unique = find_property(properties, b"UNIQ_KEY\x01")
        if unique is None:
            unique = self._unique_keys.next(self._wall_ms()).encode()
            return properties + b"UNIQ_KEY\x01" + unique + b"\x02", unique, properties
        return properties, unique, properties

    def append(
        self,
        topic: bytes,
        queue_id: int,
        flag: int,
        sys_flag: int,
        born_timestamp: int,
        born_host: bytes,
        reconsume_times: int,
        body: bytes,
        properties: bytes,
    ) -> tuple[Staged, int, int]:
        """One record into the open batch: (staged, physical offset, queue offset).

        Raises NotLeader, Overloaded, TooLarge: then nothing was logged.
        """
        state = self._state
        size = record_size(
            len(body),
            len(topic),
            len(properties),
            born_v6=len(born_host) != 8,
            store_v6=len(self._store_host) != 8,
        )
        physical = state.group.reserve(size)
        staged = state.open_staged(physical)
        queue = state.queues.pending_queue(topic, queue_id)
        store_ms = state.staging.next_store_ms()
        record = encode_record(
            queue_id,
            flag,
            queue.next_offset,
            physical,
            sys_flag,
            born_timestamp,
            born_host,
            store_ms,
            self._store_host,
            reconsume_times,
            0,
            body,
            topic,
            properties,
        )
        tags_code = state.staging.tags_code_of(topic, queue_id, properties, store_ms)
        queue_offset = state.staging.stage_record(staged, queue, physical, size, tags_code, store_ms)
        state.staging.stage_keys(staged, topic, properties, physical)
        state.group.add_record(record)
        return staged, physical, queue_offset
