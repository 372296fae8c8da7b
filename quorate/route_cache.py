"""Where the queues of a topic are: asked from the name servers, kept, and refreshed as soon as something fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio
from attrs import field, frozen

from quorate.errors import NoRoute, NoTopic, QuorateError, RequestRefused
from remoting.bodies import TopicRouteData, decode_topic_route
from remoting.codes import (
    MASTER_ID,
    PERM_INHERIT,
    PERM_READ,
    PERM_WRITE,
    SYSTEM_TOPIC_TEMPLATE,
    RequestCode,
    ResponseCode,
)
from remoting.command import Command
from remoting.errors import BodyError, ConnectFailed, ConnectionLost, RequestTimeout
from remoting.message import MessageQueue
from remoting.pool import Client as RemotingClient
from runtime.model import Clock

POLL_S = 30.0
MISSING_POLL_S = 3.0
PROVISIONAL_S = 0.2
COALESCE_S = 0.02
"""A refresh asked for this soon after the last one is answered by that one."""
TEMPLATE_QUEUES = 4


@frozen
class TopicRoute:
    """Queues of a topic and the addresses behind them, at one moment."""

    topic: str
    writable: tuple[MessageQueue, ...]
    readable: tuple[MessageQueue, ...]
    members: Mapping[str, Mapping[int, str]] = field(hash=False)
    """Per broker group: broker id to address; id 0 is the leader."""
    fetched_at: float = field(eq=False)
    provisional: bool = False
    """Taken from the template topic: the topic itself is created by the first send."""

    def leader(self, broker_name: str) -> str | None:
        """Address of the group's leader, if the name server knew one."""
        return self.members.get(broker_name, {}).get(MASTER_ID)

    def addresses(self, broker_name: str) -> list[str]:
        """All members of a group, the leader first."""
        members = self.members.get(broker_name, {})
        return [members[broker_id] for broker_id in sorted(members)]

    def all_addresses(self) -> list[str]:
        """Every address of the topic, each once."""
        return list(dict.fromkeys(address for name in sorted(self.members) for address in self.addresses(name)))


def route_of(topic: str, data: TopicRouteData, fetched_at: float, *, provisional: bool = False) -> TopicRoute:
    """The queues meant by a name server's answer. A template hands down at most 4 queues per group, if it may."""
    members = {broker.broker_name: dict(broker.broker_addrs) for broker in data.broker_datas}
    writable: list[MessageQueue] = []
    readable: list[MessageQueue] = []
    for queues in data.queue_datas:
        name = queues.broker_name
        if not members.get(name):
            continue
        if provisional:
            if not queues.perm & PERM_INHERIT:
                continue
            count = min(TEMPLATE_QUEUES, queues.write_queue_nums, queues.read_queue_nums)
            writable += [MessageQueue(topic, name, number) for number in range(count)]
            continue
        if queues.perm & PERM_WRITE:
            writable += [MessageQueue(topic, name, number) for number in range(queues.write_queue_nums)]
        if queues.perm & PERM_READ:
            readable += [MessageQueue(topic, name, number) for number in range(queues.read_queue_nums)]
    return TopicRoute(topic, tuple(sorted(writable)), tuple(sorted(readable)), members, fetched_at, provisional)


class _Flight:
    """A question under way, and how it ended for those who wait for it."""

    __slots__ = ("error", "landed", "route")

    def __init__(self) -> None:
        self.landed = trio.Event()
        self.route: TopicRoute | None = None
        self.error: QuorateError | None = None


