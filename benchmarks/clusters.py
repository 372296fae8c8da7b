"""One face for every cluster under test: ours, Apache's DLedger group, Apache's plain master."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from attrs import frozen

from benchmarks import processes, wire

REGISTERED_LIMIT_S = 150.0
"""Apache's brokers may need one 30 s registration round after another before a route is whole."""


@frozen
class Node:
    """One server process."""

    name: str
    kind: str
    pid: int
    address: str


class Cluster(ABC):
    """A started set of name server and brokers of one broker name. Leaving the context stops it, data and all."""

    title: str
    broker_name: str
    replicas: int
    log_copies: int
    """Brokers that write each message."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    @abstractmethod
    def namesrv(self) -> str:
        """Address of the name server."""

    @property
    @abstractmethod
    def nodes(self) -> list[Node]:
        """Processes as they are now, restarted ones with their new pids."""

    @abstractmethod
    def start(self) -> None:
        """Start every process; returns without waiting until they serve."""

    @abstractmethod
    def stop(self) -> None:
        """End every process and remove the data. May be called twice."""

    @abstractmethod
    def restart(self, name: str) -> None:
        """Make sure that a broker that was killed runs again; does not wait until it serves."""

    @property
    def brokers(self) -> list[Node]:
        return [node for node in self.nodes if node.kind == "broker"]

    @property
    def broker_pids(self) -> list[int]:
        return [node.pid for node in self.brokers]

    def probe(self, topic: str) -> wire.Probe:
        return wire.Probe(self.namesrv, topic, self.broker_name)

    def leader(self) -> Node | None:
        """The broker that the route calls id 0, ``None`` while there is none."""
        route = wire.query_route(self.namesrv, wire.TEMPLATE_TOPIC)
        address = route.leader(self.broker_name) if route is not None else None
        return next((node for node in self.brokers if node.address == address), None)

    def await_whole(self) -> Node:
        """Wait until every broker is registered, one of them as id 0, and give that one.

        :raises TimeoutError: not within ``REGISTERED_LIMIT_S``
        """

        def whole() -> Node | None:
            route = wire.query_route(self.namesrv, wire.TEMPLATE_TOPIC)
            if route is None or len(route.brokers.get(self.broker_name, {})) < self.replicas:
                return None
            return self.leader()

        return wire.wait_until(whole, REGISTERED_LIMIT_S, f"all brokers of {self.title} in the route", pause=0.1)

    def make_topic(self, topic: str, queues: int) -> str:
        """Create a topic on the leader and wait for its route.

        :returns: the leader's address
        :raises TimeoutError: the topic did not show
        """
        leader = self.await_whole()

        def created() -> bool | None:
            try:
                wire.create_topic(leader.address, topic, queues)
            except wire.Refused:
                return None
            return True

        wire.wait_until(created, 30.0, f"{self.title} takes topic {topic}", pause=0.2)
        wire.wait_until(lambda: wire.query_route(self.namesrv, topic), 60.0, f"route of {topic}")
        return leader.address

    def kill_leader(self) -> Node:
        """SIGKILL the leader.

        :returns: the process that was killed
        """
        leader = self.await_whole()
        processes.signal_all([leader.pid], signal.SIGKILL)
        return leader
