"""Server, connection and client on real loopback sockets: pipelining, bounds, strangers, loss, back-off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from remoting.codes import FRAME_LIMIT_BYTES, RequestCode, ResponseCode
from remoting.command import Command, encode_command, encode_response
from remoting.connection import Connection, Limits
from remoting.errors import ConnectFailed, ConnectionLost, RequestTimeout, ResponseError
from remoting.frames import Frame, FrameReader, decode_frame
from remoting.pool import Client, open_client, parse_address
from remoting.server import serve
from runtime.model import Env
from runtime.testing import test_env as make_env
from runtime.testing import wait_until


class RecordingLog:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def debug(self, event: str, **fields: Any) -> None:
        pass

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))


class Handler:
    """Echoes the body; code 38 is never answered, code 28 answers 1 MiB, code 40 is asked back from the client."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.closed: list[Connection] = []
        self.batches: list[int] = []
        self.turns = 0
        self.flagged: list[Command] = []

    def on_open(self, connection: Connection) -> None:
        self.opened.append(connection)

    def on_close(self, connection: Connection) -> None:
        self.closed.append(connection)

    def on_frames(self, connection: Connection, frames: list[Frame]) -> None:
        self.batches.append(len(frames))
        for frame in frames:
            request = decode_frame(frame)
            if request.code == RequestCode.GET_CONSUMER_LIST_BY_GROUP or request.is_oneway:
                self.flagged.append(request)
            elif request.code == RequestCode.GET_BROKER_RUNTIME_INFO:
                connection.write(encode_response(request, 0, {"a": 1}, bytes(1024 * 1024)))
            elif request.code == RequestCode.GET_MAX_OFFSET:
                connection.write(encode_response(request, ResponseCode.SYSTEM_ERROR, remark="no such queue"))
            else:
                connection.write(encode_response(request, 0, {"n": request.ext.get("n", "")}, request.body))

    def turn(self) -> None:
        self.turns += 1


@asynccontextmanager
async def running_server(
    env: Env, limits: Limits | None = None
) -> AsyncIterator[tuple[Handler, str, RecordingLog, Callable[[], None]]]:
    handler, log = Handler(), RecordingLog()
    listener = await env.net.listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:

        async def run(task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            await serve(env, listener, handler, log=log, limits=limits, task_status=task_status)

        host, port = await nursery.start(run)
        yield handler, f"{host}:{port}", log, nursery.cancel_scope.cancel
        nursery.cancel_scope.cancel()


def ask(client: Client, code: int = 12, **fields: object) -> Command:
    return client.request(code, fields, b"body")


async def test_many_requests_in_flight_each_get_their_own_answer() -> None:
    env = make_env()
    async with running_server(env) as (handler, address, _log, _stop), open_client(env, log=RecordingLog()) as client:
        got: dict[int, str] = {}

        async def one(number: int) -> None:
            answer = await client.invoke(address, ask(client, n=number), 5.0)
            got[number] = answer.ext["n"]

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one, number)
        assert got == {number: str(number) for number in range(200)}
        assert len(handler.opened) == 1, "one connection per address"
        assert max(handler.batches) > 1, "frames of one read are handled together"
        assert handler.turns == len(handler.batches)


async def test_answer_codes_timeouts_and_refused_addresses_are_told_apart() -> None:
    env = make_env()
    async with running_server(env) as (_handler, address, _log, _stop), open_client(env, log=RecordingLog()) as client:
        with pytest.raises(ResponseError) as refused:
            await client.call(address, RequestCode.GET_MAX_OFFSET)
        assert refused.value.code == 1
        assert "no such queue" in str(refused.value)
        with pytest.raises(RequestTimeout):
            await client.invoke(address, ask(client, RequestCode.GET_CONSUMER_LIST_BY_GROUP), 0.05)
        # The connection is still good, and the late answer would be dropped.
        assert (await client.call(address, 12, {"n": True})).ext["n"] == "true"
        with pytest.raises(ConnectFailed):
            await client.invoke("127.0.0.1:1", ask(client), 1.0)
        with pytest.raises(ConnectFailed):
            await client.invoke("nonsense", ask(client), 1.0)


