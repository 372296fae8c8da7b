"""Power lost at any operation of a repair, of giving entries up, of a switch to fetched segments: whatever a restart
finds, the node is whole, or says that it has forgotten something, or goes on mending, and ends where it would have."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import trio

from dledger.core.types import HEADER_BYTES, Entry
from dledger.fetch import Answer, FetchClient, LogSource
from dledger.install import Installer, end_switch, finish_install
from dledger.repair import Mended, RepairPhase
from dledger.store.checkpoint import read_checkpoint, write_checkpoint
from dledger.store.faults import add_suspects
from dledger.store.log_store import LogStore
from dledger.store.meta import Meta, MetaFile
from dledger.store.rows import ROW_BYTES
from dledger.store.segments import segment_name
from dledger.wire import Fetch, FetchKind, FetchStatus
from runtime.logs import get_logger
from tests.unit.dledger.store.crash_files import CrashFiles
from tests.unit.dledger.store.store_kit import IDENTITY, SEGMENT, Framer, append, read_all, some_entries
from tests.unit.dledger.store.test_store_crash import FOLDER, at_every_operation, built, env_of, opened

ENTRIES = some_entries(Framer(), random.Random(11), 27, 1, largest=900)
LAST = len(ENTRIES)
LOG = get_logger("test")
VOTERS = ("n0", "n1", "n2")


class Peer:
    """The two other members, who have the same, or not, asked as over the network."""

    def __init__(self, source: LogSource | None, other: LogSource | None = None) -> None:
        self._by_name = {"n1": source, "n2": other or source}
        self.bytes_received = 0

    def sources(self) -> list[str]:
        return ["n1", "n2"]

    def too_old(self) -> list[str]:
        return []

    def tell_complete(self, peer: str, position: int) -> None:
        return

    async def ask(self, peer: str, kind: FetchKind, first: int = 0, last: int = 0, number: int = 0) -> Answer:
        source = self._by_name[peer]
        if source is None:
            await trio.lowlevel.checkpoint()
            return Answer(FetchStatus.DAMAGED, reason="damaged here too")
        return await source.answer("n0", Fetch(1, kind, first, last, number))


def source_of(files: CrashFiles, store: LogStore) -> LogSource:
    return LogSource(env_of(files), FOLDER, SEGMENT, store, committed=lambda: store.last_index, is_sure=lambda: True)


async def a_peer(entries: list[Entry], other: list[Entry] | None = None) -> Peer:
    sources: list[LogSource] = []
    for log in (entries, other or entries):
        files = await built(log)
        sources.append(source_of(files, (await opened(files))[0]))
    return Peer(*sources)


def a_phase(files: CrashFiles, store: LogStore, peer: Peer, faults: Any) -> RepairPhase:
    return RepairPhase(
        env_of(files),
        FOLDER,
        SEGMENT,
        store._meta,
        faults,
        VOTERS,
        "n0",
        cast(FetchClient, peer),
        LOG,
        first_index=store.first_index,
    )


async def mend(files: CrashFiles, peer: Peer, *, gives_up: bool = False) -> LogStore:
    """What the group does from its start to the moment when it would serve."""
    for _ in range(8):
        await end_switch(env_of(files), FOLDER, MetaFile.open(files, FOLDER, IDENTITY))
        store, recovered = await opened(files)
        if not recovered.faults:
            return store
        phase = a_phase(files, store, peer, recovered.faults)
        if gives_up:
            phase.accept_loss()
        verdict = await phase.run()
        if verdict is Mended.INSTALL:
            await store._meta.save_recovering(True)
            installer = Installer(env_of(files), FOLDER, SEGMENT, cast(FetchClient, peer), LOG)
            pulled = await installer.pull(lambda: 1, lambda: True)
            assert pulled is not None
            await finish_install(env_of(files), FOLDER, pulled, store._meta)
    raise AssertionError("mended again and again")


def saved(files: CrashFiles) -> Meta:
    return MetaFile.open(files, FOLDER, IDENTITY).saved


async def stopped(files: CrashFiles, *, clean: bool, mark: int = LAST) -> CrashFiles:
    meta = MetaFile.open(files, FOLDER, IDENTITY)
    await meta.save_mark(mark, clean=clean)
    return files


def damage(files: CrashFiles, entry: Entry) -> None:
    base = entry.position - entry.position % SEGMENT
    inode = files.open(f"{FOLDER}/log/{segment_name(base)}").inode
    inode.cached[entry.position - base + 66] ^= 4
    inode.durable = bytes(inode.cached)
    add_suspects(files, FOLDER, [base])  # whoever met it


def lose_last_row(files: CrashFiles) -> None:
    base = ENTRIES[-1].position - ENTRIES[-1].position % SEGMENT
    inode = files.open(f"{FOLDER}/rows/{segment_name(base)}").inode
    del inode.cached[-ROW_BYTES:]
    inode.durable = bytes(inode.cached)


Check = Callable[[CrashFiles, bool], Awaitable[None]]


def mended_again(peer: Peer, *, is_sure: bool, last_index: int = LAST, gives_up: bool = False) -> Check:
    """Nothing is served that is not whole, unless it is said; and the next attempt comes to the same end."""

    async def check(files: CrashFiles, is_done: bool) -> None:
        await end_switch(env_of(files), FOLDER, MetaFile.open(files, FOLDER, IDENTITY))
        store, recovered = await opened(files)
        if not recovered.faults and (store.last_index < LAST or not is_sure):
            assert saved(files).recovering, "it would vote without what it may have acknowledged"
        assert not is_done or not recovered.faults
        assert (saved(files).term, saved(files).vote) == (7, "n2")
        store = await mend(files, peer, gives_up=gives_up)
        assert read_all(store) == ENTRIES[store.first_index - 1 : last_index]
        assert saved(files).recovering is not is_sure
        assert saved(files).durable_index <= last_index

    return check


@pytest.mark.parametrize("number", [9, 20])
async def test_scenario_10_damage_in_the_middle(number: int) -> None:
    before = await stopped(await built(ENTRIES), clean=False)
    damage(before, ENTRIES[number])
    peer = await a_peer(ENTRIES)

    async def action(files: CrashFiles) -> None:
        await mend(files, peer)

    await at_every_operation(before, action, mended_again(peer, is_sure=True))


@pytest.mark.parametrize("clean", [True, False])
async def test_a_damaged_end_whose_last_entry_is_known(clean: bool) -> None:
    """Taken from the peer, byte for byte. Who was killed may have acknowledged more: that is noted first."""
    before = await stopped(await built(ENTRIES), clean=clean)
    damage(before, ENTRIES[-1])
    peer = await a_peer([*ENTRIES])

    async def action(files: CrashFiles) -> None:
        await mend(files, peer)

    await at_every_operation(before, action, mended_again(peer, is_sure=clean))


async def test_a_damaged_end_whose_last_entry_is_not_known() -> None:
    before = await stopped(await built(ENTRIES), clean=True)
    damage(before, ENTRIES[-1])
    lose_last_row(before)
    peer = await a_peer(ENTRIES)

    async def action(files: CrashFiles) -> None:
        await mend(files, peer)

    await at_every_operation(before, action, mended_again(peer, is_sure=False, last_index=LAST - 1))


async def test_a_peer_with_other_entries_at_the_end_is_not_believed() -> None:
    """Of a later term, as long as what was lost: an uncommitted end was overwritten elsewhere."""
    framer = Framer()
    framer.back_to(ENTRIES[-2])
    others = [*ENTRIES[:-1], *some_entries(framer, random.Random(3), 3, 2)]
    before = await stopped(await built(ENTRIES), clean=True)
    damage(before, ENTRIES[-1])
    peer = await a_peer(others)
    store = await mend(before, peer)
    assert read_all(store) == ENTRIES[:-1] and saved(before).recovering


def others_behind(last: int, *sizes: int) -> list[Entry]:
    """The first of ENTRIES, and behind them others of a later term, with bodies of these sizes."""
    framer = Framer()
    framer.back_to(ENTRIES[last - 1])
    return [*ENTRIES[:last], *(framer.next(bytes([size % 251]) * size, 2) for size in sizes)]


def to_the_end_of_a_segment(last: int) -> list[Entry]:
    """As `others_behind`, one more that ends just where its segment does."""
    return others_behind(last, -ENTRIES[last - 1].end % SEGMENT - HEADER_BYTES)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("damaged", "peers", "expected"),
    [
        pytest.param((9, 15), (ENTRIES[:12], ENTRIES[:8]), ENTRIES[:12], id="the first of those that were here"),
        pytest.param((9, 12), (others_behind(9, *[2500] * 6), ENTRIES[:8]), others_behind(9, *[2500] * 3), id="longer"),
        pytest.param(
            (10, 11), (to_the_end_of_a_segment(10), ENTRIES[:8]), to_the_end_of_a_segment(10), id="to a border"
        ),
    ],
)
async def test_4_6_of_a_range_that_no_quorum_can_have_the_front_is_written_and_the_rest_is_cut(
    damaged: tuple[int, int], peers: tuple[list[Entry], list[Entry]], expected: list[Entry]
) -> None:
    """Also where the front lies in other segments than what it replaces, whose side rows still tell of that."""
    before = await stopped(await built(ENTRIES), clean=True)
    for index in range(damaged[0], damaged[1] + 1):
        damage(before, ENTRIES[index - 1])
    peer = await a_peer(*peers)

    async def action(files: CrashFiles) -> None:
        await mend(files, peer)

    async def check(files: CrashFiles, is_done: bool) -> None:
        _, recovered = await opened(files)
        assert recovered.faults or saved(files).recovering, "it would vote without what it may have acknowledged"
        assert not is_done or not recovered.faults
        found = read_all(await mend(files, peer))
        # A crash between the front and the cut leaves a range that may end later: then more is known of its front.
        assert found == expected or (not is_done and found == peers[0][: max(len(found), len(expected) + 1)])
        assert saved(files).recovering and saved(files).durable_index <= len(found)

    await at_every_operation(before, action, check)


async def test_entries_that_nobody_supplies_are_given_up() -> None:
    before = await stopped(await built(ENTRIES), clean=True)
    damage(before, ENTRIES[7])
    damage(before, ENTRIES[20])
    peer = Peer(None)

    async def action(files: CrashFiles) -> None:
        await mend(files, peer, gives_up=True)

    await at_every_operation(before, action, mended_again(peer, is_sure=False, last_index=7, gives_up=True))


async def test_scenario_25_segments_that_end_before_the_mark() -> None:
    """Trimmed by the only peer, which has less than this node had. The installed log has no damaged end."""
    framer = Framer()
    framer.back_to(ENTRIES[-1])
    longer = [*ENTRIES, *some_entries(framer, random.Random(4), 13, 1)]
    source_files = await built(longer[:-2])
    write_checkpoint(source_files, FOLDER, LAST, b"tables")
    giver, _ = await opened(source_files)
    await giver.trim(SEGMENT)
    assert giver.first_index > 5
    before = await stopped(await built(longer), clean=True, mark=len(longer))
    damage(before, ENTRIES[4])
    peer = Peer(source_of(source_files, giver))
    store, recovered = await opened(before)
    assert await a_phase(before, store, peer, recovered.faults).run() is Mended.INSTALL
    await store._meta.save_recovering(True)
    pulled = await Installer(env_of(before), FOLDER, SEGMENT, cast(FetchClient, peer), LOG).pull(
        lambda: 1, lambda: True
    )
    assert pulled is not None

    async def action(files: CrashFiles) -> None:
        await finish_install(env_of(files), FOLDER, pulled, MetaFile.open(files, FOLDER, IDENTITY))

    async def check(files: CrashFiles, is_done: bool) -> None:
        store = await mend(files, peer)
        assert read_all(store) == longer[giver.first_index - 1 : -2]
        assert saved(files).recovering and saved(files).durable_index == len(longer) - 2
        found = read_checkpoint(files, FOLDER)
        assert found is not None and found.blob == b"tables"

    await at_every_operation(before, action, check)


async def test_a_repaired_end_is_written_on() -> None:
    """As the group goes on behind it: no row and no mark of the damaged time is in the way."""
    before = await stopped(await built(ENTRIES), clean=True)
    damage(before, ENTRIES[-1])
    store = await mend(before, await a_peer(ENTRIES))
    framer = Framer()
    framer.back_to(ENTRIES[-1])
    more = some_entries(framer, random.Random(8), 20, 2)
    if store.needs_spare:
        await store.prepare_spare()
    await append(store, more)
    await store.close()
    again, recovered = await opened(before)
    assert not recovered.faults and read_all(again) == ENTRIES + more
