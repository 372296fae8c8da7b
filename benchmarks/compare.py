"""This cluster and Apache RocketMQ 5.3.3, loaded in turn in one run: ``uv run python -m benchmarks.compare``.

Never two of them at work at once. Apache's two clusters are started once, warmed under load, and frozen (SIGSTOP) while
another is measured, so that they stay warm and cost nothing; ours is started for every slot and stopped after it, so it
is measured cold. ``docs/benchmarks.md`` explains each row.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import asdict, define, field, frozen

from benchmarks import losses, page_cache, processes
from benchmarks.apache import HEAP, ApacheCluster, ToolMissing
from benchmarks.clusters import Cluster
from benchmarks.ours import QuorateCluster

OURS = "quorate"
DLEDGER = "dledger"
PLAIN = "plain"
SYSTEMS = (OURS, DLEDGER, PLAIN)
GENERATOR_LIMIT = 0.5
"""Cores; a generator above that marks its row, since it takes CPU the brokers could use."""
_QUEUES = 8
_QUIET_LOAD = 0.7


@frozen
class Row:
    """One line of the table.

    :ivar more_is_better: direction of the ratio
    :ivar goal: ratio to Apache's DLedger group to reach now, or an absolute figure when ``absolute``
    """

    key: str
    title: str
    unit: str
    more_is_better: bool
    goal: float
    absolute: bool = False
    digits: int = 0
    systems: tuple[str, ...] = SYSTEMS


ROWS = (
    Row("sends", "acknowledged 1 KiB sends, 4 connections x 256 in flight", "/s", True, 4.0),
    Row("cpu", "CPU per replicated message, all brokers", "us", False, 1 / 6, digits=1),
    Row("batch", "batches of 32 x 1 KiB, messages", "/s", True, 5.0),
    Row("latency", "one send in flight, p50", "ms", False, 1 / 2, digits=3),
    Row("latency99", "one send in flight, p99", "ms", False, 1.0, digits=3),
    Row("pull", "pull, 32 per request, messages", "/s", True, 1.0),
    Row("startup", "up to first acknowledged send", "s", False, 4.0, absolute=True, digits=2),
    Row("memory", "memory per broker, idle, unique set", "MB", False, 80.0, absolute=True),
    Row("memory_loaded", "memory per broker right after load, without mapped files", "MB", False, 1.0),
    Row("idle", "idle CPU, all brokers together", "% of a core", False, 6.0, absolute=True, digits=1),
    Row(
        "failover",
        "kill -9 leader to next acknowledged send",
        "s",
        False,
        1.5,
        absolute=True,
        digits=2,
        systems=(OURS, DLEDGER),
    ),
    Row(
        "failover_client",
        "the same, seen by our own client",
        "s",
        False,
        1.5,
        absolute=True,
        digits=2,
        systems=(OURS,),
    ),
    Row(
        "losses",
        "acknowledged, not consumable after 3 leader kills",
        "messages",
        False,
        0.0,
        absolute=True,
        systems=(OURS, DLEDGER),
    ),
)
_LOAD_ROWS = frozenset({"sends", "cpu", "batch", "latency", "latency99", "pull", "memory_loaded"})
_IDLE_ROWS = frozenset({"memory", "idle"})
_KILL_ROWS = frozenset({"failover", "failover_client", "losses"})


@define
class Results:
    """Every value measured, by row and system, and what was said about it."""

    values: dict[str, dict[str, list[float]]] = field(factory=dict)
    generator_cpu: dict[str, dict[str, list[float]]] = field(factory=dict)
    notes: list[str] = field(factory=list)
    details: list[dict[str, Any]] = field(factory=list)

    def add(self, row: str, system: str, value: float, generator: float | None = None) -> None:
        self.values.setdefault(row, {}).setdefault(system, []).append(value)
        if generator is not None:
            self.generator_cpu.setdefault(row, {}).setdefault(system, []).append(generator)

    def note(self, text: str) -> None:
        self.notes.append(text)
        say(f"  note: {text}")

    def median(self, row: str, system: str) -> float | None:
        found = self.values.get(row, {}).get(system)
        return statistics.median(found) if found else None


def say(text: str) -> None:
    """Progress goes to stderr, so that ``--json`` leaves stdout to the result."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


