"""The raft engine alone beside PySyncObj: three processes each on loopback, proposals of 1 KiB, no message protocol.

    uv run python -m benchmarks.engine [--rounds 3] [--seconds 5] [--in-flight 4000] [--json]

Each round starts every variant in turn, one after the other on the same machine: many proposals in flight, one at a
time, and a kill -9 of the leader to the next commit. Ratios are taken within a round; the table shows medians.

Quorate runs with `flush = "async"` (as PySyncObj, which never syncs its journal), with "sync", and with "sync" on a
disk whose every sync takes 5 ms longer (`runtime.faults`). PySyncObj runs as it comes (its batching on), and in the
setting that is best for all but a flood: no batching, shorter timers (raft.md 3.2). Both of its files are always
set, or its first compaction would lose everything (raft.md 3.1).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio
from attrs import frozen

from benchmarks import processes
from benchmarks.counting import CountingMachine
from benchmarks.ours import REPOSITORY
from dledger.config import GroupConfig
from dledger.group import RaftGroup
from runtime.logs import get_logger
from runtime.real import FAULTS_VARIABLE, real_env

BODY_BYTES = 1024
NODES = ("n0", "n1", "n2")
READY_WITHIN_S = 30.0
FAILOVER_WITHIN_S = 30.0
NEVER_S = FAILOVER_WITHIN_S
"""Shown as "none": no commit in that time."""
WARM_UP_S = 0.5
PORTS = 3
APPLIED_ENTRIES_CUT = "truncating already-applied log entries"
"""PySyncObj's warning that a follower removed entries it had applied (raft.md 3.1)."""


@frozen(kw_only=True)
class Variant:
    """One engine in one setting."""

    name: str
    title: str
    engine: str
    options: Mapping[str, Any]
    sync_delay_ms: float = 0.0


VARIANTS = (
    Variant(name="async", title="Quorate, async", engine="quorate", options={"flush": "async"}),
    Variant(name="sync", title="Quorate, sync", engine="quorate", options={"flush": "sync"}),
    Variant(
        name="sync_5ms",
        title="Quorate, sync, 5 ms per sync",
        engine="quorate",
        options={"flush": "sync"},
        sync_delay_ms=5.0,
    ),
    Variant(name="pysyncobj", title="PySyncObj, as it comes", engine="pysyncobj", options={}),
    Variant(
        name="pysyncobj_tuned",
        title="PySyncObj, no batching, short timers",
        engine="pysyncobj",
        options={
            "appendEntriesUseBatch": False,
            "raftMinTimeout": 0.35,
            "raftMaxTimeout": 0.7,
            "connectionRetryTime": 0.5,
        },
    ),
)
GOALS = {"sync": 0.5, "sync_5ms": 0.3}
"""Throughput as a share of `async` in the same round."""


# --- a node's process: commands come as lines on its standard input, answers go as lines to its standard output ---


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


