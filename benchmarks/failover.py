"""How long nobody is served: the leader killed, the leader frozen, and a rolling restart, under load on real processes.

    uv run python -m benchmarks.failover [--kills 30] [--freezes 5] [--rolling 3] [--json]

The load is that of the project's own client. A kill counts from the signal to the first acknowledgement by another
node. A frozen leader (SIGSTOP) counts in the same way; some senders wait at the frozen process itself, and whatever it
acknowledges after SIGCONT is looked up in the new leader's log, byte by byte. A rolling restart is `quorate restart` of
one broker after the other; what counts is failed sends, and the longest time without an acknowledgement.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import trio
from attrs import define, field, frozen

import quorate
from benchmarks import wire
from benchmarks.ours import REPOSITORY, QuorateCluster
from quorate.errors import QuorateError
from remoting.message import parse_offset_msg_id

TOPIC = "failover"
QUEUES = 8
SENDERS = 8
BODY_BYTES = 1024
PAUSE_S = 0.004
SEND_WITHIN_S = 8.0
STUCK_SENDERS = 4
STUCK_WITHIN_S = 30.0
WHOLE_WITHIN_S = 60.0
GIVEN_UP_AFTER_S = 30.0
BROKER_NAME = "broker-a"

GOALS_S = {"kill_p50": 0.2, "kill_max": 0.7, "freeze_max": 3.0, "rolling_gap": 0.3}
"""Issue 4, Done when 3; design §3."""


@frozen
class Broker:
    """A broker process as its supervisor knows it."""

    name: str
    address: str
    pid: int | None
    is_up: bool


class UpFolder:
    """What runs in a data folder of `quorate up`, without asking anybody."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def brokers(self) -> list[Broker]:
        state = json.loads((self.data / "up.json").read_bytes())
        return [
            Broker(
                name=node["name"],
                address=node["listen"],
                pid=node["process"]["pid"] if node["process"] else None,
                is_up=node["state"] == "up" and node["process"] is not None,
            )
            for node in state["nodes"]
            if node["kind"] == "broker"
        ]

    def bytes_at(self, name: str, position: int, nbytes: int) -> bytes:
        """Bytes of a broker's log, read from its segment files."""
        folder = self.data / name / "raft" / "log"
        for path in sorted(folder.glob("[0-9]" * 20), reverse=True):
            base = int(path.name)
            if base <= position < base + path.stat().st_size:
                with path.open("rb") as file:
                    file.seek(position - base)
                    return file.read(nbytes)
        return b""


@define
class Load:
    """Senders of the own client, and what came of their sends."""

    acknowledged: list[tuple[float, str]] = field(factory=list)
    """(moment, address of the node that stored it), in the order of their arrival."""
    failed: list[str] = field(factory=list)
    is_over: bool = False

    async def send(self, client: quorate.Client, number: int, timeout: float) -> None:
        queues = (await client.routes.get(TOPIC, for_publish=True)).writable
        queue = queues[number % len(queues)]
        body = bytes(BODY_BYTES)
        while not self.is_over:
            try:
                receipt = await client.send(TOPIC, body, queue=queue, timeout=timeout)
            except QuorateError as error:
                self.failed.append(str(error))
            else:
                host, port, _ = parse_offset_msg_id(receipt.offset_message_id)
                self.acknowledged.append((time.monotonic(), f"{host}:{port}"))
            await trio.sleep(PAUSE_S)

    def first_after(self, moment: float, other_than: str) -> float | None:
        """When another node acknowledged first."""
        first = None
        for at, address in reversed(self.acknowledged):
            if at <= moment:
                break
            if address != other_than:
                first = at
        return first

    def longest_gap(self, start: float, end: float) -> float:
        """Longest time without any acknowledgement between two moments."""
        moments = [start, *(at for at, _ in self.acknowledged if start < at < end), end]
        return max(after - before for before, after in pairwise(moments))


async def await_whole(folder: UpFolder, client: quorate.Client) -> Broker:
    """Wait until every broker runs and is up to date with the leader; returns the leader. Raises TimeoutError."""
    problem = ""
    with trio.move_on_after(WHOLE_WITHIN_S):
        while True:
            try:
                brokers = folder.brokers()
                if all(broker.is_up for broker in brokers):
                    infos = {b.name: await client.admin.broker_info(b.address, timeout=1.0) for b in brokers}
                    leading = [b for b in brokers if infos[b.name].get("raftReady") == "true"]
                    terms = {info["raftTerm"] for info in infos.values()}
                    lags = [int(i["raftCommittedIndex"]) for i in infos.values()]
                    problem = f"leaders {[b.name for b in leading]}, terms {terms}, committed {lags}"
                    route = await client.routes.refresh(TOPIC, for_publish=True)
                    if len(leading) == 1 and len(terms) == 1 and max(lags) - min(lags) < 500:
                        if route.leader(BROKER_NAME) == leading[0].address:
                            return leading[0]
                        problem = f"the route says that {route.leader(BROKER_NAME)} leads"
                else:
                    problem = f"down: {[broker.name for broker in brokers if not broker.is_up]}"
            except (QuorateError, OSError, ValueError) as error:  # a broker that goes or comes just now
                problem = str(error)
            await trio.sleep(0.1)
    raise TimeoutError(f"the group is not whole after {WHOLE_WITHIN_S:g} s: {problem}")