@define
class Comparison:
    """One run over the chosen rows and systems.

    :param rows: keys of the rows wanted
    :param seconds: length of each stretch of load
    :param warm_seconds: load on each Apache cluster before its first measurement
    :param data: folder for the clusters' data, which the caller removes
    """

    rows: frozenset[str]
    systems: Sequence[str]
    rounds: int
    seconds: float
    warm_seconds: float
    idle_seconds: float
    kill_messages: int
    data: Path
    ours_options: Sequence[str]
    fills_page_cache: bool = True
    results: Results = field(factory=Results)
    load_before: float = field(factory=lambda: os.getloadavg()[0])

    def run(self) -> Results:
        """Everything, in turn."""
        if self.load_before > _QUIET_LOAD:
            self.results.note(f"the machine was not quiet: load average {self.load_before:.1f} before the run")
        kept: dict[str, ApacheCluster] = {}
        try:
            with self._page_cache():
                self._cold_stage(kept)
                if self.rows & _LOAD_ROWS:
                    self._load_stage(kept)
                if self.rows & _KILL_ROWS:
                    self._kill_stage(kept)
        finally:
            for cluster in kept.values():
                cluster.stop()
        return self.results

    @contextmanager
    def _page_cache(self) -> Iterator[None]:
        if not self.fills_page_cache or not self.rows & _LOAD_ROWS:
            yield
            return
        with page_cache.filled(self.data) as size:
            say(f"page cache filled with {size / 2**30:.1f} GiB")
            yield

    def _make(self, system: str) -> Cluster:
        if system == OURS:
            # Removing its data would give the memory of those pages back to the host, and the next slot would pay.
            return QuorateCluster(data=self.data, options=self.ours_options, keeps_data=True)
        return ApacheCluster(system, data=self.data)

    def _start(self, system: str, cluster: Cluster) -> None:
        """Start one cluster and take the time to its first acknowledged send."""
        begin = time.monotonic()
        cluster.start()
        probe = cluster.probe("first")
        try:
            probe.until_acknowledged(120.0)
        finally:
            probe.close()
        elapsed = time.monotonic() - begin
        if "startup" in self.rows:
            self.results.add("startup", system, elapsed)
        cluster.await_whole()
        whole = time.monotonic() - begin
        say(f"{cluster.title}: first acknowledged send after {elapsed:.2f} s, whole after {whole:.1f} s")

    def _cold_stage(self, kept: dict[str, ApacheCluster]) -> None:
        """Start every cluster once, measure it idle, keep Apache's for the stages to come."""
        for system in self.systems:
            keep = system != OURS and bool(
                self.rows & (_LOAD_ROWS | (_KILL_ROWS if system == DLEDGER else frozenset()))
            )
            if not keep and not self.rows & (_IDLE_ROWS | {"startup"}):
                continue
            cluster = self._make(system)
            try:
                self._start(system, cluster)
                if self.rows & _IDLE_ROWS:
                    self._measure_idle(system, cluster)
                if keep and isinstance(cluster, ApacheCluster):
                    kept[system] = cluster
                    if self.rows & _LOAD_ROWS:
                        self._warm(cluster)
                    cluster.freeze()
            finally:
                if system not in kept:
                    cluster.stop()

    def _measure_idle(self, system: str, cluster: Cluster) -> None:
        time.sleep(self.idle_seconds)
        pids = cluster.broker_pids
        before = processes.cpu_seconds(pids)
        begin = time.monotonic()
        time.sleep(self.idle_seconds)
        busy = (processes.cpu_seconds(pids) - before) / (time.monotonic() - begin)
        memory = statistics.fmean(processes.unique_megabytes(pid) for pid in pids)
        self.results.add("idle", system, busy * 100)
        self.results.add("memory", system, memory)
        say(f"{cluster.title}: idle {busy * 100:.1f} % of a core, {memory:.0f} MB per broker")

    def _warm(self, cluster: Cluster) -> None:
        topic = "warm"
        address = cluster.make_topic(topic, _QUEUES)
        say(f"{cluster.title}: {self.warm_seconds:.0f} s of load to warm up")
        for mode, share in (("sends", 0.6), ("batches", 0.15), ("latency", 0.1), ("pull", 0.15)):
            self._generate(mode, cluster, address, topic, seconds=self.warm_seconds * share)

    def _load_stage(self, kept: Mapping[str, ApacheCluster]) -> None:
        for number in range(1, self.rounds + 1):
            # Turned by one each round, so that no system always follows the same neighbour.
            order = [self.systems[(number - 1 + k) % len(self.systems)] for k in range(len(self.systems))]
            for system in order:
                say(f"round {number} of {self.rounds}: {system}")
                held = kept.get(system)
                if held is not None:
                    held.thaw()
                    self._load(system, held, f"load{number}")
                    held.freeze()
                    continue
                with self._make(system) as cluster:
                    self._start(system, cluster)
                    self._load(system, cluster, f"load{number}")

    def _load(self, system: str, cluster: Cluster, topic: str) -> None:
        address = cluster.make_topic(topic, _QUEUES)
        wanted = self.rows
        if wanted & {"sends", "cpu", "pull", "memory_loaded"}:
            found = self._generate("sends", cluster, address, topic, seconds=self.seconds)
            if found is not None and wanted & {"sends", "cpu"}:
                self._record("sends", system, found["per_second"], found)
                self._record("cpu", system, found["broker_us_per_message"], found)
        if wanted & {"latency", "latency99"}:
            found = self._generate("latency", cluster, address, topic, seconds=self.seconds / 2)
            if found is not None:
                self._record("latency", system, found["p50_ms"], found)
                self._record("latency99", system, found["p99_ms"], found)
        if "pull" in wanted:
            found = self._generate("pull", cluster, address, topic, seconds=self.seconds)
            if found is not None:
                self._record("pull", system, found["per_second"], found)
        if "batch" in wanted:
            found = self._generate("batches", cluster, address, topic, seconds=self.seconds)
            if found is not None:
                self._record("batch", system, found["per_second"], found)
        if "memory_loaded" in wanted:
            memory = statistics.fmean(processes.anonymous_megabytes(pid) for pid in cluster.broker_pids)
            self.results.add("memory_loaded", system, memory)

    def _record(self, row: str, system: str, value: float, found: Mapping[str, Any]) -> None:
        self.results.add(row, system, value, found["generator_cpu"])
        self.results.details.append({"row": row, "system": system, **found})

    def _generate(
        self, mode: str, cluster: Cluster, address: str, topic: str, *, seconds: float
    ) -> dict[str, Any] | None:
        pids = ",".join(str(pid) for pid in cluster.broker_pids)
        command = [sys.executable, "-m", "benchmarks.generator", mode, "--address", address, "--topic", topic]
        command += ["--broker-name", cluster.broker_name, "--queues", str(_QUEUES), "--seconds", str(seconds)]
        done = subprocess.run([*command, "--pids", pids], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            self.results.note(f"{cluster.title}, {mode}: {done.stderr.strip()[-300:]}")
            return None
        found: dict[str, Any] = json.loads(done.stdout)
        if found["errors"]:
            self.results.note(f"{cluster.title}, {mode}: answers other than 0: {found['errors']}")
        figure = found.get("per_second", found.get("p50_ms"))
        say(f"{cluster.title}: {mode} {figure:,.2f}, generator {found['generator_cpu'] * 100:.0f} % of a core")
        return found

    def _kill_stage(self, kept: Mapping[str, ApacheCluster]) -> None:
        for system in self.systems:
            if system == PLAIN:
                continue
            held = kept.get(system)
            if held is not None:
                held.thaw()
                self._kill(system, held)
                held.freeze()
                continue
            with self._make(system) as cluster:
                self._start(system, cluster)
                self._kill(system, cluster)

    def _kill(self, system: str, cluster: Cluster) -> None:
        if "failover" in self.rows:
            self._attempt(cluster, "failover", lambda: self._measure_failover(system, cluster))
        if "failover_client" in self.rows and system == OURS:
            self._attempt(cluster, "failover_client", lambda: self._measure_own_client(system, cluster))
        if "losses" in self.rows:
            self._attempt(cluster, "losses", lambda: self._measure_losses(system, cluster))

    def _attempt(self, cluster: Cluster, what: str, measure: Callable[[], None]) -> None:
        try:
            measure()
        except TimeoutError as error:
            self.results.note(f"{cluster.title}, {what}: {error}")

    def _measure_failover(self, system: str, cluster: Cluster) -> None:
        topic = "failover"
        cluster.make_topic(topic, _QUEUES)
        for _ in range(self.rounds):
            probe = cluster.probe(topic)
            try:
                probe.until_acknowledged(60.0)
                victim = cluster.kill_leader()
                seconds = probe.until_acknowledged(120.0)
            finally:
                probe.close()
            self.results.add("failover", system, seconds)
            say(f"{cluster.title}: next acknowledged send {seconds:.2f} s after kill -9")
            cluster.restart(victim.name)
            cluster.await_whole()

    def _measure_own_client(self, system: str, cluster: Cluster) -> None:
        topic = "failover"
        cluster.make_topic(topic, _QUEUES)
        for _ in range(self.rounds):
            cluster.await_whole()
            client = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.own_client", cluster.namesrv, topic],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=processes.die_with_parent,
            )
            assert client.stdout is not None
            client.stdout.readline()
            time.sleep(0.5)
            victim = cluster.kill_leader()
            killed_at = time.monotonic()
            time.sleep(5.0)
            answer, _ = client.communicate(timeout=30)
            after = [moment for moment in json.loads(answer) if moment > killed_at]
            # An answer already on its way may still arrive right after the kill: count the longest wait.
            pauses = [later - earlier for earlier, later in itertools.pairwise([killed_at, *after])]
            if not pauses:
                raise TimeoutError("no send acknowledged within 5 s")
            self.results.add("failover_client", system, max(pauses))
            say(f"{cluster.title}: own client went on {max(pauses):.2f} s after kill -9")
            cluster.restart(victim.name)

    def _measure_losses(self, system: str, cluster: Cluster) -> None:
        found = losses.measure(cluster, messages=self.kill_messages)
        self.results.add("losses", system, found.not_consumable)
        self.results.details.append({"row": "losses", "system": system, **asdict(found)})
        say(
            f"{cluster.title}: {found.not_consumable} of {found.acknowledged} acknowledged messages not consumable, "
            f"{found.consumed_twice} stored twice, pauses "
            + ", ".join(f"{gap:.2f} s" for gap in found.seconds_without_acknowledgement)
        )


