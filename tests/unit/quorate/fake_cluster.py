"""A name server and brokers in memory, behind real sockets: enough of RocketMQ to test the client against.

Each broker group has any number of nodes sharing one state, as replicas do; one of them leads. The state can be told to
misbehave: refuse with a code, swallow requests, lose its leader.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from attrs import define, field

from remoting.bodies import (
    BrokerData,
    ClusterInfo,
    HeartbeatData,
    LockBatchRequestBody,
    LockBatchResponseBody,
    QueueData,
    TopicRouteData,
    decode_body,
    encode_body,
    encode_names,
    encode_topic_route,
)
from remoting.codes import PULL_SUSPEND, RequestCode, ResponseCode
from remoting.command import Command, encode_response
from remoting.connection import Connection
from remoting.frames import Frame, decode_frame, decode_pull, decode_send_v2
from remoting.message import host_to_bytes, offset_msg_id, property_of, string_to_properties, tags_code
from remoting.message_codec import decode_stored, encode_record, iter_batch
from remoting.server import serve
from runtime.logs import get_logger
from runtime.model import Env
from runtime.testing import wait_until

Key = tuple[str, int]


@define
class Parked:
    connection: Connection
    frame: Frame
    key: Key
    offset: int


class GroupState:
    """What all nodes of one broker group share."""

    def __init__(self, name: str, env: Env) -> None:
        self.name = name
        self.env = env
        self.nodes: dict[int, Node] = {}
        self.leader: int | None = 0
        self.queues: dict[Key, list[bytes]] = defaultdict(list)
        self.tags: dict[Key, list[int]] = defaultdict(list)
        self.by_physical: dict[int, bytes] = {}
        self.physical = 0
        self.seen: dict[tuple[str, str], tuple[int, str]] = {}
        self.offsets: dict[tuple[str, str, int], int] = {}
        self.locks: dict[tuple[str, str, int], str] = {}
        self.sent_back: list[dict[str, str]] = []
        self.refuse: Callable[[Command], tuple[int, str] | None] = lambda request: None
        self.swallow: Callable[[Command], bool] = lambda request: False
        self.requests: list[tuple[int, Command]] = []
        self.waiting_for_leader: list[tuple[Connection, Frame]] = []
        self.held_s: float | None = None
        """How long such a request waits before it is refused; for ever where None."""

    def append(self, topic: str, queue_id: int, body: bytes, properties: str, *, times: int = 0) -> tuple[int, str]:
        key = (topic, queue_id)
        host = host_to_bytes("127.0.0.1", 1)
        offset = len(self.queues[key])
        record = encode_record(
            queue_id, 0, offset, self.physical, 0, 1, host, self.env.clock.wall_ms(), host, times, 0, body,
            topic.encode(), properties.encode(),
        )  # fmt: skip
        self.queues[key].append(record)
        self.tags[key].append(tags_code(string_to_properties(properties).get("TAGS")))
        self.by_physical[self.physical] = record
        made = offset_msg_id(host, self.physical)
        self.physical += len(record)
        for node in self.nodes.values():
            node.wake(key)
        return offset, made

    def stored(self, topic: str) -> list[bytes]:
        """Bodies of a topic in order of storing."""
        bodies = [
            (decode_stored(r).physical_offset, decode_stored(r).body)
            for k, rs in self.queues.items()
            if k[0] == topic
            for r in rs
        ]
        return [body for _, body in sorted(bodies)]


class Node:
    """One broker process of a group."""

    def __init__(self, state: GroupState, node_id: int, cluster: FakeCluster) -> None:
        self.state = state
        self.node_id = node_id
        self.cluster = cluster
        self.address = ""
        self.connections: list[Connection] = []
        self.parked: list[Parked] = []
        self.members: dict[str, dict[str, Connection]] = defaultdict(dict)
        self.heartbeats: list[HeartbeatData] = []
        self.scope: trio.CancelScope | None = None
        self.is_frozen = False
        self.unanswered: list[tuple[Connection, Frame]] = []
        """What came while it was frozen."""

    @property
    def is_leader(self) -> bool:
        return self.state.leader == self.node_id

    def on_open(self, connection: Connection) -> None:
        self.connections.append(connection)

    def on_close(self, connection: Connection) -> None:
        self.connections.remove(connection)
        for group, members in self.members.items():
            for client_id in [c for c, conn in members.items() if conn is connection]:
                del members[client_id]
                self.notify(group)

    def notify(self, group: str) -> None:
        for connection in self.members[group].values():
            if not connection.is_closed:
                connection.send_oneway(
                    Command(RequestCode.NOTIFY_CONSUMER_IDS_CHANGED, 0, ext={"consumerGroup": group})
                )

    def on_frames(self, connection: Connection, frames: list[Frame]) -> None:
        for frame in frames:
            if self.is_frozen:
                self.unanswered.append((connection, frame))
            else:
                self.handle(connection, frame)

    def answer_late(self) -> None:
        """What came while it was frozen."""
        unanswered, self.unanswered = self.unanswered, []
        for connection, frame in unanswered:
            self.handle(connection, frame)
            connection.flush()

    def handle(self, connection: Connection, frame: Frame) -> None:
        request = decode_frame(frame)
        self.state.requests.append((self.node_id, request))
        if self.state.swallow(request):
            return
        refused = self.state.refuse(request)
        if refused is not None:
            connection.write(encode_response(request, refused[0], remark=refused[1]))
            return
        if request.code in (310, 320, 36, 15, 41, 42) and self.state.leader is None:
            self.state.waiting_for_leader.append((connection, frame))
            if self.state.held_s is not None and self.cluster.nursery is not None:
                self.cluster.nursery.start_soon(self.refuse_late, connection, frame, self.state.held_s)
            return
        answer = getattr(self, f"on_{request.code}")(connection, frame, request)
        if answer is not None and not request.is_oneway:
            connection.write(answer)

    async def refuse_late(self, connection: Connection, frame: Frame, after_s: float) -> None:
        """As a real broker does with what it holds."""
        await trio.sleep(after_s)
        if (connection, frame) in self.state.waiting_for_leader:
            self.state.waiting_for_leader.remove((connection, frame))
            connection.write(encode_response(decode_frame(frame), 14, remark="not leader; leader=none"))
            connection.flush()

    def lead(self) -> None:
        """This node leads from now on; what was held for a leader is executed."""
        self.state.leader = self.node_id
        held, self.state.waiting_for_leader = self.state.waiting_for_leader, []
        for connection, frame in held:
            self.handle(connection, frame)
            connection.flush()

    # ------------------------------------------------------------------------------------------------------ requests

    def on_310(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        header = decode_send_v2(frame)
        if header.topic not in self.cluster.topics:
            self.cluster.topics[header.topic] = min(4, header.default_topic_queue_nums)
        unique = property_of(header.properties, "UNIQ_KEY") or ""
        again = self.state.seen.get((header.topic, unique))
        if header.code == 320:
            items = list(iter_batch(frame[2]))
            unique = property_of(items[0][2].decode(), "UNIQ_KEY") or ""
            again = self.state.seen.get((header.topic, unique))
            if again is None:
                made = [
                    self.state.append(header.topic, header.queue_id, body, properties.decode())
                    for _, body, properties in items
                ]
                again = made[0][0], ",".join(m[1] for m in made)
                self.state.seen[header.topic, unique] = again
        elif again is None:
            again = self.state.append(
                header.topic, header.queue_id, frame[2], header.properties, times=header.reconsume_times
            )
            self.state.seen[header.topic, unique] = again
        return encode_response(request, 0, {"queueId": header.queue_id, "queueOffset": again[0], "msgId": again[1]})

    on_320 = on_310

    def on_34(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        beat = decode_body(request.body, HeartbeatData)
        self.heartbeats.append(beat)
        for consumer in beat.consumer_data_set:
            members = self.members[consumer.group_name]
            new = members.get(beat.client_id) is not connection
            members[beat.client_id] = connection
            if new:
                self.notify(consumer.group_name)
        return encode_response(request, 0)

    def on_35(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        group = request.ext["consumerGroup"]
        self.members[group].pop(request.ext["clientID"], None)
        self.notify(group)
        return encode_response(request, 0)

    def on_38(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        members = sorted(self.members[request.ext["consumerGroup"]])
        if not members:
            return encode_response(request, 1, remark="no consumer for this group")
        return encode_response(request, 0, None, encode_names("consumerIdList", members))

    def on_14(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        ext = request.ext
        offset = self.state.offsets.get((ext["consumerGroup"], ext["topic"], int(ext["queueId"])))
        if offset is None:
            return encode_response(request, ResponseCode.QUERY_NOT_FOUND, remark="Not found")
        return encode_response(request, 0, {"offset": offset})

    def on_15(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        ext = request.ext
        self.state.offsets[ext["consumerGroup"], ext["topic"], int(ext["queueId"])] = int(ext["commitOffset"])
        return encode_response(request, 0)

    def on_30(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        return encode_response(
            request, 0, {"offset": len(self.state.queues[request.ext["topic"], int(request.ext["queueId"])])}
        )

    def on_31(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        return encode_response(request, 0, {"offset": 0})

    def on_29(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        return encode_response(request, 0, {"offset": 1})

    def on_36(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        self.state.sent_back.append(dict(request.ext))
        return encode_response(request, 0)

    def on_41(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        body = decode_body(request.body, LockBatchRequestBody)
        granted = []
        for queue in body.mq_set:
            key = (body.consumer_group, queue.topic, queue.queue_id)
            if self.state.locks.setdefault(key, body.client_id) == body.client_id:
                granted.append(queue)
        return encode_response(request, 0, None, encode_body(LockBatchResponseBody(lock_ok_mq_set=granted)))

    def on_42(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        body = decode_body(request.body, LockBatchRequestBody)
        for queue in body.mq_set:
            key = (body.consumer_group, queue.topic, queue.queue_id)
            if self.state.locks.get(key) == body.client_id:
                del self.state.locks[key]
        return encode_response(request, 0)

    def on_11(self, connection: Connection, frame: Frame, request: Command) -> bytes | None:
        header = decode_pull(frame)
        key = (header.topic, header.queue_id)
        return self.pull(connection, frame, key, header.queue_offset, bool(header.sys_flag & PULL_SUSPEND))

    def pull(self, connection: Connection, frame: Frame, key: Key, offset: int, suspend: bool) -> bytes | None:
        records = self.state.queues[key]
        request = decode_frame(frame)
        fields = {"suggestWhichBrokerId": 0, "minOffset": 0, "maxOffset": len(records), "nextBeginOffset": offset}
        if offset > len(records) or offset < 0:
            fields["nextBeginOffset"] = min(max(0, offset), len(records))
            return encode_response(request, ResponseCode.PULL_OFFSET_MOVED, fields)
        if offset == len(records):
            if suspend:
                self.parked.append(Parked(connection, frame, key, offset))
                return None
            return encode_response(request, ResponseCode.PULL_NOT_FOUND, fields)
        wanted = decode_pull(frame).subscription or "*"
        codes = {tags_code(tag.strip()) for tag in wanted.split("||")} if wanted != "*" else None
        chunk = records[offset : offset + decode_pull(frame).max_msg_nums]
        chosen = [
            record
            for number, record in enumerate(chunk)
            if codes is None or self.state.tags[key][offset + number] in codes
        ]
        fields["nextBeginOffset"] = offset + len(chunk)
        if not chosen:
            return encode_response(request, ResponseCode.PULL_RETRY_IMMEDIATELY, fields)
        return encode_response(request, 0, fields, b"".join(chosen), "FOUND")

    def wake(self, key: Key) -> None:
        still: list[Parked] = []
        for parked in self.parked:
            if parked.key != key or parked.connection.is_closed:
                still.append(parked)
                continue
            answer = self.pull(parked.connection, parked.frame, key, parked.offset, False)
            if answer is not None:
                parked.connection.write(answer)
                parked.connection.flush()
        self.parked = still

    def on_12(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        ext = request.ext
        found = []
        for (topic, _), records in self.state.queues.items():
            for record in records:
                message = decode_stored(record)
                if topic == ext["topic"] and ext["key"] in (message.unique_key, *message.keys.split()):
                    found.append(record)
        if not found:
            return encode_response(request, ResponseCode.QUERY_NOT_FOUND, remark="none")
        return encode_response(request, 0, {"indexLastUpdateTimestamp": 0}, b"".join(found))

    def on_33(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        record = self.state.by_physical.get(int(request.ext["offset"]))
        if record is None:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark="none")
        return encode_response(request, 0, None, record)

    def on_28(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        role = "LEADER" if self.is_leader else "FOLLOWER"
        return encode_response(request, 0, None, encode_body({"table": {"raftRole": role}}))

    def on_17(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        self.cluster.topics[request.ext["topic"]] = int(request.ext["writeQueueNums"])
        return encode_response(request, 0)

    def on_215(self, connection: Connection, frame: Frame, request: Command) -> bytes:
        self.cluster.topics.pop(request.ext["topic"], None)
        return encode_response(request, 0)


@define
class FakeCluster:
    """One name server in front of broker groups."""

    env: Env
    groups: dict[str, GroupState] = field(factory=dict)
    topics: dict[str, int] = field(factory=dict)
    template: bool = True
    namesrv: str = ""
    route_requests: int = 0
    nursery: trio.Nursery | None = None
    perm: int = 6

    def on_open(self, connection: Connection) -> None: ...

    def on_close(self, connection: Connection) -> None: ...

    def on_frames(self, connection: Connection, frames: list[Frame]) -> None:
        for frame in frames:
            request = decode_frame(frame)
            if request.code == RequestCode.GET_ROUTEINFO_BY_TOPIC:
                self.route_requests += 1
                connection.write(self.answer_route(request))
            elif request.code == RequestCode.GET_BROKER_CLUSTER_INFO:
                table = {data.broker_name: data for data in self.brokers()}
                info = ClusterInfo(broker_addr_table=table, cluster_addr_table={"c": sorted(table)})
                connection.write(encode_response(request, 0, None, encode_body(info)))
            else:
                connection.write(encode_response(request, 0))

    def brokers(self) -> list[BrokerData]:
        found = []
        for group in self.groups.values():
            addresses = {
                0 if group.leader == node.node_id else node.node_id + 1: node.address
                for node in group.nodes.values()
                if node.scope is not None
            }
            if addresses:
                found.append(BrokerData(broker_name=group.name, cluster="c", broker_addrs=addresses))
        return found

    def answer_route(self, request: Command) -> bytes:
        topic = request.ext["topic"]
        brokers = self.brokers()
        if topic == "TBW102" and self.template:
            queues, perm = 8, 7
        elif topic in self.topics:
            queues, perm = self.topics[topic], self.perm
        else:
            return encode_response(request, ResponseCode.TOPIC_NOT_EXIST, remark="No topic route info")
        if not brokers:
            return encode_response(request, ResponseCode.TOPIC_NOT_EXIST, remark="No topic route info")
        route = TopicRouteData(
            broker_datas=brokers,
            queue_datas=[
                QueueData(broker_name=broker.broker_name, read_queue_nums=queues, write_queue_nums=queues, perm=perm)
                for broker in brokers
            ],
        )
        return encode_response(request, 0, None, encode_topic_route(route, standard_json=True))

    async def start_node(self, group: str, node_id: int) -> Node:
        state = self.groups.setdefault(group, GroupState(group, self.env))
        node = Node(state, node_id, self)
        listener = await self.env.net.listen("127.0.0.1", 0)
        node.address = f"127.0.0.1:{listener.address[1]}"
        node.scope = trio.CancelScope()
        state.nodes[node_id] = node

        async def run(task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            assert node.scope is not None
            with node.scope:
                await serve(self.env, listener, node, log=get_logger("fake"), task_status=task_status)

        assert self.nursery is not None
        await self.nursery.start(run)
        return node

    async def kill(self, node: Node) -> None:
        """As SIGKILL: all connections break at once, and the name server notices."""
        scope, node.scope = node.scope, None
        assert scope is not None
        if node.is_leader:
            node.state.leader = None
        scope.cancel()
        await wait_until(lambda: not node.connections, what="the node's connections to break")


@asynccontextmanager
async def fake_cluster(env: Env, groups: int = 1, nodes: int = 3) -> AsyncIterator[FakeCluster]:
    cluster = FakeCluster(env)
    listener = await env.net.listen("127.0.0.1", 0)
    cluster.namesrv = f"127.0.0.1:{listener.address[1]}"
    async with trio.open_nursery() as nursery:
        cluster.nursery = nursery

        async def run(task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            await serve(env, listener, cluster, log=get_logger("fake"), task_status=task_status)

        await nursery.start(run)
        for number in range(groups):
            for node_id in range(nodes):
                await cluster.start_node(f"broker-{'abc'[number]}", node_id)
        try:
            yield cluster
        finally:
            nursery.cancel_scope.cancel()
