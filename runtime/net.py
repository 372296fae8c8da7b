"""Plain TCP on non-blocking sockets, one thin layer above trio's readiness calls (decision record 0005).

trio's own SocketStream takes a lock, a conflict check and several coroutine frames per call. A broker makes two calls
per batch and connection, so this class makes the system call first and asks trio only when the socket is not ready.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence

import trio

from runtime.model import Buffer, Listener, Stream

_PARTS_PER_CALL = 1024  # IOV_MAX on Linux and macOS
_BACKLOG = 1024
_RECEIVE_BUFFER = 262_144
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_OVERLOAD_PAUSE_S = 0.1

_checkpoint = trio.lowlevel.checkpoint
_checkpoint_if_cancelled = trio.lowlevel.checkpoint_if_cancelled
_cancel_shielded_checkpoint = trio.lowlevel.cancel_shielded_checkpoint
_wait_readable = trio.lowlevel.wait_readable
_wait_writable = trio.lowlevel.wait_writable


class TcpStream:
    """`runtime.model.Stream` over one connected socket. One task may send while another receives."""

    __slots__ = ("_buffer", "_local", "_peer", "_socket")

    def __init__(self, connected: socket.socket, buffer: memoryview) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._buffer = buffer  # shared by all streams of one loop; nothing is kept in it across an await
        self._peer = _pair(connected.getpeername())
        self._local = _pair(connected.getsockname())

    @property
    def peer(self) -> tuple[str, int]:
        return self._peer

    @property
    def local(self) -> tuple[str, int]:
        return self._local

    def send_nowait(self, parts: Sequence[Buffer]) -> int:
        """Hand over what the socket takes right now; returns the number of bytes taken (0 allowed).

        One system call. Only valid while no `send_parts` is under way. Raises trio.BrokenResourceError.
        """
        try:
            if len(parts) == 1:
                return self._socket.send(parts[0])
            return self._socket.sendmsg(parts[:_PARTS_PER_CALL])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(f"{_text(self._peer)}: {error.strerror}") from error

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        """Send all parts back to back. Checkpoint; after a cancellation an unknown part of them is sent.

        Raises trio.BrokenResourceError.
        """
        await _checkpoint()
        waiting = [view for view in map(_bytes_view, parts) if view.nbytes]
        while waiting:
            taken = self.send_nowait(waiting)
            if taken == 0:
                try:
                    await _wait_writable(self._socket)
                except (trio.ClosedResourceError, OSError, ValueError) as error:
                    raise trio.BrokenResourceError(f"{_text(self._peer)}: closed") from error
                continue
            done = 0
            while done < len(waiting) and taken >= waiting[done].nbytes:
                taken -= waiting[done].nbytes
                done += 1
            del waiting[:done]
            if taken:
                waiting[0] = waiting[0][taken:]

    async def receive_some(self, max_bytes: int = _RECEIVE_BUFFER) -> bytes:
        """What has arrived, at most `max_bytes`; b"" at end of stream and after `abort`. Checkpoint, nothing lost
        by a cancellation. Raises trio.BrokenResourceError.
        """
        # Exactly one pass through the scheduler on either way: waiting for readiness is one, and when the bytes are
        # here already a shielded one follows, because a cancelled receive must not swallow what it has read.
        await _checkpoint_if_cancelled()
        buffer = self._buffer
        receive_into = self._socket.recv_into
        waited = False
        while True:
            try:
                taken = receive_into(buffer, min(max_bytes, _RECEIVE_BUFFER))
                data = buffer[:taken].tobytes()
                if not waited:
                    await _cancel_shielded_checkpoint()
                return data
            except BlockingIOError:
                pass
            except OSError as error:
                if self._socket.fileno() < 0:
                    return b""
                raise trio.BrokenResourceError(f"{_text(self._peer)}: {error.strerror}") from error
            waited = True
            try:
                await _wait_readable(self._socket)
            except trio.ClosedResourceError:
                return b""

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes; receiving goes on. Checkpoint."""
        await _checkpoint()
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise trio.BrokenResourceError(f"{_text(self._peer)}: {error.strerror}") from error

    async def aclose(self) -> None:
        """Close; the kernel still delivers what was handed over. Checkpoint, closes even when cancelled."""
        self.abort()
        await _checkpoint()

    def abort(self) -> None:
        """Close at once, from synchronous code; a pending receive returns b"". May be called twice."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def give_up_after(self, seconds: float) -> None:
        """See the function of this name."""
        options = [(socket.SOL_SOCKET, "SO_KEEPALIVE", 1)]
        tcp = socket.IPPROTO_TCP
        options += [(tcp, "TCP_KEEPIDLE", 1), (tcp, "TCP_KEEPINTVL", 1), (tcp, "TCP_KEEPCNT", max(1, int(seconds)))]
        options.append((tcp, "TCP_USER_TIMEOUT", int(seconds * 1000)))
        for level, name, value in options:
            option = getattr(socket, name, None)  # macOS has not all of them
            if option is not None:
                try:
                    self._socket.setsockopt(level, option, value)
                except OSError:
                    return  # gone already: the next send or receive says so


def give_up_after(stream: Stream, seconds: float) -> None:
    """Let a connection break when what was sent stays unacknowledged, or probes of an idle one unanswered, for about
    so long: a host that lost its power closes nothing. Where the stream is no TCP connection, nothing is done.
    """
    if isinstance(stream, TcpStream):
        stream.give_up_after(seconds)


class TcpListener:
    """`runtime.model.Listener` over one listening socket."""

    __slots__ = ("_address", "_buffer", "_socket")

    def __init__(self, listening: socket.socket, buffer: memoryview) -> None:
        self._socket = listening
        self._buffer = buffer
        self._address = _pair(listening.getsockname())

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    async def accept(self) -> Stream:
        """The next connection. Checkpoint, cancel-safe. Raises trio.ClosedResourceError after `aclose`.

        Running out of descriptors or memory is waited out; a connection that died in the backlog is skipped.
        """
        await _checkpoint()
        while True:
            try:
                connected, _ = self._socket.accept()
            except BlockingIOError:
                await _wait_readable(self._socket)
                continue
            except OSError as error:
                if self._socket.fileno() < 0:
                    raise trio.ClosedResourceError(f"listener {_text(self._address)} is closed") from None
                if error.errno in _OUT_OF_RESOURCES:
                    await trio.sleep(_OVERLOAD_PAUSE_S)
                else:
                    await _checkpoint()
                continue
            try:
                return TcpStream(connected, self._buffer)
            except OSError:  # gone again between accept and here
                connected.close()
                await _checkpoint()

    async def aclose(self) -> None:
        """Stop listening; a pending `accept` raises. Checkpoint, closes even when cancelled."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await _checkpoint()


