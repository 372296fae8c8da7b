"""Blank and far-behind nodes are filled with whole segments, members come and go, leadership is handed over."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from attrs import evolve

from dledger.core.config import RaftConfig
from dledger.errors import LedgerError, NotLeader
from dledger.fetch import Answer, FetchClient, LogSource
from dledger.group import AddLearner, Promote, Remove, Role
from dledger.install import Installer, Pulled, end_switch
from dledger.segment_catch_up import SegmentCatchUp
from dledger.store.log_store import LogStore, format_folder
from dledger.store.meta import MetaFile
from dledger.store.staging import INCOMING_FOLDER, INSTALL_MARK, Staging, decode_manifest, encode_manifest
from dledger.wire import Fetch, Fetched, FetchKind
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import Node, ToyCluster, toy_env
from tests.unit.dledger.test_log_store import IDENTITY
from tests.unit.dledger.test_repair import SEGMENT, assert_identical, cluster, fill, flip_body


def first_indexes(toy: ToyCluster) -> list[int]:
    return [node.running.statistics().first_index for node in toy.alive()]


async def save_checkpoints(toy: ToyCluster) -> None:
    for _ in range(2):  # both that are kept must cover what is removed
        for node in toy.alive():
            await trio.to_thread.run_sync(node.running.save_checkpoint, *node.machine.checkpoint())


async def trim(toy: ToyCluster) -> None:
    """Remove the older segments on all live nodes, behind a checkpoint on each."""
    await toy.level()
    await save_checkpoints(toy)
    leader = await toy.leader()
    leader.running.trim_to(leader.running.committed_position)
    await wait_until(lambda: min(first_indexes(toy)) > 1, what="trimmed logs")


def a_follower(toy: ToyCluster) -> Node:
    return next(node for node in toy.alive() if node.running.leader_id not in (None, node.node_id))


def retained(toy: ToyCluster) -> int:
    return max(node.running.first_position for node in toy.alive())


def assert_same_logs(toy: ToyCluster) -> None:
    """From the highest first position on, and the tables."""
    start = retained(toy)
    ends = {node.running.committed_position for node in toy.alive()}
    assert len(ends) == 1
    end = ends.pop()
    logs = []
    for node in toy.alive():
        parts = [path.read_bytes() for path in sorted((node.folder / "log").iterdir()) if path.name.isdigit()]
        base = node.running.first_position
        logs.append(b"".join(parts)[start - base : end - base])
    assert all(log == logs[0] for log in logs) and logs[0]
    tables = [node.machine.applied for node in toy.alive()]
    assert all(table == tables[0] for table in tables)


async def begin_blank(toy: ToyCluster, node: Node) -> None:
    """Its disk was replaced: an empty folder under the old id, started as one that joins."""
    toy.env.files.remove_tree(str(node.folder))
    toy.node_settings[node.node_id] = {"format_if_empty": False, "join": True}
    await node.start()


async def test_scenario_21_blank_node_is_filled_on_an_idle_cluster_whose_log_was_trimmed(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 45)
        node = a_follower(toy)
        await node.stop()
        await trim(toy)
        before = {other.node_id: other.running.end_position for other in toy.alive()}
        await begin_blank(toy, node)
        await toy.level(20)
        assert {other.node_id: other.running.end_position for other in toy.alive() if other is not node} == before
        assert_same_logs(toy)
        now = node.running.statistics()
        assert now.counters["installs"] == 1 and now.first_index > 1
        assert now.state == "serving" and now.waits_for == ""
        await wait_until(lambda: not node.running.statistics().recovering, what="the leader's confirmation")
        await toy.put(b"more")
        await toy.level()
        assert_same_logs(toy)
        await node.stop()
        await node.start()
        assert not node.running.statistics().recovering, "confirmed once and for all"


async def test_scenario_21_blank_node_is_filled_by_appends_where_nothing_was_trimmed(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 12)
        node = a_follower(toy)
        await node.stop()
        await begin_blank(toy, node)
        await toy.level(20)
        assert_identical(toy)
        assert node.running.statistics().counters["installs"] == 0


@pytest.mark.chaos
async def test_node_below_the_first_index_is_filled_killed_half_way_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, fetch_bytes_per_second=1_500_000) as toy:
        await fill(toy, 3)
        node = a_follower(toy)
        await node.stop()
        await fill(toy, 25)
        await trim(toy)
        await fill(toy, 25)
        await node.start()
        await wait_until(
            lambda: (
                node.running._life.installer is not None
                and 0 < node.running._life.installer.missing_bytes < node.running._life.installer.total_bytes
            ),
            limit=10,
            what="half of the transfer",
        )
        now = node.running.statistics()
        assert now.state == "installing" and "bytes are to come" in now.waits_for
        await node.kill()
        progress = (node.folder / "incoming" / "progress").read_bytes()
        assert 0 < progress.count(1) < len(progress)
        put, received = Staging.put, []

        def counted(staging: Staging, *chunk: Any) -> None:
            received.append(chunk[:2])
            put(staging, *chunk)

        monkeypatch.setattr(Staging, "put", counted)
        await node.start()
        await toy.level(20)
        assert len(received) == len(progress) - progress.count(1), "only what was missing"
        assert_same_logs(toy)
        assert node.running.statistics().counters["installs"] == 1
        assert not (node.folder / "incoming").exists()


@pytest.mark.chaos
async def test_a_log_that_differs_is_filled_by_segments_however_long_it_is(tmp_path: Path) -> None:
    """An ex-leader's uncommitted tail of many small entries may reach as far as the segments that replace it."""
    async with cluster(tmp_path) as toy:
        await fill(toy, 2)
        old = await toy.leader()
        others = [node for node in toy.alive() if node is not old]
        for node in others:
            await node.kill()
        told: list[str] = []
        while old.running.role is Role.LEADER:
            if old.running.statistics().last_index < 200:
                old.machine.put(old.running, b"lost", told.append)
                old.running.seal()
                old.running.wake()
            await trio.sleep(0.001)
        tail_end = old.running.statistics().last_index
        await old.kill()
        for node in others:
            await node.start()
        await fill(toy, 45)
        await trim(toy)
        assert 3 < max(first_indexes(toy)) <= tail_end, "the tail reaches behind the first entry that is left"
        await old.start()
        await toy.level(20)
        assert_same_logs(toy)
        assert old.running.statistics().counters["installs"] == 1


