"""Segments: files of one fixed size, named by the position of their first byte, that hold frames back to back.

A segment is allocated in full before its first byte is written, so a full disk shows at allocation, and its length
never changes, so its map stays valid: a cut overwrites with zeros, deletion is unlink. Positions from `next_position`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from dledger.core.types import BODY_BYTES_MAX, HEADER_BYTES, BadFrame, Entry, parse_entry
from dledger.errors import LogDamaged
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER
from dledger.store.rows import DISK_FULL, ROW_BYTES, Row, last_row, read_row, unpack_row
from runtime.model import File, Files

NAME_DIGITS = 20
_CHUNK = 1 << 20
_PAGE = 4096
_ZEROS = bytes(_CHUNK)


def segment_name(base: int) -> str:
    return f"{base:0{NAME_DIGITS}d}"


def segment_bases(files: Files, folder: str) -> list[int]:
    """Start positions of the segment files there are, ascending."""
    names = files.listdir(f"{folder}/{LOG_FOLDER}")
    return sorted(int(name) for name in names if len(name) == NAME_DIGITS and name.isdigit())


def read_around(file: File, nbytes: int, offset: int) -> tuple[bytes, bool]:
    """As `pread`, with zeros for pages the disk does not give back, and whether there were none of those.

    Zeros are no frame, so what cannot be read counts as damaged and not as absent (raft.md 4.6).
    """
    try:
        return file.pread(nbytes, offset), True
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    parts: list[bytes] = []
    stop = min(offset + nbytes, file.size())
    while offset < stop:
        step = min(_PAGE - offset % _PAGE, stop - offset)
        try:
            parts.append(file.pread(step, offset))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            parts.append(bytes(step))
        offset += step
    return b"".join(parts), False


def row_bases(files: Files, folder: str) -> list[int]:
    """Start positions of the segments that have side rows, ascending."""
    names = files.listdir(f"{folder}/{ROWS_FOLDER}")
    return sorted(int(name) for name in names if len(name) == NAME_DIGITS and name.isdigit())


def last_row_at(files: Files, folder: str, base: int) -> Row | None:
    """The last readable side row of the segment that begins there, be it open or lost."""
    file = files.open(f"{folder}/{ROWS_FOLDER}/{segment_name(base)}")
    try:
        return last_row(file)
    finally:
        file.close()


class Segment:
    """One segment file with its side rows. `first_index` is 0 while it holds no entry."""

    __slots__ = (
        "_map",
        "_readers",
        "base",
        "file",
        "first_index",
        "is_readable",
        "is_retired",
        "known",
        "nbytes",
        "rows",
        "unverified",
    )

    def __init__(self, base: int, nbytes: int, file: File, rows: File, first_index: int = 0) -> None:
        self.base = base
        self.nbytes = nbytes
        self.file = file
        self.rows = rows
        self.first_index = first_index
        self._map: memoryview | None = None
        self.unverified: bytearray | None = None
        """One byte per chunk, 1 while its frames have not been verified since the start; None: all of them have."""
        self.known: dict[int, bytes] | None = None
        """Packed rows of the intact entries, where damage keeps the side rows from telling."""
        self.is_readable = True
        """False where the disk did not give back some of its pages."""
        self._readers = 0
        self.is_retired = False

    @property
    def end(self) -> int:
        return self.base + self.nbytes

    @property
    def view(self) -> memoryview:
        """Read-only map of the whole file. Sees every pwrite (Linux keeps page cache and shared maps coherent)."""
        if self._map is None:
            self._map = self.file.map()
        return self._map

    def row(self, index: int) -> Row | None:
        """The side row of an entry, if it is there and intact."""
        if self.known is not None:
            return unpack_row(self.known.get(index, b""))
        row = read_row(self.rows, index - self.first_index)
        return row if row is not None and row.index == index else None

    def write_rows(self, first_index: int, rows: bytes) -> None:
        self.rows.pwrite(rows, (first_index - self.first_index) * ROW_BYTES)

    def read_frames(self, position: int, end: int, max_bytes: int) -> list[Entry]:
        """Whole, verified frames from `position` on, none behind `end`: as many as fit `max_bytes`, at least one.

        Stops where the segment's frames end. Raises LogDamaged when the first one is not intact.
        """
        limit = min(end, self.end)
        offset = position - self.base
        data, _ = read_around(self.file, min(max(max_bytes, HEADER_BYTES), limit - position), offset)
        entries: list[Entry] = []
        taken = 0
        while taken + HEADER_BYTES <= len(data):
            try:
                entry = parse_entry(data, taken)
            except BadFrame as error:
                if entries:
                    break
                data = self._read_one(position, limit, error)
                entry = parse_entry(data)
            if entry.position != position + taken:
                break
            entries.append(entry)
            taken += len(entry.frame)
        if not entries:
            raise LogDamaged(f"no entry at position {position} of {self.file.path}")
        return entries

    def _read_one(self, position: int, limit: int, error: BadFrame) -> bytes:
        """A frame that is larger than what was asked for, or else the damage that `error` found."""
        head, _ = read_around(self.file, HEADER_BYTES, position - self.base)
        length = HEADER_BYTES + int.from_bytes(head[40:44], "little") if len(head) == HEADER_BYTES else 0
        data, _ = read_around(
            self.file, min(length, HEADER_BYTES + BODY_BYTES_MAX, limit - position), position - self.base
        )
        try:
            parse_entry(data)
        except BadFrame:
            raise LogDamaged(f"entry at position {position} of {self.file.path} is damaged: {error}") from error
        return data

    def nonzero_from(self, offset: int) -> int | None:
        """Offset of a non-zero chunk at or behind `offset`, None when all is zero to the end. Blocks; for start-up.

        What was reserved and never written is not read: in a segment that has just begun that is nearly all of it.
        """
        for start, end in self.file.data_extents(offset):
            offset = max(offset, start)
            while offset < min(end, self.nbytes):
                step = min(_CHUNK - offset % _CHUNK, self.nbytes - offset)
                data, readable = read_around(self.file, step, offset)
                self.is_readable = self.is_readable and readable
                if data != _ZEROS[: len(data)]:
                    return offset
                offset += step
        return None

    def used_from(self, offset: int) -> int:
        """How many bytes at or behind `offset` are in use: not counting zeros around what is there. Blocks."""
        used = 0
        start: int | None = offset
        while start is not None and (start := self.nonzero_from(start)) is not None:
            step = min(_CHUNK - start % _CHUNK, self.nbytes - start)
            used += len(read_around(self.file, step, start)[0].strip(b"\0"))
            start += step
        return used

    def zero(self, start: int, end: int) -> None:
        """Overwrite [start, end), offsets within the file, without a sync. Blocks; for threads and start-up.

        From the back to the front: should the machine die in between, what is left is a clean prefix and a torn tail.
        Page by page, as a kill may end a longer write when only the front of it is done.
        """
        while end > start:
            step = min(end % _PAGE or _PAGE, end - start)
            self.file.pwrite(_ZEROS[:step], end - step)
            end -= step

    def displacement(self, folder: str) -> str:
        """What has become of the files since they were opened; empty where both are in their places, whole. Blocks."""
        name = segment_name(self.base)
        if not self.file.is_at(f"{folder}/{LOG_FOLDER}/{name}"):
            return f"segment {name} was removed or replaced"
        if not self.is_whole:
            return f"segment {name} was truncated"
        if not self.rows.is_at(f"{folder}/{ROWS_FOLDER}/{name}"):
            return f"the side rows of segment {name} were removed or replaced"
        return ""

    @property
    def is_whole(self) -> bool:
        """Whether the file has its size still: touching the map of one that is shorter ends the process (SIGBUS)."""
        return self.file.size() >= self.nbytes

    def enter(self) -> None:
        """A thread reads from now on: the files stay open until `leave`."""
        self._readers += 1

    def leave(self) -> None:
        self._readers -= 1
        if self.is_retired and self._readers == 0:
            self.close()

    def retire(self) -> None:
        """Close the files once nobody reads any more. Maps handed out stay valid."""
        self.is_retired = True
        if self._readers == 0:
            self.close()

    def close(self) -> None:
        self.file.close()
        self.rows.close()


def retire_all(segments: Iterable[Segment]) -> None:
    """Close the files of segments that are the log's no longer, as `Segment.retire` does."""
    for segment in segments:
        segment.retire()


