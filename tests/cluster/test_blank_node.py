"""A broker that lost its folder: the others fill it with whole segments, under load and on an idle cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

import quorate
from cluster.config import default_text
from runtime.model import Env
from runtime.real import real_env
from tests.cluster.harness import BROKERS, STATUS_EVERY_S, Cluster, cluster, wait_for
from tests.cluster.harness import quorate as run_quorate
from tests.cluster.workload import Promises, check_stored, produce_numbers, queues_of, read_all, same_logs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

TOPIC = "ledger"
SEGMENT_BYTES = 5 << 20
FILLED_WITHIN_S = 60.0
OLD_BYTES = 6 * SEGMENT_BYTES
KEPT_FROM = 2 * SEGMENT_BYTES
"""The head of the log is deleted, so that nothing but segments can fill a blank node."""


async def fill(client: quorate.Client) -> None:
    """Some segments of another topic, whose head is deleted afterwards."""
    await client.admin.create_topic("old", queues=4)
    body = bytes(500_000)

    async def send(count: int) -> None:
        for _ in range(count):
            await client.send("old", body, timeout=10)

    await queues_of(client, "old")
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(send, OLD_BYTES // len(body) // 4 + 1)


async def delete_head(env: Env, client: quorate.Client, running: Cluster) -> None:
    leader = await env.run_in_thread(running.leader)
    host, port = running.address(leader)
    await client.admin.raft.delete_expired(f"{host}:{port}", KEPT_FROM)

    def is_deleted() -> bool:
        return all(running.status()[name]["first_position"] == KEPT_FROM for name in BROKERS)

    await env.run_in_thread(wait_for, is_deleted, 30, "the head of every log is deleted", STATUS_EVERY_S)


@pytest.mark.parametrize("is_idle", [False, True], ids=["under load", "idle"])
async def test_an_empty_folder_is_filled_by_the_others(tmp_path: Path, is_idle: bool) -> None:
    env = real_env()
    promises = Promises()
    text = default_text().replace('flush = "async"', f'flush = "async"\nsegment_bytes = {SEGMENT_BYTES}', 1)
    with cluster(tmp_path / "data", "--no-restart", config=text) as running:
        async with quorate.connect(running.namesrv) as client:
            await fill(client)
            await delete_head(env, client, running)
            await client.admin.create_topic(TOPIC, queues=4)
            leader = await env.run_in_thread(running.leader)
            blank = next(name for name in BROKERS if name != leader)
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(produce_numbers, client, TOPIC, f"p{number}", promises, stop)
                await trio.sleep(1.0)
                if is_idle:
                    stop.set()
                running.kill(blank)
                await env.run_in_thread(wait_for, lambda: running.pid(blank) is None, 10, f"{blank} is down")
                shutil.rmtree(running.data / blank)
                started = env.clock.monotonic()
                await env.run_in_thread(run_quorate, "restart", blank, "--data", str(running.data))

                def has_log() -> bool:
                    one = running.status()[blank]
                    return (
                        one["state"] == "up"
                        and (one["committed_position"] or 0) > OLD_BYTES
                        and one["lag_entries"] is not None
                        and one["lag_entries"] < 200
                    )

                await env.run_in_thread(wait_for, has_log, FILLED_WITHIN_S, f"{blank} has the log", STATUS_EVERY_S)
                print(f"{blank} filled {env.clock.monotonic() - started:.1f} s after it was asked to start")
                stop.set()
            await same_logs(env, running, within_s=30)
            assert "segments installed" in (running.data / "logs" / f"{blank}.log").read_text()
            assert min(int(path.name) for path in (running.data / blank / "raft" / "log").glob("[0-9]" * 20)) > 0
            # It is a full member again: with another one gone, nothing is committed without it.
            running.kill(leader)
            promises.note("after-0", await client.send(TOPIC, b"after-0 ", timeout=15))
            check_stored(await read_all(client, TOPIC), promises)
