"""A raft group as the broker sees it: the open batch, committed bytes to read, one service to run.

group = RaftGroup(env, config, machine, log)
await nursery.start(group.run)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio
from attrs import evolve

from dledger.config import GroupConfig
from dledger.core.errors import LocalError
from dledger.core.raft import Raft
from dledger.core.types import HEADER_BYTES, HardState, Role
from dledger.driver import APPLY_SECONDS_MAX, Driver, Replay
from dledger.errors import CoreStopped, FormatError, LedgerError, LogDamaged, NotLeader, Overloaded, TooLarge
from dledger.machine import EntryView, GroupStatistics, StateMachine
from dledger.open_batch import OpenBatch
from dledger.peers import Peers
from dledger.store.checkpoint import drop_checkpoints, read_checkpoint, write_checkpoint
from dledger.store.faults import refuse_faults
from dledger.store.format import FORMAT_FILE, Format, check_format, read_format
from dledger.store.log_store import LogStore, format_folder, is_blank
from dledger.store.meta import MetaFile, boot_tag
from dledger.store.recovery import RecoveredLog
from runtime.logs import Logger
from runtime.model import Env, Listener

__all__ = ["EntryView", "GroupStatistics", "NotLeader", "Overloaded", "RaftGroup", "Role", "StateMachine", "TooLarge"]

REPLAY_BYTES = 1024 * 1024
HOT_BYTES_MIN = 64 * 1024 * 1024
HOT_MEMORY_SHARE = 16
"""The end of the log that is taken to be in the page cache: this part of the machine's memory."""
BODY_OFFSET = HEADER_BYTES
"""From an entry's position to the physical offset of the first byte of its body."""


