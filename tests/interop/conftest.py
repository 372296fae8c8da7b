"""Builds the stock clients' programs, starts the clusters they talk to, and runs each program once for all its tests.

``INTEROP_NAMESRV=host:port`` runs everything against an outside cluster instead, Apache RocketMQ's own for example,
which is how the programs themselves are proven right.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field, frozen

from benchmarks import processes, wire

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CACHE = REPOSITORY / ".cache" / "interop"
JAVA_VERSIONS = ("4.9.8", "5.3.3")
NODE_TOPICS = ("retry_dlq", "sync", "async", "ordered", "tag")
JOINING = """
[[group.node]]
name = "n3"
listen = "127.0.0.1:10941"
peer = "127.0.0.1:10945"
join = true
"""
_BUILD_LIMIT_S = 400
_RUN_LIMIT_S = 200


@frozen
class Target:
    """The cluster under test."""

    namesrv: str
    groups: int
    """Broker names with a leader."""
    data: Path | None = None
    """Our cluster's data folder, ``None`` for an outside cluster."""

    @property
    def pids_known(self) -> bool:
        """True where the cluster's processes are ours to kill."""
        return self.data is not None

    def brokers(self) -> dict[int, str]:
        """Addresses of the running brokers by process id."""
        return {node["pid"]: node["listen"] for node in self.quorate("ps") if node["kind"] == "broker"}

    def quorate(self, *words: str) -> Any:
        """What a verb of `quorate` says about this cluster, as JSON."""
        command = [sys.executable, "-m", "cli", *words, "--json", "--data", str(self.data)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@frozen
class Outcome:
    """What a program said about one scenario."""

    ok: bool
    detail: str
    milliseconds: int


def _need(tool: str, what: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not on this machine, so {what} cannot run")


def _build(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_BUILD_LIMIT_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def _fingerprint(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# Programs.


def java_class_path(version: str) -> str:
    """Compiled programs and the client's jars, built by Maven unless the cache has them."""
    _need("java", "the Java clients")
    _need("mvn", "the Java clients")
    folder = HERE / "java"
    sources = [folder / "pom.xml", *folder.glob("src/**/*.java")]
    build = CACHE / f"java-{version}-{_fingerprint(*sources)}"
    jars = build / "classpath.txt"
    if not jars.exists() or not all(Path(jar).exists() for jar in jars.read_text().split(":")):
        command = ["mvn", "-q", "-B", f"-Drocketmq.version={version}", f"-Dinterop.build={build}"]
        command += ["compile", "dependency:build-classpath", "-Dmdep.includeScope=runtime"]
        _build([*command, f"-Dmdep.outputFile={jars}.new"], folder)
        jars.with_name("classpath.txt.new").rename(jars)
    return f"{build / 'classes'}:{jars.read_text()}"


def java_command(version: str, main: str, home: Path) -> list[str]:
    """Words that start one of our Java programs; its client logs stay under ``home``."""
    command = ["java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", f"-Duser.home={home}"]
    # The stock client then shares queues out anew each 2 s instead of 20.
    command += ["-Drocketmq.client.rebalance.waitInterval=2000"]
    return [*command, "-cp", java_class_path(version), f"quorate.interop.{main}"]


def go_program() -> Path:
    """The Go program, built unless the cache has it."""
    _need("go", "the Go client")
    folder = HERE / "go"
    program = CACHE / f"go-{_fingerprint(*folder.glob('*.go'), folder / 'go.mod', folder / 'go.sum')}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        _build(["go", "build", "-o", str(program), "."], folder)
    return program


def node_program() -> Path:
    """The Node program beside its installed client."""
    _need("node", "the Node client")
    _need("npm", "the Node client")
    folder = HERE / "node"
    installed = CACHE / f"node-{_fingerprint(folder / 'package.json', folder / 'package-lock.json')}"
    if not (installed / "node_modules" / "ali-ons").exists():
        installed.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(folder / name, installed / name)
        _build(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], installed)
    shutil.copy(folder / "main.js", installed / "main.js")
    return installed / "main.js"


def run_program(command: Sequence[str]) -> dict[str, Outcome]:
    """Run a program to its end and read its JSON lines.

    :returns: outcome by scenario
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_RUN_LIMIT_S)
    outcomes = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"scenario"'):
            said: dict[str, Any] = json.loads(line)
            outcomes[said["scenario"]] = Outcome(said["ok"], said["detail"], said["ms"])
    assert outcomes, f"{command[0]} said nothing: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (done.returncode == 0) == all(outcome.ok for outcome in outcomes.values()), "exit code and lines disagree"
    return outcomes


# Clusters.


def _leaders(namesrv: str, groups: int) -> dict[str, str]:
    def all_there() -> dict[str, str] | None:
        route = wire.query_route(namesrv, wire.TEMPLATE_TOPIC)
        if route is None or len(route.leaders) < groups:
            return None
        return route.leaders

    return wire.wait_until(all_there, 30.0, f"{groups} leaders in the route")


def make_topics(target: Target, names: Sequence[str], queues: int = 4) -> None:
    """Create topics on every leader and wait until the name server knows them all there."""
    leaders = _leaders(target.namesrv, target.groups)
    for name in names:
        for address in leaders.values():
            wire.create_topic(address, name, queues)

    def known(name: str) -> bool | None:
        route = wire.query_route(target.namesrv, name)
        return True if route is not None and len(route.queues) >= len(leaders) else None

    for name in names:
        wire.wait_until(lambda name=name: known(name), 30.0, f"route of {name}")  # type: ignore[misc]


def _our_cluster(data: Path, groups: int, config: Path | None = None) -> Iterator[Target]:
    base = processes.free_port_base(100, start=random.randrange(12_000, 29_000, 100), stop=31_000)
    quorate = [sys.executable, "-m", "cli"]
    command = [*quorate, "up", "--detach", "--json", "--port-base", str(base), "--groups", str(groups)]
    command += [] if config is None else ["--config", str(config)]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "--data", str(data)], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 0, f"quorate up: {done.stdout}{done.stderr}"
    document = json.loads(done.stdout)
    try:
        _leaders(document["namesrv"], groups)
        print(f"quorate up with {groups} groups took {time.monotonic() - begin:.1f} s")
        yield Target(document["namesrv"], groups, data)
    finally:
        subprocess.run([*quorate, "down", "--data", str(data)], cwd=REPOSITORY, check=False, timeout=60)


def _outside_namesrv() -> str | None:
    return os.environ.get("INTEROP_NAMESRV")


def _outside() -> Target | None:
    namesrv = _outside_namesrv()
    if not namesrv:
        return None
    route = wire.query_route(namesrv, wire.TEMPLATE_TOPIC)
    assert route is not None, f"{namesrv} has no broker with the template topic"
    return Target(namesrv, len(route.leaders))


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One raft group of three brokers, or the outside cluster."""
    outside = _outside()
    if outside is not None:
        yield outside
        return
    yield from _our_cluster(tmp_path_factory.mktemp("one-group"), 1)


@pytest.fixture(scope="session")
def two_groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Two raft groups of three brokers each."""
    if _outside_namesrv():
        pytest.skip("an outside cluster is under test, which has the groups it has")
    yield from _our_cluster(tmp_path_factory.mktemp("two-groups"), 2)


@pytest.fixture(scope="module")
def four_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One raft group of three brokers, with a fourth one beside it that is no member yet."""
    if _outside_namesrv():
        pytest.skip("an outside cluster is under test, which has the members it has")
    folder = tmp_path_factory.mktemp("four-nodes")
    config = folder / "cluster.toml"
    config.write_text((REPOSITORY / "cluster.toml").read_text() + JOINING)
    yield from _our_cluster(folder / "data", 1, config)


@pytest.fixture(scope="session")
def suffix() -> str:
    """Word that makes topics and groups of this run unique; an outside cluster may have seen others."""
    return f"{random.randrange(16**6):06x}"


@define
class Programs:
    """Runs each client's program at most once for one cluster and remembers what it said."""

    target: Target
    suffix: str
    home: Path
    _said: dict[str, dict[str, Outcome] | BaseException] = field(factory=dict)

    def outcome(self, client: str, scenario: str) -> Outcome:
        """What the client's program said about the scenario, running the program if it has not run."""
        if client not in self._said:
            try:
                self._said[client] = self._run(client)
            except pytest.skip.Exception as missing:
                self._said[client] = missing
        said = self._said[client]
        if isinstance(said, BaseException):
            raise said
        assert scenario in said, f"{client} said nothing about {scenario}, only about {sorted(said)}"
        return said[scenario]

    def word(self, client: str) -> str:
        """The client's own suffix, so that two versions of one client do not meet in a topic."""
        return f"{client.rpartition('-')[2].replace('.', '')}_{self.suffix}"

    def _run(self, client: str) -> dict[str, Outcome]:
        words = [self.target.namesrv, self.word(client)]
        language, _, version = client.partition("-")
        if language == "java":
            return run_program([*java_command(version, "Main", self.home), *words])
        if language == "go":
            return run_program([str(go_program()), *words])
        program = node_program()
        make_topics(self.target, [f"Node_{name}_{words[1]}" for name in NODE_TOPICS])
        return run_program(["node", str(program), *words])


@pytest.fixture(scope="session")
def programs(target: Target, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The clients' programs against one group."""
    return Programs(target, suffix, tmp_path_factory.mktemp("client-home"))


@pytest.fixture(scope="session")
def programs_two_groups(two_groups: Target, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The clients' programs against two groups."""
    return Programs(two_groups, suffix, tmp_path_factory.mktemp("client-home-two"))


@pytest.fixture(scope="session")
def new_topics() -> Callable[[Target, Sequence[str]], None]:
    """Makes topics before a program needs them."""
    return make_topics


@pytest.fixture
def start_java(tmp_path: Path) -> Callable[..., AbstractContextManager[subprocess.Popen[str]]]:
    """Starts one of our Java programs with the 5.3.3 client and default settings; ends it with the context."""

    @contextmanager
    def start(main: str, *words: str) -> Iterator[subprocess.Popen[str]]:
        command = [*java_command("5.3.3", main, tmp_path), *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    return start


# mqadmin.


@define
class MqAdmin:
    """Stock mqadmin 5.3.3, its commands run one after another in one JVM where they allow it."""

    namesrv: str
    command: list[str]
    process: subprocess.Popen[str]

    def run(self, command: str, *words: str) -> str:
        """Everything the sub-command prints.

        :raises AssertionError: it says that it failed, or prints a stack trace
        """
        text = self.attempt(command, *words)
        assert "Exception" not in text and "failed" not in text, text
        return text

    def attempt(self, command: str, *words: str) -> str:
        """Everything the sub-command prints, whether it worked or not."""
        line = "\t".join([command, *words, "-n", self.namesrv]) + "\n"
        if command == "sendMessage":
            # The tool keeps the producer it shut down, so a second one in the same JVM would fail.
            done = subprocess.run(self.command, input=line, capture_output=True, text=True, check=True, timeout=60)
            return done.stdout
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()
        lines: list[str] = []
        for line in self.process.stdout:
            if line.startswith("@@@ end"):
                return "".join(lines)
            if line.startswith("@@@ begin"):
                lines.clear()
            else:
                lines.append(line)
        raise AssertionError(f"mqadmin {command} ended the JVM: {''.join(lines)}")

    def table(self, command: str, *words: str) -> list[dict[str, str]]:
        """The printed table, one mapping of heading to cell for each row; only the last cell may be empty."""
        lines = iter(self.run(command, *words).splitlines())
        head = next(line for line in lines if line.startswith("#"))
        heads = [cell.strip() for cell in head.split("#") if cell.strip()]
        rows = []
        for line in lines:
            if not line.strip():
                break
            rows.append(dict(zip(heads, line.split(), strict=False)))
        return rows


@pytest.fixture(scope="session")
def mqadmin(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MqAdmin]:
    """mqadmin against one group."""
    yield from _mqadmin(target, tmp_path_factory.mktemp("mqadmin-home"))


@pytest.fixture(scope="module")
def mqadmin_of_four(four_nodes: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MqAdmin]:
    """mqadmin against the group whose members change."""
    yield from _mqadmin(four_nodes, tmp_path_factory.mktemp("mqadmin-home"))


def _mqadmin(target: Target, home: Path) -> Iterator[MqAdmin]:
    command = java_command("5.3.3", "Admin", home)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield MqAdmin(target.namesrv, command, process)
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