class _QuorateNode:
    """A member of a raft group; proposes when told to, if it leads."""

    def __init__(self, node: str, folder: str, ports: Sequence[int], flush: Any) -> None:
        self._machine = CountingMachine()
        config = GroupConfig(
            cluster="bench",
            group="g",
            node_id=node,
            peers={name: ("127.0.0.1", port) for name, port in zip(NODES, ports, strict=True)},
            data_dir=f"{folder}/{node}",
            format_if_empty=True,
            flush=flush,
        )
        self._group = RaftGroup(real_env(), config, self._machine, get_logger("bench"))
        self._body = bytes(BODY_BYTES)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._group.run)
            _say(started=True)
            while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                command = json.loads(line)
                match command["do"]:
                    case "status":
                        _say(leads=self._group.is_ready_leader, whole=self._is_whole())
                    case "many":
                        _say(**await self._many(command["in_flight"], command["seconds"]))
                    case "one":
                        _say(**await self._one(command["seconds"]))
                    case "next":
                        _say(at=await self._next())
            nursery.cancel_scope.cancel()

    def _is_whole(self) -> bool:
        return all(self._group.statistics().connected.values())

    def _propose(self, done: Callable[[int], None]) -> None:
        """One record into the open batch, as the broker does it for each message."""
        group = self._group
        group.reserve(BODY_BYTES)
        staged = group.open_staged()
        group.set_open_staged((1 if staged is None else staged[0] + 1, done))
        group.add_record(self._body)

    async def _many(self, in_flight: int, seconds: float) -> dict[str, Any]:
        waiting = committed = 0
        some = trio.Event()

        def done(count: int) -> None:
            nonlocal waiting, committed
            waiting -= count
            committed += count
            some.set()

        monotonic = time.monotonic
        started, before = monotonic(), 0
        end = started + WARM_UP_S + seconds
        is_warm = False
        while (now := monotonic()) < end:
            if not is_warm and now - started >= WARM_UP_S:
                is_warm, started, before = True, now, committed
            room = in_flight - waiting
            waiting += room
            for _ in range(room):
                self._propose(done)
            self._group.wake()
            some = trio.Event()
            await some.wait()
        elapsed, counted = monotonic() - started, committed - before
        while waiting:
            some = trio.Event()
            await some.wait()
        return {"committed": counted, "elapsed": elapsed}

    async def _one(self, seconds: float) -> dict[str, Any]:
        latencies: list[float] = []
        end = time.monotonic() + seconds
        while (started := time.perf_counter()) and time.monotonic() < end:
            committed = trio.Event()
            self._propose(lambda _count, committed=committed: committed.set())  # type: ignore[misc]
            self._group.kick()
            await committed.wait()
            latencies.append(time.perf_counter() - started)
        return {"latencies": latencies}

    async def _next(self) -> float | None:
        """When the first proposal of this node, as a new leader, was committed; None where another one leads."""
        group = self._group
        with trio.move_on_after(FAILOVER_WITHIN_S):
            was = group.leader_id
            while not group.is_ready_leader:
                if group.leader_id not in (None, was, group.node_id):
                    return None
                await trio.sleep(0.001)
            committed = trio.Event()
            self._propose(lambda _count: committed.set())
            group.kick()
            await committed.wait()
            return time.monotonic()
        return None


class _PySyncObjNode:
    """The same with PySyncObj: its own thread ticks, proposals are made by it and by the main thread."""

    def __init__(self, node: str, folder: str, ports: Sequence[int], options: Mapping[str, Any]) -> None:
        from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated

        class Counter(SyncObj):  # type: ignore[misc]  # the library has no types
            def __init__(self, *arguments: Any) -> None:
                self.applied = 0
                super().__init__(*arguments)

            @replicated  # type: ignore[untyped-decorator]
            def take(self, body: bytes) -> int:
                self.applied += 1
                return self.applied

        addresses = [f"127.0.0.1:{port}" for port in ports]
        own = addresses[NODES.index(node)]
        conf = SyncObjConf(
            bindAddress=own,
            journalFile=f"{folder}/{node}.journal",
            fullDumpFile=f"{folder}/{node}.dump",
            **options,
        )
        self._success = FAIL_REASON.SUCCESS
        self._body = bytes(BODY_BYTES)
        self._object = Counter(own, [address for address in addresses if address != own], conf)

    def run(self) -> None:
        _say(started=True)
        for line in sys.stdin:
            command = json.loads(line)
            match command["do"]:
                case "status":
                    status = self._object.getStatus()
                    leads = self._object.isReady() and str(status["leader"]) == str(status["self"])
                    _say(leads=leads, whole=status["partner_nodes_count"] == sum(
                        1 for key, value in status.items() if key.startswith("partner_node_status") and value == 2
                    ))  # fmt: skip
                case "many":
                    _say(**self._many(command["in_flight"], command["seconds"]))
                case "one":
                    _say(**self._one(command["seconds"]))
                case "next":
                    _say(at=self._next())

    def _many(self, in_flight: int, seconds: float) -> dict[str, Any]:
        """Each answer makes the next proposal, on the library's thread: so many are always waiting."""
        committed = failed = 0
        stopping = threading.Event()

        def done(_result: Any, reason: int) -> None:
            nonlocal committed, failed
            if reason == self._success:
                committed += 1
            else:
                failed += 1
            if not stopping.is_set():
                self._object.take(self._body, callback=done)

        for _ in range(in_flight):
            self._object.take(self._body, callback=done)
        time.sleep(WARM_UP_S)
        before, started = committed, time.monotonic()
        time.sleep(seconds)
        counted, elapsed = committed - before, time.monotonic() - started
        stopping.set()
        time.sleep(1.0)
        return {"committed": counted, "elapsed": elapsed, "failed": failed}

    def _one(self, seconds: float) -> dict[str, Any]:
        latencies: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            started = time.perf_counter()
            if self._take_one(FAILOVER_WITHIN_S):
                latencies.append(time.perf_counter() - started)
        return {"latencies": latencies}

    def _take_one(self, within_s: float) -> bool:
        answered = threading.Event()
        reasons: list[int] = []

        def done(_result: Any, reason: int) -> None:
            reasons.append(reason)
            answered.set()

        self._object.take(self._body, callback=done)
        return answered.wait(within_s) and reasons == [self._success]

    def _next(self) -> float | None:
        """When the first proposal of this node was committed, whoever leads: a follower passes it on."""
        end = time.monotonic() + FAILOVER_WITHIN_S
        while time.monotonic() < end:
            if self._take_one(0.5):
                return time.monotonic()
        return None


