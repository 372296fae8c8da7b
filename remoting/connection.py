"""One connection that carries commands both ways: outbox, requests of our own, and its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import trio
from attrs import frozen

from remoting.codes import FRAME_LIMIT_BYTES
from remoting.command import Command, encode_command
from remoting.errors import ConnectionLost, RequestTimeout
from remoting.frames import Frame, decode_frame
from runtime.model import Buffer, Env, Stream

_JOIN_BELOW_BYTES: Final = 65_536
_OPAQUE_MASK: Final = 0x7FFFFFFF


class Log(Protocol):
    """What is used of a bound logger."""

    def debug(self, event: str, **fields: Any) -> None: ...
    def info(self, event: str, **fields: Any) -> None: ...
    def warning(self, event: str, **fields: Any) -> None: ...


@frozen
class Limits:
    """Bounds of one connection, and of a server's connections together."""

    frame_bytes: int = FRAME_LIMIT_BYTES
    outbox_bytes: int = 4 * 1024 * 1024
    """Past it nothing more is read from this connection until the peer has taken what waits."""
    outbox_close_bytes: int = 64 * 1024 * 1024
    """Past it the peer is too slow: the connection is closed."""
    read_bytes: int = 262_144
    idle_s: float = 120.0
    connections: int = 10_000


class Asked:
    """A request that was sent and whose answer somebody waits for. Several may share an event."""

    __slots__ = ("_connection", "_opaque", "answer", "event")

    def __init__(self, connection: Connection, opaque: int, event: trio.Event) -> None:
        self._connection = connection
        self._opaque = opaque
        self.event = event
        """Set when the answer comes, or the connection ends."""
        self.answer: Command | None = None

    @property
    def lost(self) -> str | None:
        """Why no answer will come any more, as a sentence."""
        reason = self._connection.closed_reason
        return None if reason is None else f"connection to {self._connection.peer_text} ended: {reason}"

    def drop(self) -> None:
        """Nobody waits any more: a late answer is dropped."""
        self._connection.forget(self._opaque)


