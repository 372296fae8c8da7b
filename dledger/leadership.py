"""What a member does as the leader of its term: it proposes, hands over, and tells its followers (Raft 5.3, 3.10).

Its first entry is a no-op; behind that the open batch takes what clients propose. In each turn that batch goes first,
then what the group itself has to log, then a transfer that somebody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dledger.applier import Applier
from dledger.config import GroupConfig
from dledger.core import effects as fx
from dledger.core.events import Propose, Transfer, TurnEnd
from dledger.core.membership import Change
from dledger.core.raft import Raft
from dledger.core.transitions import PeerState
from dledger.core.types import HEADER_BYTES, Entry, EntryType
from dledger.disk_watch import DiskWatch
from dledger.errors import CoreStopped, DiskFull, NotLeader, Overloaded
from dledger.kick import Kick
from dledger.machine import StateMachine
from dledger.measures import Measures
from dledger.open_batch import OpenBatch, Proposal
from dledger.own_entries import OwnEntries
from dledger.peers import Peers
from dledger.reads import Told
from dledger.roster import Roster
from dledger.status import RoundTrips
from dledger.store.log_store import LogStore
from dledger.transfers import Transfers
from runtime.logs import Logger
from runtime.model import Env

COMMIT_NEWS_SECONDS = 0.002
STOPS = "this node stops"
TRANSFER_UNDER_WAY = "a transfer is under way already"


class Leadership:
    """Also while this member follows: then it refuses, and says who leads."""

    def __init__(
        self,
        env: Env,
        config: GroupConfig,
        machine: StateMachine,
        log: Logger,
        *,
        core: Raft,
        store: LogStore,
        batch: OpenBatch,
        applier: Applier,
        peers: Peers,
        roster: Roster,
        disk: DiskWatch,
        measures: Measures,
        segment_bytes: int,
        perform: Callable[[Sequence[fx.Effect]], bool],
        wake: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        """`perform` has the effects of a step done; False at a cut. `wake` has a turn run soon. `tell` has a leader
        send what its followers lack, without a turn.
        """
        self._clock = env.clock
        self._config = config
        self._machine = machine
        self._log = log
        self._core = core
        self._store = store
        self._batch = batch
        self._applier = applier
        self._peers = peers
        self._roster = roster
        self._disk = disk
        self._measures = measures
        self._perform = perform
        self._wake = wake
        self._tell = tell
        self._own = OwnEntries(store, core, segment_bytes)
        self._transfers = Transfers()
        self._round_trips = RoundTrips(measures.replicate)
        self._news_kick = Kick()
        self._is_news_due = False
        self._has_ended = False
        self.noop_term = 0
        """The no-op of this term is to be proposed; 0: none."""
        batch.bind(segment_bytes, min(config.entry_bytes_max, segment_bytes - HEADER_BYTES), self.check_room, wake)
        batch.commit_index = applier.commit_index

    # What the group asks. Whoever is to be told is told once, in a turn: None when it is done, else the reason.

    def transfer(self, target: str | None, told: Told | None = None) -> None:
        """Hand leadership to `target`, or to the most advanced member. Ends within an election timeout."""
        if self._has_ended and told is not None:
            told(STOPS)
            return
        self._transfers.ask(target, told)
        self._wake()

    def change_members(self, change: Change, told: Told) -> None:
        """Log one change of members; done when it is committed. One at a time."""
        self.log_own(EntryType.CONFIG, lambda: self._roster.config_body(change), told)

    def log_own(self, entry_type: EntryType, make_body: Callable[[], bytes], told: Told) -> None:
        """Log a CONFIG or TRIM; done when it is committed. `make_body` is called in the turn that logs it; it raises
        LocalError where that must not be.
        """
        if self._has_ended:
            told(STOPS)
            return
        self._own.ask(entry_type, make_body, told)
        self._wake()

    # In a turn.

    def propose_noop(self, now: float) -> bool:
        """The first entry of a term. False at a cut."""
        term, self.noop_term = self.noop_term, 0
        core = self._core
        if term == core.term and core.is_leader:
            if not self._perform(core.step(Propose(now, [self._own.frame(EntryType.NOOP, b"")]))):
                return False
            self._open_batch()
        return True

    def propose(self, now: float) -> None:
        """Everything that waits to be logged; or refuse it."""
        batch = self._batch
        if batch.leading:
            if not batch.is_empty:
                self._propose_batch(batch.take_sealed(), now)
                self._perform(self._core.step(TurnEnd(now)))  # the peers write while we do
            if self._own.asked:
                self._propose_own(now)
            if self._transfers.wanted:
                self._begin_transfer(now)
        elif self._own.asked or self._transfers.wanted:
            self._refuse_asked()

    def applied(self, applied_index: int) -> None:
        """Tell those whose entries are committed and have had their effect."""
        self._own.applied(applied_index)

    def send_rest(self, now: float, *, is_read_asked: bool, is_sampled: bool) -> None:
        """After the producers' answers: entries a peer's window now has room for, probes, and news of the commit index.

        Mere news wait a moment: under load, and with one send after the other, the next entry brings them along.
        """
        core = self._core
        is_news_only = not is_read_asked
        if is_sampled or self._round_trips.under_way:
            self._round_trips.look(core.progress, now)
        log = core.log
        for progress in core.progress.values():
            if progress.state is not PeerState.REPLICATE or progress.next_index <= log.last_index:
                is_news_only = False
            elif progress.commit_sent < log.commit_index and not self._is_news_due:
                self._is_news_due = True
                self._news_kick.give()
        if not is_news_only:
            self._perform(core.step(TurnEnd(now)))

    def transfer_ended(self, reason: str | None) -> None:
        """None: another member leads; else why this one goes on."""
        if reason is not None:
            self._open_batch()
        self._transfers.ended(reason)

    def role_changed(self, reason: str, leader_id: str | None) -> None:
        """No proposals until this member leads again; those that never reached the log are undone."""
        self._transfers.ended(f"the role changed: {reason}")
        self._discard_batch(leader_id)

    def step_down(self, reason: str) -> None:
        """Whatever is committed is applied; the outcome of the rest is unknown (raft.md 4.3)."""
        self._measures.step_down(reason)
        self._round_trips.forget()
        self._applier.step_down()
        self._own.applied(self._applier.applied_index)
        self._own.lost("leadership was lost; the outcome is unknown")

    def end(self) -> None:
        """There will be no more turn: tell everybody who waits for one."""
        self._has_ended = True
        self._discard_batch(None)
        self._own.lost("this node stops; the outcome is unknown")
        self._transfers.ended(STOPS)
        self._transfers.refuse(STOPS)
        self._own.refuse(STOPS)

    async def keep_told(self) -> None:
        """Bring followers the commit index when no entry does within a moment: they serve reads up to it. A service."""
        while True:
            await self._news_kick.wait()
            await self._clock.sleep(COMMIT_NEWS_SECONDS)
            self._is_news_due = False
            self._tell()

    def check_room(self) -> Overloaded | None:
        """Why no further batch may be opened now, or None (raft.md 4.11, 4.12)."""
        applier = self._applier
        if self._batch.log_end - applier.committed_position > self._config.uncommitted_bytes_max:
            return Overloaded("too many bytes wait for their quorum")
        if applier.waiting_records > self._config.waiting_records_max:
            return Overloaded("too many messages wait for their quorum")
        if self._disk.is_full:
            return DiskFull("the disk is full")
        if self._disk.is_refusing:
            return DiskFull(self._disk.refusal)
        return None

    def _open_batch(self) -> None:
        """Take proposals, where the core does: as leader behind its no-op, not while handing over."""
        core, store = self._core, self._store
        if core.accepts_proposals and core.noop_index:
            self._batch.lead(core.term, store.last_index + 1, store.position_end, store.last_head_crc)

    def _discard_batch(self, leader_id: str | None) -> None:
        for staged in self._batch.stop(leader_id):
            self._machine.discard(staged)

    def _propose_batch(self, proposals: Sequence[Proposal], now: float) -> None:
        effects = self._core.step(Propose(now, [proposal.entry for proposal in proposals]))
        if len(effects) == 1 and type(effects[0]) is fx.Append:
            self._store.accept(effects[0].entries)
            self._applier.proposed(proposals, now)
            return
        refused = [effect for effect in effects if type(effect) is fx.Refused]
        if not refused:
            raise CoreStopped(f"unexpected effects of a proposal: {effects!r}")
        self._log.warning("proposal refused", entries=len(proposals), reason=refused[0].reason)
        self._discard_batch(self._batch.leader_id)
        for proposal in reversed(proposals):
            self._machine.discard(proposal.staged)
        self._open_batch()

    def _propose_own(self, now: float) -> None:
        """Changes of members, trims. Everything that clients proposed before is logged already."""

        def propose(entry: Entry) -> str | None:
            effects = self._core.step(Propose(now, [entry]))
            refused = [effect for effect in effects if type(effect) is fx.Refused]
            self._perform([effect for effect in effects if type(effect) is not fx.Refused])
            if refused:
                return refused[0].reason
            self._applier.note(entry)
            return None

        self._own.log(self._peers.oldest_version, propose)
        self._open_batch()
        self._perform(self._core.step(TurnEnd(now)))

    def _begin_transfer(self, now: float) -> None:
        if self._core.is_transferring:
            self._transfers.refuse(TRANSFER_UNDER_WAY)
            return
        self._batch.leading = False
        self._batch.leader_id = None
        self._perform(self._core.step(Transfer(now, self._transfers.begin())))

    def _refuse_asked(self) -> None:
        """Not leading, or handing over."""
        if not self._core.is_leader:
            reason = str(NotLeader(self._batch.leader_id))
            self._own.refuse(reason)
            self._transfers.refuse(reason)
        elif self._core.is_transferring:
            self._own.refuse("leadership is being handed over")
            self._transfers.refuse(TRANSFER_UNDER_WAY)
        # Else the no-op of this term comes first, in a moment.
