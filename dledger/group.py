"""A raft group as the broker sees it: the open batch, committed bytes to read, one service to run.

group = RaftGroup(env, config, machine, log)
await nursery.start(group.run)

`lifecycle.py` has what `run` does; where that serves a log there is a driver, and most calls here go on to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio
from attrs import evolve

from dledger.config import Address, GroupConfig
from dledger.core.membership import AddLearner, Change, Members, Promote, Remove, encode_members
from dledger.core.types import Role
from dledger.driver import Driver
from dledger.errors import LedgerError, LogDamaged, NotLeader, Overloaded, TooLarge
from dledger.lifecycle import LifeCycle
from dledger.machine import EntryView, GroupStatistics, StateMachine
from dledger.open_batch import OpenBatch
from dledger.peers import Refused
from dledger.reads import Told
from dledger.store.checkpoint import write_checkpoint
from dledger.store.manifest import Manifest
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

HOT_BYTES_MIN = 64 * 1024 * 1024
HOT_MEMORY_SHARE = 16
"""The end of the log that is taken to be in the page cache: this part of the machine's memory."""
TRANSFER_SECONDS_MAX = 10.0
SUCCESSOR_SECONDS_MAX = 2.0
SUCCESSOR_LOOK_SECONDS = 0.01
"""After a transfer: for how long to wait for the first word of the new leader, and how often to look."""
CHECKPOINT_LOOK_SECONDS = 0.01
LATE = "late"


