"""`quorate chaos ...`: simulated runs by seed. The CLI hangs `chaos_group` under its own group.

Exit codes (chaos.md 5.9): 0 all promises held, 1 one was broken, 2 usage, 3 not enough evidence (a run in which nothing
was elected or committed proves nothing), 4 the kit itself failed (a seed gave two different results), 130 interrupted.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from chaos.sim.full.run import SeedResult as FullResult
    from chaos.sim.run import SeedResult
    from chaos.sim.scenario import Scenario
    from chaos.sim.shrink import Shrunk
    from chaos.sim.world import World

EXIT_BROKEN = 1
EXIT_NO_EVIDENCE = 3
EXIT_KIT_FAILED = 4
EXIT_INTERRUPTED = 130
AUDIT_EVERY = 100
"""One seed in so many is played again, in a process with another hash seed, and must give the same trace hash."""
PROGRESS_SECONDS = 10.0
SHRUNK_MAX = 3
"""So many of the failing seeds of a run are made small."""
NARRATIVE_LINES = 12
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


@click.group(
    "chaos",
    epilog="""\b
Examples:
  quorate chaos sim --seeds 400 --jobs 2     play 400 schedules of faults
  quorate chaos replay 83 --trace            what happened in one of them
  quorate chaos shrink 83                    the same failure with as few faults as possible
  quorate chaos replay chaos-out/83.toml --trace --until 4.2
""",
)
def chaos_group() -> None:
    """Break a cluster on purpose and check that it keeps its promises."""


def _play(seed: int) -> SeedResult:
    from chaos.sim.run import run_seed

    return run_seed(seed)


def _trace_hash(seed: int) -> str:
    return _play(seed).trace_hash


def _play_full(seed: int) -> FullResult:
    from chaos.sim.full.run import run_seed

    return run_seed(seed)


def _full_trace_hash(seed: int) -> str:
    return _play_full(seed).trace_hash


Result = TypeVar("Result")


def _play_all(play: Callable[[int], Result], seeds: Sequence[int], jobs: int, *, chunk: int = 4) -> Iterator[Result]:
    if jobs == 1:
        yield from map(play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(play, seeds, chunksize=chunk)


def _play_again(trace_hash: Callable[[int], str], seeds: Sequence[int]) -> list[str]:
    """Trace hashes from a fresh process: its hash seed is another one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(trace_hash, seeds)


def _stopwatch() -> Callable[[], float]:
    """Seconds since now, by the wall clock: good enough for progress and budgets."""
    from runtime.real import real_env

    wall_ms = real_env().clock.wall_ms
    begin = wall_ms()
    return lambda: (wall_ms() - begin) / 1000


class _Progress:
    """A line on stderr now and then while a long run goes on."""

    def __init__(self, seeds: int) -> None:
        self._seeds = seeds
        self._elapsed = _stopwatch()
        self._next = PROGRESS_SECONDS

    def show(self, done: int, totals: dict[str, int], sim_seconds: float, reached: int) -> None:
        from chaos.sim.reached import REACHED

        seconds = self._elapsed()
        if seconds < self._next or done >= self._seeds:
            return
        self._next = seconds + PROGRESS_SECONDS
        click.echo(
            f"{done}/{self._seeds}  {done / seconds:.1f} seeds/s  {sim_seconds / 3600:.1f} sim-h  "
            f"faults {totals['faults']}  leader changes {totals['elections']}  acked {totals['acknowledged']}  "
            f"reached {reached}/{len(REACHED)}",
            err=True,
        )