async def test_segments_that_a_node_has_already_are_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far behind, though nothing was trimmed: only what it lacks comes over the network."""
    monkeypatch.setattr(
        "dledger.config.GroupConfig.raft_config",
        lambda config: RaftConfig(
            heartbeat=0.05,
            election_timeout_min=0.3,
            election_timeout_max=0.6,
            round_timeout=0.15,
            segment_bytes=config.segment_bytes,
            segments_behind_bytes=2 * SEGMENT,
        ),
    )
    async with cluster(tmp_path) as toy:
        await fill(toy, 25)
        await toy.level()
        node = a_follower(toy)
        had = node.running.end_position
        await node.stop()
        await fill(toy, 25)
        receive, received = FetchClient.receive, 0

        def counted(client: FetchClient, peer: str, fetched: Fetched, raw: bytes) -> None:
            nonlocal received
            received += len(raw)
            receive(client, peer, fetched, raw)

        monkeypatch.setattr(FetchClient, "receive", counted)
        await node.start()
        await toy.level(20)
        assert_same_logs(toy)
        assert node.running.statistics().counters["installs"] == 1
        total = node.running.end_position
        assert 0 < received < total - had + 2 * SEGMENT, (received, had, total)


@pytest.mark.chaos
async def test_full_disk_holds_a_transfer_up_and_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, failures = Staging.put, 0

    def full_at_first(staging: Staging, *chunk: Any) -> None:
        nonlocal failures
        if failures < 3:
            failures += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        put(staging, *chunk)

    async with cluster(tmp_path) as toy:
        await fill(toy, 2)
        node = a_follower(toy)
        await node.stop()
        await fill(toy, 25)
        await trim(toy)
        monkeypatch.setattr(Staging, "put", full_at_first)
        await node.start()
        await toy.level(20)
        assert failures == 3 and node.running.statistics().counters["installs"] == 1
        assert_same_logs(toy)


@pytest.mark.chaos
@pytest.mark.parametrize("lie", ["a part", "the manifest"])
async def test_a_source_of_garbage_does_not_keep_a_node_from_being_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    """Whatever it sends passes all checks on the way: its memory is bad, say. Another one is asked the next time."""
    answer = LogSource.answer
    async with cluster(tmp_path) as toy:
        await fill(toy, 45)
        await toy.level()
        node = a_follower(toy)
        await node.stop()
        await trim(toy)
        liar = str(min(other.folder for other in toy.alive()))  # who is asked first

        async def garbage(source: LogSource, peer: str, fetch: Fetch) -> Answer:
            told = await answer(source, peer, fetch)
            if source._folder != liar or not told.is_ok or not told.data:
                return told
            if lie == "a part" and fetch.kind is FetchKind.CHUNK:
                return evolve(told, data=told.data[:-1] + bytes([told.data[-1] ^ 1]))
            if lie == "the manifest" and fetch.kind is FetchKind.MANIFEST:
                manifest = decode_manifest(told.data)
                last = evolve(manifest.segments[-1], last_crc=manifest.segments[-1].last_crc ^ 1)
                return evolve(told, data=encode_manifest(evolve(manifest, segments=(*manifest.segments[:-1], last))))
            return told

        monkeypatch.setattr(LogSource, "answer", garbage)
        await begin_blank(toy, node)
        await wait_until(lambda: node.running.statistics().counters["installs"] == 1, limit=20, what="the log")
        await toy.level(20)
        assert_same_logs(toy)


async def test_damage_that_the_peers_have_trimmed_is_replaced_by_segments(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 30)
        await toy.level()
        node = a_follower(toy)
        await node.stop()
        flip_body(node)
        await trim(toy)
        await node.start()
        await toy.level(20)
        assert_same_logs(toy)
        assert node.running.statistics().counters["installs"] == 1
        await wait_until(lambda: not node.running.statistics().recovering, what="the leader's confirmation")


@pytest.mark.chaos
async def test_segments_that_end_before_the_own_mark_are_no_new_damage(tmp_path: Path) -> None:
    """All that is reached is a member that was away for the last entries: nothing of them is missing from *its* log."""
    async with cluster(tmp_path) as toy:
        await fill(toy, 30)
        await toy.level()
        node = a_follower(toy)
        leader = await toy.leader()
        short = next(other for other in toy.nodes.values() if other not in (node, leader))
        for _ in range(2):  # the node itself keeps everything: its segments wait for checkpoints
            for other in (leader, short):
                await trio.to_thread.run_sync(other.running.save_checkpoint, *other.machine.checkpoint())
        leader.running.trim_to(leader.running.committed_position)
        await wait_until(lambda: short.running.statistics().first_index > 1, what="a trimmed log")
        await toy.level()
        end = short.running.statistics().last_index
        await short.stop()
        await fill(toy, 2, b"later")
        await toy.level()
        for other in (node, leader):
            await other.stop()
        assert node.running.statistics().first_index == 1
        flip_body(node)
        toy.nursery.start_soon(node.run_here)
        await short.start()
        await wait_until(lambda: node.running.is_serving, limit=10, what="the installed log to be served")
        now = node.running.statistics()
        assert now.counters["installs"] == 1 and now.recovering and now.last_index <= end
        await trio.sleep(0.7)
        assert not toy.leaders(), "what they have forgotten together, nobody else may lead without"
        await leader.start()
        await toy.put(b"more", limit=20)
        await toy.level()
        assert_same_logs(toy)
        assert len(leader.machine.applied) == 32 * 300 + 1


async def test_segments_that_replication_has_overtaken_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    are_useful = iter([False, True])
    wanted: list[int] = []

    class Puller:
        async def pull(self, wanted_index: Callable[[], int], is_needed: Callable[[], bool]) -> Any:
            await trio.lowlevel.checkpoint()
            wanted.append(wanted_index())
            return wanted[-1]

    monkeypatch.setattr("dledger.segment_catch_up.is_useful", lambda store, pulled: next(are_useful))
    catch_up = SegmentCatchUp(cast(LogStore, None), lambda: cast(Installer, Puller()), lambda: 0)
    async with trio.open_nursery() as nursery:
        catch_up.need(5)
        nursery.start_soon(wait_for, catch_up)
        await wait_until(lambda: wanted, what="the first transfer")
        catch_up.need(9)
    assert wanted == [4, 8] and catch_up.installer is None


async def wait_for(catch_up: SegmentCatchUp) -> None:
    assert await catch_up.run() == cast(Pulled, 8)


@pytest.mark.parametrize("left", ["nothing", "a damaged manifest"])
async def test_a_switch_that_a_crash_left_near_its_end_is_ended_and_the_mark_stays(tmp_path: Path, left: str) -> None:
    """The manifest is the last thing to go, and all that tells where the new log ends."""
    env, folder = toy_env(tmp_path), str(tmp_path)
    format_folder(env, folder, IDENTITY)
    meta = MetaFile.open(env.files, folder, IDENTITY)
    await meta.save_mark(7)
    (tmp_path / INCOMING_FOLDER).mkdir()
    if left != "nothing":
        (tmp_path / INCOMING_FOLDER / "manifest").write_bytes(b"?")
    (tmp_path / INSTALL_MARK).write_bytes(b"")
    await end_switch(env, folder, meta)
    assert not (tmp_path / INSTALL_MARK).exists() and not (tmp_path / INCOMING_FOLDER).exists()
    assert meta.durable_mark == 7
    meta.close()


async def test_the_source_hears_that_a_transfer_is_complete(tmp_path: Path) -> None:
    """What the new log holds is not kept for its sake any more."""
    async with cluster(tmp_path) as toy:
        await fill(toy, 45)
        node = a_follower(toy)
        await node.stop()
        await trim(toy)
        await begin_blank(toy, node)
        await toy.level(20)
        lenders = [other for other in toy.alive() if other is not node]
        positions = [other.running._life.fetch_server.leased_position() for other in lenders]  # type: ignore[union-attr]
        assert any(positions) and all(
            position is None or position > other.running.end_position - 2 * SEGMENT
            for position, other in zip(positions, lenders, strict=True)
        ), positions


async def test_lost_checkpoints_of_a_trimmed_log_come_from_a_peer_with_its_segments(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 30)
        await trim(toy)
        node = a_follower(toy)
        await node.stop()
        for name in ("checkpoint", "checkpoint.1"):
            path = node.folder / name
            path.write_bytes(path.read_bytes()[:-1])
        await node.start()
        await toy.level(20)
        assert_same_logs(toy)
        assert node.running.statistics().counters["installs"] == 1


@pytest.mark.chaos
async def test_scenario_23_blank_and_lagging_nodes_elect_nobody(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 2)
        await toy.level()
        leader = await toy.leader()
        blank, lagging = (node for node in toy.nodes.values() if node is not leader)
        await lagging.stop()
        await fill(toy, 2, b"acknowledged")
        await toy.level()
        await leader.stop()
        await blank.stop()
        await begin_blank(toy, blank)
        await lagging.start()
        await trio.sleep(1.5)
        assert not toy.leaders() and blank.running.statistics().recovering
        await blank.kill()
        await blank.start()
        assert blank.running.statistics().recovering, "also behind a restart"
        await trio.sleep(1.0)
        assert not toy.leaders()
        await leader.start()
        await toy.put(b"more", limit=20)
        await toy.level()
        assert_identical(toy)
        assert len(leader.machine.applied) == 4 * 300 + 1


async def test_a_learner_joins_is_promoted_and_leaves(tmp_path: Path) -> None:
    async with cluster(tmp_path, cluster_uuid="u" * 32, founders=("n0", "n1", "n2")) as toy:
        await fill(toy, 3)
        newcomer = await toy.add("n3")
        leader = await toy.leader()
        with pytest.raises(NotLeader):
            await a_follower(toy).running.change_members(Promote("n3"))
        with pytest.raises(LedgerError, match="n3 is not a learner"):
            await leader.running.change_members(Promote("n3"))
        await leader.running.change_members(AddLearner("n3", toy.peers["n3"]))
        await wait_until(lambda: len(newcomer.machine.applied) == 900, what="the learner to catch up")
        assert leader.running.statistics().learners == ("n3",)
        await leader.running.change_members(Promote("n3"))
        await wait_until(lambda: "n3" in newcomer.running.members.voters, what="the promotion")
        gone = next(node for node in toy.alive() if node not in (leader, newcomer))
        await leader.running.change_members(Remove(gone.node_id))
        await toy.put(b"without it")
        assert gone.node_id not in leader.running.members
        await wait_until(
            lambda: not leader.running._driver.peers.is_connected(gone.node_id),  # type: ignore[union-attr]
            what="the connection to close",
        )
        await gone.stop()
        # The members outlive a restart, and a checkpoint in place of the log that named them.
        await save_checkpoints(toy)
        await newcomer.stop()
        await newcomer.start()
        assert newcomer.running.members.voters == tuple(sorted({"n0", "n1", "n2", "n3"} - {gone.node_id}))
        await toy.put(b"more")
        await toy.level()
        assert_same_logs(toy)


async def test_transfer_and_wait_tells_how_it_ended(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        target = a_follower(toy)
        assert "not leader" in str(await target.running.transfer_and_wait())
        assert "not another" in str(await leader.running.transfer_and_wait("nobody"))
        assert await leader.running.transfer_and_wait(target.node_id) is None
        assert leader.running.leader_id == target.node_id
        await wait_until(lambda: target.running.is_ready_leader, what="the target to lead")
        await toy.put(b"two")


async def test_reads_by_index_are_confirmed_by_the_leader_alone(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        told: list[str | None] = []
        leader.running.read_index(told.append)
        leader.running.read_index(told.append)
        await wait_until(lambda: len(told) == 2, what="the confirmation")
        assert told == [None, None]
        a_follower(toy).running.read_index(told.append)
        await wait_until(lambda: len(told) == 3, what="the refusal")
        assert told[2] is not None
        for node in list(toy.alive()):
            if node is not leader:
                await node.kill()
        leader.running.read_index(told.append)
        await wait_until(lambda: len(told) == 4, what="the end of the wait")
        assert told[3] is not None, "nobody confirms it"
