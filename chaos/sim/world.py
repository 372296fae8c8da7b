"""A whole raft group on virtual time: the event loop, the faults, the clients and the final judgement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import Any, Protocol

from attrs import define, field

from chaos.sim.chance import stream
from chaos.sim.network import Network
from chaos.sim.node import SimNode
from chaos.sim.plan import Plan
from chaos.sim.properties import Properties, PropertyBroken
from dledger.core.config import RaftConfig
from dledger.core.events import Transfer
from dledger.core.log import LogView
from dledger.core.quorum import majority
from dledger.core.raft import Raft
from dledger.core.types import Entry, HardState, Role

STEPS_MAX = 2_000_000
LEADER_WITHIN = 10.0
"""After the last fault: five election timeouts (raft.md 6.1, 14)."""
EQUAL_WITHIN = 20.0


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
    ) -> Raft: ...


@define
class Clients:
    """All clients together: what they asked and what they were told."""

    sent: int = 0
    refused: set[int] = field(factory=set)
    acknowledged: dict[int, tuple[int, int]] = field(factory=dict)
    unknown: int = 0

    def refuse(self, proposals: Iterable[int]) -> None:
        """Failed for certain: must never be found in a log."""
        self.refused.update(proposals)

    def acknowledge(self, proposals: Iterable[int], entry: Entry) -> None:
        for proposal in proposals:
            if proposal in self.acknowledged:
                raise PropertyBroken(f"proposal {proposal} is answered twice")
            self.acknowledged[proposal] = (entry.index, entry.head_crc)


class World:
    """One run of one seed."""

    def __init__(self, plan: Plan, make_raft: MakeRaft = Raft, *, keep_trace: bool = False) -> None:
        self.plan = plan
        self.make_raft = make_raft
        self.now = 0.0
        self.steps = 0
        self.names = tuple(f"n{i}" for i in range(plan.nodes))
        self.counts: dict[str, int] = dict.fromkeys(
            (
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
            ),
            0,
        )
        self.trace: list[str] | None = [] if keep_trace else None
        self._hash = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled = 0
        self.clients = Clients()
        self.properties = Properties(sync=plan.sync, segment_bytes=plan.segment_bytes)
        self.nodes: dict[str, SimNode] = {}
        for name in self.names:
            self.nodes[name] = SimNode(self, name)
        self.properties.nodes = self.nodes
        self.network = Network(self)
        self._faults = stream(plan.seed, "nemesis")
        self._arrivals = stream(plan.seed, "clients")
        self._is_healed = False

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
            f"{self.now!r} {node.name} {raft.role:d} {raft.term} {raft.last_crc} {raft.commit_index} ".encode()
            + str(raft.durable_index).encode()
        )

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()

    # The story

    def run(self) -> None:
        """Faults and load, then healing, then the judgement. Raises an AssertionError that names the broken promise."""
        plan = self.plan
        for node in self.nodes.values():
            self.at(self._arrivals.random() * 0.5, node.start)
        self.network.start()
        self.at(0.5, self._arrive)
        self.at(1.0 + self._faults.expovariate(1 / plan.fault_interval), self._fault)
        self.run_until(plan.fault_seconds)
        self._heal()
        healed_at = self.now
        if not self.run_until(healed_at + LEADER_WITHIN, self._has_leader):
            raise PropertyBroken(f"liveness: no leader {LEADER_WITHIN:.0f} s after the last fault; {self.summary()}")
        if not self.run_until(healed_at + EQUAL_WITHIN, self._is_equal):
            raise PropertyBroken(f"convergence: logs differ {EQUAL_WITHIN:.0f} s after healing; {self.summary()}")
        self._judge()

    def summary(self) -> str:
        parts = []
        for node in self.nodes.values():
            raft = node.raft
            parts.append(
                f"{node.name} down"
                if raft is None
                else f"{node.name} {raft.role.name} term={raft.term} leader={raft.leader} last={raft.last_index} "
                f"commit={raft.commit_index}"
            )
        return "; ".join(parts)

    def _leader(self) -> SimNode | None:
        best, best_term = None, -1
        for node in self.nodes.values():
            if node.raft is not None and node.raft.role is Role.LEADER and node.raft.term > best_term:
                best, best_term = node, node.raft.term
        return best

    def _has_leader(self) -> bool:
        leader = self._leader()
        return leader is not None and leader.raft is not None and 0 < leader.raft.noop_index <= leader.raft.commit_index

    def _is_equal(self) -> bool:
        leader = self._leader()
        if leader is None or leader.raft is None:
            return False
        end = leader.raft.last_index
        return all(
            node.raft is not None
            and node.raft.commit_index == node.raft.last_index == end
            and node.raft.leader == leader.name
            and not node.is_recovering
            for node in self.nodes.values()
        )

    def _judge(self) -> None:
        """8: nothing acknowledged is missing, nothing refused is there. 3: the logs are equal, byte for byte."""
        nodes = sorted(self.nodes.values(), key=lambda node: node.log.first_index)
        first = nodes[-1].log.first_index
        frames = [b"".join(entry.frame for entry in node.log if entry.index >= first) for node in nodes]
        if any(other != frames[0] for other in frames[1:]):
            raise PropertyBroken("the logs differ after convergence")
        found: dict[int, int] = {}
        for entry in nodes[0].log:
            for i in range(entry.count if len(entry.body) else 0):
                proposal = int.from_bytes(entry.body[8 * i : 8 * i + 8], "big")
                if proposal in found:
                    raise PropertyBroken(f"proposal {proposal} is stored twice")
                found[proposal] = entry.index
        for proposal, (index, _) in self.clients.acknowledged.items():
            if found.get(proposal) != index and index >= nodes[0].log.first_index:
                raise PropertyBroken(f"acknowledged proposal {proposal} of entry {index} is lost")
        for proposal in self.clients.refused:
            if proposal in found:
                raise PropertyBroken(f"proposal {proposal} was refused for certain and is stored")

    # Clients

    def _arrive(self) -> None:
        if self._is_healed:
            return
        rng = self._arrivals
        self.at(self.now + rng.expovariate(self.plan.proposals_per_second), self._arrive)
        leaders = [node for node in self.nodes.values() if node.raft is not None and node.raft.is_leader]
        if not leaders:
            return
        # A client with an old route may find a leader that was deposed and does not know it yet.
        node = rng.choice(leaders)
        for _ in range(rng.randint(1, self.plan.burst_max)):
            proposal = self.clients.sent
            self.clients.sent += 1
            if not node.submit(proposal):
                self.clients.refuse((proposal,))

    # Faults

    def _fault(self) -> None:
        if self._is_healed:
            return
        rng = self._faults
        self.at(self.now + rng.expovariate(1 / self.plan.fault_interval), self._fault)
        kind = rng.choice(FAULTS)
        kind(self)

    def _victim(self) -> SimNode:
        """The leader half of the time: that is where the interesting failures are."""
        leader = self._leader()
        if leader is not None and self._faults.random() < 0.5:
            return leader
        return self.nodes[self._faults.choice(self.names)]

    def crash(self, node: SimNode, *, power: bool = False) -> None:
        """Kill a node now and start it again some time later."""
        if node.raft is None:
            return
        if power and not self._may_lose_power(node):
            power = False
        self.counts["power_losses" if power else "crashes"] += 1
        node.kill(power=power)
        down = 0.02 + self._faults.random() * (0.3 if self._faults.random() < 0.5 else 3.0)
        self.at(self.now + down, self._restart, node, node.incarnation)

    def _restart(self, node: SimNode, incarnation: int) -> None:
        if node.raft is None and node.incarnation == incarnation:
            node.start()

    def _may_lose_power(self, node: SimNode) -> bool:
        """With synced flush everybody may, together. Asynchronous flush promises (design 3) that a quorum has an
        acknowledged message in its page cache, so it survives as long as those that lost theirs are a minority: the
        next may fail once the others have recovered from a leader. Beyond that, loss is bounded but real, and it is
        the operator's `raft recover` that goes on; there is nothing to assert here.
        """
        if self.plan.sync:
            return True
        lost = sum(1 for other in self.nodes.values() if other.is_recovering and other is not node)
        return lost + 1 < majority(len(self.nodes))

    def _crash_one(self) -> None:
        self.crash(self._victim())

    def _crash_at_effect(self) -> None:
        """Die between two effects of a turn."""
        node = self._victim()
        if node.raft is not None:
            node.fuse = self._faults.randint(1, 12)

    def _crash_all(self) -> None:
        power = self._faults.random() < 0.5
        for node in self.nodes.values():
            self.crash(node, power=power)

    def _lose_power(self) -> None:
        self.crash(self._victim(), power=True)

    def _pause(self) -> None:
        node = self._victim()
        if node.raft is not None:
            self.counts["pauses"] += 1
            seconds = self._faults.choice((0.05, 0.7, 1.5, 4.0)) * (0.5 + self._faults.random())
            self.note(node.name, f"stands still for {seconds:.2f} s")
            node.paused_until = max(node.paused_until, self.now + seconds)

    def _stall_disk(self) -> None:
        node = self._victim()
        self.counts["stalls"] += 1
        seconds = self._faults.choice((0.1, 1.0, 4.0)) * (0.5 + self._faults.random())
        self.note(node.name, f"disk stalls for {seconds:.2f} s")
        node.stall_disk(self.now + seconds)

    def _cut_pairs(self, pairs: list[tuple[str, str]], what: str) -> None:
        self.counts["partitions"] += 1
        seconds = self._faults.choice((0.1, 1.0, 3.0, 6.0)) * (0.5 + self._faults.random())
        self.note("net", f"{what} for {seconds:.2f} s")
        for source, target in pairs:
            self.network.cut(source, target)
        self.at(self.now + seconds, self._heal_pairs, pairs)

    def _heal_pairs(self, pairs: list[tuple[str, str]]) -> None:
        if not self._is_healed:
            for source, target in pairs:
                self.network.heal(source, target)

    def _partition(self) -> None:
        """A node, or a random half, on its own."""
        if self._faults.random() < 0.6:
            side = [self._victim().name]
        else:
            side = self._faults.sample(self.names, self._faults.randint(1, len(self.names) - 1))
        rest = [name for name in self.names if name not in side]
        pairs = [pair for a in side for b in rest for pair in ((a, b), (b, a))]
        self._cut_pairs(pairs, f"{','.join(side)} | {','.join(rest)}")

    def _cut_link(self) -> None:
        """One link only: a bridge remains (Howard 2020)."""
        a, b = self._faults.sample(self.names, 2)
        self._cut_pairs([(a, b), (b, a)], f"{a} - {b} cut")

    def _cut_one_way(self) -> None:
        victim = self._victim().name
        others = [name for name in self.names if name != victim]
        if self._faults.random() < 0.5:
            others = [self._faults.choice(others)]
        pairs = [(victim, other) for other in others]
        if self._faults.random() < 0.5:
            pairs = [(target, source) for source, target in pairs]
        self._cut_pairs(pairs, "one way " + ", ".join(f"{a} > {b}" for a, b in pairs))

    def _reset_links(self) -> None:
        for link in sorted({id(link): link for link in self.network.links.values()}.values(), key=lambda x: (x.a, x.b)):
            if self._faults.random() < 0.5:
                self.network.reset(link)

    def _transfer(self) -> None:
        leader = self._leader()
        if leader is not None:
            target = None if self._faults.random() < 0.3 else self._faults.choice(self.names)
            leader.post(Transfer, target)

    def _trim(self) -> None:
        """Retention on one node, up to what every disk has durable and every process knows to be committed.

        Beyond that a lagging follower would need segments, which the core only asks for.
        """
        safe = self.properties.committed_index
        for other in self.nodes.values():
            if other.raft is None:
                return  # what it has durable may differ from what was committed
            safe = min(safe, other.durable, other.raft.commit_index)
        node = self._victim()
        if safe > node.log.first_index:
            self.counts["trims"] += 1
            node.trim(self._faults.randint(node.log.first_index, safe))

    def _heal(self) -> None:
        self._is_healed = True
        self.note("all", "healed")
        self.network.heal_all()
        for node in self.nodes.values():
            node.fuse = 0
            if node.raft is None:
                self.at(self.now + 0.1 + self._faults.random() * 0.4, self._restart, node, node.incarnation)


FAULTS: tuple[Callable[[World], None], ...] = (
    World._crash_one,
    World._crash_one,
    World._crash_at_effect,
    World._crash_at_effect,
    World._crash_all,
    World._lose_power,
    World._lose_power,
    World._pause,
    World._stall_disk,
    World._partition,
    World._partition,
    World._cut_link,
    World._cut_one_way,
    World._cut_one_way,
    World._reset_links,
    World._transfer,
    World._transfer,
    World._trim,
)
