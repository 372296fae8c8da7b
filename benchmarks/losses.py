"""Kill the leader under load, several times, and look for every acknowledged message afterwards."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter

from attrs import define, field, frozen

from benchmarks import processes, wire
from benchmarks.clusters import Cluster

SENDERS = 16
MESSAGES = 4_400
KILLS = 3
_PAUSE_S = 0.02
_FAILOVER_LIMIT_S = 120.0


@frozen
class LossResult:
    """What became of the acknowledged messages."""

    acknowledged: int
    not_consumable: int
    consumed_twice: int
    kills: int
    seconds_without_acknowledgement: list[float]


@define
class _Ledger:
    """Acknowledged bodies of all senders."""

    acknowledged: list[bytes] = field(factory=list)
    enough: threading.Event = field(factory=threading.Event)


def _send_on(cluster: Cluster, topic: str, number: int, queues: int, ledger: _Ledger) -> None:
    """One sender: one message in flight; a message whose answer is lost is given up, its outcome unknown."""
    connection: wire.Wire | None = None
    counter = 0
    while not ledger.enough.is_set():
        time.sleep(_PAUSE_S)
        try:
            if connection is None:
                route = wire.query_route(cluster.namesrv, topic, 1.0)
                leader = route.leader(cluster.broker_name) if route is not None else None
                if leader is None:
                    continue
                connection = wire.Wire(leader, 3.0)
            counter += 1
            body = b"%d-%d" % (number, counter)
            properties = wire.send_properties(f"{time.time_ns():016X}{number:04X}{counter:012X}")
            fields = wire.send_fields(topic, number % queues, properties, cluster.broker_name)
            answer = connection.request(wire.SEND_MESSAGE_V2, fields, body)
        except wire.WireError:
            if connection is not None:
                connection.close()
            connection = None
            continue
        if answer.code == wire.SUCCESS:
            ledger.acknowledged.append(body)
        else:
            connection.close()
            connection = None
    if connection is not None:
        connection.close()


def _consume(cluster: Cluster, topic: str, queues: int) -> Counter[bytes]:
    """Every body that a consumer can get, from each queue's smallest offset to its end."""
    leader = cluster.await_whole()
    found: Counter[bytes] = Counter()
    with wire.Wire(leader.address, 10.0) as connection:
        for queue_id in range(queues):
            at, end = wire.queue_bounds(connection, topic, queue_id)
            stuck = 0
            while at < end and stuck < 50:
                answer = connection.request(
                    wire.PULL_MESSAGE, wire.pull_fields(topic, "quorate_losses", queue_id, at, 32)
                )
                if answer.code == wire.SUCCESS:
                    found.update(wire.stored_bodies(answer.body))
                following = int(answer.ext.get("nextBeginOffset", at))
                stuck = stuck + 1 if following <= at else 0
                at = max(at, following)
                if stuck:
                    time.sleep(0.1)
    return found


def measure(cluster: Cluster, *, messages: int = MESSAGES, kills: int = KILLS, queues: int = 4) -> LossResult:
    """Sixteen senders, some 500 messages a second, the leader killed ``kills`` times and started again each time.

    The next kill comes when the next share of messages is acknowledged, whether the restarted broker is back or not.

    :param messages: acknowledged ones, all shares together
    :raises TimeoutError: no send was acknowledged for two minutes, or the brokers did not come together again
    """
    topic = "losses"
    cluster.make_topic(topic, queues)
    ledger = _Ledger()
    threads = [
        threading.Thread(target=_send_on, args=(cluster, topic, number, queues, ledger), daemon=True)
        for number in range(SENDERS)
    ]
    gaps = []
    try:
        for thread in threads:
            thread.start()
        for _ in range(kills):
            _await_count(ledger, len(ledger.acknowledged) + messages // (kills + 1))
            victim = wire.wait_until(cluster.leader, 60.0, "a leader to kill")
            processes.signal_all([victim.pid], signal.SIGKILL)
            killed_at = time.monotonic()
            # Answers that were on their way when the leader died are still being read now.
            time.sleep(0.05)
            _await_count(ledger, len(ledger.acknowledged) + 1)
            gaps.append(time.monotonic() - killed_at)
            cluster.restart(victim.name)
        _await_count(ledger, len(ledger.acknowledged) + messages // (kills + 1))
    finally:
        ledger.enough.set()
        for thread in threads:
            thread.join(10.0)
    time.sleep(3.0)
    found = _consume(cluster, topic, queues)
    return LossResult(
        acknowledged=len(ledger.acknowledged),
        not_consumable=sum(1 for body in ledger.acknowledged if not found[body]),
        consumed_twice=sum(1 for count in found.values() if count > 1),
        kills=kills,
        seconds_without_acknowledgement=gaps,
    )


def _await_count(ledger: _Ledger, count: int) -> None:
    wire.wait_until(
        lambda: True if len(ledger.acknowledged) >= count else None,
        _FAILOVER_LIMIT_S,
        f"{count} acknowledged sends",
        pause=0.002,
    )
