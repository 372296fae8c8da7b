"""The first subject: the members of one raft group with a small state machine, and proposers beside them.

The machine keeps which operation lies at which byte of the log. The judge sees every entry that any member applies, at
the moment it does, and every answer a proposer gets.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from zlib import crc32

import cbor2
import trio
from attrs import define, field

from chaos.sim.full.machine import Process
from chaos.sim.full.subject import RaftSubject, excuses
from chaos.sim.full.world import Broken, World
from dledger.core.types import Role
from dledger.errors import NotLeader, Overloaded, StoreFailed
from dledger.group import EntryView, RaftGroup

PEER_PORT: Final = 10_911
CHECKPOINT_SECONDS: Final = 3.0
READ_SECONDS: Final = 0.05
HEAD: Final = struct.Struct("<IQQ")
"""size | operation | wall milliseconds; filler follows."""
OPS: Final = b"\x01an entry without records"
TASKS_MAX: Final = 80
"""Of one quiet member; its connections included."""


@define
class Operation:
    """One proposal, and what became of it as far as its proposer knows."""

    number: int
    outcome: str = "waiting"
    """"waiting" | "acknowledged" | "refused" (for certain) | "unknown"."""
    offset: int = -1
    node: str = ""
    life: int = 0


@define
class Judge:
    """All that members and proposers did, and what must hold between them at any time."""

    world: World
    operations: list[Operation] = field(factory=list)
    entries: dict[int, tuple[int, int, int]] = field(factory=dict)
    """Committed entries by index: (term, position, checksum of the body)."""
    places: dict[int, int] = field(factory=dict)
    """Committed operations: number -> offset."""
    leaders: dict[int, str] = field(factory=dict)
    seen: dict[int, int] = field(factory=dict)
    """What readers saw: offset -> operation."""

    def leads(self, node: str, term: int) -> None:
        former = self.leaders.setdefault(term, node)
        if former != node:
            self.world.broke(f"{former} and {node} both lead term {term}")

    def applies(self, node: str, index: int, term: int, position: int, body: bytes, found: Sequence[Place]) -> None:
        entry = (term, position, crc32(body))
        known = self.entries.setdefault(index, entry)
        if known != entry:
            self.world.broke(f"{node} applies {entry} at index {index}, another member {known}")
        for offset, number in found:
            before = self.places.setdefault(number, offset)
            if before != offset:
                self.world.broke(f"operation {number} is in the log twice: at {before} and at {offset}")
            elif self.operations[number].outcome == "refused":
                self.world.broke(f"operation {number} was refused for certain and is committed at {offset}")

    def told(self, operation: Operation, outcome: str) -> None:
        """A proposer's answer."""
        if operation.outcome != "waiting":
            self.world.broke(f"operation {operation.number} is answered twice: {operation.outcome}, then {outcome}")
        operation.outcome = outcome
        if outcome == "acknowledged":
            place = self.places.get(operation.number)
            if place != operation.offset:
                self.world.broke(
                    f"operation {operation.number} is acknowledged at {operation.offset}, but is at {place}"
                )
        elif outcome == "refused" and operation.number in self.places:
            self.world.broke(f"operation {operation.number} is committed, but refused for certain")


Place = tuple[int, int]
"""(offset, operation)."""


class Rows:
    """What is staged of one entry."""

    __slots__ = ("body", "found", "position", "waiters")

    def __init__(self) -> None:
        self.body = b""
        self.found: list[Place] = []
        self.waiters: list[Operation] = []
        self.position = 0


def places_in(body: memoryview, count: int, position: int) -> list[Place]:
    """The operations of an entry's records, the first of which lies at `position`."""
    found: list[Place] = []
    at = 0
    for _ in range(count):
        size, number, _ = HEAD.unpack_from(body, at)
        found.append((position + at, number))
        at += size
    return found


