"""The log's bytes on disk: what is written is found again, what was cut stays away, damage is never mistaken."""

from __future__ import annotations

import errno
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dledger.core.types import Entry, EntryType, frame_entry, next_position
from dledger.errors import FormatError, LogDamaged, MetaDamaged, NoRoom, StoreFailed
from dledger.store.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from dledger.store.faults import refuse_faults
from dledger.store.format import Format, check_format, read_format
from dledger.store.log_store import LogStore, format_folder, is_blank
from dledger.store.meta import SLOT_DISTANCE, MetaFile
from dledger.store.recovery import recover_log
from dledger.store.rows import row_of
from dledger.store.segments import segment_name
from runtime.files import RealFile, RealFiles
from runtime.model import Env
from runtime.testing import test_env

SEGMENT = 65_536
IDENTITY = Format(
    cluster="c", cluster_uuid="cu", group="broker-a", group_uuid="gu", node_id="n0", segment_bytes=SEGMENT
)


class Framer:
    """Frames entries the way a leader does."""

    def __init__(self, segment_bytes: int = SEGMENT) -> None:
        self.segment_bytes = segment_bytes
        self.index = 0
        self.end = 0
        self.crc = 0

    def next(self, body: bytes, term: int = 1, commit_hint: int = 0) -> Entry:
        position = next_position(self.end, 64 + len(body), self.segment_bytes)
        entry = frame_entry(self.index + 1, term, position, EntryType.DATA, 1, [body], self.crc, commit_hint)
        self.index, self.end, self.crc = entry.index, entry.end, entry.head_crc
        return entry

    def back_to(self, entry: Entry | None) -> None:
        self.index, self.end, self.crc = (entry.index, entry.end, entry.head_crc) if entry else (0, 0, 0)


async def opened(env: Env, folder: Path) -> LogStore:
    meta = MetaFile.open(env.files, str(folder), IDENTITY)
    store, _ = await LogStore.open(env, str(folder), SEGMENT, meta)
    if store.needs_spare:
        await store.prepare_spare()
    return store


async def fresh(env: Env, folder: Path) -> LogStore:
    format_folder(env, str(folder), IDENTITY)
    return await opened(env, folder)


async def append(store: LogStore, entries: Sequence[Entry]) -> None:
    store.accept(entries)
    while store.write() < entries[-1].index:
        await store.prepare_spare()
    if store.needs_spare:
        await store.prepare_spare()


def all_entries(store: LogStore) -> list[Entry]:
    found: list[Entry] = []
    while len(found) < store.last_index:
        found.extend(store.entries(len(found) + 1, 1 << 20))
    return found


async def test_appended_entries_are_read_back_by_index_and_position(tmp_path: Path) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    framer = Framer()
    entries = [framer.next(bytes([n]) * (n * 10)) for n in range(1, 40)]
    await append(store, entries[:1])
    await append(store, entries[1:])
    assert store.last_index == store.written_index == 39 and store.durable_index == 0
    assert all_entries(store) == entries
    for entry in entries:
        assert (store.term_at(entry.index), store.head_crc_at(entry.index)) == (1, entry.head_crc)
        assert store.end_of(entry.index) == entry.end
        view = store.read(entry.position, len(entry.frame))
        assert view is not None and bytes(view) == entry.frame
    assert store.term_at(40) is None and store.term_at(0) == 0 and store.entries(40, 1) == ()
    assert [len(store.entries(5, limit)) for limit in (1, len(entries[4].frame) + len(entries[5].frame))] == [1, 2]


async def test_killed_process_keeps_what_it_wrote(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"x" * 500, commit_hint=max(0, n - 3)) for n in range(300)]
    await append(store, entries)
    assert len(store._segments) == 3
    store.abandon()
    again = await opened(env, tmp_path)
    assert all_entries(again) == entries
    assert again.written_index == again.durable_index == 300
    assert (again.last_term, again.last_head_crc, again.position_end) == (1, entries[-1].head_crc, entries[-1].end)


