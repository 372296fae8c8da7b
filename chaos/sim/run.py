"""Engine core: `run_scenario` plays a plan with a list of faults, `run_plan` with those of its seed."""

from __future__ import annotations

from typing import Any

from chaos.sim.engine import Engine
from chaos.sim.plan import Plan, draw_plan
from chaos.sim.reached import REACHED
from chaos.sim.result import SeedResult
from chaos.sim.scenario import Scenario
from chaos.sim.schedule import draw_schedule
from chaos.sim.world import Build, World
from dledger.core.errors import CoreError

TOTALS = (
    "steps",
    "delivered",
    "elections",
    "entries",
    "proposals",
    "acknowledged",
    "cuts",
    "crashes",
    "power_losses",
    "recovered",
    "partitions",
    "transfers",
    "repairs",
    "installs",
    "changes",
    "reads",
    "faults",
)
SIMPLER: tuple[dict[str, Any], ...] = (
    {"real_store": False},
    {"clients": 1},
    {"burst_max": 1},
    {"reads_per_second": 0.0},
    {"spares": 0},
    {"heal_core": False},
    {"preferred": ""},
    {"late": 0.0},
    {"duplicate": 0.0},
    {"drop": 0.0},
    {"drift": 0.0},
    {"bytes_per_second": 0.0},
    {"threaded_writes": False},
    {"tcp": True},
    {"use_commit_hint": False},
    {"segments_behind_bytes": 1 << 28},
    {"segment_bytes": 1 << 20},
    {"body_bytes_max": 64},
    {"proposals_per_second": 3.0},
    {"nodes": 3},
    {"latency": 0.0005},
    {"sync_latency": 0.001},
)
"""Shapes, one at a time, from what disturbs most to what matters least."""


def run_plan(plan: Plan, build: Build | None = None, *, keep_trace: bool = False) -> SeedResult:
    """Play a plan with the faults of its seed to its end. Same plan, same result, on every machine; a broken promise is
    a result, not an error."""
    return run_scenario(Scenario(plan, draw_schedule(plan)), build, keep_trace=keep_trace)


def run_scenario(
    scenario: Scenario, build: Build | None = None, *, keep_trace: bool = False, until: float | None = None
) -> SeedResult:
    """Play a plan with these faults to its end, or until a virtual second."""
    plan = scenario.plan
    assert isinstance(plan, Plan)
    world = World(plan, scenario.faults, build, keep_trace=keep_trace)
    violation = None
    try:
        world.run(until)
    except (AssertionError, CoreError) as error:
        violation = f"{type(error).__name__}: {error}"
        world.note("all", violation)
    counts = {
        **world.counts,
        "steps": world.steps,
        "delivered": world.network.delivered,
        "entries": world.properties.committed_index,
        "proposals": world.clients.sent,
        "acknowledged": len(world.clients.acknowledged),
        "faults": sum(world.faults_applied.values()),
    }
    return SeedResult(
        engine="core",
        seed=plan.seed,
        violation=violation,
        at_seconds=round(world.now, 4),
        plan=plan.describe(),
        trace_hash=world.trace_hash,
        counts={name: counts[name] for name in TOTALS},
        reached=world.states_reached,
        faults_by_kind=world.faults_applied,
        trace=tuple(world.trace or ()),
        standing=() if until is None else tuple(world.describe(node) for node in world.nodes.values()),
    )


CORE = Engine(
    name="core",
    draw_plan=draw_plan,
    play=run_scenario,
    totals=TOTALS,
    states=REACHED,
    simpler=SIMPLER,
    shrink_seconds=60.0,
    check=lambda: None,
)
