"""The 18 delay levels (semantics.md 3.1): replicated progress, and the leader's service that delivers.

A delayed message lies in SCHEDULE_TOPIC_XXXX, queue level - 1, its unit's tags code being the delivery time. Delivery
is one entry: the message under its real topic, and the level's next offset. So a crash delivers nothing twice and loses
nothing. While such an entry is pending, the level waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import trio

from broker.records import SYS_TRANSACTION_MASK, UNIT, Record, decode_record, find_property
from broker.tables import PendingTable
from dledger.errors import NotLeader, Overloaded, TooLarge
from remoting.codes import SCHEDULE_TOPIC
from remoting.message_codec import encode_record, record_size

if TYPE_CHECKING:
    from broker.consume_queue import QueueState
    from broker.staging import Staged
    from broker.state import BrokerState

DELAY_LEVELS_TEXT: Final = "1s 5s 10s 30s 1m 2m 3m 4m 5m 6m 7m 8m 9m 10m 20m 30m 1h 2h"
_UNIT_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
DELAYS_MS: Final = tuple(int(text[:-1]) * _UNIT_MS[text[-1]] for text in DELAY_LEVELS_TEXT.split())
MAX_LEVEL: Final = len(DELAYS_MS)

_BATCH_UNITS: Final = 256
_BATCH_BYTES: Final = 256 * 1024


class DelayProgress(PendingTable[int, int]):
    """Per level the queue offset that is delivered next, committed + pending."""

    __slots__ = ()

    @property
    def level_count(self) -> int:
        return MAX_LEVEL

    @property
    def levels(self) -> dict[int, int]:
        """level -> next queue offset, for every level that ever delivered."""
        return dict(sorted(self.committed.items()))

    @staticmethod
    def due_ms(level: int, store_ms: int) -> int:
        """When a message of this level is delivered; the tags code of its unit."""
        return store_ms + DELAYS_MS[min(max(level, 1), MAX_LEVEL) - 1]

    def next_offset(self, level: int) -> int:
        value = self.get_pending(level)
        return value if value is not None else 0

    def snapshot(self) -> list[list[int]]:
        return [[level, offset] for level, offset in self.levels.items()]

    def restore(self, snapshot: list[list[int]] | None) -> None:
        self.committed = {row[0]: row[1] for row in snapshot or ()}
        self._pending.clear()


class DelayService:
    """Delivers due messages while this node is the ready leader."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._look_ms = state.config.delay_look_ms
        self._again = trio.Event()
        self._unread: int | None = None
        """A due message that has to come from the disk."""
        self._read: tuple[int, bytes | None] = (-1, None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look at every level each 100 ms, earlier when a unit is known to be due earlier. Never returns."""
        clock = self._state.env.clock
        task_status.started()
        while True:
            now = clock.wall_ms()
            wake_at = now + self._look_ms
            if self._state.is_ready_leader:
                for level in range(1, MAX_LEVEL + 1):
                    due = self._deliver(level, now)
                    while self._unread is not None:
                        unread, self._unread = self._unread, None
                        self._read = (unread, await self._state.read_message_cold(unread))
                        if self._read[1] is None and not self._is_gone(unread):
                            break  # damaged, or the log is not served: it is due still
                        due = self._deliver(level, now)
                    if due is not None and due < wake_at:
                        wake_at = due
            self._again = trio.Event()
            with clock.move_on_after(max(1, wake_at - clock.wall_ms()) / 1000):
                await self._again.wait()

    def _deliver(self, level: int, now: int) -> int | None:
        """Propose what is due of one level. Returns when its next unit is due (ms), None if that is not known."""
        state = self._state
        progress = state.delay
        if progress.is_pending(level):
            return None
        # What retention removed is gone; the level goes on behind it.
        offset = max(progress.next_offset(level), state.queues.min_offset(SCHEDULE_TOPIC, level - 1))
        units = state.queues.units(SCHEDULE_TOPIC, level - 1, offset, _BATCH_UNITS)
        if not units:
            return None
        latest = now + DELAYS_MS[level - 1]
        due_records: list[tuple[Record, bytes, int]] = []
        total = 0
        next_offset = offset
        next_due: int | None = None
        for physical_offset, _size, due in UNIT.iter_unpack(units):
            # A time further away than the whole delay comes from a clock that was wrong: it counts as due.
            if now < due <= latest:
                next_due = due
                break
            data = self._message(physical_offset)
            if data is None and not self._is_gone(physical_offset):
                if not due_records:
                    self._unread = physical_offset
                break
            target = self._target(data) if data is not None else None
            if target is not None:
                record, topic, _queue_id = target
                nbytes = record_size(
                    len(record.body),
                    len(topic),
                    len(record.properties),
                    born_v6=len(record.born_host) != 8,
                    store_v6=len(state.store_host) != 8,
                )
                if due_records and total + nbytes > _BATCH_BYTES:
                    break
                due_records.append(target)
                total += nbytes
            next_offset += 1
        if next_offset == offset:
            return next_due
        ops = [("delay", level, next_offset)]
        try:
            if due_records:
                state.propose_records(
                    lambda start, staged: self._stage(start, staged, due_records), total, ops, self._done
                )
            else:
                state.propose_ops(ops, self._done)
        except (NotLeader, Overloaded):
            return None
        except TooLarge:
            # Cannot be: the message was stored once. Never stop the level for it.
            state.propose_ops(ops, self._done)
        return next_due

    def _done(self, ok: bool, _reason: str | None) -> None:
        if ok:
            self._again.set()

    def _message(self, physical_offset: int) -> bytes | memoryview | None:
        read_at, data = self._read
        return data if read_at == physical_offset else self._state.read_message(physical_offset)

    def _is_gone(self, physical_offset: int) -> bool:
        """Trimmed, by force: what retention removes in its time is never a message that is still to be delivered."""
        group = self._state.group
        return group.is_serving and physical_offset < group.first_position

    def _target(self, data: bytes | memoryview) -> tuple[Record, bytes, int] | None:
        """(record, real topic, real queue); None where its topic no longer exists."""
        record = decode_record(data)
        topic = find_property(record.properties, b"REAL_TOPIC\x01")
        queue = find_property(record.properties, b"REAL_QID\x01")
        if topic is None or queue is None or not queue.isdigit():
            return None
        if self._state.topics.get_pending(topic.decode()) is None:
            return None
        return record, topic, int(queue)

    def _stage(self, start: int, staged: Staged, due: list[tuple[Record, bytes, int]]) -> list[bytes]:
        state = self._state
        staging = state.staging
        records: list[bytes] = []
        for record, topic, queue_id in due:
            queue: QueueState = state.queues.pending_queue(topic, queue_id)
            store_ms = staging.next_store_ms()
            data = _encode(state, record, topic, queue_id, queue.next_offset, start, store_ms)
            code = staging.tags_code_of(topic, queue_id, record.properties, store_ms)
            staging.stage_record(staged, queue, start, len(data), code, store_ms)
            staging.stage_keys(staged, topic, record.properties, start)
            records.append(data)
            start += len(data)
        return records


def _encode(
    state: Any, record: Record, topic: bytes, queue_id: int, queue_offset: int, physical_offset: int, store_ms: int
) -> bytes:
    """The delivered form: born data, properties and reconsumeTimes as they were (semantics.md 3.1)."""
    return encode_record(
        queue_id,
        record.flag,
        queue_offset,
        physical_offset,
        record.sys_flag & ~SYS_TRANSACTION_MASK,
        record.born_timestamp,
        record.born_host,
        store_ms,
        state.store_host,
        record.reconsume_times,
        0,
        record.body,
        topic,
        record.properties,
    )


__all__ = ["DELAYS_MS", "DELAY_LEVELS_TEXT", "MAX_LEVEL", "DelayProgress", "DelayService"]
