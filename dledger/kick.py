"""Wakes the one task that waits for work: a kick that finds nobody waiting is kept for the next wait.

As a `trio.Event` that is made anew after each wait, without the making: turns of the driver kick several services each.
"""

from __future__ import annotations

import trio


class Kick:
    """Waited for by one task, given by anybody on the trio thread."""

    __slots__ = ("_is_given", "_task")

    def __init__(self) -> None:
        self._is_given = False
        self._task: trio.lowlevel.Task | None = None

    def give(self) -> None:
        """Wake who waits; else the next `wait` returns at once."""
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)
        else:
            self._is_given = True

    def clear(self) -> None:
        """Forget a kick that was given: what it was for is about to be done."""
        self._is_given = False

    async def wait(self) -> None:
        """Until a kick is given, and take it. Checkpoint; a cancelled wait takes none."""
        if self._is_given:
            await trio.lowlevel.checkpoint()
            self._is_given = False
        else:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
