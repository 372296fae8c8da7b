"""A real cluster for one test: own folder and ports, started with `quorate up --detach --json`, stopped with `down`."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field

from cluster.config import default_text
from runtime.real import FAULTS_VARIABLE

QUORATE = (sys.executable, "-P", "-m", "cli")
PORTS_PER_CLUSTER = 100
VERB_WITHIN_S = 120
"""This, and the limits below, are for a busy machine: where a time counts, its test says so."""
STATUS_EVERY_S = 0.25
"""A look at the status costs a process, and may not take the machine from those it looks at."""
BROKERS = ("n0", "n1", "n2")
"""Of a cluster of one group, as shipped."""
SEGMENT_NAME_DIGITS = 20


def quorate(
    *arguments: str,
    check: bool = True,
    within_s: float = VERB_WITHIN_S,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a verb as a user would."""
    ran = subprocess.run(
        [*QUORATE, *arguments],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
        env=None if environment is None else {**os.environ, **environment},
    )
    if check and ran.returncode != 0:
        raise AssertionError(f"quorate {' '.join(arguments)} ended with {ran.returncode}: {ran.stdout}{ran.stderr}")
    return ran


def config_with(*, flush: str = "async", **settings: int) -> str:
    """The configuration as shipped, with other settings of its group."""
    text, shipped = default_text(), 'flush = "async"'
    assert text.count(shipped) == 1
    lines = [f'flush = "{flush}"', *(f"{name} = {json.dumps(value)}" for name, value in settings.items())]
    return text.replace(shipped, "\n".join(lines))


def free_port_base() -> int:
    """A base whose first ports are all free right now, away from the range that the system hands out by itself."""
    chooser = random.Random(os.getpid() * 1_000_003 + time.monotonic_ns())
    for _ in range(200):
        base = chooser.randrange(12_000, 31_000, PORTS_PER_CLUSTER)
        if all(_is_free(port) for port in range(base, base + 40)):
            return base
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for(condition: Callable[[], Any], within_s: float, what: str, every_s: float = 0.02) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {within_s:g} s")
        time.sleep(every_s)


class Disks:
    """The plan of disk faults of one cluster (see `runtime.faults`): each broker's data folder has its own."""

    def __init__(self, data: Path, path: Path | None) -> None:
        self._data = data
        self._path = path
        self._faults: dict[str, dict[str, Any]] = {}
        self._boots = 0

    @property
    def environment(self) -> dict[str, str]:
        return {} if self._path is None else {FAULTS_VARIABLE: str(self._path)}

    def start(self, brokers: Sequence[str], faults: Mapping[str, Any], parts: Sequence[str] = ()) -> None:
        """`parts` of each broker's folder may have faults of their own later."""
        self._faults = {name: dict(faults) for name in brokers}
        self._faults.update({f"{name}/{part}": dict(faults) for name in brokers for part in parts})
        self.boot_anew()

    def boot_anew(self) -> None:
        """Processes that start from now on find another boot id."""
        self._boots += 1
        self._write()

    def change(self, broker: str, **faults: Any) -> None:
        """Give one broker's disk faults besides those it has; None takes one away. BROKER/PART is a part."""
        merged = {**self._faults[broker], **faults}
        self._faults[broker] = {name: value for name, value in merged.items() if value is not None}
        self._write()

    def _write(self) -> None:
        assert self._path is not None, "this cluster was started without faults"
        folders = {str(self._data / name): faults for name, faults in self._faults.items()}
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps({"boot_id": f"boot-{self._boots}", "folders": folders}))
        aside.replace(self._path)


