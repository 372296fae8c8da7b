"""A simulated machine, and the processes that run on it one after the other.

A process is one life of a node: from its start to its end, kill or power loss. All that a dead one still does in its
clean-up is without effect: its files and streams refuse it. A paused machine takes no notice of anything until it goes
on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from chaos.sim.chance import stream
from chaos.sim.full.clock import Agenda, NodeClock, VirtualTime
from runtime.model import Env

if TYPE_CHECKING:
    from chaos.sim.full.files import Disk
    from chaos.sim.full.net import Network

THREADS = 2
THREAD_SECONDS = 0.0005


class Dead(OSError):
    """The process that asks is no more."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the process is dead")


class Machine:
    """A host: its clock, its disk, and whether it stands still."""

    def __init__(
        self, name: str, host: str, seed: int, time: VirtualTime, agenda: Agenda, clock: NodeClock, disk: Disk
    ) -> None:
        self.name = name
        self.host = host
        self.seed = seed
        self.time = time
        self.agenda = agenda
        self.clock = clock
        self.disk = disk
        self.is_up = True
        """False between a power loss and the next start: it answers nothing at all."""
        self.boots = 1
        self.lives = 0
        self.restart_at = 0.0
        """When a dead process is followed by the next one, unless the machine is a spare one."""
        self.is_spare = False
        """Nobody wants a node here (yet, or any more): nothing is started on it by itself."""
        self.process: Process | None = None
        self._held: list[Callable[[], None]] = []
        self._pauses = 0

    @property
    def is_paused(self) -> bool:
        return self.clock.is_paused

    def when_running(self, act: Callable[[], None]) -> None:
        """Now, or when the machine goes on."""
        if self.clock.is_paused:
            self._held.append(act)
        else:
            act()

    def pause(self, *, stops: bool) -> int:
        """Stand still. Returns the number `resume` needs: of two pauses that overlap the later one counts."""
        self._pauses += 1
        if not self.clock.is_paused:
            self.clock.pause(stops=stops)
        return self._pauses

    def resume(self, number: int | None = None) -> None:
        if self.clock.is_paused and number in (None, self._pauses):
            self.clock.resume()
            held, self._held = self._held, []
            for act in held:
                act()

    async def delay(self, seconds: float) -> None:
        """Wait for something outside of the program (a disk, a wire), whose time is the world's. Checkpoint."""
        gate = Gate(self)
        self.agenda.call_after(seconds, gate.open)
        await gate.wait()


class Gate:
    """Parks one task until it is opened; a paused machine's task goes on when the machine does."""

    __slots__ = ("_is_open", "_machine", "_task")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._task: trio.lowlevel.Task | None = None
        self._is_open = False

    def open(self) -> None:
        self._machine.when_running(self._open)

    def _open(self) -> None:
        self._is_open = True
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        """Checkpoint; cancel-safe."""
        if self._is_open:
            await trio.lowlevel.checkpoint()
            return
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Process:
    """One life of a node. Its `env` is all the node knows of the world."""

    def __init__(self, machine: Machine, network: Network) -> None:
        from chaos.sim.full.files import SimFiles
        from chaos.sim.full.net import SimNet

        machine.is_up = True
        machine.lives += 1
        machine.process = self
        self.machine = machine
        self.network = network
        self.number = machine.lives
        self.is_dead = False
        self.scope = trio.CancelScope()
        self.fuse: int | None = None
        """Disk operations until `on_fuse`: the way to die in the middle of one of its threads' work."""
        self.on_fuse: Callable[[], None] = lambda: None
        self.is_in_thread = False
        self.debt = 0.0
        """Seconds that the work under way in a thread has spent at the disk."""
        self._threads = trio.CapacityLimiter(THREADS)
        self._shields: dict[trio.CancelScope, None] = {}
        self._rng = stream(machine.seed, f"{machine.name}/{self.number}/threads")
        self._salt = stream(machine.seed, f"{machine.name}/{self.number}/salt")
        self.env = Env(
            clock=machine.clock,
            rng=self._stream,
            ids=self,
            files=SimFiles(self),
            net=SimNet(self, network),
            run_in_thread=self.run_in_thread,
        )

    def _stream(self, name: str) -> Random:
        return stream(self.machine.seed, f"{self.machine.name}/{self.number}/{name}")

    # runtime.model.Ids

    def salt(self, nbytes: int) -> bytes:
        return self._salt.randbytes(nbytes)

    @property
    def host(self) -> str:
        return self.machine.name

    @property
    def pid(self) -> int:
        return 1000 + self.number

    @property
    def boot_id(self) -> str:
        return f"{self.machine.name}-boot-{self.machine.boots}"

    @property
    def memory_bytes(self) -> int:
        return 1 << 30

    # Threads

    async def run_in_thread(self, function: Callable[..., Any], *args: object) -> Any:
        """As a thread would, but in one step at its beginning; what it spent at the disk is waited for afterwards.

        As with real threads a cancellation waits for the end, except that of death.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True) as shield:
            self._shields[shield] = None
            try:
                async with self._threads:
                    await self.machine.delay(self._rng.random() * 2 * THREAD_SECONDS)
                    if self.is_dead:
                        raise Dead
                    self.is_in_thread, self.debt = True, 0.0
                    try:
                        return function(*args)
                    finally:
                        self.is_in_thread = False
                        if self.debt and not self.is_dead:
                            await self.machine.delay(self.debt)
            finally:
                del self._shields[shield]
        await trio.lowlevel.checkpoint()  # only a death ends the shielded part
        raise Dead

    def shielded(self) -> trio.CancelScope:
        """A shield that only death breaks; to be used through `hold` and `release`."""
        shield = trio.CancelScope(shield=True)
        self._shields[shield] = None
        return shield

    def release(self, shield: trio.CancelScope) -> None:
        del self._shields[shield]

    # The end

    def burn(self) -> None:
        """One step of disk work. Raises Dead where the process is no more, or ends just here."""
        if self.is_dead:
            raise Dead
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                self.on_fuse()
                if self.is_dead:
                    raise Dead

    def die(self, *, power: bool, rng: Random) -> None:
        """End this life on the spot. The page cache stays, except with a power loss."""
        if self.is_dead:
            return
        self.is_dead = True
        if power:
            self.machine.is_up = False
            self.machine.boots += 1
            self.machine.disk.lose_power(rng)
        self.network.process_died(self, is_silent=power)
        self.machine.resume()
        self.scope.cancel()
        for shield in list(self._shields):
            shield.cancel()
