"""Administration of topics, consumer groups and the broker itself (mqadmin.md 2, 3, 5 and 7).

What changes a table becomes a META entry and is answered after its commit; the router sees to it that the leader does
it. What only looks is answered by the node that was asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from broker.groups import validate_group
from broker.refusals import refusal_answer
from broker.runtime_info import runtime_info
from broker.settings import RefusedChange
from broker.topics import is_system_topic, validate_topic
from remoting.bodies import (
    BrokerStatsData,
    ConnectionInfo,
    ConsumerConnection,
    GroupList,
    HaClientInfo,
    HaConnectionInfo,
    HARuntimeInfo,
    KVTable,
    ProducerConnection,
    ProducerInfo,
    ProducerTableInfo,
    QuerySubscriptionResponseBody,
    StatsItem,
    SubscriptionData,
    SubscriptionGroupConfig,
    SubscriptionGroupList,
    SubscriptionGroupWrapper,
    TopicConfig,
    TopicConfigList,
    TopicConfigSerializeWrapper,
    TopicList,
    TopicOffset,
    TopicStatsTable,
    decode_body,
    decode_properties_text,
    encode_body,
    encode_properties_text,
)
from remoting.codes import ResponseCode
from remoting.command import Command, encode_response
from remoting.headers import optional, require
from remoting.message import MessageQueue, java_hash

if TYPE_CHECKING:
    from broker.clients import ConsumerGroup, Member
    from broker.context import BrokerContext
    from broker.subscriptions import Subscription

QUEUES_PER_TOPIC_MAX: Final = 65_535
CHANGES_PER_REQUEST_MAX: Final = 10_000
IN_SYNC_LAG_BYTES: Final = 256 * 1024 * 1024
"""A follower further behind is shown as not in sync, as RocketMQ does (haMaxGapNotInSync)."""

Done = Callable[[bool, str | None], None]


class AdminProcessor:
    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker
        self._state = broker.state
        self._queues = broker.state.queues
        self._clock = broker.env.clock

    # ---------------------------------------------------------------------------------------------------- answering

    def _answer_when_logged(self, request: Command, conn: Any, after: Callable[[], None] | None = None) -> Done:
        """A `done` for `propose_op` that answers the request."""

        def done(ok: bool, reason: str | None) -> None:
            if ok:
                if after is not None:
                    after()
                answer = encode_response(request, ResponseCode.SUCCESS)
            else:
                answer = refusal_answer(request, reason)
            if not request.is_oneway:
                conn.write(answer)
                self._broker.changed(conn)

        return done

    def _propose_all(
        self, request: Command, conn: Any, ops: list[tuple[Any, ...]], *, routed: bool = False
    ) -> bytes | None:
        """Log several changes as one entry: all or none. `routed`: answered when the name servers know of them."""
        if not ops:
            return encode_response(request, ResponseCode.SUCCESS)
        answer = self._answer_when_logged(request, conn)

        def done(ok: bool, reason: str | None) -> None:
            if ok and routed:
                self._broker.when_registered(lambda: answer(True, None))
            else:
                answer(ok, reason)

        self._state.propose_ops(ops, done)
        return None

    @staticmethod
    def _refuse(request: Command, code: int, remark: str) -> bytes:
        return encode_response(request, code, remark=remark)

    # ------------------------------------------------------------------------------------------------------- topics

    def create_topic(self, request: Command, conn: Any) -> bytes | None:
        """UPDATE_AND_CREATE_TOPIC: replaces the whole configuration; attributes are merged."""
        ext = request.ext
        name = require(ext, "topic", str)
        refusal = self._check_topic_name(request, name)
        if refusal is not None:
            return refusal
        old = self._state.topics.get_pending(name)
        try:
            attributes = merge_attributes(old.attributes if old is not None else {}, ext.get("attributes") or "")
        except ValueError as error:
            return self._refuse(request, ResponseCode.INVALID_PARAMETER, str(error))
        config = TopicConfig(
            topic_name=name,
            read_queue_nums=require(ext, "readQueueNums", int, bits=32),
            write_queue_nums=require(ext, "writeQueueNums", int, bits=32),
            perm=require(ext, "perm", int, bits=32),
            topic_filter_type=ext.get("topicFilterType") or "SINGLE_TAG",
            topic_sys_flag=optional(ext, "topicSysFlag", int, 0),
            order=optional(ext, "order", bool, False),
            attributes=attributes,
        )
        return self._put_topics(request, conn, [config])

    def create_topics(self, request: Command, conn: Any) -> bytes | None:
        """UPDATE_AND_CREATE_TOPIC_LIST."""
        configs = decode_body(request.body, TopicConfigList).topic_config_list
        if not configs:
            return self._refuse(request, ResponseCode.INVALID_PARAMETER, "The topic list is empty.")
        if len(configs) > CHANGES_PER_REQUEST_MAX:
            remark = f"more than {CHANGES_PER_REQUEST_MAX} topics in one request"
            return self._refuse(request, ResponseCode.INVALID_PARAMETER, remark)
        for config in configs:
            refusal = self._check_topic_name(request, config.topic_name)
            if refusal is not None:
                return refusal
            old = self._state.topics.get_pending(config.topic_name)
            signed = {key: value for key, value in config.attributes.items() if key[:1] in ("+", "-")}
            if signed:
                changes = ",".join(key if key[0] == "-" else f"{key}={value}" for key, value in signed.items())
                config.attributes = merge_attributes(old.attributes if old is not None else {}, changes)
        return self._put_topics(request, conn, configs)

    def _check_topic_name(self, request: Command, name: str) -> bytes | None:
        problem = validate_topic(name)
        if problem is None and is_system_topic(name, self._broker.config):
            problem = f"The topic[{name}] is conflict with system topic."
        return None if problem is None else self._refuse(request, ResponseCode.INVALID_PARAMETER, problem)

    def _put_topics(self, request: Command, conn: Any, configs: list[TopicConfig]) -> bytes | None:
        ops: list[tuple[Any, ...]] = []
        for config in configs:
            for queues in (config.read_queue_nums, config.write_queue_nums):
                if not 0 <= queues <= QUEUES_PER_TOPIC_MAX:
                    remark = f"a topic has 0 to {QUEUES_PER_TOPIC_MAX} queues, not {queues}"
                    return self._refuse(request, ResponseCode.INVALID_PARAMETER, remark)
            if not 0 <= config.perm <= 15:
                remark = f"perm is a sum of 4 (read), 2 (write), 1 (inherit), not {config.perm}"
                return self._refuse(request, ResponseCode.INVALID_PARAMETER, remark)
            if config != self._state.topics.get_pending(config.topic_name):
                ops.append(("topic_put", config))
        return self._propose_all(request, conn, ops, routed=True)

    def delete_topic(self, request: Command, conn: Any) -> bytes | None:
        """DELETE_TOPIC_IN_BROKER; deleting an unknown topic succeeds."""
        name = require(request.ext, "topic", str)
        if not name.strip():
            return self._refuse(request, ResponseCode.INVALID_PARAMETER, "The specified topic is blank.")
        if is_system_topic(name, self._broker.config):
            remark = f"The topic[{name}] is conflict with system topic."
            return self._refuse(request, ResponseCode.INVALID_PARAMETER, remark)
        if self._state.topics.get_pending(name) is None:
            return encode_response(request, ResponseCode.SUCCESS)

        def after() -> None:
            self._broker.stats.forget_topic(name)
            self._broker.long_poll.drop_queue_of(name)

        self._state.propose_op(("topic_del", name), self._answer_when_logged(request, conn, after))
        return None

    def all_topic_configs(self, request: Command, conn: Any) -> bytes:
        topics = self._state.topics
        body = TopicConfigSerializeWrapper(topic_config_table=topics.all(), data_version=topics.data_version)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def topic_config(self, request: Command, conn: Any) -> bytes:
        name = require(request.ext, "topic", str)
        config = self._state.topics.get(name)
        if config is None:
            remark = f"No topic in this broker. topic: {name}"
            return self._refuse(request, ResponseCode.TOPIC_NOT_EXIST, remark)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(config))

    def topic_stats(self, request: Command, conn: Any) -> bytes:
        """GET_TOPIC_STATS_INFO: bounds and last store time of every queue."""
        name = require(request.ext, "topic", str)
        config = self._state.topics.get(name)
        if config is None:
            return self._refuse(request, ResponseCode.TOPIC_NOT_EXIST, f"topic[{name}] not exist")
        body = TopicStatsTable(topic_put_tps=self._broker.stats.minute_rate("TOPIC_PUT_NUMS", name))
        for queue_id in range(max(config.read_queue_nums, config.write_queue_nums)):
            high = self._queues.max_offset(name, queue_id)
            last_ms = self._queues.store_time_at(name, queue_id, high - 1) if high else 0
            queue = MessageQueue(topic=name, broker_name=self._broker.config.broker_name, queue_id=queue_id)
            body.offset_table[queue] = TopicOffset(
                min_offset=self._queues.min_offset(name, queue_id),
                max_offset=high,
                last_update_timestamp=max(0, last_ms),
            )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def system_topics(self, request: Command, conn: Any) -> bytes:
        config = self._broker.config
        names = [name for name in self._state.topics.names() if is_system_topic(name, config)]
        names += [
            name
            for name in ("TRANS_CHECK_MAX_TIME_TOPIC", "RMQ_SYS_TRACE_TOPIC", "CHECKPOINT_TOPIC")
            if name not in names
        ]
        reply_topic = f"{config.cluster}_REPLY_TOPIC"
        if reply_topic not in names:
            names.append(reply_topic)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(TopicList(topic_list=names)))

    def who_consumes(self, request: Command, conn: Any) -> bytes:
        """QUERY_TOPIC_CONSUME_BY_WHO: groups connected to the topic or with offsets on it."""
        name = require(request.ext, "topic", str)
        groups = dict.fromkeys(self._broker.clients.groups_of_topic(name))
        groups.update(dict.fromkeys(self._state.offsets.groups_of(name)))
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(GroupList(group_list=list(groups))))

    # ------------------------------------------------------------------------------------------------------- groups

    def create_group(self, request: Command, conn: Any) -> bytes | None:
        """UPDATE_AND_CREATE_SUBSCRIPTIONGROUP."""
        return self._put_groups(request, conn, [decode_body(request.body, SubscriptionGroupConfig)])

    def create_groups(self, request: Command, conn: Any) -> bytes | None:
        """UPDATE_AND_CREATE_SUBSCRIPTIONGROUP_LIST."""
        configs = decode_body(request.body, SubscriptionGroupList).group_config_list
        if len(configs) > CHANGES_PER_REQUEST_MAX:
            remark = f"more than {CHANGES_PER_REQUEST_MAX} groups in one request"
            return self._refuse(request, ResponseCode.INVALID_PARAMETER, remark)
        return self._put_groups(request, conn, configs)

    def _put_groups(self, request: Command, conn: Any, configs: list[SubscriptionGroupConfig]) -> bytes | None:
        ops: list[tuple[Any, ...]] = []
        for config in configs:
            problem = validate_group(config.group_name)
            if problem is not None:
                return self._refuse(request, ResponseCode.INVALID_PARAMETER, problem)
            old = self._state.groups.get_pending(config.group_name)
            signed = {key: value for key, value in config.attributes.items() if key[:1] in ("+", "-")}
            if signed:
                changes = ",".join(key if key[0] == "-" else f"{key}={value}" for key, value in signed.items())
                config.attributes = merge_attributes(old.attributes if old is not None else {}, changes)
            if config != old:
                ops.append(("group_put", config))
        return self._propose_all(request, conn, ops)

    def delete_group(self, request: Command, conn: Any) -> bytes | None:
        """DELETE_SUBSCRIPTIONGROUP; deleting an unknown group succeeds."""
        ext = request.ext
        name = require(ext, "groupName", str)
        clean = optional(ext, "cleanOffset", bool, False) or optional(ext, "removeOffset", bool, False)
        if self._state.groups.get_pending(name) is None and not (clean and self._state.offsets.topics_of(name)):
            return encode_response(request, ResponseCode.SUCCESS)
        done = self._answer_when_logged(request, conn, lambda: self._broker.stats.forget_group(name))
        self._state.propose_op(("group_del", name, clean), done)
        return None

    def all_group_configs(self, request: Command, conn: Any) -> bytes:
        groups = self._state.groups
        body = SubscriptionGroupWrapper(
            subscription_group_table=groups.all(), data_version=groups.data_version, forbidden_table={}
        )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def group_config(self, request: Command, conn: Any) -> bytes:
        name = require(request.ext, "group", str)
        config = self._broker.group_config(name)
        if config is None:
            remark = f"No group in this broker. group: {name}"
            return self._refuse(request, ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST, remark)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(config))

    def consumer_connections(self, request: Command, conn: Any) -> bytes:
        """GET_CONSUMER_CONNECTION_LIST."""
        name = require(request.ext, "consumerGroup", str)
        group = self._broker.clients.consumer_group(name)
        if group is None:
            remark = f"the consumer group[{name}] not online"
            return self._refuse(request, ResponseCode.CONSUMER_NOT_ONLINE, remark)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(_connection_body(group)))

    def producer_connections(self, request: Command, conn: Any) -> bytes:
        """GET_PRODUCER_CONNECTION_LIST."""
        name = require(request.ext, "producerGroup", str)
        members = self._broker.clients.producers(name)
        if not members:
            return self._refuse(request, ResponseCode.SYSTEM_ERROR, f"the producer group[{name}] not exist")
        body = ProducerConnection(connection_set=[_connection_info(member) for member in members])
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def all_producers(self, request: Command, conn: Any) -> bytes:
        """GET_ALL_PRODUCER_INFO."""
        body = ProducerTableInfo(
            data={
                name: [
                    ProducerInfo(
                        client_id=member.client_id,
                        remote_ip=member.conn.peer_text,
                        language=member.language,
                        version=member.version,
                        last_update_timestamp=member.last_seen_ms,
                    )
                    for member in members
                ]
                for name, members in self._broker.clients.producer_groups().items()
            }
        )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def topics_of_group(self, request: Command, conn: Any) -> bytes:
        """QUERY_TOPICS_BY_CONSUMER: topics the group has offsets on."""
        name = require(request.ext, "group", str)
        body = TopicList(topic_list=self._state.offsets.topics_of(name), broker_addr=self._broker.address)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def subscription_of_group(self, request: Command, conn: Any) -> bytes:
        """QUERY_SUBSCRIPTION_BY_CONSUMER."""
        name = require(request.ext, "group", str)
        topic = request.ext.get("topic") or ""
        group = self._broker.clients.consumer_group(name)
        subscription = group.subscriptions.get(topic) if group is not None else None
        body = QuerySubscriptionResponseBody(
            group=name,
            topic=topic,
            subscription_data=_subscription_data(subscription) if subscription is not None else None,
        )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    # ------------------------------------------------------------------------------------------------ configuration

    def update_config(self, request: Command, conn: Any) -> bytes:
        """UPDATE_BROKER_CONFIG of this node: done and kept, or refused with a sentence."""
        wanted = decode_properties_text(request.body)
        broker = self._broker
        try:
            changed = broker.settings.change(wanted, self._clock.wall_ms())
        except RefusedChange as error:
            return self._refuse(request, error.code, str(error))
        if changed:
            broker.settings_changed()
            try:
                broker.save_overrides()
            except OSError as error:
                remark = f"changed until the next start only: it cannot be written down: {error}"
                return self._refuse(request, ResponseCode.SYSTEM_ERROR, remark)
            broker.log.info("settings changed", **{key: wanted[key] for key in sorted(wanted)[:32]})
        return encode_response(request, ResponseCode.SUCCESS)

    def get_config(self, request: Command, conn: Any) -> bytes:
        settings = self._broker.settings
        ext = {"version": msgspec.json.encode(settings.version).decode()}
        body = encode_properties_text(settings.properties())
        return encode_response(request, ResponseCode.SUCCESS, ext, body=body)

    def get_runtime_info(self, request: Command, conn: Any) -> bytes:
        body = encode_body(KVTable(table=runtime_info(self._broker)), raw_keys=False)
        return encode_response(request, ResponseCode.SUCCESS, body=body)

    def view_stats(self, request: Command, conn: Any) -> bytes:
        """VIEW_BROKER_STATS_DATA."""
        name = require(request.ext, "statsName", str)
        key = require(request.ext, "statsKey", str)
        found = self._broker.stats.view(name, key)
        if found is None:
            return self._refuse(request, ResponseCode.SYSTEM_ERROR, f"The stats <{name}> <{key}> not exist")
        minute, hour, day = (StatsItem(sum=s.sum, tps=s.tps, avgpt=s.avgpt) for s in found)
        body = BrokerStatsData(stats_minute=minute, stats_hour=hour, stats_day=day)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def clean_consume_queues(self, request: Command, conn: Any) -> bytes:
        """CLEAN_EXPIRED_CONSUMEQUEUE: queue files wholly below the log go with the next checkpoint, at once that is."""
        self._state.checkpoint_soon()
        return encode_response(request, ResponseCode.SUCCESS)

    def clean_unused_topics(self, request: Command, conn: Any) -> bytes:
        """CLEAN_UNUSED_TOPIC: a deleted topic's queues go with it already, so nothing is ever left to clean."""
        return encode_response(request, ResponseCode.SUCCESS)

    # ---------------------------------------------------------------------------------------------------------- raft

    def ha_status(self, request: Command, conn: Any) -> bytes:
        """GET_BROKER_HA_STATUS: the followers of the raft group stand for the slaves."""
        broker = self._broker
        group = broker.group
        statistics = group.statistics()
        leads = group.leader_id == group.node_id
        body = HARuntimeInfo(master=leads, master_commit_log_max_offset=statistics.end_position)
        if leads:
            addresses = {**broker.config.group.peers, **statistics.addresses}
            for peer, lag in sorted(statistics.lag_bytes.items()):
                host, port = addresses[peer]
                in_sync = bool(statistics.connected.get(peer)) and lag <= IN_SYNC_LAG_BYTES
                body.ha_connection_info.append(
                    HaConnectionInfo(
                        addr=f"{host}:{port}",
                        slave_ack_offset=statistics.end_position - lag,
                        diff=lag,
                        in_sync=in_sync,
                    )
                )
                body.in_sync_slave_nums += in_sync
        else:
            body.ha_client_runtime_info = HaClientInfo(
                master_addr=broker.master_address or None, max_offset=statistics.end_position
            )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def epoch_cache(self, request: Command, conn: Any) -> bytes:
        """GET_BROKER_EPOCH_CACHE: there is no controller here; the terms are shown in runtime information."""
        return self._refuse(request, ResponseCode.SYSTEM_ERROR, "this request only for controllerMode ")


