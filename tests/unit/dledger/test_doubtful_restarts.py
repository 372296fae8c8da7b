"""A node that may have forgotten what it acknowledged, or voted, says so; whatever was under way when it opened its log
anew."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from dledger import lifecycle
from dledger.core.membership import AddLearner, Remove
from dledger.errors import LedgerError, LogDamaged, StoreFailed
from dledger.fetch import FetchServer
from dledger.store.checkpoint import read_checkpoint, write_checkpoint
from dledger.store.faults import EntryDamaged, FaultyRange
from dledger.store.format import Format
from dledger.store.meta import MetaFile, format_meta
from runtime.files import RealFile
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import Node, ToyCluster, driver_of
from tests.unit.dledger.dledger_toy import toy_cluster as cluster
from tests.unit.dledger.store.crash_files import CrashFiles, PowerLoss

IDENTITY = Format(cluster="c", cluster_uuid="cu", group="g", group_uuid="gu", node_id="n0", segment_bytes=65_536)


async def a_follower(toy: ToyCluster) -> Node:
    leader = await toy.leader()
    return next(node for node in toy.alive() if node is not leader)


async def test_node_whose_sync_failed_recovers_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Async flush: it acknowledged from the page cache, and the next start drops that."""
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        node = await a_follower(toy)
        toy.is_error_expected = True
        sync, broken_folder = RealFile.sync, [str(node.folder)]

        async def broken(file: RealFile) -> None:
            if any(file.path.startswith(folder) and "/log/" in file.path for folder in broken_folder):
                raise OSError(errno.EIO, "Input/output error")
            await sync(file)

        monkeypatch.setattr(RealFile, "sync", broken)
        await toy.put(b"two")
        await node.ended.wait()
        assert isinstance(node.error, StoreFailed)
        broken_folder.clear()
        others = [other for other in toy.alive() if other is not node]
        for other in others:
            await other.kill()
        await node.start()
        assert node.running.statistics().recovering
        await node.kill()
        await node.start()
        assert node.running.statistics().recovering, "the second start sees no mark any more, and still knows"
        for other in others:
            await other.start()
        await toy.put(b"three")
        await wait_until(lambda: not node.running.statistics().recovering, what="the leader's confirmation")


@pytest.mark.parametrize("who_meets_it", ["a read", "a service beside the driver"])
async def test_acknowledged_entries_that_turn_out_damaged_before_their_sync_are_no_torn_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who_meets_it: str
) -> None:
    """Whatever ends the run, what it acknowledged is known to have been there when the log is opened anew."""
    damage = EntryDamaged(FaultyRange(2, 2, 0, None, 0, None, f"met by {who_meets_it}"))
    is_met = trio.Event()

    async def meet(server: FetchServer) -> None:
        await is_met.wait()
        raise damage

    if who_meets_it != "a read":
        monkeypatch.setattr(FetchServer, "run", meet)
    async with cluster(tmp_path, flush_interval_ms=60_000) as toy:
        await toy.put(b"one")
        await toy.level()
        node = await a_follower(toy)
        others = [other for other in toy.alive() if other is not node]
        for other in others:
            await other.kill()
        driver = driver_of(node)
        assert driver.store.durable_index < driver.store.written_index == 2
        path = node.folder / "log" / "00000000000000000000"
        data = bytearray(path.read_bytes())
        position = driver.store.position_of(2)
        assert position is not None
        data[position + 70] ^= 1
        with path.open("r+b") as file:
            file.write(data)
        monkeypatch.undo()
        if who_meets_it == "a read":
            driver.damaged(damage)
        is_met.set()
        await wait_until(lambda: node.running.state == "repairing", what="the repair")
        for other in others:
            await other.start()
        await toy.put(b"two")
        await toy.level()
        assert node.machine.applied == others[0].machine.applied
        await wait_until(lambda: not node.running.statistics().recovering, what="the leader's confirmation")


