"""From the disk to the state machine, before a node takes part: the checkpoint's tables, then the log behind them."""

from __future__ import annotations

from collections import deque

import trio

from dledger.applier import APPLY_SECONDS_MAX, Staged
from dledger.core.types import Entry, EntryType
from dledger.errors import LogDamaged
from dledger.machine import EntryView, StateMachine
from dledger.retention import trim_base
from dledger.store.checkpoint import Checkpoint, take_stock
from dledger.store.log_store import LogStore
from runtime.logs import Logger
from runtime.model import Env

REPLAY_BYTES = 1024 * 1024


class TablesLost(LogDamaged):
    """The beginning of the log was trimmed, and no checkpoint stands for it any more: all that helps is a peer's."""


class Replay:
    """Shows the machine the entries behind its tables, and keeps what is not known to be committed yet."""

    def __init__(
        self, machine: StateMachine, segment_bytes: int, applied_index: int, checkpoints: tuple[int, int]
    ) -> None:
        """`checkpoints` are what the older and the newer one cover."""
        self._machine = machine
        self._segment_bytes = segment_bytes
        self.applied_index = applied_index
        """Up to here everything is known to be committed."""
        self.checkpoints = checkpoints
        self.staged: deque[Staged] = deque()
        self.trims: deque[Entry] = deque()
        """TRIM entries that are not known to be committed."""
        self.trimmed_position = 0

    def show(self, entry: Entry) -> None:
        """The next entry; applied as well where it is known to be committed."""
        if entry.type == EntryType.DATA:
            staged = self._machine.stage(EntryView(entry))
            if entry.index <= self.applied_index:
                self._machine.apply(entry.index, entry.term, staged)
            else:
                self.staged.append(Staged(entry, staged, False, 0.0))
        elif entry.type == EntryType.TRIM:
            if entry.index > self.applied_index:
                self.trims.append(entry)
                return
            self.trim(trim_base(entry, self._segment_bytes))

    def trim(self, position: int) -> None:
        """The group gave up what lies before this byte."""
        if position > self.trimmed_position:
            self.trimmed_position = position
            self._machine.trim(position)


async def replay_log(
    env: Env,
    folder: str,
    machine: StateMachine,
    log: Logger,
    store: LogStore,
    segment_bytes: int,
    commit_hint: int,
) -> tuple[Replay, Checkpoint | None]:
    """Bring the machine to what is known to be committed; stage, but do not apply, what lies behind. Returns also the
    checkpoint used. Checkpoint (trio). Raises TablesLost, or LogDamaged for an entry that cannot be read.
    """
    stock = take_stock(env.files, folder, last_index=store.last_index)
    for covers in stock.dropped:
        # Nor may it count once the log has grown past it again, maybe with other entries (async power losses).
        log.warning("checkpoint lies behind the end of the log", covers=covers, last_index=store.last_index)
    checkpoint = stock.newest
    covers, blob = (checkpoint.index, checkpoint.blob) if checkpoint is not None else (0, None)
    if covers + 1 < store.first_index:
        raise TablesLost(f"the log begins at entry {store.first_index}, but tables are known only up to {covers}")
    # Where the machine wants to read from may lie before what its tables cover (a dedup window is read again).
    covered = machine.restore(blob, first_index=store.first_index, first_position=store.first_position)
    covered = max(covered, store.first_index - 1)
    # What a checkpoint covers was committed.
    replay = Replay(machine, segment_bytes, max(covered, covers, commit_hint), stock.covered)
    if checkpoint is not None:  # it may cover TRIM entries whose segments are still there
        replay.trim(checkpoint.trimmed_position)
    index = covered + 1
    slice_end = env.clock.monotonic() + APPLY_SECONDS_MAX
    while index <= store.last_index:
        entries = store.entries(index, REPLAY_BYTES)
        for entry in entries:
            replay.show(entry)
            if env.clock.monotonic() > slice_end:
                machine.turn_done()
                await trio.lowlevel.checkpoint()
                slice_end = env.clock.monotonic() + APPLY_SECONDS_MAX
        index = entries[-1].index + 1
    machine.turn_done()
    return replay, checkpoint
