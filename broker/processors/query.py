"""Looking things up: messages by offset id and by key, offsets by queue and time, raw ConsumeQueue units.

Semantics.md 4.6 and 7. Maximum, search by time and consumer offsets are the leader's to answer (the router sends them
there); minimum, store times and messages any node reads from what it has committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from broker.consume_queue import LOWER, NotAtHand
from broker.processors.pull import LOG_NOT_SERVED
from broker.records import UNIT, store_timestamp_of
from broker.refusals import refusal_answer
from remoting.bodies import ConsumeQueueData, QueryConsumeQueueResponseBody, SubscriptionData, encode_body
from remoting.codes import ResponseCode
from remoting.command import Command, encode_response
from remoting.headers import optional, require

if TYPE_CHECKING:
    from broker.context import BrokerContext
    from dledger.group import RaftGroup

KEYS_PER_QUERY_MAX: Final = 64
UNIQUE_KEYS_PER_QUERY: Final = 32
QUERY_BODY_BYTES_MAX: Final = 12 * 1024 * 1024
"""An answer must fit a frame of 16 MiB; what does not fit is left out, newest first."""
UNITS_PER_QUERY_MAX: Final = 1_024


def _as_many_as_fit(newest_first: Iterable[bytes | memoryview | None]) -> list[bytes]:
    """The newest messages that fit one answer, oldest first."""
    found: list[bytes] = []
    total = 0
    for record in newest_first:
        if record is None:
            continue
        if total + len(record) > QUERY_BODY_BYTES_MAX:
            break
        found.append(bytes(record))
        total += len(record)
    found.reverse()
    return found


async def search_with_disk(
    group: RaftGroup, request: Command, missing: NotAtHand, attempt: Callable[[dict[int, int]], bytes | None]
) -> bytes | None:
    """`attempt(known)` again and again, each time with one more message's store time, read from the disk.

    What it returns in the end; 14 where the log cannot be read. Checkpoint.
    """
    known: dict[int, int] = {}
    while True:
        head = await group.read_cold(missing.physical_offset, missing.nbytes)
        if head is None and (not group.is_serving or missing.physical_offset >= group.first_position):
            return encode_response(request, ResponseCode.SERVICE_NOT_AVAILABLE, remark=LOG_NOT_SERVED)
        # What was trimmed meanwhile is older than whatever is looked for.
        known[missing.physical_offset] = -1 if head is None else store_timestamp_of(head)
        try:
            return attempt(known)
        except NotAtHand as another:
            missing = another


class QueryProcessor:
    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker
        self._state = broker.state
        self._queues = broker.state.queues
        self._group = broker.group

    # ----------------------------------------------------------------------------------------------------- messages

    def view_message(self, request: Command, conn: Any) -> bytes | None:
        """VIEW_MESSAGE_BY_ID: the message at a physical offset."""
        offset = require(request.ext, "offset", int)
        if self._state.is_cold(offset):
            return self._in_job(self._view_cold, request, conn, offset)
        record = self._state.read_message(offset)
        return self._view_answer(request, offset, None if record is None else bytes(record))

    async def _view_cold(self, request: Command, conn: Any, offset: int) -> None:
        conn.write(self._view_answer(request, offset, await self._state.read_message_cold(offset)))
        conn.flush()

    @staticmethod
    def _view_answer(request: Command, offset: int, record: bytes | None) -> bytes:
        if record is None:
            remark = f"can not find message by the offset, {offset}"
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        return encode_response(request, ResponseCode.SUCCESS, body=record)

    def query_message(self, request: Command, conn: Any) -> bytes | None:
        """QUERY_MESSAGE: messages of a topic by key, sorted by offset."""
        ext = request.ext
        topic = require(ext, "topic", str)
        key = require(ext, "key", str)
        wanted = require(ext, "maxNum", int)
        begin_ms = require(ext, "beginTimestamp", int)
        end_ms = require(ext, "endTimestamp", int)
        if ext.get("_UNIQUE_KEY_QUERY", "").lower() == "true":
            wanted = UNIQUE_KEYS_PER_QUERY
        wanted = max(1, min(wanted, KEYS_PER_QUERY_MAX))
        if self._state.index.is_long:
            return self._in_job(self._query_long, request, conn, (topic, key, wanted, begin_ms, end_ms))
        positions = sorted(self._state.index.lookup(topic, key, wanted, begin_ms, end_ms), reverse=True)
        if any(self._state.is_cold(position) for position in positions):
            return self._in_job(self._query_cold, request, conn, positions)
        records = (self._state.read_message(position) for position in positions)
        return self._query_answer(request, _as_many_as_fit(records))

    async def _query_long(self, request: Command, conn: Any, what: tuple[str, str, int, int, int]) -> None:
        positions = await self._state.index.lookup_in_steps(*what)
        await self._query_cold(request, conn, sorted(positions, reverse=True))

    async def _query_cold(self, request: Command, conn: Any, positions: list[int]) -> None:
        records = [await self._state.read_message_cold(position) for position in positions]
        conn.write(self._query_answer(request, _as_many_as_fit(records)))
        conn.flush()

    def _query_answer(self, request: Command, found: list[bytes]) -> bytes:
        index = self._state.index
        ext = {
            "indexLastUpdateTimestamp": index.last_store_timestamp if found else 0,
            "indexLastUpdatePhyoffset": index.last_physical_offset if found else 0,
        }
        if not found:
            remark = "can not find message, maybe time range not correct"
            return encode_response(request, ResponseCode.QUERY_NOT_FOUND, ext, remark=remark)
        return encode_response(request, ResponseCode.SUCCESS, ext, body=b"".join(found))

    def _in_job(self, job: Any, request: Command, conn: Any, what: Any) -> bytes | None:
        if self._broker.jobs.start(job, request, conn, what):
            return None
        remark = "[OVERLOAD]too many queries wait for the disk"
        return encode_response(request, ResponseCode.SYSTEM_BUSY, remark=remark)

    # ------------------------------------------------------------------------------------------------------ offsets

    def max_offset(self, request: Command, conn: Any) -> bytes:
        topic, queue_id = self._queue_of(request)
        return encode_response(request, ResponseCode.SUCCESS, {"offset": self._queues.max_offset(topic, queue_id)})

    def min_offset(self, request: Command, conn: Any) -> bytes:
        topic, queue_id = self._queue_of(request)
        return encode_response(request, ResponseCode.SUCCESS, {"offset": self._queues.min_offset(topic, queue_id)})

    def earliest_store_time(self, request: Command, conn: Any) -> bytes:
        topic, queue_id = self._queue_of(request)
        timestamp = self._queues.earliest_store_time(topic, queue_id)
        return encode_response(request, ResponseCode.SUCCESS, {"timestamp": timestamp})

    def search_offset(self, request: Command, conn: Any) -> bytes | None:
        """SEARCH_OFFSET_BY_TIMESTAMP."""
        try:
            return self._search(request, {})
        except NotAtHand as missing:
            return self._in_job(self._search_cold, request, conn, missing)

    def _search(self, request: Command, known: dict[int, int]) -> bytes:
        topic, queue_id = self._queue_of(request)
        timestamp = require(request.ext, "timestamp", int)
        boundary = request.ext.get("boundaryType") or LOWER
        offset = self._queues.search_by_time(topic, queue_id, timestamp, boundary, known)
        return encode_response(request, ResponseCode.SUCCESS, {"offset": offset})

    async def _search_cold(self, request: Command, conn: Any, missing: NotAtHand) -> None:
        answer = await search_with_disk(self._group, request, missing, lambda known: self._search(request, known))
        if answer is not None:
            conn.write(answer)
            conn.flush()

    def query_consumer_offset(self, request: Command, conn: Any) -> bytes | None:
        """QUERY_CONSUMER_OFFSET: only what is committed is answered; an update not logged yet is logged first."""
        ext = request.ext
        group = require(ext, "consumerGroup", str)
        topic, queue_id = self._queue_of(request)
        offsets = self._state.offsets
        if offsets.has_unlogged(group, topic, queue_id):
            self._state.log_offsets(lambda ok, reason: self._answer_offset(request, conn, ok, reason))
            return None
        return self._offset_answer(request, group, topic, queue_id)

    def _answer_offset(self, request: Command, conn: Any, ok: bool, reason: str | None) -> None:
        if ok:
            answer = self._offset_answer(request, request.ext["consumerGroup"], *self._queue_of(request))
        else:
            answer = refusal_answer(request, reason)
        conn.write(answer)
        self._broker.changed(conn)

    def _offset_answer(self, request: Command, group: str, topic: str, queue_id: int) -> bytes:
        offset = self._state.offsets.query(group, topic, queue_id)
        if offset is not None and offset >= 0:
            return encode_response(request, ResponseCode.SUCCESS, {"offset": offset})
        if not optional(request.ext, "setZeroIfNotFound", bool, True):
            remark = "Not found, do not set to zero, maybe this group boot first"
        elif self._is_young(topic, queue_id):
            # Why a young topic is consumed from its start, whatever ConsumeFromWhere says.
            return encode_response(request, ResponseCode.SUCCESS, {"offset": 0})
        else:
            remark = "Not found, V3_0_6_SNAPSHOT maybe this group consumer boot first"
        return encode_response(request, ResponseCode.QUERY_NOT_FOUND, {}, remark=remark)

    def _is_young(self, topic: str, queue_id: int) -> bool:
        """The queue still starts at 0, and its first message is in memory."""
        if self._queues.min_offset(topic, queue_id) > 0:
            return False
        units = self._queues.units(topic, queue_id, 0, 1)
        return bool(units) and self._group.is_hot(UNIT.unpack_from(units)[0])

    def query_consume_queue(self, request: Command, conn: Any) -> bytes:
        """QUERY_CONSUME_QUEUE: raw units, for people."""
        ext = request.ext
        topic, queue_id = self._queue_of(request)
        index = optional(ext, "index", int, 0)
        count = min(max(0, optional(ext, "count", int, 10)), UNITS_PER_QUERY_MAX)
        if not self._queues.exists(topic, queue_id):
            remark = f"{queue_id}@{topic} is not exist!"
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        body = QueryConsumeQueueResponseBody(
            min_queue_index=self._queues.min_offset(topic, queue_id),
            max_queue_index=self._queues.max_offset(topic, queue_id),
        )
        group_name = ext.get("consumerGroup")
        group = self._broker.clients.consumer_group(group_name) if group_name else None
        subscription = group.subscriptions.get(topic) if group is not None else None
        if subscription is not None:
            body.subscription_data = SubscriptionData(
                topic=topic, sub_string=subscription.expression, sub_version=subscription.version
            )
        if index < body.min_queue_index or index > body.max_queue_index:
            body.queue_data = []
        else:
            units = self._queues.units(topic, queue_id, index, count)
            hashes = subscription.hashes if subscription is not None else None
            body.queue_data = [
                ConsumeQueueData(
                    physic_offset=physical_offset,
                    physic_size=size,
                    tags_code=tags_code,
                    eval=subscription is not None and (hashes is None or (tags_code & 0xFFFFFFFF) in hashes),
                )
                for physical_offset, size, tags_code in UNIT.iter_unpack(units)
            ]
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(body))

    @staticmethod
    def _queue_of(request: Command) -> tuple[str, int]:
        return require(request.ext, "topic", str), require(request.ext, "queueId", int, bits=32)
