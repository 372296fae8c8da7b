"""The disk of one simulated node, at the level of entries: page cache, platter, and what rots on it.

Three lengths of the log matter: what the core has *appended*, what is *written* (page cache) and what is *durable*. A
killed process keeps what was written. A power loss keeps what was durable; of the rest the seed picks: everything gone,
any subset left, or all but a torn last one. Damage of synced bytes is a set of indexes whose frames no longer read.

`judge` follows the rules of `dledger.store.recovery` (raft.md 4.6) on entries instead of bytes: evidence that an
entry once was on stable storage makes a hole *damage* (repaired from peers before the node serves, never cut); no
evidence makes it a torn tail (cut). Evidence is the durable mark in the meta slot, up to 200 ms old, and the side rows.
In one seed of four the store itself judges, on bytes that are laid out for it (`chaos.sim.store_disk`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from attrs import define, frozen

from chaos.sim.chance import stream
from dledger.core.log import MemoryLog
from dledger.core.membership import Members
from dledger.core.types import Entry, HardState

if TYPE_CHECKING:
    from chaos.sim.node import SimNode
    from chaos.sim.world import World

MARK_SECONDS = 0.2
"""An idle writer stores the durable mark within this time (raft.md 4.6)."""
DISK_STALL_NOTICED = 2.0
"""Two election timeouts without a completed write: the driver says DiskState (raft.md 4.12)."""
FULL_NOTICED = 0.3
"""A disk without space answers at once; the driver says so with its next look."""


class Unreadable(Exception):
    """A read met bytes that fail their checksum: `LogDamaged` of the real store."""

    def __init__(self, index: int) -> None:
        super().__init__(f"entry {index} does not read")
        self.index = index


@frozen
class Gap:
    """Entries `first` to `last` are damaged or missing although they once were durable.

    `prev_crc` is the chain before the gap, `next_crc` the one that the next intact entry names (None: there is none).
    """

    first: int
    last: int
    prev_crc: int
    next_crc: int | None


class SimLog(MemoryLog):
    """A `LogView` whose reads fail where bytes are damaged. Terms and checksums come from memory, as in the store."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[int] = set()

    def entries(self, from_index: int, max_bytes: int) -> list[Entry]:
        taken = super().entries(from_index, max_bytes)
        if self.bad:
            for entry in taken:
                if entry.index in self.bad:
                    raise Unreadable(entry.index)
        return taken

    def peek(self, index: int) -> Entry | None:
        """The entry as it was written, damaged or not; None outside the log."""
        offset = index - self._trimmed_index - 1
        return self._entries[offset] if 0 <= offset < len(self._entries) else None

    def cut(self, from_index: int) -> list[Entry]:
        if self.bad:
            self.bad = {index for index in self.bad if index < from_index}
        return super().cut(from_index)

    def trim(self, through_index: int) -> None:
        if self.bad:
            self.bad = {index for index in self.bad if index > through_index}
        super().trim(through_index)

    def put(self, entries: Iterable[Entry]) -> None:
        """Replace entries by intact ones of the same index, as a repair does."""
        for entry in entries:
            self._entries[entry.index - self._trimmed_index - 1] = entry
            self.bad.discard(entry.index)

    def install(self, other: SimLog, last_index: int) -> None:
        """Become a copy of another log up to `last_index`, trimmed head included."""
        self._trimmed_index, self._trimmed_term = other._trimmed_index, other._trimmed_term
        self._trimmed_crc, self._trimmed_end = other._trimmed_crc, other._trimmed_end
        self._entries = other._entries[: last_index - other._trimmed_index]
        self.bad = set()


@define(eq=False)
class _Job:
    """A write or sync under way; a Cut lowers what it will report."""

    index: int


