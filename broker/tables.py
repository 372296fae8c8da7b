"""A table that is committed + pending (design 2): what proposals consult before their entry is committed.

Staging an entry pushes its changes, applying it moves them over, discarding it (newest entry first) takes them back. So
the leader at proposal and the followers on arrival compute the same pending view, and a cut of the log needs no scan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class InvariantBroken(Exception):
    """What committed + pending promises does not hold: the node must stop with this one line."""


class PendingTable(Generic[K, V]):
    """A mapping whose changes wait for the commit of their entry. A pending None is a deletion."""

    __slots__ = ("_pending", "committed")

    def __init__(self) -> None:
        self.committed: dict[K, V] = {}
        self._pending: dict[K, deque[V | None]] = {}

    def get(self, key: K) -> V | None:
        """The committed value."""
        return self.committed.get(key)

    def get_pending(self, key: K) -> V | None:
        """The value once everything staged so far is committed."""
        changes = self._pending.get(key)
        return changes[-1] if changes else self.committed.get(key)

    def is_pending(self, key: K) -> bool:
        """A change of this key is staged and not yet committed."""
        return key in self._pending

    def pending_keys(self) -> Iterator[K]:
        return iter(self._pending)

    def stage(self, key: K, value: V | None) -> None:
        changes = self._pending.get(key)
        if changes is None:
            changes = self._pending[key] = deque()
        changes.append(value)

    def apply(self, key: K) -> V | None:
        """Commit the oldest staged change of `key`; returns it."""
        changes = self._pending.get(key)
        if not changes:
            raise InvariantBroken(f"nothing is staged for {key!r}")
        value = changes.popleft()
        if not changes:
            del self._pending[key]
        if value is None:
            self.committed.pop(key, None)
        else:
            self.committed[key] = value
        return value

    def discard(self, key: K) -> None:
        """Take back the newest staged change of `key`."""
        changes = self._pending.get(key)
        if not changes:
            raise InvariantBroken(f"nothing is staged for {key!r}")
        changes.pop()
        if not changes:
            del self._pending[key]
