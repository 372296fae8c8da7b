"""What an operator does to a cluster that runs: members come and go, folders get lost, logs are trimmed, saved and put
back, power fails. By the verbs, as a person would, on real processes."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

import quorate
from cluster.config import default_text
from runtime.real import real_env
from tests.cluster.harness import BROKERS, STATUS_EVERY_S, Cluster, cluster, config_with, free_port_base, wait_for
from tests.cluster.harness import quorate as run_quorate
from tests.cluster.workload import Promises, check_stored, fill, producing, read_all, same_logs, trim

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

TOPIC = "ledger"
SEGMENT_BYTES = 5 << 20
JOINING = """
[[group.node]]
name = "n3"
listen = "127.0.0.1:10941"
peer = "127.0.0.1:10945"
join = true
"""
SMALL_SEGMENTS = config_with(segment_bytes=SEGMENT_BYTES)
SOME = 100
"""Messages that make a load."""


def peer_address(running: Cluster, number: int) -> str:
    """As --port-base lays them out."""
    return f"127.0.0.1:{running.port_base + 15 + number}"


def refused(*arguments: str) -> str:
    """What a verb that fails says."""
    ran = run_quorate(*arguments, check=False)
    assert ran.returncode != 0, f"quorate {' '.join(arguments)} succeeded: {ran.stdout}"
    return ran.stderr


async def with_load(
    client: quorate.Client, promises: Promises, work: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Numbered messages before, while and after the work is done."""
    await client.admin.create_topic(TOPIC, queues=4)
    async with producing(client, TOPIC, promises, producers=2):
        await promises.wait_more(SOME)
        if work is not None:
            await work()
            await promises.wait_more(SOME)


def standing(running: Cluster) -> dict[str, Any]:
    return {name: one["membership"] for name, one in running.status().items() if one["kind"] == "broker"}


def starts_elsewhere(running: Cluster, config: Path) -> Cluster:
    """The same folder with every port moved, as after a move to other hosts."""
    run_quorate("down", "--data", str(running.data))
    base = free_port_base()
    flags = ("--detach", "--json", "--data", str(running.data), "--port-base", str(base), "--config", str(config))
    document = json.loads(run_quorate("up", *flags).stdout)
    return Cluster(running.data, document, base, 0.0, running.disks)


async def test_a_node_is_added_the_old_leader_removed_and_the_group_moved(tmp_path: Path) -> None:
    env = real_env()
    promises = Promises()
    with cluster(tmp_path / "data", config=default_text() + JOINING) as running:
        data = ("--data", str(running.data))
        assert await env.run_in_thread(standing, running) == {"n0": "voter", "n1": "voter", "n2": "voter", "n3": "none"}
        former = await env.run_in_thread(running.leader)

        async def change() -> None:
            # n4 is nowhere: it stays a learner, is a learner somewhere else then, and goes.
            for number in (98, 99):
                nowhere = f"127.0.0.1:{running.port_base + number}"
                said = await env.run_in_thread(
                    refused, "raft", "add-node", "n4", "--peer", nowhere, "--wait", "0.5", *data
                )
                assert f"it is not reached at {nowhere}" in said
            assert standing(running)["n3"] == "none"
            await env.run_in_thread(running.verb, "raft", "remove-node", "n4", "--yes")
            add = ("raft", "add-node", "n3", "--peer", peer_address(running, 3))
            assert (await env.run_in_thread(running.verb, *add))["voters"] == ["n0", "n1", "n2", "n3"]
            # Again, as after an interruption.
            assert (await env.run_in_thread(running.verb, *add))["voters"] == ["n0", "n1", "n2", "n3"]
            moved = await env.run_in_thread(running.verb, "raft", "transfer-leadership", "--to", "n3")
            assert moved == {"group": "broker-a", "from": former, "leader": "n3"}
            gone = await env.run_in_thread(running.verb, "raft", "remove-node", former, "--yes")
            assert former not in gone["voters"] and len(gone["voters"]) == 3
            assert "is no member" in await env.run_in_thread(refused, "raft", "remove-node", former, "--yes", *data)

        async with quorate.connect(running.namesrv) as client:
            await with_load(client, promises, change)
            assert promises.failures == []

            def is_unlisted() -> bool:
                route = running.verb("topic", "route", TOPIC)
                addresses = {"{}:{}".format(*running.address(name)): name for name in (*BROKERS, "n3")}
                return former not in {addresses[one["address"]] for one in route}

            await env.run_in_thread(wait_for, is_unlisted, 30, f"{former} leaves the route", STATUS_EVERY_S)
        shown = await env.run_in_thread(standing, running)
        assert [name for name, part in shown.items() if part == "none"] == [former]
        # The log names its members with their addresses; the configuration says where they are now.
        config = tmp_path / "data.toml"
        text = config.read_text()
        config.write_text(text.replace(f'name = "{former}"', f'name = "{former}"\nremoved = true'))
        moved_cluster = await env.run_in_thread(starts_elsewhere, running, config)
        assert former not in moved_cluster.processes()
        async with quorate.connect(moved_cluster.namesrv) as client:
            promises.note("after-0", await client.send(TOPIC, b"after-0 ", timeout=30))
            check_stored(await read_all(client, TOPIC), promises)
        await same_logs(env, moved_cluster)


