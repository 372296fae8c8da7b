"""From frames to processors: which code is whose, and what only the leader may do.

All frames of one read come in one call. Sends and pulls, the hot ones, go straight to their processors as frames; the
others are decoded and handed to a handler `f(request, conn) -> answer or None`, None meaning "answers later".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from broker.answers import REFUSALS, reason_of
from broker.failures import UNEXPECTED
from broker.forward import ForwardedConnection, Forwarder
from dledger.errors import NotLeader, Overloaded, TooLarge
from remoting.codes import RequestCode, ResponseCode
from remoting.command import Command, encode_response
from remoting.errors import BodyError, HeaderError
from remoting.frames import Frame, decode_frame, peek_code
from remoting.headers import require

if TYPE_CHECKING:
    from broker.context import BrokerContext

Handler = Callable[[Command, Any], bytes | None]
HotHandler = Callable[[Frame, Any], None]

# Plain numbers in the two hot sets: an enum member costs a call per comparison.
SENDS: Final[frozenset[int]] = frozenset(
    map(int, (RequestCode.SEND_MESSAGE, RequestCode.SEND_MESSAGE_V2, RequestCode.SEND_BATCH_MESSAGE))
)
PULLS: Final[frozenset[int]] = frozenset(map(int, (RequestCode.PULL_MESSAGE, RequestCode.LITE_PULL_MESSAGE)))

LEADER_ONLY: Final[frozenset[int]] = SENDS | {
    RequestCode.CONSUMER_SEND_MSG_BACK,
    RequestCode.QUERY_CONSUMER_OFFSET,
    RequestCode.UPDATE_CONSUMER_OFFSET,
    RequestCode.SEARCH_OFFSET_BY_TIMESTAMP,
    RequestCode.GET_MAX_OFFSET,
    RequestCode.LOCK_BATCH_MQ,
    RequestCode.UNLOCK_BATCH_MQ,
    RequestCode.UPDATE_AND_CREATE_TOPIC,
    RequestCode.UPDATE_AND_CREATE_TOPIC_LIST,
    RequestCode.DELETE_TOPIC_IN_BROKER,
    RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP,
    RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP_LIST,
    RequestCode.DELETE_SUBSCRIPTIONGROUP,
    RequestCode.INVOKE_BROKER_TO_RESET_OFFSET,
    RequestCode.CLONE_GROUP_OFFSET,
    RequestCode.DELETE_EXPIRED_COMMITLOG,
    RequestCode.RAFT_TRANSFER,
    RequestCode.RAFT_CHANGE_MEMBERS,
    RequestCode.RAFT_DELETE_EXPIRED,
}
"""Codes that a follower, or a leader whose no-op is not applied, passes on (design 4)."""

CONFIRMED_READS: Final[frozenset[int]] = frozenset(
    {
        RequestCode.QUERY_CONSUMER_OFFSET,
        RequestCode.SEARCH_OFFSET_BY_TIMESTAMP,
        RequestCode.GET_MAX_OFFSET,
        RequestCode.LOCK_BATCH_MQ,
        RequestCode.GET_CONSUME_STATS,
        RequestCode.GET_BROKER_CONSUME_STATS,
        RequestCode.QUERY_CONSUME_TIME_SPAN,
        RequestCode.GET_TOPIC_STATS_INFO,
        RequestCode.GET_ALL_CONSUMER_OFFSET,
        RequestCode.GET_ALL_DELAY_OFFSET,
    }
)
"""Codes whose answer of a leader is out of its tables: it may have been replaced without knowing, so a quorum must have
heard it lead after the request came (Raft 8, ReadIndex). Renewing a lock is one of them."""

WITHOUT_THE_LOG: Final[frozenset[int]] = frozenset(
    {
        RequestCode.HEART_BEAT,
        RequestCode.UNREGISTER_CLIENT,
        RequestCode.GET_CONSUMER_LIST_BY_GROUP,
        RequestCode.CHECK_CLIENT_CONFIG,
        RequestCode.GET_CONSUMER_CONNECTION_LIST,
        RequestCode.GET_PRODUCER_CONNECTION_LIST,
        RequestCode.GET_ALL_PRODUCER_INFO,
        RequestCode.GET_CONSUMER_RUNNING_INFO,
        RequestCode.INVOKE_BROKER_TO_GET_CONSUMER_STATUS,
        RequestCode.QUERY_SUBSCRIPTION_BY_CONSUMER,
        RequestCode.GET_SYSTEM_TOPIC_LIST_FROM_BROKER,
        RequestCode.UPDATE_BROKER_CONFIG,
        RequestCode.GET_BROKER_CONFIG,
        RequestCode.GET_BROKER_RUNTIME_INFO,
        RequestCode.VIEW_BROKER_STATS_DATA,
        RequestCode.GET_BROKER_HA_STATUS,
        RequestCode.GET_BROKER_EPOCH_CACHE,
        RequestCode.RAFT_DESCRIBE,
        RequestCode.RAFT_ACCEPT_LOSS,
        RequestCode.RAFT_BACKUP_MANIFEST,
        RequestCode.RAFT_BACKUP_CHUNK,
    }
)
"""Answered while the log of this node is repaired or installed too: by its clients, settings and the group itself."""

BAD_INPUT: Final = (HeaderError, BodyError)
"""A request that cannot be read: answered 1 with the reason."""


class Router:
    """The node's FrameHandler. `send` is the send processor's hot entry, `pull` the pull processor's."""

    def __init__(
        self, broker: BrokerContext, *, send: HotHandler, pull: HotHandler, handlers: dict[int, Handler]
    ) -> None:
        self._broker = broker
        self._group = broker.group
        self._send = send
        self._pull = pull
        self._handlers = handlers
        self.forwarder = Forwarder(
            broker.env.clock,
            broker.group,
            execute=self.execute,
            changed=broker.changed,
            leader_address=lambda: broker.master_address,
            log=broker.log,
        )

    # ------------------------------------------------------------------------------------------------ FrameHandler

    def on_open(self, conn: Any) -> None:
        """Nothing is known of a connection until it asks for something."""

    def on_close(self, conn: Any) -> None:
        """The clients on it are gone, and nobody waits for their held requests."""
        self._broker.clients.disconnected(conn)
        self.forwarder.forget(conn)
        self._broker.flush_changed()

    def on_frames(self, conn: Any, frames: list[Frame]) -> None:
        """All requests of one read. Raises RemoteProtocolError on a header that is none: the connection is closed."""
        ready = self._group.is_ready_leader
        for frame in frames:
            code = peek_code(frame)
            if code in SENDS and ready:
                handler = self._send
            elif code in PULLS:
                handler = self._pull
            else:
                self._dispatch(code, frame, conn, ready)
                continue
            try:
                handler(frame, conn)
            except BAD_INPUT as error:
                self._answer(frame, conn, ResponseCode.SYSTEM_ERROR, str(error))
            except UNEXPECTED as error:
                self._broker.failures.answer(decode_frame(frame), conn, error)

    def turn(self) -> None:
        """After each read: its sends go into the log, and what was answered on other connections leaves now."""
        self._group.kick()
        self._broker.flush_changed()

    # -------------------------------------------------------------------------------------------------- dispatching

    def execute(self, conn: Any, frame: Frame) -> None:
        """Serve a request here: one forwarded by another node, or one that was held for a leader."""
        self.on_frames(conn, [frame])

    def _dispatch(self, code: int, frame: Frame, conn: Any, ready: bool) -> None:
        request = decode_frame(frame)
        try:
            if not ready and self._needs_leader(code, request):
                self._pass_on(request, frame, conn, None)
                return
        except BAD_INPUT as error:
            self._answer(frame, conn, ResponseCode.SYSTEM_ERROR, str(error))
            return
        if ready and code in CONFIRMED_READS:
            arrived = self._broker.env.clock.monotonic()
            self._group.read_index(lambda reason: self._confirmed(request, frame, conn, arrived, reason))
        else:
            self._serve(request, frame, conn)

    def _pass_on(self, request: Command, frame: Frame, conn: Any, arrived: float | None) -> None:
        """To whoever leads, or will. A request that another node passed on goes back to it."""
        if isinstance(conn, ForwardedConnection):
            conn.refuse()
        else:
            self.forwarder.submit(conn, frame, request.code, request.opaque, request.flag, arrived)

    def _confirmed(self, request: Command, frame: Frame, conn: Any, arrived: float, reason: str | None) -> None:
        """A quorum has heard this node lead since the request came; or, with a reason, it has not."""
        if reason is None:
            self._serve(request, frame, conn)
            self._broker.changed(conn)
        else:
            # Whether this node still leads is settled at the end of the turn.
            self._broker.state.defer(lambda: self._not_confirmed(request, frame, conn, arrived, reason))
        self._group.wake()

    def _not_confirmed(self, request: Command, frame: Frame, conn: Any, arrived: float, reason: str) -> None:
        if self._group.is_ready_leader:
            self._answer(frame, conn, ResponseCode.SYSTEM_BUSY, f"[OVERLOAD]not answered: {reason}")
            self._broker.changed(conn)
        else:
            self._pass_on(request, frame, conn, arrived)

    def _serve(self, request: Command, frame: Frame, conn: Any) -> None:
        """By the handler of its code."""
        code = request.code
        try:
            handler = self._handlers.get(code)
            if handler is None:
                answer: bytes | None = encode_response(
                    request, ResponseCode.REQUEST_CODE_NOT_SUPPORTED, remark=f" request type {code} not supported"
                )
            else:
                answer = handler(request, conn)
            if answer is not None and not request.is_oneway:
                conn.write(answer)
        except BAD_INPUT as error:
            self._answer(frame, conn, ResponseCode.SYSTEM_ERROR, str(error))
        except (NotLeader, Overloaded, TooLarge) as error:
            self._answer(frame, conn, *REFUSALS[reason_of(error)])
        except UNEXPECTED as error:
            self._broker.failures.answer(decode_frame(frame), conn, error)

    def _needs_leader(self, code: int, request: Command) -> bool:
        if code in LEADER_ONLY:
            return True
        if not self._group.is_serving:
            return code in self._handlers and code not in WITHOUT_THE_LOG
        if code == RequestCode.VIEW_MESSAGE_BY_ID:
            # An acknowledged message may not be known as committed here yet; while a leader is elected least of all.
            return require(request.ext, "offset", int) >= self._group.committed_position
        return False

    # ------------------------------------------------------------------------------------------------------ failures

    def _answer(self, frame: Frame, conn: Any, code: int, remark: str) -> None:
        request = decode_frame(frame)
        if not request.is_oneway:
            conn.write(encode_response(request, code, {}, remark=remark))
