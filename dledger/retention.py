"""How the log forgets: the leader decides, a TRIM entry tells everybody, each node removes its own segments.

A TRIM names a byte of the log. When it is committed, every replica's state machine stops showing what lies before it,
at the same entry; the segments themselves go once two checkpoints cover them, because a start replays from a
checkpoint, and once the TRIM is on stable storage, because an unlinked file does not come back with the page cache that
a power loss takes. A checkpoint tells how far the log was given up, for the next start does not see the TRIM.

Any member's disk counts: a follower above its second watermark tells the leader up to where the log has to go, for the
leader's disk may be larger. Only a node that no TRIM can help removes segments on its own: there is no leader, or the
log cannot take the TRIM, as the disk is full. It notes that on the disk, and leads only after the group has done the
same.

When the log is limited by its size, or a disk fills up, this is looked at whenever a segment is closed, and checkpoints
are asked for at that pace, so that segments which have to go are covered already.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from datetime import datetime

from attrs import frozen

from dledger.config import GroupConfig
from dledger.core.types import Entry, EntryType
from dledger.disk_watch import DiskWatch, Usage
from dledger.errors import StoreFailed
from dledger.feed import read_entries
from dledger.kick import Kick
from dledger.lone_trim import drop_lone_trim, read_lone_trim, write_lone_trim
from dledger.machine import EntryView, StateMachine
from dledger.store.log_store import LogStore
from dledger.store.manifest import SegmentSpan
from dledger.store.rows import DISK_FULL
from runtime.logs import Logger
from runtime.model import Env

DECIDE_SECONDS = 10.0
REMOVE_SECONDS = 0.25
"""How often removal is tried while checkpoints, or the TRIM's way to the disk, are waited for."""
AHEAD = 2
"""Segments that count as there when the size is limited: the spare, and the one that is made while others go."""
KEPT_CLOSED = 2
"""The newest closed segments are never trimmed: a peer that was away for a moment finds its entries there."""
LOOK_BYTES = 256 * 1024
"""Where the first message of a segment is looked for."""
ALONE_AFTER_SECONDS = 10.0
"""For how long there must have been no leader, or no room for its entries, before a node trims on its own."""
PRESSED_SECONDS = 2.0
"""How often is decided while the disk is above its second watermark, or full."""
ALONE_LEADS_AFTER_SECONDS = 30.0
"""A node that trimmed alone may lead after all when there is no leader for so long: all others may have done the same.
Its first act as a leader is the TRIM."""
FLAG_FORCED = 1
_BODY = struct.Struct("<QB")
_HOUR_MS = 3_600_000


def encode_trim(position: int, *, is_forced: bool) -> bytes:
    """The body of a TRIM entry."""
    return _BODY.pack(position, FLAG_FORCED if is_forced else 0)


def decode_trim(body: bytes | memoryview) -> tuple[int, bool]:
    """(position, whether it was forced). Raises ValueError for anything that `encode_trim` does not write."""
    if len(body) != _BODY.size:
        raise ValueError(f"a TRIM of {len(body)} bytes")
    position, flags = _BODY.unpack(body)
    return position, bool(flags & FLAG_FORCED)


def trim_base(entry: Entry, segment_bytes: int) -> int:
    """First byte that a TRIM entry keeps: the segment that holds the named byte is kept, and so is the entry's own."""
    position = min(decode_trim(entry.body)[0], entry.position)
    return position - position % segment_bytes


@frozen
class Plan:
    """Give up the log before `position`, and why."""

    position: int
    is_forced: bool
    reason: str


@frozen
class Closed:
    """A closed segment as the decision sees it; `closed_ms` is the store time of the first message behind it."""

    base: int
    end: int
    closed_ms: int | None


@frozen(kw_only=True)
class Situation:
    """All that the decision rests on. Sizes in bytes, times in wall milliseconds."""

    now_ms: int
    hour: int
    segments: Sequence[Closed]
    """Those that may go, oldest first: closed, applied, and not among the newest closed ones."""
    first_position: int
    """Where the log begins, everything given up already being gone."""
    files_end: int
    """Where the files end, those that are made ahead counted too."""
    floor: int
    disk: Usage
    """Everything given up already being gone."""


