"""Guards of the store that no other test names: each was found by taking it away (tests/mutants.toml)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import msgspec
import pytest
import trio
from attrs import evolve

from dledger.core.types import HEADER_BYTES, Entry, EntryType, frame_entry
from dledger.errors import LogDamaged, MetaDamaged
from dledger.store.base import BaseRecord, pack_base, unpack_base
from dledger.store.checkpoint import read_checkpoint, write_checkpoint
from dledger.store.faults import EntryDamaged, FaultyRange, read_suspects, refuse_faults
from dledger.store.format import read_format
from dledger.store.log_store import format_folder
from dledger.store.manifest import Manifest
from dledger.store.meta import SLOT_DISTANCE, SLOTS, Meta, MetaFile, identity_of, pack_slot
from dledger.store.quarantine import QUARANTINE_FOLDER, keep_aside
from dledger.store.recovery import recover_log
from dledger.store.repair import write_repair
from dledger.store.rows import ROW_BYTES, read_rows, row_of
from dledger.store.segments import Segment, create_segment, segment_name
from dledger.store.staging import Staging, complete_install
from runtime.files import RealFile, RealFiles
from runtime.testing import test_env
from tests.unit.dledger.store.crash_files import CrashFiles
from tests.unit.dledger.store.store_kit import (
    IDENTITY,
    SEGMENT,
    Bench,
    Framer,
    append,
    copied,
    fresh,
    log_files,
    make_unreadable,
    opened,
    read_all,
    some_entries,
    write_log,
)
from tests.unit.dledger.store.test_store_crash import FOLDER, built, env_of
from tests.unit.dledger.store.test_store_crash import opened as opened_in_memory

ENTRIES = some_entries(Framer(), random.Random(21), 60, 1)
FIRST = [entry for entry in ENTRIES if entry.end <= SEGMENT]
"""Those of the first segment, which is closed."""


def other_than(entry: Entry) -> Entry:
    """Another entry in the very same place: same predecessor, index, position and length."""
    body = bytes(byte ^ 1 for byte in entry.body)
    return frame_entry(entry.index, entry.term, entry.position, EntryType.DATA, 1, [body], entry.prev_crc, 0)


def overwrite(folder: Path, entry: Entry, *, row: bool = False) -> None:
    base = entry.position // SEGMENT * SEGMENT
    with (folder / "log" / segment_name(base)).open("r+b") as file:
        file.seek(entry.position - base)
        file.write(entry.frame)
    if row:
        first = next(each.index for each in ENTRIES if each.position >= base)
        with (folder / "rows" / segment_name(base)).open("r+b") as file:
            file.seek((entry.index - first) * ROW_BYTES)
            file.write(row_of(entry))


def fault_of(first: int, last: int) -> FaultyRange:
    before, behind = ENTRIES[first - 2], ENTRIES[last]
    return FaultyRange(first, last, before.end, behind.position, before.head_crc, behind.prev_crc, "a test says so")


# Meta, base record, format


async def test_4_2_a_saved_vote_outlives_a_power_loss() -> None:
    files = await built(ENTRIES[:2])
    meta = MetaFile.open(files, FOLDER, IDENTITY)
    await meta.save_hard_state(9, "n1")
    files.lose_power(False)
    found = MetaFile.open(files, FOLDER, IDENTITY).saved
    assert (found.term, found.vote) == (9, "n1")


def test_4_2_meta_slots_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    format_folder(env, str(tmp_path), IDENTITY)
    slot = bytearray(pack_slot(Meta(sequence=9, term=3), identity_of(IDENTITY)))
    slot[8] = 3
    slot[4:8] = crc32(slot[8:]).to_bytes(4, "little")
    content = bytearray((tmp_path / "meta").read_bytes())
    for number in range(SLOTS):
        content[number * SLOT_DISTANCE : number * SLOT_DISTANCE + len(slot)] = slot
    (tmp_path / "meta").write_bytes(content)
    with pytest.raises(MetaDamaged, match="newer than this program knows"):
        MetaFile.open(env.files, str(tmp_path), IDENTITY)


def test_a_formatted_folder_outlives_a_power_loss() -> None:
    """etcd#6368: also the names of the folders above it, else the votes below are forgotten."""
    files = CrashFiles()
    format_folder(env_of(files), FOLDER, IDENTITY)
    files.lose_power(False)
    assert read_format(files, FOLDER) == IDENTITY
    assert MetaFile.open(files, FOLDER, IDENTITY).saved.term == 0


