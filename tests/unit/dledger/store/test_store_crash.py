"""Power lost at any operation of a trim, a cut, a repair, an installation: the old or the new state, never a third."""

from __future__ import annotations

import copy
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from zlib import crc32

import pytest
from attrs import evolve

from dledger.core.types import Entry
from dledger.store.checkpoint import (
    Checkpoint,
    Stock,
    pack_checkpoint,
    read_checkpoint,
    take_stock,
    write_checkpoint,
)
from dledger.store.log_store import LogStore, format_folder
from dledger.store.meta import MetaFile
from dledger.store.options import StoreOptions
from dledger.store.recovery import RecoveredLog
from dledger.store.repair import drop_open_fault, write_repair
from dledger.store.segments import segment_name
from dledger.store.staging import Staging, complete_install
from runtime.model import Env
from runtime.testing import test_env
from tests.unit.dledger.store.crash_files import CrashFiles, PowerLoss
from tests.unit.dledger.store.store_kit import IDENTITY, SEGMENT, Framer, append, read_all, some_entries

T = TypeVar("T")
FOLDER = "/data/raft"
LOSSES: list[random.Random | bool] = [False, True, *(random.Random(seed) for seed in range(1))]
ENTRIES = some_entries(Framer(), random.Random(5), 60, 1)


