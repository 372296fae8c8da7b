"""PULL_MESSAGE and LITE_PULL_MESSAGE: from ConsumeQueue units to ranges of the log (semantics.md 4).

Hot: a pull of 32 messages builds no message object. Units are unpacked, neighbours in the log are merged into ranges,
and the ranges go out as they lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import trio

from broker.failures import UNEXPECTED
from broker.long_poll import SUSPEND_MAX_MS, Parked
from broker.records import UNIT
from broker.subscriptions import is_tag_type, tag_hashes
from remoting.codes import (
    FLAG_ONEWAY,
    PERM_READ,
    PULL_COMMIT_OFFSET,
    PULL_SUBSCRIPTION,
    PULL_SUSPEND,
    RequestCode,
    ResponseCode,
)
from remoting.command import encode_response
from remoting.frames import Frame, PullHeader, decode_pull, format_pull_response_head
from runtime.model import Buffer

if TYPE_CHECKING:
    from broker.context import BrokerContext

UNITS_SCANNED_MAX: Final = 800
COLD_MESSAGES_MAX: Final = 8
COLD_BYTES_MAX: Final = 64 * 1024
COLD_READERS: Final = 2
COLD_JOBS_MAX: Final = 1_024
SHORT_POLLING_MS: Final = 1_000
NANOSECONDS_FROM: Final = 1_000_000_000
"""A suspend time from here on can only be nanoseconds (older Go clients): as milliseconds it would be eleven days."""
RANGE_WORTH_ITS_OWN_WRITE: Final = 16_384
"""Ranges longer than this on average are handed on as views; joining shorter ones costs less than the calls."""

_FOUND = int(ResponseCode.SUCCESS)
_NOT_FOUND = int(ResponseCode.PULL_NOT_FOUND)
_RETRY = int(ResponseCode.PULL_RETRY_IMMEDIATELY)
_MOVED = int(ResponseCode.PULL_OFFSET_MOVED)

LOG_NOT_SERVED: Final = "the log of this node cannot be read now: it is being repaired or installed; ask again later"

Ranges = list[tuple[int, int]]


class PullProcessor:
    """One per node. `handle` answers, parks the pull in the long-poll table, or hands it to a cold reader."""

    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker
        self._state = broker.state
        self._queues = broker.state.queues
        self._group = broker.group
        self._monotonic = broker.env.clock.monotonic
        self._cold_send, self._cold_receive = trio.open_memory_channel[_ColdJob](COLD_JOBS_MAX)

    def handle(self, frame: Frame, conn: Any) -> None:
        """A pull's first pass. Raises HeaderError or RemoteProtocolError."""
        header = decode_pull(frame)
        if header.flag & FLAG_ONEWAY:
            return
        broker = self._broker
        refusal = self._check(header, conn)
        if refusal is not None:
            conn.write(refusal)
            return
        broker.pull_offsets[header.consumer_group, header.topic, header.queue_id] = header.queue_offset
        if header.sys_flag & PULL_COMMIT_OFFSET and header.commit_offset >= 0 and self._group.is_ready_leader:
            broker.commit_offset(header.consumer_group, header.topic, header.queue_id, header.commit_offset)
        self._answer(header, conn, can_park=True)

    def wake(self, parked: Parked, expired: bool) -> None:
        """Second pass of a parked pull: a message has come, or its time is up."""
        conn, header = parked.conn, parked.header
        try:
            refusal = self._check(header, conn)
            if refusal is not None:
                conn.write(refusal)
            else:
                self._answer(header, conn, can_park=False)
        except UNEXPECTED as error:
            # This runs inside the group's turn, which one request's failure must not end.
            self._failed(header, conn, error)
        self._broker.changed(conn)

    def _failed(self, header: PullHeader, conn: Any, error: BaseException) -> None:
        remark = self._broker.failures.note(header.code, conn.peer_text, error)
        conn.write(encode_response(header.opaque, ResponseCode.SYSTEM_ERROR, {}, remark=remark))

    # -------------------------------------------------------------------------------------------------- the checks

    def _check(self, header: PullHeader, conn: Any) -> bytes | None:
        """The checks of semantics.md 4.1, in order; the refusal, if any. `header.subscription` becomes the filter."""
        broker = self._broker
        settings = broker.settings
        if not self._group.is_serving:
            return self._refuse(header, ResponseCode.SERVICE_NOT_AVAILABLE, LOG_NOT_SERVED)
        if not settings.broker_permission & PERM_READ:
            return self._forbid(header, 1, f"the broker[{broker.config.advertised[0]}] pulling message is forbidden")
        if header.code == RequestCode.LITE_PULL_MESSAGE and not settings.lite_pull_enable:
            remark = f"the broker[{broker.config.advertised[0]}] for lite pull consumer is forbidden"
            return encode_response(header.opaque, ResponseCode.NO_PERMISSION, {}, remark=remark)
        group_name = header.consumer_group
        group = broker.group_config(group_name)
        if group is None:
            remark = f"subscription group [{group_name}] does not exist, create it first"
            return self._refuse(header, ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST, remark)
        if not group.consume_enable:
            return self._forbid(header, 2, f"subscription group no permission, {group_name}")
        topic_name = header.topic
        topic = self._state.topics.get(topic_name)
        if topic is None:
            remark = f"topic[{topic_name}] not exist, apply first please!"
            return self._refuse(header, ResponseCode.TOPIC_NOT_EXIST, remark)
        if not topic.perm & PERM_READ:
            return self._forbid(header, 3, f"the topic[{topic_name}] pulling message is forbidden")
        if not 0 <= header.queue_id < topic.read_queue_nums:
            return self._refuse(
                header,
                ResponseCode.INVALID_PARAMETER,
                f"queueId[{header.queue_id}] is illegal, topic:[{topic_name}] "
                f"topicConfig.readQueueNums:[{topic.read_queue_nums}] consumer:[{conn.peer_text}]",
            )
        if header.sys_flag & PULL_SUBSCRIPTION:
            if is_tag_type(header.expression_type):
                return None
            if not header.subscription:
                remark = "parse the consumer's subscription failed"
                return self._refuse(header, ResponseCode.SUBSCRIPTION_PARSE_FAILED, remark)
            return self._no_filter(header)
        return self._check_membership(header, group)

    def _check_membership(self, header: PullHeader, config: Any) -> bytes | None:
        """The group must be connected and subscribe to the topic; its newest heartbeat brings the filter."""
        group = self._broker.clients.consumer_group(header.consumer_group)
        if group is None:
            return self._refuse(header, ResponseCode.SUBSCRIPTION_NOT_EXIST, "the consumer's group info not exist")
        if not config.consume_broadcast_enable and group.message_model == "BROADCASTING":
            remark = f"the consumer group[{header.consumer_group}] can not consume by broadcast way"
            return self._forbid(header, 4, remark)
        subscription = group.subscriptions.get(header.topic)
        if subscription is None:
            return self._refuse(header, ResponseCode.SUBSCRIPTION_NOT_EXIST, "the consumer's subscription not exist")
        if subscription.version < header.sub_version:
            remark = "the consumer's subscription not latest"
            return self._refuse(header, ResponseCode.SUBSCRIPTION_NOT_LATEST, remark)
        if not is_tag_type(subscription.expression_type):
            return self._no_filter(header)
        header.subscription = subscription.expression
        return None

    def _no_filter(self, header: PullHeader) -> bytes:
        remark = "The broker does not support consumer to filter message by " + (header.expression_type or "SQL92")
        return self._refuse(header, ResponseCode.SYSTEM_ERROR, remark)

    @staticmethod
    def _refuse(header: PullHeader, code: int, remark: str) -> bytes:
        return encode_response(header.opaque, code, {}, remark=remark)

    @staticmethod
    def _forbid(header: PullHeader, forbidden_type: int, remark: str) -> bytes:
        ext = {"forbiddenType": forbidden_type}
        return encode_response(header.opaque, ResponseCode.NO_PERMISSION, ext, remark=remark)

    # -------------------------------------------------------------------------------------------------- the reading

    def _answer(self, header: PullHeader, conn: Any, *, can_park: bool) -> None:
        """Semantics.md 4.2, from the queue's bounds to the answer."""
        broker = self._broker
        queues = self._queues
        topic, queue_id, offset = header.topic, header.queue_id, header.queue_offset
        low = queues.min_offset(topic, queue_id)
        high = queues.max_offset(topic, queue_id)
        if broker.resets and self._group.is_ready_leader:
            reset = broker.resets.take(header.consumer_group, topic, queue_id)
            if reset is not None:
                self._write_empty(header, conn, _MOVED, "OFFSET_RESET", reset, low, high)
                return
        if low <= offset < high:
            self._read(header, conn, low, high)
            return
        if offset > high and not self._group.is_ready_leader:
            # What lies above may be committed without this node knowing: never a reason to move a consumer back.
            remark = "OFFSET_OVERFLOW_ONE" if high else "NO_MESSAGE_IN_QUEUE"
            if not (can_park and self._park(header, conn, keep_offset=True)):
                self._write_empty(header, conn, _NOT_FOUND, remark, offset, low, high)
            return
        if high == 0:
            code = _NOT_FOUND if offset == 0 else _MOVED
            remark, next_begin = "NO_MESSAGE_IN_QUEUE", 0
        elif offset < low:
            code, remark, next_begin = _MOVED, "OFFSET_TOO_SMALL", low
        elif offset == high:
            code, remark, next_begin = _NOT_FOUND, "OFFSET_OVERFLOW_ONE", offset
        else:
            code, remark, next_begin = _MOVED, "OFFSET_OVERFLOW_BADLY", high
        if code == _NOT_FOUND and can_park and self._park(header, conn, keep_offset=False):
            return
        self._write_empty(header, conn, code, remark, next_begin, low, high)

    def _park(self, header: PullHeader, conn: Any, *, keep_offset: bool) -> bool:
        if not header.sys_flag & PULL_SUSPEND:
            return False
        suspend_ms = header.suspend_timeout_ms
        if not self._broker.settings.long_polling_enable:
            suspend_ms = SHORT_POLLING_MS
        elif suspend_ms >= NANOSECONDS_FROM:
            suspend_ms //= 1_000_000
        suspend_ms = min(suspend_ms, SUSPEND_MAX_MS)
        if suspend_ms <= 0:
            return False
        deadline = self._monotonic() + suspend_ms / 1000
        parked = Parked(conn, header, deadline, header.queue_offset, tag_hashes(header.subscription), keep_offset)
        return self._broker.long_poll.park(header.topic, header.queue_id, parked)

    def _read(self, header: PullHeader, conn: Any, low: int, high: int) -> None:
        topic, queue_id, offset = header.topic, header.queue_id, header.queue_offset
        wanted = max(1, header.max_msg_nums)
        codes = tag_hashes(header.subscription)
        config = self._broker.config
        messages_max = min(wanted, config.pull_max_messages)
        scan_end = offset + (messages_max if codes is None else max(UNITS_SCANNED_MAX, messages_max))
        # Few units are needed where most of them match, so a filter's scan goes in growing steps.
        step = min(scan_end - offset, 2 * messages_max)
        units = self._queues.units(topic, queue_id, offset, step)
        bytes_max = config.pull_max_bytes
        position = UNIT.unpack_from(units)[0]
        if self._broker.is_far_behind(position):
            messages_max, bytes_max = min(wanted, COLD_MESSAGES_MAX), COLD_BYTES_MAX
        ranges: Ranges = []
        count = total = 0
        next_begin = offset
        start = end = -1
        full = False
        while True:
            for physical_offset, size, tags_code in UNIT.iter_unpack(units):
                if codes is not None and (tags_code & 0xFFFFFFFF) not in codes:
                    next_begin += 1
                    continue
                if count and (count == messages_max or total + size > bytes_max):
                    full = True
                    break
                if physical_offset == end:
                    end += size
                else:
                    if end > 0:
                        ranges.append((start, end))
                    start = physical_offset
                    end = physical_offset + size
                count += 1
                total += size
                next_begin += 1
            if full or count == messages_max or next_begin >= scan_end or next_begin >= high:
                break
            step *= 4
            units = self._queues.units(topic, queue_id, next_begin, min(step, scan_end - next_begin))
        if not count:
            self._write_empty(header, conn, _RETRY, "NO_MATCHED_MESSAGE", next_begin, low, high)
            return
        ranges.append((start, end))
        # The end of the log is mapped and in memory; what lies before it may not be, and a page fault stops the loop.
        if self._group.is_hot(position):
            parts = _gather(self._group.read, ranges, total, ranges[-1][1] - ranges[0][0])
        else:
            parts = _gather(self._group.read_cached, ranges, total, 4 * total + RANGE_WORTH_ITS_OWN_WRITE)
        if parts is not None:
            self._write_found(header, conn, parts, count, total, next_begin, low, high)
            return
        try:
            self._cold_send.send_nowait(_ColdJob(header, conn, ranges, count, total, next_begin, low, high))
        except trio.WouldBlock:
            remark = "[OVERLOAD]too many pulls wait for the disk"
            conn.write(encode_response(header.opaque, ResponseCode.SYSTEM_BUSY, {}, remark=remark))

    def _write_found(
        self,
        header: PullHeader,
        conn: Any,
        parts: Sequence[Buffer],
        count: int,
        total: int,
        next_begin: int,
        low: int,
        high: int,
    ) -> None:
        suggested = self._broker.suggested_broker_id(next_begin, high, header)
        conn.write(format_pull_response_head(header.opaque, _FOUND, "FOUND", next_begin, low, high, total, suggested))
        for part in parts:
            conn.write(part)
        self._broker.stats.count_get(header.topic, header.consumer_group, count, total)

    def _write_empty(
        self, header: PullHeader, conn: Any, code: int, remark: str, next_begin: int, low: int, high: int
    ) -> None:
        conn.write(format_pull_response_head(header.opaque, code, remark, next_begin, low, high, 0))
        self._broker.stats.count_miss()

    def _write_unreadable(self, header: PullHeader, conn: Any, high: int) -> None:
        """The log did not have the bytes. Only what was trimmed meanwhile is passed over."""
        low = self._queues.min_offset(header.topic, header.queue_id) if self._group.is_serving else 0
        if low > header.queue_offset:
            self._write_empty(header, conn, _RETRY, "MESSAGE_WAS_REMOVING", low, low, max(low, high))
        else:
            conn.write(self._refuse(header, ResponseCode.SERVICE_NOT_AVAILABLE, LOG_NOT_SERVED))

    # --------------------------------------------------------------------------------------------------- cold data

    async def read_cold_forever(self) -> None:
        """One cold reader: pulls whose data is not in memory wait here for the disk, and nobody else. Cancel-safe."""
        read_cold = self._group.read_cold
        async for job in self._cold_receive:
            header, conn = job.header, job.conn
            parts: list[bytes] = []
            try:
                for start, end in job.ranges:
                    data = await read_cold(start, end - start)
                    if data is None:
                        break
                    parts.append(data)
            except UNEXPECTED as error:
                self._failed(header, conn, error)
                conn.flush()
                continue
            if conn.closed_reason is not None:
                continue
            if len(parts) < len(job.ranges):
                self._write_unreadable(header, conn, job.high)
            else:
                self._write_found(header, conn, parts, job.count, job.total, job.next_begin, job.low, job.high)
            conn.flush()


