"""Sends that the dedup window has seen before: they get the first one's result (design 4, raft.md 4.10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from broker.records import Record, find_property, int_or_zero
from remoting.codes import FLAG_ONEWAY, SCHEDULE_TOPIC
from remoting.frames import SendHeader
from remoting.message import offset_msg_id

if TYPE_CHECKING:
    from broker.state import BrokerState

_SCHEDULE: Final = SCHEDULE_TOPIC.encode()


class Duplicates:
    """Answers duplicates of sends. `send` looks at a send once more, all of it."""

    def __init__(self, state: BrokerState, send: Callable[[SendHeader, bytes, Any], None]) -> None:
        self._state = state
        self._dedup = state.dedup
        self._answers = state.answers
        self._send = send

    def is_answered(
        self,
        header: SendHeader,
        body: bytes,
        conn: Any,
        topic: bytes,
        keys: Sequence[tuple[bytes, int]],
        key: int,
        earlier: int,
    ) -> bool:
        """The window has a message under this key, at `earlier`: whether that, or one next to it, is the original."""
        if self._answer_duplicate(header, body, conn, topic, keys, earlier):
            return True
        return any(
            self._answer_duplicate(header, body, conn, topic, keys, other) for other in self._dedup.others(key, earlier)
        )

    def _answer_duplicate(
        self,
        header: SendHeader,
        body: bytes,
        conn: Any,
        topic: bytes,
        keys: Sequence[tuple[bytes, int]],
        position: int,
    ) -> bool:
        """Answer with the original's result, after its commit; False where the window's hit is no duplicate.

        `keys` are (UNIQ_KEY, body CRC) of the message, or of every message of a client's batch.
        """
        state = self._state
        if position >= state.committed_position:
            if not state.is_in_flight(position):
                # Applied in this very turn, readable at its end.
                self._send_again_at_end_of_turn(header, body, conn)
                return True
            return self._wait_for_original(header, body, conn, topic, position, len(keys))
        records = state.read_records(position, len(keys))
        if records is None or not self._is_same(records, topic, keys):
            return False
        if state.staging.next_store_ms() - records[0].store_timestamp > self._dedup.window_ms:
            return False
        first = records[0]
        if not state.queues.points_to(first.topic.decode(), first.queue_id, first.queue_offset, position):
            return False  # of a topic that was deleted and made anew since
        state.dedup_hits += 1
        if header.flag & FLAG_ONEWAY:
            return True
        queue_id = first.queue_id
        if first.topic == _SCHEDULE:
            queue_id = int_or_zero(find_property(first.properties, b"REAL_QID\x01"))
        message_id = ",".join([offset_msg_id(record.store_host, record.physical_offset) for record in records])
        unique = keys[0][0].decode() if not header.batch else ""
        conn.write(self._answers.stored(header.opaque, message_id, queue_id, first.queue_offset, unique))
        return True

    @staticmethod
    def _is_same(records: list[Record], topic: bytes, keys: Sequence[tuple[bytes, int]]) -> bool:
        first = records[0]
        return all(
            record.topic == topic
            and record.queue_id == first.queue_id
            and record.queue_offset == first.queue_offset + row
            and record.body_crc == body_crc
            and find_property(record.properties, b"UNIQ_KEY\x01") == unique
            for row, (record, (unique, body_crc)) in enumerate(zip(records, keys, strict=True))
        )

    def _wait_for_original(
        self, header: SendHeader, body: bytes, conn: Any, topic: bytes, position: int, count: int
    ) -> bool:
        """The hit is not committed yet. When it is, it can be read, and the send is looked at once more."""
        state = self._state
        found = state.find_pending(position, count)
        if found is None or found[1].topic_bytes != topic:
            return False

        def settled(ok: bool, reason: str | None) -> None:
            if ok:
                self._send_again_at_end_of_turn(header, body, conn)
            elif not header.flag & FLAG_ONEWAY:
                state.touch(conn)
                self._answers.fail_send(header, conn, reason)

        state.wait_for(found[0], settled)
        return True

    def _send_again_at_end_of_turn(self, header: SendHeader, body: bytes, conn: Any) -> None:
        def again() -> None:
            self._state.touch(conn)
            self._send(header, body, conn)

        self._state.defer(again)
