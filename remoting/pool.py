"""Outgoing connections by address: dialling, back-off, and requests from the peers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from remoting.codes import VERSION, ResponseCode
from remoting.command import Command, encode_response
from remoting.connection import Asked, Connection, Limits, Log
from remoting.errors import ConnectFailed, ConnectionLost, RemoteProtocolError, ResponseError
from remoting.frames import FrameReader, RefusedFrame, decode_frame
from runtime.model import Env, Stream

InboundHandler = Callable[[Connection, Command], bytes | None]
"""Takes a request a broker sent to us; returns the encoded answer, or None where there is none (yet)."""


def parse_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port". Raises ValueError."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"an address is host:port, not {address!r}")
    return host.strip("[]"), int(port)


class _Slot:
    """One address: its connection, or why there is none."""

    __slots__ = ("connection", "dialling", "failed_at", "failure", "pause_s")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.dialling: trio.Event | None = None
        self.failure: str | None = None
        self.failed_at = 0.0
        self.pause_s = 0.0


class Client:
    """Requests to any number of servers, one connection each. Use `open_client`, or start `run` in a nursery.

    After a failed dial the address is refused without another attempt for a pause that doubles from `backoff_min_s`
    to `backoff_max_s`, so a loop of retries does not become a storm of dials.
    """

    def __init__(
        self,
        env: Env,
        *,
        log: Log,
        on_request: InboundHandler | None = None,
        on_lost: Callable[[str, Connection], None] | None = None,
        limits: Limits | None = None,
        language: str = "PYTHON",
        connect_timeout_s: float = 3.0,
        backoff_min_s: float = 0.02,
        backoff_max_s: float = 1.0,
        addresses_limit: int = 1_000,
    ) -> None:
        self._env = env
        self._log = log
        self._on_request = on_request
        self._on_lost = on_lost
        self._limits = limits or Limits()
        self._language = language
        self._connect_timeout_s = connect_timeout_s
        self._backoff_min_s = backoff_min_s
        self._backoff_max_s = backoff_max_s
        self._addresses_limit = addresses_limit
        self._slots: dict[str, _Slot] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the connections' tasks; ends when cancelled, closing all connections. Checkpoint."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await self._close_idle()
            finally:
                self._nursery = None
                for address in list(self._slots):
                    self.close(address, "client stopped")

    def connection(self, address: str) -> Connection | None:
        """The open connection to `address`, if there is one."""
        slot = self._slots.get(address)
        return slot.connection if slot is not None else None

    def connected_addresses(self) -> list[str]:
        return [address for address, slot in self._slots.items() if slot.connection is not None]

    def close(self, address: str, reason: str = "closed here") -> None:
        """End the connection to `address`; whoever waits for an answer gets ConnectionLost."""
        slot = self._slots.pop(address, None)
        if slot is not None and slot.connection is not None:
            slot.connection.close(reason)

    async def connect(self, address: str, *, timeout: float | None = None) -> Connection:
        """The connection to "host:port", dialled if need be, `timeout` seconds at most (default 3).

        Raises ConnectFailed. Checkpoint; cancel-safe.
        """
        slot = self._slots.get(address)
        if slot is not None and slot.connection is not None and not slot.connection.is_closed:
            return slot.connection
        deadline = self._env.clock.monotonic() + (self._connect_timeout_s if timeout is None else timeout)
        while True:
            slot = self._slots.get(address)
            if slot is None:
                slot = self._new_slot(address)
            if slot.connection is not None and not slot.connection.is_closed:
                return slot.connection
            if slot.dialling is None:
                return await self._dial(address, slot, deadline)
            with self._env.clock.move_on_at(deadline):
                await slot.dialling.wait()
                continue
            raise ConnectFailed(f"cannot connect to {address} in time")

    def _new_slot(self, address: str) -> _Slot:
        if len(self._slots) >= self._addresses_limit:
            for other, slot in list(self._slots.items()):
                if slot.connection is None and slot.dialling is None:
                    del self._slots[other]
        slot = _Slot()
        self._slots[address] = slot
        return slot

    async def _dial(self, address: str, slot: _Slot, deadline: float) -> Connection:
        clock = self._env.clock
        if self._nursery is None:
            raise ConnectFailed(f"cannot connect to {address}: the client is not running")
        now = clock.monotonic()
        if slot.failure is not None and now < slot.failed_at + slot.pause_s:
            await trio.lowlevel.checkpoint()
            raise ConnectFailed(slot.failure)
        try:
            host, port = parse_address(address)
        except ValueError as error:
            raise ConnectFailed(str(error)) from error
        slot.dialling = trio.Event()
        try:
            stream = await self._env.net.dial(host, port, timeout=max(0.001, deadline - now))
        except (OSError, trio.TooSlowError) as error:
            # `dial` names the address in its own sentence.
            said = None if isinstance(error, trio.TooSlowError) else error.strerror
            slot.failure = said or f"cannot connect to {address}: no answer in time"
            slot.failed_at = clock.monotonic()
            slot.pause_s = min(self._backoff_max_s, max(self._backoff_min_s, slot.pause_s * 2))
            raise ConnectFailed(slot.failure) from error
        finally:
            slot.dialling.set()
            slot.dialling = None
        if self._nursery is None or self._slots.get(address) is not slot:
            stream.abort()
            raise ConnectFailed(f"cannot connect to {address}: closed meanwhile")
        slot.failure = None
        slot.pause_s = 0.0
        connection = Connection(self._env, stream, self._limits)
        slot.connection = connection
        self._nursery.start_soon(self._run_connection, address, slot, connection, stream)
        return connection

    async def invoke(self, address: str, command: Command, timeout: float) -> Command:
        """Send a request to "host:port" and wait for its answer, `timeout` seconds in all, whatever its code.

        Raises ConnectFailed (certainly not executed), ConnectionLost or RequestTimeout (perhaps executed).
        Checkpoint; cancel-safe, but a cancelled request may still be executed.
        """
        slot = self._slots.get(address)
        connection = slot.connection if slot is not None else None
        if connection is None or connection.closed_reason is not None:
            started = self._env.clock.monotonic()
            connection = await self.connect(address, timeout=min(timeout, self._connect_timeout_s))
            timeout = max(0.001, timeout - (self._env.clock.monotonic() - started))
        return await connection.request(command, timeout)

    async def ask(self, address: str, command: Command, timeout: float, event: trio.Event) -> Asked:
        """Send a request, connected within `timeout` seconds, and return at once; `event` is set when there is news.

        The caller must `drop` what it gets. Raises ConnectFailed or ConnectionLost, and then nothing was sent.
        Checkpoint where it dials; cancel-safe.
        """
        slot = self._slots.get(address)
        connection = slot.connection if slot is not None else None
        if connection is None or connection.closed_reason is not None:
            connection = await self.connect(address, timeout=min(timeout, self._connect_timeout_s))
        return connection.ask(command, event)

    async def invoke_oneway(self, address: str, command: Command, timeout: float = 3.0) -> None:
        """Send a request that wants no answer. Raises ConnectFailed or ConnectionLost. Checkpoint; cancel-safe."""
        connection = await self.connect(address, timeout=timeout)
        await connection.wait_writable()
        connection.send_oneway(command)

    def request(self, code: int, ext: Mapping[str, object] | None = None, body: bytes = b"") -> Command:
        """A request of this client; values of `ext` become text, None is left out."""
        fields = {
            name: value if isinstance(value, str) else _text(value)
            for name, value in (ext or {}).items()
            if value is not None
        }
        return Command(int(code), 0, 0, VERSION, self._language, None, fields, body)

    async def call(
        self,
        address: str,
        code: int,
        ext: Mapping[str, object] | None = None,
        body: bytes = b"",
        *,
        timeout: float = 3.0,
        accept: tuple[int, ...] = (ResponseCode.SUCCESS,),
    ) -> Command:
        """`invoke` for a request made on the spot. Raises ResponseError on a code that is not in `accept`."""
        answer = await self.invoke(address, self.request(code, ext, body), timeout)
        if answer.code not in accept:
            raise ResponseError(answer.code, answer.remark, address)
        return answer

    async def _run_connection(self, address: str, slot: _Slot, connection: Connection, stream: Stream) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run_writer)
                await self._read(connection)
                nursery.cancel_scope.cancel()
        finally:
            connection.close("client stopped")
            if slot.connection is connection:
                slot.connection = None
            if self._on_lost is not None:
                self._on_lost(address, connection)

    async def _read(self, connection: Connection) -> None:
        reader = FrameReader(self._limits.frame_bytes)
        monotonic = self._env.clock.monotonic
        while True:
            data = await connection.receive()
            if not data:
                connection.close("closed by peer")
                return
            connection.last_activity = monotonic()
            try:
                try:
                    frames = reader.cut(data)
                except RefusedFrame as error:
                    for frame in error.frames:
                        self._take(connection, decode_frame(frame))
                    raise
                for frame in frames:
                    self._take(connection, decode_frame(frame))
            except RemoteProtocolError as error:
                self._log.warning("connection closed: bad bytes", peer=connection.peer_text, reason=str(error))
                connection.close(str(error))
                return
            connection.flush()
            if connection.outbox_bytes > self._limits.outbox_bytes:
                await connection.wait_writable()

    def _take(self, connection: Connection, command: Command) -> None:
        if command.is_response:
            connection.answer(command)
            return
        answer: bytes | None = None
        if self._on_request is not None:
            answer = self._on_request(connection, command)
        elif not command.is_oneway:
            answer = encode_response(
                command,
                ResponseCode.REQUEST_CODE_NOT_SUPPORTED,
                remark=f" request type {command.code} not supported",
            )
        if answer is not None and not command.is_oneway:
            connection.write(answer)

    async def _close_idle(self) -> None:
        idle_s = self._limits.idle_s
        while True:
            await self._env.clock.sleep(min(5.0, idle_s / 4))
            oldest = self._env.clock.monotonic() - idle_s
            for slot in list(self._slots.values()):
                if slot.connection is not None and slot.connection.last_activity < oldest:
                    slot.connection.close(f"idle for {idle_s:g} s")


def _text(value: object) -> str:
    if value is True:
        return "true"
    if value is False:
        return "false"
    return str(value)


@asynccontextmanager
async def open_client(env: Env, *, log: Log, **options: Any) -> AsyncIterator[Client]:
    """A running `Client` for the length of a block; `options` as for `Client`. Checkpoint."""
    client = Client(env, log=log, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()


__all__ = ["Client", "ConnectFailed", "ConnectionLost", "InboundHandler", "open_client", "parse_address"]
