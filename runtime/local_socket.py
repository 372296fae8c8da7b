"""A Unix socket for words between the supervisor of a data folder and the `quorate` verbs. One JSON line each way."""

from __future__ import annotations

import errno
import json
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

_SOCKET_PATH_BYTES_MAX = 100
"""`sun_path` holds 108 bytes on Linux and 104 on macOS."""
_OWN_FOLDER_PREFIX = "quorate-socket-"


def socket_path(folder: str, name: str) -> str:
    """A path for a Unix socket: in `folder` where it is short enough, else in a new private temporary folder."""
    wanted = str(Path(folder, name))
    if len(wanted.encode()) <= _SOCKET_PATH_BYTES_MAX:
        return wanted
    return str(Path(tempfile.mkdtemp(prefix=_OWN_FOLDER_PREFIX), name))


def _remove_socket(path: str, *, with_folder: bool) -> None:
    """Remove a Unix socket, and at the end its folder where `socket_path` made one for it."""
    try:
        if Path(path).is_socket():
            Path(path).unlink()
        folder = Path(path).parent
        if with_folder and folder.name.startswith(_OWN_FOLDER_PREFIX) and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def _restrict_to_this_user(path: str) -> None:
    Path(path).chmod(0o600)


async def serve_local(
    path: str,
    answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    *,
    connections_max: int = 16,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer one JSON line per connection on a Unix socket that only this user may open, until cancelled."""
    _remove_socket(path, with_folder=False)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await listening.bind(path)
        _restrict_to_this_user(path)
        listening.listen(connections_max)
    except OSError:
        listening.close()
        raise
    limit = trio.CapacityLimiter(connections_max)

    async def converse(stream: trio.SocketStream) -> None:
        async with stream, limit:
            with trio.move_on_after(60):
                try:
                    line = await _read_line(stream)
                    request = json.loads(line)
                    reply = await answer(request) if isinstance(request, dict) else {"error": "not a JSON object"}
                    await stream.send_all(json.dumps(reply).encode() + b"\n")
                except (trio.BrokenResourceError, ValueError):
                    return  # the caller left or spoke another language: nothing to tell it

    try:
        await trio.serve_listeners(
            converse, [trio.SocketListener(listening)], task_status=_started_without_value(task_status)
        )
    finally:
        _remove_socket(path, with_folder=True)


class _started_without_value:
    """`serve_listeners` reports its listeners; our caller wants to know only that it listens."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status = status

    def started(self, value: object = None) -> None:
        self._status.started()


async def _read_line(stream: trio.SocketStream) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        chunk = await stream.receive_some(65_536)
        if not chunk or len(data) > 65_536:
            raise ValueError("no complete line")
        data += chunk
    return data


async def ask_local(path: str, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """One request to `serve_local`. Checkpoint; cancel-safe.

    Raises OSError (nobody there), ValueError (no answer), trio.TooSlowError.
    """
    with trio.fail_after(timeout_s):
        stream = await trio.open_unix_socket(path)
        async with stream:
            try:
                await stream.send_all(json.dumps(request).encode() + b"\n")
                reply = json.loads(await _read_line(stream))
            except trio.BrokenResourceError as error:
                raise ValueError("connection closed without an answer") from error
    if not isinstance(reply, dict):
        raise ValueError("not a JSON object")
    return reply