@chaos_group.command(
    "sim",
    epilog="""\b
Examples:
  quorate chaos sim
  quorate chaos sim --seeds 2000 --jobs 2
  quorate chaos sim --seeds 50 --start 1000 --json --no-shrink
  quorate chaos sim --full --seeds 20 --jobs 2     whole programs instead of the core alone
""",
)
@click.option("--seeds", default=100, show_default=True, type=click.IntRange(1), help="How many seeds to play.")
@click.option("--start", default=0, show_default=True, type=click.IntRange(0), help="The first seed.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes side by side.")
@click.option(
    "--shrink/--no-shrink", "is_shrinking", default=True, show_default=True, help="Make failing runs small at the end."
)
@click.option("--out", default="chaos-out", show_default=True, help="Folder for the files of failing runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per seed and one with the totals.")
@click.option("--full", "is_full", is_flag=True, help="Engine full: the real programs, disks, streams and client.")
def sim(seeds: int, start: int, jobs: int, is_shrinking: bool, out: str, as_json: bool, is_full: bool) -> None:
    """Play whole raft groups on virtual time: crashes, power losses, rotten disks, partitions. A seed is a schedule."""
    if is_full:
        _sim_full(range(start, start + seeds), jobs, as_json)
        return
    from chaos.sim.reached import REACHED

    totals = dict.fromkeys(TOTALS, 0)
    reached = dict.fromkeys(REACHED, 0)
    broken: list[int] = []
    to_audit: dict[int, str] = {}
    sim_seconds = 0.0
    progress = _Progress(seeds)
    try:
        for done, result in enumerate(_play_all(_play, range(start, start + seeds), jobs), 1):
            for name in TOTALS:
                totals[name] += getattr(result, name)
            for state, times in result.reached.items():
                reached[state] = reached.get(state, 0) + times
            sim_seconds += result.at_seconds
            if as_json:
                click.echo(json.dumps(result.to_json()))
            if not result.ok:
                broken.append(result.seed)
                click.echo(f"seed {result.seed} at {result.at_seconds} s: {result.violation}", err=True)
                click.echo(f"  repeat with: {result.reproduction}", err=True)
            if result.seed % AUDIT_EVERY == 0:
                to_audit[result.seed] = result.trace_hash
            progress.show(done, totals, sim_seconds, sum(1 for times in reached.values() if times))
        again = _play_again(_trace_hash, list(to_audit)) if to_audit else []
        if is_shrinking:
            for seed in broken[:SHRUNK_MAX]:
                _report_shrunk(_scenario_of(str(seed)), f"{out}/{seed}.toml")
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    unstable = [seed for (seed, first), second in zip(to_audit.items(), again, strict=True) if first != second]
    for seed in unstable:
        click.echo(f"seed {seed} gave two different runs", err=True)
    never = [state for state, times in reached.items() if not times]
    if as_json:
        document = {"seeds": seeds, "start": start, "broken": broken, "unstable": unstable, "audited": len(to_audit)}
        click.echo(json.dumps({**document, "sim_seconds": round(sim_seconds, 1), **totals, "reached": reached}))
    else:
        click.echo(
            f"{seeds} seeds, {len(broken)} violations; {sim_seconds / 3600:.1f} simulated hours, "
            f"{totals['faults']} faults, {totals['elections']} elections, {totals['entries']} entries committed, "
            f"{totals['acknowledged']} of {totals['proposals']} proposals acknowledged, {totals['reads']} reads, "
            f"{totals['cuts']} cuts, {totals['crashes']} crashes, {totals['power_losses']} power losses, "
            f"{totals['repairs']} repairs, {totals['installs']} installs, {totals['partitions']} partitions, "
            f"{totals['transfers']} transfers, {totals['changes']} changes of members"
        )
        click.echo(f"{len(to_audit)} seeds audited; reached {len(reached) - len(never)} of {len(reached)} states")
        if never:
            click.echo(f"never met: {', '.join(never)}")
    if broken:
        raise SystemExit(EXIT_BROKEN)
    if unstable:
        raise SystemExit(EXIT_KIT_FAILED)
    if not totals["elections"] or not totals["entries"]:
        click.echo("nothing was elected or committed: this proves nothing", err=True)
        raise SystemExit(EXIT_NO_EVIDENCE)