def document(comparison: Comparison) -> dict[str, Any]:
    """The whole result, for ``--json`` and for files."""
    results = comparison.results
    rows = []
    for row in ROWS:
        if row.key not in results.values:
            continue
        medians = {system: results.median(row.key, system) for system in row.systems}
        rows.append(
            {
                "row": row.key,
                "title": row.title,
                "unit": row.unit,
                "values": results.values[row.key],
                "median": medians,
                "ratio_to_dledger": _ratio(medians.get(OURS), medians.get(DLEDGER)),
                "ratio_to_plain": _ratio(medians.get(OURS), medians.get(PLAIN)),
                "reached": _reached(row, medians),
                "generator_cpu": results.generator_cpu.get(row.key, {}),
                "generator_over_limit": _over_limit(results, row.key),
            }
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cores": os.cpu_count(),
            "load_average_before": comparison.load_before,
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "settings": {
            "rounds": comparison.rounds,
            "seconds": comparison.seconds,
            "warm_seconds": comparison.warm_seconds,
            "apache_heap": HEAP,
            "page_cache_filled": comparison.fills_page_cache,
        },
        "rows": rows,
        "notes": results.notes,
        "details": results.details,
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _ratio(ours: float | None, other: float | None) -> float | None:
    return ours / other if ours is not None and other else None


def _reached(row: Row, medians: Mapping[str, float | None]) -> bool | None:
    ours = medians.get(OURS)
    if ours is None:
        return None
    if row.absolute:
        return ours <= row.goal
    ratio = _ratio(ours, medians.get(DLEDGER))
    if ratio is None:
        return None
    return ratio >= row.goal if row.more_is_better else ratio <= row.goal


def _over_limit(results: Results, row: str) -> list[str]:
    measured = results.generator_cpu.get(row, {})
    return [system for system, values in measured.items() if statistics.median(values) > GENERATOR_LIMIT]


def table(found: Mapping[str, Any]) -> str:
    """The result as a Markdown table; ``*`` marks a figure whose generator used more than half a core."""
    by_key = {row.key: row for row in ROWS}
    heads = ["what", "Quorate", "Apache DLedger", "Apache plain", "/ DLedger", "/ plain", "reach now", "generator CPU"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for entry in found["rows"]:
        row = by_key[entry["row"]]
        figures = []
        for system in SYSTEMS:
            value = entry["median"].get(system)
            mark = "*" if system in entry["generator_over_limit"] else ""
            figures.append("" if value is None else f"{value:,.{row.digits}f}{mark}")
        ratios = []
        for name in ("ratio_to_dledger", "ratio_to_plain"):
            ratio = entry[name]
            ratios.append(
                "" if ratio is None else f"{ratio:.2f} x" if ratio >= 0.1 else f"1/{1 / ratio:.0f}" if ratio else "0"
            )
        verdict = {None: "", True: "yes", False: "no"}[entry["reached"]]
        generators = [
            f"{statistics.median(entry['generator_cpu'][system]):.2f}" if system in entry["generator_cpu"] else "-"
            for system in SYSTEMS
        ]
        cells = [f"{row.title}, {row.unit}", *figures, *ratios, f"{_goal(row)}: {verdict}", " ".join(generators)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _goal(row: Row) -> str:
    bound = ">=" if row.more_is_better else "<="
    if row.absolute:
        return f"{bound} {row.goal:g} {row.unit}"
    return f"{bound} {row.goal:g} x" if row.goal >= 1 else f"{bound} 1/{1 / row.goal:g}"


def _chosen(text: str, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            parser.error(f"{word!r} is none of {', '.join(known)}")
    return words


def main() -> None:
    """Measure, print the table, and with ``--out`` keep the whole result."""
    parser = argparse.ArgumentParser(description="This cluster beside Apache RocketMQ's own, in one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each stretch of load")
    parser.add_argument("--warm", type=float, default=60.0, help="seconds of load that warm Apache up")
    parser.add_argument("--only", default="", help="rows, by comma: " + ", ".join(row.key for row in ROWS))
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="any of " + ", ".join(SYSTEMS))
    parser.add_argument("--quick", action="store_true", help="one short round, barely warm: a smoke test, no figures")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--data", type=Path, help="folder for the clusters' temporary data")
    parser.add_argument("--up-option", action="append", default=[], help="one more word for our `quorate up`")
    parser.add_argument("--leave-page-cache", action="store_true", help="do not fill the page cache first")
    given = parser.parse_args()
    keys = [row.key for row in ROWS]
    rows = _chosen(given.only, keys, parser) or keys
    # So that a SIGTERM, too, ends the clusters and removes their data.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="quorate-compare-", dir=given.data) as data:
        comparison = Comparison(
            rows=frozenset(rows),
            systems=_chosen(given.systems, SYSTEMS, parser),
            rounds=1 if given.quick else given.rounds,
            seconds=2.0 if given.quick else given.seconds,
            warm_seconds=8.0 if given.quick else given.warm,
            idle_seconds=4.0 if given.quick else 15.0,
            kill_messages=800 if given.quick else losses.MESSAGES,
            data=Path(data),
            ours_options=given.up_option,
            fills_page_cache=not (given.quick or given.leave_page_cache),
        )
        try:
            comparison.run()
        except ToolMissing as error:
            print(str(error), file=sys.stderr)
            sys.exit(2)
    found = document(comparison)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    if given.json:
        print(json.dumps(found))
        return
    print(table(found))
    for note in found["notes"]:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
