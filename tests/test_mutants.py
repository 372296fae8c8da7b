"""Every guard has a test that fails without it: each patch of tests/mutants.toml is applied to a copy of the code, and
the test it names must then fail.

uv run pytest -m slow tests/test_mutants.py            # all of them
uv run pytest -m slow tests/test_mutants.py -k vote    # those with "vote" in their names
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from py_compile import PycInvalidationMode
from queue import SimpleQueue
from typing import Any

import pytest

from tests.trees import ROOT

MUTANTS: list[dict[str, Any]] = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))["mutant"]
COPIED = ("runtime", "remoting", "dledger", "namesrv", "broker", "quorate", "cluster", "chaos", "tests")
LIMIT_S = 25
WORKERS = 2
SCENARIOS = range(1, 34)

# The patched copy must run in place of the installed code: a wrong path here would make every mutant "survive".
#
# What all tests import is imported once; for each line (one test, or several) the process forks, and says how pytest
# ended. No bytecode is kept: two patches of one file in the same second would share it.
SERVER = """
import os, sys
import attrs, cbor2, hypothesis, msgspec, pytest, pytest_timeout, pytest_trio, trio, trio.testing
import dledger.errors
assert dledger.errors.__file__.startswith(sys.argv[1]), "the copy is not what Python imports there"
del sys.modules["dledger.errors"], sys.modules["dledger"]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        said = os.open("said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        ended = pytest.main([*sys.argv[2:], *line.split()])
        sys.stdout.flush()
        os._exit(ended)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
OPTIONS = ("-q", "-x", "-m", "", "--assert=plain", "-p", "no:cacheprovider")
"""Plain assertions: rewriting them would compile the tests anew for each patch."""


class Copy:
    """The code and its tests, where patches do no harm, and a process that runs the tests there."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        for name in COPIED:
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("node_modules"))
        for name in ("pyproject.toml", "cluster.toml", "README.md"):
            shutil.copy(source / name, folder / name)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), *OPTIONS, f"--timeout={LIMIT_S}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *tests: str) -> tuple[int, str]:
        """How pytest ended, and what it said."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(" ".join(tests) + "\n")
        self.server.stdin.flush()
        ended = int(self.server.stdout.readline())
        return ended, (self.folder / "said").read_text(encoding="utf-8")

    def run_without(self, mutant: dict[str, Any]) -> tuple[int, str]:
        """The same for the test that a guard names, while the guard is gone."""
        path = self.folder / mutant["file"]
        source = path.read_text(encoding="utf-8")
        assert source.count(mutant["old"]) == 1, f"{mutant['file']} must hold the guard exactly once:\n{mutant['old']}"
        path.write_text(source.replace(mutant["old"], mutant["new"]), encoding="utf-8")
        try:
            return self.run(mutant["test"])
        finally:
            path.write_text(source, encoding="utf-8")

    def close(self) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


Outcomes = dict[str, Future[tuple[int, str]]]


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleQueue[Copy]]:
    """Those that nobody uses at the moment."""
    source = tmp_path_factory.mktemp("guards")
    for name in COPIED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("pyproject.toml", "cluster.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    for name in COPIED:  # by content, not by time: a patch of the same second counts
        compileall.compile_dir(str(source / name), quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    made = [Copy(tmp_path_factory.mktemp(f"mutants{number}"), source) for number in range(WORKERS)]
    free: SimpleQueue[Copy] = SimpleQueue()
    for each in made:
        free.put(each)
    yield free
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, copies: SimpleQueue[Copy]) -> Iterator[Outcomes]:
    """By the names of the mutants this session asks for; so many at a time as there are copies of the code."""

    def run_without(mutant: dict[str, Any]) -> tuple[int, str]:
        copy = copies.get()
        try:
            return copy.run_without(mutant)
        finally:
            copies.put(copy)

    asked = [item.callspec.params["mutant"] for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {mutant["name"]: pool.submit(run_without, mutant) for mutant in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_named_tests_pass_with_the_guards_in_place(copies: SimpleQueue[Copy]) -> None:
    copy = copies.get()
    try:
        ended, said = copy.run(*sorted({mutant["test"] for mutant in MUTANTS}))
    finally:
        copies.put(copy)
    assert ended == 0, said[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_without_the_guard_its_test_fails(mutant: dict[str, Any], outcomes: Outcomes) -> None:
    ended, said = outcomes[mutant["name"]].result()
    assert ended == 1, f"{mutant['name']}: {mutant['test']} ended with {ended}\n{said[-2000:]}"


def test_each_entry_is_complete_and_named_once() -> None:
    for mutant in MUTANTS:
        assert set(mutant) == {"name", "why", "file", "old", "new", "test"}, mutant["name"]
        assert mutant["old"] != mutant["new"], mutant["name"]
        assert (ROOT / mutant["file"]).read_text(encoding="utf-8").count(mutant["old"]) == 1, mutant["name"]
        path, _, name = mutant["test"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), mutant["test"]
    names = [mutant["name"] for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_every_scenario_is_a_named_test() -> None:
    """Scenarios 1 to 33 of the list of regressions (raft.md 6.2)."""
    found: set[int] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        found |= {int(number) for number in re.findall(r"def test_scenario_(\d\d)_", path.read_text(encoding="utf-8"))}
    assert [number for number in SCENARIOS if number not in found] == []
