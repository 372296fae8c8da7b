"""The two engines behind one face: what draws a scenario from a seed, what plays it, and what it counts.

`core` drives the Raft core with a model of everything around it: fast, so many seeds. `full` runs the real programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from attrs import frozen

from chaos.sim.plan import RunPlan
from chaos.sim.result import SeedResult
from chaos.sim.scenario import Scenario
from chaos.sim.schedule import draw_schedule


class Play(Protocol):
    """Plays a scenario to its end, or until a virtual second. Same scenario, same result, on every machine; a broken
    promise is a result, not an error."""

    def __call__(self, scenario: Scenario, *, keep_trace: bool = False, until: float | None = None) -> SeedResult: ...


@frozen(kw_only=True)
class Engine:
    """How one engine is used."""

    name: str
    draw_plan: Callable[[int], RunPlan]
    play: Play
    totals: tuple[str, ...]
    """The counts that add up over seeds."""
    states: tuple[str, ...] = ()
    """Interesting states that runs may reach."""
    simpler: tuple[dict[str, Any], ...]
    """Changes of the plan that shrinking tries, one at a time, from what disturbs most to what matters least."""
    shrink_seconds: float
    check: Callable[[], None]
    """Raises NotDeterministic where this machine cannot repeat a run."""

    def draw(self, seed: int) -> Scenario:
        """The scenario that a seed stands for."""
        plan = self.draw_plan(seed)
        return Scenario(plan, draw_schedule(plan))


class NotDeterministic(Exception):
    """A run cannot be made to repeat itself here: the kit is of no use."""


def engine_named(name: str) -> Engine:
    """The engine "core" or "full"; the other one is not imported."""
    if name == "full":
        from chaos.sim.full.run import FULL

        return FULL
    from chaos.sim.run import CORE

    return CORE
