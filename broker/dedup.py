"""The dedup window: a client's second send of a message gets the first one's result (design 4, raft.md 4.10).

(topic, UNIQ_KEY, body CRC) -> physical offset, in two generations that rotate. Keys are added when an entry is staged,
so pending sends are in it too, and the answer to a duplicate then waits for the original's commit. Generations rotate
by store timestamps in the log, hence alike on every replica, but each forgets by itself what nobody adds to any more.
The table holds hashes only, so a hit is verified against the record, its age included, and a key under which another
message stands already goes to the next free one. Only what clients send is in it: retries, delayed deliveries and dead
letters reuse the key legitimately.

With each checkpoint of the tables the keys applied since the last one are appended to a file per generation, 16 bytes a
key. A start loads them and need not read the last minute of the log again (decision record 0007).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final
from zlib import crc32

import trio
from attrs import frozen

from broker.tables import InvariantBroken
from runtime.model import Files

PROBES: Final = 4
"""Keys tried for one message; with 1,000,000 of them even the second one is hardly ever taken."""
ROW_BYTES: Final = 16
SLICE_KEYS: Final = 8_192
"""Keys looked up while others wait for the loop: about a millisecond."""

_BODY_BITS: Final = 31
_KEY_MASK: Final = (1 << 63) - 1


def dedup_key(topic_seed: int, unique_key: bytes, body_crc: int) -> int:
    """The window's key of one message: 63 bits, alike in every process.

    The upper part is the message's hash in the key index too, so the hot paths put the two together in place.
    """
    return crc32(unique_key, topic_seed) << _BODY_BITS | body_crc


def _next_key(key: int) -> int:
    return (key * 6364136223846793005 + 1442695040888963407) & _KEY_MASK


@frozen
class SavedGeneration:
    """What a checkpoint says of one generation's file: it has `rows` keys, the first of them from `start_index` on."""

    start_index: int
    start_ms: int
    rows: int

    def plain(self) -> list[int]:
        return [self.start_index, self.start_ms, self.rows]


@frozen
class UnsavedKeys:
    """Keys of applied entries that belong behind row `from_row` of the file of generation `start_index`."""

    start_index: int
    from_row: int
    keys: array[int]