async def test_what_closed_segments_hold_is_known_without_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention asks four times a second, of logs of thousands of segments."""
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    await append(store, [framer.next(b"x" * 30_000) for _ in range(7)])
    await store.close()
    again = await opened(env, tmp_path)
    spans = [(info.base, info.first_index, info.last_index) for info in again.manifest().segments]
    assert spans == [(0, 1, 2), (SEGMENT, 3, 4), (2 * SEGMENT, 5, 6)]

    def nothing_is_read(*_: object) -> bytes:
        raise AssertionError("read from the disk")

    monkeypatch.setattr(RealFile, "pread", nothing_is_read)
    assert [(span.base, span.first_index, span.last_index) for span in again.closed_segments()] == spans


async def test_entry_never_crosses_a_segment_end_and_the_gap_is_zero(tmp_path: Path) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    framer = Framer()
    entries = [framer.next(b"y" * 30_000) for _ in range(5)]
    await append(store, entries)
    assert [entry.position for entry in entries] == [0, 30_064, SEGMENT, SEGMENT + 30_064, 2 * SEGMENT]
    gap = store.read(60_128, SEGMENT - 60_128)
    assert gap is not None and not any(gap)
    assert store.read(60_128, SEGMENT) is None
    assert all_entries(store) == entries


async def test_rolls_wait_for_the_spare_and_never_create_files_themselves(tmp_path: Path) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    framer = Framer()
    entries = [framer.next(b"z" * 60_000) for _ in range(4)]
    store.accept(entries)
    assert store.write() == 2 and store.unwritten and store.needs_spare
    assert store.last_index == 4 and all_entries(store) == entries
    await store.prepare_spare()
    assert store.write() == 3
    await store.prepare_spare()
    assert store.write() == 4 and not store.unwritten


@pytest.mark.parametrize("synced", [False, True])
async def test_cut_then_other_entries(tmp_path: Path, synced: bool) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"a" * 700) for _ in range(250)]
    await append(store, entries)
    if synced:
        await store.sync()
        await store._meta.save_mark(store.durable_index)
    bases = [segment.base for segment in store._segments]
    await store.cut(60)
    assert (store.last_index, store.written_index) == (59, 59)
    assert store.durable_index == (59 if synced else 0)
    assert store.position_end == entries[58].end and store.term_at(60) is None
    names = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert names == [segment_name(0)] and len(bases) == 3
    assert not any((tmp_path / "log" / segment_name(0)).read_bytes()[entries[58].end :])
    framer.back_to(entries[58])
    others = [framer.next(b"b" * 333, term=2) for _ in range(200)]
    await append(store, others)
    assert all_entries(store) == entries[:59] + others
    store.abandon()
    again = await opened(env, tmp_path)
    assert all_entries(again) == entries[:59] + others


async def test_cut_of_everything(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    await append(store, [framer.next(b"a" * 7000) for _ in range(25)])
    await store.sync()
    await store.cut(1)
    assert (store.last_index, store.last_term, store.position_end, store.last_head_crc) == (0, 0, 0, 0)
    framer.back_to(None)
    entries = [framer.next(b"b" * 100, term=3) for _ in range(5)]
    await append(store, entries)
    await store.close()
    assert all_entries(await opened(env, tmp_path)) == entries


async def test_cut_below_the_log_or_above_it_is_refused(tmp_path: Path) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, [Framer().next(b"a")])
    for index in (0, 2):
        with pytest.raises(StoreFailed):
            await store.cut(index)


async def test_stale_tail_does_not_come_back_after_a_shorter_rewrite_and_a_kill(tmp_path: Path) -> None:
    """rocketmq#10666: intact old frames behind a new, shorter log must stay invisible."""
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    old = [framer.next(b"o" * 100) for _ in range(20)]
    await append(store, old)
    # A crash inside the cut: marks are lowered, some of the stale bytes are still there.
    framer.back_to(old[4])
    new = framer.next(b"n" * 100, term=2)
    store._segments[-1].file.pwrite(new.frame, new.position)
    store.abandon()
    again = await opened(env, tmp_path)
    assert all_entries(again) == [*old[:5], new]
    assert not any((tmp_path / "log" / segment_name(0)).read_bytes()[new.end :])


async def build_segment(folder: Path, bodies: Sequence[bytes]) -> list[Entry]:
    store = await fresh(test_env(folder), folder)
    framer = Framer()
    entries = [framer.next(body, commit_hint=max(0, n - 1)) for n, body in enumerate(bodies)]
    await append(store, entries)
    store.abandon()
    return entries