async def test_a_node_removed_while_it_was_down_disturbs_nobody(tmp_path: Path) -> None:
    env = real_env()
    with cluster(tmp_path / "data", "--no-restart") as running:
        leader = running.leader()
        away = next(name for name in BROKERS if name != leader)
        running.stop(away)
        assert away not in running.verb("raft", "remove-node", away, "--yes")["voters"]
        term = running.status()[leader]["term"]
        running.restart(away)
        with trio.move_on_after(4.0):  # twice the longest election timeout
            while True:
                status = await env.run_in_thread(running.status)
                assert (status[leader]["role"], status[leader]["term"]) == ("leader", term)
                await trio.sleep(STATUS_EVERY_S)
        assert status[away]["membership"] == "none"
        doctor = await env.run_in_thread(running.verb, "doctor")
        about = {finding["about"]: finding for finding in doctor}
        assert "is no member of the group" in about[f"broker-a/{away}"]["text"]


async def test_lost_folders_are_filled_and_the_loss_of_most_is_refused(tmp_path: Path) -> None:
    env = real_env()
    promises = Promises()

    def lose(running: Cluster, *names: str) -> None:
        for name in names:
            (running.data / name).rename(tmp_path / f"lost-{name}")
            running.signal(name, signal.SIGKILL)

    with cluster(tmp_path / "data") as running:
        async with quorate.connect(running.namesrv) as client:
            leader = await env.run_in_thread(running.leader)
            other, third = (name for name in BROKERS if name != leader)
            before = running.pid(other)

            async def lose_one() -> None:
                lose(running, other)
                await env.run_in_thread(running.wait_restarted, other, before)

            await with_load(client, promises, lose_one)
            await same_logs(env, running)
            shutil.rmtree(tmp_path / f"lost-{other}")
            pids = {name: running.pid(name) for name in (other, third)}
            lose(running, other, third)

            def told() -> list[str]:
                lines = (running.data / "logs" / "supervisor.log").read_text().splitlines()
                return [event["text"] for event in map(json.loads, lines) if event["kind"] == "refused"]

            await env.run_in_thread(wait_for, lambda: len(told()) >= 2, 30, "two refusals")
            assert all("no majority; put the data back" in text for text in told())
            text = await env.run_in_thread(refused, "restart", third, "--data", str(running.data))
            assert "put the data back" in text
            for name in (other, third):
                shutil.rmtree(running.data / name, ignore_errors=True)
                (tmp_path / f"lost-{name}").rename(running.data / name)
                running.restart(name)
                assert running.pid(name) != pids[name]
            promises.note("after-0", await client.send(TOPIC, b"after-0 ", timeout=30))
            check_stored(await read_all(client, TOPIC), promises)


