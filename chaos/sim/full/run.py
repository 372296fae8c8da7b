"""Run seeds of the full engine: `run_seed(seed)` plays one, and says what happened."""

from __future__ import annotations

import gc

from attrs import asdict, frozen

from chaos.sim.full.clock import VirtualTime, run_virtually
from chaos.sim.full.cluster import ClusterSubject
from chaos.sim.full.groups import GroupsSubject
from chaos.sim.full.plan import FullPlan, draw_plan
from chaos.sim.full.world import World

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
)


@frozen(kw_only=True)
class SeedResult:
    """What one seed did. `violation` is None when every promise held."""

    seed: int
    violation: str | None
    at_seconds: float
    plan: str
    trace_hash: str
    virtual_seconds: float
    delivered: int
    elections: int
    entries: int
    proposals: int
    acknowledged: int
    starts: int
    crashes: int
    power_losses: int
    pauses: int
    partitions: int
    disk_faults: int
    flips: int
    transfers: int
    trace: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.violation is None

    @property
    def reproduction(self) -> str:
        """The command that plays this seed again."""
        return f"quorate chaos replay --full {self.seed} --trace"

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = asdict(self)
        if not self.trace:
            del fields["trace"]
        return {"ok": self.ok, **fields}


def run_seed(seed: int, *, keep_trace: bool = False, plan: FullPlan | None = None) -> SeedResult:
    """Play one seed to its end. Same seed, same result; a broken promise is a result, not an error.

    Raises clock.NotDeterministic where this trio cannot be made to repeat itself.
    """
    plan = plan or draw_plan(seed)
    world: World | None = None
    subject: GroupsSubject | ClusterSubject | None = None

    async def main(time: VirtualTime) -> None:
        nonlocal world, subject
        world = World(plan, time, keep_trace=keep_trace)
        subject = GroupsSubject(world) if plan.kind == "groups" else ClusterSubject(world)
        await world.run(subject)

    def spins() -> None:
        assert world is not None
        world.broke("a task spins: it runs again and again without waiting for anything")

    was_collecting = gc.isenabled()
    gc.disable()
    try:
        seconds = run_virtually(main, seed, spins)
    finally:
        if was_collecting:
            gc.enable()
            gc.collect()
    assert world is not None and subject is not None
    counts = world.counts
    return SeedResult(
        seed=seed,
        violation=world.violation,
        at_seconds=round(world.at_seconds, 4),
        plan=plan.describe(),
        trace_hash=world.trace_hash,
        virtual_seconds=round(seconds, 3),
        delivered=world.delivered,
        elections=subject.elections,
        entries=subject.entries,
        proposals=len(subject.operations),
        acknowledged=sum(1 for each in subject.operations if each.outcome == "acknowledged"),
        starts=counts["starts"],
        crashes=counts["crashes"],
        power_losses=counts["power_losses"],
        pauses=counts["pauses"],
        partitions=counts["partitions"],
        disk_faults=counts["disk_faults"],
        flips=counts["flips"],
        transfers=counts["transfers"],
        trace=tuple(world.trace) if keep_trace else (),
    )