async def test_torn_at_every_byte(tmp_path: Path) -> None:
    """Whatever prefix of the tail reached the disk: whole entries stay, the rest is cut and overwritten."""
    entries = await build_segment(tmp_path, [b"", b"a" * 10, b"b" * 63, b"c", b"d" * 40])
    segment = tmp_path / "log" / segment_name(0)
    whole = segment.read_bytes()
    files = RealFiles()
    for kept in range(entries[-1].end + 1):
        content = whole[:kept] + bytes(SEGMENT - kept)
        segment.write_bytes(content)
        recovered = recover_log(files, str(tmp_path), SEGMENT, 0)
        matches = [content[entry.position : entry.end] == entry.frame for entry in entries]
        expected = entries[: [*matches, False].index(False)]
        assert recovered.last.index == len(expected), kept
        end = expected[-1].end if expected else 0
        assert segment.read_bytes() == whole[:end] + bytes(SEGMENT - end), kept
        for each in recovered.segments:
            each.close()
        (tmp_path / "rows" / segment_name(0)).unlink()  # evidence of the run before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_cut_without_evidence_and_reported_with_it(
    built: tuple[Path, list[Entry]], data: st.DataObject
) -> None:
    folder, entries = built
    work = folder.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    for rows in (work / "rows").iterdir():
        rows.unlink()
    log_end = entries[-1].end
    offset = data.draw(st.integers(0, log_end - 1), label="offset")
    length = data.draw(st.integers(1, 3000), label="length")
    fill = data.draw(st.sampled_from([0, 0xFF, None]), label="fill")
    damage_end = min(offset + length, log_end)
    for name in sorted((work / "log").iterdir()):
        base = int(name.name)
        content = bytearray(name.read_bytes())
        for position in range(max(offset, base), min(damage_end, base + SEGMENT)):
            content[position - base] = content[position - base] ^ 0x55 if fill is None else fill
        name.write_bytes(content)
    original = {path.name: path.read_bytes() for path in (folder / "log").iterdir()}
    bad = next(
        (
            entry.index
            for entry in entries
            if (work / "log" / segment_name(entry.position - entry.position % SEGMENT)).read_bytes()[
                entry.position % SEGMENT : entry.position % SEGMENT + len(entry.frame)
            ]
            != entry.frame
        ),
        entries[-1].index + 1,
    )
    mark = data.draw(st.integers(0, entries[-1].index), label="durable mark")
    files = RealFiles()
    if mark >= bad:
        before = {path.name: path.read_bytes() for path in (work / "log").iterdir()}
        damaged = recover_log(files, str(work), SEGMENT, mark)
        # Without rows, only both sides of a segment's end say together that the segment before it is the log's own.
        starts = [entry.index for entry in entries if entry.position % SEGMENT == 0]
        hit = {entry.index for entry in entries if entry.position < damage_end and entry.end > offset}
        first = damaged.faults[0].first_index
        assert first == bad or (first < bad and first in starts and hit & {*starts, *(start - 1 for start in starts)})
        assert damaged.last.index == entries[-1].index or damaged.faults[-1].is_open or damaged.bytes_cut
        if not damaged.bytes_cut:
            assert {path.name: path.read_bytes() for path in (work / "log").iterdir()} == before
        for each in damaged.segments:
            each.close()
        return
    recovered = recover_log(files, str(work), SEGMENT, mark)
    assert recovered.last.index == bad - 1
    end = entries[bad - 2].end if bad > 1 else 0
    for path in (work / "log").iterdir():
        kept = max(0, min(end - int(path.name), SEGMENT))
        assert path.read_bytes() == original[path.name][:kept] + bytes(SEGMENT - kept)
    for each in recovered.segments:
        each.close()


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, list[Entry]]:
    rng = random.Random(7)
    folder = tmp_path / "built"
    folder.mkdir()
    return folder, trio.run(build_segment, folder, [rng.randbytes(rng.randrange(1, 2500)) for _ in range(90)])