class SmallMachine:
    """`dledger.machine.StateMachine`: the place of each operation."""

    def __init__(self, judge: Judge, process: Process, name: str) -> None:
        self._judge = judge
        self._process = process
        self._name = name
        self.applied: dict[int, int] = {}
        """offset -> operation."""
        self.pending: list[Place] = []
        self.index = 0
        self.first_position = 0
        self.is_checkpoint_wanted = False
        self.group: RaftGroup | None = None

    def stage(self, entry: EntryView) -> Rows:
        rows = Rows()
        rows.body = bytes(entry.body)
        rows.position = entry.body_position
        rows.found = places_in(entry.body, entry.count, entry.body_position)
        self.pending.extend(rows.found)
        return rows

    def apply(self, index: int, term: int, staged: Rows) -> None:
        found = staged.found
        if self.pending[: len(found)] != found:
            self._judge.world.broke(f"{self._name} applies {found}, pending are {self.pending[: len(found)]}")
        del self.pending[: len(found)]
        if index <= self.index:
            self._judge.world.broke(f"{self._name} applies entry {index} after {self.index}")
        self.index = index
        if not self._process.is_dead:
            self._judge.applies(self._name, index, term, staged.position, staged.body, found)
        for offset, number in found:
            self.applied[offset] = number
        self._tell(staged, "acknowledged")

    def discard(self, staged: Rows) -> None:
        found = staged.found
        if found and self.pending[-len(found) :] != found:
            self._judge.world.broke(f"{self._name} discards {found}, pending end with {self.pending[-len(found) :]}")
        if found:
            del self.pending[-len(found) :]
        self._tell(staged, "refused")

    def orphan(self, staged: Rows) -> None:
        self._tell(staged, "unknown")

    def _tell(self, staged: Rows, outcome: str) -> None:
        waiters, staged.waiters = staged.waiters, []
        if not self._process.is_dead:
            for operation in waiters:
                self._judge.told(operation, outcome)

    def role_changed(self, role: Role, term: int, leader_id: str | None, ready: bool) -> None:
        if role is Role.LEADER and not self._process.is_dead:
            self._judge.leads(self._name, term)

    def app_message(self, peer_id: str, payload: bytes) -> None:
        """Members of this machine have nothing to say to each other."""

    def turn_done(self) -> None:
        """No connections to flush."""

    def restore(self, checkpoint: bytes | None, *, first_index: int = 1, first_position: int = 0) -> int:
        self.applied.clear()
        self.pending.clear()
        self.index = 0
        self.first_position = first_position
        if checkpoint is not None:
            self.index, flat = cbor2.loads(checkpoint)
            self.applied = {offset: number for offset, number in flat if offset >= first_position}
        return self.index

    def checkpoint(self) -> tuple[int, bytes]:
        return self.index, cbor2.dumps([self.index, [list(place) for place in self.applied.items()]])

    def stopped(self) -> None:
        """Nothing but tables."""

    def trim(self, first_position: int) -> None:
        self.first_position = max(self.first_position, first_position)
        for offset in [offset for offset in self.applied if offset < first_position]:
            del self.applied[offset]

    def trim_floor(self) -> int:
        return 1 << 62

    def store_time_ms(self, entry: EntryView) -> int | None:
        if not entry.count:
            return None
        stored: int = HEAD.unpack_from(entry.body)[2]
        return stored

    def checkpoint_soon(self) -> None:
        self.is_checkpoint_wanted = True

    def put(self, group: RaftGroup, operation: Operation, size: int, wall_ms: int) -> None:
        """Raises as `RaftGroup.reserve`."""
        record = HEAD.pack(size, operation.number, wall_ms).ljust(size, b".")
        operation.offset = group.reserve(size)
        staged = group.open_staged()
        if staged is None:
            staged = Rows()
            group.set_open_staged(staged)
            staged.position = operation.offset
        group.add_record(record)
        place = (operation.offset, operation.number)
        staged.found.append(place)
        staged.body += record
        staged.waiters.append(operation)
        self.pending.append(place)