def merge_attributes(old: dict[str, str], changes: str) -> dict[str, str]:
    """Apply `+key=value,-key` to a topic's attributes. Raises ValueError."""
    attributes = dict(old)
    for part in filter(None, (piece.strip() for piece in changes.split(","))):
        sign, rest = part[0], part[1:]
        key, equals, value = rest.partition("=")
        if sign == "+" and equals and key:
            attributes[key] = value
        elif sign == "-" and key:
            attributes.pop(key, None)
        else:
            raise ValueError(f"an attribute change is +key=value or -key, not {part!r}")
    return attributes


def _connection_info(member: Member) -> ConnectionInfo:
    return ConnectionInfo(
        client_id=member.client_id,
        client_addr=member.conn.peer_text,
        language=member.language,
        version=member.version,
    )


def _subscription_data(subscription: Subscription) -> SubscriptionData:
    return SubscriptionData(
        topic=subscription.topic,
        sub_string=subscription.expression,
        tags_set=list(subscription.tags),
        code_set=[java_hash(tag) for tag in subscription.tags],
        sub_version=subscription.version,
        expression_type=subscription.expression_type,
        class_filter_mode=subscription.class_filter,
    )


def _connection_body(group: ConsumerGroup) -> ConsumerConnection:
    return ConsumerConnection(
        connection_set=[_connection_info(member) for member in group.members.values()],
        subscription_table={
            topic: _subscription_data(subscription) for topic, subscription in group.subscriptions.items()
        },
        consume_type=group.consume_type,
        message_model=group.message_model,
        consume_from_where=group.consume_from_where,
    )