async def at_once(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


def env_of(files: CrashFiles) -> Env:
    return evolve(test_env(), files=files, run_in_thread=at_once)


async def opened(files: CrashFiles) -> tuple[LogStore, RecoveredLog]:
    meta = MetaFile.open(files, FOLDER, IDENTITY)
    return await LogStore.open(env_of(files), FOLDER, SEGMENT, meta)


async def built(entries: list[Entry], *, synced: bool = True) -> CrashFiles:
    files = CrashFiles()
    files.make_dirs(FOLDER)
    env = env_of(files)
    format_folder(env, FOLDER, IDENTITY)
    store, _ = await opened(files)
    await store._meta.save_hard_state(7, "n2")
    await append(store, entries)
    if synced:
        await store.close()
        await store._meta.save_mark(store.durable_index)
    return files


async def at_every_operation(
    before: CrashFiles,
    action: Callable[[CrashFiles], Awaitable[None]],
    check: Callable[[CrashFiles, bool], Awaitable[None]],
    losses: Sequence[random.Random | bool] = LOSSES,
) -> None:
    """Perform `action` once for each of its operations, losing power there, and `check` what a restart finds."""
    count = 0
    while True:
        is_done = False
        for loss in losses:
            files = copy.deepcopy(before)
            files.operations_left = count
            try:
                await action(files)
                is_done = True
            except PowerLoss:
                pass
            files.lose_power(copy.copy(loss))
            try:
                await check(files, is_done)
            except BaseException:
                print("operations:", *files.done[-12:], sep="\n  ")
                raise
        if is_done:
            return
        count += 1


async def test_trim() -> None:
    before = await built(ENTRIES)

    async def trim(files: CrashFiles) -> None:
        store, _ = await opened(files)
        await store.trim(2 * SEGMENT)

    first = next(entry.index for entry in ENTRIES if entry.position >= 2 * SEGMENT)
    assert first > 2
    allowed = (1, first)

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        assert not recovered.faults and store.first_index in allowed
        assert not is_done or store.first_index == first
        assert read_all(store) == ENTRIES[store.first_index - 1 :]
        if store.first_index > 1:
            last = ENTRIES[store.first_index - 2]
            assert (store.term_at(last.index), store.head_crc_at(last.index)) == (1, last.head_crc)
            assert store.first_position == 2 * SEGMENT

    await at_every_operation(before, trim, check)


@pytest.mark.parametrize("from_index", [12, 55])
async def test_scenario_11_cut(from_index: int) -> None:
    """Crash during truncation: what was cut never comes back behind entries that replaced it."""
    before = await built(ENTRIES)
    framer = Framer()
    framer.back_to(ENTRIES[from_index - 2])
    others = some_entries(framer, random.Random(9), 15, 2)

    async def cut(files: CrashFiles) -> None:
        store, _ = await opened(files)
        if store.needs_spare:
            await store.prepare_spare()
        await store.cut(from_index)
        await append(store, others)
        await store.sync()

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        assert not recovered.faults
        found = read_all(store)
        kept = ENTRIES[: from_index - 1]
        if is_done:
            assert found == kept + others
        elif len(found) >= from_index and found[from_index - 1].term == 2:
            assert found == (kept + others)[: len(found)]
        else:
            assert found == ENTRIES[: len(found)] and len(found) >= from_index - 1

    await at_every_operation(before, cut, check)


@pytest.mark.parametrize("from_index", [3, 15, 55])
async def test_scenario_11_a_cut_that_a_kill_ends_leaves_no_damage(from_index: int) -> None:
    """The page cache keeps what was written: at no moment may an intact frame lie behind what is zeros already."""
    before = await built(ENTRIES)

    async def cut(files: CrashFiles) -> None:
        store, _ = await opened(files)
        await store.cut(from_index)

    async def check(files: CrashFiles, is_done: bool) -> None:
        meta = MetaFile.open(files, FOLDER, IDENTITY)
        options = StoreOptions(is_cache_kept=True)
        store, recovered = await LogStore.open(env_of(files), FOLDER, SEGMENT, meta, options)
        assert not recovered.faults and read_all(store) == ENTRIES[: store.last_index]
        assert store.last_index == from_index - 1 if is_done else store.last_index >= from_index - 1

    await at_every_operation(before, cut, check, [True])


async def test_scenario_10_repair() -> None:
    """A bit flip and a lost segment: either still reported, or healed."""
    before = await built(ENTRIES)
    path = f"{FOLDER}/log/{segment_name(SEGMENT)}"
    inode = before.open(path).inode
    inode.cached[300] ^= 4
    inode.durable = bytes(inode.cached)
    before.unlink(f"{FOLDER}/log/{segment_name(2 * SEGMENT)}")
    before.sync_dir(f"{FOLDER}/log")

    async def repair(files: CrashFiles) -> None:
        while True:
            _, recovered = await opened(files)
            if not recovered.faults:
                return
            fault = recovered.faults[0]
            assert fault.last_index is not None
            write_repair(files, FOLDER, SEGMENT, fault, ENTRIES[fault.first_index - 1 : fault.last_index])

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        assert not is_done or not recovered.faults
        faulty = {
            index for fault in recovered.faults for index in range(fault.first_index, (fault.last_index or 0) + 1)
        }
        assert store.last_index == len(ENTRIES)
        for entry in ENTRIES:
            if entry.index not in faulty:
                assert store.entries(entry.index, 1)[0] == entry

    await at_every_operation(before, repair, check)


async def test_scenario_07_a_damaged_end_is_given_up() -> None:
    """The end of the log is gone for good: it is dropped, and is a shorter log or still damage at any crash."""
    before = await built(ENTRIES)
    last_base = ENTRIES[-1].position // SEGMENT * SEGMENT
    inode = before.open(f"{FOLDER}/log/{segment_name(last_base)}").inode
    inode.cached[:] = bytes(SEGMENT)
    inode.durable = bytes(SEGMENT)

    async def drop(files: CrashFiles) -> None:
        store, recovered = await opened(files)
        (fault,) = recovered.faults
        assert fault.is_open and fault.last_index == len(ENTRIES)
        await drop_open_fault(env_of(files), FOLDER, SEGMENT, store._meta, fault)

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        assert not is_done or not recovered.faults
        assert all(fault.is_open for fault in recovered.faults)
        first = next(entry.index for entry in ENTRIES if entry.position >= last_base)
        assert store.last_index == first - 1
        assert read_all(store) == ENTRIES[: store.last_index]

    await at_every_operation(before, drop, check)


async def test_install_ends_in_the_old_or_the_new_log() -> None:
    others = some_entries(Framer(), random.Random(77), 60, 3)
    source = await built(others)
    giver, _ = await opened(source)
    await giver.trim(SEGMENT)
    manifest = giver.manifest()
    before = await built(ENTRIES[:20])
    write_checkpoint(before, FOLDER, 15, b"old")
    checkpoint = pack_checkpoint(Checkpoint(manifest.segments[-1].last_index, b"new"))
    chunks = {info.base: await giver.read_in_thread(info.base, SEGMENT) for info in manifest.segments}

    async def install(files: CrashFiles) -> None:
        staging = Staging.open(files, FOLDER, manifest)
        for base, offset, nbytes in staging.missing():
            data = chunks[base][offset : offset + nbytes]
            staging.put(base, offset, data, crc32(data))
        staging.finish(checkpoint)
        staging.close()
        assert complete_install(files, FOLDER)

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        saved = store._meta.saved
        assert (saved.term, saved.vote) == (7, "n2")
        tables = read_checkpoint(files, FOLDER)
        found = read_all(store)
        assert tables is not None
        if tables.blob == b"new":
            last = manifest.segments[-1].last_index
            assert found == others[manifest.base.index : last] and store.first_index == manifest.base.index + 1
            assert store.term_at(manifest.base.index) == 3 and not files.exists(f"{FOLDER}/incoming")
        else:
            assert not is_done and found == ENTRIES[:20]
        assert not recovered.faults

    await at_every_operation(before, install, check)


async def test_scenario_25_checkpoint_rotation() -> None:
    files = await built(ENTRIES[:3])
    write_checkpoint(files, FOLDER, 1, b"one")
    write_checkpoint(files, FOLDER, 2, b"two", config=b"members", config_index=2)

    async def rotate(files: CrashFiles) -> None:
        write_checkpoint(files, FOLDER, 3, b"three")

    async def check(files: CrashFiles, is_done: bool) -> None:
        found = read_checkpoint(files, FOLDER)
        assert found is not None and found.blob in ((b"three",) if is_done else (b"two", b"three"))
        if found.blob == b"two":
            assert (found.config, found.config_index) == (b"members", 2)

    await at_every_operation(files, rotate, check)


async def test_scenario_09_rolls_and_syncs_lose_nothing_durable() -> None:
    before = await built(ENTRIES[:5])
    durable = [5]

    async def write(files: CrashFiles) -> None:
        durable[0] = 5
        store, _ = await opened(files)
        if store.needs_spare:
            await store.prepare_spare()
        for first in range(5, 60, 11):
            await append(store, ENTRIES[first : first + 11])
            durable[0] = max(durable[0], await store.sync())

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        assert not recovered.faults
        found = read_all(store)
        assert len(found) >= durable[0] and found == ENTRIES[: len(found)]

    await at_every_operation(before, write, check)


async def test_scenario_10_a_lost_beginning_comes_back_or_is_still_reported() -> None:
    """Segments and side rows; never does it pass for a trimmed log, nor for an empty one."""
    before = await built(ENTRIES)
    for sub in ("log", "rows"):
        for base in (0, SEGMENT):
            before.unlink(f"{FOLDER}/{sub}/{segment_name(base)}")
        before.sync_dir(f"{FOLDER}/{sub}")

    async def repair(files: CrashFiles) -> None:
        _, recovered = await opened(files)
        (fault,) = recovered.faults
        assert (fault.first_index, fault.position) == (1, 0)
        write_repair(files, FOLDER, SEGMENT, fault, ENTRIES[: fault.last_index])
        await opened(files)

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        assert store.first_index == 1 and store.last_index == len(ENTRIES)
        if recovered.faults:
            assert not is_done and recovered.faults[0].first_index == 1
        else:
            assert read_all(store) == ENTRIES

    await at_every_operation(before, repair, check)


async def test_scenario_10_a_log_of_which_nothing_is_left_is_given_up_or_still_reported() -> None:
    before = await built(ENTRIES)
    for sub in ("log", "rows"):
        for name in before.listdir(f"{FOLDER}/{sub}")[:-1]:
            before.unlink(f"{FOLDER}/{sub}/{name}")
        before.sync_dir(f"{FOLDER}/{sub}")
    meta = MetaFile.open(before, FOLDER, IDENTITY)
    await meta.save_mark(0)  # nor is there a mark

    async def drop(files: CrashFiles) -> None:
        store, recovered = await opened(files)
        (fault,) = recovered.faults
        assert fault.is_open and fault.first_index == 1
        await store._meta.save_recovering(True)
        await drop_open_fault(env_of(files), FOLDER, SEGMENT, store._meta, fault)

    async def check(files: CrashFiles, is_done: bool) -> None:
        store, recovered = await opened(files)
        assert not is_done or not recovered.faults
        assert recovered.faults or (store._meta.saved.recovering and store.first_position == store.position_end == 0)

    await at_every_operation(before, drop, check)


async def test_4_9_a_checkpoint_behind_the_end_of_the_log_is_gone_for_good() -> None:
    before = await built(ENTRIES[:10])
    write_checkpoint(before, FOLDER, 9, b"nine")
    write_checkpoint(before, FOLDER, 20, b"twenty")

    async def start(files: CrashFiles) -> None:
        assert take_stock(files, FOLDER, last_index=10) == Stock(Checkpoint(9, b"nine"), (9, 0), [20])

    async def check(files: CrashFiles, is_done: bool) -> None:
        newest = read_checkpoint(files, FOLDER)
        assert newest is not None and newest.index in ((9,) if is_done else (9, 20))

    await at_every_operation(before, start, check)


async def test_4_2_the_start_of_a_run_is_in_the_slots_or_the_run_before_it() -> None:
    before = await built(ENTRIES[:2])
    meta = MetaFile.open(before, FOLDER, IDENTITY)
    await meta.save_started(b"old!", is_async=True)

    async def start(files: CrashFiles) -> None:
        await MetaFile.open(files, FOLDER, IDENTITY).save_started(b"new!", recovering=True)

    async def check(files: CrashFiles, is_done: bool) -> None:
        saved = MetaFile.open(files, FOLDER, IDENTITY).saved
        assert (saved.boot, saved.is_async, saved.recovering) in (
            [(b"new!", False, True)] if is_done else [(b"old!", True, False), (b"new!", False, True)]
        )
        assert (saved.term, saved.vote) == (7, "n2")

    await at_every_operation(before, start, check)
