"""Who does the breaking: applies the faults of a schedule to a running world, within the fault budget.

The budget (chaos.md 5.3, "atlas"): crashes, partitions, pauses and, with synced flush, power losses are unlimited.
Bytes that were on stable storage are damaged only while, for every entry they hold, a majority of intact copies
remains elsewhere, and only on as many nodes at once as may fail together; a node counts until it has repaired itself.
A wiped node counts too, and so does, with asynchronous flush, one that lost its page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import TYPE_CHECKING

from chaos.sim.chance import stream
from chaos.sim.changes import possible_changes
from chaos.sim.reached import REACHED
from chaos.sim.schedule import LEADER, Fault
from dledger.core.events import Transfer
from dledger.core.membership import AddLearner, Change, Members, Promote, Remove, apply_change
from dledger.core.quorum import majority
from dledger.core.types import Entry

if TYPE_CHECKING:
    from chaos.sim.node import SimNode
    from chaos.sim.world import World


EFFECTS = tuple(state.removeprefix("dies-before-") for state in REACHED if state.startswith("dies-before-"))
NEWEST = 12
"""Entries that a turned bit hits more often than others: their log may still change around them."""
HASTY = 0.25
"""How often an operator does not wait for one change of members to end before the next."""


class Nemesis:
    """Applies faults. Everything drawn meanwhile comes from the fault's own stream."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._copies: dict[str, list[Entry]] = {}
        self._kinds: dict[str, Callable[[Fault, SimNode, Random], bool]] = {
            "crash": self._crash,
            "crash-at-effect": self._crash_at_effect,
            "crash-all": self._crash_all,
            "power-loss": self._lose_power,
            "power-loss-all": self._lose_power_everywhere,
            "pause": self._pause,
            "late-ticks": self._late_ticks,
            "clock-rate": self._clock_rate,
            "stall": self._stall,
            "disk-full": self._disk_full,
            "write-error": self._write_error,
            "sync-error": self._sync_error,
            "flip": self._flip,
            "rows-lost": self._rows_lost,
            "truncate": self._truncate,
            "older-copy": self._older_copy,
            "misdirect": self._misdirect,
            "wipe": self._wipe,
            "partition": self._partition,
            "cut-link": self._cut_link,
            "cut-one-way": self._cut_one_way,
            "flap": self._flap,
            "slow-link": self._slow_link,
            "reset": self._reset,
            "transfer": self._transfer,
            "trim": self._trim,
            "members": self._members,
        }

    def apply(self, fault: Fault) -> None:
        """Do it now. A fault that cannot happen (nothing to hit, or over the budget) does nothing; one that begins with
        the end of a process may come to no more than that."""
        world = self._world
        if world.is_healed:
            return
        node = world.leader() if fault.target == LEADER else world.nodes.get(fault.target)
        if node is None:
            node = world.nodes[world.names[fault.number % len(world.names)]]
        if not node.incarnation and fault.target != LEADER:
            return  # a spare that nobody has asked for yet
        rng = stream(world.plan.seed, f"fault/{fault.number}")
        if self._kinds[fault.kind](fault, node, rng):
            world.note(node.name, f"fault {fault.number}: {fault.kind} for {fault.seconds} s")
            world.faults_applied[fault.kind] = world.faults_applied.get(fault.kind, 0) + 1

    # The budget

    def _may_impair(self, node: SimNode) -> bool:
        """Whether one more damaged node still leaves a majority sound."""
        voters = self._world.voters()
        impaired = sum(1 for name in voters if name != node.name and self._world.nodes[name].disk.is_impaired)
        return impaired + 1 <= len(voters) - majority(len(voters))

    def _may_lose_power(self, node: SimNode) -> bool:
        """With synced flush everybody may, together. Asynchronous flush promises (design 3) that a quorum has an
        acknowledged message in its page cache, so it survives as long as those that lost theirs are a minority: the
        next may fail once the others have recovered from a leader. Beyond that, loss is bounded but real, and it is
        the operator's `raft recover` that goes on; there is nothing to assert here.
        """
        return self._world.plan.sync or self._may_impair(node)

    def _may_damage(self, node: SimNode, indexes: Iterable[int], *, will_be_down: bool = False) -> bool:
        """Whether every one of these entries stays intact on a majority without this copy, or can never be missed."""
        world = self._world
        if not self._may_impair(node):
            return False
        needed = majority(len(world.voters()))
        others = [world.nodes[name].disk for name in world.voters() if name != node.name]
        durable = world.plan.sync
        for index in indexes:
            crc = node.log.head_crc_at(index)
            assert crc is not None
            committed = world.properties.committed.get(index)
            if committed is not None and committed[1] != crc:
                continue  # of a branch that lost: its place is taken by what is committed
            copies = sum(1 for disk in others if disk.holds(index, crc, durable=durable))
            # What nobody else has heard of, and nobody will hear of from a node that is down, is in no quorum.
            is_private = will_be_down and not copies and index > world.properties.committed_index
            if copies < needed and not is_private:
                return False
        return True

    # Processes and machines

    def _crash(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        return self.crash(node, fault.seconds)

    def crash(self, node: SimNode, seconds: float, *, power: bool = False) -> bool:
        """Kill a node now and start it again some time later."""
        if not node.is_alive:
            return False
        if power and not self._may_lose_power(node):
            power = False
        self._world.counts["power_losses" if power else "crashes"] += 1
        node.kill(power=power)
        self.start_later(node, seconds)
        return True

    def start_later(self, node: SimNode, seconds: float) -> None:
        self._world.at(self._world.now + seconds, self._start, node, node.incarnation)

    def _start(self, node: SimNode, incarnation: int) -> None:
        if not node.is_alive and node.incarnation == incarnation and node.name not in self._world.left_down:
            node.start()

    def _crash_at_effect(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """Die between two effects of a turn: before one of the next, or before the next of a kind, however rare."""
        if node.raft is None:
            return False
        if rng.random() < 0.5:
            node.fuse = rng.randint(1, 12)
        else:
            node.fuse_before = rng.choice(EFFECTS)
        node.fuse_burns_power = rng.random() < 0.5
        node.fuse_seconds = fault.seconds
        return True

    def _crash_all(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        for other in self._world.nodes.values():
            self.crash(other, fault.seconds * rng.random())
        return True

    def _lose_power(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        return self.crash(node, fault.seconds, power=True)

    def _lose_power_everywhere(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        for other in self._world.nodes.values():
            self.crash(other, fault.seconds * rng.random(), power=True)
        return True

    def _pause(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        if not node.is_alive:
            return False
        self._world.counts["pauses"] += 1
        node.paused_until = max(node.paused_until, self._world.now + fault.seconds)
        return True

    def _late_ticks(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        node.late_until = self._world.now + fault.seconds
        return True

    def _clock_rate(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """The clock runs fast or slow for a while, +-5 %. Monotonic time never steps; the core knows no other."""
        node.set_clock_rate(1.0 + rng.uniform(-0.05, 0.05))
        return True

    # Disks

    def _stall(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        self._world.counts["stalls"] += 1
        node.disk.stall(self._world.now + fault.seconds)
        return True

    def _disk_full(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        node.disk.fill(self._world.now + fault.seconds)
        return True

    def _write_error(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        return self._fail_next(node, "write", fault.seconds)

    def _sync_error(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        return self._fail_next(node, "sync", fault.seconds)

    def _fail_next(self, node: SimNode, what: str, seconds: float) -> bool:
        """EIO loses what is in the page cache, as a power loss does."""
        if not node.is_alive or not self._may_lose_power(node):
            return False
        node.fuse_seconds = seconds
        node.disk.fail_next(what)
        return True

    def _flip(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """Flipped bits in old entries. The process finds them when it reads, scrubs or starts."""
        held = node.disk.synced_range
        if not held:
            return False
        first = rng.choice(held[-NEWEST:] if rng.random() < 0.3 else held)
        indexes = list(range(first, min(first + rng.choice((1, 1, 3)), held.stop)))
        return self._damage(node, indexes)

    def _damage(self, node: SimNode, indexes: list[int]) -> bool:
        if not indexes or not self._may_damage(node, indexes, will_be_down=not node.is_alive):
            return False
        node.disk.damage(indexes)
        node.expect_scrub()
        return True

    def _rows_lost(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        node.disk.lose_rows()
        self.crash(node, fault.seconds)
        return True

    def _truncate(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """The last segment file is shorter after a stop, although it was synced."""
        held = node.disk.synced_range
        if not held:
            return False
        self.crash(node, fault.seconds)
        disk = node.disk
        if disk.has_failed or disk.evidence() < disk.durable:
            return False  # beyond the mark only the side rows vouch, and those went, or go, with the page cache
        first = max(held.start, held.stop - 1 - rng.randrange(20))
        return self._damage(node, list(range(first, node.log.last_index + 1)))

    def _older_copy(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """Once: somebody copies a segment file. Next time on that node: the copy comes back."""
        copy = self._copies.pop(node.name, None)
        if copy is None:
            held = node.disk.synced_range
            if held:
                self._copies[node.name] = node.disk.copy_of(node.disk.segment_of(rng.choice(held)))
            return bool(held)
        lost = node.disk.differs_from(copy)
        if not lost:
            return False
        self.crash(node, fault.seconds)
        lost = [index for index in node.disk.differs_from(copy) if index <= node.log.last_index]
        # Beyond the mark there is no evidence: that part is unsynced and no damage of stable storage.
        if not all(index in node.disk.synced_range for index in lost):
            return False
        return self._damage(node, lost)

    def _misdirect(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """A write of one entry landed in the place of another: the first is missing, the second destroyed."""
        held = node.disk.synced_range
        if len(held) < 2:
            return False
        return self._damage(node, sorted(rng.sample(held, 2)))

    def _wipe(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """The node returns with an empty folder."""
        indexes = range(node.log.first_index, node.log.last_index + 1)
        is_fit = self._may_damage(node, indexes, will_be_down=True) and not node.disk.is_impaired
        # The trimmed head has to be whole elsewhere as well: others must not begin behind what this one holds.
        if not is_fit or self._world.properties.committed_index == 0:
            return False
        self.crash(node, fault.seconds)
        node.disk.wipe()
        self._world.properties.wiped(node)
        self._world.reached("wiped")
        return True

    # The network

    def _cut_pairs(self, pairs: list[tuple[str, str]], seconds: float, what: str) -> None:
        world = self._world
        world.counts["partitions"] += 1
        world.note("net", f"{what} for {seconds:.2f} s")
        for source, target in pairs:
            world.network.cut(source, target)
        world.at(world.now + seconds, self._heal_pairs, pairs)

    def _heal_pairs(self, pairs: list[tuple[str, str]]) -> None:
        if not self._world.is_healed:
            for source, target in pairs:
                self._world.network.heal(source, target)

    def _partition(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """A node, or a random half, on its own."""
        names = self._world.names
        side = [node.name] if rng.random() < 0.6 else rng.sample(names, rng.randint(1, len(names) - 1))
        rest = [name for name in names if name not in side]
        pairs = [pair for a in side for b in rest for pair in ((a, b), (b, a))]
        self._cut_pairs(pairs, fault.seconds, f"{','.join(side)} | {','.join(rest)}")
        return True

    def _cut_link(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """One link only: a bridge remains (Howard 2020)."""
        a = node.name
        b = rng.choice([name for name in self._world.names if name != a])
        self._cut_pairs([(a, b), (b, a)], fault.seconds, f"{a} - {b} cut")
        return True

    def _cut_one_way(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        others = [name for name in self._world.names if name != node.name]
        if rng.random() < 0.5:
            others = [rng.choice(others)]
        pairs = [(node.name, other) for other in others]
        if rng.random() < 0.5:
            pairs = [(target, source) for source, target in pairs]
        self._cut_pairs(pairs, fault.seconds, "one way " + ", ".join(f"{a} > {b}" for a, b in pairs))
        return True

    def _flap(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """A link goes and comes."""
        a = node.name
        b = rng.choice([name for name in self._world.names if name != a])
        period = rng.choice((0.3, 1.0))
        pairs = [(a, b), (b, a)]
        for number in range(int(fault.seconds / period / 2)):
            at = self._world.now + 2 * number * period
            self._world.at(at, self._flap_once, pairs, period)
        return True

    def _flap_once(self, pairs: list[tuple[str, str]], seconds: float) -> None:
        if not self._world.is_healed:
            self._cut_pairs(pairs, seconds, f"{pairs[0][0]} - {pairs[0][1]} flaps")

    def _slow_link(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        world = self._world
        other = rng.choice([name for name in world.names if name != node.name])
        delay = rng.choice((0.02, 0.2, 0.8))
        for source, target in ((node.name, other), (other, node.name)):
            if rng.random() < 0.7:
                world.network.slow(source, target, delay)
                world.at(world.now + fault.seconds, world.network.slow, source, target, 0.0)
        return True

    def _reset(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        for conn in self._world.network.conns.values():
            if rng.random() < 0.4:
                self._world.network.reset(conn)
        return True

    # What operators do

    def _transfer(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        leader = self._world.leader()
        if leader is None:
            return False
        target = None if rng.random() < 0.3 else rng.choice(self._world.names)
        leader.post(Transfer, target)
        return True

    def _trim(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """Retention: the leader logs how far, every node removes whole segments once it has applied that."""
        leader = self._world.leader()
        if leader is None or leader.raft is None:
            return False
        end = leader.log.position_end
        leader.want_trim(int(end * rng.choice((0.3, 0.7, 1.0))))
        return True

    def _members(self, fault: Fault, node: SimNode, rng: Random) -> bool:
        """One change of the group, whatever makes sense now: a spare joins, a learner is promoted, a member goes."""
        world = self._world
        leader = world.leader()
        if leader is None or leader.raft is None:
            return False
        is_hasty = rng.random() < HASTY
        if leader.raft.configs.index != world.properties.config_index and not is_hasty:
            return False  # one at a time, and only from what is committed
        members = leader.raft.members
        changes: list[Change] = []
        for _ in range(2 if is_hasty else 1):
            change = self._draw_change(members, rng)
            if change is not None:
                changes.append(change)
                members = apply_change(members, change)
        for change in changes:
            if isinstance(change, AddLearner):
                self._prepare(world.nodes[change.node], rng)
        leader.want_changes(changes)
        return bool(changes)

    def _draw_change(self, members: Members, rng: Random) -> Change | None:
        world = self._world
        # Who is a member by the last committed list keeps its log, whatever a leader of the moment believes.
        outside = {
            name: (name, 1) for name in world.names if name not in members and name not in world.properties.members
        }
        changes = possible_changes(members, outside)
        if not changes:
            return None
        change = rng.choice(changes)
        if isinstance(change, Promote | Remove) and not self._may_change(change, members.voters):
            return None
        return change

    def _may_change(self, change: Change, voters: tuple[str, ...]) -> bool:
        """An operator looks at the group first: with a member damaged or lost, none of the sound ones is removed."""
        nodes = self._world.nodes
        if isinstance(change, Promote):
            return not nodes[change.node].disk.is_impaired
        impaired = [name for name in voters if nodes[name].disk.is_impaired]
        return not impaired

    def _prepare(self, node: SimNode, rng: Random) -> None:
        """A node that joins (again) begins with an empty folder, as `quorate raft add` demands."""
        if node.is_alive:
            node.kill(power=False)
        node.disk.wipe()
        self._world.properties.wiped(node)
        node.disk.excused.clear()
        self.start_later(node, 0.05 + rng.random())
        self._world.reached("blank-joins")