async def test_lost_connection_wakes_all_waiters_and_the_next_request_dials_again() -> None:
    env = make_env()
    async with running_server(env) as (handler, address, _log, _stop), open_client(env, log=RecordingLog()) as client:
        outcomes: list[str] = []

        async def wait_for_nothing() -> None:
            try:
                await client.invoke(address, ask(client, RequestCode.GET_CONSUMER_LIST_BY_GROUP), 30.0)
            except ConnectionLost:
                outcomes.append("lost")

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(wait_for_nothing)
            await wait_until(lambda: len(handler.flagged) == 5, what="five requests at the server")
            handler.opened[0].close("test")
        assert outcomes == ["lost"] * 5
        assert (await client.call(address, 12, {"n": 1})).ext == {"n": "1"}
        assert len(handler.opened) == 2
        assert handler.closed == [handler.opened[0]]


async def test_failed_dials_back_off_and_success_resets_them() -> None:
    env = make_env()
    listener = await env.net.listen("127.0.0.1", 0)
    port = listener.address[1]
    await listener.aclose()
    async with open_client(env, log=RecordingLog(), backoff_min_s=5.0, backoff_max_s=5.0) as client:
        with pytest.raises(ConnectFailed) as first:
            await client.connect(f"127.0.0.1:{port}")
        assert str(first.value) == f"cannot connect to 127.0.0.1:{port}: Connection refused"
        listener = await env.net.listen("127.0.0.1", port)
        with pytest.raises(ConnectFailed) as second:
            await client.connect(f"127.0.0.1:{port}")
        assert str(second.value) == str(first.value), "within the pause the old failure is repeated without a dial"
        await listener.aclose()


async def test_server_asks_the_client_on_the_same_connection() -> None:
    env = make_env()
    asked: list[Command] = []

    def on_request(_connection: Connection, command: Command) -> bytes | None:
        asked.append(command)
        return encode_response(command, 0, {"seen": command.ext["group"]}, b"state")

    async with (
        running_server(env) as (handler, address, _log, _stop),
        open_client(env, log=RecordingLog(), on_request=on_request) as client,
    ):
        await client.call(address, 12)
        server_side = handler.opened[0]
        answer = await server_side.request(Command(307, 0, ext={"group": "g"}), 5.0)
        assert answer.ext == {"seen": "g"}
        assert bytes(answer.body) == b"state"
        server_side.send_oneway(Command(40, 0, ext={"group": "h"}))
        await wait_until(lambda: len(asked) == 2, what="the one-way request")
        assert asked[1].is_oneway
        # Requests and answers still share the connection.
        assert (await client.call(address, 12, {"n": 7})).ext == {"n": "7"}


async def test_client_without_a_handler_answers_code_3() -> None:
    env = make_env()
    async with running_server(env) as (handler, address, _log, _stop), open_client(env, log=RecordingLog()) as client:
        await client.call(address, 12)
        answer = await handler.opened[0].request(Command(307, 0), 5.0)
        assert (answer.code, answer.remark) == (3, " request type 307 not supported")


async def test_oneway_requests_arrive_and_are_not_answered() -> None:
    env = make_env()
    async with running_server(env) as (handler, address, _log, _stop), open_client(env, log=RecordingLog()) as client:
        await client.invoke_oneway(address, ask(client, 15))
        await wait_until(lambda: len(handler.flagged) == 1, what="the one-way request")
        assert handler.flagged[0].code == 15


STRANGERS = {
    "tls": (bytes.fromhex("1603010200010001fc0303") + bytes(100), "TLS"),
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
    "one byte of tls": (b"\x16", "TLS"),
    "oversized": ((FRAME_LIMIT_BYTES + 1).to_bytes(4) + bytes(20), "over the limit"),
    "huge": (b"\xff\xff\xff\xff", "no RocketMQ frame"),
    "header longer than frame": (bytes.fromhex("00000010 000000ff") + bytes(100), "does not fit"),
    "no json": (bytes.fromhex("00000010 0000000c") + b"x" * 12, "JSON header"),
    "unknown serialization": (bytes.fromhex("00000010 0700000c") + b"x" * 12, "unknown serialization"),
    "binary header cut short": (bytes.fromhex("00000008 01000004 00000000"), "ROCKETMQ header"),
}


