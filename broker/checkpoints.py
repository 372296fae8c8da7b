"""Checkpoints of the tables: when one is due, and how it is taken beside the running group (decision record 0007).

A checkpoint is one synchronous look at every table, and files that hold at least as much: units, keys and the dedup
window are appended and synced first, the blob with the look is saved last. What the blob no longer counts on is removed
only then, so whatever a crash interrupts, the newest saved blob finds its files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import trio

from broker.errors import DISK_FULL
from broker.store_files import encode_checkpoint

if TYPE_CHECKING:
    from broker.state import BrokerState

SOON_INTERVAL_S: Final = 1.0
"""Between two checkpoints that were asked for."""
ROOM_BYTES: Final = 64 * 1024 * 1024
"""On a disk with less room than that (or a sixteenth) no checkpoint is begun, as half of one would have to be undone;
unless it is asked for: segments of the log may wait for it, and be what makes room."""
FULL_PAUSE_S: Final = 5.0
"""After one that had to be undone all the same (a quota): until the next try."""


class Checkpoints:
    """Takes the checkpoints of one node's tables, one at a time."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._lock = trio.Lock()
        self._position = 0
        self._at = 0.0
        self._wanted = False
        self._paused_until = 0.0
        self.saved_index = 0
        """What the last one covers."""

    def restored(self, position: int) -> None:
        """The tables were loaded from a checkpoint that covers the log up to this byte."""
        self._at = self._state.env.clock.monotonic()
        self._position = position
        self._wanted = False

    def soon(self) -> None:
        """Whatever has grown since the last one: with the next look of the maintenance."""
        self._wanted = True

    @property
    def is_due(self) -> bool:
        state = self._state
        config = state.config
        if not state.group.is_serving:
            return False  # a log that is repaired or replayed: the tables are on their way
        now = state.env.clock.monotonic()
        since = now - self._at
        if now < self._paused_until:
            return False
        if self._wanted:
            return since >= SOON_INTERVAL_S
        if since < config.checkpoint_interval_ms / 1000:
            return False
        grown = state.group.committed_position - self._position
        return grown >= config.checkpoint_log_bytes or state.meta_bytes >= config.checkpoint_meta_bytes

    async def save(self) -> None:
        """Write queues, index, dedup window and tables. Checkpoint (trio). Raises OSError.

        Gives up without a word where the tables are loaded anew meanwhile, and on a full disk: the log has it all, and
        what was collected stays for the next one.
        """
        async with self._lock:
            free, total = self._state.env.files.free_space(self._state.config.data_dir)
            if self._wanted or free >= min(ROOM_BYTES, total // 16):
                try:
                    await self._save()
                except OSError as error:
                    if error.errno not in DISK_FULL:
                        raise
                    self._paused_until = self._state.env.clock.monotonic() + FULL_PAUSE_S

    async def _save(self) -> None:
        state = self._state
        run_in_thread = state.env.run_in_thread
        run = state.runs
        await state.queues.settle()
        await state.index.persist(run_in_thread)
        if state.runs != run or not state.restart.is_complete:
            return
        # One synchronous look at everything: it covers exactly the entries up to `applied_index`.
        state.queues.flush()
        if state.queues.is_full:
            return
        index = state.applied_index
        position = state.group.committed_position if state.group.is_serving else self._position
        saved, unsaved = state.dedup.collect()
        tables: dict[str, Any] = {
            "index": index,
            "position": position,
            "topics": state.topics.snapshot(),
            "groups": state.groups.snapshot(),
            "offsets": state.offsets.snapshot(),
            "locks": state.locks.snapshot(),
            "delay": state.delay.snapshot(),
            "queues": state.queues.bounds(),
            "key_index": state.index.snapshot(),
            "last_store_ms": state.staging.last_store_ms,
            "put_messages": state.put_messages,
            "dedup": [one.plain() for one in saved],
        }
        shrunk = state.queues.collect_shrunk()
        dropped = state.index.collect_dropped()
        before = state.meta_bytes, self._position
        state.meta_bytes = 0
        self._wanted = False
        self._at = state.env.clock.monotonic()
        self._position = position
        try:
            await state.dedup_files.append(state.dedup, unsaved, run_in_thread)
            await state.queues.sync()
            await state.index.sync()
            if not index or state.runs != run:
                return
            blob = await run_in_thread(encode_checkpoint, tables)
            if state.runs != run:
                return
            is_saved = await run_in_thread(state.group.save_checkpoint, index, blob)
        except OSError:
            if state.runs == run:  # what was collected for this one is the next one's
                state.dedup.give_back(unsaved)
                state.queues.give_back_shrunk(shrunk)
                state.index.give_back_dropped(dropped)
                state.meta_bytes += before[0]
                self._position = before[1]
            raise
        if not is_saved or state.runs != run:
            return  # the group has stopped meanwhile: an older checkpoint counts, with the files it names
        self.saved_index = index
        state.dedup_files.keep_only(saved)
        state.index.remove(dropped)
        await state.queues.drop_files(shrunk)
