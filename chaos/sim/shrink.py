"""Make a failing run small (chaos.md 5.8): fewer faults, a shorter time line, fewer clients, simpler shapes.

The predicate is fixed: the same promise must break. Every candidate is a whole run; the budget bounds how many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import evolve, frozen

from chaos.sim.plan import RunPlan
from chaos.sim.result import SeedResult
from chaos.sim.scenario import Scenario
from chaos.sim.schedule import Fault

RUNS_MAX = 200


@frozen
class Shrunk:
    """The smallest run found that breaks the same promise."""

    scenario: Scenario
    result: SeedResult
    runs: int


class _Budget(Exception):
    """Runs or time are used up."""


class Shrinker:
    """Shrinks one failing run. `elapsed` tells the seconds since the beginning, by whatever clock the caller has."""

    def __init__(
        self,
        scenario: Scenario,
        play: Callable[[Scenario], SeedResult],
        simpler: Sequence[dict[str, Any]],
        *,
        seconds_max: float,
        elapsed: Callable[[], float] = lambda: 0.0,
        runs_max: int = RUNS_MAX,
    ) -> None:
        """`simpler`: changes of the plan to try, one at a time."""
        self._plan = scenario.plan
        self._faults = scenario.faults
        self._play = play
        self._simpler = simpler
        self._elapsed = elapsed
        self._runs_max = runs_max
        self._seconds_max = seconds_max
        self._runs = 0
        self._best: SeedResult | None = None

    def shrink(self) -> Shrunk | None:
        """None when the run does not fail."""
        self._best = self._play(Scenario(self._plan, self._faults))
        self._runs = 1
        if self._best.ok:
            return None
        wanted = self._best.violation_class
        try:
            self._cut_time(wanted)
            self._drop_faults(wanted)
            self._simplify(wanted)
            self._cut_time(wanted)
            self._drop_faults(wanted)
            self._round_times(wanted)
        except _Budget:
            pass
        return Shrunk(Scenario(self._plan, self._faults, self._best.violation or ""), self._best, self._runs)

    def _fails(self, plan: RunPlan, faults: Sequence[Fault], wanted: str) -> bool:
        """Whether this smaller run breaks the same promise; then it is the new smallest."""
        if self._runs >= self._runs_max or self._elapsed() >= self._seconds_max:
            raise _Budget
        self._runs += 1
        result = self._play(Scenario(plan, tuple(faults)))
        if result.violation_class != wanted:
            return False
        self._plan, self._faults, self._best = plan, tuple(faults), result
        return True

    def _cut_time(self, wanted: str) -> None:
        """Nothing that comes behind the violation can have caused it; what was judged at the end may show sooner."""
        assert self._best is not None
        at, end = self._best.at_seconds, self._plan.fault_seconds
        if at < end:
            faults = [fault for fault in self._faults if fault.at <= at]
            self._fails(evolve(self._plan, fault_seconds=round(at + 0.001, 3)), faults, wanted)
            return
        for share in (0.25, 0.5, 0.75):
            faults = [fault for fault in self._faults if fault.at < end * share]
            if self._fails(evolve(self._plan, fault_seconds=round(end * share, 3)), faults, wanted):
                return

    def _drop_faults(self, wanted: str) -> None:
        """Delta debugging (Zeller, Hildebrandt 2002): leave out ever smaller parts."""
        parts = 2
        while self._faults:
            faults = self._faults
            size = max(1, len(faults) // parts)
            for start in range(0, len(faults), size):
                if self._fails(self._plan, faults[:start] + faults[start + size :], wanted):
                    parts = max(2, parts - 1)
                    break
            else:
                if size == 1:
                    return
                parts = min(parts * 2, len(faults))

    def _simplify(self, wanted: str) -> None:
        for change in self._simpler:
            plan = evolve(self._plan, **change)
            if plan != self._plan:
                self._fails(plan, self._faults, wanted)

    def _round_times(self, wanted: str) -> None:
        """Times a person can read."""
        for digits in (0, 1, 2):
            faults = [evolve(fault, at=round(fault.at, digits)) for fault in self._faults]
            if self._fails(self._plan, faults, wanted):
                return