class TcpNet:
    """`runtime.model.Net` over TCP, IPv4 and IPv6. One object per trio loop."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_RECEIVE_BUFFER))

    async def dial(self, host: str, port: int, *, timeout: float = 3.0) -> Stream:
        """Connect, trying each address of `host` in turn; `timeout` in seconds for all of it together.

        Raises ConnectionRefusedError where nobody listens, another OSError, or trio.TooSlowError. An OSError's
        strerror is a sentence that names host:port. Checkpoint, cancel-safe.
        """
        problem: OSError | None = None
        with trio.fail_after(timeout):
            try:
                found = await _resolve(host, port)
            except OSError as error:
                found, problem = [], error
            for family, address in found:
                try:
                    return await self._connect(family, address)
                except OSError as error:
                    problem = error
        code = problem.errno if problem is not None and problem.errno is not None else errno.EADDRNOTAVAIL
        reason = problem.strerror if problem is not None else "no address"
        # OSError picks the fitting subclass (ConnectionRefusedError ...) from the code by itself.
        raise OSError(code, f"cannot connect to {_text((host, port))}: {reason}") from problem

    async def _connect(self, family: int, address: tuple[str, int]) -> Stream:
        connecting = socket.socket(family, socket.SOCK_STREAM)
        try:
            connecting.setblocking(False)
            code = connecting.connect_ex(address)
            if code == errno.EINPROGRESS:
                await _wait_writable(connecting)
                code = connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            else:
                await _checkpoint()
            if code:
                raise OSError(code, os.strerror(code))
            if connecting.getsockname() == connecting.getpeername():
                # TCP may connect an ephemeral port to itself while nobody listens there.
                raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself: nobody listens there")
            return TcpStream(connecting, self._buffer)
        except BaseException:  # cancellation included: the descriptor must not leak
            connecting.close()
            raise

    async def listen(self, host: str, port: int) -> Listener:
        """Listen on the first address of `host`; port 0 takes a free one. Checkpoint.

        Raises OSError, with host:port in its text, where the address cannot be had.
        """
        try:
            family, address = (await _resolve(host or "0.0.0.0", port))[0]
            listening = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {_text((host, port))}: {error.strerror}") from error
        try:
            listening.setblocking(False)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            raise OSError(error.errno, f"cannot listen on {_text((host, port))}: {error.strerror}") from error
        return TcpListener(listening, self._buffer)


async def _resolve(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """(family, socket address) pairs of a host, IPv4 first. Numeric addresses take no thread."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        await _checkpoint()
        return [(family, (host, port))]
    found = await trio.to_thread.run_sync(
        socket.getaddrinfo, host, port, socket.AF_UNSPEC, socket.SOCK_STREAM, abandon_on_cancel=True
    )
    wanted = [
        (int(family), (str(address[0]), int(address[1])))
        for family, _, _, _, address in found
        if family in (socket.AF_INET, socket.AF_INET6)
    ]
    return sorted(wanted, key=lambda pair: pair[0] != socket.AF_INET)


def _bytes_view(part: Buffer) -> memoryview:
    return memoryview(part).cast("B")


def _pair(address: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    return address[0], address[1]


def _text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
