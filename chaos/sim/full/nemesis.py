"""The nemesis: carries out the faults of a schedule, remembers how to undo each, and heals everything at the end."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import trio

from chaos.sim.chance import stream
from chaos.sim.schedule import LEADER, Fault

if TYPE_CHECKING:
    from chaos.sim.full.files import Disk
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
    """Carries faults out. Everything drawn meanwhile comes from the fault's own stream."""

    def __init__(self, world: World, subject: Subject, background: trio.Nursery) -> None:
        """What takes its time goes on in `background`."""
        self._world = world
        self._subject = subject
        self._background = background
        self._network = world.network
        self._do: dict[str, Callable[[Fault, str, Random], None]] = {
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
            "members": self._members,
            "retention": self._retention,
        }

    async def run(self) -> None:
        """All faults of the world at their times, until the plan ends them. Checkpoint."""
        seconds = self._world.plan.fault_seconds
        for fault in self._world.faults:
            if fault.at >= seconds:
                break
            await trio.sleep_until(fault.at)
            name = self._subject.leader() if fault.target == LEADER else fault.target
            if name not in self._world.machines:
                names = self._world.plan.members
                name = names[fault.number % len(names)]
            self._world.faults_applied[fault.kind] += 1
            self._do[fault.kind](fault, name, stream(self._world.plan.seed, f"fault/{fault.number}"))
        await trio.sleep_until(seconds)

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

    # Processes

    def _kill(self, fault: Fault, name: str, rng: Random) -> None:
        self._end(fault, name, rng, power=False)

    def _power(self, fault: Fault, name: str, rng: Random) -> None:
        if self._world.plan.flush == "sync" and rng.random() < 0.25:
            self._note("the whole site loses power")
            for each in self._world.plan.targets:
                self._world.end_life(each, power=True, down_seconds=fault.seconds * rng.random())
        else:
            self._end(fault, name, rng, power=True)

    def _end(self, fault: Fault, name: str, rng: Random, *, power: bool) -> None:
        """At once, or in the middle of the work at its disk."""
        world = self._world
        process = self._machine(name).process
        if power and not self._subject.may_lose_power(name):
            power = False
        if process is None or process.is_dead:
            return
        if rng.random() < 0.5:

            def burnt() -> None:
                is_power = power and self._subject.may_lose_power(name)
                world.end_life(name, power=is_power, down_seconds=fault.seconds)

            process.fuse = rng.randrange(FUSE_OPERATIONS_MAX)
            process.on_fuse = burnt
        else:
            world.end_life(name, power=power, down_seconds=fault.seconds)

    def _pause(self, fault: Fault, name: str, rng: Random) -> None:
        machine = self._machine(name)
        stops = rng.random() < 0.4
        self._note(f"{name} stands still for {fault.seconds} s{', its clock too' if stops else ''}")
        self._world.counts["pauses"] += 1
        number = machine.pause(stops=stops)
        self._later(fault.seconds, lambda: machine.resume(number))

    def _restart(self, fault: Fault, name: str, rng: Random) -> None:
        process = self._machine(name).process
        if process is not None and not process.is_dead and not self._machine(name).is_paused:
            self._note(f"{name} is to stop in order")
            self._background.start_soon(self._subject.stop_node, name)

    def _wall_clock(self, fault: Fault, name: str, rng: Random) -> None:
        step = rng.choice(WALL_STEPS_MS[self._world.plan.kind])
        self._note(f"the date of {name} is set by {step} ms")
        self._machine(name).clock.step_wall(step)

    # What operators do

    def _transfer(self, fault: Fault, name: str, rng: Random) -> None:
        self._note("leadership is to be handed over")
        self._world.counts["transfers"] += 1
        self._subject.transfer(name)

    def _members(self, fault: Fault, name: str, rng: Random) -> None:
        self._background.start_soon(self._subject.change_members, rng)

    def _retention(self, fault: Fault, name: str, rng: Random) -> None:
        self._note("what has expired is to be deleted")
        self._subject.delete_expired()

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

    def _partition(self, fault: Fault, name: str, rng: Random) -> None:
        self._note(f"{name} is cut off for {fault.seconds} s")
        host = self._machine(name).host
        self._cut([pair for other in self._others(name) for pair in ((host, other), (other, host))], fault.seconds)

    def _one_way(self, fault: Fault, name: str, rng: Random) -> None:
        seconds = fault.seconds
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

    def _reset(self, fault: Fault, name: str, rng: Random) -> None:
        host = self._machine(name).host
        self._note(f"connections of {name} are reset")
        self._world.counts["resets"] += 1
        for each in list(self._network.streams):
            if each.local[0] == host and rng.random() < 0.7:
                each.reset()
                if each.other is not None:
                    each.other.reset()

    # Disks

    def _stall(self, fault: Fault, name: str, rng: Random) -> None:
        disk = self._hurt(name, f"stalls for {fault.seconds} s")
        disk.stalled_until = max(disk.stalled_until, self._world.time.now + fault.seconds)

    def _hurt(self, name: str, how: str) -> Disk:
        self._note(f"the disk of {name} {how}")
        self._world.counts["disk_faults"] += 1
        return self._machine(name).disk

    def _slow_disk(self, fault: Fault, name: str, rng: Random) -> None:
        disk = self._hurt(name, f"takes long for every write for {fault.seconds} s")
        disk.write_seconds = SLOW_WRITE_SECONDS

        def end() -> None:
            disk.write_seconds = 0.0

        self._later(fault.seconds, end)

    def _full_disk(self, fault: Fault, name: str, rng: Random) -> None:
        disk = self._hurt(name, f"is full for {fault.seconds} s")
        disk.reserved = disk.quota
        disk.was_full_until = self._world.time.now + fault.seconds

        def end() -> None:
            disk.reserved = 0

        self._later(fault.seconds, end)

    def _failing_sync(self, fault: Fault, name: str, rng: Random) -> None:
        """What was to be synced is lost, as with a power loss, should the page cache go too."""
        if self._subject.may_lose_power(name):
            self._hurt(name, "fails the next sync").failing_syncs += 1

    def _bit_flip(self, fault: Fault, name: str, rng: Random) -> None:
        """A bit of the log turns while its node is down. Always the same node: the others' copies stay whole."""
        world = self._world
        name = self._subject.victim
        disk, folder = self._machine(name).disk, self._subject.log_folder(name)
        segments = [path for path in disk.paths() if path.startswith(folder) and path[-1].isdigit()]
        written = {path: nbytes for path in segments if (nbytes := disk.written_bytes(path))}
        if not written or not self._subject.is_whole():
            return
        path = rng.choice(list(written))
        world.end_life(name, power=False, down_seconds=fault.seconds)
        offset, bit = rng.randrange(written[path]), rng.randrange(8)
        self._note(f"bit {bit} of byte {offset} of {path} turns")
        world.counts["flips"] += 1
        disk.flip_bit(path, offset, bit)
