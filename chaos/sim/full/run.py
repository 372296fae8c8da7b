"""Engine full: `run_scenario` plays a plan with a list of faults, `run_plan` with those of its seed."""

from __future__ import annotations

import gc

from chaos.sim.engine import Engine
from chaos.sim.full.clock import VirtualTime, probe_scheduler, run_virtually
from chaos.sim.full.cluster import ClusterSubject
from chaos.sim.full.groups import GroupsSubject
from chaos.sim.full.plan import FullPlan, draw_plan
from chaos.sim.full.world import World
from chaos.sim.result import SeedResult
from chaos.sim.scenario import Scenario
from chaos.sim.schedule import draw_schedule

TOTALS = (
    "delivered",
    "elections",
    "entries",
    "proposals",
    "acknowledged",
    "starts",
    "crashes",
    "power_losses",
    "pauses",
    "partitions",
    "disk_faults",
    "flips",
    "transfers",
    "changes",
    "trims",
    "repairs",
    "installs",
    "faults",
)
SIMPLER = (
    {"spares": 0},
    {"jitter": 0.0},
    {"cold": 0.0},
    {"drift": 0.0},
    {"retention_bytes": 0},
    {"retention_seconds": 72 * 3600.0},
    {"segment_bytes": 262_144},
    {"record_bytes_max": 64},
    {"rate": 10.0},
    {"latency": 0.0005},
    {"sync_seconds": 0.001},
)
"""Shapes, one at a time, from what disturbs most to what matters least."""


def run_plan(plan: FullPlan, *, keep_trace: bool = False) -> SeedResult:
    """Play a plan with the faults of its seed to its end. Same plan, same result; a broken promise is a result, not an
    error.

    Raises NotDeterministic where this trio cannot be made to repeat itself.
    """
    return run_scenario(Scenario(plan, draw_schedule(plan)), keep_trace=keep_trace)


def run_scenario(scenario: Scenario, *, keep_trace: bool = False, until: float | None = None) -> SeedResult:
    """Play a plan with these faults to its end, or until a virtual second. Raises NotDeterministic."""
    plan = scenario.plan
    assert isinstance(plan, FullPlan)
    world: World | None = None
    subject: GroupsSubject | ClusterSubject | None = None

    async def main(time: VirtualTime) -> None:
        nonlocal world, subject
        world = World(plan, scenario.faults, time, keep_trace=keep_trace)
        subject = GroupsSubject(world) if plan.kind == "groups" else ClusterSubject(world)
        await world.run(subject, until)

    def spins() -> None:
        assert world is not None
        world.broke("a task spins: it runs again and again without waiting for anything")

    was_collecting = gc.isenabled()
    gc.disable()
    try:
        seconds = run_virtually(main, plan.seed, spins)
    finally:
        if was_collecting:
            gc.enable()
            gc.collect()
    assert world is not None and subject is not None
    counts = {
        **dict.fromkeys(TOTALS, 0),
        **world.counts,
        "delivered": world.delivered,
        "elections": subject.elections,
        "entries": subject.entries,
        "proposals": len(subject.operations),
        "acknowledged": sum(1 for each in subject.operations if each.outcome == "acknowledged"),
        "trims": world.logged["log trimmed"],
        "faults": sum(world.faults_applied.values()),
    }
    return SeedResult(
        engine="full",
        seed=plan.seed,
        violation=None if world.violation is None else f"Broken: {world.violation}",
        at_seconds=round(world.at_seconds or seconds, 4),
        plan=plan.describe(),
        trace_hash=world.trace_hash,
        counts={name: counts[name] for name in TOTALS},
        faults_by_kind=dict(world.faults_applied),
        trace=tuple(world.trace) if keep_trace else (),
        standing=world.standing,
    )


FULL = Engine(
    name="full",
    draw_plan=draw_plan,
    play=run_scenario,
    totals=TOTALS,
    simpler=SIMPLER,
    shrink_seconds=300.0,
    check=probe_scheduler,
)
