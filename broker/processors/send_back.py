"""CONSUMER_SEND_MSG_BACK: a consumer could not handle a message, and wants it again later (semantics.md 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from broker.answers import reason_before_logging, reason_of
from broker.appender import Appender, Target, delayed, one_queue_topic
from broker.consume_queue import NotAtHand
from broker.delay import MAX_LEVEL
from broker.records import SYS_TRANSACTION_MASK, Record, decode_record, join_properties, properties_dict
from broker.refusals import Refusal, illegal
from broker.topics import dlq_topic, retry_topic
from dledger.errors import NotLeader, Overloaded, TooLarge
from remoting.bodies import SubscriptionGroupConfig, TopicConfig
from remoting.codes import PERM_READ_WRITE, PERM_WRITE, VERSION_MAX_RECONSUME_IN_REQUEST, ResponseCode
from remoting.command import Command, encode_response
from remoting.errors import HeaderError
from remoting.headers import optional, require
from remoting.message import offset_msg_id

if TYPE_CHECKING:
    from broker.state import BrokerState


class SendBackProcessor:
    """One per node."""

    def __init__(self, state: BrokerState, appender: Appender) -> None:
        self._state = state
        self._config = state.config
        self._answers = state.answers
        self._appender = appender
        self._rng = state.env.rng("broker.send_back")

    def handle(self, request: Command, conn: Any, message: bytes | None = None) -> bytes | None:
        """CONSUMER_SEND_MSG_BACK: the message again, delayed, in the group's retry topic, or in its dead letters.

        Returns the answer, or None when it follows after commit (or is not wanted). Raises NotAtHand where the message
        has to be read from the disk first, and given as `message`.
        """
        try:
            refusal = self._send_back(request, conn, message)
        except HeaderError as error:
            refusal = Refusal(ResponseCode.SYSTEM_ERROR, str(error))
        if refusal is None or request.is_oneway:
            return None
        return encode_response(request, refusal.code, remark=refusal.remark or None)

    def _send_back(self, request: Command, conn: Any, message: bytes | None) -> Refusal | None:
        ext = request.ext
        state = self._state
        offset = require(ext, "offset", int)
        group_name = require(ext, "group", str)
        delay_level = require(ext, "delayLevel", int)
        limit_of_request = optional(ext, "maxReconsumeTimes", int, None)
        unit_mode = optional(ext, "unitMode", bool, False)
        if not state.is_ready_leader:
            return Refusal(ResponseCode.SERVICE_NOT_AVAILABLE, "this node is not the leader of its group")
        group = state.groups.find(group_name)
        if group is None:
            return Refusal(
                ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST,
                f"subscription group not exist, {group_name}: create it first",
            )
        if not state.broker_permission & PERM_WRITE:
            return Refusal(
                ResponseCode.NO_PERMISSION, f"the broker[{self._config.advertised[0]}] sending message is forbidden"
            )
        if group.retry_queue_nums <= 0:
            return Refusal(ResponseCode.SUCCESS, "")
        data = message or (state.read_message(offset) if offset >= 0 else None)
        if data is None:
            if message is None and state.is_cold(offset):
                raise NotAtHand(offset, 0)
            return Refusal(ResponseCode.SYSTEM_ERROR, f"look message by offset failed, {offset}")
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
                self._answer_back(request, conn, reason_before_logging(reason))

        state.ensure_topic(topic, ready)
        return None

    @staticmethod
    def _back_topic(group: SubscriptionGroupConfig, dead: bool, unit_mode: bool) -> TopicConfig:
        if dead:
            return one_queue_topic(dlq_topic(group.group_name))
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
                origin = offset_msg_id(record.store_host, record.physical_offset)
                pairs[b"ORIGIN_MESSAGE_ID"] = origin.encode()
            pairs[b"WAIT"] = b"false"
            name = topic.topic_name.encode()
            if dead:
                pairs[b"DELAY"] = b"0"
                target = Target(name, 0, join_properties(pairs), 0)
            else:
                level = delay_level if delay_level > 0 else 3 + record.reconsume_times
                queue_id = self._rng.randrange(topic.write_queue_nums)
                target = delayed(name, queue_id, min(level, MAX_LEVEL), pairs)
            if len(target.properties) > self._config.max_properties_bytes:
                refusal = illegal(self._config)
                self._answer_back(request, conn, None, refusal)
                return
            try:
                staged, _physical, _queue_offset = self._appender.append(
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
                staged.callbacks.append(lambda _ok, reason: self._answer_back(request, conn, reason))

        return store

    def _answer_back(self, request: Command, conn: Any, reason: str | None, refusal: Refusal | None = None) -> None:
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
