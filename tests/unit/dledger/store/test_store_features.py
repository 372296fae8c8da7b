"""What the store promises its users beside recovery: reads, trims, membership entries, transfers, failures."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import trio
from attrs import evolve

from dledger.core.types import Entry, EntryType
from dledger.errors import LogDamaged, StoreFailed
from dledger.store.base import BaseRecord
from dledger.store.checkpoint import _HEADER_1 as HEADER_1
from dledger.store.checkpoint import _HEADER_2 as HEADER_2
from dledger.store.checkpoint import (
    CHECKPOINT_MAGIC,
    Checkpoint,
    Stock,
    read_checkpoint,
    take_stock,
    unpack_checkpoint,
    write_checkpoint,
)
from dledger.store.failure import has_failed
from dledger.store.faults import EntryDamaged, add_suspects, read_suspects
from dledger.store.log_store import LogStore, format_folder
from dledger.store.manifest import Manifest, SegmentInfo
from dledger.store.meta import META_MAGIC, SLOT_BYTES, SLOT_DISTANCE, Meta, MetaFile, boot_tag, identity_of, pack_slot
from dledger.store.options import StoreOptions
from dledger.store.repair import drop_open_fault, write_repair
from dledger.store.segments import create_segment, segment_name
from dledger.store.staging import Staging, complete_install, decode_manifest, encode_manifest
from runtime.files import RealFile, RealFiles
from runtime.testing import test_env, wait_until
from tests.unit.dledger.store.store_kit import (
    IDENTITY,
    SEGMENT,
    Framer,
    append,
    copied,
    fresh,
    make_unreadable,
    opened,
    read_all,
    some_entries,
    write_log,
)

ENTRIES = some_entries(Framer(), random.Random(21), 60, 1)


async def reopened(folder: Path) -> LogStore:
    return (await opened(test_env(folder), folder))[0]


def damage(folder: Path, position: int) -> None:
    base = position // SEGMENT * SEGMENT
    with (folder / "log" / segment_name(base)).open("r+b") as file:
        file.seek(position - base)
        byte = file.read(1)
        file.seek(position - base)
        file.write(bytes([byte[0] ^ 0x10]))


async def test_nothing_of_a_closed_segment_is_served_unverified(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    damage(tmp_path, ENTRIES[4].position + 70)
    store = await reopened(tmp_path)
    sound = ENTRIES[2]
    assert store.read_cached(sound.position, 10) is None  # not before somebody has verified it
    with pytest.raises(EntryDamaged) as caught:
        store.read(sound.position, 10)
    assert caught.value.fault.first_index == 5 and store.damage is caught.value
    with pytest.raises(EntryDamaged):
        await store.read_in_thread(sound.position, 10)
    with pytest.raises(EntryDamaged):
        store.entries(5, 1)
    assert store.entries(3, 1)[0] == sound
    closed = ENTRIES[30]
    assert store.read_cached(closed.position, 10) is None
    view = store.read(closed.position, len(closed.frame))
    assert view is not None and view == closed.frame and store.read_cached(closed.position, 10) == closed.frame[:10]
    assert read_suspects(RealFiles(), str(tmp_path)) == {0}
    store.abandon()
    again, recovered = await opened(test_env(tmp_path), tmp_path)  # which looks where damage was met
    (fault,) = recovered.faults
    assert (fault.first_index, fault.last_index) == (5, 5)
    again.abandon()
    with pytest.raises(LogDamaged, match="does not continue"):
        write_repair(RealFiles(), str(tmp_path), SEGMENT, fault, ENTRIES[5:6])
    write_repair(RealFiles(), str(tmp_path), SEGMENT, fault, ENTRIES[4:5])
    healed = await reopened(tmp_path)
    assert read_all(healed) == ENTRIES and read_suspects(RealFiles(), str(tmp_path)) == frozenset()
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert kept.read_bytes() != ENTRIES[4].frame and len(kept.read_bytes()) == len(ENTRIES[4].frame)


async def test_scrub_finds_what_nobody_reads(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    store = await reopened(tmp_path)
    closed = len(store._segments) - 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.scrub, 1 << 40)
        await wait_until(lambda: store.scrubbed_chunks == closed)
        nursery.cancel_scope.cancel()
    assert all(segment.unverified is None for segment in store._segments)
    damage(tmp_path, ENTRIES[20].position + 3)
    with pytest.raises(EntryDamaged, match="entry 21 "):
        await store.scrub(1 << 40)


async def test_trim_keeps_the_chain_comparable_and_maps_valid(tmp_path: Path) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES)
    await store.sync()
    view = store.read(0, 64)
    bases = [segment.base for segment in store._segments]
    await store.trim(SEGMENT - 1)
    assert store.first_index == 1
    await store.trim(SEGMENT)
    first = next(entry for entry in ENTRIES if entry.position >= SEGMENT)
    assert (store.first_index, store.first_position) == (first.index, SEGMENT)
    assert view is not None and view == ENTRIES[0].frame[:64] and store.read(0, 64) is None
    await store.trim(1 << 60)
    assert store.first_position == bases[-2], "the active segment and the one before it stay"
    last = ENTRIES[store.first_index - 2]
    await store.close()
    again = await reopened(tmp_path)
    assert read_all(again) == ENTRIES[last.index :]
    for each in (store, again):
        assert (each.term_at(last.index), each.head_crc_at(last.index)) == (1, last.head_crc)
        assert each.term_at(last.index - 1) is None and each.position_of(last.index) is None
        assert each.position_of(last.index + 1) == bases[-2]
    again.abandon()
    for name in ("base", "base.1"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes(len(content)))
        if name == "base":
            assert read_all(await reopened(tmp_path)) == ENTRIES[last.index :]
    _, recovered = await opened(test_env(tmp_path), tmp_path)
    (fault,) = recovered.faults
    assert (fault.first_index, fault.last_index) == (1, last.index)


async def test_trim_on_a_full_disk_makes_its_own_room_or_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what gives room back, so it must neither end the node nor need room that is not there."""
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES)
    await store.sync()
    assert store._spare is not None
    files, spare = RealFiles(), store._spare.file.path
    write_atomic, left = RealFiles.write_atomic, [0]

    def full(each: RealFiles, path: str, data: bytes) -> None:
        if "base" in path and (files.exists(spare) or left):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomic(each, path, data)

    monkeypatch.setattr(RealFiles, "write_atomic", full)
    await store.trim(SEGMENT)
    assert store.first_index == 1 and not files.exists(spare) and store.needs_spare
    await store.prepare_spare()
    left.clear()
    await store.trim(SEGMENT)
    assert store.first_position == SEGMENT and not files.exists(spare)
    await store.prepare_spare()
    assert read_all(store) == ENTRIES[store.first_index - 1 :]
    await store.close()
    assert read_all(await reopened(tmp_path)) == ENTRIES[store.first_index - 1 :]


