"""Requests to broker groups under way, and when to look elsewhere before their time: another node leads by now.

A killed leader closes its connections, but a frozen or cut-off one says nothing at all. While an answer is late, the
name servers are asked again and again; as soon as they name another leader than when the request was sent, whoever
waits is told, so that he can try there.

What was sent stays waited for while other nodes are tried (`Tries`): an answer that comes late is an answer, and only
what nobody ever answered is of unknown outcome.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import trio

from quorate.errors import NoRoute, RequestRefused
from quorate.route_cache import RouteCache
from remoting.command import Command
from remoting.connection import Asked
from remoting.errors import ConnectionLost, RequestTimeout
from remoting.pool import Client as RemotingClient
from runtime.model import Clock

LATE_AFTER_S = 0.25
"""An answer that takes longer than that makes one wonder: far above a commit, far below an election timeout."""
ASK_EVERY_S = 0.1
PATIENT_ASK_EVERY_S = 3.0
"""The same for requests that may wait for long, as pulls do: all a consumer costs the name servers while it is idle."""


class LedElsewhere(RequestTimeout):
    """No answer yet, and another node leads by now than when the request was sent."""


class _Try:
    """What one node was asked. `leader` is the group's leader as known then."""

    __slots__ = ("address", "asked", "broker_name", "is_left", "leader")

    def __init__(self, broker_name: str, address: str, leader: str | None, asked: Asked) -> None:
        self.broker_name = broker_name
        self.address = address
        self.leader = leader
        self.asked = asked
        self.is_left = False


class Tries:
    """One request, asked of several nodes until one answers. Made by `Attempts.begin`, used as a context."""

    __slots__ = ("_attempts", "_event", "_left", "_open", "_tried", "is_patient", "maybe_done", "since", "topic")

    def __init__(self, attempts: Attempts, topic: str, is_patient: bool) -> None:
        self._attempts = attempts
        self._event = trio.Event()
        self._open: list[_Try] = []
        self._left: str | None = None
        """Address of a silent node that leads no more, until its sender knows."""
        self._tried: list[str] = []
        self.topic = topic
        self.is_patient = is_patient
        self.maybe_done = False
        """A connection ended before its answer came."""
        self.since = 0.0
        """When a node was last asked."""

    def __enter__(self) -> Tries:
        self._attempts.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._attempts.leave(self)
        for each in self._open:
            each.asked.drop()

    @property
    def is_open(self) -> bool:
        """Whether a node was asked and may still answer."""
        return bool(self._open)

    @property
    def has_answer(self) -> bool:
        """Whether `take` has an answer to give."""
        return any(each.asked.answer is not None for each in self._open)

    def next_of(self, members: Iterable[str]) -> str | None:
        """The first that was not asked in this round, and need not answer yet."""
        return next((each for each in members if each not in self._tried and not self._is_asked(each)), None)

    def start_over(self) -> None:
        """All were asked in vain: begin with the first again."""
        self._tried.clear()

    def _is_asked(self, address: str) -> bool:
        return any(each.address == address for each in self._open)

    async def ask(self, broker_name: str, address: str, request: Command, timeout: float) -> tuple[str, Command]:
        """Send the request to one more node, and wait for `take`'s answer, `timeout` seconds in all.

        Raises ConnectFailed or ConnectionLost where nothing was sent, and what `take` raises, and RequestTimeout.
        Checkpoint; cancel-safe.
        """
        clock = self._attempts.clock
        deadline = clock.monotonic() + timeout
        self._tried.append(address)
        leader = self._attempts.leader_of(self.topic, broker_name)
        asked = await self._attempts.remoting.ask(address, request, timeout, self._event)
        self._open.append(_Try(broker_name, address, leader, asked))
        self.since = clock.monotonic()
        while True:
            await self.pause_until(deadline)
            found = self.take()
            if found is not None:
                return found
            if clock.monotonic() >= deadline:
                raise RequestTimeout(f"no answer from {address} within {timeout:g} s")

    def take(self) -> tuple[str, Command] | None:
        """(address, answer) of a node that has answered, each once. Never waits.

        Raises ConnectionLost once for each connection that ended instead, LedElsewhere once when silent nodes were
        left behind.
        """
        if self._event.is_set():
            self._event = trio.Event()
            for each in self._open:
                each.asked.event = self._event
        for each in self._open:
            if each.asked.answer is not None:
                self._open.remove(each)
                each.asked.drop()
                return each.address, each.asked.answer
        for each in self._open:
            if each.asked.lost is not None:
                self._open.remove(each)
                self.maybe_done = True
                raise ConnectionLost(each.asked.lost)
        left, self._left = self._left, None
        if left is not None:
            raise LedElsewhere(f"no answer from {left}, and another node leads by now")
        return None

    async def pause_until(self, deadline: float) -> None:
        """Until there is something to take, or it is time (monotonic seconds). Checkpoint; cancel-safe."""
        with self._attempts.clock.move_on_at(deadline):
            await self._event.wait()

    def route_changed(self) -> None:
        """Wake whoever waits for a node that does not lead any more."""
        for each in self._open:
            leader = self._attempts.leader_of(self.topic, each.broker_name)
            if each.is_left or leader is None or leader in (each.leader, each.address):
                continue
            if self.is_patient and each.address != each.leader:
                continue  # a follower was meant
            each.is_left = True
            self._left = each.address
            self._event.set()


