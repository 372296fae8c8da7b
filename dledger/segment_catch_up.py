"""A follower that is too far behind for entries (raft.md 4.7): it pulls whole segments beside whatever else happens."""

from __future__ import annotations

from collections.abc import Callable

from dledger.errors import LogDamaged
from dledger.install import Installer, Pulled, adds_to
from dledger.kick import Kick
from dledger.store.log_store import LogStore


class SegmentCatchUp:
    """Of one run of a node. One transfer at a time: one leader's offer is as good as another's."""

    def __init__(
        self, store: LogStore, make_installer: Callable[[], Installer], verified_index: Callable[[], int]
    ) -> None:
        """`verified_index()`: up to where the log is known to be the leader's."""
        self._store = store
        self._make_installer = make_installer
        self._verified_index = verified_index
        self._needed = 0
        self._need = Kick()
        self.installer: Installer | None = None
        """Of the transfer under way."""

    def need(self, first_index: int) -> None:
        """The core's: only whole segments can bring this node to `first_index`."""
        self._needed = first_index
        self._need.give()

    async def run(self) -> Pulled:
        """Wait for such a need, and fill it; returns when the log is to be replaced by what was pulled. Checkpoint.
        Raises LogDamaged for this node's own segments, OSError where the disk fails.
        """
        while True:
            await self._need.wait()
            self.installer = self._make_installer()
            try:
                pulled = await self.installer.pull(lambda: self._needed - 1, self._is_needed)
            finally:
                self.installer = None
            if pulled is not None and is_useful(self._store, pulled):
                return pulled

    def _is_needed(self) -> bool:
        """An index alone proves nothing: a log that differs from the leader's may be as long."""
        return self._verified_index() + 1 < self._needed


def is_useful(store: LogStore, pulled: Pulled) -> bool:
    """Whether what was pulled adds to a log, or ordinary replication was faster in the end."""
    try:
        return adds_to(store, pulled.manifest)
    except LogDamaged:
        return False  # what this log holds is to be found out, and mended, first
