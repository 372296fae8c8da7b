"""Putting a peer's entries where this node's are damaged, or giving up a damaged end (raft.md 4.6).

Nothing is trusted but the chain: entries are taken only when they lead from the last intact entry before the range to
the first one behind it, checksum by checksum. Every segment touched is written anew beside the old one and renamed
over it, so a crash leaves the damage or the repair; the next recovery walks it frame by frame and completes its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from dledger.core.types import BadFrame, Entry, next_position, parse_entry
from dledger.errors import LogDamaged, StoreFailed
from dledger.store.failure import mark_failed
from dledger.store.faults import FaultyRange, add_suspects
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER
from dledger.store.meta import MetaFile
from dledger.store.quarantine import keep_aside
from dledger.store.rows import ROW_BYTES, Row, read_rows, row_of
from dledger.store.segments import (
    last_row_at,
    open_segment,
    read_around,
    remove_segments,
    row_bases,
    segment_bases,
    segment_name,
)
from runtime.model import Env, File, Files

_CHUNK = 1 << 20


def write_repair(files: Files, folder: str, segment_bytes: int, fault: FaultyRange, entries: Iterable[Entry]) -> None:
    """Replace a faulty range by `entries`, first to last, all of them. Blocks; run it in a thread.

    The log must be recovered again afterwards. Raises LogDamaged, with nothing changed, where the entries do not fit
    between the two ends of the range or the range has an open end; OSError where the disk does not take them.
    """
    if fault.end is None:
        raise LogDamaged(f"{fault}: nothing intact lies behind it, so no entries can be proven to belong there")
    repair = _Repair(files, folder, segment_bytes, fault)
    try:
        repair.add_all(entries)
        repair.install()
    finally:
        repair.close()


class _Repair:
    def __init__(self, files: Files, folder: str, segment_bytes: int, fault: FaultyRange) -> None:
        assert fault.end is not None
        self._files = files
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._fault = fault
        self._end = fault.end
        self._rows: dict[int, bytes] = {}
        last_base = (fault.end - 1) // segment_bytes * segment_bytes
        first_base = min(fault.position // segment_bytes * segment_bytes, last_base)
        self._new: dict[int, File] = {
            base: self._begin(base) for base in range(first_base, last_base + 1, segment_bytes)
        }

    def _path(self, base: int) -> str:
        return f"{self._folder}/{LOG_FOLDER}/{segment_name(base)}"

    def _range(self, base: int) -> tuple[int, int]:
        """The damaged offsets of a segment."""
        return max(self._fault.position - base, 0), min(self._end - base, self._segment_bytes)

    def _begin(self, base: int) -> File:
        """A copy of a segment with zeros in place of the damage."""
        path = self._path(base)
        new = self._files.open(f"{path}.repair", create=True)
        new.truncate(0)
        new.allocate(self._segment_bytes)
        new.truncate(self._segment_bytes)
        if self._files.exists(path):
            start, stop = self._range(base)
            old = self._files.open(path)
            try:
                for first, last in ((0, start), (stop, self._segment_bytes)):
                    for offset in range(first, last, _CHUNK):
                        data, _ = read_around(old, min(_CHUNK, last - offset), offset)
                        if data.strip(b"\0"):
                            new.pwrite(data, offset)
            finally:
                old.close()
        return new

    def add_all(self, entries: Iterable[Entry]) -> None:
        fault = self._fault
        wanted = count(fault.first_index)
        index, crc, end, term = fault.first_index - 1, fault.prev_crc, fault.position, 0
        for entry in entries:
            if entry.index != next(wanted) or entry.prev_crc != crc or entry.term < term:
                raise LogDamaged(f"{fault}: entry {entry.index} of term {entry.term} does not continue what is there")
            try:
                is_intact = parse_entry(entry.frame) == entry
            except BadFrame:
                is_intact = False
            if not is_intact or entry.position != next_position(end, len(entry.frame), self._segment_bytes):
                raise LogDamaged(f"{fault}: entry {entry.index} is not intact or lies elsewhere")
            if entry.end > self._end:
                break
            base = entry.position - entry.position % self._segment_bytes
            self._new[base].pwrite(entry.frame, entry.position - base)
            self._rows[entry.index] = row_of(entry)
            index, crc, end, term = entry.index, entry.head_crc, entry.end, entry.term
        if index != fault.last_index or crc != fault.next_crc:
            raise LogDamaged(f"{fault}: the entries up to {index} do not lead to the one behind the range")

    def install(self) -> None:
        files, folder = self._files, self._folder
        add_suspects(files, folder, self._new)
        for base, new in self._new.items():
            new.sync_now()
            if files.exists(self._path(base)):
                old = files.open(self._path(base))
                try:
                    keep_aside(files, folder, base, old, [self._range(base)])
                finally:
                    old.close()
        for base in self._new:
            self._drop_wrong_rows(base)
            files.rename(f"{self._path(base)}.repair", self._path(base))
        files.sync_dir(f"{folder}/{LOG_FOLDER}")

    def _drop_wrong_rows(self, base: int) -> None:
        """Side rows that tell of other entries than the proven ones would bring the damage back."""
        path = f"{self._folder}/{ROWS_FOLDER}/{segment_name(base)}"
        if not self._files.exists(path):
            return
        file = self._files.open(path)
        try:
            for index, (number, row) in read_rows(file).items():
                proven = self._rows.get(index)
                if proven is not None and file.pread(ROW_BYTES, number * ROW_BYTES)[: ROW_BYTES - 4] != proven[:-4]:
                    assert row.index == index
                    file.pwrite(bytes(ROW_BYTES), number * ROW_BYTES)
            file.sync_now()
        finally:
            file.close()

    def close(self) -> None:
        for base, new in self._new.items():
            new.close()
            if self._files.exists(f"{self._path(base)}.repair"):
                self._files.unlink(f"{self._path(base)}.repair")


def row_of_last(files: Files, folder: str, segment_bytes: int, fault: FaultyRange) -> Row | None:
    """The side row of the last entry that a range with an open end is known to have held; None where it is lost, too.

    A row is written when its entry is on stable storage, and has the entry's own checksum: entries that lead from
    the front of the range to that checksum are, byte for byte, those that were there. Blocks. Raises OSError.
    """
    for base in row_bases(files, folder):
        row = last_row_at(files, folder, base)
        if row is not None and row.index == fault.last_index and base <= row.position < base + segment_bytes:
            return row
    return None


async def drop_open_fault(env: Env, folder: str, segment_bytes: int, meta: MetaFile, fault: FaultyRange) -> None:
    """Cut the log where a range begins, so that ordinary replication brings the entries again. Checkpoint.

    For an open end: the caller has first made the node *recovering*, on stable storage, for it forgets entries it may
    have acknowledged. For any range of which it is certain that its entries were never committed. The evidence goes
    first, so that a crash in between leaves a torn tail. The log must be recovered again. Raises StoreFailed.
    """
    if meta.durable_mark >= fault.first_index:
        await meta.save_mark(fault.first_index - 1)
    try:
        await env.run_in_thread(_drop, env.files, folder, segment_bytes, fault)
    except OSError as error:
        text = f"cutting the damaged end of the log in {folder} failed: {error}"
        mark_failed(env.files, folder, text)
        raise StoreFailed(text) from error


def _drop(files: Files, folder: str, segment_bytes: int, fault: FaultyRange) -> None:
    base = fault.position - fault.position % segment_bytes
    later = sorted({each for each in (*segment_bases(files, folder), *row_bases(files, folder)) if each > base})
    for each in reversed(later):
        if files.exists(f"{folder}/{LOG_FOLDER}/{segment_name(each)}"):
            segment = open_segment(files, folder, each, segment_bytes)
            try:
                keep_aside(files, folder, each, segment.file, [(0, segment_bytes)])
            finally:
                segment.close()
    remove_segments(files, folder, later)
    for each in row_bases(files, folder):
        last = last_row_at(files, folder, each) if each < base else None
        if last is not None and last.index >= fault.first_index:
            _drop_rows(files, folder, each, fault.first_index)
    if base not in segment_bases(files, folder):
        if base in row_bases(files, folder):
            remove_segments(files, folder, [base])
        return
    segment = open_segment(files, folder, base, segment_bytes)
    try:
        start = fault.position - base
        keep_aside(files, folder, base, segment.file, [(start, segment_bytes)])
        dropped = [number for index, (number, _) in read_rows(segment.rows).items() if index >= fault.first_index]
        if dropped or start == 0:
            segment.rows.truncate(min(dropped, default=0) * ROW_BYTES if start else 0)
            segment.rows.sync_now()
        segment.zero(start, segment_bytes)
        segment.file.sync_now()
    finally:
        segment.close()


def _drop_rows(files: Files, folder: str, base: int, from_index: int) -> None:
    """Entries that once were there, shorter than those a repair put in their place, may have ended in an earlier
    segment: its side rows would tell of them again and again."""
    file = files.open(f"{folder}/{ROWS_FOLDER}/{segment_name(base)}")
    try:
        file.truncate(min(number for index, (number, _) in read_rows(file).items() if index >= from_index) * ROW_BYTES)
        file.sync_now()
    finally:
        file.close()