def _sim_full(seeds: range, jobs: int, as_json: bool) -> None:
    """As `sim`, with engine full: half of the seeds are bare raft groups, half whole clusters."""
    from chaos.sim.full.clock import NotDeterministic, probe_scheduler
    from chaos.sim.full.run import TOTALS as FULL_TOTALS

    totals = dict.fromkeys(FULL_TOTALS, 0)
    broken: list[int] = []
    to_audit: dict[int, str] = {}
    sim_seconds = 0.0
    elapsed = _stopwatch()
    try:
        probe_scheduler()
        for result in _play_all(_play_full, seeds, jobs, chunk=1):
            for name in FULL_TOTALS:
                totals[name] += getattr(result, name)
            sim_seconds += result.virtual_seconds
            if as_json:
                click.echo(json.dumps(result.to_json()))
            if not result.ok:
                broken.append(result.seed)
                click.echo(f"seed {result.seed} at {result.at_seconds} s: {result.violation}", err=True)
                click.echo(f"  repeat with: {result.reproduction}", err=True)
            if result.seed % AUDIT_EVERY == 0:
                to_audit[result.seed] = result.trace_hash
        again = _play_again(_full_trace_hash, list(to_audit)) if to_audit else []
    except NotDeterministic as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_KIT_FAILED) from None
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    unstable = [seed for (seed, first), second in zip(to_audit.items(), again, strict=True) if first != second]
    for seed in unstable:
        click.echo(f"seed {seed} gave two different runs", err=True)
    if as_json:
        document = {"seeds": len(seeds), "start": seeds.start, "broken": broken, "unstable": unstable}
        click.echo(json.dumps({**document, "sim_seconds": round(sim_seconds, 1), **totals}))
    else:
        click.echo(
            f"{len(seeds)} seeds of whole programs, {len(broken)} violations; {len(seeds) / elapsed():.2f} seeds/s, "
            f"{sim_seconds / 60:.1f} simulated minutes; "
            + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in totals.items())
        )
    if broken:
        raise SystemExit(EXIT_BROKEN)
    if unstable:
        raise SystemExit(EXIT_KIT_FAILED)
    if not totals["elections"] or not totals["acknowledged"]:
        click.echo("nothing was elected or acknowledged: this proves nothing", err=True)
        raise SystemExit(EXIT_NO_EVIDENCE)


def _replay_full(what: str, trace: bool, as_json: bool) -> None:
    if not (what.isascii() and what.isdigit()):
        raise click.UsageError(f"{what!r} is not a seed; engine full has no scenario files")
    from chaos.sim.full.run import run_seed

    result = run_seed(int(what), keep_trace=trace)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        for line in result.trace:
            click.echo(line)
        click.echo(f"seed {result.seed}: {result.plan}")
        click.echo(f"{result.elections} elections, {result.acknowledged} acknowledged, trace {result.trace_hash}")
        click.echo("every promise held" if result.ok else f"BROKEN at {result.at_seconds} s: {result.violation}")
    if not result.ok:
        raise SystemExit(EXIT_BROKEN)
    if not result.acknowledged:
        raise SystemExit(EXIT_NO_EVIDENCE)


def _scenario_of(what: str) -> Scenario:
    """A seed's plan and faults, or those of a file. Raises UsageError."""
    from chaos.sim.plan import draw_plan
    from chaos.sim.scenario import BadScenario, Scenario, read_scenario
    from chaos.sim.schedule import draw_schedule
    from runtime.real import real_env

    if what.isascii() and what.isdigit():
        plan = draw_plan(int(what))
        return Scenario(plan, draw_schedule(plan))
    try:
        return read_scenario(real_env().files.read_bytes(what).decode())
    except OSError as error:
        raise click.UsageError(f"{what!r} is neither a seed nor a file that can be read: {error.strerror}") from error
    except (BadScenario, UnicodeDecodeError) as error:
        raise click.UsageError(f"{what} is no scenario: {error}") from error


