"""How accepted entries get to the page cache and to stable storage, and how the disk is kept ready for them.

A turn writes; everything that waits for the disk runs beside the turns: syncs, one at a time (group commit), the writes
themselves while the disk is slow, and the preparation of the next segment. What is reached is read from the store's
two marks in the turn that follows, so marks, cuts and syncs are seen in the same order whoever wrote.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from dledger.config import GroupConfig
from dledger.disk_watch import CUT, LOG_SYNC, LOG_WRITE, DiskWatch
from dledger.kick import Kick
from dledger.measures import Measures
from dledger.store.log_store import LogStore
from runtime.logs import Logger
from runtime.model import Env

DISK_FULL_RETRY_SECONDS = 1.0


class LogFlusher:
    """The one that writes to the log of a driver, between its cuts."""

    def __init__(
        self,
        env: Env,
        config: GroupConfig,
        log: Logger,
        store: LogStore,
        disk: DiskWatch,
        measures: Measures,
        *,
        pump: Callable[[], None],
        wake: Callable[[], None],
        is_cut_due: Callable[[], bool],
        segment_closed: Callable[[], None],
    ) -> None:
        """`pump` runs a turn, `wake` has one run soon. `is_cut_due`: nothing is to be written before the cut.
        `segment_closed` is called when the log goes on in its next segment, before the one behind that is made."""
        self._clock = env.clock
        self._monotonic = env.clock.monotonic
        self._config = config
        self._log = log
        self._store = store
        self._disk = disk
        self._measures = measures
        self._pump = pump
        self._wake = wake
        self._is_cut_due = is_cut_due
        self._segment_closed = segment_closed
        self._sync_kick = Kick()
        self._spare_kick = Kick()
        self._write_kick = Kick()
        self._is_writing = False
        self._watched_index = -1

    @property
    def services(self) -> tuple[Callable[[], Awaitable[None]], ...]:
        """Each to run in a task of its own. They raise LogDamaged, StoreFailed or OSError."""
        return self._keep_synced, self._keep_written, self._keep_spare, self._keep_scrubbed, self._store.watch_files

    def write(self, *, is_sampled: bool) -> None:
        """Bring accepted entries to the page cache, or have them brought there while the disk is slow."""
        store = self._store
        if store.unwritten:
            if self._is_writing or store.is_slow:
                self._write_kick.give()
            else:
                store.write()
                if is_sampled:
                    self._measures.write.record(store.last_write_seconds)
            if store.needs_spare or store.disk_full:
                self._spare_kick.give()
            self._sync_kick.give()
            if store.unwritten:
                self._watch_write()
        elif self._watched_index >= 0:
            self._watched_index = -1
            self._disk.end(LOG_WRITE)

    async def cut(self, from_index: int) -> None:
        """Cut the log on stable storage. Checkpoint. Raises StoreFailed or LogDamaged."""
        self._disk.begin(CUT)
        await self._store.cut(from_index)
        self._disk.end(CUT)
        self._spare_kick.give()

    def _watch_write(self) -> None:
        """Entries wait to be written: for a thread, or for room. As long as some get through it is no stall."""
        written_index = self._store.written_index
        if written_index != self._watched_index:
            self._watched_index = written_index
            self._disk.begin(LOG_WRITE)

    async def _keep_synced(self) -> None:
        """One sync at a time. While it runs, the next batch of entries gathers (group commit)."""
        store = self._store
        is_sync = self._config.flush == "sync"
        interval = self._config.flush_interval_ms / 1000
        while True:
            await self._sync_kick.wait()
            if not is_sync:
                await self._clock.sleep(interval)
                self._sync_kick.clear()
            if not store.unsynced:
                continue
            self._disk.begin(LOG_SYNC)
            started = self._monotonic()
            await store.sync()
            self._measures.fsync.record(self._monotonic() - started)
            self._disk.end(LOG_SYNC)
            self._measures.counters["syncs"] += 1
            if store.unsynced:
                self._sync_kick.give()
            self._pump()

    async def _keep_written(self) -> None:
        """The log's writes, while the disk is slow: the turns leave them to this."""
        store = self._store
        while True:
            await self._write_kick.wait()
            written_index = -1
            while store.unwritten and not self._is_cut_due() and store.written_index != written_index:
                written_index = store.written_index
                self._is_writing = True
                try:
                    await store.write_in_thread()
                finally:
                    self._is_writing = False
                self._measures.write.record(store.last_write_seconds)
                self._measures.counters["writes_in_thread"] += 1
                self._sync_kick.give()
                if store.written_index != written_index:
                    self._pump()
                elif store.needs_spare or store.disk_full:
                    self._spare_kick.give()  # whoever makes room wakes the next turn; a turn before that would spin

    async def _keep_spare(self) -> None:
        """Have the next segment ready before it is needed. A full disk shows here, and costs leadership."""
        store = self._store
        while True:
            if store.needs_spare or store.disk_full:
                self._segment_closed()
                await store.prepare_spare()
                if store.unwritten:
                    self._wake()
            if store.disk_full != self._disk.is_full:
                self._disk.is_full = store.disk_full
                self._log.warning("disk full" if store.disk_full else "disk has room again")
            if store.disk_full:
                await self._clock.sleep(DISK_FULL_RETRY_SECONDS)
            else:
                await self._spare_kick.wait()

    async def _keep_scrubbed(self) -> None:
        if self._config.scrub_bytes_per_second:
            await self._store.scrub(self._config.scrub_bytes_per_second)
