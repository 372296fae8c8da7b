"""SEND_BATCH_MESSAGE: a client's batch, all of it in one entry (semantics.md 2, store.md 7)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from broker.answers import reason_of
from broker.dedup import dedup_key
from broker.key_index import topic_seed
from broker.records import (
    SYS_MULTI_TAGS,
    SYS_TRANSACTION_MASK,
    UNIT,
    V1_OVERHEAD_BYTES,
    Facts,
    find_property,
    int_or_zero,
)
from dledger.errors import NotLeader, Overloaded, TooLarge
from remoting.bodies import TopicConfig
from remoting.codes import FLAG_ONEWAY, ResponseCode
from remoting.errors import BodyError
from remoting.frames import SendHeader
from remoting.message import host_to_bytes
from remoting.message_codec import encode_record, iter_batch

if TYPE_CHECKING:
    from broker.appender import Appender
    from broker.processors.duplicates import Duplicates
    from broker.state import BrokerState

_pack_unit = UNIT.pack
_crc32 = zlib.crc32


class BatchSender:
    """Stores batches whose topic and header are checked."""

    def __init__(self, state: BrokerState, appender: Appender, duplicates: Duplicates) -> None:
        self._state = state
        self._group = state.group
        self._dedup = state.dedup
        self._config = state.config
        self._answers = state.answers
        self._facts = state.facts
        self._store_host = state.store_host
        self._straight = len(state.store_host) == 8
        self._appender = appender
        self._suffix = appender.suffix
        self._duplicates = duplicates
        self._rng = state.env.rng("broker.send_batch")

    def send(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any) -> None:
        """A client's batch: all of it in one entry, so that it is stored as a whole or not at all."""
        try:
            messages = self._read(body, len(config.topic_name.encode()))
        except BodyError as error:
            self._answers.refuse_send(header, conn, ResponseCode.MESSAGE_ILLEGAL, f"the batch is illegal: {error}")
            return
        except TooLarge as error:
            self._answers.fail_send(header, conn, reason_of(error))
            return
        state = self._state
        topic = config.topic_name.encode()
        queue_id = header.queue_id if header.queue_id >= 0 else self._rng.randrange(config.write_queue_nums)
        dedup = self._dedup
        if dedup.enabled:
            key = dedup_key(topic_seed(topic), messages[0][3], messages[0][4])
            earlier = dedup.find(key)
            keys = [(message[3], message[4]) for message in messages]
            if earlier is not None and self._duplicates.is_answered(header, body, conn, topic, keys, key, earlier):
                return
        sys_flag = header.sys_flag & ~SYS_TRANSACTION_MASK
        if config.topic_filter_type == "MULTI_TAG":
            sys_flag |= SYS_MULTI_TAGS
        born_host = host_to_bytes(*conn.peer)
        extra = V1_OVERHEAD_BYTES + len(topic) + (12 if len(born_host) != 8 else 0) + (0 if self._straight else 12)
        total = sum([len(message[1]) + len(message[2]) + extra for message in messages])
        try:
            physical = self._group.reserve(total)
        except (NotLeader, Overloaded, TooLarge) as error:
            self._answers.fail_send(header, conn, reason_of(error))
            return
        staged = state.open_staged(physical)
        queue = state.queues.pending_queue(topic, queue_id)
        first_offset = queue_offset = queue.next_offset
        seed = queue.index_seed
        store_ms = staged.store_ms
        reconsumed = header.reconsume_times
        window = dedup.current if dedup.enabled and not reconsumed else None
        units = staged.by_queue.setdefault(queue, [])
        records: list[bytes] = []
        positions: list[int] = []
        for flag, message, properties, unique, body_crc, (tags_code, words, _is_ordinary) in messages:
            record = encode_record(
                queue_id,
                flag,
                queue_offset,
                physical,
                sys_flag,
                header.born_timestamp,
                born_host,
                store_ms,
                self._store_host,
                reconsumed,
                0,
                message,
                topic,
                properties,
            )
            queue_offset += 1
            units.append(_pack_unit(physical, len(record), tags_code))
            key_hash = _crc32(unique, seed)
            staged.hashes.append(key_hash)
            staged.positions.append(physical)
            for word in words:
                staged.hashes.append(_crc32(word, seed))
                staged.positions.append(physical)
            if window is not None:
                key = key_hash << 31 | body_crc
                if key in window:
                    key = dedup.free_key(key)
                window[key] = physical
                staged.dedup_keys.append(key)
            positions.append(physical)
            records.append(record)
            physical += len(record)
        queue.next_offset = queue_offset
        staged.count += len(records)
        self._group.add_records(records)

        def stored(ok: bool, reason: str | None) -> None:
            state.touch(conn)
            if ok:
                message_id = ",".join([self._answers.message_id(position) for position in positions])
                conn.write(self._answers.stored(header.opaque, message_id, queue_id, first_offset, ""))
            else:
                conn.write(self._answers.failed(header.opaque, reason))

        if not header.flag & FLAG_ONEWAY:
            staged.callbacks.append(stored)

    def _read(self, body: bytes, topic_bytes: int) -> list[tuple[int, bytes, bytes, bytes, int, Facts]]:
        """(flag, body, properties as stored, UNIQ_KEY, body CRC, facts) of each message.

        Raises BodyError, or TooLarge as soon as that is clear: 4 MiB of the smallest messages are 180,000 of them.
        """
        room = self._config.group.entry_bytes_max
        overhead = V1_OVERHEAD_BYTES + topic_bytes + len(self._suffix)
        suffix = self._suffix
        limit = self._config.max_properties_bytes - len(suffix)
        before, key_start, behind, key_end, shape_facts = self._facts.shape
        messages: list[tuple[int, bytes, bytes, bytes, int, Facts]] = []
        for flag, message, properties in iter_batch(body):
            unique = properties[key_start:key_end]
            if properties[:key_start] == before and properties[key_end:] == behind and unique.isalnum():
                facts = shape_facts
            else:
                properties, unique, facts = self._appender.keyed(properties)
                before, key_start, behind, key_end, shape_facts = self._facts.shape
            if not message or not unique or len(properties) > limit:
                raise BodyError("a message of the batch is empty, or its properties are too long or broken")
            if not facts[2] and int_or_zero(find_property(properties, b"DELAY\x01")) > 0:
                raise BodyError("messages of a batch cannot be delayed")
            room -= overhead + len(message) + len(properties)
            if room < 0:
                raise TooLarge("the stored form of the batch is larger than an entry may be")
            messages.append((flag, message, properties + suffix, unique, _crc32(message) & 0x7FFFFFFF, facts))
        return messages
