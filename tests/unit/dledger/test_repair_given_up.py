"""What a repair gives up: of a damaged range only what no quorum can have had (raft.md 4.6)."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from attrs import evolve

from dledger.core.types import HEADER_BYTES, Entry
from dledger.divergence import widened
from dledger.fetch import Answer, FetchClient
from dledger.repair import Mended, RepairPhase, _Found
from dledger.store.faults import EntryDamaged, FaultyRange
from dledger.store.meta import Meta
from dledger.wire import FetchKind, FetchStatus
from runtime.testing import test_env, wait_until
from tests.unit.dledger.dledger_toy import Node, ToyCluster
from tests.unit.dledger.store.store_kit import Framer, opened, some_entries, write_log
from tests.unit.dledger.test_guards_peers import ENTRIES, Answers, a_phase
from tests.unit.dledger.test_repair import assert_identical, cluster, fill, flip, frames, segments


class Logs(Answers):
    """Peers that have these entries, and nothing else."""

    async def ask(self, peer: str, kind: FetchKind, first: int = 0, last: int = 0, number: int = 0) -> Answer:
        await trio.lowlevel.checkpoint()
        log = cast(list[Entry], self.given[peer])
        crcs = {0: 0, **{entry.index: entry.head_crc for entry in log}}
        if first not in crcs or crcs.get(first - 1) != number:
            return Answer(FetchStatus.ABSENT, reason="never had it")
        return Answer(FetchStatus.OK, b"".join(entry.frame for entry in log if first <= entry.index <= last))


def log_until(last: int, *, then: int = 0, term: int = 2) -> list[Entry]:
    """The first of ENTRIES, and behind them others of a later term."""
    framer = Framer()
    framer.back_to(ENTRIES[last - 1])
    return [*ENTRIES[:last], *some_entries(framer, random.Random(5), then, term)]


def at(index: int) -> FaultyRange:
    """ENTRIES from `index` to 20 are damaged."""
    before = ENTRIES[index - 2]
    return FaultyRange(
        index, 20, before.end, ENTRIES[20].position, before.head_crc, ENTRIES[19].head_crc, "the entry is damaged"
    )


@pytest.mark.parametrize(
    ("peers", "front_of", "kept"),
    [
        ({"n1": log_until(12), "n2": log_until(14)}, "n2", range(10, 15)),
        ({"n1": log_until(14), "n2": log_until(12, then=1)}, "n2", range(10, 14)),
        ({"n1": log_until(12, then=9), "n2": log_until(14)}, "n1", range(10, 21)),
        ({"n1": log_until(8, then=9), "n2": log_until(11)}, "n2", range(10, 12)),
        ({"n1": log_until(9), "n2": log_until(8)}, None, range(0)),
    ],
)
async def test_4_6_the_front_is_taken_from_who_has_all_that_is_committed_of_it(
    peers: dict[str, list[Entry]], front_of: str | None, kept: range
) -> None:
    """The entry of the greatest term was logged by who had everything committed before (Raft 5.4.1, 5.4.3)."""
    found = await a_phase(Logs(**peers))._ask_everybody(at(10))
    assert sorted(found.absent) == ["n1", "n2"]
    assert (found.front_of, [entry.index for entry in found.front]) == (front_of, list(kept))


class Trimmed(Logs):
    """Logs that begin behind the first entries."""

    first_index = 1

    async def ask(self, peer: str, kind: FetchKind, first: int = 0, last: int = 0, number: int = 0) -> Answer:
        if first < self.first_index:
            await trio.lowlevel.checkpoint()
            return Answer(FetchStatus.GONE, reason="trimmed")
        return await super().ask(peer, kind, first, last, number)


def beside_an_older_copy(index: int) -> FaultyRange:
    """As `at`, and what lies before it is not what the group has there."""
    return evolve(at(index), prev_crc=at(index).prev_crc ^ 1)


async def test_4_6_who_has_what_follows_a_range_does_not_say_that_it_was_never_committed() -> None:
    """But that what lies before it here is another log's, and the entries behind it are intact."""
    phase = a_phase(Logs(n1=ENTRIES, n2=ENTRIES[:20]))
    found = await phase._ask_everybody(beside_an_older_copy(10))
    assert sorted(found.absent) == ["n2"] and sorted(found.others) == ["n1"] and not found.gone
    assert not phase._was_never_committed(found)
    assert found.differing == ["n1", "n2"], "the range may be widened"


