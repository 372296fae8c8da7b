"""One simulated process: the driver of the core on virtual time, and what it does beside the core.

A process is down, repairing or serving. It repairs when its recovery found damage with intact entries behind it: it
then fetches what is missing from its peers and neither votes nor answers, as the real one (raft.md 4.6). It goes back
there when a read or the scrub meets damage. A node far behind asks for whole segments and starts anew on a copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chaos.sim.chance import stream
from chaos.sim.disk import Gap, SimDisk, SimLog, Unreadable
from chaos.sim.properties import PropertyBroken
from chaos.sim.reached import REACHED
from dledger.core import effects as fx
from dledger.core.config import RaftConfig
from dledger.core.errors import LocalError
from dledger.core.events import (
    DiskState,
    Durable,
    Event,
    HardStateSaved,
    Propose,
    ReadIndex,
    Tick,
    TurnEnd,
    Written,
)
from dledger.core.invariants import Watch
from dledger.core.membership import Change, Members, apply_change, decode_members, encode_members
from dledger.core.quorum import majority
from dledger.core.raft import Raft
from dledger.core.transitions import Cause
from dledger.core.types import HEADER_BYTES, Entry, EntryType, HardState, Role, frame_entry, next_position

if TYPE_CHECKING:
    from chaos.sim.world import World

CLIENT_QUEUE_MAX = 1000
READS_WAITING_MAX = 1000
REPAIR_ROUND_SECONDS = 0.1
FETCH_SECONDS = 0.3
"""How long the transfer of a log takes, about."""
SCRUB_SECONDS = 8.0
"""Within this time the scrub comes by every closed segment."""
REOPEN_SECONDS = 0.05
SEGMENTS_KEPT = 2
"""Retention leaves so many segments."""


class Crashed(Exception):
    """Unwinds a turn when the process dies between two effects."""


class SimNode:
    """A member of the simulated group. `raft` is None unless the process serves."""

    def __init__(self, world: World, name: str) -> None:
        plan = world.plan
        self._world = world
        self.name = name
        self._rng = stream(plan.seed, f"node/{name}")
        self.chance = stream(plan.seed, f"process/{name}")
        self._clock_rate = 1.0 + self._rng.uniform(-plan.drift, plan.drift)
        self._clock_offset = self._rng.uniform(0.0, 1000.0)
        self._config = RaftConfig(
            sync=plan.sync,
            segment_bytes=plan.segment_bytes,
            message_bytes_max=plan.message_bytes_max,
            window_messages_max=plan.window_messages_max,
            segments_behind_bytes=plan.segments_behind_bytes,
            promote_lag_bytes_max=min(1 << 20, plan.segments_behind_bytes),
            priorities={plan.preferred: 1} if plan.preferred else {},
            preferred_after=plan.preferred_after,
        )
        self.disk: SimDisk = world.build.disk(world, name, self)
        # The process.
        self.raft: Raft | None = None
        self.is_alive = False
        self.has_power = True
        self.incarnation = 0
        self.applied_index = 0
        self._watch: Watch | None = None
        self._inbox: list[tuple[type, tuple[Any, ...]]] = []
        self._is_turn_due = False
        self._wake_at = 0.0
        self.paused_until = 0.0
        self.late_until = 0.0
        self.fuse = 0
        """Effects left until the process dies; 0 = none armed."""
        self.fuse_before = ""
        """The kind of effect before which the process, or one that follows it, dies; empty = none."""
        self.fuse_burns_power = False
        self.fuse_seconds = 1.0
        self._clients: deque[int] = deque()
        self._waiting: dict[int, tuple[int, list[int]]] = {}
        self._reads: dict[int, int] = {}
        """By token: what had been acknowledged when the read was asked."""
        self._reads_asked: list[int] = []
        self._changes: Sequence[Change] = ()
        self._trim_to = 0
        self._is_fetching = False
        self._needed_until = 0
        self._members_index = 0

    @property
    def log(self) -> SimLog:
        return self.disk.log

    # Life and death

    def start(self) -> None:
        """Recover the log; repair what is damaged; serve."""
        assert not self.is_alive
        world = self._world
        self.is_alive = self.has_power = True
        self.incarnation += 1
        durable = self.disk.durable
        gaps = self.disk.recover()
        world.properties.recovered_log(self, durable)
        self._clients.clear()
        self._reads_asked = []
        world.network.node_started(self.name)
        if gaps:
            world.counts["repairs"] += 1
            world.reached("repair-phase")
            world.note(self.name, f"repairs {', '.join(f'{gap.first}-{gap.last}' for gap in gaps)}")
            world.at(world.now + REPAIR_ROUND_SECONDS, self._repair, self.incarnation, gaps)
        else:
            self._serve()

    def _serve(self) -> None:
        world = self._world
        log = self.log
        hint = 0
        if world.plan.use_commit_hint and len(log):
            last = log.peek(log.last_index)
            assert last is not None
            hint = last.commit_hint
        hint = max(hint, log.first_index - 1)
        world.properties.starts(self, hint)
        self.applied_index = hint
        self.disk.opened()
        self.raft = world.build.raft(
            self.name,
            world.bootstrap,
            self._config,
            stream(world.plan.seed, f"raft/{self.name}/{self.incarnation}"),
            self.disk.saved,
            log,
            self._local_now(),
            commit_index=hint,
            recovering=self.disk.recovering,
            configs=self.disk.configs(),
        )
        self._watch = Watch(self.raft)
        self._inbox = []
        self._is_turn_due = False
        self._wake_at = float("inf")
        self.fuse = 0
        self._waiting = {}
        self._reads = {}
        self._changes = ()
        self._trim_to = 0
        self._is_fetching = False
        self._members_index = self.raft.configs.index
        world.network.tell_connected(self.name)
        self.expect_scrub()
        self._set_alarm()

    def kill(self, *, power: bool) -> None:
        """End the process at once; with `power`, the page cache goes too. Restarting is the caller's business."""
        if not self.is_alive:
            return
        self._world.note(self.name, "loses power" if power else "is killed")
        self._end_process()
        self.is_alive = False
        self.has_power = not power
        self.paused_until = 0.0
        self._world.network.node_gone(self.name, hard=not power)
        if power:
            self.disk.lose_power()

    def _end_process(self) -> None:
        """Nobody is told anything any more; the disk keeps what was written."""
        world = self._world
        for _, waiters in self._waiting.values():
            world.clients.unknown += len(waiters)
        self._waiting = {}
        self._reads = {}
        if self.disk.recovering:
            world.reached("killed-while-recovering")
        if self.raft is not None and self.raft.is_transferring:
            world.reached("killed-in-transfer")
        self.raft = None
        self._watch = None
        self.incarnation += 1
        self.applied_index = 0
        self.disk.process_ended()

    def reopen(self, reason: str) -> None:
        """Begin again from the disk, in the same process (`Reopen` of the real group)."""
        self._world.note(self.name, f"begins again from its disk: {reason}")
        self._end_process()
        self.is_alive = False
        # Its transport listens on; for its peers that is a connection that broke and stands again.
        self._world.network.node_gone(self.name, hard=True)
        self._world.nemesis.start_later(self, REOPEN_SECONDS)

    def disk_failed(self) -> None:
        """A write or sync has failed for good: the node stops and is started again (raft.md 4.2)."""
        self._world.note(self.name, "stops: its disk has failed")
        self._end_process()
        self.is_alive = False
        self._world.network.node_gone(self.name, hard=True)
        self._world.nemesis.start_later(self, self.fuse_seconds)

    @property
    def is_paused(self) -> bool:
        return self._world.now < self.paused_until

    @property
    def inbox_length(self) -> int:
        return len(self._inbox)

    def has_kept(self, entry: Entry, *, durable: bool) -> bool:
        """Whether this disk holds the entry, or has truthfully said so before a fault took it that the group bears."""
        if self.disk.holds(entry.index, entry.head_crc, durable=durable):
            return True
        return (entry.index, entry.head_crc) in self.disk.excused

    # Damage

    def expect_scrub(self) -> None:
        """The background pass over closed segments will find damage some time."""
        if self.raft is not None and self.log.bad:
            at = self._world.now + SCRUB_SECONDS * self.chance.random()
            self._world.at(at, self._scrubbed, self.incarnation)

    def _scrubbed(self, incarnation: int) -> None:
        if incarnation == self.incarnation and self.log.bad:
            if self.is_paused:
                self._world.at(self.paused_until, self._scrubbed, incarnation)
                return
            self._world.reached("damage-found-by-scrub")
            self._found_damage(min(self.log.bad))

    def _found_damage(self, index: int) -> None:
        raft = self.raft
        if raft is not None and raft.is_leader:
            self._world.reached("leader-finds-damage")
        self.disk.is_suspect = True
        self.reopen(f"entry {index} does not read")

    def _repair(self, incarnation: int, gaps: list[Gap]) -> None:
        """Ask the peers in turn for every gap; go on until all are filled or known never to have been committed."""
        if incarnation != self.incarnation:
            return
        world = self._world
        if self.is_paused:
            world.at(self.paused_until, self._repair, incarnation, gaps)
            return
        left: list[Gap] = []
        for gap in gaps:
            if gap.first > self.log.last_index:
                continue
            if self._fill(gap):
                world.reached("repaired-from-peer")
                world.note(self.name, f"has {gap.first}-{gap.last} again")
                world.properties.repaired(self, gap.first, gap.last)
            elif self._was_never_committed(gap):
                world.reached("repair-cuts-never-committed")
                front = self._front(gap)
                first = gap.first + len(front)
                world.note(self.name, f"cuts at {first}: no quorum can have had it")
                world.properties.gives_up(self, gap.first, front)
                self.disk.recovering = True
                self.log.put(front)
                self.disk.cut(first)
                for entry in front:
                    if entry.type == EntryType.CONFIG:  # one that this node may never have had
                        self.disk.note_config(entry.index, decode_members(entry.body))
            else:
                left.append(gap)
        for gap in left:
            # What the peers have trimmed was committed; nobody has the entries, but whole segments and a checkpoint.
            for peer in self._peers_heard():
                if peer.raft is not None and peer.log.first_index > gap.first and self._install_from(peer):
                    # What the segments do not hold, this node may have acknowledged.
                    self.disk.recovering = True
                    world.reached("repair-installs")
                    return
        if left:
            world.at(world.now + REPAIR_ROUND_SECONDS * (1 + self.chance.random()), self._repair, incarnation, left)
        else:
            self._serve()

    def _peers_heard(self) -> list[SimNode]:
        """Members that answer a fetch now, in an order drawn anew."""
        world = self._world
        names = [name for name in world.names if name != self.name and not world.network.is_cut(self.name, name)]
        nodes = [world.nodes[name] for name in names]
        heard = [node for node in nodes if node.is_alive and not node.is_paused]
        self.chance.shuffle(heard)
        return heard

    def _fill(self, gap: Gap) -> bool:
        """Accept only what chains from before the gap to what is intact behind it (raft.md 4.6)."""
        for peer in self._peers_heard():
            taken = self._chained(peer, gap)
            if len(taken) == gap.last + 1 - gap.first and taken[-1].head_crc == gap.next_crc:
                self.log.put(taken)
                return True
        return False

    @staticmethod
    def _chained(peer: SimNode, gap: Gap) -> list[Entry]:
        """A peer's entries of a gap, from its beginning on, as far as they follow each other."""
        chain = gap.prev_crc
        taken: list[Entry] = []
        for index in range(gap.first, gap.last + 1):
            entry = peer.log.peek(index)
            if entry is None or entry.prev_crc != chain or index in peer.log.bad or index > peer.disk.written:
                break
            taken.append(entry)
            chain = entry.head_crc
        return taken

    def _front(self, gap: Gap) -> list[Entry]:
        """The first entries of a gap that is given up, as a peer has them: they may be committed (Raft 5.4.1)."""
        fronts = [front for peer in self._peers_heard() if (front := self._chained(peer, gap))]
        return max(fronts, key=lambda front: (front[-1].term, len(front)), default=[])

    def _was_never_committed(self, gap: Gap) -> bool:
        """A definite "no" from so many voters that no quorum can have it. Silence is no answer, nor is a node's that
        may have forgotten."""
        voters = self._voters_known()
        following = self.log.peek(gap.last + 1)
        assert following is not None
        noes = 0
        for peer in self._peers_heard():
            if peer.name not in voters or peer.disk.is_impaired:
                continue
            if gap.last + 1 < peer.log.first_index:
                continue
            if peer.log.head_crc_at(following.index) != following.head_crc:
                noes += 1
        return len(voters) - noes < majority(len(voters))

    def _voters_known(self) -> tuple[str, ...]:
        configs = self.disk.configs()
        return configs[-1][1].voters if configs else self._world.bootstrap

    # Segments

    def _fetch_log(self, leader: str) -> None:
        """The transfer of closed segments from a replica that has them, then a start on the copy (raft.md 4.7)."""
        world = self._world
        self._is_fetching = True
        delay = FETCH_SECONDS * (0.5 + self.chance.random()) + 4 * world.plan.latency
        world.at(world.now + delay, self._install, self.incarnation, leader)

    def _install(self, incarnation: int, leader: str) -> None:
        if incarnation != self.incarnation:
            return
        world, raft = self._world, self.raft
        assert raft is not None
        self._is_fetching = False
        if raft.is_leader or raft.verified_index >= self._needed_until - 1:
            return
        if raft.leader not in (None, leader):
            self._fetch_log(raft.leader)  # one replica is as good as another; nobody asks us again to fetch
            return
        source = world.nodes[leader]
        can_fetch = source.raft is not None and not source.is_paused and not world.network.is_cut(self.name, leader)
        if self.is_paused or not can_fetch or not self._install_from(source):
            self._fetch_log(leader)  # the transfer is resumed until it is no longer needed

    def _install_from(self, source: SimNode) -> bool:
        """Take another's closed segments in the place of our log, and start on them."""
        world = self._world
        if source.log.bad:
            return False
        # What is committed of them is for the checkpoint to say.
        last = source.disk.durable
        start = source.log.position_end // world.plan.segment_bytes * world.plan.segment_bytes
        while (entry := source.log.peek(last)) is not None and entry.position >= start:
            last -= 1
        last = max(last, source.log.first_index - 1)
        is_ours = self.log.head_crc_at(last) == source.log.head_crc_at(last) and not self.log.bad
        if last <= self.applied_index or is_ours:
            return False  # we have all of it
        world.counts["installs"] += 1
        world.reached("segments-installed")
        world.properties.installs(self, source, last)
        self._end_process()
        self.is_alive = False
        world.network.node_gone(self.name, hard=True)
        self.log.install(source.log, last)
        self.disk.installed(source.disk)
        world.note(self.name, f"has installed the log of {source.name} up to {last}")
        world.nemesis.start_later(self, REOPEN_SECONDS)
        return True

    # Clock

    def _local_now(self) -> float:
        return self._world.now * self._clock_rate + self._clock_offset

    def set_clock_rate(self, rate: float) -> None:
        """From now on; the clock's reading does not step."""
        now = self._world.now
        self._clock_offset += now * (self._clock_rate - rate)
        self._clock_rate = rate
        self._wake_at = float("inf")
        self._set_alarm()

    # Turns

    def post(self, kind: type, *details: Any) -> None:
        """Put an event into the inbox of a serving process."""
        if self.raft is not None:
            self._inbox.append((kind, details))
            self._want_turn()

    def submit(self, proposal: int) -> bool:
        """A client's request arrives. False when the queue is full."""
        if self.raft is None or len(self._clients) >= CLIENT_QUEUE_MAX:
            return False
        self._clients.append(proposal)
        self._want_turn()
        return True

    def ask_read(self, token: int, acknowledged: int) -> None:
        """A client asks for a read that must see every entry up to `acknowledged`."""
        if self.raft is not None and len(self._reads) < READS_WAITING_MAX:
            self._reads[token] = acknowledged
            self._reads_asked.append(token)
            self._want_turn()

    def want_changes(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self._want_turn()

    def want_trim(self, position: int) -> None:
        self._trim_to = position
        self._want_turn()

    def disk_state(self, ok: bool) -> None:
        self.post(DiskState, ok)

    def saved(self, state: HardState) -> None:
        self._world.properties.saves(self, state)
        self.post(HardStateSaved, state.term, state.vote)

    def wrote(self, index: int) -> None:
        self.post(Written, index, self.log.term_at(index))

    def synced(self, index: int) -> None:
        self.post(Durable, index, self.log.term_at(index))

    def _want_turn(self) -> None:
        if not self._is_turn_due and self.raft is not None:
            self._is_turn_due = True
            delay = self._rng.random() * 0.0003
            self._world.at(max(self._world.now + delay, self.paused_until), self._turn, self.incarnation)

    def _set_alarm(self) -> None:
        raft = self.raft
        if raft is None:
            return
        at = (raft.deadline - self._clock_offset) / self._clock_rate + 1e-6
        if at < self._wake_at:
            self._wake_at = at
            world = self._world
            if world.now < self.late_until:
                at += 1.2 * self.chance.random()
            world.at(max(at, world.now), self._wake, self.incarnation, self._wake_at)

    def _wake(self, incarnation: int, at: float) -> None:
        if incarnation == self.incarnation and at == self._wake_at:
            self._wake_at = float("inf")
            if self.raft is not None and self.raft.deadline <= self._local_now():
                self._want_turn()
            else:
                self._set_alarm()

    def _turn(self, incarnation: int) -> None:
        world = self._world
        if incarnation != self.incarnation:
            return
        if world.now < self.paused_until:
            world.at(self.paused_until, self._turn, incarnation)
            return
        self._is_turn_due = False
        raft = self.raft
        assert raft is not None
        now = self._local_now()
        inbox, self._inbox = self._inbox, []
        try:
            for kind, details in inbox:
                self._step(kind(now, *details))
            if self._clients:
                self._propose_clients(now)
            if self._reads_asked:
                asked, self._reads_asked = self._reads_asked, []
                for token in asked:
                    self._step(ReadIndex(now, token))
            if self._changes or self._trim_to:
                self._propose_orders(now)
            if raft.deadline <= now:
                self._step(Tick(now))
            self._step(TurnEnd(now))
        except Crashed:
            return
        except Unreadable as damage:
            world.reached("damage-found-by-read")
            self._found_damage(damage.index)
            return
        self._set_alarm()
        world.note_turn(self)

    def _step(self, event: Event) -> None:
        raft, watch = self.raft, self._watch
        if raft is None or watch is None:
            raise Crashed
        self._world.steps += 1
        effects = raft.step(event)
        watch.check()
        follow_ups: list[Event] = []
        for effect in effects:
            if self.fuse:
                self.fuse -= 1
                if not self.fuse:
                    self._burn(effect)
            if self.fuse_before and self.fuse_before == type(effect).__name__:
                self._burn(effect)
            self._perform(effect, event.now, follow_ups)
        for follow_up in follow_ups:
            self._step(follow_up)

    def _burn(self, effect: fx.Effect) -> None:
        """Die before this effect, or within it."""
        world = self._world
        self.fuse_before = ""
        if (state := f"dies-before-{type(effect).__name__}") in REACHED:
            world.reached(state)
        if isinstance(effect, fx.Cut):
            world.reached("dies-within-cut")
            self.disk.torn_cut(effect.from_index)
        world.nemesis.crash(self, self.fuse_seconds, power=self.fuse_burns_power)
        raise Crashed

    def _perform(self, effect: fx.Effect, now: float, follow_ups: list[Event]) -> None:
        world = self._world
        match effect:
            case fx.Send():
                world.properties.sends(self, effect.peer, effect.message)
                world.network.send(self.name, effect.peer, effect.message)
            case fx.Append():
                log = self.log
                for entry in effect.entries:
                    world.properties.appended(self, entry, log.position_end)
                    log.append((entry,))
                    if entry.type == EntryType.CONFIG:
                        self.disk.note_config(entry.index, decode_members(entry.body))
                index = self.disk.write()
                if self.raft is None:
                    raise Crashed
                if index:
                    term = log.term_at(index)
                    assert term is not None
                    follow_ups.append(Written(now, index, term))
            case fx.Commit():
                if self.log.term_at(self.applied_index + 1) != self.log.term_at(effect.index):
                    world.reached("commit-across-terms")
                world.properties.moves_commit(self, effect.index)
                self._apply(effect.index)
            case fx.SaveHardState():
                self.disk.save(HardState(effect.term, effect.vote))
            case fx.Cut():
                world.counts["cuts"] += 1
                world.reached("uncommitted-entry-cut")
                world.note(self.name, f"cuts its log at {effect.from_index}")
                world.properties.cuts(self, effect.from_index)
                self.disk.cut(effect.from_index)
            case fx.RoleChanged():
                self._change_role(effect)
            case fx.NoopNeeded():
                follow_ups.append(Propose(now, (self._frame(EntryType.NOOP, 1, b"", self._tail()),)))
            case fx.Refused():
                world.counts["refused"] += 1
                for entry in effect.entries:
                    _, waiters = self._waiting.pop(entry.index, (0, []))
                    world.clients.refuse(waiters)
                    if entry.type == EntryType.CONFIG:
                        world.reached("change-refused")
                        world.note(self.name, f"change refused: {effect.reason}")
            case fx.TransferEnded():
                world.counts["transfers" if effect.done else "transfers_failed"] += 1
                world.reached("transfer-done" if effect.done else "transfer-failed")
                world.note(self.name, f"transfer to {effect.target}: done={effect.done}, {effect.reason}")
            case fx.Recovered():
                world.counts["recovered"] += 1
                world.reached("recovered")
                self.disk.recovered()
                world.properties.is_confirmed(self)
            case fx.ReadReady():
                acknowledged = self._reads.pop(effect.token, None)
                if acknowledged is not None:
                    world.counts["reads"] += 1
                    world.reached("read-served")
                    world.properties.reads(self, effect.index, acknowledged)
            case fx.ReadRefused():
                self._reads.pop(effect.token, None)
                world.counts["reads_refused"] += 1
                world.reached("read-refused")
            case fx.MembersChanged():
                self._members_changed(effect)
            case fx.NeedSegments():
                world.reached("needs-segments")
                self._needed_until = effect.first_index
                if not self._is_fetching:
                    self._fetch_log(effect.leader)
            case fx.Fatal():
                raise PropertyBroken(f"fatal: {self.name} stops: {effect.reason}")

    def _members_changed(self, effect: fx.MembersChanged) -> None:
        world = self._world
        members = effect.members
        if effect.is_committed:
            world.note(self.name, f"members of {effect.index} are committed")
            return
        if effect.index < self._members_index:
            world.reached("change-cut-again")
        self._members_index = effect.index
        world.note(self.name, f"members of {effect.index}: {','.join(members.voters)} + {','.join(members.learners)}")
        raft = self.raft
        assert raft is not None
        if raft.is_leader:
            world.counts["changes"] += 1
            if self.name not in members:
                world.reached("leader-removes-itself")

    def _change_role(self, effect: fx.RoleChanged) -> None:
        world = self._world
        world.note(self.name, f"{effect.role.name} term={effect.term} leader={effect.leader}: {effect.reason}")
        if effect.reason == Cause.REMOVED.value:
            world.reached("steps-aside-when-removed")
        if effect.role is Role.LEADER:
            world.counts["elections"] += 1
            world.properties.leads(self, effect.term)
            if self.name == world.plan.preferred:
                world.reached("preferred-leader-takes-over")
            if self.log.bad:
                world.reached("leads-with-latent-damage")
        else:
            # Leadership is gone: the outcome of what waits is unknown, each waiter is told so exactly once.
            for _, waiters in self._waiting.values():
                world.clients.unknown += len(waiters)
            self._waiting = {}

    # Proposals

    def _tail(self) -> tuple[int, int, int]:
        raft = self.raft
        assert raft is not None
        return raft.log.last_index, raft.log.last_crc, raft.log.position_end

    def _frame(self, entry_type: int, count: int, body: bytes, tail: tuple[int, int, int]) -> Entry:
        raft = self.raft
        assert raft is not None
        last_index, last_crc, end = tail
        position = next_position(end, HEADER_BYTES + len(body), self._world.plan.segment_bytes)
        return frame_entry(last_index + 1, raft.term, position, entry_type, count, (body,), last_crc, raft.commit_index)

    def _propose_clients(self, now: float) -> None:
        raft, world = self.raft, self._world
        assert raft is not None
        if not raft.accepts_proposals or not raft.noop_index:
            world.clients.refuse(self._clients)
            self._clients.clear()
            return
        entries: list[Entry] = []
        tail = self._tail()
        while self._clients:
            ids = [self._clients.popleft() for _ in range(min(len(self._clients), self._rng.randint(1, 8)))]
            body = b"".join(proposal.to_bytes(8, "big") for proposal in ids)
            body += bytes(self._rng.randint(0, world.plan.body_bytes_max))
            entry = self._frame(EntryType.DATA, len(ids), body, tail)
            tail = (entry.index, entry.head_crc, entry.end)
            entries.append(entry)
            self._waiting[entry.index] = (entry.term, ids)
        self._step(Propose(now, entries))

    def _propose_orders(self, now: float) -> None:
        """What an operator, or retention, wants logged."""
        raft = self.raft
        assert raft is not None
        changes, self._changes = self._changes, ()
        trim_to, self._trim_to = self._trim_to, 0
        if not raft.accepts_proposals or not raft.noop_index:
            return
        if trim_to:
            body = trim_to.to_bytes(8, "little") + b"\0"
            self._step(Propose(now, (self._frame(EntryType.TRIM, 1, body, self._tail()),)))
        for change in changes:
            if not raft.is_leader:
                return
            try:
                members: Members = apply_change(raft.members, change)
            except LocalError:
                continue
            self._step(Propose(now, (self._frame(EntryType.CONFIG, 1, encode_members(members), self._tail()),)))

    def _apply(self, index: int) -> None:
        world = self._world
        while self.applied_index < index:
            entry = self.log.entries(self.applied_index + 1, 1)[0]
            world.properties.commits(self, entry)
            self.applied_index = entry.index
            if entry.type == EntryType.TRIM:
                world.at(world.now + 0.5 * self.chance.random(), self._trim, self.incarnation, entry)
            term, waiters = self._waiting.pop(entry.index, (0, []))
            if waiters:
                assert term == entry.term
                world.clients.acknowledge(waiters, entry)

    def _trim(self, incarnation: int, order: Entry) -> None:
        """A TRIM entry is applied and a checkpoint covers what goes: whole segments only, never the last ones."""
        if incarnation != self.incarnation:
            return
        log, nbytes = self.log, self._world.plan.segment_bytes
        position = min(int.from_bytes(order.body[:8], "little"), log.position_end - SEGMENTS_KEPT * nbytes)
        following = log.peek(min(self.applied_index, self.disk.durable) + 1)
        if following is not None:
            position = min(position, following.position)
        start = position // nbytes * nbytes
        last = 0
        for entry in log:
            if entry.position >= start:
                break
            last = entry.index
        if last >= log.first_index and not log.bad:
            self._world.counts["trims"] += 1
            self._world.reached("trimmed")
            self.disk.trim(last)
