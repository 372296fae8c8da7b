"""How the log was flushed counts for what a power loss took of it, not how it is flushed from now on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import evolve

from dledger.core.types import HEADER_BYTES
from dledger.store.failure import mark_failed
from dledger.store.format import read_format
from dledger.store.meta import MetaFile
from dledger.store.segments import segment_name
from runtime.model import Env
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import Boot, Node, ToyCluster, ToyMachine, toy_cluster, toy_env
from tests.unit.dledger.test_compat import FOLDERS, served, unpacked


@asynccontextmanager
async def one_left(tmp_path: Path) -> AsyncIterator[tuple[ToyCluster, Node, list[Node]]]:
    """A follower of a group with async flush, killed like all the others."""
    async with toy_cluster(tmp_path) as toy:
        for number in range(5):
            await toy.put(b"%d" % number)
        await toy.level()
        leader = await toy.leader()
        node, *others = sorted(toy.alive(), key=lambda each: each is leader)
        for each in (node, *others):
            await each.kill()
        toy.settings["flush"] = "sync"
        yield toy, node, others


async def test_async_then_a_power_loss_then_sync_recovers_first(tmp_path: Path) -> None:
    async with one_left(tmp_path) as (toy, node, others):
        toy.env = evolve(toy.env, ids=Boot(1))
        await node.start()
        assert node.running.statistics().recovering and node.running.statistics().power_lost_index == 6
        await node.kill()
        await node.start()
        assert node.running.statistics().recovering, "nobody has confirmed it meanwhile"
        for other in others:
            await other.start()
        await toy.put(b"more")
        await wait_until(lambda: not node.running.statistics().recovering, what="the leader's confirmation")
        await node.kill()
        toy.env = evolve(toy.env, ids=Boot(2))
        await node.start()
        assert not node.running.statistics().recovering, "with sync flush a power loss takes nothing that was promised"
        assert node.running.statistics().power_lost_index is None


async def test_async_then_a_failed_sync_then_sync_recovers_first(tmp_path: Path) -> None:
    async with one_left(tmp_path) as (toy, node, _):
        mark_failed(toy.env.files, str(node.folder), "sync failed")
        await node.start()
        assert node.running.statistics().recovering


async def state_with_damage_beyond_the_evidence(toy: ToyCluster, node: Node, *, was_async: bool) -> str:
    """The first entries are damaged, no side row or mark tells of them, and intact ones lie behind."""
    folder = str(node.folder)
    identity = read_format(toy.env.files, folder)
    assert identity is not None
    meta = MetaFile.open(toy.env.files, folder, identity)
    assert meta.saved.is_async
    await meta.save_mark(0)
    await meta.save_started(meta.saved.boot, is_async=was_async)
    meta.close()
    (node.folder / "rows" / segment_name(0)).write_bytes(b"")
    with (node.folder / "log" / segment_name(0)).open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"?" * 40)
    before = node.group
    toy.nursery.start_soon(node.run_here)
    await wait_until(lambda: node.group is not before and node.running.state != "recovering", what="a state")
    return node.running.state


@pytest.mark.parametrize("was_async", [True, False])
async def test_a_commit_index_in_a_frame_proves_nothing_where_the_run_that_wrote_it_was_async(
    tmp_path: Path, was_async: bool
) -> None:
    """Without a side row or a mark, what is torn by the power loss is torn: maybe nobody has it any more."""
    async with one_left(tmp_path) as (toy, node, _):
        toy.env = evolve(toy.env, ids=Boot(1))
        state = await state_with_damage_beyond_the_evidence(toy, node, was_async=was_async)
        assert state == ("serving" if was_async else "repairing")


async def test_4_6_after_a_mere_kill_what_lies_before_an_intact_frame_is_no_torn_tail(tmp_path: Path) -> None:
    """The page cache keeps every write: only the last one can be cut short by the end of the process."""
    async with one_left(tmp_path) as (toy, node, others):
        assert await state_with_damage_beyond_the_evidence(toy, node, was_async=True) == "repairing"
        for other in others:
            await other.start()
        await wait_until(lambda: node.running.is_serving, what="the repair")
        assert node.running.statistics().counters["repairs"] == 1
        await toy.put(b"more")
        await toy.level()
        assert len({toy.segment_bytes(name) for name in toy.nodes}) == 1


async def test_4_2_a_failed_sync_is_as_a_power_loss_for_what_it_may_have_taken(tmp_path: Path) -> None:
    async with one_left(tmp_path) as (toy, node, _):
        mark_failed(toy.env.files, str(node.folder), "sync failed")
        assert await state_with_damage_beyond_the_evidence(toy, node, was_async=True) == "serving"
        assert node.running.statistics().recovering


@pytest.mark.parametrize("flush", ["async", "sync"])
@pytest.mark.parametrize("name", FOLDERS)
async def test_a_folder_of_format_1_does_not_say_and_its_configuration_counts(
    tmp_path: Path, name: str, flush: str
) -> None:
    folder, recorded = unpacked(name, tmp_path)
    env: Env = evolve(toy_env(tmp_path), ids=Boot(1))
    group = await served(env, folder, recorded, ToyMachine(), flush=flush)
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        assert group.statistics().recovering == (flush == "async" and name == "folder-killed")
        identity = read_format(env.files, str(folder))
        assert identity is not None
        meta = MetaFile.open(env.files, str(folder), identity)
        assert meta.saved.is_async == (flush == "async"), "from this start on it does say"
        meta.close()
        await group.stop_gracefully()