def decide(config: GroupConfig, now: Situation, *, is_manual: bool = False) -> Plan | None:
    """What to trim, if anything. `is_manual`: somebody asked for it, so the hour does not count."""
    segments = [segment for segment in now.segments if segment.end > now.first_position]
    if not segments:
        return None
    early, forced, _ = config.disk_watermarks
    usage = now.disk.share
    if usage > forced:
        excess = now.disk.excess(forced)
        position = segments[0].end
        for segment in segments:
            position = segment.end
            if position - now.first_position >= excess:
                break
        return Plan(position, True, f"the disk is {usage:.0%} full")
    position = now.first_position
    reason = ""
    if is_manual or config.delete_hour in (-1, now.hour) or usage > early:
        before = now.now_ms - config.retention_hours * _HOUR_MS
        for segment in segments:
            if segment.closed_ms is None or segment.closed_ms > before:
                break
            position = segment.end
            reason = f"older than {config.retention_hours:g} hours"
    if config.retention_bytes is not None:
        for segment in segments:
            if now.files_end - max(position, segment.base) <= config.retention_bytes:
                break
            if segment.end > position:
                position = segment.end
                reason = f"its files hold more than {config.retention_bytes} bytes"
    allowed = [segment.end for segment in segments if segment.end <= min(position, now.floor)]
    return Plan(allowed[-1], False, reason) if allowed else None