async def test_a_trimmed_group_restarts_and_is_saved_and_put_back(tmp_path: Path) -> None:
    env = real_env()
    promises = Promises()
    config = tmp_path / "data.toml"
    saved, put_back = tmp_path / "saved", tmp_path / "put-back"
    with cluster(tmp_path / "data", config=SMALL_SEGMENTS) as running:
        data = ("--data", str(running.data))
        async with quorate.connect(running.namesrv) as client:
            await client.admin.create_topic("early", queues=1)
            for number in range(5):
                await client.send("early", b"early-%d " % number)
            first = run_quorate("consume", "early", "--group", "g", "--from-start", "--count", "2", *data).stdout
            assert "early-1" in first
            await fill(client, "old", 4 * SEGMENT_BYTES)
            await trim(env, client, running, 2 * SEGMENT_BYTES)
            await client.send("early", b"late-0 ")
            # The group stood at offset 2, which is gone: it goes on with what there is.
            rest = run_quorate("consume", "early", "--group", "g", "--count", "1", *data).stdout
            assert "offset 5  late-0" in rest
            await with_load(client, promises)
        again = await env.run_in_thread(starts_elsewhere, running, config)
        assert {one["first_position"] for one in again.status().values() if one["kind"] == "broker"} == {
            2 * SEGMENT_BYTES
        }
        async with quorate.connect(again.namesrv) as client:
            check_stored(await read_all(client, TOPIC), promises)
        backup = again.verb("backup", str(saved))
        assert backup["node"] != again.leader()
        assert "is not empty" in refused("backup", str(saved), *data)
    restore = ("restore", str(saved), "--config", str(config), "--data")
    assert run_quorate(*restore, str(put_back)).returncode == 0
    assert "Traceback" not in refused(*restore, str(put_back))
    flags = ("--detach", "--json", "--port-base", str(free_port_base()), "--config", str(config))
    document = json.loads(run_quorate("up", *flags, "--data", str(put_back)).stdout)
    try:
        async with quorate.connect(document["namesrv"]) as client:
            promises.note("after-0", await client.send(TOPIC, b"after-0 ", timeout=30))
            check_stored(await read_all(client, TOPIC), promises)
    finally:
        run_quorate("down", "--data", str(put_back), check=False)
    largest = max((path for path in saved.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    largest.write_bytes(damaged)
    said = refused(*restore, str(tmp_path / "never"))
    assert said.startswith("quorate: ") and "Traceback" not in said and len(said.strip().splitlines()) == 1


def power_losses(findings: list[Mapping[str, str]]) -> list[str]:
    return [finding["about"] for finding in findings if "came back from a power loss" in finding["text"]]


async def test_the_doctor_says_what_a_power_loss_may_have_taken(tmp_path: Path) -> None:
    env = real_env()
    promises = Promises()
    with cluster(tmp_path / "data", config=SMALL_SEGMENTS, faults={"lose_unsynced": True}) as running:
        assert power_losses(await env.run_in_thread(running.verb, "doctor")) == []
        async with quorate.connect(running.namesrv) as client:
            await with_load(client, promises)
            pids = running.cut_power_of_all_brokers()
            await env.run_in_thread(running.wait_all_restarted, pids)
            await env.run_in_thread(running.leader)
            findings = await env.run_in_thread(running.verb, "doctor")
        assert sorted(power_losses(findings)) == [f"broker-a/{name}" for name in BROKERS]
        for finding in findings:
            if finding["about"] in power_losses(findings) and "power loss" in finding["text"]:
                assert finding["level"] == "warning" and "0.5 s of messages" in finding["text"]
                described = await env.run_in_thread(running.verb, "raft", "describe", finding["about"])
                assert f"entries up to {described['power_lost_index']:,};" in finding["text"]
        said = await env.run_in_thread(refused, "raft", "recover", "n0", "--data", str(running.data))
        assert "n0 is not recovering: there is nothing to accept" in said
