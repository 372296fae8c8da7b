"""The first subject: the members of one raft group with a small state machine, and proposers beside them.

The machine keeps which operation lies at which byte of the log. The judge sees every entry that any member applies, at
the moment it does, and every answer a proposer gets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from zlib import crc32

import cbor2
import trio
from attrs import define, field

from chaos.sim.full.machine import Process
from chaos.sim.full.world import Broken, World
from dledger.config import GroupConfig
from dledger.core.types import Role
from dledger.errors import NotLeader, Overloaded, StoreFailed
from dledger.group import EntryView, GroupStatistics, RaftGroup

PEER_PORT: Final = 10_911
CHECKPOINT_SECONDS: Final = 3.0
READ_SECONDS: Final = 0.05
HEAD: Final = struct.Struct("<IQQ")
"""size | operation | wall milliseconds; filler follows."""
OPS: Final = b"\x01an entry without records"
TASKS_MAX: Final = 80
"""Of one quiet member; its connections included."""

Told = Callable[[str], None]


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


class GroupsSubject:
    """`world.Subject`: three members, proposers, readers."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._plan = world.plan
        self.members: Sequence[str] = ("n0", "n1", "n2")
        for name in self.members:
            world.add_machine(name)
        self.victim = self.members[world.plan.seed % 3]
        self._judge = Judge(world)
        self._is_busy = False
        self.groups: dict[str, RaftGroup] = {}
        self._machines: dict[str, SmallMachine] = {}
        self._peers = {name: (world.machines[name].host, PEER_PORT) for name in self.members}
        self._formatted: dict[str, None] = {}

    @property
    def operations(self) -> list[Operation]:
        return self._judge.operations

    @property
    def entries(self) -> int:
        return len(self._judge.entries)

    @property
    def elections(self) -> int:
        return len(self._judge.leaders)

    def log_folder(self, name: str) -> str:
        return f"/{name}/raft/log/"

    # Lives

    def _config(self, name: str) -> GroupConfig:
        plan = self._plan
        return GroupConfig(
            cluster="sim",
            group="g",
            node_id=name,
            peers=self._peers,
            data_dir=f"/{name}/raft",
            flush=plan.flush,
            segment_bytes=plan.segment_bytes,
            format_if_empty=name not in self._formatted,
            secret=b"between us",
        )

    async def run_node(self, process: Process, task_status: trio.TaskStatus[Any]) -> None:
        name = process.machine.name
        machine = SmallMachine(self._judge, process, name)
        group = RaftGroup(process.env, self._config(name), machine, self._world.logger(name))
        machine.group = group
        self.groups[name], self._machines[name] = group, machine
        task_status.started()
        async with trio.open_nursery() as nursery:
            for service in (self._keep_checkpoints, self._propose, self._read):
                nursery.start_soon(service, process, group, machine)
            await self._run_group(group, name)
            nursery.cancel_scope.cancel()

    async def _run_group(self, group: RaftGroup, name: str) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(group.run)
            self._formatted[name] = None

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
        await self.groups[name].stop_gracefully()

    # Clients: beside their member, in its process, as the processors of a broker are

    async def run_workload(self) -> None:
        self._is_busy = True
        try:
            await trio.sleep_forever()
        finally:
            self._is_busy = False

    def _is_usable(self, name: str) -> bool:
        machine = self._world.machines[name]
        return machine.process is not None and not machine.process.is_dead and not machine.is_paused

    def _running(self) -> list[str]:
        return [name for name in self.members if name in self.groups and self._is_usable(name)]

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

    def transfer(self) -> None:
        for name in self._running():
            if self.groups[name].is_ready_leader:
                self.groups[name].transfer_leadership()

    # Judgement

    def may_lose_power(self, name: str) -> bool:
        """With async flush one copy at a time, and only while the other two hold all that is committed."""
        return self._plan.flush == "sync" or self.is_whole()

    def is_whole(self) -> bool:
        return all(name in self._running() for name in self.members) and holds_everything(
            self._world, {name: self.groups[name] for name in self.members}
        )

    def is_excused(self, process: Process, error: BaseException) -> bool:
        disk = process.machine.disk
        if isinstance(error, StoreFailed):
            return disk.has_failed
        return isinstance(error, OSError) and (disk.was_full_until > 0 or disk.has_failed)

    def unsettled(self) -> str | None:
        statistics = {}
        for name in self.members:
            if name not in self._running():
                return f"{name} does not run"
            statistics[name] = self.groups[name].statistics()
        return not_level(statistics)

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()
        tables = {name: self._machines[name].applied for name in self.members}
        first = max(self._machines[name].first_position for name in self.members)
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
        check_logs_equal(self._world, {name: f"/{name}/raft/log" for name in self.members}, self.groups)

    def leftovers(self) -> str | None:
        lives = {name: self._world.machines[name].process for name in self.members}
        for operation in self.operations:
            process = lives[operation.node]
            if operation.outcome == "waiting" and process is not None and process.number == operation.life:
                return f"the proposer of operation {operation.number} still waits at {operation.node}"
        for name in self.members:
            if self.groups[name].statistics().waiting_records:
                return f"{name} still counts waiting records"
        return None


def holds_everything(world: World, groups: dict[str, RaftGroup]) -> bool:
    """Whether every member has written all that any has applied, and none's disk has rotted."""
    statistics = [group.statistics() for group in groups.values()]
    applied = max(each.applied_index for each in statistics)
    return not any(each.recovering or each.written_index < applied for each in statistics) and not any(
        world.machines[name].disk.rotten for name in groups
    )


def not_level(statistics: Mapping[str, GroupStatistics]) -> str | None:
    """Why members of a group cannot be judged yet; None when they lead, end and are committed alike."""
    if not any(each.ready for each in statistics.values()):
        return "no leader"
    ends = {name: (each.end_position, each.committed_position) for name, each in statistics.items()}
    if len({end for pair in ends.values() for end in pair}) != 1:
        return f"logs end, and are committed, at {ends}"
    recovering = [name for name, each in statistics.items() if each.recovering]
    return f"{recovering[0]} is recovering" if recovering else None


def check_logs_equal(world: World, folders: dict[str, str], groups: dict[str, RaftGroup]) -> None:
    """The files of all members, byte by byte, over what all of them have and have committed."""
    begin = max(groups[name].first_position for name in folders)
    end = min(groups[name].committed_position for name in folders)
    logs = {}
    for name, folder in folders.items():
        disk = world.machines[name].disk
        log = bytearray()
        for file in disk.names_in(folder):
            inode = disk.find(f"{folder}/{file}")
            if file.isdigit() and inode is not None and int(file) + len(inode.cached) > begin:
                if int(file) != begin + len(log) and log:
                    raise Broken(f"{name} lacks a segment before {file}")
                content = bytearray(inode.cached)
                for path, offset, before in disk.rotten:
                    if path == f"{folder}/{file}":
                        content[offset] = before  # nobody has looked there since
                log += content
        logs[name] = bytes(log[: end - begin])
    names = list(logs)
    for name in names[1:]:
        if logs[name] != logs[names[0]]:
            raise Broken(f"the logs of {names[0]} and {name} differ between {begin} and {end}")
        if len(logs[name]) != end - begin:
            raise Broken(f"the log of {name} has {len(logs[name])} bytes between {begin} and {end}")
