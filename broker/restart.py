"""What a node begins with: the newest checkpoint of the tables, and files that may hold less than it says.

Where queues, key index or dedup window do not hold what the checkpoint counts on, they are dropped and made again from
everything the log still holds. Entries that the tables cover are then staged and applied once more, for the files only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.consume_queue import QueueFilesShort
from broker.dedup import SavedGeneration
from broker.store_files import CheckpointUnusable, decode_checkpoint
from dledger.errors import LogDamaged

if TYPE_CHECKING:
    from broker.staging import Staged
    from broker.state import BrokerState
    from runtime.logs import Logger


class Restart:
    """Takes up a checkpoint for one node's tables, which are empty before."""

    def __init__(self, state: BrokerState, log: Logger) -> None:
        self._state = state
        self._log = log
        self.covered_index = 0
        """The last entry that the checkpoint covers."""
        self._missing: list[list[Any]] | None = None
        """Bounds of the queues in the checkpoint, while they are made again from the log."""

    def reset(self) -> None:
        """Nothing is covered."""
        self.covered_index = 0
        self._missing = None

    @property
    def is_complete(self) -> bool:
        """Queues and indexes are not being made again: they hold what the tables hold."""
        return self._missing is None

    def take_up(self, checkpoint: bytes | None, first_index: int) -> int:
        """Load the tables, cut queues, index and dedup window to what they cover. Returns the entry to replay from.

        Raises LogDamaged where the log begins behind what is known, InvariantBroken where log and checkpoint contradict
        each other.
        """
        state = self._state
        tables = self._tables_of(checkpoint, first_index)
        state.checkpoints.restored(0)
        if tables is None:
            self._drop_files()
            return 0
        state.topics.restore(tables["topics"])
        state.groups.restore(tables["groups"])
        state.offsets.restore(tables["offsets"])
        state.locks.restore(tables["locks"])
        state.delay.restore(tables["delay"])
        state.staging.last_store_ms = tables["last_store_ms"]
        state.put_messages = tables["put_messages"]
        self.covered_index = state.applied_index = tables["index"]
        state.checkpoints.restored(tables["position"])
        try:
            self._restore_files(tables)
        except (CheckpointUnusable, QueueFilesShort) as error:
            self._log.warning("queues and indexes are made again from the log", reason=str(error), first=first_index)
            self._drop_files()
            self._missing = tables["queues"]
            state.checkpoints.soon()
            if first_index - 1 == self.covered_index:
                self._finish()
            return first_index - 1
        return self.covered_index

    def _tables_of(self, checkpoint: bytes | None, first_index: int) -> dict[str, Any] | None:
        """None: begin empty, with the first entry there ever was."""
        reason = "there is no checkpoint of the tables"
        if checkpoint is not None:
            try:
                tables = decode_checkpoint(checkpoint)
            except CheckpointUnusable as error:
                reason = str(error)
                if first_index == 1:
                    self._log.warning("checkpoint of the tables is not used, reading the whole log", reason=reason)
            else:
                if tables["index"] + 1 >= first_index:
                    return tables
                reason = f"the tables are known only up to entry {tables['index']}"
        if first_index > 1:
            raise LogDamaged(f"the log begins with entry {first_index}, and {reason}")
        return None

    def _restore_files(self, tables: dict[str, Any]) -> None:
        """Take up what lies in files. Raises CheckpointUnusable or QueueFilesShort."""
        state = self._state
        generations = [SavedGeneration(*row) for row in tables["dedup"]]
        window = state.dedup_files.load(generations)
        if window is None:
            raise CheckpointUnusable("a file of the dedup window is missing or short")
        state.queues.restore(tables["queues"])
        if not state.index.restore(tables["key_index"]):
            raise CheckpointUnusable("a key index file is missing or damaged")
        state.dedup.take_up(window)

    def _drop_files(self) -> None:
        state = self._state
        state.queues.remove_all()
        state.index.restore(None)
        state.dedup_files.remove_all()

    def apply_covered(self, index: int, staged: Staged) -> None:
        """The tables know of it; units and keys are made again. The last such entry completes them."""
        state = self._state
        for queue, parts in staged.by_queue.items():
            state.queues.append(queue, b"".join(parts))
        if staged.hashes:
            state.index.extend(staged.hashes, staged.positions, staged.store_ms)
        for op, removed in zip(staged.ops, staged.removed, strict=True):
            state.queues.apply_delete(op[1], removed)
        if index == self.covered_index:
            self._finish()

    def _finish(self) -> None:
        assert self._missing is not None
        self._state.queues.finish_rebuild(self._missing)
        self._missing = None
        self._log.info("queues, key index and dedup window made again from the log", up_to=self.covered_index)
