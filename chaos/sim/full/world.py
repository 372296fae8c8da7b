"""The world of one seed: machines, network, nemesis and judge, around the real programs.

    start -> workload under faults -> heal -> settle (no new work) -> check

What runs on the machines is the affair of a `Subject`: raft groups (`groups.py`) or a whole cluster (`cluster.py`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, Protocol
from zlib import crc32

import trio

from chaos.sim.chance import stream
from chaos.sim.full.clock import Agenda, NodeClock, VirtualTime
from chaos.sim.full.files import Disk
from chaos.sim.full.machine import Machine, Process
from chaos.sim.full.nemesis import Nemesis
from chaos.sim.full.net import Network
from chaos.sim.full.plan import SECONDS_TO_SETTLE, FullPlan
from chaos.sim.schedule import Fault
from runtime.logs import Logger

LOOK_SECONDS = 0.05
RESTART_SECONDS = 1.0
"""What a supervisor waits before it starts a node that stopped by itself."""
VIRTUAL_SECONDS_MAX = 600.0


class Broken(AssertionError):
    """A promise does not hold. The message says which."""


class Subject(Protocol):
    """What runs on the machines, and what must hold of it."""

    victim: str
    """The one machine whose log may rot."""

    def log_folder(self, name: str) -> str:
        """Where a machine's segments are."""

    def leader(self) -> str | None:
        """Who leads the highest term, as far as running nodes say."""

    def is_whole(self) -> bool:
        """Whether every member holds all that is committed, and nothing has been damaged before."""

    async def run_node(self, process: Process, task_status: trio.TaskStatus[Any]) -> None:
        """One life of a node, until it is cancelled or stops."""

    async def run_workload(self) -> None:
        """Clients at work, until cancelled."""

    async def finish_workload(self) -> None:
        """What clients still have to do once all faults are over. May take its time."""

    def may_lose_power(self, name: str) -> bool:
        """Whether what was acknowledged survives when this machine loses power now."""

    async def stop_node(self, name: str) -> None:
        """Ask a running node to stop in order."""

    def transfer(self, target: str) -> None:
        """Have a leader hand over, to `target` where that can take it."""

    async def change_members(self, rng: Random) -> None:
        """One change of the group, whatever makes sense now."""

    def delete_expired(self) -> None:
        """Have a leader give up what retention does not keep."""

    def is_excused(self, process: Process, error: BaseException) -> bool:
        """Whether a node may end like this, in view of what its disk did to it."""

    def unsettled(self) -> str | None:
        """Why the cluster has not come to rest yet; None once it has."""

    async def check(self) -> None:
        """Raises Broken."""

    def leftovers(self) -> str | None:
        """What has leaked, in one sentence."""

    def describe(self, name: str) -> str:
        """The state of one machine's node in a line."""


class SimLogger(Logger):
    """Writes into the trace of the world."""

    __slots__ = ("_node", "_world")

    def __init__(self, world: World, node: str, fields: dict[str, Any]) -> None:
        super().__init__("sim", fields)
        self._world = world
        self._node = node

    def bind(self, **fields: Any) -> Logger:
        return SimLogger(self._world, self._node, {**self._fields, **fields})

    def _log(self, level: str, event: str, fields: dict[str, Any], traceback: bool = False) -> None:
        self._world.logged[event] += 1
        if level != "debug" or self._world.keeps_trace:
            text = " ".join([event, *(f"{key}={value!r}" for key, value in {**self._fields, **fields}.items())])
            if level == "debug":
                self._world.remark(self._node, text)
            else:
                self._world.note(self._node, text)


