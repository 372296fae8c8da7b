"""The arithmetic of the raft benchmarks: gaps, shares, growth, and what counts as a missed goal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import engine, failover, long_run


def test_percentiles_are_of_measured_values() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [failover.percentile(values, each) for each in (0, 20, 50, 95, 100)] == [1.0, 1.0, 3.0, 5.0, 5.0]


def test_the_first_acknowledgement_is_of_another_node_and_after_the_kill() -> None:
    load = failover.Load([(1.0, "a"), (2.0, "b"), (3.1, "a"), (3.2, "b"), (3.3, "c")])
    assert load.first_after(3.0, other_than="a") == 3.2
    assert load.first_after(3.0, other_than="z") == 3.1
    assert load.first_after(3.3, other_than="a") is None


def test_gaps_begin_and_end_with_the_window() -> None:
    load = failover.Load([(1.0, "a"), (2.0, "a"), (2.5, "a")])
    assert load.longest_gap(0.5, 2.6) == 1.0
    assert load.longest_gap(0.5, 4.0) == 1.5
    assert load.longest_gap(3.0, 5.0) == 2.0


def test_bytes_are_read_from_the_segment_that_holds_them(tmp_path: Path) -> None:
    folder = tmp_path / "n1" / "raft" / "log"
    folder.mkdir(parents=True)
    for base, text in ((0, b"0123456789"), (10, b"abcdefghij")):
        (folder / f"{base:020d}").write_bytes(text)
    up = failover.UpFolder(tmp_path)
    assert up.bytes_at("n1", 12, 3) == b"cde"
    assert up.bytes_at("n1", 4, 2) == b"45"
    assert up.bytes_at("n1", 20, 2) == b""


def test_missed_failover_goals_are_named() -> None:
    fine = {
        "kill": {"seconds": [0.1, 0.2, 0.6]},
        "freeze": {"seconds": [2.9], "not_in_new_leaders_log": [], "acknowledged_after_waking": 4},
        "rolling": {"gaps": [0.3], "failed_sends": []},
    }
    assert failover.missed(fine) == []
    assert len(failover.table(fine)) == 6
    bad = {
        "kill": {"seconds": [0.3, 0.3, 0.6]},
        "freeze": {"seconds": [3.1], "not_in_new_leaders_log": ["x at 7"]},
        "rolling": {"gaps": [0.4], "failed_sends": ["no leader"]},
    }
    assert [problem.split(":")[0] for problem in failover.missed(bad)] == [
        "kill",
        "freeze",
        "freeze",
        "rolling restart",
        "rolling restart",
    ]


def rounds_of(*rounds: dict[str, float]) -> list[dict[str, dict[str, float]]]:
    keys = ("cpu_us", "one_p50_ms", "one_p99_ms", "failed", "kill_s")
    return [{name: {"per_second": rate, **dict.fromkeys(keys, 1.0)} for name, rate in each.items()} for each in rounds]


def test_shares_are_taken_within_a_round() -> None:
    rounds = rounds_of({"async": 100, "sync": 60}, {"async": 10, "sync": 4}, {"async": 1000, "sync": 550})
    assert engine.ratio(rounds, "sync") == 0.55
    assert engine.ratio(rounds, "pysyncobj") is None
    assert engine.missed(rounds) == []
    assert engine.missed(rounds_of({"async": 100, "sync": 49, "sync_5ms": 29})) == [
        "sync: 0.49 x async, the goal is 0.5",
        "sync_5ms: 0.29 x async, the goal is 0.3",
    ]
    assert len(engine.table(rounds)) == 4


def test_descriptors_of_segments_are_told_from_all_others(tmp_path: Path) -> None:
    folder = tmp_path / "n0"
    (folder / "raft" / "log").mkdir(parents=True)
    footprint = long_run.Footprint(anonymous_mb=[100, 101, 100, 103, 104, 104], resident_mb=[200, 200, 200, 202, 202])
    assert footprint.growth == pytest.approx(0.04)
    assert footprint.resident_growth == pytest.approx(0.01)
    footprint.look(folder, os.getpid())
    with (folder / "raft" / "log" / "segment").open("wb"), (folder / "raft" / "meta").open("wb"):
        footprint.look(folder, os.getpid())
    assert footprint.more_descriptors == 1
    assert footprint.of_segments == [0, 1]


def test_missed_long_run_goals_are_named() -> None:
    def found(growth: float, more: int, vote: float, serve: float) -> dict[str, object]:
        broker = {"memory_growth": growth, "resident_growth": growth, "more_descriptors": more}
        return {
            "role_changes": {"brokers": {"n0": broker}},
            "kill": {"ready_to_vote_s": {"n0": 1.0, "n1": vote}, "serving_s": serve},
        }

    assert long_run.missed(found(0.05, 0, 3.0, 5.0)) == []
    assert len(long_run.missed(found(0.06, 1, 3.1, 5.1))) == 5


def test_what_runs_is_read_from_the_supervisors_file(tmp_path: Path) -> None:
    nodes = [
        {"name": "ns0", "kind": "namesrv", "listen": "127.0.0.1:1", "process": {"pid": 1}, "state": "up"},
        {"name": "n0", "kind": "broker", "listen": "127.0.0.1:2", "process": {"pid": 2}, "state": "up"},
        {"name": "n1", "kind": "broker", "listen": "127.0.0.1:3", "process": None, "state": "down"},
    ]
    (tmp_path / "up.json").write_text(json.dumps({"nodes": nodes}))
    found = failover.UpFolder(tmp_path).brokers()
    assert [(each.name, each.address, each.pid, each.is_up) for each in found] == [
        ("n0", "127.0.0.1:2", 2, True),
        ("n1", "127.0.0.1:3", None, False),
    ]