async def test_damage_is_reported_when_a_side_row_is_evidence(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"q" * 1000) for _ in range(200)]
    await append(store, entries)
    await store.close()
    path = tmp_path / "log" / segment_name(3 * SEGMENT)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    store, recovered = await LogStore.open(env, str(tmp_path), SEGMENT, store._meta)
    (fault,) = recovered.faults
    damaged = next(entry for entry in entries if entry.end > 3 * SEGMENT + 5000)
    assert (fault.first_index, fault.last_index) == (damaged.index, damaged.index)
    assert (fault.prev_crc, fault.next_crc) == (damaged.prev_crc, damaged.head_crc)
    with pytest.raises(LogDamaged, match="refusing to serve"):
        refuse_faults(recovered.faults)
    with pytest.raises(LogDamaged, match="damaged"):
        store.entries(damaged.index, 1)
    assert store.entries(damaged.index + 1, 1)[0] == entries[damaged.index]  # what is intact can be given to others


async def test_reading_a_damaged_entry_is_an_error_not_an_answer(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"q" * 1000) for _ in range(200)]
    await append(store, entries)
    await store.close()
    with (tmp_path / "log" / segment_name(0)).open("r+b") as file:
        file.seek(entries[3].position + 100)
        file.write(b"!")
    again = await opened(env, tmp_path)  # a closed segment with complete rows is not walked at start
    assert again.entries(2, 1)[0] == entries[1]
    with pytest.raises(LogDamaged, match="damaged"):
        again.entries(4, 1)


async def test_damaged_side_row_is_found_again_in_the_segment(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"q" * 1000) for _ in range(200)]
    await append(store, entries)
    await store.close()
    rows = tmp_path / "rows" / segment_name(0)
    content = bytearray(rows.read_bytes())
    content[40 * 7 + 3] ^= 9
    rows.write_bytes(content)
    again = await opened(env, tmp_path)
    assert again.head_crc_at(8) == entries[7].head_crc
    assert rows.read_bytes()[40 * 7 : 40 * 8] != content[40 * 7 : 40 * 8]


