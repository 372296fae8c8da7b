"""Every guard has a test that fails without it: each patch of tests/mutants.toml is applied to a copy of the code, and
the test it names must then fail.

uv run pytest -m slow tests/test_mutants.py            # all of them
uv run pytest -m slow tests/test_mutants.py -k vote    # those with "vote" in their names
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS: list[dict[str, Any]] = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))["mutant"]
COPIED = ("runtime", "remoting", "dledger", "namesrv", "broker", "quorate", "cluster", "chaos", "tests")
LIMIT_S = 120
SCENARIOS = range(1, 34)

# The patched copy must run in place of the installed code: a wrong path here would make every mutant "survive".
WHERE = "import dledger, sys; sys.exit(0 if dledger.__file__.startswith(sys.argv[1]) else 1)"


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code and its tests, where patches do no harm."""
    folder = tmp_path_factory.mktemp("mutants")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("pyproject.toml", "cluster.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    assert run(folder, "-c", WHERE, str(folder)).returncode == 0, "the copy is not what Python imports there"
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # No bytecode is kept: two patches of one file in the same second would share it.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", *tests)


@pytest.fixture
def patched(copy: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The copy with one guard gone, for the length of one test."""
    mutant = request.param
    path = copy / mutant["file"]
    source = path.read_text(encoding="utf-8")
    assert source.count(mutant["old"]) == 1, f"{mutant['file']} must hold the guard exactly once:\n{mutant['old']}"
    path.write_text(source.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    yield copy
    path.write_text(source, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_named_tests_pass_with_the_guards_in_place(copy: Path) -> None:
    ran = run_tests(copy, *sorted({mutant["test"] for mutant in MUTANTS}))
    assert ran.returncode == 0, ran.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "patched"),
    [(mutant, mutant) for mutant in MUTANTS],
    indirect=["patched"],
    ids=lambda value: value["name"],
)
def test_without_the_guard_its_test_fails(mutant: dict[str, Any], patched: Path) -> None:
    ran = run_tests(patched, mutant["test"])
    assert ran.returncode == 1, f"{mutant['name']}: {mutant['test']} ended with {ran.returncode}\n{ran.stdout[-2000:]}"


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