class DedupWindow:
    """Two generations of hashes; the older one is dropped when the newer one is full or a window old.

    `window_ms` is a generation's span in store time, `max_keys` bounds both generations together.
    """

    __slots__ = (
        "_keys_per_generation",
        "_newest_ms",
        "_newest_since_s",
        "_rows",
        "_unsaved",
        "current",
        "current_start_index",
        "current_start_ms",
        "enabled",
        "previous",
        "previous_start_index",
        "previous_start_ms",
        "window_ms",
    )

    def __init__(self, window_ms: int, max_keys: int) -> None:
        self.enabled = window_ms > 0 and max_keys > 1
        self.window_ms = window_ms
        self._keys_per_generation = max(1, max_keys // 2)
        self._newest_ms = -1
        self._newest_since_s = 0.0
        self.clear()

    def clear(self) -> None:
        self.current: dict[int, int] = {}
        self.previous: dict[int, int] = {}
        self.current_start_ms = self.previous_start_ms = 0
        self.current_start_index = self.previous_start_index = 0
        self._rows = [0, 0]
        """Keys in the files of the previous and the current generation."""
        self._unsaved = [array("Q"), array("Q")]

    def find(self, key: int) -> int | None:
        """Physical offset of the newest message under this hash."""
        position = self.current.get(key)
        return position if position is not None else self.previous.get(key)

    def others(self, key: int, found: int) -> Iterator[int]:
        """Where else the message may be, as the one at `found` is another with the same hash."""
        for probe in range(PROBES):
            for position in (self.current.get(key), self.previous.get(key)):
                if position is not None and (probe or position != found):
                    yield position
            key = _next_key(key)

    def free_key(self, key: int) -> int:
        """Under what a message goes whose key another one has in the current generation."""
        for _ in range(PROBES - 1):
            if key not in self.current:
                break
            key = _next_key(key)
        return key

    def enter(self, keys: list[int], positions: list[int]) -> list[int]:
        """Messages that were staged, under their keys; returns under which ones they are here."""
        current = self.current
        new = dict(zip(keys, positions, strict=True))
        if len(new) == len(keys) and current.keys().isdisjoint(new):
            current.update(new)
            return keys
        entered: list[int] = []
        for key, position in zip(keys, positions, strict=True):
            if key in current:
                key = self.free_key(key)
            current[key] = position
            entered.append(key)
        return entered

    def forget(self, key: int, start: int) -> None:
        """The message under this hash was discarded before its commit, with everything from `start` on."""
        if self.current.get(key, -1) >= start:
            del self.current[key]
        elif self.previous.get(key, -1) >= start:
            del self.previous[key]

    def entry_applied(self, index: int, last_store_ms: int, keys: list[int], start: int) -> None:
        """Keys of a committed entry, which begins at `start`, are here to stay. Rotates when the current generation is
        old or full: by what is committed only."""
        if not self.enabled:
            return
        if keys and keys[-1] not in self.current:
            # Staged before the last rotation: from now on they are as old as the entry is.
            for key in keys:
                position = self.previous.pop(key, None)
                if position is not None:
                    self.current[key] = position
        self._unsaved[1].fromlist(keys)
        if not self.current_start_index:
            self.current_start_index = index
            self.current_start_ms = last_store_ms
            return
        if last_store_ms - self.current_start_ms >= self.window_ms or len(self.current) >= self._keys_per_generation:
            # What is staged and not applied must not go with the generation it was staged in. It stands at the end.
            staged: list[tuple[int, int]] = []
            for row in reversed(self.previous.items()):
                if row[1] <= start:
                    break
                staged.append(row)
            self.previous = self.current
            self.previous.update(reversed(staged))
            self.current = {}
            self.previous_start_index, self.previous_start_ms = self.current_start_index, self.current_start_ms
            self.current_start_index = index + 1
            self.current_start_ms = last_store_ms
            self._rows = [self._rows[1], 0]
            self._unsaved = [self._unsaved[1], array("Q")]

    def forget_old(self, now_ms: int, now_s: float, last_store_ms: int) -> None:
        """Where the last message is older than a window, so is every other: a key takes 136 bytes, and a broker without
        sends would keep up to a million of them. Only while nothing is staged and not applied.

        `now_ms` is wall time, which judges duplicates; but it may jump ahead for a moment, so the last message has to
        be the last one for a window of monotonic time (`now_s`, seconds), too.
        """
        if last_store_ms != self._newest_ms:
            self._newest_ms, self._newest_since_s = last_store_ms, now_s
        quiet_ms = min(now_ms - last_store_ms, (now_s - self._newest_since_s) * 1000)
        if (self.current or self.previous) and quiet_ms > self.window_ms:
            self.clear()

    def collect(self) -> tuple[list[SavedGeneration], list[UnsavedKeys]]:
        """For a checkpoint: what the files will hold, and what must be appended to them for that."""
        saved: list[SavedGeneration] = []
        unsaved: list[UnsavedKeys] = []
        starts = (self.previous_start_index, self.previous_start_ms), (self.current_start_index, self.current_start_ms)
        for which, (start_index, start_ms) in enumerate(starts):
            if not start_index:
                continue
            keys, self._unsaved[which] = self._unsaved[which], array("Q")
            if keys:
                unsaved.append(UnsavedKeys(start_index, self._rows[which], keys))
            self._rows[which] += len(keys)
            saved.append(SavedGeneration(start_index, start_ms, self._rows[which]))
        return saved, unsaved

    def give_back(self, unsaved: list[UnsavedKeys]) -> None:
        """No checkpoint came of what was collected: it belongs to the next one. A generation that is gone meanwhile
        needs no file any more."""
        starts = self.previous_start_index, self.current_start_index
        for part in unsaved:
            if part.start_index in starts:
                which = starts.index(part.start_index)
                self._rows[which] = part.from_row
                self._unsaved[which] = part.keys + self._unsaved[which]

    def take_up(self, generations: list[tuple[SavedGeneration, dict[int, int]]]) -> None:
        """Begin with what a checkpoint covers: the older generation first."""
        self.clear()
        for saved, keys in generations:
            self.previous, self.current = self.current, keys
            self.previous_start_index, self.previous_start_ms = self.current_start_index, self.current_start_ms
            self.current_start_index, self.current_start_ms = saved.start_index, saved.start_ms
            self._rows = [self._rows[1], saved.rows]

    def __len__(self) -> int:
        return len(self.current) + len(self.previous)


class DedupFiles:
    """The generations' files: `dedup/<index of the first entry>` in the node's folder, rows of key and position."""

    def __init__(self, files: Files, data_dir: str) -> None:
        if sys.byteorder != "little" or array("Q").itemsize != 8:
            raise InvariantBroken("the dedup window's files are laid out for little-endian machines")
        self._files = files
        self.folder = f"{data_dir}/dedup"

    def _path(self, start_index: int) -> str:
        return f"{self.folder}/{start_index:020d}"

    async def append(
        self, window: DedupWindow, unsaved: list[UnsavedKeys], run_in_thread: Callable[..., Awaitable[Any]]
    ) -> None:
        """Write collected keys with their positions, durably. Checkpoint (trio). Raises OSError."""
        for part in unsaved:
            keys = part.keys
            rows = array("Q", bytes(ROW_BYTES * len(keys)))
            rows[0::2] = keys
            for at in range(0, len(keys), SLICE_KEYS):
                found = [window.find(key) or 0 for key in keys[at : at + SLICE_KEYS]]
                rows[2 * at + 1 : 2 * (at + len(found)) : 2] = array("Q", found)
                await trio.lowlevel.checkpoint()
            self._files.make_dirs(self.folder)
            file = self._files.open(self._path(part.start_index), create=True)
            try:
                await run_in_thread(file.pwrite, rows.tobytes(), ROW_BYTES * part.from_row)
                await file.sync()
            finally:
                file.close()
        if unsaved:
            await run_in_thread(self._files.sync_dir, self.folder)

    def load(self, saved: list[SavedGeneration]) -> list[tuple[SavedGeneration, dict[int, int]]] | None:
        """What a checkpoint counts on; None where a file holds less. Raises OSError."""
        generations: list[tuple[SavedGeneration, dict[int, int]]] = []
        for one in saved:
            keys: dict[int, int] = {}
            if one.rows:
                try:
                    file = self._files.open(self._path(one.start_index))
                except FileNotFoundError:
                    return None
                try:
                    data = file.pread(ROW_BYTES * one.rows, 0)
                finally:
                    file.close()
                if len(data) != ROW_BYTES * one.rows:
                    return None
                rows = array("Q")
                rows.frombytes(data)
                keys = dict(zip(rows[0::2], rows[1::2], strict=True))
            generations.append((one, keys))
        return generations

    def keep_only(self, saved: list[SavedGeneration]) -> None:
        """Remove the files of generations that a saved checkpoint no longer names. Raises OSError."""
        wanted = {f"{one.start_index:020d}" for one in saved}
        for name in self._files.listdir(self.folder):
            if name not in wanted:
                self._files.unlink(f"{self.folder}/{name}")

    def remove_all(self) -> None:
        """Begin anew. Raises OSError."""
        if self._files.exists(self.folder):
            self._files.remove_tree(self.folder)
