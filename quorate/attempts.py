"""Requests to broker groups under way, and the one reason to give one up before its time: another node leads by now.

A killed leader closes its connections, but a frozen or cut-off one says nothing at all. While an answer is late, the
name servers are asked again and again; as soon as they name another leader than when the request was sent, it is ended
as timed out, so that its sender can try there.
"""

from __future__ import annotations

import trio

from quorate.errors import NoRoute, RequestRefused
from quorate.route_cache import RouteCache
from remoting.command import Command
from remoting.errors import RequestTimeout
from remoting.pool import Client as RemotingClient
from runtime.model import Clock

LATE_AFTER_S = 0.25
"""An answer that takes longer than that makes one wonder: far above a commit, far below an election timeout."""
ASK_EVERY_S = 0.1


class _Attempt:
    """One request under way. `leader` is the group's leader as known when it was sent."""

    __slots__ = ("address", "broker_name", "leader", "scope", "since", "topic")

    def __init__(self, topic: str, broker_name: str, address: str, leader: str | None, since: float) -> None:
        self.topic = topic
        self.broker_name = broker_name
        self.address = address
        self.leader = leader
        self.since = since
        self.scope = trio.CancelScope()


class Attempts:
    """The requests of one client that wait for a broker group's answer."""

    def __init__(self, remoting: RemotingClient, routes: RouteCache, clock: Clock) -> None:
        self._remoting = remoting
        self._routes = routes
        self._clock = clock
        self._under_way: dict[_Attempt, None] = {}
        self._some = trio.Event()
        routes.on_change.append(self._route_changed)

    async def invoke(self, topic: str, broker_name: str, address: str, request: Command, timeout: float) -> Command:
        """As `remoting.pool.Client.invoke`; RequestTimeout also when another leader than before is known.

        Checkpoint; cancel-safe, but a cancelled request may still be executed.
        """
        leader = route.leader(broker_name) if (route := self._routes.known(topic)) is not None else None
        attempt = _Attempt(topic, broker_name, address, leader, self._clock.monotonic())
        self._under_way[attempt] = None
        if not self._some.is_set():
            self._some.set()
        try:
            with attempt.scope:
                return await self._remoting.invoke(address, request, timeout)
        finally:
            del self._under_way[attempt]
        raise RequestTimeout(f"no answer from {address}, and another node leads by now")

    def _route_changed(self, topic: str) -> None:
        route = self._routes.known(topic)
        for attempt in self._under_way:
            if attempt.topic == topic and route is not None:
                leader = route.leader(attempt.broker_name)
                if leader is not None and leader != attempt.leader and leader != attempt.address:
                    attempt.scope.cancel()

    async def watch(self) -> None:
        """Ask for routes while answers are late, until cancelled. Checkpoint."""
        clock = self._clock
        while True:
            if not self._under_way:
                self._some = trio.Event()
                await self._some.wait()
            await clock.sleep(ASK_EVERY_S)
            late_before = clock.monotonic() - LATE_AFTER_S
            for topic in dict.fromkeys(each.topic for each in self._under_way if each.since <= late_before):
                try:
                    await self._routes.refresh(topic)
                except (NoRoute, RequestRefused):
                    pass  # whoever waits for the answer will see for himself
