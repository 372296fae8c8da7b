"""ConsumeQueues: per (topic, queue) the 20-byte units that point into the log (store.md 4).

Units are appended in memory when their entry is applied, so nothing above the commit index is ever here; they go to
their file each second or when 4 KiB have gathered. What is in memory is readable. At a start the files are cut to what
the checkpoint of the tables covers, and the rest is made again by replaying the log. Where they do not hold that, as
after the log was taken over from another node, all are made again from what the log still holds.

Trimming is a number: every queue looks for its first unit behind it when it is next asked. Files below go only once a
checkpoint knows, so that a start never misses one it counts on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Final, Protocol

import trio

from broker.errors import DISK_FULL
from broker.key_index import topic_seed
from broker.records import STORE_TIMESTAMP_END, UNIT, UNIT_BYTES, store_timestamp_of
from broker.tables import InvariantBroken
from remoting.codes import SCHEDULE_TOPIC
from runtime.model import File, Files

LOWER: Final = "LOWER"
UPPER: Final = "UPPER"
SETTLED_AT_ONCE: Final = 64
"""Queues that look for their minimum before others get the loop."""


class LogReader(Protocol):
    """What search by time needs of the raft group: committed bytes by physical offset."""

    def read(self, physical_offset: int, nbytes: int) -> memoryview | None: ...


class NotAtHand(Exception):
    """The head of a message has to be read from the disk first: `nbytes` at `physical_offset`."""

    def __init__(self, physical_offset: int, nbytes: int) -> None:
        super().__init__(f"{nbytes} bytes at {physical_offset} are not in memory")
        self.physical_offset = physical_offset
        self.nbytes = nbytes


class QueueState:
    """One queue. `next_offset` is pending (what the next staged record gets), `max_offset` is committed."""

    __slots__ = (
        "dirty",
        "gone",
        "index_seed",
        "is_schedule",
        "last_position",
        "max_offset",
        "min_offset",
        "next_offset",
        "queue_id",
        "settled_to",
        "tail",
        "tail_offset",
        "topic",
        "topic_bytes",
        "unsynced",
        "visible",
    )

    def __init__(self, topic: str, queue_id: int) -> None:
        self.topic = topic
        self.topic_bytes = topic.encode()
        self.queue_id = queue_id
        self.index_seed = topic_seed(self.topic_bytes)
        self.is_schedule = topic == SCHEDULE_TOPIC
        """Its tags codes are delivery times."""
        self.min_offset = 0
        self.max_offset = 0
        self.next_offset = 0
        self.settled_to = 0
        """`min_offset` is right for a log trimmed to here."""
        self.last_position = -1
        """Physical offset in the newest unit that is in a file; -1 for none."""
        self.tail = bytearray()
        self.tail_offset = 0
        """Queue offset of the first unit in `tail`; all before are in files."""
        self.visible = False
        self.dirty = False
        self.unsynced: dict[str, None] = {}
        """Files written since the last checkpoint."""
        self.gone = False

    def __repr__(self) -> str:
        return f"QueueState({self.topic!r}, {self.queue_id}, [{self.min_offset}, {self.max_offset}))"


class QueueFilesShort(Exception):
    """The files do not hold what the checkpoint says: they must be made again from the log."""


class _OpenFiles:
    """Descriptors in least-recently-used order."""

    __slots__ = ("_files", "_limit", "_open")

    def __init__(self, files: Files, limit: int) -> None:
        self._files = files
        self._limit = max(1, limit)
        self._open: OrderedDict[str, File] = OrderedDict()

    def get(self, path: str, *, create: bool) -> File | None:
        file = self._open.get(path)
        if file is not None:
            self._open.move_to_end(path)
            return file
        try:
            file = self._files.open(path, create=create)
        except FileNotFoundError:
            return None
        self._open[path] = file
        if len(self._open) > self._limit:
            self._open.popitem(last=False)[1].close()
        return file

    def forget(self, prefix: str) -> None:
        """Close every file whose path starts with `prefix`."""
        for path in [path for path in self._open if path.startswith(prefix)]:
            self._open.pop(path).close()

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


class QueueTable:
    """Every queue of this node: a pending view by (topic bytes, queue id) and a committed one by topic.

    `data_dir` is the node's folder; files are `consumequeue/<topic>/<queue>/<20 digits>` in it.
    """

    def __init__(
        self,
        files: Files,
        data_dir: str,
        *,
        flush_bytes: int = 4_096,
        file_units: int = 300_000,
        open_files: int = 256,
    ) -> None:
        self._files = files
        self.folder = f"{data_dir}/consumequeue"
        self._trash = f"{data_dir}/trash"
        self._flush_bytes = flush_bytes
        self._file_bytes = file_units * UNIT_BYTES
        self._open = _OpenFiles(files, open_files)
        self._topics: dict[str, dict[int, QueueState]] = {}
        self.pending: dict[tuple[bytes, int], QueueState] = {}
        """The queues records are staged into. A deleted topic's queues leave it when the deletion is staged."""
        self._dirty: list[QueueState] = []
        self.is_full = False
        """The disk has no room for units: they wait in memory, and `flush` tries again."""
        self._log: LogReader | None = None
        self._trimmed_to = 0
        self._shrunk: dict[QueueState, None] = {}
        """Queues whose minimum was raised since the last checkpoint: files of theirs may go with the next one."""
        self._trash_count = 0

    def attach(self, log: LogReader) -> None:
        self._log = log

    # ------------------------------------------------------------------------------------------- staging, applying

    def pending_queue(self, topic: bytes, queue_id: int) -> QueueState:
        """The queue the next record of (topic, queue_id) goes to; made when there is none."""
        key = (topic, queue_id)
        queue = self.pending.get(key)
        if queue is None:
            queue = self.pending[key] = QueueState(topic.decode(), queue_id)
        return queue

    def append(self, queue: QueueState, units: bytes) -> None:
        """Units of a committed entry, back to back."""
        tail = queue.tail
        tail += units
        queue.max_offset += len(units) // UNIT_BYTES
        if not queue.dirty:
            queue.dirty = True
            self._dirty.append(queue)
            if not queue.visible:
                self._show(queue)
        if len(tail) >= self._flush_bytes and not self.is_full:
            self._write_if_room(queue)

    def _show(self, queue: QueueState) -> None:
        queue.visible = True
        self._topics.setdefault(queue.topic, {})[queue.queue_id] = queue

    def stage_delete(self, topic: bytes) -> list[QueueState]:
        """The topic's deletion was staged: later records of that name start new queues at 0."""
        removed = [queue for key, queue in self.pending.items() if key[0] == topic]
        for queue in removed:
            del self.pending[topic, queue.queue_id]
        return removed

    def discard_delete(self, removed: list[QueueState]) -> None:
        for queue in removed:
            self.pending[queue.topic_bytes, queue.queue_id] = queue

    def apply_delete(self, topic: str, removed: list[QueueState]) -> None:
        """The topic's deletion is committed: its queues and files go. The files are only renamed here."""
        for queue in removed:
            queue.gone = True
            self._shrunk.pop(queue, None)
            queue.tail = bytearray()
            queue.unsynced.clear()
        self._topics.pop(topic, None)
        self._open.forget(f"{self.folder}/{topic}/")
        self._throw_away(f"{self.folder}/{topic}")

    def _throw_away(self, path: str) -> None:
        """Only a rename; maintenance removes what is in the trash, off the loop."""
        if self._files.exists(path):
            self._files.make_dirs(self._trash)
            self._trash_count += 1
            target = f"{self._trash}/{self._trash_count}"
            while self._files.exists(target):
                self._trash_count += 1
                target = f"{self._trash}/{self._trash_count}"
            self._files.rename(path, target)

    @property
    def trash(self) -> str:
        """Folder of files that belong to nothing any more, emptied by maintenance."""
        return self._trash

    # ------------------------------------------------------------------------------------------------------ reading

    def _get(self, topic: str, queue_id: int) -> QueueState | None:
        queues = self._topics.get(topic)
        queue = queues.get(queue_id) if queues is not None else None
        if queue is not None and queue.settled_to < self._trimmed_to:
            self._settle(queue)
        return queue

    def exists(self, topic: str, queue_id: int) -> bool:
        """Some committed message was stored in this queue."""
        return self._get(topic, queue_id) is not None

    def min_offset(self, topic: str, queue_id: int) -> int:
        queue = self._get(topic, queue_id)
        return queue.min_offset if queue is not None else 0

    def max_offset(self, topic: str, queue_id: int) -> int:
        """One past the newest committed unit; 0 for an unknown queue."""
        queue = self._get(topic, queue_id)
        return queue.max_offset if queue is not None else 0

    def queues_of(self, topic: str) -> list[int]:
        return sorted(self._topics.get(topic, ()))

    def topics(self) -> list[str]:
        return sorted(self._topics)

    def __iter__(self) -> Iterator[QueueState]:
        for topic in sorted(self._topics):
            queues = self._topics[topic]
            for queue_id in sorted(queues):
                queue = queues[queue_id]
                if queue.settled_to < self._trimmed_to:
                    self._settle(queue)
                yield queue

    def units(self, topic: str, queue_id: int, from_offset: int, max_units: int) -> bytes:
        """Up to `max_units` committed units from `from_offset` on, back to back; b"" where there are none.

        Raises OSError when a file cannot be read.
        """
        queue = self._get(topic, queue_id)
        if queue is None or from_offset < queue.min_offset:
            return b""
        end = min(from_offset + max_units, queue.max_offset)
        if end <= from_offset:
            return b""
        tail_offset = queue.tail_offset
        if from_offset >= tail_offset:
            return bytes(queue.tail[(from_offset - tail_offset) * UNIT_BYTES : (end - tail_offset) * UNIT_BYTES])
        parts = [self._read_files(queue, from_offset, min(end, tail_offset))]
        if end > tail_offset:
            parts.append(bytes(queue.tail[: (end - tail_offset) * UNIT_BYTES]))
        return b"".join(parts)

    def points_to(self, topic: str, queue_id: int, offset: int, physical_offset: int) -> bool:
        """The committed unit at a queue offset is that of the message there. Raises OSError."""
        queue = self._get(topic, queue_id)
        if queue is None or not queue.min_offset <= offset < queue.max_offset:
            return False
        return self.unit(queue, offset)[0] == physical_offset

    def unit(self, queue: QueueState, offset: int) -> tuple[int, int, int]:
        """(physical offset, size, tags code) of one unit in [min, max)."""
        if offset >= queue.tail_offset:
            found: tuple[int, int, int] = UNIT.unpack_from(queue.tail, (offset - queue.tail_offset) * UNIT_BYTES)
        else:
            found = UNIT.unpack(self._read_files(queue, offset, offset + 1))
        return found

    def _read_files(self, queue: QueueState, start: int, end: int) -> bytes:
        at = start * UNIT_BYTES
        stop = end * UNIT_BYTES
        parts: list[bytes] = []
        while at < stop:
            first = at - at % self._file_bytes
            nbytes = min(stop, first + self._file_bytes) - at
            file = self._open.get(self._path(queue, first), create=False)
            data = b""
            if file is not None:
                found = file.pread_nowait(nbytes, at - first)
                data = found if found is not None else file.pread(nbytes, at - first)
            if len(data) != nbytes:
                raise InvariantBroken(f"consume queue file of {queue.topic} {queue.queue_id} is short at byte {at}")
            parts.append(data)
            at += nbytes
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # ------------------------------------------------------------------------------------------------ search by time

    def store_time_at(self, topic: str, queue_id: int, offset: int) -> int:
        """Store time (ms) of the message at a queue offset; -1 when it is not there, or not in memory."""
        queue = self._get(topic, queue_id)
        if queue is None or not queue.min_offset <= offset < queue.max_offset:
            return -1
        try:
            return self._store_time(queue, offset, {})
        except NotAtHand:
            return -1

    def earliest_store_time(self, topic: str, queue_id: int) -> int:
        """Store time (ms) of the queue's first message; -1 as for `store_time_at`."""
        return self.store_time_at(topic, queue_id, self.min_offset(topic, queue_id))

    def _store_time(self, queue: QueueState, offset: int, known: dict[int, int]) -> int:
        physical_offset, size, _tags = self.unit(queue, offset)
        nbytes = min(size, STORE_TIMESTAMP_END)
        head = self._log.read(physical_offset, nbytes) if self._log is not None else None
        if head is not None:
            return store_timestamp_of(head)
        if physical_offset not in known:
            raise NotAtHand(physical_offset, nbytes)
        return known[physical_offset]

    def search_by_time(
        self, topic: str, queue_id: int, timestamp_ms: int, boundary: str = LOWER, known: dict[int, int] | None = None
    ) -> int:
        """The queue offset for a store time, by binary search (semantics.md 4).

        LOWER: the first message at or after it, the maximum if all are older. UPPER: the last one at or before it,
        the maximum - 1 if all are older, 0 if all are younger. `known` are store times by physical offset that the
        caller has read. Raises NotAtHand where one more is needed: a guess would send the consumer past messages.
        """
        queue = self._get(topic, queue_id)
        if queue is None or queue.max_offset == queue.min_offset:
            return queue.max_offset if queue is not None else 0
        low, high = queue.min_offset, queue.max_offset
        upper = boundary.upper() == UPPER
        while low < high:
            middle = (low + high) // 2
            time = self._store_time(queue, middle, known or {})
            if time < timestamp_ms or (upper and time == timestamp_ms):
                low = middle + 1
            else:
                high = middle
        if not upper:
            return low
        return low - 1 if low > queue.min_offset else 0

    # -------------------------------------------------------------------------------------------------------- files

    def _folder_of(self, queue: QueueState) -> str:
        return f"{self.folder}/{queue.topic}/{queue.queue_id}"

    def _path(self, queue: QueueState, first_byte: int) -> str:
        return f"{self.folder}/{queue.topic}/{queue.queue_id}/{first_byte:020d}"

    def _write_tail(self, queue: QueueState) -> None:
        """Hand the tail to the page cache. Raises OSError."""
        tail = queue.tail
        at = queue.tail_offset * UNIT_BYTES
        done = 0
        while done < len(tail):
            first = at - at % self._file_bytes
            nbytes = min(len(tail) - done, first + self._file_bytes - at)
            path = self._path(queue, first)
            file = self._open.get(path, create=False)
            if file is None:
                self._files.make_dirs(self._folder_of(queue))
                file = self._open.get(path, create=True)
                assert file is not None
            file.pwrite(bytes(tail[done : done + nbytes]), at - first)
            queue.unsynced[path] = None
            at += nbytes
            done += nbytes
        queue.tail_offset += len(tail) // UNIT_BYTES
        queue.last_position = int.from_bytes(tail[-UNIT_BYTES : 8 - UNIT_BYTES])
        queue.tail = bytearray()

    def _write_if_room(self, queue: QueueState) -> None:
        try:
            self._write_tail(queue)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self.is_full = True

    def flush(self) -> None:
        """Write every tail to its file (page cache); on a full disk, see `is_full`. Raises OSError."""
        self.is_full = False
        dirty, self._dirty = self._dirty, []
        for queue in dirty:
            if queue.tail and not queue.gone and not self.is_full:
                self._write_if_room(queue)
            queue.dirty = bool(queue.tail) and not queue.gone
            if queue.dirty:
                self._dirty.append(queue)

    async def sync(self) -> None:
        """Make what `flush` wrote so far durable. Checkpoint (trio). Raises OSError."""
        for queue in list(self):
            paths = list(queue.unsynced)
            queue.unsynced.clear()
            for path in paths:
                # An own descriptor: the one in the LRU may be closed while this waits.
                try:
                    file = self._files.open(path)
                except FileNotFoundError:
                    continue  # its topic was deleted meanwhile
                try:
                    await file.sync()
                finally:
                    file.close()

    def bounds(self) -> list[list[object]]:
        """[topic, queue id, min, max, position of the last message] of every queue, for the checkpoint; after `flush`.

        The position tells the files of a topic that was deleted and made again from those that are meant.
        """
        return [
            [queue.topic, queue.queue_id, queue.min_offset, queue.max_offset, queue.last_position] for queue in self
        ]

    def restore(self, bounds: list[list[Any]]) -> None:
        """Cut the files to what a checkpoint covers; queues it does not know go altogether. Before anything else.

        Raises QueueFilesShort where the files do not hold that; nothing is removed then.
        """
        wanted: dict[str, dict[int, QueueState]] = {}
        for topic, queue_id, minimum, maximum, last_position in bounds:
            queue = QueueState(topic, queue_id)
            queue.min_offset = minimum
            queue.max_offset = queue.next_offset = queue.tail_offset = maximum
            if minimum < maximum:
                self._check(queue, last_position)
            wanted.setdefault(topic, {})[queue_id] = queue
        for topic in self._files.listdir(self.folder):
            queues = wanted.get(topic)
            if queues is None:
                self._throw_away(f"{self.folder}/{topic}")
                continue
            for name in self._files.listdir(f"{self.folder}/{topic}"):
                kept = queues.get(int(name)) if name.isdecimal() else None
                if kept is None:
                    self._throw_away(f"{self.folder}/{topic}/{name}")
                else:
                    self._cut(kept)
        for queues in wanted.values():
            for queue in queues.values():
                self._show(queue)
                self.pending[queue.topic_bytes, queue.queue_id] = queue

    def _check(self, queue: QueueState, last_position: int) -> None:
        """The files hold every unit of [min, max), the last one being that of the message at `last_position`."""
        first = queue.min_offset * UNIT_BYTES
        first -= first % self._file_bytes
        end = queue.max_offset * UNIT_BYTES
        while first < end:
            file = self._open.get(self._path(queue, first), create=False)
            if file is None or first + file.size() < min(end, first + self._file_bytes):
                raise QueueFilesShort(f"{queue.topic} {queue.queue_id} lacks units before {queue.max_offset}")
            first += self._file_bytes
        queue.last_position = self.unit(queue, queue.max_offset - 1)[0]
        if last_position != queue.last_position:
            raise QueueFilesShort(
                f"{queue.topic} {queue.queue_id} ends with the message at {queue.last_position}, not at {last_position}"
            )

    def _cut(self, queue: QueueState) -> None:
        end = queue.max_offset * UNIT_BYTES
        folder = self._folder_of(queue)
        for name in self._files.listdir(folder):
            first = int(name) if name.isdecimal() else end
            path = f"{folder}/{name}"
            if first + self._file_bytes <= queue.min_offset * UNIT_BYTES:
                self._shrunk[queue] = None
            elif first >= end:
                self._open.forget(path)
                self._files.unlink(path)
            elif first + self._file_bytes >= end:
                file = self._open.get(path, create=False)
                if file is not None and file.size() > end - first:
                    file.truncate(end - first)

    # --------------------------------------------------------------------- files made again from what the log holds

    def adopt(self, queue: QueueState, queue_offset: int) -> bool:
        """The first message of a queue that the log still holds says where it is. False where that cannot be."""
        if queue.next_offset or queue.visible or queue_offset < 0:
            return False
        queue.min_offset = queue.max_offset = queue.next_offset = queue.tail_offset = queue_offset
        return True

    def finish_rebuild(self, bounds: list[list[Any]]) -> None:
        """Everything the checkpoint covers was appended again: the queues must be those it knows.

        Those whose messages are all trimmed go on where they were. Raises InvariantBroken.
        """
        for topic, queue_id, _minimum, maximum, *_last in bounds:
            queue = self.pending_queue(topic.encode(), queue_id)
            if not queue.visible:
                self.adopt(queue, maximum)
                self._show(queue)
            if queue.max_offset != maximum:
                raise InvariantBroken(
                    f"the log gives {topic} {queue_id} a maximum of {queue.max_offset}, the checkpoint {maximum}"
                )
        known = {(topic, queue_id) for topic, queue_id, *_rest in bounds}
        for queue in self:
            if (queue.topic, queue.queue_id) not in known:
                raise InvariantBroken(f"the log holds messages of {queue.topic} {queue.queue_id}, the checkpoint none")

    # ----------------------------------------------------------------------------------------------------- trimming

    def trim(self, first_position: int) -> None:
        """Messages before this byte of the log are shown no more, in no queue."""
        self._trimmed_to = max(self._trimmed_to, first_position)

    def _settle(self, queue: QueueState) -> None:
        """Raise the minimum to the first unit at or behind the trimmed part. Raises OSError."""
        first_position = queue.settled_to = self._trimmed_to
        low, high = queue.min_offset, queue.max_offset
        if low == high or self.unit(queue, low)[0] >= first_position:
            return
        while low < high:
            middle = (low + high) // 2
            if self.unit(queue, middle)[0] < first_position:
                low = middle + 1
            else:
                high = middle
        queue.min_offset = low
        self._shrunk[queue] = None

    async def settle(self) -> None:
        """Have every queue look now, letting others run in between. Checkpoint (trio). Raises OSError."""
        for number, queue in enumerate([queue for queues in self._topics.values() for queue in queues.values()]):
            if number % SETTLED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if queue.settled_to < self._trimmed_to and not queue.gone:
                self._settle(queue)

    def collect_shrunk(self) -> list[tuple[QueueState, int]]:
        """For a checkpoint: queues with the minimum it knows, whose files below go once it is saved."""
        shrunk, self._shrunk = self._shrunk, {}
        return [(queue, queue.min_offset) for queue in shrunk]

    def give_back_shrunk(self, shrunk: list[tuple[QueueState, int]]) -> None:
        """No checkpoint came of it: their files wait for the next one."""
        self._shrunk.update((queue, None) for queue, _ in shrunk)

    async def drop_files(self, shrunk: list[tuple[QueueState, int]]) -> None:
        """Remove the files wholly below. Checkpoint (trio). Raises OSError."""
        for queue, minimum in shrunk:
            await trio.lowlevel.checkpoint()
            if queue.gone:
                continue  # what lies in its folder now belongs to a topic of the same name
            folder = self._folder_of(queue)
            for name in self._files.listdir(folder):
                if name.isdecimal() and int(name) + self._file_bytes <= minimum * UNIT_BYTES:
                    self._open.forget(f"{folder}/{name}")
                    queue.unsynced.pop(f"{folder}/{name}", None)
                    self._files.unlink(f"{folder}/{name}")

    def remove_all(self) -> None:
        """Forget everything, files too: they will be made again from the log."""
        self.forget_all()
        self._throw_away(self.folder)

    def forget_all(self) -> None:
        """As at the start of the process: what is in files stays there."""
        self._open.close()
        for queue in self.pending.values():
            queue.gone = True
        for queues in self._topics.values():
            for queue in queues.values():
                queue.gone = True
        self._topics.clear()
        self.pending.clear()
        self._dirty.clear()
        self._shrunk.clear()
        self._trimmed_to = 0

    def close(self) -> None:
        self._open.close()