def test_a_flipped_byte_of_a_base_record_makes_it_unreadable() -> None:
    record = pack_base(BaseRecord(7, 3, 0x1234, 4096))
    assert unpack_base(record) == BaseRecord(7, 3, 0x1234, 4096)
    for offset in range(len(record)):
        assert unpack_base(record[:offset] + bytes([record[offset] ^ 1]) + record[offset + 1 :]) is None


async def test_4_6_a_trimmed_log_without_its_base_record_lacks_its_beginning(tmp_path: Path) -> None:
    """Without any evidence of entries, too: only a record says that a trim was lawful."""
    await write_log(tmp_path, ENTRIES)
    store, _ = await opened(test_env(tmp_path), tmp_path)
    await store.trim(2 * SEGMENT)
    await store.close()
    for name in ("base", "base.1"):
        (tmp_path / name).unlink()
    first = next(entry for entry in ENTRIES if entry.position >= 2 * SEGMENT)
    for path in (tmp_path / "rows").iterdir():
        path.write_bytes(b"")
    (fault,) = recover_log(RealFiles(), str(tmp_path), SEGMENT, 0).faults
    assert (fault.first_index, fault.last_index, fault.position) == (1, first.index - 1, 0)
    assert (fault.end, fault.prev_crc, fault.next_crc) == (first.position, 0, first.prev_crc)
    with pytest.raises(LogDamaged, match=r"no record says that it was trimmed.*restore a backup"):
        refuse_faults([fault])
    for path in (tmp_path / "log").iterdir():
        path.write_bytes(bytes(SEGMENT))
    (fault,) = recover_log(RealFiles(), str(tmp_path), SEGMENT, 0).faults
    assert fault.is_open and (fault.first_index, fault.position) == (1, 0), "nor is it an empty log"


@pytest.mark.parametrize("lost", [1, 3, 99])
async def test_4_6_a_log_whose_first_segments_are_lost_with_their_rows_is_repaired_to_the_byte(
    tmp_path: Path, lost: int
) -> None:
    await write_log(tmp_path / "whole", ENTRIES)
    work = copied(tmp_path / "whole", tmp_path / "work")
    for sub in ("log", "rows"):
        for path in sorted((work / sub).iterdir())[:lost]:
            path.unlink()
    bench = Bench(work, ENTRIES, ENTRIES[-1].index)
    store, recovered = await opened(test_env(work), work)
    assert recovered.faults[0].first_index == 1
    if lost < 99:
        with pytest.raises(EntryDamaged):
            store.config_entries(0)
    store.abandon()
    await trio.to_thread.run_sync(bench.heal)
    if lost < 99:
        assert log_files(work) == log_files(tmp_path / "whole")
    store, recovered = await opened(test_env(work), work)
    assert not recovered.faults and store.last_index == (len(ENTRIES) if lost < 99 else 0)
    if lost == 99:
        await append(store, ENTRIES)
    await store.close()
    assert read_all((await opened(test_env(work), work))[0]) == ENTRIES


# Recovery


async def test_4_6_what_a_recovery_kept_is_on_stable_storage() -> None:
    """After a kill of the process it may be in the page cache only, and somebody may build on it."""
    files = await built(ENTRIES[:8], synced=False)
    store, _ = await opened_in_memory(files)
    assert store.last_index == store.durable_index == 8
    files.lose_power(False)
    store, recovered = await opened_in_memory(files)
    assert read_all(store) == ENTRIES[:8] and not recovered.faults


async def test_4_6_the_zeros_over_a_torn_tail_are_on_stable_storage() -> None:
    files = await built(ENTRIES[:8], synced=False)
    inode = files.open(f"{FOLDER}/log/{segment_name(0)}").inode
    inode.cached[ENTRIES[5].position + HEADER_BYTES] ^= 1
    inode.durable = bytes(inode.cached)
    store, _ = await opened_in_memory(files)
    assert store.last_index == 5
    assert not any(inode.durable[ENTRIES[4].end :]), "else it comes back behind entries that replace it"


async def test_4_6_a_frame_of_a_newer_version_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framer = Framer()
    entries = [framer.next(b"known"), framer.next(b"known, too")]
    with monkeypatch.context() as patch:
        patch.setattr("dledger.core.types.FRAME_VERSION", 2)
        entries.append(framer.next(b"from the future"))
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, entries)
    store.abandon()
    with pytest.raises(LogDamaged, match="newer than this program knows"):
        recover_log(RealFiles(), str(tmp_path), SEGMENT, 0)


