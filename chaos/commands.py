"""`quorate chaos ...`: simulated runs by seed. The CLI hangs `chaos_group` under its own group.

Exit codes (chaos.md 5.9): 0 all promises held, 1 one was broken, 2 usage, 3 not enough evidence (a run in which nothing
was elected or committed proves nothing), 4 the kit itself failed (a seed gave two different results), 130 interrupted.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from chaos.sim.engine import Engine
    from chaos.sim.result import SeedResult
    from chaos.sim.scenario import Scenario
    from chaos.sim.shrink import Shrunk

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


@click.group(
    "chaos",
    epilog="""\b
Examples:
  quorate chaos sim --seeds 400 --jobs 2     play 400 schedules of faults
  quorate chaos replay 83 --trace            what happened in one of them
  quorate chaos shrink 83                    the same failure with as few faults as possible
  quorate chaos replay chaos-out/83.toml --trace --until 4.2
  quorate chaos sim --full --seeds 20        the whole programs instead of the core alone
""",
)
def chaos_group() -> None:
    """Break a cluster on purpose and check that it keeps its promises."""


def _engine(name: str) -> Engine:
    from chaos.sim.engine import engine_named

    return engine_named(name)


def _play_seed(name: str, seed: int) -> SeedResult:
    """In whatever process: play a seed of the engine called `name`."""
    engine = _engine(name)
    return engine.play(engine.draw(seed))


def _play_all(name: str, seeds: Sequence[int], jobs: int) -> Iterator[SeedResult]:
    play = partial(_play_seed, name)
    if jobs == 1:
        yield from map(play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(play, seeds, chunksize=1)


def _play_again(name: str, seeds: Sequence[int]) -> list[str]:
    """Trace hashes from a fresh process: its hash seed is another one."""
    if not seeds:
        return []
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [result.trace_hash for result in pool.map(partial(_play_seed, name), seeds)]


def _stopwatch() -> Callable[[], float]:
    """Seconds since now, by the wall clock: good enough for progress and budgets."""
    from runtime.real import real_env

    wall_ms = real_env().clock.wall_ms
    begin = wall_ms()
    return lambda: (wall_ms() - begin) / 1000


class _Tally:
    """What the seeds of a run have done together, and a line on stderr now and then while it goes on."""

    def __init__(self, engine: Engine, seeds: range) -> None:
        self._engine = engine
        self._seeds = seeds
        self._elapsed = _stopwatch()
        self._next = PROGRESS_SECONDS
        self._done = 0
        self._sim_seconds = 0.0
        self.totals = dict.fromkeys(engine.totals, 0)
        self.reached = dict.fromkeys(engine.states, 0)
        self.broken: list[int] = []
        self.to_audit: dict[int, str] = {}
        self.unstable: list[int] = []

    def add(self, result: SeedResult) -> None:
        self._done += 1
        self._sim_seconds += result.at_seconds
        for name in self.totals:
            self.totals[name] += result.counts[name]
        for state, times in result.reached.items():
            self.reached[state] = self.reached.get(state, 0) + times
        if not result.ok:
            self.broken.append(result.seed)
            click.echo(f"seed {result.seed} at {result.at_seconds} s: {result.violation}", err=True)
            click.echo(f"  repeat with: {result.reproduction}", err=True)
        if result.seed % AUDIT_EVERY == 0:
            self.to_audit[result.seed] = result.trace_hash
        self._show_progress()

    def _show_progress(self) -> None:
        seconds = self._elapsed()
        if seconds < self._next or self._done >= len(self._seeds):
            return
        self._next = seconds + PROGRESS_SECONDS
        click.echo(
            f"{self._done}/{len(self._seeds)}  {self._done / seconds:.1f} seeds/s  "
            f"{self._sim_seconds / 3600:.1f} sim-h  faults {self.totals['faults']}  "
            f"leader changes {self.totals['elections']}  acked {self.totals['acknowledged']}"
            f"{self._states('  reached ')}",
            err=True,
        )

    def _states(self, before: str) -> str:
        met = sum(1 for times in self.reached.values() if times)
        return f"{before}{met} of {len(self.reached)} states" if self.reached else ""

    def audited(self, again: Sequence[str]) -> None:
        """The trace hashes of the seeds in `to_audit`, played once more."""
        pairs = zip(self.to_audit.items(), again, strict=True)
        self.unstable = [seed for (seed, first), second in pairs if first != second]
        for seed in self.unstable:
            click.echo(f"seed {seed} gave two different runs", err=True)

    def report(self, *, as_json: bool) -> None:
        if as_json:
            document = {
                "engine": self._engine.name,
                "seeds": len(self._seeds),
                "start": self._seeds.start,
                "broken": self.broken,
                "unstable": self.unstable,
                "audited": len(self.to_audit),
                "sim_seconds": round(self._sim_seconds, 1),
            }
            click.echo(json.dumps({**document, **self.totals, "reached": self.reached}))
            return
        click.echo(
            f"{len(self._seeds)} seeds of engine {self._engine.name}, {len(self.broken)} violations; "
            f"{self._sim_seconds / 3600:.2f} simulated hours, {self._done / max(self._elapsed(), 0.001):.2f} seeds/s"
        )
        click.echo(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.totals.items()))
        click.echo(f"{len(self.to_audit)} seeds audited{self._states('; reached ')}")
        never = [state for state, times in self.reached.items() if not times]
        if never:
            click.echo(f"never met: {', '.join(never)}")

    def exit_code(self) -> int:
        if self.broken:
            return EXIT_BROKEN
        if self.unstable:
            return EXIT_KIT_FAILED
        return 0 if self.totals["elections"] and self.totals["acknowledged"] else EXIT_NO_EVIDENCE


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
    """Play whole raft groups on virtual time: crashes, power losses, rotten disks, partitions. A seed is a schedule.

    Of engine full, half of the seeds are bare raft groups and half whole clusters.
    """
    engine = _engine("full" if is_full else "core")
    numbers = range(start, start + seeds)
    tally = _Tally(engine, numbers)
    with _said_in_a_line():
        engine.check()
        for result in _play_all(engine.name, numbers, jobs):
            if as_json:
                click.echo(json.dumps(result.to_json()))
            tally.add(result)
        tally.audited(_play_again(engine.name, list(tally.to_audit)))
        if is_shrinking:
            for seed in tally.broken[:SHRUNK_MAX]:
                _report_shrunk(engine.draw(seed), f"{out}/{seed}.toml", on_stderr=as_json)
    tally.report(as_json=as_json)
    code = tally.exit_code()
    if code == EXIT_NO_EVIDENCE:
        click.echo("nothing was elected or acknowledged: this proves nothing", err=True)
    if code:
        raise SystemExit(code)


@contextmanager
def _said_in_a_line() -> Iterator[None]:
    """What ends a run before it has a result."""
    from chaos.sim.engine import NotDeterministic

    try:
        yield
    except NotDeterministic as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_KIT_FAILED) from None
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _is_seed(what: str) -> bool:
    return what.isascii() and what.isdigit()


def _scenario_of(what: str, *, is_full: bool) -> Scenario:
    """A seed's plan and faults, or those of a file, which says itself which engine it is for. Raises UsageError."""
    from chaos.sim.scenario import BadScenario, read_scenario
    from runtime.real import real_env

    if _is_seed(what):
        return _engine("full" if is_full else "core").draw(int(what))
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
    scenario = _scenario_of(what, is_full=is_full)
    with _said_in_a_line():
        result = _engine(scenario.engine).play(scenario, keep_trace=trace, until=until)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        for line in result.trace:
            click.echo(line)
        if result.standing:
            click.echo(f"at {result.at_seconds:.4f} s:")
        for line in result.standing:
            click.echo(f"  {line}")
        verdict = "every promise held" if result.ok else f"BROKEN at {result.at_seconds} s: {result.violation}"
        if until is not None and result.ok:
            verdict = "nothing broken so far"
        click.echo(f"seed {result.seed}: {result.plan}")
        counts = result.counts
        click.echo(
            f"{counts['elections']} elections, {counts['entries']} entries, {counts['acknowledged']} acknowledged, "
            f"trace {result.trace_hash}"
        )
        click.echo(verdict)
    if not result.ok:
        raise SystemExit(EXIT_BROKEN)
    if not result.counts["acknowledged"] and until is None:
        raise SystemExit(EXIT_NO_EVIDENCE)


