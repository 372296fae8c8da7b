"""All machines lose power in one moment: what is unsynced is gone on every one of them, and the boot ids are new.

With `flush = "sync"` nothing acknowledged may be missing. With `flush = "async"` what is missing is bounded, lies at
the end, and the group comes back by the rules of a recovering majority: all members must answer, the longest log leads.

QUORATE_POWER_LOSS_ROUNDS sets the rounds of the first one (2; `.ci/full` takes 50).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

import quorate
from quorate import MessageExt, MessageQueue
from runtime.model import Env
from runtime.real import real_env
from tests.cluster.harness import BROKERS, STATUS_EVERY_S, Cluster, cluster, config_with
from tests.cluster.workload import Promises, TimedPromises, check_stored, producing, read_all, same_logs, word_of

ROUNDS = int(os.environ.get("QUORATE_POWER_LOSS_ROUNDS", "2"))
LOAD_S = 0.8
"""Longer than the flush interval of 0.5 s: some of it is synced, and some is not."""
LOST_WITHIN_S = 2.0
"""With flush = "async" a sync follows a write within 0.5 s; the rest is for the sync itself, on a busy machine."""
NO_LEADER_FOR_S = 5.0
"""Twice the longest election timeout, and more."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180 + 20 * ROUNDS)]

LOSSY = {"lose_unsynced": True, "early_write_back": 0.3}


def config(flush: str) -> str:
    """As shipped, with small segments: files of lossy disks are held in memory."""
    return config_with(flush=flush, segment_bytes=8 << 20)


async def produce_until_power_cut(
    env: Env, client: quorate.Client, topic: str, running: Cluster, promises: Promises
) -> tuple[dict[str, int], float]:
    """Load, then the cut. Returns the pids that died and the moment."""
    async with producing(client, topic, promises):
        await promises.wait_more(100)
        await trio.sleep(LOAD_S)
        pids = running.cut_power_of_all_brokers()
        cut_at = env.clock.monotonic()
    return pids, cut_at


async def test_nothing_acknowledged_is_lost_with_flush_sync(tmp_path: Path) -> None:
    env = real_env()
    everything: dict[str, Promises] = {}
    with cluster(tmp_path / "data", config=config("sync"), faults=LOSSY) as running:
        async with quorate.connect(running.namesrv) as client:
            for number in range(ROUNDS):
                topic = f"round{number}"
                await client.admin.create_topic(topic, queues=4)
                promises = everything[topic] = Promises()
                pids, _ = await produce_until_power_cut(env, client, topic, running, promises)
                await env.run_in_thread(running.wait_all_restarted, pids)
                promises.note("after-0", await client.send(topic, b"after-0 ", timeout=15))
                check_stored(await read_all(client, topic), promises)
            for topic, promises in everything.items():
                check_stored(await read_all(client, topic), promises)
            await same_logs(env, running)
    total = sum(len(promises.acknowledged) for promises in everything.values())
    print(f"{ROUNDS} power cuts of all three: {total} acknowledged, 0 lost")


def recovered(running: Cluster, name: str) -> dict[str, Any]:
    """What a node said about its log at its last start."""
    lines = (running.data / "logs" / f"{name}.log").read_text().splitlines()
    return next(said for line in reversed(lines) if (said := json.loads(line))["event"] == "log recovered")


def check_tail_only(found: Mapping[MessageQueue, list[MessageExt]], promises: Promises) -> set[str]:
    """What was acknowledged and is missing; it must be the end of each queue, and nothing else may have moved."""
    there = {word_of(message) for messages in found.values() for message in messages}
    lost = set(promises.acknowledged) - there
    kept = Promises({word: at for word, at in promises.acknowledged.items() if word not in lost}, promises.unknown)
    check_stored(found, kept)
    for queue in found:
        in_queue = [(at[2], word) for word, at in promises.acknowledged.items() if at[:2] == queue_key(queue)]
        missing = [word in lost for _, word in sorted(in_queue)]
        assert missing == sorted(missing), f"{queue}: a hole in the middle"
    return lost


def queue_key(queue: MessageQueue) -> tuple[str, int]:
    return queue.broker_name, queue.queue_id


async def test_the_longest_log_leads_and_little_is_lost_with_flush_async(tmp_path: Path) -> None:
    env = real_env()
    promises = TimedPromises(clock=env.clock)
    topic = "ledger"
    with cluster(tmp_path / "data", "--no-restart", config=config("async"), faults=LOSSY) as running:
        async with quorate.connect(running.namesrv) as client:
            await client.admin.create_topic(topic, queues=4)
            _, cut_at = await produce_until_power_cut(env, client, topic, running, promises)
            await env.run_in_thread(running.wait_down, *BROKERS)
            for name in BROKERS[:2]:
                await env.run_in_thread(running.restart, name)
                assert recovered(running, name)["recovering"] is True
            # A majority, but any of them may have forgotten what it promised: only all members together may elect.
            with trio.move_on_after(NO_LEADER_FOR_S):
                while True:
                    status = await env.run_in_thread(running.status)
                    assert [one["name"] for one in status.values() if one.get("role") == "leader"] == []
                    await trio.sleep(STATUS_EVERY_S)
            await env.run_in_thread(running.restart, BROKERS[2])
            leader = await env.run_in_thread(running.leader)
            ends = {name: recovered(running, name)["last_index"] for name in BROKERS}
            assert ends[leader] == max(ends.values()), f"{leader} leads, though the logs ended at {ends}"
            # Some unknown ones may have been stored; ahead of new messages, where they were.
            lost = check_tail_only(await read_all(client, topic), promises)
            late = {word: cut_at - promises.at[word] for word in lost}
            assert all(age < LOST_WITHIN_S for age in late.values()), f"lost, though acknowledged long before: {late}"
            await client.send(topic, b"after-0 ", timeout=15)
            await same_logs(env, running)
    oldest = max(late.values(), default=0.0)
    print(
        f"{len(promises.acknowledged)} acknowledged, {len(lost)} of the last {oldest:.2f} s lost; logs ended at {ends}"
    )
