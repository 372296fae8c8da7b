"""The log as the core sees it, with the reading of old entries moved off the loop.

A peer that lags far behind wants entries that left memory long ago. Reading them from the disk would hold up the loop,
and with it everybody else. So the first question for such entries gets none, a thread reads ahead, and the driver's
next turn asks again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import trio

from dledger.core.types import HEADER_BYTES, BadFrame, Entry, parse_entry
from dledger.errors import LogDamaged
from dledger.kick import Kick
from dledger.store.log_store import LogStore

READ_BYTES = 4 * 1024 * 1024
"""What one reading brings: half a peer's window."""
RUN_ENTRIES_MAX = 2048
"""Parsing is work for the loop: no more of it at once."""
RUNS_MAX = 6
"""How many readings are kept: one or two for each peer that may lag."""


class LogFeed:
    """A `LogView` over the store. `entries` answers () where the entries have yet to be read; a reading follows."""

    def __init__(self, store: LogStore, segment_bytes: int, ready: Callable[[], None]) -> None:
        """`ready` is called when entries that were asked for in vain are at hand."""
        self._store = store
        self._segment_bytes = segment_bytes
        self._ready = ready
        self.term_at = store.term_at
        self.head_crc_at = store.head_crc_at
        self.position_of = store.position_of
        self._runs: OrderedDict[int, Sequence[Entry]] = OrderedDict()
        self._wanted: deque[int] = deque()
        self._kick = Kick()
        self._generation = 0
        self.is_leading = False
        """Only a leader feeds peers; what a follower asks about its own end is answered on the spot."""
        self.reads = 0

    @property
    def first_index(self) -> int:
        return self._store.first_index

    @property
    def last_index(self) -> int:
        return self._store.last_index

    @property
    def last_term(self) -> int:
        return self._store.last_term

    @property
    def position_end(self) -> int:
        return self._store.position_end

    def entries(self, from_index: int, max_bytes: int) -> Sequence[Entry]:
        """As `LogStore.entries` where they are in memory; else (), and a reading begins."""
        store = self._store
        if (
            not self.is_leading
            or store.is_recent(from_index)
            or not store.first_index <= from_index <= store.written_index
        ):
            return store.entries(from_index, max_bytes)
        for first, run in self._runs.items():
            if first <= from_index < first + len(run):
                self._runs.move_to_end(first)
                return _slice(run, from_index - first, max_bytes)
        if from_index not in self._wanted and len(self._wanted) < RUNS_MAX:
            self._wanted.append(from_index)
            self._kick.give()
        return ()

    def forget(self) -> None:
        """After a cut, a trim or the end of a leadership: what was read may not be the log any more."""
        self._generation += 1
        self._runs.clear()
        self._wanted.clear()

    async def run(self) -> None:
        """Read what is wanted, for ever. Checkpoint. Raises LogDamaged."""
        while True:
            await self._kick.wait()
            while self._wanted:
                index = self._wanted[0]
                generation = self._generation
                run = await self._read(index)
                if generation != self._generation:
                    continue
                self._wanted.popleft()
                if run:
                    self._runs[index] = run
                    if len(self._runs) > RUNS_MAX:
                        self._runs.popitem(last=False)
                self._ready()

    async def _read(self, index: int) -> Sequence[Entry]:
        self.reads += 1
        return await read_entries(self._store, self._segment_bytes, index, READ_BYTES)


async def read_entries(store: LogStore, segment_bytes: int, index: int, nbytes: int) -> Sequence[Entry]:
    """Entries from `index` on, read in a thread: at least one where it exists, and no more than about `nbytes`, of one
    segment. Checkpoint. Raises LogDamaged.
    """
    position = store.position_of(index)
    if position is None or index > store.written_index:
        await trio.lowlevel.checkpoint()
        return ()
    end = min(store.end_of(store.written_index), position - position % segment_bytes + segment_bytes)
    data = await store.read_in_thread(position, min(nbytes, end - position))
    if data is not None and len(data) >= HEADER_BYTES:
        length = HEADER_BYTES + int.from_bytes(data[40:44], "little")
        if len(data) < length <= end - position:
            data = await store.read_in_thread(position, length)
    if data is None:
        return ()  # trimmed meanwhile
    entries: list[Entry] = []
    taken = 0
    while taken + HEADER_BYTES <= len(data) and len(entries) < RUN_ENTRIES_MAX:
        try:
            entry = parse_entry(data, taken)
        except BadFrame as error:
            if not entries:
                raise LogDamaged(f"entry {index} at position {position} cannot be read: {error}") from error
            break
        if entry.index != index + len(entries):
            break
        entries.append(entry)
        taken += len(entry.frame)
    return entries


def _slice(run: Sequence[Entry], start: int, max_bytes: int) -> list[Entry]:
    taken = [run[start]]
    size = len(run[start].frame)
    for entry in run[start + 1 :]:
        size += len(entry.frame)
        if size > max_bytes:
            break
        taken.append(entry)
    return taken
