"""Requests that must wait for something (a client's answer, a disk): a bounded number of them, owned by the node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from broker.failures import UNEXPECTED, FailureLog
from remoting.command import Command

JOBS_MAX: Final = 256


class Jobs:
    """Starts at most `limit` jobs at once in the node's nursery."""

    def __init__(self, failures: FailureLog, limit: int = JOBS_MAX) -> None:
        self._failures = failures
        self._nursery: trio.Nursery | None = None
        self._limit = limit
        self.running = 0

    def attach(self, nursery: trio.Nursery) -> None:
        """Jobs run in this nursery from now on."""
        self._nursery = nursery

    def start(self, job: Callable[..., Awaitable[None]], request: Command, conn: Any, *args: Any) -> bool:
        """Run `job(request, conn, *args)`, which answers.

        False when too many run already, or the node is not running: answer SYSTEM_BUSY.
        """
        if self._nursery is None or self.running >= self._limit:
            return False
        self.running += 1
        self._nursery.start_soon(self._run, job, request, conn, args)
        return True

    async def _run(
        self, job: Callable[..., Awaitable[None]], request: Command, conn: Any, args: tuple[Any, ...]
    ) -> None:
        try:
            await job(request, conn, *args)
        except UNEXPECTED as error:
            self._failures.answer(request, conn, error)
            conn.flush()
        finally:
            self.running -= 1
