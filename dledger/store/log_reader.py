"""The reading half of an open log: entries by index for the core and the peers, bytes by position for the broker."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import trio

from dledger.core.types import Entry, EntryType
from dledger.errors import LogDamaged
from dledger.store.faults import EntryDamaged, FaultyRange, add_suspects
from dledger.store.manifest import Manifest, SegmentInfo, SegmentSpan
from dledger.store.options import StoreOptions
from dledger.store.recovery import RecoveredLog
from dledger.store.rows import ROW_BYTES, Row, marked_rows, row_of, suppress_disk_full, unpack_row
from dledger.store.segments import Segment, read_around
from dledger.store.verify import CHUNK_BYTES, chunks_of, is_verified, verify_chunks
from runtime.model import Env

SCRUB_EVERY_SECONDS = 24 * 3600.0
WATCH_EVERY_SECONDS = 60.0
CHUNKS_ON_LOOP_MAX = 2
"""So many chunks are verified on the spot; that takes a few milliseconds where the page cache has them."""
_WALK_BYTES = 1 << 20


class LogReader:
    """What an open log holds. `LogStore` adds to it."""

    def __init__(
        self, env: Env, folder: str, segment_bytes: int, recovered: RecoveredLog, options: StoreOptions
    ) -> None:
        self._env = env
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._options = options
        self.faults = recovered.faults
        """Ranges that recovery found damaged: nothing of them is readable. A log with faults must not be served."""
        self.damage: EntryDamaged | None = None
        """The last damage met while reading or scrubbing, also where the reader swallowed the error."""
        self.scrubbed_chunks = 0
        self._base = recovered.base
        self._segments = recovered.segments
        self._spare: Segment | None = None
        if len(self._segments) > 1 and not self._segments[-1].first_index:
            self._spare = self._segments.pop()
        self._by_base = {segment.base: segment for segment in self._segments}
        self.first_index = recovered.base.index + 1
        self.first_position = self._segments[0].base
        self.last_index = recovered.last.index
        self.last_term = recovered.last.term
        """Term of the last *stored* entry and nothing else (dledger#52)."""
        self.last_head_crc = recovered.last.head_crc
        self.position_end = recovered.last.end
        self.written_index = self.last_index
        self._recovered_last = self.last_index
        self._configs: dict[int, bytes] = {}  # CONFIG entries accepted since the start
        self._recent: dict[int, Entry] = {}
        self._rows: dict[int, bytes] = {}  # of entries that are not known to be durable yet, by index, ascending

    # What the core asks (dledger.core.log.LogView).

    def term_at(self, index: int) -> int | None:
        """Term of an entry, also of the trimmed one before the first (0 at index 0); else None. Raises LogDamaged."""
        entry = self._recent.get(index)
        if entry is not None:
            return entry.term
        if index == self.last_index:
            return self.last_term
        if index == self._base.index:
            return self._base.term
        return self._row(index).term if self.first_index <= index < self.last_index else None

    def head_crc_at(self, index: int) -> int | None:
        """Chain checksum of the same entries; 0 at index 0; else None. Raises LogDamaged."""
        entry = self._recent.get(index)
        if entry is not None:
            return entry.head_crc
        if index == self.last_index:
            return self.last_head_crc
        if index == self._base.index:
            return self._base.head_crc
        return self._row(index).head_crc if self.first_index <= index < self.last_index else None

    def position_of(self, index: int) -> int | None:
        """Where a retained entry begins; None outside of the log. Raises LogDamaged."""
        entry = self._recent.get(index)
        if entry is not None:
            return entry.position
        return self._row(index).position if self.first_index <= index <= self.last_index else None

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
        return self._segments[self._number_of(index)]

    def _refuse_faulty(self, index: int) -> None:
        for fault in self.faults:
            if fault.first_index <= index <= (fault.last_index or index):
                raise EntryDamaged(fault)

    def _row(self, index: int) -> Row:
        self._refuse_faulty(index)
        pending = self._rows.get(index)
        row = unpack_row(pending) if pending is not None else self._segment_of(index).row(index)
        return row if row is not None else self._find_row(index)

    def _find_row(self, index: int) -> Row:
        """Walk a segment for an entry whose side row is damaged, and write the row again."""
        segment = self._segment_of(index)
        position = segment.base
        try:
            while True:
                # To the segment's end: where the log ends may be what that row was to tell.
                for entry in segment.read_frames(position, segment.end, _WALK_BYTES):
                    if entry.index == index:
                        with suppress_disk_full():
                            segment.write_rows(index, row_of(entry))
                        return Row(index, entry.term, entry.position, len(entry.frame), entry.head_crc)
                    position = entry.end
        except LogDamaged as error:
            fault = FaultyRange(index, index, position, None, 0, None, str(error))
            raise self._met(EntryDamaged(fault), segment) from error

    def _read_entries(self, from_index: int, max_bytes: int) -> Sequence[Entry]:
        row = self._row(from_index)
        segment = self._segment_of(from_index)
        try:
            entries = segment.read_frames(row.position, self.end_of(self.written_index), max_bytes)
            crc = row.head_crc
            for index, entry in enumerate(entries, from_index):
                if entry.index != index or (entry.prev_crc if index > from_index else entry.head_crc) != crc:
                    raise LogDamaged(f"entry {entry.index} at {entry.position}, where entry {index} should be")
                crc = entry.head_crc
        except LogDamaged as error:
            fault = FaultyRange(from_index, from_index, row.position, row.end, 0, row.head_crc, str(error))
            raise self._met(EntryDamaged(fault), segment) from error
        return entries

    def config_entries(self, after_index: int) -> list[tuple[int, bytes]]:
        """(index, body) of the CONFIG entries behind `after_index`, ascending. Raises LogDamaged.

        Those from before the start are found by a mark in their side rows, so ask with the checkpoint's index. Blocks
        for as long as reading the side rows behind it takes.
        """
        found = {index: body for index, body in self._configs.items() if index > after_index}
        index = max(after_index + 1, self.first_index)
        while index <= self._recovered_last:
            self._refuse_faulty(index)
            number = self._number_of(index)
            segment = self._segments[number]
            stop = self._last_of(number, self._recovered_last)
            data, _ = read_around(
                segment.rows, (stop + 1 - index) * ROW_BYTES, (index - segment.first_index) * ROW_BYTES
            )
            is_whole = len(data) == (stop + 1 - index) * ROW_BYTES and _agree(data, index, segment.known)
            marked = marked_rows(data, index) if is_whole else None
            for each in range(index, stop + 1) if marked is None else marked:
                entry = self.entries(each, 1)[0]
                if entry.type == EntryType.CONFIG:
                    found[each] = bytes(entry.body)
            index = stop + 1
        return sorted(found.items())

    def manifest(self) -> Manifest:
        """The closed segments there are, for a peer's catch-up. Raises LogDamaged."""
        segments: list[SegmentInfo] = []
        for span in self.closed_segments():
            crc = self.head_crc_at(span.last_index)
            assert crc is not None
            end = self.end_of(span.last_index)
            segments.append(SegmentInfo(span.base, span.first_index, span.last_index, end, crc))
        return Manifest(self._base, self._segment_bytes, tuple(segments))

    def closed_segments(self) -> tuple[SegmentSpan, ...]:
        """Ascending. Unlike the manifest it reads nothing from the disk."""
        return tuple(
            SegmentSpan(segment.base, segment.first_index, self._last_of(number, self.written_index))
            for number, segment in enumerate(self._segments[:-1])
        )

    def _number_of(self, index: int) -> int:
        beyond = self.last_index + 1
        return max(0, bisect_right(self._segments, index, key=lambda segment: segment.first_index or beyond) - 1)

    def _last_of(self, number: int, last: int) -> int:
        """Last entry of a segment by its number, or `last` where that comes first."""
        following = self._segments[number + 1].first_index if number + 1 < len(self._segments) else 0
        return min(last, following - 1) if following else last

    # Reading by position. What was not walked at start is verified before any of it is shown.

    def read(self, position: int, nbytes: int) -> memoryview | None:
        """A slice of the map; None where no segment holds all of it, or where so much has yet to be verified that it
        belongs into a thread (`read_in_thread`). Raises EntryDamaged.
        """
        offset = position % self._segment_bytes
        segment = self._by_base.get(position - offset)
        if segment is None or offset + nbytes > self._segment_bytes:
            return None
        if segment.unverified is not None and not self._verify_few(segment, offset, nbytes):
            return None
        if not segment.is_whole:
            raise self._truncated(segment)
        return segment.view[offset : offset + nbytes]

    def read_cached(self, position: int, nbytes: int) -> bytes | None:
        """A copy of what `read` shows, or None where it would have to come from the disk or be verified first. Raises
        EntryDamaged."""
        offset = position % self._segment_bytes
        segment = self._by_base.get(position - offset)
        if segment is None or offset + nbytes > self._segment_bytes:
            return None
        if segment.unverified is not None and not is_verified(segment, *chunks_of(offset, nbytes)):
            return None
        data = segment.file.pread_nowait(nbytes, offset)
        if data is not None and len(data) < nbytes:
            raise self._truncated(segment)
        return data

    async def read_in_thread(self, position: int, nbytes: int) -> bytes | None:
        """As `read`, without a page fault on the loop. Checkpoint. Raises EntryDamaged."""
        offset = position % self._segment_bytes
        segment = self._by_base.get(position - offset)
        if segment is None or offset + nbytes > self._segment_bytes:
            await trio.lowlevel.checkpoint()
            return None
        segment.enter()
        try:
            if segment.unverified is not None:
                await self._verify_in_thread(segment, *chunks_of(offset, nbytes))
            data = await segment.file.pread_in_thread(nbytes, offset)
            if len(data) < nbytes:
                raise self._truncated(segment)
            return data
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise self._met(self._damage_of(segment, f"unreadable: {error}"), segment) from error
        finally:
            segment.leave()

    async def scrub(self, bytes_per_second: int) -> None:
        """Verify the closed segments and their names, again and again, once a day. Runs until cancelled. Raises
        EntryDamaged."""
        clock = self._env.clock
        while True:
            started = clock.monotonic()
            await self.check_files()  # what is read below is read by descriptor: a removed file would look whole
            for base in [segment.base for segment in self._segments[:-1]]:
                for chunk in range(-(-self._segment_bytes // CHUNK_BYTES)):
                    segment = self._by_base.get(base)
                    if segment is None or segment is self._segments[-1]:
                        break  # trimmed or cut meanwhile
                    if self._options.advise:
                        segment.file.advise("willneed", chunk * CHUNK_BYTES, 2 * CHUNK_BYTES)
                    segment.enter()
                    try:
                        await self._verify_in_thread(segment, chunk, chunk)
                    finally:
                        segment.leave()
                    self.scrubbed_chunks += 1
                    await clock.sleep(CHUNK_BYTES / bytes_per_second)
            await clock.sleep_until(started + SCRUB_EVERY_SECONDS)

    async def watch_files(self) -> None:
        """`check_files`, once a minute. Runs until cancelled."""
        while True:
            await self._env.clock.sleep(WATCH_EVERY_SECONDS)
            await self.check_files()

    async def check_files(self) -> None:
        """Look whether the log's files are the ones that were opened, and have their sizes: in a thread, some
        microseconds a segment. Checkpoint. Raises EntryDamaged where somebody has removed, replaced or truncated one:
        the next start would find it so. A spare segment is just made anew.
        """
        segments = [*self._segments, *([self._spare] if self._spare is not None else [])]
        for segment in segments:
            segment.enter()
        try:
            displaced: dict[int, str] = await self._env.run_in_thread(self._displaced, segments)
        finally:
            for segment in segments:
                segment.leave()
        for number, reason in displaced.items():
            segment = segments[number]
            if segment is self._spare:
                self._spare = None
                segment.retire()
            elif self._by_base.get(segment.base) is segment:  # else it was trimmed or cut meanwhile
                raise self._met(self._damage_of(segment, reason), segment)

    def _displaced(self, segments: Sequence[Segment]) -> dict[int, str]:
        found = ((number, segment.displacement(self._folder)) for number, segment in enumerate(segments))
        return {number: reason for number, reason in found if reason}

    def _truncated(self, segment: Segment) -> EntryDamaged:
        return self._met(self._damage_of(segment, f"{segment.file.path} was truncated"), segment)

    def _damage_of(self, segment: Segment, reason: str) -> EntryDamaged:
        """To a whole segment: where it begins is all that is known."""
        return EntryDamaged(
            FaultyRange(segment.first_index or self.last_index + 1, None, segment.base, None, 0, None, reason)
        )

    def _verify_few(self, segment: Segment, offset: int, nbytes: int) -> bool:
        first, last = chunks_of(offset, nbytes)
        if is_verified(segment, first, last):
            return True
        if last - first >= CHUNKS_ON_LOOP_MAX:
            return False
        self._verify(segment, first, last, self._end_in(segment))
        return True

    async def _verify_in_thread(self, segment: Segment, first: int, last: int) -> None:
        await self._env.run_in_thread(self._verify, segment, first, last, self._end_in(segment))

    def _end_in(self, segment: Segment) -> int:
        return self.end_of(self._last_of(self._segments.index(segment), self.written_index))

    def _verify(self, segment: Segment, first: int, last: int, end: int) -> None:
        try:
            verify_chunks(segment, first, last, end)
        except EntryDamaged as error:
            raise self._met(error, segment) from None

    def _met(self, error: EntryDamaged, segment: Segment) -> EntryDamaged:
        """Take note of damage, so that the next recovery looks for it, whatever becomes of the error."""
        self.damage = error
        try:
            add_suspects(self._env.files, self._folder, [segment.base])
        except OSError:
            return error  # then the recovery finds no more than the next read does
        return error


def _agree(rows: bytes, first_index: int, known: Mapping[int, bytes] | None) -> bool:
    """Whether side rows, of entries from `first_index` on, are the log's: those of intact entries show it."""
    for index, row in (known or {}).items():
        start = (index - first_index) * ROW_BYTES
        if 0 <= start < len(rows) and rows[start : start + ROW_BYTES] != row:
            return False
    return True
