"""What the core asks of the log, and the smallest thing that answers.

The core never reads a disk. It asks a `LogView` about entries it has handed out earlier in `Append` effects (or that
were there at start) and keeps the identity of the last entry itself.

Contract with the driver: the effects of one step are performed, in order, before the next step. From then on the view
shows the result of `Append` and `Cut`, whether or not the bytes have reached the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from dledger.core.types import Entry


class LogView(Protocol):
    """Read-only view of the entries, appended or kept from before. Index 0 stands for "before the first entry"."""

    @property
    def first_index(self) -> int:
        """First retained entry; 1 while nothing was trimmed, `last_index + 1` when nothing is retained."""

    @property
    def last_index(self) -> int: ...

    @property
    def last_term(self) -> int:
        """Term of the last *stored* entry and nothing else (dledger#52); 0 for an empty log."""

    @property
    def position_end(self) -> int:
        """Byte after the last entry."""

    def term_at(self, index: int) -> int | None:
        """Term of an entry in `first_index - 1 .. last_index` (0 at index 0), else None."""

    def head_crc_at(self, index: int) -> int | None:
        """Chain checksum of an entry in the same range (0 at index 0), else None."""

    def position_of(self, index: int) -> int | None:
        """Byte at which a retained entry begins; None outside `first_index .. last_index`."""

    def entries(self, from_index: int, max_bytes: int) -> Sequence[Entry]:
        """Entries from `from_index` on: at least one when it exists, and no more than `max_bytes` of frames.

        A leader may get none where they have to be read from the disk first; whoever drives it asks again then, by the
        next `TurnEnd`.
        """


class MemoryLog:
    """A `LogView` over a plain list, with the two operations the core's effects ask for."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: list[Entry] = list(entries)
        self._trimmed_index = 0
        self._trimmed_term = 0
        self._trimmed_crc = 0
        self._trimmed_end = 0

    @property
    def first_index(self) -> int:
        return self._trimmed_index + 1

    @property
    def last_index(self) -> int:
        return self._trimmed_index + len(self._entries)

    @property
    def last_term(self) -> int:
        return self._entries[-1].term if self._entries else self._trimmed_term

    @property
    def position_end(self) -> int:
        return self._entries[-1].end if self._entries else self._trimmed_end

    def term_at(self, index: int) -> int | None:
        offset = index - self._trimmed_index - 1
        if 0 <= offset < len(self._entries):
            return self._entries[offset].term
        return self._trimmed_term if offset == -1 else None

    def head_crc_at(self, index: int) -> int | None:
        offset = index - self._trimmed_index - 1
        if 0 <= offset < len(self._entries):
            return self._entries[offset].head_crc
        return self._trimmed_crc if offset == -1 else None

    def position_of(self, index: int) -> int | None:
        offset = index - self._trimmed_index - 1
        return self._entries[offset].position if 0 <= offset < len(self._entries) else None

    def entries(self, from_index: int, max_bytes: int) -> list[Entry]:
        offset = from_index - self._trimmed_index - 1
        if offset < 0:
            return []
        taken: list[Entry] = []
        size = 0
        for entry in self._entries[offset : offset + 256]:
            size += len(entry.frame)
            if taken and size > max_bytes:
                break
            taken.append(entry)
        return taken

    def append(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            assert entry.index == self.last_index + 1, (entry.index, self.last_index)
            self._entries.append(entry)

    def cut(self, from_index: int) -> list[Entry]:
        """Drop `from_index` and everything behind it; what was dropped is returned, oldest first."""
        assert from_index >= self.first_index, (from_index, self.first_index)
        offset = from_index - self._trimmed_index - 1
        dropped = self._entries[offset:]
        del self._entries[offset:]
        return dropped

    def trim(self, through_index: int) -> None:
        """Forget the head of the log up to and including `through_index`, as retention does."""
        count = through_index - self._trimmed_index
        last = self._entries[count - 1]
        self._trimmed_index, self._trimmed_term = last.index, last.term
        self._trimmed_crc, self._trimmed_end = last.head_crc, last.end
        del self._entries[:count]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
