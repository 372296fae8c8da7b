"""Disks that fill up, stall or fail under one broker of a running cluster: the group goes on, and nothing is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from attrs import frozen

import quorate
from dledger.store.format import CHECKPOINT_FILE
from remoting.codes import RequestCode
from runtime.model import Env
from runtime.real import real_env
from tests.cluster.harness import BROKERS, STATUS_EVERY_S, Cluster, cluster, config_with, wait_for
from tests.cluster.harness import quorate as quorate_verb
from tests.cluster.workload import Promises, TimedPromises, check_stored, producing, read_all, same_logs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

TOPIC = "ledger"
SEGMENT_BYTES = 5 << 20
PADDING = 4000
NEW_LEADER_WITHIN_S = 9.0
"""The goal is 2 s to give up leadership and 3 s in all (design §3, raft.md 4.12); the rest is for a busy machine. With
async flush a stalled sync alone tells after 10 s: it must not be that."""
NOTICED_WITHIN_S = 90.0
SLOW_WRITE_MS = 80
RELIEVED_WITHIN_S = 60.0
SILENT_S = 4.0
"""So long without an acknowledgement: what was allocated is used up."""
WITHOUT_ROOM_S = 5.0
"""Some flushes of the queues, one a second, and the try of a checkpoint."""
SMALL_DISK_BYTES = 100 << 20
LARGE_DISK_BYTES = 10 << 30
PARTS = {
    "tables": ("consumequeue", "index", "dedup"),
    "term, vote and checkpoints": ("raft",),
}
"""What is on the disk beside the log, and the folders it is in."""


def config(flush: str) -> str:
    return config_with(flush=flush, segment_bytes=SEGMENT_BYTES)


@frozen
class Load:
    """A client, and what its producers were told and when."""

    client: quorate.Client
    promises: TimedPromises


@asynccontextmanager
async def under_load(env: Env, running: Cluster) -> AsyncIterator[Load]:
    """Producers for the length of the block; afterwards everything acknowledged is there, and all logs are the same."""
    promises = TimedPromises(clock=env.clock)
    async with quorate.connect(running.namesrv) as client:
        await client.admin.create_topic(TOPIC, queues=4)
        async with producing(client, TOPIC, promises, padding=PADDING):
            await promises.wait_more(100)
            yield Load(client, promises)
        check_stored(await read_all(client, TOPIC), promises)
        await same_logs(env, running)
        print(f"{len(promises.acknowledged)} acknowledged, {len(promises.unknown)} unknown")


async def test_a_full_disk_costs_leadership_until_there_is_room_again(tmp_path: Path) -> None:
    env = real_env()
    with cluster(tmp_path / "data", config=config("async"), faults={}) as running:
        async with under_load(env, running) as load:
            full = await env.run_in_thread(running.leader)
            pid = running.pid(full)
            running.disks.change(full, free_bytes=0)  # what is allocated may be written: two segments at most
            other = await env.run_in_thread(partial(running.leader, NOTICED_WITHIN_S, other_than=full))
            print(f"{full} is full, {other} leads")
            await load.promises.wait_more(300)
            running.disks.change(full, free_bytes=None)
            await load.promises.wait_more(100)

            def caught_up() -> bool:
                one = running.status()[full]
                return one["state"] == "up" and one["lag_entries"] is not None and one["lag_entries"] < 50

            await env.run_in_thread(wait_for, caught_up, RELIEVED_WITHIN_S, f"{full} has caught up", STATUS_EVERY_S)
            assert running.pid(full) == pid, "it had to be restarted"
        assert load.promises.failures == []


@pytest.mark.parametrize(
    ("flush", "stalls"), [("sync", ("stall_syncs",)), ("async", ("stall_syncs", "stall_writes"))], ids=["sync", "async"]
)
async def test_a_stalled_disk_of_the_leader_costs_leadership_soon(
    tmp_path: Path, flush: str, stalls: tuple[str, ...]
) -> None:
    """Stalled syncs leave the loop running, with heartbeats and all; a stalled write holds it."""
    env = real_env()
    with cluster(tmp_path / "data", config=config(flush), faults={}) as running:
        async with under_load(env, running) as load:
            stalled = await env.run_in_thread(running.leader)
            pid = running.pid(stalled)
            started = env.clock.monotonic()
            running.disks.change(stalled, **dict.fromkeys(stalls, True))
            other = await env.run_in_thread(partial(running.leader, NEW_LEADER_WITHIN_S, other_than=stalled))
            await load.promises.wait_more(100)
            gap = load.promises.longest_gap(started, env.clock.monotonic())
            print(f"{stalled} stalled, {other} leads, {gap:.2f} s without an acknowledgement")
            assert gap <= NEW_LEADER_WITHIN_S
            running.disks.change(stalled, **dict.fromkeys(stalls))
            await load.promises.wait_more(100)
            assert running.pid(stalled) == pid, "it had to be restarted"


async def test_a_failed_sync_ends_the_node_and_loses_nothing(tmp_path: Path) -> None:
    """An fsync error is final: the process leaves, and reads at its next start what the disk really holds."""
    env = real_env()
    faults = {"lose_unsynced": True}
    with cluster(tmp_path / "data", config=config("sync"), faults=faults) as running:
        async with under_load(env, running) as load:
            broken = await env.run_in_thread(running.leader)
            pid = running.pid(broken)
            running.disks.change(broken, sync_fails="EIO")
            await env.run_in_thread(
                wait_for, lambda: running.pid(broken) != pid, NOTICED_WITHIN_S, f"{broken} has left"
            )
            running.disks.change(broken, sync_fails=None)
            await env.run_in_thread(running.wait_restarted, broken, pid)
            await load.promises.wait_more(200)


async def test_slow_writes_leave_the_loop_and_the_leader_stays(tmp_path: Path) -> None:
    env = real_env()
    with cluster(tmp_path / "data", config=config("async"), faults={}) as running:
        async with under_load(env, running) as load:
            slow = await env.run_in_thread(running.leader)
            host, port = running.address(slow)
            term = running.status()[slow]["term"]
            running.disks.change(slow, write_delay_ms=SLOW_WRITE_MS)
            with trio.fail_after(NOTICED_WITHIN_S):
                while not (await load.client.admin.raft.describe(f"{host}:{port}"))["is_disk_slow"]:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            started = env.clock.monotonic()
            await load.promises.wait_more(200)
            gap = load.promises.longest_gap(started, env.clock.monotonic())
            print(f"{slow} writes slowly; longest time without an acknowledgement {gap:.2f} s")
            running.disks.change(slow, write_delay_ms=None)
            status = running.status()[slow]
            assert (status["role"], status["term"]) == ("leader", term)
        assert load.promises.failures == []


@pytest.mark.parametrize(
    ("which", "flush"),
    [
        ("both followers", "async"),
        ("all", "sync"),
        pytest.param("both followers", "sync", marks=pytest.mark.slow),
        pytest.param("all", "async", marks=pytest.mark.slow),
    ],
)
async def test_disks_full_on_most_nodes_stop_sends_until_there_is_room(tmp_path: Path, flush: str, which: str) -> None:
    """Nothing is acknowledged that only one node could write, nobody dies, and room alone ends it."""
    env = real_env()
    with cluster(tmp_path / "data", config=config(flush), faults={}) as running:
        async with under_load(env, running) as load:
            leader = await env.run_in_thread(running.leader)
            pids = {name: running.pid(name) for name in BROKERS}
            full = [name for name in BROKERS if which == "all" or name != leader]
            for name in full:
                running.disks.change(name, free_bytes=0)  # what is allocated may be written: two segments at most
            with trio.fail_after(NOTICED_WITHIN_S):
                seen = -1
                while seen != len(load.promises.at):  # until the last room is used up
                    seen = len(load.promises.at)
                    await trio.sleep(SILENT_S)
            print(f"{full} are full; {seen} were answered")
            for name in full:
                running.disks.change(name, free_bytes=None)
            await load.promises.wait_more(100, within_s=RELIEVED_WITHIN_S)
            assert {name: running.pid(name) for name in BROKERS} == pids, "somebody had to be restarted"


@pytest.mark.parametrize("part", PARTS)
async def test_no_room_beside_the_log_ends_nobody_and_spoils_nothing(tmp_path: Path, part: str) -> None:
    """Checkpoints, ConsumeQueues, key index, dedup window, term and vote: they wait, and the log has it all."""
    env = real_env()
    parts = (*PARTS[part], "raft/log", "raft/rows")  # the innermost folder counts
    with cluster(tmp_path / "data", config=config("async"), faults={}, parts=parts) as running:
        async with under_load(env, running) as load:
            leader = await env.run_in_thread(running.leader)
            pids = {name: running.pid(name) for name in BROKERS}
            checkpoint = running.data / leader / "raft" / CHECKPOINT_FILE

            async def ask_for_checkpoint() -> None:
                """The tables go into one with the next look at what is to be saved, within a second."""
                address = "{}:{}".format(*running.address(leader))
                await load.client.admin.call(address, RequestCode.CLEAN_EXPIRED_CONSUMEQUEUE, timeout=30)

            for folder in PARTS[part]:
                running.disks.change(f"{leader}/{folder}", write_fails="ENOSPC")
            await ask_for_checkpoint()
            await trio.sleep(WITHOUT_ROOM_S)
            await load.promises.wait_more(100)  # the log has room: sends go on
            assert not checkpoint.exists(), "saved although there is no room"
            for folder in PARTS[part]:
                running.disks.change(f"{leader}/{folder}", write_fails=None)
            await load.promises.wait_more(100)
            await ask_for_checkpoint()
            await env.run_in_thread(wait_for, checkpoint.exists, RELIEVED_WITHIN_S, "a checkpoint", STATUS_EVERY_S)
            assert {name: running.pid(name) for name in BROKERS} == pids, "somebody had to be restarted"
        assert load.promises.failures == []
        # What is on that disk now has to be good enough for a start after a crash, and to be served from.
        await env.run_in_thread(running.kill, leader)
        await env.run_in_thread(running.wait_restarted, leader, pids[leader])
        await lead(env, running, leader)
        async with quorate.connect(running.namesrv) as client:
            check_stored(await read_all(client, TOPIC), load.promises)


async def lead(env: Env, running: Cluster, name: str) -> None:
    """Have one node lead, once it is level."""

    def leads() -> bool:
        if running.leader() == name:
            return True
        quorate_verb("raft", "transfer-leadership", "--to", name, "--data", str(running.data), check=False)
        return False

    await env.run_in_thread(wait_for, leads, RELIEVED_WITHIN_S, f"{name} leads", STATUS_EVERY_S)


@pytest.mark.slow
async def test_the_smallest_disk_decides_what_is_kept(tmp_path: Path) -> None:
    """A follower's disk fills up, the leader's does not: the group trims before that node takes no messages."""
    env = real_env()
    faults = {"total_bytes": LARGE_DISK_BYTES, "free_bytes": LARGE_DISK_BYTES}
    with cluster(tmp_path / "data", config=config("async"), faults=faults) as running:
        leader = await env.run_in_thread(running.leader)
        small = next(name for name in BROKERS if name != leader)
        # From the second watermark to a full disk it is several looks at it at the pace of the producers below: a
        # disk that is full before the TRIM comes cannot take it.
        running.disks.change(small, total_bytes=2 * SMALL_DISK_BYTES, free_bytes=SMALL_DISK_BYTES * 3 // 5)
        promises = Promises()

        def trimmed_everywhere() -> bool:
            status = running.status()
            return all(status[name]["state"] == "up" and status[name]["first_position"] > 0 for name in BROKERS)

        async with quorate.connect(running.namesrv) as client:
            await client.admin.create_topic(TOPIC, queues=4)
            async with producing(client, TOPIC, promises, pause_s=0.1, padding=10 * PADDING):
                await env.run_in_thread(wait_for, trimmed_everywhere, 150.0, "a trim on all nodes", STATUS_EVERY_S)
            host, port = running.address(small)
            counters = (await client.admin.raft.describe(f"{host}:{port}"))["counters"]
            assert counters["trimmed_alone"] == 0 and counters["trims"] >= 1
            await same_logs(env, running)
        assert promises.failures == []


async def test_above_the_third_watermark_sends_are_refused_and_pulls_go_on(tmp_path: Path) -> None:
    faults = {"total_bytes": SMALL_DISK_BYTES, "free_bytes": SMALL_DISK_BYTES}
    with cluster(tmp_path / "data", config=config("async"), faults=faults) as running:
        async with quorate.connect(running.namesrv) as client:
            await client.admin.create_topic(TOPIC, queues=4)
            await client.send(TOPIC, b"before")
            for name in BROKERS:
                running.disks.change(name, free_bytes=SMALL_DISK_BYTES // 20)
            refusal = ""
            with trio.fail_after(NOTICED_WITHIN_S):
                while not refusal:
                    try:
                        await client.send(TOPIC, b"whenever", timeout=3.0)
                    except quorate.SendFailed as error:
                        refusal = str(error)
            print(refusal)
            assert "service not available now: the disk of the broker is full" in refusal
            assert sum(len(messages) for messages in (await read_all(client, TOPIC)).values()) >= 1
            for name in BROKERS:
                running.disks.change(name, free_bytes=SMALL_DISK_BYTES)
            with trio.fail_after(RELIEVED_WITHIN_S):
                while True:
                    with suppress(quorate.SendFailed):
                        await client.send(TOPIC, b"after", timeout=3.0)
                        break
