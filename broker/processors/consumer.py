"""Clients and consumer groups: heartbeats, membership, offsets, queue locks (semantics.md 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.refusals import refusal_answer
from broker.subscriptions import Subscription, is_tag_type
from remoting.bodies import (
    CheckClientRequestBody,
    HeartbeatData,
    LockBatchRequestBody,
    LockBatchResponseBody,
    decode_body,
    encode_body,
    encode_names,
)
from remoting.codes import ResponseCode
from remoting.command import Command, encode_response
from remoting.errors import BodyError
from remoting.headers import require
from remoting.message import MessageQueue

if TYPE_CHECKING:
    from broker.context import BrokerContext

QUEUES_PER_LOCK_MAX = 65_536
REFUSALS_TOLD_MAX = 8


class ConsumerProcessor:
    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker
        self._state = broker.state
        self._clock = broker.env.clock

    # -------------------------------------------------------------------------------------------------- membership

    def heartbeat(self, request: Command, conn: Any) -> bytes:
        """HEART_BEAT: membership of this connection in the groups it names. The answer carries our version.

        Every node keeps its own members; only a ready leader logs what a consumer's first heartbeat creates.
        """
        data = decode_body(request.body, HeartbeatData)
        broker = self._broker
        now, wall_ms = self._clock.monotonic(), self._clock.wall_ms()
        who = (conn, data.client_id, request.language, request.version)
        changed = False
        for consumer in data.consumer_data_set:
            config = broker.ensure_group(consumer.group_name)
            if config is None:
                continue  # unknown and not to be created: this part of the heartbeat is ignored
            subscriptions = None
            if not data.without_sub:
                subscriptions = [
                    Subscription.of(s.topic, s.sub_string, s.sub_version, s.expression_type, s.class_filter_mode)
                    for s in consumer.subscription_data_set
                ]
            settings = (consumer.consume_type, consumer.message_model, consumer.consume_from_where)
            changed |= broker.clients.heartbeat_consumer(
                *who, consumer.group_name, settings, subscriptions, now, wall_ms
            )
        for producer in data.producer_data_set:
            broker.clients.heartbeat_producer(*who, producer.group_name, now, wall_ms)
        ext = {"IS_SUPPORT_HEART_BEAT_V2": True, "IS_SUB_CHANGE": changed}
        return encode_response(request, ResponseCode.SUCCESS, ext)

    def unregister(self, request: Command, conn: Any) -> bytes:
        """UNREGISTER_CLIENT: the client leaves the groups it names."""
        ext = request.ext
        client_id = require(ext, "clientID", str)
        self._broker.clients.unregister(conn, client_id, ext.get("producerGroup") or "", ext.get("consumerGroup") or "")
        return encode_response(request, ResponseCode.SUCCESS, {})

    def consumer_list(self, request: Command, conn: Any) -> bytes:
        """GET_CONSUMER_LIST_BY_GROUP."""
        name = require(request.ext, "consumerGroup", str)
        group = self._broker.clients.consumer_group(name)
        if group is None:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, {}, remark=f"no consumer for this group, {name}")
        body = encode_names("consumerIdList", group.client_ids())
        return encode_response(request, ResponseCode.SUCCESS, {}, body=body)

    def check_client_config(self, request: Command, conn: Any) -> bytes:
        """CHECK_CLIENT_CONFIG: asked when a subscription is not by tags, which is all there is so far."""
        data = decode_body(request.body, CheckClientRequestBody)
        subscription = data.subscription_data
        if subscription is None:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark="subscriptionData is null")
        if is_tag_type(subscription.expression_type):
            return encode_response(request, ResponseCode.SUCCESS)
        remark = f"The broker does not support consumer to filter message by {subscription.expression_type}"
        return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)

    # ------------------------------------------------------------------------------------------------------ offsets

    def update_offset(self, request: Command, conn: Any) -> bytes | None:
        """UPDATE_CONSUMER_OFFSET: one-way joins the next entry of deltas; two-way is answered after commit."""
        ext = request.ext
        group = require(ext, "consumerGroup", str)
        topic = require(ext, "topic", str)
        queue_id = require(ext, "queueId", int, bits=32)
        offset = require(ext, "commitOffset", int)
        state = self._state
        if state.groups.get_pending(group) is None:
            remark = f"Group {group} not exist!"
            return encode_response(request, ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST, {}, remark=remark)
        if state.topics.get_pending(topic) is None:
            remark = f"Topic {topic} not exist!"
            return encode_response(request, ResponseCode.TOPIC_NOT_EXIST, {}, remark=remark)
        refusal = self._broker.refusal_of_queue(topic, queue_id)
        if refusal is not None:
            return encode_response(request, ResponseCode.INVALID_PARAMETER, {}, remark=refusal)
        if not self._broker.commit_offset(group, topic, queue_id, offset):
            return encode_response(request, ResponseCode.SUCCESS, {}, remark="Offset has been previously reset")
        if request.is_oneway:
            return None
        # Through the delta, so that an older one-way update waiting there cannot land on top of this one.
        state.log_offsets(lambda ok, reason: self._offset_logged(request, conn, ok, reason))
        return None

    def _offset_logged(self, request: Command, conn: Any, ok: bool, reason: str | None) -> None:
        conn.write(encode_response(request, ResponseCode.SUCCESS, {}) if ok else refusal_answer(request, reason))
        self._broker.changed(conn)

    # -------------------------------------------------------------------------------------------------------- locks

    def lock(self, request: Command, conn: Any) -> bytes | None:
        """LOCK_BATCH_MQ: the queues this client holds from now on; those that no topic has are left out."""
        data = self._lock_body(request)
        wanted: list[MessageQueue] = []
        refusals: list[str] = []
        for queue in data.mq_set:
            refusal = self._broker.refusal_of_queue(queue.topic, queue.queue_id)
            if refusal is None:
                wanted.append(queue)
            else:
                refusals.append(refusal)
        remark = "; ".join(refusals[:REFUSALS_TOLD_MAX]) or None

        def done(granted: list[MessageQueue] | None) -> None:
            if granted is None:
                answer = refusal_answer(request, None)
            else:
                body = encode_body(LockBatchResponseBody(lock_ok_mq_set=granted))
                answer = encode_response(request, ResponseCode.SUCCESS, body=body, remark=remark)
            conn.write(answer)
            self._broker.changed(conn)

        self._state.locks.lock(data.consumer_group, data.client_id, wanted, done)
        return None

    def unlock(self, request: Command, conn: Any) -> bytes | None:
        """UNLOCK_BATCH_MQ, often one-way."""
        data = self._lock_body(request)

        def done(ok: bool) -> None:
            if request.is_oneway:
                return
            conn.write(encode_response(request, ResponseCode.SUCCESS) if ok else refusal_answer(request, None))
            self._broker.changed(conn)

        self._state.locks.unlock(data.consumer_group, data.client_id, data.mq_set, done)
        return None

    @staticmethod
    def _lock_body(request: Command) -> LockBatchRequestBody:
        data = decode_body(request.body, LockBatchRequestBody)
        if not data.consumer_group or not data.client_id:
            raise BodyError("consumerGroup and clientId must not be empty")
        if len(data.mq_set) > QUEUES_PER_LOCK_MAX:
            raise BodyError(f"more than {QUEUES_PER_LOCK_MAX} queues in one request")
        return data
