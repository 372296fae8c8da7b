"""`quorate consume`."""

from __future__ import annotations

from typing import Any

import click

from cli.exits import GAVE_UP_WAITING, Failure, print_json
from cli.run import run
from cli.target import namesrv_of, remote_options
from runtime.real import real_env


@click.command(
    epilog="""\b
Examples:
  quorate consume orders --group demo                     until Ctrl-C
  quorate consume orders --group demo --count 10 --json   ten lines of JSON
  quorate consume orders --group audit --from-start --filter "new || paid"
"""
)
@click.argument("topic")
@click.option("--group", required=True, help="Consumer group; it remembers how far it has read.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N messages.")
@click.option("--from-start", is_flag=True, help="A new group begins at the oldest message, not at the next one.")
@click.option("--filter", "expression", default="*", show_default=True, help='Tags: "new || paid".')
@click.option("--timeout", type=click.FloatRange(0.01), help="End when no message came for so many seconds.")
@remote_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line and message.")
def consume(
    topic: str,
    group: str,
    count: int | None,
    from_start: bool,
    expression: str,
    timeout: float | None,
    namesrv: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Receive messages of TOPIC as a member of a consumer group.

    Each message is acknowledged once printed. Ends with 4 when --timeout passes before --count messages came.
    """
    run(
        _consume,
        topic,
        group,
        {"filter": expression, "start": "first" if from_start else "last"},
        (count, timeout),
        (namesrv, data_path, config_path),
        as_json,
    )


async def _consume(
    topic: str,
    group: str,
    options: dict[str, Any],
    limits: tuple[int | None, float | None],
    target: tuple[str | None, str | None, str | None],
    as_json: bool,
) -> None:
    import quorate

    env = real_env()
    count, timeout = limits
    taken = 0
    async with (
        quorate.connect(namesrv_of(env.files, *target), env=env) as mq,
        mq.subscribe(topic, group=group, **options) as inbox,
    ):
        with env.clock.move_on_after(timeout if timeout is not None else float("inf")) as waiting:
            async for message in inbox:
                _print(message, as_json)
                taken += 1
                if taken == count:
                    return
                if timeout is not None:
                    waiting.deadline = env.clock.monotonic() + timeout
        if taken == 0:
            await mq.admin.cluster()  # nobody there is not the same as nothing there
    if count is not None:
        raise Failure(f"{taken} of {count} messages within the time", GAVE_UP_WAITING, received=taken)


def _print(message: Any, as_json: bool) -> None:
    body = bytes(message.body)
    try:
        text: str | None = body.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if as_json:
        document = {
            "topic": message.topic,
            "broker_name": message.queue.broker_name,
            "queue_id": message.queue.queue_id,
            "queue_offset": message.raw.queue_offset,
            "message_id": message.message_id,
            "tag": message.tag,
            "keys": message.keys,
            "reconsume_times": message.reconsume_times,
            "store_timestamp_ms": message.raw.store_timestamp,
            "properties": dict(message.properties),
        }
        content = {"body": text} if text is not None else {"body_hex": body.hex()}
        print_json({**document, **content})
    else:
        where = f"{message.queue.broker_name} queue {message.queue.queue_id} offset {message.raw.queue_offset}"
        click.echo(f"{where}  {text if text is not None else body.hex()}")
