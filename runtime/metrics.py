"""Measurements over HTTP, in Prometheus' text format: GET /metrics, and nothing else.

One connection at a time per client is enough for a scraper; requests are small, and so is what they may make us keep.
"""

from __future__ import annotations

from collections.abc import Callable

import h11
import trio

from runtime.logs import Logger
from runtime.model import Env, Listener, Stream

CONNECTIONS_MAX = 16
IDLE_SECONDS_MAX = 60.0
REQUEST_BYTES_MAX = 16 * 1024
RECEIVE_BYTES = 4096
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Render = Callable[[], bytes]


async def serve_metrics(
    env: Env,
    listener: Listener,
    render: Render,
    log: Logger,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer scrapers until cancelled. `render` makes the page, synchronously and without waiting. Checkpoint.

    Closes `listener` at the end. A client that speaks something else than HTTP costs one line of the debug log.
    """
    places = trio.Semaphore(CONNECTIONS_MAX)
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await places.acquire()
                nursery.start_soon(_serve_one, env, await listener.accept(), render, log, places)
    finally:
        with trio.CancelScope(shield=True):
            await listener.aclose()


async def _serve_one(env: Env, stream: Stream, render: Render, log: Logger, places: trio.Semaphore) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES_MAX)
    try:
        while connection.our_state is not h11.MUST_CLOSE:
            with env.clock.fail_after(IDLE_SECONDS_MAX):
                request = await _next_request(connection, stream)
                if request is None:
                    return
                await stream.send_parts([_answer(connection, request, render)])
            if connection.our_state is h11.DONE and connection.their_state is h11.DONE:
                connection.start_next_cycle()
    except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.TooSlowError) as error:
        log.debug("metrics connection ended", peer=stream.peer, reason=str(error) or "silent")
    finally:
        places.release()
        stream.abort()


async def _next_request(connection: h11.Connection, stream: Stream) -> h11.Request | None:
    """The next request with its body read and dropped; None at the end of the stream."""
    request = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(RECEIVE_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None


def _answer(connection: h11.Connection, request: h11.Request, render: Render) -> bytes:
    path = request.target.partition(b"?")[0]
    if path != b"/metrics":
        status, body = 404, b"only /metrics is served here\n"
    elif request.method not in (b"GET", b"HEAD"):
        status, body = 405, b"only GET\n"
    else:
        status, body = 200, render()
    headers = [("content-type", CONTENT_TYPE), ("content-length", str(len(body)))]
    parts = [
        connection.send(h11.Response(status_code=status, headers=headers)),
        connection.send(h11.Data(data=b"" if request.method == b"HEAD" else body)),
        connection.send(h11.EndOfMessage()),
    ]
    return b"".join(part for part in parts if part)
