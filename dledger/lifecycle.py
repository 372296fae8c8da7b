"""The life of one member on its data folder, from the lock to the last save.

It is a loop, for a log may turn out to be damaged, or be replaced by a peer's segments, while the process lives on:

    identify -> finish an installation -> recover the log -> faults?  yes: mend it from the peers   (dledger.repair)
                                                             no:  replay, take part                (dledger.driver)
    `Reopen`, out of either: begin again behind "identify"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import trio
from attrs import evolve, frozen

from dledger.config import GroupConfig
from dledger.core.errors import LocalError
from dledger.core.membership import Members
from dledger.core.raft import Raft
from dledger.core.types import HardState
from dledger.driver import Driver
from dledger.errors import CoreStopped, LedgerError, LogDamaged, NoRoom, Reopen
from dledger.fetch import Exchange, FetchClient, FetchServer, LogSource
from dledger.hard_state import NO_ROOM_RETRY_SECONDS
from dledger.identity import identify
from dledger.install import Installer, Pulled, end_switch, finish_install
from dledger.machine import StateMachine
from dledger.open_batch import OpenBatch
from dledger.peers import Peers
from dledger.repair import Deaf, Mended, RepairPhase
from dledger.replay import TablesLost, replay_log
from dledger.roster import known_members
from dledger.segment_catch_up import SegmentCatchUp, is_useful
from dledger.store.checkpoint import read_checkpoint
from dledger.store.failure import has_failed, is_cache_kept
from dledger.store.faults import EntryDamaged, refuse_faults
from dledger.store.format import Format
from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile, boot_tag
from dledger.store.options import StoreOptions
from dledger.store.recovery import RecoveredLog
from dledger.store.rows import DISK_FULL
from dledger.store.walk import LastEntry
from runtime.logs import Logger
from runtime.model import Env, Listener

REOPEN_SECONDS_MIN = 0.05
REOPEN_SECONDS_MAX = 10.0
"""How long to wait before a log that turned out damaged again and again is opened anew."""
COUNTERS = ("reopened", "faults", "repairs", "cut_as_damaged", "installs")


@frozen
class OpenLog:
    """What a run works on: the log as recovered, the meta slots, and whose they are."""

    store: LogStore
    recovered: RecoveredLog
    meta: MetaFile
    identity: Format


class LifeCycle:
    """Runs once. What it is doing is in its attributes, for status."""

    def __init__(
        self,
        env: Env,
        config: GroupConfig,
        machine: StateMachine,
        log: Logger,
        batch: OpenBatch,
        *,
        listener: Listener | None,
        serving: Callable[[Driver | None], None],
        before_reopen: Callable[[], Awaitable[None]],
    ) -> None:
        """`listener`, when given, is used instead of listening on the configured address. `serving` is told of the
        driver of each run, and of its end; `before_reopen` is awaited between two runs.
        """
        self._env = env
        self._config = config
        self._machine = machine
        self._log = log
        self._batch = batch
        self._listener = listener
        self._listen_address = config.listen_address
        self._serving = serving
        self._before_reopen = before_reopen
        self._state = "recovering"
        self.group_uuid = config.group_uuid
        """Final once the folder is identified."""
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        """Over all runs of this process that have ended."""
        self.power_lost_index: int | None = None
        self.phase: RepairPhase | None = None
        """Of the repair under way."""
        self._installer: Installer | None = None
        self._catch_up: SegmentCatchUp | None = None
        self._pulled: Pulled | None = None
        self._misfits = 0
        """Transfers in a row whose segments did not fit together."""
        self._served_index: int | None = None
        """Up to where a run that has ended had written, and so may have acknowledged."""
        self._lacks_tables = False
        self._last_written: LastEntry | None = None
        """What the last run of this process wrote last, where the log is opened anew behind it."""
        self.fetch_server: FetchServer | None = None
        """Of the run that serves the log now."""
        self._stopped = trio.Event()
        self._stop_wanted = trio.Event()
        self._is_started = False

    @property
    def state(self) -> str:
        """Recovering (the log from the disk), repairing (it from the peers), installing (their segments) or serving."""
        if self._catch_up is not None and self._catch_up.installer is not None:
            return "installing"
        return self._state

    @property
    def installer(self) -> Installer | None:
        """Of the transfer of segments under way."""
        return self._catch_up.installer if self._catch_up is not None else self._installer

    def accept_loss(self) -> None:
        """As `RaftGroup.accept_loss`, of a log that is not served."""
        if self._lacks_tables or self.phase is None:
            raise LedgerError(f"there is nothing to give up while the log is {self.state}: {self.waits_for}")
        self.phase.accept_loss()

    @property
    def waits_for(self) -> str:
        """What keeps a repair or a transfer from ending, for an operator; empty where nothing does."""
        installer = self.installer
        if installer is not None:
            return installer.waits_for or f"{installer.missing_bytes} of {installer.total_bytes} bytes are to come"
        return self.phase.waits_for if self.phase is not None else ""

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """As `RaftGroup.run`."""
        try:
            await self._run(task_status)
        except (BaseExceptionGroup, LocalError) as error:
            cause = _cause(error)
            if cause is None:
                raise
            raise cause from error
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """Have `run` return, and wait until it has. Checkpoint."""
        self._stop_wanted.set()
        await self._stopped.wait()

    @property
    def _is_stopping(self) -> bool:
        return self._stop_wanted.is_set()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        env, folder = self._env, self._config.data_dir
        env.files.make_dirs(folder)
        with env.files.lock(f"{folder}/lock"):
            identity = identify(env, self._config, self._log)
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
                if len(self._config.peers) == 1 and not self._config.joined:
                    raise
                self._lacks_tables, reason = True, str(error)
            except (Reopen, EntryDamaged) as error:
                reason = str(error)
            except BaseExceptionGroup as group:
                cause = _cause(group)
                if not isinstance(cause, Reopen | EntryDamaged):
                    raise
                reason = str(cause)
            self._state = "recovering"
            self.counters["reopened"] += 1
            self._log.warning("opening the log anew", reason=reason)
            await self._before_reopen()
            await self._finish_install(meta)
            await self._save_served(meta)
            if clock.monotonic() - began > REOPEN_SECONDS_MAX:
                pause = REOPEN_SECONDS_MIN
            else:  # what was mended is damaged again at once: do not wear the disk out
                with clock.move_on_after(pause):
                    await self._stop_wanted.wait()
                pause = min(2 * pause, REOPEN_SECONDS_MAX)

    async def _run_once(self, meta: MetaFile, identity: Format, task_status: trio.TaskStatus[None]) -> None:
        """From the disk to the end of serving. Raises Reopen where it is to begin again."""
        env, config = self._env, self._config
        await end_switch(env, config.data_dir, meta)
        if self._answered_from_cache(meta) and has_failed(env.files, config.data_dir):
            # It acknowledged from the page cache, which the recovery drops: as after a power loss.
            await meta.save_recovering(True)
        options = StoreOptions(
            warm=config.warm,
            mlock=config.mlock,
            advise=config.advise,
            is_cache_kept=is_cache_kept(env.files, config.data_dir, meta.saved, env.ids.boot_id),
            hint_is_evidence=not self._answered_from_cache(meta),
        )
        store, recovered = await LogStore.open(env, config.data_dir, identity.segment_bytes, meta, options)
        log = OpenLog(store, recovered, meta, identity)
        try:
            if recovered.faults or self._lacks_tables:
                self.counters["faults"] += len(recovered.faults)
                if self._is_alone(log):
                    refuse_faults(recovered.faults)
                await self._mend(log)
            else:
                await self._serve(log, task_status)
        finally:
            store.abandon()

    async def _save_served(self, meta: MetaFile) -> None:
        """With flush "async", what was written was acknowledged: none of it may pass for a torn tail, should it turn
        out to be damaged. Whatever it was that ended the run.
        """
        served_index, self._served_index = self._served_index, None
        if served_index is None or self._config.flush != "async":
            return
        while not self._is_stopping:
            try:
                await meta.save_mark(served_index)
                return
            except NoRoom:
                with self._env.clock.move_on_after(NO_ROOM_RETRY_SECONDS):
                    await self._stop_wanted.wait()

    async def _finish_install(self, meta: MetaFile) -> None:
        """Put pulled segments in place of the log. The run has ended, so nothing is acknowledged meanwhile."""
        pulled, self._pulled = self._pulled, None
        if pulled is None:
            return
        self._state = "installing"
        try:
            await finish_install(self._env, self._config.data_dir, pulled, meta)
        except LogDamaged as error:
            self._misfits += 1
            self._log.error("fetched segments do not fit together; fetching them again", error=str(error))
            return
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._log.error("no room to install segments", error=str(error))
            return
        self._misfits = 0
        self._served_index = self._last_written = None  # both were of another log
        self.counters["installs"] += 1
        self._log.info("segments installed", last_index=pulled.last_index)

    async def _listen(self) -> Listener:
        """A listener for one stay in a phase: in between, who calls is refused and need not wait."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._listen_address = listener.address
            return listener
        return await self._env.net.listen(*self._listen_address)

    def _may_have_forgotten(self, meta: MetaFile) -> bool:
        """Whether a power loss may have taken what this node acknowledged: async flush, and the machine rebooted."""
        saved = meta.saved
        return self._answered_from_cache(meta) and not saved.clean and not saved.is_of_boot(self._env.ids.boot_id)

    def _answered_from_cache(self, meta: MetaFile) -> bool:
        """Whether the run that wrote the log may have acknowledged what only the page cache had. The slots say so where
        it did; slots of earlier programs do not, so a configuration that has not changed counts as well."""
        return meta.saved.is_async or self._config.flush == "async"

    # A damaged log.

    def _is_alone(self, log: OpenLog) -> bool:
        """Whether nobody could mend this log: neither the configuration nor the log knows another member."""
        config = self._config
        if len(config.peers) > 1 or config.joined:
            return False
        members = self._members_of(log)
        return members is None or members.all == (config.node_id,)

    def _members_of(self, log: OpenLog) -> Members | None:
        """Those in force at the end of a damaged log; None where a change of members is among what is damaged."""
        config = self._config
        checkpoint = read_checkpoint(self._env.files, config.data_dir, up_to=log.recovered.last.index)
        try:
            return known_members(config, log.store, checkpoint)[-1][1]
        except LogDamaged:
            return None

    async def _mend(self, log: OpenLog) -> None:
        """The repair phase. Raises Reopen when something has changed; returns only when the group is to stop."""
        env, config, folder = self._env, self._config, self._config.data_dir
        self._state = "repairing"
        is_sure = not log.meta.saved.recovering and not self._may_have_forgotten(log.meta)
        members = self._members_of(log)
        client = FetchClient(env)
        source = LogSource(
            env,
            folder,
            log.identity.segment_bytes,
            log.store,
            committed=lambda: 0,
            is_sure=lambda: is_sure,
            faults=log.recovered.faults,
        )
        server = FetchServer(env, source, config.fetch_bytes_per_second)
        peers = Peers(env, config, log.identity, self._log, Deaf(), Exchange(server, client))
        peers.set_members({**config.peers, **(members.addresses if members is not None else {})})
        client.peers = peers
        phase = self.phase = RepairPhase(
            env,
            folder,
            log.identity.segment_bytes,
            log.meta,
            log.recovered.faults,
            members.voters if members is not None else (),  # else it is not known who decides
            config.node_id,
            client,
            self._log,
            first_index=log.store.first_index,
            last_written=self._last_written,
            own=log.store,
        )
        listener = await self._listen()
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peers.run, listener)
                nursery.start_soon(server.run)
                nursery.start_soon(self._cancel_when_stopping, nursery.cancel_scope)
                while not reason:
                    verdict = Mended.INSTALL if self._lacks_tables else await phase.run()
                    if verdict is Mended.REOPEN or await self._pull_everything(log, client, phase):
                        reason = verdict.value
                self._lacks_tables = False
                nursery.cancel_scope.cancel()
        finally:
            self.phase = self._installer = None
            self.counters["repairs"] += phase.repaired
            self.counters["cut_as_damaged"] += phase.dropped
            with trio.CancelScope(shield=True):
                await listener.aclose()
        if reason:
            raise Reopen(reason)

    async def _pull_everything(self, log: OpenLog, client: FetchClient, phase: RepairPhase) -> bool:
        """Whole segments in place of a log that cannot be mended. False where an operator would not wait for them."""
        self._state = "installing"
        # What the segments do not hold, this node may have acknowledged.
        await log.meta.save_recovering(True)
        self._installer = Installer(
            self._env,
            self._config.data_dir,
            log.identity.segment_bytes,
            client,
            self._log,
            misfits=self._misfits,
        )
        self._pulled = await self._installer.pull(lambda: 1, lambda: not phase.is_loss_accepted)
        self._installer = None
        self._state = "repairing"
        return self._pulled is not None

    async def _cancel_when_stopping(self, scope: trio.CancelScope) -> None:
        await self._stop_wanted.wait()
        scope.cancel()

    # An intact log.

    async def _serve(self, log: OpenLog, task_status: trio.TaskStatus[None]) -> None:
        """Take part until the group is to stop. Raises Reopen where the log is to be opened anew."""
        env, config, meta, store = self._env, self._config, log.meta, log.store
        is_recovering = await self._start_writing(log)
        segment_bytes = log.identity.segment_bytes
        self._served_index = store.written_index  # an earlier process of this boot may have acknowledged all of it
        replay, checkpoint = await replay_log(
            env, config.data_dir, self._machine, self._log, store, segment_bytes, log.recovered.commit_hint
        )
        raft_config = evolve(config.raft_config(), segment_bytes=segment_bytes)
        hard_state = HardState(meta.saved.term, meta.saved.vote)
        configs = known_members(config, store, checkpoint)[1:]
        client = FetchClient(env)
        source = LogSource(
            env,
            config.data_dir,
            segment_bytes,
            store,
            committed=lambda: driver.applier.applied_index,
            is_sure=lambda: not driver.core.recovering,
        )
        server = FetchServer(env, source, config.fetch_bytes_per_second, lambda peer: driver.core.is_waiting_for(peer))
        catch_up = SegmentCatchUp(
            store,
            lambda: Installer(env, config.data_dir, segment_bytes, client, self._log, store, misfits=self._misfits),
            lambda: driver.core.verified_index,
        )
        driver = Driver(
            env,
            config,
            self._machine,
            self._log,
            store=store,
            meta=meta,
            batch=self._batch,
            make_core=lambda now, view: Raft(
                config.node_id,
                config.first_voters,
                raft_config,
                env.rng(f"raft/{config.group}/{config.node_id}"),
                hard_state,
                view,
                now,
                commit_index=replay.applied_index,
                recovering=is_recovering,
                configs=configs,
            ),
            make_peers=lambda driver: Peers(env, config, log.identity, self._log, driver, Exchange(server, client)),
            replay=replay,
            segment_bytes=segment_bytes,
            need_segments=catch_up.need,
            leased_position=server.leased_position,
        )
        client.peers = driver.peers
        server.on_damage = driver.damaged
        listener = await self._listen()
        self._catch_up = catch_up
        self.fetch_server = server
        self._last_written = None
        self._serving(driver)
        self._state = "serving"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.peers.run, listener)
                nursery.start_soon(server.run)
                nursery.start_soon(self._keep_caught_up, driver, catch_up)
                nursery.start_soon(self._stop_driver, driver)
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
                raise reopen
        finally:
            self._serving(None)  # from here on this is a group that does not lead; reading ends too
            self._catch_up = self.fetch_server = None
            self._served_index = store.written_index
            self._last_written = _last_written(store)
            self._batch.stop(None)
            for name, count in driver.counters.items():
                self.counters[name] += count
            with trio.CancelScope(shield=True):
                await listener.aclose()
            if self._pulled is not None and not is_useful(store, self._pulled):
                self._pulled = None  # ordinary replication was faster in the end
        await store.close()
        await meta.save_mark(store.durable_index, clean=True)

    async def _start_writing(self, log: OpenLog) -> bool:
        """From here on the slots say that this process uses the log. Returns whether this node recovers."""
        store, meta, recovered = log.store, log.meta, log.recovered
        has_forgotten = self._may_have_forgotten(meta)
        recovering = meta.saved.recovering or has_forgotten
        if has_forgotten:
            self.power_lost_index = store.last_index
        self._log.info(
            "log recovered",
            last_index=store.last_index,
            term=meta.saved.term,
            end=store.position_end,
            walked=recovered.entries_walked,
            bytes_cut=recovered.bytes_cut,
            commit_hint=recovered.commit_hint,
            recovering=recovering,
        )
        boot, is_async = boot_tag(self._env.ids.boot_id), self._config.flush == "async"
        await meta.save_started(boot, recovering=recovering, is_async=is_async)
        return recovering

    async def _keep_caught_up(self, driver: Driver, catch_up: SegmentCatchUp) -> None:
        try:
            self._pulled = await catch_up.run()
        except LogDamaged as error:  # in this node's own segments, on their way to the new log
            driver.damaged(error)
        else:
            driver.reopen("segments fetched")

    async def _stop_driver(self, driver: Driver) -> None:
        await self._stop_wanted.wait()
        driver.stop()


def _last_written(store: LogStore) -> LastEntry | None:
    """The last entry in the files of a run that has ended; None where damage hides it."""
    index = store.written_index
    try:
        term, head_crc = store.term_at(index), store.head_crc_at(index)
        return LastEntry(index, term or 0, head_crc or 0, store.end_of(index))
    except LogDamaged:
        return None


def _cause(failure: BaseException) -> BaseException | None:
    """The one error, in a group or alone, that says why a node stops; None where there is none, or something else too.
    What the core was asked wrongly counts as a broken promise."""
    leaves: list[BaseException] = []
    waiting = [failure]
    while waiting:
        error = waiting.pop()
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        else:
            leaves.append(CoreStopped(str(error)) if isinstance(error, LocalError) else error)
    told = [error for error in leaves if isinstance(error, LedgerError | OSError)]
    return told[0] if len(told) == len(leaves) else None
