"""The supervisor with stand-ins for nodes: start, restart, refusals, orderly stop, what it tells and what it writes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import evolve

from cluster.config import ClusterConfig, NodeSection, default_text, parse
from cluster.layout import Layout, UpRefused, lock_data, prepare, read_identity, read_up_state, write_identity
from cluster.raft_groups import GroupView, NodeView
from cluster.supervisor import Event, NotReadyInTime, StartFailed, Supervisor
from runtime.local_socket import ask_local
from runtime.model import Env
from runtime.real import real_env
from runtime.testing import wait_until

FAKE = (sys.executable, "-S", "-E", str(Path(__file__).with_name("fake_node.py")))


@pytest.fixture
def env() -> Env:
    return real_env()


async def free_config(env: Env) -> ClusterConfig:
    """The default cluster on ports that were free a moment ago."""
    config = parse(default_text(), "cluster.toml")
    listeners = [await env.net.listen("127.0.0.1", 0) for _ in range(7)]
    ports = [listener.address[1] for listener in listeners]
    for listener in listeners:
        await listener.aclose()
    nodes = tuple(
        evolve(node, listen=node.listen.at(ports[1 + 2 * k]), peer=node.peer.at(ports[2 + 2 * k]))
        for k, node in enumerate(config.groups[0].nodes)
    )
    namesrvs = (evolve(config.namesrvs[0], listen=config.namesrvs[0].listen.at(ports[0])),)
    return evolve(config, namesrvs=namesrvs, groups=(evolve(config.groups[0], nodes=nodes),))


@asynccontextmanager
async def running(env: Env, folder: Path, events: list[Event], *, restarts: bool = True) -> AsyncIterator[Supervisor]:
    (folder / "leader").write_text("n1 1")
    supervisor = Supervisor(
        env,
        await free_config(env),
        Layout(str(folder)),
        restarts_dead_nodes=restarts,
        on_event=events.append,
        command=FAKE,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        with trio.fail_after(10):
            await supervisor.ready.wait()
        yield supervisor
        supervisor.request_stop()


def up_nodes(supervisor: Supervisor) -> set[str]:
    return {node.name for node in supervisor.state().nodes if node.state == "up"}


def pids(supervisor: Supervisor) -> dict[str, int | None]:
    return {node.name: node.pid for node in supervisor.state().nodes}


async def test_start_tells_who_runs_and_stop_leaves_nothing(env: Env, tmp_path: Path) -> None:
    events: list[Event] = []
    layout = Layout(str(tmp_path))
    async with running(env, tmp_path, events) as supervisor:
        state = read_up_state(env.files, layout)
        assert state == supervisor.state()
        assert state is not None
        assert state.is_running
        document = state.document(layout.data)
        assert list(document) == ["namesrv", "data", "nodes"]
        assert [list(node) for node in document["nodes"]] == [["name", "group", "kind", "pid", "listen"]] * 3 + [
            ["name", "kind", "pid", "listen"]
        ]
        assert all(node.pid is not None for node in state.nodes)
        assert supervisor.leader_of("broker-a") == "n1"
        identity = read_identity(env.files, layout)
        assert identity is not None
        assert identity.groups["broker-a"].is_formatted
        held = [node.process for node in state.nodes]
    assert not any(process.is_running for process in held if process)
    assert read_up_state(env.files, layout) is None
    kinds = [event.kind for event in events]
    assert kinds.count("started") == kinds.count("ready") == 4
    assert kinds[-3:] == ["all_ready", "stopping", "stopped"]
    leader = next(event for event in events if event.kind == "leader")
    assert leader.text == "n1 leader elected, term 1"


async def test_format_is_asked_for_once(env: Env, tmp_path: Path) -> None:
    for _ in range(2):
        async with running(env, tmp_path, []):
            pass
    first, second = (tmp_path / "n0.starts").read_text().splitlines()
    assert "--format" in first
    assert "--format" not in second
    assert "--format" not in (tmp_path / "ns0.starts").read_text()


async def test_killed_leader_is_told_and_comes_back_after_a_second(env: Env, tmp_path: Path) -> None:
    events: list[Event] = []
    async with running(env, tmp_path, events) as supervisor:
        before = pids(supervisor)
        killed = supervisor.state().node("n1")
        assert killed is not None
        assert killed.process is not None
        killed.process.send_signal(signal.SIGKILL)
        await wait_until(lambda: "killed" in [event.kind for event in events], what="n1's end is noticed")
        (tmp_path / "leader").write_text("n2 2")
        killed_at = env.clock.monotonic()
        await wait_until(lambda: supervisor.leader_of("broker-a") == "n2", what="n2 leads")
        await wait_until(lambda: [e.kind for e in events].count("ready") == 5, what="n1 is back")
        assert env.clock.monotonic() - killed_at > 0.8
        after = pids(supervisor)
        assert after["n1"] != before["n1"]
        assert {name: after[name] for name in ("ns0", "n0", "n2")} == {
            name: before[name] for name in ("ns0", "n0", "n2")
        }
        state = read_up_state(env.files, Layout(str(tmp_path)))
        assert state is not None
        node = state.node("n1")
        assert node is not None
        assert (node.pid, node.restarts, node.state) == (after["n1"], 1, "up")
    texts = [event.text for event in events]
    assert "n1 killed by SIGKILL" in texts
    assert any(re.fullmatch(r"n2 leader elected, term 2, \d+\.\d\d s without leader", text) for text in texts)


async def test_without_restarts_dead_stays_dead_until_asked(env: Env, tmp_path: Path) -> None:
    events: list[Event] = []
    async with running(env, tmp_path, events, restarts=False) as supervisor:
        node = supervisor.state().node("n0")
        assert node is not None
        assert node.process is not None
        node.process.send_signal(signal.SIGKILL)
        await wait_until(lambda: pids(supervisor)["n0"] is None, what="n0 is down")
        await trio.sleep(1.2)
        assert pids(supervisor)["n0"] is None
        reply = await ask_local(supervisor.state().control, {"do": "restart", "node": "n0"}, timeout_s=10)
        assert reply == {"node": "n0", "pid": pids(supervisor)["n0"], "pid_before": None}
        before = pids(supervisor)["n2"]
        reply = await ask_local(supervisor.state().control, {"do": "restart", "node": "n2"}, timeout_s=10)
        assert reply["pid_before"] == before
        assert reply["pid"] == pids(supervisor)["n2"] != before
        assert "error" in await ask_local(supervisor.state().control, {"do": "restart", "node": "n9"}, timeout_s=10)
        (tmp_path / "n2.exit").write_text("its disk is gone 1")
        reply = await ask_local(supervisor.state().control, {"do": "restart", "node": "n2"}, timeout_s=10)
        assert "n2 ended before it was ready" in reply["error"] and "its disk is gone" in reply["error"]
        assert "error" in await ask_local(supervisor.state().control, {"do": "dance"}, timeout_s=10)


async def test_a_node_that_ends_at_start_is_shown_with_its_last_words(env: Env, tmp_path: Path) -> None:
    (tmp_path / "leader").write_text("n1 1")
    (tmp_path / "n2.exit").write_text("n2: the moon is in the way 3")
    supervisor = Supervisor(
        env, await free_config(env), Layout(str(tmp_path)), on_event=lambda event: None, command=FAKE
    )
    with pytest.RaisesGroup(pytest.RaisesExc(StartFailed, match=r"n2 ended with exit code 3\n.*moon is in the way")):
        await supervisor.run()
    assert read_up_state(env.files, Layout(str(tmp_path))) is None
    identity = read_identity(env.files, Layout(str(tmp_path)))
    assert identity is not None
    assert not identity.groups["broker-a"].is_formatted  # so the next start may format again


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("states", "is_left_alone"), [(("repairing", "serving"), True), (("serving", "serving"), False)]
)
async def test_nodes_that_mend_their_logs_are_left_to_it(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: tuple[str, ...], is_left_alone: bool
) -> None:
    """No leader within the time that a start has: a failure, unless nodes are at work that takes longer."""
    monkeypatch.setattr("cluster.supervisor.READY_WITHIN_S", 1.0)

    async def views(self: Supervisor, groups: list[str]) -> list[GroupView]:
        assert groups == ["broker-a"]
        said = [
            {"node_id": f"n{k}", "state": state, "waits_for": "entry 5", "members": [], "learners": []}
            for k, state in enumerate(states)
        ]
        return [
            GroupView("broker-a", tuple(NodeView(f"127.0.0.1:{k}", "broker-a", each) for k, each in enumerate(said)))
        ]

    monkeypatch.setattr(Supervisor, "_views_of", views)
    monkeypatch.setattr("cluster.supervisor._troubles_of", lambda views: [])
    (tmp_path / "leader").write_text("")
    events: list[Event] = []
    supervisor = Supervisor(env, await free_config(env), Layout(str(tmp_path)), on_event=events.append, command=FAKE)
    ended = trio.Event()

    async def run() -> None:
        try:
            await supervisor.run()
        except* NotReadyInTime:
            pass
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await wait_until(lambda: ended.is_set() or supervisor.ready.is_set(), limit=10, what="the end of the start")
        assert supervisor.ready.is_set() is is_left_alone
        if is_left_alone:
            assert supervisor.notice == "broker-a has no leader yet (n0 is repairing: entry 5)"
            assert all(node.pid is not None and node.restarts == 0 for node in supervisor.state().nodes)
            assert events[-1].text.endswith(supervisor.notice)
            supervisor.request_stop()
        await ended.wait()


@pytest.mark.cluster
async def test_a_start_may_take_long_while_a_node_is_at_work(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine, or with a long log to read. A node that only waits is given up."""
    monkeypatch.setattr("cluster.supervisor.READY_WITHIN_S", 0.6)
    monkeypatch.setattr("cluster.supervisor.PROGRESS_LOOK_S", 0.05)
    monkeypatch.setattr("cluster.supervisor.WORK_CPU_S", 0.02)
    late = tmp_path / "n2.late"
    late.write_text("work")
    (tmp_path / "leader").write_text("n1 1")
    supervisor = Supervisor(
        env, await free_config(env), Layout(str(tmp_path)), on_event=lambda event: None, command=FAKE
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        await wait_until(lambda: up_nodes(supervisor) == {"n0", "n1", "ns0"}, limit=20, what="all but n2")
        await trio.sleep(1.2)
        assert not supervisor.ready.is_set()
        late.unlink()
        await wait_until(supervisor.ready.is_set, what="the end of the start")
        assert [node.restarts for node in supervisor.state().nodes] == [0] * 4
        supervisor.request_stop()
    late.write_text("wait")
    again = Supervisor(env, await free_config(env), Layout(str(tmp_path)), on_event=lambda event: None, command=FAKE)
    with pytest.RaisesGroup(pytest.RaisesExc(NotReadyInTime, match=r"n2 not ready, and no progress seen for 1 s")):
        await again.run()


async def test_a_stop_while_a_node_is_loading_leaves_no_traceback(env: Env, tmp_path: Path) -> None:
    (tmp_path / "n2.loading").touch()
    (tmp_path / "leader").write_text("n1 1")
    layout = Layout(str(tmp_path))
    supervisor = Supervisor(env, await free_config(env), layout, on_event=lambda event: None, command=FAKE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        await wait_until(lambda: (tmp_path / "n2.starts").exists(), limit=20, what="n2 to be started")
        supervisor.request_stop()
    assert env.files.read_bytes(layout.stderr("n2")) == b""


async def refusal(env: Env, config: ClusterConfig, folder: Path) -> str:
    supervisor = Supervisor(env, config, Layout(str(folder)), on_event=lambda event: None, command=FAKE)
    with pytest.raises(UpRefused) as raised:
        await supervisor.run()
    message = str(raised.value)
    assert "\n" not in message
    return message


async def test_second_supervisor_in_the_same_folder_is_refused(env: Env, tmp_path: Path) -> None:
    async with running(env, tmp_path, []) as supervisor:
        message = await refusal(env, await free_config(env), tmp_path)
        assert f"process {supervisor.state().supervisor.pid}" in message
        assert "quorate down" in message
        assert read_up_state(env.files, Layout(str(tmp_path))) == supervisor.state()


async def test_taken_port_is_named_with_its_holder(env: Env, tmp_path: Path) -> None:
    config = await free_config(env)
    port = config.groups[0].nodes[1].peer.port
    listener = await env.net.listen("127.0.0.1", port)
    message = await refusal(env, config, tmp_path)
    await listener.aclose()
    assert f"port {port} (n1) is taken by process {env.ids.pid}" in message
    assert "--port-base" in message


async def test_a_port_that_a_connection_begins_at_is_named_too(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await env.net.listen("127.0.0.1", 0)
    with socket.create_connection(listener.address) as connection:
        port = connection.getsockname()[1]
        config = await free_config(env)
        (group,) = config.groups
        moved = evolve(group.nodes[1], peer=group.nodes[1].peer.at(port))
        config = evolve(config, groups=(evolve(group, nodes=(group.nodes[0], moved, *group.nodes[2:])),))
        monkeypatch.setattr("cluster.supervisor.outgoing_ports", lambda: (port, port))
        message = await refusal(env, config, tmp_path)
    await listener.aclose()
    assert f"port {port} (n1) is taken by a connection of process {env.ids.pid}" in message
    assert f"gives ports from {port} on to outgoing connections" in message


async def test_unwritable_folder(env: Env, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = await refusal(env, await free_config(env), tmp_path / "file" / "data")
    assert "cannot write to data folder" in message
    assert "--data" in message


async def test_foreign_folders_are_left_alone(env: Env, tmp_path: Path) -> None:
    config = await free_config(env)
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / "thesis.txt").write_text("years of work")
    assert "thesis" not in (message := await refusal(env, config, tmp_path))
    assert "no cluster.json" in message
    assert (tmp_path / "n1" / "thesis.txt").read_text() == "years of work"
    for text in ("{}", "[1]", "not JSON", '{"format": 1}'):
        (tmp_path / "cluster.json").write_text(text)
        assert "not a state file of quorate" in await refusal(env, config, tmp_path)
    (tmp_path / "cluster.json").write_text(json.dumps({"format": 99}))
    assert "newer quorate" in await refusal(env, config, tmp_path)


def lose_log(data: Path, name: str) -> None:
    (data / name / "raft" / "format.json").unlink()


async def test_one_lost_folder_of_three_joins_and_says_so(env: Env, tmp_path: Path) -> None:
    async with running(env, tmp_path, []):
        pass
    lose_log(tmp_path, "n2")
    events: list[Event] = []
    async with running(env, tmp_path, events):
        pass
    starts = {name: (tmp_path / f"{name}.starts").read_text().splitlines()[-1] for name in ("n0", "n1", "n2")}
    assert ["--join" in starts[name] for name in ("n0", "n1", "n2")] == [False, False, True]
    assert [event.node for event in events if event.kind == "blank"] == ["n2"]


async def test_a_formatted_group_that_lost_most_of_its_folders_is_refused(env: Env, tmp_path: Path) -> None:
    async with running(env, tmp_path, []):
        pass
    lose_log(tmp_path, "n1")
    lose_log(tmp_path, "n2")
    message = await refusal(env, await free_config(env), tmp_path)
    assert f"{tmp_path}/n1 and {tmp_path}/n2 have no data" in message
    assert "no majority" in message


async def test_nodes_that_lost_most_of_a_running_group_are_not_started_until_the_data_is_back(
    env: Env, tmp_path: Path
) -> None:
    events: list[Event] = []
    async with running(env, tmp_path, events) as supervisor:
        before = pids(supervisor)
        for name in ("n1", "n2"):
            lose_log(tmp_path, name)
            pid = before[name]
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: [event.kind for event in events].count("refused") == 2, limit=5, what="two refusals")
        told = [event.text for event in events if event.kind == "refused"]
        assert all(f"{tmp_path}/n1 and {tmp_path}/n2 have no data" in text for text in told)
        answer = await ask_local(supervisor.state().control, {"do": "restart", "node": "n1"}, timeout_s=10)
        assert "n1 is not started" in answer["error"]
        (tmp_path / "n2" / "raft" / "format.json").touch()
        answer = await ask_local(supervisor.state().control, {"do": "restart", "node": "n1"}, timeout_s=10)
        assert answer["pid"] == pids(supervisor)["n1"] != before["n1"]
    assert "--join" in (tmp_path / "n1.starts").read_text().splitlines()[-1]
    assert not [event for event in events if event.kind == "exited"]


@pytest.mark.cluster
async def test_a_folder_that_is_being_filled_counts_as_lost_until_it_has_all(env: Env, tmp_path: Path) -> None:
    events: list[Event] = []

    def lose(supervisor: Supervisor, name: str) -> None:
        pid = pids(supervisor)[name]
        assert pid is not None
        lose_log(tmp_path, name)
        os.kill(pid, signal.SIGKILL)

    def told(kind: str) -> list[str | None]:
        return [event.node for event in events if event.kind == kind]

    async with running(env, tmp_path, events) as supervisor:
        lose(supervisor, "n2")
        await wait_until(lambda: told("ready").count("n2") == 2, limit=5, what="n2 to be filled")
        lose(supervisor, "n1")
        await wait_until(lambda: told("refused") == ["n1"], limit=5, what="the refusal")
        assert not env.files.exists(f"{tmp_path}/n1/raft/format.json")
        (tmp_path / "n2.filled").touch()
        await wait_until(lambda: told("filled") == ["n2"], limit=5, what="n2 to have all")
        answer = await ask_local(supervisor.state().control, {"do": "restart", "node": "n1"}, timeout_s=10)
        assert "error" not in answer
    # What is still being filled when the cluster stops is so at its next start, and says when it has all.
    async with running(env, tmp_path, []):
        starts = {name: (tmp_path / f"{name}.starts").read_text().splitlines()[-1] for name in ("n0", "n1", "n2")}
        assert ["--join" in starts[name] for name in ("n0", "n1", "n2")] == [False, True, False]


async def test_a_joined_node_with_data_counts_and_a_removed_founder_is_not_missed(env: Env, tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    config = await free_config(env)
    first, second, third = config.groups[0].nodes
    joined = evolve(third, name="n3", join=True, listen=third.listen.at(9), peer=third.peer.at(10))

    def with_nodes(*nodes: NodeSection) -> ClusterConfig:
        return evolve(config, groups=(evolve(config.groups[0], nodes=nodes),))

    write_identity(env.files, layout, prepare(env, layout, config).formatted())
    for name in ("n1", "n2", "n3"):
        (tmp_path / name / "raft").mkdir(parents=True)
        (tmp_path / name / "raft" / "format.json").touch()
    gone = evolve(first, removed=True)
    with_removed = with_nodes(gone, second, third, joined)
    assert [node.name for node in with_removed.nodes()] == ["ns0", "n1", "n2", "n3"]
    prepare(env, layout, with_removed)
    lose_log(tmp_path, "n1")
    prepare(env, layout, with_removed)
    lose_log(tmp_path, "n3")
    with pytest.raises(UpRefused, match="n1 has no data"):
        prepare(env, layout, with_removed)


async def test_members_of_a_formatted_group_stay(env: Env, tmp_path: Path) -> None:
    async with running(env, tmp_path, []):
        pass
    config = await free_config(env)
    alone = evolve(config, groups=(evolve(config.groups[0], nodes=config.groups[0].nodes[:1]),))
    assert "has the nodes n0, n1, n2 here" in await refusal(env, alone, tmp_path)


async def test_identity_stays_over_restarts_and_port_changes(env: Env, tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    first = prepare(env, layout, await free_config(env))
    again = prepare(env, layout, await free_config(env))
    assert first.uuid == again.uuid
    assert again.config != first.config
    assert read_identity(env.files, layout) == again


async def test_lock_ends_with_its_holder(env: Env, tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    with lock_data(env, layout), pytest.raises(UpRefused):
        lock_data(env, layout)
    with lock_data(env, layout):
        pass
