"""`quorate status`: what each node says about itself."""

from __future__ import annotations

from typing import Any

import attrs
import click
import trio

from cli.exits import CHECK_FAILED, NOBODY_REACHED, Failure, print_json
from cli.output import number, table
from cli.run import run
from cli.target import json_option, local_options, running_cluster
from cluster.layout import RunningNode
from cluster.status import NodeStatus, read_broker_status, read_namesrv_status
from runtime.real import real_env


@click.command(
    epilog="""\b
Examples:
  quorate status
  quorate status --json | jq '.[] | select(.role == "leader")'
"""
)
@local_options
@json_option
def status(data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """Show role, term and log positions of each node.

    Ends with 5 when a raft group has no leader or a node is down.
    """
    run(_status, data_path, config_path, as_json)


async def _status(data_path: str | None, config_path: str | None, as_json: bool) -> None:
    env = real_env()
    running = running_cluster(env.files, data_path, config_path)
    found: dict[str, NodeStatus] = {}

    async def brokers() -> None:
        nodes = [node for node in running.state.nodes if node.kind == "broker"]
        for one in await read_broker_status(env, running.state.namesrv, nodes):
            found[one.name] = one

    async def name_server(node: RunningNode) -> None:
        found[node.name] = await read_namesrv_status(env, node)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(brokers)
        for node in running.state.nodes:
            if node.kind == "namesrv":
                nursery.start_soon(name_server, node)
    statuses = [found[node.name] for node in running.state.nodes]
    if as_json:
        print_json([_row(one) for one in statuses])
    else:
        _print_tables(statuses)
    down = [one.name for one in statuses if one.state == "down"]
    if len(down) == len(statuses):
        raise Failure(f"no node answers: {', '.join(down)}", NOBODY_REACHED)
    leaderless = [
        group.name
        for group in running.config.groups
        if not any(one.role == "leader" and one.group == group.name for one in statuses)
    ]
    if down or leaderless:
        parts = [f"down: {', '.join(down)}"] if down else []
        parts += [f"without leader: {', '.join(leaderless)}"] if leaderless else []
        raise Failure("; ".join(parts), CHECK_FAILED)


def _row(one: NodeStatus) -> dict[str, Any]:
    """A flat object; a name server has no raft fields."""
    row = attrs.asdict(one)
    if one.kind == "namesrv":
        return {key: row[key] for key in ("name", "kind", "listen", "state", "reason")}
    return row


def _print_tables(statuses: list[NodeStatus]) -> None:
    groups = sorted({one.group for one in statuses if one.group is not None})
    headings = ("", "role", "term", "last", "written", "durable", "committed", "applied", "lag", "listen")
    for group in groups:
        rows = [
            (
                one.name,
                ("* " if one.role == "leader" else "  ") + one.standing,
                number(one.term),
                number(one.last_index),
                number(one.written_index),
                number(one.durable_index),
                number(one.committed_index),
                number(one.applied_index),
                number(one.lag_entries),
                one.listen,
            )
            for one in statuses
            if one.group == group
        ]
        click.echo(table((group, *headings[1:]), rows))
    for one in statuses:
        if one.kind == "namesrv":
            click.echo(f"{one.name}  {one.state}  {one.listen}")
    for one in statuses:
        if one.reason is not None:
            click.echo(f"{one.name} is down: {one.reason}")