@define
class Cluster:
    """A running cluster and the verbs a test needs."""

    data: Path
    document: Mapping[str, Any]
    port_base: int
    up_seconds: float
    disks: Disks
    killed: list[str] = field(factory=list)

    @property
    def namesrv(self) -> str:
        return str(self.document["namesrv"])

    def verb(self, *arguments: str) -> Any:
        """A verb's JSON document."""
        return json.loads(quorate(*arguments, "--data", str(self.data), "--json").stdout)

    def processes(self) -> dict[str, dict[str, Any]]:
        """From DATA/up.json, as `ps` shows it."""
        state = json.loads((self.data / "up.json").read_bytes())
        return {node["name"]: node for node in state["nodes"]}

    def brokers(self) -> list[str]:
        return [name for name, node in self.processes().items() if node["kind"] == "broker"]

    def pid(self, name: str) -> int | None:
        process = self.processes()[name]["process"]
        return process["pid"] if process else None

    def address(self, name: str) -> tuple[str, int]:
        host, _, port = str(self.processes()[name]["listen"]).rpartition(":")
        return host, int(port)

    def kill(self, name: str) -> str:
        """`quorate kill`; returns whom it hit."""
        hit = str(self.verb("kill", name)["killed"])
        self.killed.append(hit)
        return hit

    def signal(self, name: str, number: signal.Signals) -> None:
        pid = self.pid(name)
        assert pid is not None, f"{name} does not run"
        os.kill(pid, number)

    def stop(self, name: str) -> None:
        """Kill a node of a cluster that restarts none, and see it gone."""
        self.kill(name)
        self.wait_down(name)

    def wait_down(self, *names: str, within_s: float = 30.0) -> None:
        """Until none of these nodes runs."""
        wait_for(lambda: not any(map(self.pid, names)), within_s, f"{', '.join(names)} down")

    def restart(self, name: str) -> None:
        """`quorate restart`; returns when the node is ready."""
        self.verb("restart", name)

    def kill_all_brokers_at_once(self) -> dict[str, int]:
        """Returns the pids that died."""
        pids: dict[str, int] = {}
        for name in self.brokers():
            pid = self.pid(name)
            assert pid is not None, f"{name} does not run"
            pids[name] = pid
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        return pids

    def cut_power_of_all_brokers(self) -> dict[str, int]:
        """As when all machines lose power in one moment and start again: unsynced bytes are gone, and the boot id is
        another one. Only on disks that lose what is unsynced. Returns the pids that died."""
        self.disks.boot_anew()
        return self.kill_all_brokers_at_once()

    def leader(self, within_s: float = 30.0, *, other_than: str | None = None) -> str:
        """The broker that says it leads, and serves."""

        def find() -> str | None:
            found = [one for one in self.status().values() if one.get("role") == "leader"]
            newest = max(found, key=lambda one: int(one["term"]), default=None)
            return None if newest is None or newest["name"] == other_than else str(newest["name"])

        return str(wait_for(find, within_s, "a leader", STATUS_EVERY_S))

    def wait_restarted(self, name: str, than_pid: int | None, within_s: float = 60) -> None:
        """Until the node runs in another process than before, and is ready."""
        wait_for(
            lambda: (node := self.processes()[name])["state"] == "up" and node["process"]["pid"] != than_pid,
            within_s,
            f"{name} is back",
        )

    def wait_all_restarted(self, than_pids: Mapping[str, int | None]) -> None:
        """Until each of these nodes runs in another process than before, and is ready."""
        for name, pid in than_pids.items():
            self.wait_restarted(name, pid)

    def status(self) -> dict[str, dict[str, Any]]:
        ran = quorate("status", "--data", str(self.data), "--json", check=False)
        return {one["name"]: one for one in json.loads(ran.stdout)}

    def segments(self, name: str) -> list[Path]:
        """The files of the node's log, in order."""
        return sorted((self.data / name / "raft" / "log").glob("[0-9]" * SEGMENT_NAME_DIGITS))

    def log_bytes(self, name: str, start: int, end: int) -> bytes:
        """The node's log from position `start` to `end`, read from its segment files."""
        found = bytearray()
        for path in self.segments(name):
            base, size = int(path.name), path.stat().st_size
            if base < end and base + size > start:
                with path.open("rb") as file:
                    file.seek(max(0, start - base))
                    found += file.read(min(end, base + size) - max(start, base))
        return bytes(found)

    def last_logs(self) -> str:
        """For the message of a failed test."""
        parts = []
        for path in sorted((self.data / "logs").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)


@contextmanager
def cluster(
    data: Path,
    *flags: str,
    config: str | None = None,
    faults: Mapping[str, Any] | None = None,
    parts: Sequence[str] = (),
) -> Iterator[Cluster]:
    """Start, hand over, stop. On a failure the last lines of all logs are printed.

    `faults` are those of every broker's disk from the start; without it the fault layer is off. `parts` are folders
    within a broker's that get faults of their own.
    """
    base = free_port_base()
    print(f"cluster in {data}, ports from {base}")
    disks = Disks(data, data.parent / f"{data.name}-faults.json" if faults is not None else None)
    if faults is not None:
        disks.start(BROKERS, faults, parts)
    arguments: list[str] = ["up", "--detach", "--json", "--data", str(data), "--port-base", str(base), *flags]
    if config is not None:
        path = data.parent / f"{data.name}.toml"
        path.write_text(config)
        arguments += ["--config", str(path)]
    started = time.monotonic()
    ran = quorate(*arguments, environment=disks.environment)
    running = Cluster(data, json.loads(ran.stdout), base, time.monotonic() - started, disks)
    try:
        yield running
    except BaseException:
        print(running.last_logs())
        raise
    finally:
        quorate("down", "--data", str(data), check=False)


def differing(parts: Sequence[bytes]) -> int | None:
    """Index of the first byte in which they differ, None when they are the same."""
    if all(part == parts[0] for part in parts):
        return None
    same, different = 0, min(map(len, parts)) + 1
    while different - same > 1:
        middle = (same + different) // 2
        if all(part[same:middle] == parts[0][same:middle] for part in parts):
            same = middle
        else:
            different = middle
    return same
