"""Run seeds: `run_seed(seed)` plays one, `run_scenario` a plan with a list of faults, and says what happened."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from attrs import asdict, field, frozen

from chaos.sim.plan import Plan, draw_plan
from chaos.sim.schedule import Fault, draw_schedule
from chaos.sim.world import Build, MakeRaft, World
from dledger.core.errors import CoreError
from dledger.core.raft import Raft


@frozen(kw_only=True)
class SeedResult:
    """What one seed did. `violation` is None when every promise held."""

    seed: int
    violation: str | None
    at_seconds: float
    plan: str
    trace_hash: str
    steps: int
    delivered: int
    elections: int
    entries: int
    proposals: int
    acknowledged: int
    cuts: int
    crashes: int
    power_losses: int
    recovered: int
    partitions: int
    transfers: int
    repairs: int
    installs: int
    changes: int
    reads: int
    faults: int
    reached: Mapping[str, int] = field(factory=dict)
    faults_by_kind: Mapping[str, int] = field(factory=dict)
    trace: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.violation is None

    @property
    def violation_class(self) -> str:
        """Which promise is broken, without the circumstances: what shrinking has to keep."""
        return "" if self.violation is None else violation_class(self.violation)

    @property
    def reproduction(self) -> str:
        """The command that plays this seed again."""
        return f"quorate chaos replay {self.seed} --trace"

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = asdict(self)
        if not self.trace:
            del fields["trace"]
        return {"ok": self.ok, **fields}


def violation_class(violation: str) -> str:
    """The words up to the second colon, numbers and node names taken out."""
    head = ":".join(violation.split(":")[:2])
    return re.sub(r"\bn?\d+\b", "#", head)


def run_seed(
    seed: int, *, keep_trace: bool = False, make_raft: MakeRaft = Raft, build: Build | None = None
) -> SeedResult:
    """Play one seed to its end. Same seed, same result, on every machine; a broken promise is a result, not an
    error."""
    plan = draw_plan(seed)
    return run_scenario(plan, draw_schedule(plan), build or Build(raft=make_raft), keep_trace=keep_trace)


def run_scenario(
    plan: Plan,
    faults: Sequence[Fault],
    build: Build | None = None,
    *,
    keep_trace: bool = False,
    until: float | None = None,
    seen: Callable[[World], None] | None = None,
) -> SeedResult:
    """Play a plan with these faults to its end, or until a virtual second, where `seen` may look at the world."""
    world = World(plan, faults, build, keep_trace=keep_trace)
    violation = None
    try:
        world.run(until)
    except (AssertionError, CoreError) as error:
        violation = f"{type(error).__name__}: {error}"
        world.note("all", violation)
    if seen is not None:
        seen(world)
    counts = world.counts
    return SeedResult(
        seed=plan.seed,
        violation=violation,
        at_seconds=round(world.now, 4),
        plan=plan.describe(),
        trace_hash=world.trace_hash,
        steps=world.steps,
        delivered=world.network.delivered,
        elections=counts["elections"],
        entries=world.properties.committed_index,
        proposals=world.clients.sent,
        acknowledged=len(world.clients.acknowledged),
        cuts=counts["cuts"],
        crashes=counts["crashes"],
        power_losses=counts["power_losses"],
        recovered=counts["recovered"],
        partitions=counts["partitions"],
        transfers=counts["transfers"],
        repairs=counts["repairs"],
        installs=counts["installs"],
        changes=counts["changes"],
        reads=counts["reads"],
        faults=sum(world.faults_applied.values()),
        reached=world.states_reached,
        faults_by_kind=world.faults_applied,
        trace=tuple(world.trace or ()),
    )