@chaos_group.command(
    "shrink",
    epilog="""\b
Examples:
  quorate chaos shrink 83                       writes chaos-out/83.toml
  quorate chaos shrink 83 --out repro.toml
  quorate chaos shrink repro.toml --out smaller.toml
  quorate chaos shrink 83 --full
""",
)
@click.argument("what", metavar="SEED|FILE")
@click.option("--out", help="The file to write; chaos-out/SEED.toml when not given.")
@click.option("--full", "is_full", is_flag=True, help="The seed is one of engine full.")
def shrink(what: str, out: str | None, is_full: bool) -> None:
    """Make a failing run small: the same broken promise with fewer faults, nodes and clients."""
    scenario = _scenario_of(what, is_full=is_full)
    with _said_in_a_line():
        shrunk = _report_shrunk(
            scenario, out or f"chaos-out/{scenario.plan.seed}.toml", file=None if _is_seed(what) else what
        )
    if shrunk is not None:
        raise SystemExit(EXIT_BROKEN)
    click.echo("every promise held: there is nothing to shrink")


def _report_shrunk(scenario: Scenario, path: str, *, file: str | None = None, on_stderr: bool = False) -> Shrunk | None:
    """Shrink, write the scenario file, tell the story. None when the run does not fail. `file`: where the scenario
    comes from, when it is not its seed's."""
    from chaos.sim.scenario import write_scenario
    from chaos.sim.shrink import Shrinker
    from runtime.real import real_env

    engine = _engine(scenario.engine)
    shrunk = Shrinker(
        scenario, engine.play, engine.simpler, seconds_max=engine.shrink_seconds, elapsed=_stopwatch()
    ).shrink()
    if shrunk is None:
        return None
    files = real_env().files
    folder, _, _ = path.rpartition("/")
    if folder:
        files.make_dirs(folder)
    files.write_atomic(path, write_scenario(shrunk.scenario).encode())
    before, after = scenario.plan, shrunk.scenario.plan
    repeat = shrunk.result.reproduction if file is None else f"quorate chaos replay {file} --trace"
    story = [
        f"seed {before.seed}: {len(scenario.faults)} faults -> {len(shrunk.scenario.faults)}, "
        f"{before.fault_seconds:g} s -> {after.fault_seconds:g} s ({shrunk.runs} runs)",
        f"  {after.describe()}",
        *(f"  {fault}" for fault in shrunk.scenario.faults),
        *(f"  | {line}" for line in engine.play(shrunk.scenario, keep_trace=True).trace[-NARRATIVE_LINES:]),
        f"  repeat: {repeat}      minimal: quorate chaos replay {path} --trace",
    ]
    click.echo("\n".join(story), err=on_stderr)
    return shrunk
