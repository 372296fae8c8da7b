"""What a node must not forget, on its way to the meta slots: term and vote, whether it recovers, the durable mark.

Term and vote are saved before the core lets anybody know of them (raft.md 4.2).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from dledger.config import GroupConfig
from dledger.disk_watch import HARD_STATE, DiskWatch
from dledger.errors import NoRoom
from dledger.kick import Kick
from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile
from runtime.model import Env

NO_ROOM_RETRY_SECONDS = 0.5


class HardStateKeeper:
    """Saves beside the turns of a driver, the newest values first."""

    def __init__(
        self,
        env: Env,
        config: GroupConfig,
        meta: MetaFile,
        store: LogStore,
        disk: DiskWatch,
        *,
        saved: Callable[[int, str | None], None],
        is_cut_due: Callable[[], bool],
    ) -> None:
        """`saved(term, vote)`: they are on stable storage. `is_cut_due`: the durable mark may be about to go down."""
        self._clock = env.clock
        self._interval = config.flush_interval_ms / 1000
        self._meta = meta
        self._store = store
        self._disk = disk
        self._saved = saved
        self._is_cut_due = is_cut_due
        self._wanted: tuple[int, str | None] | None = None
        self._wanted_kick = Kick()
        self._recovered_kick = Kick()

    @property
    def services(self) -> tuple[Callable[[], Awaitable[None]], ...]:
        """Each to run in a task of its own. They raise StoreFailed."""
        return self._keep_hard_state, self._keep_recovered, self._keep_marked

    def save(self, term: int, vote: str | None) -> None:
        """`saved` follows; values that are overtaken by newer ones may never be."""
        self._wanted = (term, vote)
        self._wanted_kick.give()

    def recovered(self) -> None:
        """A leader has confirmed the log: the next start need not recover."""
        self._recovered_kick.give()

    async def _keep_hard_state(self) -> None:
        while True:
            await self._wanted_kick.wait()
            wanted, self._wanted = self._wanted, None
            if wanted is None:
                continue
            self._disk.begin(HARD_STATE)
            await self._until_there_is_room(partial(self._meta.save_hard_state, *wanted))
            self._disk.end(HARD_STATE)
            self._saved(*wanted)

    async def _keep_recovered(self) -> None:
        """A node that is killed while it recovers does so again at its next start, until a leader has confirmed it."""
        while True:
            await self._recovered_kick.wait()
            await self._until_there_is_room(partial(self._meta.save_recovering, False))

    async def _until_there_is_room(self, save: Callable[[], Awaitable[None]]) -> None:
        """Nobody is told meanwhile; a leader whose disk stalls for so long steps down."""
        while True:
            try:
                await save()
            except NoRoom:
                await self._clock.sleep(NO_ROOM_RETRY_SECONDS)
            else:
                return

    async def _keep_marked(self) -> None:
        """Bring the durable mark to the meta slot now and then: evidence for a recovery."""
        while True:
            await self._clock.sleep(self._interval)
            if self._store.durable_index != self._meta.saved.durable_index and not self._is_cut_due():
                with suppress(NoRoom):
                    await self._meta.save_mark(self._store.durable_index)