async def test_missing_segment_is_damage(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    await append(store, [framer.next(b"q" * 1000) for _ in range(200)])
    await store.close()
    (tmp_path / "log" / segment_name(SEGMENT)).unlink()
    _, recovered = await LogStore.open(env, str(tmp_path), SEGMENT, store._meta)
    assert [fault.reason for fault in recovered.faults] == [f"segment {segment_name(SEGMENT)} is missing"]


async def test_rows_are_written_only_for_what_is_durable(tmp_path: Path) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    framer = Framer()
    await append(store, [framer.next(b"q" * 1000) for _ in range(100)])
    assert sum(path.stat().st_size for path in (tmp_path / "rows").iterdir()) == 0
    await store.sync()
    assert store.durable_index == 100
    assert sum(path.stat().st_size for path in (tmp_path / "rows").iterdir()) == 100 * 40


async def test_old_entries_leave_memory_and_are_read_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dledger.store.log_store.RECENT_BYTES_MAX", 50_000)
    store = await fresh(test_env(tmp_path), tmp_path)
    framer = Framer()
    entries = [framer.next(bytes([n]) * 1500) for n in range(200)]
    for entry in entries:
        await append(store, [entry])
    assert len(store._recent) < 40
    assert all_entries(store) == entries
    assert store.head_crc_at(3) == entries[2].head_crc
    await store.sync()
    assert store.head_crc_at(3) == entries[2].head_crc and all_entries(store) == entries


async def test_full_disk_keeps_entries_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    framer = Framer()
    entries = [framer.next(b"f" * 60_000) for _ in range(3)]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("runtime.files.RealFile.allocate", full)
        store.accept(entries)
        assert store.write() == 2
        await store.prepare_spare()
        assert store.disk_full and store.write() == 2
        assert not [path for path in (tmp_path / "log").iterdir() if path.name.endswith(".new")]
    await store.prepare_spare()
    assert not store.disk_full and store.write() == 3


async def test_failed_sync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await fresh(test_env(tmp_path), tmp_path)
    await append(store, [Framer().next(b"f")])

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("runtime.files._data_sync", broken)
    with pytest.raises(StoreFailed, match="Input/output error"):
        await store.sync()
    assert store.durable_index == 0


async def test_term_and_vote_survive_and_alternate_slots(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    format_folder(env, str(tmp_path), IDENTITY)
    meta = MetaFile.open(env.files, str(tmp_path), IDENTITY)
    assert (meta.saved.term, meta.saved.vote, meta.saved.clean) == (0, None, True)
    await meta.save_started(b"boot")
    for term in range(1, 8):
        await meta.save_hard_state(term, f"n{term % 3}")
        await meta.save_mark(term * 10)
        again = MetaFile.open(env.files, str(tmp_path), IDENTITY).saved
        assert (again.term, again.vote, again.durable_index, again.boot, again.clean) == (
            term,
            f"n{term % 3}",
            term * 10,
            b"boot",
            False,
        )


async def test_torn_meta_slot_falls_back_to_the_other(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    format_folder(env, str(tmp_path), IDENTITY)
    meta = MetaFile.open(env.files, str(tmp_path), IDENTITY)
    await meta.save_hard_state(3, "n1")
    await meta.save_hard_state(4, "n2")
    path = tmp_path / "meta"
    content = bytearray(path.read_bytes())
    torn = (meta.saved.sequence % 2) * SLOT_DISTANCE
    content[torn + 20] ^= 0xFF
    path.write_bytes(content)
    assert MetaFile.open(env.files, str(tmp_path), IDENTITY).saved.term == 4  # one damaged slot leaves its twin
    content[torn + 2 * SLOT_DISTANCE + 20] ^= 0xFF
    path.write_bytes(content)
    assert MetaFile.open(env.files, str(tmp_path), IDENTITY).saved.term == 3
    for slot in range(4):
        content[slot * SLOT_DISTANCE + 30] = 0x77
    path.write_bytes(content)
    with pytest.raises(MetaDamaged, match="must not start"):
        MetaFile.open(env.files, str(tmp_path), IDENTITY)


async def test_meta_of_another_node_and_missing_meta_are_refused(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    format_folder(env, str(tmp_path), IDENTITY)
    other = Format(cluster="c", cluster_uuid="cu", group="g", group_uuid="gu", node_id="n9", segment_bytes=SEGMENT)
    with pytest.raises(MetaDamaged, match="another node"):
        MetaFile.open(env.files, str(tmp_path), other)
    (tmp_path / "meta").unlink()
    with pytest.raises(MetaDamaged, match="missing"):
        MetaFile.open(env.files, str(tmp_path), IDENTITY)


async def test_format_is_checked(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    folder = str(tmp_path / "n0")
    assert is_blank(env, folder) and read_format(env.files, folder) is None
    format_folder(env, folder, IDENTITY)
    found = read_format(env.files, folder)
    assert found == IDENTITY and not is_blank(env, folder)
    for changed in ("cluster_uuid", "group_uuid", "node_id"):
        other = Format(
            **{**{name: getattr(IDENTITY, name) for name in Format.__slots__ if name[0] != "_"}, changed: "x"}
        )
        with pytest.raises(FormatError, match="belongs to"):
            check_format(folder, found, other)
    path = tmp_path / "n0" / "format.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(FormatError, match="newer"):
        read_format(env.files, folder)
    path.write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        read_format(env.files, folder)


def test_checkpoint_is_read_back_or_ignored(tmp_path: Path) -> None:
    files = RealFiles()
    folder = str(tmp_path)
    assert read_checkpoint(files, folder) is None
    write_checkpoint(files, folder, 42, b"tables" * 1000)
    assert read_checkpoint(files, folder) == Checkpoint(42, b"tables" * 1000)
    path = tmp_path / "checkpoint"
    whole = path.read_bytes()
    for offset in (0, 9, 20, 31, 40, len(whole) - 1):
        path.write_bytes(whole[:offset] + struct.pack("B", whole[offset] ^ 1) + whole[offset + 1 :])
        assert read_checkpoint(files, folder) is None, offset
    path.write_bytes(whole[:-1])
    assert read_checkpoint(files, folder) is None


async def test_torn_first_frame_of_a_new_segment_is_cut(tmp_path: Path) -> None:
    """A power loss may keep the header of a segment's first frame and lose its body, with the next spare in place."""
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"t" * 40_000) for _ in range(2)]
    await append(store, entries)
    assert len(list((tmp_path / "log").iterdir())) == 3
    with (tmp_path / "log" / segment_name(SEGMENT)).open("r+b") as file:
        file.seek(4096)
        file.write(bytes(30_000))
    store.abandon()
    # Complete rows: the first segment is taken at its word, and its follower's header continues it.
    rows = tmp_path / "rows" / segment_name(0)
    rows.write_bytes(row_of(entries[0]))
    again = await opened(env, tmp_path)
    assert all_entries(again) == entries[:1]
    framer.back_to(entries[0])
    await append(again, [framer.next(b"u" * 40_000, term=2)])
    assert again.written_index == 2


async def test_cut_behind_a_roll_that_found_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    old = [framer.next(b"r" * 20_000) for _ in range(4)]
    await append(store, old[:3])
    with monkeypatch.context() as patch:
        patch.setattr("runtime.files.RealFile.pwrite", no_room)
        store.accept(old[3:])
        assert store.write() == 3 and store.disk_full
    framer.back_to(old[1])
    await store.cut(3)
    assert not any((tmp_path / "log" / segment_name(0)).read_bytes()[old[1].end :])
    new = [framer.next(b"s" * 20_000, term=2) for _ in range(3)]
    await append(store, new)
    assert store.written_index == 5 and all_entries(store) == [*old[:2], *new]
    store.abandon()
    assert all_entries(await opened(env, tmp_path)) == [*old[:2], *new]


async def test_room_for_a_write_ends_the_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may refuse a write into allocated space (copy on write, quota), with the spare long there."""
    store = await fresh(test_env(tmp_path), tmp_path)
    entry = Framer().next(b"x" * 100)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.files.RealFile.pwrite", no_room)
        store.accept([entry])
        assert store.write() == 0 and store.disk_full and store.unwritten_bytes == 164
    assert store.write() == 1 and not store.disk_full and store.unwritten_bytes == 0


async def test_start_on_a_full_disk_does_without_new_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"r" * 1000) for _ in range(30)]
    await append(store, entries)
    store.abandon()
    monkeypatch.setattr("runtime.files.RealFile.pwrite", no_room)
    again = await opened(env, tmp_path)
    assert all_entries(again) == entries and again.head_crc_at(7) == entries[6].head_crc


async def test_lost_rows_folder_is_made_again(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    store = await fresh(env, tmp_path)
    framer = Framer()
    entries = [framer.next(b"r" * 1000) for _ in range(100)]
    await append(store, entries)
    await store.close()
    shutil.rmtree(tmp_path / "rows")
    again = await opened(env, tmp_path)
    assert all_entries(again) == entries and again.head_crc_at(70) == entries[69].head_crc


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_room_for(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[int], bool]) -> list[int]:
    """Refuse some writes, by their numbers from 1 on. Returns the offsets of all that are tried from now on."""
    pwrite = RealFile.pwrite
    writes: list[int] = []

    def write(self: RealFile, data: Any, offset: int) -> None:
        writes.append(offset)
        if is_refused(len(writes)):
            no_room()
        pwrite(self, data, offset)

    monkeypatch.setattr(RealFile, "pwrite", write)
    return writes


async def test_meta_slots_find_room_later_and_keep_the_last_word_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = test_env(tmp_path)
    format_folder(env, str(tmp_path), IDENTITY)
    meta = MetaFile.open(env.files, str(tmp_path), IDENTITY)
    await meta.save_hard_state(3, "n1")
    writes = no_room_for(monkeypatch, lambda number: number % 2 == 0)
    for _ in range(2):
        with pytest.raises(NoRoom):
            await meta.save_hard_state(4, "n2")
    assert writes[0] == writes[2], "the pair that holds the last word is not touched"
    assert (meta.saved.term, meta.saved.vote) == (3, "n1")
    monkeypatch.undo()
    await meta.save_hard_state(5, None)
    found = MetaFile.open(env.files, str(tmp_path), IDENTITY).saved
    assert (found.term, found.vote) == (5, None) == (meta.saved.term, meta.saved.vote)


async def test_4_2_what_a_save_without_room_has_left_does_not_outlive_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = test_env()
    format_folder(env, str(tmp_path), IDENTITY)
    meta = MetaFile.open(env.files, str(tmp_path), IDENTITY)
    await meta.save_recovering(True)
    no_room_for(monkeypatch, lambda number: number == 2)
    with pytest.raises(NoRoom):
        await meta.save_recovering(False)
    assert not MetaFile.open(env.files, str(tmp_path), IDENTITY).saved.recovering, "one slot says so already"
    await meta.save_recovering(True)  # as it was before: and yet there is something to write
    assert MetaFile.open(env.files, str(tmp_path), IDENTITY).saved.recovering
