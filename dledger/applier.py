"""What lies between the log and the state machine: entries are staged when they arrive, applied in log order once they
are committed, discarded when they are cut (Raft 5.3; DLedger's StateMachineCaller).

Only DATA entries are shown to the machine. A TRIM has its effect between the entries before and behind it, on every
replica and in every replay. NOOP and CONFIG entries only move the applied index.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dledger.core.types import Entry, EntryType
from dledger.errors import CoreStopped
from dledger.machine import EntryView, StateMachine
from dledger.measures import Measures
from dledger.open_batch import Proposal
from dledger.store.log_store import LogStore

APPLY_BYTES_MAX = 2 * 1024 * 1024
"""What one turn applies at most; a longer catch-up is spread over turns, so that the loop stays responsive."""
APPLY_SECONDS_MAX = 0.020
APPLY_CHECK_EVERY = 16


class Staged:
    """A DATA entry between its arrival and its commit or cut."""

    __slots__ = ("count", "index", "is_orphan", "is_own", "nbytes", "since", "staged", "term")

    def __init__(self, entry: Entry, staged: Any, is_own: bool, since: float) -> None:
        self.index = entry.index
        self.term = entry.term
        self.nbytes = len(entry.frame)
        self.count = entry.count
        self.staged = staged
        self.is_own = is_own
        self.is_orphan = not is_own
        self.since = since


class Applier:
    """The state machine's side of the log, from the entries a replay left staged on."""

    def __init__(
        self,
        machine: StateMachine,
        store: LogStore,
        measures: Measures,
        monotonic: Callable[[], float],
        trim: Callable[[Entry], None],
        *,
        applied_index: int,
        staged: Iterable[Staged],
        trims: Iterable[Entry],
    ) -> None:
        """`trim` gives effect to a committed TRIM; it raises ValueError for one that makes no sense. `staged` and
        `trims` are the entries behind `applied_index`, oldest first.
        """
        self._machine = machine
        self._store = store
        self._measures = measures
        self._counters = measures.counters
        self._monotonic = monotonic
        self._trim = trim
        self._staged = deque(staged)
        self._trims = deque(trims)
        self.commit_index = applied_index
        """As the core says; the driver moves it."""
        self.applied_index = applied_index
        self.committed_position = store.end_of(applied_index)
        """Byte of the log behind the applied entries."""
        self.waiting_records = 0
        """Messages of this leader that wait for their quorum."""

    def stage(self, entries: Sequence[Entry]) -> None:
        """A leader's entries have arrived."""
        now = self._monotonic()
        for entry in entries:
            if entry.type == EntryType.DATA:
                self._staged.append(Staged(entry, self._machine.stage(EntryView(entry)), False, now))
            else:
                self.note(entry)

    def note(self, entry: Entry) -> None:
        """An entry that the machine is not shown: a TRIM waits for its commit, the others need nothing."""
        if entry.type == EntryType.TRIM:
            self._trims.append(entry)

    def proposed(self, proposals: Sequence[Proposal], now: float) -> None:
        """Entries of this leader are in its log; the machine staged them itself."""
        records = 0
        for proposal in proposals:
            self._staged.append(Staged(proposal.entry, proposal.staged, True, now))
            records += proposal.entry.count
        self.waiting_records += records
        self._counters["entries_proposed"] += len(proposals)
        self._counters["records_proposed"] += records

    def apply(self, now: float, *, is_sampled: bool = False) -> bool:
        """Hand the next committed entries to the machine, as many as a turn that began at `now` applies. Whether there
        are more.

        A TRIM ends a slice: what is behind it is applied to tables that are trimmed already.
        """
        target = self.commit_index
        if target <= self.applied_index:
            return False
        trims = self._trims
        if trims and trims[0].index < target:
            target = trims[0].index
        staged = self._staged
        if staged and staged[0].index <= target:
            if staged[0].is_own:
                self._measures.commit.record(now - staged[0].since)
            started = self._monotonic() if is_sampled else now
            target = self._apply_staged(target, started)
            if is_sampled:
                self._measures.apply.record(self._monotonic() - started)
        self.applied_index = target
        self.committed_position = self._store.end_of(target)
        if trims and trims[0].index <= target:
            self._apply_trim(trims.popleft())
        return target < self.commit_index

    def _apply_staged(self, target: int, started: float) -> int:
        """The staged entries up to `target`, unless that takes too long. Returns up to where."""
        staged = self._staged
        apply = self._machine.apply
        applied = 0
        nbytes = 0
        while staged and staged[0].index <= target:
            each = staged.popleft()
            apply(each.index, each.term, each.staged)
            if not each.is_orphan:
                self.waiting_records -= each.count
            applied += 1
            nbytes += each.nbytes
            if nbytes > APPLY_BYTES_MAX or (
                not applied % APPLY_CHECK_EVERY and self._monotonic() - started > APPLY_SECONDS_MAX
            ):
                target = each.index
        self._counters["entries_applied"] += applied
        return target

    def _apply_trim(self, entry: Entry) -> None:
        try:
            self._trim(entry)
        except ValueError as error:
            raise CoreStopped(f"TRIM entry {entry.index} makes no sense: {error}") from error

    def cut(self, from_index: int) -> None:
        """Entries from `from_index` on were never committed: take them back, newest first."""
        while self._trims and self._trims[-1].index >= from_index:
            self._trims.pop()
        while self._staged and self._staged[-1].index >= from_index:
            each = self._staged.pop()
            if not each.is_orphan:
                self.waiting_records -= each.count
            self._machine.discard(each.staged)

    def step_down(self) -> None:
        """Leadership is lost: whatever is committed is applied, the outcome of the rest is unknown (raft.md 4.3)."""
        while self.apply(self._monotonic()):
            pass
        self.orphan_all()

    def orphan_all(self) -> None:
        """Whoever waits for an entry hears that its outcome is unknown."""
        for each in self._staged:
            self._orphan(each)

    def orphan_before(self, since: float) -> None:
        """As `orphan_all`, for those who have waited since before `since` (raft.md 4.10)."""
        for each in self._staged:
            if each.since > since:
                break
            self._orphan(each)

    def _orphan(self, each: Staged) -> None:
        if not each.is_orphan:
            each.is_orphan = True
            self.waiting_records -= each.count
            self._counters["orphaned"] += 1
            self._machine.orphan(each.staged)