class Attempts:
    """The requests of one client that wait for a broker group's answer."""

    def __init__(self, remoting: RemotingClient, routes: RouteCache, clock: Clock) -> None:
        self.remoting = remoting
        self.clock = clock
        self._routes = routes
        self._under_way: dict[Tries, None] = {}
        self._some = trio.Event()
        routes.on_change.append(self._route_changed)

    def begin(self, topic: str, *, is_patient: bool = False) -> Tries:
        """For a request that has to do with `topic`. A patient one is not late before it fails: it waits for news."""
        return Tries(self, topic, is_patient)

    def enter(self, tries: Tries) -> None:
        """From now on routes are asked while its answers are late."""
        self._under_way[tries] = None
        if not self._some.is_set():
            self._some.set()

    def leave(self, tries: Tries) -> None:
        """Nobody waits for it any more."""
        del self._under_way[tries]

    def leader_of(self, topic: str, broker_name: str) -> str | None:
        """Address of the group's leader, as far as known."""
        route = self._routes.known(topic)
        return None if route is None else route.leader(broker_name)

    async def invoke(
        self, topic: str, broker_name: str, address: str, request: Command, timeout: float, *, is_patient: bool = False
    ) -> Command:
        """As `remoting.pool.Client.invoke`; LedElsewhere when another leader than before is known.

        Checkpoint; cancel-safe, but a cancelled request may still be executed.
        """
        with self.begin(topic, is_patient=is_patient) as tries:
            _, answer = await tries.ask(broker_name, address, request, timeout)
            return answer

    def _route_changed(self, topic: str) -> None:
        for tries in self._under_way:
            if tries.topic == topic:
                tries.route_changed()

    async def watch(self) -> None:
        """Ask for routes while answers are late, until cancelled. Checkpoint."""
        clock = self.clock
        patient_asked_at = 0.0
        while True:
            if not self._under_way:
                self._some = trio.Event()
                await self._some.wait()
            await clock.sleep(ASK_EVERY_S)
            now = clock.monotonic()
            waiting = [each for each in self._under_way if each.is_open]
            late = [each.topic for each in waiting if not each.is_patient and each.since <= now - LATE_AFTER_S]
            if now >= patient_asked_at + PATIENT_ASK_EVERY_S:
                patient_asked_at = now
                late += [each.topic for each in waiting if each.is_patient and each.since <= now - PATIENT_ASK_EVERY_S]
            for topic in dict.fromkeys(late):
                try:
                    await self._routes.refresh(topic)
                except (NoRoute, RequestRefused):
                    pass  # whoever waits for the answer will see for himself
