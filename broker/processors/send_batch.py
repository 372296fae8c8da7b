"""SEND_BATCH_MESSAGE: a client's batch, all of it in one entry (semantics.md 2, store.md 7)."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

from broker.answers import reason_of
from broker.dedup import dedup_key
from broker.key_index import topic_seed
from broker.records import (
    SYS_MULTI_TAGS,
    SYS_TRANSACTION_MASK,
    UNIT,
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
from remoting.message_codec import RecordTemplate, iter_batch, record_size

if TYPE_CHECKING:
    from broker.appender import Appender
    from broker.processors.duplicates import Duplicates
    from broker.state import BrokerState

_pack_unit = UNIT.pack
_pack_length = struct.Struct(">H").pack
_crc32 = zlib.crc32

_Message = tuple[int, bytes, bytes, bytes, int, Facts]
"""(flag, body, properties with a UNIQ_KEY, that key, body CRC, facts)."""


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
        self._appender = appender
        self._suffix = appender.suffix
        self._duplicates = duplicates
        self._rng = state.env.rng("broker.send_batch")

    def send(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any) -> None:
        """A client's batch: all of it in one entry, so that it is stored as a whole or not at all."""
        state = self._state
        topic = config.topic_name.encode()
        born_host = host_to_bytes(*conn.peer)
        store_host = self._store_host
        suffix = self._suffix
        overhead_bytes = record_size(
            0, len(topic), len(suffix), born_v6=len(born_host) != 8, store_v6=len(store_host) != 8
        )
        try:
            messages, total_bytes = self._read(body, overhead_bytes)
        except BodyError as error:
            self._answers.refuse_send(header, conn, ResponseCode.MESSAGE_ILLEGAL, f"the batch is illegal: {error}")
            return
        except TooLarge as error:
            self._answers.fail_send(header, conn, reason_of(error))
            return
        queue_id = header.queue_id if header.queue_id >= 0 else self._rng.randrange(config.write_queue_nums)
        seed = topic_seed(topic)
        dedup = self._dedup
        if dedup.enabled:
            key = dedup_key(seed, messages[0][3], messages[0][4])
            earlier = dedup.find(key)
            if earlier is not None:
                keys = [(message[3], message[4]) for message in messages]
                if self._duplicates.is_answered(header, body, conn, topic, keys, key, earlier):
                    return
        try:
            physical = self._group.reserve(total_bytes)
        except (NotLeader, Overloaded, TooLarge) as error:
            self._answers.fail_send(header, conn, reason_of(error))
            return
        staged = state.open_staged(physical)
        sys_flag = header.sys_flag & ~SYS_TRANSACTION_MASK
        if config.topic_filter_type == "MULTI_TAG":
            sys_flag |= SYS_MULTI_TAGS
        template = RecordTemplate(
            sys_flag, header.born_timestamp, born_host, staged.store_ms, store_host, header.reconsume_times, topic
        )
        pack_head, magic, fixed, topic_part = template.pack_head, template.magic, template.fixed, template.topic
        queue = state.queues.pending_queue(topic, queue_id)
        first_offset = queue_offset = queue.next_offset
        dedup_keys: list[int] = []
        units = staged.by_queue.setdefault(queue, [])
        hashes = staged.hashes
        rows = staged.positions
        records: list[bytes] = []
        positions: list[int] = []
        for flag, content, properties, unique, body_crc, (tags_code, words, _is_ordinary) in messages:
            body_bytes = len(content)
            properties_bytes = len(properties)
            size = overhead_bytes + body_bytes + properties_bytes
            records.append(
                b"".join(
                    (
                        pack_head(size, magic, body_crc, queue_id, flag, queue_offset, physical, fixed, body_bytes),
                        content,
                        topic_part,
                        _pack_length(properties_bytes + len(suffix)),
                        properties,
                        suffix,
                    )
                )
            )
            queue_offset += 1
            units.append(_pack_unit(physical, size, tags_code))
            key_hash = _crc32(unique, seed)
            hashes.append(key_hash)
            rows.append(physical)
            for word in words:
                hashes.append(_crc32(word, seed))
                rows.append(physical)
            dedup_keys.append(key_hash << 31 | body_crc)  # dedup_key, in place
            positions.append(physical)
            physical += size
        if dedup.enabled and not header.reconsume_times:
            staged.dedup_keys += dedup.enter(dedup_keys, positions)
        queue.next_offset = queue_offset
        staged.count += len(records)
        self._group.add_records(records)

        def stored(ok: bool, reason: str | None) -> None:
            state.touch(conn)
            if ok:
                message_ids = self._answers.message_ids(positions)
                conn.write(self._answers.stored(header.opaque, message_ids, queue_id, first_offset, ""))
            else:
                conn.write(self._answers.failed(header.opaque, reason))

        if not header.flag & FLAG_ONEWAY:
            staged.callbacks.append(stored)

    def _read(self, body: bytes, overhead_bytes: int) -> tuple[list[_Message], int]:
        """Every message, and the bytes of all their records; one has `overhead_bytes` besides body and properties.

        Raises BodyError, or TooLarge as soon as that is clear: 4 MiB of the smallest messages are 180,000 of them.
        """
        room = self._config.group.entry_bytes_max
        total_bytes = 0
        limit = self._config.max_properties_bytes - len(self._suffix)
        before, key_start, behind, key_end, shape_facts = self._facts.shape
        messages: list[_Message] = []
        for flag, content, properties in iter_batch(body):
            unique = properties[key_start:key_end]
            if properties[:key_start] == before and properties[key_end:] == behind and unique.isalnum():
                facts = shape_facts
            else:
                properties, unique, facts = self._appender.keyed(properties)
                before, key_start, behind, key_end, shape_facts = self._facts.shape
            if not content or not unique or len(properties) > limit:
                raise BodyError("a message of the batch is empty, or its properties are too long or broken")
            if not facts[2] and int_or_zero(find_property(properties, b"DELAY\x01")) > 0:
                raise BodyError("messages of a batch cannot be delayed")
            total_bytes += overhead_bytes + len(content) + len(properties)
            if total_bytes > room:
                raise TooLarge("the stored form of the batch is larger than an entry may be")
            messages.append((flag, content, properties, unique, _crc32(content) & 0x7FFFFFFF, facts))
        return messages, total_bytes
