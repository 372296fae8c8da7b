"""Measurements over HTTP: what a scraper, a curious browser and a port scanner get."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from runtime import metrics
from runtime.logs import get_logger
from runtime.model import Stream
from runtime.real import real_env

PAGE = b"dledger_term 7\n"


@asynccontextmanager
async def scraper() -> AsyncIterator[Stream]:
    env = real_env()
    listener = await env.net.listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(metrics.serve_metrics, env, listener, lambda: PAGE, get_logger("test"))
        stream = await env.net.dial(*listener.address)
        yield stream
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def answer(stream: Stream, request: bytes, until: bytes) -> bytes:
    await stream.send_parts([request])
    received = b""
    with trio.fail_after(5):
        while not received.endswith(until):
            data = await stream.receive_some()
            received += data
            if not data:
                return received
    return received


async def test_two_scrapes_on_one_connection() -> None:
    async with scraper() as stream:
        for _ in range(2):
            got = await answer(stream, b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n", PAGE)
            assert got.startswith(b"HTTP/1.1 200")
            assert b"content-type: text/plain; version=0.0.4" in got
            assert got.endswith(b"\r\n\r\n" + PAGE)


async def test_head_has_the_length_and_no_body() -> None:
    async with scraper() as stream:
        got = await answer(stream, b"HEAD /metrics HTTP/1.1\r\nHost: here\r\n\r\n", b"\r\n\r\n")
        assert b"content-length: %d" % len(PAGE) in got


@pytest.mark.parametrize(
    ("request_line", "status"), [(b"GET / HTTP/1.1", b"404"), (b"DELETE /metrics HTTP/1.1", b"405")]
)
async def test_nothing_else_is_served(request_line: bytes, status: bytes) -> None:
    async with scraper() as stream:
        got = await answer(stream, request_line + b"\r\nHost: here\r\n\r\n", b"\n")
        assert got.split()[1] == status


async def test_what_is_no_http_is_closed() -> None:
    async with scraper() as stream:
        assert await answer(stream, b"\x00\x01\x02garbage\r\n\r\n", b"never") == b""


async def test_an_endless_header_is_not_kept() -> None:
    async with scraper() as stream:
        endless = b"GET /metrics HTTP/1.1\r\nX: " + b"y" * (metrics.REQUEST_BYTES_MAX + 8192)
        try:
            got = await answer(stream, endless, b"never")
        except trio.BrokenResourceError:
            return  # closed with bytes of ours unread: a reset
        assert got == b""