def _node_main(options: argparse.Namespace) -> None:
    ports = [int(port) for port in options.ports.split(",")]
    settings = json.loads(options.options)
    if options.engine == "quorate":
        trio.run(_QuorateNode(options.node, options.folder, ports, settings["flush"]).run)
    else:
        _PySyncObjNode(options.node, options.folder, ports, settings).run()
        os._exit(0)  # its thread would go on


# --- the three processes, from outside ---


class Trial:
    """Three processes of one variant, in a folder of their own."""

    def __init__(self, variant: Variant, parent: Path | None) -> None:
        self.variant = variant
        self._folder = Path(tempfile.mkdtemp(prefix="engine-bench-", dir=parent))
        self._children: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        variant = self.variant
        base = processes.free_port_base(PORTS)
        ports = ",".join(str(base + number) for number in range(PORTS))
        environment = dict(os.environ)
        if variant.sync_delay_ms:
            plan = self._folder / "faults.json"
            folders = {f"{self._folder}/{node}": {"sync_delay_ms": variant.sync_delay_ms} for node in NODES}
            plan.write_text(json.dumps({"folders": folders}))
            environment[FAULTS_VARIABLE] = str(plan)
        errors = (self._folder / "stderr").open("wb")
        for node in NODES:
            command = [sys.executable, "-m", "benchmarks.engine", "--node", node, "--engine", variant.engine]
            command += ["--folder", str(self._folder), "--ports", ports, "--options", json.dumps(variant.options)]
            self._children[node] = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=processes.die_with_parent,
            )
        errors.close()
        for node in NODES:
            self._read(node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children.values():
            child.kill()
            child.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell(self, node: str, **command: Any) -> None:
        child = self._children[node]
        assert child.stdin is not None
        child.stdin.write(json.dumps(command) + "\n")
        child.stdin.flush()

    def _read(self, node: str) -> dict[str, Any]:
        child = self._children[node]
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.variant.title}: {node} ended with {child.wait()}: {self.errors()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def errors(self) -> str:
        """What the three wrote to their standard error output."""
        return (self._folder / "stderr").read_text(errors="replace")

    def ask(self, node: str, **command: Any) -> dict[str, Any]:
        """One command, one answer."""
        self._tell(node, **command)
        return self._read(node)

    def leader(self) -> str:
        """Waits for one that leads, with all three connected. Raises TimeoutError."""
        end = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < end:
            answers = {node: self.ask(node, do="status") for node in self._children}
            leading = [node for node, answer in answers.items() if answer["leads"]]
            if len(leading) == 1 and all(answer["whole"] for answer in answers.values()):
                return leading[0]
            time.sleep(0.05)
        raise TimeoutError(f"{self.variant.title}: no leader of a whole group within {READY_WITHIN_S:g} s")

    def cpu_seconds(self) -> float:
        return processes.cpu_seconds(child.pid for child in self._children.values())

    def kill_to_next_commit(self, leader: str) -> float:
        """Seconds; `NEVER_S` where the other engine does not commit again. Raises TimeoutError where ours does not."""
        others = [node for node in self._children if node != leader]
        for node in others:
            self._tell(node, do="next")
        time.sleep(0.05)
        killed_at = time.monotonic()
        child = self._children.pop(leader)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        moments: list[float] = [at for node in others if (at := self._read(node)["at"]) is not None and at > killed_at]
        if moments:
            return min(moments) - killed_at
        if self.variant.engine == "quorate":
            raise TimeoutError(f"{self.variant.title}: no commit within {FAILOVER_WITHIN_S:g} s after the kill")
        return NEVER_S


def measure(variant: Variant, options: argparse.Namespace) -> dict[str, float]:
    """One trial: throughput, latency, failover."""
    with Trial(variant, options.folder) as trial:
        leader = trial.leader()
        time.sleep(0.5)
        one = sorted(trial.ask(leader, do="one", seconds=options.seconds / 2)["latencies"])
        cpu = trial.cpu_seconds()
        many = trial.ask(leader, do="many", in_flight=options.in_flight, seconds=options.seconds)
        cpu = trial.cpu_seconds() - cpu
        result = {
            "per_second": many["committed"] / many["elapsed"],
            "cpu_us": cpu / max(1, many["committed"]) * 1e6 * many["elapsed"] / (many["elapsed"] + WARM_UP_S),
            "one_p50_ms": one[len(one) // 2] * 1e3,
            "one_p99_ms": one[len(one) * 99 // 100] * 1e3,
            "failed": float(many.get("failed", 0)),
            "applied_entries_cut": float(trial.errors().count(APPLIED_ENTRIES_CUT)),
        }
        result["kill_s"] = trial.kill_to_next_commit(trial.leader())
        return result


def table(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Medians, as Markdown: what `docs/benchmarks.md` shows."""
    heads = ("", "proposals/s", "CPU µs each, 3 processes", "x async", "one at a time p50", "p99", "kill → next commit")
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    for variant in VARIANTS:
        results = [each[variant.name] for each in rounds if variant.name in each]
        if not results:
            continue
        medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
        share = ratio(rounds, variant.name)
        kills = sorted(result["kill_s"] for result in results)
        cells = (
            variant.title,
            f"{medians['per_second']:,.0f}",
            f"{medians['cpu_us']:.0f}",
            f"{share:.2f}" if share is not None else "",
            f"{medians['one_p50_ms']:.2f} ms",
            f"{medians['one_p99_ms']:.2f} ms",
            _shown(statistics.median(kills)) + (f" ({_shown(kills[0])} to {_shown(kills[-1])})" if kills[1:] else ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _shown(seconds: float) -> str:
    return f"none in {NEVER_S:.0f} s" if seconds >= NEVER_S else f"{seconds:.2f} s"


def ratio(rounds: Sequence[Mapping[str, Mapping[str, float]]], name: str) -> float | None:
    """Median, over the rounds, of a variant's throughput as a share of `async` in the same round."""
    shares = [
        each[name]["per_second"] / each["async"]["per_second"] for each in rounds if name in each and "async" in each
    ]
    return statistics.median(shares) if shares else None


def missed(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Goals that are not met, one sentence each."""
    return [
        f"{name}: {share:.2f} x async, the goal is {goal}"
        for name, goal in GOALS.items()
        if (share := ratio(rounds, name)) is not None and share < goal
    ]


def main() -> None:
    """Measure; ends with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--in-flight", type=int, default=4000)
    parser.add_argument("--only", default="", help="names of variants, with commas between them")
    parser.add_argument("--folder", default=None, help="where to make the temporary data folders")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--node", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ports", default="", help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node is not None:
        _node_main(options)
        return
    chosen = [each for each in VARIANTS if not options.only or each.name in options.only.split(",")]
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        rounds.append({})
        for variant in chosen:
            rounds[-1][variant.name] = result = measure(variant, options)
            print(f"round {number + 1}: {variant.title}: {result}", file=sys.stderr)
    problems = missed(rounds)
    if options.json:
        print(json.dumps({"rounds": rounds, "missed": problems}))
    else:
        print("\n".join(table(rounds)))
        print("\n".join(f"missed: {problem}" for problem in problems) or "all goals met")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
