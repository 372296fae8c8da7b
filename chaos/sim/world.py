"""A whole raft group on virtual time: the event loop, the clients, the healing and the final judgement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any, Protocol

from attrs import define, evolve, field, frozen

from chaos.sim.chance import stream
from chaos.sim.disk import SimDisk
from chaos.sim.nemesis import Nemesis
from chaos.sim.network import Network
from chaos.sim.node import SimNode
from chaos.sim.plan import Plan
from chaos.sim.properties import Properties, PropertyBroken
from chaos.sim.schedule import Fault
from chaos.sim.store_disk import StoreDisk
from dledger.core.config import RaftConfig
from dledger.core.log import LogView
from dledger.core.membership import Members
from dledger.core.quorum import majority
from dledger.core.raft import Raft
from dledger.core.types import Entry, EntryType, HardState, Role

STEPS_MAX = 2_000_000
LEADER_WITHIN = 10.0
"""After the last fault: five election timeouts (raft.md 6.1, 14)."""
EQUAL_WITHIN = 20.0
COUNTS = (
    "elections",
    "cuts",
    "refused",
    "transfers",
    "transfers_failed",
    "recovered",
    "crashes",
    "power_losses",
    "partitions",
    "pauses",
    "stalls",
    "trims",
    "repairs",
    "installs",
    "changes",
    "reads",
    "reads_refused",
)


class MakeRaft(Protocol):
    """How a node's core is built; the planted-bug tests put a wrong one in its place."""

    def __call__(
        self,
        node_id: str,
        voters: Iterable[str],
        config: RaftConfig,
        rng: Any,
        hard_state: HardState,
        log: LogView,
        now: float,
        *,
        commit_index: int,
        recovering: bool,
        configs: Sequence[tuple[int, Members]],
    ) -> Raft: ...


@frozen
class Build:
    """What a world is made of. Planted bugs are other parts."""

    raft: MakeRaft = Raft
    disk: type[SimDisk] = SimDisk
    node: type[SimNode] = SimNode


@define
class Clients:
    """All clients together: what they asked and what they were told."""

    sent: int = 0
    refused: set[int] = field(factory=set)
    acknowledged: dict[int, tuple[int, int]] = field(factory=dict)
    acknowledged_index: int = 0
    """The highest entry any client knows to be committed: no read may miss it."""
    unknown: int = 0
    reads: int = 0

    def refuse(self, proposals: Iterable[int]) -> None:
        """Failed for certain: must never be found in a log."""
        self.refused.update(proposals)

    def acknowledge(self, proposals: Iterable[int], entry: Entry) -> None:
        for proposal in proposals:
            if proposal in self.acknowledged:
                raise PropertyBroken(f"answered twice: proposal {proposal}")
            self.acknowledged[proposal] = (entry.index, entry.head_crc)
        self.acknowledged_index = max(self.acknowledged_index, entry.index)