class Notes:
    """Of a file: where it was written to."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def pwrite(self, data: bytes, offset: int) -> None:
        assert not any(data)
        self.offsets.append(offset)


def test_4_4_a_cut_zeroes_from_the_back_to_the_front() -> None:
    """Should the machine die in between, what is left is a clean prefix and a torn tail."""
    file = Notes()
    segment = Segment(0, 4 << 20, file, file)  # type: ignore[arg-type]
    segment.zero(100, 3 << 20)
    assert file.offsets == sorted(file.offsets, reverse=True) and len(file.offsets) > 2 and file.offsets[-1] == 100


async def test_4_2_a_cut_and_the_end_of_its_evidence_are_on_stable_storage_when_it_returns() -> None:
    """The answer that follows says that these entries are gone."""
    files = await built(ENTRIES[:8])
    store, _ = await opened_in_memory(files)
    assert store._meta.saved.durable_index == 8
    await store.cut(5)
    files.lose_power(False)
    store, recovered = await opened_in_memory(files)
    assert not recovered.faults and read_all(store) == ENTRIES[:4]
    assert store._meta.saved.durable_index == 4


async def test_etcd_6368_a_new_segment_and_its_rows_have_durable_names_and_their_whole_size() -> None:
    files = CrashFiles()
    format_folder(env_of(files), FOLDER, IDENTITY)
    create_segment(files, FOLDER, SEGMENT, SEGMENT)
    files.lose_power(False)
    assert files.open(f"{FOLDER}/log/{segment_name(SEGMENT)}").size() == SEGMENT
    assert files.exists(f"{FOLDER}/rows/{segment_name(SEGMENT)}")


async def test_4_6_a_row_is_written_only_of_what_the_sync_has_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries go on being written while a sync runs."""
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, ENTRIES[:3])

    async def sync(file: RealFile) -> None:
        await trio.lowlevel.checkpoint()
        store.accept(ENTRIES[3:5])
        store.write()

    monkeypatch.setattr("runtime.files.RealFile.sync", sync)
    assert await store.sync() == 3 and store.written_index == 5
    assert (tmp_path / "rows" / segment_name(0)).stat().st_size == 3 * ROW_BYTES
    store.abandon()


