"""The full engine: the same seed gives the same run, and what goes wrong is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from attrs import evolve
from click.testing import CliRunner

from broker.state import BrokerState
from chaos import commands
from chaos.commands import chaos_group
from chaos.sim.full import clock, cluster, groups
from chaos.sim.full.clock import VirtualTime, probe_scheduler, run_virtually
from chaos.sim.full.cluster import ClusterSubject, Sent
from chaos.sim.full.machine import Process
from chaos.sim.full.plan import FullPlan, draw_plan
from chaos.sim.full.run import FULL, run_plan
from chaos.sim.full.world import World
from chaos.sim.scenario import BadScenario, Scenario, read_scenario, write_scenario
from chaos.sim.schedule import draw_schedule
from tests.trees import ROOT


def short(seed: int, **changes: Any) -> FullPlan:
    """A few seconds of one seed, with little to do."""
    settings = {
        "kind": "groups",
        "fault_seconds": 4.0,
        "spares": 0,
        "rate": 20.0,
        "record_bytes_max": 64,
        "fault_interval": 0.4,
    }
    return evolve(draw_plan(seed), **{**settings, **changes})


def test_the_scheduler_repeats_itself() -> None:
    probe_scheduler()


@pytest.mark.chaos
def test_a_seed_is_a_run() -> None:
    first, second, other = run_plan(short(3)), run_plan(short(3)), run_plan(short(4))
    assert first == second
    assert first.trace_hash != other.trace_hash
    assert first.ok and first.counts["acknowledged"] and first.counts["elections"]


@pytest.mark.chaos
def test_a_seed_is_the_same_run_in_another_process() -> None:
    """Whatever Python's hashes of strings are: no order of a set may get through to what happens."""
    program = (
        "from tests.unit.chaos.test_full import short\nfrom chaos.sim.full.run import run_plan\n"
        "print(run_plan(short(3)).trace_hash)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "12345"},
    )  # fmt: skip
    assert done.stdout.strip() == run_plan(short(3)).trace_hash


