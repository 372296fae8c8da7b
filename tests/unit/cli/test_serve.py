"""What `quorate serve` puts around a node."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from cli import serve
from cluster.config import parse
from cluster.layout import Layout
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


DIALLED = """
[[namesrv]]
listen = "127.0.0.1:9876"

[[group]]
name = "broker-a"
[[group.node]]
name = "n0"
listen = "127.0.0.1:10911"
peer = "127.0.0.1:40911"
dial = { n1 = "127.0.0.1:7001" }
[[group.node]]
name = "n1"
listen = "127.0.0.1:10912"
peer = "127.0.0.1:40912"
dial = { n2 = "127.0.0.1:7002" }
[[group.node]]
name = "n2"
listen = "127.0.0.1:10913"
peer = "127.0.0.1:40913"
"""


def test_nodes_that_dial_each_other_differently_are_one_cluster() -> None:
    config = parse(DIALLED, "cluster.toml")
    groups = [
        serve.broker_config(
            serve.Assignment(config=config, node=config.find(name), layout=Layout("/nowhere"), is_format_allowed=True)
        ).group
        for name in ("n0", "n1", "n2")
    ]
    assert groups[0].dial == {"n1": ("127.0.0.1", 7001)}
    assert len({group.effective_cluster_uuid for group in groups}) == 1
    assert len({group.group_uuid for group in groups}) == 1


def test_a_node_that_joins_after_a_founder_moved_is_told_which_cluster_it_is() -> None:
    """It would derive another identity than the one the others were formatted with."""

    def uuid_of(text: str) -> str:
        config = parse(text, "cluster.toml")
        assignment = serve.Assignment(
            config=config, node=config.find("n1"), layout=Layout("/nowhere"), is_format_allowed=False
        )
        return serve.broker_config(assignment).group.effective_cluster_uuid

    founded = uuid_of(DIALLED)
    moved = DIALLED.replace("127.0.0.1:40911", "127.0.0.1:50911")
    assert uuid_of(moved) != founded
    assert uuid_of(moved.replace('name = "broker-a"', f'name = "broker-a"\nidentity = "{founded}"')) == founded