async def test_4_6_a_lost_end_that_the_durable_mark_proves_is_damage(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    last_base = ENTRIES[-1].position // SEGMENT * SEGMENT
    path = tmp_path / "log" / segment_name(last_base)
    path.write_bytes(bytes(SEGMENT))
    (tmp_path / "rows" / segment_name(last_base)).write_bytes(b"")
    (fault,) = recover_log(RealFiles(), str(tmp_path), SEGMENT, 60).faults
    assert fault.is_open and fault.last_index == 60
    assert recover_log(RealFiles(), str(tmp_path), SEGMENT, 0).faults == [], "zeros prove nothing"


async def test_4_6_a_lost_end_that_a_side_row_proves_is_damage(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    last_base = ENTRIES[-1].position // SEGMENT * SEGMENT
    (tmp_path / "log" / segment_name(last_base)).write_bytes(bytes(SEGMENT))
    (fault,) = recover_log(RealFiles(), str(tmp_path), SEGMENT, 0).faults
    assert fault.is_open and fault.last_index == 60


async def test_4_6_an_end_that_the_disk_does_not_give_back_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any other evidence: unreadable is never absent."""
    await write_log(tmp_path, ENTRIES[:5], mark=False)
    (tmp_path / "rows" / segment_name(0)).write_bytes(b"")
    make_unreadable(monkeypatch, 0, 4096, SEGMENT)
    (fault,) = recover_log(RealFiles(), str(tmp_path), SEGMENT, 0).faults
    assert fault.is_open


# Reading


async def test_4_5_an_entry_read_is_the_one_of_that_index(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    wrong = ENTRIES[4]
    row = msgspec.structs.replace(wrong, index=4)
    with (tmp_path / "rows" / segment_name(0)).open("r+b") as file:
        file.seek(3 * ROW_BYTES)
        file.write(row_of(row))
    store, recovered = await opened(test_env(tmp_path), tmp_path)
    assert not recovered.faults
    with pytest.raises(LogDamaged):
        store.entries(4, 1)
    store.abandon()


async def test_4_5_verified_frames_are_those_of_the_chain(tmp_path: Path) -> None:
    """A frame and its row, both intact, and both of another log: only the successor's checksum tells."""
    await write_log(tmp_path, ENTRIES)
    overwrite(tmp_path, other_than(FIRST[3]), row=True)
    store, recovered = await opened(test_env(tmp_path), tmp_path)
    assert not recovered.faults
    with pytest.raises(LogDamaged):
        store.read(FIRST[3].position, 200)
    store.abandon()


async def test_4_6_damage_that_was_met_is_looked_for_by_the_next_recovery(tmp_path: Path) -> None:
    await write_log(tmp_path, ENTRIES)
    torn = msgspec.structs.replace(FIRST[3], frame=FIRST[3].frame[:-1] + bytes([FIRST[3].frame[-1] ^ 1]))
    overwrite(tmp_path, torn)
    store, recovered = await opened(test_env(tmp_path), tmp_path)
    assert not recovered.faults, "of a closed segment only the ends are looked at"
    with pytest.raises(LogDamaged):
        store.read(FIRST[3].position, 10)
    store.abandon()
    assert read_suspects(RealFiles(), str(tmp_path)) == {0}
    (fault,) = recover_log(RealFiles(), str(tmp_path), SEGMENT, 0).faults
    assert (fault.first_index, fault.last_index) == (4, 4)


# Repair


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[str, FaultyRange]]:
    """A log of which entries 3 and 4 are said to be damaged; nothing of it may change when a repair is refused."""
    files = RealFiles()
    for sub in ("log", "rows"):
        files.make_dirs(str(tmp_path / sub))
    content = bytearray(SEGMENT)
    for entry in FIRST:
        content[entry.position : entry.end] = entry.frame
    content[FIRST[2].position : FIRST[3].end] = bytes(FIRST[3].end - FIRST[2].position)
    path = tmp_path / "log" / segment_name(0)
    path.write_bytes(content)
    (tmp_path / "rows" / segment_name(0)).write_bytes(b"".join(map(row_of, FIRST)))
    yield str(tmp_path), fault_of(3, 4)


def refused(damaged: tuple[str, FaultyRange], entries: list[Entry]) -> str:
    folder, fault = damaged
    path = Path(folder) / "log" / segment_name(0)
    before = path.read_bytes()
    with pytest.raises(LogDamaged) as caught:
        write_repair(RealFiles(), folder, SEGMENT, fault, entries)
    assert path.read_bytes() == before and not (path.parent / f"{path.name}.repair").exists()
    return str(caught.value)


def test_4_6_a_repair_continues_the_chain(damaged: tuple[str, FaultyRange]) -> None:
    assert "does not continue" in refused(damaged, [other_than(FIRST[2]), FIRST[3]])
    assert "does not continue" in refused(damaged, FIRST[3:4])


def test_4_6_a_repair_leads_to_the_next_intact_frame(damaged: tuple[str, FaultyRange]) -> None:
    assert "do not lead" in refused(damaged, [FIRST[2], other_than(FIRST[3])])
    assert "do not lead" in refused(damaged, FIRST[2:3])


def test_4_6_a_repair_is_made_of_intact_frames(damaged: tuple[str, FaultyRange]) -> None:
    frame = FIRST[2].frame
    flipped = msgspec.structs.replace(FIRST[2], frame=frame[:-1] + bytes([frame[-1] ^ 1]))
    assert "not intact" in refused(damaged, [flipped, FIRST[3]])


def test_4_6_a_repair_is_walked_by_the_next_recovery_and_keeps_no_wrong_row(damaged: tuple[str, FaultyRange]) -> None:
    folder, fault = damaged
    files = RealFiles()
    path = Path(folder) / "rows" / segment_name(0)
    content = bytearray(path.read_bytes())
    content[2 * ROW_BYTES : 3 * ROW_BYTES] = row_of(other_than(FIRST[2]))
    path.write_bytes(content)
    write_repair(files, folder, SEGMENT, fault, FIRST[2:4])
    assert read_suspects(files, folder) == {0}
    rows = files.open(str(path))
    assert sorted(read_rows(rows)) == [entry.index for entry in FIRST if entry.index != 3]
    rows.close()


def test_4_6_damaged_bytes_are_kept_aside_before_they_are_overwritten(damaged: tuple[str, FaultyRange]) -> None:
    folder, fault = damaged
    path = Path(folder) / "log" / segment_name(0)
    content = bytearray(path.read_bytes())
    content[fault.position : fault.end] = junk = b"?" * (FIRST[3].end - FIRST[2].position)
    path.write_bytes(content)
    write_repair(RealFiles(), folder, SEGMENT, fault, FIRST[2:4])
    (kept,) = (Path(folder) / QUARANTINE_FOLDER).iterdir()
    assert kept.read_bytes() == junk
    assert path.read_bytes()[FIRST[2].position : FIRST[3].end] == FIRST[2].frame + FIRST[3].frame


def test_4_6_what_is_kept_aside_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dledger.store.quarantine.QUARANTINE_BYTES_MAX", 1000)
    files = RealFiles()
    source = files.open(str(tmp_path / "segment"), create=True)
    source.pwrite(b"?" * 4000, 0)
    for number in range(4):
        keep_aside(files, str(tmp_path), 0, source, [(number * 400, number * 400 + 400)])
    kept = sorted((tmp_path / QUARANTINE_FOLDER).iterdir())
    assert sum(path.stat().st_size for path in kept) <= 1000
    assert kept[-1].name.endswith("-1200"), "the oldest copies make room for the new ones"
    source.close()


# Installation


async def given(tmp_path: Path) -> tuple[Manifest, dict[int, bytes]]:
    """What a peer offers, with the bytes of each segment."""
    await write_log(tmp_path / "giver", ENTRIES)
    giver, _ = await opened(test_env(tmp_path / "giver"), tmp_path / "giver")
    manifest = giver.manifest()
    chunks = {info.base: await giver.read_in_thread(info.base, info.used_bytes) for info in manifest.segments}
    await giver.close()
    return manifest, chunks


async def staged(tmp_path: Path, manifest: Manifest, chunks: dict[int, bytes]) -> Staging:
    format_folder(test_env(tmp_path / "taker"), str(tmp_path / "taker"), IDENTITY)
    staging = Staging.open(RealFiles(), str(tmp_path / "taker"), manifest)
    for base, offset, nbytes in staging.missing():
        data = chunks[base][offset : offset + nbytes]
        staging.put(base, offset, data, crc32(data))
    return staging


async def test_4_7_nothing_is_installed_before_everything_is_there(tmp_path: Path) -> None:
    manifest, _ = await given(tmp_path)
    format_folder(test_env(tmp_path / "taker"), str(tmp_path / "taker"), IDENTITY)
    staging = Staging.open(RealFiles(), str(tmp_path / "taker"), manifest)
    with pytest.raises(LogDamaged, match="not all of the log"):
        staging.finish(None)
    staging.close()


async def test_4_7_segments_received_form_one_chain(tmp_path: Path) -> None:
    manifest, chunks = await given(tmp_path)
    data, entry = bytearray(chunks[0]), other_than(FIRST[2])
    data[entry.position : entry.end] = entry.frame
    staging = await staged(tmp_path, manifest, {**chunks, 0: bytes(data)})
    with pytest.raises(LogDamaged, match="as received is damaged"):
        staging.finish(None)
    staging.close()
    assert not complete_install(RealFiles(), str(tmp_path / "taker"))


async def test_4_7_segments_received_end_as_the_manifest_says(tmp_path: Path) -> None:
    manifest, chunks = await given(tmp_path)
    first, *rest = manifest.segments
    wrong = evolve(manifest, segments=(evolve(first, last_crc=first.last_crc ^ 1), *rest))
    staging = await staged(tmp_path, wrong, chunks)
    with pytest.raises(LogDamaged, match="as received is damaged"):
        staging.finish(None)
    staging.close()


async def test_4_7_nothing_lies_behind_what_was_received(tmp_path: Path) -> None:
    manifest, chunks = await given(tmp_path)
    staging = await staged(tmp_path, manifest, chunks)
    with (tmp_path / "taker" / "incoming" / "log" / segment_name(0)).open("r+b") as file:
        file.seek(SEGMENT - 1)
        file.write(b"?")
    with pytest.raises(LogDamaged, match="as received is damaged"):
        staging.finish(None)
    staging.close()


async def test_4_7_tables_of_the_former_log_do_not_outlive_an_installation(tmp_path: Path) -> None:
    """dqlite#309, redisraft#43: beside a log that is not theirs they would be false."""
    manifest, chunks = await given(tmp_path)
    staging = await staged(tmp_path, manifest, chunks)
    files, folder = RealFiles(), str(tmp_path / "taker")
    write_checkpoint(files, folder, 15, b"of the former log")
    staging.finish(None)
    staging.close()
    assert complete_install(files, folder)
    assert read_checkpoint(files, folder) is None