def peer_text(peer: tuple[str, int]) -> str:
    """ "address:port", IPv6 in brackets."""
    host, port = peer
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Connection:
    """A connected stream with a bounded outbox. Made by `serve` and `Client`; not to be shared between loops.

    `write` only collects; `flush` hands over what the socket takes at once, and leaves the rest to the one writer task.
    """

    __slots__ = (
        "_clock",
        "_drained",
        "_limits",
        "_next_opaque",
        "_outbox",
        "_sending",
        "_stream",
        "_waiters",
        "_wake",
        "attributes",
        "closed_reason",
        "has_asked",
        "last_activity",
        "outbox_bytes",
        "peer",
        "peer_text",
    )

    def __init__(self, env: Env, stream: Stream, limits: Limits) -> None:
        self._stream = stream
        self._clock = env.clock
        self._limits = limits
        self._outbox: list[Buffer] = []
        self.outbox_bytes = 0
        """Bytes written and not yet taken by the socket."""
        self._sending = False
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._waiters: dict[int, Asked] = {}
        self._next_opaque = 0
        self.peer = stream.peer
        self.peer_text = peer_text(stream.peer)
        self.attributes: dict[str, Any] = {}
        """For the layer above: client id, group and the like."""
        self.closed_reason: str | None = None
        self.has_asked = False
        """Whether a request was ever sent here, so that answers may arrive among the frames."""
        self.last_activity = env.clock.monotonic()

    def __repr__(self) -> str:
        return f"<Connection {self.peer_text}{' closed' if self.closed_reason else ''}>"

    @property
    def local(self) -> tuple[str, int]:
        return self._stream.local

    @property
    def is_closed(self) -> bool:
        return self.closed_reason is not None

    # ------------------------------------------------------------------------------------------------------ writing

    def write(self, data: Buffer) -> None:
        """Append one frame, or part of one, to the outbox. No system call; after the end it is dropped silently."""
        if self.closed_reason is None:
            self._outbox.append(data)
            self.outbox_bytes += len(data)

    def flush(self) -> None:
        """Hand over what fits right now; the writer task sends the rest. Never blocks, never raises."""
        outbox = self._outbox
        if not outbox or self._sending or self.closed_reason is not None:
            return
        total = self.outbox_bytes
        # Joining copies, but sendmsg costs more than the copy for many small answers.
        parts: Sequence[Buffer] = [b"".join(outbox)] if len(outbox) > 1 and total <= _JOIN_BELOW_BYTES else outbox
        try:
            taken = self._stream.send_nowait(parts)
        except trio.BrokenResourceError:
            self.close("connection broken while sending")
            return
        self.last_activity = self._clock.monotonic()
        if taken == total:
            self._outbox = []
            self.outbox_bytes = 0
            return
        self._drop_sent(parts, taken)
        if self.outbox_bytes > self._limits.outbox_close_bytes:
            self.close(f"peer does not read: {self.outbox_bytes} bytes wait for it")
            return
        self._wake.set()

    def _drop_sent(self, parts: Sequence[Buffer], taken: int) -> None:
        self.outbox_bytes -= taken
        index = 0
        while taken and taken >= len(parts[index]):
            taken -= len(parts[index])
            index += 1
        rest: list[Buffer] = list(parts[index:])
        if taken:
            rest[0] = memoryview(rest[0])[taken:]
        self._outbox = rest

    async def run_writer(self) -> None:
        """Sends what `flush` could not. Runs as the connection's one writer task until the connection ends."""
        while self.closed_reason is None:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._outbox and self.closed_reason is None:
                parts, size = self._outbox, self.outbox_bytes
                self._outbox = []
                self._sending = True
                try:
                    await self._stream.send_parts(parts)
                except trio.BrokenResourceError:
                    self.close("connection broken while sending")
                    return
                finally:
                    self._sending = False
                self.outbox_bytes -= size
                self.last_activity = self._clock.monotonic()
                if self.outbox_bytes > self._limits.outbox_close_bytes:
                    self.close(f"peer does not read: {self.outbox_bytes} bytes wait for it")
                    return
                if self.outbox_bytes <= self._limits.outbox_bytes:
                    self._drained.set()
                    self._drained = trio.Event()

    async def wait_writable(self) -> None:
        """Wait until the outbox is below its bound or the connection has ended. Checkpoint; cancel-safe."""
        await trio.lowlevel.checkpoint()
        while self.outbox_bytes > self._limits.outbox_bytes and self.closed_reason is None:
            await self._drained.wait()

    # ---------------------------------------------------------------------------------------------------- requests

    def next_opaque(self) -> int:
        """A request id not in use on this connection."""
        opaque = self._next_opaque
        self._next_opaque = (opaque + 1) & _OPAQUE_MASK
        return opaque

    def send_oneway(self, command: Command) -> None:
        """Send a request that wants no answer; `opaque` and the one-way flag are set here. Never blocks.

        Raises ConnectionLost where the connection has ended.
        """
        if self.closed_reason is not None:
            raise ConnectionLost(f"connection to {self.peer_text} is closed: {self.closed_reason}")
        command.opaque = self.next_opaque()
        command.flag |= 2
        self.write(encode_command(command))
        self.flush()

    async def request(self, command: Command, timeout: float) -> Command:
        """Send a request and wait up to `timeout` seconds for its answer, whatever its code. `opaque` is set here.

        Raises RequestTimeout or ConnectionLost. Checkpoint; cancel-safe (a late answer is dropped), but a cancelled
        request may still be executed.
        """
        if self.closed_reason is not None:
            await trio.lowlevel.checkpoint()
        asked = self.ask(command, trio.Event())
        try:
            with self._clock.move_on_after(timeout):
                await asked.event.wait()
        finally:
            asked.drop()
        if asked.answer is not None:
            return asked.answer
        if asked.lost is not None:
            raise ConnectionLost(asked.lost)
        raise RequestTimeout(f"no answer from {self.peer_text} to code {command.code} within {timeout:g} s")

    def ask(self, command: Command, event: trio.Event) -> Asked:
        """Send a request and return at once; `event` is set when there is news of it. `opaque` is set here.

        The caller must `drop` what it gets. Raises ConnectionLost where the connection has ended, and then nothing was
        sent; RemoteProtocolError for what cannot be encoded.
        """
        if self.closed_reason is not None:
            raise ConnectionLost(f"connection to {self.peer_text} is closed: {self.closed_reason}")
        opaque = self.next_opaque()
        command.opaque = opaque
        data = encode_command(command)
        asked = self._waiters[opaque] = Asked(self, opaque, event)
        self.has_asked = True
        self.write(data)
        self.flush()
        return asked

    def forget(self, opaque: int) -> None:
        """Nobody waits for this answer any more."""
        self._waiters.pop(opaque, None)

    def take_answers(self, frames: list[Frame]) -> list[Frame]:
        """Hand answers among `frames` to those who wait; returns the others, which are requests.

        Raises RemoteProtocolError on a header that cannot be read.
        """
        others: list[Frame] = []
        for frame in frames:
            # A text value cannot hold this sequence: its quotes would be escaped.
            if frame[0] == 0 and b'"flag":0' in frame[1] and b'"flag":1' not in frame[1]:
                others.append(frame)
                continue
            command = decode_frame(frame)
            if not command.is_response:
                others.append(frame)
                continue
            self.answer(command)
        return others

    def answer(self, command: Command) -> None:
        """Wake whoever waits for this answer; one that nobody waits for any more is dropped."""
        waiter = self._waiters.get(command.opaque)
        if waiter is not None:
            waiter.answer = command
            waiter.event.set()

    # --------------------------------------------------------------------------------------------------------- end

    def close(self, reason: str) -> None:
        """End the connection now, from synchronous code. What waits in the outbox is lost. May be called twice."""
        if self.closed_reason is not None:
            return
        self.closed_reason = reason
        self._stream.abort()
        self._outbox = []
        self.outbox_bytes = 0
        for waiter in self._waiters.values():
            waiter.event.set()
        self._wake.set()
        self._drained.set()

    async def receive(self) -> bytes:
        """Bytes from the peer, b"" at the end. Checkpoint; cancel-safe."""
        try:
            return await self._stream.receive_some(self._limits.read_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""


__all__ = ["Asked", "Connection", "Limits", "Log", "peer_text"]