def test_a_member_that_applies_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = groups.SmallMachine.stage

    def altered(self: groups.SmallMachine, entry: Any) -> groups.Rows:
        rows = stage(self, entry)
        rows.body = rows.body[:-1]
        return rows

    monkeypatch.setattr(groups.SmallMachine, "stage", altered)
    violation = run_plan(short(3)).violation
    assert violation is not None and "another member" in violation


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposers are told of success before anything is committed."""
    put = groups.SmallMachine.put

    def put_and_tell(
        self: groups.SmallMachine, group: Any, operation: groups.Operation, size: int, wall_ms: int
    ) -> None:
        put(self, group, operation, size, wall_ms)
        self._judge.told(operation, "acknowledged")

    monkeypatch.setattr(groups.SmallMachine, "put", put_and_tell)


@pytest.mark.usefixtures("hasty")
def test_an_answer_before_its_commit_is_found() -> None:
    violation = run_plan(short(3)).violation
    assert violation is not None and "is acknowledged at" in violation


def test_a_cluster_is_a_run() -> None:
    result = run_plan(short(3, kind="cluster", fault_seconds=2.5, rate=10.0, kinds=("kill", "partition")))
    assert result.ok, result.violation
    assert result.counts["acknowledged"] and result.counts["elections"]


def test_a_slow_disk_without_a_next_segment_costs_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SPIN_LOOKS_MAX", 50_000)
    kinds = ("slow disk", "stall")
    plan = short(
        5, fault_seconds=2.0, rate=60.0, record_bytes_max=5000, kinds=kinds, segment_bytes=65_536, flush="async"
    )
    result = run_plan(plan)
    assert result.ok, result.violation
    assert result.counts["disk_faults"]


def test_a_turned_bit_is_mended_from_the_other_members() -> None:
    result = run_plan(short(2, fault_seconds=3.0, kinds=("bit flip",), flush="sync"))
    assert result.ok, result.violation
    assert result.counts["flips"]


# Members come and go, the log is trimmed


def busy(seed: int, **changes: Any) -> FullPlan:
    """Many changes of members, and a log that retention keeps short."""
    settings = {"fault_seconds": 9.0, "spares": 2, "kinds": ("members", "retention"), "fault_interval": 0.25}
    sizes = {"rate": 60.0, "record_bytes_max": 3000, "segment_bytes": 65_536, "retention_bytes": 4 * 65_536}
    return short(seed, **{**settings, **sizes, "retention_seconds": 1.0, "latency": 0.0005, "jitter": 0.0, **changes})


def test_a_node_that_nobody_wants_any_more_does_not_come_back_however_it_went_down() -> None:
    lives: list[int] = []

    class Idle:
        async def run_node(self, process: Process, task_status: trio.TaskStatus[Any]) -> None:
            lives.append(process.number)
            await trio.sleep_forever()

    subject: Any = Idle()

    async def main(time: VirtualTime) -> None:
        world = World(short(1), (), time)
        machine = world.add_machine("n0")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.agenda.run)
            nursery.start_soon(world.keep_running, subject, "n0")
            await trio.sleep(1.0)
            world.end_life("n0", power=False, down_seconds=2.0)
            machine.is_spare = True
            await trio.sleep(10.0)
            assert lives == [1]
            machine.is_spare = False
            await trio.sleep(1.0)
            assert lives == [1, 2]
            nursery.cancel_scope.cancel()

    run_virtually(main, 1, lambda: None)


def test_a_cluster_that_does_not_settle_for_want_of_a_leader_is_said_to_have_none() -> None:
    subject = ClusterSubject(World(short(1, kind="cluster"), (), VirtualTime(lambda: None)))
    subject.book.sent.append(Sent(0, outcome="refused"))
    assert subject.unsettled() == "no leader"


@pytest.mark.chaos
def test_members_join_are_promoted_and_leave_while_the_log_is_trimmed() -> None:
    result = run_plan(busy(1), keep_trace=True)
    assert result.ok, result.violation
    done = " ".join(line for line in result.trace if line.endswith(": done"))
    assert all(step in done for step in ("AddLearner", "Promote", "Remove")), done
    assert result.counts["changes"] >= 3 and result.counts["trims"], result.counts


@pytest.mark.chaos
def test_brokers_join_and_leave_while_consumers_and_delayed_messages_live() -> None:
    result = run_plan(busy(2, kind="cluster", rate=40.0, fault_seconds=6.0))
    assert result.ok, result.violation
    assert result.counts["changes"] and result.counts["trims"], result.counts


@pytest.mark.chaos
def test_retention_that_takes_what_is_still_to_be_delivered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "DELAYED_SHARE", 0.3)
    monkeypatch.setattr(BrokerState, "trim_floor", lambda self: 1 << 62)
    plan = busy(2, kind="cluster", rate=60.0, fault_seconds=6.0, retention_seconds=0.2, kinds=("retention",))
    violation = run_plan(plan).violation
    assert violation is not None and "acknowledged messages are not delivered" in violation


# Shrinking


@pytest.mark.chaos
@pytest.mark.usefixtures("hasty")
def test_a_failing_run_is_shrunk_to_a_file_that_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_engine", lambda name: evolve(FULL, draw_plan=short))
    runner = CliRunner()
    path = tmp_path / "3.toml"
    shrunk = runner.invoke(chaos_group, ["shrink", "--full", "3", "--out", str(path)])
    assert shrunk.exit_code == 1, shrunk.output
    scenario = read_scenario(path.read_text(encoding="utf-8"))
    assert scenario.engine == "full" and scenario.faults == () and "is acknowledged at" in scenario.breaks
    again = runner.invoke(chaos_group, ["replay", str(path)])
    assert again.exit_code == 1 and "is acknowledged at" in again.output


def test_a_scenario_of_the_full_engine_survives_its_file() -> None:
    plan = draw_plan(3)
    scenario = Scenario(plan, draw_schedule(plan), "why")
    assert read_scenario(write_scenario(scenario)) == scenario
    with pytest.raises(BadScenario, match="must be one of"):
        read_scenario(write_scenario(scenario).replace(f'kind = "{plan.kind}"', 'kind = "other"', 1))
    with pytest.raises(BadScenario, match="spares"):
        read_scenario(write_scenario(Scenario(evolve(plan, spares=9), ())))


def test_a_run_can_be_stopped_and_looked_at() -> None:
    scenario = Scenario(short(3), ())
    result = FULL.play(scenario, until=3.0)
    assert result.ok and result.at_seconds == 3.0
    assert [line.split()[0] for line in result.standing] == ["n0", "n1", "n2"]
    assert sum("LEADER" in line for line in result.standing) == 1


@pytest.mark.chaos
def test_the_verbs_play_and_repeat_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = evolve(FULL, draw_plan=lambda seed: short(seed, fault_seconds=2.0))
    monkeypatch.setattr(commands, "_engine", lambda name: engine)
    runner = CliRunner()
    played = runner.invoke(chaos_group, ["sim", "--full", "--start", "3", "--seeds", "1", "--json"])
    assert played.exit_code == 0, played.output
    first, totals = map(json.loads, played.output.splitlines())
    assert totals["broken"] == [] and totals["acknowledged"] == first["acknowledged"] > 0
    again = runner.invoke(chaos_group, ["replay", "--full", "3", "--json"])
    assert json.loads(again.output) == first
    assert runner.invoke(chaos_group, ["replay", "--full", "a-file.toml"]).exit_code == 2


@pytest.mark.parametrize("verb", [["sim", "--seeds", "1"], ["replay", "3"], ["shrink", "3"]])
def test_a_trio_that_cannot_be_made_to_repeat_itself_is_told_in_a_line(
    verb: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio._core._run._r", None)
    ended = CliRunner().invoke(chaos_group, [*verb, "--full"])
    assert ended.exit_code == commands.EXIT_KIT_FAILED, ended.output
    assert ended.output == f"trio {trio.__version__} has no switch for deterministic scheduling\n"


@pytest.mark.parametrize("kept_from", [1_000, 1_001])
def test_a_message_that_is_stored_twice_is_told_unless_retention_took_the_first_one(kept_from: int) -> None:
    told: list[str] = []
    book = cluster.Book(cast(World, SimpleNamespace(broke=told.append)))
    book.found(0, 113, 1_000, b"%012d" % 447, kept_from=0)
    book.found(0, 113, 1_000, b"%012d" % 447, kept_from=0)
    assert not told
    book.found(2, 137, 9_000, b"%012d" % 447, kept_from=kept_from)
    assert told == (["message 447 is stored at (0, 113) and at (2, 137)"] if kept_from <= 1_000 else [])
