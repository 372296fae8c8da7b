"""Segments: files of one fixed size, named by the position of their first byte, that hold frames back to back.

A segment is allocated in full before its first byte is written, so a full disk shows at allocation, and its length
never changes, so its map stays valid: a cut overwrites with zeros, deletion is unlink. Positions from `next_position`.
"""

from __future__ import annotations

from dledger.core.types import HEADER_BYTES, BadFrame, Entry, parse_entry
from dledger.errors import LogDamaged
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER
from dledger.store.rows import ROW_BYTES, Row, read_row
from runtime.model import File, Files

NAME_DIGITS = 20
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


def segment_name(base: int) -> str:
    return f"{base:0{NAME_DIGITS}d}"


def segment_bases(files: Files, folder: str) -> list[int]:
    """Start positions of the segment files there are, ascending."""
    names = files.listdir(f"{folder}/{LOG_FOLDER}")
    return sorted(int(name) for name in names if len(name) == NAME_DIGITS and name.isdigit())


class Segment:
    """One segment file with its side rows. `first_index` is 0 while it holds no entry."""

    __slots__ = ("_map", "base", "file", "first_index", "nbytes", "rows")

    def __init__(self, base: int, nbytes: int, file: File, rows: File, first_index: int = 0) -> None:
        self.base = base
        self.nbytes = nbytes
        self.file = file
        self.rows = rows
        self.first_index = first_index
        self._map: memoryview | None = None

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
        data = self.file.pread(min(max(max_bytes, HEADER_BYTES), limit - position), offset)
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
        head = self.file.pread(HEADER_BYTES, position - self.base)
        length = HEADER_BYTES + int.from_bytes(head[40:44], "little") if len(head) == HEADER_BYTES else 0
        data = self.file.pread(min(length, limit - position), position - self.base)
        try:
            parse_entry(data)
        except BadFrame:
            raise LogDamaged(f"entry at position {position} of {self.file.path} is damaged: {error}") from error
        return data

    def nonzero_from(self, offset: int) -> int | None:
        """Offset of a non-zero chunk at or behind `offset`, None when all is zero to the end. Blocks; for start-up."""
        while offset < self.nbytes:
            step = min(_CHUNK - offset % _CHUNK, self.nbytes - offset)
            data = self.file.pread(step, offset)
            if data != _ZEROS[: len(data)]:
                return offset
            offset += step
        return None

    def zero(self, start: int, end: int) -> None:
        """Overwrite [start, end), offsets within the file, without a sync. Blocks; for threads and start-up.

        From the back to the front: should the machine die in between, what is left is a clean prefix and a torn tail.
        """
        while end > start:
            step = min(_CHUNK, end - start)
            self.file.pwrite(_ZEROS[:step], end - step)
            end -= step

    def close(self) -> None:
        self.file.close()
        self.rows.close()


def create_segment(files: Files, folder: str, base: int, nbytes: int) -> Segment:
    """A new segment, all zeros, its space reserved and its name durable. Waits for the disk; leaves nothing behind
    when the disk is full.
    """
    path = f"{folder}/{LOG_FOLDER}/{segment_name(base)}"
    rows_path = f"{folder}/{ROWS_FOLDER}/{segment_name(base)}"
    aside = f"{path}.new"
    file = files.open(aside, create=True)
    try:
        file.truncate(0)
        file.allocate(nbytes)
        file.truncate(nbytes)
        file.sync_now()
        rows = files.open(rows_path, create=True)
    except OSError:
        file.close()
        files.unlink(aside)
        raise
    rows.truncate(0)
    # The rows' name first: a segment without rows can be walked, old rows beside a new segment would be false evidence.
    files.sync_dir(f"{folder}/{ROWS_FOLDER}")
    files.rename(aside, path)
    files.sync_dir(f"{folder}/{LOG_FOLDER}")
    return Segment(base, nbytes, file, rows)


def open_segment(files: Files, folder: str, base: int, nbytes: int) -> Segment:
    """An existing segment. Raises LogDamaged when its size is not the group's segment size."""
    file = files.open(f"{folder}/{LOG_FOLDER}/{segment_name(base)}")
    if file.size() != nbytes:
        size = file.size()
        file.close()
        raise LogDamaged(f"segment {segment_name(base)} has {size} bytes instead of {nbytes}")
    return Segment(base, nbytes, file, files.open(f"{folder}/{ROWS_FOLDER}/{segment_name(base)}", create=True))


def remove_segment(files: Files, folder: str, segment: Segment) -> None:
    """Delete it, rows first (see `create_segment`). The folders are not synced here. Maps handed out stay valid."""
    segment.close()
    for sub in (ROWS_FOLDER, LOG_FOLDER):
        path = f"{folder}/{sub}/{segment_name(segment.base)}"
        if files.exists(path):
            files.unlink(path)
