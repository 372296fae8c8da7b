"""Sends: SEND_MESSAGE, SEND_MESSAGE_V2, SEND_BATCH_MESSAGE, and one-way (semantics.md 2).

`handle_send` is the hottest function of the broker. An ordinary message takes one straight way through it: header
decoded in C, topic found in a cache, record encoded into the open batch, rows and a waiter appended to lists. A
client's batch leaves it for `send_batch`, and whatever is not ordinary (unknown topic, delay, refusal, duplicate, IPv6)
for `_send_slowly`, which makes all checks in RocketMQ's order. The cache holds only topics whose committed
configuration has no pending change.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any, Final

from broker.answers import reason_before_logging, reason_of
from broker.appender import Appender, Target, delayed, one_queue_topic
from broker.dedup import dedup_key
from broker.delay import MAX_LEVEL
from broker.key_index import topic_seed
from broker.processors.duplicates import Duplicates
from broker.processors.parked_sends import ParkedSends
from broker.processors.send_batch import BatchSender
from broker.records import (
    HEAD,
    MAGIC_V1,
    MAX_V1_TOPIC_BYTES,
    SYS_MULTI_TAGS,
    SYS_TRANSACTION_MASK,
    SYS_TRANSACTION_PREPARED,
    UNIT,
    V1_OVERHEAD_BYTES,
    are_ordinary,
    find_property,
    int_or_zero,
    join_properties,
    properties_dict,
)
from broker.refusals import Refusal, illegal
from broker.topics import (
    dlq_topic,
    is_forbidden_to_send,
    topic_config_text,
    validate_topic,
)
from dledger.errors import NotLeader, Overloaded, TooLarge
from remoting.bodies import TopicConfig
from remoting.codes import (
    DLQ_TOPIC_PREFIX,
    FLAG_ONEWAY,
    PERM_WRITE,
    RETRY_TOPIC_PREFIX,
    SCHEDULE_TOPIC,
    VERSION_MAX_RECONSUME_IN_REQUEST,
    ResponseCode,
)
from remoting.command import encode_response
from remoting.errors import HeaderError
from remoting.frames import Frame, SendHeader, decode_frame, decode_send_v2
from remoting.message import host_to_bytes

if TYPE_CHECKING:
    from broker.consume_queue import QueueState
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
        self.appender = Appender(state)
        self._suffix = self.appender.suffix
        self._max_properties = config.max_properties_bytes - len(self._suffix)
        self._topics: dict[str, SendTopic] = {}
        self._facts = state.facts
        self._rng = state.env.rng("broker.send")
        self._parked = ParkedSends(state, self._send_slowly)
        self._duplicates = Duplicates(state, self._send_slowly)
        self._batches = BatchSender(state, self.appender, self._duplicates)
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
        if topic is None:
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
        if header.batch:
            # Not `facts`: a batch's own properties may hold a key, and would be remembered each time.
            if len(properties) <= self._max_properties - 64 and are_ordinary(properties):
                self._batches.send(header, body, topic.config, conn)
            else:
                self._send_slowly(header, body, conn)
            return

        state = self._state
        before, key_start, behind, key_end, facts = self._facts.shape
        unique = properties[key_start:key_end]
        if properties[:key_start] != before or properties[key_end:] != behind or not unique.isalnum():
            properties, unique, facts = self.appender.keyed(properties)
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
                if self._duplicates.is_answered(header, body, conn, topic.name, keys, key, earlier):
                    return
                key = dedup.free_key(key)

        size = topic.base_bytes + body_bytes + properties_bytes
        group = self._group
        try:
            physical = group.reserve(size)
        except (NotLeader, Overloaded, TooLarge) as error:
            self._answers.fail_send(header, conn, reason_of(error))
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

    def _answer_unreadable(self, frame: Frame, conn: Any, remark: str) -> None:
        command = decode_frame(frame)
        if not command.is_oneway:
            conn.write(encode_response(command, ResponseCode.SYSTEM_ERROR, {}, remark=remark))

    # ------------------------------------------------------------------------------------------------ the careful way

    def _send_slowly(self, header: SendHeader, body: bytes, conn: Any) -> None:
        """Any send, with all checks in RocketMQ's order (semantics.md 2)."""
        refusal = self._check_name(header)
        if refusal is not None:
            self._answers.refuse_send(header, conn, refusal.code, refusal.remark)
            return
        if self._parked.hold(header, body, conn):
            return
        config = self._state.topics.committed[header.topic]
        if header.topic not in self._topics:
            self._remember_topic(config)
        refusal = self._check_message(header, body, config, conn)
        if refusal is not None:
            self._answers.refuse_send(header, conn, refusal.code, refusal.remark)
        elif header.batch:
            self._batches.send(header, body, config, conn)
        else:
            self._send_one(header, body, config, conn)

    def _check_name(self, header: SendHeader) -> Refusal | None:
        state = self._state
        if not state.is_ready_leader:
            return Refusal(ResponseCode.SERVICE_NOT_AVAILABLE, "this node is not the leader of its group")
        name = header.topic
        known = state.topics.get(name)
        if not state.broker_permission & PERM_WRITE and known is not None and known.order:
            return Refusal(
                ResponseCode.NO_PERMISSION, f"the broker[{self._config.advertised[0]}] sending message is forbidden"
            )
        remark = validate_topic(name)
        if remark is not None:
            return Refusal(ResponseCode.INVALID_PARAMETER, remark)
        if is_forbidden_to_send(name):
            return Refusal(ResponseCode.NO_PERMISSION, f"Sending message to topic[{name}] is forbidden.")
        return None

    def _check_message(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any) -> Refusal | None:
        queue_limit = max(config.write_queue_nums, config.read_queue_nums)
        if header.queue_id >= queue_limit or (header.queue_id < 0 and config.write_queue_nums <= 0):
            return Refusal(
                ResponseCode.INVALID_PARAMETER,
                f"request queueId[{header.queue_id}] is illegal, {topic_config_text(config)} "
                f"Producer: {conn.peer[0]}:{conn.peer[1]}",
            )
        if header.topic.startswith(RETRY_TOPIC_PREFIX):
            group = header.topic[len(RETRY_TOPIC_PREFIX) :]
            if self._state.groups.find(group) is None:
                return Refusal(
                    ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST, f"subscription group not exist, {group}: create it first"
                )
        properties = header.properties.encode()
        pairs = properties_dict(properties)
        level = int_or_zero(pairs.get(b"DELAY"))
        half = pairs.get(b"TRAN_MSG", b"").lower() == b"true" and not (header.reconsume_times > 0 and level > 0)
        if half or header.sys_flag & SYS_TRANSACTION_MASK == SYS_TRANSACTION_PREPARED:
            return Refusal(
                ResponseCode.NO_PERMISSION,
                f"the broker[{self._config.advertised[0]}] sending transaction message is forbidden: "
                "transactions are not supported yet",
            )
        if not 0 < len(body) <= self._max_body or len(properties) > self._max_properties - 64:
            return illegal(self._config)
        if header.batch and (level > 0 or header.topic.startswith(RETRY_TOPIC_PREFIX)):
            return Refusal(ResponseCode.MESSAGE_ILLEGAL, "batch messages cannot be delayed or sent to a retry topic")
        if level <= 0 and any(name.startswith(b"TIMER_DEL") for name in pairs):
            return Refusal(
                ResponseCode.SYSTEM_ERROR,
                "accurate timer message is not enabled, timerWheelEnable is false: use one of the 18 delay levels",
            )
        return None

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

    # ---------------------------------------------------------------------------------------------- single messages

    def _send_one(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any) -> None:
        if header.topic.startswith(RETRY_TOPIC_PREFIX) and self._is_exhausted(header):
            self._send_to_dlq(header, body, conn)
        else:
            self._store(header, body, config, conn, self._resolve(header, config))

    def _resolve(self, header: SendHeader, config: TopicConfig) -> Target:
        """The real destination."""
        properties, _unique, _rest = self.appender.complete(header.properties.encode())
        queue_id = header.queue_id
        if queue_id < 0:
            queue_id = self._rng.randrange(config.write_queue_nums)
        if b"POP_CK\x01" in properties or b"TIMER_DEL" in properties or b"DELAY\x01" in properties:
            pairs = properties_dict(properties)
            pairs.pop(b"POP_CK", None)
            level = min(int_or_zero(pairs.get(b"DELAY")), MAX_LEVEL)
            if level > 0:
                # The level wins over a timer, and is redirected (semantics.md 3.1).
                for name in [name for name in pairs if name.startswith(b"TIMER_DEL")]:
                    del pairs[name]
                return delayed(header.topic.encode(), queue_id, level, pairs)
            properties = join_properties(pairs)
        return Target(header.topic.encode(), queue_id, properties, queue_id)

    def _is_exhausted(self, header: SendHeader) -> bool:
        """A consumer's own retry that was consumed too often goes to the dead letters."""
        group = self._state.groups.find(header.topic[len(RETRY_TOPIC_PREFIX) :])
        limit = group.retry_max_times if group is not None else 16
        if header.version >= VERSION_MAX_RECONSUME_IN_REQUEST and header.max_reconsume_times is not None:
            limit = header.max_reconsume_times
        return header.reconsume_times > limit

    def _send_to_dlq(self, header: SendHeader, body: bytes, conn: Any) -> None:
        name = dlq_topic(header.topic[len(RETRY_TOPIC_PREFIX) :])
        pairs = properties_dict(self.appender.complete(header.properties.encode())[0])
        pairs[b"DELAY"] = b"0"
        pairs.pop(b"POP_CK", None)
        target = Target(name.encode(), 0, join_properties(pairs), 0)

        def ready(ok: bool, reason: str | None) -> None:
            self._state.touch(conn)
            if ok:
                self._store(header, body, self._state.topics.committed[name], conn, target)
            else:
                self._answers.fail_send(header, conn, reason_before_logging(reason))

        self._state.ensure_topic(one_queue_topic(name), ready)

    def _store(self, header: SendHeader, body: bytes, config: TopicConfig, conn: Any, target: Target) -> None:
        unique = find_property(target.properties, b"UNIQ_KEY\x01") or b""
        body_crc = _crc32(body) & 0x7FFFFFFF
        if not header.reconsume_times and unique and self._dedup.enabled:
            key = dedup_key(topic_seed(target.topic), unique, body_crc)
            earlier = self._dedup.find(key)
            if earlier is not None and self._duplicates.is_answered(
                header, body, conn, target.topic, [(unique, body_crc)], key, earlier
            ):
                return
        sys_flag = header.sys_flag & ~SYS_TRANSACTION_MASK
        if config.topic_filter_type == "MULTI_TAG":
            sys_flag |= SYS_MULTI_TAGS
        properties = target.properties + self._suffix
        if len(properties) > self._config.max_properties_bytes:
            refusal = illegal(self._config)
            self._answers.refuse_send(header, conn, refusal.code, refusal.remark)
            return
        try:
            staged, physical, queue_offset = self.appender.append(
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
            self._answers.fail_send(header, conn, reason_of(error))
            return
        if not header.reconsume_times and unique:
            self._state.staging.stage_dedup(staged, target.topic, unique, body_crc, physical)
        if not header.flag & FLAG_ONEWAY:
            waiter = (conn, header.opaque, physical, target.answer_queue_id, queue_offset, unique.decode())
            staged.waiters.append(waiter)
