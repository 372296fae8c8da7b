"""What the store has opened it closes, also when whoever waits for it is cancelled in between."""

from __future__ import annotations

import errno
import gc
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile
from dledger.store.segments import Segment, open_segment
from runtime.files import RealFiles
from runtime.testing import test_env
from tests.unit.dledger.store.store_kit import (
    IDENTITY,
    SEGMENT,
    Framer,
    copied,
    fresh,
    opened,
    read_all,
    some_entries,
    write_log,
)

ENTRIES = some_entries(Framer(), random.Random(21), 60, 1)
STEPS_MAX = 12


def held(folder: Path) -> tuple[int, int]:
    """(descriptors, maps) of files below a folder, removed ones too."""
    gc.collect()
    names = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in name for name in names), sum(str(folder) in line for line in maps)


async def is_cancelled(folder: Path, action: Callable[[LogStore], Awaitable[None]], step: int) -> bool:
    """Open a log, read of it, perform `action` and close it; cancelled as it comes to its n-th wait for a thread or
    for the meta slot. False where it has no such wait."""
    store, _ = await opened(test_env(folder), folder)
    for segment in store._segments:
        assert store.read(segment.base, 64) is not None
    left = [step]
    with trio.CancelScope() as scope:

        def passing(function: Callable[..., Awaitable[Any]]) -> Any:
            async def call(*args: Any) -> Any:
                if left[0] == 0:
                    scope.cancel()
                left[0] -= 1
                return await function(*args)

            return call

        store._env = evolve(store._env, run_in_thread=passing(store._env.run_in_thread))
        store._meta.save_mark = passing(store._meta.save_mark)  # type: ignore[method-assign]
        await action(store)
    store.abandon()
    store._meta.close()
    return scope.cancelled_caught


async def at_each_wait(folder: Path, action: Callable[[LogStore], Awaitable[None]]) -> int:
    """As `is_cancelled`, for each of its waits, on a copy of the log; returns how many there are."""
    work = folder.parent / "work"
    for step in range(STEPS_MAX):
        copied(folder, work)
        if not await is_cancelled(work, action, step):
            return step
        await trio.lowlevel.checkpoint()  # lets go of the cancellation, and what its traceback holds
        assert held(work) == (0, 0), f"cancelled at step {step}"
        store, recovered = await opened(test_env(work), work)
        assert not recovered.faults and read_all(store) == ENTRIES[store.first_index - 1 : store.last_index]
        store.abandon()
        store._meta.close()
    raise AssertionError("has no end")


async def test_a_cancelled_trim_leaves_nothing_open(tmp_path: Path) -> None:
    await write_log(tmp_path / "log", ENTRIES)
    assert await at_each_wait(tmp_path / "log", lambda store: store.trim(3 * SEGMENT)) >= 3


async def test_a_cancelled_cut_leaves_nothing_open(tmp_path: Path) -> None:
    await write_log(tmp_path / "log", ENTRIES)
    assert await at_each_wait(tmp_path / "log", lambda store: store.cut(12)) == 2


@pytest.mark.parametrize(
    "broken", ["log_store.create_segment", "log_store.clear_failed", "recovery.read_suspects", "recovery.open_segment"]
)
async def test_a_log_that_cannot_be_opened_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken != "log_store.create_segment":
        await write_log(tmp_path, ENTRIES)
    else:
        store = await fresh(test_env(tmp_path), tmp_path)
        store.abandon()
        store._meta.close()
        for sub in ("log", "rows"):
            for path in (tmp_path / sub).iterdir():
                path.unlink()
    meta = MetaFile.open(RealFiles(), str(tmp_path), IDENTITY)

    def fails(*args: Any) -> Segment:
        if broken == "recovery.open_segment" and args[2] < 2 * SEGMENT:
            return open_segment(*args)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(f"dledger.store.{broken}", fails)
    with pytest.raises(OSError, match="Input/output"):
        await LogStore.open(test_env(tmp_path), str(tmp_path), SEGMENT, meta)
    meta.close()
    assert held(tmp_path) == (0, 0)
