"""A table that is committed + pending (design 2): what proposals consult before their entry is committed.

Staging an entry pushes its changes, applying it moves them over, discarding it (newest entry first) takes them back. So
the leader at proposal and the followers on arrival compute the same pending view, and a cut of the log needs no scan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from remoting.bodies import DataVersion

K = TypeVar("K")
V = TypeVar("V")
C = TypeVar("C", bound=msgspec.Struct)


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


class ConfigTable(PendingTable[str, C]):
    """Configurations by name, with the version that others compare. One that is in the table is never changed in place.

    `kind` is what it holds, `key` names a configuration, and `defaults` are there without having been logged.
    """

    __slots__ = ("_defaults", "_key", "_kind", "data_version")

    def __init__(self, kind: type[C], key: str, defaults: list[C]) -> None:
        super().__init__()
        self._kind = kind
        self._key = key
        self._defaults = defaults
        self.data_version = DataVersion()
        self._add_defaults()

    def _add_defaults(self) -> None:
        for config in self._defaults:
            self.committed.setdefault(getattr(config, self._key), config)

    def all(self) -> dict[str, C]:
        """Committed ones by name, sorted."""
        return dict(sorted(self.committed.items()))

    def names(self) -> list[str]:
        return sorted(self.committed)

    def changed(self, wall_ms: int, term: int) -> None:
        """A committed change: the version moves on."""
        self.data_version = self.data_version.next(wall_ms, term)

    def snapshot(self) -> dict[str, Any]:
        return {
            "version": msgspec.to_builtins(self.data_version),
            "configs": [msgspec.to_builtins(config) for config in self.all().values()],
        }

    def restore(self, snapshot: dict[str, Any] | None) -> None:
        self.committed.clear()
        self._pending.clear()
        self.data_version = DataVersion()
        if snapshot is not None:
            self.data_version = msgspec.convert(snapshot["version"], DataVersion)
            for plain in snapshot["configs"]:
                config = msgspec.convert(plain, self._kind)
                self.committed[getattr(config, self._key)] = config
        self._add_defaults()
