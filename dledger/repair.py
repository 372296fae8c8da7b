"""Mending a damaged log from the peers' before it is served again (raft.md 4.6).

While this runs the node takes no part in the group: it neither votes nor answers appends, for it does not know what it
once acknowledged. It does answer peers' fetches from what is intact, so that two nodes damaged at different places
mend each other.

* Damage between two intact frames: entries of a peer count only when their chain of checksums leads from the frame
  before to the frame behind. They are then, byte for byte, what was lost.
* Damage at the end, where it is still known which entry was the last one there (its side row outlived it, or the run
  that met the damage had it in memory): a peer's entries that lead to just that one are what was lost, too. Unless it
  is certain that this node acknowledged nothing behind that entry, it is marked *recovering* first: its votes do not
  make a majority until a leader has confirmed its log (docs/decisions/0010).
* Damage at the end of which no more is known: what was there cannot be proven. Once a peer is known to have as much,
  the end is cut, the node is marked recovering, and ordinary replication brings the entries back.
* Damage beside an older copy of a segment: no peer has the entry before it. The range is widened to begin behind the
  last entry in common, and to end where a later range does (`dledger.divergence`).
* Entries that so many voters definitely never had that no quorum can have them were never committed: cut, as above.
  The first ones of such a range, which one of these voters does have, may be: they are written in its place.
  Who has the intact entry behind the range is none of these voters, whatever it has before.
* Trimmed by the peers meanwhile: whole segments and a checkpoint take the log's place (`dledger.install`).
* Else nobody can supply them now. The node goes on asking, and says so once a minute; it never skips an entry. Only an
  operator can give them up: then the log is cut where the first of them was, as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import partial

import trio
from attrs import define, evolve, field

from dledger.core.quorum import majority
from dledger.core.types import BadFrame, Entry, next_position, parse_entry
from dledger.divergence import widened
from dledger.errors import LedgerError, LogDamaged
from dledger.fetch import FetchClient
from dledger.store.checkpoint import read_checkpoint
from dledger.store.faults import FaultyRange, add_suspects
from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile
from dledger.store.repair import drop_open_fault, row_of_last, write_repair
from dledger.store.rows import DISK_FULL, suppress_disk_full
from dledger.store.walk import LastEntry
from dledger.wire import FetchKind, FetchStatus
from runtime.logs import Logger
from runtime.model import Env

ROUND_SECONDS_MIN = 0.05
ROUND_SECONDS_MAX = 2.0
ALARM_SECONDS = 60.0
INSTALL_AFTER_SECONDS = 2.0
"""For so long, members that are not reached yet keep a node from replacing its whole log for what others trimmed."""


class Mended(Enum):
    """What is to be done next."""

    REOPEN = "recover the log again"
    INSTALL = "the peers have trimmed what is damaged here: fetch whole segments"


@define
class _Found:
    """What is known of one faulty range: the peers' answers, and the entries where one had them all."""

    entries: list[Entry] = field(factory=list)
    supplier: str | None = None
    """Who gave the entries: proven to be those that were here."""
    has_as_much: str | None = None
    """Who has other entries, or unproven ones, as far as an open end is known to have reached."""
    differing: list[str] = field(factory=list)
    """Peers that do not have these entries, be it for certain or not."""
    absent: dict[str, str] = field(factory=dict)
    """Peers that never had all of these entries, and how they said so."""
    front: list[Entry] = field(factory=list)
    """The first of these entries, as far as one of `absent` has them: `front_of`. Of several such peers the one whose
    are of the greater term, then the longer ones: it has whatever of them was committed with this node's word (Raft
    5.4.1, 5.4.3)."""
    front_of: str | None = None
    gone: set[str] = field(factory=set)
    others: dict[str, str] = field(factory=dict)


