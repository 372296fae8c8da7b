"""Joins the pure core with the disk, the peers and the state machine: one turn after the other.

A turn steps everything that arrived, performs each step's effects before the next one, sends, writes, and applies what
is committed. It is synchronous, and runs wherever something has arrived: in the task that read a peer's message, or in
the driver's own. Only a cut has to wait for the disk within a turn; then the turn is continued by the driver's task.

    inbox -> core -> effects        (messages of peers, marks of the disk, time)
    open batch -> one entry -> core -> sent to both peers -> page cache -> `Written` -> core
    commit index -> machine.apply -> machine.turn_done

What waits for the disk otherwise runs beside it: saving term and vote, syncing the log (one at a time), preparing the
next segment, keeping the durable mark, reading old entries for a peer (`feed.py`), and the log's own writes while the
disk is slow. Each comes back as an event of a later turn. `disk_watch.py` sees to it that a node whose disk does not
come back with them does not lead; `retention.py` forgets what is old.

Damage found while the log is in use ends the run with `Reopen`, after leadership has been handed over: the group then
repairs the log from its peers and runs again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from attrs import evolve

from dledger.config import Address, GroupConfig
from dledger.core import effects as fx
from dledger.core.errors import LocalError, RemoteError
from dledger.core.events import (
    AcceptLoss,
    DiskState,
    Durable,
    Event,
    HardStateSaved,
    PeerLost,
    PeerUp,
    Propose,
    ReadIndex,
    Receive,
    Tick,
    Transfer,
    TurnEnd,
    Written,
)
from dledger.core.log import LogView
from dledger.core.membership import Change, Members, apply_change, encode_members
from dledger.core.messages import Append, Message, PreVoteReply
from dledger.core.raft import Raft
from dledger.core.transitions import PeerState
from dledger.core.types import HEADER_BYTES, Entry, EntryType, Role, frame_entry, next_position
from dledger.disk_watch import CUT, HARD_STATE, LOG_SYNC, LOG_WRITE, DiskWatch
from dledger.errors import CoreStopped, DiskFull, LedgerError, LogDamaged, NotLeader, Overloaded, Reopen
from dledger.feed import LogFeed
from dledger.machine import EntryView, GroupStatistics, StateMachine
from dledger.measures import Measures
from dledger.open_batch import OpenBatch, Proposal
from dledger.peers import Peers
from dledger.reads import Outcomes, Reads, Told
from dledger.retention import Plan, Retention, encode_trim, trim_base
from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile
from runtime.logs import Logger
from runtime.model import Env

APPLY_BYTES_MAX = 2 * 1024 * 1024
"""What one turn applies at most; a longer catch-up is spread over turns, so that the loop stays responsive."""
APPLY_SECONDS_MAX = 0.020
APPLY_CHECK_EVERY = 16
SAMPLE_EVERY = 8
"""Turns whose writing, application and round trips are timed: it shows when one send follows the other."""
COMMIT_NEWS_SECONDS = 0.002
HOUSEKEEPING_SECONDS = 0.25
DISK_FULL_RETRY_SECONDS = 1.0
HAND_OVER_SECONDS = 0.5
"""How long a leader that found damage in its log looks for a successor before it leaves."""
OWN_WAITING_MAX = 64
"""Changes of members and trims that wait to be logged."""
INBOX_MAX = 1024
"""Messages that wait while a cut holds the turns up; more of them are as if lost on the way."""
LAG_SAMPLES_MAX = 2400
"""Ten minutes of where the log ended: what the lag of a peer in seconds is told from."""
APP_MESSAGES_MAX = 4096
APP_BYTES_MAX = 64 * 1024 * 1024
STOPS = "this node stops"
OLD_PEER = "a connected member runs an older version; upgrade it first"


class Staged:
    """A DATA entry between its arrival and its commit or cut."""

    __slots__ = ("count", "end", "index", "is_orphan", "is_own", "nbytes", "since", "staged", "term")

    def __init__(self, entry: Entry, staged: Any, is_own: bool, since: float) -> None:
        self.index = entry.index
        self.term = entry.term
        self.end = entry.end
        self.nbytes = len(entry.frame)
        self.count = entry.count
        self.staged = staged
        self.is_own = is_own
        self.is_orphan = not is_own
        self.since = since


def _ignore_need(leader: str, first_index: int) -> None:
    """For groups without catch-up by segments."""


def _no_lease() -> None:
    return None


class Replay:
    """Shows the machine the entries behind its tables, and keeps what is not known to be committed yet."""

    def __init__(self, machine: StateMachine, segment_bytes: int) -> None:
        self._machine = machine
        self._segment_bytes = segment_bytes
        self.staged: deque[Staged] = deque()
        self.trims: list[Entry] = []
        """TRIM entries that are not known to be committed."""
        self.trimmed_position = 0

    def show(self, entry: Entry, applied_index: int) -> None:
        """The next entry; applied as well when it is not behind `applied_index`."""
        if entry.type == EntryType.DATA:
            staged = self._machine.stage(EntryView(entry))
            if entry.index <= applied_index:
                self._machine.apply(entry.index, entry.term, staged)
            else:
                self.staged.append(Staged(entry, staged, False, 0.0))
        elif entry.type == EntryType.TRIM:
            if entry.index > applied_index:
                self.trims.append(entry)
                return
            base = trim_base(entry, self._segment_bytes)
            if base > self.trimmed_position:
                self.trimmed_position = base
                self._machine.trim(base)


class Driver:
    """One member of a group, recovered and ready to take part."""

    def __init__(
        self,
        env: Env,
        config: GroupConfig,
        machine: StateMachine,
        log: Logger,
        *,
        store: LogStore,
        meta: MetaFile,
        batch: OpenBatch,
        make_core: Callable[[float, LogView], Raft],
        make_peers: Callable[[Driver], Peers],
        replay: Replay,
        applied_index: int,
        checkpoint_index: int = 0,
        segment_bytes: int,
        need_segments: Callable[[str, int], None] = _ignore_need,
        leased_position: Callable[[], int | None] = _no_lease,
    ) -> None:
        """`replay` has shown the machine everything up to `applied_index`; `checkpoint_index` is what the newest
        checkpoint covers. `need_segments(leader, first_index)`: only whole segments can help this node.
        `leased_position`: from where on a peer that fetches segments needs them.
        """
        self._env = env
        self._config = config
        self._machine = machine
        self._log = log
        self._monotonic = env.clock.monotonic
        self.store = store
        self._meta = meta
        self._segment_bytes = segment_bytes
        self.feed = LogFeed(store, segment_bytes, self.wake)
        self.core = make_core(self._monotonic(), self.feed)
        self.peers = make_peers(self)
        self._need_segments = need_segments
        self.members = self.core.members
        self.members_index = self.core.config_index
        if self.members_index:
            self.peers.set_members(self._addresses_of(self.members))
        self.measures = Measures()
        self.disk = DiskWatch(env, config, log)
        self.retention = Retention(
            env,
            config,
            machine,
            log,
            store,
            self.disk,
            segment_bytes=segment_bytes,
            propose=self._propose_trim,
            applied=lambda: self.applied_index,
            leased=leased_position,
            removed=self._segments_removed,
        )
        self.retention.trimmed_position = replay.trimmed_position
        self.retention.checkpoint_saved(checkpoint_index)
        self.batch = batch
        batch.bind(
            segment_bytes, min(config.entry_bytes_max, segment_bytes - HEADER_BYTES), self._check_room, self.wake
        )

        self.role = self.core.role
        self.term = self.core.term
        self.leader_id: str | None = None
        self.is_ready = False
        self.applied_index = applied_index
        self.committed_position = store.end_of(applied_index)
        self.waiting_records = 0
        self._commit_index = applied_index
        self._staged = replay.staged
        self._trims: deque[Entry] = deque(replay.trims)
        self._reads = Reads()
        self._outcomes = Outcomes()
        self._own: deque[tuple[EntryType, Callable[[], bytes], Told]] = deque()
        self._inbox: deque[Event] = deque()
        self._app_inbox: deque[tuple[str, bytes]] = deque()
        self._noop_term = 0
        self._marked_index = store.written_index
        self._durable_index = store.durable_index
        self._cut: tuple[int, Sequence[fx.Effect]] | None = None
        self._transfer: tuple[str | None] | None = None
        self._transfer_wanted: list[Told] = []
        self._transfer_told: list[Told] = []
        self._in_turn = False
        self._is_stopping = False
        self._leaving: str | None = None
        self._is_broken = False
        self._has_ended = False
        self._app_bytes = 0

        self._task: trio.lowlevel.Task | None = None
        self._is_awake = True
        self._ticker_deadline = 0.0
        self._ticker_kick = trio.Event()
        self._hard_state: tuple[int, str | None] | None = None
        self._hard_state_kick = trio.Event()
        self._news_kick = trio.Event()
        self._is_news_due = False
        self._sync_kick = trio.Event()
        self._spare_kick = trio.Event()
        self._write_kick = trio.Event()
        self._recovered_kick = trio.Event()
        self._is_writing = False
        self._watched_index = -1
        self._rtt_asked: dict[str, tuple[int, float]] = {}
        self._ends: deque[tuple[float, int]] = deque(maxlen=LAG_SAMPLES_MAX)

        self._busy = 0.0
        self._busy_since = self._monotonic()
        self.saturation = 0.0
        self.turns = 0
        self.counters: dict[str, int] = {
            "elections": 0,
            "elections_won": 0,
            "role_changes": 0,
            "cuts": 0,
            "entries_proposed": 0,
            "records_proposed": 0,
            "entries_applied": 0,
            "syncs": 0,
            "orphaned": 0,
            "entries_dropped": 0,
            "messages_dropped": 0,
            "app_dropped": 0,
            "damage_found": 0,
            "writes_in_thread": 0,
        }

    # What has arrived. None of these does more than take note; `pump` or `wake` follows.

    def on_message(self, peer: str, message: Message) -> None:
        if (
            type(message) is Append
            and message.entries
            and self.store.unwritten_bytes > self._config.uncommitted_bytes_max
        ):
            # Nowhere to write them (a full or stalled disk), and memory must not fill instead. As if lost on the way:
            # the next heartbeat finds the gap, and the leader probes until there is room.
            self.counters["entries_dropped"] += len(message.entries)
            return
        if self._cut is not None and len(self._inbox) >= INBOX_MAX:
            self.counters["messages_dropped"] += 1
            return
        self._inbox.append(Receive(self._monotonic(), peer, message))

    def on_app_message(self, peer: str, payload: bytes) -> None:
        """Kept for the next turn; lost when too many wait, which only a cut on a stalled disk brings about."""
        if len(self._app_inbox) >= APP_MESSAGES_MAX or self._app_bytes + len(payload) > APP_BYTES_MAX:
            self.counters["app_dropped"] += 1
            return
        self._app_bytes += len(payload)
        self._app_inbox.append((peer, payload))

    def on_peer_up(self, peer: str) -> None:
        self._inbox.append(PeerUp(self._monotonic(), peer))

    def on_peer_lost(self, peer: str, hard: bool) -> None:
        self._inbox.append(PeerLost(self._monotonic(), peer, hard))

    # What the group asks. Whoever is to be told is told once, in a turn: None when it is done, else the reason.

    def transfer(self, target: str | None, told: Told | None = None) -> None:
        """Hand leadership to `target`, or to the most advanced member. Ends within an election timeout."""
        if told is not None:
            if self._has_ended:
                told(STOPS)
                return
            self._transfer_wanted.append(told)
        self._transfer = (target,)
        self.wake()

    def read_index(self, told: Told) -> None:
        """Tell when this node's tables show everything that was acknowledged anywhere before this call.

        All calls up to the next turn share one round to the other members. Refused where this node does not lead.
        """
        if self._has_ended:
            told(STOPS)
            return
        self._reads.ask(told)
        self.wake()

    def change_members(self, change: Change, told: Told) -> None:
        """Log one change of members; done when it is committed. Leader only; one at a time."""
        self._log_own(EntryType.CONFIG, lambda: self._config_body(change), told)

    def accept_loss(self) -> None:
        """The operator gives up what a power loss may have taken from this node: it votes and campaigns again."""
        self._inbox.append(AcceptLoss(self._monotonic()))
        self.wake()

    def trim_to(self, position: int, *, is_forced: bool = False) -> int:
        """Give up the log before `position`, as far as that is allowed: whole segments, not the newest ones, and what
        the machine still needs only when forced. Returns the position that will be logged.

        Raises NotLeader, or LedgerError with a reason.
        """
        self._check_leads()
        allowed = self.retention.limit(position if is_forced else min(position, self._machine.trim_floor()))
        if allowed <= max(self.store.first_position, self.retention.trimmed_position):
            raise LedgerError(f"no closed segment before {position} can be trimmed")
        self._propose_trim(Plan(allowed, is_forced, "asked for"))
        return allowed

    def delete_expired(self) -> None:
        """Trim what is older than the retention now, whatever the hour. Raises NotLeader."""
        self._check_leads()
        self.retention.ask()

    def checkpoint_saved(self, index: int) -> None:
        """A checkpoint of the machine's tables after entry `index` is on stable storage. Also from a thread."""
        self.retention.checkpoint_saved(index)

    def damaged(self, error: LogDamaged) -> None:
        """A read has found damage: hand over leadership, then end the run with `Reopen`."""
        self.counters["damage_found"] += 1
        self._log.error("damage found in the log", error=str(error))
        self.reopen(str(error))

    def reopen(self, reason: str) -> None:
        """End the run with `Reopen`: the log on disk has to be opened anew."""
        if self._leaving is None:
            self._leaving = reason
        self.wake()

    def _check_leads(self) -> None:
        if not self.batch.leading:
            raise NotLeader(self.leader_id)

    def _log_own(self, entry_type: EntryType, make_body: Callable[[], bytes], told: Told) -> None:
        if self._has_ended:
            told(STOPS)
            return
        if len(self._own) >= OWN_WAITING_MAX:
            told("too many changes wait to be logged")
            return
        self._own.append((entry_type, make_body, told))
        self.wake()

    def _config_body(self, change: Change) -> bytes:
        members = self.members
        known = evolve(members, addresses=self._addresses_of(members))
        return encode_members(apply_change(known, change))

    def _addresses_of(self, members: Members) -> dict[str, Address]:
        """By the CONFIG entry, else as configured."""
        found: dict[str, Address] = {}
        for name in members.all:
            address = members.addresses.get(name) or self._config.peers.get(name)
            if address is not None:
                found[name] = address
        return found

    def _propose_trim(self, plan: Plan) -> None:
        body = encode_trim(plan.position, is_forced=plan.is_forced)

        def told(reason: str | None) -> None:
            if reason is not None:
                self._log.warning("trim not logged", position=plan.position, reason=reason)

        self._log.info("trimming the log", position=plan.position, forced=plan.is_forced, reason=plan.reason)
        self._log_own(EntryType.TRIM, lambda: body, told)

    def pump(self) -> None:
        """Run a turn here and now, in the task that brought the news: it saves a pass through the scheduler."""
        if self._in_turn or self._cut is not None:
            self.wake()
        else:
            self.turn()

    def kick(self) -> None:
        """A turn at once when nothing is in flight, else soon: a lone proposal loses no time, many share an entry."""
        if self.batch.is_empty:
            return
        if self.store.last_index > self._commit_index:
            self.wake()
        else:
            self.pump()

    def wake(self) -> None:
        """Have the driver's task run a turn soon: everything that arrives meanwhile shares it."""
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)
        else:
            self._is_awake = True

    # The turn.

    def turn(self) -> None:
        """Everything there is to do now, without waiting. Leaves a cut for the driver's task."""
        if self._is_broken:
            return
        started = self._monotonic()
        self._in_turn = True
        try:
            self._turn(started)
        except LogDamaged as error:
            self._break(error)
        finally:
            self._in_turn = False
        if self.core.deadline < self._ticker_deadline:
            self._ticker_kick.set()
        self.turns += 1
        self._busy += self._monotonic() - started

    def _turn(self, now: float) -> None:
        step = self.core.step
        inbox = self._inbox
        while inbox:
            event = inbox.popleft()
            try:
                effects = step(event)
            except RemoteError as error:
                assert type(event) is Receive
                self.peers.disconnect(event.peer, str(error))
                continue
            if effects and not self._perform(effects):
                return
        if now >= self.core.deadline and not self._perform(step(Tick(now))):
            return
        if self._noop_term and not self._propose_noop():
            return
        reads = self._reads
        if reads.asked:
            self._perform(step(ReadIndex(now, reads.begin_round())))
        batch = self.batch
        if batch.leading:
            if not batch.is_empty:
                self._propose(batch.take_sealed())
                self._perform(step(TurnEnd(now)))  # the peers write while we do
            if self._own:
                self._propose_own(now)
            if self._transfer is not None:
                self._begin_transfer(now)
        elif self._own or self._transfer is not None:
            self._refuse_own()
        if not self._write(now):
            return
        is_leader = self.role is Role.LEADER
        if not is_leader:
            self._perform(step(TurnEnd(now)))  # the leader waits for this answer: before our own applying
        self._apply()
        if reads.is_settled:
            reads.answer(self.applied_index)
        if self._app_inbox:
            self._app_bytes = 0
            while self._app_inbox:
                self._machine.app_message(*self._app_inbox.popleft())
        self._machine.turn_done()
        if is_leader and self.role is Role.LEADER:
            self._send_rest(now)
        if inbox or not batch.is_empty:
            self.wake()

    def _break(self, error: LogDamaged) -> None:
        """Damage met within a step: what the step had decided is lost, so the core takes no further one."""
        self._is_broken = True
        self.damaged(error)

    def _send_rest(self, now: float) -> None:
        """After the producers' answers: entries a peer's window now has room for, probes, and news of the commit index.

        Mere news wait a moment: under load, and with one send after the other, the next entry brings them along.
        """
        core = self.core
        is_news_only = not self._reads.rounds
        if self._rtt_asked or not self.turns % SAMPLE_EVERY:
            self._sample_rtt(now)
        for progress in core.progress.values():
            if progress.state is not PeerState.REPLICATE or progress.next_index <= core.last_index:
                is_news_only = False
            elif progress.commit_sent < core.commit_index and not self._is_news_due:
                self._is_news_due = True
                self._news_kick.set()
        if not is_news_only:
            self._perform(core.step(TurnEnd(now)))

    def _sample_rtt(self, now: float) -> None:
        """How long a message with entries takes to be answered: one at a time for each peer."""
        asked = self._rtt_asked
        for peer, progress in self.core.progress.items():
            sample = asked.get(peer)
            if sample is None:
                if progress.inflight:
                    asked[peer] = (progress.seq, now)
            elif progress.reply_seq >= sample[0]:
                self.measures.replicate.record(now - sample[1])
                del asked[peer]

    async def _keep_told(self) -> None:
        """Bring followers the commit index when no entry does within a moment: they serve reads up to it."""
        while True:
            await self._news_kick.wait()
            self._news_kick = trio.Event()
            await self._env.clock.sleep(COMMIT_NEWS_SECONDS)
            self._is_news_due = False
            if self.role is Role.LEADER and self._cut is None and not self._is_broken:
                self._perform(self.core.step(TurnEnd(self._monotonic())))

    def _write(self, now: float) -> bool:
        """Bring accepted entries to the page cache and tell the core. False where the turn must pause."""
        store = self.store
        if store.unwritten:
            if self._is_writing or store.is_slow:
                self._write_kick.set()
            else:
                store.write()
                if not self.turns % SAMPLE_EVERY:
                    self.measures.write.record(store.last_write_seconds)
            if store.needs_spare or store.disk_full:
                self._spare_kick.set()
            self._sync_kick.set()
            if store.unwritten:
                self._watch_write()
        elif self._watched_index >= 0:
            self._watched_index = -1
            self.disk.end(LOG_WRITE)
        if store.written_index > self._marked_index:
            self._marked_index = store.written_index
            if not self._step_mark(Written, now, store.written_index):
                return False
        if store.durable_index > self._durable_index:
            self._durable_index = store.durable_index
            return self._step_mark(Durable, now, store.durable_index)
        return True

    def _watch_write(self) -> None:
        """Entries wait to be written: for a thread, or for room. As long as some get through it is no stall."""
        written_index = self.store.written_index
        if written_index != self._watched_index:
            self._watched_index = written_index
            self.disk.begin(LOG_WRITE)

    def _segments_removed(self) -> None:
        """Nothing was written meanwhile, and what was read before may be gone."""
        self.feed.forget()
        self.wake()

    def _step_mark(self, kind: type[Written] | type[Durable], now: float, index: int) -> bool:
        term = self.store.term_at(index)
        assert term is not None
        return self._perform(self.core.step(kind(now, index, term)))

    def _perform(self, effects: Sequence[fx.Effect]) -> bool:
        """Perform in order. False at a Cut: what is behind it waits for the driver's task."""
        for number, effect in enumerate(effects):
            kind = type(effect)
            if kind is fx.Send:
                message = effect.message  # type: ignore[union-attr]
                self.peers.send(effect.peer, message)  # type: ignore[union-attr]
                if type(message) is PreVoteReply and not message.granted:
                    self.measures.refuse_pre_vote(message)
            elif kind is fx.Append:
                self._append(effect.entries)  # type: ignore[union-attr]
            elif kind is fx.Commit:
                self._commit_index = max(self._commit_index, effect.index)  # type: ignore[union-attr]
            elif kind is fx.Cut:
                self._cut = (effect.from_index, effects[number + 1 :])  # type: ignore[union-attr]
                self.wake()
                return False
            else:
                self._perform_rare(effect)
        return True

    def _perform_rare(self, effect: fx.Effect) -> None:
        match effect:
            case fx.SaveHardState(term, vote):
                self._hard_state = (term, vote)
                self._hard_state_kick.set()
            case fx.RoleChanged():
                self._change_role(effect)
            case fx.NoopNeeded(term):
                self._noop_term = term
            case fx.TransferEnded(target, done, reason):
                self._log.info("leadership transfer ended", target=target, done=done, reason=reason)
                if not done:
                    self._open_batch()
                self._tell_transfer(None if done else reason)
            case fx.ReadReady(token, index):
                self._reads.confirm(token, index)
            case fx.ReadRefused(token, reason):
                self._reads.refuse(token, reason)
            case fx.MembersChanged():
                self._change_members(effect)
            case fx.NeedSegments(leader, first_index):
                self._need_segments(leader, first_index)
            case fx.Recovered(term):
                self._log.info("a leader has confirmed the log: this node votes as others do again", term=term)
                self._recovered_kick.set()
            case fx.Fatal(reason):
                raise CoreStopped(reason)
            case fx.Refused(entries, reason):
                raise CoreStopped(f"proposal of {len(entries)} entries refused out of turn: {reason}")
            case _:
                raise CoreStopped(f"unknown effect {effect!r}")

    def _append(self, entries: Sequence[Entry]) -> None:
        self.store.accept(entries)
        if self.role is not Role.LEADER:
            self._stage(entries)

    def _stage(self, entries: Sequence[Entry]) -> None:
        now = self._monotonic()
        for entry in entries:
            if entry.type == EntryType.DATA:
                self._staged.append(Staged(entry, self._machine.stage(EntryView(entry)), False, now))
            elif entry.type == EntryType.TRIM:
                self._trims.append(entry)

    def _change_members(self, change: fx.MembersChanged) -> None:
        """Members that left keep their connections until that cannot be cut any more: see the effect."""
        before = self.members
        self.members, self.members_index = change.members, change.index
        addresses = self._addresses_of(change.members)
        if not change.is_committed:
            self._log.info(
                "members changed",
                index=change.index,
                voters=change.members.voters,
                learners=change.members.learners,
            )
            addresses = {**self._addresses_of(before), **addresses}
        self.peers.set_members(addresses)

    # Leading.

    def _check_room(self) -> Overloaded | None:
        if self.batch.log_end - self.committed_position > self._config.uncommitted_bytes_max:
            return Overloaded("too many bytes wait for their quorum")
        if self.waiting_records > self._config.waiting_records_max:
            return Overloaded("too many messages wait for their quorum")
        if self.disk.is_full:
            return DiskFull("the disk is full")
        if self.disk.is_refusing:
            return DiskFull(self.disk.refusal)
        return None

    def _open_batch(self) -> None:
        """Take proposals, where the core does: as leader behind its no-op, not while handing over."""
        if self.core.accepts_proposals and self.core.noop_index:
            store = self.store
            self.batch.lead(self.term, store.last_index + 1, store.position_end, store.last_head_crc)

    def _propose_noop(self) -> bool:
        term, self._noop_term = self._noop_term, 0
        if term != self.core.term or not self.core.is_leader:
            return True
        if not self._perform(self.core.step(Propose(self._monotonic(), [self._frame_own(EntryType.NOOP, b"")]))):
            return False
        self._open_batch()
        return True

    def _frame_own(self, entry_type: EntryType, body: bytes) -> Entry:
        """An entry that no client asked for, at the end of the log."""
        store = self.store
        return frame_entry(
            store.last_index + 1,
            self.core.term,
            next_position(store.position_end, HEADER_BYTES + len(body), self._segment_bytes),
            entry_type,
            0,
            (body,) if body else (),
            store.last_head_crc,
            self._commit_index,
        )

    def _propose_own(self, now: float) -> None:
        """Changes of members, trims. Everything that clients proposed before is logged already."""
        while self._own:
            entry_type, make_body, told = self._own.popleft()
            if self.peers.oldest_version < 2:
                told(OLD_PEER)
                continue
            try:
                entry = self._frame_own(entry_type, make_body())
            except LocalError as error:
                told(str(error))
                continue
            effects = self.core.step(Propose(now, [entry]))
            refused = [effect for effect in effects if type(effect) is fx.Refused]
            self._perform([effect for effect in effects if type(effect) is not fx.Refused])
            if refused:
                told(refused[0].reason)
                continue
            if entry_type == EntryType.TRIM:
                self._trims.append(entry)
            self._outcomes.expect(entry.index, told)
        self._open_batch()
        self._perform(self.core.step(TurnEnd(now)))

    def _refuse_own(self) -> None:
        """Not leading, or handing over."""
        if self.role is Role.LEADER and not self.core.is_transferring:
            return  # the no-op of this term comes first, in a moment
        reason = "leadership is being handed over" if self.role is Role.LEADER else str(NotLeader(self.leader_id))
        own, self._own = self._own, deque()
        for _, _, told in own:
            told(reason)
        if self._transfer is not None:
            self._transfer = None
            wanted, self._transfer_wanted = self._transfer_wanted, []
            for told in wanted:
                told("a transfer is under way already" if self.role is Role.LEADER else reason)

    def _tell_transfer(self, reason: str | None) -> None:
        """How the one under way has ended."""
        waiting, self._transfer_told = self._transfer_told, []
        for told in waiting:
            told(reason)

    def _propose(self, proposals: Sequence[Proposal]) -> None:
        now = self._monotonic()
        effects = self.core.step(Propose(now, [proposal.entry for proposal in proposals]))
        if len(effects) == 1 and type(effects[0]) is fx.Append:
            self.store.accept(effects[0].entries)
            records = 0
            for proposal in proposals:
                self._staged.append(Staged(proposal.entry, proposal.staged, True, now))
                records += proposal.entry.count
            self.waiting_records += records
            self.counters["entries_proposed"] += len(proposals)
            self.counters["records_proposed"] += records
            return
        refused = [effect for effect in effects if type(effect) is fx.Refused]
        if not refused:
            raise CoreStopped(f"unexpected effects of a proposal: {effects!r}")
        self._log.warning("proposal refused", entries=len(proposals), reason=refused[0].reason)
        for staged in self.batch.stop(self.leader_id):
            self._machine.discard(staged)
        for proposal in reversed(proposals):
            self._machine.discard(proposal.staged)
        self._open_batch()

    def _begin_transfer(self, now: float) -> None:
        assert self._transfer is not None
        (target,), self._transfer = self._transfer, None
        told, self._transfer_wanted = self._transfer_wanted, []
        if self.core.is_transferring:
            for each in told:
                each("a transfer is under way already")
            return
        self._transfer_told = told
        self.batch.leading = False
        self.batch.leader_id = None
        effects = self.core.step(Transfer(now, target))
        self._perform(effects)

    def _change_role(self, change: fx.RoleChanged) -> None:
        was_leader = self.role is Role.LEADER
        self._log.info(
            "role changed",
            role=change.role.name.lower(),
            term=change.term,
            leader=change.leader,
            reason=change.reason,
            last_index=self.store.last_index,
            commit_index=self._commit_index,
        )
        self.counters["role_changes"] += 1
        self.role = change.role
        self.term = change.term
        self.leader_id = change.leader
        self.is_ready = False
        self._tell_transfer(f"the role changed: {change.reason}")
        for staged in self.batch.stop(change.leader):
            self._machine.discard(staged)
        if was_leader:
            self.measures.step_down(change.reason)
            self._rtt_asked.clear()
            self.feed.is_leading = False
            self.feed.forget()
            self._apply(bounded=False)
            for each in self._staged:
                self._orphan(each)
            self._outcomes.lost("leadership was lost; the outcome is unknown")
        if change.role is Role.LEADER:
            self.feed.is_leading = True
            self.counters["elections_won"] += 1
        elif change.role is Role.CANDIDATE:
            self.counters["elections"] += 1
        self.retention.role_changed(is_leader=change.role is Role.LEADER, leader_known=change.leader is not None)
        self._machine.role_changed(change.role, change.term, change.leader, False)

    def _orphan(self, each: Staged) -> None:
        if not each.is_orphan:
            each.is_orphan = True
            self.waiting_records -= each.count
            self.counters["orphaned"] += 1
            self._machine.orphan(each.staged)

    # Committed.

    def _apply(self, *, bounded: bool = True) -> None:
        """Hand the committed entries to the machine, in order; in slices where there are many."""
        commit_index = self._commit_index
        self.batch.commit_index = commit_index
        if commit_index <= self.applied_index:
            return
        staged = self._staged
        apply = self._machine.apply
        applied = 0
        nbytes = 0
        started = self._monotonic()
        if staged and staged[0].is_own and staged[0].index <= commit_index:
            self.measures.commit.record(started - staged[0].since)
        while staged and staged[0].index <= commit_index:
            each = staged.popleft()
            apply(each.index, each.term, each.staged)
            if not each.is_orphan:
                self.waiting_records -= each.count
            applied += 1
            nbytes += each.nbytes
            if (
                bounded
                and staged
                and (
                    nbytes > APPLY_BYTES_MAX
                    or (applied % APPLY_CHECK_EVERY == 0 and self._monotonic() - started > APPLY_SECONDS_MAX)
                )
            ):
                self.applied_index = each.index
                self.committed_position = each.end
                if staged[0].index <= commit_index:
                    self._has_applied(applied, started)
                    self.wake()
                    return
                break
        self.applied_index = commit_index
        self.committed_position = self.store.end_of(commit_index)
        self._has_applied(applied, started)
        if not self.is_ready and self.role is Role.LEADER and 0 < self.core.noop_index <= commit_index:
            self.is_ready = True
            self._machine.role_changed(self.role, self.term, self.leader_id, True)

    def _has_applied(self, applied: int, started: float) -> None:
        """Up to `applied_index`. What hangs on entries that the machine is not shown follows here."""
        if applied:
            self.counters["entries_applied"] += applied
            if not self.turns % SAMPLE_EVERY:
                self.measures.apply.record(self._monotonic() - started)
        trims = self._trims
        while trims and trims[0].index <= self.applied_index:
            entry = trims.popleft()
            try:
                self.retention.apply(entry)
            except ValueError as error:
                raise CoreStopped(f"TRIM entry {entry.index} makes no sense: {error}") from error
        if self._outcomes:
            self._outcomes.applied(self.applied_index)

    # Services.

    async def run(self) -> None:
        """Every service of the driver, in one nursery; returns after `stop`. Raises LedgerError: `Reopen` where the
        group has to open its log anew."""
        async with trio.open_nursery() as nursery:
            for service in (
                self._keep_hard_state,
                self._keep_told,
                self._keep_synced,
                self._keep_written,
                self._keep_marked,
                self._keep_spare,
                self._keep_recovered,
                self._keep_scrubbed,
                self._keep_time,
                self.feed.run,
                self.retention.run,
                self.disk.run,
            ):
                nursery.start_soon(self._serve, service)
            await self._run_turns(lambda: self._leaving is not None)
            if self._leaving is not None and not self._is_stopping:
                await self._hand_over()
            nursery.cancel_scope.cancel()
        # The tasks of peers and clients end after this one: what they still bring is no turn's any more.
        self._is_broken = self._has_ended = True
        for staged in self.batch.stop(None):
            self._machine.discard(staged)
        for each in self._staged:
            self._orphan(each)
        self._reads.stop(STOPS)
        self._outcomes.lost("this node stops; the outcome is unknown")
        self._tell_transfer(STOPS)
        for told in [*self._transfer_wanted, *(told for _, _, told in self._own)]:
            told(STOPS)
        self._machine.turn_done()
        self._machine.stopped()
        await trio.lowlevel.checkpoint_if_cancelled()  # whoever ends us does not want to hear of it any more
        if self._leaving is not None and not self._is_stopping:
            raise Reopen(self._leaving)

    def stop(self) -> None:
        self._is_stopping = True
        self.wake()

    async def _serve(self, service: Callable[[], Awaitable[None]]) -> None:
        try:
            await service()
        except LogDamaged as error:
            self.damaged(error)

    async def _hand_over(self) -> None:
        """Damage must not cost more than a transfer would: find a successor, but do not wait for long."""
        if self.role is not Role.LEADER:
            return
        if self._is_broken:
            # The core may take no further step of its own accord; this one asks the best peer to campaign.
            try:
                effects = self.core.step(DiskState(self._monotonic(), False))
            except LogDamaged:
                return
            for effect in effects:
                if type(effect) is fx.Send:
                    self.peers.send(effect.peer, effect.message)
            return
        self.transfer(None)
        with self._env.clock.move_on_after(HAND_OVER_SECONDS):
            await self._run_turns(lambda: self.role is not Role.LEADER or self._is_broken)

    async def _run_turns(self, is_over: Callable[[], bool]) -> None:
        while not (self._is_stopping or is_over()):
            self._is_awake = False
            try:
                while self._cut is not None:
                    await self._perform_cut()
            except LogDamaged as error:
                self._break(error)
            self.turn()
            if self._is_awake or self._is_stopping:
                await trio.lowlevel.checkpoint()
            else:
                self._task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort_wait)

    def _abort_wait(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def _perform_cut(self) -> None:
        """The one effect that waits: later ones may only follow when the cut is on stable storage (raft.md 4.2)."""
        assert self._cut is not None
        from_index, rest = self._cut
        self._log.warning(
            "entries cut", first=from_index, last=self.store.last_index, term=self.term, leader=self.leader_id
        )
        self.counters["cuts"] += 1
        self.feed.forget()
        while self._trims and self._trims[-1].index >= from_index:
            self._trims.pop()
        while self._staged and self._staged[-1].index >= from_index:
            each = self._staged.pop()
            if not each.is_orphan:
                self.waiting_records -= each.count
            self._machine.discard(each.staged)
        self.disk.begin(CUT)
        await self.store.cut(from_index)
        self.disk.end(CUT)
        self._marked_index = min(self._marked_index, self.store.written_index)
        self._durable_index = min(self._durable_index, self.store.durable_index)
        self._cut = None
        self._spare_kick.set()
        self._perform(rest)

    async def _keep_hard_state(self) -> None:
        while True:
            await self._hard_state_kick.wait()
            self._hard_state_kick = trio.Event()
            wanted, self._hard_state = self._hard_state, None
            if wanted is None:
                continue
            self.disk.begin(HARD_STATE)
            await self._meta.save_hard_state(*wanted)
            self.disk.end(HARD_STATE)
            self._inbox.append(HardStateSaved(self._monotonic(), *wanted))
            self.pump()

    async def _keep_synced(self) -> None:
        """One sync at a time. While it runs, the next batch of entries gathers (group commit)."""
        is_sync = self._config.flush == "sync"
        interval = self._config.flush_interval_ms / 1000
        while True:
            await self._sync_kick.wait()
            if not is_sync:
                await self._env.clock.sleep(interval)
            self._sync_kick = trio.Event()
            if not self.store.unsynced:
                continue
            self.disk.begin(LOG_SYNC)
            started = self._monotonic()
            await self.store.sync()
            self.measures.fsync.record(self._monotonic() - started)
            self.disk.end(LOG_SYNC)
            self.counters["syncs"] += 1
            if self.store.unsynced:
                self._sync_kick.set()
            self.pump()

    async def _keep_written(self) -> None:
        """The log's writes, while the disk is slow: the turns leave them to this. What is written is reported by the
        turn that follows, so marks, cuts and syncs see the same order as ever."""
        store = self.store
        while True:
            await self._write_kick.wait()
            self._write_kick = trio.Event()
            written_index = -1
            while store.unwritten and self._cut is None and store.written_index != written_index:
                written_index = store.written_index
                self._is_writing = True
                try:
                    await store.write_in_thread()
                finally:
                    self._is_writing = False
                self.measures.write.record(store.last_write_seconds)
                self.counters["writes_in_thread"] += 1
                self._sync_kick.set()
                if store.written_index != written_index:
                    self.pump()
                elif store.needs_spare or store.disk_full:
                    self._spare_kick.set()  # whoever makes room wakes the next turn; a turn before that would spin

    async def _keep_recovered(self) -> None:
        """A node that is killed while it recovers does so again at its next start, until a leader has confirmed it."""
        while True:
            await self._recovered_kick.wait()
            self._recovered_kick = trio.Event()
            await self._meta.save_recovering(False)

    async def _keep_scrubbed(self) -> None:
        if self._config.scrub_bytes_per_second:
            await self.store.scrub(self._config.scrub_bytes_per_second)

    async def _keep_marked(self) -> None:
        """Bring the durable mark to the meta slot now and then: evidence for a recovery."""
        while True:
            await self._env.clock.sleep(self._config.flush_interval_ms / 1000)
            if self.store.durable_index != self._meta.saved.durable_index and self._cut is None:
                await self._meta.save_mark(self.store.durable_index)

    async def _keep_spare(self) -> None:
        """Have the next segment ready before it is needed. A full disk shows here, and costs leadership."""
        store = self.store
        while True:
            if store.needs_spare or store.disk_full:
                await store.prepare_spare()
                if store.unwritten:
                    self.wake()
            if store.disk_full != self.disk.is_full:
                self.disk.is_full = store.disk_full
                self._log.warning("disk full" if store.disk_full else "disk has room again")
            if store.disk_full:
                await self._env.clock.sleep(DISK_FULL_RETRY_SECONDS)
            else:
                await self._spare_kick.wait()
                self._spare_kick = trio.Event()

    async def _keep_time(self) -> None:
        """Ticks for the core, and the housekeeping four times a second."""
        clock = self._env.clock
        housekeeping = self._monotonic()
        while True:
            now = self._monotonic()
            if now >= housekeeping:
                housekeeping = now + HOUSEKEEPING_SECONDS
                self._keep_house(now)
            if now >= self.core.deadline:
                self.pump()
                now = self._monotonic()
            # A deadline in the past is only there while a cut holds the turns up.
            self._ticker_deadline = min(housekeeping, max(self.core.deadline, now + 0.001))
            self._ticker_kick = trio.Event()
            with clock.move_on_at(self._ticker_deadline):
                await self._ticker_kick.wait()

    def _keep_house(self, now: float) -> None:
        orphan_before = now - self._config.orphan_after_ms / 1000
        for each in self._staged:
            if each.since > orphan_before:
                break
            self._orphan(each)
        elapsed = now - self._busy_since
        if elapsed >= 1.0:
            self.saturation = min(1.0, self._busy / elapsed)
            self._busy, self._busy_since = 0.0, now
        if not self._ends or self._ends[-1][1] != self.store.last_index:
            self._ends.append((now, self.store.last_index))
        is_ok = self.disk.verdict(is_unfit=self.retention.is_unfit)
        has_room = not self.disk.is_refusing
        if is_ok is not None or has_room != self.core.has_room:
            self._inbox.append(DiskState(now, self.disk.is_ok, has_room))
        if self._inbox or not self.disk.is_ok:
            self.pump()

    # For status commands and metrics.

    def statistics(self, state: str = "serving") -> GroupStatistics:
        """One consistent look; costs some microseconds per peer."""
        core, store, config = self.core, self.store, self._config
        now = self._monotonic()
        progress = core.progress if core.is_leader else {}
        others = [peer for peer in self.members.all if peer != config.node_id]
        return GroupStatistics(
            node_id=config.node_id,
            flush=config.flush,
            role=self.role,
            term=self.term,
            leader_id=self.leader_id,
            ready=self.is_ready and self.batch.leading,
            recovering=core.recovering,
            first_index=store.first_index,
            last_index=store.last_index,
            written_index=store.written_index,
            durable_index=store.durable_index,
            commit_index=core.commit_index,
            applied_index=self.applied_index,
            first_position=store.first_position,
            committed_position=self.committed_position,
            end_position=store.position_end,
            acknowledged={peer: each.written for peer, each in progress.items()},
            lag_bytes={peer: store.position_end - store.end_of(each.written) for peer, each in progress.items()},
            connected={peer: self.peers.is_connected(peer) for peer in others},
            waiting_records=self.waiting_records,
            state=state,
            members=self.members.voters,
            learners=self.members.learners,
            addresses=self._addresses_of(self.members),
            members_index=self.members_index,
            priorities=dict(config.priorities),
            peer_state={peer: each.state.name.lower() for peer, each in progress.items()},
            inflight={peer: len(each.inflight) for peer, each in progress.items()},
            lag_seconds={peer: self._lag_seconds(each.written, now) for peer, each in progress.items()},
            trimmed_position=max(self.retention.trimmed_position, store.first_position),
            disk_ok=core.is_disk_ok,
            disk_usage=self.disk.usage.share,
            disk_watermarks=config.disk_watermarks,
            is_disk_slow=store.is_slow,
            loop_saturation=self.saturation,
            histograms=self.measures.distributions(),
            steps_down=dict(self.measures.steps_down),
            pre_votes_refused=dict(self.measures.pre_votes_refused),
            counters={**self.counters, **self.retention.counters, "turns": self.turns},
        )

    def _lag_seconds(self, written: int, now: float) -> float:
        """Age of the oldest moment at which the log already held more than `written`, as far as is remembered."""
        if written >= self.store.last_index:
            return 0.0
        for at, last_index in self._ends:
            if last_index > written:
                return now - at
        return 0.0