async def test_files_of_an_abandoned_log_stay_open_while_a_thread_reads(tmp_path: Path) -> None:
    """Else their descriptors might be another file's by then, and its bytes be taken for messages."""
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES)
    segment = store._segments[0]
    segment.enter()
    store.abandon()
    assert segment.file.pread(64, 0) == ENTRIES[0].frame[:64]
    segment.leave()
    with pytest.raises(OSError, match="Bad file descriptor"):
        segment.file.pread(64, 0)


async def test_config_entries_are_found_without_a_walk(tmp_path: Path) -> None:
    framer = Framer()
    entries = []
    for number in range(70):
        is_config = number in (3, 30, 69)
        entries.append(framer.next(b"%d" % number * 150, 1, 0, EntryType.CONFIG if is_config else EntryType.DATA))
    wanted = [(entries[n].index, bytes(entries[n].body)) for n in (3, 30, 69)]
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, entries)
    assert store.config_entries(0) == wanted
    await store.close()
    again, recovered = await opened(test_env(tmp_path), tmp_path)
    assert recovered.entries_walked < 30
    assert again.config_entries(0) == wanted and again.config_entries(4) == wanted[1:]
    await again.cut(70)
    assert again.config_entries(0) == wanted[:2]
    again.abandon()
    rows = tmp_path / "rows" / segment_name(entries[30].position // SEGMENT * SEGMENT)
    content = bytearray(rows.read_bytes())
    content[40:-40] = bytes(len(content) - 80)  # lost rows: the frames tell
    rows.write_bytes(content)
    assert (await reopened(tmp_path)).config_entries(0) == wanted[:2]


async def test_config_entries_beside_damage_are_found_although_the_side_rows_are_another_logs(tmp_path: Path) -> None:
    def entries(salt: bytes, config: int | None) -> list[Entry]:
        framer = Framer()
        kinds = [EntryType.CONFIG if number == config else EntryType.DATA for number in range(70)]
        return [framer.next(b"%d" % n * 150 if n < 30 else salt * 300, type=kind) for n, kind in enumerate(kinds)]

    ours = entries(b"a", 34)
    await write_log(tmp_path / "ours", ours)
    await write_log(tmp_path / "other", entries(b"b", None))
    name = segment_name(ours[34].position // SEGMENT * SEGMENT)
    shutil.copy(tmp_path / "other" / "rows" / name, tmp_path / "ours" / "rows" / name)
    damage(tmp_path / "ours", ours[40].position + 70)
    store, recovered = await opened(test_env(tmp_path), tmp_path / "ours")
    assert [(fault.first_index, fault.last_index) for fault in recovered.faults] == [(41, 41)]
    with pytest.raises(EntryDamaged):  # which may be one as well
        store.config_entries(0)
    store.abandon()
    await write_log(tmp_path / "again", ours)
    damage(tmp_path / "again", ours[40].position + 70)
    add_suspects(RealFiles(), str(tmp_path / "again"), [int(name)])
    store, recovered = await opened(test_env(tmp_path), tmp_path / "again")
    assert recovered.faults and [index for index, _ in store.config_entries(0)] == [35], "its own row tells what it was"
    store.abandon()


async def test_manifest_and_chunks_make_the_same_log_elsewhere(tmp_path: Path) -> None:
    await write_log(tmp_path / "giver", ENTRIES)
    giver = await reopened(tmp_path / "giver")
    await giver.trim(SEGMENT)
    manifest = giver.manifest()
    assert decode_manifest(encode_manifest(manifest)) == manifest
    await write_log(tmp_path / "taker", some_entries(Framer(), random.Random(1), 5, 1), mark=False)
    files, folder = RealFiles(), str(tmp_path / "taker")
    staging = Staging.open(files, folder, manifest)
    wanted = staging.missing()
    assert wanted[0][:2] == (SEGMENT, 0)
    for base, offset, nbytes in wanted[:2]:
        data = await giver.read_in_thread(base + offset, nbytes)
        with pytest.raises(ValueError, match="damaged on the way"):
            staging.put(base, offset, data, crc32(data) ^ 1)
        staging.put(base, offset, data, crc32(data))
    staging.close()
    staging = Staging.open(files, folder, manifest)
    assert staging.missing() == wanted[2:], "goes on where it was"
    for base, offset, nbytes in wanted[2:]:
        data = await giver.read_in_thread(base + offset, nbytes)
        if base == wanted[2][0]:
            data = data[:100] + b"?" + data[101:]
        staging.put(base, offset, data, crc32(data))
    with pytest.raises(LogDamaged, match="as received is damaged"):
        staging.finish(None)
    assert staging.missing() == wanted[2:3] and not complete_install(files, folder)
    base, offset, nbytes = wanted[2]
    data = await giver.read_in_thread(base + offset, nbytes)
    staging.put(base, offset, data, crc32(data))
    staging.finish(None)
    staging.close()
    assert complete_install(files, folder) and not complete_install(files, folder)
    taker = await reopened(tmp_path / "taker")
    assert read_all(taker) == read_all(giver)[: taker.last_index + 1 - taker.first_index]
    assert taker.last_index == manifest.segments[-1].last_index
    framer = Framer()
    framer.back_to(ENTRIES[taker.last_index - 1])
    await append(taker, [framer.next(b"more", 2)])
    assert await giver.read_in_thread(0, 10) is None


async def test_slow_disk_moves_writes_to_a_thread_until_it_is_fast_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    monkeypatch.setattr("dledger.store.log_store.SLOW_WRITE_SECONDS", -1.0)
    await append(store, ENTRIES[:1])
    assert store.is_slow
    monkeypatch.setattr("dledger.store.log_store.SLOW_WRITE_SECONDS", 10.0)
    monkeypatch.setattr("dledger.store.log_store.FAST_WRITES_TO_TRUST", 3)
    gate = trio.Event()

    async def held(function: Callable[..., Any], *args: Any) -> Any:
        await gate.wait()
        return await test_env().run_in_thread(function, *args)

    store._env = evolve(store._env, run_in_thread=held)
    for number in (1, 2, 3):
        assert store.is_slow
        gate = trio.Event()
        store.accept(ENTRIES[number : number + 1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.write_in_thread)
            await wait_until(store._writing.locked)
            assert store.write() == number, "never two writers"
            gate.set()
        assert store.written_index == number + 1
    assert not store.is_slow and read_all(store) == ENTRIES[:4]


async def test_scenario_08_a_failed_sync_leaves_a_mark_and_nothing_cached_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES[:5])
    with monkeypatch.context() as patch:

        async def broken(_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr("runtime.files.RealFile.sync", broken)
        with pytest.raises(StoreFailed):
            await store.sync()
    assert (tmp_path / "failed").exists() and store.durable_index == 0
    store.abandon()
    dropped: list[str] = []
    monkeypatch.setattr(
        "runtime.files.RealFile.advise", lambda file, kind, *_: dropped.append(f"{kind} {Path(file.path).name}")
    )
    again = await reopened(tmp_path)
    assert f"dontneed {segment_name(0)}" in dropped and "dontneed meta" in dropped
    assert not (tmp_path / "failed").exists() and read_all(again) == ENTRIES[:5]


def break_sync_now(patch: pytest.MonkeyPatch, folder: str) -> None:
    """The disk does not take what lies in a folder of this name."""
    there = RealFile.sync_now

    def sync_now(file: RealFile) -> None:
        if f"/{folder}/" in file.path:
            raise OSError(errno.EIO, "Input/output error")
        there(file)

    patch.setattr(RealFile, "sync_now", sync_now)


@pytest.mark.parametrize("broken", ["log", "rows"])
async def test_scenario_08_a_cut_that_cannot_be_synced_leaves_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Its sync is also that of the entries before it, which were written and may not be on the disk now."""
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES[:4])
    await store.sync()
    await append(store, ENTRIES[4:6])
    break_sync_now(monkeypatch, broken)
    with pytest.raises(StoreFailed):
        await store.cut(4)
    assert has_failed(RealFiles(), str(tmp_path))
    store.abandon()


async def test_scenario_08_a_recovery_that_cannot_sync_what_it_keeps_leaves_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try would find the pages clean, and take for durable what is in memory alone."""
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES[:5])
    store.abandon()
    with monkeypatch.context() as patch:
        break_sync_now(patch, "log")
        with pytest.raises(OSError, match="Input/output"):
            await reopened(tmp_path)
    assert has_failed(RealFiles(), str(tmp_path))
    assert read_all(await reopened(tmp_path)) == ENTRIES[:5]
    assert not has_failed(RealFiles(), str(tmp_path))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
async def test_a_recovery_that_cannot_open_a_file_has_lost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """With the mark a voter that acknowledges from the page cache would take itself for one that has forgotten."""
    await write_log(tmp_path, ENTRIES[:5])

    def fails(*_: object) -> None:
        raise OSError(number, "not opened")

    monkeypatch.setattr("dledger.store.recovery.open_segment", fails)
    with pytest.raises(OSError, match="not opened"):
        await reopened(tmp_path)
    assert not has_failed(RealFiles(), str(tmp_path))


async def test_scenario_08_a_damaged_end_that_cannot_be_cut_leaves_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write_log(tmp_path, ENTRIES[:5])
    damage(tmp_path, ENTRIES[4].position + 5)
    store, recovered = await opened(test_env(tmp_path), tmp_path)
    store.abandon()
    (fault,) = recovered.faults
    break_sync_now(monkeypatch, "log")
    with pytest.raises(StoreFailed):
        await drop_open_fault(test_env(tmp_path), str(tmp_path), SEGMENT, store._meta, fault)
    assert has_failed(RealFiles(), str(tmp_path))


async def test_scenario_08_a_received_segment_that_cannot_be_synced_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was received is remembered over a restart, whose sync of clean pages would bring nothing to the disk."""
    await write_log(tmp_path / "giver", ENTRIES)
    giver = await reopened(tmp_path / "giver")
    files, folder, manifest = RealFiles(), str(tmp_path / "taker"), giver.manifest()
    staging = Staging.open(files, folder, manifest)
    wanted = staging.missing()
    for base, offset, nbytes in wanted:
        data = await giver.read_in_thread(base + offset, nbytes)
        staging.put(base, offset, data, crc32(data))
    with monkeypatch.context() as patch:
        break_sync_now(patch, "incoming/log")
        with pytest.raises(OSError, match="Input/output"):
            staging.finish(None)
    staging.close()
    assert Staging.open(files, folder, manifest).missing() == wanted[:1]


async def test_recovering_is_remembered_and_old_meta_files_are_read(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    format_folder(env, str(tmp_path), IDENTITY)
    path, own = tmp_path / "meta", identity_of(IDENTITY)
    old = bytearray(2 * SLOT_DISTANCE)
    for sequence, term in ((4, 8), (5, 9)):
        slot = bytearray(pack_slot(Meta(sequence=sequence, term=term, vote="n1"), own))
        slot[8] = 1
        slot[4:8] = crc32(slot[8:]).to_bytes(4, "little")
        old[sequence % 2 * SLOT_DISTANCE : sequence % 2 * SLOT_DISTANCE + SLOT_BYTES] = slot
    path.write_bytes(old)
    assert old[:4] == META_MAGIC.to_bytes(4, "little")
    meta = MetaFile.open(env.files, str(tmp_path), IDENTITY)
    assert (meta.saved.term, meta.saved.vote, meta.saved.recovering) == (9, "n1", False)
    await meta.save_started(boot_tag("b"), recovering=True)
    assert MetaFile.open(env.files, str(tmp_path), IDENTITY).saved == meta.saved and meta.saved.recovering
    await meta.save_started(boot_tag("c"))
    assert meta.saved.recovering, "a start alone confirms nothing"
    await meta.save_hard_state(10, "n2")
    for number in range(4):
        content = bytearray(path.read_bytes())
        content[number * SLOT_DISTANCE + 17] ^= 1
        damaged = tmp_path / "damaged"
        damaged.mkdir(exist_ok=True)
        (damaged / "meta").write_bytes(content)
        found = MetaFile.open(env.files, str(damaged), IDENTITY).saved
        assert (found.term, found.vote) == (10, "n2"), "one flipped bit never brings an older vote back"
    await meta.save_recovering(False)
    assert not MetaFile.open(env.files, str(tmp_path), IDENTITY).saved.recovering


def test_checkpoints_are_kept_in_pairs_and_version_1_is_read(tmp_path: Path) -> None:
    files, folder = RealFiles(), str(tmp_path)
    header = HEADER_1.pack(CHECKPOINT_MAGIC, 1, 0, 7, 3, crc32(b"old"), 0)[:-4]
    (tmp_path / "checkpoint").write_bytes(header + crc32(header).to_bytes(4, "little") + b"old")
    assert read_checkpoint(files, folder) == Checkpoint(7, b"old")
    write_checkpoint(files, folder, 9, b"nine", config=b"abc", config_index=4)
    assert read_checkpoint(files, folder) == Checkpoint(9, b"nine", b"abc", 4)
    assert read_checkpoint(files, folder, up_to=8) == Checkpoint(7, b"old")
    whole = (tmp_path / "checkpoint").read_bytes()
    for offset in range(len(whole)):
        damaged = whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]
        assert unpack_checkpoint(damaged) is None
    (tmp_path / "checkpoint").write_bytes(whole[:-1])
    assert read_checkpoint(files, folder) == Checkpoint(7, b"old")
    write_checkpoint(files, folder, 11, b"eleven")  # does not push the good one out for the damaged one
    assert read_checkpoint(files, folder, up_to=10) == Checkpoint(7, b"old")
    assert take_stock(files, folder, last_index=8) == Stock(Checkpoint(7, b"old"), (7, 0), [11])
    assert take_stock(files, folder, last_index=7) == Stock(Checkpoint(7, b"old"), (7, 0), [])
    assert take_stock(files, folder, last_index=6) == Stock(None, (0, 0), [7])
    assert read_checkpoint(files, folder) is None


def test_a_checkpoint_of_version_2_is_read_and_tells_of_no_trim(tmp_path: Path) -> None:
    files, folder = RealFiles(), str(tmp_path)
    header = HEADER_2.pack(CHECKPOINT_MAGIC, 2, 0, 7, 3, crc32(b"old"), 4, 2, crc32(b"ab"), 0)[:-4]
    (tmp_path / "checkpoint").write_bytes(header + crc32(header).to_bytes(4, "little") + b"ab" + b"old")
    assert read_checkpoint(files, folder) == Checkpoint(7, b"old", b"ab", 4)
    write_checkpoint(files, folder, 9, b"nine", config=b"abc", config_index=4, trimmed_position=1 << 40)
    assert read_checkpoint(files, folder) == Checkpoint(9, b"nine", b"abc", 4, 1 << 40)
    assert take_stock(files, folder, last_index=9).covered == (7, 9)
    (tmp_path / "checkpoint").write_bytes(b"damaged")
    assert take_stock(files, folder, last_index=9).covered == (7, 0)


async def test_scenario_12_torn_tail_of_several_frames_then_more(tmp_path: Path) -> None:
    """Some of the last frames never reached the disk, intact ones lie behind them, and nothing proves any durable."""
    await write_log(tmp_path, ENTRIES[:20], mark=False)
    for path in (tmp_path / "rows").iterdir():
        path.write_bytes(b"")
    for torn in (15, 17):
        damage(tmp_path, ENTRIES[torn].position + 5)
    store, recovered = await opened(test_env(tmp_path), tmp_path)
    tail = b"".join(entry.frame for entry in ENTRIES[15:20])
    assert not recovered.faults and read_all(store) == ENTRIES[:15]
    assert 0 < recovered.bytes_cut <= len(tail)
    framer = Framer()
    framer.back_to(ENTRIES[14])
    more = some_entries(framer, random.Random(2), 8, 2, 400)
    await append(store, more)
    store.abandon()
    assert read_all(await reopened(tmp_path)) == ENTRIES[:15] + more


async def test_commit_hint_is_evidence_only_with_sync_flush(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES[:10], mark=False)
    for path in (tmp_path / "rows").iterdir():
        path.write_bytes(b"")
    damage(tmp_path, ENTRIES[5].position + 5)
    files = test_env(tmp_path).files
    copied(tmp_path, tmp_path.parent / "twin")
    meta = MetaFile.open(files, str(tmp_path), IDENTITY)
    options = StoreOptions(hint_is_evidence=True)
    store, recovered = await LogStore.open(test_env(tmp_path), str(tmp_path), SEGMENT, meta, options)
    assert [fault.first_index for fault in recovered.faults] == [6] and store.last_index == 10
    twin, recovered = await opened(test_env(tmp_path), tmp_path.parent / "twin")
    assert not recovered.faults and twin.last_index == 5


@pytest.mark.parametrize("is_cache_kept", [True, False])
async def test_4_6_an_intact_frame_proves_what_lies_before_it_only_without_a_power_loss(
    tmp_path: Path, is_cache_kept: bool
) -> None:
    await write_log(tmp_path, ENTRIES[:10], mark=False)
    for path in (tmp_path / "rows").iterdir():
        path.write_bytes(b"")
    for damaged in (5, 9):
        damage(tmp_path, ENTRIES[damaged].position + 5)
    env = test_env(tmp_path)
    meta = MetaFile.open(env.files, str(tmp_path), IDENTITY)
    options = StoreOptions(is_cache_kept=is_cache_kept)
    store, recovered = await LogStore.open(env, str(tmp_path), SEGMENT, meta, options)
    faults = [(fault.first_index, fault.last_index) for fault in recovered.faults]
    assert (faults, store.last_index) == (([(6, 6)], 9) if is_cache_kept else ([], 5)), "a cut off last write is torn"


async def test_unreadable_bytes_are_damage_without_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await write_log(tmp_path, ENTRIES[:8], mark=False)
    for path in (tmp_path / "rows").iterdir():
        path.write_bytes(b"")
    bad = ENTRIES[5].position
    env = test_env(tmp_path)
    with monkeypatch.context() as patch:
        make_unreadable(patch, 0, bad, bad)
        store, recovered = await opened(env, tmp_path)
        store.abandon()
        (fault,) = recovered.faults  # although nothing proves that these entries were ever durable
        assert 1 <= fault.first_index <= 6 and not fault.is_open and fault.last_index is not None
        with pytest.raises(LogDamaged):
            store.entries(6, 1)
        write_repair(env.files, str(tmp_path), SEGMENT, fault, ENTRIES[fault.first_index - 1 : fault.last_index])
    again, recovered = await opened(env, tmp_path)
    assert not recovered.faults and read_all(again) == ENTRIES[:8]


async def test_an_open_end_is_given_up_with_all_its_evidence(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    env = test_env(tmp_path)
    last_base = ENTRIES[-1].position // SEGMENT * SEGMENT
    (tmp_path / "log" / segment_name(last_base)).unlink()
    store, recovered = await opened(env, tmp_path)
    store.abandon()
    (fault,) = recovered.faults
    assert fault.is_open and fault.last_index == 60
    with pytest.raises(LogDamaged, match="nothing intact"):
        write_repair(env.files, str(tmp_path), SEGMENT, fault, ENTRIES[fault.first_index - 1 :])
    await drop_open_fault(env, str(tmp_path), SEGMENT, store._meta, fault)
    again, recovered = await opened(env, tmp_path)
    assert not recovered.faults and read_all(again) == ENTRIES[: fault.first_index - 1]
    await append(again, ENTRIES[fault.first_index - 1 :])
    await again.close()
    assert read_all(await reopened(tmp_path)) == ENTRIES


async def test_options_change_nothing_but_speed(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    format_folder(env, str(tmp_path), IDENTITY)
    meta = MetaFile.open(env.files, str(tmp_path), IDENTITY)
    options = StoreOptions(warm=True, mlock=True, advise=False)
    store, _ = await LogStore.open(env, str(tmp_path), SEGMENT, meta, options)
    await append(store, ENTRIES)
    await store.close()
    assert read_all(await reopened(tmp_path)) == ENTRIES


def test_a_segment_that_cannot_be_made_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RealFiles()
    for sub in ("log", "rows"):
        (tmp_path / sub).mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for name in ("truncate", "sync_now"):
        with monkeypatch.context() as patch:
            patch.setattr(f"runtime.files.RealFile.{name}", broken)
            with pytest.raises(OSError, match="Input/output"):
                create_segment(files, str(tmp_path), 0, SEGMENT)
    for name in ("sync_dir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"runtime.files.RealFiles.{name}", broken)
            with pytest.raises(OSError, match="Input/output"):
                create_segment(files, str(tmp_path), 0, SEGMENT)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not list((tmp_path / "log").iterdir())


def test_manifest_of_nonsense_is_refused() -> None:
    good = SegmentInfo(SEGMENT, 5, 9, SEGMENT + 100, 1)
    manifest = Manifest(BaseRecord(4, 1, 2, SEGMENT - 3), SEGMENT, (good,))
    assert decode_manifest(encode_manifest(manifest)) == manifest
    for bad in (
        evolve(manifest, segment_bytes=0),
        evolve(manifest, segments=(evolve(good, base=0),)),
        evolve(manifest, segments=(evolve(good, first_index=6),)),
        evolve(manifest, segments=(evolve(good, end_position=3 * SEGMENT),)),
        evolve(manifest, base=BaseRecord(-1, 1, 2, SEGMENT)),
    ):
        with pytest.raises(ValueError, match="manifest"):
            decode_manifest(encode_manifest(bad))
    with pytest.raises(ValueError, match="manifest"):
        decode_manifest(b"nonsense")
