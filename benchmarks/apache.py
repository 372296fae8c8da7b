"""Apache RocketMQ's own name server and broker, as the thing to compare with.

Maven lays out the class path (``apache_server/pom.xml``) into ``.cache/`` once; every start then needs only ``java``.
Run as a program, it keeps one cluster up until Ctrl-C: ``python -m benchmarks.apache dledger``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from attrs import define

from benchmarks import processes
from benchmarks.clusters import Cluster, Node

VERSION = "5.3.3"
REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"
HEAP = "1g"
"""Each of up to three brokers; Apache's script asks for 8 GiB, which three of them do not find here."""
DIRECT_MEMORY = "2g"

_NAMESRV_CLASS = "org.apache.rocketmq.namesrv.NamesrvStartup"
_BROKER_CLASS = "org.apache.rocketmq.broker.BrokerStartup"
# The servers reach into the JDK for off-heap buffers; Java 17 wants to be told.
_JAVA_17 = [
    f"--add-{what}=java.base/{package}=ALL-UNNAMED"
    for what in ("opens", "exports")
    for package in ("java.nio", "sun.nio.ch", "java.lang", "jdk.internal.misc", "jdk.internal.ref")
]


class ToolMissing(Exception):
    """Java or Maven is not on this machine, or Maven could not bring the servers."""


