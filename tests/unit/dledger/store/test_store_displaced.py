"""Files of the log that somebody removes, replaces or truncates while it is open: noticed, and never a SIGBUS."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from dledger.store.faults import EntryDamaged, read_suspects
from dledger.store.repair import write_repair
from dledger.store.segments import segment_name
from runtime.files import RealFiles
from runtime.testing import test_env
from tests.unit.dledger.store.store_kit import (
    SEGMENT,
    Framer,
    append,
    fresh,
    opened,
    read_all,
    some_entries,
    write_log,
)

ENTRIES = some_entries(Framer(), random.Random(21), 60, 1)
LAST_BASE = ENTRIES[-1].position // SEGMENT * SEGMENT


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    """By a copy with the same bytes: what is written to the file that is open would be lost all the same."""
    shutil.copyfile(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize("base", [SEGMENT, LAST_BASE])
@pytest.mark.parametrize(
    ("sub", "displace", "told"),
    [
        ("log", remove, "was removed or replaced"),
        ("log", replace, "was removed or replaced"),
        ("log", truncate, "was truncated"),
        ("rows", remove, "the side rows of segment"),
    ],
)
async def test_a_file_that_is_not_in_its_place_any_more_is_noticed(
    tmp_path: Path, sub: str, displace: Callable[[Path], None], told: str, base: int
) -> None:
    await write_log(tmp_path, ENTRIES)
    store, _ = await opened(test_env(tmp_path), tmp_path)
    await store.check_files()
    displace(tmp_path / sub / segment_name(base))
    with pytest.raises(EntryDamaged, match=told) as caught:
        await store.check_files()
    first = next(entry.index for entry in ENTRIES if entry.position >= base)
    assert (caught.value.fault.first_index, caught.value.fault.position) == (first, base)
    assert store.damage is caught.value and read_suspects(RealFiles(), str(tmp_path)) == {base}
    with pytest.raises(EntryDamaged, match=told):
        await store.scrub(1 << 40)
    store.abandon()
    store, recovered = await opened(test_env(tmp_path), tmp_path)
    store.abandon()
    if sub == "rows" or displace is replace:
        assert not recovered.faults
    else:
        (fault,) = recovered.faults
        assert fault.first_index == first and fault.is_open == (base == LAST_BASE)
        if not fault.is_open:
            write_repair(RealFiles(), str(tmp_path), SEGMENT, fault, ENTRIES[first - 1 : fault.last_index])
            again, recovered = await opened(test_env(tmp_path), tmp_path)
            assert not recovered.faults and read_all(again) == ENTRIES
            again.abandon()


async def test_files_are_looked_at_once_a_minute(tmp_path: Path, autojump_clock: MockClock) -> None:
    await write_log(tmp_path, ENTRIES)
    store, _ = await opened(test_env(tmp_path), tmp_path)
    there = store.check_files
    looked: list[float] = []

    async def check_files() -> None:
        looked.append(trio.current_time() - began)
        if len(looked) == 3:
            remove(tmp_path / "log" / segment_name(SEGMENT))
        await there()

    store.check_files = check_files  # type: ignore[method-assign]
    began = trio.current_time()
    with pytest.raises(EntryDamaged):
        await store.watch_files()
    assert looked == pytest.approx([60, 120, 180])
    store.abandon()


async def test_a_spare_segment_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES[:3])
    spare = tmp_path / "log" / segment_name(SEGMENT)
    spare.unlink()
    await store.check_files()
    assert store.needs_spare
    await append(store, ENTRIES[3:])
    await store.check_files()
    await store.close()
    assert read_all((await opened(test_env(tmp_path), tmp_path))[0]) == ENTRIES


async def test_a_file_that_a_trim_or_a_cut_removes_is_no_damage(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    store, _ = await opened(test_env(tmp_path), tmp_path)
    there = store._displaced

    def after(action: Callable[[], object], segments: list[object]) -> dict[int, str]:
        action()
        found = there(segments)  # type: ignore[arg-type]
        assert found
        return found

    for change in (lambda: store.trim(2 * SEGMENT), lambda: store.cut(ENTRIES[-20].index)):
        store._displaced = lambda segments, change=change: after(  # type: ignore[method-assign]
            lambda: trio.from_thread.run(change), segments
        )
        await store.check_files()
    store.abandon()


@pytest.mark.parametrize("is_verified", [False, True])
async def test_scenario_10_what_lies_in_a_truncated_file_is_damaged_and_the_process_lives(
    tmp_path: Path, is_verified: bool
) -> None:
    await write_log(tmp_path, ENTRIES)
    store, _ = await opened(test_env(tmp_path), tmp_path)
    entry = next(entry for entry in ENTRIES if entry.position >= SEGMENT + 5000)
    if is_verified:
        for number in range(SEGMENT // 1024):
            store.read(SEGMENT + 1024 * number, 1024)
    os.truncate(tmp_path / "log" / segment_name(SEGMENT), 4096)
    with pytest.raises(EntryDamaged):
        store.read(entry.position, 64)  # the bytes themselves would end the process
    with pytest.raises(EntryDamaged):
        await store.read_in_thread(entry.position, 64)
    with pytest.raises(EntryDamaged):
        store.entries(entry.index, 1)
    if is_verified:
        with pytest.raises(EntryDamaged):
            store.read_cached(entry.position, 64)
    assert read_suspects(RealFiles(), str(tmp_path)) == {SEGMENT}
    store.abandon()
