"""`quorate bench`: a producer benchmark through the Python client. It measures client and cluster together."""

from __future__ import annotations

from typing import Any

import click
import trio

import quorate
from cli.exits import CLUSTER_ANSWERED_ERROR, Failure, print_json
from cli.output import number
from cli.run import run
from cli.target import json_option, namesrv_of, remote_options
from runtime.model import Env
from runtime.real import real_env

WARM_UP_S = 0.5


@click.command(
    epilog="""\b
Examples:
  quorate bench
  quorate bench --duration 30 --in-flight 64 --size 200
  quorate bench --in-flight 1 --json         latency of one send at a time
"""
)
@click.option("--topic", default="bench", show_default=True, help="Topic to send to.")
@click.option("--duration", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True, help="Seconds.")
@click.option("--in-flight", type=click.IntRange(1, 1024), default=32, show_default=True, help="Sends at a time.")
@click.option("--size", type=click.IntRange(0, 4 << 20), default=1024, show_default=True, help="Bytes per message.")
@remote_options
@json_option
def bench(
    topic: str,
    duration: float,
    in_flight: int,
    size: int,
    namesrv: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Measure how fast a cluster takes messages from one Python client: rate, and latency at several percentiles.

    Every send waits for its acknowledgement. A half second of warm-up is not counted.
    """
    run(_bench, topic, duration, in_flight, size, (namesrv, data_path, config_path), as_json)


async def _bench(
    topic: str,
    duration_s: float,
    in_flight: int,
    size: int,
    target: tuple[str | None, str | None, str | None],
    as_json: bool,
) -> None:
    env = real_env()
    latencies_s: list[float] = []
    errors: list[str] = []
    async with quorate.connect(namesrv_of(env.files, *target), env=env) as mq:
        await mq.send(topic, b"first", timeout=10)
        begin = env.clock.monotonic() + WARM_UP_S
        end = begin + duration_s
        async with trio.open_nursery() as nursery:
            for _ in range(in_flight):
                nursery.start_soon(_send_until, env, mq, topic, bytes(size), (begin, end), latencies_s, errors)
    if not latencies_s:
        raise Failure(f"no send was acknowledged: {errors[0] if errors else 'none was made'}", CLUSTER_ANSWERED_ERROR)
    latencies_s.sort()

    def at(share: float) -> float:
        return round(latencies_s[min(len(latencies_s) - 1, int(share * len(latencies_s)))] * 1000, 3)

    document: dict[str, Any] = {
        "topic": topic,
        "in_flight": in_flight,
        "size_bytes": size,
        "duration_s": duration_s,
        "acknowledged": len(latencies_s),
        "errors": len(errors),
        "rate_per_s": round(len(latencies_s) / duration_s, 1),
        "p50_ms": at(0.5),
        "p90_ms": at(0.9),
        "p99_ms": at(0.99),
        "p999_ms": at(0.999),
        "max_ms": at(1.0),
    }
    if as_json:
        print_json(document)
        return
    click.echo(f"{number(document['rate_per_s'])} acknowledged messages/s of {size} bytes, {in_flight} in flight")
    click.echo("latency  " + "  ".join(f"{key[:-3]} {document[key]} ms" for key in document if key.endswith("_ms")))
    if errors:
        click.echo(f"{len(errors)} errors, first: {errors[0]}")


async def _send_until(
    env: Env,
    mq: Any,
    topic: str,
    body: bytes,
    window: tuple[float, float],
    latencies_s: list[float],
    errors: list[str],
) -> None:
    begin, end = window
    now = env.clock.monotonic()
    while now < end:
        started = now
        try:
            await mq.send(topic, body)
        except quorate.QuorateError as error:
            errors.append(str(error))
            await env.clock.sleep(0.01)
            now = env.clock.monotonic()
            continue
        now = env.clock.monotonic()
        if started >= begin and now <= end:
            latencies_s.append(now - started)
