"""A simulated disk whose recovery is the store's own: `dledger.store.recovery` on files laid out from its entries.

The core engine keeps logs as entries. In one seed of four (`Plan.real_store`) each start writes segments, side rows,
the base record and the suspects as the store does, damaged entries with a turned bit, zeros or a torn end, and goes on
with what `recover_log` finds there: about a third more work for the seed. All promises are judged as ever.

What lies between two starts stays the model's: appends, syncs, cuts, trims, repairs and installs are tried on real
files by engine full, a hundred times slower. So are faults of whole files: what a damaged entry looks like is drawn
here entry by entry.
"""

from __future__ import annotations

from chaos.sim.chance import stream
from chaos.sim.disk import Gap, SimDisk
from chaos.sim.full.clock import Agenda, NodeClock, VirtualTime
from chaos.sim.full.files import Disk
from chaos.sim.full.machine import Machine, Process
from chaos.sim.full.net import Network
from chaos.sim.properties import PropertyBroken
from dledger.core.types import Entry
from dledger.errors import LogDamaged
from dledger.store.base import BaseRecord, write_base
from dledger.store.faults import add_suspects
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER
from dledger.store.recovery import RecoveredLog, recover_log
from dledger.store.rows import row_of
from dledger.store.segments import segment_name
from runtime.model import Files

FOLDER = "/raft"


class StoreDisk(SimDisk):
    """A `SimDisk` on which a start is the store's."""

    def judge(self) -> tuple[list[Gap], int, bool]:
        files = self._laid_out()
        try:
            found = recover_log(files, FOLDER, self._plan.segment_bytes, self.mark, hint_is_evidence=self._plan.sync)
        except LogDamaged as error:
            raise PropertyBroken(f"recovery refuses: {self._name} has {error}") from error
        self.is_suspect = False
        return self._as_entries(found)

    def _as_entries(self, found: RecoveredLog) -> tuple[list[Gap], int, bool]:
        gaps: list[Gap] = []
        for fault in found.faults:
            if fault.next_crc is None:
                return gaps, fault.first_index - 1, True
            assert fault.last_index is not None
            gaps.append(Gap(fault.first_index, fault.last_index, fault.prev_crc, fault.next_crc))
        return gaps, max(found.last.index, self.log.first_index - 1), False

    # The files

    def _laid_out(self) -> Files:
        log, segment_bytes = self.log, self._plan.segment_bytes
        files = _empty_files()
        files.make_dirs(f"{FOLDER}/{LOG_FOLDER}")
        files.make_dirs(f"{FOLDER}/{ROWS_FOLDER}")
        before = log.first_index - 1
        segments: dict[int, list[Entry]] = {}
        for index in range(log.first_index, log.last_index + 1):
            entry = log.peek(index)
            assert entry is not None
            segments.setdefault(entry.position // segment_bytes * segment_bytes, []).append(entry)
        if before:
            term, crc = log.term_at(before), log.head_crc_at(before)
            assert term is not None and crc is not None
            # A trimmed log begins with a segment; where the last one went as well, with the next.
            position = min(segments, default=-(-log.position_end // segment_bytes) * segment_bytes)
            write_base(files, FOLDER, BaseRecord(before, term, crc, position))
        for base, entries in segments.items():
            image = bytearray(segment_bytes)
            for entry in entries:
                frame = self._damaged(entry) if entry.index in log.bad else entry.frame
                image[entry.position - base : entry.position - base + len(frame)] = frame
            files.open(f"{FOLDER}/{LOG_FOLDER}/{segment_name(base)}", create=True).pwrite(image, 0)
            rows = b"".join(row_of(entry) for entry in entries if entry.index <= self.rows)
            files.open(f"{FOLDER}/{ROWS_FOLDER}/{segment_name(base)}", create=True).pwrite(rows, 0)
        if self.is_suspect:
            add_suspects(files, FOLDER, segments)
        return files

    def _damaged(self, entry: Entry) -> bytes:
        """How a damaged entry reads: the same at each look."""
        rng = stream(self._plan.seed, f"wound/{self._name}/{entry.index}/{entry.head_crc}")
        frame = bytearray(entry.frame)
        how = rng.randrange(3)
        if how == 0:
            return bytes(len(frame))
        if how == 1:
            torn = rng.randrange(len(frame))
            frame[torn:] = bytes(len(frame) - torn)
        if bytes(frame) == entry.frame:  # a bit turns; also where a torn end was all zeros before
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        return bytes(frame)


def _empty_files() -> Files:
    time = VirtualTime(lambda: None)
    agenda = Agenda(time)
    disk = Disk("store", stream(0, "store"))
    machine = Machine("store", "10.0.0.1", 0, time, agenda, NodeClock(time), disk)
    return Process(machine, Network(0, agenda, lambda: 0.0, lambda name, data: None)).env.files
