"""Clocks of the full engine: time that jumps, and what each machine makes of it."""

from __future__ import annotations

import math

import pytest
import trio

from chaos.sim.full import clock
from chaos.sim.full.clock import EPOCH_MS, NodeClock, VirtualTime
from tests.unit.chaos.full_kit import Kit, play


def clock_of(kit: Kit, *, rate: float = 1.0) -> NodeClock:
    return kit.process(rate=rate).machine.clock


def test_waiting_costs_virtual_time_only() -> None:
    async def main(kit: Kit) -> None:
        await clock_of(kit).sleep(1e6)

    assert play(main) == 1e6


def test_what_is_due_together_happens_in_the_order_it_was_asked_for() -> None:
    async def main(kit: Kit) -> None:
        seen: list[tuple[str, float]] = []
        for name, when in (("late", 2.0), ("first", 1.0), ("second", 1.0)):
            kit.agenda.call_at(when, lambda name=name: seen.append((name, kit.time.now)))  # type: ignore[misc]
        await trio.sleep(3.0)
        assert seen == [("first", 1.0), ("second", 1.0), ("late", 2.0)]

    play(main)


@pytest.mark.parametrize("rate", [0.95, 1.05])
def test_a_clock_that_drifts_sleeps_longer_or_shorter(rate: float) -> None:
    async def main(kit: Kit) -> None:
        clock = clock_of(kit, rate=rate)
        own = clock.monotonic()
        await clock.sleep(10.0)
        assert clock.monotonic() - own == pytest.approx(10.0)
        assert kit.time.now == pytest.approx(10.0 / rate)

    play(main)


def test_a_deadline_has_come_when_its_sleep_ends() -> None:
    """Or a loop around `sleep_until` would spin: rounding must not end it a hair too early."""

    async def main(kit: Kit) -> None:
        clock = clock_of(kit, rate=1.049)
        for step in range(1, 200):
            deadline = clock.monotonic() + step / 7
            await clock.sleep_until(deadline)
            assert clock.monotonic() >= deadline

    play(main)


def test_a_step_of_the_date_moves_no_deadline() -> None:
    async def main(kit: Kit) -> None:
        clock = clock_of(kit)
        before = clock.monotonic()
        clock.step_wall(-3_600_000)
        assert clock.wall_ms() == EPOCH_MS - 3_600_000 and clock.monotonic() == before
        with pytest.raises(trio.TooSlowError), clock.fail_after(2.0):
            await clock.sleep(5.0)
        assert kit.time.now == 2.0

    play(main)


def test_a_stopped_process_misses_its_deadlines_and_has_them_all_at_once() -> None:
    async def main(kit: Kit) -> None:
        machine = kit.process().machine
        woken: list[float] = []

        async def sleeper(seconds: float) -> None:
            await machine.clock.sleep(seconds)
            woken.append(kit.time.now)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper, 1.0)
            nursery.start_soon(sleeper, 2.0)
            await trio.sleep(0.5)
            machine.pause(stops=False)
            await trio.sleep(9.5)
            assert woken == []
            machine.resume()
        assert woken == [10.0, 10.0]

    play(main)


def test_a_suspended_machine_has_lost_no_time_of_its_own() -> None:
    async def main(kit: Kit) -> None:
        machine = kit.process().machine
        woken: list[float] = []

        async def sleeper() -> None:
            await machine.clock.sleep(1.0)
            woken.append(kit.time.now)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await trio.sleep(0.25)
            own = machine.clock.monotonic()
            machine.pause(stops=True)
            await trio.sleep(10.0)
            assert machine.clock.monotonic() == own
            machine.resume()
        assert woken == [11.0]

    play(main)


def test_of_two_pauses_that_overlap_the_later_one_ends_both() -> None:
    async def main(kit: Kit) -> None:
        machine = kit.process().machine
        first = machine.pause(stops=False)
        second = machine.pause(stops=False)
        machine.resume(first)
        assert machine.is_paused
        machine.resume(second)
        assert not machine.is_paused

    play(main)


def test_what_a_synchronous_call_took_is_gone_from_the_clock_it_happened_on() -> None:
    async def main(kit: Kit) -> None:
        clock, other = clock_of(kit), clock_of(kit)
        before = clock.monotonic()
        clock.spend(0.5)
        assert clock.monotonic() == before + 0.5 and other.monotonic() == before
        await trio.sleep(0.25)
        assert clock.monotonic() == before + 0.5, "it never goes back, and waits until the world is there"

    play(main)


def test_a_program_in_which_nobody_waits_for_time_is_found() -> None:
    with pytest.raises(RuntimeError, match="dead end"):
        VirtualTime(lambda: None).deadline_to_sleep_time(math.inf)


def test_a_program_that_never_waits_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SPIN_LOOKS_MAX", 100)
    found: list[int] = []
    time = VirtualTime(lambda: found.append(1))
    for look in range(150):
        time.current_time()
        assert len(found) == (look >= 99)
    time.deadline_to_sleep_time(1.0)
    for _ in range(99):
        time.current_time()
    assert len(found) == 1, "time has gone on: counting begins anew"
