"""How the log forgets: the leader decides, a TRIM entry tells everybody, each node removes its own segments.

A TRIM names a byte of the log. When it is committed, every replica's state machine stops showing what lies before it,
at the same entry; the segments themselves go later, once two checkpoints cover them, because a start replays from a
checkpoint. Only a node whose disk fills up while there is no leader may remove segments on its own, and then it leads
only after the group has done the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from datetime import datetime

import trio
from attrs import frozen

from dledger.config import GroupConfig
from dledger.core.types import Entry, EntryType
from dledger.disk_watch import DiskWatch
from dledger.feed import read_entries
from dledger.machine import EntryView, StateMachine
from dledger.store.log_store import LogStore
from dledger.store.manifest import SegmentInfo
from runtime.logs import Logger
from runtime.model import Env

DECIDE_SECONDS = 10.0
REMOVE_SECONDS = 1.0
KEPT_CLOSED = 2
"""The newest closed segments are never trimmed: a peer that was away for a moment finds its entries there."""
LOOK_BYTES = 256 * 1024
"""Where the first message of a segment is looked for."""
ALONE_AFTER_SECONDS = 10.0
"""For how long there must have been no leader before a node trims on its own."""
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
    end_position: int
    floor: int
    disk_free: int
    disk_total: int


def decide(config: GroupConfig, now: Situation, *, is_manual: bool = False) -> Plan | None:
    """What to trim, if anything. `is_manual`: somebody asked for it, so the hour does not count."""
    segments = [segment for segment in now.segments if segment.end > now.first_position]
    if not segments:
        return None
    early, forced, _ = config.disk_watermarks
    usage = 1.0 - now.disk_free / now.disk_total if now.disk_total else 0.0
    if usage > forced:
        excess = int((usage - forced) * now.disk_total)
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
            if now.end_position - max(position, segment.base) <= config.retention_bytes:
                break
            if segment.end > position:
                position = segment.end
                reason = f"the log holds more than {config.retention_bytes} bytes"
    allowed = [segment.end for segment in segments if segment.end <= min(position, now.floor)]
    return Plan(allowed[-1], False, reason) if allowed else None


class Retention:
    """The retention of one node: decides while it leads, removes what was given up, helps itself when alone."""

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
        applied: Callable[[], int],
        leased: Callable[[], int | None],
        removed: Callable[[], None],
    ) -> None:
        """`propose` has a TRIM logged; `applied` is the applied index; `leased` the byte from which on segments are
        needed by a peer that fetches them; `removed` is called when segments are gone."""
        self._env = env
        self._config = config
        self._machine = machine
        self._log = log
        self._store = store
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._propose = propose
        self._applied = applied
        self._leased = leased
        self._removed = removed
        self._times: dict[int, int] = {}
        self._kick = trio.Event()
        self._is_due = False
        self._is_manual = False
        self._owes_trim = False
        self._checkpoints = (0, 0)
        self._leaderless_since: float | None = env.clock.monotonic()
        self.is_leader = False
        self.trimmed_position = 0
        """Byte before which the log was given up, by TRIM entries and alone."""
        self.is_unfit = False
        """Trimmed alone: not to lead before the group has trimmed, too."""
        self.counters = {"trims": 0, "trimmed_bytes": 0, "lost_to_trim": 0, "trimmed_alone": 0}

    # From the driver's turns.

    def apply(self, entry: Entry) -> None:
        """A TRIM is committed, and everything before it is applied."""
        base = trim_base(entry, self._segment_bytes)
        is_forced = decode_trim(entry.body)[1]
        self.is_unfit = False
        self.counters["trims"] += 1
        if base >= self.trimmed_position:
            self._owes_trim = False
        if base <= self.trimmed_position:
            return
        if is_forced:
            known = max(self.trimmed_position, self._store.first_position)
            self.counters["lost_to_trim"] += max(0, base - max(known, min(self._machine.trim_floor(), base)))
        self._give_up(base)

    def _give_up(self, base: int) -> None:
        self.trimmed_position = base
        self._log.info("log trimmed", position=base, first=self._store.first_position)
        self._machine.trim(base)
        self._machine.checkpoint_soon()
        self._kick.set()

    def role_changed(self, *, is_leader: bool, leader_known: bool) -> None:
        self.is_leader = is_leader
        if leader_known:
            self._leaderless_since = None
        elif self._leaderless_since is None:
            self._leaderless_since = self._env.clock.monotonic()
        if is_leader and self._owes_trim:
            self._decide_soon()

    def checkpoint_saved(self, index: int) -> None:
        """A checkpoint that covers the log up to entry `index` is on stable storage. Also from a thread."""
        self._checkpoints = (self._checkpoints[1], index)

    def ask(self) -> None:
        """Trim what is old enough now, whatever the hour."""
        self._is_manual = True
        self._decide_soon()

    def _decide_soon(self) -> None:
        self._is_due = True
        self._kick.set()

    def limit(self, position: int) -> int:
        """How far a trim to `position` may go: to a segment's begin, not into the newest closed ones."""
        segments = self._candidates()
        allowed = [segment.base + self._segment_bytes for segment in segments]
        return max((end for end in allowed if end <= position), default=0)

    # The service.

    async def run(self) -> None:
        """Decide and remove, for ever. Checkpoint. Raises LogDamaged, StoreFailed."""
        clock = self._env.clock
        decide_at = clock.monotonic() + DECIDE_SECONDS
        while True:
            is_removal_due = self.trimmed_position > self._store.first_position
            wake_at = min(decide_at, clock.monotonic() + REMOVE_SECONDS) if is_removal_due else decide_at
            with clock.move_on_at(wake_at):
                await self._kick.wait()
            self._kick = trio.Event()
            if self._is_due or clock.monotonic() >= decide_at:
                self._is_due = False
                decide_at = clock.monotonic() + DECIDE_SECONDS
                await self._decide()
            if is_removal_due or self.trimmed_position > self._store.first_position:
                await self._remove(self.trimmed_position)

    def _candidates(self) -> tuple[SegmentInfo, ...]:
        applied = self._applied()
        closed = self._store.manifest().segments
        return tuple(segment for segment in closed[:-KEPT_CLOSED] if segment.last_index <= applied)

    async def _decide(self) -> None:
        is_manual, self._is_manual = self._is_manual, False
        if not self.is_leader:
            await self._help_yourself()
            return
        store = self._store
        if self._owes_trim:
            # We lead with a log that begins later than the group has agreed.
            self._propose(Plan(self.trimmed_position, True, "this node had to trim alone"))
            return
        await self._disk.look()
        closed = self._store.manifest().segments
        segments = []
        for segment, follower in zip(self._candidates(), closed[1:], strict=False):
            segments.append(
                Closed(segment.base, segment.base + self._segment_bytes, await self._time_of(follower.first_index))
            )
        self._times = {index: stored_ms for index, stored_ms in self._times.items() if index >= store.first_index}
        now_ms = self._env.clock.wall_ms()
        plan = decide(
            self._config,
            Situation(
                now_ms=now_ms,
                hour=datetime.fromtimestamp(now_ms / 1000).hour,
                segments=segments,
                first_position=max(store.first_position, self.trimmed_position),
                end_position=store.position_end,
                floor=self._machine.trim_floor(),
                disk_free=self._disk.usage.free + max(0, self.trimmed_position - store.first_position),
                disk_total=self._disk.usage.total,
            ),
            is_manual=is_manual,
        )
        if plan is not None:
            self._propose(plan)

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

    async def _remove(self, position: int) -> None:
        """Remove segments before `position`, as far as checkpoints cover them and no peer needs them."""
        store = self._store
        covered = min(self._checkpoints)
        leased = self._leased()
        if leased is not None:
            position = min(position, leased)
        target = store.first_position
        is_waiting = False
        for segment in store.manifest().segments:
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
        """No leader to decide, and the disk fills up: give up the oldest segments that our checkpoints cover."""
        since = self._leaderless_since
        if since is None:
            return
        alone = self._env.clock.monotonic() - since
        if self.is_unfit and alone > ALONE_LEADS_AFTER_SECONDS:
            self.is_unfit = False
        if alone < ALONE_AFTER_SECONDS:
            return
        await self._disk.look()
        usage = self._disk.usage
        forced = self._config.disk_watermarks[1]
        if usage.share <= forced:
            return
        store = self._store
        excess = int((usage.share - forced) * usage.total)
        covered = min(self._checkpoints)
        base = store.first_position
        for segment in self._candidates():
            if segment.last_index > covered or base - store.first_position >= excess:
                break
            base = segment.base + self._segment_bytes
        if base <= max(store.first_position, self.trimmed_position):
            self._machine.checkpoint_soon()
            return
        self._log.warning("trimmed without the group: the disk is nearly full", position=base, usage=usage.share)
        self.is_unfit = self._owes_trim = True
        self.counters["trimmed_alone"] += 1
        self._give_up(base)