@pytest.mark.parametrize("name", STRANGERS)
async def test_strangers_get_one_log_line_and_a_closed_connection(name: str) -> None:
    data, expected = STRANGERS[name]
    env = make_env()
    async with running_server(env) as (handler, address, log, _stop):
        stream = await env.net.dial(*parse_address(address))
        await stream.send_parts([data])
        with trio.fail_after(5):
            try:
                assert await stream.receive_some() == b""
            except trio.BrokenResourceError:
                pass
        await wait_until(lambda: len(handler.closed) == 1, what="the connection's end")
        assert len(log.lines) == 1
        assert expected in log.lines[0][1]["reason"]
        await stream.aclose()


async def test_good_frames_before_bad_bytes_are_still_handled() -> None:
    env = make_env()
    async with running_server(env) as (handler, address, _log, _stop):
        stream = await env.net.dial(*parse_address(address))
        good = encode_command(Command(12, 7, ext={"n": "1"}))
        await stream.send_parts([good, good, b"\xff" * 8])
        received = b""
        with trio.fail_after(5):
            while True:
                try:
                    data = await stream.receive_some()
                except trio.BrokenResourceError:
                    break
                if not data:
                    break
                received += data
        assert [decode_frame(frame).opaque for frame in FrameReader().cut(received)] == [7, 7]
        assert handler.batches == [2]
        await stream.aclose()


async def test_reading_stops_while_the_peer_does_not_take_its_answers() -> None:
    env = make_env()
    limits = Limits(outbox_bytes=1024 * 1024, outbox_close_bytes=1 << 30)
    async with running_server(env, limits) as (handler, address, _log, _stop):
        stream = await env.net.dial(*parse_address(address))
        request = encode_command(Command(RequestCode.GET_BROKER_RUNTIME_INFO, 1))
        wanted = 40

        sent = 0
        while handler.opened == [] or handler.opened[0].outbox_bytes <= 1024 * 1024:
            await stream.send_parts([request])
            sent += 1
            await wait_until(lambda expected=sent: sum(handler.batches) == expected, what="the request's handling")
        assert sent < wanted
        await stream.send_parts([request] * (wanted - sent))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sum(handler.batches) == sent, "nothing is read while answers wait"
        received = 0
        with trio.fail_after(20):
            while received < wanted * 1024 * 1024:
                received += len(await stream.receive_some())
        assert sum(handler.batches) == wanted
        await stream.aclose()


async def test_a_peer_that_never_reads_is_closed() -> None:
    env = make_env()
    limits = Limits(outbox_bytes=1 << 30, outbox_close_bytes=8 * 1024 * 1024)
    async with running_server(env, limits) as (handler, address, _log, _stop):
        stream = await env.net.dial(*parse_address(address))
        await stream.send_parts([encode_command(Command(RequestCode.GET_BROKER_RUNTIME_INFO, 1)) * 64])
        await wait_until(lambda: len(handler.closed) == 1, what="the connection's end")
        assert "does not read" in (handler.closed[0].closed_reason or "")
        await stream.aclose()


async def test_idle_connections_are_closed() -> None:
    env = make_env()
    async with running_server(env, Limits(idle_s=0.1)) as (handler, address, _log, _stop):
        stream = await env.net.dial(*parse_address(address))
        await wait_until(lambda: len(handler.closed) == 1, what="the idle connection's end")
        assert "idle" in (handler.closed[0].closed_reason or "")
        await stream.aclose()


async def test_too_many_connections_are_refused() -> None:
    env = make_env()
    async with running_server(env, Limits(connections=1)) as (handler, address, log, _stop):
        first = await env.net.dial(*parse_address(address))
        await wait_until(lambda: len(handler.opened) == 1)
        second = await env.net.dial(*parse_address(address))
        await wait_until(lambda: len(log.lines) == 1)
        assert len(handler.opened) == 1
        await first.aclose()
        await second.aclose()


async def test_cancelled_request_leaves_the_connection_usable() -> None:
    env = make_env()
    async with running_server(env) as (_handler, address, _log, _stop), open_client(env, log=RecordingLog()) as client:
        with trio.move_on_after(0.02) as scope:
            await client.invoke(address, ask(client, RequestCode.GET_CONSUMER_LIST_BY_GROUP), 30.0)
        assert scope.cancelled_caught
        assert (await client.call(address, 12, {"n": 3})).ext == {"n": "3"}


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:0", "host:65536", "host:x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("10.0.0.1:9876") == ("10.0.0.1", 9876)
    assert parse_address("[::1]:9876") == ("::1", 9876)
