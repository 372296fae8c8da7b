"""Failover under load, a short form of `benchmarks/failover.py`: killed, frozen and restarted brokers.

The goals stand in the issue (kill p50 0.2 s, max 0.7 s; freeze 3 s; transfer 0.3 s) and are measured by the benchmark
on a quiet machine; here, where other tests may run beside, some times as much counts as broken. What is no matter of
time holds as it stands: no send fails while all are restarted, and a woken leader acknowledges nothing that is not in
the new leader's log.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.failover import GOALS_S, UpFolder, freeze_leaders, kill_leaders, percentile, restart_all
from runtime.real import real_env
from tests.cluster.harness import cluster
from tests.cluster.workload import same_logs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

SLOW_MACHINE = 3
FREEZE_MAX_S = 4.5
"""Two seconds of it are the longest election timeout, on any machine."""
SEED = 7


async def test_killed_frozen_and_restarted_leaders(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    with cluster(tmp_path / "data") as running:
        folder = UpFolder(running.data)
        killed = await kill_leaders(folder, running.namesrv, 3, rng)
        print(killed)
        assert percentile(killed["seconds"], 50) <= SLOW_MACHINE * GOALS_S["kill_p50"]
        assert max(killed["seconds"]) <= SLOW_MACHINE * GOALS_S["kill_max"]
        assert killed["failed_sends"] == 0

        frozen = await freeze_leaders(folder, running.namesrv, 1, rng)
        print(frozen)
        assert max(frozen["seconds"]) <= FREEZE_MAX_S
        assert frozen["acknowledged_after_waking"] > 0, "nobody waited at the frozen leader"
        assert frozen["not_in_new_leaders_log"] == []
        assert frozen["failed_sends"] == 0

        restarted = await restart_all(folder, running.namesrv, 1)
        print(restarted)
        assert restarted["failed_sends"] == []
        assert max(restarted["gaps"]) <= SLOW_MACHINE * GOALS_S["rolling_gap"]
        await same_logs(real_env(), running)
