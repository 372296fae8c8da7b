"""The dedup window: a client's second send of a message gets the first one's result (design 4, raft.md 4.10).

(topic, UNIQ_KEY, body CRC) -> physical offset, in two generations that rotate. Keys are added when an entry is staged,
so pending sends are in it too, and the answer to a duplicate then waits for the original's commit. Age is judged by
store timestamps in the log, hence alike on every replica; the table holds hashes only, so a hit is verified against the
record. Only what clients send is in it: retries, delayed deliveries and dead letters reuse the key legitimately.
"""

from __future__ import annotations


def dedup_key(topic: bytes, unique_key: bytes, body_crc: int) -> int:
    """The window's key of one message. The hot paths compute the same expression in place."""
    return hash((topic, unique_key, body_crc))


class DedupWindow:
    """Two generations of hashes; the older one is dropped when the newer one is full or a window old.

    `window_ms` is a generation's span in store time, `max_keys` bounds both generations together.
    """

    __slots__ = (
        "_keys_per_generation",
        "current",
        "current_start_index",
        "current_start_ms",
        "enabled",
        "previous",
        "previous_start_index",
        "window_ms",
    )

    def __init__(self, window_ms: int, max_keys: int) -> None:
        self.enabled = window_ms > 0 and max_keys > 1
        self.window_ms = window_ms
        self._keys_per_generation = max(1, max_keys // 2)
        self.current: dict[int, int] = {}
        self.previous: dict[int, int] = {}
        self.current_start_ms = 0
        self.current_start_index = 0
        self.previous_start_index = 0

    def find(self, key: int) -> int | None:
        """Physical offset of the newest message under this hash."""
        position = self.current.get(key)
        return position if position is not None else self.previous.get(key)

    def forget(self, key: int, start: int) -> None:
        """The message under this hash was discarded before its commit, with everything from `start` on."""
        if self.current.get(key, -1) >= start:
            del self.current[key]
        elif self.previous.get(key, -1) >= start:
            del self.previous[key]

    def entry_applied(self, index: int, last_store_ms: int) -> None:
        """Rotate when the current generation is old or full. A function of committed entries only."""
        if not self.current_start_index:
            self.current_start_index = index
            self.current_start_ms = last_store_ms
            return
        if last_store_ms - self.current_start_ms >= self.window_ms or len(self.current) >= self._keys_per_generation:
            self.previous = self.current
            self.current = {}
            self.previous_start_index = self.current_start_index
            # Keys of entries staged but not applied sit in `previous` now: found there all the same.
            self.current_start_index = index + 1
            self.current_start_ms = last_store_ms

    @property
    def rebuild_from_index(self) -> int:
        """The first entry a restart must read again to have this window; 0 while it never held anything."""
        return self.previous_start_index or self.current_start_index

    def clear(self) -> None:
        self.current = {}
        self.previous = {}
        self.current_start_ms = 0
        self.current_start_index = 0
        self.previous_start_index = 0

    def __len__(self) -> int:
        return len(self.current) + len(self.previous)
