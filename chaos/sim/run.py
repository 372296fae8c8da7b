"""Run seeds: `run_seed(seed)` plays one, and says what happened."""

from __future__ import annotations

from attrs import asdict, frozen

from chaos.sim.plan import draw_plan
from chaos.sim.world import MakeRaft, World
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
    trace: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.violation is None

    @property
    def reproduction(self) -> str:
        """The command that plays this seed again."""
        return f"quorate chaos replay {self.seed} --trace"

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = asdict(self)
        if not self.trace:
            del fields["trace"]
        return {"ok": self.ok, **fields}


def run_seed(seed: int, *, keep_trace: bool = False, make_raft: MakeRaft = Raft) -> SeedResult:
    """Play one seed to its end. Same seed, same result, on every machine; a broken promise is a result, not an
    error."""
    plan = draw_plan(seed)
    world = World(plan, make_raft, keep_trace=keep_trace)
    violation = None
    try:
        world.run()
    except (AssertionError, CoreError) as error:
        violation = f"{type(error).__name__}: {error}"
        world.note("all", violation)
    counts = world.counts
    return SeedResult(
        seed=seed,
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
        trace=tuple(world.trace or ()),
    )
