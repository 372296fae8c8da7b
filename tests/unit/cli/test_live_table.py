"""What `up` draws on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import trio
from rich.console import Console
from trio.testing import MockClock

from cli.live import LiveView
from cluster.config import default_text, parse
from cluster.status import NodeStatus
from runtime.testing import test_env


async def test_the_table_of_nodes_fits_a_terminal_of_80_columns(tmp_path: Path, autojump_clock: MockClock) -> None:
    def status(name: str, role: str, messages: int) -> NodeStatus:
        return NodeStatus(
            name=name,
            group="broker-a",
            kind="broker",
            listen="127.0.0.1:10911",
            state="up",
            role=role,
            term=12,
            last_index=1_234_567,
            committed_index=1_234_500,
            applied_index=1_234_500,
            lag_entries=1_000,
            messages_in=messages,
            messages_out=messages,
        )

    env, shown = test_env(tmp_path), io.StringIO()
    view = LiveView(env, parse(default_text(), "cluster.toml"), "quorate up")
    view._console = Console(file=shown, width=80)
    view._draw([status("n0", "leader", 0), status("n1", "follower", 0)])
    autojump_clock.jump(1)
    view._console.print(view._draw([status("n0", "leader", 38_000), status("n1", "follower", 9)]))
    await trio.lowlevel.checkpoint()
    heading, leader, follower = (" ".join(line.split()) for line in shown.getvalue().splitlines()[:3])
    assert heading == "broker-a role term uncommitted committed applied lag in/s out/s"
    assert leader == "n0 :10911 ★ leader 12 67 1,234,500 1,234,500 1,000 38,000 38,000"
    assert follower == "n1 :10911 follower 12 67 1,234,500 1,234,500 1,000 9 9"
