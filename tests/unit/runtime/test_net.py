import errno
import socket
from collections.abc import AsyncIterator
from unittest import mock

import pytest
import trio
import trio.testing

from runtime.model import Listener, Net, Stream
from runtime.net import TcpStream
from runtime.testing import test_env


class ClosingNet:
    """The real network, which closes after the test whatever the test opened (an unclosed socket fails it)."""

    def __init__(self) -> None:
        self._net = test_env().net
        self.opened: list[TcpStream] = []
        self.listeners: list[Listener] = []

    async def dial(self, host: str, port: int, *, timeout: float = 3.0) -> Stream:
        return await self._net.dial(host, port, timeout=timeout)

    async def listen(self, host: str, port: int) -> Listener:
        listener = await self._net.listen(host, port)
        self.listeners.append(listener)
        return listener


@pytest.fixture
async def net(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ClosingNet]:
    closing = ClosingNet()
    original = TcpStream.__init__

    def remembered(self: TcpStream, connected: socket.socket, buffer: memoryview) -> None:
        original(self, connected, buffer)
        closing.opened.append(self)

    monkeypatch.setattr(TcpStream, "__init__", remembered)
    yield closing
    for stream in closing.opened:
        stream.abort()
    for listener in closing.listeners:
        await listener.aclose()


async def pair(net: Net, host: str = "127.0.0.1") -> tuple[Stream, Stream, Listener]:
    listener = await net.listen(host, 0)
    dialled = await net.dial(*listener.address)
    return dialled, await listener.accept(), listener


async def test_bytes_go_both_ways_until_the_end_of_stream(net: ClosingNet) -> None:
    client, server, listener = await pair(net)
    assert client.peer == server.local == listener.address
    assert server.peer == client.local
    await client.send_parts([b"abc", bytearray(b"de"), memoryview(b"f"), b""])
    assert await server.receive_some() == b"abcdef"
    assert server.send_nowait([b"x"]) == 1
    assert server.send_nowait([b"y", b"z"]) == 2
    assert await client.receive_some(1) == b"x"
    assert await client.receive_some() == b"yz"
    await client.send_eof()
    assert await server.receive_some() == b""
    await server.send_parts([b"still here"])
    assert await client.receive_some() == b"still here"
    await server.aclose()
    assert await client.receive_some() == b""


async def test_send_parts_outlasts_a_full_socket_buffer(net: ClosingNet) -> None:
    client, server, _ = await pair(net)
    parts = [bytes([number % 251]) * (number * 7 % 5000) for number in range(4000)]
    received = bytearray()

    async def receive() -> None:
        while data := await server.receive_some():
            received.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await client.send_parts(parts)
        await client.aclose()
    assert received == b"".join(parts)


async def test_send_nowait_takes_what_fits(net: ClosingNet) -> None:
    client, server, _ = await pair(net)
    block = b"x" * 1_000_000
    taken = 0
    while n := client.send_nowait([block]):
        taken += n
    assert taken > 0
    received = 0
    while received < taken:
        received += len(await server.receive_some())
    assert received == taken


async def test_receiving_is_a_checkpoint_and_loses_nothing_when_cancelled(net: ClosingNet) -> None:
    client, server, _ = await pair(net)
    await client.send_parts([b"abc"])
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.receive_some()
    assert scope.cancelled_caught
    assert await server.receive_some() == b"abc"
    await client.send_parts([b"def"])
    with trio.testing.assert_checkpoints():
        assert await server.receive_some() == b"def"


async def test_abort_ends_a_pending_receive_and_breaks_later_sends(net: ClosingNet) -> None:
    client, _server, _ = await pair(net)
    got: list[bytes] = []

    async def receive() -> None:
        got.append(await client.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        client.abort()
        client.abort()
    assert got == [b""]
    assert await client.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        client.send_nowait([b"x"])
    with pytest.raises(trio.BrokenResourceError):
        await client.send_parts([b"x"])
    with pytest.raises(trio.BrokenResourceError):
        await client.send_eof()


async def test_abort_breaks_a_pending_send(net: ClosingNet) -> None:
    client, _server, _ = await pair(net)
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await client.send_parts([b"x" * 50_000_000])

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        client.abort()


async def test_nobody_listening_is_told_apart(net: ClosingNet) -> None:
    listener = await net.listen("127.0.0.1", 0)
    host, port = listener.address
    await listener.aclose()
    with pytest.raises(ConnectionRefusedError, match=f"{host}:{port}"):
        await net.dial(host, port)


async def test_a_name_nobody_knows_is_a_sentence_with_the_name(net: ClosingNet) -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with mock.patch("socket.getaddrinfo", side_effect=unknown), pytest.raises(OSError) as caught:
        await net.dial("no.such.host", 9876)
    assert caught.value.strerror == "cannot connect to no.such.host:9876: Name or service not known"


async def never(_socket: socket.socket) -> None:
    await trio.sleep_forever()


async def test_dialling_gives_up_in_time(net: ClosingNet) -> None:
    with (
        mock.patch("runtime.net._wait_writable", never),
        mock.patch("socket.socket.connect_ex", return_value=errno.EINPROGRESS),
        pytest.raises(trio.TooSlowError),
    ):
        await net.dial("127.0.0.1", 1, timeout=0.01)


async def test_a_taken_port_is_named(net: ClosingNet) -> None:
    listener = await net.listen("127.0.0.1", 0)
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{listener.address[1]}: ") as caught:
        await net.listen(*listener.address)
    assert caught.value.errno == errno.EADDRINUSE


async def test_a_port_is_free_again_after_closing_with_connections(net: ClosingNet) -> None:
    client, server, listener = await pair(net)
    await server.aclose()  # the side that closes first keeps the port in TIME_WAIT
    await listener.aclose()
    again = await net.listen(*listener.address)
    assert again.address == listener.address
    await client.aclose()


async def test_names_are_resolved(net: ClosingNet) -> None:
    client, server, listener = await pair(net, "localhost")
    await client.send_parts([b"x"])
    assert await server.receive_some() == b"x"
    await listener.aclose()


async def test_ipv6(net: ClosingNet) -> None:
    try:
        client, server, _ = await pair(net, "::1")
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
        pytest.skip("this machine has no IPv6 loopback address")
    assert client.peer[0] == server.local[0] == "::1"


async def test_closing_a_listener_wakes_accept(net: ClosingNet) -> None:
    listener = await net.listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        await listener.aclose()
        await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_accept_waits_out_a_lack_of_descriptors(net: ClosingNet) -> None:
    listener = await net.listen("127.0.0.1", 0)
    client = await net.dial(*listener.address)
    real = socket.socket.accept
    failures = [OSError(errno.EMFILE, "too many"), OSError(errno.ECONNABORTED, "gone")]

    def accept(self: socket.socket) -> object:
        if failures:
            raise failures.pop(0)
        return real(self)

    with mock.patch("socket.socket.accept", accept):
        server = await listener.accept()
    assert not failures
    assert server.peer == client.local
    assert isinstance(server, TcpStream)
