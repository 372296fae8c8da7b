"""The main promise, on real processes: leaders are killed under load, and nothing acknowledged is lost or doubled."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import trio

import quorate
from runtime.model import Env
from runtime.real import real_env
from tests.cluster.harness import Cluster, cluster, wait_for
from tests.cluster.workload import Promises, check_stored, producing, read_all, same_logs, word_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TOPIC = "ledger"
GROUP = "readers"
KILLS = 5
SOME = 500
"""Messages between two kills."""
STALLED_AFTER_S = 20.0


async def consume(client: quorate.Client, seen: set[str]) -> None:
    async with client.subscribe(TOPIC, group=GROUP, start="first") as inbox:
        async for message in inbox:
            seen.add(word_of(message))


async def watch_offsets(client: quorate.Client, answers: dict[str, list[int]]) -> None:
    """What the cluster answers about the group's progress, again and again."""
    consumer = client.pull_consumer(GROUP)
    while True:
        try:
            for queue in await consumer.queues(TOPIC):
                offset = await consumer.query(queue)
                if offset is not None:
                    answers.setdefault(str(queue), []).append(offset)
        except quorate.QuorateError:
            pass  # no leader for longer than a query waits; the next round asks again
        await trio.sleep(0.05)


async def kill_leader_and_wait(env: Env, running: Cluster) -> str:
    def once() -> str:
        before = {name: running.pid(name) for name in running.brokers()}
        hit = wait_for(lambda: kill_leader(running), 10, "a leader to kill")
        running.wait_restarted(hit, than_pid=before[hit])
        return str(hit)

    return str(await env.run_in_thread(once))


def kill_leader(running: Cluster) -> str | None:
    try:
        return running.kill("leader")
    except AssertionError as error:
        if "no leader at the moment" in str(error):
            return None
        raise


async def all_consumed(env: Env, promises: Promises, seen: set[str]) -> None:
    """Wait for as long as more arrives."""
    missing = set(promises.acknowledged) - seen
    patience = env.clock.monotonic() + STALLED_AFTER_S
    while missing:
        await trio.sleep(0.1)
        left = missing - seen
        if len(left) < len(missing):
            missing, patience = left, env.clock.monotonic() + STALLED_AFTER_S
        assert env.clock.monotonic() < patience, (
            f"acknowledged, but not consumed: {len(missing)} of {len(promises.acknowledged)}, "
            f"for example {sorted((promises.acknowledged[word], word) for word in missing)[:10]}"
        )


async def test_scenario_30_five_leader_kills_under_load_and_queue_offsets_go_on(tmp_path: Path) -> None:
    env = real_env()
    promises = Promises()
    seen: set[str] = set()
    answers: dict[str, list[int]] = {}
    with cluster(tmp_path / "data") as running:
        print(f"up in {running.up_seconds:.2f} s")
        async with quorate.connect(running.namesrv) as client, trio.open_nursery() as background:
            await client.admin.create_topic(TOPIC, queues=4)
            background.start_soon(consume, client, seen)
            background.start_soon(watch_offsets, client, answers)
            async with producing(client, TOPIC, promises):
                for _ in range(KILLS):
                    await promises.wait_more(SOME)
                    before = len(promises.acknowledged)
                    hit = await kill_leader_and_wait(env, running)
                    print(f"killed {hit}; {len(promises.acknowledged) - before} acknowledged until it was back")
                await same_logs(env, running)
                await promises.wait_more(SOME)
            assert len(running.killed) == KILLS
            found = await read_all(client, TOPIC)
            check_stored(found, promises)
            await all_consumed(env, promises, seen)
            with trio.fail_after(STALLED_AFTER_S):
                while sum(map(len, answers.values())) <= 50:  # noqa: ASYNC110 - whatever the watcher comes to
                    await trio.sleep(0.05)
            for queue, offsets in answers.items():
                back = [(a, b) for a, b in pairwise(offsets) if b < a]
                assert not back, f"offsets of {GROUP} went back in {queue}: {back}"
            await same_logs(env, running)
            background.cancel_scope.cancel()
    print(f"{len(promises.acknowledged)} acknowledged, {len(promises.unknown)} unknown, {len(seen)} consumed")


async def test_all_three_killed_at_once(tmp_path: Path) -> None:
    env = real_env()
    promises = Promises()
    with cluster(tmp_path / "data") as running:
        async with quorate.connect(running.namesrv) as client:
            await client.admin.create_topic(TOPIC, queues=4)
            async with producing(client, TOPIC, promises):
                await promises.wait_more(SOME)
                pids = running.kill_all_brokers_at_once()
            await env.run_in_thread(running.wait_all_restarted, pids)
            receipt = await client.send(TOPIC, b"after-0 ", key="after-0", timeout=15)
            promises.note("after-0", receipt)
            check_stored(await read_all(client, TOPIC), promises)
            for word, (broker_name, queue_id, queue_offset) in promises.acknowledged.items():
                matches = [m for m in await client.admin.query_by_key(TOPIC, word) if word_of(m) == word]
                assert [(m.queue_id, m.queue_offset) for m in matches] == [(queue_id, queue_offset)], (
                    f"{word} by key: {matches}, acknowledged in {broker_name} at {queue_id}/{queue_offset}"
                )
            await same_logs(env, running)
    print(f"{len(promises.acknowledged)} acknowledged and found by key, {len(promises.unknown)} unknown")