async def test_4_6_a_range_beside_an_older_copy_is_lost_with_what_the_peers_have_trimmed() -> None:
    """No entry in common is left to widen it to."""
    peers = Trimmed(n1=ENTRIES, n2=ENTRIES)
    peers.first_index = 5
    assert await noting(a_phase(peers), [], beside_an_older_copy(10))._round() is Mended.INSTALL


async def test_4_6_who_cannot_say_whether_it_has_what_follows_gives_no_definite_no() -> None:
    class Interrupted(Logs):
        async def ask(self, peer: str, kind: FetchKind, first: int = 0, last: int = 0, number: int = 0) -> Answer:
            answer = await super().ask(peer, kind, first, last, number)
            return Answer(FetchStatus.BUSY, reason="the connection was lost") if first == 21 else answer

    found = await a_phase(Interrupted(n1=ENTRIES))._ask_everybody(beside_an_older_copy(10))
    assert not found.absent and sorted(found.others) == ["n1"]


async def test_4_6_damage_met_while_a_range_is_widened_is_no_divergence(tmp_path: Path) -> None:
    """What lies between may be committed: the log is recovered anew, and the peers are asked for that entry."""
    await write_log(tmp_path, ENTRIES)
    store, _ = await opened(test_env(tmp_path), tmp_path)
    for path in sorted((tmp_path / "log").iterdir()):
        for offset, index in frames(path):
            if index == 4:
                flip(path, offset + HEADER_BYTES + 3)
    with pytest.raises(EntryDamaged):
        await widened(cast(FetchClient, Logs(n1=log_until(7, then=3))), "n1", store, at(10))
    store.abandon()


async def test_what_keeps_a_front_from_being_written_is_told() -> None:
    phase = a_phase(Logs(n1=log_until(14), n2=log_until(12)))

    async def no_room(*args: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENOSPC, "no space left")

    changed = cast(Any, noting(phase, [], at(10)))
    del changed._write
    changed._meta.saved = Meta()
    changed._env = evolve(changed._env, run_in_thread=no_room)
    assert await phase._round() is None
    assert "this node has no room for the repair" in phase.waits_for


def noting(phase: RepairPhase, done: list[str], fault: FaultyRange, *, has_room: bool = True) -> RepairPhase:
    """With this damage, on a disk that notes what is done to it."""

    async def save_recovering(recovering: bool) -> None:
        await trio.lowlevel.checkpoint()
        done.append(f"recovering {recovering}")

    async def write(fault: FaultyRange, found: _Found, *, was_open: bool) -> bool:
        await trio.lowlevel.checkpoint()
        done.append(f"write {fault.first_index} to {fault.last_index} of {found.supplier}")
        return has_room

    async def cut(fault: FaultyRange, found: _Found, text: str) -> None:
        await trio.lowlevel.checkpoint()
        done.append(f"cut at {fault.first_index}, position {fault.position}")

    changed = cast(Any, phase)
    changed._pending, changed._meta = [fault], SimpleNamespace(save_recovering=save_recovering)
    changed._write, changed._cut = write, cut
    return phase


@pytest.mark.parametrize("has_room", [True, False])
async def test_4_6_of_a_range_that_is_given_up_the_front_is_written_and_the_rest_is_cut(has_room: bool) -> None:
    done: list[str] = []
    phase = noting(a_phase(Logs(n1=log_until(14), n2=log_until(12))), done, at(10), has_room=has_room)
    verdict = await phase._round()
    assert done[:2] == ["recovering True", "write 10 to 14 of n1"], (
        "what may have been acknowledged behind is forgotten"
    )
    if has_room:
        assert verdict is Mended.REOPEN and done[2:] == [f"cut at 15, position {ENTRIES[13].end}"]
    else:
        assert verdict is None and not done[2:], "it is tried again"


async def test_4_6_where_a_peer_has_as_much_replication_brings_the_front_too() -> None:
    done: list[str] = []
    is_open = evolve(at(10), end=None, next_crc=None)
    phase = noting(a_phase(Logs(n1=log_until(14), n2=log_until(30))), done, is_open)
    assert await phase._round() is Mended.REOPEN
    assert done == [f"cut at 10, position {ENTRIES[8].end}"]


