"""Any node takes any request (design 4): what only the leader can do is handed to it over the peer connection.

A request that reaches a follower, a former leader or a leader whose no-op is not applied yet is forwarded with its
client's address, one hop, and its answer is passed back. While no leader is known it is held, first in first out. A
request has 2.5 s from its arrival. Only sends that the leader's dedup window covers are ever forwarded twice; for
everything else a lost answer is answered with 1, "outcome unknown".
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from broker.answers import NO_ROOM_REMARK
from remoting.codes import FLAG_ONEWAY, RequestCode, ResponseCode
from remoting.command import Command, encode_response
from remoting.errors import RemoteProtocolError
from remoting.frames import Frame

if TYPE_CHECKING:
    from runtime.model import Clock

HELD_REQUESTS_MAX: Final = 1_000
HELD_BYTES_MAX: Final = 64 * 1024 * 1024
HOLD_S: Final = 2.0
BUDGET_S: Final = 2.5
PENDING_MAX: Final = 10_000
"""Forwarded requests awaiting their answer; one more is answered SYSTEM_BUSY."""
PENDING_BYTES_MAX: Final = 64 * 1024 * 1024
"""Their bytes together, which are kept: a send may have to go out once more."""
RETRY_INTERVAL_S: Final = 0.02

_WIRE_VERSION: Final = 1
_REQUEST: Final = 1
_ANSWER: Final = 2
_REFUSED: Final = 3
_HEAD = struct.Struct("<BBQ")
"""kind, version, id"""
_REQUEST_REST = struct.Struct("<BBHHII")
"""serialize type, host length, port, principal length, header length, body length"""

_SENDS: Final = frozenset(
    {
        RequestCode.SEND_MESSAGE,
        RequestCode.SEND_MESSAGE_V2,
        RequestCode.SEND_BATCH_MESSAGE,
        RequestCode.SEND_REPLY_MESSAGE,
        RequestCode.SEND_REPLY_MESSAGE_V2,
    }
)
_NEVER_LOGGED: Final = b'{"code":14,'
"""How an answer starts that says: this was not stored, and never will be."""
_NO_ROOM: Final = NO_ROOM_REMARK.encode()
"""In such an answer: no use in asking again soon."""
_HEADER_LOOK: Final = 1_024


class _Request:
    """One request of a client that this node cannot serve itself."""

    __slots__ = (
        "arrived",
        "code",
        "conn",
        "frame",
        "maybe_done",
        "nbytes",
        "oneway",
        "opaque",
        "order",
        "refusal",
        "sent_term",
        "sent_to",
    )

    def __init__(
        self, conn: Any, frame: Frame, code: int, opaque: int, oneway: bool, arrived: float, order: int
    ) -> None:
        self.conn = conn
        self.frame = frame
        self.code = code
        self.opaque = opaque
        self.oneway = oneway
        self.arrived = arrived
        self.nbytes = len(frame[1]) + len(frame[2])
        self.sent_to: str | None = None
        self.sent_term = 0
        self.order = order
        """Place in the order of arrival: what comes back from a leader goes in line where it was."""
        self.maybe_done = False
        """A former leader may have executed it: never to be answered with "not stored"."""
        self.refusal: bytes | None = None


class ForwardedConnection:
    """On the leader, the far client of one forwarded request: what is written goes back through the follower."""

    __slots__ = ("_forwarder", "_id", "_peer_id", "attributes", "closed_reason", "peer")

    is_forwarded = True

    def __init__(self, forwarder: Forwarder, peer_id: str, request_id: int, peer: tuple[str, int]) -> None:
        self._forwarder = forwarder
        self._peer_id = peer_id
        self._id = request_id
        self.peer = peer
        self.attributes: dict[str, Any] = {}
        self.closed_reason: str | None = None

    @property
    def peer_text(self) -> str:
        host, port = self.peer
        return f"{host}:{port}"

    def write(self, data: bytes | memoryview) -> None:
        """One whole answer."""
        self._forwarder.send_answer(self._peer_id, self._id, data)

    def refuse(self) -> None:
        """Not executed here; the node that was asked may try another leader."""
        self._forwarder.send_refusal(self._peer_id, self._id)

    def flush(self) -> None:
        """Answers leave with the peer stream; nothing to do."""

    def close(self, reason: str = "") -> None:
        self.closed_reason = reason


class Forwarder:
    """The part of a node that hands requests to the leader and takes those of other nodes.

    `group` is the RaftGroup: its leader, its readiness, its `send_app`. `execute(conn, frame)` serves a request here;
    `changed(conn)` notes a connection that has something to flush. `leader_address` is for remarks.
    """

    def __init__(
        self,
        clock: Clock,
        group: Any,
        *,
        execute: Callable[[Any, Frame], None],
        changed: Callable[[Any], None],
        leader_address: Callable[[], str],
        log: Any,
    ) -> None:
        self._clock = clock
        self._group = group
        self._execute = execute
        self._changed = changed
        self._leader_address = leader_address
        self._log = log
        self._held: deque[_Request] = deque()
        self._held_bytes = 0
        self._pending: dict[int, _Request] = {}
        self._pending_bytes = 0
        self._next_id = 1
        self._arrivals = 0
        self._work = trio.Event()
        self.forwarded_total = 0
        self.served_total = 0

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def pending(self) -> int:
        return len(self._pending)

    # ------------------------------------------------------------------------------------- on the node asked

    def submit(self, conn: Any, frame: Frame, code: int, opaque: int, flag: int, arrived: float | None = None) -> None:
        """Take over a request that only a ready leader can serve. `arrived` (monotonic seconds): now when None."""
        request = self._request(conn, frame, code, opaque, flag & FLAG_ONEWAY != 0)
        if arrived is not None:
            request.arrived = arrived
        if self._held or not self._send(request):
            self._hold(request)

    def _request(self, conn: Any, frame: Frame, code: int, opaque: int, oneway: bool) -> _Request:
        self._arrivals += 1
        return _Request(conn, frame, code, opaque, oneway, self._clock.monotonic(), self._arrivals)

    def _send(self, request: _Request) -> bool:
        """To the leader, if there is one and it can be reached now."""
        group = self._group
        leader = group.leader_id
        if leader is None or leader == group.node_id:
            return False
        if not request.oneway and (
            len(self._pending) >= PENDING_MAX or self._pending_bytes + request.nbytes > PENDING_BYTES_MAX
        ):
            self._answer(request, ResponseCode.SYSTEM_BUSY, "[OVERLOAD]too many requests are being forwarded")
            return True
        request_id = self._next_id
        serialize, header, body = request.frame
        host, port = request.conn.peer[0].encode(), request.conn.peer[1]
        payload = b"".join(
            (
                _HEAD.pack(_REQUEST, _WIRE_VERSION, request_id),
                _REQUEST_REST.pack(serialize, len(host), port, 0, len(header), len(body)),
                host,
                header,
                body,
            )
        )
        if not group.send_app(leader, payload):
            return False
        self._next_id += 1
        self.forwarded_total += 1
        if not request.oneway:
            request.sent_to = leader
            request.sent_term = group.term
            self._pending[request_id] = request
            self._pending_bytes += request.nbytes
            self._work.set()
        return True

    def _take_pending(self, request_id: int) -> _Request | None:
        request = self._pending.pop(request_id, None)
        if request is not None:
            self._pending_bytes -= request.nbytes
        return request

    def _hold(self, request: _Request) -> None:
        if len(self._held) >= HELD_REQUESTS_MAX or self._held_bytes + request.nbytes > HELD_BYTES_MAX:
            self._refuse(request)
            return
        self._held.append(request)
        self._held_bytes += request.nbytes
        self._work.set()

    def leadership_changed(self) -> None:
        """Role, term, leader or readiness have changed: move what can move now."""
        group = self._group
        here = group.is_ready_leader
        target = group.node_id if here else group.leader_id
        if target is not None and (here or target != group.node_id):
            for request_id in [
                request_id
                for request_id, request in self._pending.items()
                if request.sent_to != target or request.sent_term != group.term
            ]:
                # The one it was sent to leads no more: its answer, if there ever is one, may be lost.
                request = self._take_pending(request_id)
                assert request is not None
                if self._is_covered_by_dedup(request):
                    request.maybe_done = True
                    self._hold_again(request)
                else:
                    self._answer(request, ResponseCode.SYSTEM_ERROR, "outcome unknown: the leader changed meanwhile")
        self.pump()

    @staticmethod
    def _is_covered_by_dedup(request: _Request) -> bool:
        if request.code not in _SENDS:
            return False
        where = request.frame[2] if request.code == RequestCode.SEND_BATCH_MESSAGE else request.frame[1]
        return b"UNIQ_KEY" in where

    def pump(self) -> None:
        """Move held requests as far as possible and end those whose time is up."""
        now = self._clock.monotonic()
        held = self._held
        group = self._group
        while held:
            request = held[0]
            if request.arrived + HOLD_S <= now:
                self._take_first()
                self._refuse(request)
            elif group.is_ready_leader:
                self._take_first()
                self._execute(request.conn, request.frame)
                self._changed(request.conn)
            elif isinstance(request.conn, ForwardedConnection):
                if group.leader_id == group.node_id:
                    break
                # One hop: the node that was asked looks for the next leader itself.
                self._take_first()
                request.conn.refuse()
            elif self._send(request):
                self._take_first()
            else:
                break
        for request_id in [i for i, request in self._pending.items() if request.arrived + BUDGET_S <= now]:
            late = self._take_pending(request_id)
            assert late is not None
            self._answer(
                late, ResponseCode.SYSTEM_ERROR, f"outcome unknown: the leader did not answer within {BUDGET_S} s"
            )

    def _take_first(self) -> None:
        self._held_bytes -= self._held.popleft().nbytes

    def _refuse(self, request: _Request) -> None:
        """It was certainly not executed, by the leader it was offered to last at least."""
        if isinstance(request.conn, ForwardedConnection):
            request.conn.refuse()
            return
        if request.oneway or request.conn.closed_reason is not None:
            return
        if request.maybe_done:
            self._answer(request, ResponseCode.SYSTEM_ERROR, "outcome unknown: the leader changed meanwhile")
            return
        if request.refusal is not None:
            request.conn.write(request.refusal)
            self._changed(request.conn)
            return
        leader = self._leader_address() or self._group.leader_id or "none"
        remark = f"not leader; leader={leader} term={self._group.term}"
        self._answer(request, ResponseCode.SERVICE_NOT_AVAILABLE, remark)

    def _answer(self, request: _Request, code: int, remark: str) -> None:
        if request.oneway or request.conn.closed_reason is not None:
            return
        # Java clients need extFields on the answer of a send (remoting.md 1.1).
        ext = {"MSG_REGION": "DefaultRegion", "TRACE_ON": "true"} if request.code in _SENDS else None
        stub = Command(code=request.code, opaque=request.opaque, serialize=request.frame[0])
        request.conn.write(encode_response(stub, code, ext, remark=remark))
        self._changed(request.conn)

    def forget(self, conn: Any) -> None:
        """A connection ended: its held requests are not worth executing any more unless they are one-way."""
        if not self._held:
            return
        keep = [request for request in self._held if request.conn is not conn or request.oneway]
        self._held = deque(keep)
        self._held_bytes = sum(request.nbytes for request in keep)

    async def run(self) -> None:
        """Retry and expire while there is anything to wait for; idle otherwise. Runs until cancelled; cancel-safe."""
        while True:
            if not self._held and not self._pending:
                self._work = trio.Event()
                await self._work.wait()
            await self._clock.sleep(RETRY_INTERVAL_S)
            self.pump()

    # --------------------------------------------------------------------------------------- between the nodes

    def receive(self, peer_id: str, payload: bytes | memoryview) -> None:
        """A payload of another node of the group: a request for the leader, or an answer for a client of ours."""
        if len(payload) < _HEAD.size:
            self._log.warning("forwarded payload is too short", peer=peer_id, size=len(payload))
            return
        kind, version, request_id = _HEAD.unpack_from(payload)
        if version != _WIRE_VERSION:
            self._log.warning("forwarded payload has an unknown version", peer=peer_id, version=version)
        elif kind == _REQUEST:
            self._serve(peer_id, request_id, payload)
        elif kind == _ANSWER:
            self._deliver(request_id, bytes(payload[_HEAD.size :]))
        elif kind == _REFUSED:
            self._refused(request_id)
        else:
            self._log.warning("forwarded payload has an unknown kind", peer=peer_id, kind=kind)

    def _serve(self, peer_id: str, request_id: int, payload: bytes | memoryview) -> None:
        group = self._group
        if group.leader_id != group.node_id:
            # One hop: it is not forwarded on; the node that was asked looks for the leader again.
            self.send_refusal(peer_id, request_id)
            return
        position = _HEAD.size + _REQUEST_REST.size
        if len(payload) < position:
            self._log.warning("forwarded request is too short", peer=peer_id, size=len(payload))
            return
        serialize, host_length, port, principal_length, header_length, body_length = _REQUEST_REST.unpack_from(
            payload, _HEAD.size
        )
        header_at = position + host_length + principal_length
        body_at = header_at + header_length
        if len(payload) != body_at + body_length:
            self._log.warning("forwarded request has the wrong length", peer=peer_id, size=len(payload))
            return
        host = bytes(payload[position : position + host_length]).decode("ascii", "replace")
        self.served_total += 1
        conn = ForwardedConnection(self, peer_id, request_id, (host, port))
        frame = (serialize, bytes(payload[header_at:body_at]), bytes(payload[body_at:]))
        if group.is_ready_leader:
            try:
                self._execute(conn, frame)
            except RemoteProtocolError as error:
                self._log.warning("forwarded request cannot be read", peer=peer_id, reason=str(error))
        else:
            # It leads, but the no-op of its term is still on its way: a matter of one round trip.
            self._hold(self._request(conn, frame, 0, 0, False))

    def send_refusal(self, peer_id: str, request_id: int) -> None:
        """Tell the node that was asked that this one did not execute its request."""
        self._group.send_app(peer_id, _HEAD.pack(_REFUSED, _WIRE_VERSION, request_id))

    def send_answer(self, peer_id: str, request_id: int, data: bytes | memoryview) -> None:
        """Back to the node that was asked. If it is gone, so is its client."""
        self._group.send_app(peer_id, _HEAD.pack(_ANSWER, _WIRE_VERSION, request_id) + data)

    def _deliver(self, request_id: int, answer: bytes) -> None:
        request = self._take_pending(request_id)
        if request is None:
            return  # answered already: its budget was over, or it was forwarded again
        if answer[8 : 8 + len(_NEVER_LOGGED)] == _NEVER_LOGGED and _NO_ROOM not in answer[:_HEADER_LOOK]:
            request.refusal = answer
            self._hold_again(request)
        elif request.conn.closed_reason is None:
            request.conn.write(answer)
            self._changed(request.conn)

    def _refused(self, request_id: int) -> None:
        request = self._take_pending(request_id)
        if request is not None:
            self._hold_again(request)

    def _hold_again(self, request: _Request) -> None:
        """In line for the next leader, where it was: several requests of one client must not change their order."""
        held = self._held
        at = 0
        while at < len(held) and held[at].order < request.order:
            at += 1
        held.insert(at, request)
        self._held_bytes += request.nbytes
        self._work.set()
