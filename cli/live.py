"""`up` on a terminal: steps with ticks, then one live table of every node, with the last events below it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from attrs import define, field
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

import quorate
from cli.output import number
from cli.plain import QUIET, clock_time, hints, promise, step_line
from cluster.config import ClusterConfig
from cluster.status import NodeStatus, StatusReader
from cluster.supervisor import Event, Supervisor
from runtime.model import Env

REFRESH_S = 0.25
ASK_WITHIN_S = 0.2
RATE_OVER_S = 2.0
EVENTS_SHOWN = 6
ROOMY_COLUMNS = 90


@define
class _Rate:
    """Messages per second over the last two seconds, from a counter that begins again when its node does."""

    samples: deque[tuple[float, int]] = field(factory=lambda: deque(maxlen=64))

    def add(self, now: float, total: int | None) -> float | None:
        if total is None:
            self.samples.clear()
            return None
        if self.samples and total < self.samples[-1][1]:
            self.samples.clear()
        self.samples.append((now, total))
        while len(self.samples) > 2 and now - self.samples[0][0] > RATE_OVER_S:
            self.samples.popleft()
        (then, before), (_, after) = self.samples[0], self.samples[-1]
        return (after - before) / (now - then) if now > then else None


class LiveView:
    """Steps as lines, then the table in place."""

    def __init__(self, env: Env, config: ClusterConfig, head: str) -> None:
        self._env = env
        self._config = config
        self._console = Console(highlight=False)
        self._head: str | None = head
        self._started_ms = 0
        self._live: Live | None = None
        self._events: deque[Event] = deque(maxlen=EVENTS_SHOWN)
        self._rates: dict[tuple[str, str], _Rate] = {}

    def show(self, event: Event) -> None:
        if self._head is not None:
            self._console.print(self._head)
            self._head, self._started_ms = None, event.at_ms
        if event.kind == "all_ready":
            self._console.print(f" {event.text}\n {promise(self._config)}\n {hints(self._config)}\n")
        elif self._live is None and event.kind in ("ready", "leader"):
            self._console.print(step_line(self._config, event, self._started_ms), style="green")
        elif event.kind not in QUIET:
            self._events.append(event)
            if self._live is None:
                self._console.print(f"{clock_time(event.at_ms)} {event.text}")

    async def watch(self, supervisor: Supervisor) -> None:
        """Draw four times a second until the cluster stops."""
        brokers = [node for node in supervisor.state().nodes if node.kind == "broker"]
        async with quorate.connect(self._config.namesrv_addresses(), env=self._env) as client:
            reader = StatusReader(self._env, client)
            with Live(console=self._console, auto_refresh=False, transient=False) as live:
                self._live = live
                try:
                    while not supervisor.is_stopping:
                        due = self._env.clock.monotonic() + REFRESH_S
                        statuses = await reader.read(brokers, within_s=ASK_WITHIN_S)
                        live.update(self._draw(statuses), refresh=True)
                        await self._env.clock.sleep_until(due)
                finally:
                    self._live = None

    def _draw(self, statuses: Sequence[NodeStatus]) -> RenderableType:
        now = self._env.clock.monotonic()
        gap = 2 if self._console.width >= ROOMY_COLUMNS else 1
        parts: list[RenderableType] = []
        for group in self._config.groups:
            table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
            table.add_column(group.name)
            table.add_column("role")
            for heading in ("term", "uncommitted", "committed", "applied", "lag", "in/s", "out/s"):
                table.add_column(heading, justify="right")
            for status in statuses:
                if status.group == group.name:
                    self._add_row(table, status, now)
            parts.append(table)
        parts.append(Text())
        for event in self._events:
            parts.append(Text(f" {clock_time(event.at_ms)} {event.text}", style=_style(event)))
        return Group(*parts)

    def _add_row(self, table: Table, status: NodeStatus, now: float) -> None:
        name = f"{status.name}  :{status.listen.rpartition(':')[2]}"
        rates = [
            self._rates.setdefault((status.name, way), _Rate()).add(now, total)
            for way, total in (("in", status.messages_in), ("out", status.messages_out))
        ]
        if status.state == "down":
            table.add_row(name, "  down", *["-"] * 7, style="red")
            return
        is_leader = status.role == "leader"
        table.add_row(
            name,
            f"{'★' if is_leader else ' '} {status.standing}",
            number(status.term),
            number(status.uncommitted),
            number(status.committed_index),
            number(status.applied_index),
            number(status.lag_entries),
            *(number(rate) for rate in rates),
            style="bold green" if is_leader else "yellow" if status.standing != status.role else "",
        )


def _style(event: Event) -> str:
    return {"killed": "red", "no_leader": "yellow", "leader": "green", "exited": "yellow"}.get(event.kind, "")
