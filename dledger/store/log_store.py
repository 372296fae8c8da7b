"""The log of one node: append, cut, sync and read entries, by index and by position.

Appends touch the page cache only, on the loop: one pwrite for the frames of a message. Whatever waits for the disk is
awaitable. What the core sees (`LogView`) changes at `accept` and `cut`; `written` and `durable` follow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePosixPath

import trio

from dledger.core.types import Entry
from dledger.errors import LogDamaged, StoreFailed
from dledger.store.faults import EntryDamaged
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER, Format, read_format, write_format
from dledger.store.manifest import Manifest
from dledger.store.meta import MetaFile, format_meta
from dledger.store.options import StoreOptions
from dledger.store.recovery import RecoveredLog, recover_log
from dledger.store.rows import DISK_FULL, ROW_BYTES, Row, row_of, suppress_disk_full, unpack_row
from dledger.store.segments import Segment, create_segment, remove_segments, segment_bases
from runtime.model import Env

RECENT_BYTES_MAX = 16 * 1024 * 1024
RECENT_ENTRIES_MAX = 4096
_WALK_BYTES = 1 << 20


def format_folder(env: Env, folder: str, identity: Format) -> None:
    """Make an empty folder this node's. Blocks; for start-up. May be repeated after a crash in between."""
    files = env.files
    for sub in (folder, f"{folder}/{LOG_FOLDER}", f"{folder}/{ROWS_FOLDER}"):
        files.make_dirs(sub)
    format_meta(files, folder, identity)
    files.sync_dir(folder)
    for above in PurePosixPath(folder).parents:
        # New folders on the way are names too: losing one with the power would forget the votes below it.
        with suppress(OSError):  # of the system's own folders some cannot be opened, or synced
            files.sync_dir(str(above))
    write_format(files, folder, identity)


def is_blank(env: Env, folder: str) -> bool:
    """Whether a folder holds neither a format nor any part of a log."""
    return read_format(env.files, folder) is None and not segment_bases(env.files, folder)


