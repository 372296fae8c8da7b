"""Sends: SEND_MESSAGE, SEND_MESSAGE_V2, SEND_BATCH_MESSAGE, one-way, and CONSUMER_SEND_MSG_BACK (semantics.md 2, 5.3).

`handle_send` is the hottest function of the broker. An ordinary message takes one straight way through it: header
decoded in C, topic found in a cache, record encoded into the open batch, rows and a waiter appended to lists. Whatever
is not ordinary (unknown topic, batch, delay, refusal, duplicate, IPv6) leaves it for `_send_slowly`, which makes all
checks in RocketMQ's order. The cache holds only topics whose committed configuration has no pending change.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from attrs import define

from broker.answers import BUSY, NO_ROOM, NOT_LEADER, Done, reason_of
from broker.consume_queue import NotAtHand
from broker.dedup import dedup_key
from broker.delay import MAX_LEVEL
from broker.key_index import topic_seed
from broker.records import (
    HEAD,
    MAGIC_V1,
    MAX_V1_TOPIC_BYTES,
    SYS_MULTI_TAGS,
    SYS_TRANSACTION_MASK,
    SYS_TRANSACTION_PREPARED,
    UNIT,
    V1_OVERHEAD_BYTES,
    Facts,
    Record,
    decode_record,
    find_property,
    join_properties,
    properties_dict,
)
from broker.topics import (
    dlq_topic,
    is_forbidden_to_send,
    retry_topic,
    topic_config_text,
    validate_topic,
)
from dledger.errors import LedgerError, NotLeader, Overloaded, TooLarge
from remoting.bodies import SubscriptionGroupConfig, TopicConfig
from remoting.codes import (
    DLQ_TOPIC_PREFIX,
    FLAG_ONEWAY,
    PERM_READ_WRITE,
    PERM_WRITE,
    RETRY_TOPIC_PREFIX,
    SCHEDULE_TOPIC,
    VERSION_MAX_RECONSUME_IN_REQUEST,
    ResponseCode,
)
from remoting.command import Command, encode_response
from remoting.errors import BodyError, HeaderError
from remoting.frames import Frame, SendHeader, decode_frame, decode_send_v2
from remoting.headers import optional, require
from remoting.message import UniqKeyGenerator, host_to_bytes
from remoting.message_codec import encode_record, iter_batch, record_size

if TYPE_CHECKING:
    from broker.consume_queue import QueueState
    from broker.staging import Staged
    from broker.state import BrokerState

_pack_head = HEAD.pack
_pack_unit = UNIT.pack
_pack_length = struct.Struct(">H").pack
_crc32 = zlib.crc32
_SCHEDULE: Final = SCHEDULE_TOPIC.encode()
_ORDINARY_SYS_FLAGS: Final = ~0x703
"""sysFlag bits the straight way accepts are the complement: compression and its kind, multi-tag."""


class SendTopic:
    """What the straight way needs of a topic, ready to use."""

    __slots__ = ("base_bytes", "config", "index_seed", "limit", "name", "prefix", "queues", "sys_flag")

    def __init__(self, config: TopicConfig, index_seed: int) -> None:
        self.config = config
        self.name = config.topic_name.encode()
        self.prefix = bytes((len(self.name),)) + self.name
        self.base_bytes = V1_OVERHEAD_BYTES + len(self.name)
        self.limit = max(config.write_queue_nums, config.read_queue_nums)
        self.queues: list[QueueState | None] = [None] * self.limit
        self.sys_flag = SYS_MULTI_TAGS if config.topic_filter_type == "MULTI_TAG" else 0
        self.index_seed = index_seed


@define
class _Refusal:
    """Why a send is not stored."""

    code: int
    remark: str


@define
class _Target:
    """Where a checked message goes: after retry limit, delay and random queue are decided."""

    topic: bytes
    queue_id: int
    properties: bytes
    answer_queue_id: int


class SendProcessor:
    """One per node. Every answer carries MSG_REGION and TRACE_ON."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._group = state.group
        self._dedup = state.dedup
        config = state.config
        self._config = config
        self._answers = state.answers
        self._store_host = state.store_host
        self._straight = len(state.store_host) == 8
        self._max_body = config.max_message_bytes
        self._suffix = (
            f"CLUSTER\x01{config.cluster}\x02MSG_REGION\x01{config.region_id}\x02"
            f"TRACE_ON\x01{'true' if config.trace_on else 'false'}\x02"
        ).encode()
        self._max_properties = config.max_properties_bytes - len(self._suffix)
        self._topics: dict[str, SendTopic] = {}
        self._facts = state.facts
        self._rng = state.env.rng("broker.send")
        ids = state.env.ids
        self._unique_keys = UniqKeyGenerator(state.store_host[:-4], ids.pid, ids.salt(4))
        self._wall_ms = state.env.clock.wall_ms
        self._parked: dict[str, deque[tuple[SendHeader, bytes, Any]]] = {}
        self._parked_count = 0
        self._parked_bytes = 0
        state.on_topic_touched.append(self._forget_topic)

    # ------------------------------------------------------------------------------------------------- straight way

    def handle_send(self, frame: Frame, conn: Any) -> None:
        """One send, from a client or forwarded. Answers through `conn.write`, at once or when the entry is applied.

        Raises RemoteProtocolError where the header cannot be read at all.
        """
        try:
            header = decode_send_v2(frame)
        except HeaderError as error:
            self._answer_unreadable(frame, conn, str(error))
            return
        body = frame[2]
        topic = self._topics.get(header.topic)
        if topic is None or header.batch:
            self._send_slowly(header, body, conn)
            return
        queue_id = header.queue_id
        properties = header.properties.encode()
        body_bytes = len(body)
        sys_flag = header.sys_flag
        born_host = host_to_bytes(*conn.peer)
        if (
            not 0 <= queue_id < topic.limit
            or not 0 < body_bytes <= self._max_body
            or sys_flag & _ORDINARY_SYS_FLAGS
            or len(born_host) != 8
        ):
            self._send_slowly(header, body, conn)
            return

        state = self._state
        found = properties.rfind(b"UNIQ_KEY\x01")
        value_end = properties.find(b"\x02", found)
        if found < 0 or value_end < 0 or (found and properties[found - 1] != 2) or properties[-1] != 2:
            properties, unique, rest = self._complete(properties)
        else:
            unique = properties[found + 9 : value_end]
            # What the properties mean but for the key is the same for most messages of a producer.
            rest = properties[:found] + properties[value_end + 1 :]
        facts = self._facts.known.get(rest)
        if facts is None:
            facts = self._facts.learn(rest)
        tags_code, words, is_ordinary = facts
        suffix = self._suffix
        properties_bytes = len(properties) + len(suffix)
        if not is_ordinary or properties_bytes > 32_767 or not unique:
            self._send_slowly(header, body, conn)
            return

        body_crc = _crc32(body) & 0x7FFFFFFF
        reconsumed = header.reconsume_times
        key_hash = _crc32(unique, topic.index_seed)
        dedup = self._dedup
        key = 0
        if dedup.enabled and not reconsumed:
            key = key_hash << 31 | body_crc  # dedup_key, in place
            earlier = dedup.current.get(key)
            if earlier is None:
                earlier = dedup.previous.get(key)
            if earlier is not None:
                keys = [(unique, body_crc)]
                if self._is_answered(header, body, conn, topic.name, keys, key, earlier):
                    return
                key = dedup.free_key(key)

        size = topic.base_bytes + body_bytes + properties_bytes
        group = self._group
        try:
            physical = group.reserve(size)
        except (NotLeader, Overloaded, TooLarge) as error:
            self._refuse_by(error, header, conn)
            return
        staged = group.open_staged() or state.open_staged(physical)
        queue = topic.queues[queue_id]
        if queue is None:
            queue = topic.queues[queue_id] = state.queues.pending_queue(topic.name, queue_id)
        queue_offset = queue.next_offset
        queue.next_offset = queue_offset + 1
        store_ms = staged.store_ms
        group.add_record(
            b"".join(
                (
                    _pack_head(
                        size,
                        MAGIC_V1,
                        body_crc,
                        queue_id,
                        header.message_flag,
                        queue_offset,
                        physical,
                        sys_flag | topic.sys_flag,
                        header.born_timestamp,
                        born_host,
                        store_ms,
                        self._store_host,
                        reconsumed,
                        0,
                        body_bytes,
                    ),
                    body,
                    topic.prefix,
                    _pack_length(properties_bytes),
                    properties,
                    suffix,
                )
            )
        )

        units = staged.by_queue.get(queue)
        if units is None:
            units = staged.by_queue[queue] = []
        units.append(_pack_unit(physical, size, tags_code))
        staged.count += 1
        staged.hashes.append(key_hash)
        staged.positions.append(physical)
        for word in words:
            staged.hashes.append(_crc32(word, topic.index_seed))
            staged.positions.append(physical)
        if key:
            dedup.current[key] = physical
            staged.dedup_keys.append(key)
        if not header.flag & FLAG_ONEWAY:
            staged.waiters.append((conn, header.opaque, physical, queue_id, queue_offset, unique.decode()))

    # --------------------------------------------------------------------------------------------------- properties

    def _complete(self, properties: bytes) -> tuple[bytes, bytes, bytes]:
        """Properties with a closing 0x02 and a UNIQ_KEY, that key, and the properties without a key made here."""
        if properties and properties[-1] != 2:
            properties += b"\x02"
        unique = find_property(properties, b"UNIQ_KEY\x01")
        if unique is None:
            unique = self._unique_keys.next(self._wall_ms()).encode()
            return properties + b"UNIQ_KEY\x01" + unique + b"\x02", unique, properties
        return properties, unique, properties

    # ------------------------------------------------------------------------------------------------------ refusals

    def _answer(self, header: SendHeader, conn: Any, code: int, remark: str) -> None:
        if not header.flag & FLAG_ONEWAY:
            conn.write(self._answers.refused(header.opaque, code, remark))

    def _answer_unreadable(self, frame: Frame, conn: Any, remark: str) -> None:
        command = decode_frame(frame)
        if not command.is_oneway:
            conn.write(encode_response(command, ResponseCode.SYSTEM_ERROR, {}, remark=remark))

    def _refuse_by(self, error: LedgerError, header: SendHeader, conn: Any) -> None:
        if header.flag & FLAG_ONEWAY:
            return
        conn.write(self._answers.failed(header.opaque, reason_of(error)))

    # ------------------------------------------------------------------------------------------------ the careful way

    def _send_slowly(self, header: SendHeader, body: bytes, conn: Any) -> None:
        """Any send, with all checks in RocketMQ's order (semantics.md 2)."""
        refusal = self._check_name(header)
        if refusal is not None:
            self._answer(header, conn, refusal.code, refusal.remark)
            return
        if self._park_for_topic(header, body, conn):
            return
        config = self._state.topics.committed[header.topic]
        if header.topic not in self._topics:
            self._remember_topic(config)
        refusal = self._check_message(header, body, config, conn)
        if refusal is not None:
            self._answer(header, conn, refusal.code, refusal.remark)
        elif header.batch:
            self._send_batch(header, body, config, conn)
        else:
            self._send_one(header, body, config, conn)

    def _check_name(self, header: SendHeader) -> _Refusal | None:
        state = self._state
        if not state.is_ready_leader:
            return _Refusal(ResponseCode.SERVICE_NOT_AVAILABLE, "this node is not the leader of its group")
        name = header.topic
        known = state.topics.get(name)
        if not state.broker_permission & PERM_WRITE and known is not None and known.order:
            return _Refusal(
                ResponseCode.NO_PERMISSION, f"the broker[{self._config.advertised[0]}] sending message is forbidden"
            )
        remark = validate_topic(name)
        if remark is not None:
            return _Refusal(ResponseCode.INVALID_PARAMETER, remark)
        if is_forbidden_to_send(name):
            return _Refusal(ResponseCode.NO_PERMISSION, f"Sending message to topic[{name}] is forbidden.")
        return None

    def _check_message(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any) -> _Refusal | None:
        queue_limit = max(config.write_queue_nums, config.read_queue_nums)
        if header.queue_id >= queue_limit or (header.queue_id < 0 and config.write_queue_nums <= 0):
            return _Refusal(
                ResponseCode.INVALID_PARAMETER,
                f"request queueId[{header.queue_id}] is illegal, {topic_config_text(config)} "
                f"Producer: {conn.peer[0]}:{conn.peer[1]}",
            )
        if header.topic.startswith(RETRY_TOPIC_PREFIX):
            group = header.topic[len(RETRY_TOPIC_PREFIX) :]
            if self._state.groups.find(group) is None:
                return _Refusal(
                    ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST, f"subscription group not exist, {group}: create it first"
                )
        properties = header.properties.encode()
        pairs = properties_dict(properties)
        level = _int_or_zero(pairs.get(b"DELAY"))
        half = pairs.get(b"TRAN_MSG", b"").lower() == b"true" and not (header.reconsume_times > 0 and level > 0)
        if half or header.sys_flag & SYS_TRANSACTION_MASK == SYS_TRANSACTION_PREPARED:
            return _Refusal(
                ResponseCode.NO_PERMISSION,
                f"the broker[{self._config.advertised[0]}] sending transaction message is forbidden: "
                "transactions are not supported yet",
            )
        if not 0 < len(body) <= self._max_body or len(properties) > self._max_properties - 64:
            return self._illegal()
        if header.batch and (level > 0 or header.topic.startswith(RETRY_TOPIC_PREFIX)):
            return _Refusal(ResponseCode.MESSAGE_ILLEGAL, "batch messages cannot be delayed or sent to a retry topic")
        if level <= 0 and any(name.startswith(b"TIMER_DEL") for name in pairs):
            return _Refusal(
                ResponseCode.SYSTEM_ERROR,
                "accurate timer message is not enabled, timerWheelEnable is false: use one of the 18 delay levels",
            )
        return None

    def _illegal(self) -> _Refusal:
        return _Refusal(
            ResponseCode.MESSAGE_ILLEGAL,
            "the message is illegal, maybe msg body or properties length not matched. msg body length limit "
            f"{self._max_body}B, msg properties length limit {self._config.max_properties_bytes}B.",
        )

    def _remember_topic(self, config: TopicConfig) -> None:
        topic = config.topic_name
        # A retry topic has its reconsume limit checked, a long name has another layout: always the careful way.
        if (
            self._straight
            and not topic.startswith((RETRY_TOPIC_PREFIX, DLQ_TOPIC_PREFIX))
            and not (config.order and not self._state.broker_permission & PERM_WRITE)
            and len(topic.encode()) <= MAX_V1_TOPIC_BYTES
        ):
            self._topics[topic] = SendTopic(config, topic_seed(topic.encode()))

    def _forget_topic(self, name: str) -> None:
        self._topics.pop(name, None)

    def forget_topics(self) -> None:
        """The broker's permission changed: look at every topic again."""
        self._topics.clear()

    # ------------------------------------------------------------------------------------------- topics still to come

    def _park_for_topic(self, header: SendHeader, body: bytes, conn: Any) -> bool:
        """Hold the send while its topic is created or changes; True when it was held or refused."""
        state = self._state
        name = header.topic
        parked = self._parked.get(name)
        if parked is None and state.topics.get(name) is not None and not state.topics.is_pending(name):
            return False
        config: TopicConfig | None = None
        if parked is None and state.topics.get_pending(name) is None:
            config = state.topics.created_by_send(
                name,
                header.default_topic,
                header.default_topic_queue_nums,
                unit_mode=header.unit_mode,
                retry_queues=self._config.retry_queues,
            )
            if config is None:
                self._answer(
                    header,
                    conn,
                    ResponseCode.TOPIC_NOT_EXIST,
                    f"topic[{name}] not exist, apply first please!\nCreate it, or allow automatic creation.",
                )
                return True
        if (
            self._parked_count >= self._config.max_parked_sends
            or self._parked_bytes + len(body) > self._config.max_parked_bytes
        ):
            self._answer(
                header, conn, ResponseCode.SYSTEM_BUSY, f"[REJECTREQUEST]too many sends wait for topic[{name}]"
            )
            return True
        self._parked_count += 1
        self._parked_bytes += len(body)
        if parked is not None:
            parked.append((header, bytes(body), conn))
            return True
        self._parked[name] = deque([(header, bytes(body), conn)])

        def ready(ok: bool, reason: str | None) -> None:
            self._unpark(name, ok, reason)

        if config is not None:
            state.ensure_topic(config, ready)
        else:
            state.after_in_flight(ready)
        return True

    def _unpark(self, name: str, ok: bool, reason: str | None) -> None:
        for header, body, conn in self._parked.pop(name):
            self._parked_count -= 1
            self._parked_bytes -= len(body)
            self._state.touch(conn)
            if ok:
                self._send_slowly(header, body, conn)
            elif not header.flag & FLAG_ONEWAY:
                # The send itself was never logged, whatever became of the topic.
                conn.write(self._answers.failed(header.opaque, reason if reason in (BUSY, NO_ROOM) else NOT_LEADER))

    # ---------------------------------------------------------------------------------------------- single messages

    def _send_one(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any) -> None:
        target = self._resolve(header, config)
        if target is None:
            return self._send_to_dlq(header, body, conn)
        return self._store(header, body, config, conn, target)

    def _resolve(self, header: SendHeader, config: TopicConfig) -> _Target | None:
        """The real destination; None for the dead-letter queue."""
        properties, _unique, _rest = self._complete(header.properties.encode())
        queue_id = header.queue_id
        if queue_id < 0:
            queue_id = self._rng.randrange(config.write_queue_nums)
        if header.topic.startswith(RETRY_TOPIC_PREFIX) and self._is_exhausted(header):
            return None
        if b"POP_CK\x01" in properties or b"TIMER_DEL" in properties or b"DELAY\x01" in properties:
            pairs = properties_dict(properties)
            pairs.pop(b"POP_CK", None)
            level = min(_int_or_zero(pairs.get(b"DELAY")), MAX_LEVEL)
            if level > 0:
                # The level wins over a timer, and is redirected (semantics.md 3.1).
                for name in [name for name in pairs if name.startswith(b"TIMER_DEL")]:
                    del pairs[name]
                return self._delayed(header.topic.encode(), queue_id, level, pairs)
            properties = join_properties(pairs)
        return _Target(header.topic.encode(), queue_id, properties, queue_id)

    @staticmethod
    def _delayed(topic: bytes, queue_id: int, level: int, pairs: dict[bytes, bytes]) -> _Target:
        pairs[b"DELAY"] = b"%d" % level
        pairs[b"REAL_TOPIC"] = topic
        pairs[b"REAL_QID"] = b"%d" % queue_id
        return _Target(_SCHEDULE, level - 1, join_properties(pairs), queue_id)

    def _is_exhausted(self, header: SendHeader) -> bool:
        """A consumer's own retry that was consumed too often goes to the dead letters."""
        group = self._state.groups.find(header.topic[len(RETRY_TOPIC_PREFIX) :])
        limit = group.retry_max_times if group is not None else 16
        if header.version >= VERSION_MAX_RECONSUME_IN_REQUEST and header.max_reconsume_times is not None:
            limit = header.max_reconsume_times
        return header.reconsume_times > limit

    def _send_to_dlq(self, header: SendHeader, body: bytes, conn: Any) -> None:
        name = dlq_topic(header.topic[len(RETRY_TOPIC_PREFIX) :])
        pairs = properties_dict(self._complete(header.properties.encode())[0])
        pairs[b"DELAY"] = b"0"
        pairs.pop(b"POP_CK", None)
        target = _Target(name.encode(), 0, join_properties(pairs), 0)

        def ready(ok: bool, reason: str | None) -> None:
            self._state.touch(conn)
            if ok:
                self._store(header, body, self._state.topics.committed[name], conn, target)
            elif not header.flag & FLAG_ONEWAY:
                conn.write(self._answers.failed(header.opaque, reason if reason in (BUSY, NO_ROOM) else NOT_LEADER))

        self._state.ensure_topic(_one_queue_topic(name), ready)

    def _store(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any, target: _Target) -> None:
        unique = find_property(target.properties, b"UNIQ_KEY\x01") or b""
        body_crc = _crc32(body) & 0x7FFFFFFF
        if not header.reconsume_times and unique and self._dedup.enabled:
            key = dedup_key(topic_seed(target.topic), unique, body_crc)
            earlier = self._dedup.find(key)
            if earlier is not None and self._is_answered(
                header, body, conn, target.topic, [(unique, body_crc)], key, earlier
            ):
                return
        sys_flag = header.sys_flag & ~SYS_TRANSACTION_MASK
        if config.topic_filter_type == "MULTI_TAG":
            sys_flag |= SYS_MULTI_TAGS
        properties = target.properties + self._suffix
        if len(properties) > self._config.max_properties_bytes:
            refusal = self._illegal()
            self._answer(header, conn, refusal.code, refusal.remark)
            return
        try:
            staged, physical, queue_offset = self._append(
                target.topic,
                target.queue_id,
                header.message_flag,
                sys_flag,
                header.born_timestamp,
                host_to_bytes(*conn.peer),
                header.reconsume_times,
                body,
                properties,
            )
        except (NotLeader, Overloaded, TooLarge) as error:
            self._refuse_by(error, header, conn)
            return
        if not header.reconsume_times and unique:
            self._state.staging.stage_dedup(staged, target.topic, unique, body_crc, physical)
        if not header.flag & FLAG_ONEWAY:
            waiter = (conn, header.opaque, physical, target.answer_queue_id, queue_offset, unique.decode())
            staged.waiters.append(waiter)

    def _append(
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
        physical = self._group.reserve(size)
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
        self._group.add_record(record)
        return staged, physical, queue_offset

    # ------------------------------------------------------------------------------------------------------- batches

    def _send_batch(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any) -> None:
        """A client's batch: all of it in one entry, so that it is stored as a whole or not at all."""
        try:
            messages = self._read_batch(body, len(config.topic_name.encode()))
        except BodyError as error:
            self._answer(header, conn, ResponseCode.MESSAGE_ILLEGAL, f"the batch is illegal: {error}")
            return
        except TooLarge as error:
            self._refuse_by(error, header, conn)
            return
        state = self._state
        topic = config.topic_name.encode()
        queue_id = header.queue_id if header.queue_id >= 0 else self._rng.randrange(config.write_queue_nums)
        dedup = self._dedup
        if dedup.enabled:
            key = dedup_key(topic_seed(topic), messages[0][3], messages[0][4])
            earlier = dedup.find(key)
            keys = [(message[3], message[4]) for message in messages]
            if earlier is not None and self._is_answered(header, body, conn, topic, keys, key, earlier):
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
            self._refuse_by(error, header, conn)
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

    def _read_batch(self, body: bytes, topic_bytes: int) -> list[tuple[int, bytes, bytes, bytes, int, Facts]]:
        """(flag, body, properties as stored, UNIQ_KEY, body CRC, facts) of each message.

        Raises BodyError, or TooLarge as soon as that is clear: 4 MiB of the smallest messages are 180,000 of them.
        """
        room = self._config.group.entry_bytes_max
        overhead = V1_OVERHEAD_BYTES + topic_bytes + len(self._suffix)
        suffix = self._suffix
        limit = self._config.max_properties_bytes - len(suffix)
        known = self._facts.known
        messages: list[tuple[int, bytes, bytes, bytes, int, Facts]] = []
        for flag, message, properties in iter_batch(body):
            found = properties.rfind(b"UNIQ_KEY\x01")
            value_end = properties.find(b"\x02", found)
            if found < 0 or value_end < 0 or (found and properties[found - 1] != 2) or properties[-1] != 2:
                properties, unique, rest = self._complete(properties)
            else:
                unique = properties[found + 9 : value_end]
                rest = properties[:found] + properties[value_end + 1 :]
            facts = known.get(rest)
            if facts is None:
                facts = self._facts.learn(rest)
            if not message or not unique or len(properties) > limit:
                raise BodyError("a message of the batch is empty, or its properties are too long or broken")
            if not facts[2] and _int_or_zero(find_property(rest, b"DELAY\x01")) > 0:
                raise BodyError("messages of a batch cannot be delayed")
            room -= overhead + len(message) + len(properties)
            if room < 0:
                raise TooLarge("the stored form of the batch is larger than an entry may be")
            messages.append((flag, message, properties + suffix, unique, _crc32(message) & 0x7FFFFFFF, facts))
        return messages

    # ---------------------------------------------------------------------------------------------------- duplicates

    def _is_answered(
        self,
        header: SendHeader,
        body: bytes,
        conn: Any,
        topic: bytes,
        keys: Sequence[tuple[bytes, int]],
        key: int,
        earlier: int,
    ) -> bool:
        """The window has a message under this key, at `earlier`: whether that, or one next to it, is the original."""
        if self._answer_duplicate(header, body, conn, topic, keys, earlier):
            return True
        return any(
            self._answer_duplicate(header, body, conn, topic, keys, other) for other in self._dedup.others(key, earlier)
        )

    def _answer_duplicate(
        self,
        header: SendHeader,
        body: bytes,
        conn: Any,
        topic: bytes,
        keys: Sequence[tuple[bytes, int]],
        position: int,
    ) -> bool:
        """Answer with the original's result, after its commit; False where the window's hit is no duplicate.

        `keys` are (UNIQ_KEY, body CRC) of the message, or of every message of a client's batch.
        """
        state = self._state
        if position >= state.committed_position:
            if not state.is_in_flight(position):
                # Applied in this very turn, readable at its end.
                self._send_again_at_end_of_turn(header, body, conn)
                return True
            return self._wait_for_original(header, body, conn, topic, position, len(keys))
        records = state.read_records(position, len(keys))
        if records is None or not self._is_same(records, topic, keys):
            return False
        if state.staging.next_store_ms() - records[0].store_timestamp > self._dedup.window_ms:
            return False
        first = records[0]
        if not state.queues.points_to(first.topic.decode(), first.queue_id, first.queue_offset, position):
            return False  # of a topic that was deleted and made anew since
        state.dedup_hits += 1
        if header.flag & FLAG_ONEWAY:
            return True
        queue_id = first.queue_id
        if first.topic == _SCHEDULE:
            queue_id = _int_or_zero(find_property(first.properties, b"REAL_QID\x01"))
        prefix = first.store_host.hex().upper()
        message_id = ",".join([f"{prefix}{record.physical_offset:016X}" for record in records])
        unique = keys[0][0].decode() if not header.batch else ""
        conn.write(self._answers.stored(header.opaque, message_id, queue_id, first.queue_offset, unique))
        return True

    @staticmethod
    def _is_same(records: list[Record], topic: bytes, keys: Sequence[tuple[bytes, int]]) -> bool:
        first = records[0]
        return all(
            record.topic == topic
            and record.queue_id == first.queue_id
            and record.queue_offset == first.queue_offset + row
            and record.body_crc == body_crc
            and find_property(record.properties, b"UNIQ_KEY\x01") == unique
            for row, (record, (unique, body_crc)) in enumerate(zip(records, keys, strict=True))
        )

    def _wait_for_original(
        self, header: SendHeader, body: bytes, conn: Any, topic: bytes, position: int, count: int
    ) -> bool:
        """The hit is not committed yet. When it is, it can be read, and the send is looked at once more."""
        state = self._state
        found = state.find_pending(position, count)
        if found is None or found[1].topic_bytes != topic:
            return False

        def settled(ok: bool, reason: str | None) -> None:
            if ok:
                self._send_again_at_end_of_turn(header, body, conn)
            elif not header.flag & FLAG_ONEWAY:
                state.touch(conn)
                conn.write(self._answers.failed(header.opaque, reason))

        state.wait_for(found[0], settled)
        return True

    def _send_again_at_end_of_turn(self, header: SendHeader, body: bytes, conn: Any) -> None:
        def again() -> None:
            self._state.touch(conn)
            self._send_slowly(header, body, conn)

        self._state.defer(again)

    # ----------------------------------------------------------------------------------------------------- send-back

    def handle_send_back(self, request: Command, conn: Any, message: bytes | None = None) -> bytes | None:
        """CONSUMER_SEND_MSG_BACK: the message again, delayed, in the group's retry topic, or in its dead letters.

        Returns the answer, or None when it follows after commit (or is not wanted). Raises NotAtHand where the message
        has to be read from the disk first, and given as `message`.
        """
        try:
            refusal = self._send_back(request, conn, message)
        except HeaderError as error:
            refusal = _Refusal(ResponseCode.SYSTEM_ERROR, str(error))
        if refusal is None or request.is_oneway:
            return None
        return encode_response(request, refusal.code, remark=refusal.remark or None)

    def _send_back(self, request: Command, conn: Any, message: bytes | None) -> _Refusal | None:
        ext = request.ext
        state = self._state
        offset = require(ext, "offset", int)
        group_name = require(ext, "group", str)
        delay_level = require(ext, "delayLevel", int)
        limit_of_request = optional(ext, "maxReconsumeTimes", int, None)
        unit_mode = optional(ext, "unitMode", bool, False)
        if not state.is_ready_leader:
            return _Refusal(ResponseCode.SERVICE_NOT_AVAILABLE, "this node is not the leader of its group")
        group = state.groups.find(group_name)
        if group is None:
            return _Refusal(
                ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST,
                f"subscription group not exist, {group_name}: create it first",
            )
        if not state.broker_permission & PERM_WRITE:
            return _Refusal(
                ResponseCode.NO_PERMISSION, f"the broker[{self._config.advertised[0]}] sending message is forbidden"
            )
        if group.retry_queue_nums <= 0:
            return _Refusal(ResponseCode.SUCCESS, "")
        data = message or (state.read_message(offset) if offset >= 0 else None)
        if data is None:
            if message is None and state.is_cold(offset):
                raise NotAtHand(offset, 0)
            return _Refusal(ResponseCode.SYSTEM_ERROR, f"look message by offset failed, {offset}")
        record = decode_record(data)
        limit = group.retry_max_times
        if request.version >= VERSION_MAX_RECONSUME_IN_REQUEST and limit_of_request is not None:
            limit = limit_of_request
        dead = record.reconsume_times >= limit or delay_level < 0
        topic = self._back_topic(group, dead, unit_mode)
        store = self._back_store(request, conn, record, topic, dead, delay_level)

        def ready(ok: bool, reason: str | None) -> None:
            if ok:
                store()
            else:
                self._answer_back(request, conn, reason if reason in (BUSY, NO_ROOM) else NOT_LEADER)

        state.ensure_topic(topic, ready)
        return None

    @staticmethod
    def _back_topic(group: SubscriptionGroupConfig, dead: bool, unit_mode: bool) -> TopicConfig:
        if dead:
            return _one_queue_topic(dlq_topic(group.group_name))
        return TopicConfig(
            topic_name=retry_topic(group.group_name),
            read_queue_nums=group.retry_queue_nums,
            write_queue_nums=group.retry_queue_nums,
            perm=PERM_READ_WRITE,
            # RocketMQ's unit-subscription bit.
            topic_sys_flag=2 if unit_mode else 0,
        )

    def _back_store(
        self, request: Command, conn: Any, record: Record, topic: TopicConfig, dead: bool, delay_level: int
    ) -> Callable[[], None]:
        """What stores the message again, once its topic is there."""

        def store() -> None:
            pairs = properties_dict(record.properties)
            pairs.setdefault(b"RETRY_TOPIC", record.topic)
            if b"ORIGIN_MESSAGE_ID" not in pairs:
                origin = record.store_host.hex().upper() + f"{record.physical_offset:016X}"
                pairs[b"ORIGIN_MESSAGE_ID"] = origin.encode()
            pairs[b"WAIT"] = b"false"
            name = topic.topic_name.encode()
            if dead:
                pairs[b"DELAY"] = b"0"
                target = _Target(name, 0, join_properties(pairs), 0)
            else:
                level = delay_level if delay_level > 0 else 3 + record.reconsume_times
                queue_id = self._rng.randrange(topic.write_queue_nums)
                target = self._delayed(name, queue_id, min(level, MAX_LEVEL), pairs)
            if len(target.properties) > self._config.max_properties_bytes:
                refusal = self._illegal()
                self._answer_back(request, conn, None, refusal)
                return
            try:
                staged, _physical, _queue_offset = self._append(
                    target.topic,
                    target.queue_id,
                    record.flag,
                    record.sys_flag & ~SYS_TRANSACTION_MASK,
                    record.born_timestamp,
                    record.born_host,
                    record.reconsume_times + 1,
                    record.body,
                    target.properties,
                )
            except (NotLeader, Overloaded, TooLarge) as error:
                self._answer_back(request, conn, reason_of(error))
            else:
                staged.callbacks.append(self._back_answerer(request, conn))

        return store

    def _back_answerer(self, request: Command, conn: Any) -> Done:
        def stored(ok: bool, reason: str | None) -> None:
            if ok:
                self._answer_back(request, conn, None)
            else:
                self._answer_back(request, conn, reason)

        return stored

    def _answer_back(self, request: Command, conn: Any, reason: str | None, refusal: _Refusal | None = None) -> None:
        if request.is_oneway:
            return
        self._state.touch(conn)
        if refusal is not None:
            conn.write(encode_response(request, refusal.code, remark=refusal.remark))
        elif reason is None:
            conn.write(encode_response(request, ResponseCode.SUCCESS))
        else:
            code, remark = self._answers.reason(reason)
            conn.write(encode_response(request, code, remark=remark))


def _one_queue_topic(name: str) -> TopicConfig:
    return TopicConfig(topic_name=name, read_queue_nums=1, write_queue_nums=1, perm=PERM_READ_WRITE)


def _int_or_zero(text: bytes | None) -> int:
    if not text:
        return 0
    try:
        return int(text)
    except ValueError:
        return 0
