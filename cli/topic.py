"""`quorate topic`: list, create, delete, route, status."""

from __future__ import annotations

from typing import Any

import click

from cli.exits import Failure, confirm, print_json
from cli.lazy import LazyGroup
from cli.output import table
from cli.run import run
from cli.target import json_option, namesrv_of, remote_options
from runtime.real import real_env

Target = tuple[str | None, str | None, str | None]


@click.group(
    cls=LazyGroup,
    aliases={"ls": "list", "rm": "delete"},
    epilog="""\b
Examples:
  quorate topic list
  quorate topic create orders --queues 8
  quorate topic route orders --json
  quorate topic delete orders --yes
""",
)
def topic() -> None:
    """List, create, delete and inspect topics."""


@topic.command("list")
@click.option("--all", "with_system", is_flag=True, help="Retry, dead letter and system topics too.")
@remote_options
@json_option
def list_topics(
    with_system: bool, namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool
) -> None:
    """List topics."""
    run(_list, with_system, (namesrv, data_path, config_path), as_json)


async def _list(with_system: bool, target: Target, as_json: bool) -> None:
    import quorate

    async with quorate.connect(namesrv_of(real_env().files, *target)) as mq:
        names = await mq.admin.topics()
        if not with_system:
            info = await mq.admin.cluster()
            reserved = {*info.cluster_addr_table, *info.broker_addr_table}
            reserved |= {f"{name}_REPLY_TOPIC" for name in info.cluster_addr_table}
            names = [name for name in names if name not in reserved and not is_system(name)]
    if as_json:
        print_json([{"topic": name} for name in names])
    else:
        click.echo("\n".join(names) if names else "no topics yet")


SYSTEM_NAMES = frozenset(
    {"TBW102", "SELF_TEST_TOPIC", "OFFSET_MOVED_EVENT", "SCHEDULE_TOPIC_XXXX", "BenchmarkTest", "CHECKPOINT_TOPIC"}
)


def is_system(name: str) -> bool:
    """Topics that users did not make: retry and dead-letter topics, and those RocketMQ reserves."""
    return name in SYSTEM_NAMES or name.startswith(("%RETRY%", "%DLQ%", "RMQ_SYS_", "rmq_sys_"))


@topic.command()
@click.argument("name")
@click.option("--queues", type=click.IntRange(1, 1024), default=4, show_default=True, help="Queues per raft group.")
@remote_options
@json_option
def create(
    name: str, queues: int, namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool
) -> None:
    """Create topic NAME in all raft groups, or change its number of queues."""
    run(_create, name, queues, (namesrv, data_path, config_path), as_json)


async def _create(name: str, queues: int, target: Target, as_json: bool) -> None:
    import quorate

    async with quorate.connect(namesrv_of(real_env().files, *target)) as mq:
        await mq.admin.create_topic(name, queues=queues)
    if as_json:
        print_json({"topic": name, "queues": queues})
    else:
        click.echo(f"topic {name}, {queues} queues per raft group")


@topic.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@remote_options
@json_option
def delete(
    name: str, yes: bool, namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool
) -> None:
    """Delete topic NAME and its messages."""
    refusal = f"deletes topic {name} and its messages; say --yes"
    confirm(f"Delete topic {name} and its messages?", refusal, yes, as_json)
    run(_delete, name, (namesrv, data_path, config_path), as_json)


async def _delete(name: str, target: Target, as_json: bool) -> None:
    import quorate

    async with quorate.connect(namesrv_of(real_env().files, *target)) as mq:
        await mq.admin.route(name)  # a name that is mistyped is told, not "deleted"
        await mq.admin.delete_topic(name)
    if as_json:
        print_json({"deleted": name})
    else:
        click.echo(f"deleted topic {name}")


@topic.command()
@click.argument("name")
@remote_options
@json_option
def route(name: str, namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """Show which brokers hold topic NAME."""
    run(_route, name, (namesrv, data_path, config_path), as_json)


async def _route(name: str, target: Target, as_json: bool) -> None:
    import quorate

    async with quorate.connect(namesrv_of(real_env().files, *target)) as mq:
        found = await mq.admin.route(name)
    if found.provisional:
        raise Failure(f"topic {name} does not exist yet; the first send creates it")
    rows: list[dict[str, Any]] = []
    for group, members in sorted(found.members.items()):
        for broker_id, address in sorted(members.items()):
            rows.append(
                {
                    "broker_name": group,
                    "broker_id": broker_id,
                    "address": address,
                    "read_queues": sum(queue.broker_name == group for queue in found.readable),
                    "write_queues": sum(queue.broker_name == group for queue in found.writable),
                }
            )
    if as_json:
        print_json(rows)
    else:
        headings = ("broker", "id", "address", "read queues", "write queues")
        click.echo(table(headings, [tuple(row.values()) for row in rows]))


@topic.command()
@click.argument("name")
@remote_options
@json_option
def status(name: str, namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """Show first and next offset of each queue of topic NAME."""
    run(_status, name, (namesrv, data_path, config_path), as_json)


async def _status(name: str, target: Target, as_json: bool) -> None:
    import quorate

    rows: list[dict[str, Any]] = []
    async with quorate.connect(namesrv_of(real_env().files, *target)) as mq:
        consumer = mq.pull_consumer(group="TOOLS_CONSUMER")
        for queue in await consumer.queues(name):
            low, high = await consumer.min_offset(queue), await consumer.max_offset(queue)
            rows.append(
                {
                    "broker_name": queue.broker_name,
                    "queue_id": queue.queue_id,
                    "min_offset": low,
                    "max_offset": high,
                    "messages": high - low,
                }
            )
    if as_json:
        print_json(rows)
    else:
        click.echo(table(("broker", "queue", "first", "next", "messages"), [tuple(row.values()) for row in rows]))
        click.echo(f"{sum(row['messages'] for row in rows):,} messages")