async def _first_ack(load: Load, since: float, other_than: str) -> float:
    """Seconds until another node acknowledged. Raises TimeoutError."""
    with trio.move_on_after(GIVEN_UP_AFTER_S):
        while True:
            at = load.first_after(since, other_than)
            if at is not None:
                return at - since
            await trio.sleep(0.002)
    raise TimeoutError(f"no acknowledgement within {GIVEN_UP_AFTER_S:g} s; {load.failed[-1:]}")


async def prepare(client: quorate.Client) -> None:
    """The topic, and a moment for the name server to hear of it."""
    await client.admin.create_topic(TOPIC, queues=QUEUES)
    with trio.fail_after(10):
        while (await client.routes.refresh(TOPIC, for_publish=True)).provisional:  # noqa: ASYNC110 - asks each time
            await trio.sleep(0.05)


@asynccontextmanager
async def loaded(namesrv: str, timeout: float) -> AsyncIterator[tuple[quorate.Client, Load]]:
    """A client whose senders send for the length of the block, each send within `timeout` seconds."""
    load = Load()
    async with quorate.connect(namesrv) as client:
        await prepare(client)
        async with trio.open_nursery() as nursery:
            for number in range(SENDERS):
                nursery.start_soon(load.send, client, number, timeout)
            try:
                yield client, load
            finally:
                load.is_over = True


