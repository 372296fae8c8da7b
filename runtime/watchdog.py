"""Tells which step held the loop.

A thread looks at the loop, every half threshold while it is busy and every two thresholds while it idles (a look
costs 0.1 ms, and an idle broker should cost nothing). The loop's only part is one counter, moved once per pass over
its ready tasks, not per task: 2 us per pass. A pass that outlasts the threshold is reported once, with the place in
the code where it was seen and its whole length; one that began in an idle loop may go unseen below three thresholds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import trio
from attrs import frozen

from runtime.logs import Logger

STALL_MS = 50
_BUSY_PASSES = 10  # between two looks; heartbeats alone stay below
_WAITING_FUNCTION = "get_events"  # trio's name for its wait on epoll or kqueue


@frozen
class Stall:
    """One pass of the loop that took too long."""

    held_ms: int
    where: str
    """Innermost frames first: file:line function."""


class _Passes(trio.abc.Instrument):
    """Counts the loop's passes. Only this one hook, so trio calls nothing per task."""

    def __init__(self) -> None:
        self.count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


class Watchdog:
    """Watches the trio loop of the thread that calls `watch`."""

    def __init__(self, log: Logger, *, stall_ms: int = STALL_MS) -> None:
        self._log = log
        self._stall_s = stall_ms / 1000
        self._passes = _Passes()
        self._stop = threading.Event()
        self.stalls = 0
        self.last: Stall | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch while the block runs; enter it inside the trio loop."""
        trio.lowlevel.add_instrument(self._passes)
        watcher = threading.Thread(target=self._look, args=(threading.get_ident(),), name="loop watchdog", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._stop.set()
            watcher.join()
            trio.lowlevel.remove_instrument(self._passes)

    def _look(self, loop_thread: int) -> None:
        passes = self._passes
        seen = passes.count
        since = time.perf_counter()
        where = ""
        pause = self._stall_s / 2
        while not self._stop.wait(pause):
            now = time.perf_counter()
            count = passes.count
            if count != seen:
                if where:
                    self._report(now - since, where)
                pause = self._stall_s * (0.5 if count - seen > _BUSY_PASSES else 2)
                seen, since, where = count, now, ""
                continue
            frame = sys._current_frames().get(loop_thread)
            if frame is None or frame.f_code.co_name == _WAITING_FUNCTION:
                if where:
                    self._report(now - since, where)
                since, where = now, ""
                pause = self._stall_s * 2
                continue
            pause = self._stall_s / 2
            if not where and now - since >= self._stall_s:
                where = _describe(frame)

    def _report(self, held_s: float, where: str) -> None:
        self.stalls += 1
        self.last = Stall(int(held_s * 1000), where)
        self._log.warning("loop stalled", held_ms=self.last.held_ms, where=where)


def _describe(frame: FrameType | None) -> str:
    """The innermost frames, without trio's own below them."""
    steps: list[str] = []
    while frame is not None and len(steps) < 6:
        code = frame.f_code
        if "/trio/_core/" in code.co_filename:
            break
        name = "/".join(code.co_filename.split("/")[-2:])
        steps.append(f"{name}:{frame.f_lineno} {code.co_qualname}")
        frame = frame.f_back
    return " < ".join(steps)
