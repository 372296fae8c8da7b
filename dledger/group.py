"""A raft group as the broker sees it: the open batch, committed bytes to read, one service to run.

group = RaftGroup(env, config, machine, log)
await nursery.start(group.run)

A run is a loop, for a log may turn out to be damaged, or be replaced by a peer's segments, while the process lives on:

    finish an installation -> recover the log -> faults?  yes: mend it from the peers          (dledger.repair)
                                                          no:  restore, replay, take part
    `Reopen`, out of either: begin again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import trio
from attrs import evolve

from dledger.config import Address, GroupConfig
from dledger.core.errors import LocalError
from dledger.core.membership import AddLearner, Change, Members, Promote, Remove, decode_members, encode_members
from dledger.core.raft import Raft
from dledger.core.types import HEADER_BYTES, HardState, Role
from dledger.driver import APPLY_SECONDS_MAX, Driver, Replay
from dledger.errors import CoreStopped, FormatError, LedgerError, LogDamaged, NotLeader, Overloaded, Reopen, TooLarge
from dledger.fetch import Exchange, FetchClient, FetchServer, LogSource
from dledger.install import Installer, Pulled, adds_to, complete_install, finish_install
from dledger.machine import EntryView, GroupStatistics, StateMachine
from dledger.open_batch import OpenBatch
from dledger.peers import Peers, Refused
from dledger.repair import Deaf, Mended, RepairPhase
from dledger.store.checkpoint import Checkpoint, drop_checkpoints, read_checkpoint, write_checkpoint
from dledger.store.failure import has_failed
from dledger.store.faults import EntryDamaged, refuse_faults
from dledger.store.format import FORMAT_FILE, Format, check_format, read_format
from dledger.store.log_store import LogStore, format_folder, is_blank
from dledger.store.manifest import Manifest
from dledger.store.meta import MetaFile, boot_tag
from dledger.store.options import StoreOptions
from dledger.store.recovery import RecoveredLog
from dledger.store.rows import DISK_FULL
from runtime.logs import Logger
from runtime.model import Env, Listener

__all__ = [
    "AddLearner",
    "EntryView",
    "GroupStatistics",
    "Members",
    "NotLeader",
    "Overloaded",
    "Promote",
    "RaftGroup",
    "Remove",
    "Role",
    "StateMachine",
    "TooLarge",
]

REPLAY_BYTES = 1024 * 1024
HOT_BYTES_MIN = 64 * 1024 * 1024
HOT_MEMORY_SHARE = 16
"""The end of the log that is taken to be in the page cache: this part of the machine's memory."""
REOPEN_SECONDS_MIN = 0.05
REOPEN_SECONDS_MAX = 10.0
"""How long to wait before a log that turned out damaged again and again is opened anew."""
TRANSFER_SECONDS_MAX = 10.0
SUCCESSOR_SECONDS_MAX = 2.0
SUCCESSOR_LOOK_SECONDS = 0.01
"""After a transfer: for how long to wait for the first word of the new leader, and how often to look."""
CHECKPOINT_LOOK_SECONDS = 0.01
LATE = "late"
COUNTERS = ("reopened", "faults", "repairs", "cut_as_damaged", "installs")
BODY_OFFSET = HEADER_BYTES
"""From an entry's position to the physical offset of the first byte of its body."""


