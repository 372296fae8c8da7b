"""Damage of any kind: the log is found whole, or the damage is reported and a healthy copy's entries heal it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dledger.store.segments import create_segment
from runtime.files import RealFile
from runtime.testing import test_env
from tests.unit.dledger.store.store_kit import SEGMENT, Bench, Framer, copied, log_files, some_entries, write_log


class Logs:
    def __init__(self, folder: Path) -> None:
        rng = random.Random(11)
        framer = Framer()
        self.folder = folder
        self.entries = some_entries(framer, rng, 40, 1)
        kept = framer.index
        framer.back_to(self.entries[24])
        stale = some_entries(framer, rng, 12, 1)
        """An older copy's end: entries that were cut later."""
        framer.back_to(self.entries[kept - 1])
        self.entries += some_entries(framer, rng, 25, 2)
        trio.run(write_log, folder / "whole", self.entries)
        trio.run(write_log, folder / "older", self.entries[:33])
        trio.run(write_log, folder / "stale", self.entries[:25] + stale)
        trio.run(write_log, folder / "foreign", some_entries(Framer(), rng, 60, 3))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logs]:
    yield Logs(tmp_path_factory.mktemp("logs"))


DAMAGE = st.tuples(
    st.sampled_from(["log", "log", "rows"]),
    st.integers(0, 6),
    st.sampled_from(["flip", "flip", "fill", "zero", "truncate", "delete", "older", "stale", "foreign"]),
    st.integers(0, SEGMENT - 1),
    st.integers(1, 3000),
)


def inflict(folder: Path, logs: Logs, damage: tuple[str, int, str, int, int]) -> None:
    sub, number, kind, offset, length = damage
    paths = sorted((logs.folder / "whole" / sub).iterdir())
    name = paths[number % len(paths)].name
    path = folder / sub / name
    if not path.exists():
        return
    content = bytearray(path.read_bytes())
    offset = offset % max(len(content), 1)
    if kind == "flip" and content:
        content[offset] ^= 1 << length % 8
    elif kind in ("fill", "zero"):
        stop = min(offset + length, len(content))
        content[offset:stop] = (b"\xff" if kind == "fill" else b"\0") * (stop - offset)
    elif kind == "truncate":
        del content[offset:]
    elif kind == "delete":
        path.unlink()
        return
    elif kind in ("older", "stale", "foreign"):
        other = logs.folder / kind / sub / name
        content = bytearray(other.read_bytes()) if other.exists() else bytearray(len(content) if sub == "log" else 0)
    path.write_bytes(content)


TWO_STALE = [("log", 2, "stale", 0, 1), ("log", 3, "stale", 0, 1)]
"""Neighbours of one overwritten history: they lead on to each other, but not to the segment behind them."""

REPLACED = [
    TWO_STALE,
    [("log", 0, "foreign", 0, 1)],  # its first frame has nothing before it, as the log's
    [("log", 0, "foreign", 0, 1), ("log", 1, "foreign", 0, 1)],
    [("log", 3, "foreign", 0, 1), ("log", 4, "foreign", 0, 1)],
    [("log", 2, "stale", 0, 1), ("rows", 2, "stale", 0, 1)],  # rows and frames agree, and belong to what was cut
    [("log", 2, "foreign", 0, 1), ("rows", 2, "foreign", 0, 1)],
    [("log", 0, "truncate", 0, 1), ("rows", 0, "foreign", 0, 1)],  # rows of entries that the next segment has
]


@pytest.mark.parametrize("damages", REPLACED)
def test_the_true_ends_of_replaced_segments_are_reported_and_a_twin_repairs_them_to_the_byte(
    logs: Logs, damages: list[tuple[str, int, str, int, int]]
) -> None:
    work = copied(logs.folder / "whole", logs.folder / "work")
    for damage in damages:
        inflict(work, logs, damage)
    Bench(work, logs.entries, logs.entries[-1].index).heal()
    assert log_files(work) == log_files(logs.folder / "whole")


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3))
@example(damages=TWO_STALE)
@example(damages=[*TWO_STALE, ("rows", 3, "flip", 0, 1)])
@example(damages=[("log", 4, "delete", 0, 1), ("log", 5, "foreign", 0, 1)])
@example(damages=[("log", 5, "foreign", 0, 1), ("rows", 5, "foreign", 0, 1)])
@example(damages=[("log", 4, "delete", 0, 1), ("rows", 5, "stale", 0, 1), ("log", 5, "foreign", 0, 1)])
@example(damages=[("log", 3, "zero", 1990, 2), ("rows", 3, "flip", 2969, 2082)])
def test_any_damage_is_reported_and_healed(logs: Logs, damages: list[tuple[str, int, str, int, int]]) -> None:
    work = copied(logs.folder / "whole", logs.folder / "work")
    for damage in damages:
        inflict(work, logs, damage)
    bench = Bench(work, logs.entries, logs.entries[-1].index)
    recovered = bench.recover()
    for segment in recovered.segments:
        segment.close()
    bench.heal()
    trio.run(bench.read_everything_or_mark)


def test_what_was_reserved_and_never_written_is_not_read_at_a_start(tmp_path: Path) -> None:
    nbytes = 16 << 20
    files = test_env(tmp_path).files
    for folder in ("log", "rows"):
        files.make_dirs(str(tmp_path / folder))
    segment = create_segment(files, str(tmp_path), 0, nbytes)
    segment.file.pwrite(b"entries", 0)
    read: list[int] = []
    real = RealFile.pread

    def counted(file: RealFile, nbytes: int, offset: int) -> bytes:
        read.append(nbytes)
        return real(file, nbytes, offset)

    with mock.patch.object(RealFile, "pread", counted):
        assert segment.nonzero_from(7) is None
    if len(segment.file.data_extents(0)) != 1 or segment.file.data_extents(0)[0][1] < nbytes:
        assert sum(read) <= nbytes // 8
    segment.file.pwrite(b"x", 10 << 20)
    assert segment.nonzero_from(7) == 10 << 20
    assert segment.used_from(7) == 1
    segment.close()
