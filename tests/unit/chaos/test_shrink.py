"""Failing runs are made small, written to a file, and break the same promise when that is played."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner

from chaos import commands
from chaos.sim.plan import KINDS, Plan, draw_plan
from chaos.sim.result import violation_class
from chaos.sim.run import CORE, run_scenario
from chaos.sim.scenario import BadScenario, Scenario, read_scenario, write_scenario
from chaos.sim.schedule import Fault, draw_schedule
from chaos.sim.shrink import Shrinker
from chaos.sim.world import World
from dledger.core.raft import Raft
from tests.unit.chaos.planted import LogNotCompared, MessagesNotHeld, play_with

SEED = 9


def shrinker(plan: Plan, *, elapsed: float = 0.0, runs_max: int = 200, raft: type[Raft] = LogNotCompared) -> Shrinker:
    scenario = Scenario(plan, draw_schedule(plan))
    return Shrinker(
        scenario, play_with(raft), CORE.simpler, seconds_max=60.0, elapsed=lambda: elapsed, runs_max=runs_max
    )


def test_a_schedule_is_drawn_before_the_run_and_only_from_the_kinds_of_the_plan() -> None:
    for seed in range(30):
        plan = draw_plan(seed)
        faults = draw_schedule(plan)
        assert faults == draw_schedule(plan)
        assert {fault.kind for fault in faults} <= set(plan.kinds)
        assert [fault.number for fault in faults] == list(range(len(faults)))
        assert all(1.0 < fault.at < plan.fault_seconds for fault in faults)


def test_over_many_seeds_every_kind_of_fault_is_drawn() -> None:
    drawn = {fault.kind for seed in range(40) for fault in draw_schedule(draw_plan(seed))}
    assert drawn == set(KINDS)


def test_leaving_a_fault_out_leaves_what_came_before_it_alone() -> None:
    plan = attrs.evolve(draw_plan(5), fault_seconds=12.0)
    faults = draw_schedule(plan)
    assert len(faults) > 2
    whole = run_scenario(Scenario(plan, faults), keep_trace=True)
    without = run_scenario(Scenario(plan, faults[:-1]), keep_trace=True)
    end = faults[-1].at
    assert [line for line in whole.trace if float(line.split()[0]) < end] == [
        line for line in without.trace if float(line.split()[0]) < end
    ]


def test_a_scenario_survives_its_file() -> None:
    plan = draw_plan(3)
    scenario = Scenario(plan, draw_schedule(plan), 'a "quoted" reason: n1')
    assert read_scenario(write_scenario(scenario)) == scenario


@pytest.mark.parametrize(
    "text, why",
    [
        ("plan = 3", "missing"),
        ("[plan", "not TOML"),
        ("[plan]\nseed = 1", "missing or unknown"),
    ],
)
def test_what_is_no_scenario_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadScenario, match=why):
        read_scenario(text)


@pytest.mark.parametrize(
    "old, new", [("nodes = 3", "nodes = 0"), ("nodes = 3", 'nodes = "3"'), ('kind = "crash"', 'kind = "flood"')]
)
def test_a_scenario_with_a_wrong_value_is_refused(old: str, new: str) -> None:
    plan = attrs.evolve(draw_plan(3), nodes=3)
    text = write_scenario(Scenario(plan, (Fault(number=0, at=1.0, kind="crash", target="n0", seconds=1.0),)))
    assert old in text
    with pytest.raises(BadScenario):
        read_scenario(text.replace(old, new))


def test_the_class_of_a_violation_names_the_promise_and_not_the_circumstances() -> None:
    first = violation_class("PropertyBroken: election safety (Raft 5.2): n0 and n1 both lead term 7")
    again = violation_class("PropertyBroken: election safety (Raft 5.2): n2 and n1 both lead term 19")
    assert first == again != violation_class("PropertyBroken: liveness: no leader 10 s after the last fault; n0 down")


def test_a_run_without_a_violation_is_not_shrunk() -> None:
    assert shrinker(attrs.evolve(draw_plan(3), fault_seconds=3.0), raft=Raft).shrink() is None


def test_shrinking_keeps_the_broken_promise_and_drops_the_rest() -> None:
    plan = attrs.evolve(draw_plan(SEED), fault_seconds=8.0)
    play, before = play_with(LogNotCompared), Scenario(plan, draw_schedule(plan))
    shrunk = shrinker(plan, runs_max=30).shrink()
    assert shrunk is not None
    assert len(shrunk.scenario.faults) <= 3 < len(before.faults)
    assert shrunk.scenario.plan.fault_seconds < plan.fault_seconds
    again = play(shrunk.scenario)
    assert again.violation_class == play(before).violation_class != ""
    assert again == shrunk.result and shrunk.scenario.breaks == again.violation


def test_shrinking_ends_with_its_budget() -> None:
    plan = attrs.evolve(draw_plan(SEED), fault_seconds=8.0)
    shrunk = shrinker(plan, runs_max=3).shrink()
    assert shrunk is not None and shrunk.runs == 3
    timed = shrinker(plan, elapsed=61.0).shrink()
    assert timed is not None and timed.runs == 1


# The commands


@pytest.fixture
def broken_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_engine", lambda name: attrs.evolve(CORE, play=play_with(MessagesNotHeld)))


@pytest.mark.usefixtures("broken_core")
def test_a_failing_seed_is_shrunk_to_a_file_that_replays(tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(commands.chaos_group, ["sim", "--seeds", "1", "--start", "1", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    path = tmp_path / "out" / "1.toml"
    assert f"minimal: quorate chaos replay {path} --trace" in done.stdout
    scenario = read_scenario(path.read_text(encoding="utf-8"))
    assert scenario.faults == () and "vote not saved" in scenario.breaks
    again = runner.invoke(commands.chaos_group, ["replay", str(path)])
    assert again.exit_code == 1 and "vote not saved" in again.stdout
    smaller = runner.invoke(commands.chaos_group, ["shrink", str(path), "--out", str(tmp_path / "again.toml")])
    assert smaller.exit_code == 1 and (tmp_path / "again.toml").exists()
    assert f"repeat: quorate chaos replay {path} --trace " in smaller.stdout


@pytest.mark.usefixtures("broken_core")
def test_the_story_of_a_failing_seed_is_not_among_the_json(tmp_path: Path) -> None:
    words = ["sim", "--seeds", "1", "--start", "1", "--json", "--out", str(tmp_path)]
    done = CliRunner().invoke(commands.chaos_group, words)
    seed, totals = map(json.loads, done.stdout.splitlines())
    assert not seed["ok"] and totals["broken"] == [1]
    assert "minimal: quorate chaos replay" in done.stderr


def test_a_file_that_breaks_nothing_replays_to_the_end_or_to_a_moment(tmp_path: Path) -> None:
    plan = attrs.evolve(draw_plan(3), fault_seconds=3.0)
    path = tmp_path / "calm.toml"
    path.write_text(write_scenario(Scenario(plan, ())), encoding="utf-8")
    runner = CliRunner()
    done = runner.invoke(commands.chaos_group, ["replay", str(path)])
    assert done.exit_code == 0 and "every promise held" in done.stdout
    stopped = runner.invoke(commands.chaos_group, ["replay", str(path), "--until", "2.5"])
    assert stopped.exit_code == 0 and "at 2.5000 s:" in stopped.stdout and "n0 " in stopped.stdout
    nothing = runner.invoke(commands.chaos_group, ["shrink", str(path)])
    assert nothing.exit_code == 0 and "nothing to shrink" in nothing.stdout


@pytest.mark.parametrize("content", [None, "[plan"])
def test_a_file_that_cannot_be_played_is_wrong_usage(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "repro.toml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert CliRunner().invoke(commands.chaos_group, ["replay", str(path)]).exit_code == 2


@pytest.mark.parametrize("verb", ["sim", "replay", "shrink"])
def test_each_verb_has_examples(verb: str) -> None:
    done = CliRunner().invoke(commands.chaos_group, [verb, "--help"])
    assert done.exit_code == 0 and "Examples:" in done.output


@pytest.mark.parametrize("seed", [1, 2])
def test_a_world_that_heals_its_core_only_leaves_a_minority_as_it_is(seed: int) -> None:
    plan = attrs.evolve(draw_plan(seed), fault_seconds=4.0, heal_core=True, spares=0)
    world = World(plan, ())
    world.run()
    assert len(world.left_down) == plan.nodes // 2
