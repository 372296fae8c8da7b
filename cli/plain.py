"""`up` where stdout is no terminal: one line per step and event. And as JSON lines into the supervisor's log."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import attrs
import click
import trio

from cluster.config import ClusterConfig, promise_of
from cluster.supervisor import Event, Supervisor
from runtime.logs import RotatingFile

QUIET = frozenset({"started", "all_ready"})
"""Kinds that make no line of their own."""


def clock_time(at_ms: int) -> str:
    """12:04:11, local time."""
    return datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%H:%M:%S")


def promise(config: ClusterConfig) -> str:
    """What an acknowledgement means in this cluster (design §3: `up` prints it); a line for each different promise."""
    return "\n ".join(dict.fromkeys(promise_of(group.flush, len(group.founders)) for group in config.groups))


def hints(config: ClusterConfig) -> str:
    """What to type next, and what to paste."""
    namesrv = ";".join(config.namesrv_addresses())
    return f'try: quorate produce orders "hello" · quorate kill leader · clients: {namesrv}'


def ready_lines(config: ClusterConfig, document: dict[str, Any]) -> str:
    """After `up --detach`."""
    lines = [f"{node['name']:6} {node['listen']:21} pid {node['pid']}" for node in document["nodes"]]
    notice = [f"! {document['notice']}; see quorate doctor"] if "notice" in document else []
    return "\n".join(
        [*lines, *notice, promise(config), hints(config), f"stop it: quorate down --data {document['data']}"]
    )


def step_line(config: ClusterConfig, event: Event, started_ms: int) -> str:
    """A tick for something that came up."""
    node = config.find(event.node) if event.node is not None else None
    if event.kind == "leader":
        text = f"leader elected: {event.node}, {event.text.partition(', ')[2]}"
    elif node is not None and node.kind == "namesrv":
        text = f"name server   {node.listen}"
    elif node is not None:
        text = f"{node.group} {node.name:5} {node.listen}   raft :{node.peer.port if node.peer else ''}"
    else:
        text = event.text
    return f" ✔ {text:60} {(event.at_ms - started_ms) / 1000:.1f} s"


class PlainView:
    """Lines on stdout."""

    def __init__(self, config: ClusterConfig, head: str) -> None:
        self._config = config
        self._head: str | None = head
        self._started_ms = 0
        self._is_ready = False

    def show(self, event: Event) -> None:
        if self._head is not None:
            click.echo(self._head)
            self._head, self._started_ms = None, event.at_ms
        if event.kind == "all_ready":
            self._is_ready = True
            click.echo(f" {event.text}\n {promise(self._config)}\n {hints(self._config)}")
        elif not self._is_ready and event.kind in ("ready", "leader"):
            click.echo(step_line(self._config, event, self._started_ms))
        elif event.kind not in QUIET:
            click.echo(f"{clock_time(event.at_ms)} {event.text}")

    async def watch(self, supervisor: Supervisor) -> None:
        await trio.lowlevel.checkpoint()


class LogView:
    """JSON lines in a rotating file."""

    def __init__(self, path: str) -> None:
        self._file = RotatingFile(path)

    def show(self, event: Event) -> None:
        self._file.write_line(json.dumps(attrs.asdict(event), ensure_ascii=False))

    async def watch(self, supervisor: Supervisor) -> None:
        await trio.lowlevel.checkpoint()