class RaftGroup:
    """One member of a raft group. All methods are for the trio thread; the synchronous ones never block."""

    def __init__(
        self, env: Env, config: GroupConfig, machine: StateMachine, log: Logger, *, listener: Listener | None = None
    ) -> None:
        """`listener`, when given, is used instead of listening on the configured address (tests; socket activation)."""
        self.config = config
        self.machine = machine
        self.node_id = config.node_id
        self.group_uuid = config.group_uuid
        """Identity of the group, 32 hex digits; final once `run` has started."""
        self._env = env
        self._hot_bytes = max(HOT_BYTES_MIN, env.ids.memory_bytes // HOT_MEMORY_SHARE)
        self._log = log.bind(group=config.group, node=config.node_id)
        self._listener = listener
        self._driver: Driver | None = None
        self._batch = OpenBatch()
        self.reserve: Callable[[int], int] = self._batch.reserve
        """Physical offset that the next record, of this size, will get; `add_record` must follow before any await.

        Leader only. Raises NotLeader, Overloaded (nothing was logged) or TooLarge.
        """
        self.add_record: Callable[[bytes], None] = self._batch.add_record
        self.add_records: Callable[[Sequence[bytes]], None] = self._batch.add_records
        """Put the reserved record into the open batch."""
        self._stopped = trio.Event()
        self._is_stopping = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover the log, replay it, listen, take part. `started()` once recovered and listening. Returns after
        `stop_gracefully`. Raises LedgerError, Locked or OSError with one sentence where the node cannot or must not
        serve.
        """
        try:
            await self._run(task_status)
        except BaseExceptionGroup as group:
            cause = _cause(group)
            if cause is None:
                raise
            raise cause from group
        finally:
            self._stopped.set()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        env, folder = self._env, self.config.data_dir
        env.files.make_dirs(folder)
        with env.files.lock(f"{folder}/lock"):
            identity = self._identify()
            self.group_uuid = identity.group_uuid
            meta = MetaFile.open(env.files, folder, identity)
            try:
                store, recovered = await LogStore.open(env, folder, identity.segment_bytes, meta)
                try:
                    refuse_faults(recovered.faults)
                    await self._serve(store, recovered, meta, identity, task_status)
                finally:
                    store.abandon()
            finally:
                meta.close()

    def _identify(self) -> Format:
        """The folder's format: checked, or made where that is asked for."""
        env, config, folder = self._env, self.config, self.config.data_dir
        wanted = Format(
            cluster=config.cluster,
            cluster_uuid=config.effective_cluster_uuid,
            group=config.group,
            group_uuid=config.group_uuid,
            node_id=config.node_id,
            segment_bytes=config.segment_bytes,
        )
        found = read_format(env.files, folder)
        if found is None:
            if not is_blank(env, folder):
                raise FormatError(f"data folder {folder} holds a log but no {FORMAT_FILE}: refusing to touch it")
            if not config.format_if_empty:
                raise FormatError(f"data folder {folder} is not formatted; start the node once with --format")
            format_folder(env, folder, wanted)
            self._log.info("data folder formatted", folder=folder, group_uuid=wanted.group_uuid)
            return wanted
        if config.cluster_uuid is None:
            # Derived from the peers' addresses only when a folder is formatted; addresses may change later.
            wanted = evolve(wanted, cluster_uuid=found.cluster_uuid, group_uuid=found.group_uuid)
        check_format(folder, found, wanted)
        if found.segment_bytes != wanted.segment_bytes:
            self._log.warning(
                "segment size of the data folder differs from the configured one and stays",
                folder=folder,
                segment_bytes=found.segment_bytes,
            )
        return found

    async def _serve(
        self,
        store: LogStore,
        recovered: RecoveredLog,
        meta: MetaFile,
        identity: Format,
        task_status: trio.TaskStatus[None],
    ) -> None:
        env, config = self._env, self.config
        boot = boot_tag(env.ids.boot_id)
        saved = meta.saved
        recovering = config.flush == "async" and not saved.clean and saved.boot != boot
        self._log.info(
            "log recovered",
            last_index=store.last_index,
            term=saved.term,
            end=store.position_end,
            walked=recovered.entries_walked,
            bytes_cut=recovered.bytes_cut,
            commit_hint=recovered.commit_hint,
            recovering=recovering,
        )
        await meta.save_started(boot)
        replay, applied_index, covers = await self._replay(store, recovered.commit_hint, identity.segment_bytes)
        listener = self._listener
        if listener is None:
            listener = await env.net.listen(*config.listen_address)
        raft_config = evolve(config.raft_config(), segment_bytes=identity.segment_bytes)
        driver = Driver(
            env,
            config,
            self.machine,
            self._log,
            store=store,
            meta=meta,
            batch=self._batch,
            make_core=lambda now, log: Raft(
                config.node_id,
                config.peers,
                raft_config,
                env.rng(f"raft/{config.group}/{config.node_id}"),
                HardState(saved.term, saved.vote),
                log,
                now,
                commit_index=applied_index,
                recovering=recovering,
            ),
            make_peers=lambda driver: Peers(env, config, identity, self._log, driver),
            replay=replay,
            applied_index=applied_index,
            checkpoint_index=covers,
            segment_bytes=identity.segment_bytes,
        )
        self._driver = driver
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.peers.run, listener)
                if self._is_stopping:
                    driver.stop()
                task_status.started()
                await driver.run()
                nursery.cancel_scope.cancel()
        except LocalError as error:
            raise CoreStopped(str(error)) from error
        finally:
            self._driver = None  # from here on this is a group that does not lead; reading ends too
            self._batch.stop(None)
            with trio.CancelScope(shield=True):
                await listener.aclose()
        await store.close()
        await meta.save_mark(store.durable_index, clean=True)

    async def _replay(self, store: LogStore, commit_hint: int, segment_bytes: int) -> tuple[Replay, int, int]:
        """Bring the machine to what is known to be committed; stage, but do not apply, what lies behind. Returns also
        the applied index, and what the checkpoint covers."""
        machine = self.machine
        checkpoint = read_checkpoint(self._env.files, self.config.data_dir)
        covers, blob = (checkpoint.index, checkpoint.blob) if checkpoint is not None else (0, None)
        if covers > store.last_index:
            self._log.warning("checkpoint lies behind the end of the log", covers=covers, last_index=store.last_index)
            # Nor may it count once the log has grown past it again, maybe with other entries (async power losses).
            drop_checkpoints(self._env.files, self.config.data_dir, above=store.last_index)
            older = read_checkpoint(self._env.files, self.config.data_dir)
            covers, blob = (older.index, older.blob) if older is not None else (0, None)
        # Where the machine wants to read from may lie before what its tables cover (a dedup window is read again).
        covered = machine.restore(blob, first_index=store.first_index, first_position=store.first_position)
        if covers + 1 < store.first_index:
            raise LogDamaged(f"the log begins at entry {store.first_index}, but tables are known only up to {covers}")
        covered = max(covered, store.first_index - 1)
        # What a checkpoint covers was committed.
        applied_index = max(covered, covers, commit_hint)
        replay = Replay(machine, segment_bytes)
        index = covered + 1
        slice_end = self._env.clock.monotonic() + APPLY_SECONDS_MAX
        while index <= store.last_index:
            entries = store.entries(index, REPLAY_BYTES)
            for entry in entries:
                replay.show(entry, applied_index)
                if self._env.clock.monotonic() > slice_end:
                    machine.turn_done()
                    await trio.lowlevel.checkpoint()
                    slice_end = self._env.clock.monotonic() + APPLY_SECONDS_MAX
            index = entries[-1].index + 1
        machine.turn_done()
        return replay, applied_index, covers

    @property
    def role(self) -> Role:
        return self._driver.role if self._driver is not None else Role.FOLLOWER

    @property
    def term(self) -> int:
        return self._driver.term if self._driver is not None else 0

    @property
    def leader_id(self) -> str | None:
        return self._driver.leader_id if self._driver is not None else None

    @property
    def is_ready_leader(self) -> bool:
        """Leads, and the no-op of its term is applied; False while leadership is being handed over."""
        driver = self._driver
        return driver is not None and driver.is_ready and driver.batch.leading

    @property
    def is_serving(self) -> bool:
        """The log is replayed and takes part; False before that, and while it is repaired or installed."""
        return self._driver is not None

    @property
    def first_position(self) -> int:
        return self._driver.store.first_position if self._driver is not None else 0

    @property
    def committed_position(self) -> int:
        """End of what is applied: reads end here."""
        return self._driver.committed_position if self._driver is not None else 0

    @property
    def end_position(self) -> int:
        """End of the log, uncommitted entries included."""
        return self._driver.store.position_end if self._driver is not None else 0

    def statistics(self) -> GroupStatistics:
        """A look at the group, for status commands; costs some microseconds per peer. Before `run` all is zero."""
        driver = self._driver
        config = self.config
        if driver is None:
            return GroupStatistics(node_id=self.node_id, flush=config.flush)
        return driver.statistics()

    # The open batch: leader only, between two awaits. `reserve` and `add_record`, called once per message, are the
    # batch's own methods (see __init__).

    def open_staged(self) -> Any | None:
        """What `set_open_staged` stored for the batch that is open now, else None. Ask after `reserve`."""
        return self._batch.staged

    def set_open_staged(self, staged: Any) -> None:
        """Keep the caller's rows and waiters of the open batch; they come back in apply, discard or orphan."""
        self._batch.staged = staged

    def seal(self) -> None:
        """Make one entry of the open batch now. Otherwise the driver does, in its turn."""
        self._batch.seal()

    def propose(self, *, records: Sequence[bytes] = (), ops: bytes = b"", staged: Any) -> int:
        """One DATA entry of its own: records encoded for `position_for(total)`, then the ops tail. Returns its index.

        When there are records, `position_for` must have been called for the same total in the same step. Raises as
        `reserve`.
        """
        return self._batch.propose(records, ops, staged)

    def position_for(self, total_bytes: int) -> int:
        """Physical offset of the first byte of the next entry of its own, of a body of `total_bytes` (ops included).
        Seals the open batch. Raises as `reserve`.
        """
        return self._batch.position_for(total_bytes)

    def wake(self) -> None:
        """Schedule a driver turn."""
        if self._driver is not None:
            self._driver.wake()

    def kick(self) -> None:
        """For the end of a read of requests: run a driver turn at once where nothing is in flight, else schedule one.

        A lone send then loses no time, while many share an entry. The machine's callbacks may run before this returns.
        """
        if self._driver is not None:
            self._driver.kick()

    # Reading, bounded by what is applied.

    def read(self, physical_offset: int, nbytes: int) -> memoryview | None:
        """Bytes of the log without a copy. None where they are not all between first and committed position, or
        cross a segment's end."""
        driver = self._driver
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.committed_position:
            return None
        return driver.store.read(physical_offset, nbytes)

    def read_cached(self, physical_offset: int, nbytes: int) -> bytes | None:
        """A copy, where the page cache has the bytes; None also where `read` has none. Never waits for the disk."""
        driver = self._driver
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.committed_position:
            return None
        return driver.store.read_cached(physical_offset, nbytes)

    async def read_cold(self, physical_offset: int, nbytes: int) -> bytes | None:
        """As `read`, in a thread: for bytes that may have to come from the disk. Checkpoint."""
        driver = self._driver
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.committed_position:
            await trio.lowlevel.checkpoint()
            return None
        return await driver.store.read_in_thread(physical_offset, nbytes)

    def is_hot(self, physical_offset: int) -> bool:
        """Whether `read` there is sure to find the bytes in memory."""
        return self.end_position - physical_offset <= self._hot_bytes

    # Other duties.

    def send_app(self, peer_id: str, payload: bytes) -> bool:
        """Send over the authenticated peer stream; may get lost. False when not connected or the queue is full."""
        return self._driver is not None and self._driver.peers.send_app(peer_id, payload)

    def transfer_leadership(self, target: str | None = None) -> None:
        """Hand leadership over (to the most advanced peer when None). Does nothing on a follower."""
        if self._driver is not None and self._driver.role is Role.LEADER:
            self._driver.transfer(target)

    async def stop_gracefully(self) -> None:
        """Final sync, clean-stop mark, and `run` returns. Does not transfer leadership. Checkpoint."""
        self._is_stopping = True
        if self._driver is not None:
            self._driver.stop()
        await self._stopped.wait()

    def save_checkpoint(self, index: int, blob: bytes) -> None:
        """Keep `blob`, the state machine's tables after entry `index`; the next start hands it to `restore`.

        Replaces the previous one atomically. Waits for the disk, so call it in a thread (`env.run_in_thread`).
        """
        write_checkpoint(self._env.files, self.config.data_dir, index, blob)
        driver = self._driver
        if driver is not None:
            driver.checkpoint_saved(index)


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one error in a group that says why a node stops; None where there is none or something else besides."""
    leaves: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop()
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        else:
            leaves.append(error)
    told = [error for error in leaves if isinstance(error, LedgerError | OSError)]
    return told[0] if len(told) == len(leaves) else None
