"""Damage on one node's disk is found, mended from its peers to the byte, and never served (raft.md 4.6)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from dledger.core.membership import AddLearner, Promote
from dledger.core.types import FRAME_MAGIC, HEADER_BYTES, parse_entry
from dledger.errors import LogDamaged
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import Node, ToyCluster, toy_env

SEGMENT = 65_536
MAGIC = FRAME_MAGIC.to_bytes(4, "little")


@asynccontextmanager
async def cluster(tmp_path: Path, size: int = 3, **settings: Any) -> AsyncIterator[ToyCluster]:
    async with trio.open_nursery() as nursery:
        toy = ToyCluster(toy_env(tmp_path), tmp_path, nursery, size, **{"segment_bytes": SEGMENT, **settings})
        await toy.start()
        yield toy
        nursery.cancel_scope.cancel()


async def fill(toy: ToyCluster, batches: int, name: bytes = b"r") -> None:
    """Entries of about 9.6 KB, six to a segment."""
    for batch in range(batches):
        leader = await toy.leader()
        outcomes: list[str] = []
        for number in range(300):
            leader.machine.put(leader.running, b"%s%d.%d" % (name, batch, number), outcomes.append)
        await wait_until(lambda outcomes=outcomes: len(outcomes) == 300, what="commits")
        assert set(outcomes) == {"applied"}


def segments(node: Node) -> list[Path]:
    return [path for path in sorted((node.folder / "log").iterdir()) if path.name.isdigit()]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x04
    path.write_bytes(data)


def frames(path: Path) -> list[tuple[int, int]]:
    """(offset, index) of each frame."""
    data, found, at = path.read_bytes(), [], 0
    while data[at : at + 4] == MAGIC and at + HEADER_BYTES < len(data):
        entry = parse_entry(data, at, check_body=False)
        found.append((at, entry.index))
        at += len(entry.frame)
    return found


def assert_identical(toy: ToyCluster) -> None:
    assert len({toy.segment_bytes(name) for name in toy.nodes}) == 1
    applied = [node.machine.applied for node in toy.nodes.values()]
    assert all(records == applied[0] for records in applied)
    for node in toy.nodes.values():
        assert len(set(node.machine.applied)) == len(node.machine.applied)


def flip_body(node: Node) -> None:
    path = segments(node)[1]
    flip(path, frames(path)[2][0] + HEADER_BYTES + 700)


def flip_header(node: Node) -> None:
    path = segments(node)[1]
    flip(path, frames(path)[3][0] + 20)


def flip_first_frame(node: Node) -> None:
    flip(segments(node)[1], 70)


def truncate(node: Node) -> None:
    path = segments(node)[1]
    path.write_bytes(path.read_bytes()[:20_000])


def blank_out(node: Node) -> None:
    segments(node)[1].write_bytes(bytes(SEGMENT))


def remove(node: Node) -> None:
    segments(node)[1].unlink()


def older_copy(node: Node) -> None:
    """As of when only two entries of it had been written."""
    path = segments(node)[1]
    data = path.read_bytes()
    end = frames(path)[2][0]
    path.write_bytes(data[:end] + bytes(len(data) - end))


def flip_two_segments(node: Node) -> None:
    flip_body(node)
    path = segments(node)[2]
    flip(path, frames(path)[1][0] + HEADER_BYTES)


@pytest.mark.parametrize(
    "damage",
    [flip_body, flip_header, flip_first_frame, truncate, blank_out, remove, older_copy, flip_two_segments],
)
async def test_scenario_10_damage_in_the_middle_is_repaired_from_peers(
    tmp_path: Path, damage: Callable[[Node], None]
) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        leader = await toy.leader()
        node = next(node for node in toy.nodes.values() if node is not leader)
        await node.stop()
        damage(node)
        await fill(toy, 1, b"meanwhile")
        await node.start()
        await toy.level()
        assert_identical(toy)
        counters = node.running.statistics().counters
        assert counters["repairs"] >= 1 and counters["cut_as_damaged"] == 0, counters
        assert node.running.statistics().state == "serving" and not node.running.statistics().recovering


async def test_scenario_10_damage_met_while_serving_is_repaired_and_never_shown(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        leader = await toy.leader()
        node = next(node for node in toy.nodes.values() if node is not leader)
        await node.stop()
        await node.start()  # what it has not written itself is verified before it is shown
        await toy.level()
        path = segments(node)[1]
        offset = frames(path)[2][0] + HEADER_BYTES + 64
        good = path.read_bytes()[offset : offset + 32]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([good[0] ^ 1]))
        restores = len(node.machine.restored)
        position = SEGMENT + offset
        seen: list[bytes | None] = []
        for _ in range(400):
            try:
                data = await node.running.read_cold(position, 32)
            except LogDamaged:
                data = None
            seen.append(data)
            if len(node.machine.restored) > restores and node.running.is_serving and data is not None:
                break
            await trio.sleep(0.01)
        await toy.level()
        assert_identical(toy)
        assert node.machine.restored[restores:], "the log was opened anew"
        assert bytes(node.running.read(position, 32) or b"") == good


async def test_scenario_10_two_nodes_damaged_at_different_places_mend_each_other(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 25)
        await toy.level()
        one, two, away = toy.nodes.values()
        for node in toy.nodes.values():
            await node.stop()
        path = segments(one)[1]
        flip(path, frames(path)[1][0] + 100)
        truncate_path = segments(two)[2]
        truncate_path.write_bytes(truncate_path.read_bytes()[:30_000])
        toy.nursery.start_soon(one.run_here)
        await two.start()
        await wait_until(lambda: one.group is not None and one.running.is_serving, what="the first to serve")
        assert one.running.statistics().counters["repairs"] == 1
        assert two.running.statistics().counters["repairs"] == 1
        await toy.put(b"without the third")
        await away.start()
        await toy.level()
        assert_identical(toy)


async def test_what_nobody_can_supply_keeps_the_node_out_and_is_said(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        for node in toy.nodes.values():
            await node.stop()
        good = segments(toy.nodes["n2"])[1].read_bytes()
        offset = frames(segments(toy.nodes["n2"])[1])[2][0] + 300
        for node in toy.nodes.values():
            flip(segments(node)[1], offset)
        for node in toy.nodes.values():
            toy.nursery.start_soon(node.run_here)
        await wait_until(
            lambda: all(
                node.group is not None
                and node.group.state == "repairing"
                and "damaged here too" in node.group.statistics().waits_for
                for node in toy.nodes.values()
            ),
            limit=10,
            what="all of them to say what they wait for",
        )
        await trio.sleep(0.7)
        assert not toy.leaders() and all(not node.running.is_serving for node in toy.nodes.values())
        # One copy comes back from a backup: the others need no more than that.
        await toy.nodes["n2"].kill()
        segments(toy.nodes["n2"])[1].write_bytes(good)
        await toy.nodes["n2"].start()
        await toy.put(b"again", limit=20)
        await toy.level(20)
        assert_identical(toy)


async def test_a_node_being_repaired_is_stopped_in_order(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        for node in toy.nodes.values():
            await node.stop()
        node = toy.nodes["n0"]
        flip_body(node)
        toy.nursery.start_soon(node.start)
        await wait_until(lambda: node.group is not None and node.group.state == "repairing", what="the phase")
        with trio.fail_after(3):
            await node.stop()


async def test_damaged_end_is_cut_only_when_a_peer_has_it_and_a_leader_confirms_the_rest(tmp_path: Path) -> None:
    async with cluster(tmp_path, flush="sync") as toy:
        await fill(toy, 8)
        await toy.level()
        leader = await toy.leader()
        node = next(node for node in toy.nodes.values() if node is not leader)
        others = [other for other in toy.nodes.values() if other is not node]
        await node.stop()
        path = segments(node)[1]
        last = frames(path)[-1][0]
        flip(path, last + 200)
        for other in others:
            await other.kill()
        toy.nursery.start_soon(node.run_here)
        await wait_until(
            lambda: node.group is not None and "no peer" in node.group.statistics().waits_for, what="the phase"
        )
        data = path.read_bytes()
        assert data[last : last + 4] == data[:4], "nothing is cut while nobody has it"
        for other in others:
            await other.start()
        await toy.put(b"more", limit=20)
        await toy.level()
        assert_identical(toy)
        assert node.running.statistics().counters["cut_as_damaged"] == 1
        await wait_until(lambda: not node.running.statistics().recovering, what="the confirmation")


async def test_damaged_entries_that_no_quorum_can_have_are_given_up(tmp_path: Path) -> None:
    """A leader alone logged them; they were never committed. One peer's no is not enough, two of three are."""
    async with cluster(tmp_path, flush="sync") as toy:
        await fill(toy, 3)
        await toy.level()
        old = await toy.leader()
        one, two = (node for node in toy.nodes.values() if node is not old)
        await one.stop()
        await two.stop()
        outcomes: list[str] = []
        for number in range(3):
            old.machine.put(old.running, b"alone %d" % number, outcomes.append)
            old.running.seal()
        first = old.running.statistics().last_index + 1
        await wait_until(lambda: old.running.statistics().durable_index == first + 2, what="three entries on disk")
        await old.stop()
        path = segments(old)[0]
        flip(path, next(offset for offset, index in frames(path) if index == first) + HEADER_BYTES + 3)
        toy.nursery.start_soon(old.run_here)
        await one.start()
        await wait_until(
            lambda: old.group is not None and "the log ends at entry" in old.group.statistics().waits_for,
            what="the first no",
        )
        assert old.running.state == "repairing"
        await two.start()
        await toy.put(b"in their place", limit=20)
        await wait_until(lambda: old.running.is_serving, what="the old leader to serve")
        await toy.level(20)
        assert_identical(toy)
        assert old.running.statistics().counters["cut_as_damaged"] == 1
        assert not [record for record in old.machine.applied if record.startswith(b"alone")]
        await wait_until(lambda: not old.running.statistics().recovering, what="the leader's confirmation")


async def test_founder_of_a_group_that_has_grown_is_mended_by_those_who_joined(tmp_path: Path) -> None:
    """Its configuration knows nobody else, but its log does."""
    async with cluster(tmp_path, 1, cluster_uuid="u" * 32, founders=("n0",)) as toy:
        await fill(toy, 14)
        node, newcomer = toy.nodes["n0"], await toy.add("n1")
        await node.running.change_members(AddLearner("n1", toy.peers["n1"]))
        await toy.level()
        await node.running.change_members(Promote("n1"))
        await toy.level()
        assert node.running.config.peers.keys() == {"n0"}
        await node.stop()
        flip_body(node)
        await node.start()
        await toy.put(b"more")
        await toy.level()
        assert_identical(toy)
        assert node.running.statistics().counters["repairs"] == 1
        assert newcomer.running.statistics().counters["repairs"] == 0


async def test_single_node_with_damage_refuses_with_its_sentence(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await fill(toy, 14)
        node = toy.nodes["n0"]
        await node.stop()
        flip_body(node)
        with pytest.raises(LogDamaged, match="refusing to serve"):
            await node.run_here()
