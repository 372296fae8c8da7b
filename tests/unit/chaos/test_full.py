"""The full engine: the same seed gives the same run, and what goes wrong is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from attrs import evolve
from click.testing import CliRunner

from chaos.commands import chaos_group
from chaos.sim.full import clock, groups
from chaos.sim.full.clock import probe_scheduler
from chaos.sim.full.plan import FullPlan, draw_plan
from chaos.sim.full.run import run_seed
from tests.trees import ROOT


def short(seed: int, **changes: Any) -> FullPlan:
    """A few seconds of one seed, with little to do."""
    settings = {"kind": "groups", "seconds": 3.0, "rate": 20.0, "record_bytes_max": 64, "fault_interval": 0.4}
    return evolve(draw_plan(seed), **{**settings, **changes})


def test_the_scheduler_repeats_itself() -> None:
    probe_scheduler()


def test_a_seed_is_a_run() -> None:
    first, second, other = run_seed(3, plan=short(3)), run_seed(3, plan=short(3)), run_seed(4, plan=short(4))
    assert first == second
    assert first.trace_hash != other.trace_hash
    assert first.ok and first.acknowledged and first.elections


def test_a_seed_is_the_same_run_in_another_process() -> None:
    """Whatever Python's hashes of strings are: no order of a set may get through to what happens."""
    program = (
        "from tests.unit.chaos.test_full import short\nfrom chaos.sim.full.run import run_seed\n"
        "print(run_seed(3, plan=short(3)).trace_hash)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "12345"},
    )  # fmt: skip
    assert done.stdout.strip() == run_seed(3, plan=short(3)).trace_hash


def test_a_member_that_applies_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = groups.SmallMachine.stage

    def altered(self: groups.SmallMachine, entry: Any) -> groups.Rows:
        rows = stage(self, entry)
        rows.body = rows.body[:-1]
        return rows

    monkeypatch.setattr(groups.SmallMachine, "stage", altered)
    violation = run_seed(3, plan=short(3)).violation
    assert violation is not None and "another member" in violation


def test_an_answer_before_its_commit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    put = groups.SmallMachine.put

    def hasty(self: groups.SmallMachine, group: Any, operation: groups.Operation, size: int, wall_ms: int) -> None:
        put(self, group, operation, size, wall_ms)
        self._judge.told(operation, "acknowledged")

    monkeypatch.setattr(groups.SmallMachine, "put", hasty)
    violation = run_seed(3, plan=short(3)).violation
    assert violation is not None and "is acknowledged at" in violation


def test_a_cluster_is_a_run() -> None:
    result = run_seed(3, plan=short(3, kind="cluster", seconds=1.5, rate=10.0, faults=("kill", "partition")))
    assert result.ok, result.violation
    assert result.acknowledged and result.elections


def test_a_slow_disk_without_a_next_segment_costs_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SPIN_LOOKS_MAX", 50_000)
    faults = ("slow disk", "stall")
    plan = short(5, seconds=1.0, rate=60.0, record_bytes_max=5000, faults=faults, segment_bytes=65_536, flush="async")
    result = run_seed(5, plan=plan)
    assert result.ok, result.violation
    assert result.disk_faults


def test_a_turned_bit_is_mended_from_the_other_members() -> None:
    result = run_seed(2, plan=short(2, seconds=2.0, faults=("bit flip",), flush="sync"))
    assert result.ok, result.violation
    assert result.flips


def test_the_verbs_play_and_repeat_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos.sim.full.run.draw_plan", lambda seed: short(seed, seconds=1.0))
    runner = CliRunner()
    played = runner.invoke(chaos_group, ["sim", "--full", "--start", "3", "--seeds", "1", "--json"])
    assert played.exit_code == 0, played.output
    first, totals = map(json.loads, played.output.splitlines())
    assert totals["broken"] == [] and totals["acknowledged"] == first["acknowledged"] > 0
    again = runner.invoke(chaos_group, ["replay", "--full", "3", "--json"])
    assert json.loads(again.output) == first
    assert runner.invoke(chaos_group, ["replay", "--full", "a-file.toml"]).exit_code == 2
