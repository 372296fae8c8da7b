"""Joins the pure core with the disk, the peers and the state machine: one turn after the other.

A turn steps everything that arrived, performs each step's effects before the next one, sends, writes, and applies what
is committed. It is synchronous, and runs wherever something has arrived: in the task that read a peer's message, or in
the driver's own. Only a cut has to wait for the disk within a turn; then the turn is continued by the driver's task.

    inbox -> core -> effects        (messages of peers, marks of the disk, time)
    open batch -> one entry -> core -> sent to both peers -> page cache -> `Written` -> core
    commit index -> machine.apply -> machine.turn_done

What waits for the disk otherwise runs beside it: saving term and vote, syncing the log (one at a time), preparing the
next segment, keeping the durable mark. Each comes back as an event of a later turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import trio

from dledger.config import GroupConfig
from dledger.core import effects as fx
from dledger.core.errors import RemoteError
from dledger.core.events import (
    DiskState,
    Durable,
    Event,
    HardStateSaved,
    PeerLost,
    PeerUp,
    Propose,
    Receive,
    Tick,
    Transfer,
    TurnEnd,
    Written,
)
from dledger.core.messages import Append, Message
from dledger.core.raft import Raft
from dledger.core.transitions import PeerState
from dledger.core.types import HEADER_BYTES, Entry, EntryType, Role, frame_entry, next_position
from dledger.errors import CoreStopped
from dledger.machine import EntryView, StateMachine
from dledger.open_batch import OpenBatch, Proposal
from dledger.peers import Peers
from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile
from runtime.logs import Logger
from runtime.model import Env

APPLY_BYTES_MAX = 2 * 1024 * 1024
"""What one turn applies at most; a longer catch-up is spread over turns, so that the loop stays responsive."""
APPLY_SECONDS_MAX = 0.020
APPLY_CHECK_EVERY = 16
COMMIT_NEWS_SECONDS = 0.002
HOUSEKEEPING_SECONDS = 0.25
DISK_FULL_RETRY_SECONDS = 1.0
STALL_SECONDS_MIN_ASYNC = 10.0
"""With flush = "async" nobody waits for a sync, so only a very long one tells that the disk is dead."""


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
        make_core: Callable[[float], Raft],
        make_peers: Callable[[Driver], Peers],
        staged: deque[Staged],
        applied_index: int,
        segment_bytes: int,
    ) -> None:
        self._env = env
        self._config = config
        self._machine = machine
        self._log = log
        self._monotonic = env.clock.monotonic
        self.store = store
        self._meta = meta
        self._segment_bytes = segment_bytes
        self.core = make_core(self._monotonic())
        self.peers = make_peers(self)
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
        self._staged = staged
        self._inbox: deque[Event] = deque()
        self._app_inbox: deque[tuple[str, bytes]] = deque()
        self._noop_term = 0
        self._marked_index = store.written_index
        self._durable_index = store.durable_index
        self._cut: tuple[int, Sequence[fx.Effect]] | None = None
        self._transfer: tuple[str | None] | None = None
        self._in_turn = False
        self._is_stopping = False

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
        self._disk_busy: dict[str, float] = {}
        self._is_disk_ok = True
        self._is_disk_full = False

        self._busy = 0.0
        self._busy_since = self._monotonic()
        self.saturation = 0.0
        self.turns = 0
        self.counters: dict[str, int] = {
            "elections_won": 0,
            "role_changes": 0,
            "cuts": 0,
            "entries_proposed": 0,
            "records_proposed": 0,
            "entries_applied": 0,
            "syncs": 0,
            "orphaned": 0,
            "entries_dropped": 0,
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
        self._inbox.append(Receive(self._monotonic(), peer, message))

    def on_app_message(self, peer: str, payload: bytes) -> None:
        self._app_inbox.append((peer, payload))

    def on_peer_up(self, peer: str) -> None:
        self._inbox.append(PeerUp(self._monotonic(), peer))

    def on_peer_lost(self, peer: str, hard: bool) -> None:
        self._inbox.append(PeerLost(self._monotonic(), peer, hard))

    def transfer(self, target: str | None) -> None:
        self._transfer = (target,)
        self.wake()

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
        started = self._monotonic()
        self._in_turn = True
        try:
            self._turn(started)
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
        batch = self.batch
        if batch.leading:
            if not batch.is_empty:
                self._propose(batch.take_sealed())
                self._perform(step(TurnEnd(now)))  # the peers write while we do
            if self._transfer is not None:
                self._begin_transfer(now)
        if not self._write(now):
            return
        is_leader = self.role is Role.LEADER
        if not is_leader:
            self._perform(step(TurnEnd(now)))  # the leader waits for this answer: before our own applying
        self._apply()
        while self._app_inbox:
            self._machine.app_message(*self._app_inbox.popleft())
        self._machine.turn_done()
        if is_leader and self.role is Role.LEADER:
            self._send_rest(now)
        if inbox or not batch.is_empty:
            self.wake()

    def _send_rest(self, now: float) -> None:
        """After the producers' answers: entries a peer's window now has room for, probes, and news of the commit index.

        Mere news wait a moment: under load, and with one send after the other, the next entry brings them along.
        """
        core = self.core
        is_news_only = True
        for progress in core.progress.values():
            if progress.state is not PeerState.REPLICATE or progress.next_index <= core.last_index:
                is_news_only = False
            elif progress.commit_sent < core.commit_index and not self._is_news_due:
                self._is_news_due = True
                self._news_kick.set()
        if not is_news_only:
            self._perform(core.step(TurnEnd(now)))

    async def _keep_told(self) -> None:
        """Bring followers the commit index when no entry does within a moment: they serve reads up to it."""
        while True:
            await self._news_kick.wait()
            self._news_kick = trio.Event()
            await self._env.clock.sleep(COMMIT_NEWS_SECONDS)
            self._is_news_due = False
            if self.role is Role.LEADER and self._cut is None:
                self._perform(self.core.step(TurnEnd(self._monotonic())))

    def _write(self, now: float) -> bool:
        """Bring accepted entries to the page cache and tell the core. False where the turn must pause."""
        store = self.store
        if store.unwritten:
            store.write()
            if store.needs_spare or store.disk_full:
                self._spare_kick.set()
            self._sync_kick.set()
        if store.written_index > self._marked_index:
            self._marked_index = store.written_index
            if not self._step_mark(Written, now, store.written_index):
                return False
        if store.durable_index > self._durable_index:
            self._durable_index = store.durable_index
            return self._step_mark(Durable, now, store.durable_index)
        return True

    def _step_mark(self, kind: type[Written] | type[Durable], now: float, index: int) -> bool:
        term = self.store.term_at(index)
        assert term is not None
        return self._perform(self.core.step(kind(now, index, term)))

    def _perform(self, effects: Sequence[fx.Effect]) -> bool:
        """Perform in order. False at a Cut: what is behind it waits for the driver's task."""
        for number, effect in enumerate(effects):
            kind = type(effect)
            if kind is fx.Send:
                self.peers.send(effect.peer, effect.message)  # type: ignore[union-attr]
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
            case fx.Recovered(term):
                self._log.info("log confirmed by a leader after a power loss", term=term)
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

    # Leading.

    def _check_room(self) -> str | None:
        if self.batch.log_end - self.committed_position > self._config.uncommitted_bytes_max:
            return "too many bytes wait for their quorum"
        if self.waiting_records > self._config.waiting_records_max:
            return "too many messages wait for their quorum"
        if self._is_disk_full:
            return "the disk is full"
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
        store = self.store
        position = next_position(store.position_end, HEADER_BYTES, self._segment_bytes)
        noop = frame_entry(
            store.last_index + 1, term, position, EntryType.NOOP, 0, (), store.last_head_crc, self._commit_index
        )
        if not self._perform(self.core.step(Propose(self._monotonic(), [noop]))):
            return False
        self._open_batch()
        return True

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
        self._transfer = None
        for staged in self.batch.stop(change.leader):
            self._machine.discard(staged)
        if was_leader:
            self._apply(bounded=False)
            for each in self._staged:
                self._orphan(each)
        if change.role is Role.LEADER:
            self.counters["elections_won"] += 1
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
                self.counters["entries_applied"] += applied
                if staged[0].index <= commit_index:
                    self.wake()
                    return
                break
        self.applied_index = commit_index
        self.committed_position = self.store.end_of(commit_index)
        self.counters["entries_applied"] += applied
        if not self.is_ready and self.role is Role.LEADER and 0 < self.core.noop_index <= commit_index:
            self.is_ready = True
            self._machine.role_changed(self.role, self.term, self.leader_id, True)

    # Services.

    async def run(self) -> None:
        """Every service of the driver, in one nursery; returns after `stop`. Raises LedgerError."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_hard_state)
            nursery.start_soon(self._keep_told)
            nursery.start_soon(self._keep_synced)
            nursery.start_soon(self._keep_marked)
            nursery.start_soon(self._keep_spare)
            nursery.start_soon(self._keep_time)
            await self._run_turns()
            nursery.cancel_scope.cancel()
        for staged in self.batch.stop(None):
            self._machine.discard(staged)
        for each in self._staged:
            self._orphan(each)
        self._machine.turn_done()

    def stop(self) -> None:
        self._is_stopping = True
        self.wake()

    async def _run_turns(self) -> None:
        while not self._is_stopping:
            self._is_awake = False
            while self._cut is not None:
                await self._perform_cut()
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
        while self._staged and self._staged[-1].index >= from_index:
            each = self._staged.pop()
            if not each.is_orphan:
                self.waiting_records -= each.count
            self._machine.discard(each.staged)
        await self.store.cut(from_index)
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
            self._disk_busy["term and vote"] = self._monotonic()
            await self._meta.save_hard_state(*wanted)
            del self._disk_busy["term and vote"]
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
            self._disk_busy["log"] = self._monotonic()
            await self.store.sync()
            del self._disk_busy["log"]
            self.counters["syncs"] += 1
            if self.store.unsynced:
                self._sync_kick.set()
            self.pump()

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
                if store.disk_full != self._is_disk_full:
                    self._is_disk_full = store.disk_full
                    self._log.warning("disk full" if store.disk_full else "disk has room again")
                if store.unwritten:
                    self.wake()
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
        limit = 2 * self._config.election_timeout_ms_min / 1000
        if self._config.flush == "async":
            limit = max(limit, STALL_SECONDS_MIN_ASYNC)
        is_stalled = any(now - since > limit for since in self._disk_busy.values())
        is_ok = not is_stalled and not self._is_disk_full
        if is_ok != self._is_disk_ok:
            self._is_disk_ok = is_ok
            self._log.warning("disk works again" if is_ok else "disk full or stalled: giving up leadership")
            self._inbox.append(DiskState(now, is_ok))
        if self._inbox or not is_ok:
            self.pump()