@pytest.mark.parametrize(
    ("log", "first"),
    [
        (log_until(9), None),
        (log_until(12), None),
        (log_until(9, then=9), None),
        (log_until(8, then=9), 9),
        (log_until(8, then=1), 9),
        (log_until(3, then=20), 4),
        (log_until(8), 9),
        (log_until(1), 2),
        ([], None),
    ],
    ids=lambda given: f"until {len(given)}" if isinstance(given, list) else f"from {given}",
)
async def test_4_6_a_range_is_widened_only_where_the_peer_does_not_have_the_entry_before(
    tmp_path: Path, log: list[Entry], first: int | None
) -> None:
    """That a peer's log ends there is no reason to give the entry up."""
    await write_log(tmp_path, ENTRIES)
    store, _ = await opened(test_env(tmp_path), tmp_path)
    wide = await widened(cast(FetchClient, Logs(n1=log)), "n1", store, at(10))
    store.abandon()
    assert (wide and wide.first_index) == first
    if wide is not None:
        assert (wide.position, wide.prev_crc) == (
            ENTRIES[wide.first_index - 2].end,
            ENTRIES[wide.first_index - 2].head_crc,
        )


async def filled(toy: ToyCluster) -> tuple[Node, Node, Node]:
    """The leader of a level group with some entries, and the others."""
    await fill(toy, 3)
    await toy.level()
    leader = await toy.leader()
    one, two = (node for node in toy.nodes.values() if node is not leader)
    return leader, one, two


async def log_alone(old: Node, count: int) -> int:
    """Entries of a leader nobody follows; they are on its disk, and not committed. Returns the first one's index."""
    first = old.running.statistics().last_index + 1
    outcomes: list[str] = []
    for number in range(count):
        old.machine.put(old.running, b"alone %d" % number, outcomes.append)
        old.running.seal()
    await wait_until(lambda: old.running.statistics().durable_index == first + count - 1, what="entries on disk")
    return first


def flip_entries(node: Node, *indexes: int) -> None:
    """One bit of the body of each."""
    for path in segments(node):
        for offset, index in frames(path):
            if index in indexes:
                flip(path, offset + HEADER_BYTES + 3)


def first_cut(caplog: pytest.LogCaptureFixture) -> int:
    """The entry a damaged end was cut at, as the log tells."""
    (text,) = (record.getMessage() for record in caplog.records if "damaged end of the log cut" in record.message)
    return int(text.partition(" first=")[2].split()[0])


async def test_damaged_entries_that_no_quorum_can_have_are_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A leader alone logged them; they were never committed. One peer's no is not enough, two of three are."""
    async with cluster(tmp_path, flush="sync") as toy:
        old, one, two = await filled(toy)
        await one.stop()
        await two.stop()
        first = await log_alone(old, 3)
        await old.stop()
        flip_entries(old, first)
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
        assert first_cut(caplog) >= first, "the entry before was committed"
        assert not [record for record in old.machine.applied if record.startswith(b"alone")]
        await wait_until(lambda: not old.running.statistics().recovering, what="the leader's confirmation")


async def test_of_a_range_that_is_given_up_the_first_entries_may_be_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A leader's disk damaged one entry that a majority has, and the next one, that it alone had."""
    async with cluster(tmp_path, flush="sync") as toy:
        old, one, two = await filled(toy)
        await two.stop()
        await toy.put(b"committed by two of three")
        await one.stop()
        first = await log_alone(old, 3)
        await old.stop()
        flip_entries(old, first - 1, first)
        await one.start()
        await two.start()
        toy.nursery.start_soon(old.run_here)
        await wait_until(lambda: old.group is not None and old.running.is_serving, what="the old leader to serve")
        await toy.put(b"in their place", limit=20)
        await toy.level(20)
        assert_identical(toy)
        assert first_cut(caplog) == first
        assert any(record.startswith(b"committed by two of three") for record in old.machine.applied)
        assert not [record for record in old.machine.applied if record.startswith(b"alone")]
        await wait_until(lambda: not old.running.statistics().recovering, what="the leader's confirmation")
