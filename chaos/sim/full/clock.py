"""Virtual time for a trio run, and what each simulated machine sees of it.

trio asks its clock how long it may sleep only when nothing is runnable. `VirtualTime` answers by jumping there, so a
run takes as long as its work and not as its waiting. A machine looks at it through a `NodeClock` of its own: with
drift, with steps of its wall time, and standing still during a pause.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from heapq import heappop, heappush
from random import Random
from types import TracebackType
from typing import Final

import trio
from trio._core import _run as trio_run

from chaos.sim.engine import NotDeterministic

EPOCH_MS: Final = 1_767_225_600_000
"""2026-01-01: where the wall time of every simulation begins."""
SPIN_LOOKS_MAX: Final = 2_000_000
"""Looks at the clock while it stands: beyond, some loop waits for a condition without waiting for time."""
PROBE_TASKS: Final = 50


class VirtualTime(trio.abc.Clock):
    """Seconds since the start of a run. Jumps to the next deadline as soon as nothing is runnable."""

    def __init__(self, on_spin: Callable[[], None]) -> None:
        self.now = 0.0
        self.is_over = False
        """The program has ended, trio is clearing up: for real, not in virtual time."""
        self._looks = 0
        self._on_spin = on_spin

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        self._looks += 1
        if self._looks == SPIN_LOOKS_MAX:
            self._on_spin()
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if self.is_over:
            return 0.0
        if deadline == math.inf:
            raise RuntimeError("every task waits, and none for time: the simulation has come to a dead end")
        if deadline > self.now:
            self.now = deadline
            self._looks = 0
        return 0.0


class Agenda:
    """What the world itself has to do at certain times, in order; one task carries it out."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._scope = trio.CancelScope()

    def call_at(self, when: float, act: Callable[[], None]) -> None:
        """Call `act` at `when`, behind what is due at the same time already."""
        self._count += 1
        heappush(self._due, (when, self._count, act))
        if when < self._scope.deadline:
            self._scope.deadline = when

    def call_after(self, seconds: float, act: Callable[[], None]) -> None:
        self.call_at(self._time.now + seconds, act)

    async def run(self) -> None:
        """Until cancelled. What an act raises ends it: a mistake of the kit."""
        due = self._due
        while True:
            while due and due[0][0] <= self._time.now:
                heappop(due)[2]()
            with trio.CancelScope(deadline=due[0][0] if due else math.inf) as self._scope:
                await trio.sleep_forever()


class _Timed(AbstractContextManager[trio.CancelScope]):
    """A cancel scope whose deadline is of one machine's time."""

    __slots__ = ("_clock", "_deadline", "_fails", "_scope")

    def __init__(self, clock: NodeClock, deadline: float, *, fails: bool) -> None:
        self._clock = clock
        self._deadline = deadline
        self._fails = fails
        self._scope = trio.CancelScope()

    def set(self) -> None:
        self._scope.deadline = self._clock.to_world(self._deadline)

    def stop(self) -> None:
        self._scope.deadline = math.inf

    def __enter__(self) -> trio.CancelScope:
        clock = self._clock
        clock.open_scopes[self] = None
        if not clock.is_paused:
            self.set()
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        del self._clock.open_scopes[self]
        swallowed = self._scope.__exit__(kind, error, trace)
        if self._fails and self._scope.cancelled_caught:
            raise trio.TooSlowError
        return swallowed


