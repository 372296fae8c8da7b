"""`quorate chaos ...`: simulated runs by seed. The CLI hangs `chaos_group` under its own group.

Exit codes (chaos.md 5.9): 0 all promises held, 1 one was broken, 2 usage, 3 not enough evidence (a run in which nothing
was elected or committed proves nothing), 4 the kit itself failed (a seed gave two different results), 130 interrupted.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from chaos.sim.run import SeedResult

EXIT_BROKEN = 1
EXIT_NO_EVIDENCE = 3
EXIT_KIT_FAILED = 4
EXIT_INTERRUPTED = 130
AUDIT_EVERY = 100
"""One seed in so many is played twice and must give the same trace hash."""
TOTALS = (
    "steps",
    "delivered",
    "elections",
    "entries",
    "proposals",
    "acknowledged",
    "cuts",
    "crashes",
    "power_losses",
    "recovered",
    "partitions",
    "transfers",
    "repairs",
    "installs",
    "changes",
    "reads",
    "faults",
)


@click.group("chaos")
def chaos_group() -> None:
    """Break a cluster on purpose and check that it keeps its promises."""


def _play(seed: int) -> tuple[SeedResult, bool]:
    """A seed's result, and whether a second run agreed where one was made."""
    from chaos.sim.run import run_seed

    result = run_seed(seed)
    if seed % AUDIT_EVERY == 0:
        return result, run_seed(seed).trace_hash == result.trace_hash
    return result, True


def _play_all(seeds: range, jobs: int) -> Iterator[tuple[SeedResult, bool]]:
    if jobs == 1:
        yield from map(_play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_play, seeds, chunksize=4)


@chaos_group.command("sim")
@click.option("--seeds", default=100, show_default=True, type=click.IntRange(1), help="How many seeds to play.")
@click.option("--start", default=0, show_default=True, type=click.IntRange(0), help="The first seed.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes side by side.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per seed and one with the totals.")
def sim(seeds: int, start: int, jobs: int, as_json: bool) -> None:
    """Play whole raft groups on virtual time: crashes, power losses, partitions, stalls. A seed is a schedule."""
    totals = dict.fromkeys(TOTALS, 0)
    broken: list[int] = []
    unstable: list[int] = []
    try:
        for result, agreed in _play_all(range(start, start + seeds), jobs):
            for name in TOTALS:
                totals[name] += getattr(result, name)
            if as_json:
                click.echo(json.dumps(result.to_json()))
            if not result.ok:
                broken.append(result.seed)
                click.echo(f"seed {result.seed} at {result.at_seconds} s: {result.violation}", err=True)
                click.echo(f"  repeat with: {result.reproduction}", err=True)
            if not agreed:
                unstable.append(result.seed)
                click.echo(f"seed {result.seed} gave two different runs", err=True)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    if as_json:
        click.echo(json.dumps({"seeds": seeds, "start": start, "broken": broken, "unstable": unstable, **totals}))
    else:
        click.echo(
            f"{seeds} seeds, {len(broken)} violations; "
            f"{totals['elections']} elections, {totals['entries']} entries committed, "
            f"{totals['acknowledged']} of {totals['proposals']} proposals acknowledged, {totals['cuts']} cuts, "
            f"{totals['crashes']} crashes, {totals['power_losses']} power losses, {totals['partitions']} partitions, "
            f"{totals['transfers']} transfers"
        )
    if broken:
        raise SystemExit(EXIT_BROKEN)
    if unstable:
        raise SystemExit(EXIT_KIT_FAILED)
    if not totals["elections"] or not totals["entries"]:
        click.echo("nothing was elected or committed: this proves nothing", err=True)
        raise SystemExit(EXIT_NO_EVIDENCE)


@chaos_group.command("replay")
@click.argument("seed", type=click.IntRange(0))
@click.option("--trace", is_flag=True, help="Print what every node did, with virtual time.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def replay(seed: int, trace: bool, as_json: bool) -> None:
    """Play one seed again."""
    from chaos.sim.run import run_seed

    result = run_seed(seed, keep_trace=trace)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        for line in result.trace:
            click.echo(line)
        verdict = "every promise held" if result.ok else f"BROKEN at {result.at_seconds} s: {result.violation}"
        click.echo(f"seed {seed}: {result.plan}")
        click.echo(f"{result.elections} elections, {result.entries} entries, trace {result.trace_hash}")
        click.echo(verdict)
    if not result.ok:
        raise SystemExit(EXIT_BROKEN)
    if not result.entries:
        raise SystemExit(EXIT_NO_EVIDENCE)