class RepairPhase:
    """One stay in the phase. `run` ends when the log is to be opened again, or replaced."""

    def __init__(
        self,
        env: Env,
        folder: str,
        segment_bytes: int,
        meta: MetaFile,
        faults: Sequence[FaultyRange],
        voters: Sequence[str],
        node_id: str,
        client: FetchClient,
        log: Logger,
        *,
        first_index: int = 1,
        last_written: LastEntry | None = None,
        own: LogStore | None = None,
    ) -> None:
        """`voters`: the members that count; empty where they are not known, and nothing is then given up as never
        committed. `first_index`: of the log. `last_written`: where a run of this process has met the damage, the last
        entry that it had written, and so the last one that this node can have acknowledged. `own`: this node's log,
        as far as it is intact."""
        self._env = env
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._meta = meta
        self._pending = list(faults)
        self._voters = voters
        self._node_id = node_id
        self._client = client
        self._log = log
        self._first_index = first_index
        self._last_written = last_written
        self._own = own
        self._ends: dict[int, FaultyRange] = {}
        """Open ends whose last entry is known, by their first index: as ranges with that end."""
        self._obstacles: dict[int, str] = {}
        self._obstacle = ""
        """Why the log cannot end before the first range that is left."""
        self._began_at: float | None = None
        self._told = trio.Event()
        self.is_loss_accepted = False
        self.repaired = 0
        """Ranges mended by a peer's entries."""
        self.dropped = 0
        """Ranges cut."""
        self.waits_for = "; ".join(str(fault) for fault in faults)
        """Why it still goes on, for an operator."""

    @property
    def damaged(self) -> tuple[tuple[int, int], ...]:
        """(first, last) entry of each range that is not mended yet, ascending; of an open end, as far as is known."""
        return tuple((fault.first_index, fault.last_index or fault.first_index) for fault in self._pending)

    def accept_loss(self) -> None:
        """The operator's word that what nobody can supply is given up. The peers are asked once more, at once.

        Raises LedgerError where there would be nothing to go on with.
        """
        if self._obstacle:
            raise LedgerError(self._obstacle)
        self.is_loss_accepted = True
        self._told.set()

    async def run(self) -> Mended:
        """Checkpoint; may be run again. Raises StoreFailed, or OSError, where the disk takes no repair."""
        clock = self._env.clock
        pause = ROUND_SECONDS_MIN
        alarm_at = clock.monotonic() + ALARM_SECONDS
        for fault in self._pending:
            self._log.error("damage in the log: asking the peers", range=str(fault))
            if fault.is_open:
                await self._look_for_its_end(fault)
        with suppress_disk_full():
            # Who mends one range and stops has to find the others again, also in a segment that looks complete.
            await self._env.run_in_thread(add_suspects, self._env.files, self._folder, self._damaged_segments())
        while True:
            verdict = await self._round()
            if verdict is not None:
                return verdict
            now = clock.monotonic()
            if now >= alarm_at:
                alarm_at = now + ALARM_SECONDS
                self._log.error(
                    "nobody can supply damaged entries; this node takes no part",
                    why=self.waits_for,
                    way_out=self._obstacle or f"start the other nodes, or: quorate raft recover {self._node_id}",
                )
            with clock.move_on_after(pause):
                await self._told.wait()
            self._told = trio.Event()
            pause = min(2 * pause, ROUND_SECONDS_MAX)

    def _damaged_segments(self) -> set[int]:
        """Start positions of the segments that the ranges lie in."""
        nbytes = self._segment_bytes
        return {
            base
            for fault in self._pending
            for base in range(fault.position // nbytes * nbytes, fault.end or fault.position + 1, nbytes)
        }

    async def _look_for_its_end(self, fault: FaultyRange) -> None:
        """Which entry was the last one of an open end, where something still tells."""
        last = self._last_written
        if last is not None and last.index == fault.last_index:
            self._ends[fault.first_index] = evolve(fault, end=last.end, next_crc=last.head_crc)
            return
        row = await self._env.run_in_thread(row_of_last, self._env.files, self._folder, self._segment_bytes, fault)
        if row is not None:
            self._ends[fault.first_index] = evolve(fault, end=row.end, next_crc=row.head_crc)

    async def _round(self) -> Mended | None:
        """Ask for every range once. Returns how to go on, if that is decided."""
        left: list[tuple[FaultyRange, _Found]] = []
        is_trimmed = is_everybody_asked = False
        now = self._env.clock.monotonic()
        if self._began_at is None:
            self._began_at = now
        for fault in list(self._pending):
            found = await self._ask_everybody(fault)
            if found.supplier is not None:
                known = self._ends.get(fault.first_index, fault)
                if await self._write(known, found, was_open=fault.is_open):
                    self._pending.remove(fault)
                    continue
            elif await self._write_wider(fault, found):
                return Mended.REOPEN
            elif found.has_as_much is not None or self._was_never_committed(found):
                rest = await self._keep_front(await self._from_divergence(fault, found), found)
                if rest is not None:
                    await self._cut(rest, found, "damaged end of the log cut; a leader has to confirm the rest")
                    return Mended.REOPEN
            is_trimmed = is_trimmed or bool(found.gone)
            is_everybody_asked = {self._node_id, *found.absent, *found.others} >= set(self._voters)
            left.append((fault, found))
        if not left:
            return Mended.REOPEN
        self.waits_for = "; ".join(_why(fault, found) for fault, found in left)
        if is_trimmed and not self.is_loss_accepted:
            has_waited = now - self._began_at > INSTALL_AFTER_SECONDS
            return Mended.INSTALL if has_waited or (is_everybody_asked and self._voters) else None
        self._obstacle = await self._obstacle_to_cut(left[0][0])
        if self.is_loss_accepted and not self._obstacle:
            await self._cut(*left[0], "damaged entries given up, as the operator said; the log is cut before them")
            return Mended.REOPEN
        return None

    async def _ask_everybody(self, fault: FaultyRange) -> _Found:
        """Until one peer has all of it."""
        found = _Found()
        known = self._ends.get(fault.first_index, fault)
        for peer in self._client.sources():
            entries, status, reason = await self._fetch(peer, fault)
            if status is FetchStatus.OK:
                if entries[-1].head_crc == known.next_crc:
                    found.entries, found.supplier = entries, peer
                    break
                if fault.is_open:
                    found.has_as_much = peer
                    continue
                status, reason = FetchStatus.ABSENT, "has other entries there"
            elif status is FetchStatus.ABSENT:
                status = await self._judge_absence(peer, fault)
            if status in (FetchStatus.ABSENT, FetchStatus.UNSURE):
                found.differing.append(peer)
            if status is FetchStatus.ABSENT:
                found.absent[peer] = reason
                if _how_far(entries) > _how_far(found.front):
                    found.front, found.front_of = entries, peer
            elif status is FetchStatus.GONE:
                found.gone.add(peer)
                found.others[peer] = reason
            else:
                found.others[peer] = reason
        for peer in self._client.too_old():
            found.others[peer] = "runs a version that supplies nothing: upgrade it"
        return found

    async def _judge_absence(self, peer: str, fault: FaultyRange) -> FetchStatus:
        """What it means that a peer does not have a range as it follows here. Who has the intact entry behind it has
        the range, too: then what lies before it here is not the group's, and that is no definite no. GONE where no
        entry in common can be found, for the peer has trimmed them."""
        if fault.last_index is None or fault.next_crc is None:
            return FetchStatus.ABSENT
        index = fault.last_index + 1
        answer = await self._client.ask(peer, FetchKind.ENTRIES, index, index, fault.next_crc)
        if not answer.is_ok:
            return FetchStatus.ABSENT if answer.status is FetchStatus.ABSENT else FetchStatus.UNSURE
        first = await self._client.ask(peer, FetchKind.ENTRIES, self._first_index, self._first_index)
        return FetchStatus.GONE if first.status is FetchStatus.GONE else FetchStatus.UNSURE

    async def _fetch(self, peer: str, fault: FaultyRange) -> tuple[list[Entry], FetchStatus, str]:
        """A peer's entries of a range, their chain verified from its beginning on."""
        entries: list[Entry] = []
        index, crc, end, term = fault.first_index, fault.prev_crc, fault.position, 0
        last = max(index, fault.last_index or index)
        while index <= last:
            answer = await self._client.ask(peer, FetchKind.ENTRIES, index, last, crc)
            if not answer.is_ok:
                return entries, answer.status, answer.reason
            offset = 0
            try:
                while offset < len(answer.data):
                    entry = parse_entry(answer.data, offset)
                    offset += len(entry.frame)
                    position = next_position(end, len(entry.frame), self._segment_bytes)
                    if (entry.index, entry.prev_crc, entry.position) != (index, crc, position) or entry.term < term:
                        return entries, FetchStatus.BUSY, f"sent entry {entry.index}, which does not follow"
                    if index > last:
                        return entries, FetchStatus.BUSY, f"sent entry {index}, which nobody asked for"
                    entries.append(entry)
                    index, crc, end, term = index + 1, entry.head_crc, entry.end, entry.term
            except (BadFrame, ValueError) as error:
                return entries, FetchStatus.BUSY, f"sent a damaged entry: {error}"
            if not offset:
                return entries, FetchStatus.BUSY, "sent nothing"
            self.waits_for = f"{fault}: {len(entries)} of {last + 1 - fault.first_index} entries have come from {peer}"
        return entries, FetchStatus.OK, ""

    async def _write_wider(self, fault: FaultyRange, found: _Found) -> bool:
        """Put a peer's entries in place of a range and of what, intact as it is, is not the group's around it."""
        own = self._own
        if own is None:
            return False
        later = [each for each in self._pending if each.first_index >= fault.first_index]
        for peer in found.differing:
            start = await widened(self._client, peer, own, fault) or fault
            for each in later:
                known = self._ends.get(each.first_index, each)
                wide = evolve(start, last_index=known.last_index, end=known.end, next_crc=known.next_crc)
                if known.is_open or wide == known:
                    continue  # leads nowhere, or has been asked for
                entries, status, _ = await self._fetch(peer, wide)
                if status is not FetchStatus.OK:
                    break
                if entries[-1].head_crc == wide.next_crc:
                    return await self._write(wide, _Found(entries, peer), was_open=each.is_open)
        return False

    async def _from_divergence(self, fault: FaultyRange, found: _Found) -> FaultyRange:
        """What is to be cut where so many do not have the entry before a range, either, that it was never committed."""
        own = self._own
        if own is None or found.has_as_much is not None:
            return fault
        wide = [await widened(self._client, peer, own, fault) or fault for peer in found.absent]
        return max(wide, key=lambda each: each.first_index)

    async def _keep_front(self, fault: FaultyRange, found: _Found) -> FaultyRange | None:
        """What is left to be cut of a range whose last entries were never committed: its first ones may be, and a
        peer's stay in their place. None where they cannot be written now."""
        if not found.front or found.has_as_much is not None:
            return fault
        last = found.front[-1]
        front = evolve(fault, last_index=last.index, end=last.end, next_crc=last.head_crc)
        # Nothing proves that they are those that were here.
        await self._meta.save_recovering(True)
        if not await self._write(front, evolve(found, entries=found.front, supplier=found.front_of), was_open=True):
            return None
        return evolve(fault, first_index=last.index + 1, position=last.end, prev_crc=last.head_crc)

    async def _write(self, fault: FaultyRange, found: _Found, *, was_open: bool) -> bool:
        """Put a peer's entries in place of a range; False where that fails, and may succeed later. `was_open`: of its
        end no more is known than its last entry."""
        if was_open and not self._ends_with_what_was_acknowledged(fault):
            # First, and on stable storage: what this node acknowledged behind these entries, it has forgotten.
            await self._meta.save_recovering(True)
        try:
            await self._env.run_in_thread(
                write_repair, self._env.files, self._folder, self._segment_bytes, fault, found.entries
            )
        except LogDamaged as error:
            self._log.error("entries of a peer do not fit", peer=found.supplier, error=str(error))
            found.others[str(found.supplier)] = f"sent entries that do not fit: {error}"
            return False
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            found.others["this node"] = f"has no room for the repair: {error}"
            return False
        self.repaired += 1
        self._log.warning(
            "damaged entries replaced by a peer's",
            first=fault.first_index,
            last=fault.last_index,
            peer=found.supplier,
            was_open=was_open,
        )
        return True

    def _ends_with_what_was_acknowledged(self, fault: FaultyRange) -> bool:
        """Whether this node cannot have acknowledged an entry behind a range: it stopped in order, with a mark at its
        last entry, or the run that met the damage tells which one was the last."""
        saved = self._meta.saved
        if self._last_written is not None:
            acknowledged = self._last_written.index
        elif saved.clean:
            acknowledged = saved.durable_index
        else:
            return False
        return fault.last_index is not None and acknowledged <= fault.last_index

    def _was_never_committed(self, found: _Found) -> bool:
        """Whether too few voters are left that could have these entries for a quorum. Never, of no known voters."""
        never = sum(1 for voter in self._voters if voter in found.absent and voter != self._node_id)
        return never > 0 and len(self._voters) - never < majority(len(self._voters))

    async def _obstacle_to_cut(self, fault: FaultyRange) -> str:
        """A trimmed log begins with tables: they must be as of an entry that stays."""
        if fault.first_index not in self._obstacles:
            covers = 0
            if self._first_index > 1:
                read = partial(read_checkpoint, self._env.files, self._folder, up_to=fault.first_index - 1)
                found = await self._env.run_in_thread(read)
                covers = found.index if found is not None else 0
            self._obstacles[fault.first_index] = (
                ""
                if covers >= self._first_index - 1
                else f"entries from {fault.first_index} on cannot be given up: the log begins at entry "
                f"{self._first_index}, and the tables kept for what was before are of a later entry; restore a backup"
            )
        return self._obstacles[fault.first_index]

    async def _cut(self, fault: FaultyRange, found: _Found, text: str) -> None:
        # First, and on stable storage: this node may have acknowledged what it now forgets.
        await self._meta.save_recovering(True)
        await drop_open_fault(self._env, self._folder, self._segment_bytes, self._meta, fault)
        self.dropped += 1
        self._log.warning(
            text,
            first=fault.first_index,
            last=fault.last_index,
            supplier=found.has_as_much,
            never_had=sorted(found.absent),
        )


def _how_far(entries: list[Entry]) -> tuple[int, int]:
    return (entries[-1].term, len(entries)) if entries else (0, 0)


def _why(fault: FaultyRange, found: _Found) -> str:
    """Why a range is not mended yet."""
    answers = {**found.absent, **found.others} or {"": "no peer is connected"}
    return f"{fault} ({'; '.join(f'{peer} {text}'.strip() for peer, text in sorted(answers.items()))})"


class Deaf:
    """Peer events of a node that takes no part: nothing is answered, as if it were down."""

    def on_message(self, peer: str, message: object) -> None:
        return

    def on_app_message(self, peer: str, payload: bytes) -> None:
        return

    def on_trim_wanted(self, peer: str, position: int) -> None:
        return

    def on_peer_up(self, peer: str) -> None:
        return

    def on_peer_lost(self, peer: str, hard: bool) -> None:
        return

    def pump(self) -> None:
        return
