"""One simulated process and its disk: the driver of the core on virtual time.

The disk knows three lengths of the log: what the core has appended, what is *written* (page cache) and what is
*durable*. A killed process keeps what was written. A power loss keeps what was durable and any prefix of the rest:
recovery cuts at the first bad frame, so other torn patterns come to the same for the core; the store's own tests tear
frames.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from attrs import define

from chaos.sim.chance import stream
from chaos.sim.properties import PropertyBroken
from dledger.core import effects as fx
from dledger.core.config import RaftConfig
from dledger.core.events import (
    DiskState,
    Durable,
    Event,
    HardStateSaved,
    Propose,
    Tick,
    TurnEnd,
    Written,
)
from dledger.core.invariants import Watch
from dledger.core.log import MemoryLog
from dledger.core.raft import Raft
from dledger.core.types import HEADER_BYTES, Entry, EntryType, HardState, Role, frame_entry, next_position

if TYPE_CHECKING:
    from chaos.sim.world import World

DISK_STALL_NOTICED = 2.0
"""Two election timeouts without a completed write: the driver says DiskState (raft.md 4.12)."""
CLIENT_QUEUE_MAX = 1000


class Crashed(Exception):
    """Unwinds a turn when the process dies between two effects."""


@define(eq=False)
class _DiskJob:
    """A write or sync under way; a Cut lowers what it will report."""

    index: int


class SimNode:
    """A member of the simulated group. `raft` is None while the process is down."""

    def __init__(self, world: World, name: str) -> None:
        plan = world.plan
        self._world = world
        self.name = name
        self._rng = stream(plan.seed, f"node/{name}")
        self._disk_rng = stream(plan.seed, f"disk/{name}")
        self._clock_rate = 1.0 + self._rng.uniform(-plan.drift, plan.drift)
        self._clock_offset = self._rng.uniform(0.0, 1000.0)
        self._config = RaftConfig(
            sync=plan.sync,
            segment_bytes=plan.segment_bytes,
            message_bytes_max=plan.message_bytes_max,
            window_messages_max=plan.window_messages_max,
        )
        # The disk: outlives the process.
        self.log = MemoryLog()
        self.saved = HardState()
        self.written = 0
        self.durable = 0
        self.is_recovering = False
        self.power_lost: set[tuple[int, int]] = set()
        self._stalled_until = 0.0
        # The process.
        self.raft: Raft | None = None
        self.incarnation = 0
        self.applied_index = 0
        self._watch: Watch | None = None
        self._inbox: list[tuple[type, tuple[Any, ...]]] = []
        self._is_turn_due = False
        self._wake_at = 0.0
        self.paused_until = 0.0
        self.fuse = 0
        """Effects left until the process dies; 0 = none armed."""
        self._clients: deque[int] = deque()
        self._waiting: dict[int, tuple[int, list[int]]] = {}
        self._writes: list[_DiskJob] = []
        self._write_free_at = 0.0
        self._meta_free_at = 0.0
        self._sync: _DiskJob | None = None
        self._is_sync_due = False

    # Life and death

    def start(self) -> None:
        """Recover the log, sync what is kept, run."""
        world = self._world
        assert self.raft is None
        self.incarnation += 1
        self.durable = self.written = self.log.last_index
        hint = 0
        if world.plan.use_commit_hint and len(self.log):
            hint = self.log.entries(self.log.last_index, 1)[0].commit_hint
        hint = max(hint, self.log.first_index - 1)
        world.properties.starts(self, hint)
        self.applied_index = hint
        rng = stream(world.plan.seed, f"raft/{self.name}/{self.incarnation}")
        self.raft = world.make_raft(
            self.name,
            world.names,
            self._config,
            rng,
            self.saved,
            self.log,
            self._local_now(),
            commit_index=hint,
            recovering=self.is_recovering,
        )
        self._watch = Watch(self.raft)
        self._inbox = []
        self._is_turn_due = False
        self._wake_at = float("inf")
        self.fuse = 0
        self._clients.clear()
        self._waiting = {}
        self._writes = []
        self._write_free_at = self._meta_free_at = 0.0
        self._sync = None
        self._is_sync_due = False
        world.network.node_started(self.name)
        self._set_alarm()

    def kill(self, *, power: bool) -> None:
        """End the process at once; with `power`, the page cache goes too. Restarting is the caller's business."""
        if self.raft is None:
            return
        world = self._world
        world.note(self.name, "loses power" if power else "is killed")
        for _, waiters in self._waiting.values():
            world.clients.unknown += len(waiters)
        self.raft = None
        self._watch = None
        self.incarnation += 1
        self.paused_until = 0.0
        kept = self.written
        if power and self.durable < self.written:
            kept = self._disk_rng.randint(self.durable, self.written)
            if not world.plan.sync:
                for index in range(kept + 1, self.written + 1):
                    crc = self.log.head_crc_at(index)
                    assert crc is not None
                    self.power_lost.add((index, crc))
        if power and not world.plan.sync:
            # The boot id has changed: what was acknowledged from the page cache may be gone (raft.md 4.2).
            self.is_recovering = True
        if kept < self.log.last_index:
            self.log.cut(kept + 1)
        self.written = kept
        self.durable = min(self.durable, kept)
        self.applied_index = 0
        world.network.node_gone(self.name, hard=not power)

    @property
    def is_paused(self) -> bool:
        return self._world.now < self.paused_until

    def has_kept(self, entry: Entry, *, durable: bool) -> bool:
        """Whether this disk holds the entry, or has truthfully said so before a power loss took it."""
        if entry.index <= (self.durable if durable else self.written):
            return self.log.head_crc_at(entry.index) == entry.head_crc
        return not durable and (entry.index, entry.head_crc) in self.power_lost

    def trim(self, through_index: int) -> None:
        """Retention: forget the head of the log."""
        if self.log.first_index <= through_index < self.log.last_index:
            self.log.trim(through_index)

    # Turns

    def _local_now(self) -> float:
        return self._world.now * self._clock_rate + self._clock_offset

    def post(self, kind: type, *details: Any) -> None:
        """Put an event into the inbox of a running process."""
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

    def _want_turn(self) -> None:
        if not self._is_turn_due:
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
            self._world.at(max(at, self._world.now), self._wake, self.incarnation, at)

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
            if raft.deadline <= now:
                self._step(Tick(now))
            self._step(TurnEnd(now))
        except Crashed:
            return
        self._set_alarm()
        world.note_turn(self)

    def _step(self, event: Event) -> None:
        raft, watch = self.raft, self._watch
        assert raft is not None and watch is not None
        self._world.steps += 1
        effects = raft.step(event)
        watch.check()
        follow_ups: list[Event] = []
        for effect in effects:
            if self.fuse:
                self.fuse -= 1
                if not self.fuse:
                    self._world.crash(self)
                    raise Crashed
            self._perform(effect, event.now, follow_ups)
        for follow_up in follow_ups:
            self._step(follow_up)

    def _perform(self, effect: fx.Effect, now: float, follow_ups: list[Event]) -> None:
        world = self._world
        match effect:
            case fx.Send():
                world.properties.sends(self, effect.peer, effect.message)
                world.network.send(self.name, effect.peer, effect.message)
            case fx.Append():
                for entry in effect.entries:
                    world.properties.appended(self, entry, self.log.position_end)
                    self.log.append((entry,))
                self._write(now, follow_ups)
            case fx.Commit():
                world.properties.moves_commit(self, effect.index)
                self._apply(effect.index)
            case fx.SaveHardState():
                self._save(HardState(effect.term, effect.vote))
            case fx.Cut():
                world.counts["cuts"] += 1
                world.note(self.name, f"cuts its log at {effect.from_index}")
                world.properties.cuts(self, effect.from_index)
                self._cut(effect.from_index)
            case fx.RoleChanged():
                self._change_role(effect)
            case fx.NoopNeeded():
                follow_ups.append(Propose(now, (self._frame(EntryType.NOOP, 1, b"", self._tail()),)))
            case fx.Refused():
                world.counts["refused"] += 1
                for entry in effect.entries:
                    _, waiters = self._waiting.pop(entry.index, (0, []))
                    world.clients.refuse(waiters)
            case fx.TransferEnded():
                world.counts["transfers" if effect.done else "transfers_failed"] += 1
                world.note(self.name, f"transfer to {effect.target}: done={effect.done}, {effect.reason}")
            case fx.Recovered():
                world.counts["recovered"] += 1
                self.is_recovering = False
            case fx.Fatal():
                raise PropertyBroken(f"{self.name} stops: {effect.reason}")

    def _change_role(self, effect: fx.RoleChanged) -> None:
        world = self._world
        world.note(self.name, f"{effect.role.name} term={effect.term} leader={effect.leader}: {effect.reason}")
        if effect.role is Role.LEADER:
            world.counts["elections"] += 1
            world.properties.leads(self, effect.term)
        else:
            # Leadership is gone: the outcome of what waits is unknown, each waiter is told so exactly once.
            for _, waiters in self._waiting.values():
                world.clients.unknown += len(waiters)
            self._waiting = {}

    # Proposals

    def _tail(self) -> tuple[int, int, int]:
        raft = self.raft
        assert raft is not None
        return raft.last_index, raft.last_crc, raft.position_end

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

    def _apply(self, index: int) -> None:
        world = self._world
        while self.applied_index < index:
            entry = self.log.entries(self.applied_index + 1, 1)[0]
            world.properties.commits(self, entry)
            self.applied_index = entry.index
            term, waiters = self._waiting.pop(entry.index, (0, []))
            if waiters:
                assert term == entry.term
                world.clients.acknowledge(waiters, entry)

    # Disk

    def stall_disk(self, until: float) -> None:
        """Nothing completes before `until`; a long stall is noticed."""
        self._stalled_until = max(self._stalled_until, until)
        world = self._world
        if until - world.now > DISK_STALL_NOTICED:
            world.at(world.now + DISK_STALL_NOTICED, self._tell_disk_state, self.incarnation, False)
            world.at(until, self._tell_disk_state, self.incarnation, True)

    def _tell_disk_state(self, incarnation: int, ok: bool) -> None:
        if incarnation == self.incarnation:
            self.post(DiskState, ok)

    def _disk_done_at(self, latency: float) -> float:
        delay = latency * (0.3 + 1.4 * self._disk_rng.random())
        if self._disk_rng.random() < 0.01:
            delay += 0.2 * self._disk_rng.random()
        return max(self._world.now + delay, self._stalled_until)

    def _save(self, state: HardState) -> None:
        self._meta_free_at = max(self._meta_free_at, self._disk_done_at(self._world.plan.sync_latency))
        self._world.at(self._meta_free_at, self._saved, self.incarnation, state)

    def _saved(self, incarnation: int, state: HardState) -> None:
        if incarnation == self.incarnation:
            self.saved = state
            self.post(HardStateSaved, state.term, state.vote)

    def _write(self, now: float, follow_ups: list[Event]) -> None:
        world = self._world
        if not world.plan.threaded_writes and world.now >= self._stalled_until:
            follow_ups.append(self._written(now, self.log.last_index))
            return
        job = _DiskJob(self.log.last_index)
        self._writes.append(job)
        self._write_free_at = max(self._write_free_at, self._disk_done_at(0.0005))
        world.at(self._write_free_at, self._write_done, self.incarnation, job)

    def _write_done(self, incarnation: int, job: _DiskJob) -> None:
        if incarnation != self.incarnation:
            return
        self._writes.remove(job)
        if job.index > self.written:
            event = self._written(0.0, job.index)
            self.post(Written, event.index, event.term)

    def _written(self, now: float, index: int) -> Written:
        self.written = max(self.written, index)
        if not self._is_sync_due:
            self._is_sync_due = True
            plan = self._world.plan
            wait = 0.0 if plan.sync else self._disk_rng.random() * plan.lazy_sync_interval
            self._world.at(self._world.now + wait, self._begin_sync, self.incarnation)
        term = self.log.term_at(index)
        assert term is not None
        return Written(now, index, term)

    def _begin_sync(self, incarnation: int) -> None:
        if incarnation != self.incarnation:
            return
        if self._sync is not None:
            return
        self._is_sync_due = False
        self._sync = _DiskJob(self.written)
        self._world.at(self._disk_done_at(self._world.plan.sync_latency), self._sync_done, self.incarnation, self._sync)

    def _sync_done(self, incarnation: int, job: _DiskJob) -> None:
        if incarnation != self.incarnation:
            return
        self._sync = None
        if job.index > self.durable:
            self.durable = job.index
            term = self.log.term_at(job.index)
            self.post(Durable, job.index, term)
        if self._is_sync_due:
            self._begin_sync(incarnation)

    def _cut(self, from_index: int) -> None:
        """Removed and synced before anything else happens; marks under way no longer cover what is gone."""
        self.log.cut(from_index)
        kept = from_index - 1
        self.written = min(self.written, kept)
        self.durable = min(self.durable, kept)
        for job in self._writes:
            job.index = min(job.index, kept)
        if self._sync is not None:
            self._sync.index = min(self._sync.index, kept)
