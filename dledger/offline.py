"""A log looked at while its node is stopped: what a start would find there, and the entries themselves.

Nothing is changed: the recovery that a start would run works on an overlay in memory. The folder's lock is held
meanwhile, so the node cannot be running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attrs import field, frozen

from dledger.core.types import Entry
from dledger.errors import FormatError, LogDamaged
from dledger.store.base import BaseRecord
from dledger.store.checkpoint import read_checkpoint
from dledger.store.failure import is_cache_kept
from dledger.store.faults import FaultyRange, add_suspects
from dledger.store.format import FORMAT_FILE, Format, read_format
from dledger.store.meta import Meta, MetaFile
from dledger.store.recovery import RecoveredLog, recover_log
from dledger.store.segments import Segment, segment_bases
from runtime.model import Env, Files
from runtime.overlay import OverlayFiles

READ_BYTES = 1 << 20


@frozen(kw_only=True)
class SegmentReport:
    """One segment file. `used_bytes` ends behind its last intact entry."""

    base: int
    first_index: int
    last_index: int
    entries: int
    used_bytes: int


@frozen(kw_only=True)
class TermReport:
    """A run of entries of one term."""

    term: int
    first_index: int
    entries: int
    nbytes: int


@frozen(kw_only=True)
class OfflineLog:
    """What a start would find. Indexes are of entries, positions bytes of the log."""

    folder: str
    identity: Format
    meta: Meta
    base: BaseRecord
    """What retention removed before the first entry."""
    last_index: int
    last_term: int
    end_position: int
    commit_hint: int
    """Entries up to here are committed for certain."""
    faults: tuple[FaultyRange, ...]
    torn_bytes: int
    """Behind the last entry: writes that were never promised to anybody. A start cuts them."""
    checkpoint_index: int
    """Entry up to which the tables are saved; 0 without a checkpoint."""
    segments: tuple[Segment, ...] = field(repr=False)

    @property
    def first_index(self) -> int:
        return self.base.index + 1

    def entries(self, from_index: int = 1) -> Iterator[Entry]:
        """The intact entries from `from_index` on, verified; damaged ones are left out."""
        for number, segment in enumerate(self.segments):
            following = self.segments[number + 1].first_index if number + 1 < len(self.segments) else 0
            if segment.first_index and (not following or following > from_index):
                for entry in self._entries_of(segment):
                    if from_index <= entry.index <= self.last_index:
                        yield entry

    def _entries_of(self, segment: Segment) -> Iterator[Entry]:
        position, end = segment.base, min(self.end_position, segment.end)
        index = segment.first_index
        while position < end:
            try:
                entries = segment.read_frames(position, end, READ_BYTES)
            except LogDamaged:
                beyond = self._behind_damage(segment, position, index)
                if beyond is None:
                    return  # nothing but the zeros at a segment's end, or damage without an end
                position, index = beyond
                continue
            yield from entries
            position, index = entries[-1].end, entries[-1].index + 1

    def _behind_damage(self, segment: Segment, position: int, index: int) -> tuple[int, int] | None:
        """(position, index) of the next entry that may be intact, behind damage at `position`."""
        for fault in self.faults:
            if fault.end is not None and fault.last_index is not None and fault.end > position:
                return fault.end, fault.last_index + 1
        row = segment.row(index + 1)
        return None if row is None else (row.position, row.index)

    def segment_reports(self) -> list[SegmentReport]:
        """Reads the whole log."""
        reports = []
        for segment in self.segments:
            first = last = count = 0
            end = segment.base
            for entry in self._entries_of(segment):
                first, last, end = first or entry.index, entry.index, entry.end
                count += 1
            reports.append(
                SegmentReport(
                    base=segment.base, first_index=first, last_index=last, entries=count, used_bytes=end - segment.base
                )
            )
        return reports

    def term_reports(self) -> list[TermReport]:
        """Reads the whole log."""
        runs: list[list[int]] = []
        for entry in self.entries(self.first_index):
            if not runs or runs[-1][0] != entry.term:
                runs.append([entry.term, entry.index, 0, 0])
            runs[-1][2] += 1
            runs[-1][3] += len(entry.frame)
        return [TermReport(term=t, first_index=first, entries=count, nbytes=n) for t, first, count, n in runs]


def find_log_folder(files: Files, folder: str) -> str:
    """The raft folder in `folder`: itself, or the one inside a node's data folder. Raises FormatError."""
    for candidate in (folder, f"{folder}/raft"):
        if files.exists(f"{candidate}/{FORMAT_FILE}"):
            return candidate
    raise FormatError(f"{folder} is no data folder of a broker node: there is no {FORMAT_FILE} in it, nor in raft/")


@contextmanager
def open_offline(
    env: Env, folder: str, *, every_frame: bool = True, on_read: Callable[[int], None] | None = None
) -> Iterator[OfflineLog]:
    """Look at a stopped node's log. `every_frame`: read it all, instead of trusting complete segments as a start does.
    `on_read` is told how many bytes were read, each time.

    Blocks. Raises FormatError, MetaDamaged, LogDamaged or OSError with one sentence; Locked while the node runs.
    """
    folder = find_log_folder(env.files, folder)
    with env.files.lock(f"{folder}/lock"):
        overlay = OverlayFiles(env.files, on_read)
        try:
            identity = read_format(overlay, folder)
            assert identity is not None  # find_log_folder saw its file
            meta = MetaFile.open(overlay, folder, identity).saved
            if every_frame:
                add_suspects(overlay, folder, segment_bases(overlay, folder))
            recovered = recover_log(
                overlay,
                folder,
                identity.segment_bytes,
                meta.durable_index,
                is_cache_kept=is_cache_kept(overlay, folder, meta, env.ids.boot_id),
            )
            checkpoint = read_checkpoint(overlay, folder)
            yield _offline_log(folder, identity, meta, recovered, 0 if checkpoint is None else checkpoint.index)
        finally:
            overlay.close()


def _offline_log(
    folder: str, identity: Format, meta: Meta, recovered: RecoveredLog, checkpoint_index: int
) -> OfflineLog:
    return OfflineLog(
        folder=folder,
        identity=identity,
        meta=meta,
        base=recovered.base,
        last_index=recovered.last.index,
        last_term=recovered.last.term,
        end_position=recovered.last.end,
        commit_hint=recovered.commit_hint,
        faults=tuple(recovered.faults),
        torn_bytes=recovered.bytes_cut,
        checkpoint_index=checkpoint_index,
        segments=tuple(recovered.segments),
    )
