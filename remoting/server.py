"""Accepting connections and handing over their frames, all frames of one read at once."""

from __future__ import annotations

from typing import Any, Protocol

import trio

from remoting.connection import Connection, Limits, Log
from remoting.errors import RemoteProtocolError
from remoting.frames import Frame, FrameReader, RefusedFrame
from runtime.model import Env, Listener, Stream


class FrameHandler(Protocol):
    """What a server does with frames. All calls are synchronous and must not block.

    A handler may also have `turn(self) -> None`, called after each `on_frames`.
    """

    def on_open(self, connection: Connection) -> None: ...

    def on_frames(self, connection: Connection, frames: list[Frame]) -> None:
        """Requests of one read, in order. Answers go to `connection.write`; the server flushes afterwards.

        RemoteProtocolError raised here closes the connection with one log line.
        """

    def on_close(self, connection: Connection) -> None:
        """Called exactly once per opened connection; `connection.closed_reason` says why."""


async def serve(
    env: Env,
    listener: Listener,
    handler: FrameHandler,
    *,
    log: Log,
    limits: Limits | None = None,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `listener` until cancelled; every connection ends with it. `task_status.started()` gives its address.

    Checkpoint. What `handler` raises beyond RemoteProtocolError ends the server: it is a bug of the node.
    """
    server = _Server(env, handler, log, limits or Limits())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.close_idle)
        task_status.started(listener.address)
        try:
            while True:
                stream = await listener.accept()
                nursery.start_soon(server.run_connection, stream)
        except trio.ClosedResourceError:
            nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await listener.aclose()


class _Server:
    def __init__(self, env: Env, handler: FrameHandler, log: Log, limits: Limits) -> None:
        self._env = env
        self._handler = handler
        self._log = log
        self._limits = limits
        self._turn = getattr(handler, "turn", None)
        self._connections: dict[int, Connection] = {}

    async def run_connection(self, stream: Stream) -> None:
        if len(self._connections) >= self._limits.connections:
            self._log.warning("connection refused: too many", peer=stream.peer, limit=self._limits.connections)
            stream.abort()
            await trio.lowlevel.checkpoint()
            return
        connection = Connection(self._env, stream, self._limits)
        self._connections[id(connection)] = connection
        self._handler.on_open(connection)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run_writer)
                await self._read(connection)
                nursery.cancel_scope.cancel()
        finally:
            connection.close("server stopped")
            del self._connections[id(connection)]
            self._handler.on_close(connection)

    async def _read(self, connection: Connection) -> None:
        cut = FrameReader(self._limits.frame_bytes).cut
        on_frames = self._handler.on_frames
        turn = self._turn
        receive = connection.receive
        monotonic = self._env.clock.monotonic
        outbox_limit = self._limits.outbox_bytes
        while True:
            data = await receive()
            if not data:
                connection.close("closed by peer")
                return
            connection.last_activity = monotonic()
            refused: RemoteProtocolError | None = None
            try:
                try:
                    frames = cut(data)
                except RefusedFrame as error:
                    refused = error
                    frames = error.frames
                if connection.has_asked:
                    frames = connection.take_answers(frames)
                if frames:
                    on_frames(connection, frames)
                    if turn is not None:
                        turn()
            except RemoteProtocolError as error:
                refused = error
            connection.flush()
            if refused is not None:
                self._log.warning("connection closed: bad bytes", peer=connection.peer_text, reason=str(refused))
                connection.close(str(refused))
                return
            if connection.outbox_bytes > outbox_limit:
                await connection.wait_writable()

    async def close_idle(self) -> None:
        idle_s = self._limits.idle_s
        while True:
            await self._env.clock.sleep(min(5.0, idle_s / 4))
            oldest = self._env.clock.monotonic() - idle_s
            for connection in list(self._connections.values()):
                if connection.last_activity < oldest:
                    self._log.info("connection closed: idle", peer=connection.peer_text, idle_s=idle_s)
                    connection.close(f"idle for {idle_s:g} s")