def class_path() -> str:
    """Class path of the servers, fetched by Maven when it is not in the cache.

    :raises ToolMissing: it cannot be had here
    """
    pom = REPOSITORY / "benchmarks" / "apache_server" / "pom.xml"
    target = CACHE / "apache-server" / f"classpath-{VERSION}.txt"
    if target.exists():
        found = target.read_text()
        if all(Path(jar).exists() for jar in found.split(":")):
            return found
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            raise ToolMissing(f"{tool} is not on this machine, so Apache's servers cannot be started")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:build-classpath", f"-Drocketmq.version={VERSION}"]
    command += ["-Dmdep.includeScope=runtime", f"-Dmdep.outputFile={target}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolMissing(f"Maven could not bring Apache RocketMQ {VERSION}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return target.read_text()


@define
class _Server:
    name: str
    kind: str
    address: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None


class ApacheCluster(Cluster):
    """A DLedger group of three brokers, or one plain master without replication, both with asynchronous flush.

    :param mode: ``dledger`` or ``plain``
    :param port_base: first of 60 free ports
    :param data: folder to make the temporary data folder in
    """

    def __init__(self, mode: str, port_base: int | None = None, data: Path | None = None) -> None:
        if mode not in ("dledger", "plain"):
            raise ValueError(f"no such mode: {mode}")
        self.mode = mode
        self.title = f"Apache {VERSION} " + ("DLedger" if mode == "dledger" else "plain master")
        self.broker_name = "apache-a" if mode == "dledger" else "apache-p"
        self.replicas = 3 if mode == "dledger" else 1
        self.log_copies = self.replicas
        self._base = port_base if port_base is not None else processes.free_port_base(60)
        self._parent = data
        self._folder: Path | None = None
        self._servers: list[_Server] = []
        self._frozen = False

    @property
    def namesrv(self) -> str:
        return f"127.0.0.1:{self._base}"

    @property
    def nodes(self) -> list[Node]:
        return [
            Node(server.name, server.kind, server.process.pid, server.address)
            for server in self._servers
            if server.process is not None and server.process.poll() is None
        ]

    def start(self) -> None:
        """Start every process; returns without waiting until they serve.

        :raises ToolMissing: Java or the servers are not to be had
        """
        jars = class_path()
        folder = self._folder = Path(tempfile.mkdtemp(prefix=f"apache-{self.mode}-", dir=self._parent))
        namesrv_home = folder / "namesrv"
        namesrv_file = self._write_properties(
            namesrv_home,
            {
                "listenPort": str(self._base),
                "kvConfigPath": f"{namesrv_home}/kvConfig.json",
                "configStorePath": f"{namesrv_home}/namesrv.properties",
            },
        )
        self._servers = [
            _Server(
                "namesrv",
                "namesrv",
                self.namesrv,
                self._java(namesrv_home, "256m", jars, _NAMESRV_CLASS, namesrv_file),
                namesrv_home / "out.log",
            )
        ]
        ports = [self._base + 10 + 10 * k for k in range(self.replicas)]
        peers = ";".join(f"n{k}-127.0.0.1:{port + 5}" for k, port in enumerate(ports))
        for k, port in enumerate(ports):
            home = folder / f"n{k}"
            properties = {
                "brokerClusterName": "ApacheCluster",
                "brokerName": self.broker_name,
                "brokerId": "0",
                "namesrvAddr": self.namesrv,
                "listenPort": str(port),
                "brokerIP1": "127.0.0.1",
                "brokerIP2": "127.0.0.1",
                "storePathRootDir": f"{home}/store",
                "storePathCommitLog": f"{home}/store/commitlog",
                "flushDiskType": "ASYNC_FLUSH",
                "autoCreateTopicEnable": "true",
            }
            if self.mode == "dledger":
                properties |= {
                    "enableDLegerCommitLog": "true",
                    "dLegerGroup": self.broker_name,
                    "dLegerPeers": peers,
                    "dLegerSelfId": f"n{k}",
                }
            command = self._java(home, HEAP, jars, _BROKER_CLASS, self._write_properties(home, properties))
            self._servers.append(_Server(f"n{k}", "broker", f"127.0.0.1:{port}", command, home / "out.log"))
        for server in self._servers:
            self._launch(server)

    def stop(self) -> None:
        """End every process and remove the data. May be called twice."""
        for server in self._servers:
            if server.process is not None and server.process.poll() is None:
                server.process.kill()
        for server in self._servers:
            if server.process is not None:
                server.process.wait()
        self._servers = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def restart(self, name: str) -> None:
        """Start a broker again that was killed; its data is as the kill left it."""
        server = next(server for server in self._servers if server.name == name)
        if server.process is not None:
            server.process.wait()
        self._launch(server)

    def freeze(self) -> None:
        """Stop the clock of every process (SIGSTOP), so that a warm cluster costs nothing while another is measured."""
        processes.signal_all([node.pid for node in self.nodes], signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """Let the processes go on and wait until they serve again; DLedger elects anew after a freeze."""
        if not self._frozen:
            return
        processes.signal_all([node.pid for node in self.nodes], signal.SIGCONT)
        self._frozen = False
        self.settle()

    def settle(self, quiet: float = 3.0) -> None:
        """Wait until sends have been acknowledged for ``quiet`` seconds on end.

        :raises TimeoutError: they never were
        """
        end = time.monotonic() + 180
        probe = self.probe("settle")
        try:
            good_since: float | None = None
            while good_since is None or time.monotonic() - good_since < quiet:
                if time.monotonic() > end:
                    raise TimeoutError(f"{self.title} does not settle")
                if not probe.try_send():
                    good_since = None
                elif good_since is None:
                    good_since = time.monotonic()
                time.sleep(0.05)
        finally:
            probe.close()
        self.await_whole()

    def _launch(self, server: _Server) -> None:
        with server.log.open("ab") as log:
            server.process = subprocess.Popen(
                server.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=processes.die_with_parent
            )

    @staticmethod
    def _write_properties(home: Path, properties: Mapping[str, str]) -> Path:
        (home / "conf").mkdir(parents=True)
        file = home / "conf" / "server.conf"
        file.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        return file

    @staticmethod
    def _java(home: Path, heap: str, jars: str, main: str, configuration: Path) -> list[str]:
        return [
            "java",
            f"-Xms{heap}",
            f"-Xmx{heap}",
            f"-XX:MaxDirectMemorySize={DIRECT_MEMORY}",
            *_JAVA_17,
            f"-Drocketmq.home.dir={home}",
            f"-Duser.home={home}",
            "-cp",
            jars,
            main,
            "-c",
            str(configuration),
        ]


def main() -> None:
    """Keep one cluster up until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="Apache RocketMQ's own servers on loopback, until Ctrl-C")
    parser.add_argument("mode", choices=["dledger", "plain"])
    parser.add_argument("--port-base", type=int, default=None)
    parser.add_argument("--data", type=Path, default=None)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    with ApacheCluster(arguments.mode, arguments.port_base, arguments.data) as cluster:
        begin = time.monotonic()
        cluster.start()
        probe = cluster.probe("first")
        first = probe.until_acknowledged(120)
        probe.close()
        cluster.await_whole()
        nodes = [{"name": n.name, "kind": n.kind, "pid": n.pid, "listen": n.address} for n in cluster.nodes]
        summary = {"namesrv": cluster.namesrv, "first_acknowledged_s": round(first, 2), "nodes": nodes}
        print(json.dumps(summary), flush=True)
        print(f"up after {time.monotonic() - begin:.1f} s, pid {os.getpid()}; Ctrl-C ends it", file=sys.stderr)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