class RouteCache:
    """Routes by topic. One question per topic is under way at a time; the others wait for its answer."""

    def __init__(self, remoting: RemotingClient, namesrv: Sequence[str], clock: Clock, log: Any) -> None:
        self._remoting = remoting
        self._namesrv = list(namesrv)
        self._current = 0
        self._clock = clock
        self._log = log
        self._routes: dict[str, TopicRoute] = {}
        self._flights: dict[str, _Flight] = {}
        self._wanted: dict[str, float] = {}
        """Topics somebody uses, with the moment of the last question for them."""
        self.on_change: list[Callable[[str], None]] = []
        """Called with the topic whenever its route differs from the one before."""

    def known(self, topic: str) -> TopicRoute | None:
        """The route at hand, of any age. Never waits."""
        return self._routes.get(topic)

    def topics(self) -> list[str]:
        return sorted(self._wanted)

    def forget(self, topic: str) -> None:
        """Stop polling for a topic nobody uses any more."""
        self._wanted.pop(topic, None)
        self._routes.pop(topic, None)

    def broker_addresses(self) -> list[str]:
        """Every broker behind any known route, each once."""
        return list(
            dict.fromkeys(address for topic in sorted(self._routes) for address in self._routes[topic].all_addresses())
        )

    def leader_addresses(self) -> list[str]:
        found: dict[str, None] = {}
        for topic in sorted(self._routes):
            for members in self._routes[topic].members.values():
                if MASTER_ID in members:
                    found[members[MASTER_ID]] = None
        return list(found)

    def members_of(self, broker_name: str) -> list[str]:
        """Addresses of a group from whichever route is newest, the leader first."""
        newest: TopicRoute | None = None
        for route in self._routes.values():
            if broker_name in route.members and (newest is None or route.fetched_at > newest.fetched_at):
                newest = route
        return newest.addresses(broker_name) if newest is not None else []

    def at_hand(self, topic: str) -> TopicRoute | None:
        """The route, unless it is a provisional one due for another look. Never waits."""
        route = self._routes.get(topic)
        if route is not None and route.provisional and self._clock.monotonic() - route.fetched_at > PROVISIONAL_S:
            return None
        return route

    async def get(self, topic: str, *, for_publish: bool = False) -> TopicRoute:
        """The route, asked for where none is at hand. Raises NoRoute. Checkpoint if it asks; cancel-safe."""
        route = self.at_hand(topic)
        if route is not None:
            return route
        return await self.refresh(topic, for_publish=for_publish)

    async def refresh(self, topic: str, *, for_publish: bool = False) -> TopicRoute:
        """Ask a name server now, unless that happened a moment ago. Raises NoRoute. Checkpoint; cancel-safe."""
        await trio.lowlevel.checkpoint()
        while (flight := self._flights.get(topic)) is not None:
            await flight.landed.wait()
            if flight.route is not None:
                return flight.route
            if flight.error is not None:
                kind = NoTopic if isinstance(flight.error, NoTopic) else NoRoute
                raise kind(str(flight.error)) from flight.error
            # Whoever asked was cancelled; this task asks then, or waits for another that was faster.
        asked_at = self._wanted.get(topic)
        route = self._routes.get(topic)
        if route is not None and asked_at is not None and self._clock.monotonic() - asked_at < COALESCE_S:
            return route
        flight = self._flights[topic] = _Flight()
        try:
            route = flight.route = await self._ask(topic, for_publish)
        except (NoRoute, RequestRefused) as error:
            flight.error = error
            raise
        finally:
            del self._flights[topic]
            flight.landed.set()
        self._wanted[topic] = self._clock.monotonic()
        previous = self._routes.get(topic)
        self._routes[topic] = route
        if previous != route:
            self._log.debug("route changed", topic=topic, groups=sorted(route.members))
            for callback in self.on_change:
                callback(topic)
        return route

    async def _ask(self, topic: str, for_publish: bool) -> TopicRoute:
        self._wanted.setdefault(topic, self._clock.monotonic())
        data = await self.ask_name_server(topic)
        if data is not None:
            return route_of(topic, data, self._clock.monotonic())
        if for_publish:
            template = await self.ask_name_server(SYSTEM_TOPIC_TEMPLATE)
            if template is not None:
                route = route_of(topic, template, self._clock.monotonic(), provisional=True)
                if route.writable:
                    return route
        self._routes.pop(topic, None)
        raise NoTopic(f"no name server knows topic {topic}")

    async def ask_name_server(self, topic: str) -> TopicRouteData | None:
        """What a name server says about a topic, None where it has no such topic. Raises NoRoute. Checkpoint."""
        answer = await self.call_name_server(
            RequestCode.GET_ROUTEINFO_BY_TOPIC,
            {"topic": topic, "acceptStandardJsonOnly": True},
            accept=(ResponseCode.SUCCESS, ResponseCode.TOPIC_NOT_EXIST),
        )
        if answer.code == ResponseCode.TOPIC_NOT_EXIST:
            return None
        try:
            return decode_topic_route(answer.body)
        except BodyError as error:
            raise NoRoute(f"route of topic {topic} cannot be read: {error}") from error

    async def call_name_server(
        self,
        code: int,
        ext: Mapping[str, object] | None = None,
        body: bytes = b"",
        *,
        accept: tuple[int, ...] = (ResponseCode.SUCCESS,),
        timeout: float = 1.5,
    ) -> Command:
        """Ask the current name server, then the others in turn, `timeout` seconds each.

        Raises NoRoute where none answers, RequestRefused on another code. Checkpoint; cancel-safe.
        """
        problems: list[str] = []
        for _ in range(len(self._namesrv)):
            address = self._namesrv[self._current % len(self._namesrv)]
            try:
                answer = await self._remoting.invoke(address, self._remoting.request(code, ext, body), timeout)
            except (ConnectFailed, ConnectionLost, RequestTimeout) as error:
                problems.append(str(error))
                self._current += 1
                continue
            if answer.code not in accept:
                raise RequestRefused(answer.code, answer.remark or "", address)
            return answer
        raise NoRoute(f"no name server answers: {'; '.join(problems)}")

    async def call_every_name_server(
        self, code: int, ext: Mapping[str, object], *, accept: tuple[int, ...] = (ResponseCode.SUCCESS,)
    ) -> None:
        """For what each name server must hear. Raises NoRoute where one cannot be asked. Checkpoint."""
        for _ in range(len(self._namesrv)):
            await self.call_name_server(code, ext, accept=accept)
            self._current += 1

    async def poll(self) -> None:
        """Refresh every used topic every 30 s, missing ones every 3 s, until cancelled."""
        while True:
            await self._clock.sleep(1.0)
            now = self._clock.monotonic()
            for topic, asked_at in list(self._wanted.items()):
                interval = POLL_S if topic in self._routes else MISSING_POLL_S
                if now - asked_at >= interval:
                    self._wanted[topic] = now
                    try:
                        await self.refresh(topic)
                    except (NoRoute, RequestRefused) as error:
                        self._log.debug("route poll failed", topic=topic, reason=str(error))