@chaos_group.command(
    "replay",
    epilog="""\b
Examples:
  quorate chaos replay 83 --trace
  quorate chaos replay chaos-out/83.toml --trace --until 4.2
""",
)
@click.argument("what", metavar="SEED|FILE")
@click.option("--trace", is_flag=True, help="Print what every node did, with virtual time.")
@click.option("--until", type=click.FloatRange(0.0), help="Stop at this virtual second and show every node.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--full", "is_full", is_flag=True, help="The seed is one of engine full.")
def replay(what: str, trace: bool, until: float | None, as_json: bool, is_full: bool) -> None:
    """Play one seed, or one scenario file, again."""
    if is_full:
        _replay_full(what, trace, as_json)
        return
    from chaos.sim.run import run_scenario, run_seed

    scenario = _scenario_of(what)
    stops: list[World] = []
    if until is not None:
        result = run_scenario(scenario.plan, scenario.faults, keep_trace=trace, until=until, seen=stops.append)
    elif what.isdigit():
        result = run_seed(int(what), keep_trace=trace)
    else:
        result = run_scenario(scenario.plan, scenario.faults, keep_trace=trace)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        for line in result.trace:
            click.echo(line)
        for world in stops:
            click.echo(f"at {world.now:.4f} s:")
            for node in world.nodes.values():
                click.echo(f"  {world.describe(node)}")
        verdict = "every promise held" if result.ok else f"BROKEN at {result.at_seconds} s: {result.violation}"
        if stops and result.ok:
            verdict = "nothing broken so far"
        click.echo(f"seed {result.seed}: {result.plan}")
        click.echo(f"{result.elections} elections, {result.entries} entries, trace {result.trace_hash}")
        click.echo(verdict)
    if not result.ok:
        raise SystemExit(EXIT_BROKEN)
    if not result.entries and not stops:
        raise SystemExit(EXIT_NO_EVIDENCE)


@chaos_group.command(
    "shrink",
    epilog="""\b
Examples:
  quorate chaos shrink 83                       writes chaos-out/83.toml
  quorate chaos shrink 83 --out repro.toml
  quorate chaos shrink repro.toml --out smaller.toml
""",
)
@click.argument("what", metavar="SEED|FILE")
@click.option("--out", help="The file to write; chaos-out/SEED.toml when not given.")
def shrink(what: str, out: str | None) -> None:
    """Make a failing run small: the same broken promise with fewer faults, nodes and clients."""
    scenario = _scenario_of(what)
    try:
        shrunk = _report_shrunk(scenario, out or f"chaos-out/{scenario.plan.seed}.toml")
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    if shrunk is not None:
        raise SystemExit(EXIT_BROKEN)
    click.echo("every promise held: there is nothing to shrink")


def _report_shrunk(scenario: Scenario, path: str) -> Shrunk | None:
    """Shrink, write the scenario file, tell the story. None when the run does not fail."""
    from chaos.sim.run import run_scenario
    from chaos.sim.scenario import Scenario, write_scenario
    from chaos.sim.shrink import Shrinker
    from runtime.real import real_env

    shrunk = Shrinker(scenario.plan, scenario.faults, elapsed=_stopwatch()).shrink()
    if shrunk is None:
        return None
    assert shrunk.result.violation is not None
    files = real_env().files
    folder, _, _ = path.rpartition("/")
    if folder:
        files.make_dirs(folder)
    text = write_scenario(Scenario(shrunk.plan, shrunk.faults, shrunk.result.violation))
    files.write_atomic(path, text.encode())
    before = scenario.plan
    click.echo(
        f"seed {before.seed}: {shrunk.faults_before} faults -> {len(shrunk.faults)}, {before.fault_seconds:g} s -> "
        f"{shrunk.plan.fault_seconds:g} s, {before.clients} clients -> {shrunk.plan.clients}, {before.nodes} nodes -> "
        f"{shrunk.plan.nodes} ({shrunk.runs} runs)"
    )
    for fault in shrunk.faults:
        click.echo(f"  {fault}")
    for line in run_scenario(shrunk.plan, shrunk.faults, keep_trace=True).trace[-NARRATIVE_LINES:]:
        click.echo(f"  | {line}")
    click.echo(
        f"  repeat: quorate chaos replay {before.seed} --trace      minimal: quorate chaos replay {path} --trace"
    )
    return shrunk
