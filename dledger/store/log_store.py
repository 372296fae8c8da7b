"""The log of one node: append, cut, sync and read entries, by index and by position.

Appends touch the page cache only, on the loop: one pwrite for the frames of a message. Whatever waits for the disk is
awaitable. What the core sees (`LogView`) changes at `accept` and `cut`; `written` and `durable` follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePosixPath

import trio

from dledger.core.types import Entry, EntryType
from dledger.errors import StoreFailed
from dledger.store.base import BaseRecord, write_base
from dledger.store.failure import NOT_OPENED, clear_failed, forget_cached_pages, mark_failed
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER, Format, read_format, write_format
from dledger.store.log_reader import LogReader
from dledger.store.meta import MetaFile, format_meta
from dledger.store.options import StoreOptions
from dledger.store.recovery import RecoveredLog, recover_log
from dledger.store.rows import DISK_FULL, ROW_BYTES, row_of
from dledger.store.segments import Segment, create_segment, remove_segments, retire_all, segment_bases
from dledger.store.staging import complete_install
from runtime.model import Env, Files

SLOW_WRITE_SECONDS = 0.050
FAST_WRITES_TO_TRUST = 1000
RECENT_BYTES_MAX = 16 * 1024 * 1024
RECENT_ENTRIES_MAX = 4096


def format_folder(env: Env, folder: str, identity: Format, *, recovering: bool = False) -> None:
    """Make an empty folder this node's. Blocks; for start-up. May be repeated after a crash in between.

    `recovering`: of a node that may have voted before its folder was lost, from its first moment on (raft.md 4.6,
    nats-server#2792).
    """
    files = env.files
    for sub in (folder, f"{folder}/{LOG_FOLDER}", f"{folder}/{ROWS_FOLDER}"):
        files.make_dirs(sub)
    format_meta(files, folder, identity, recovering=recovering)
    files.sync_dir(folder)
    for above in PurePosixPath(folder).parents:
        # New folders on the way are names too: losing one with the power would forget the votes below it.
        with suppress(OSError):  # of the system's own folders some cannot be opened, or synced
            files.sync_dir(str(above))
    write_format(files, folder, identity)


def is_blank(env: Env, folder: str) -> bool:
    """Whether a folder holds neither a format nor any part of a log."""
    return read_format(env.files, folder) is None and not segment_bases(env.files, folder)


def _load(files: Files, folder: str, segment_bytes: int, durable_index: int, options: StoreOptions) -> RecoveredLog:
    """Recover, with at least one segment to write to."""
    complete_install(files, folder)
    forget_cached_pages(files, folder)
    try:
        recovered = recover_log(
            files,
            folder,
            segment_bytes,
            durable_index,
            hint_is_evidence=options.hint_is_evidence,
            is_cache_kept=options.is_cache_kept,
        )
    except OSError as error:
        if error.errno not in DISK_FULL | NOT_OPENED:
            # What it could not sync is clean now: the next one must not find it in memory.
            mark_failed(files, folder, f"recovering the log in {folder} failed: {error}")
        raise
    try:
        if not recovered.segments:
            first_base = recovered.base.first_base(segment_bytes)
            recovered.segments.append(create_segment(files, folder, first_base, segment_bytes))
        clear_failed(files, folder)
    except OSError:
        retire_all(recovered.segments)
        raise
    return recovered


class LogStore(LogReader):
    """An open log. One task accepts, writes and cuts; anything may read between two awaits.

    `accept` puts entries into the log as the core sees it; `write` puts them into the page cache, or leaves them for
    the next `write` while the next segment is not there yet (`needs_spare`). Nothing here creates a file on the loop.
    """

    def __init__(
        self,
        env: Env,
        folder: str,
        segment_bytes: int,
        meta: MetaFile,
        recovered: RecoveredLog,
        options: StoreOptions,
    ) -> None:
        super().__init__(env, folder, segment_bytes, recovered, options)
        self._monotonic = env.clock.monotonic
        self._meta = meta
        self.durable_index = self.last_index
        self._is_write_full = False
        self._is_spare_full = False
        self._recent_bytes = 0
        self._recent_first = self.last_index + 1
        self._unwritten: list[Entry] = []
        self._dirty: list[Segment] = []
        self._creating = trio.Lock()
        self._writing = trio.Lock()  # of writes in a thread
        self._disk = trio.Lock()  # a sync must not run on a file that a cut removes
        self.is_slow = False
        """A write took longer than 50 ms lately: `write_in_thread` is to be used instead of `write`."""
        self._fast_writes = 0
        self.last_write_seconds = 0.0

    @classmethod
    async def open(
        cls, env: Env, folder: str, segment_bytes: int, meta: MetaFile, options: StoreOptions | None = None
    ) -> tuple[LogStore, RecoveredLog]:
        """Recover the log in a thread. Checkpoint. Raises LogDamaged, or OSError where the folder cannot be used.

        Damage is no error here: it is in `RecoveredLog.faults`, and such a log may be read but not served.
        """
        options = options if options is not None else StoreOptions()
        recovered: RecoveredLog = await env.run_in_thread(
            _load, env.files, folder, segment_bytes, meta.saved.durable_index, options
        )
        return cls(env, folder, segment_bytes, meta, recovered, options), recovered

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
            if entry.type == EntryType.CONFIG:
                self._configs[index] = bytes(entry.body)
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

        Raises StoreFailed (final). A full disk is no failure: `disk_full` is set and the rest stays accepted. Does
        nothing while a `write_in_thread` is under way.
        """
        if self._writing.locked():
            return self.written_index
        clock = self._monotonic
        unwritten = self._unwritten
        while unwritten:
            first = unwritten[0]
            segment: Segment | None = self._segments[-1]
            try:
                if len(unwritten) == 1 and segment is not None and first.position < segment.end:
                    count = 1
                    started = clock()
                    segment.file.pwrite(first.frame, first.position - segment.base)
                else:
                    segment, parts, offset = self._next_write()
                    if segment is None:
                        break
                    count = len(parts)
                    started = clock()
                    if count == 1:
                        segment.file.pwrite(parts[0], offset)
                    else:
                        segment.file.pwritev(parts, offset)
            except OSError as error:
                self._write_failed(error)
                break
            self.last_write_seconds = took = clock() - started
            if took > SLOW_WRITE_SECONDS:
                self.is_slow, self._fast_writes = True, 0
            self._is_write_full = False
            if not segment.first_index:
                segment.first_index = first.index
            dirty = self._dirty
            if not dirty or dirty[-1] is not segment:
                dirty.append(segment)
            self.written_index = unwritten[count - 1].index
            del unwritten[:count]
        if self._recent_bytes > RECENT_BYTES_MAX or len(self._recent) > RECENT_ENTRIES_MAX:
            self._forget_oldest()
        return self.written_index

    async def write_in_thread(self) -> int:
        """As `write`, off the loop, for a disk that holds writes up. Checkpoint.

        After a thousand fast ones in a row `is_slow` is False again. No cut or trim happens meanwhile.
        """
        async with self._writing:
            while self._unwritten:
                segment, parts, offset = self._next_write()
                if segment is None:
                    break
                started = self._monotonic()
                try:
                    await self._env.run_in_thread(segment.file.pwritev, parts, offset)
                except OSError as error:
                    self._write_failed(error)
                    break
                took = self.last_write_seconds = self._monotonic() - started
                self._fast_writes = self._fast_writes + 1 if took <= SLOW_WRITE_SECONDS else 0
                if self._fast_writes >= FAST_WRITES_TO_TRUST:
                    self.is_slow, self._fast_writes = False, 0
                self._has_written(segment, len(parts))
            if self._recent_bytes > RECENT_BYTES_MAX or len(self._recent) > RECENT_ENTRIES_MAX:
                self._forget_oldest()
        await trio.lowlevel.checkpoint()
        return self.written_index

    def _next_write(self) -> tuple[Segment | None, list[bytes], int]:
        """The next frames that lie back to back in one segment; no segment where there is none for them yet."""
        unwritten = self._unwritten
        segment = self._segments[-1]
        first = unwritten[0]
        if first.position >= segment.end:
            if self._spare is None or self._spare.base != first.position:
                return None, [], 0
            segment = self._roll(self._spare)
        parts = [first.frame]
        end = first.end
        for entry in unwritten[1:]:
            if entry.position != end or entry.end > segment.end:  # a segment may end just where an entry does
                break
            parts.append(entry.frame)
            end = entry.end
        return segment, parts, first.position - segment.base

    def _has_written(self, segment: Segment, count: int) -> None:
        unwritten = self._unwritten
        self._is_write_full = False
        if not segment.first_index:
            segment.first_index = unwritten[0].index
        if not self._dirty or self._dirty[-1] is not segment:
            self._dirty.append(segment)
        self.written_index = unwritten[count - 1].index
        del unwritten[:count]

    def _write_failed(self, error: OSError) -> None:
        if error.errno not in DISK_FULL:
            raise self._failed(f"writing to the log in {self._folder} failed: {error}") from error
        self._is_write_full = True

    def _failed(self, text: str) -> StoreFailed:
        """Leave a mark: the page cache may hold what the disk does not, and the next start must not believe it."""
        mark_failed(self._env.files, self._folder, text)
        return StoreFailed(text)

    def _roll(self, spare: Segment) -> Segment:
        if self._options.mlock:
            self._segments[-1].file.unlock_pages()
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
                self._spare = await self._env.run_in_thread(self._create_spare, base)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise StoreFailed(f"creating a segment in {self._folder} failed: {error}") from error
                self._is_spare_full = True
            else:
                self._is_spare_full = False

    def _create_spare(self, base: int) -> Segment:
        spare = create_segment(self._env.files, self._folder, base, self._segment_bytes, warm=self._options.warm)
        if self._options.mlock:
            spare.file.lock_pages()
        return spare

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
                raise self._failed(f"sync of the log in {self._folder} failed: {error}") from error
            return self.durable_index

    def _flush_rows(self) -> None:
        """Write the side rows of durable entries. Later ones wait: a row is evidence."""
        rows = self._rows
        index = next(iter(rows), self.durable_index + 1)
        while index <= self.durable_index:
            segment = self._segment_of(index)
            stop = self._last_of(self._segments.index(segment), self.durable_index)
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
        async with self._creating, self._writing, self._disk:
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
                self._configs.pop(index, None)
            self._recovered_last = min(self._recovered_last, from_index - 1)
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
            try:
                if self._meta.durable_mark >= from_index:
                    await self._meta.save_mark(self.last_index)
                await self._env.run_in_thread(self._cut_files, active, removed, new_end, old_end)
            except OSError as error:
                raise self._failed(f"cutting the log in {self._folder} failed: {error}") from error
            finally:
                retire_all(removed)  # also when this is cancelled: nothing else knows of them any more

    def _cut_files(self, active: Segment, removed: Sequence[Segment], new_end: int, old_end: int) -> None:
        files = self._env.files
        kept_rows = (self.last_index + 1 - active.first_index) * ROW_BYTES if active.first_index else 0
        if active.rows.size() > kept_rows:
            active.rows.truncate(kept_rows)
            active.rows.sync_now()
        if removed:
            remove_segments(files, self._folder, [segment.base for segment in removed])
        active.zero(max(new_end - active.base, 0), min(old_end, active.end) - active.base)
        active.file.sync_now()

    async def trim(self, position: int) -> None:
        """Remove whole segments that end at or before `position`. Checkpoint. Raises StoreFailed (final).

        The active segment stays and so does the closed one before it: a cut may have to go back into it. What was
        before the new start is kept on stable storage first, so that the chain can still be compared there.
        """
        async with self._creating, self._writing, self._disk:
            count = sum(1 for segment in self._segments[:-2] if segment.end <= position)
            if not count:
                return
            last = self._segments[count].first_index - 1
            removed: list[Segment] = []
            try:
                base = await self._env.run_in_thread(self._base_at, last)
                await self._write_base(base)
                removed, self._segments[:count] = self._segments[:count], []
                self._base = base
                self.first_index = last + 1
                self.first_position = self._segments[0].base
                for segment in removed:
                    del self._by_base[segment.base]
                for index in [index for index in self._configs if index <= last]:
                    del self._configs[index]
                while self._recent_first <= last and self._recent_first in self._recent:
                    self._recent_bytes -= len(self._recent.pop(self._recent_first).frame)
                    self._recent_first += 1
                self._dirty = [segment for segment in self._dirty if segment not in removed]
                for index in [index for index in self._rows if index <= last]:
                    del self._rows[index]
                bases = [segment.base for segment in removed]
                await self._env.run_in_thread(remove_segments, self._env.files, self._folder, bases)
            except OSError as error:
                if error.errno in DISK_FULL and self._segments[0].first_index <= last:
                    return  # not even the record of what was before fits; nothing has changed, a later trim may do
                raise StoreFailed(f"trimming the log in {self._folder} failed: {error}") from error
            finally:
                retire_all(removed)  # also when this is cancelled: the next recovery removes the files

    async def _write_base(self, base: BaseRecord) -> None:
        """On a full disk the spare makes room: what is trimmed gives back more than that."""
        files, folder = self._env.files, self._folder
        try:
            await self._env.run_in_thread(write_base, files, folder, base)
        except OSError as error:
            if error.errno not in DISK_FULL or self._spare is None:
                raise
            spare, self._spare = self._spare, None
            spare.retire()
            await self._env.run_in_thread(remove_segments, files, folder, [spare.base])
            await self._env.run_in_thread(write_base, files, folder, base)

    def _base_at(self, index: int) -> BaseRecord:
        term, head_crc = self.term_at(index), self.head_crc_at(index)
        assert term is not None and head_crc is not None
        return BaseRecord(index, term, head_crc, self.end_of(index))

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
        """Close the files as they are, as a killed process would; those a thread reads from, when it has ended."""
        retire_all([*self._segments, *([self._spare] if self._spare is not None else [])])
