"""Where consumer groups stand, and moving them: consume statistics, time spans, resets, clones (mqadmin.md 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.consume_queue import LOWER, NotAtHand
from broker.processors.query import search_with_disk
from broker.refusals import refusal_answer
from broker.stats import GROUP_GET_NUMS
from remoting.bodies import (
    ConsumerOffsetTable,
    ConsumeStats,
    ConsumeStatsList,
    DataVersion,
    OffsetWrapper,
    QueryConsumeTimeSpanBody,
    QueueTimeSpan,
    ResetOffsetBody,
    TopicConfig,
    encode_body,
    encode_reset_offset,
)
from remoting.codes import VERSION_RESET_OFFSET_PUSH, RequestCode, ResponseCode
from remoting.command import Command, encode_response
from remoting.errors import ConnectionLost
from remoting.headers import optional, require
from remoting.message import MessageQueue

if TYPE_CHECKING:
    from broker.clients import ConsumerGroup
    from broker.context import BrokerContext


class ProgressProcessor:
    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker
        self._state = broker.state
        self._queues = broker.state.queues
        self._clock = broker.env.clock

    # ----------------------------------------------------------------------------------------------------- looking

    def consume_stats(self, request: Command, conn: Any) -> bytes:
        """GET_CONSUME_STATS: how far a group is behind, per queue."""
        ext = request.ext
        group = require(ext, "consumerGroup", str)
        topics = [name for name in [ext.get("topic"), *(ext.get("topicList") or "").split(";")] if name]
        body = ConsumeStats()
        for topic in topics or self._state.offsets.topics_of(group):
            self._add_topic(body, group, topic)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def _add_topic(self, body: ConsumeStats, group: str, topic: str) -> None:
        config = self._state.topics.get(topic)
        if config is None:
            return
        connected = self._broker.clients.consumer_group(group)
        if connected is not None and connected.subscriptions and topic not in connected.subscriptions:
            return  # it consumed this topic once and does no more
        for queue_id in range(config.read_queue_nums):
            consumed = max(0, self._state.offsets.query(group, topic, queue_id) or 0)
            last_ms = self._queues.store_time_at(topic, queue_id, consumed - 1) if consumed else 0
            pulled = self._broker.pull_offsets.get((group, topic, queue_id), consumed)
            body.offset_table[self._queue(topic, queue_id)] = OffsetWrapper(
                broker_offset=self._queues.max_offset(topic, queue_id),
                consumer_offset=consumed,
                last_timestamp=max(0, last_ms),
                pull_offset=max(pulled, consumed),
            )
        body.consume_tps += self._broker.stats.minute_rate(GROUP_GET_NUMS, f"{topic}@{group}")

    def broker_consume_stats(self, request: Command, conn: Any) -> bytes:
        """GET_BROKER_CONSUME_STATS: every group with offsets, one entry per topic."""
        only_ordered = optional(request.ext, "isOrder", bool, False)
        body = ConsumeStatsList(broker_addr=self._broker.address)
        for group in self._state.offsets.groups():
            rows: list[ConsumeStats] = []
            for topic in self._state.offsets.topics_of(group):
                config = self._state.topics.get(topic)
                if config is None or (only_ordered and not config.order):
                    continue
                stats = ConsumeStats()
                self._add_topic(stats, group, topic)
                if not stats.offset_table:
                    continue
                for wrapper in stats.offset_table.values():
                    body.total_diff += wrapper.broker_offset - wrapper.consumer_offset
                    body.total_inflight_diff += (wrapper.pull_offset or 0) - wrapper.consumer_offset
                rows.append(stats)
            body.consume_stats_list.append({group: rows})
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def consume_time_span(self, request: Command, conn: Any) -> bytes:
        """QUERY_CONSUME_TIME_SPAN: store times at the start, at the end, and where the group is."""
        topic = require(request.ext, "topic", str)
        group = require(request.ext, "group", str)
        config = self._state.topics.get(topic)
        if config is None:
            return encode_response(request, ResponseCode.TOPIC_NOT_EXIST, remark=f"topic[{topic}] not exist")
        now_ms = self._clock.wall_ms()
        body = QueryConsumeTimeSpanBody()
        for queue_id in range(config.write_queue_nums):
            low = self._queues.min_offset(topic, queue_id)
            high = self._queues.max_offset(topic, queue_id)
            consumed = self._state.offsets.query(group, topic, queue_id) or 0
            first_ms = self._queues.earliest_store_time(topic, queue_id)
            waiting_ms = self._queues.store_time_at(topic, queue_id, max(low, consumed)) if consumed < high else now_ms
            body.consume_time_span_set.append(
                QueueTimeSpan(
                    message_queue=self._queue(topic, queue_id),
                    min_time_stamp=first_ms,
                    max_time_stamp=self._queues.store_time_at(topic, queue_id, high - 1),
                    consume_time_stamp=(
                        self._queues.store_time_at(topic, queue_id, consumed - 1) if consumed > low else first_ms
                    ),
                    delay_time=max(0, now_ms - waiting_ms),
                )
            )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def all_consumer_offsets(self, request: Command, conn: Any) -> bytes:
        """GET_ALL_CONSUMER_OFFSET, as consumerOffset.json."""
        body = ConsumerOffsetTable(offset_table=self._state.offsets.all(), data_version=DataVersion())
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    def all_delay_offsets(self, request: Command, conn: Any) -> bytes:
        """GET_ALL_DELAY_OFFSET, as delayOffset.json."""
        body = {"dataVersion": DataVersion(), "offsetTable": self._state.delay.levels}
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    # ------------------------------------------------------------------------------------------------------- moving

    def reset_offset(self, request: Command, conn: Any) -> bytes | None:
        """INVOKE_BROKER_TO_RESET_OFFSET.

        As in 5.3 the broker itself stores the new offsets and answers the next pull of each queue with 21, so it also
        works for a group that is not connected. With useServerSideResetOffset=false the members are told, as in 4.9.
        """
        try:
            return self._reset(request, conn, {})
        except NotAtHand as missing:
            if self._broker.jobs.start(self._reset_cold, request, conn, missing):
                return None
            remark = "[OVERLOAD]too many queries wait for the disk"
            return encode_response(request, ResponseCode.SYSTEM_BUSY, remark=remark)

    async def _reset_cold(self, request: Command, conn: Any, missing: NotAtHand) -> None:
        group = self._broker.group
        answer = await search_with_disk(group, request, missing, lambda known: self._reset(request, conn, known))
        if answer is not None:
            conn.write(answer)
            conn.flush()

    def _reset(self, request: Command, conn: Any, known: dict[int, int]) -> bytes | None:
        ext = request.ext
        topic = require(ext, "topic", str)
        group = require(ext, "group", str)
        timestamp = optional(ext, "timestamp", int, -1)
        forced = optional(ext, "isForce", bool, False)
        queue_id = optional(ext, "queueId", int, -1)
        wanted = optional(ext, "offset", int, -1)
        config = self._state.topics.get(topic)
        if config is None:
            return encode_response(request, ResponseCode.TOPIC_NOT_EXIST, remark=f"Topic {topic} does not exist")
        if self._state.groups.get(group) is None:
            remark = f"Group {group} does not exist"
            return encode_response(request, ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST, remark=remark)
        if queue_id >= config.read_queue_nums:
            remark = f"queueId[{queue_id}] is illegal, topic:[{topic}] readQueueNums:[{config.read_queue_nums}]"
            return encode_response(request, ResponseCode.INVALID_PARAMETER, remark=remark)
        if not self._broker.settings.server_side_reset:
            return self._reset_by_clients(request, config, group, timestamp, forced, known)
        table: dict[int, int] = {}
        for number in range(config.read_queue_nums) if queue_id < 0 else (queue_id,):
            if wanted >= 0:
                high = self._queues.max_offset(topic, number)
                table[number] = min(max(wanted, self._queues.min_offset(topic, number)), high)
            else:
                table[number] = self._reset_target(group, topic, number, timestamp, forced, known)
        rows = [[group, topic, number, offset] for number, offset in table.items()]

        def done(ok: bool, reason: str | None) -> None:
            if ok:
                for number, offset in table.items():
                    self._broker.resets.put(group, topic, number, offset)
                body = ResetOffsetBody(offset_table={self._queue(topic, n): offset for n, offset in table.items()})
                answer = encode_response(request, ResponseCode.SUCCESS, body=encode_reset_offset(body))
                self._broker.long_poll.drop_queue_of(topic)
            else:
                answer = refusal_answer(request, reason)
            conn.write(answer)
            self._broker.changed(conn)

        self._state.propose_op(("offsets", rows), done)
        return None

    def _reset_target(
        self, group: str, topic: str, queue_id: int, timestamp: int, forced: bool, known: dict[int, int]
    ) -> int:
        if timestamp == -1:
            offset = self._queues.max_offset(topic, queue_id)
        elif timestamp < 0:
            offset = 0
        else:
            offset = self._queues.search_by_time(topic, queue_id, timestamp, LOWER, known)
        consumed = self._state.offsets.query(group, topic, queue_id)
        if not forced and consumed is not None and offset >= consumed:
            return consumed
        return offset

    def _reset_by_clients(
        self,
        request: Command,
        config: TopicConfig,
        group_name: str,
        timestamp: int,
        forced: bool,
        known: dict[int, int],
    ) -> bytes:
        topic = config.topic_name
        body = ResetOffsetBody()
        for queue_id in range(config.write_queue_nums):
            if self._state.offsets.query(group_name, topic, queue_id) is None:
                continue
            target = self._reset_target(group_name, topic, queue_id, timestamp, forced, known)
            body.offset_table[self._queue(topic, queue_id)] = target
        if not body.offset_table:
            remark = f"THe consumer group <{group_name}> not exist"
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        group = self._broker.clients.consumer_group(group_name)
        if group is None:
            remark = (
                f"Consumer not online, so can not reset offset, Group: {group_name} Topic: {topic} "
                f"Timestamp: {timestamp}"
            )
            return encode_response(request, ResponseCode.CONSUMER_NOT_ONLINE, remark=remark)
        problem = self._push_reset(group, topic, timestamp, body, list_form=request.language == "CPP")
        if problem is not None:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=problem)
        return encode_response(request, ResponseCode.SUCCESS, body=encode_reset_offset(body))

    def _push_reset(
        self, group: ConsumerGroup, topic: str, timestamp: int, body: ResetOffsetBody, *, list_form: bool
    ) -> str | None:
        for member in group.members.values():
            if member.version < VERSION_RESET_OFFSET_PUSH:
                return f"the client does not support this feature, version={member.version}"
        data = encode_reset_offset(body, list_form=list_form)
        for conn in list(group.members):
            ext = {
                "topic": topic,
                "group": group.name,
                "timestamp": str(timestamp),
                "isForce": "false",
                "queueId": "-1",
            }
            command = Command(code=RequestCode.RESET_CONSUMER_CLIENT_OFFSET, opaque=0, ext=ext, body=data)
            try:
                conn.send_oneway(command)
            except ConnectionLost:
                continue
        return None

    def clone_offsets(self, request: Command, conn: Any) -> bytes | None:
        """CLONE_GROUP_OFFSET: the destination group continues where the source group is."""
        ext = request.ext
        source = require(ext, "srcGroup", str)
        destination = require(ext, "destGroup", str)
        topic = ext.get("topic") or ""
        rows = [
            [destination, name, queue_id, offset]
            for name in ([topic] if topic else self._state.offsets.topics_of(source))
            if self._state.topics.get(name) is not None
            for queue_id, offset in self._state.offsets.of_topic(source, name).items()
        ]
        if not rows:
            return encode_response(request, ResponseCode.SUCCESS)

        def done(ok: bool, reason: str | None) -> None:
            conn.write(encode_response(request, ResponseCode.SUCCESS) if ok else refusal_answer(request, reason))
            self._broker.changed(conn)

        self._state.propose_op(("offsets", rows), done)
        return None

    def _queue(self, topic: str, queue_id: int) -> MessageQueue:
        return MessageQueue(topic=topic, broker_name=self._broker.config.broker_name, queue_id=queue_id)
