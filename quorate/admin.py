"""Administration: topics, groups, lookups, and what the nodes say about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quorate.client import inflate
from quorate.errors import NoRoute, RequestRefused, Unavailable
from quorate.raft_admin import RaftAdmin
from quorate.route_cache import TopicRoute
from remoting.bodies import (
    ClusterInfo,
    ConsumerConnection,
    ConsumeStats,
    GroupList,
    KVTable,
    SubscriptionGroupConfig,
    TopicConfig,
    TopicList,
    TopicStatsTable,
    decode_body,
    decode_consume_stats,
    decode_topic_stats,
    encode_body,
)
from remoting.codes import MASTER_ID, PERM_READ, PERM_READ_WRITE, SYSTEM_TOPIC_TEMPLATE, RequestCode, ResponseCode
from remoting.command import Command
from remoting.errors import ConnectFailed, ConnectionLost, RequestTimeout
from remoting.message import MessageExt, parse_offset_msg_id, unique_key_time_ms
from remoting.message_codec import decode_stored, decode_stored_many

if TYPE_CHECKING:
    from quorate.client import Client

DAY_MS = 86_400_000
REGISTERED_WITHIN_S = 3.0
FOREVER_MS = 2**62


class Admin:
    """Made by `Client.admin`. All calls raise NoRoute, Unavailable or RequestRefused; all are checkpoints, cancel-safe.

    A cancelled or failed change may have been executed on some of the brokers; all changes may be repeated.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def raft(self) -> RaftAdmin:
        """Raft groups: members, leadership, backups."""
        return RaftAdmin(self)

    # ------------------------------------------------------------------------------------------------------- cluster

    async def cluster(self) -> ClusterInfo:
        """Broker groups, their members' addresses, and clusters, as a name server sees them."""
        answer = await self._client.routes.call_name_server(RequestCode.GET_BROKER_CLUSTER_INFO)
        return decode_body(answer.body, ClusterInfo)

    async def route(self, topic: str) -> TopicRoute:
        """Queues and addresses of a topic, asked for now."""
        return await self._client.routes.refresh(topic)

    async def topics(self) -> list[str]:
        """All topic names, sorted."""
        answer = await self._client.routes.call_name_server(RequestCode.GET_ALL_TOPIC_LIST_FROM_NAMESERVER)
        return sorted(decode_body(answer.body, TopicList).topic_list)

    async def call(
        self,
        address: str,
        code: int,
        ext: Mapping[str, object] | None = None,
        body: bytes = b"",
        *,
        accept: tuple[int, ...] = (ResponseCode.SUCCESS,),
        timeout: float = 3.0,
    ) -> Command:
        """One request to one node, no retry."""
        try:
            answer = await self._client.remoting.invoke(
                address, self._client.remoting.request(code, ext, body), timeout
            )
        except ConnectFailed as error:
            raise Unavailable(str(error), maybe_done=False) from error
        except (ConnectionLost, RequestTimeout) as error:
            raise Unavailable(str(error), maybe_done=True) from error
        if answer.code not in accept:
            raise RequestRefused(answer.code, answer.remark or "", address)
        return answer

    async def broker_info(self, address: str, *, timeout: float = 3.0) -> dict[str, str]:
        """What one broker says of itself (GET_BROKER_RUNTIME_INFO), raft state included."""
        answer = await self.call(address, RequestCode.GET_BROKER_RUNTIME_INFO, timeout=timeout)
        return decode_body(answer.body, KVTable).table

    async def _leaders(self, cluster: str | None = None) -> dict[str, str]:
        """Leader addresses by broker group; a group without one is asked through another member."""
        info = await self.cluster()
        names = info.cluster_addr_table.get(cluster, []) if cluster is not None else sorted(info.broker_addr_table)
        leaders: dict[str, str] = {}
        for name in names:
            addresses = info.broker_addr_table[name].broker_addrs if name in info.broker_addr_table else {}
            if addresses:
                leaders[name] = addresses.get(MASTER_ID) or addresses[min(addresses)]
        if not leaders:
            raise NoRoute("no broker is registered")
        return leaders

    async def _on_each_group(
        self, code: int, ext: Mapping[str, object] | None, body: bytes = b"", *, cluster: str | None = None
    ) -> None:
        """Execute a change on every broker group, each given some time to find a leader."""
        for name in await self._leaders(cluster):
            await self._call_group(name, code, ext, body)

    async def _call_group(
        self,
        name: str,
        code: int,
        ext: Mapping[str, object] | None = None,
        body: bytes = b"",
        *,
        accept: tuple[int, ...] = (ResponseCode.SUCCESS,),
        timeout: float = 5.0,
    ) -> Command:
        clock = self._client.env.clock
        deadline = clock.monotonic() + timeout
        while True:
            try:
                leaders = await self._leaders()
                if name not in leaders:
                    raise NoRoute(f"broker group {name} is not registered")
                return await self.call(leaders[name], code, ext, body, accept=accept)
            except (Unavailable, NoRoute):
                if clock.monotonic() >= deadline:
                    raise
            except RequestRefused as error:
                if error.code != ResponseCode.SERVICE_NOT_AVAILABLE or clock.monotonic() >= deadline:
                    raise
            await clock.sleep(self._client.retry_pause())

    # -------------------------------------------------------------------------------------------------------- topics

    async def create_topic(
        self,
        topic: str,
        *,
        queues: int = 4,
        perm: int = PERM_READ_WRITE,
        order: bool = False,
        cluster: str | None = None,
    ) -> None:
        """Create a topic, or change it, on every broker group (of one cluster, if given).

        Returns when a name server knows it, or after 3 s: brokers register a change after they have answered.
        """
        fields = {
            "topic": topic,
            "defaultTopic": SYSTEM_TOPIC_TEMPLATE,
            "readQueueNums": queues,
            "writeQueueNums": queues,
            "perm": perm,
            "topicFilterType": "SINGLE_TAG",
            "topicSysFlag": 0,
            "order": order,
        }
        await self._on_each_group(RequestCode.UPDATE_AND_CREATE_TOPIC, fields, cluster=cluster)
        names = list(await self._leaders(cluster))
        clock = self._client.env.clock
        deadline = clock.monotonic() + REGISTERED_WITHIN_S
        while clock.monotonic() < deadline:
            try:
                route = await self.route(topic)
                known = route.readable if perm & PERM_READ else route.writable
                if all(sum(queue.broker_name == name for queue in known) == queues for name in names):
                    return
            except NoRoute as error:
                self._client.log.debug("not registered yet", topic=topic, reason=str(error))
            await clock.sleep(self._client.retry_pause())

    async def delete_topic(self, topic: str) -> None:
        """Delete a topic from all brokers, then from all name servers. Its messages are gone."""
        await self._on_each_group(RequestCode.DELETE_TOPIC_IN_BROKER, {"topic": topic})
        await self._client.routes.call_every_name_server(RequestCode.DELETE_TOPIC_IN_NAMESRV, {"topic": topic})
        self._client.routes.forget(topic)

    async def topic_config(self, topic: str) -> TopicConfig:
        """A topic's settings on the first broker group that has it."""
        route = await self.route(topic)
        name = min(route.members)
        answer = await self._client.call_group(name, topic, RequestCode.GET_TOPIC_CONFIG, {"topic": topic, "lo": False})
        return decode_body(answer.body, TopicConfig)

    async def topic_stats(self, topic: str) -> TopicStatsTable:
        """Minimum and maximum offset of each queue."""
        route = await self.route(topic)
        merged = TopicStatsTable(offset_table={})
        for name in sorted(route.members):
            answer = await self._client.call_group(name, topic, RequestCode.GET_TOPIC_STATS_INFO, {"topic": topic})
            merged.offset_table |= decode_topic_stats(answer.body).offset_table
        return merged

    # -------------------------------------------------------------------------------------------------------- lookup

    async def view(self, message_id: str, *, topic: str | None = None) -> MessageExt | None:
        """A message by the broker's id, or by the client's id when `topic` is given; None where there is none.

        Raises ValueError for text that can be neither.
        """
        try:
            host, port, offset = parse_offset_msg_id(message_id)
        except ValueError:
            if topic is None:
                raise
        else:
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            try:
                answer = await self.call(address, RequestCode.VIEW_MESSAGE_BY_ID, {"offset": offset, "topic": topic})
                return inflate(decode_stored(answer.body))
            except RequestRefused:
                if topic is None:
                    return None
            except Unavailable:
                if topic is None:
                    raise
                found = await self._view_elsewhere(topic, address, offset)
                if found is not None:
                    return found
        assert topic is not None
        matches = await self.query_by_key(topic, message_id, unique=True)
        return matches[0] if matches else None

    async def _view_elsewhere(self, topic: str, stored_by: str, offset: int) -> MessageExt | None:
        """The node in a message id is gone: physical offsets are the same on all members of its group."""
        route = await self.route(topic)
        for name in sorted(route.members):
            answer = await self._client.call_group(
                name,
                topic,
                RequestCode.VIEW_MESSAGE_BY_ID,
                {"offset": offset, "topic": topic},
                accept=(ResponseCode.SUCCESS, ResponseCode.SYSTEM_ERROR),
            )
            if answer.code == ResponseCode.SUCCESS:
                message = decode_stored(answer.body)
                # Another group may have a message at this offset as well.
                if message.topic == topic and message.store_host == stored_by:
                    message.broker_name = name
                    return inflate(message)
        return None

    async def query_by_key(
        self,
        topic: str,
        key: str,
        *,
        max_messages: int = 64,
        begin_ms: int = 0,
        end_ms: int = FOREVER_MS,
        unique: bool = False,
    ) -> list[MessageExt]:
        """Messages of a topic with that key (with `unique`: that client message id), oldest first.

        The brokers find them by hash, so the keys are compared here again. Raises BodyError for an unreadable answer.
        """
        route = await self.route(topic)
        if unique and not begin_ms:
            made = unique_key_time_ms(key, self._client.env.clock.wall_ms())
            begin_ms = made - DAY_MS if made is not None else 0
        found: dict[tuple[str, int], MessageExt] = {}
        for name in sorted(route.members):
            answer = await self._client.call_group(
                name,
                topic,
                RequestCode.QUERY_MESSAGE,
                {
                    "topic": topic,
                    "key": key,
                    "maxNum": max_messages,
                    "beginTimestamp": max(0, begin_ms),
                    "endTimestamp": end_ms,
                    "_UNIQUE_KEY_QUERY": unique,
                },
                accept=(ResponseCode.SUCCESS, ResponseCode.QUERY_NOT_FOUND),
                timeout=6.0,
            )
            if answer.code != ResponseCode.SUCCESS:
                continue
            for message in decode_stored_many(answer.body):
                wanted = message.unique_key == key if unique else key in message.keys.split()
                if wanted and message.topic == topic:
                    message.broker_name = name
                    found[name, message.physical_offset] = inflate(message)
        return sorted(found.values(), key=lambda message: (message.store_timestamp, message.physical_offset))

    # ----------------------------------------------------------------------------------------------- consumer groups

    async def create_group(self, config: SubscriptionGroupConfig, *, cluster: str | None = None) -> None:
        """Create a consumer group, or change it, on every broker group."""
        body = encode_body(config)
        await self._on_each_group(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, None, body, cluster=cluster)

    async def delete_group(self, group: str, *, clean_offsets: bool = True) -> None:
        """Delete a consumer group everywhere."""
        fields = {"groupName": group, "cleanOffset": clean_offsets, "removeOffset": clean_offsets}
        await self._on_each_group(RequestCode.DELETE_SUBSCRIPTIONGROUP, fields)

    async def groups_of_topic(self, topic: str) -> list[str]:
        """Consumer groups that have offsets for a topic or are connected to it."""
        names: set[str] = set()
        for name in await self._leaders():
            answer = await self._call_group(name, RequestCode.QUERY_TOPIC_CONSUME_BY_WHO, {"topic": topic})
            names |= set(decode_body(answer.body, GroupList).group_list)
        return sorted(names)

    async def consume_stats(self, group: str, topic: str | None = None) -> ConsumeStats:
        """How far a group has come in each queue, all broker groups together."""
        merged = ConsumeStats(offset_table={})
        for name in await self._leaders():
            answer = await self._call_group(
                name, RequestCode.GET_CONSUME_STATS, {"consumerGroup": group, "topic": topic}
            )
            stats = decode_consume_stats(answer.body)
            merged.offset_table |= stats.offset_table
            merged.consume_tps += stats.consume_tps
        return merged

    async def consumer_connections(self, group: str) -> ConsumerConnection | None:
        """Members of a consumer group with their subscriptions; None where nobody is connected."""
        for name in await self._leaders():
            answer = await self._call_group(
                name,
                RequestCode.GET_CONSUMER_CONNECTION_LIST,
                {"consumerGroup": group},
                accept=(ResponseCode.SUCCESS, ResponseCode.CONSUMER_NOT_ONLINE),
            )
            if answer.code == ResponseCode.SUCCESS:
                return decode_body(answer.body, ConsumerConnection)
        return None

    async def broker_config(self, address: str) -> bytes:
        """The broker's settings as properties text."""
        return bytes((await self.call(address, RequestCode.GET_BROKER_CONFIG)).body)


__all__ = ["Admin"]
