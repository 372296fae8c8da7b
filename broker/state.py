"""The broker's tables as the state machine of its raft group.

Every table a proposal consults is committed + pending (design 2). One entry is `count` message records and an optional
cbor2 tail of META operations, applied together. `stage` moves the pending side on, `apply` the committed one, `discard`
takes back, newest first. On the leader the send path stages its records one by one as it encodes them; followers, and
every node at its start, stage whole entries from their bytes: both must arrive at the same tables.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import cbor2
import msgspec
import trio

from broker.answers import BUSY, CUT, NO_ROOM, NOT_LEADER, UNKNOWN, Done, SendAnswers, SendWaiter, reason_of
from broker.checkpoints import Checkpoints
from broker.consume_queue import QueueFilesShort, QueueState, QueueTable
from broker.dedup import DedupFiles, DedupWindow, SavedGeneration, dedup_key
from broker.delay import MAX_LEVEL, DelayProgress
from broker.errors import DISK_FULL
from broker.groups import GroupTable
from broker.key_index import KeyIndex, topic_seed
from broker.locks import LockRow, QueueLocks
from broker.offsets import DELTA_LIMIT, ROWS_PER_ENTRY, OffsetRow, OffsetTable
from broker.records import (
    HEAD_BYTES,
    MAGIC_V1,
    STORE_TIMESTAMP_END,
    SYS_BORN_IPV6,
    SYS_STORE_IPV6,
    UNIT,
    UNIT_BYTES,
    PropertyFacts,
    Record,
    RecordError,
    decode_record,
    find_property,
    store_timestamp_of,
)
from broker.store_files import CheckpointUnusable, StoreFiles, decode_checkpoint
from broker.tables import InvariantBroken
from broker.topics import TopicTable
from dledger.errors import LogDamaged
from dledger.group import EntryView, NotLeader, Overloaded, RaftGroup, Role, TooLarge
from remoting.bodies import SubscriptionGroupConfig, TopicConfig
from remoting.codes import SCHEDULE_TOPIC
from remoting.message import host_to_bytes
from runtime.model import Env

if TYPE_CHECKING:
    from broker.config import BrokerConfig

_unpack_head = struct.Struct(">IIIi4xqqi16xq8xi8xi").unpack_from
"""Size, magic, body crc, queue id, queue offset, physical offset, sysFlag, store time, reconsume times, body length."""
_pack_unit = UNIT.pack
_INT = struct.Struct(">i")
_crc32 = zlib.crc32
_IPV6_BITS = SYS_BORN_IPV6 | SYS_STORE_IPV6

NOTHING_NEEDED: Final = (1 << 63) - 1
"""`trim_floor` of a log of which only consumers may still want something."""

DispatchListener = Callable[[str, int, int, bytes], None]
RoleListener = Callable[[Role, int, str | None, bool], None]


class Staged:
    """What one entry does, from its staging to its apply or discard."""

    __slots__ = (
        "by_queue",
        "callbacks",
        "count",
        "covered",
        "dedup_keys",
        "hashes",
        "is_orphan",
        "ops",
        "positions",
        "removed",
        "start",
        "store_ms",
        "waiters",
    )

    def __init__(self, start: int) -> None:
        self.start = start
        """Physical offset of the first record."""
        self.by_queue: dict[QueueState, list[bytes]] = {}
        """ConsumeQueue units per queue, in log order."""
        self.count = 0
        self.store_ms = 0
        self.dedup_keys: list[int] = []
        self.hashes: list[int] = []
        self.positions: list[int] = []
        """Key index rows: two columns."""
        self.waiters: list[SendWaiter] = []
        self.callbacks: list[Done] = []
        self.ops: list[list[Any]] = []
        self.removed: list[list[QueueState]] = []
        """Per staged "topic_del": the queues it took out of the pending view."""
        self.is_orphan = False
        """Who waited for it has been told that the outcome is unknown; nobody is to wait for it any more."""
        self.covered = False
        """The tables already hold this entry (checkpoint); only what is kept in files is made from it again."""


class BrokerState:
    """Implements dledger.group.StateMachine. All methods are for the trio thread.

    Build it, build the RaftGroup with it as `machine`, call `attach(group)`, run the group, then `run`.
    """

    def __init__(self, env: Env, config: BrokerConfig, log: Any) -> None:
        self.env = env
        self.config = config
        self._log = log
        self._wall_ms = env.clock.wall_ms
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
        self.group: RaftGroup = None  # type: ignore[assignment]  # set by attach, before anything else is called
        self.broker_permission = config.broker_permission

        self.applied_index = 0
        self.last_store_ms = 0
        """Store time of the newest staged record; the next one is not earlier."""
        self.term = 0
        self._entry_term = 0
        """Term of the entry being applied. Tables follow from the log alone, not from what this node has heard."""
        self.ready = False
        self._covered_index = 0
        self._rebuilding: list[list[Any]] | None = None
        """Bounds of the queues in the checkpoint, while they are made again from the log."""
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
        """A change of this topic was staged, applied or discarded: cached views of it are stale."""

        self._ops: dict[str, tuple[Callable[..., None], Callable[..., None], Callable[..., None]]] = {
            "topic_put": (self._stage_topic_put, self._apply_topic_put, self._discard_topic_put),
            "topic_del": (self._stage_topic_del, self._apply_topic_del, self._discard_topic_del),
            "group_put": (self._stage_group_put, self._apply_group_put, self._discard_group_put),
            "group_del": (self._stage_group_del, self._apply_group_del, self._discard_group_del),
            "offsets": (self._stage_offsets, self._apply_offsets, self._discard_offsets),
            "locks": (self._stage_locks, self._apply_locks, self._discard_locks),
            "delay": (self._stage_delay, self._apply_delay, self._discard_delay),
        }

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

    def next_store_ms(self) -> int:
        """Store time of a record made now: never before the last one's."""
        now = self._wall_ms()
        if now > self.last_store_ms:
            self.last_store_ms = now
            return now
        return self.last_store_ms

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
            staged.store_ms = self.next_store_ms()
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
        plain = [self._plain_op(op) for op in ops]
        tail = cbor2.dumps(plain)
        # Sealing the open batch may be refused and discard it: nothing of this entry is staged yet.
        start = self.group.position_for(len(tail))
        staged = Staged(start)
        staged.callbacks.append(done)
        self._in_flight.append(staged)
        self._stage_ops(staged, plain)
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
        plain = [self._plain_op(op) for op in ops]
        tail = cbor2.dumps(plain) if plain else b""
        start = self.group.position_for(total_bytes + len(tail))
        staged = Staged(start)
        if done is not None:
            staged.callbacks.append(done)
        self._in_flight.append(staged)
        records = make_records(start, staged)
        self._stage_ops(staged, plain)
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

    def _plain_op(self, op: tuple[Any, ...]) -> list[Any]:
        """An operation as it lies in the log; table changes carry the wall time their DataVersion gets."""
        name = op[0]
        if name in ("topic_put", "group_put"):
            return [name, msgspec.to_builtins(op[1]), self._wall_ms()]
        if name == "topic_del":
            return [name, op[1], self._wall_ms()]
        if name == "group_del":
            return [name, op[1], bool(op[2]), self._wall_ms()]
        return list(op)

    def stage_record(
        self, staged: Staged, queue: QueueState, physical_offset: int, size: int, tags_code: int, store_ms: int
    ) -> int:
        """Stage one record of an own entry; returns the queue offset it has. Keys are added with `stage_keys`."""
        queue_offset = queue.next_offset
        queue.next_offset = queue_offset + 1
        units = staged.by_queue.get(queue)
        if units is None:
            units = staged.by_queue[queue] = []
        units.append(_pack_unit(physical_offset, size, tags_code))
        staged.count += 1
        staged.store_ms = store_ms
        return queue_offset

    def stage_keys(self, staged: Staged, topic: bytes, properties: bytes, physical_offset: int) -> bytes | None:
        """Key index rows of one record; returns its UNIQ_KEY."""
        seed = topic_seed(topic)
        unique = find_property(properties, b"UNIQ_KEY\x01")
        if unique is not None:
            staged.hashes.append(_crc32(unique, seed))
            staged.positions.append(physical_offset)
        words = find_property(properties, b"KEYS\x01")
        if words is not None:
            for word in words.split():
                staged.hashes.append(_crc32(word, seed))
                staged.positions.append(physical_offset)
        return unique

    def tags_code_of(self, topic: bytes, queue_id: int, properties: bytes, store_ms: int) -> int:
        """The tags code of a unit: hash of TAGS, or the delivery time in the schedule topic."""
        if topic == _SCHEDULE:
            return self.delay.due_ms(queue_id + 1, store_ms)
        tag = find_property(properties, b"TAGS\x01")
        return self.facts.tag_codes.of(tag) if tag is not None else 0

    def stage_dedup(self, staged: Staged, topic: bytes, unique: bytes, body_crc: int, physical_offset: int) -> None:
        """A client's own message enters the window."""
        if self.dedup.enabled:
            key = self.dedup.free_key(dedup_key(topic_seed(topic), unique, body_crc))
            self.dedup.current[key] = physical_offset
            staged.dedup_keys.append(key)

    # ------------------------------------------------------------------------------------------ StateMachine: staging

    def stage(self, entry: EntryView) -> Staged:
        """An entry from its bytes. Raises InvariantBroken where it does not follow from the entries before it."""
        data = bytes(entry.body)
        staged = Staged(entry.body_position)
        staged.covered = entry.index <= self._covered_index
        self._in_flight.append(staged)
        end = self._stage_records(staged, entry.count, data, staged.start)
        if end < len(data):
            ops = cbor2.loads(data[end:])
            if staged.covered:
                self._stage_deletions(staged, ops)
            else:
                self.meta_bytes += len(data) - end
                self._stage_ops(staged, ops)
        return staged

    def _stage_deletions(self, staged: Staged, ops: list[list[Any]]) -> None:
        """Of an entry that the tables hold already: only what it does to the queues."""
        for op in ops:
            if op[0] == "topic_del":
                staged.removed.append(self.queues.stage_delete(op[1].encode()))
                staged.ops.append(op)

    def _records_end(self, count: int, data: bytes) -> int:
        at = 0
        for _ in range(count):
            (size,) = _INT.unpack_from(data, at)
            at += size
        return at

    def _stage_records(self, staged: Staged, count: int, data: bytes, base: int) -> int:
        """Hot: every record of every follower comes through here. Returns where the records end."""
        pending = self.queues.pending
        by_queue = staged.by_queue
        known = self.facts.known
        learn = self.facts.learn
        find = data.find
        find_last = data.rfind
        # Only what clients send is deduplicated; entries with operations hold deliveries, whose keys are in use.
        dedup = self.dedup.current if self.dedup.enabled and self._records_end(count, data) == len(data) else None
        add_dedup_key = staged.dedup_keys.append
        add_hash = staged.hashes.append
        add_position = staged.positions.append
        at = 0
        store_ms = self.last_store_ms
        for _ in range(count):
            size, magic, body_crc, queue_id, queue_offset, physical, sys_flag, store_ms, reconsumed, body_length = (
                _unpack_head(data, at)
            )
            end = at + size
            if magic == MAGIC_V1 and not sys_flag & _IPV6_BITS:
                topic_start = at + 89 + body_length
                topic_end = topic_start + data[topic_start - 1]
                topic = data[topic_start:topic_end]
            else:
                record = decode_record(data, at)
                topic, store_ms, reconsumed = record.topic, record.store_timestamp, record.reconsume_times
                topic_end = end - len(record.properties) - 2
            start = topic_end + 2
            queue = pending.get((topic, queue_id))
            if queue is None:
                queue = self.queues.pending_queue(topic, queue_id)
            if (queue_offset != queue.next_offset or physical != base + at) and not (
                staged.covered and physical == base + at and self.queues.adopt(queue, queue_offset)
            ):
                raise InvariantBroken(
                    f"record at {base + at} says queue offset {queue_offset} at {physical} where {queue.topic} "
                    f"{queue_id} is at {queue.next_offset}"
                )
            queue.next_offset = queue_offset + 1

            found = find_last(b"UNIQ_KEY\x01", start, end)
            value_end = find(b"\x02", found, end)
            if found < 0 or value_end < 0 or (found != start and data[found - 1] != 2):
                rest = data[start:end]
                unique = find_property(rest, b"UNIQ_KEY\x01")
            else:
                unique = data[found + 9 : value_end]
                rest = data[start:found] + data[value_end + 1 : end]
            facts = known.get(rest)
            tags_code, words, _is_ordinary = learn(rest) if facts is None else facts
            if queue.is_schedule:
                tags_code = self.delay.due_ms(queue_id + 1, store_ms)
            if unique:
                key_hash = _crc32(unique, queue.index_seed)
                add_hash(key_hash)
                add_position(physical)
                if dedup is not None and not reconsumed:
                    key = key_hash << 31 | body_crc  # dedup_key, in place
                    if key in dedup:
                        key = self.dedup.free_key(key)
                    dedup[key] = physical
                    add_dedup_key(key)
            for word in words:
                add_hash(_crc32(word, queue.index_seed))
                add_position(physical)

            units = by_queue.get(queue)
            if units is None:
                units = by_queue[queue] = []
            units.append(_pack_unit(physical, size, tags_code))
            at = end
        staged.count = count
        staged.store_ms = store_ms
        if store_ms > self.last_store_ms:
            self.last_store_ms = store_ms
        return at

    # -------------------------------------------------------------------------------- StateMachine: apply and discard

    def apply(self, index: int, term: int, staged: Staged) -> None:
        """Committed: units to the queues, keys to the index, operations to their tables, answers to those who wait."""
        if not self._in_flight or self._in_flight.popleft() is not staged:
            raise InvariantBroken(f"entry {index} is applied out of order")
        self.applied_index = index
        if staged.count:
            self.dedup.entry_applied(index, staged.store_ms, staged.dedup_keys, staged.start)
        if staged.covered:
            self._apply_covered(index, staged)
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
            self._entry_term = term
            self._apply_ops(staged)
        if staged.waiters:
            self.answers.answer_all(staged.waiters, self._touched)
            staged.waiters = []
        if staged.callbacks:
            callbacks, staged.callbacks = staged.callbacks, []
            for done in callbacks:
                done(True, None)

    def _apply_covered(self, index: int, staged: Staged) -> None:
        """The tables know of it; units and keys are made again. The last such entry completes them."""
        for queue, parts in staged.by_queue.items():
            self.queues.append(queue, b"".join(parts))
        if staged.hashes:
            self.index.extend(staged.hashes, staged.positions, staged.store_ms)
        for op, removed in zip(staged.ops, staged.removed, strict=True):
            self.queues.apply_delete(op[1], removed)
        if index == self._covered_index:
            self._finish_rebuild()

    def _finish_rebuild(self) -> None:
        assert self._rebuilding is not None
        self.queues.finish_rebuild(self._rebuilding)
        self._rebuilding = None
        self._log.info("queues, key index and dedup window made again from the log", up_to=self._covered_index)

    def discard(self, staged: Staged) -> None:
        """Cut or refused: take back what `stage` moved. Newest first, so queue offsets step back in order."""
        if not self._in_flight or self._in_flight.pop() is not staged:
            raise InvariantBroken("an entry is discarded out of order")
        if staged.covered:
            raise InvariantBroken("an entry that the checkpoint of the tables covers is cut from the log")
        self._discard_ops(staged)
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

    # ------------------------------------------------------------------------------------------------- META operations

    def _stage_ops(self, staged: Staged, ops: list[list[Any]]) -> None:
        for op in ops:
            handlers = self._ops.get(op[0])
            if handlers is None:
                raise InvariantBroken(f"operation {op[0]!r} is not known: the log is of a newer version")
            handlers[0](staged, *op[1:])
            staged.ops.append(op)

    def _apply_ops(self, staged: Staged) -> None:
        for op in staged.ops:
            self._ops[op[0]][1](staged, *op[1:])

    def _discard_ops(self, staged: Staged) -> None:
        for op in reversed(staged.ops):
            self._ops[op[0]][2](staged, *op[1:])

    def _topic_touched(self, name: str) -> None:
        for listener in self.on_topic_touched:
            listener(name)

    def _stage_topic_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        config = msgspec.convert(plain, TopicConfig)
        self.topics.stage(config.topic_name, config)
        self._topic_touched(config.topic_name)

    def _apply_topic_put(self, _staged: Staged, plain: dict[str, Any], wall_ms: int) -> None:
        name = plain["topicName"]
        self.topics.apply(name)
        self._topics_changed(name, wall_ms)

    def _discard_topic_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        self.topics.discard(plain["topicName"])
        self._topic_touched(plain["topicName"])

    def _stage_topic_del(self, staged: Staged, name: str, _wall_ms: int) -> None:
        self.topics.stage(name, None)
        staged.removed.append(self.queues.stage_delete(name.encode()))
        self._topic_touched(name)

    def _apply_topic_del(self, staged: Staged, name: str, wall_ms: int) -> None:
        self.topics.apply(name)
        self.queues.apply_delete(name, staged.removed.pop(0))
        self.offsets.remove_topic(name)
        self.locks.remove_topic(name)
        self._topics_changed(name, wall_ms)

    def _discard_topic_del(self, staged: Staged, name: str, _wall_ms: int) -> None:
        self.topics.discard(name)
        self.queues.discard_delete(staged.removed.pop())
        self._topic_touched(name)

    def _topics_changed(self, name: str, wall_ms: int) -> None:
        self.topics.changed(wall_ms, self._entry_term)
        self._topic_touched(name)
        for listener in self.on_topics_changed:
            listener([name])

    def _stage_group_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        config = msgspec.convert(plain, SubscriptionGroupConfig)
        self.groups.stage(config.group_name, config)

    def _apply_group_put(self, _staged: Staged, plain: dict[str, Any], wall_ms: int) -> None:
        self.groups.apply(plain["groupName"])
        self._groups_changed(plain["groupName"], wall_ms)

    def _discard_group_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        self.groups.discard(plain["groupName"])

    def _stage_group_del(self, _staged: Staged, name: str, _clean: bool, _wall_ms: int) -> None:
        self.groups.stage(name, None)

    def _apply_group_del(self, _staged: Staged, name: str, clean: bool, wall_ms: int) -> None:
        self.groups.apply(name)
        self.locks.remove_group(name)
        if clean:
            self.offsets.remove_group(name)
        self._groups_changed(name, wall_ms)

    def _discard_group_del(self, _staged: Staged, name: str, _clean: bool, _wall_ms: int) -> None:
        self.groups.discard(name)

    def _groups_changed(self, name: str, wall_ms: int) -> None:
        self.groups.changed(wall_ms, self._entry_term)
        for listener in self.on_groups_changed:
            listener([name])

    def _stage_offsets(self, _staged: Staged, rows: list[OffsetRow]) -> None:
        self.offsets.stage(rows)

    def _apply_offsets(self, _staged: Staged, rows: list[OffsetRow]) -> None:
        self.offsets.apply(rows)

    def _discard_offsets(self, _staged: Staged, rows: list[OffsetRow]) -> None:
        self.offsets.discard(rows)

    def _stage_locks(self, _staged: Staged, rows: list[LockRow]) -> None:
        self.locks.stage(rows)

    def _apply_locks(self, _staged: Staged, rows: list[LockRow]) -> None:
        self.locks.apply(rows)

    def _discard_locks(self, _staged: Staged, rows: list[LockRow]) -> None:
        self.locks.discard(rows)

    def _stage_delay(self, _staged: Staged, level: int, next_offset: int) -> None:
        self.delay.stage(level, next_offset)

    def _apply_delay(self, _staged: Staged, level: int, _next_offset: int) -> None:
        self.delay.apply(level)

    def _discard_delay(self, _staged: Staged, level: int, _next_offset: int) -> None:
        self.delay.discard(level)

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
        tables = self._tables_of(checkpoint, first_index)
        self.checkpoints.restored(0)
        if tables is None:
            self._drop_files()
            return 0
        self.topics.restore(tables["topics"])
        self.groups.restore(tables["groups"])
        self.offsets.restore(tables["offsets"])
        self.locks.restore(tables["locks"])
        self.delay.restore(tables["delay"])
        self.last_store_ms = tables["last_store_ms"]
        self.put_messages = tables["put_messages"]
        self._covered_index = self.applied_index = tables["index"]
        self.checkpoints.restored(tables["position"])
        replay_from = self._covered_index
        try:
            self._restore_files(tables)
        except (CheckpointUnusable, QueueFilesShort) as error:
            self._log.warning("queues and indexes are made again from the log", reason=str(error), first=first_index)
            self._drop_files()
            self._rebuilding = tables["queues"]
            self.checkpoints.soon()
            replay_from = first_index - 1
            if replay_from == self._covered_index:
                self._finish_rebuild()
        self.trim(first_position)
        return replay_from

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
        generations = [SavedGeneration(*row) for row in tables["dedup"]]
        window = self.dedup_files.load(generations)
        if window is None:
            raise CheckpointUnusable("a file of the dedup window is missing or short")
        self.queues.restore(tables["queues"])
        if not self.index.restore(tables["key_index"]):
            raise CheckpointUnusable("a key index file is missing or damaged")
        self.dedup.take_up(window)

    def _reset(self) -> None:
        for name in {**self.topics.committed, **dict.fromkeys(self.topics.pending_keys())}:
            self._topic_touched(name)
        self.runs += 1
        self._in_flight.clear()
        self._rebuilding = None
        self.meta_bytes = 0
        self.applied_index = self._covered_index = 0
        self.last_store_ms = 0
        self.put_messages = 0
        self.dedup.clear()
        self.queues.forget_all()
        self.topics.restore(None)
        self.groups.restore(None)
        self.offsets.restore(None)
        self.locks.restore(None)
        self.delay.restore(None)

    def _drop_files(self) -> None:
        self.queues.remove_all()
        self.index.restore(None)
        self.dedup_files.remove_all()

    @property
    def is_complete(self) -> bool:
        """Queues and indexes are not being made again: they hold what the tables hold."""
        return self._rebuilding is None

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


_SCHEDULE = SCHEDULE_TOPIC.encode()
__all__ = ["STORE_TIMESTAMP_END", "UNIT_BYTES", "BrokerState", "Staged"]
