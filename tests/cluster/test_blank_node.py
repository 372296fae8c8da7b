"""A broker that lost its folder: the others fill it with whole segments, under load and on an idle cluster."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import quorate
from runtime.real import real_env
from tests.cluster.harness import BROKERS, STATUS_EVERY_S, cluster, config_with, wait_for
from tests.cluster.workload import Promises, check_stored, fill, producing, read_all, same_logs, trim

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

TOPIC = "ledger"
SEGMENT_BYTES = 5 << 20
FILLED_WITHIN_S = 60.0
OLD_BYTES = 6 * SEGMENT_BYTES
KEPT_FROM = 2 * SEGMENT_BYTES
"""The head of the log is deleted, so that nothing but segments can fill a blank node."""


@pytest.mark.parametrize("is_idle", [False, True], ids=["under load", "idle"])
async def test_an_empty_folder_is_filled_by_the_others(tmp_path: Path, is_idle: bool) -> None:
    env = real_env()
    promises = Promises()
    with cluster(tmp_path / "data", "--no-restart", config=config_with(segment_bytes=SEGMENT_BYTES)) as running:

        def lose_folder(blank: str) -> None:
            running.stop(blank)
            shutil.rmtree(running.data / blank)
            started = time.monotonic()
            running.restart(blank)

            def has_log() -> bool:
                one = running.status()[blank]
                return (
                    one["state"] == "up"
                    and (one["committed_position"] or 0) > OLD_BYTES
                    and one["lag_entries"] is not None
                    and one["lag_entries"] < 200
                )

            wait_for(has_log, FILLED_WITHIN_S, f"{blank} has the log", STATUS_EVERY_S)
            print(f"{blank} filled {time.monotonic() - started:.1f} s after it was asked to start")

        async with quorate.connect(running.namesrv) as client:
            await fill(client, "old", OLD_BYTES)
            await trim(env, client, running, KEPT_FROM)
            await client.admin.create_topic(TOPIC, queues=4)
            leader = await env.run_in_thread(running.leader)
            blank = next(name for name in BROKERS if name != leader)
            async with producing(client, TOPIC, promises):
                await promises.wait_more(200)
                if not is_idle:
                    await env.run_in_thread(lose_folder, blank)
            if is_idle:
                await env.run_in_thread(lose_folder, blank)
            await same_logs(env, running, within_s=30)
            assert "segments installed" in (running.data / "logs" / f"{blank}.log").read_text()
            assert int(running.segments(blank)[0].name) > 0
            # It is a full member again: with another one gone, nothing is committed without it.
            running.kill(leader)
            promises.note("after-0", await client.send(TOPIC, b"after-0 ", timeout=15))
            check_stored(await read_all(client, TOPIC), promises)
