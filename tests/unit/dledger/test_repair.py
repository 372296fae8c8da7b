"""Damage on one node's disk is found, mended from its peers to the byte, and never served (raft.md 4.6)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from dledger.core.membership import AddLearner, Promote
from dledger.core.types import FRAME_MAGIC, HEADER_BYTES, parse_entry
from dledger.errors import LedgerError, LogDamaged
from dledger.store.faults import add_suspects
from dledger.store.rows import ROW_BYTES
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import RECORD_BYTES, Node, ToyCluster, toy_env

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


@pytest.mark.chaos
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


@pytest.mark.chaos
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


def flip_last(node: Node) -> tuple[Path, int]:
    """Damage the last entry; returns the file and the offset where that entry begins."""
    path = segments(node)[-1] if frames(segments(node)[-1]) else segments(node)[-2]
    last = frames(path)[-1][0]
    flip(path, last + 200)
    return path, last


def lose_last_row(node: Node) -> None:
    """As a full disk does, or damage to the side rows too."""
    path = max(path for path in (node.folder / "rows").iterdir() if path.read_bytes().strip(b"\0"))
    data = path.read_bytes()
    path.write_bytes(data[:-ROW_BYTES])


async def test_damaged_end_is_cut_only_when_a_peer_has_it_and_a_leader_confirms_the_rest(tmp_path: Path) -> None:
    """Nothing tells any more which entry it was that the mark is about."""
    async with cluster(tmp_path, flush="sync") as toy:
        await fill(toy, 8)
        await toy.level()
        leader = await toy.leader()
        node = next(node for node in toy.nodes.values() if node is not leader)
        others = [other for other in toy.nodes.values() if other is not node]
        await node.stop()
        path, last = flip_last(node)
        lose_last_row(node)
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


@pytest.mark.chaos
@pytest.mark.parametrize("is_stopped_in_order", [True, False])
async def test_damaged_end_whose_last_entry_is_known_is_mended(tmp_path: Path, is_stopped_in_order: bool) -> None:
    """The side row proves which entry it was. Only a stop in order proves that no later one was acknowledged."""
    async with cluster(tmp_path, flush="sync") as toy:
        await fill(toy, 8)
        await toy.level()
        leader = await toy.leader()
        node, other = (node for node in toy.nodes.values() if node is not leader)
        driver = node.running._driver
        assert driver is not None
        last_index = driver.store.last_index
        await wait_until(lambda: driver.store._meta.saved.durable_index == last_index, what="the mark of the idle log")
        await (node.stop() if is_stopped_in_order else node.kill())
        await leader.stop()
        await other.stop()
        flip_last(node)
        toy.nursery.start_soon(node.run_here)
        await leader.start()  # that of the other two is not needed
        await wait_until(lambda: node.running.is_serving, what="the mended log")
        counters = node.running.statistics().counters
        assert counters["repairs"] == 1 and counters["cut_as_damaged"] == 0
        assert node.running.statistics().last_index >= last_index
        if is_stopped_in_order:
            assert not node.running.statistics().recovering
            await toy.put(b"two of three, both sure", limit=10)
        else:
            await trio.sleep(1.0)
            assert node.running.statistics().recovering and not toy.leaders()
        await other.start()
        await toy.put(b"more", limit=20)
        await toy.level()
        assert_identical(toy)


async def test_damage_met_in_the_unsynced_end_leaves_the_node_sure(tmp_path: Path) -> None:
    """No side row yet: but the run that met it knows what it wrote last, and so acknowledged at most."""
    async with cluster(tmp_path, flush_interval_ms=60_000) as toy:
        for number in range(4):
            await toy.put(b"entry %d" % number)
        await toy.level()
        leader = await toy.leader()
        node, third = (node for node in toy.alive() if node is not leader)
        driver = node.running._driver
        assert driver is not None and driver.store.durable_index < driver.store.written_index - 1
        await third.kill()
        position = driver.store.position_of(driver.store.written_index)
        assert position is not None
        with segments(node)[0].open("r+b") as file:
            file.seek(position + 70)
            file.write(b"!")
        driver.damaged(LogDamaged("met by a read"))
        await wait_until(lambda: node.running.statistics().counters["repairs"] == 1, what="the repair")
        await leader.stop()  # the two others confirm nothing: what the node says is its own
        await wait_until(lambda: node.running.is_serving, what="service")
        assert not node.running.statistics().recovering
        assert node.running.statistics().counters["cut_as_damaged"] == 0
        await third.start()
        await toy.put(b"two of three", limit=20)
        await leader.start()
        await toy.level()
        assert_identical(toy)


async def begin_damaged_alike(toy: ToyCluster) -> None:
    """All members lose the same entries in the middle, and wait for each other."""
    for node in toy.nodes.values():
        await node.stop()
    for node in toy.nodes.values():
        flip_body(node)
        toy.nursery.start_soon(node.run_here)
    await wait_until(
        lambda: all(
            node.group is not None and "damaged here too" in node.group.statistics().waits_for
            for node in toy.nodes.values()
        ),
        limit=10,
        what="all of them to say what they wait for",
    )


@pytest.mark.chaos
async def test_what_nobody_can_supply_is_given_up_by_the_operators_word(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        lost = frames(segments(toy.nodes["n0"])[1])[2][1]
        await begin_damaged_alike(toy)
        now = toy.nodes["n0"].running.statistics()
        assert (now.state, now.damaged) == ("repairing", ((lost, lost),))
        toy.nodes["n0"].running.accept_loss()
        await wait_until(lambda: toy.nodes["n0"].running.is_serving, what="the first to serve")
        now = toy.nodes["n0"].running.statistics()
        assert (now.last_index, now.recovering, now.counters["cut_as_damaged"]) == (lost - 1, True, 1)
        assert toy.nodes["n1"].running.state == "repairing", "each is told by itself"
        await trio.sleep(0.7)
        assert not toy.leaders()
        for name in ("n1", "n2"):
            toy.nodes[name].running.accept_loss()
        await toy.put(b"in its place", limit=20)
        await toy.level()
        assert_identical(toy)
        applied = toy.nodes["n0"].machine.applied
        assert applied[-1].startswith(b"in its place") and 300 < len(applied) < 20 * 300


async def test_what_was_given_up_comes_back_from_who_still_has_it(tmp_path: Path) -> None:
    """The word was said too early: a member that was away has the entries, and brings them."""
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        count = len(toy.nodes["n0"].machine.applied)
        *damaged, whole = toy.nodes.values()
        for node in toy.nodes.values():
            await node.stop()
        for node in damaged:
            flip_body(node)
            toy.nursery.start_soon(node.run_here)
        await wait_until(
            lambda: all("damaged here too" in node.running.statistics().waits_for for node in damaged if node.group),
            what="both to wait for each other",
        )
        for node in damaged:
            node.running.accept_loss()
        await wait_until(lambda: all(node.running.is_serving for node in damaged), what="service")
        await whole.start()
        await toy.put(b"more", limit=20)
        await toy.level()
        assert_identical(toy)
        assert len(whole.machine.applied) == count + 1, "whoever had most was elected"


@pytest.mark.chaos
async def test_tables_are_not_given_up_with_the_entries(tmp_path: Path) -> None:
    """The log before was trimmed, and no checkpoint is of an entry before the damage: a cut would leave nothing."""
    async with cluster(tmp_path) as toy:
        await fill(toy, 30)
        await toy.level()
        for _ in range(2):
            for node in toy.nodes.values():
                await trio.to_thread.run_sync(node.running.save_checkpoint, *node.machine.checkpoint())
        leader = await toy.leader()
        leader.running.trim_to(2 * SEGMENT)
        await wait_until(
            lambda: min(node.running.statistics().first_index for node in toy.alive()) > 1, what="trimmed logs"
        )
        await toy.level()
        await begin_damaged_alike(toy)
        node = toy.nodes["n0"]
        with pytest.raises(LedgerError, match="restore a backup"):
            node.running.accept_loss()
        await trio.sleep(0.3)
        assert node.running.state == "repairing" and node.running.statistics().counters["cut_as_damaged"] == 0


async def test_there_is_nothing_to_give_up_while_tables_are_fetched(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 30)
        await toy.level()
        for _ in range(2):
            for node in toy.nodes.values():
                await trio.to_thread.run_sync(node.running.save_checkpoint, *node.machine.checkpoint())
        leader = await toy.leader()
        leader.running.trim_to(2 * SEGMENT)
        await wait_until(
            lambda: min(node.running.statistics().first_index for node in toy.alive()) > 1, what="trimmed logs"
        )
        for node in toy.nodes.values():
            await node.stop()
        node = toy.nodes["n0"]
        for name in ("checkpoint", "checkpoint.1"):
            (node.folder / name).unlink()
        toy.nursery.start_soon(node.run_here)
        await wait_until(lambda: node.group is not None and node.group.state == "installing", what="the phase")
        with pytest.raises(LedgerError, match="nothing to give up while the log is installing"):
            node.running.accept_loss()


async def test_two_nodes_damaged_alike_are_mended_by_the_third(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        *damaged, third = toy.nodes.values()
        for node in toy.nodes.values():
            await node.stop()
        for node in damaged:
            flip_two_segments(node)
            toy.nursery.start_soon(node.run_here)
        await third.start()
        await toy.put(b"more", limit=20)
        await toy.level()
        assert_identical(toy)
        assert [node.running.statistics().counters["repairs"] for node in damaged] == [2, 2]
        assert not any(node.running.statistics().counters["cut_as_damaged"] for node in damaged)


@pytest.mark.chaos
async def test_a_leader_damaged_under_load_hands_over_and_loses_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 12)
        await toy.level()
        old = await toy.leader()
        acknowledged: list[bytes] = []
        is_over = False

        async def load() -> None:
            number = 0
            while not is_over:
                record = b"load %d" % number
                number += 1
                done = trio.Event()
                outcome: list[str] = []

                def told(how: str, outcome: list[str] = outcome, done: trio.Event = done) -> None:
                    outcome.append(how)
                    done.set()

                for node in toy.leaders():
                    with suppress(LedgerError):
                        node.machine.put(node.running, record, told)
                with trio.move_on_after(0.5):
                    await done.wait()
                if outcome == ["applied"]:
                    acknowledged.append(record.ljust(RECORD_BYTES, b"."))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await wait_until(lambda: len(acknowledged) > 20, what="load")
            flip_body(old)
            add_suspects(toy.env.files, str(old.folder), [SEGMENT])  # as the scrub does, which comes by once a day
            assert old.running._driver is not None
            old.running._driver.damaged(LogDamaged("met by the scrub"))
            await wait_until(lambda: old.running.statistics().counters["repairs"] == 1, what="the repair")
            await wait_until(lambda: old.running.is_serving and toy.leaders(), limit=10, what="service")
            before = len(acknowledged)
            await wait_until(lambda: len(acknowledged) > before + 20, limit=10, what="more load")
            is_over = True
        await toy.level()
        assert_identical(toy)
        assert not set(acknowledged) - set(old.machine.applied)


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
