"""`quorate produce`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import click

from cli.exits import USAGE, Failure, print_json
from cli.run import run
from cli.target import json_option, namesrv_of, remote_options
from runtime.real import real_env

TOPIC_HELP = "created on first use unless the cluster forbids it"


@click.command(
    epilog="""\b
Examples:
  quorate produce orders "hello"
  quorate produce orders one two three --tag new --key 42
  quorate produce orders --count 1000 --size 200 --rate 100
  seq 10 | quorate produce orders -          one message per line
"""
)
@click.argument("topic")
@click.argument("bodies", nargs=-1, metavar="[BODY...|-]")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Send N messages, repeating what is given.")
@click.option("--size", type=click.IntRange(0, 4 << 20), metavar="BYTES", help="Bodies of that size, numbered.")
@click.option("--tag", help="Tag of each message.")
@click.option("--key", "keys", multiple=True, help="Key to find it by; may be given again.")
@click.option("--rate", type=click.FloatRange(0.001), metavar="PER_S", help="At most so many a second.")
@click.option("--timeout", type=click.FloatRange(0.01), default=3.0, show_default=True, help="Seconds for each send.")
@remote_options
@json_option
def produce(
    topic: str,
    bodies: tuple[str, ...],
    count: int | None,
    size: int | None,
    tag: str | None,
    keys: tuple[str, ...],
    rate: float | None,
    timeout: float,
    namesrv: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Send messages to TOPIC and print where each went. The topic is created on first use."""
    if bodies and size is not None:
        raise Failure("give bodies or --size, not both", USAGE)
    if not bodies and size is None and count is None:
        raise Failure('nothing to send: give a body, "-" for standard input, or --count and --size', USAGE)
    messages = _bodies(bodies, count, size if size is not None else 0)
    options = {"tag": tag, "keys": keys, "timeout": timeout}
    run(_produce, topic, messages, options, rate, (namesrv, data_path, config_path), as_json)


def _bodies(given: tuple[str, ...], count: int | None, size: int) -> Iterator[bytes]:
    if given == ("-",):
        with click.open_file("-", "rb") as lines:
            for number, line in enumerate(lines):
                if count is not None and number >= count:
                    return
                yield line.rstrip(b"\r\n")
        return
    total = count if count is not None else max(1, len(given))
    for number in range(total):
        if given:
            yield given[number % len(given)].encode()
        else:
            yield (b"%d " % number).ljust(size, b".")[: max(size, 0)]


async def _produce(
    topic: str,
    messages: Iterator[bytes],
    options: dict[str, Any],
    rate: float | None,
    target: tuple[str | None, str | None, str | None],
    as_json: bool,
) -> None:
    import quorate

    env = real_env()
    rows: list[dict[str, Any]] = []
    started = env.clock.monotonic()
    sent = 0
    try:
        async with quorate.connect(namesrv_of(env.files, *target), env=env) as mq:
            for body in messages:
                if rate is not None:
                    await env.clock.sleep_until(started + sent / rate)
                receipt = await mq.send(topic, body, **options)
                sent += 1
                if as_json:
                    rows.append({**attrs.asdict(receipt), "elapsed_ms": round(receipt.elapsed_ms, 3)})
                else:
                    click.echo(
                        f"{receipt.broker_name} queue {receipt.queue_id} offset {receipt.queue_offset}  "
                        f"{receipt.elapsed_ms:.1f} ms  {receipt.message_id}"
                    )
    finally:
        if as_json:
            print_json(rows)
