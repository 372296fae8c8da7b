"""This project's own cluster, started the way a user starts it: ``quorate up --detach --json``."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import processes, wire
from benchmarks.clusters import Cluster, Node

REPOSITORY = Path(__file__).resolve().parent.parent
_UP_LIMIT_S = 60.0


class QuorateFailed(Exception):
    """A ``quorate`` command ended with an error."""


class QuorateCluster(Cluster):
    """One name server and one raft group of three brokers, asynchronous flush, everything else as shipped.

    :param port_base: first of 100 free ports
    :param data: folder to make the temporary data folder in
    :param options: more words for ``quorate up``
    :param keeps_data: leave the data folder in place when stopped
    """

    title = "Quorate"
    broker_name = "broker-a"
    replicas = 3
    log_copies = 3

    def __init__(
        self,
        port_base: int | None = None,
        data: Path | None = None,
        options: Sequence[str] = (),
        *,
        keeps_data: bool = False,
    ) -> None:
        self._base = port_base
        self._parent = data
        self._options = list(options)
        self._keeps_data = keeps_data
        self._folder: Path | None = None
        self._namesrv = ""
        self._pids: list[int] = []

    @property
    def namesrv(self) -> str:
        return self._namesrv

    @property
    def data(self) -> Path:
        """The data folder while the cluster runs."""
        assert self._folder is not None
        return self._folder

    @property
    def nodes(self) -> list[Node]:
        if self._folder is None:
            return []
        return [
            Node(node["name"], node["kind"], node["pid"], node["listen"])
            for node in self._run("ps", "--json")
            if node["pid"] and processes.alive(node["pid"])
        ]

    def start(self) -> None:
        """Start every process; ``up`` itself returns when the cluster serves.

        :raises QuorateFailed: it does not come up
        """
        base = self._base if self._base is not None else processes.free_port_base(100)
        self._folder = Path(tempfile.mkdtemp(prefix="quorate-bench-", dir=self._parent))
        answer = self._run("up", "--detach", "--json", "--port-base", str(base), *self._options)
        self._namesrv = answer["namesrv"]
        self._pids = [node["pid"] for node in answer["nodes"]]

    def stop(self) -> None:
        """End every process and remove the data, unless it is to be kept. May be called twice."""
        folder = self._folder
        if folder is None:
            return
        pids = self._pids
        with contextlib.suppress(QuorateFailed):
            pids = [node.pid for node in self.nodes]
        with contextlib.suppress(QuorateFailed):
            self._run("down", parse=False)
        for pid in pids:
            if not processes.wait_gone(pid, 5.0):
                processes.signal_all([pid], signal.SIGKILL)
        if not self._keeps_data:
            shutil.rmtree(folder, ignore_errors=True)
        self._folder = None

    def restart(self, name: str) -> None:
        """Wait until the supervisor has restarted the broker, which it does by itself after a second.

        :raises TimeoutError: it has not
        """

        def running() -> bool | None:
            return True if any(node.name == name for node in self.brokers) else None

        wire.wait_until(running, 20.0, f"the supervisor restarts {name}", pause=0.2)

    def _run(self, verb: str, *words: str, parse: bool = True) -> Any:
        command = [sys.executable, "-m", "cli", verb, *words, "--data", str(self._folder)]
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=_UP_LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            raise QuorateFailed(f"quorate {verb} does not return within {_UP_LIMIT_S:.0f} s") from error
        if done.returncode != 0:
            raise QuorateFailed(f"quorate {verb} ended with {done.returncode}: {done.stderr[-800:]}")
        return json.loads(done.stdout) if parse else None
