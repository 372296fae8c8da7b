"""The faults of a run as a list: drawn from the seed before it begins, then played, saved, edited or cut down.

What a fault draws while it is applied (which message, which entry) comes from a stream of its own, named by its
number: leaving one out changes nothing about the others (chaos.md 5.3).
"""

from __future__ import annotations

from attrs import frozen

from chaos.sim.chance import stream
from chaos.sim.plan import KINDS, Plan

LEADER = "leader"
ANY_LENGTH = (0.1, 1.0, 3.0, 6.0)
SECONDS: dict[str, tuple[float, ...]] = {
    "crash": (0.1, 0.3, 3.0),
    "crash-at-effect": (0.1, 0.3, 3.0),
    "crash-all": (0.1, 0.3, 3.0),
    "power-loss": (0.1, 0.3, 3.0, 8.0),
    "power-loss-all": (0.1, 3.0),
    "wipe": (0.3, 2.0),
    "pause": (0.05, 0.7, 1.5, 4.0),
    "late-ticks": (2.0, 6.0),
    "clock-rate": (5.0, 15.0),
    "stall": (0.1, 1.0, 4.0),
    "disk-full": (0.5, 3.0, 8.0),
    "flap": (3.0, 6.0),
}
"""How long a fault lasts, about; the kinds not named draw from ANY_LENGTH."""


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


def draw_schedule(plan: Plan) -> tuple[Fault, ...]:
    """The faults of a seed. The leader is the target half of the time: that is where the interesting failures are."""
    rng = stream(plan.seed, "nemesis")
    names = [f"n{number}" for number in range(plan.nodes)]
    kinds = [kind for kind in KINDS if kind in plan.kinds]
    weights = [KINDS[kind] for kind in kinds]
    faults: list[Fault] = []
    at = 1.0
    while True:
        at += rng.expovariate(1 / plan.fault_interval)
        if at >= plan.fault_seconds:
            return tuple(faults)
        kind = rng.choices(kinds, weights)[0]
        target = LEADER if rng.random() < 0.5 else rng.choice(names)
        seconds = rng.choice(SECONDS.get(kind, ANY_LENGTH)) * (0.5 + rng.random())
        faults.append(Fault(number=len(faults), at=round(at, 4), kind=kind, target=target, seconds=round(seconds, 3)))