def _gather(
    read: Callable[[int, int], Buffer | None], ranges: Ranges, total: int, span_max: int
) -> Sequence[Buffer] | None:
    """The bytes of the ranges; None where `read` does not have them all.

    Up to `span_max` bytes are looked at in one go, with the messages of other queues in between: a view costs nothing,
    a copy costs by its length.
    """
    if len(ranges) == 1:
        start, end = ranges[0]
        only = read(start, end - start)
        return None if only is None else [only]
    parts: list[Buffer] = []
    first, last = ranges[0][0], ranges[-1][1]
    if first < last and last - first <= span_max:
        # Fails only where a segment ends in between.
        span = read(first, last - first)
        if span is not None:
            view = memoryview(span)
            parts += [view[start - first : end - first] for start, end in ranges]
    if not parts:
        for start, end in ranges:
            part = read(start, end - start)
            if part is None:
                return None
            parts.append(part)
    return parts if total >= RANGE_WORTH_ITS_OWN_WRITE * len(parts) else [b"".join(parts)]


class _ColdJob:
    """A pull whose bytes must come from the disk."""

    __slots__ = ("conn", "count", "header", "high", "low", "next_begin", "ranges", "total")

    def __init__(
        self,
        header: PullHeader,
        conn: Any,
        ranges: Ranges,
        count: int,
        total: int,
        next_begin: int,
        low: int,
        high: int,
    ) -> None:
        self.header = header
        self.conn = conn
        self.ranges = ranges
        self.count = count
        self.total = total
        self.next_begin = next_begin
        self.low = low
        self.high = high