class NodeClock:
    """`runtime.model.Clock` of one machine: its own rate, and its own idea of the date."""

    def __init__(self, time: VirtualTime, *, rate: float = 1.0, wall_offset_ms: int = 0) -> None:
        self._time = time
        self._rate = rate
        self._own_zero = 1000.0
        self._world_zero = time.now
        self._spent_until = 0.0
        self._frozen_at: float | None = None
        self._wall_offset_ms = wall_offset_ms
        self._last_wall = 0
        self.is_paused = False
        self.open_scopes: dict[_Timed, None] = {}

    # What the node sees.

    def wall_ms(self) -> int:
        """Milliseconds since the Unix epoch. May step."""
        return EPOCH_MS + self._wall_offset_ms + int(self._time.now * self._rate * 1000)

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; the deadlines below use it."""
        if self._frozen_at is not None:
            return self._frozen_at
        return max(self._spent_until, self._own_zero + (self._time.now - self._world_zero) * self._rate)

    async def sleep(self, seconds: float) -> None:
        """Checkpoint; cancel-safe."""
        if seconds <= 0:
            await trio.lowlevel.checkpoint()
        else:
            await self.sleep_until(self.monotonic() + seconds)

    async def sleep_until(self, deadline: float) -> None:
        """Checkpoint; cancel-safe."""
        with _Timed(self, deadline, fails=False):
            await trio.sleep_forever()

    def move_on_at(self, deadline: float) -> AbstractContextManager[trio.CancelScope]:
        """Cancels its body at `deadline` (seconds of `monotonic`) and carries on."""
        return _Timed(self, deadline, fails=False)

    def move_on_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """Cancels its body after `seconds` and carries on."""
        return _Timed(self, self.monotonic() + seconds, fails=False)

    def fail_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """Raises trio.TooSlowError when its body took longer than `seconds`."""
        return _Timed(self, self.monotonic() + seconds, fails=True)

    # What the world does to it.

    def to_world(self, deadline: float) -> float:
        """The first moment of the world at which `monotonic` has reached `deadline`."""
        when = self._world_zero + (deadline - self._own_zero) / self._rate
        while self._own_zero + (when - self._world_zero) * self._rate < deadline:
            when = math.nextafter(when, math.inf)  # or a loop around `sleep_until` would spin for ever
        return when

    def spend(self, seconds: float) -> None:
        """A synchronous call took so long on the node's loop."""
        self._spent_until = self.monotonic() + seconds

    def step_wall(self, milliseconds: int) -> None:
        """Somebody set the date."""
        self._wall_offset_ms += milliseconds

    def pause(self, *, stops: bool) -> None:
        """No deadline comes any more. With `stops` monotonic time stands too, as in a suspended virtual machine;
        otherwise it goes on, as for a stopped process, and what was missed is due at once afterwards."""
        if stops:
            self._frozen_at = self.monotonic()
        self.is_paused = True
        for scope in self.open_scopes:
            scope.stop()

    def resume(self) -> None:
        if self._frozen_at is not None:
            self._own_zero, self._world_zero = self._frozen_at, self._time.now
            self._frozen_at = None
        self.is_paused = False
        for scope in self.open_scopes:
            scope.set()


@contextmanager
def repeatable_scheduler(seed: int) -> Iterator[None]:
    """trio runs tasks in an order drawn from `seed`, for the length of the block. Raises NotDeterministic."""
    state = vars(trio_run)
    chance = state.get("_r")
    if not isinstance(chance, Random) or "_ALLOW_DETERMINISTIC_SCHEDULING" not in state:
        raise NotDeterministic(f"trio {trio.__version__} has no switch for deterministic scheduling")
    before, kept = state["_ALLOW_DETERMINISTIC_SCHEDULING"], chance.getstate()
    state["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    chance.seed(seed)
    try:
        yield
    finally:
        state["_ALLOW_DETERMINISTIC_SCHEDULING"] = before
        chance.setstate(kept)


def run_virtually(main: Callable[[VirtualTime], Awaitable[None]], seed: int, on_spin: Callable[[], None]) -> float:
    """Run `main` to its end on virtual time; returns how many virtual seconds it took. Raises what `main` raises."""
    time = VirtualTime(on_spin)

    async def play() -> None:
        try:
            await main(time)
        finally:
            time.is_over = True

    with repeatable_scheduler(seed):
        trio.run(play, clock=time)
    return time.now


def probe_scheduler() -> None:
    """Run fifty tasks twice. Raises NotDeterministic where their order differs, or does not depend on the seed."""
    first, second, other = _probe(1), _probe(1), _probe(2)
    if first != second or first == other:
        raise NotDeterministic(f"trio {trio.__version__} does not schedule by the seed")


def _probe(seed: int) -> list[tuple[int, int]]:
    order: list[tuple[int, int]] = []

    async def walk(number: int, time: VirtualTime, bell: trio.Event) -> None:
        for step in range(3):
            await trio.sleep_until(step + 1 + number % 3)
            order.append((number, step))
        if number == PROBE_TASKS - 1:
            bell.set()
        await bell.wait()
        order.append((number, 3))

    async def main(time: VirtualTime) -> None:
        bell = trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(PROBE_TASKS):
                nursery.start_soon(walk, number, time, bell)

    run_virtually(main, seed, lambda: None)
    return order