class Retention:
    """The retention of one node: decides while it leads, removes what was given up, and has a word with the leader, or
    helps itself, when its own disk fills up."""

    def __init__(
        self,
        env: Env,
        config: GroupConfig,
        machine: StateMachine,
        log: Logger,
        store: LogStore,
        disk: DiskWatch,
        *,
        segment_bytes: int,
        propose: Callable[[Plan], None],
        tell_leader: Callable[[int], None],
        applied: Callable[[], int],
        leased: Callable[[], int | None],
        removed: Callable[[], None],
    ) -> None:
        """`propose` has a TRIM logged; `tell_leader` lets the leader know up to which byte this node's disk needs one;
        `applied` is the applied index; `leased` the byte from which on segments are needed by a peer that fetches them;
        `removed` is called when segments are gone."""
        self._env = env
        self._config = config
        self._machine = machine
        self._log = log
        self._store = store
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._propose = propose
        self._tell_leader = tell_leader
        self._applied = applied
        self._leased = leased
        self._removed = removed
        self._times: dict[int, int] = {}
        self._kick = Kick()
        self._is_due = False
        self._is_manual = False
        self._wanted: dict[str, int] = {}
        self._checkpoints = (0, 0)
        self._leaderless_since: float | None = env.clock.monotonic()
        self._full_since: float | None = None
        self._given_up: tuple[tuple[int, int], ...] = ((0, 0),)
        """(entry, byte) of the TRIM entries applied, ascending, as far back as a checkpoint or a power loss may ask."""
        self._owed: int | None = None
        """Byte before which the log was given up alone, and by no TRIM yet."""
        self._noted: int | None = None
        """The same, as it is noted on the disk."""
        self._asked_for = 0
        """What the leader was asked for last."""
        self.is_leader = False
        self.trimmed_position = 0
        """Byte before which the log was given up, by TRIM entries and alone."""
        self.is_unfit = False
        """Trimmed alone: not to lead before the group has trimmed, too."""
        self.counters = {"trims": 0, "trimmed_bytes": 0, "lost_to_trim": 0, "trimmed_alone": 0}

    def restored(self, trimmed_position: int) -> None:
        """At the start: the machine's tables and the log say that the group gave up what lies before this byte. Reads
        the note of what this node gave up alone."""
        self._given_up = ((0, trimmed_position),)
        self.trimmed_position = trimmed_position
        owed = self._noted = read_lone_trim(self._env.files, self._config.data_dir, self._store.first_position)
        if owed is not None and owed > trimmed_position:
            self._owed = owed
            self.is_unfit = True

    @property
    def begin_position(self) -> int:
        """Where the log begins, everything given up already being gone."""
        return max(self._store.first_position, self.trimmed_position)

    # From the driver's turns.

    def apply(self, entry: Entry) -> None:
        """A TRIM is committed, and everything before it is applied."""
        base = trim_base(entry, self._segment_bytes)
        self.counters["trims"] += 1
        if self._owed is not None and base >= self._owed:
            self._owed, self.is_unfit = None, False
            self._kick.give()
        self._note_given_up(entry.index, base)
        if base <= self.trimmed_position:
            return
        _, is_forced = decode_trim(entry.body)
        if is_forced:
            self.counters["lost_to_trim"] += max(0, base - max(self.begin_position, self._machine.trim_floor()))
        self._give_up(base)

    def _note_given_up(self, index: int, base: int) -> None:
        known = self._given_up
        asked_for = min(*self._checkpoints, self._store.durable_index)
        while len(known) > 1 and known[1][0] <= asked_for:
            known = known[1:]
        if base > known[-1][1]:
            known = (*known, (index, base))
        self._given_up = known

    def trimmed_at(self, index: int) -> int:
        """Byte before which the TRIM entries up to entry `index` gave the log up. Also from a thread."""
        known = self._given_up
        return next((base for at, base in reversed(known) if at <= index), known[0][1])

    def _give_up(self, base: int) -> None:
        self.trimmed_position = base
        self._log.info("log trimmed", position=base, first=self._store.first_position)
        self._machine.trim(base)
        self._machine.checkpoint_soon()
        self._kick.give()

    def role_changed(self, *, is_leader: bool, leader_known: bool) -> None:
        self.is_leader = is_leader
        if leader_known:
            self._leaderless_since = None
        elif self._leaderless_since is None:
            self._leaderless_since = self._env.clock.monotonic()
        if is_leader and self._owed is not None:
            self._decide_soon()

    def checkpoint_saved(self, index: int) -> None:
        """A checkpoint that covers the log up to entry `index` is on stable storage. Also from a thread."""
        self._checkpoints = (self._checkpoints[1], index)

    def segment_closed(self) -> None:
        """The log goes on in its next segment. Where it is large, or the disk nearly full: see at once what has to go,
        and have it covered by then."""
        limit = self._config.retention_bytes
        is_large = limit is not None and self._files_end() + self._segment_bytes - self.begin_position > limit
        if is_large or self._is_pressed:
            self._machine.checkpoint_soon()
            if self.is_leader or self._is_pressed:
                self._decide_soon()

    def wanted_by(self, peer: str, position: int) -> None:
        """A follower's disk is above its second watermark: it needs the log to be given up before this byte."""
        if self.is_leader:
            self._wanted[peer] = position
            self._decide_soon()

    def ask(self) -> None:
        """Trim what is old enough now, whatever the hour."""
        self._is_manual = True
        self._decide_soon()

    def _decide_soon(self) -> None:
        self._is_due = True
        self._kick.give()

    def limit(self, position: int) -> int:
        """How far a trim to `position` may go: to a segment's begin, not into the newest closed ones."""
        allowed = [segment.base + self._segment_bytes for segment in self._candidates(self._store.closed_segments())]
        return max((end for end in allowed if end <= position), default=0)

    # The service.

    async def run(self) -> None:
        """Decide and remove, for ever. Checkpoint. Raises LogDamaged, StoreFailed."""
        clock = self._env.clock
        decide_at = clock.monotonic() + DECIDE_SECONDS
        while True:
            wake_at = min(decide_at, clock.monotonic() + REMOVE_SECONDS) if self._is_removal_due else decide_at
            with clock.move_on_at(wake_at):
                await self._kick.wait()
            if self._is_due or clock.monotonic() >= decide_at:
                self._is_due = False
                await self._decide()
                decide_at = clock.monotonic() + (PRESSED_SECONDS if self._is_pressed else DECIDE_SECONDS)
            await self._keep_note()
            if self._is_removal_due:
                await self._remove()

    @property
    def _is_removal_due(self) -> bool:
        return self.trimmed_position > self._store.first_position or self._owed != self._noted

    @property
    def _is_pressed(self) -> bool:
        return self._disk.is_full or self._disk.usage.share > self._config.disk_watermarks[1]

    def _files_end(self) -> int:
        """Of the segment that is written to, the spare behind it, and the one that is made while segments go."""
        segment_bytes = self._segment_bytes
        return -(-self._store.position_end // segment_bytes) * segment_bytes + AHEAD * segment_bytes

    def _candidates(self, closed: Sequence[SegmentSpan]) -> Sequence[SegmentSpan]:
        applied = self._applied()
        return tuple(segment for segment in closed[:-KEPT_CLOSED] if segment.last_index <= applied)

    async def _decide(self) -> None:
        is_manual, self._is_manual = self._is_manual, False
        wanted, self._wanted = self._wanted, {}
        await self._disk.look()
        if not self.is_leader:
            await self._help_yourself()
            self._ask_for_trim()
            return
        if self._owed is not None:
            # We lead with a log that begins later than the group has agreed.
            self._propose(Plan(self._owed, True, "this node had to trim alone"))
            return
        closed = self._store.closed_segments()
        segments = []
        for segment, follower in zip(self._candidates(closed), closed[1:], strict=False):
            stored_ms = await self._time_of(follower.first_index)
            segments.append(Closed(segment.base, segment.base + self._segment_bytes, stored_ms))
        first_index = self._store.first_index
        self._times = {index: stored_ms for index, stored_ms in self._times.items() if index >= first_index}
        plan = decide(self._config, self._situation(segments), is_manual=is_manual)
        reached = max(self.begin_position, plan.position if plan is not None else 0)
        for peer, position in wanted.items():
            allowed = self.limit(position)
            if allowed > reached:
                reached = allowed
                plan = Plan(allowed, True, f"the disk of {peer} is nearly full")
        if plan is not None:
            self._propose(plan)

    def _situation(self, segments: Sequence[Closed]) -> Situation:
        now_ms = self._env.clock.wall_ms()
        store, usage = self._store, self._disk.usage
        return Situation(
            now_ms=now_ms,
            hour=datetime.fromtimestamp(now_ms / 1000).hour,
            segments=segments,
            first_position=self.begin_position,
            files_end=self._files_end(),
            floor=self._machine.trim_floor(),
            disk=Usage(usage.free + self.begin_position - store.first_position, usage.total),
        )

    def _ask_for_trim(self) -> None:
        """This node's disk is above its second watermark; the leader's may not be."""
        if not self._is_pressed or self._leaderless_since is not None:
            return
        segments = [
            Closed(segment.base, segment.base + self._segment_bytes, None)
            for segment in self._candidates(self._store.closed_segments())
        ]
        plan = decide(self._config, self._situation(segments))
        if plan is not None and plan.is_forced:
            if plan.position != self._asked_for:
                self._asked_for = plan.position
                self._log.info("asking the leader for a trim", position=plan.position, reason=plan.reason)
            self._tell_leader(plan.position)

    async def _time_of(self, first_index: int) -> int | None:
        """Store time of the first message at or behind an entry; each segment is looked into once."""
        if first_index not in self._times:
            for entry in await read_entries(self._store, self._segment_bytes, first_index, LOOK_BYTES):
                if entry.type == EntryType.DATA and entry.index <= self._applied():
                    stored_ms = self._machine.store_time_ms(EntryView(entry))
                    if stored_ms is not None:
                        self._times[first_index] = stored_ms
                        break
        return self._times.get(first_index)

    async def _remove(self) -> None:
        """Remove segments that were given up, as far as TRIM entries on stable storage, or the note, say so,
        checkpoints cover them, and no peer needs them."""
        store = self._store
        position = max(self.trimmed_at(store.durable_index), self._owed or 0)
        covered = min(self._checkpoints)
        leased = self._leased()
        if leased is not None:
            position = min(position, leased)
        target = store.first_position
        if position <= target:
            return
        is_waiting = False
        for segment in self._store.closed_segments():
            end = segment.base + self._segment_bytes
            if end > position:
                break
            if segment.last_index > covered:
                is_waiting = True
                break
            target = end
        if target > store.first_position:
            before = store.first_position
            await store.trim(target)
            self.counters["trimmed_bytes"] += store.first_position - before
            self._removed()
        if is_waiting:
            self._machine.checkpoint_soon()

    async def _help_yourself(self) -> None:
        """No TRIM can help, and the disk fills up: give up the oldest segments that our checkpoints cover."""
        now = self._env.clock.monotonic()
        if not self._disk.is_full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        leaderless = now - self._leaderless_since if self._leaderless_since is not None else 0.0
        # A log that takes no entries takes no TRIM: on a follower with a full disk none is ever applied.
        deaf = now - self._full_since if self._full_since is not None else 0.0
        if self.is_unfit and leaderless > ALONE_LEADS_AFTER_SECONDS:
            self.is_unfit = False
        alone = max(leaderless, deaf)
        if alone < ALONE_AFTER_SECONDS:
            return
        usage = self._disk.usage
        forced = self._config.disk_watermarks[1]
        if usage.share <= forced:
            return
        store = self._store
        excess = usage.excess(forced)
        covered = min(self._checkpoints)
        base = store.first_position
        for segment in self._candidates(self._store.closed_segments()):
            if segment.last_index > covered or base - store.first_position >= excess:
                break
            base = segment.base + self._segment_bytes
        if base <= self.begin_position:
            self._machine.checkpoint_soon()
            return
        self._log.warning("trimmed without the group: the disk is nearly full", position=base, usage=usage.share)
        self._owed, self.is_unfit = base, True
        self.counters["trimmed_alone"] += 1
        self._give_up(base)

    async def _keep_note(self) -> None:
        """What is owed to the group is not forgotten over a restart. Raises StoreFailed."""
        owed = self._owed
        if owed == self._noted:
            return
        files, folder = self._env.files, self._config.data_dir
        try:
            if owed is None:
                await self._env.run_in_thread(drop_lone_trim, files, folder)
            else:
                await self._env.run_in_thread(write_lone_trim, files, folder, owed)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise StoreFailed(f"noting a trim in {folder} failed: {error}") from error
            return  # the segments that go make room for it: the next try comes behind their removal
        self._noted = owed
