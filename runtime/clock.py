"""The real clock: wall time for stamps, trio's time for everything that waits."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import trio


class RealClock:
    """`runtime.model.Clock` over the operating system and trio.

    `monotonic` is trio's own time, so deadlines computed from it fit trio's cancel scopes (and trio's test clocks).
    """

    __slots__ = ("monotonic",)

    def __init__(self) -> None:
        # Bound once: the hot paths call it without another Python frame in between.
        self.monotonic = trio.current_time

    def wall_ms(self) -> int:
        """Milliseconds since the Unix epoch. May step."""
        return time.time_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        """Checkpoint; cancel-safe."""
        await trio.sleep(seconds)

    async def sleep_until(self, deadline: float) -> None:
        """Checkpoint; cancel-safe. `deadline` in seconds of `monotonic`."""
        await trio.sleep_until(deadline)

    def move_on_at(self, deadline: float) -> AbstractContextManager[trio.CancelScope]:
        """Cancels its body at `deadline` (seconds of `monotonic`) and carries on."""
        return trio.move_on_at(deadline)

    def move_on_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """Cancels its body after `seconds` and carries on."""
        return trio.move_on_after(seconds)

    def fail_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """Raises trio.TooSlowError when its body took longer than `seconds`."""
        return trio.fail_after(seconds)