def create_segment(files: Files, folder: str, base: int, nbytes: int, *, warm: bool = False) -> Segment:
    """A new segment, all zeros, its space reserved and its name durable. Waits for the disk; leaves nothing behind
    when the disk is full. `warm` writes the zeros out, so that its pages are in memory and on allocated blocks.
    """
    path = f"{folder}/{LOG_FOLDER}/{segment_name(base)}"
    rows_path = f"{folder}/{ROWS_FOLDER}/{segment_name(base)}"
    aside = f"{path}.new"
    file = files.open(aside, create=True)
    rows: File | None = None
    try:
        file.truncate(0)
        file.allocate(nbytes)
        file.truncate(nbytes)
        if warm:
            for offset in range(0, nbytes, _CHUNK):
                file.pwrite(_ZEROS[: min(_CHUNK, nbytes - offset)], offset)
        file.sync_now()
        rows = files.open(rows_path, create=True)
        rows.truncate(0)
        # The rows' name first: a segment without rows can be walked, old rows beside a new one would be false evidence.
        files.sync_dir(f"{folder}/{ROWS_FOLDER}")
        files.rename(aside, path)
        files.sync_dir(f"{folder}/{LOG_FOLDER}")
    except OSError:
        file.close()
        if rows is not None:
            rows.close()
        if files.exists(aside):
            files.unlink(aside)
        raise
    return Segment(base, nbytes, file, rows)


def open_segment(files: Files, folder: str, base: int, nbytes: int) -> Segment:
    """An existing segment. One that is too short (a truncated file) is filled up with zeros, which are no frames."""
    file = files.open(f"{folder}/{LOG_FOLDER}/{segment_name(base)}")
    try:
        if file.size() < nbytes:
            try:
                file.allocate(nbytes)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                file.truncate(nbytes)
        rows = files.open(f"{folder}/{ROWS_FOLDER}/{segment_name(base)}", create=True)
    except OSError:
        file.close()
        raise
    return Segment(base, nbytes, file, rows)


def remove_segments(files: Files, folder: str, bases: Sequence[int]) -> None:
    """Delete segments, the last one first, all rows (evidence) before any frame. Waits for the disk."""
    for sub in (ROWS_FOLDER, LOG_FOLDER):
        for base in sorted(bases, reverse=True):
            path = f"{folder}/{sub}/{segment_name(base)}"
            if files.exists(path):
                files.unlink(path)
        files.sync_dir(f"{folder}/{sub}")