async def kill_leaders(folder: UpFolder, namesrv: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """SIGKILL the leader again and again; seconds to the first acknowledgement by another node, each time."""
    seconds: list[float] = []
    async with loaded(namesrv, SEND_WITHIN_S) as (client, load):
        for _ in range(kills):
            leader = await await_whole(folder, client)
            await trio.sleep(0.3 + rng.random() * 0.5)
            assert leader.pid is not None
            os.kill(leader.pid, signal.SIGKILL)
            seconds.append(await _first_ack(load, time.monotonic(), leader.address))
        await await_whole(folder, client)
    return {"seconds": seconds, "acknowledged": len(load.acknowledged), "failed_sends": len(load.failed)}


@define
class _Stuck:
    """A sender that stays at one node, whatever happens to it."""

    address: str
    number: int
    is_over: threading.Event
    acknowledged: list[tuple[float, bytes, int]] = field(factory=list)
    """(moment, body, physical offset)."""

    def run(self) -> None:
        counter = 0
        try:
            with wire.Wire(self.address, STUCK_WITHIN_S) as connection:
                while not self.is_over.is_set():
                    counter += 1
                    key = f"{time.time_ns():016X}{self.number:04X}{counter:012X}"
                    fields = wire.send_fields(TOPIC, self.number % QUEUES, wire.send_properties(key), BROKER_NAME)
                    body = key.encode().ljust(BODY_BYTES, b".")
                    answer = connection.request(wire.SEND_MESSAGE_V2, fields, body)
                    if answer.code == wire.SUCCESS:
                        _, _, position = parse_offset_msg_id(answer.ext["msgId"])
                        self.acknowledged.append((time.monotonic(), body, position))
                    time.sleep(PAUSE_S)
        except wire.WireError:
            return  # an old leader may well close the connection


async def freeze_leaders(folder: UpFolder, namesrv: str, freezes: int, rng: random.Random) -> dict[str, Any]:
    """SIGSTOP the leader, wait for another to serve, SIGCONT it, and check all it acknowledges from then on."""
    seconds: list[float] = []
    late = 0
    wrong: list[str] = []
    async with loaded(namesrv, SEND_WITHIN_S) as (client, load):
        for _ in range(freezes):
            leader = await await_whole(folder, client)
            over = threading.Event()
            stuck = [_Stuck(leader.address, number, over) for number in range(STUCK_SENDERS)]
            async with trio.open_nursery() as stuck_nursery:
                for each in stuck:
                    stuck_nursery.start_soon(trio.to_thread.run_sync, each.run)
                await trio.sleep(0.3 + rng.random() * 0.5)
                assert leader.pid is not None
                os.kill(leader.pid, signal.SIGSTOP)
                try:
                    seconds.append(await _first_ack(load, time.monotonic(), leader.address))
                    await trio.sleep(0.5)
                finally:
                    woken_at = time.monotonic()
                    os.kill(leader.pid, signal.SIGCONT)
                await trio.sleep(1.5)
                over.set()
            new_leader = await await_whole(folder, client)
            for each in stuck:
                for at, body, position in each.acknowledged:
                    if at > woken_at:
                        late += 1
                        if body not in folder.bytes_at(new_leader.name, position, 4 * BODY_BYTES):
                            wrong.append(f"{body[:32].decode()} acknowledged at {position}")
    return {
        "seconds": seconds,
        "acknowledged_after_waking": late,
        "not_in_new_leaders_log": wrong,
        "acknowledged": len(load.acknowledged),
        "failed_sends": len(load.failed),
    }


async def restart_all(folder: UpFolder, namesrv: str, rounds: int) -> dict[str, Any]:
    """`quorate restart` of each broker in turn, the leader's by handing leadership over; longest gap of each round."""
    gaps: list[float] = []
    async with loaded(namesrv, 3.0) as (client, load):
        for _ in range(rounds):
            await await_whole(folder, client)
            started = time.monotonic()
            for broker in folder.brokers():
                command = [sys.executable, "-m", "cli", "restart", broker.name, "--data", str(folder.data)]
                await trio.run_process(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
                await await_whole(folder, client)
            await trio.sleep(0.2)
            gaps.append(load.longest_gap(started, time.monotonic()))
    return {"gaps": gaps, "acknowledged": len(load.acknowledged), "failed_sends": load.failed}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


async def _measure(folder: UpFolder, namesrv: str, options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(options.seed)
    found: dict[str, Any] = {}
    if options.kills:
        found["kill"] = await kill_leaders(folder, namesrv, options.kills, rng)
    if options.freezes:
        found["freeze"] = await freeze_leaders(folder, namesrv, options.freezes, rng)
    if options.rolling:
        found["rolling"] = await restart_all(folder, namesrv, options.rolling)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """For people: one line per figure, with its goal."""
    lines = [f"{'figure':44} {'n':>4} {'p50':>8} {'p95':>8} {'max':>8}  goal"]
    rows = (
        ("kill", "seconds", "leader killed -> first acknowledgement", "p50 <= 0.2, max <= 0.7"),
        ("freeze", "seconds", "leader frozen -> first acknowledgement", "max <= 3"),
        ("rolling", "gaps", "rolling restart: longest gap", "max <= 0.3"),
    )
    for name, key, title, goal in rows:
        values = found.get(name, {}).get(key)
        if values:
            figures = " ".join(f"{percentile(values, each):7.3f}s" for each in (50, 95, 100))
            lines.append(f"{title:44} {len(values):4} {figures}  {goal}")
    if "freeze" in found:
        freeze = found["freeze"]
        lines.append(
            f"woken leaders acknowledged {freeze['acknowledged_after_waking']} sends,"
            f" {len(freeze['not_in_new_leaders_log'])} of them not in the new leader's log (goal: 0)"
        )
    if "rolling" in found:
        lines.append(f"sends that failed during rolling restarts: {len(found['rolling']['failed_sends'])} (goal: 0)")
    return lines


def missed(found: dict[str, Any]) -> list[str]:
    """Goals that are not met, one sentence each."""
    problems = []
    if "kill" in found:
        p50, most = percentile(found["kill"]["seconds"], 50), max(found["kill"]["seconds"])
        if p50 > GOALS_S["kill_p50"] or most > GOALS_S["kill_max"]:
            problems.append(f"kill: p50 {p50:.3f} s, max {most:.3f} s")
    if "freeze" in found:
        if max(found["freeze"]["seconds"]) > GOALS_S["freeze_max"]:
            problems.append(f"freeze: max {max(found['freeze']['seconds']):.3f} s")
        if found["freeze"]["not_in_new_leaders_log"]:
            problems.append(f"freeze: {found['freeze']['not_in_new_leaders_log'][:3]}")
    if "rolling" in found:
        if max(found["rolling"]["gaps"]) > GOALS_S["rolling_gap"]:
            problems.append(f"rolling restart: gap {max(found['rolling']['gaps']):.3f} s")
        if found["rolling"]["failed_sends"]:
            problems.append(f"rolling restart: failed sends, {found['rolling']['failed_sends'][:3]}")
    return problems


def tell(found: dict[str, Any], lines: list[str], as_json: bool) -> NoReturn:
    """Print what was found, and end with 1 where a goal is missed."""
    if as_json:
        print(json.dumps(found))
    else:
        print("\n".join(lines))
        print("\n".join(f"missed: {problem}" for problem in found["missed"]) or "all goals met")
    raise SystemExit(1 if found["missed"] else 0)


def main() -> None:
    """Measure on a cluster of its own; ends with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--freezes", type=int, default=5)
    parser.add_argument("--rolling", type=int, default=3, help="rounds of restarting all three")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary data folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with QuorateCluster(data=options.folder) as cluster:
        cluster.start()
        found = trio.run(_measure, UpFolder(cluster.data), cluster.namesrv, options)
    found["missed"] = missed(found)
    tell(found, table(found), options.json)


if __name__ == "__main__":
    main()