class TablesLost(LogDamaged):
    """The beginning of the log was trimmed, and no checkpoint stands for it any more: all that helps is a peer's."""


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
        self._listen_address = config.listen_address
        self._driver: Driver | None = None
        self.state = "recovering"
        """"recovering" the log from the disk, "repairing" it from the peers, "installing" their segments, "serving"."""
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        """Over all runs of this process."""
        self._phase: RepairPhase | None = None
        self._installer: Installer | None = None
        self._pulled: Pulled | None = None
        self._power_lost_index: int | None = None
        self._lacks_tables = False
        self._needed = 0
        self._need = trio.Event()
        self._batch = OpenBatch()
        self.reserve: Callable[[int], int] = self._batch.reserve
        """Physical offset that the next record, of this size, will get; `add_record` must follow before any await.

        Leader only. Raises NotLeader, Overloaded (nothing was logged) or TooLarge.
        """
        self.add_record: Callable[[bytes], None] = self._batch.add_record
        self.add_records: Callable[[Sequence[bytes]], None] = self._batch.add_records
        """Put the reserved record into the open batch."""
        self._stopped = trio.Event()
        self._stop_wanted = trio.Event()
        self._is_stopping = False
        self._is_started = False
        self._checkpoints_under_way = 0

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
                await self._reopen_until_stopped(meta, identity, task_status)
                if not self._is_started:  # stopped before it ever served: no failure of whoever started it
                    task_status.started()
            finally:
                meta.close()

    async def _reopen_until_stopped(self, meta: MetaFile, identity: Format, task_status: trio.TaskStatus[None]) -> None:
        clock = self._env.clock
        pause = REOPEN_SECONDS_MIN
        while not self._is_stopping:
            began = clock.monotonic()
            try:
                await self._run_once(meta, identity, task_status)
                return
            except TablesLost as error:
                if len(self.config.peers) == 1 and not self.config.joined:
                    raise
                self._lacks_tables, reason = True, str(error)
            except (Reopen, EntryDamaged) as error:
                reason = str(error)
            except BaseExceptionGroup as group:
                cause = _cause(group)
                if not isinstance(cause, Reopen | EntryDamaged):
                    raise
                reason = str(cause)
            self.state = "recovering"
            self.counters["reopened"] += 1
            self._log.warning("opening the log anew", reason=reason)
            await self._checkpoint_written()
            await self._finish_install()
            if clock.monotonic() - began > REOPEN_SECONDS_MAX:
                pause = REOPEN_SECONDS_MIN
            else:  # what was mended is damaged again at once: do not wear the disk out
                with clock.move_on_after(pause):
                    await self._stop_wanted.wait()
                pause = min(2 * pause, REOPEN_SECONDS_MAX)

    async def _run_once(self, meta: MetaFile, identity: Format, task_status: trio.TaskStatus[None]) -> None:
        """From the disk to the end of serving. Raises Reopen where it is to begin again."""
        env, folder = self._env, self.config.data_dir
        self._installer = None
        await env.run_in_thread(complete_install, env.files, folder)
        if self.config.flush == "async" and has_failed(env.files, folder):
            # It acknowledged from the page cache, which the recovery drops: as after a power loss.
            await meta.save_recovering(True)
        options = StoreOptions(
            warm=self.config.warm,
            mlock=self.config.mlock,
            advise=self.config.advise,
            hint_is_evidence=self.config.flush == "sync",
        )
        store, recovered = await LogStore.open(env, folder, identity.segment_bytes, meta, options)
        try:
            if recovered.faults or self._lacks_tables:
                self.counters["faults"] += len(recovered.faults)
                if self._is_alone(store, recovered):
                    refuse_faults(recovered.faults)
                await self._mend(store, recovered, meta, identity)
            else:
                await self._serve(store, recovered, meta, identity, task_status)
        finally:
            store.abandon()

    def _is_alone(self, store: LogStore, recovered: RecoveredLog) -> bool:
        """Whether nobody could mend this log: neither the configuration nor the log knows another member."""
        config = self.config
        if len(config.peers) > 1 or config.joined:
            return False
        checkpoint = read_checkpoint(self._env.files, config.data_dir, up_to=recovered.last.index)
        try:
            return self._known_members(store, checkpoint)[-1][1].all == (config.node_id,)
        except LogDamaged:  # the change of members is what is damaged
            return True

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
            if not config.format_if_empty and not config.join:
                raise FormatError(f"data folder {folder} is not formatted; start the node once with --format")
            format_folder(env, folder, wanted, recovering=config.join)
            self._log.info("data folder formatted", folder=folder, group_uuid=wanted.group_uuid, blank=config.join)
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

    async def _listen(self) -> Listener:
        """A listener for one stay in a phase: in between, who calls is refused and need not wait."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._listen_address = listener.address
            return listener
        return await self._env.net.listen(*self._listen_address)

    async def _stop_phase(self, scope: trio.CancelScope) -> None:
        await self._stop_wanted.wait()
        scope.cancel()

    async def _mend(self, store: LogStore, recovered: RecoveredLog, meta: MetaFile, identity: Format) -> None:
        """The repair phase. Raises Reopen when something has changed; returns only when the group is to stop."""
        env, config, folder = self._env, self.config, self.config.data_dir
        self.state = "repairing"
        is_sure = not meta.saved.recovering and not self._may_have_forgotten(meta)
        checkpoint = read_checkpoint(env.files, folder, up_to=recovered.last.index)
        try:
            known: Sequence[tuple[int, Members]] = self._known_members(store, checkpoint)
            voters = known[-1][1].voters
        except LogDamaged:  # a change of members may be among what is damaged: who decides is not known
            known, voters = [], ()
        client = FetchClient(env)
        source = LogSource(
            env,
            folder,
            identity.segment_bytes,
            store,
            committed=lambda: 0,
            is_sure=lambda: is_sure,
            faults=recovered.faults,
        )
        server = FetchServer(env, source, config.fetch_bytes_per_second)
        peers = Peers(env, config, identity, self._log, Deaf(), Exchange(server, client))
        peers.set_members({**config.peers, **(known[-1][1].addresses if known else {})})
        client.peers = peers
        phase = RepairPhase(
            env,
            folder,
            identity.segment_bytes,
            meta,
            recovered.faults,
            voters,
            config.node_id,
            client,
            self._log,
        )
        self._phase = phase
        listener = await self._listen()
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peers.run, listener)
                nursery.start_soon(server.run)
                nursery.start_soon(self._stop_phase, nursery.cancel_scope)
                verdict = Mended.INSTALL if self._lacks_tables else await phase.run()
                self._lacks_tables = False
                reason = verdict.value
                if verdict is Mended.INSTALL:
                    self.state = "installing"
                    # What the segments do not hold, this node may have acknowledged.
                    await meta.save_recovering(True)
                    installer = self._installer = Installer(env, folder, identity.segment_bytes, client, self._log)
                    self._pulled = await installer.pull(lambda: 1, lambda: True)
                nursery.cancel_scope.cancel()
        finally:
            self._phase = None
            self.counters["repairs"] += phase.repaired
            self.counters["cut_as_damaged"] += phase.dropped
            with trio.CancelScope(shield=True):
                await listener.aclose()
        if reason:
            raise Reopen(reason)

    async def _finish_install(self) -> None:
        """Put pulled segments in place of the log. The run has ended, so nothing is acknowledged meanwhile."""
        pulled, self._pulled = self._pulled, None
        if pulled is None:
            return
        env, folder = self._env, self.config.data_dir
        self.state = "installing"
        try:
            await finish_install(env, folder, pulled)
        except LogDamaged as error:
            self._log.error("fetched segments do not fit together; fetching them again", error=str(error))
            return
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._log.error("no room to install segments", error=str(error))
            return
        self.counters["installs"] += 1
        self._log.info("segments installed", last_index=pulled.last_index)

    def _may_have_forgotten(self, meta: MetaFile) -> bool:
        """Whether a power loss may have taken what this node acknowledged: async flush, and the machine rebooted."""
        saved = meta.saved
        return self.config.flush == "async" and not saved.clean and saved.boot != boot_tag(self._env.ids.boot_id)

    def _known_members(self, store: LogStore, checkpoint: Checkpoint | None) -> list[tuple[int, Members]]:
        """The CONFIG entries known, ascending; the configured members before them as entry 0."""
        config = self.config
        founders = Members(config.first_voters, (), {name: config.peers[name] for name in config.first_voters})
        known = [(0, founders)]
        try:
            if checkpoint is not None and checkpoint.config:
                known.append((checkpoint.config_index, decode_members(checkpoint.config)))
            covered = max(checkpoint.index, checkpoint.config_index) if checkpoint is not None else 0
            for index, body in store.config_entries(covered):
                known.append((index, decode_members(body)))
        except ValueError as error:
            raise FormatError(f"a list of members in {config.data_dir} cannot be read: {error}") from error
        return known

    async def _serve(
        self,
        store: LogStore,
        recovered: RecoveredLog,
        meta: MetaFile,
        identity: Format,
        task_status: trio.TaskStatus[None],
    ) -> None:
        env, config = self._env, self.config
        saved = meta.saved
        recovering = saved.recovering or self._may_have_forgotten(meta)
        if self._may_have_forgotten(meta):
            self._power_lost_index = store.last_index
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
        await meta.save_started(boot_tag(env.ids.boot_id), recovering=recovering)
        replay, applied_index, checkpoint = await self._replay(store, recovered.commit_hint, identity.segment_bytes)
        configs = self._known_members(store, checkpoint)[1:]
        listener = await self._listen()
        raft_config = evolve(config.raft_config(), segment_bytes=identity.segment_bytes)
        client = FetchClient(env)
        source = LogSource(
            env,
            config.data_dir,
            identity.segment_bytes,
            store,
            committed=lambda: driver.applied_index,
            is_sure=lambda: not driver.core.recovering,
        )
        server = FetchServer(env, source, config.fetch_bytes_per_second)
        self._needed = 0
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
                config.first_voters,
                raft_config,
                env.rng(f"raft/{config.group}/{config.node_id}"),
                HardState(saved.term, saved.vote),
                log,
                now,
                commit_index=applied_index,
                recovering=recovering,
                configs=configs,
            ),
            make_peers=lambda driver: Peers(env, config, identity, self._log, driver, Exchange(server, client)),
            replay=replay,
            applied_index=applied_index,
            checkpoint_index=checkpoint.index if checkpoint is not None else 0,
            segment_bytes=identity.segment_bytes,
            need_segments=self._note_need,
            leased_position=server.leased_position,
        )
        client.peers = driver.peers
        server.on_damage = driver.damaged
        self._driver = driver
        self.state = "serving"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.peers.run, listener)
                nursery.start_soon(server.run)
                nursery.start_soon(self._keep_filled, driver, client, identity.segment_bytes)
                if self._is_stopping:
                    driver.stop()
                if not self._is_started:
                    self._is_started = True
                    task_status.started()
                reopen: Reopen | None = None
                try:
                    await driver.run()
                except Reopen as error:
                    reopen = error  # not through the nursery: a cancellation meanwhile would come out beside it
                nursery.cancel_scope.cancel()
            if reopen is not None:
                if config.flush == "async" and self._pulled is None:
                    # What was written was acknowledged: none of it may pass for a torn tail, should it be damaged.
                    await meta.save_mark(store.written_index)
                raise reopen
        except LocalError as error:
            raise CoreStopped(str(error)) from error
        finally:
            self._driver = None  # from here on this is a group that does not lead; reading ends too
            self._batch.stop(None)
            for name, count in driver.counters.items():
                self.counters[name] += count
            with trio.CancelScope(shield=True):
                await listener.aclose()
            if self._pulled is not None and not self._is_useful(store, self._pulled):
                self._pulled = None  # ordinary replication was faster in the end
        await store.close()
        await meta.save_mark(store.durable_index, clean=True)

    @staticmethod
    def _is_useful(store: LogStore, pulled: Pulled) -> bool:
        try:
            return adds_to(store, pulled.manifest)
        except LogDamaged:
            return False  # what this log holds is to be found out, and mended, first

    def _note_need(self, leader: str, first_index: int) -> None:
        """The core's: only whole segments can bring this node to `first_index`."""
        self._needed = first_index
        self._need.set()

    async def _keep_filled(self, driver: Driver, client: FetchClient, segment_bytes: int) -> None:
        """Pull segments whenever the leader offers them, beside whatever else happens; then have the log opened anew.
        One leader's offer is as good as another's: a transfer under way goes on."""
        store = driver.store

        def is_needed() -> bool:
            """An index alone proves nothing: a log that differs from the leader's may be as long."""
            return driver.core.verified_index + 1 < self._needed

        while True:
            await self._need.wait()
            self._need = trio.Event()
            self.state = "installing"
            installer = self._installer = Installer(
                self._env, self.config.data_dir, segment_bytes, client, self._log, store
            )
            try:
                pulled = await installer.pull(lambda: self._needed - 1, is_needed)
            except LogDamaged as error:  # in this node's own segments, on their way to the new log
                driver.damaged(error)
                return
            self._installer = None
            self.state = "serving"
            if pulled is not None and self._is_useful(store, pulled):
                self._pulled = pulled
                driver.reopen("segments fetched")
                return

    async def _replay(
        self, store: LogStore, commit_hint: int, segment_bytes: int
    ) -> tuple[Replay, int, Checkpoint | None]:
        """Bring the machine to what is known to be committed; stage, but do not apply, what lies behind. Returns also
        the applied index, and the checkpoint used."""
        machine = self.machine
        files, folder = self._env.files, self.config.data_dir
        for covers in drop_checkpoints(files, folder, above=store.last_index):
            # Nor may it count once the log has grown past it again, maybe with other entries (async power losses).
            self._log.warning("checkpoint lies behind the end of the log", covers=covers, last_index=store.last_index)
        checkpoint = read_checkpoint(files, folder)
        covers, blob = (checkpoint.index, checkpoint.blob) if checkpoint is not None else (0, None)
        if covers + 1 < store.first_index:
            raise TablesLost(f"the log begins at entry {store.first_index}, but tables are known only up to {covers}")
        # Where the machine wants to read from may lie before what its tables cover (a dedup window is read again).
        covered = machine.restore(blob, first_index=store.first_index, first_position=store.first_position)
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
        return replay, applied_index, checkpoint

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
            return GroupStatistics(
                node_id=self.node_id,
                flush=config.flush,
                flush_interval_ms=config.flush_interval_ms,
                power_lost_index=self._power_lost_index,
                state=self.state,
                waits_for=self._waits_for,
                counters=dict(self.counters),
            )
        now = driver.statistics(self.state)
        counters = {**self.counters, **now.counters}
        for name in driver.counters:  # what earlier runs of this process counted is part of it
            counters[name] = now.counters[name] + self.counters[name]
        return evolve(
            now,
            counters=counters,
            waits_for=self._waits_for,
            flush_interval_ms=self.config.flush_interval_ms,
            power_lost_index=self._power_lost_index,
        )

    @property
    def _waits_for(self) -> str:
        """What keeps a repair or a transfer from ending, for an operator; empty where nothing does."""
        installer = self._installer
        if installer is not None:
            return installer.waits_for or f"{installer.missing_bytes} of {installer.total_bytes} bytes are to come"
        return self._phase.waits_for if self._phase is not None else ""

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
        try:
            return driver.store.read(physical_offset, nbytes)
        except LogDamaged as error:
            driver.damaged(error)  # the group mends itself; whoever reads is not to end for it
            return None

    def read_cached(self, physical_offset: int, nbytes: int) -> bytes | None:
        """A copy, where the page cache has the bytes; None also where `read` has none. Never waits for the disk."""
        driver = self._driver
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.committed_position:
            return None
        try:
            return driver.store.read_cached(physical_offset, nbytes)
        except LogDamaged as error:
            driver.damaged(error)  # the group mends itself; whoever reads is not to end for it
            return None

    async def read_cold(self, physical_offset: int, nbytes: int) -> bytes | None:
        """As `read`, in a thread: for bytes that may have to come from the disk. Checkpoint."""
        driver = self._driver
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.committed_position:
            await trio.lowlevel.checkpoint()
            return None
        try:
            return await driver.store.read_in_thread(physical_offset, nbytes)
        except LogDamaged as error:
            driver.damaged(error)  # the group mends itself; whoever reads is not to end for it
            return None

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

    async def transfer_and_wait(self, target: str | None = None) -> str | None:
        """As `transfer_leadership`; returns when it has ended: None when another node leads, else the reason why this
        one goes on, or why it never led. `leader_id` names the new leader then, unless nobody was heard to lead within
        2 s. Takes no longer than some election timeouts. Checkpoint.
        """
        if self._driver is None or self._driver.role is not Role.LEADER:
            await trio.lowlevel.checkpoint()
            return str(NotLeader(self.leader_id))
        driver = self._driver
        outcome = await self._outcome(lambda told: driver.transfer(target, told), TRANSFER_SECONDS_MAX)
        if outcome is None:  # given up on hearing of the higher term: its leader speaks only when it is elected
            with self._env.clock.move_on_after(SUCCESSOR_SECONDS_MAX):
                while self._driver is not None and self.leader_id is None:
                    await self._env.clock.sleep(SUCCESSOR_LOOK_SECONDS)
        return "the transfer has not ended in time" if outcome is LATE else outcome

    def read_index(self, callback: Callable[[str | None], None]) -> None:
        """Call back once this node's tables show everything that was acknowledged before this call: with None, in a
        driver turn. Where the node does not lead, or cannot have that confirmed: with the reason, maybe at once.

        All calls of a turn share one round to the peers; a call costs no task.
        """
        if self._driver is None:
            callback(str(NotLeader(None)))
        else:
            self._driver.read_index(callback)

    @property
    def members(self) -> Members:
        """The members in force; before the log is read, the configured ones."""
        if self._driver is not None:
            return self._driver.members
        return Members(self.config.first_voters, (), dict(self.config.peers))

    async def change_members(self, change: Change) -> None:
        """Add a learner, promote it, or remove a member; returns once that is committed. One at a time. Checkpoint;
        cancelling leaves the outcome open.

        Raises NotLeader, or LedgerError with the reason: also where somebody else than the node answers at its address,
        and, for a promotion, where nobody does, as that address stays in the log for all members.
        """
        driver = self._leading()
        if driver.peers.oldest_version < 2:
            raise LedgerError("a member still runs a version that does not know changes of members; upgrade it first")
        match change:
            case AddLearner(node, address):
                await self._check_address(driver, node, address, is_needed=False)
            case Promote(node) if node in driver.members.learners and node not in self.config.dial:
                await self._check_address(driver, node, driver.members.addresses[node], is_needed=True)
        reason = await self._outcome(lambda told: driver.change_members(change, told), None)
        if reason is not None:
            raise LedgerError(str(reason))

    async def _check_address(self, driver: Driver, node: str, address: Address, *, is_needed: bool) -> None:
        """Raises LedgerError where `address` is not, or does not seem to be, that of `node`."""
        place = f"{node} at {address[0]}:{address[1]}"
        try:
            await driver.peers.look_at(node, address)
        except Refused as error:
            raise LedgerError(f"{place} is not found: {error}") from error
        except (OSError, trio.TooSlowError) as error:
            if is_needed:
                raise LedgerError(
                    f"{place}, as the log has it, does not answer ({error}); where it is reached at another address,"
                    " add it again with that one"
                ) from error

    def accept_loss(self) -> None:
        """The operator's word that what a power loss or damage took from this node is given up: it votes again."""
        if self._driver is not None:
            self._driver.accept_loss()

    def trim_to(self, position: int, *, is_forced: bool = False) -> int:
        """Have the log before `position` given up on all members, in whole segments; returns up to where. Forced, also
        what delayed messages still need. Raises NotLeader, or LedgerError with the reason.
        """
        return self._leading().trim_to(position, is_forced=is_forced)

    def delete_expired(self) -> None:
        """Trim now what is older than the retention, whatever the hour. Raises NotLeader."""
        self._leading().delete_expired()

    def _leading(self) -> Driver:
        driver = self._driver
        if driver is None or driver.role is not Role.LEADER:
            raise NotLeader(self.leader_id)
        return driver

    async def _outcome(
        self, ask: Callable[[Callable[[str | None], None]], object], seconds: float | None
    ) -> str | None:
        """What the driver tells about a request; LATE when it takes longer than `seconds`."""
        told = trio.Event()
        outcome: list[str | None] = []

        def note(reason: str | None) -> None:
            outcome.append(reason)
            told.set()

        ask(note)
        if seconds is None:
            await told.wait()
        else:
            with self._env.clock.move_on_after(seconds):
                await told.wait()
        return outcome[0] if outcome else LATE

    async def stop_gracefully(self) -> None:
        """Final sync, clean-stop mark, and `run` returns. Does not transfer leadership. Checkpoint."""
        self._is_stopping = True
        self._stop_wanted.set()
        if self._driver is not None:
            self._driver.stop()
        await self._stopped.wait()

    def manifest(self) -> Manifest | None:
        """The closed segments and what lies before them, for a backup; None where the log is not served."""
        return self._driver.store.manifest() if self._driver is not None else None

    def save_checkpoint(self, index: int, blob: bytes) -> bool:
        """Keep `blob`, the state machine's tables after entry `index`; the next start hands it to `restore`.

        Replaces the previous one atomically. Waits for the disk, so call it in a thread (`env.run_in_thread`), one at
        a time. False where nothing was saved, because the run that these tables come from has ended.
        """
        self._checkpoints_under_way += 1  # before the look at the driver: see `_checkpoint_written`
        try:
            driver = self._driver
            if driver is None:
                return False  # the log is not this one any more
            found = driver.core.configs.latest(index)
            if found is None:
                return False  # the members changed again and again meanwhile: a later checkpoint will know
            at, members = found
            config = encode_members(members) if at else b""
            write_checkpoint(self._env.files, self.config.data_dir, index, blob, config=config, config_index=at)
            driver.checkpoint_saved(index)
            return True
        finally:
            self._checkpoints_under_way -= 1

    async def _checkpoint_written(self) -> None:
        """Of a run that has ended, a thread may still be saving a checkpoint: not beside whatever comes next."""
        while self._checkpoints_under_way:
            await self._env.clock.sleep(CHECKPOINT_LOOK_SECONDS)


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
