"""What `quorate serve` puts around a node."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from cli import serve
from runtime.real import real_env


class HoldingService:
    """Ready at once; then it keeps the loop for a third of a second, and ends."""

    async def run(self, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        time.sleep(0.35)  # noqa: ASYNC251
        for _ in range(20):
            await trio.sleep(0.02)

    async def stop(self, drain_s: float) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_step_that_holds_the_loop_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "_service", lambda env, assignment: HoldingService())
    assignment: Any = SimpleNamespace(node=SimpleNamespace(name="n0"), events=None, supervisor_pid=None)
    with caplog.at_level(logging.WARNING):
        await serve._run(real_env(), assignment)
    lines = [record.getMessage() for record in caplog.records]
    assert any("loop stalled" in line and "HoldingService.run" in line for line in lines), lines