class LogStore:
    """An open log. One task accepts, writes and cuts; anything may read between two awaits.

    `accept` puts entries into the log as the core sees it; `write` puts them into the page cache, or leaves them for
    the next `write` while the next segment is not there yet (`needs_spare`). Nothing here creates a file on the loop.
    """

    def __init__(self, env: Env, folder: str, segment_bytes: int, meta: MetaFile, recovered: RecoveredLog) -> None:
        self._env = env
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._meta = meta
        self.faults = recovered.faults
        self._segments = recovered.segments
        self._spare: Segment | None = None
        if len(self._segments) > 1 and not self._segments[-1].first_index:
            self._spare = self._segments.pop()
        self._by_base = {segment.base: segment for segment in self._segments}
        self.first_index = max(1, self._segments[0].first_index)
        self.first_position = self._segments[0].base
        self.last_index = recovered.last.index
        self.last_term = recovered.last.term
        """Term of the last *stored* entry and nothing else (dledger#52)."""
        self.last_head_crc = recovered.last.head_crc
        self.position_end = recovered.last.end
        self.written_index = self.last_index
        self.durable_index = self.last_index
        self._is_write_full = False
        self._is_spare_full = False
        self._recent: dict[int, Entry] = {}
        self._recent_bytes = 0
        self._recent_first = self.last_index + 1
        self._unwritten: list[Entry] = []
        self._rows: dict[int, bytes] = {}  # of entries that are not known to be durable yet, by index, ascending
        self._dirty: list[Segment] = []
        self._disk = trio.Lock()  # a sync must not run on a file that a cut removes
        self._creating = trio.Lock()

    @classmethod
    async def open(
        cls, env: Env, folder: str, segment_bytes: int, meta: MetaFile, options: StoreOptions | None = None
    ) -> tuple[LogStore, RecoveredLog]:
        """Recover the log in a thread. Checkpoint. Raises LogDamaged, or OSError where the folder cannot be used."""
        recovered: RecoveredLog = await env.run_in_thread(
            recover_log, env.files, folder, segment_bytes, meta.saved.durable_index
        )
        if not recovered.segments:
            first = await env.run_in_thread(create_segment, env.files, folder, 0, segment_bytes)
            recovered.segments.append(first)
        return cls(env, folder, segment_bytes, meta, recovered), recovered

    # What the core asks (dledger.core.log.LogView).

    def term_at(self, index: int) -> int | None:
        """Term of an entry; 0 at index 0; None outside of the log. Raises LogDamaged."""
        entry = self._recent.get(index)
        if entry is not None:
            return entry.term
        if index == self.last_index:
            return self.last_term
        if index == 0:
            return 0
        return self._row(index).term if self.first_index <= index < self.last_index else None

    def head_crc_at(self, index: int) -> int | None:
        """Chain checksum of an entry; 0 at index 0; None outside of the log. Raises LogDamaged."""
        entry = self._recent.get(index)
        if entry is not None:
            return entry.head_crc
        if index == self.last_index:
            return self.last_head_crc
        if index == 0:
            return 0
        return self._row(index).head_crc if self.first_index <= index < self.last_index else None

    def position_of(self, index: int) -> int | None:
        """Where a retained entry begins; None outside of the log. Raises LogDamaged."""
        entry = self._recent.get(index)
        if entry is not None:
            return entry.position
        return self._row(index).position if self.first_index <= index <= self.last_index else None

    def config_entries(self, after_index: int) -> list[tuple[int, bytes]]:
        """(index, body) of the CONFIG entries behind `after_index`, ascending. Raises LogDamaged."""
        raise NotImplementedError

    def manifest(self) -> Manifest:
        """The closed segments there are, for a peer's catch-up. Raises LogDamaged."""
        raise NotImplementedError

    async def read_chunk(self, base: int, offset: int, nbytes: int) -> bytes:
        """Verified bytes of a closed segment, in a thread. Checkpoint. Raises LogDamaged, KeyError for a segment that
        is not there (any more)."""
        raise NotImplementedError

    async def trim(self, position: int) -> None:
        """Remove whole closed segments that end at or before `position`. Checkpoint. Raises StoreFailed (final)."""
        raise NotImplementedError

    @property
    def is_slow(self) -> bool:
        """A write took longer than 50 ms lately: `write_in_thread` is to be used instead of `write`."""
        return False

    async def write_in_thread(self) -> int:
        """As `write`, off the loop; `write` does nothing meanwhile. Checkpoint."""
        raise NotImplementedError

    async def scrub(self, bytes_per_second: int) -> None:
        """Verify the closed segments, again and again, once a day. Runs until cancelled. Raises EntryDamaged."""
        raise NotImplementedError

    def is_recent(self, index: int) -> bool:
        """Whether `entries` finds this one in memory."""
        return index in self._recent

    def entries(self, from_index: int, max_bytes: int) -> Sequence[Entry]:
        """Entries from `from_index` on, at least one where it exists, else no more than `max_bytes` of frames.

        Verified when they come from the disk: raises LogDamaged.
        """
        recent = self._recent
        entry = recent.get(from_index)
        if entry is None:
            if not self.first_index <= from_index <= self.written_index:
                return ()
            return self._read_entries(from_index, max_bytes)
        taken = [entry]
        size = len(entry.frame)
        index = from_index + 1
        while (entry := recent.get(index)) is not None:
            size += len(entry.frame)
            if size > max_bytes:
                break
            taken.append(entry)
            index += 1
        return taken

    def end_of(self, index: int) -> int:
        """Position behind an entry; the log's start for the index before the first."""
        if index == self.last_index:
            return self.position_end
        if index < self.first_index:
            return self.first_position
        entry = self._recent.get(index)
        return entry.end if entry is not None else self._row(index).end

    def _segment_of(self, index: int) -> Segment:
        beyond = self.last_index + 1
        number = bisect_right(self._segments, index, key=lambda segment: segment.first_index or beyond)
        return self._segments[max(0, number - 1)]

    def _row(self, index: int) -> Row:
        for fault in self.faults:
            if fault.first_index <= index <= (fault.last_index or index):
                raise EntryDamaged(fault)
        pending = self._rows.get(index)
        row = unpack_row(pending) if pending is not None else self._segment_of(index).row(index)
        return row if row is not None else self._find_row(index)

    def _find_row(self, index: int) -> Row:
        """Walk a segment for an entry whose side row is damaged, and write the row again."""
        segment = self._segment_of(index)
        position = segment.base
        while True:
            # To the segment's end: where the log ends may be what that row was to tell.
            for entry in segment.read_frames(position, segment.end, _WALK_BYTES):
                if entry.index == index:
                    with suppress_disk_full():
                        segment.write_rows(index, row_of(entry))
                    return Row(index, entry.term, entry.position, len(entry.frame), entry.head_crc)
                position = entry.end

    def _read_entries(self, from_index: int, max_bytes: int) -> Sequence[Entry]:
        position = self._row(from_index).position
        entries = self._segment_of(from_index).read_frames(position, self.end_of(self.written_index), max_bytes)
        for index, entry in enumerate(entries, from_index):
            if entry.index != index:
                raise LogDamaged(f"entry {entry.index} at position {entry.position}, where entry {index} should be")
        return entries

    # Writing.

    def accept(self, entries: Sequence[Entry]) -> None:
        """Put entries behind the last one. They count as the log's from now on; `write` brings them to the file."""
        recent = self._recent
        rows = self._rows
        added = 0
        for entry in entries:
            index = entry.index
            recent[index] = entry
            rows[index] = row_of(entry)
            added += len(entry.frame)
        self._unwritten.extend(entries)
        last = entries[-1]
        self.last_index = last.index
        self.last_term = last.term
        self.last_head_crc = last.head_crc
        self.position_end = last.end
        self._recent_bytes += added

    def write(self) -> int:
        """Write what was accepted to the page cache, as far as there are segments for it; returns `written_index`.

        Raises StoreFailed (final). A full disk is no failure: `disk_full` is set and the rest stays accepted.
        """
        unwritten = self._unwritten
        while unwritten:
            segment = self._segments[-1]
            first = unwritten[0]
            if first.position >= segment.end:
                if self._spare is None or self._spare.base != first.position:
                    break
                segment = self._roll(self._spare)
            count = 1
            end = first.end
            for entry in unwritten[1:]:
                if entry.position != end or entry.end > segment.end:
                    break
                end = entry.end
                count += 1
            try:
                if count == 1:
                    segment.file.pwrite(first.frame, first.position - segment.base)
                else:
                    frames = [entry.frame for entry in unwritten[:count]]
                    segment.file.pwritev(frames, first.position - segment.base)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise StoreFailed(f"writing to {segment.file.path} failed: {error}") from error
                self._is_write_full = True
                break
            self._is_write_full = False
            if not segment.first_index:
                segment.first_index = first.index
            if not self._dirty or self._dirty[-1] is not segment:
                self._dirty.append(segment)
            self.written_index = unwritten[count - 1].index
            del unwritten[:count]
        if self._recent_bytes > RECENT_BYTES_MAX or len(self._recent) > RECENT_ENTRIES_MAX:
            self._forget_oldest()
        return self.written_index

    def _roll(self, spare: Segment) -> Segment:
        self._segments.append(spare)
        self._by_base[spare.base] = spare
        self._spare = None
        return spare

    def _forget_oldest(self) -> None:
        recent = self._recent
        index = self._recent_first
        while index < self.written_index and (
            self._recent_bytes > RECENT_BYTES_MAX or len(recent) > RECENT_ENTRIES_MAX
        ):
            self._recent_bytes -= len(recent.pop(index).frame)
            index += 1
        self._recent_first = index

    @property
    def unwritten(self) -> bool:
        """Whether accepted entries wait for a segment or for room."""
        return bool(self._unwritten)

    @property
    def unwritten_bytes(self) -> int:
        """Bytes of the log that are accepted and wait in memory."""
        return self.position_end - self.end_of(self.written_index) if self._unwritten else 0

    @property
    def disk_full(self) -> bool:
        """The last attempt to write, or to create the next segment, found no room. The next one that does clears it."""
        return self._is_write_full or self._is_spare_full

    @property
    def needs_spare(self) -> bool:
        return self._spare is None

    async def prepare_spare(self) -> None:
        """Create the next segment, in a thread. Checkpoint. Sets `disk_full` where there is no room for it.

        Raises StoreFailed (final).
        """
        async with self._creating:
            if self._spare is not None:
                return
            base = self._segments[-1].end
            try:
                self._spare = await self._env.run_in_thread(
                    create_segment, self._env.files, self._folder, base, self._segment_bytes
                )
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise StoreFailed(f"creating a segment in {self._folder} failed: {error}") from error
                self._is_spare_full = True
            else:
                self._is_spare_full = False

    @property
    def unsynced(self) -> bool:
        return self.durable_index < self.written_index

    async def sync(self) -> int:
        """Bring what is written to stable storage; returns `durable_index`. Checkpoint. Raises StoreFailed (final)."""
        async with self._disk:
            target = self.written_index
            dirty, self._dirty = self._dirty, []
            try:
                for segment in dirty:
                    await segment.file.sync()
                if target > self.durable_index:
                    self.durable_index = target
                self._flush_rows()
            except OSError as error:
                raise StoreFailed(f"sync of the log in {self._folder} failed: {error}") from error
            return self.durable_index

    def _flush_rows(self) -> None:
        """Write the side rows of durable entries. Later ones wait: a row is evidence."""
        rows = self._rows
        index = next(iter(rows), self.durable_index + 1)
        while index <= self.durable_index:
            segment = self._segment_of(index)
            number = self._segments.index(segment) + 1
            stop = self.durable_index
            if number < len(self._segments):
                stop = min(stop, self._segments[number].first_index - 1)
            try:
                segment.write_rows(index, b"".join([rows[each] for each in range(index, stop + 1)]))
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                return  # kept in memory; the log is what counts
            for each in range(index, stop + 1):
                del rows[each]
            index = stop + 1

    async def cut(self, from_index: int) -> None:
        """Remove `from_index` and everything behind it, on stable storage when this returns. Checkpoint.

        The evidence that these entries were durable goes first, so that a crash in between leaves a torn tail and not
        damage. What is removed is overwritten with zeros, so it never comes back. Raises StoreFailed (final).
        """
        async with self._creating, self._disk:
            old_end = self.position_end
            term, head_crc = self.term_at(from_index - 1), self.head_crc_at(from_index - 1)
            if from_index > self.last_index or term is None or head_crc is None:
                raise StoreFailed(
                    f"asked to cut entry {from_index} of a log that has {self.first_index} to {self.last_index}"
                )
            new_end = self.end_of(from_index - 1)
            for index in range(from_index, self.last_index + 1):
                dropped = self._recent.pop(index, None)
                if dropped is not None:
                    self._recent_bytes -= len(dropped.frame)
                self._rows.pop(index, None)
            self._unwritten = [entry for entry in self._unwritten if entry.index < from_index]
            self.last_index = from_index - 1
            self.last_term, self.last_head_crc, self.position_end = term, head_crc, new_end
            self._recent_first = min(self._recent_first, from_index)
            self.written_index = min(self.written_index, self.last_index)
            self.durable_index = min(self.durable_index, self.last_index)
            removed: list[Segment] = []
            # A segment without entries (rolled to, but nothing could be written yet) goes with what was to fill it.
            while len(self._segments) > 1 and not 0 < self._segments[-1].first_index < from_index:
                removed.append(self._segments.pop())
                del self._by_base[removed[-1].base]
            active = self._segments[-1]
            if removed and self._spare is not None:
                removed.insert(0, self._spare)
                self._spare = None
            if active.first_index >= from_index:
                active.first_index = 0
            self._dirty = [segment for segment in self._dirty if segment not in removed and segment is not active]
            if self._meta.durable_mark >= from_index:
                await self._meta.save_mark(self.last_index)
            try:
                await self._env.run_in_thread(self._cut_files, active, removed, new_end, old_end)
            except OSError as error:
                raise StoreFailed(f"cutting the log in {self._folder} failed: {error}") from error

    def _cut_files(self, active: Segment, removed: Sequence[Segment], new_end: int, old_end: int) -> None:
        files = self._env.files
        kept_rows = (self.last_index + 1 - active.first_index) * ROW_BYTES if active.first_index else 0
        if active.rows.size() > kept_rows:
            active.rows.truncate(kept_rows)
            active.rows.sync_now()
        if removed:
            remove_segments(files, self._folder, [segment.base for segment in removed])
            for segment in removed:
                segment.retire()
        active.zero(max(new_end - active.base, 0), min(old_end, active.end) - active.base)
        active.file.sync_now()

    # Reading by position.

    def read(self, position: int, nbytes: int) -> memoryview | None:
        """A slice of the map; None where no segment holds all of it."""
        offset = position % self._segment_bytes
        segment = self._by_base.get(position - offset)
        if segment is None or offset + nbytes > self._segment_bytes:
            return None
        return segment.view[offset : offset + nbytes]

    def read_cached(self, position: int, nbytes: int) -> bytes | None:
        """A copy of what `read` shows, or None where it would have to come from the disk."""
        offset = position % self._segment_bytes
        segment = self._by_base.get(position - offset)
        if segment is None or offset + nbytes > self._segment_bytes:
            return None
        return segment.file.pread_nowait(nbytes, offset)

    async def read_in_thread(self, position: int, nbytes: int) -> bytes | None:
        """As `read`, without a page fault on the loop. Checkpoint."""
        offset = position % self._segment_bytes
        segment = self._by_base.get(position - offset)
        if segment is None or offset + nbytes > self._segment_bytes:
            await trio.lowlevel.checkpoint()
            return None
        return await segment.file.pread_in_thread(nbytes, offset)

    async def close(self) -> None:
        """Sync everything, rows included, and close the files. Checkpoint. Raises StoreFailed."""
        await self.sync()
        try:
            for segment in self._segments[-2:]:
                await segment.rows.sync()
        except OSError as error:
            raise StoreFailed(f"sync of the side rows in {self._folder} failed: {error}") from error
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are, as a killed process would."""
        for segment in [*self._segments, *([self._spare] if self._spare is not None else [])]:
            segment.close()
