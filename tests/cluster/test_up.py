"""`up` and its companions on real processes: several clusters, groups, foreground, what a dead supervisor leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.supervisor import RESTART_AFTER_S
from runtime.processes import process_id
from tests.cluster.harness import QUORATE, Cluster, cluster, free_port_base, quorate, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def sample(verb: str) -> Any:
    """The JSON document that docs/cli.md shows for a verb."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n### {verb}\n")[2]
    found = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert found is not None, verb
    return json.loads(found[1])


def shape(document: Any) -> Any:
    """Keys in order; of lists, the set of their objects' shapes."""
    if isinstance(document, list):
        return {shape(item) for item in document}
    if isinstance(document, dict):
        return tuple(document)
    return type(document).__name__


def test_documents_are_those_of_the_page(tmp_path: Path) -> None:
    with cluster(tmp_path / "data") as running:
        assert shape(running.document) == shape(sample("up"))
        assert shape(running.document["nodes"]) == shape(sample("up")["nodes"])
        words = ("produce", "orders", "hello", "--tag", "new", "--key", "42")
        assert shape(running.verb(*words)) == shape(sample("produce"))
        message = running.verb(
            "consume", "orders", "--group", "demo", "--from-start", "--count", "1", "--timeout", "20"
        )
        assert shape(message) == shape(sample("consume"))
        assert message["body"] == "hello"
        assert shape(running.verb("ps")) == shape(sample("ps"))
        assert shape(running.verb("status")) == shape(sample("status"))
        assert running.verb("topic", "create", "audit", "--queues", "8") == sample("topic create")
        assert wait_for(lambda: len(running.verb("topic", "list")) == 2, 10, "both topics listed")
        assert running.verb("topic", "list") == sample("topic list")
        assert shape(running.verb("topic", "route", "orders")) == shape(sample("topic route"))
        assert shape(running.verb("topic", "status", "orders")) == shape(sample("topic status"))
        assert running.verb("topic", "delete", "audit", "--yes") == sample("topic delete")
        assert shape(running.verb("bench", "--duration", "0.5")) == shape(sample("bench"))
        assert shape(running.verb("kill", "n1")) == shape(sample("kill"))
        assert shape(running.verb("restart", "n1")) == shape(sample("restart"))
        assert shape(running.verb("down")) == shape(sample("down"))
        ran = quorate("ps", "--json", "--data", str(running.data), check=False)
        assert (ran.returncode, ran.stdout) == (3, "")
        assert shape(json.loads(ran.stderr)) == shape({"error": "", "exit_code": 3})


def test_two_clusters_side_by_side_one_of_two_groups(tmp_path: Path) -> None:
    with cluster(tmp_path / "one") as one, cluster(tmp_path / "two", "--groups", "2") as two:
        assert len(one.brokers()) == 3
        assert two.brokers() == ["n0", "n1", "n2", "b-n0", "b-n1", "b-n2"]
        ports = [two.address(name)[1] for name in two.processes()]
        assert all(two.port_base <= port < two.port_base + 100 for port in ports)
        receipts = two.verb("produce", "orders", "--count", "16", "--size", "10")
        assert {receipt["broker_name"] for receipt in receipts} == {"broker-a", "broker-b"}
        assert [topic["topic"] for topic in two.verb("topic", "list")] == ["orders"]
        assert one.verb("topic", "list") == []
        hit = two.verb("kill", "broker-b/leader")
        assert hit["group"] == "broker-b"
        assert hit["killed"].startswith("b-n")
        assert all(node["restarts"] == 0 for node in one.processes().values())


def held_processes(running: Cluster) -> list[Any]:
    return [process_id(pid) for name in running.processes() if (pid := running.pid(name)) is not None]


def test_a_killed_supervisor_takes_its_nodes_along(tmp_path: Path) -> None:
    with cluster(tmp_path / "data") as running:
        receipt = running.verb("produce", "orders", "kept", "--key", "k")[0]
        held = held_processes(running)
        assert len(held) == 4
        supervisor = json.loads((running.data / "up.json").read_bytes())["supervisor"]
        os.kill(supervisor["pid"], signal.SIGKILL)
        wait_for(lambda: not any(process.is_running for process in held), 5, "all nodes are gone")
        assert quorate("ps", "--data", str(running.data), check=False).returncode == 3
        base = ["--port-base", str(running.port_base)]
        again = quorate("up", "--detach", "--json", "--data", str(running.data), *base)
        assert json.loads(again.stdout)["data"] == str(running.data)
        found = running.verb("consume", "orders", "--group", "g", "--from-start", "--count", "1", "--timeout", "20")
        assert (found["body"], found["message_id"]) == ("kept", receipt["message_id"])


def test_no_restart_leaves_dead_until_asked(tmp_path: Path) -> None:
    with cluster(tmp_path / "data", "--no-restart") as running:
        assert running.verb("kill", "n2")["restarts"] is False
        running.wait_down("n2", within_s=5)
        time.sleep(RESTART_AFTER_S + 0.5)
        assert running.pid("n2") is None
        ran = quorate("status", "--data", str(running.data), "--json", check=False)
        assert ran.returncode == 5
        assert "n2" in json.loads(ran.stderr)["error"]
        assert running.verb("restart", "n2")["restarted"] == "n2"
        assert running.pid("n2") is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_shows_its_steps_and_a_signal_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    base = free_port_base()
    up = subprocess.Popen(
        [*QUORATE, "up", "--ephemeral", "--port-base", str(base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert up.stdout is not None
        lines: list[str] = []
        for line in up.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith(" try:"):
                break
        text = "\n".join(lines)
        data = re.search(r"data in (\S+) \(fresh\)", lines[0])
        assert data is not None, text
        assert Path(data[1]).is_dir()
        assert text.count("✔") == 5
        assert "leader elected: n" in text
        assert 'flush = "async": acknowledged means in the page cache of 2 of 3 nodes' in text
        hit = json.loads(quorate("kill", "leader", "--json", "--data", data[1]).stdout)["killed"]
        line = next(line for line in up.stdout if "leader elected" in line)
        assert re.search(r"n\d leader elected, term \d+, \d+\.\d\d s without leader$", line.rstrip()), line
        assert hit not in line
        up.send_signal(number)
        rest = up.stdout.read()
        assert up.wait(timeout=20) == 0
        assert rest.rstrip().endswith("stopped")
        assert not Path(data[1]).exists()
        assert up.stderr is not None
        assert up.stderr.read() == ""
    finally:
        if up.poll() is None:
            up.kill()
        up.communicate()