@pytest.mark.parametrize(("do_they_fit", "are_they_useful"), [(False, True), (True, True), (True, False)])
async def test_what_was_acknowledged_is_vouched_for_unless_fetched_segments_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do_they_fit: bool, are_they_useful: bool
) -> None:
    marks: list[int] = []
    save_mark = MetaFile.save_mark

    async def save_and_note(meta: MetaFile, durable_index: int, *, clean: bool = False) -> None:
        marks.append(durable_index)
        await save_mark(meta, durable_index, clean=clean)

    async def finish(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        if not do_they_fit:
            raise LogDamaged("they do not fit")

    monkeypatch.setattr(lifecycle, "finish_install", finish)
    monkeypatch.setattr(lifecycle, "is_useful", lambda store, pulled: are_they_useful)
    async with cluster(tmp_path, flush_interval_ms=60_000) as toy:
        await toy.put(b"one")
        await toy.level()
        node = await a_follower(toy)
        life, driver = node.running._life, driver_of(node)
        assert driver.store.durable_index < driver.store.written_index == 2
        monkeypatch.setattr(MetaFile, "save_mark", save_and_note)
        life._pulled = cast(Any, SimpleNamespace(last_index=2))
        life._misfits = 1
        driver.reopen("segments fetched")
        await wait_until(lambda: node.running._driver not in (None, driver), what="the next run")
        assert marks == ([] if do_they_fit and are_they_useful else [2])
        assert life._misfits == (1 if not are_they_useful else 0 if do_they_fit else 2), "transfers in a row"


async def test_vote_found_in_the_page_cache_is_on_the_disk_before_it_counts() -> None:
    """The process died between writing its vote and syncing it; then the power goes, too."""
    files = CrashFiles()
    files.make_dirs("/raft")
    format_meta(files, "/raft", IDENTITY)
    files.sync_dir("/raft")
    files.sync_dir("/")
    meta = MetaFile.open(files, "/raft", IDENTITY)
    await meta.save_started(b"boot")
    files.operations_left = 2  # both slots, and not the sync
    with pytest.raises(PowerLoss):
        await meta.save_hard_state(5, "n1")
    files.operations_left = None
    again = MetaFile.open(files, "/raft", IDENTITY)
    assert (again.saved.term, again.saved.vote) == (5, "n1")
    await again.save_started(b"boot")  # from here on the vote is repeated to whoever asks
    files.lose_power(False)
    after = MetaFile.open(files, "/raft", IDENTITY).saved
    assert (after.term, after.vote) == (5, "n1")


async def test_checkpoint_names_the_members_as_of_its_entry(tmp_path: Path) -> None:
    """The members change while the tables are encoded: an entry that may be lost again must not be in it."""
    async with cluster(tmp_path, 1) as toy:
        group, machine = toy.nodes["n0"].running, toy.nodes["n0"].machine
        await toy.put(b"one")
        await group.change_members(AddLearner("n5", ("127.0.0.1", 9)))
        await toy.put(b"two")
        index, blob = machine.checkpoint()
        first = group.statistics().members_index
        assert 0 < first <= index
        await group.change_members(Remove("n5"))
        await toy.put(b"three")
        assert await trio.to_thread.run_sync(group.save_checkpoint, index, blob)
        saved = read_checkpoint(toy.env.files, group.config.data_dir)
        assert saved is not None and (saved.index, saved.config_index) == (index, first)


async def test_checkpoint_under_way_is_written_before_the_log_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could take the place of the one that came with fetched segments, and cover less than was trimmed."""
    async with cluster(tmp_path, 1) as toy:
        node = toy.nodes["n0"]
        await toy.put(b"one")
        index, blob = node.machine.checkpoint()
        begun, go_on = threading.Event(), threading.Event()

        def slow(*args: Any, **settings: Any) -> None:
            begun.set()
            go_on.wait(10)
            write_checkpoint(*args, **settings)

        monkeypatch.setattr("dledger.group.write_checkpoint", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, node.running.save_checkpoint, index, blob)
            await wait_until(begun.is_set, what="the thread")
            driver_of(node).reopen("test")
            await wait_until(lambda: node.running._driver is None, what="the end of the run")
            await trio.sleep(0.2)
            is_early = len(node.machine.restored) > 1
            go_on.set()
        assert not is_early, "not restored again while the thread writes"
        await wait_until(lambda: node.machine.restored[-1] == blob, what="the tables of the checkpoint")


async def test_whoever_waits_for_a_change_of_members_hears_that_the_node_stops(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await toy.put(b"one")
        node = toy.nodes["n0"]
        driver_of(node).stop()
        with trio.fail_after(3), pytest.raises(LedgerError, match="stops"):
            await node.running.change_members(AddLearner("n5", ("127.0.0.1", 9)))


async def test_news_behind_the_end_of_a_run_change_nothing(tmp_path: Path) -> None:
    """The machine may be restoring its tables already when a connection that is about to close brings something."""
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        node = await a_follower(toy)
        driver = driver_of(node)
        driver.reopen("test")
        await wait_until(lambda: node.running._driver is None, what="the end of the run")
        turns, before = node.machine.turns, driver.turns
        driver.on_app_message("n1", b"late")
        driver.pump()
        assert (driver.turns, node.machine.turns, node.machine.messages) == (before, turns, [])
        told: list[str | None] = []
        driver.read_index(told.append)
        driver.leadership.transfer(None, told.append)
        driver.leadership.change_members(Remove("n2"), told.append)
        assert told == ["this node stops"] * 3, "at once: there is no other turn in which to tell them"
