"""The nemesis: from one stream of chance, what goes wrong and when. Everything is healed at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from chaos.sim.chance import stream

if TYPE_CHECKING:
    from chaos.sim.full.machine import Machine
    from chaos.sim.full.world import Subject, World

FUSE_OPERATIONS_MAX = 40
SLOW_WRITE_SECONDS = 0.06
HEAL_PAUSE_SECONDS = 0.1
WALL_STEPS_MS = {
    "groups": (-3_600_000, -2_000, 2_000, 3_600_000),
    # The date is the measure for delayed messages and for the window that finds repeated sends. An hour too many
    # empties that window, and behind a leader whose date is an hour back delayed messages wait for an hour.
    "cluster": (-2_000, 2_000),
}


class Nemesis:
    """Draws faults and carries them out; remembers how to undo each."""

    def __init__(self, world: World, subject: Subject) -> None:
        self._world = world
        self._subject = subject
        self._network = world.network
        self._rng = stream(world.plan.seed, "nemesis")
        self._members = list(subject.members)
        self._do: dict[str, Callable[[str], None]] = {
            "kill": self._kill,
            "power": self._power,
            "pause": self._pause,
            "partition": self._partition,
            "one-way": self._one_way,
            "reset": self._reset,
            "stall": self._stall,
            "slow disk": self._slow_disk,
            "full disk": self._full_disk,
            "failing sync": self._failing_sync,
            "bit flip": self._bit_flip,
            "transfer": self._transfer,
            "restart": self._restart,
            "wall clock": self._wall_clock,
        }
        self._stopping: list[str] = []

    async def run(self, seconds: float) -> None:
        """Faults until so many seconds have passed. Checkpoint."""
        world, rng, plan = self._world, self._rng, self._world.plan
        until = world.time.now + seconds
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(rng.expovariate(1 / plan.fault_interval))
                if world.time.now >= until:
                    break
                self._do[rng.choice(plan.faults)](rng.choice(self._members))
                for name in self._stopping:
                    nursery.start_soon(self._subject.stop_node, name)
                self._stopping = []

    async def heal(self) -> None:
        """Undo everything that is still wrong; machines that are down start again."""
        world = self._world
        for machine in world.machines.values():
            machine.resume()
            disk = machine.disk
            disk.stalled_until = disk.write_seconds = 0.0
            disk.reserved = disk.failing_syncs = disk.failing_writes = 0
            if machine.process is not None:
                machine.process.fuse = None
            machine.restart_at = min(machine.restart_at, world.time.now)
        self._network.heal_all()
        await trio.sleep(HEAL_PAUSE_SECONDS)

    def _note(self, what: str) -> None:
        self._world.note("!!", what)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._world.agenda.call_after(seconds, act)

    def _machine(self, name: str) -> Machine:
        return self._world.machines[name]

    def _down_seconds(self) -> float:
        return self._rng.choice((0.05, 0.5, 3.0))

    # Processes

    def _kill(self, name: str) -> None:
        self._end(name, power=False)

    def _power(self, name: str) -> None:
        if self._world.plan.flush == "sync" and self._rng.random() < 0.25:
            self._note("the whole site loses power")
            for each in self._members:
                self._world.end_life(each, power=True, down_seconds=self._down_seconds())
        else:
            self._end(name, power=True)

    def _end(self, name: str, *, power: bool) -> None:
        """At once, or in the middle of the work at its disk."""
        world, rng = self._world, self._rng
        process = self._machine(name).process
        down = self._down_seconds()
        if power and not self._subject.may_lose_power(name):
            power = False
        if process is None or process.is_dead:
            return
        if rng.random() < 0.5:

            def burnt() -> None:
                is_power = power and self._subject.may_lose_power(name)
                world.end_life(name, power=is_power, down_seconds=down)

            process.fuse = rng.randrange(FUSE_OPERATIONS_MAX)
            process.on_fuse = burnt
        else:
            world.end_life(name, power=power, down_seconds=down)

    def _pause(self, name: str) -> None:
        machine, rng = self._machine(name), self._rng
        seconds, stops = rng.choice((0.2, 1.5, 4.0)), rng.random() < 0.4
        self._note(f"{name} stands still for {seconds} s{', its clock too' if stops else ''}")
        self._world.counts["pauses"] += 1
        number = machine.pause(stops=stops)
        self._later(seconds, lambda: machine.resume(number))

    def _restart(self, name: str) -> None:
        process = self._machine(name).process
        if process is not None and not process.is_dead and not self._machine(name).is_paused:
            self._note(f"{name} is to stop in order")
            self._stopping.append(name)

    def _transfer(self, _: str) -> None:
        self._note("leadership is to be handed over")
        self._world.counts["transfers"] += 1
        self._subject.transfer()

    def _wall_clock(self, name: str) -> None:
        step = self._rng.choice(WALL_STEPS_MS[self._world.plan.kind])
        self._note(f"the date of {name} is set by {step} ms")
        self._machine(name).clock.step_wall(step)

    # Network

    def _cut(self, pairs: list[tuple[str, str]], seconds: float) -> None:
        self._world.counts["partitions"] += 1
        for origin, target in pairs:
            self._network.cut(origin, target)

        def heal() -> None:
            self._note("a partition ends")
            for origin, target in pairs:
                self._network.heal(origin, target)

        self._later(seconds, heal)

    def _others(self, name: str) -> list[str]:
        return [machine.host for each, machine in self._world.machines.items() if each != name]

    def _partition(self, name: str) -> None:
        seconds = self._rng.choice((0.3, 2.0, 5.0))
        self._note(f"{name} is cut off for {seconds} s")
        host = self._machine(name).host
        self._cut([pair for other in self._others(name) for pair in ((host, other), (other, host))], seconds)

    def _one_way(self, name: str) -> None:
        rng = self._rng
        seconds = rng.choice((0.3, 2.0, 5.0))
        host = self._machine(name).host
        others = self._others(name)
        if rng.random() < 0.5:
            others = [rng.choice(others)]
        if rng.random() < 0.5:
            self._note(f"{name} is not heard by {others} for {seconds} s")
            self._cut([(host, other) for other in others], seconds)
        else:
            self._note(f"{name} does not hear {others} for {seconds} s")
            self._cut([(other, host) for other in others], seconds)

    def _reset(self, name: str) -> None:
        host = self._machine(name).host
        self._note(f"connections of {name} are reset")
        self._world.counts["resets"] += 1
        for each in list(self._network.streams):
            if each.local[0] == host and self._rng.random() < 0.7:
                each.reset()
                if each.other is not None:
                    each.other.reset()

    # Disks

    def _stall(self, name: str) -> None:
        seconds = self._rng.choice((0.3, 3.0, 12.0))
        self._note(f"the disk of {name} stalls for {seconds} s")
        self._world.counts["disk_faults"] += 1
        disk = self._machine(name).disk
        disk.stalled_until = max(disk.stalled_until, self._world.time.now + seconds)

    def _slow_disk(self, name: str) -> None:
        seconds = self._rng.choice((0.5, 4.0))
        self._note(f"writes of {name} take long for {seconds} s")
        self._world.counts["disk_faults"] += 1
        disk = self._machine(name).disk
        disk.write_seconds = SLOW_WRITE_SECONDS

        def end() -> None:
            disk.write_seconds = 0.0

        self._later(seconds, end)

    def _full_disk(self, name: str) -> None:
        seconds = self._rng.choice((0.5, 3.0, 6.0))
        self._note(f"the disk of {name} is full for {seconds} s")
        self._world.counts["disk_faults"] += 1
        disk = self._machine(name).disk
        disk.reserved = disk.quota
        disk.was_full_until = self._world.time.now + seconds

        def end() -> None:
            disk.reserved = 0

        self._later(seconds, end)

    def _failing_sync(self, name: str) -> None:
        """What was to be synced is lost, as with a power loss, should the page cache go too."""
        if self._subject.may_lose_power(name):
            self._note(f"the next sync of {name} fails")
            self._world.counts["disk_faults"] += 1
            self._machine(name).disk.failing_syncs += 1

    def _bit_flip(self, _: str) -> None:
        """A bit of the log turns while its node is down. Always the same node: the others' copies stay whole."""
        world = self._world
        name = self._subject.victim
        disk, folder = self._machine(name).disk, self._subject.log_folder(name)
        segments = [path for path in disk.paths() if path.startswith(folder) and path[-1].isdigit()]
        written = {path: nbytes for path in segments if (nbytes := disk.written_bytes(path))}
        if not written or not self._subject.is_whole():
            return
        path = self._rng.choice(list(written))
        world.end_life(name, power=False, down_seconds=self._down_seconds())
        offset, bit = self._rng.randrange(written[path]), self._rng.randrange(8)
        self._note(f"bit {bit} of byte {offset} of {path} turns")
        world.counts["flips"] += 1
        disk.flip_bit(path, offset, bit)