class SimDisk:
    """What one machine has on its disk. It outlives the process, which is told of completed work while it lives."""

    log_class: type[SimLog] = SimLog

    def __init__(self, world: World, name: str, node: SimNode) -> None:
        self._world = world
        self._plan = world.plan
        self._name = name
        self._node = node
        self._rng = stream(world.plan.seed, f"disk/{name}")
        self.log = self.log_class()
        self.saved = HardState()
        self.written = 0
        self.durable = 0
        self.mark = 0
        """The durable index that the meta slot names."""
        self._next_mark: tuple[int, float] | None = None
        self.rows = 0
        """The last entry with a readable side row."""
        self.recovering = False
        """Persisted: what this node acknowledged may be gone until a leader has confirmed its log."""
        self.has_failed = False
        """A write or sync has failed; the mark of it is in the folder."""
        self.is_suspect = False
        """A read has met damage: the next recovery walks everything."""
        self.excused: set[tuple[int, int]] = set()
        """(index, head_crc) this disk held when that was reported, and lost by a fault the group must bear."""
        self.not_on_platter: set[int] = set()
        """Entries only in clean pages: a failed sync dropped them although the cache still shows them."""
        self._configs: list[tuple[int, int, Members]] = []
        """CONFIG entries by index and checksum: those of the log, and those a checkpoint has kept of a trimmed head."""
        self.stalled_until = 0.0
        self.full_until = 0.0
        self._fails_at: str | None = None
        self._writes: list[_Job] = []
        self._write_free_at = 0.0
        self._meta_free_at = 0.0
        self._sync: _Job | None = None
        self._is_sync_due = False

    # Work of a running process

    def opened(self) -> None:
        """A process has recovered the log: no work is under way."""
        self._writes = []
        self._write_free_at = self._meta_free_at = 0.0
        self._sync = None
        self._is_sync_due = False
        now = self._world.now
        if now < self.full_until:
            self._tell_state_at(now, False)
            self._tell_state_at(self.full_until, True)

    def _done_at(self, latency: float) -> float:
        delay = latency * (0.3 + 1.4 * self._rng.random())
        if self._rng.random() < 0.01:
            delay += 0.2 * self._rng.random()
        return max(self._world.now + delay, self.stalled_until)

    def save(self, state: HardState) -> None:
        """Term and vote: written in place and synced. Space is never needed for that."""
        self._meta_free_at = max(self._meta_free_at, self._done_at(self._plan.sync_latency))
        self._world.at(self._meta_free_at, self._saved, self._node.incarnation, state)

    def _saved(self, incarnation: int, state: HardState) -> None:
        if incarnation == self._node.incarnation:
            self.saved = state
            self._node.saved(state)

    def write(self) -> int:
        """Everything appended is to be written. Returns the index written at once; else the process is told later."""
        if self._fails_at == "write":
            return self._fail()
        index = self.log.last_index
        if not self._plan.threaded_writes and self._world.now >= max(self.stalled_until, self.full_until):
            self._wrote(index)
            return index
        job = _Job(index)
        self._writes.append(job)
        self._write_free_at = max(self._write_free_at, self._done_at(0.0005), self.full_until)
        self._world.at(self._write_free_at, self._write_done, self._node.incarnation, job)
        return 0

    def _write_done(self, incarnation: int, job: _Job) -> None:
        if incarnation != self._node.incarnation or job not in self._writes:
            return
        if self._world.now < self.full_until:  # filled meanwhile
            self._world.at(self.full_until, self._write_done, incarnation, job)
            return
        self._writes.remove(job)
        if job.index > self.written:
            self._wrote(job.index)
            self._node.wrote(job.index)

    def _wrote(self, index: int) -> None:
        self.written = max(self.written, index)
        if not self._is_sync_due:
            self._is_sync_due = True
            wait = 0.0 if self._plan.sync else self._rng.random() * self._plan.lazy_sync_interval
            self._world.at(self._world.now + wait, self._begin_sync, self._node.incarnation)

    def _begin_sync(self, incarnation: int) -> None:
        if incarnation != self._node.incarnation or self._sync is not None:
            return
        self._is_sync_due = False
        self._sync = _Job(self.written)
        self._world.at(self._done_at(self._plan.sync_latency), self._sync_done, incarnation, self._sync)

    def _sync_done(self, incarnation: int, job: _Job) -> None:
        if incarnation != self._node.incarnation or job is not self._sync:
            return
        if self._fails_at == "sync":
            self._fail()
            return
        self._sync = None
        if job.index > self.durable:
            self._synced(job.index)
            self._node.synced(job.index)
        if self._is_sync_due:
            self._begin_sync(incarnation)

    def _synced(self, index: int) -> None:
        self.durable = self.rows = index
        self._settle_mark()
        if self._next_mark is None:
            self._next_mark = (index, self._world.now + MARK_SECONDS)

    def _settle_mark(self) -> None:
        pending = self._next_mark
        if pending is not None and self._world.now >= pending[1]:
            self.mark = max(self.mark, pending[0])
            self._next_mark = None

    def _fail(self) -> int:
        """EIO: final. The mark of it is left in the folder, and the process ends (raft.md 4.2)."""
        self._fails_at = None
        self.has_failed = True
        self._world.reached("io-error")
        self._node.disk_failed()
        return 0

    def cut(self, from_index: int) -> None:
        """Removed and synced before anything else happens; marks under way no longer cover what is gone."""
        self.log.cut(from_index)
        kept = from_index - 1
        self._lower(kept)
        for job in self._writes:
            job.index = min(job.index, kept)
        if self._sync is not None:
            self._sync.index = min(self._sync.index, kept)

    def _lower(self, kept: int) -> None:
        self.written = min(self.written, kept)
        self.durable = min(self.durable, kept)
        self.mark = min(self.mark, kept)
        self.rows = min(self.rows, kept)
        if self._next_mark is not None:
            self._next_mark = (min(self._next_mark[0], kept), self._next_mark[1])
        if self.not_on_platter:
            self.not_on_platter = {index for index in self.not_on_platter if index <= kept}

    def trim(self, through_index: int) -> None:
        """Retention has removed the head. A CONFIG entry that was cut must not pass for one of it."""
        first = self.log.first_index
        self._configs = [
            known for known in self._configs if known[0] < first or self.log.head_crc_at(known[0]) == known[1]
        ]
        self.log.trim(through_index)

    def torn_cut(self, from_index: int) -> None:
        """The process dies while a cut zeroes the tail from its end: any part of it may be left."""
        left = self._rng.randint(from_index - 1, self.log.last_index)
        if left < self.log.last_index:
            self.cut(left + 1)

    def note_config(self, index: int, members: Members) -> None:
        """A CONFIG entry has been appended."""
        crc = self.log.head_crc_at(index)
        assert crc is not None
        self._configs = [known for known in self._configs if known[0] < index]
        self._configs.append((index, crc, members))

    def configs(self) -> list[tuple[int, Members]]:
        """The CONFIG entries a start can know, ascending."""
        first = self.log.first_index
        return [
            (index, members)
            for index, crc, members in self._configs
            if index < first or self.log.head_crc_at(index) == crc
        ]

    def recovered(self) -> None:
        """A leader has confirmed our log; that is persisted."""
        self.recovering = False

    # The end of a process

    def process_ended(self) -> None:
        """What was appended but never written is gone, and what was on its way there never comes."""
        self._settle_mark()
        self._next_mark = None
        self._writes = []
        self._sync = None
        if self.written < self.log.last_index:
            self.log.cut(self.written + 1)

    def lose_power(self) -> None:
        """The page cache goes: the seed picks what of the unsynced part reached the platter."""
        self._world.reached("power-loss-of-unsynced" if self.durable < self.written else "power-loss-clean")
        unsynced = range(self.durable + 1, self.written + 1)
        how = self._rng.randrange(3)
        for index in unsynced:
            if how == 0 or (how == 1 and self._rng.random() < 0.5) or (how == 2 and index == self.written):
                self._lose(index)
        for index in sorted(self.not_on_platter):
            self._lose(index)
        self.not_on_platter = set()
        self.rows = self._rng.randint(min(self.mark, self.durable), self.durable)
        if not self._plan.sync:
            # The boot id has changed: what was acknowledged from the page cache may be gone (raft.md 4.2).
            self.recovering = True

    def _lose(self, index: int) -> None:
        """Bytes no longer read, by a fault that the group must bear."""
        crc = self.log.head_crc_at(index)
        assert crc is not None
        self.excused.add((index, crc))
        self.log.bad.add(index)

    # Recovery

    def evidence(self) -> int:
        """Entries up to here once were on stable storage, as far as this disk can still prove it."""
        return max(self.mark, self.rows)

    def recover(self) -> list[Gap]:
        """Load the log; returns what must be repaired from peers before this node serves. Everything kept is synced."""
        if self.has_failed:
            # Clean pages may show what the platter does not hold: they are dropped before anything is read.
            self.has_failed = False
            world = self._world
            world.note(self._name, "drops the page cache behind a failed write or sync")
            self.lose_power()
        log = self.log
        gaps, end, is_open = self.judge()
        if is_open:
            # Nothing intact follows: only a leader can say what was there (drop_open_fault of the store).
            self._world.reached("open-ended-damage")
            self.recovering = True
        elif end < log.last_index:
            self._world.reached("torn-tail-cut")
            if any(index not in log.bad for index in range(end + 1, log.last_index + 1)):
                self._world.reached("torn-with-intact-behind")
        if end < log.last_index:
            log.cut(end + 1)
        self.written = self.durable = self.rows = self.mark = log.last_index
        self.not_on_platter = {index for index in self.not_on_platter if index <= log.last_index}
        return gaps

    def judge(self) -> tuple[list[Gap], int, bool]:
        """What a start finds: gaps with two ends, where the log ends, and whether behind that there is damage."""
        log = self.log
        evidence = self.evidence()
        walked_from = self._walked_from()
        gaps: list[Gap] = []
        end = log.last_index
        torn = [index for index in log.bad if index > evidence]
        if torn:
            end = min(torn) - 1
        for first, last in _ranges({index for index in log.bad if walked_from <= index <= end}):
            behind = log.peek(last + 1) if last < end else None
            prev_crc = log.head_crc_at(first - 1)
            assert prev_crc is not None
            gaps.append(Gap(first, last, prev_crc, behind.prev_crc if behind is not None else None))
        is_open = end < evidence
        if gaps and gaps[-1].next_crc is None:
            end, is_open = gaps.pop().first - 1, True
        return gaps, end, is_open

    def _walked_from(self) -> int:
        """Closed segments with complete side rows are trusted until they are read; the rest is walked."""
        if self.is_suspect or self.rows < self.mark:
            self.is_suspect = False
            return 0
        segment_bytes = self._plan.segment_bytes
        start = (self.log.position_end // segment_bytes - 1) * segment_bytes
        index = self.log.last_index
        while (entry := self.log.peek(index)) is not None and entry.position >= start:
            index -= 1
        return index + 1

    # Faults

    def stall(self, until: float) -> None:
        """Nothing completes before `until`; a long stall is noticed."""
        self.stalled_until = max(self.stalled_until, until)
        now = self._world.now
        if until - now > DISK_STALL_NOTICED:
            self._tell_state_at(now + DISK_STALL_NOTICED, False)
            self._tell_state_at(until, True)

    def fill(self, until: float) -> None:
        """No space before `until`; the driver notices with its next write and looks for relief."""
        self.full_until = max(self.full_until, until)
        self._tell_state_at(self._world.now + FULL_NOTICED, False)
        self._tell_state_at(until, True)

    def _tell_state_at(self, when: float, ok: bool) -> None:
        self._world.at(when, self._tell_state, self._node.incarnation, ok)

    def _tell_state(self, incarnation: int, ok: bool) -> None:
        if incarnation == self._node.incarnation:
            now = self._world.now
            if ok and now < max(self.full_until, self.stalled_until):
                self._tell_state_at(max(self.full_until, self.stalled_until), True)
                return
            if not ok and now >= max(self.full_until, self.stalled_until):
                return
            self._node.disk_state(ok)

    def fail_next(self, what: str) -> None:
        """The next write or sync ends with EIO."""
        self._fails_at = what

    def heal(self) -> None:
        """No new trouble; what is under way ends."""
        self._fails_at = None
        now = self._world.now
        self.stalled_until = min(self.stalled_until, now)
        if self.full_until > now:
            self.full_until = now
            self._tell_state_at(now, True)
        self._write_free_at = min(self._write_free_at, now)
        incarnation = self._node.incarnation
        for job in self._writes:
            self._world.at(now, self._write_done, incarnation, job)
        if self._sync is not None:
            self._world.at(now, self._sync_done, incarnation, self._sync)

    @property
    def synced_range(self) -> range:
        """Indexes that damage of synced bytes may hit: those that the meta slot vouches for."""
        self._settle_mark()
        return range(self.log.first_index, min(self.mark, self.log.last_index) + 1)

    def damage(self, indexes: Iterable[int]) -> None:
        """Frames no longer read."""
        for index in indexes:
            self._lose(index)

    def lose_rows(self) -> None:
        """The side rows are gone; frames and the mark are there."""
        self.rows = 0

    def segment_of(self, index: int) -> range:
        """The indexes in the segment that holds `index`."""
        nbytes = self._plan.segment_bytes
        entry = self.log.peek(index)
        assert entry is not None
        number = entry.position // nbytes
        first = last = index
        while (before := self.log.peek(first - 1)) is not None and before.position // nbytes == number:
            first -= 1
        while (behind := self.log.peek(last + 1)) is not None and behind.position // nbytes == number:
            last += 1
        return range(first, last + 1)

    def copy_of(self, indexes: range) -> list[Entry]:
        """A copy somebody keeps of a segment."""
        return [entry for entry in (self.log.peek(index) for index in indexes) if entry is not None]

    def differs_from(self, copy: Sequence[Entry]) -> list[int]:
        """The indexes of the copied segment whose entries would be gone if the copy replaced it."""
        if not copy or self.log.peek(copy[0].index) is None:
            return []
        held = {entry.index: entry.head_crc for entry in copy}
        return [index for index in self.segment_of(copy[0].index) if held.get(index) != self.log.head_crc_at(index)]

    def wipe(self) -> None:
        """The folder is empty: log, term and vote are gone. The next start is that of a blank node."""
        for entry in self.log:
            self.excused.add((entry.index, entry.head_crc))
        self.log = self.log_class()
        self._configs = []
        self.saved = HardState()
        self.written = self.durable = self.mark = self.rows = 0
        self._next_mark = None
        self.has_failed = False
        self._fails_at = None
        self.not_on_platter = set()
        self.recovering = True

    def installed(self, source: SimDisk) -> None:
        """A whole log was fetched, verified, synced and put in the place of ours. Term and vote stay."""
        last = self.log.last_index
        self._configs = [known for known in source._configs if known[0] <= last]
        self.written = self.durable = self.mark = self.rows = self.log.last_index
        self._next_mark = None
        self.not_on_platter = set()

    # What the observer asks

    def holds(self, index: int, head_crc: int, *, durable: bool) -> bool:
        """Whether this very entry reads, from the page cache or (`durable`) from the platter."""
        if index > (self.durable if durable else self.written) or index in self.log.bad:
            return False
        if durable and index in self.not_on_platter:
            return False
        return self.log.head_crc_at(index) == head_crc

    @property
    def is_impaired(self) -> bool:
        """Counts against the fault budget: something is damaged, lost or not confirmed yet."""
        return (
            self.recovering
            or self.has_failed
            or self._fails_at is not None
            or bool(self.log.bad)
            or bool(self.not_on_platter)
        )


def _ranges(indexes: set[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for index in sorted(indexes):
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return ranges
