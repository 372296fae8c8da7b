"""Answering what waits for an entry: tuples on the send path, callbacks elsewhere.

A waiter of a single send is (connection, opaque, physical offset, queue id, queue offset, unique key). It is answered
with preformatted bytes, and every connection is flushed once, at the end of the driver's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from dledger.errors import DiskFull, LedgerError, Overloaded, TooLarge
from remoting.codes import DEFAULT_REGION, FLAG_ONEWAY, ResponseCode
from remoting.command import encode_response
from remoting.frames import SendHeader, format_send_response

SendWaiter = tuple[Any, int, int, int, int, str]
Done = Callable[[bool, str | None], None]
"""done(True, None) after commit and apply; done(False, reason) with one of the reasons below."""

NOT_LEADER: Final = "not leader"
BUSY: Final = "busy"
CUT: Final = "cut"
UNKNOWN: Final = "unknown"
TOO_LARGE: Final = "too large"
NO_ROOM: Final = "no room"

NO_ROOM_REMARK: Final = "service not available now: the disk of the broker is full or nearly so, nothing was stored"

REFUSALS: Final[dict[str, tuple[ResponseCode, str]]] = {
    NOT_LEADER: (ResponseCode.SERVICE_NOT_AVAILABLE, "this node is not the leader of its group, nothing was stored"),
    CUT: (ResponseCode.SERVICE_NOT_AVAILABLE, "the leader changed before the request was stored, nothing was stored"),
    BUSY: (
        ResponseCode.SYSTEM_BUSY,
        "[PC_SYNCHRONIZED]broker busy, start flow control for a while: too much waits for the quorum",
    ),
    UNKNOWN: (
        ResponseCode.SYSTEM_ERROR,
        "in-sync replicas not enough: outcome unknown, the request may still be committed",
    ),
    NO_ROOM: (ResponseCode.SERVICE_NOT_AVAILABLE, NO_ROOM_REMARK),
    TOO_LARGE: (ResponseCode.MESSAGE_ILLEGAL, "the stored form is larger than an entry of the log may be"),
}
"""Response code and remark per reason of `Done`."""


def reason_of(error: LedgerError) -> str:
    """The reason for a proposal that was refused at once."""
    if isinstance(error, DiskFull):
        return NO_ROOM
    if isinstance(error, Overloaded):
        return BUSY
    return TOO_LARGE if isinstance(error, TooLarge) else NOT_LEADER


def reason_before_logging(reason: str | None) -> str:
    """The reason for what was never logged, as something it needs first, its topic, failed for `reason`."""
    return reason if reason in (BUSY, NO_ROOM) else NOT_LEADER


class Answerable(Protocol):
    """What a waiter needs of a connection, real or forwarded."""

    def write(self, data: bytes) -> None: ...

    def flush(self) -> None: ...


class SendAnswers:
    """Formats the answers to sends: message ids under this node's store host, region and trace fields."""

    __slots__ = ("_default_fields", "_fields", "_store_host", "id_prefix")

    def __init__(self, store_host: bytes, region_id: str, trace_on: bool) -> None:
        self._store_host = store_host
        self.id_prefix = store_host.hex().upper()
        self._fields = {"MSG_REGION": region_id, "TRACE_ON": "true" if trace_on else "false"}
        self._default_fields = region_id == DEFAULT_REGION and trace_on

    def message_ids(self, physical_offsets: Iterable[int]) -> str:
        """Of several messages, with commas between them."""
        host = self._store_host
        positions = [offset.to_bytes(8) for offset in physical_offsets]
        return (host + host.join(positions)).hex(",", len(host) + 8).upper()

    def stored(self, opaque: int, message_id: str, queue_id: int, queue_offset: int, unique_key: str) -> bytes:
        """The answer to a stored send. `unique_key` is "" for a batch."""
        if self._default_fields:
            return format_send_response(opaque, message_id, queue_id, queue_offset, unique_key)
        fields: dict[str, object] = {"msgId": message_id, "queueId": queue_id, "queueOffset": queue_offset}
        if unique_key:
            fields["transactionId"] = unique_key
        return encode_response(opaque, ResponseCode.SUCCESS, {**fields, **self._fields})

    def refused(self, opaque: int, code: int, remark: str) -> bytes:
        """A refusal; Java needs extFields even here."""
        return encode_response(opaque, code, self._fields, remark=remark)

    def failed(self, opaque: int, reason: str | None) -> bytes:
        """The answer for a reason of `Done`."""
        code, remark = REFUSALS[reason or CUT]
        return self.refused(opaque, code, remark)

    def refuse_send(self, header: SendHeader, conn: Answerable, code: int, remark: str) -> None:
        """Tell a send that it is not stored, if it wants to know."""
        if not header.flag & FLAG_ONEWAY:
            conn.write(self.refused(header.opaque, code, remark))

    def fail_send(self, header: SendHeader, conn: Answerable, reason: str | None) -> None:
        """As `refuse_send`, for a reason of `Done`."""
        if not header.flag & FLAG_ONEWAY:
            conn.write(self.failed(header.opaque, reason))

    @staticmethod
    def reason(reason: str) -> tuple[ResponseCode, str]:
        """Response code and remark for a reason of `Done`."""
        return REFUSALS[reason]

    def answer_all(self, waiters: list[SendWaiter], touched: dict[Any, None]) -> None:
        """Answer waiters of one committed entry; one write per run of a connection."""
        prefix = self.id_prefix
        stored = format_send_response if self._default_fields else self.stored
        connection: Any = None
        parts: list[bytes] = []
        append = parts.append
        for conn, opaque, physical_offset, queue_id, queue_offset, unique_key in waiters:
            if conn is not connection:
                if parts:
                    connection.write(parts[0] if len(parts) == 1 else b"".join(parts))
                    parts.clear()
                connection = conn
                touched[conn] = None
            append(stored(opaque, f"{prefix}{physical_offset:016X}", queue_id, queue_offset, unique_key))
        if parts:
            connection.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def fail_all(self, waiters: list[SendWaiter], reason: str, touched: dict[Any, None]) -> None:
        for conn, opaque, *_rest in waiters:
            conn.write(self.failed(opaque, reason))
            touched[conn] = None
