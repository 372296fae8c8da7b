"""The faults of a run as a list: drawn from the seed before it begins, then played, saved, edited or cut down.

What a fault draws while it is applied (which message, which entry) comes from a stream of its own, named by its
number: leaving one out changes nothing about the others (chaos.md 5.3).
"""

from __future__ import annotations

from attrs import frozen

from chaos.sim.chance import stream
from chaos.sim.plan import RunPlan

LEADER = "leader"


@frozen(kw_only=True)
class Fault:
    """One fault: `kind` at `at` seconds for about `seconds`. `target` is a node or "leader", found when it happens."""

    number: int
    at: float
    kind: str
    target: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.at:.3f} s: {self.kind} on {self.target} for {self.seconds:.2f} s (fault {self.number})"


def draw_schedule(plan: RunPlan) -> tuple[Fault, ...]:
    """The faults of a seed. The leader is the target half of the time: that is where the interesting failures are."""
    rng = stream(plan.seed, "nemesis")
    names = plan.targets
    kinds = [kind for kind in plan.weights if kind in plan.kinds]
    weights = [plan.weights[kind] for kind in kinds]
    faults: list[Fault] = []
    at = 1.0
    while True:
        at += rng.expovariate(1 / plan.fault_interval)
        if at >= plan.fault_seconds:
            return tuple(faults)
        kind = rng.choices(kinds, weights)[0]
        target = LEADER if rng.random() < 0.5 else rng.choice(names)
        seconds = rng.choice(plan.lengths(kind)) * (0.5 + rng.random())
        faults.append(Fault(number=len(faults), at=round(at, 4), kind=kind, target=target, seconds=round(seconds, 3)))
