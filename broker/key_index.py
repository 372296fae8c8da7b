"""Key index: which messages have a key, in an own layout.

Keys are crc32 of `topic#key`, for UNIQ_KEY and each word of KEYS. Rows gather in three arrays when entries are applied;
65,536 of them are sealed and kept as one file. A lookup scans the hash columns, from the newest segment on: 0.3 ms for
each, while sorting them would cost every message more than everything else here (decision record 0006). A hash may
collide: clients compare the keys again, as with RocketMQ's own index.

A segment file, little endian: header of 64 bytes (magic, version, count, crc32 of the columns, first and last second,
first and last position), then the columns: hashes u32, positions u64, seconds u32. Rows are in log order.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import trio
from attrs import frozen

from broker.errors import DISK_FULL
from broker.tables import InvariantBroken
from runtime.model import Files

MAX_LOOKUP: Final = 64
SEALED_IN_MEMORY_LIMIT: Final = 64
"""Segments waiting for the thread; past this the loop writes them itself, so memory stays bounded."""
STEP_SEGMENTS: Final = 16
"""Segments searched before others get the loop."""
_MAGIC: Final = 0x51494458
_VERSION: Final = 1
_HEADER = struct.Struct("<IIIIQQQQ16x")


def topic_seed(topic: bytes) -> int:
    """crc32 of `topic#`; crc32(key, seed) is then the index key. Kept per topic by the hot paths."""
    return zlib.crc32(topic + b"#")


def index_key(topic: bytes, key: bytes) -> int:
    return zlib.crc32(key, topic_seed(topic))


@frozen
class _Segment:
    """A sealed segment in its file."""

    path: str
    count: int
    first_second: int
    last_second: int
    first_position: int
    last_position: int


class _Rows:
    """Unsorted rows in memory: the active segment, and sealed ones not yet in a file."""

    __slots__ = ("hashes", "positions", "seconds")

    def __init__(self) -> None:
        self.hashes = array("I")
        self.positions = array("Q")
        self.seconds = array("I")

    def find(self, hash_: int, begin_s: int, end_s: int, limit: int) -> list[int]:
        """Positions, newest first."""
        found: list[int] = []
        for row in rows_of(self.hashes.tobytes(), hash_):
            if len(found) == limit:
                break
            if begin_s <= self.seconds[row] <= end_s:
                found.append(self.positions[row])
        return found


def encode_segment(rows: _Rows) -> bytes:
    """The file of a segment. Pure computation."""
    columns = b"".join((rows.hashes.tobytes(), rows.positions.tobytes(), rows.seconds.tobytes()))
    positions, seconds = rows.positions, rows.seconds
    bounds = seconds[0], seconds[-1], positions[0], positions[-1]  # neither ever falls along the log
    head = _HEADER.pack(_MAGIC, _VERSION, len(rows.hashes), zlib.crc32(columns), *bounds)
    return head + columns


def rows_of(hashes: bytes, hash_: int) -> Iterator[int]:
    """Row numbers of a hash in the hash column of a segment, newest first."""
    wanted = struct.pack("<I", hash_)
    end = len(hashes)
    while (at := hashes.rfind(wanted, 0, end)) >= 0:
        if at % 4 == 0:
            yield at // 4
        end = at + 3  # also where the four bytes lie across two rows


class KeyIndex:
    """`segment_keys` rows make a segment (at most 65,536). `data_dir` is the node's folder."""

    def __init__(self, files: Files, data_dir: str, *, segment_keys: int = 65_536) -> None:
        if sys.byteorder != "little" or array("I").itemsize != 4:
            raise InvariantBroken("the key index is laid out for little-endian machines")
        self._files = files
        self.folder = f"{data_dir}/index"
        self._segment_keys = min(segment_keys, 65_536)
        self._active = _Rows()
        self._sealed: deque[_Rows] = deque()
        self._segments: list[_Segment] = []
        self._unsynced: list[str] = []
        self._dropped: list[str] = []
        self.last_store_timestamp = 0
        self.last_physical_offset = 0

    # ------------------------------------------------------------------------------------------------------ writing

    def extend(self, hashes: list[int], positions: list[int], store_ms: int) -> None:
        """Rows of one committed entry; `store_ms` is the store time of its last record."""
        active = self._active
        active.hashes.fromlist(hashes)
        active.positions.fromlist(positions)
        active.seconds.extend(array("I", (store_ms // 1000,)) * len(hashes))
        self.last_store_timestamp = store_ms
        self.last_physical_offset = positions[-1]
        if len(active.hashes) >= self._segment_keys:
            self._seal()

    def _seal(self) -> None:
        rows = self._active
        if len(rows.hashes) <= 65_536:
            self._sealed.append(rows)
            self._active = _Rows()
        else:
            head, rest = _Rows(), _Rows()
            head.hashes, rest.hashes = rows.hashes[:65_536], rows.hashes[65_536:]
            head.positions, rest.positions = rows.positions[:65_536], rows.positions[65_536:]
            head.seconds, rest.seconds = rows.seconds[:65_536], rows.seconds[65_536:]
            self._sealed.append(head)
            self._active = rest
        while len(self._sealed) > SEALED_IN_MEMORY_LIMIT:
            oldest = self._sealed[0]
            try:
                self._write(oldest, encode_segment(oldest))
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                return  # more memory than meant, until there is room again

    @property
    def has_sealed(self) -> bool:
        """There is work for `persist`."""
        return bool(self._sealed)

    async def persist(self, run_in_thread: Callable[..., Awaitable[Any]]) -> None:
        """Encode every sealed segment off the loop, and write it. Checkpoint. Raises OSError."""
        while self._sealed:
            rows = self._sealed[0]
            data = await run_in_thread(encode_segment, rows)
            if self._sealed and self._sealed[0] is rows:
                self._write(rows, data)

    def _path(self, first_position: int) -> str:
        return f"{self.folder}/{first_position:020d}"

    def _write(self, rows: _Rows, data: bytes) -> None:
        """To the page cache. What a power loss takes is made again: the checkpoint syncs these files before it counts
        on them."""
        self._files.make_dirs(self.folder)
        segment = self._describe(self._path(rows.positions[0]), data)
        path = segment.path
        suffix = 0
        while self._files.exists(path):
            # A record with very many keys can fill more than one segment from the same position.
            suffix += 1
            path = f"{segment.path}.{suffix}"
        file = self._files.open(path, create=True)
        try:
            file.pwrite(data, 0)
        except OSError:
            self._files.unlink(path)  # no half segment: the next try begins anew
            raise
        finally:
            file.close()
        self._segments.append(self._describe(path, data))
        self._unsynced.append(path)
        self._sealed.popleft()

    async def sync(self) -> None:
        """Make the segment files written so far durable. Checkpoint (trio). Raises OSError."""
        unsynced, self._unsynced = self._unsynced, []
        for path in unsynced:
            if self._files.exists(path):
                file = self._files.open(path)
                try:
                    await file.sync()
                finally:
                    file.close()

    @staticmethod
    def _describe(path: str, data: bytes) -> _Segment:
        _magic, _version, count, _crc, first_s, last_s, first_position, last_position = _HEADER.unpack_from(data)
        return _Segment(path, count, first_s, last_s, first_position, last_position)

    # ------------------------------------------------------------------------------------------------------ reading

    def lookup(self, topic: str, key: str, max_num: int, begin_ms: int, end_ms: int) -> list[int]:
        """Physical offsets of messages with this key and a store time in [begin, end], newest first, at most 64.

        Holds the loop for some 0.3 ms per segment: see `is_long`. Raises OSError when a segment cannot be read.
        """
        found: list[int] = []
        for _ in self._search_all(found, topic, key, max_num, begin_ms, end_ms):
            pass
        # A key that is both UNIQ_KEY and one of KEYS has two rows.
        return list(dict.fromkeys(found))

    @property
    def is_long(self) -> bool:
        """There are so many segments that `lookup` should be `lookup_in_steps`."""
        return len(self._segments) > STEP_SEGMENTS

    async def lookup_in_steps(self, topic: str, key: str, max_num: int, begin_ms: int, end_ms: int) -> list[int]:
        """As `lookup`, letting others run in between. Checkpoint, cancel-safe."""
        found: list[int] = []
        for number, _ in enumerate(self._search_all(found, topic, key, max_num, begin_ms, end_ms)):
            if number % STEP_SEGMENTS == 0:
                await trio.lowlevel.checkpoint()
        return list(dict.fromkeys(found))

    def _search_all(
        self, found: list[int], topic: str, key: str, max_num: int, begin_ms: int, end_ms: int
    ) -> Iterator[None]:
        """Adds to `found`, from the newest rows on; yields after what is in memory and after each segment."""
        limit = max(0, min(max_num, MAX_LOOKUP))
        hash_ = index_key(topic.encode(), key.encode())
        begin_s = max(0, begin_ms) // 1000
        end_s = max(0, end_ms) // 1000
        segments = self._segments[::-1]
        for rows in (self._active, *reversed(self._sealed)):
            if len(found) < limit:
                found += rows.find(hash_, begin_s, end_s, limit - len(found))
        yield
        for segment in segments:
            if len(found) >= limit or segment.last_second < begin_s:
                break
            if segment.first_second <= end_s:
                found += self._search(segment, hash_, begin_s, end_s, limit - len(found))
                yield

    def _search(self, segment: _Segment, hash_: int, begin_s: int, end_s: int, limit: int) -> list[int]:
        try:
            file = self._files.open(segment.path)
        except FileNotFoundError:
            return []
        try:
            positions_at = _HEADER.size + 4 * segment.count
            seconds_at = positions_at + 8 * segment.count
            found: list[int] = []
            for row in rows_of(file.pread(4 * segment.count, _HEADER.size), hash_):
                if len(found) == limit:
                    break
                second = int.from_bytes(file.pread(4, seconds_at + 4 * row), "little")
                if begin_s <= second <= end_s:
                    found.append(int.from_bytes(file.pread(8, positions_at + 8 * row), "little"))
        finally:
            file.close()
        return found

    # ------------------------------------------------------------------------------------------- checkpoint, restart

    def snapshot(self) -> dict[str, Any]:
        """What is not in segment files; call with nothing sealed waiting, so that it stays small."""
        rows = [*self._sealed, self._active]
        return {
            "hashes": b"".join(part.hashes.tobytes() for part in rows),
            "positions": b"".join(part.positions.tobytes() for part in rows),
            "seconds": b"".join(part.seconds.tobytes() for part in rows),
            "segments": [[segment.path.rpartition("/")[2], segment.count] for segment in self._segments],
            "last": [self.last_store_timestamp, self.last_physical_offset],
        }

    def restore(self, snapshot: dict[str, Any] | None) -> bool:
        """Take up what a checkpoint covers and remove files made after it.

        False when a file it counts on is missing or damaged: then nothing is kept and the log must be read again.
        """
        self._active = _Rows()
        self._sealed.clear()
        self._segments = []
        self._unsynced = []
        self._dropped = []
        self.last_store_timestamp = self.last_physical_offset = 0
        if snapshot is None:
            if self._files.exists(self.folder):
                self._files.remove_tree(self.folder)
            return True
        wanted = dict(snapshot["segments"])
        for name, count in wanted.items():
            segment = self._load(name)
            if segment is None or segment.count != count:
                return False
            self._segments.append(segment)
        for name in self._files.listdir(self.folder):
            if name not in wanted:
                self._files.unlink(f"{self.folder}/{name}")
        self._active.hashes.frombytes(snapshot["hashes"])
        self._active.positions.frombytes(snapshot["positions"])
        self._active.seconds.frombytes(snapshot["seconds"])
        self.last_store_timestamp, self.last_physical_offset = snapshot["last"]
        while len(self._active.hashes) >= self._segment_keys:
            self._seal()
        return True

    def _load(self, name: str) -> _Segment | None:
        path = f"{self.folder}/{name}"
        try:
            file = self._files.open(path)
        except FileNotFoundError:
            return None
        try:
            head = file.pread(_HEADER.size, 0)
            if len(head) != _HEADER.size:
                return None
            magic, version, count = struct.unpack_from("<III", head)
            if magic != _MAGIC or version != _VERSION or file.size() != _HEADER.size + 16 * count:
                return None
        finally:
            file.close()
        return self._describe(path, head)

    def trim(self, first_position: int) -> None:
        """Drop segments whose messages are all below the log's first position; their files stay until `remove`."""
        while self._segments and self._segments[0].last_position < first_position:
            self._dropped.append(self._segments.pop(0).path)

    def collect_dropped(self) -> list[str]:
        """For a checkpoint: files it counts on no more."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def give_back_dropped(self, dropped: list[str]) -> None:
        """No checkpoint came of it: they wait for the next one."""
        self._dropped = dropped + self._dropped

    def remove(self, dropped: list[str]) -> None:
        """Remove files of dropped segments, once a checkpoint without them is saved. Raises OSError."""
        for path in dropped:
            if self._files.exists(path):
                self._files.unlink(path)
