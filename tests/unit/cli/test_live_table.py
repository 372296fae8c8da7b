"""What `up` draws on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import trio
from rich.console import Console

from cli.live import LiveView
from cluster.config import default_text, parse
from cluster.status import NodeStatus
from runtime.testing import test_env


async def test_the_table_of_nodes_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    def status(name: str, role: str) -> NodeStatus:
        return NodeStatus(
            name=name,
            group="broker-a",
            kind="broker",
            listen="127.0.0.1:10911",
            state="up",
            role=role,
            term=12,
            last_index=123_456,
            committed_index=123_450,
            applied_index=123_450,
            lag_entries=1_000,
        )

    view = LiveView(test_env(tmp_path), parse(default_text(), "cluster.toml"), "quorate up")
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    await trio.lowlevel.checkpoint()
    console.print(view._draw([status("n0", "leader"), status("n1", "follower")]))
    heading, leader, follower = (" ".join(line.split()) for line in shown.getvalue().splitlines()[:3])
    assert heading == "broker-a role term uncommitted committed applied lag in/s out/s"
    assert leader == "n0 :10911 ★ leader 12 6 123,450 123,450 1,000 - -"
    assert follower == "n1 :10911 follower 12 6 123,450 123,450 1,000 - -"