class GroupsSubject(RaftSubject):
    """`world.Subject`: members of a raft group, proposers, readers."""

    port = PEER_PORT

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._judge = Judge(world)
        self._groups: dict[str, RaftGroup] = {}
        self._machines: dict[str, SmallMachine] = {}

    @property
    def groups(self) -> Mapping[str, RaftGroup]:
        return self._groups

    @property
    def operations(self) -> list[Operation]:
        return self._judge.operations

    @property
    def entries(self) -> int:
        return len(self._judge.entries)

    @property
    def elections(self) -> int:
        return len(self._judge.leaders)

    def folder(self, name: str) -> str:
        return f"/{name}/raft"

    # Lives

    async def run_node(self, process: Process, task_status: trio.TaskStatus[Any]) -> None:
        name = process.machine.name
        machine = SmallMachine(self._judge, process, name)
        config = self.group_config(name, "g", secret=b"between us")
        group = RaftGroup(process.env, config, machine, self._world.logger(name))
        machine.group = group
        self._groups[name], self._machines[name] = group, machine
        task_status.started()
        async with trio.open_nursery() as nursery:
            for service in (self._keep_checkpoints, self._propose, self._read):
                nursery.start_soon(service, process, group, machine)
            await self.run_group(group.run, name)
            nursery.cancel_scope.cancel()

    async def _keep_checkpoints(self, process: Process, group: RaftGroup, machine: SmallMachine) -> None:
        covered = 0
        while True:
            await process.env.clock.sleep(CHECKPOINT_SECONDS)
            if machine.index > covered:
                index, blob = machine.checkpoint()
                with suppress(OSError):  # a full disk; the next one will do
                    await process.env.run_in_thread(group.save_checkpoint, index, blob)
                    covered = index

    async def stop_node(self, name: str) -> None:
        if name in self.groups:
            await self.groups[name].stop_gracefully()

    # Clients: beside their member, in its process, as the processors of a broker are

    async def _propose(self, process: Process, group: RaftGroup, machine: SmallMachine) -> None:
        plan, clock = self._plan, process.env.clock
        rng = process.env.rng("proposer")
        while True:
            await clock.sleep(rng.expovariate(plan.rate))
            if not self._is_busy or not group.is_ready_leader:
                continue
            for _ in range(rng.choice((1, 1, 1, 8))):
                operation = Operation(len(self.operations), node=group.node_id, life=process.number)
                size = rng.randrange(HEAD.size, HEAD.size + plan.record_bytes_max)
                self.operations.append(operation)
                try:
                    if rng.random() < 0.05:
                        rows = Rows()
                        rows.body, rows.position = OPS, group.position_for(len(OPS))
                        group.propose(ops=OPS, staged=rows)
                    machine.put(group, operation, size, clock.wall_ms())
                except (NotLeader, Overloaded):
                    operation.outcome = "refused"
                    break
            group.kick()

    async def _read(self, process: Process, group: RaftGroup, machine: SmallMachine) -> None:
        """Nothing above the commit index is readable, and what is read stays."""
        rng = process.env.rng("reader")
        while True:
            await process.env.clock.sleep(rng.expovariate(1 / READ_SECONDS))
            if not machine.applied:
                continue
            offset = next(reversed(machine.applied))
            if rng.random() < 0.5:
                offset = rng.choice(list(machine.applied))
            elif machine.pending:
                offset = machine.pending[0][0]  # beyond what is applied: that must not be shown
            data = group.read(offset, HEAD.size)
            if data is None or process.is_dead:
                continue
            _, number, _ = HEAD.unpack(data)
            self._judge.seen[offset] = number
            if self._judge.places.get(number) != offset:
                self._world.broke(f"{group.node_id} shows operation {number} at {offset}, not committed there")

    async def finish_workload(self) -> None:
        await trio.lowlevel.checkpoint()

    # Judgement

    def is_excused(self, process: Process, error: BaseException) -> bool:
        if isinstance(error, StoreFailed):
            return process.machine.disk.has_failed
        return excuses(process, error)

    def unsettled(self) -> str | None:
        return self.not_level()

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()
        members = self.members()
        tables = {name: self._machines[name].applied for name in members}
        first = max(self._machines[name].first_position for name in members)
        whole = {offset: number for number, offset in self._judge.places.items() if offset >= first}
        for name, table in tables.items():
            own = {offset: number for offset, number in table.items() if offset >= first}
            if own != whole:
                differing = sorted(offset for offset in {*own, *whole} if own.get(offset) != whole.get(offset))
                raise Broken(f"{name} has another table than was committed, from byte {differing[0]} on")
        for operation in self.operations:
            if operation.outcome == "acknowledged" and operation.offset >= first:
                for name, table in tables.items():
                    if table.get(operation.offset) != operation.number:
                        raise Broken(
                            f"acknowledged operation {operation.number} is not at {operation.offset} on {name}"
                        )
        for offset, number in self._judge.seen.items():
            if offset >= first and whole.get(offset) != number:
                raise Broken(f"a reader saw operation {number} at {offset}; it is not in the log")
        self.check_logs_equal()

    def leftovers(self) -> str | None:
        lives = {name: machine.process for name, machine in self._world.machines.items()}
        for operation in self.operations:
            process = lives[operation.node]
            if operation.outcome == "waiting" and process is not None and process.number == operation.life:
                return f"the proposer of operation {operation.number} still waits at {operation.node}"
        return self.waiting_records()
