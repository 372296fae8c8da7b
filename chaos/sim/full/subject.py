"""What both subjects have in common: one raft group on some machines, whose members change while it works.

An operator asks the leader, waits until that has proved that it leads (a read index), looks at the group, and changes
one thing. A node is added with an empty folder, as `quorate raft add-node` and `serve --join` demand; one that has been
removed may come back so. The next change waits for the end of the one before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Final

import trio

from chaos.sim.changes import possible_changes
from chaos.sim.full.machine import Process
from chaos.sim.full.plan import FOUNDERS
from chaos.sim.full.world import Broken, World
from dledger.config import Address, GroupConfig
from dledger.core.membership import AddLearner, Change, Members, Promote, Remove
from dledger.errors import LedgerError
from dledger.group import GroupStatistics, RaftGroup

LOOK_SECONDS: Final = 0.1
PROOF_SECONDS: Final = 2.0
JOIN_SECONDS_MAX: Final = 1.0
COUNTERS: Final = ("repairs", "installs")


class RaftSubject(ABC):
    """Machines, nodes and members of one raft group. A subject adds what runs beside it."""

    port: int
    """Where members take each other's connections."""
    stops_removed = False
    """Whether an operator stops a node for good once it is removed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._plan = world.plan
        for name in world.plan.members:
            world.add_machine(name, is_spare=name not in FOUNDERS)
        self.victim = FOUNDERS[world.plan.seed % len(FOUNDERS)]
        self._formatted: dict[str, None] = {}
        self._joins: dict[str, None] = {}
        """Nodes that have begun, or are to begin, with an empty folder beside a group that has a log."""
        self._is_changing = False
        self._is_busy = False
        self._members: tuple[str, ...] = FOUNDERS

    @property
    @abstractmethod
    def groups(self) -> Mapping[str, RaftGroup]:
        """By node: that of its last life."""

    @abstractmethod
    def folder(self, name: str) -> str:
        """The raft folder of a machine."""

    def log_folder(self, name: str) -> str:
        return f"{self.folder(name)}/log/"

    def _address(self, name: str) -> Address:
        return self._world.machines[name].host, self.port

    def group_config(self, name: str, group: str, **settings: Any) -> GroupConfig:
        """The configuration of one member: the founders, and itself where it came later."""
        plan = self._plan
        return GroupConfig(
            cluster="sim",
            group=group,
            node_id=name,
            peers={each: self._address(each) for each in (*FOUNDERS, name)},
            founders=FOUNDERS,
            data_dir=self.folder(name),
            flush=plan.flush,
            segment_bytes=plan.segment_bytes,
            retention_bytes=plan.retention_bytes or None,
            retention_hours=plan.retention_seconds / 3600,
            delete_hour=-1,
            join=name in self._joins,
            format_if_empty=name not in self._formatted and name not in self._joins,
            **settings,
        )

    async def run_group(self, run: Callable[..., Any], name: str) -> None:
        """One life of a group, or of what contains it, through `run(task_status=...)`."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(run)
                self._formatted[name] = None
        finally:
            counters = self.groups[name].statistics().counters
            self._world.counts.update({counter: counters[counter] for counter in COUNTERS})

    async def run_workload(self) -> None:
        """Clients at work, until cancelled."""
        self._is_busy = True
        try:
            await trio.sleep_forever()
        finally:
            self._is_busy = False

    # What operators see

    def is_usable(self, name: str) -> bool:
        machine = self._world.machines[name]
        process = machine.process
        return name in self.groups and process is not None and not process.is_dead and not machine.is_paused

    def running(self) -> list[str]:
        return [name for name in self._plan.members if self.is_usable(name)]

    def leader(self) -> str | None:
        """Who leads the highest term, as far as running nodes say."""
        leaders = [name for name in self.running() if self.groups[name].is_ready_leader]
        return max(leaders, key=lambda name: self.groups[name].term, default=None)

    def members(self) -> Sequence[str]:
        """Voters and learners, as the leader last heard of has them."""
        leader = self.leader()
        if leader is not None:
            self._members = self.groups[leader].members.all
        return self._members

    def is_whole(self) -> bool:
        """Whether every member runs and has written all that any node has applied, and none's disk has rotted."""
        members = self.members()
        if not all(self.is_usable(name) for name in members):
            return False
        statistics = {name: self.groups[name].statistics() for name in self.running()}
        applied = max(each.applied_index for each in statistics.values())
        return not any(
            statistics[name].recovering
            or statistics[name].written_index < applied
            or self._world.machines[name].disk.rotten
            for name in members
        )

    def may_lose_power(self, name: str) -> bool:
        """With async flush one copy at a time, and only while the other two hold all that is committed."""
        return self._plan.flush == "sync" or name not in self._plan.members or self.is_whole()

    def describe(self, name: str) -> str:
        """The state of one machine's node in a line."""
        if not self.is_usable(name):
            return f"{name} {'paused' if self._world.machines[name].is_paused else 'down'}"
        now = self.groups[name].statistics()
        return (
            f"{name} {now.state} {self.groups[name].role.name} term={now.term} last={now.last_index} "
            f"applied={now.applied_index}{' recovering' if now.recovering else ''}"
        )

    # What operators do

    def transfer(self, target: str) -> None:
        leader = self.leader()
        if leader is not None:
            group = self.groups[leader]
            group.transfer_leadership(target if target != leader and target in group.members.voters else None)

    def delete_expired(self) -> None:
        leader = self.leader()
        if leader is not None:
            self.groups[leader].delete_expired()

    async def change_members(self, rng: Random) -> None:
        """One change of the group, whatever makes sense now. Returns once its end is known."""
        if self._is_changing:
            return
        self._is_changing = True
        try:
            await self._change_members(rng)
        finally:
            self._is_changing = False

    async def _change_members(self, rng: Random) -> None:
        leader = self.leader()
        if leader is None:
            return
        group, process = self.groups[leader], self._world.machines[leader].process
        if process is None or not await self._proves_to_lead(group) or process.is_dead:
            return
        change = self._pick(group.members, rng)
        if change is None:
            return
        self._note(f"{leader} is to {change}")
        if isinstance(change, AddLearner):
            self._prepare(change.node, rng)
        term = group.term
        outcome: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask, group, change, outcome)
            # Once it leads no more, whether the change is committed is for the next leader's log to say.
            while not outcome and group.term == term and not process.is_dead:  # noqa: ASYNC110 - three conditions
                await trio.sleep(LOOK_SECONDS)
            nursery.cancel_scope.cancel()
        if outcome == ["done"]:
            self._world.counts["changes"] += 1
            if isinstance(change, Remove) and self.stops_removed:
                self._world.machines[change.node].is_spare = True
                self._world.end_life(change.node, power=False, down_seconds=0.0)
        self._note(f"{change}: {outcome[0] if outcome else 'nobody knows'}")

    def _note(self, what: str) -> None:
        self._world.note("!!", what)

    async def _proves_to_lead(self, group: RaftGroup) -> bool:
        told = trio.Event()
        answers: list[str | None] = []

        def answer(reason: str | None) -> None:
            answers.append(reason)
            told.set()

        group.read_index(answer)
        with trio.move_on_at(self._world.time.now + PROOF_SECONDS):
            await told.wait()
        return answers == [None] and group.is_ready_leader

    def _pick(self, members: Members, rng: Random) -> Change | None:
        outside = {name: self._address(name) for name in self._plan.members if name not in members}
        changes = possible_changes(members, outside)
        if not changes:
            return None
        change = rng.choice(changes)
        # An operator looks at the group first: while a copy is damaged or missing, no sound one is removed.
        if isinstance(change, Remove) and not self.is_whole():
            return None
        if isinstance(change, Promote) and not self.is_usable(change.node):
            return None
        return change

    async def _ask(self, group: RaftGroup, change: Change, outcome: list[str]) -> None:
        try:
            await group.change_members(change)
        except LedgerError as error:
            outcome.append(f"refused: {error}")
        else:
            outcome.append("done")

    def _prepare(self, name: str, rng: Random) -> None:
        """An empty folder, and a node on it soon."""
        machine = self._world.machines[name]
        if machine.process is not None:
            machine.process.die(power=False, rng=rng)
        machine.disk.wipe(f"/{name}")
        machine.is_spare = False
        machine.restart_at = self._world.time.now + rng.random() * JOIN_SECONDS_MAX
        self._joins[name] = None
        self._formatted.pop(name, None)

    # Judgement

    def not_level(self) -> str | None:
        """Why members cannot be judged yet; None when they lead, end and are committed alike."""
        members = self.members()
        for name in members:
            if not self.is_usable(name):
                return f"{name} does not run"
        statistics: dict[str, GroupStatistics] = {name: self.groups[name].statistics() for name in members}
        if not any(each.ready for each in statistics.values()):
            return "no leader"
        ends = {name: (each.end_position, each.committed_position) for name, each in statistics.items()}
        if len({end for pair in ends.values() for end in pair}) != 1:
            return f"logs end, and are committed, at {ends}"
        recovering = [name for name, each in statistics.items() if each.recovering]
        return f"{recovering[0]} is recovering" if recovering else None

    def waiting_records(self) -> str | None:
        """Who counts records as waiting although all is over."""
        for name in self.running():
            if self.groups[name].statistics().waiting_records:
                return f"{name} still counts waiting records"
        return None

    def check_logs_equal(self) -> None:
        """The files of all members, byte by byte, over what all of them have and have committed."""
        members = self.members()
        begin = max(self.groups[name].first_position for name in members)
        end = min(self.groups[name].committed_position for name in members)
        logs = {name: self._bytes_of_log(name, begin)[: end - begin] for name in members}
        for name in members:
            if logs[name] != logs[members[0]]:
                raise Broken(f"the logs of {members[0]} and {name} differ between {begin} and {end}")
            if len(logs[name]) != end - begin:
                raise Broken(f"the log of {name} has {len(logs[name])} bytes between {begin} and {end}")

    def _bytes_of_log(self, name: str, begin: int) -> bytes:
        disk, folder = self._world.machines[name].disk, self.log_folder(name)
        log = bytearray()
        for file in disk.names_in(folder):
            path = folder + file
            inode = disk.find(path)
            if file.isdigit() and inode is not None and int(file) + len(inode.cached) > begin:
                if int(file) != begin + len(log) and log:
                    raise Broken(f"{name} lacks a segment before {file}")
                content = bytearray(inode.cached)
                for rotten, offset, before in disk.rotten:
                    if rotten == path:
                        content[offset] = before  # nobody has looked there since
                log += content[max(0, begin - int(file)) :]
        return bytes(log)


def excuses(process: Process, error: BaseException) -> bool:
    """Whether a full or failing disk may end a node with this error."""
    disk = process.machine.disk
    return isinstance(error, OSError) and (disk.was_full_until > 0 or disk.has_failed)
