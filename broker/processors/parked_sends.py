"""Sends that wait for their topic: while it is created by the first of them, or changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from broker.answers import reason_before_logging
from remoting.bodies import TopicConfig
from remoting.codes import ResponseCode
from remoting.frames import SendHeader

if TYPE_CHECKING:
    from broker.state import BrokerState


class ParkedSends:
    """Bounded by number and bytes. `send` looks at a send once more, all of it."""

    def __init__(self, state: BrokerState, send: Callable[[SendHeader, bytes, Any], None]) -> None:
        self._state = state
        self._config = state.config
        self._answers = state.answers
        self._send = send
        self._parked: dict[str, deque[tuple[SendHeader, bytes, Any]]] = {}
        self._count = 0
        self._bytes = 0

    def hold(self, header: SendHeader, body: bytes, conn: Any) -> bool:
        """Hold the send while its topic is created or changes; True when it was held or refused."""
        state = self._state
        name = header.topic
        parked = self._parked.get(name)
        if parked is None and state.topics.get(name) is not None and not state.topics.is_pending(name):
            return False
        config: TopicConfig | None = None
        if parked is None and state.topics.get_pending(name) is None:
            config = state.topics.created_by_send(
                name,
                header.default_topic,
                header.default_topic_queue_nums,
                unit_mode=header.unit_mode,
                retry_queues=self._config.retry_queues,
            )
            if config is None:
                self._answers.refuse_send(
                    header,
                    conn,
                    ResponseCode.TOPIC_NOT_EXIST,
                    f"topic[{name}] not exist, apply first please!\nCreate it, or allow automatic creation.",
                )
                return True
        if self._count >= self._config.max_parked_sends or self._bytes + len(body) > self._config.max_parked_bytes:
            self._answers.refuse_send(
                header, conn, ResponseCode.SYSTEM_BUSY, f"[REJECTREQUEST]too many sends wait for topic[{name}]"
            )
            return True
        self._count += 1
        self._bytes += len(body)
        if parked is not None:
            parked.append((header, bytes(body), conn))
            return True
        self._parked[name] = deque([(header, bytes(body), conn)])

        def ready(ok: bool, reason: str | None) -> None:
            self._unpark(name, ok, reason)

        if config is not None:
            state.ensure_topic(config, ready)
        else:
            state.after_in_flight(ready)
        return True

    def _unpark(self, name: str, ok: bool, reason: str | None) -> None:
        for header, body, conn in self._parked.pop(name):
            self._count -= 1
            self._bytes -= len(body)
            self._state.touch(conn)
            if ok:
                self._send(header, body, conn)
            else:
                self._answers.fail_send(header, conn, reason_before_logging(reason))
