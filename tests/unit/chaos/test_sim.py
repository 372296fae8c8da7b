"""The simulator: same seed, same run; no promise broken; every planted bug found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import attrs
import pytest
from click.testing import CliRunner

from chaos import commands
from chaos.sim.chance import stream
from chaos.sim.plan import draw_plan
from chaos.sim.result import SeedResult
from chaos.sim.run import CORE, run_plan
from chaos.sim.world import World
from tests.unit.chaos.planted import PLANTED, Bug, MessagesNotHeld, first_seed, play_with, runs_well

FEW = range(3)
MANY = range(1000, 1100)
NEXT_SEEDS = 8
PLANTED_WITHIN = 200
"""Seeds in which each planted bug must be found."""


def test_every_promise_holds_on_a_few_seeds_and_something_happened() -> None:
    results = [run_plan(draw_plan(seed)) for seed in FEW]
    broken = [f"seed {result.seed}: {result.violation}\n  {result.reproduction}" for result in results if not result.ok]
    assert not broken, "\n".join(broken)
    totals = {
        name: sum(result.counts[name] for result in results)
        for name in (
            "elections",
            "entries",
            "acknowledged",
            "cuts",
            "crashes",
            "power_losses",
            "recovered",
            "partitions",
        )
    }
    # A simulator in which nothing happens breaks no promise either.
    assert all(result.counts["elections"] >= 1 and result.counts["entries"] >= 10 for result in results), totals
    assert totals["elections"] > 3 * len(FEW), totals
    assert all(count > 0 for count in totals.values()), totals


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("first", MANY[::25])
def test_every_promise_holds_on_many_seeds(first: int) -> None:
    results = [run_plan(draw_plan(seed)) for seed in range(first, first + 25)]
    broken = [f"seed {result.seed}: {result.violation}\n  {result.reproduction}" for result in results if not result.ok]
    assert not broken, "\n".join(broken)


def test_the_plans_cover_both_flush_modes_and_both_group_sizes() -> None:
    plans = [draw_plan(seed) for seed in range(40)]
    assert {plan.sync for plan in plans} == {True, False}
    assert {plan.nodes for plan in plans} == {3, 5}


SECONDS_TO_FIND = {
    "DamageServed",
    "EvidenceLostOnTheWay",
    "HintTooHigh",
    "InstallForgetsVote",
    "LearnerCounted",
    "ReadBeforeNoop",
    "SecondVote",
}
"""Planted bugs that take more than a second, and so are looked for with the many seeds."""


def short(seed: int, *, keep_trace: bool = False) -> SeedResult:
    """The first seconds of a seed."""
    return run_plan(attrs.evolve(draw_plan(seed), fault_seconds=8.0), keep_trace=keep_trace)


def test_a_seed_gives_the_same_run_twice_and_another_seed_another() -> None:
    first, again, other = short(3), short(3), short(4)
    assert first == again
    assert first.trace_hash != other.trace_hash


def test_a_trace_does_not_change_the_run() -> None:
    plain, traced = short(9), short(9, keep_trace=True)
    assert plain.trace == () and len(traced.trace) > 10
    assert plain.trace_hash == traced.trace_hash


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_run_does_not_depend_on_the_hash_seed(hash_seed: str) -> None:
    program = "from tests.unit.chaos.test_sim import short; print(short(5).trace_hash)"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == short(5).trace_hash


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, id=bug.__name__, marks=[pytest.mark.chaos] if bug.__name__ in SECONDS_TO_FIND else [])
        for bug in PLANTED
    ],
)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    """By the seed that found it when it was planted, or by one of the next: the draw of a schedule may have changed."""
    first = PLANTED[bug]
    found = (not runs_well(bug, seed) for seed in range(first, first + NEXT_SEEDS))
    assert any(found), "look for another seed: python -m tests.unit.chaos.planted"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found_soon(bug: Bug) -> None:
    assert first_seed(bug, PLANTED_WITHIN) is not None


# The command


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_sim_reports_totals_as_json(runner: CliRunner) -> None:
    done = runner.invoke(commands.chaos_group, ["sim", "--seeds", "2", "--start", "7", "--json"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["seed"] for line in lines[:2]] == [7, 8]
    assert lines[2]["broken"] == [] and lines[2]["entries"] == lines[0]["entries"] + lines[1]["entries"]


@pytest.mark.chaos
def test_sim_in_two_processes_finds_the_same(runner: CliRunner) -> None:
    alone = runner.invoke(commands.chaos_group, ["sim", "--seeds", "3", "--start", "7", "--json"])
    together = runner.invoke(commands.chaos_group, ["sim", "--seeds", "3", "--start", "7", "--json", "--jobs", "2"])
    assert alone.stdout == together.stdout


def test_a_broken_promise_exits_1_and_prints_how_to_repeat_it(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, play_with(MessagesNotHeld))
    done = runner.invoke(commands.chaos_group, ["sim", "--seeds", "1", "--start", "1", "--no-shrink"])
    assert done.exit_code == 1
    assert "quorate chaos replay 1 --trace" in done.stderr
    again = runner.invoke(commands.chaos_group, ["replay", "1", "--trace"])
    assert again.exit_code == 1 and "BROKEN" in again.stdout


def use(monkeypatch: pytest.MonkeyPatch, play: Callable[..., SeedResult]) -> None:
    """Have the commands play with this instead of the core engine."""
    monkeypatch.setattr(commands, "_engine", lambda name: attrs.evolve(CORE, play=play))


def _result(seed: int, trace_hash: str, acknowledged: int) -> SeedResult:
    counts = dict.fromkeys(CORE.totals, 0) | {"elections": 1, "acknowledged": acknowledged}
    return SeedResult(
        engine="core", seed=seed, violation=None, at_seconds=1.0, plan="", trace_hash=trace_hash, counts=counts
    )


def test_nothing_committed_is_no_evidence(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda scenario, **options: _result(scenario.plan.seed, "a", 0))
    assert runner.invoke(commands.chaos_group, ["sim", "--seeds", "1", "--start", "1"]).exit_code == 3
    assert runner.invoke(commands.chaos_group, ["replay", "1"]).exit_code == 3


def test_a_seed_with_two_outcomes_is_the_kits_own_failure(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda scenario, **options: _result(scenario.plan.seed, "a", 5))
    monkeypatch.setattr(commands, "_play_again", lambda *arguments: ["b" for _ in arguments[-1]])
    assert runner.invoke(commands.chaos_group, ["sim", "--seeds", "1"]).exit_code == 4


@pytest.mark.parametrize("arguments", [["sim", "--seeds", "0"], ["replay"], ["replay", "x"], ["no-such-verb"]])
def test_wrong_usage_exits_2(runner: CliRunner, arguments: list[str]) -> None:
    assert runner.invoke(commands.chaos_group, arguments).exit_code == 2


@pytest.mark.chaos
def test_replay_prints_what_happened(runner: CliRunner) -> None:
    done = runner.invoke(commands.chaos_group, ["replay", "3", "--trace"])
    assert done.exit_code == 0
    assert "LEADER term=" in done.stdout and "every promise held" in done.stdout


# Design 3: failover goals, as far as the core decides them


def failover_seconds(seed: int, *, frozen: bool) -> float:
    """From the loss of a healthy group's leader to the next acknowledged proposal; no other fault."""
    plan = attrs.evolve(
        draw_plan(seed),
        nodes=3,
        sync=False,
        latency=0.0003,
        drop=0.0,
        duplicate=0.0,
        late=0.0,
        sync_latency=0.001,
        drift=0.0,
        tcp=True,
        bytes_per_second=0.0,
        spares=0,
        preferred="",
        threaded_writes=False,
        clients=1,
        proposals_per_second=50.0,
        burst_max=1,
    )
    world = World(plan, ())
    for node in world.nodes.values():
        world.at(0.01, node.start)
    world.at(0.5, world._send, stream(seed, "client/0"))
    world.run_until(3.5 + (seed % 7) * 0.04)
    leader = world.leader()
    assert leader is not None
    if frozen:
        leader.paused_until = world.now + 30.0
    else:
        leader.kill(power=False)
    lost_at, before = world.now, len(world.clients.acknowledged)
    assert world.run_until(lost_at + 20.0, lambda: len(world.clients.acknowledged) > before)
    return world.now - lost_at


def test_a_killed_leader_is_replaced_within_the_goal() -> None:
    seconds = sorted(failover_seconds(seed, frozen=False) for seed in range(12))
    assert seconds[6] <= 0.2 and seconds[-1] <= 0.7, seconds


def test_a_frozen_leader_is_replaced_within_the_goal() -> None:
    seconds = sorted(failover_seconds(seed, frozen=True) for seed in range(12))
    assert seconds[6] <= 1.8 and seconds[-1] <= 3.0, seconds
