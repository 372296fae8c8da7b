"""A few simulated machines of the full engine without a cluster on them, for tests of their disks, links and clocks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import trio

from chaos.sim.full.clock import Agenda, NodeClock, VirtualTime, run_virtually
from chaos.sim.full.files import Disk
from chaos.sim.full.machine import Machine, Process
from chaos.sim.full.net import Network

LATENCY = 0.01


class Kit:
    """Machines by name, a network between them, and the world's time."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.agenda = Agenda(time)
        self.delivered: list[tuple[str, bytes]] = []
        self.network = Network(1, self.agenda, lambda: time.now, lambda name, data: self.delivered.append((name, data)))
        self.network.latency = LATENCY
        self.network.short_reads = self.network.short_writes = 0.0

    def process(self, name: str = "a", *, rate: float = 1.0) -> Process:
        """The first life on a new machine; the next one with `again`."""
        number = len(self.network.hosts) + 1
        disk = Disk(name, Random(name), sync_seconds=0.01)
        disk.prepare_folder("/d")
        clock = NodeClock(self.time, rate=rate)
        machine = Machine(name, f"10.0.0.{number}", 1, self.time, self.agenda, clock, disk)
        self.network.hosts[machine.host] = machine
        return self.again(machine)

    def again(self, machine: Machine) -> Process:
        return Process(machine, self.network)


def play(main: Callable[[Kit], Awaitable[None]]) -> float:
    """Run `main` on virtual time; returns how many virtual seconds it took."""

    async def run(time: VirtualTime) -> None:
        kit = Kit(time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kit.agenda.run)
            await main(kit)
            nursery.cancel_scope.cancel()

    return run_virtually(run, 1, lambda: None)