class World:
    """One run of one plan and one list of faults."""

    def __init__(
        self,
        plan: Plan,
        faults: Sequence[Fault],
        build: Build | None = None,
        *,
        keep_trace: bool = False,
    ) -> None:
        self.plan = plan
        self.faults = tuple(faults)
        self.build = Build() if build is None else build
        if plan.real_store and self.build.disk is SimDisk:
            self.build = evolve(self.build, disk=StoreDisk)
        self.now = 0.0
        self.steps = 0
        self.bootstrap = tuple(f"n{i}" for i in range(plan.nodes))
        self.names = tuple(f"n{i}" for i in range(plan.nodes + plan.spares))
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.states_reached: dict[str, int] = {}
        self.faults_applied: dict[str, int] = {}
        self.trace: list[str] | None = [] if keep_trace else None
        self._hash = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled = 0
        self.clients = Clients()
        self.properties = Properties(
            sync=plan.sync, segment_bytes=plan.segment_bytes, bootstrap=self.bootstrap, reached=self.reached
        )
        self.nemesis = Nemesis(self)
        self.nodes: dict[str, SimNode] = {}
        for name in self.names:
            self.nodes[name] = self.build.node(self, name)
        self.properties.nodes = self.nodes
        self.network = Network(self)
        self.is_healed = False
        self.left_down: frozenset[str] = frozenset()
        """Nodes that stay as they are after a healing of the core only."""

    # The loop

    def at(self, when: float, action: Callable[..., None], *details: Any) -> None:
        """Run `action(*details)` at virtual time `when`."""
        self._scheduled += 1
        heappush(self._heap, (when, self._scheduled, action, details))

    def run_until(self, end: float, is_done: Callable[[], bool] | None = None) -> bool:
        """Take events up to `end`, or until `is_done`; says whether it was."""
        heap = self._heap
        while heap and heap[0][0] <= end:
            when, _, action, details = heappop(heap)
            self.now = when
            action(*details)
            if self.steps > STEPS_MAX:
                raise PropertyBroken(f"no end of work: {self.steps} steps in {self.now:.3f} simulated seconds")
            if is_done is not None and is_done():
                return True
        self.now = end
        return is_done is not None and is_done()

    def note(self, name: str, text: str) -> None:
        """A line of the trace."""
        self._hash.update(f"{self.now!r} {name} {text}\n".encode())
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f}  {name:<4}{text}")

    def note_turn(self, node: SimNode) -> None:
        """The state of a node after its turn goes into the trace hash."""
        raft = node.raft
        assert raft is not None
        self._hash.update(
            b"%r %s %d %d %d %d %d"
            % (
                self.now,
                node.name.encode(),
                raft.role,
                raft.term,
                raft.log.last_crc,
                raft.commit_index,
                raft.log.durable_index,
            )
        )

    def reached(self, state: str) -> None:
        """An interesting state is met (`chaos.sim.reached`)."""
        self.states_reached[state] = self.states_reached.get(state, 0) + 1

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()

    # The story

    def run(self, until: float | None = None) -> None:
        """Faults and load, then healing, then the judgement. Raises an AssertionError that names the broken promise.

        `until`: stop at this virtual second, without a judgement.
        """
        plan = self.plan
        for node in self.nodes.values():
            if node.name in self.bootstrap:
                self.at(0.5 * node.chance.random(), node.start)
        for number in range(plan.clients):
            rng = stream(plan.seed, f"client/{number}")
            self.at(0.5 + rng.random() * 0.1, self._send, rng)
            if plan.reads_per_second:
                rng = stream(plan.seed, f"reader/{number}")
                self.at(0.5 + rng.random() * 0.1, self._read, rng)
        for fault in self.faults:
            self.at(fault.at, self.nemesis.apply, fault)
        self.run_until(min(plan.fault_seconds, until or plan.fault_seconds))
        if until is not None and until <= plan.fault_seconds:
            return
        self._heal()
        healed_at = self.now
        if until is not None:
            self.run_until(until)
            return
        if not self.run_until(healed_at + LEADER_WITHIN, self._has_leader):
            raise PropertyBroken(f"liveness: no leader {LEADER_WITHIN:.0f} s after the last fault; {self.summary()}")
        if not self.run_until(healed_at + EQUAL_WITHIN, self._is_equal):
            raise PropertyBroken(f"convergence: logs differ {EQUAL_WITHIN:.0f} s after healing; {self.summary()}")
        self._judge()

    def summary(self) -> str:
        return "; ".join(self.describe(node) for node in self.nodes.values())

    def describe(self, node: SimNode) -> str:
        """The state of one node in a line."""
        raft = node.raft
        if raft is None:
            return f"{node.name} {'repairing' if node.is_alive else 'down'}"
        return (
            f"{node.name} {raft.role.name} term={raft.term} leader={raft.leader} last={raft.last_index} "
            f"commit={raft.commit_index}{' recovering' if node.disk.recovering else ''}"
        )

    def leader(self) -> SimNode | None:
        """Who leads the highest term."""
        best, best_term = None, -1
        for node in self.nodes.values():
            if node.raft is not None and node.raft.role is Role.LEADER and node.raft.term > best_term:
                best, best_term = node, node.raft.term
        return best

    def voters(self) -> tuple[str, ...]:
        """Of the last committed list."""
        return self.properties.members.voters

    def _has_leader(self) -> bool:
        leader = self.leader()
        return leader is not None and leader.raft is not None and 0 < leader.raft.noop_index <= leader.raft.commit_index

    def _members_well(self) -> list[SimNode]:
        """Who must be equal in the end."""
        leader = self.leader()
        assert leader is not None and leader.raft is not None
        names = leader.raft.members.all
        return [self.nodes[name] for name in names if name not in self.left_down]

    def _is_equal(self) -> bool:
        leader = self.leader()
        if leader is None or leader.raft is None:
            return False
        end = leader.raft.last_index
        if leader.raft.commit_index != end:
            return False
        return all(
            node.raft is not None
            and node.raft.commit_index == node.raft.last_index == end
            and node.raft.leader == leader.name
            and not node.disk.recovering
            for node in self._members_well()
        )

    def _judge(self) -> None:
        """8: nothing acknowledged is missing, nothing refused is there. 3: the logs are equal, byte for byte."""
        nodes = sorted(self._members_well(), key=lambda node: node.log.first_index)
        first = nodes[-1].log.first_index
        frames = [b"".join(entry.frame for entry in node.log if entry.index >= first) for node in nodes]
        if any(other != frames[0] for other in frames[1:]):
            raise PropertyBroken("replicas differ: the logs are not equal after convergence")
        found: dict[int, int] = {}
        for entry in nodes[0].log:
            if entry.type != EntryType.DATA:
                continue
            for i in range(entry.count):
                proposal = int.from_bytes(entry.body[8 * i : 8 * i + 8], "big")
                if proposal in found:
                    raise PropertyBroken(f"stored twice: proposal {proposal}")
                found[proposal] = entry.index
        for proposal, (index, _) in self.clients.acknowledged.items():
            if found.get(proposal) != index and index >= nodes[0].log.first_index:
                raise PropertyBroken(f"acknowledged and lost: proposal {proposal} of entry {index}")
        for proposal in self.clients.refused:
            if proposal in found:
                raise PropertyBroken(f"refused and stored: proposal {proposal}")

    # Clients

    def _leaders(self) -> list[SimNode]:
        """A client with an old route may find a leader that was deposed and does not know it yet."""
        return [node for node in self.nodes.values() if node.raft is not None and node.raft.is_leader]

    def _send(self, rng: Random) -> None:
        if self.is_healed:
            return
        plan = self.plan
        self.at(self.now + rng.expovariate(plan.proposals_per_second / plan.clients), self._send, rng)
        leaders = self._leaders()
        if not leaders:
            return
        node = rng.choice(leaders)
        for _ in range(rng.randint(1, plan.burst_max)):
            proposal = self.clients.sent
            self.clients.sent += 1
            if not node.submit(proposal):
                self.clients.refuse((proposal,))

    def _read(self, rng: Random) -> None:
        if self.is_healed:
            return
        plan = self.plan
        self.at(self.now + rng.expovariate(plan.reads_per_second / plan.clients), self._read, rng)
        leaders = self._leaders()
        if leaders:
            self.clients.reads += 1
            rng.choice(leaders).ask_read(self.clients.reads, self.clients.acknowledged_index)

    # Healing

    def _heal(self) -> None:
        """All faults end; or, of what the plan leaves broken for ever, all but that."""
        self.is_healed = True
        rng = stream(self.plan.seed, "heal")
        self.left_down = self._choose_left_down(rng)
        well = frozenset(name for name in self.names if name not in self.left_down)
        self.note("all", f"healed{' but for ' + ', '.join(sorted(self.left_down)) if self.left_down else ''}")
        if self.left_down:
            self.reached("healed-in-the-core-only")
        self.network.heal_all(well)
        for node in self.nodes.values():
            node.fuse = 0
            node.fuse_before = ""
            node.late_until = 0.0
            if node.name in self.left_down:
                if rng.random() < 0.5:
                    node.kill(power=self.plan.sync and rng.random() < 0.5)
                else:
                    for other in self.names:
                        if other != node.name:
                            self.network.cut(node.name, other)
                            self.network.cut(other, node.name)
                continue
            node.disk.heal()
            if not node.is_alive and (node.name in self.bootstrap or node.incarnation):
                self.nemesis.start_later(node, 0.1 + rng.random() * 0.4)

    def _choose_left_down(self, rng: Random) -> frozenset[str]:
        """A random majority of sound voters is enough to go on; "waits for the dead node" bugs show only then."""
        voters = self.voters()
        leader = self.leader()
        is_settled = (
            leader is not None
            and leader.raft is not None
            and self.properties.config_index == (leader.raft.configs.index)
        )
        sound = [name for name in voters if not self.nodes[name].disk.is_impaired]
        needed = majority(len(voters))
        if not self.plan.heal_core or len(sound) < needed or (self.plan.spares and not is_settled):
            return frozenset()
        core = rng.sample(sound, needed)
        return frozenset(name for name in voters if name not in core)
