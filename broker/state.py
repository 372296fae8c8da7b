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
from typing import TYPE_CHECKING, Any

import cbor2
import msgspec
import trio

from broker.answers import BUSY, CUT, NOT_LEADER, TOO_LARGE, UNKNOWN, Done, SendAnswers, SendWaiter
from broker.consume_queue import QueueFilesShort, QueueState, QueueTable
from broker.dedup import DedupWindow
from broker.delay import DelayProgress
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
from broker.store_files import CheckpointUnusable, StoreFiles, decode_checkpoint, encode_checkpoint
from broker.tables import InvariantBroken
from broker.topics import TopicTable
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
        """The tables already hold this entry (checkpoint); only the dedup window reads it again."""


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
        self.locks = QueueLocks(self._propose_locks, env.clock.monotonic, config.lock_lease_ms / 1000)
        self.delay = DelayProgress()
        self.answers = SendAnswers(self.store_host, config.region_id, config.trace_on)
        self.facts = PropertyFacts()
        self.store_files = StoreFiles(env, config.data_dir)
        self.group: RaftGroup = None  # type: ignore[assignment]  # set by attach, before anything else is called
        self.broker_permission = config.broker_permission

        self.applied_index = 0
        self.last_store_ms = 0
        """Store time of the newest staged record; the next one is not earlier."""
        self.term = 0
        self.ready = False
        self._covered_index = 0
        self._in_flight: deque[Staged] = deque()
        self._touched: dict[Any, None] = {}
        self._deferred: list[Callable[[], None]] = []
        self._topic_waiters: dict[str, list[Done]] = {}
        self._group_waiters: dict[str, list[Done]] = {}
        self._checkpoint_position = 0
        self._checkpoint_at = 0.0
        self._meta_bytes = 0
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
        except NotLeader:
            done(False, NOT_LEADER)
        except Overloaded:
            done(False, BUSY)
        except TooLarge:
            done(False, TOO_LARGE)

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
        self._meta_bytes += len(tail)
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
            key = hash((topic, unique, body_crc))
            self.dedup.current[key] = physical_offset
            staged.dedup_keys.append(key)

    # ------------------------------------------------------------------------------------------ StateMachine: staging

    def stage(self, entry: EntryView) -> Staged:
        """An entry from its bytes. Raises InvariantBroken where it does not follow from the entries before it."""
        data = bytes(entry.body)
        base = entry.body_position
        staged = Staged(base)
        self._in_flight.append(staged)
        if entry.index <= self._covered_index:
            staged.covered = True
            self._stage_covered(staged, entry.count, data, base)
            return staged
        end = self._stage_records(staged, entry.count, data, base)
        if end < len(data):
            self._meta_bytes += len(data) - end
            self._stage_ops(staged, cbor2.loads(data[end:]))
        return staged

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
            if queue_offset != queue.next_offset or physical != base + at:
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
                add_hash(_crc32(unique, queue.index_seed))
                add_position(physical)
                if dedup is not None and not reconsumed:
                    key = hash((topic, unique, body_crc))
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

    def _stage_covered(self, staged: Staged, count: int, data: bytes, base: int) -> None:
        """Rebuild the dedup window from an entry that the checkpoint's tables already hold."""
        if not count:
            return
        staged.store_ms = store_timestamp_of(data)
        staged.count = count
        # Too old to be a duplicate of anything, or not sent by a client.
        if (
            not self.dedup.enabled
            or self.last_store_ms - staged.store_ms > self.dedup.window_ms
            or self._records_end(count, data) != len(data)
        ):
            return
        at = 0
        window = self.dedup.current
        for _ in range(count):
            size, magic, body_crc, _queue_id, _offset, _physical, sys_flag, _store_ms, reconsumed, body_length = (
                _unpack_head(data, at)
            )
            end = at + size
            if magic == MAGIC_V1 and not sys_flag & _IPV6_BITS:
                topic_start = at + 89 + body_length
                topic_end = topic_start + data[topic_start - 1]
                topic = data[topic_start:topic_end]
            else:
                record = decode_record(data, at)
                topic, reconsumed = record.topic, record.reconsume_times
                topic_end = end - len(record.properties) - 2
            if not reconsumed:
                unique = find_property(data, b"UNIQ_KEY\x01", topic_end + 2, end)
                if unique is not None:
                    key = hash((topic, unique, body_crc))
                    window[key] = base + at
                    staged.dedup_keys.append(key)
            at = end

    # -------------------------------------------------------------------------------- StateMachine: apply and discard

    def apply(self, index: int, term: int, staged: Staged) -> None:
        """Committed: units to the queues, keys to the index, operations to their tables, answers to those who wait."""
        if not self._in_flight or self._in_flight.popleft() is not staged:
            raise InvariantBroken(f"entry {index} is applied out of order")
        self.applied_index = index
        if staged.count:
            self.dedup.entry_applied(index, staged.store_ms)
        if staged.covered:
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
            self._apply_ops(staged)
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
        self.topics.changed(wall_ms, self.term)
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
        self.groups.changed(wall_ms, self.term)
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
                    if reason == BUSY:
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

    def find_pending(self, physical_offset: int, count: int) -> tuple[Staged, QueueState, int] | None:
        """Where `count` records of one queue, the first at this offset, are staged: (entry, queue, row in it)."""
        at = bisect_right(self._in_flight, physical_offset, key=lambda staged: staged.start) - 1
        if at < 0:
            return None
        staged = self._in_flight[at]
        for queue, units in staged.by_queue.items():
            for row, unit in enumerate(units):
                if UNIT.unpack(unit)[0] == physical_offset:
                    return (staged, queue, row) if row + count <= len(units) else None
        return None

    def is_in_flight(self, physical_offset: int) -> bool:
        """The record there is staged and not applied."""
        return bool(self._in_flight) and physical_offset >= self._in_flight[0].start

    def defer(self, call: Callable[[], None]) -> None:
        """Call back at the end of this turn, when everything applied in it can be read."""
        self._deferred.append(call)

    def staged_after(self, staged: Staged) -> list[Staged]:
        """What is staged behind this entry and not applied."""
        in_flight = list(self._in_flight)
        return in_flight[in_flight.index(staged) + 1 :]

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

    # -------------------------------------------------------------------------------------- checkpoint, start, service

    def restore(self, checkpoint: bytes | None, *, first_index: int = 1, first_position: int = 0) -> int:
        """Before replay: load the tables, cut queues and index to what they cover. Returns the entry to replay from.

        That is not the covered entry itself but the one before the dedup window: entries in between are only read for
        it.
        """
        self._reset()
        self.store_files.opened()
        if checkpoint is None:
            self._start_empty()
            return 0
        try:
            tables = decode_checkpoint(checkpoint)
            self.queues.restore(tables["queues"])
            if not self.index.restore(tables["key_index"]):
                raise CheckpointUnusable("a key index file is missing or damaged")
        except (CheckpointUnusable, QueueFilesShort) as error:
            self._log.warning("checkpoint of the tables is not used, reading the whole log", reason=str(error))
            self._reset()
            self._start_empty()
            return 0
        self.topics.restore(tables["topics"])
        self.groups.restore(tables["groups"])
        self.offsets.restore(tables["offsets"])
        self.locks.restore(tables["locks"])
        self.delay.restore(tables["delay"])
        self.last_store_ms = tables["last_store_ms"]
        self.put_messages = tables["put_messages"]
        self._covered_index = self.applied_index = tables["index"]
        dedup_from = tables["dedup_from"]
        return max(0, min(dedup_from - 1, self._covered_index)) if dedup_from else self._covered_index

    def _reset(self) -> None:
        self._in_flight.clear()
        self.applied_index = self._covered_index = 0
        self.last_store_ms = 0
        self.put_messages = 0
        self.dedup.clear()
        self.topics.restore(None)
        self.groups.restore(None)
        self.offsets.restore(None)
        self.locks.restore(None)
        self.delay.restore(None)

    def _start_empty(self) -> None:
        self.queues.remove_all()
        self.index.restore(None)

    async def checkpoint(self) -> None:
        """Write queues, index and tables so that a restart replays from here. Checkpoint (trio). Raises OSError."""
        await self.index.persist(self.env.run_in_thread)
        # One synchronous look at everything: it covers exactly the entries up to `applied_index`.
        self.queues.flush()
        index = self.applied_index
        tables = {
            "index": index,
            "topics": self.topics.snapshot(),
            "groups": self.groups.snapshot(),
            "offsets": self.offsets.snapshot(),
            "locks": self.locks.snapshot(),
            "delay": self.delay.snapshot(),
            "queues": self.queues.bounds(),
            "key_index": self.index.snapshot(),
            "last_store_ms": self.last_store_ms,
            "put_messages": self.put_messages,
            "dedup_from": self.dedup.rebuild_from_index,
        }
        position = self.group.committed_position
        self._meta_bytes = 0
        await self.queues.sync()
        await self.index.sync()
        if index:
            blob = await self.env.run_in_thread(encode_checkpoint, tables)
            await self.env.run_in_thread(self.group.save_checkpoint, index, blob)
        self._checkpoint_position = position
        self._checkpoint_at = self.env.clock.monotonic()

    def _checkpoint_due(self) -> bool:
        config = self.config
        if self.env.clock.monotonic() - self._checkpoint_at < config.checkpoint_interval_ms / 1000:
            return False
        grown = self.group.committed_position - self._checkpoint_position
        return grown >= config.checkpoint_log_bytes or self._meta_bytes >= config.checkpoint_meta_bytes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Maintenance, once the group runs: offsets each 200 ms, queues each second, index, checkpoints. Never returns.

        Raises OSError where the disk fails: the node must stop.
        """
        self._checkpoint_at = self.env.clock.monotonic()
        self._checkpoint_position = self.group.committed_position
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
            self.queues.trim()
            self.index.trim(self.group.first_position)
            await self.index.persist(self.env.run_in_thread)
            for name in files.listdir(self.queues.trash):
                await self.env.run_in_thread(files.remove_tree, f"{self.queues.trash}/{name}")
            if self._checkpoint_due():
                await self.checkpoint()

    async def close(self) -> None:
        """Clean stop, after the group has stopped taking entries: flush, last checkpoint, no `abort` mark left."""
        await self.checkpoint()
        self.queues.close()
        self.store_files.closed()


_SCHEDULE = SCHEDULE_TOPIC.encode()
__all__ = ["STORE_TIMESTAMP_END", "UNIT_BYTES", "BrokerState", "Staged"]
