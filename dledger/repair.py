"""Mending a damaged log from the peers' before it is served again (raft.md 4.6).

While this runs the node takes no part in the group: it neither votes nor answers appends, for it does not know what it
once acknowledged. It does answer peers' fetches from what is intact, so that two nodes damaged at different places
mend each other.

* Damage between two intact frames: entries of a peer count only when their chain of checksums leads from the frame
  before to the frame behind. They are then, byte for byte, what was lost.
* Damage at the end: what was there cannot be proven. Once a peer is known to have as much, the end is cut, the node
  is marked *recovering* (its votes do not make a majority until a leader has confirmed its log), and ordinary
  replication brings the entries back.
* Entries that so many voters definitely never had that no quorum can have them were never committed: cut, as above.
* Trimmed by the peers meanwhile: whole segments and a checkpoint take the log's place (`dledger.install`).
* Else nobody can supply them now. The node goes on asking, and says so once a minute; it never skips an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from attrs import define, field

from dledger.core.quorum import majority
from dledger.core.types import BadFrame, Entry, next_position, parse_entry
from dledger.errors import LogDamaged
from dledger.fetch import FetchClient
from dledger.store.faults import FaultyRange
from dledger.store.meta import MetaFile
from dledger.store.repair import drop_open_fault, write_repair
from dledger.store.rows import DISK_FULL
from dledger.wire import FetchKind, FetchStatus
from runtime.logs import Logger
from runtime.model import Env

ROUND_SECONDS_MIN = 0.05
ROUND_SECONDS_MAX = 2.0
ALARM_SECONDS = 60.0


class Mended(Enum):
    """What is to be done next."""

    REOPEN = "recover the log again"
    INSTALL = "the peers have trimmed what is damaged here: fetch whole segments"


@define
class _Found:
    """What is known of one faulty range: the peers' answers, and the entries where one had them all."""

    entries: list[Entry] = field(factory=list)
    supplier: str | None = None
    absent: dict[str, str] = field(factory=dict)
    """Peers that never had these entries, and how they said so."""
    gone: set[str] = field(factory=set)
    others: dict[str, str] = field(factory=dict)


class RepairPhase:
    """One stay in the phase. `run` ends when the log is to be opened again."""

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
    ) -> None:
        """`voters`: the members that count; empty where they are not known, and nothing is then given up as never
        committed."""
        self._env = env
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._meta = meta
        self._faults = faults
        self._voters = voters
        self._node_id = node_id
        self._client = client
        self._log = log
        self.repaired = 0
        """Ranges mended by a peer's entries."""
        self.dropped = 0
        """Ranges cut."""
        self.waits_for = ""
        """Why it still goes on, for an operator."""

    async def run(self) -> Mended:
        """Checkpoint. Raises StoreFailed, or OSError, where the disk takes no repair."""
        pause = ROUND_SECONDS_MIN
        alarm_at = self._env.clock.monotonic() + ALARM_SECONDS
        pending = list(self._faults)
        for fault in pending:
            self._log.error("damage in the log: asking the peers", range=str(fault))
        while True:
            pending, verdict = await self._round(pending)
            if verdict is not None:
                return verdict
            now = self._env.clock.monotonic()
            if now >= alarm_at:
                alarm_at = now + ALARM_SECONDS
                self._log.error("nobody can supply damaged entries; this node takes no part", why=self.waits_for)
            await self._env.clock.sleep(pause)
            pause = min(2 * pause, ROUND_SECONDS_MAX)

    async def _round(self, pending: Sequence[FaultyRange]) -> tuple[list[FaultyRange], Mended | None]:
        """Ask for every range once. Returns those still faulty, and how to go on if that is decided."""
        left: list[FaultyRange] = []
        reasons: list[str] = []
        is_trimmed = False
        for fault in pending:
            found = await self._ask_everybody(fault)
            if found.supplier is not None and not fault.is_open:
                if await self._write(fault, found):
                    continue
            elif found.supplier is not None or self._was_never_committed(found):
                await self._cut(fault, found)
                return left, Mended.REOPEN
            is_trimmed = is_trimmed or bool(found.gone)
            left.append(fault)
            answers = {**found.absent, **found.others} or {"": "no peer is connected"}
            reasons.append(f"{fault} ({'; '.join(f'{peer} {text}'.strip() for peer, text in sorted(answers.items()))})")
        self.waits_for = "; ".join(reasons)
        if not left:
            return left, Mended.REOPEN
        return left, Mended.INSTALL if is_trimmed else None

    async def _ask_everybody(self, fault: FaultyRange) -> _Found:
        """Until one peer has all of it."""
        found = _Found()
        for peer in self._client.sources():
            entries, status, reason = await self._fetch(peer, fault)
            if status is FetchStatus.OK:
                if fault.is_open or entries[-1].head_crc == fault.next_crc:
                    found.entries, found.supplier = entries, peer
                    break
                status, reason = FetchStatus.ABSENT, "has other entries there"
            if status is FetchStatus.ABSENT:
                found.absent[peer] = reason
            elif status is FetchStatus.GONE:
                found.gone.add(peer)
                found.others[peer] = reason
            else:
                found.others[peer] = reason
        return found

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
                    entries.append(entry)
                    index, crc, end, term = index + 1, entry.head_crc, entry.end, entry.term
            except (BadFrame, ValueError) as error:
                return entries, FetchStatus.BUSY, f"sent a damaged entry: {error}"
            if not offset:
                return entries, FetchStatus.BUSY, "sent nothing"
        return entries, FetchStatus.OK, ""

    async def _write(self, fault: FaultyRange, found: _Found) -> bool:
        try:
            await self._env.run_in_thread(
                write_repair, self._env.files, self._folder, self._segment_bytes, fault, found.entries
            )
        except LogDamaged as error:
            self._log.error("entries of a peer do not fit", peer=found.supplier, error=str(error))
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
        )
        return True

    def _was_never_committed(self, found: _Found) -> bool:
        """Whether too few voters are left that could have these entries for a quorum."""
        if not self._voters:
            return False
        never = sum(1 for voter in self._voters if voter in found.absent and voter != self._node_id)
        return never > 0 and len(self._voters) - never < majority(len(self._voters))

    async def _cut(self, fault: FaultyRange, found: _Found) -> None:
        # First, and on stable storage: this node may have acknowledged what it now forgets.
        await self._meta.save_recovering(True)
        await drop_open_fault(self._env, self._folder, self._segment_bytes, self._meta, fault)
        self.dropped += 1
        self._log.warning(
            "damaged end of the log cut; a leader has to confirm the rest",
            first=fault.first_index,
            last=fault.last_index,
            supplier=found.supplier,
            never_had=sorted(found.absent),
        )


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