class RaftGroup:
    """One member of a raft group. All methods are for the trio thread; the synchronous ones never block."""

    def __init__(
        self, env: Env, config: GroupConfig, machine: StateMachine, log: Logger, *, listener: Listener | None = None
    ) -> None:
        """`listener`, when given, is used instead of listening on the configured address (tests; socket activation)."""
        self.config = config
        self.machine = machine
        self.node_id = config.node_id
        self._env = env
        self._hot_bytes = max(HOT_BYTES_MIN, env.ids.memory_bytes // HOT_MEMORY_SHARE)
        self._batch = OpenBatch()
        self.reserve: Callable[[int], int] = self._batch.reserve
        """Physical offset that the next record, of this size, will get; `add_record` must follow before any await.

        Leader only. Raises NotLeader, Overloaded (nothing was logged) or TooLarge.
        """
        self.add_record: Callable[[bytes], None] = self._batch.add_record
        self.add_records: Callable[[Sequence[bytes]], None] = self._batch.add_records
        """Put the reserved record into the open batch."""
        self._driver: Driver | None = None
        """Of the run that serves the log now."""
        self._checkpoints_under_way = 0
        self._life = LifeCycle(
            env,
            config,
            machine,
            log.bind(group=config.group, node=config.node_id),
            self._batch,
            listener=listener,
            serving=self._serve_through,
            before_reopen=self._checkpoint_written,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover the log, replay it, listen, take part. `started()` once recovered and listening. Returns after
        `stop_gracefully`. Raises LedgerError, Locked or OSError with one sentence where the node cannot or must not
        serve.
        """
        await self._life.run(task_status)

    async def stop_gracefully(self) -> None:
        """Final sync, clean-stop mark, and `run` returns. Does not transfer leadership. Checkpoint."""
        await self._life.stop()

    def _serve_through(self, driver: Driver | None) -> None:
        self._driver = driver

    @property
    def group_uuid(self) -> str:
        """Identity of the group, 32 hex digits; final once `run` has started."""
        return self._life.group_uuid

    @property
    def state(self) -> str:
        """Recovering (the log from the disk), repairing (it from the peers), installing (their segments) or serving."""
        return self._life.state

    @property
    def counters(self) -> Mapping[str, int]:
        """Of the runs of this process that have ended: how often the log was opened anew, what was repaired ..."""
        return self._life.counters

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
        return self._driver.applier.committed_position if self._driver is not None else 0

    @property
    def end_position(self) -> int:
        """End of the log, uncommitted entries included."""
        return self._driver.store.position_end if self._driver is not None else 0

    def statistics(self) -> GroupStatistics:
        """A look at the group, for status commands; costs some microseconds per peer. Before `run` all is zero."""
        driver, life = self._driver, self._life
        now = GroupStatistics(node_id=self.node_id, flush=self.config.flush)
        if driver is not None:
            try:
                now = driver.statistics()
            except LogDamaged as error:
                driver.damaged(error)  # the group mends itself; whoever looks is not to end for it
        counters = dict(life.counters)  # of earlier runs of this process
        for name, count in now.counters.items():
            counters[name] = counters.get(name, 0) + count
        return evolve(
            now,
            state=life.state,
            waits_for=life.waits_for,
            damaged=life.phase.damaged if life.phase is not None else (),
            power_lost_index=life.power_lost_index,
            flush_interval_ms=self.config.flush_interval_ms,
            counters=counters,
        )

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
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.applier.committed_position:
            return None
        try:
            return driver.store.read(physical_offset, nbytes)
        except LogDamaged as error:
            driver.damaged(error)  # the group mends itself; whoever reads is not to end for it
            return None

    def read_cached(self, physical_offset: int, nbytes: int) -> bytes | None:
        """A copy, where the page cache has the bytes; None also where `read` has none. Never waits for the disk."""
        driver = self._driver
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.applier.committed_position:
            return None
        try:
            return driver.store.read_cached(physical_offset, nbytes)
        except LogDamaged as error:
            driver.damaged(error)  # the group mends itself; whoever reads is not to end for it
            return None

    async def read_cold(self, physical_offset: int, nbytes: int) -> bytes | None:
        """As `read`, in a thread: for bytes that may have to come from the disk. Checkpoint."""
        driver = self._driver
        if driver is None or physical_offset < 0 or physical_offset + nbytes > driver.applier.committed_position:
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
            self._driver.leadership.transfer(target)

    async def transfer_and_wait(self, target: str | None = None) -> str | None:
        """As `transfer_leadership`; returns when it has ended: None when another node leads, else the reason why this
        one goes on, or why it never led. `leader_id` names the new leader then, unless nobody was heard to lead within
        2 s. Takes no longer than some election timeouts. Checkpoint.
        """
        if self._driver is None or self._driver.role is not Role.LEADER:
            await trio.lowlevel.checkpoint()
            return str(NotLeader(self.leader_id))
        driver = self._driver
        outcome = await self._outcome(lambda told: driver.leadership.transfer(target, told), TRANSFER_SECONDS_MAX)
        if outcome is None:  # given up on hearing of the higher term: its leader speaks only when it is elected
            with self._env.clock.move_on_after(SUCCESSOR_SECONDS_MAX):
                while self._driver is not None and self.leader_id is None:
                    await self._env.clock.sleep(SUCCESSOR_LOOK_SECONDS)
        return "the transfer has not ended in time" if outcome is LATE else outcome

    def read_index(self, callback: Told) -> None:
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
            return self._driver.roster.members
        return Members(self.config.first_voters, (), dict(self.config.peers))

    async def change_members(self, change: Change) -> None:
        """Add a learner, promote it, or remove a member; returns once that is committed. One at a time. Checkpoint;
        cancelling leaves the outcome open.

        Raises NotLeader, or LedgerError with the reason: also where somebody else than the node answers at its address,
        and, for a promotion, where nobody does, as that address stays in the log for all members.
        """
        driver = self._leading()
        members = driver.roster.members
        match change:
            case AddLearner(node, address):
                await self._check_address(driver, node, address, is_needed=False)
            case Promote(node) if node in members.learners and node not in self.config.dial:
                await self._check_address(driver, node, members.addresses[node], is_needed=True)
        reason = await self._outcome(lambda told: driver.leadership.change_members(change, told), None)
        if reason is not None:
            raise LedgerError(reason)

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
        """The operator's word that what a power loss or damage took from this node is given up: it votes again; or,
        where it repairs its log, cuts it before the first entries that nobody can supply, and recovers then.

        Raises LedgerError with the reason why that cannot be.
        """
        if self._driver is not None:
            self._driver.accept_loss()
        else:
            self._life.accept_loss()

    def hold_segments(self, holder: str, position: int, seconds: float) -> None:
        """Keep segments from this byte of the log on, for so long, for somebody who copies them; in place of what was
        kept for the same holder so far. They count as trimmed all the same."""
        if self._life.fetch_server is not None:
            self._life.fetch_server.lease(holder, position, seconds)

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

    async def _outcome(self, ask: Callable[[Told], object], seconds: float | None) -> str | None:
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

    def manifest(self) -> Manifest | None:
        """The closed segments and what lies before them, for a backup; None where the log is not served."""
        driver = self._driver
        if driver is None:
            return None
        try:
            return driver.store.manifest()
        except LogDamaged as error:
            driver.damaged(error)  # as in `read`
            return None

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
            write_checkpoint(
                self._env.files,
                self.config.data_dir,
                index,
                blob,
                config=config,
                config_index=at,
                trimmed_position=driver.trimmed_at(index),
            )
            driver.checkpoint_saved(index)
            return True
        finally:
            self._checkpoints_under_way -= 1

    async def _checkpoint_written(self) -> None:
        """Of a run that has ended, a thread may still be saving a checkpoint: not beside whatever comes next."""
        while self._checkpoints_under_way:
            await self._env.clock.sleep(CHECKPOINT_LOOK_SECONDS)
