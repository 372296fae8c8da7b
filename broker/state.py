"""The broker's tables as the state machine of its raft group.

Every table a proposal consults is committed + pending (design 2). One entry is `count` message records and an optional
cbor2 tail of META operations, applied together. `stage` moves the pending side on, `apply` the committed one, `discard`
takes back, newest first. What records do to the pending side is in `staging`, what operations do in `operations`, and
how a node takes up its checkpoint in `restart`.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import cbor2
import trio

from broker.answers import BUSY, CUT, NO_ROOM, NOT_LEADER, UNKNOWN, Done, SendAnswers, reason_of
from broker.checkpoints import Checkpoints
from broker.consume_queue import QueueState, QueueTable
from broker.dedup import DedupFiles, DedupWindow
from broker.delay import MAX_LEVEL, DelayProgress
from broker.errors import DISK_FULL
from broker.groups import GroupTable
from broker.key_index import KeyIndex
from broker.locks import LockRow, QueueLocks
from broker.offsets import DELTA_LIMIT, ROWS_PER_ENTRY, OffsetRow, OffsetTable
from broker.operations import Operations
from broker.records import (
    HEAD_BYTES,
    MAGIC_V1,
    STORE_TIMESTAMP_END,
    UNIT,
    PropertyFacts,
    Record,
    RecordError,
    decode_record,
    store_timestamp_of,
)
from broker.restart import Restart
from broker.staging import Staged, Staging
from broker.store_files import StoreFiles
from broker.tables import InvariantBroken
from broker.topics import TopicTable
from dledger.group import EntryView, NotLeader, Overloaded, RaftGroup, Role, TooLarge
from remoting.bodies import SubscriptionGroupConfig, TopicConfig
from remoting.codes import SCHEDULE_TOPIC
from remoting.message import host_to_bytes
from runtime.model import Env

if TYPE_CHECKING:
    from broker.config import BrokerConfig

NOTHING_NEEDED: Final = (1 << 63) - 1
"""`trim_floor` of a log of which only consumers may still want something."""

DispatchListener = Callable[[str, int, int, bytes], None]
RoleListener = Callable[[Role, int, str | None, bool], None]


class BrokerState:
    """Implements dledger.group.StateMachine. All methods are for the trio thread.

    Build it, build the RaftGroup with it as `machine`, call `attach(group)`, run the group, then `run`.
    """

    def __init__(self, env: Env, config: BrokerConfig, log: Any) -> None:
        self.env = env
        self.config = config
        self._log = log
        self.store_host = host_to_bytes(*config.advertised)
        self.topics = TopicTable(config)
        self.groups = GroupTable(config)
        self.offsets = OffsetTable()
        self.queues = QueueTable(
            env.files,
            config.data_dir,
            flush_bytes=config.queue_flush_bytes,
            file_units=config.queue_file_units,
            open_files=config.open_queue_files,
        )
        self.index = KeyIndex(env.files, config.data_dir, segment_keys=config.index_segment_keys)
        self.dedup = DedupWindow(config.dedup_window_ms, config.dedup_keys)
        self.dedup_files = DedupFiles(env.files, config.data_dir)
        self.locks = QueueLocks(self._propose_locks, env.clock.monotonic, config.lock_lease_ms / 1000)
        self.delay = DelayProgress()
        self.answers = SendAnswers(self.store_host, config.region_id, config.trace_on)
        self.facts = PropertyFacts()
        self.store_files = StoreFiles(env, config.data_dir)
        self.checkpoints = Checkpoints(self)
        self.staging = Staging(self.queues, self.dedup, self.facts, env.clock.wall_ms)
        self.operations = Operations(self)
        self.restart = Restart(self, log)
        self.group: RaftGroup = None  # type: ignore[assignment]  # set by attach, before anything else is called
        self.broker_permission = config.broker_permission

        self.applied_index = 0
        self.term = 0
        self.ready = False
        self.runs = 0
        """How often the tables were loaded; what belongs to an earlier time must not be saved."""
        self._in_flight: deque[Staged] = deque()
        self._touched: dict[Any, None] = {}
        self._deferred: list[Callable[[], None]] = []
        self._topic_waiters: dict[str, list[Done]] = {}
        self._group_waiters: dict[str, list[Done]] = {}
        self.meta_bytes = 0
        """Operations applied or staged since the last checkpoint."""
        self.put_messages = 0
        self.dedup_hits = 0

        self.on_dispatch: list[DispatchListener] = []
        self.on_role: list[RoleListener] = []
        self.on_app_message: list[Callable[[str, bytes], None]] = []
        self.on_topics_changed: list[Callable[[list[str]], None]] = []
        self.on_groups_changed: list[Callable[[list[str]], None]] = []
        self.on_turn_done: list[Callable[[], None]] = []
        self.on_topic_touched: list[Callable[[str], None]] = []
        """A change of this topic was staged, applied or discarded, or the permission is another: cached views of it are
        stale."""

    def attach(self, group: RaftGroup) -> None:
        """The group this is the machine of; before it runs."""
        self.group = group
        self.queues.attach(group)

    # ---------------------------------------------------------------------------------------------- facts and reads

    @property
    def is_ready_leader(self) -> bool:
        return self.group.is_ready_leader

    @property
    def committed_position(self) -> int:
        return self.group.committed_position

    def read_message(self, physical_offset: int) -> memoryview | None:
        """One committed stored message; None where there is none at this offset (or it is not in memory)."""
        head = self.group.read(physical_offset, 8)
        if head is None:
            return None
        size, magic = struct.unpack(">II", head)
        if magic & 0xFFFFFFFB != MAGIC_V1 & 0xFFFFFFFB or size < HEAD_BYTES:
            return None
        data = self.group.read(physical_offset, size)
        return data if data is not None and self._is_record(data, physical_offset) else None

    def is_cold(self, physical_offset: int) -> bool:
        """The log holds these bytes, but not in memory, or not looked at yet since the start: `read_message_cold`."""
        group = self.group
        if not group.first_position <= physical_offset <= group.committed_position - 8:
            return False
        return not group.is_hot(physical_offset) or group.read(physical_offset, 8) is None

    async def read_message_cold(self, physical_offset: int) -> bytes | None:
        """As `read_message`, waiting for the disk. Checkpoint."""
        head = await self.group.read_cold(physical_offset, 8)
        if head is None:
            return None
        size, magic = struct.unpack(">II", head)
        if magic & 0xFFFFFFFB != MAGIC_V1 & 0xFFFFFFFB or size < HEAD_BYTES:
            return None
        data = await self.group.read_cold(physical_offset, size)
        return data if data is not None and self._is_record(data, physical_offset) else None

    @staticmethod
    def _is_record(data: bytes | memoryview, physical_offset: int) -> bool:
        """An offset from a client may point anywhere: the record must say that it lies there and add up."""
        try:
            return decode_record(data).physical_offset == physical_offset
        except RecordError:
            return False

    def touch(self, conn: Any) -> None:
        """Have the connection flushed at the end of this turn."""
        self._touched[conn] = None

    def statistics(self) -> dict[str, int]:
        """Counters since the start."""
        return {
            "put_messages_total": self.put_messages,
            "dedup_hits_total": self.dedup_hits,
            "dedup_keys": len(self.dedup),
            "topics": len(self.topics.committed),
            "groups": len(self.groups.committed),
            "applied_index": self.applied_index,
            "in_flight_entries": len(self._in_flight),
        }

    # ------------------------------------------------------------------------------------------ the leader's proposals

    def open_staged(self, physical_offset: int) -> Staged:
        """The rows of the open batch; a new one begins with the record at `physical_offset`. Ask after `reserve`."""
        staged: Staged | None = self.group.open_staged()
        if staged is None:
            staged = Staged(physical_offset)
            # One look at the clock per batch: it is closed within the turn.
            staged.store_ms = self.staging.next_store_ms()
            self.group.set_open_staged(staged)
            self._in_flight.append(staged)
            self.group.wake()
        return staged

    def propose_op(self, op: tuple[Any, ...], done: Done) -> None:
        self.propose_ops([op], done)

    def propose_ops(self, ops: Sequence[tuple[Any, ...]], done: Done) -> None:
        """Log META operations as one entry. `done` is called exactly once, at once when refused.

        ("topic_put", TopicConfig) ("topic_del", name) ("group_put", SubscriptionGroupConfig)
        ("group_del", name, clean_offsets) ("offsets", rows) ("locks", rows) ("delay", level, next_offset)
        """
        try:
            self._log_ops(ops, done)
        except (NotLeader, Overloaded, TooLarge) as error:
            done(False, reason_of(error))

    def _log_ops(self, ops: Sequence[tuple[Any, ...]], done: Done) -> None:
        if not self.group.is_ready_leader:
            raise NotLeader(self.group.leader_id)
        plain = [self.operations.plain(op) for op in ops]
        tail = cbor2.dumps(plain)
        # Sealing the open batch may be refused and discard it: nothing of this entry is staged yet.
        start = self.group.position_for(len(tail))
        staged = Staged(start)
        staged.callbacks.append(done)
        self._in_flight.append(staged)
        self.operations.stage(staged, plain)
        self._propose(staged, (), tail)

    def propose_records(
        self,
        make_records: Callable[[int, Staged], list[bytes]],
        total_bytes: int,
        ops: Sequence[tuple[Any, ...]],
        done: Done | None = None,
    ) -> None:
        """One entry of records and operations. Raises NotLeader, Overloaded, TooLarge: then nothing was logged.

        `make_records(start, staged)` encodes `total_bytes` of records from physical offset `start` on and stages
        them with `stage_record`; it must not fail.
        """
        plain = [self.operations.plain(op) for op in ops]
        tail = cbor2.dumps(plain) if plain else b""
        start = self.group.position_for(total_bytes + len(tail))
        staged = Staged(start)
        if done is not None:
            staged.callbacks.append(done)
        self._in_flight.append(staged)
        records = make_records(start, staged)
        self.operations.stage(staged, plain)
        self._propose(staged, records, tail)

    def _propose(self, staged: Staged, records: Sequence[bytes], tail: bytes) -> None:
        try:
            self.group.propose(records=records, ops=tail, staged=staged)
        except (NotLeader, Overloaded, TooLarge):
            staged.callbacks.clear()
            staged.waiters.clear()
            self.discard(staged)
            raise
        self.meta_bytes += len(tail)
        self.group.wake()

    # ------------------------------------------------------------------------------------------ StateMachine: staging

    def stage(self, entry: EntryView) -> Staged:
        """An entry from its bytes. Raises InvariantBroken where it does not follow from the entries before it."""
        data = bytes(entry.body)
        staged = Staged(entry.body_position)
        staged.covered = entry.index <= self.restart.covered_index
        self._in_flight.append(staged)
        end = self.staging.stage_records(staged, entry.count, data, staged.start)
        if end < len(data):
            ops = cbor2.loads(data[end:])
            if staged.covered:
                self.operations.stage_deletions(staged, ops)
            else:
                self.meta_bytes += len(data) - end
                self.operations.stage(staged, ops)
        return staged

    # -------------------------------------------------------------------------------- StateMachine: apply and discard

    def apply(self, index: int, term: int, staged: Staged) -> None:
        """Committed: units to the queues, keys to the index, operations to their tables, answers to those who wait."""
        if not self._in_flight or self._in_flight.popleft() is not staged:
            raise InvariantBroken(f"entry {index} is applied out of order")
        self.applied_index = index
        if staged.count:
            self.dedup.entry_applied(index, staged.store_ms, staged.dedup_keys, staged.start)
        if staged.covered:
            self.restart.apply_covered(index, staged)
            return
        listeners = self.on_dispatch
        queues = self.queues
        for queue, parts in staged.by_queue.items():
            units = b"".join(parts)
            queues.append(queue, units)
            for listener in listeners:
                listener(queue.topic, queue.queue_id, queue.max_offset, units)
        if staged.hashes:
            self.index.extend(staged.hashes, staged.positions, staged.store_ms)
        self.put_messages += staged.count
        if staged.ops:
            self.operations.apply(staged, term)
        if staged.waiters:
            self.answers.answer_all(staged.waiters, self._touched)
            staged.waiters = []
        if staged.callbacks:
            callbacks, staged.callbacks = staged.callbacks, []
            for done in callbacks:
                done(True, None)

    def discard(self, staged: Staged) -> None:
        """Cut or refused: take back what `stage` moved. Newest first, so queue offsets step back in order."""
        if not self._in_flight or self._in_flight.pop() is not staged:
            raise InvariantBroken("an entry is discarded out of order")
        if staged.covered:
            raise InvariantBroken("an entry that the checkpoint of the tables covers is cut from the log")
        self.operations.discard(staged)
        for queue, parts in staged.by_queue.items():
            queue.next_offset -= len(parts)
        for key in staged.dedup_keys:
            self.dedup.forget(key, staged.start)
        self._fail(staged, CUT)

    def orphan(self, staged: Staged) -> None:
        """Nobody knows whether this entry will be committed: say so. It stays staged."""
        staged.is_orphan = True
        self._fail(staged, UNKNOWN)

    def _fail(self, staged: Staged, reason: str) -> None:
        waiters, staged.waiters = staged.waiters, []
        callbacks, staged.callbacks = staged.callbacks, []
        if waiters:
            self.answers.fail_all(waiters, reason, self._touched)
        for done in callbacks:
            done(False, reason)

    def role_changed(self, role: Role, term: int, leader_id: str | None, ready: bool) -> None:
        self.term = term
        if ready and not self.ready:
            self.locks.leading()
        if not ready:
            self.offsets.drop_delta()
        self.ready = ready
        for listener in self.on_role:
            listener(role, term, leader_id, ready)

    def app_message(self, peer_id: str, payload: bytes) -> None:
        for listener in self.on_app_message:
            listener(peer_id, payload)

    def turn_done(self) -> None:
        """One flush per connection that was answered in this turn."""
        if self._deferred:
            deferred, self._deferred = self._deferred, []
            for call in deferred:
                call()
        for listener in self.on_turn_done:
            listener()
        if self._touched:
            touched, self._touched = self._touched, {}
            for conn in touched:
                conn.flush()

    def _propose_locks(self, rows: list[LockRow], done: Done) -> None:
        self.propose_op(("locks", rows), done)

    # ------------------------------------------------------------------------------- operations several callers share

    def ensure_topic(self, config: TopicConfig, done: Done) -> None:
        """Have a topic with this name: `done(True, None)` at once when it is committed and unchanging, else logged."""
        name = config.topic_name
        waiting = self._topic_waiters.get(name)
        if waiting is not None:
            waiting.append(done)
            return
        if self.topics.get(name) is not None and not self.topics.is_pending(name):
            done(True, None)
            return
        self._ensure(self._topic_waiters, name, ("topic_put", config), done)

    def ensure_group(self, name: str, done: Done) -> None:
        """Have a consumer group with this name, with the default config where it is new."""
        waiting = self._group_waiters.get(name)
        if waiting is not None:
            waiting.append(done)
            return
        if self.groups.get(name) is not None and not self.groups.is_pending(name):
            done(True, None)
            return
        self._ensure(self._group_waiters, name, ("group_put", SubscriptionGroupConfig(group_name=name)), done)

    def _ensure(self, waiters: dict[str, list[Done]], name: str, op: tuple[Any, ...], done: Done) -> None:
        waiters[name] = [done]

        def logged(ok: bool, reason: str | None) -> None:
            for waiting in waiters.pop(name):
                waiting(ok, reason)

        self.propose_op(op, logged)

    def log_offsets(self, done: Done | None = None) -> None:
        """Log the delta of consumer offsets now; `done` after commit of everything taken so far."""
        rows = self.offsets.take_delta()
        if not rows:
            self.after_in_flight(done)
            return

        parts = [rows[at : at + ROWS_PER_ENTRY] for at in range(0, len(rows), ROWS_PER_ENTRY)]
        failures: list[str | None] = []
        waiting = len(parts)

        def propose(part: list[OffsetRow]) -> None:
            def logged(ok: bool, reason: str | None) -> None:
                nonlocal waiting
                if not ok:
                    failures.append(reason)
                    if reason in (BUSY, NO_ROOM):
                        self.offsets.put_back(part)
                waiting -= 1
                if not waiting and done is not None:
                    done(not failures, failures[0] if failures else None)

            self.propose_op(("offsets", part), logged)

        for part in parts:
            propose(part)

    def after_in_flight(self, done: Done | None) -> None:
        """Call `done` when what is staged now is committed."""
        if done is None:
            return
        if not self.group.is_ready_leader:
            done(False, NOT_LEADER)
        elif self._in_flight:
            self.wait_for(self._in_flight[-1], done)
        else:
            done(True, None)

    @staticmethod
    def wait_for(staged: Staged, done: Done) -> None:
        """Call `done` with this entry's fate, at once where that is unknown already."""
        if staged.is_orphan:
            done(False, UNKNOWN)
        else:
            staged.callbacks.append(done)

    def update_offset(self, group: str, topic: str, queue_id: int, offset: int, done: Done) -> None:
        """A two-way update: `done` after its commit."""
        self.offsets.update(group, topic, queue_id, offset)
        self.log_offsets(done)

    # -------------------------------------------------------------------------------------------- duplicates of sends

    def find_pending(self, physical_offset: int, count: int) -> tuple[Staged, QueueState] | None:
        """The entry where `count` records of one queue, the first at this offset, are staged, and that queue."""
        at = bisect_right(self._in_flight, physical_offset, key=lambda staged: staged.start) - 1
        if at < 0:
            return None
        staged = self._in_flight[at]
        for queue, units in staged.by_queue.items():
            for row, unit in enumerate(units):
                if UNIT.unpack(unit)[0] == physical_offset:
                    return (staged, queue) if row + count <= len(units) else None
        return None

    def is_in_flight(self, physical_offset: int) -> bool:
        """The record there is staged and not applied."""
        return bool(self._in_flight) and physical_offset >= self._in_flight[0].start

    def defer(self, call: Callable[[], None]) -> None:
        """Call back at the end of this turn, when everything applied in it can be read."""
        self._deferred.append(call)

    def read_records(self, physical_offset: int, count: int) -> list[Record] | None:
        """`count` committed records back to back; None where there are fewer."""
        records: list[Record] = []
        for _ in range(count):
            data = self.read_message(physical_offset)
            if data is None:
                return None
            record = decode_record(data)
            records.append(record)
            physical_offset += record.size
        return records

    # ------------------------------------------------------------------------------- start, end of a run, retention

    def restore(self, checkpoint: bytes | None, *, first_index: int = 1, first_position: int = 0) -> int:
        """Before replay: load the tables, cut queues, index and dedup window to what they cover. Returns the entry to
        replay from.

        That is the covered entry, unless those files do not hold what the checkpoint says: they are dropped, and made
        again from everything the log still holds. May be called again after `stopped`. Raises LogDamaged where the log
        begins behind what is known, InvariantBroken where log and checkpoint contradict each other.
        """
        self._reset()
        self.store_files.opened()
        replay_from = self.restart.take_up(checkpoint, first_index)
        self.trim(first_position)
        return replay_from

    def change_permission(self, permission: int) -> None:
        """What clients may do with this broker now."""
        self.broker_permission = permission
        self._touch_topics()

    def _touch_topics(self) -> None:
        for name in {**self.topics.committed, **dict.fromkeys(self.topics.pending_keys())}:
            self.operations.topic_touched(name)

    def _reset(self) -> None:
        self._touch_topics()
        self.runs += 1
        self._in_flight.clear()
        self.restart.reset()
        self.meta_bytes = 0
        self.applied_index = 0
        self.staging.last_store_ms = 0
        self.put_messages = 0
        self.dedup.clear()
        self.queues.forget_all()
        self.topics.restore(None)
        self.groups.restore(None)
        self.offsets.restore(None)
        self.locks.restore(None)
        self.delay.restore(None)

    def stopped(self) -> None:
        """The run of the group has ended; the tables stay as they are until the next `restore`, if there is one."""
        self.role_changed(Role.FOLLOWER, self.term, None, False)
        self.turn_done()
        self._in_flight.clear()

    def trim(self, first_position: int) -> None:
        """Nothing before this byte of the log is shown any more. The minima follow when they are asked for."""
        self.queues.trim(first_position)
        self.index.trim(first_position)

    def trim_floor(self) -> int:
        """Physical offset of the oldest delayed message not delivered yet; NOTHING_NEEDED where there is none."""
        floor = NOTHING_NEEDED
        for level in range(1, MAX_LEVEL + 1):
            queue_id = level - 1
            offset = max(self.delay.get(level) or 0, self.queues.min_offset(SCHEDULE_TOPIC, queue_id))
            units = self.queues.units(SCHEDULE_TOPIC, queue_id, offset, 1)
            if units:
                floor = min(floor, UNIT.unpack(units)[0])
        return floor

    def store_time_ms(self, entry: EntryView) -> int | None:
        """Of the entry's first record; None where it has none."""
        return store_timestamp_of(entry.body[:STORE_TIMESTAMP_END]) if entry.count else None

    def checkpoint_soon(self) -> None:
        self.checkpoints.soon()

    # ------------------------------------------------------------------------------------------ checkpoints, service

    async def checkpoint(self) -> None:
        """Write queues, index and tables so that a restart replays from here. Checkpoint (trio). Raises OSError."""
        await self.checkpoints.save()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Maintenance, once the group runs: offsets each 200 ms, queues each second, index, checkpoints. Never returns.

        Raises OSError where the disk fails: the node must stop.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._log_offsets_regularly)
            nursery.start_soon(self._maintain)
            task_status.started()

    async def _log_offsets_regularly(self) -> None:
        interval = self.config.offsets_interval_ms / 1000
        while True:
            await self.env.clock.sleep(interval)
            if self.offsets.delta_size and self.group.is_ready_leader:
                self.log_offsets()
            elif self.offsets.delta_size > DELTA_LIMIT:
                self.offsets.drop_delta()

    async def _maintain(self) -> None:
        interval = self.config.queue_flush_interval_ms / 1000
        files = self.env.files
        while True:
            await self.env.clock.sleep(interval)
            self.queues.flush()
            if not self._in_flight:
                clock = self.env.clock
                self.dedup.forget_old(clock.wall_ms(), clock.monotonic(), self.staging.last_store_ms)
            if self.group.is_serving:
                self.trim(self.group.first_position)
                await self.queues.settle()
            try:
                await self.index.persist(self.env.run_in_thread)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise  # else it waits in memory, as the units of the queues do
            for name in files.listdir(self.queues.trash):
                await self.env.run_in_thread(files.remove_tree, f"{self.queues.trash}/{name}")
            if self.checkpoints.is_due:
                await self.checkpoints.save()

    async def close(self) -> None:
        """Clean stop, after the group has stopped: everything is in files, no `abort` mark is left.

        The last checkpoint is taken before, while the group still runs.
        """
        self.queues.flush()
        self.queues.close()
        self.store_files.closed()
