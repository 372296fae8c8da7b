"""A long life in short: a log of many GiB, very many role changes, then kill -9 of all brokers under load.

    uv run python -m benchmarks.long_run [--gib 10] [--role-changes 1000] [--folder DIR] [--json]

1. The log is filled with `--gib` of messages.
2. Leadership is handed from broker to broker under a light load. From the first tenth of the handovers to the last, the
   brokers' own memory (without pages of the log that they map) stays within 5 %, and so does their resident memory;
   the number of their descriptors stays the same (those of the log's segments aside: a log that grows has more).
3. All brokers are killed under load. Counted from the start of the new processes: until the last one takes part in
   elections, and until the first send is acknowledged.

Needs three times `--gib` and some more of free disk; the data folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio
from attrs import define, field

import quorate
from benchmarks.failover import BROKER_NAME, UpFolder, await_whole, tell
from benchmarks.ours import QuorateCluster
from benchmarks.processes import anonymous_megabytes
from quorate.errors import QuorateError
from remoting.message import Message
from runtime.processes import resident_bytes

TOPIC = "failover"
"""As `benchmarks.failover`, whose waiting for a whole group this borrows."""
QUEUES = 8
BATCH_MESSAGES = 15
BODY_BYTES = 16_384
FILLERS = 6
LIGHT_SENDERS = 4
LIGHT_PAUSE_S = 0.02
SAMPLES = 10
WARM_UP_CHANGES = 20
"""By then every broker has led, and has all its connections."""
DISK_RESERVE_BYTES = 5 << 30
MEMORY_GROWTH_MAX = 0.05
VOTE_WITHIN_S = 3.0
SERVE_WITHIN_S = 5.0
"""Issue 4, Done when 7."""


@define
class Senders:
    """Load of the own client, and what came of it."""

    acknowledged: int = 0
    failed: int = 0
    first_after: float | None = None
    """Wall seconds of the first acknowledgement since this was last set to None."""
    is_over: bool = False
    last_error: str = ""

    async def fill(self, client: quorate.Client, enough: Callable[[], bool]) -> None:
        while not enough():
            messages = [Message(topic=TOPIC, body=os.urandom(64) * (BODY_BYTES // 64)) for _ in range(BATCH_MESSAGES)]
            try:
                await client.send_batch(TOPIC, messages, timeout=10)
                self.acknowledged += BATCH_MESSAGES
            except QuorateError as error:
                self.failed += 1
                self.last_error = str(error)

    async def send(self, client: quorate.Client) -> None:
        body = bytes(1024)
        while not self.is_over:
            try:
                await client.send(TOPIC, body, timeout=15)
                self.acknowledged += 1
                if self.first_after is None:
                    self.first_after = time.time()
            except QuorateError as error:
                self.failed += 1
                self.last_error = str(error)
            await trio.sleep(LIGHT_PAUSE_S)


@define
class Footprint:
    """What one broker's process takes, sample by sample."""

    anonymous_mb: list[float] = field(factory=list)
    resident_mb: list[float] = field(factory=list)
    descriptors: list[int] = field(factory=list)
    of_segments: list[int] = field(factory=list)

    def look(self, folder: Path, pid: int) -> None:
        self.anonymous_mb.append(anonymous_megabytes(pid))
        self.resident_mb.append((resident_bytes(pid) or 0) / (1 << 20))
        targets = [_target(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        own = [target for target in targets if not target.startswith((f"{folder}/raft/log/", f"{folder}/raft/rows/"))]
        self.descriptors.append(len(own))
        self.of_segments.append(len(targets) - len(own))

    @property
    def growth(self) -> float:
        """Of its own memory."""
        return _growth(self.anonymous_mb)

    @property
    def resident_growth(self) -> float:
        return _growth(self.resident_mb)

    @property
    def more_descriptors(self) -> int:
        return self.descriptors[-1] - self.descriptors[0]


def _growth(samples: Sequence[float]) -> float:
    """The last three samples against the first three."""
    return statistics.median(samples[-3:]) / statistics.median(samples[:3]) - 1


def _target(link: Path) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115 - sockets and pipes are no paths
    except FileNotFoundError:
        return ""  # closed since it was listed


async def _fill(folder: UpFolder, client: quorate.Client, nbytes: int) -> dict[str, Any]:
    """Until the log is so long. Raises OSError before the disk is full."""
    end = 0

    def enough() -> bool:
        return end >= nbytes

    async def watch() -> None:
        nonlocal end
        while end < nbytes:
            await trio.sleep(0.5)
            try:
                leader = (await client.routes.refresh(TOPIC, for_publish=True)).leader(BROKER_NAME)
                if leader is not None:
                    end = int((await client.admin.broker_info(leader))["raftCommittedPosition"])
            except QuorateError:
                continue  # the next look
            if shutil.disk_usage(folder.data).free < DISK_RESERVE_BYTES:
                end = nbytes  # lets the senders end
                raise OSError(f"less than {DISK_RESERVE_BYTES >> 30} GiB of disk left in {folder.data}")

    senders = Senders()
    started = time.monotonic()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        for _ in range(FILLERS):
            nursery.start_soon(senders.fill, client, enough)
    elapsed = time.monotonic() - started
    return {"bytes": end, "seconds": elapsed, "mb_per_second": end / elapsed / 1e6, "failed_sends": senders.failed}


async def _hand_over(folder: UpFolder, client: quorate.Client, count: int) -> dict[str, Any]:
    """So many transfers of leadership under a light load, with samples from the first tenth on."""
    footprints = {broker.name: Footprint() for broker in folder.brokers()}
    pids = {broker.name: broker.pid for broker in folder.brokers()}
    senders = Senders()
    refused = 0
    done = 0
    first = max(count // 10, WARM_UP_CHANGES)
    marks = {first + (count - first) * number // (SAMPLES - 1) for number in range(SAMPLES)}

    def look() -> None:
        for broker in folder.brokers():
            if broker.pid != pids[broker.name]:
                raise RuntimeError(f"{broker.name} did not live through it")
            assert broker.pid is not None
            footprints[broker.name].look(folder.data / broker.name, broker.pid)

    async with trio.open_nursery() as nursery:
        for _ in range(LIGHT_SENDERS):
            nursery.start_soon(senders.send, client)
        while done < count:
            leader = (await client.routes.refresh(TOPIC, for_publish=True)).leader(BROKER_NAME)
            try:
                if leader is None:
                    await trio.sleep(0.02)
                    continue
                await client.admin.raft.transfer_leadership(leader)
                done += 1
                if done in marks:
                    look()
            except QuorateError as error:
                refused += 1
                senders.last_error = str(error)
                if refused > count:
                    raise
                await trio.sleep(0.05)
        senders.is_over = True
    return {
        "role_changes": done,
        "refused_transfers": refused,
        "failed_sends": senders.failed,
        "last_error": senders.last_error,
        "brokers": {
            name: {
                "memory_growth": each.growth,
                "resident_growth": each.resident_growth,
                "more_descriptors": each.more_descriptors,
                "anonymous_mb": each.anonymous_mb,
                "resident_mb": each.resident_mb,
                "descriptors": each.descriptors,
                "of_segments": each.of_segments,
            }
            for name, each in footprints.items()
        },
    }


def _events(data: Path) -> list[dict[str, Any]]:
    """What the supervisor has told, oldest first."""
    lines = (data / "logs" / "supervisor.log").read_text().splitlines()
    return [json.loads(line) for line in lines]


async def _kill_all(folder: UpFolder, client: quorate.Client) -> dict[str, Any]:
    """kill -9 of all brokers under load, and how the new processes come up."""
    senders = Senders()
    async with trio.open_nursery() as nursery:
        for _ in range(2 * LIGHT_SENDERS):
            nursery.start_soon(senders.send, client)
        await trio.sleep(3.0)
        seen = len(_events(folder.data))
        for broker in folder.brokers():
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGKILL)
        await trio.sleep(0.2)  # answers that were on their way
        senders.first_after = None
        with trio.fail_after(120):
            while senders.first_after is None:  # noqa: ASYNC110 - whatever the senders come to
                await trio.sleep(0.01)
        await await_whole(folder, client)
        senders.is_over = True
    news = _events(folder.data)[seen:]

    def moments(kind: str) -> dict[str, float]:
        return {event["node"]: event["at_ms"] / 1000 for event in reversed(news) if event["kind"] == kind}

    started, ready, leading = moments("started"), moments("ready"), moments("leader")
    first = min(started.values())
    return {
        "ready_to_vote_s": {name: ready[name] - started[name] for name in sorted(ready)},
        "leader_s": min(leading.values()) - first,
        "serving_s": senders.first_after - first,
        "failed_sends": senders.failed,
    }


async def _run(folder: UpFolder, namesrv: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with quorate.connect(namesrv) as client:
        await client.admin.create_topic(TOPIC, queues=QUEUES)
        await await_whole(folder, client)
        steps: tuple[tuple[str, Callable[[], Awaitable[Any]]], ...] = (
            ("fill", lambda: _fill(folder, client, int(options.gib * (1 << 30)))),
            ("role_changes", lambda: _hand_over(folder, client, options.role_changes)),
            ("kill", lambda: _kill_all(folder, client)),
        )
        for name, step in steps:
            started = time.monotonic()
            found[name] = await step()
            print(f"{name}: {time.monotonic() - started:.0f} s: {found[name]}", file=sys.stderr)
            await await_whole(folder, client)
    return found


def missed(found: Mapping[str, Any]) -> list[str]:
    """Goals that are not met, one sentence each."""
    problems = []
    for name, broker in found["role_changes"]["brokers"].items():
        if broker["memory_growth"] > MEMORY_GROWTH_MAX:
            problems.append(f"{name}: memory grew by {broker['memory_growth']:.1%}")
        if broker["resident_growth"] > MEMORY_GROWTH_MAX:
            problems.append(f"{name}: resident memory grew by {broker['resident_growth']:.1%}")
        if broker["more_descriptors"] > 0:
            problems.append(f"{name}: {broker['more_descriptors']} more descriptors")
    slowest = max(found["kill"]["ready_to_vote_s"].values())
    if slowest > VOTE_WITHIN_S:
        problems.append(f"ready to vote after {slowest:.2f} s")
    if found["kill"]["serving_s"] > SERVE_WITHIN_S:
        problems.append(f"serving after {found['kill']['serving_s']:.2f} s")
    return problems


def report(found: Mapping[str, Any]) -> list[str]:
    """For people."""
    fill, changes, kill = found["fill"], found["role_changes"], found["kill"]
    lines = [
        f"filled {fill['bytes'] / (1 << 30):.2f} GiB at {fill['mb_per_second']:.0f} MB/s,"
        f" {fill['failed_sends']} failed sends",
        f"{changes['role_changes']} role changes, {changes['refused_transfers']} refused,"
        f" {changes['failed_sends']} failed sends",
    ]
    for name, each in changes["brokers"].items():
        lines.append(
            f"  {name}: own memory {each['anonymous_mb'][0]:.1f} -> {each['anonymous_mb'][-1]:.1f} MB"
            f" ({each['memory_growth']:+.1%}),"
            f" resident {each['resident_mb'][0]:.0f} -> {each['resident_mb'][-1]:.0f} MB,"
            f" descriptors {each['descriptors'][0]} -> {each['descriptors'][-1]}"
            f" (and of segments {each['of_segments'][0]} -> {each['of_segments'][-1]})"
        )
    votes = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in kill["ready_to_vote_s"].items())
    lines.append(f"after kill -9 of all: ready to vote {votes}; a leader after {kill['leader_s']:.2f} s,")
    lines.append(f"  the first send acknowledged after {kill['serving_s']:.2f} s, {kill['failed_sends']} sends failed")
    return lines


def main() -> None:
    """Run it; ends with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=10.0)
    parser.add_argument("--role-changes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary data folder")
    parser.add_argument("--keep", action="store_true", help="leave the data folder in place")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.role_changes < WARM_UP_CHANGES + SAMPLES:
        parser.error(f"--role-changes must be at least {WARM_UP_CHANGES + SAMPLES}")
    with QuorateCluster(data=options.folder, keeps_data=options.keep) as cluster:
        cluster.start()
        needed = int(options.gib * 3 * (1 << 30)) + DISK_RESERVE_BYTES
        if (free := shutil.disk_usage(cluster.data).free) < needed:
            raise SystemExit(f"{free >> 30} GiB of disk are free in {cluster.data}, {needed >> 30} are needed")
        found = trio.run(_run, UpFolder(cluster.data), cluster.namesrv, options)
    found["missed"] = missed(found)
    tell(found, report(found), options.json)


if __name__ == "__main__":
    main()