class World:
    """Everything there is under one seed."""

    def __init__(self, plan: FullPlan, faults: Sequence[Fault], time: VirtualTime, *, keep_trace: bool = False) -> None:
        self.plan = plan
        self.faults = tuple(faults)
        self.faults_applied: Counter[str] = Counter()
        self.time = time
        self.agenda = Agenda(time)
        self.keeps_trace = keep_trace
        self.trace: list[str] = []
        self._hash = hashlib.sha256()
        self.counts: Counter[str] = Counter()
        self.logged: Counter[str] = Counter()
        """How often nodes said what in their logs."""
        self.violation: str | None = None
        self.at_seconds = 0.0
        self.standing: tuple[str, ...] = ()
        self.scope = trio.CancelScope()
        self.network = Network(plan.seed, self.agenda, lambda: time.now, self._observe)
        self.network.latency = plan.latency
        self.network.jitter = plan.jitter
        self.machines: dict[str, Machine] = {}
        self.rng = stream(plan.seed, "world")
        self.delivered = 0
        self.is_calm = False
        """No more faults: whoever stops now, stops for no good reason."""

    # Machines

    def add_machine(self, name: str, *, is_spare: bool = False) -> Machine:
        plan, rng = self.plan, stream(self.plan.seed, f"machine/{name}")
        clock = NodeClock(
            self.time,
            rate=1.0 + plan.drift * rng.uniform(-1, 1),
            wall_offset_ms=int(rng.uniform(-1, 1) * plan.drift * 1000),
        )
        disk = Disk(name, stream(plan.seed, f"disk/{name}"), sync_seconds=plan.sync_seconds)
        disk.cold = plan.cold
        disk.prepare_folder(f"/{name}")
        machine = Machine(name, f"10.0.0.{len(self.machines) + 1}", plan.seed, self.time, self.agenda, clock, disk)
        machine.is_spare = is_spare
        self.machines[name] = machine
        self.network.hosts[machine.host] = machine
        return machine

    def logger(self, name: str) -> Logger:
        return SimLogger(self, name, {})

    # The trace

    def note(self, who: str, what: str) -> None:
        """Something happened that every run of this seed must repeat."""
        line = f"{self.time.now:10.6f} {who:4} {what}"
        self._hash.update(line.encode())
        if self.keeps_trace:
            self.trace.append(line)

    def remark(self, who: str, what: str) -> None:
        """For readers only."""
        self.trace.append(f"{self.time.now:10.6f} {who:4}   {what}")

    def _observe(self, name: str, data: bytes) -> None:
        self.delivered += 1
        line = f"{self.time.now:.9f}{name}{len(data)}/{crc32(data):08x}"
        self._hash.update(line.encode())

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()[:16]

    def broke(self, what: str) -> None:
        """A promise does not hold; the run ends. Callable from anywhere."""
        if self.violation is None:
            self.violation = what
            self.at_seconds = self.time.now
            self.note("all", f"BROKEN: {what}")
            self._end()

    def _stop_and_look(self, subject: Subject) -> None:
        self.at_seconds = self.time.now
        self.standing = tuple(subject.describe(name) for name in self.plan.members)
        self._end()

    def _end(self) -> None:
        """Nothing moves any more; not even work in threads is waited for."""
        self.scope.cancel()
        for machine in self.machines.values():
            if machine.process is not None:
                machine.process.die(power=False, rng=self.rng)

    # The run

    async def run(self, subject: Subject, until: float | None = None) -> None:
        """The whole life of the world, or its beginning `until` a virtual second. What goes wrong is in `violation`
        afterwards."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.agenda.run)
                self.agenda.call_at(VIRTUAL_SECONDS_MAX, lambda: self.broke("the run does not come to an end"))
                if until is not None:
                    self.agenda.call_at(until, lambda: self._stop_and_look(subject))
                for name in self.machines:
                    nursery.start_soon(self.keep_running, subject, name)
                async with trio.open_nursery() as workload:
                    workload.start_soon(subject.run_workload)
                    nemesis = Nemesis(self, subject, workload)
                    await nemesis.run()
                    await nemesis.heal()
                    self.is_calm = True
                    workload.cancel_scope.cancel()
                self.note("all", "healed")
                try:
                    with trio.fail_after(SECONDS_TO_SETTLE):
                        await subject.finish_workload()
                        await self.settle(subject)
                    await subject.check()
                    left = subject.leftovers()
                    if left is not None:
                        raise Broken(left)
                except Broken as error:
                    self.broke(str(error))
                except trio.TooSlowError:
                    self.broke(f"not level {SECONDS_TO_SETTLE:.0f} s after the last fault: {subject.unsettled()}")
                self.note("all", "checked")
                self._end()

    async def settle(self, subject: Subject) -> None:
        while subject.unsettled() is not None:  # noqa: ASYNC110 - members of three machines, no event to wait for
            await trio.sleep(LOOK_SECONDS)

    async def keep_running(self, subject: Subject, name: str) -> None:
        """One life after the other, as a supervisor does."""
        machine = self.machines[name]
        await self._wait_for_restart(machine)
        while True:
            process = Process(machine, self.network)
            self.note(name, f"starts, life {process.number}")
            self.counts["starts"] += 1
            error: BaseException | None = None
            with process.scope:
                try:
                    await subject.run_node(process, trio.TASK_STATUS_IGNORED)
                except* Exception as raised:  # whatever a node raises is judged here
                    error = raised
            if process.is_dead:
                await self._wait_for_restart(machine)
                continue
            process.die(power=False, rng=self.rng)
            for each in leaves(error):
                self.note(name, f"ended: {type(each).__name__}: {each}")
                self.counts["ends"] += 1
                if not subject.is_excused(process, each):
                    self.broke(f"{name} ended with {type(each).__name__}: {each}{where(each)}")
            await trio.sleep(RESTART_SECONDS)
            await self._wait_for_restart(machine)

    async def _wait_for_restart(self, machine: Machine) -> None:
        """Until a node is wanted there and the nemesis lets it start, which may come to be earlier than it said."""
        while machine.is_spare or machine.restart_at > self.time.now:
            left = LOOK_SECONDS if machine.is_spare else machine.restart_at - self.time.now
            await trio.sleep(min(LOOK_SECONDS, left))

    # What the nemesis does to a process

    def end_life(self, name: str, *, power: bool, down_seconds: float) -> None:
        """Kill, or take the power away; it starts again after so many seconds."""
        machine = self.machines[name]
        process = machine.process
        if process is None or process.is_dead:
            return
        self.note(name, "loses power" if power else "is killed")
        self.counts["power_losses" if power else "crashes"] += 1
        machine.restart_at = self.time.now + down_seconds
        process.die(power=power, rng=stream(self.plan.seed, f"death/{name}/{process.number}"))


def leaves(error: BaseException | None) -> list[BaseException]:
    """The exceptions in a tree of groups."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [] if error is None else [error]


def where(error: BaseException) -> str:
    """The innermost place of an exception, for its report."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    code = trace.tb_frame.f_code
    return f" ({'/'.join(code.co_filename.split('/')[-2:])}:{trace.tb_lineno} {code.co_name})"
