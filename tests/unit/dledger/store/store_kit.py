"""Logs to damage: built once, copied per example, compared with what was written."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from dledger.core.types import Entry, EntryType, frame_entry, next_position
from dledger.errors import LogDamaged
from dledger.store.faults import EntryDamaged, FaultyRange, add_suspects
from dledger.store.format import LOG_FOLDER, Format
from dledger.store.log_store import LogStore, format_folder
from dledger.store.meta import MetaFile
from dledger.store.recovery import RecoveredLog, recover_log
from dledger.store.repair import drop_open_fault, write_repair
from dledger.store.segments import segment_name
from runtime.files import RealFile, RealFiles
from runtime.model import Env
from runtime.testing import test_env

SEGMENT = 8192
IDENTITY = Format(
    cluster="c", cluster_uuid="cu", group="broker-a", group_uuid="gu", node_id="n0", segment_bytes=SEGMENT
)


class Framer:
    """Frames entries the way a leader does."""

    def __init__(self) -> None:
        self.index = self.end = self.crc = 0

    def next(self, body: bytes, term: int = 1, commit_hint: int = 0, type: EntryType = EntryType.DATA) -> Entry:
        position = next_position(self.end, 64 + len(body), SEGMENT)
        entry = frame_entry(self.index + 1, term, position, type, 1, [body], self.crc, commit_hint)
        self.index, self.end, self.crc = entry.index, entry.end, entry.head_crc
        return entry

    def back_to(self, entry: Entry) -> None:
        self.index, self.end, self.crc = entry.index, entry.end, entry.head_crc


def some_entries(framer: Framer, rng: random.Random, count: int, term: int, largest: int = 1200) -> list[Entry]:
    return [framer.next(rng.randbytes(rng.randrange(largest)), term, max(0, framer.index - 2)) for _ in range(count)]


async def opened(env: Env, folder: Path) -> tuple[LogStore, RecoveredLog]:
    meta = MetaFile.open(env.files, str(folder), IDENTITY)
    store, recovered = await LogStore.open(env, str(folder), SEGMENT, meta)
    if not recovered.faults and store.needs_spare:
        await store.prepare_spare()
    return store, recovered


async def fresh(env: Env, folder: Path) -> LogStore:
    format_folder(env, str(folder), IDENTITY)
    return (await opened(env, folder))[0]


async def append(store: LogStore, entries: Sequence[Entry]) -> None:
    store.accept(entries)
    while store.write() < entries[-1].index:
        await store.prepare_spare()
    if store.needs_spare:
        await store.prepare_spare()


async def write_log(folder: Path, entries: Sequence[Entry], *, mark: bool = True) -> None:
    """A folder with these entries, all of them on stable storage, closed in order."""
    store = await fresh(test_env(folder), folder)
    await append(store, entries)
    await store.close()
    if mark:
        await store._meta.save_mark(store.durable_index, clean=True)
    store._meta.close()


def read_all(store: LogStore) -> list[Entry]:
    found: list[Entry] = []
    index = store.first_index
    while index <= store.last_index:
        found.extend(store.entries(index, 1 << 20))
        index = found[-1].index + 1
    return found


def log_files(folder: Path) -> dict[str, bytes]:
    """What must be equal on two nodes with the same log."""
    return {
        f"{sub}/{path.name}": path.read_bytes() for sub in ("log", "rows") for path in sorted((folder / sub).iterdir())
    }


def make_unreadable(patch: pytest.MonkeyPatch, base: int, first: int, last: int) -> None:
    """The disk does not give back what holds any of the bytes `first` to `last` of a segment."""
    there = RealFile.pread

    def pread(file: RealFile, nbytes: int, offset: int) -> bytes:
        if file.path.endswith(f"{LOG_FOLDER}/{segment_name(base)}") and offset <= last and first < offset + nbytes:
            raise OSError(errno.EIO, "Input/output error")
        return there(file, nbytes, offset)

    patch.setattr(RealFile, "pread", pread)


class Bench:
    """A damaged copy of a log, and the log that it should be."""

    def __init__(self, folder: Path, entries: Sequence[Entry], mark: int) -> None:
        self.folder = folder
        self.entries = {entry.index: entry for entry in entries}
        self.mark = mark
        self.files = RealFiles()

    def recover(self) -> RecoveredLog:
        """Recover and check that everything which is not reported is the truth."""
        recovered = recover_log(self.files, str(self.folder), SEGMENT, self.mark)
        last = max(self.entries, default=0)
        faulty = {
            index
            for fault in recovered.faults
            for index in range(fault.first_index, (fault.last_index or fault.first_index) + 1)
        }
        assert recovered.last.index <= last
        if recovered.last.index < last:
            assert recovered.faults and recovered.faults[-1].is_open and recovered.faults[-1].last_index == last
        for segment in recovered.segments:
            if not segment.first_index:
                continue
            for index in range(segment.first_index, recovered.last.index + 1):
                entry = self.entries[index]
                if index in faulty or not segment.base <= entry.position < segment.end:
                    continue
                row = segment.row(index)
                if row is None or (row.position, row.head_crc) != (entry.position, entry.head_crc):
                    assert segment.unverified is not None, f"no right row of entry {index}"
                    continue
                try:
                    assert segment.read_frames(row.position, row.end, 1)[0] == entry
                except LogDamaged:
                    assert segment.unverified is not None, f"entry {index} was walked, and is damaged"
        return recovered

    def heal(self) -> None:
        """Repair from the truth what can be repaired, until the log is whole or has an open end."""
        for _ in range(20):
            recovered = self.recover()
            for segment in recovered.segments:
                segment.close()
            fault = next((each for each in recovered.faults if not each.is_open), None)
            if fault is not None:
                self.repair(fault)
            elif recovered.faults:
                trio.run(self._give_up, recovered.faults[0])
            else:
                return
        raise AssertionError("does not become whole")

    def repair(self, fault: FaultyRange) -> None:
        assert fault.last_index is not None
        entries = [self.entries[index] for index in range(fault.first_index, fault.last_index + 1)]
        write_repair(self.files, str(self.folder), SEGMENT, fault, entries)

    async def _give_up(self, fault: FaultyRange) -> None:
        env = test_env(self.folder)
        meta = MetaFile.open(env.files, str(self.folder), IDENTITY)
        await drop_open_fault(env, str(self.folder), SEGMENT, meta, fault)
        self.mark = meta.saved.durable_index
        meta.close()
        self.entries = {index: entry for index, entry in self.entries.items() if index < fault.first_index}

    async def read_everything_or_mark(self) -> None:
        """Read the whole log as a running node does; damage found so makes the next recovery look there."""
        for _ in range(10):
            store, recovered = await opened(test_env(self.folder), self.folder)
            assert not recovered.faults
            try:
                assert read_all(store) == [self.entries[index] for index in sorted(self.entries)]
                return
            except EntryDamaged as error:
                add_suspects(self.files, str(self.folder), [error.fault.position // SEGMENT * SEGMENT])
            finally:
                store.abandon()
                store._meta.close()
            self.heal_again()
        raise AssertionError("does not become whole")

    def heal_again(self) -> None:
        recovered = self.recover()
        for segment in recovered.segments:
            segment.close()
        for fault in recovered.faults:
            self.repair(fault)


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
