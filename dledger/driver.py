"""Joins the pure core with the disk, the peers and the state machine: one turn after the other.

A turn steps everything that arrived, performs each step's effects before the next one, sends, writes, and applies what
is committed. It is synchronous, and runs wherever something has arrived: in the task that read a peer's message, or in
the driver's own. Only a cut has to wait for the disk within a turn; then the turn is continued by the driver's task.

    inbox -> core -> effects        (messages of peers, marks of the disk, time)
    open batch -> one entry -> core -> sent to both peers -> page cache -> `Written` -> core
    commit index -> machine.apply -> machine.turn_done

What a turn works with has a module of its own: `leadership.py` (what only a leader does, with `open_batch.py`,
`own_entries.py` and `transfers.py`), `applier.py` (the state machine's side), `reads.py` (who awaits a confirmation).

What waits for the disk runs beside the turns: `flusher.py` syncs the log and prepares segments, `hard_state.py` saves
term and vote, `feed.py` reads old entries for a peer. Each comes back as an event of a later turn. `disk_watch.py` sees
to it that a node whose disk does not come back with them does not lead; `retention.py` forgets what is old.

Damage found while the log is in use ends the run with `Reopen`, after leadership has been handed over: the group then
repairs the log from its peers and runs again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import trio

from dledger.applier import Applier
from dledger.config import GroupConfig
from dledger.core import effects as fx
from dledger.core.errors import RemoteError
from dledger.core.events import (
    AcceptLoss,
    DiskState,
    Durable,
    Event,
    HardStateSaved,
    PeerLost,
    PeerUp,
    ReadIndex,
    Receive,
    Tick,
    TurnEnd,
    Written,
)
from dledger.core.log import LogView
from dledger.core.messages import Append, Message, PreVoteReply
from dledger.core.raft import Raft
from dledger.core.types import Entry, EntryType, Role
from dledger.disk_watch import DiskWatch
from dledger.errors import CoreStopped, LedgerError, LogDamaged, NotLeader, Reopen
from dledger.feed import LogFeed
from dledger.flusher import LogFlusher
from dledger.hard_state import HardStateKeeper
from dledger.kick import Kick
from dledger.leadership import STOPS, Leadership
from dledger.machine import GroupStatistics, StateMachine
from dledger.measures import Measures
from dledger.open_batch import OpenBatch
from dledger.peers import Peers
from dledger.reads import Reads, Told
from dledger.replay import Replay
from dledger.retention import Plan, Retention, encode_trim
from dledger.role_log import RoleLog
from dledger.roster import Roster
from dledger.status import LagHistory, Saturation, statistics_of
from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile
from runtime.logs import Logger
from runtime.model import Env

SAMPLE_EVERY = 8
"""Turns whose writing, application and round trips are timed: it shows when one send follows the other."""
HOUSEKEEPING_SECONDS = 0.25
HAND_OVER_SECONDS = 0.5
"""How long a leader that found damage in its log looks for a successor before it leaves."""
INBOX_MAX = 1024
"""Messages that wait while a cut holds the turns up; more of them are as if lost on the way."""
APP_MESSAGES_MAX = 4096
APP_BYTES_MAX = 64 * 1024 * 1024


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
        segment_bytes: int,
        need_segments: Callable[[int], None],
        leased_position: Callable[[], int | None],
    ) -> None:
        """`replay` has shown the machine what is known to be committed. `need_segments(first_index)`: only whole
        segments can help this node. `leased_position`: from where on a peer that fetches segments needs them.
        """
        self._env = env
        self._config = config
        self._machine = machine
        self._log = log
        self._monotonic = env.clock.monotonic
        self._turn_kick = Kick()
        self._is_turn_due = True
        self.store = store
        self.feed = LogFeed(store, segment_bytes, self.wake)
        self.core = make_core(self._monotonic(), self.feed)
        self.peers = make_peers(self)
        self._need_segments = need_segments
        self.roster = Roster(config, self.core.members, self.core.config_index)
        if self.roster.members_index:
            self.peers.set_members(self.roster.addresses_of(self.roster.members))
        self.measures = Measures()
        self.counters = self.measures.counters
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
            tell_leader=self._want_trim,
            applied=lambda: self.applier.applied_index,
            leased=leased_position,
            removed=self._segments_removed,
        )
        self.retention.restored(replay.trimmed_position)
        for covered in replay.checkpoints:
            self.retention.checkpoint_saved(covered)
        self.applier = Applier(
            machine,
            store,
            self.measures,
            self._monotonic,
            self.retention.apply,
            applied_index=replay.applied_index,
            staged=replay.staged,
            trims=replay.trims,
        )
        self._flusher = LogFlusher(
            env,
            config,
            log,
            store,
            self.disk,
            self.measures,
            pump=self.pump,
            wake=self.wake,
            is_cut_due=lambda: self._cut is not None,
            segment_closed=self.retention.segment_closed,
        )
        self._hard_state = HardStateKeeper(
            env,
            config,
            meta,
            store,
            self.disk,
            saved=self._hard_state_saved,
            is_cut_due=lambda: self._cut is not None,
        )
        self.batch = batch
        self.leadership = Leadership(
            env,
            config,
            machine,
            log,
            core=self.core,
            store=store,
            batch=batch,
            applier=self.applier,
            peers=self.peers,
            roster=self.roster,
            disk=self.disk,
            measures=self.measures,
            segment_bytes=segment_bytes,
            perform=self._perform,
            wake=self.wake,
            tell=self._tell,
        )
        self._reads = Reads()
        self._role_log = RoleLog(log, self._monotonic)

        self.role = self.core.role
        self.term = self.core.term
        self.leader_id: str | None = None
        self.is_ready = False
        """Leads, and the no-op of its term is applied."""
        self._inbox: deque[Event] = deque()
        self._app_inbox: deque[tuple[str, bytes]] = deque()
        self._app_bytes = 0
        self._marked_index = store.written_index
        self._durable_index = store.durable_index
        self._cut: tuple[int, Sequence[fx.Effect]] | None = None
        """From which entry on the log is to be cut, and the effects behind that."""
        self._in_turn = False
        self._is_stopping = False
        self._leaving: str | None = None
        self._is_broken = False
        self._has_ended = False

        self._ticker_deadline = 0.0
        self._ticker_kick = Kick()

        self.turns = 0
        self.saturation = Saturation(self._monotonic())
        self._lag = LagHistory()

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

    def on_trim_wanted(self, peer: str, position: int) -> None:
        """A member's disk is nearly full: no matter for the core. Who was removed may call, too, but has no say."""
        if peer in self.roster.members:
            self.retention.wanted_by(peer, position)

    def on_peer_up(self, peer: str) -> None:
        self._inbox.append(PeerUp(self._monotonic(), peer))

    def on_peer_lost(self, peer: str, hard: bool) -> None:
        self._inbox.append(PeerLost(self._monotonic(), peer, hard))

    # What the group asks. What it asks of a leader alone is in `leadership`.

    def read_index(self, told: Told) -> None:
        """Tell when this node's tables show everything that was acknowledged anywhere before this call.

        All calls up to the next turn share one round to the other members. Refused where this node does not lead.
        """
        if self._has_ended:
            told(STOPS)
            return
        self._reads.ask(told)
        self.wake()

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
        if allowed <= self.retention.begin_position:
            raise LedgerError(f"no closed segment before {position} can be trimmed")
        self._propose_trim(Plan(allowed, is_forced, "asked for"))
        return allowed

    def delete_expired(self) -> None:
        """Trim what is older than the retention now, whatever the hour. Raises NotLeader."""
        self._check_leads()
        self.retention.ask()

    def trimmed_at(self, index: int) -> int:
        """Byte before which TRIM entries up to entry `index` gave the log up. Also from a thread."""
        return self.retention.trimmed_at(index)

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

    def stop(self) -> None:
        """End the run; `run` returns."""
        self._is_stopping = True
        self.wake()

    def statistics(self) -> GroupStatistics:
        """One consistent look; costs some microseconds per peer."""
        return statistics_of(self, self._config, self._lag, self._monotonic())

    def _check_leads(self) -> None:
        if not self.batch.leading:
            raise NotLeader(self.leader_id)

    def _want_trim(self, position: int) -> None:
        if self.leader_id is not None:
            self.peers.send_trim_wanted(self.leader_id, position)

    def _propose_trim(self, plan: Plan) -> None:
        body = encode_trim(plan.position, is_forced=plan.is_forced)

        def told(reason: str | None) -> None:
            if reason is not None:
                self._log.warning("trim not logged", position=plan.position, reason=reason)

        self._log.info("trimming the log", position=plan.position, forced=plan.is_forced, reason=plan.reason)
        self.leadership.log_own(EntryType.TRIM, lambda: body, told)

    # When there is a turn.

    def pump(self) -> None:
        """Run a turn here and now, in the task that brought the news: it saves a pass through the scheduler."""
        if self._in_turn or self._cut is not None:
            self.wake()
        else:
            self.turn()

    def wake(self) -> None:
        """Have the driver's task run a turn soon: everything that arrives meanwhile shares it, and where somebody pumps
        first there is nothing left for another one.
        """
        self._is_turn_due = True
        self._turn_kick.give()

    def kick(self) -> None:
        """A turn at once when nothing is in flight, else soon: a lone proposal loses no time, many share an entry."""
        if self.batch.is_empty:
            return
        if self.store.last_index > self.applier.commit_index:
            self.wake()
        else:
            self.pump()

    def turn(self) -> None:
        """Everything there is to do now, without waiting. Leaves a cut for the driver's task."""
        if self._is_broken:
            return
        started = self._monotonic()
        self._in_turn = True
        self._is_turn_due = False
        try:
            self._turn(started)
        except LogDamaged as error:
            self._break(error)
        finally:
            self._in_turn = False
        if self.core.deadline < self._ticker_deadline:
            self._ticker_kick.give()
        self.turns += 1
        self.saturation.busy += self._monotonic() - started

    def _tell(self) -> None:
        """The end of a turn alone: a leader sends what its followers lack."""
        if self.role is Role.LEADER and self._cut is None and not self._is_broken:
            try:
                self._perform(self.core.step(TurnEnd(self._monotonic())))
            except LogDamaged as error:
                self._break(error)

    def _break(self, error: LogDamaged) -> None:
        """Damage met within a step: what the step had decided is lost, so the core takes no further one."""
        self._is_broken = True
        self.damaged(error)

    # The turn.

    def _turn(self, now: float) -> None:
        step = self.core.step
        inbox = self._inbox
        is_sampled = not self.turns % SAMPLE_EVERY
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
        leadership = self.leadership
        if leadership.noop_term and not leadership.propose_noop(now):
            return
        reads = self._reads
        if reads.asked:
            self._perform(step(ReadIndex(now, reads.begin_round())))
        leadership.propose(now)
        self._flusher.write(is_sampled=is_sampled)
        if not self._report_marks(now):
            return
        is_leader = self.role is Role.LEADER
        if not is_leader:
            self._perform(step(TurnEnd(now)))  # the leader waits for this answer: before our own applying
        self._apply(now, is_sampled=is_sampled)
        if reads.is_settled:
            reads.answer(self.applier.applied_index)
        if self._app_inbox:
            self._app_bytes = 0
            while self._app_inbox:
                self._machine.app_message(*self._app_inbox.popleft())
        self._machine.turn_done()
        if is_leader and self.role is Role.LEADER:
            leadership.send_rest(now, is_read_asked=bool(reads.rounds), is_sampled=is_sampled)
        if inbox or not self.batch.is_empty:
            self.wake()

    def _report_marks(self, now: float) -> bool:
        """Tell the core how far the log is in the page cache and on stable storage. False at a cut."""
        store = self.store
        if store.written_index > self._marked_index:
            self._marked_index = store.written_index
            if not self._report_mark(Written, now, store.written_index):
                return False
        if store.durable_index > self._durable_index:
            self._durable_index = store.durable_index
            return self._report_mark(Durable, now, store.durable_index)
        return True

    def _report_mark(self, kind: type[Written] | type[Durable], now: float, index: int) -> bool:
        term = self.store.term_at(index)
        assert term is not None
        return self._perform(self.core.step(kind(now, index, term)))

    def _apply(self, now: float, *, is_sampled: bool) -> None:
        applier = self.applier
        if applier.applied_index >= applier.commit_index:
            return
        if applier.apply(now, is_sampled=is_sampled):
            self.wake()
        self.leadership.applied(applier.applied_index)
        if not self.is_ready and self.role is Role.LEADER and 0 < self.core.noop_index <= applier.applied_index:
            self.is_ready = True
            self._machine.role_changed(self.role, self.term, self.leader_id, True)

    # Effects.

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
                self.applier.commit_index = self.batch.commit_index = effect.index  # type: ignore[union-attr]
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
                self._hard_state.save(term, vote)
            case fx.RoleChanged():
                self._change_role(effect)
            case fx.NoopNeeded(term):
                self.leadership.noop_term = term
            case fx.TransferEnded(target, done, reason):
                self._log.info("leadership transfer ended", target=target, done=done, reason=reason)
                self.leadership.transfer_ended(None if done else reason)
            case fx.ReadReady(token, index):
                self._reads.confirm(token, index)
            case fx.ReadRefused(token, reason):
                self._reads.refuse(token, reason)
            case fx.MembersChanged():
                self._change_members(effect)
            case fx.NeedSegments(_, first_index):
                self._need_segments(first_index)
            case fx.Recovered(term):
                self._log.info("a leader has confirmed the log: this node votes as others do again", term=term)
                self._hard_state.recovered()
            case fx.Fatal(reason):
                raise CoreStopped(reason)
            case fx.Refused(entries, reason):
                raise CoreStopped(f"proposal of {len(entries)} entries refused out of turn: {reason}")
            case _:
                raise CoreStopped(f"unknown effect {effect!r}")

    def _append(self, entries: Sequence[Entry]) -> None:
        self.store.accept(entries)
        if self.role is not Role.LEADER:
            self.applier.stage(entries)

    async def _perform_cut(self) -> None:
        """The one effect that waits: later ones may only follow when the cut is on stable storage (raft.md 4.2)."""
        assert self._cut is not None
        from_index, rest = self._cut
        store = self.store
        self._log.warning("entries cut", first=from_index, last=store.last_index, term=self.term, leader=self.leader_id)
        self.counters["cuts"] += 1
        self.feed.forget()
        self.applier.cut(from_index)
        await self._flusher.cut(from_index)
        self._marked_index = min(self._marked_index, store.written_index)
        self._durable_index = min(self._durable_index, store.durable_index)
        self._cut = None
        self._perform(rest)

    def _change_members(self, change: fx.MembersChanged) -> None:
        """Members that left keep their connections until that cannot be cut any more: see the effect."""
        roster = self.roster
        before = roster.addresses_of(roster.members)
        roster.change(change.members, change.index)
        addresses = roster.addresses_of(change.members)
        if not change.is_committed:
            self._log.info(
                "members changed",
                index=change.index,
                voters=change.members.voters,
                learners=change.members.learners,
            )
            addresses = {**before, **addresses}
        self.peers.set_members(addresses)

    def _change_role(self, change: fx.RoleChanged) -> None:
        was_leader = self.role is Role.LEADER
        self._role_log.note(change, last_index=self.store.last_index, commit_index=self.applier.commit_index)
        self.counters["role_changes"] += 1
        self.role = change.role
        self.term = change.term
        self.leader_id = change.leader
        self.is_ready = False
        self.leadership.role_changed(change.reason, change.leader)
        if was_leader:
            self.feed.is_leading = False
            self.feed.forget()
            self.leadership.step_down(change.reason)
        if change.role is Role.LEADER:
            self.feed.is_leading = True
            self.counters["elections_won"] += 1
        elif change.role is Role.CANDIDATE:
            self.counters["elections"] += 1
        self.retention.role_changed(is_leader=change.role is Role.LEADER, leader_known=change.leader is not None)
        self._machine.role_changed(change.role, change.term, change.leader, False)

    # The run.

    async def run(self) -> None:
        """Every service of the driver, in one nursery; returns after `stop`. Raises LedgerError: `Reopen` where the
        group has to open its log anew."""
        async with trio.open_nursery() as nursery:
            for service in (
                *self._hard_state.services,
                *self._flusher.services,
                self.leadership.keep_told,
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
        self._dismiss()
        await trio.lowlevel.checkpoint_if_cancelled()  # whoever ends us does not want to hear of it any more
        if self._leaving is not None and not self._is_stopping:
            raise Reopen(self._leaving)

    async def _serve(self, service: Callable[[], Awaitable[None]]) -> None:
        try:
            await service()
        except LogDamaged as error:
            self.damaged(error)

    def _dismiss(self) -> None:
        """Everybody who waits is told that there will be no more turn."""
        self.leadership.end()
        self.applier.orphan_all()
        self._reads.stop(STOPS)
        self._machine.turn_done()
        self._machine.stopped()

    async def _run_turns(self, is_over: Callable[[], bool]) -> None:
        while not (self._is_stopping or is_over()):
            self._turn_kick.clear()
            try:
                while self._cut is not None:
                    await self._perform_cut()
            except LogDamaged as error:
                self._break(error)
            if self._is_turn_due:
                self.turn()
            await self._turn_kick.wait()

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
        self.leadership.transfer(None)
        with self._env.clock.move_on_after(HAND_OVER_SECONDS):
            await self._run_turns(lambda: self.role is not Role.LEADER or self._is_broken)

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
            self._ticker_kick.clear()
            with clock.move_on_at(self._ticker_deadline):
                await self._ticker_kick.wait()

    def _keep_house(self, now: float) -> None:
        self.applier.orphan_before(now - self._config.orphan_after_ms / 1000)
        self.saturation.look(now)
        self._lag.note(now, self.store.last_index)
        is_ok = self.disk.verdict(is_unfit=self.retention.is_unfit)
        has_room = not self.disk.is_refusing
        if is_ok is not None or has_room != self.core.has_room:
            self._inbox.append(DiskState(now, self.disk.is_ok, has_room))
        if self._inbox or not self.disk.is_ok:
            self.pump()

    def _hard_state_saved(self, term: int, vote: str | None) -> None:
        self._inbox.append(HardStateSaved(self._monotonic(), term, vote))
        self.pump()

    def _segments_removed(self) -> None:
        """Nothing was written meanwhile, and what was read before may be gone."""
        self.feed.forget()
        self.wake()
