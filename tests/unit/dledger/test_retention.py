"""What the leader trims, and how every node follows: decisions on paper first, then whole groups."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from dledger import retention
from dledger.core.types import EntryType, frame_entry
from dledger.disk_watch import Usage
from dledger.errors import LedgerError, NotLeader
from dledger.lone_trim import LONE_TRIM_FILE, drop_lone_trim, read_lone_trim, write_lone_trim
from dledger.peers import Peers
from dledger.retention import Closed, Plan, Situation, decide, decode_trim, encode_trim, trim_base
from dledger.store.checkpoint import read_checkpoint
from runtime.files import RealFile, RealFiles
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import Node, ToyCluster, driver_of, toy_cluster
from tests.unit.dledger.dledger_toy import lone_config as config

HOUR_MS = 3_600_000
NOW_MS = 1_700_000_000_000
SEGMENT = 65_536


def situation(ages_hours: Sequence[float | None], **changes: Any) -> Situation:
    segments = [
        Closed(number * SEGMENT, (number + 1) * SEGMENT, None if age is None else NOW_MS - int(age * HOUR_MS))
        for number, age in enumerate(ages_hours)
    ]
    known = Situation(
        now_ms=NOW_MS,
        hour=4,
        segments=segments,
        first_position=0,
        files_end=(len(ages_hours) + 3) * SEGMENT,
        floor=1 << 60,
        disk=Usage(50, 100),
    )
    return evolve(known, **changes)


def test_segments_older_than_the_retention_go_at_the_hour_of_deletion() -> None:
    now = situation([80, 73, 71, 10])
    assert decide(config(), now) == Plan(2 * SEGMENT, False, "older than 72 hours")
    assert decide(config(), evolve(now, hour=5)) is None, "at another hour they stay"
    assert decide(config(delete_hour=-1), evolve(now, hour=5)) == Plan(2 * SEGMENT, False, "older than 72 hours")
    assert decide(config(), evolve(now, hour=5), is_manual=True) == Plan(2 * SEGMENT, False, "older than 72 hours")
    assert decide(config(retention_hours=72.5), situation([72.4])) is None


def test_a_segment_whose_age_is_unknown_stays_and_so_does_all_behind_it() -> None:
    assert decide(config(), situation([80, None, 79])) == Plan(SEGMENT, False, "older than 72 hours")
    assert decide(config(), situation([None, 80])) is None


def test_above_the_first_watermark_what_is_old_enough_goes_at_any_hour() -> None:
    now = situation([80, 10], hour=12, disk=Usage(25, 100))
    assert decide(config(), now) is None, "at the mark, not above it"
    assert decide(config(), evolve(now, disk=Usage(24, 100))) == Plan(SEGMENT, False, "older than 72 hours")


def test_above_the_second_watermark_the_oldest_go_whatever_their_age_and_no_more_than_needed() -> None:
    total = 100 * SEGMENT
    now = situation([1, 1, 1, 1], hour=12, disk=Usage(13 * SEGMENT, total), floor=0)
    plan = decide(config(), now)
    assert plan == Plan(2 * SEGMENT, True, "the disk is 87% full"), "two segments bring it back to 85 %"
    assert decide(config(), evolve(now, disk=Usage(15 * SEGMENT, total))) is None
    everything = decide(config(), evolve(now, disk=Usage(0, total)))
    assert everything is not None and everything.position == 4 * SEGMENT


def test_the_size_of_the_log_is_limited_when_asked_for() -> None:
    now = situation([1, 1, 1, 1], hour=12)
    assert decide(config(), now) is None
    plan = decide(config(retention_bytes=5 * SEGMENT), now)
    assert plan == Plan(2 * SEGMENT, False, f"its files hold more than {5 * SEGMENT} bytes")
    assert decide(config(retention_bytes=7 * SEGMENT), now) is None
    aged = decide(config(retention_bytes=6 * SEGMENT), situation([80, 80, 1, 1]))
    assert aged == Plan(2 * SEGMENT, False, "older than 72 hours"), "what is old already makes it small enough"


def test_what_the_machine_needs_stays_unless_forced() -> None:
    now = situation([80, 80, 80], floor=2 * SEGMENT - 1)
    assert decide(config(), now) == Plan(SEGMENT, False, "older than 72 hours")
    assert decide(config(), evolve(now, floor=SEGMENT - 1)) is None
    assert decide(config(retention_bytes=1), evolve(now, floor=SEGMENT - 1)) is None
    forced = decide(config(), evolve(now, floor=0, disk=Usage(1, 100)))
    assert forced is not None and forced.is_forced


def test_what_is_given_up_already_is_not_given_up_again() -> None:
    assert decide(config(), situation([80, 80], first_position=2 * SEGMENT)) is None
    assert decide(config(), situation([])) is None
    plan = decide(config(), situation([1, 1, 1], first_position=SEGMENT, disk=Usage(1, 100)))
    assert plan is not None and plan.position == 2 * SEGMENT


def test_the_body_of_a_trim_says_where_and_whether_it_was_forced() -> None:
    body = encode_trim(0x0102030405, is_forced=True)
    assert body == bytes.fromhex("0504030201000000" + "01")
    assert decode_trim(body) == (0x0102030405, True)
    assert decode_trim(encode_trim(7, is_forced=False)) == (7, False)
    with pytest.raises(ValueError, match="8 bytes"):
        decode_trim(body[:8])


def test_a_trim_keeps_the_segment_of_its_byte_and_its_own() -> None:
    def trim(position: int) -> Any:
        return frame_entry(9, 1, 5 * SEGMENT + 100, EntryType.TRIM, 0, [encode_trim(position, is_forced=False)], 0, 0)

    assert trim_base(trim(2 * SEGMENT), SEGMENT) == 2 * SEGMENT
    assert trim_base(trim(3 * SEGMENT - 1), SEGMENT) == 2 * SEGMENT
    assert trim_base(trim(1 << 50), SEGMENT) == 5 * SEGMENT, "never past itself"


# Whole groups


def cluster(tmp_path: Path, size: int = 3, **settings: Any) -> AbstractAsyncContextManager[ToyCluster]:
    fast = {
        "heartbeat_ms": 20,
        "election_timeout_ms_min": 150,
        "election_timeout_ms_max": 300,
        "segment_bytes": SEGMENT,
        "delete_hour": -1,
    }
    return toy_cluster(tmp_path, size, **{**fast, **settings})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "REMOVE_SECONDS", 0.02)


async def fill(toy: ToyCluster, segments: int, stamp_ms: int = 0) -> None:
    """Put records, each stamped, until the log has grown by so many segments."""
    leader = await toy.leader()
    end = leader.running.end_position + segments * SEGMENT
    number = 0
    while leader.running.end_position < end:
        outcomes: list[str] = []
        for _ in range(200):
            number += 1
            leader.machine.put(leader.running, b"%013d.%d" % (stamp_ms, number), outcomes.append)
        await wait_until(lambda told=outcomes: len(told) == 200, what="commits")  # type: ignore[misc]
    await toy.level()


def save_checkpoints(toy: ToyCluster) -> None:
    """Two, since a log must reach back to the older one."""
    for node in toy.alive():
        for _ in range(2):
            node.running.save_checkpoint(*node.machine.checkpoint())


async def all_but_one_killed(toy: ToyCluster, segments: int = 6) -> list[Node]:
    """The one that is left first; its checkpoints cover its log of so many segments."""
    await fill(toy, segments, toy.env.clock.wall_ms())
    save_checkpoints(toy)
    await toy.leader()
    lone, *rest = toy.alive()
    for node in rest:
        await node.kill()
    return [lone, *rest]


async def decided(toy: ToyCluster, *nodes: Node) -> None:
    """Have nodes look at what is to go, and wait until they have, and until what came of it is applied."""
    for node in nodes:
        kept, is_done = driver_of(node).retention, trio.Event()
        decide = kept._decide

        async def noted(decide: Any = decide, is_done: trio.Event = is_done) -> None:
            await decide()
            is_done.set()

        kept._decide = noted  # type: ignore[method-assign]
        kept.ask()
        await is_done.wait()
        kept._decide = decide  # type: ignore[method-assign]
    for _ in range(2):  # in one turn a TRIM is logged behind what clients proposed
        await toy.put(b"behind it")


async def tried(node: Node, position: int | None) -> None:
    """Wait until the node has tried to remove segments twice, while a peer needs those from `position` on."""
    tries = 0

    def leased() -> int | None:
        nonlocal tries
        tries += 1
        return position

    driver_of(node).retention._leased = leased
    await wait_until(lambda: tries == 2, what="two tries")


def one_disk(monkeypatch: pytest.MonkeyPatch, free: list[int], total: int) -> None:
    """All nodes share it; `free[0]` bytes of it are free."""
    monkeypatch.setattr(RealFiles, "free_space", lambda self, path: (free[0], total))


def disks(monkeypatch: pytest.MonkeyPatch, free: dict[str, int], total: int) -> None:
    """Each node has a disk of its own."""
    monkeypatch.setattr(RealFiles, "free_space", lambda self, path: (free[Path(path).name], total))


def lonely_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no leader does not wait for long before it trims on its own."""
    monkeypatch.setattr(retention, "DECIDE_SECONDS", 0.05)
    monkeypatch.setattr(retention, "ALONE_AFTER_SECONDS", 0.1)


async def wait_for_removal(toy: ToyCluster, position: int) -> None:
    await wait_until(
        lambda: all(node.running.first_position == position for node in toy.alive()), what=f"logs from {position} on"
    )


async def test_a_trim_is_applied_by_all_and_after_a_restart(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 5)
        leader = await toy.leader()
        position = driver_of(leader).trim_to(2 * SEGMENT + 100)
        assert position == 2 * SEGMENT
        await wait_until(lambda: all(node.machine.trims == [position] for node in toy.alive()), what="the trim")
        await wait_until(
            lambda: all(node.machine.checkpoints_wanted > 2 for node in toy.alive()), what="checkpoints to be asked for"
        )
        assert all(node.running.first_position == 0 for node in toy.alive()), "no checkpoint covers them yet"
        assert leader.running.statistics().trimmed_position == position
        save_checkpoints(toy)
        await wait_for_removal(toy, position)
        assert leader.running.read(position - 1, 1) is None and leader.running.read(position, 64) is not None
        await wait_until(lambda: leader.running.statistics().counters["trimmed_bytes"] == position, what="its count")
        counters = leader.running.statistics().counters
        assert (counters["trims"], counters["lost_to_trim"]) == (1, 0)
        assert sorted(path.name for path in (leader.folder / "log").iterdir())[0] == f"{position:020d}"
        for node in list(toy.nodes.values()):
            await node.kill()
        for node in toy.nodes.values():
            await node.start()
        await toy.put(b"after")
        await toy.level()
        for node in toy.alive():
            assert node.running.first_position == position
            first_index = node.running.statistics().first_index
            assert first_index > 1 and node.machine.begins == [(first_index, position)]
            assert node.machine.applied[-1].startswith(b"after")
        again = driver_of(await toy.leader()).trim_to(3 * SEGMENT)
        save_checkpoints(toy)
        await wait_for_removal(toy, again)


async def test_a_trim_that_is_replayed_is_shown_again(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await fill(toy, 5)
        node = toy.nodes["n0"]
        position = driver_of(node).trim_to(SEGMENT)
        await wait_until(lambda: node.machine.trims == [position], what="the trim")
        await toy.put(b"after")  # so that the trim is known to be committed
        await toy.put(b"and after")
        await node.kill()
        await node.start()
        await toy.leader()
        assert node.machine.trims == [position] and node.running.first_position == 0
        assert node.running.statistics().trimmed_position == position
        save_checkpoints(toy)
        await wait_for_removal(toy, position)


async def test_what_is_older_than_the_retention_goes_when_asked(tmp_path: Path) -> None:
    async with cluster(tmp_path, delete_hour=25 % 24, retention_hours=1.0) as toy:
        now_ms = toy.env.clock.wall_ms()
        await fill(toy, 3, now_ms - 2 * HOUR_MS)
        await fill(toy, 4, now_ms)
        leader = await toy.leader()
        driver_of(leader).delete_expired()
        await wait_until(lambda: all(node.machine.trims for node in toy.alive()), what="the trim")
        position = leader.machine.trims[0]
        # A segment's age is that of the first message behind it.
        assert 2 * SEGMENT <= position <= 3 * SEGMENT
        save_checkpoints(toy)
        await wait_for_removal(toy, position)
        with pytest.raises(NotLeader):
            driver_of(next(node for node in toy.alive() if node is not leader)).delete_expired()


async def test_the_newest_closed_segments_and_what_the_machine_needs_stay(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await fill(toy, 5)
        node = toy.nodes["n0"]
        driver = driver_of(node)
        end = node.running.end_position - node.running.end_position % SEGMENT
        node.machine.floor = SEGMENT + 5
        assert driver.trim_to(1 << 50) == SEGMENT, "messages that are not delivered yet"
        node.machine.floor = 0
        with pytest.raises(LedgerError, match="no closed segment"):
            driver.trim_to(1 << 50)
        await wait_until(lambda: node.machine.trims == [SEGMENT], what="the first trim")
        assert driver.trim_to(1 << 50, is_forced=True) == end - 2 * SEGMENT
        await wait_until(lambda: node.machine.trims == [SEGMENT, end - 2 * SEGMENT], what="the forced one")
        assert node.running.statistics().counters["lost_to_trim"] == end - 3 * SEGMENT


async def test_a_disk_that_fills_up_forces_a_trim_and_counts_what_it_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 100 * SEGMENT
    free = [50 * SEGMENT]
    one_disk(monkeypatch, free, total)
    async with cluster(tmp_path) as toy:
        await fill(toy, 6, toy.env.clock.wall_ms())
        leader = await toy.leader()
        for node in toy.alive():
            node.machine.floor = SEGMENT
        await decided(toy, leader)
        assert not leader.machine.trims, "nothing is old, and there is room"
        free[0] = 13 * SEGMENT
        driver_of(leader).delete_expired()
        await wait_until(lambda: all(node.machine.trims for node in toy.alive()), what="the trim")
        assert leader.machine.trims == [2 * SEGMENT], "as much as brings the disk back below 85 %"
        for node in toy.alive():
            assert node.running.statistics().counters["lost_to_trim"] == SEGMENT, node.node_id
        await decided(toy, leader)
        assert leader.machine.trims == [2 * SEGMENT], "it waits for the removal, and does not ask for more meanwhile"


@pytest.mark.chaos
async def test_a_node_without_a_leader_trims_alone_and_leads_only_after_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [50]
    one_disk(monkeypatch, free, 100)
    lonely_at_once(monkeypatch)
    async with cluster(tmp_path) as toy:
        lone, *rest = await all_but_one_killed(toy)
        await wait_until(lambda: lone.running.leader_id is None, what="the leader to be gone")
        free[0] = 10
        await wait_until(lambda: lone.running.first_position > 0, what="segments to go")
        assert lone.running.statistics().counters["trimmed_alone"] >= 1
        await wait_until(lambda: not lone.running.statistics().disk_ok, what="the node to be unfit")
        free[0] = 50
        trimmed = lone.machine.trims[-1]
        for node in rest:
            await node.start()
        leader = await toy.leader()
        assert leader is not lone
        driver_of(leader).trim_to(trimmed)
        await wait_until(lambda: lone.running.statistics().disk_ok, what="the group's trim")


@pytest.mark.chaos
async def test_a_node_that_trimmed_alone_and_leads_after_all_trims_the_group_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All members may have filled the same disk: none of them may wait for ever for another one's TRIM."""
    free = [50]
    one_disk(monkeypatch, free, 100)
    lonely_at_once(monkeypatch)
    monkeypatch.setattr(retention, "ALONE_LEADS_AFTER_SECONDS", 0.5)
    async with cluster(tmp_path, election_timeout_ms_min=400, election_timeout_ms_max=800) as toy:
        lone, *rest = await all_but_one_killed(toy)
        free[0] = 10
        await wait_until(lambda: not lone.running.statistics().disk_ok, what="the node to be unfit")
        free[0] = 50
        await wait_until(lambda: lone.running.statistics().disk_ok, what="the end of its patience")
        trimmed = lone.machine.trims[-1]
        for node in rest:
            await node.start()
        with trio.fail_after(15):
            while (leader := await toy.leader()) is not lone:
                await leader.running.transfer_and_wait(lone.node_id)
        await wait_until(lambda: all(node.machine.trims[-1:] == [trimmed] for node in rest), what="the group's trim")


async def test_nothing_is_trimmed_while_a_member_runs_an_older_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 5)
        leader = await toy.leader()
        monkeypatch.setattr(Peers, "oldest_version", property(lambda self: 1))
        driver = driver_of(leader)
        last_index = driver.store.last_index
        driver.trim_to(SEGMENT)
        await wait_until(lambda: not driver.leadership._own.asked, what="the turn that would log it")
        assert driver.store.last_index == last_index and not leader.machine.trims


async def test_segments_that_a_peer_fetches_stay(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await fill(toy, 5)
        node = toy.nodes["n0"]
        driver = driver_of(node)
        driver.retention._leased = lambda: SEGMENT
        driver.trim_to(3 * SEGMENT)
        await wait_until(lambda: node.machine.trims, what="the trim")
        save_checkpoints(toy)
        await wait_for_removal(toy, SEGMENT)
        await tried(node, SEGMENT)
        assert node.running.first_position == SEGMENT
        driver.retention._leased = lambda: None
        await wait_for_removal(toy, 3 * SEGMENT)


# Over a restart


async def test_a_trim_that_a_checkpoint_covers_is_carried_out_after_a_restart(tmp_path: Path) -> None:
    """The next start sees no TRIM entry; what it gave up must go all the same, and be shown no more."""
    async with cluster(tmp_path, 1) as toy:
        await fill(toy, 5)
        node = toy.nodes["n0"]
        driver = driver_of(node)
        driver.retention._leased = lambda: 0
        driver.trim_to(SEGMENT)
        driver.trim_to(2 * SEGMENT)
        await wait_until(lambda: node.machine.trims == [SEGMENT, 2 * SEGMENT], what="the trims")
        await toy.put(b"behind the trim")
        save_checkpoints(toy)
        await node.kill()
        checkpoint = read_checkpoint(toy.env.files, str(node.folder))
        assert checkpoint is not None and checkpoint.trimmed_position == 2 * SEGMENT
        await node.start()
        assert node.machine.trims == [2 * SEGMENT], "shown once, although the entry is not read again"
        await wait_until(lambda: node.running.first_position == 2 * SEGMENT, what="segments to go")


async def test_a_checkpoint_tells_what_was_given_up_by_the_entry_that_it_covers(tmp_path: Path) -> None:
    """Not what a later TRIM gave up: a power loss may take that one back."""
    async with cluster(tmp_path, 1) as toy:
        await fill(toy, 5)
        node = toy.nodes["n0"]
        driver = driver_of(node)
        before = node.machine.checkpoint()
        driver.trim_to(SEGMENT)
        await wait_until(lambda: node.machine.trims == [SEGMENT], what="the first trim")
        await toy.put(b"between")
        between = node.machine.checkpoint()
        driver.trim_to(2 * SEGMENT)
        await wait_until(lambda: node.machine.trims == [SEGMENT, 2 * SEGMENT], what="the second trim")
        for (index, blob), trimmed in ((before, 0), (between, SEGMENT)):
            node.running.save_checkpoint(index, blob)
            checkpoint = read_checkpoint(toy.env.files, str(node.folder))
            assert checkpoint is not None and (checkpoint.index, checkpoint.trimmed_position) == (index, trimmed)


async def test_nothing_is_removed_on_the_word_of_an_entry_that_a_power_loss_may_take_back(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1, flush_interval_ms=60_000) as toy:
        await fill(toy, 5)
        node = toy.nodes["n0"]
        driver = driver_of(node)
        await driver.store.sync()
        save_checkpoints(toy)
        driver.trim_to(SEGMENT)
        await wait_until(lambda: node.machine.trims == [SEGMENT], what="the trim")
        save_checkpoints(toy)
        await tried(node, None)
        assert node.running.first_position == 0
        await driver.store.sync()
        await wait_until(lambda: node.running.first_position == SEGMENT, what="segments to go")


@pytest.mark.chaos
async def test_who_trimmed_alone_knows_it_after_a_restart_until_the_group_has_trimmed_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [50 * SEGMENT]
    one_disk(monkeypatch, free, 100 * SEGMENT)
    lonely_at_once(monkeypatch)
    async with cluster(tmp_path) as toy:
        lone, *rest = await all_but_one_killed(toy, 7)
        free[0] = 12 * SEGMENT
        note = lone.folder / LONE_TRIM_FILE
        await wait_until(lambda: lone.running.first_position >= 2 * SEGMENT, what="segments to go")
        assert note.exists(), "noted before the first segment goes"
        free[0] = 50 * SEGMENT
        position = lone.running.first_position
        await lone.kill()
        await lone.start()
        await wait_until(lambda: not lone.running.statistics().disk_ok, what="the node to be unfit again")
        for node in rest:
            await node.start()
        leader = await toy.leader()
        assert leader is not lone
        await toy.level()
        driver_of(leader).trim_to(position - SEGMENT)
        await wait_until(lambda: lone.running.statistics().counters["trims"] == 1, what="a smaller trim")
        assert driver_of(lone).retention.is_unfit and note.exists(), "its log still begins later than agreed"
        driver_of(leader).trim_to(position)
        await wait_until(lambda: lone.running.statistics().disk_ok, what="the group's trim")
        await wait_until(lambda: not note.exists(), what="the note to be gone")
        await lone.kill()
        await lone.start()
        assert not driver_of(lone).retention.is_unfit


def test_a_note_that_cannot_be_read_stands_for_all_that_is_gone(tmp_path: Path) -> None:
    files, folder = RealFiles(), str(tmp_path)
    assert read_lone_trim(files, folder, 5 * SEGMENT) is None
    write_lone_trim(files, folder, 3 * SEGMENT)
    assert read_lone_trim(files, folder, 5 * SEGMENT) == 3 * SEGMENT
    assert read_lone_trim(files, folder, 2 * SEGMENT) == 2 * SEGMENT, "what is there yet is not owed"
    whole = (tmp_path / LONE_TRIM_FILE).read_bytes()
    for damaged in [whole[:-1], *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole)))]:
        (tmp_path / LONE_TRIM_FILE).write_bytes(damaged)
        assert read_lone_trim(files, folder, 5 * SEGMENT) == 5 * SEGMENT
    drop_lone_trim(files, folder)
    drop_lone_trim(files, folder)
    assert read_lone_trim(files, folder, 5 * SEGMENT) is None


@pytest.mark.chaos
async def test_a_note_for_which_there_is_no_room_follows_the_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(files: Any, folder: str, position: int) -> None:
        written.append(position)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "full")
        write_lone_trim(files, folder, position)

    monkeypatch.setattr(retention, "write_lone_trim", write)
    one_disk(monkeypatch, [10], 100)
    lonely_at_once(monkeypatch)
    monkeypatch.setattr("dledger.disk_watch.USAGE_SECONDS", 60.0)
    async with cluster(tmp_path, disk_watermarks=(0.75, 0.85, 1.0)) as toy:
        lone, *_ = await all_but_one_killed(toy)
        await wait_until(lambda: lone.running.first_position > 0, what="segments to go")
        await wait_until(lambda: (lone.folder / LONE_TRIM_FILE).exists(), what="the note")


# Sizes and disks


def checkpoint_when_asked(toy: ToyCluster) -> None:
    """As a broker does."""
    for node in toy.alive():

        def save(node: Node = node) -> None:
            index, blob = node.machine.checkpoint()
            node.running.save_checkpoint(index, blob)

        node.machine.checkpoint_soon = save  # type: ignore[method-assign]


async def test_a_log_that_is_limited_is_looked_at_whenever_a_segment_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the next regular look: under load that would be late."""
    monkeypatch.setattr(retention, "DECIDE_SECONDS", 3600.0)
    limit = 5 * SEGMENT
    patient = {"election_timeout_ms_min": 3000, "election_timeout_ms_max": 5000}  # a new leader looks at the next one
    async with cluster(tmp_path, retention_bytes=limit, **patient) as toy:
        checkpoint_when_asked(toy)
        for _ in range(12):
            await fill(toy, 1, toy.env.clock.wall_ms())
            await wait_until(
                lambda: all(
                    not driver_of(node).store.needs_spare and len(segments(node)) * SEGMENT <= limit
                    for node in toy.alive()
                ),
                limit=10.0,
                what="room, the spare included",
            )
        assert all(node.running.first_position >= 8 * SEGMENT for node in toy.alive())


def segments(node: Node) -> list[Path]:
    return [path for path in (node.folder / "log").iterdir() if path.name.isdigit()]


async def test_a_follower_whose_disk_fills_up_brings_about_a_trim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 100 * SEGMENT
    free = {f"n{number}": 50 * SEGMENT for number in range(3)}
    disks(monkeypatch, free, total)
    monkeypatch.setattr(retention, "DECIDE_SECONDS", 0.05)
    monkeypatch.setattr(retention, "PRESSED_SECONDS", 0.05)
    async with cluster(tmp_path) as toy:
        await fill(toy, 6, toy.env.clock.wall_ms())
        leader = await toy.leader()
        small = next(node for node in toy.alive() if node is not leader)
        await decided(toy, small, leader)
        assert not leader.machine.trims
        free[small.node_id] = 13 * SEGMENT
        await wait_until(lambda: all(node.machine.trims for node in toy.alive()), what="the trim")
        assert leader.machine.trims == [2 * SEGMENT], "as much as that disk needs"
        await decided(toy, small, small, leader)
        assert leader.machine.trims == [2 * SEGMENT], "and no more while it has yet to remove it"
        assert driver_of(small).retention.counters["trimmed_alone"] == 0


async def test_a_leader_gives_no_more_than_may_go_to_a_follower_that_wants_it(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await fill(toy, 5)
        leader = await toy.leader()
        end = leader.running.end_position - leader.running.end_position % SEGMENT
        follower = next(node for node in toy.alive() if node is not leader)
        driver_of(follower).retention._tell_leader(1 << 50)
        await wait_until(lambda: leader.machine.trims, what="the trim")
        assert leader.machine.trims == [end - 2 * SEGMENT]
        driver_of(follower).on_trim_wanted(leader.node_id, 1 << 50)
        assert not driver_of(follower).retention._wanted, "who does not lead is told by mistake"


async def test_only_a_members_disk_counts(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        leader = await toy.leader()
        follower = next(node for node in toy.alive() if node is not leader)
        driver = driver_of(leader)
        driver.on_trim_wanted("n9", 1 << 50)
        assert not driver.retention._wanted
        driver.on_trim_wanted(follower.node_id, 1 << 50)
        assert driver.retention._wanted == {follower.node_id: 1 << 50}


async def test_a_follower_whose_log_takes_nothing_helps_itself_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TRIM is an entry: it cannot come to a log for which there is no room."""
    total = 100 * SEGMENT
    free = {f"n{number}": 50 * SEGMENT for number in range(3)}
    disks(monkeypatch, free, total)
    monkeypatch.setattr(retention, "ALONE_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(retention, "PRESSED_SECONDS", 0.05)
    monkeypatch.setattr("dledger.disk_watch.USAGE_SECONDS", 0.05)
    monkeypatch.setattr("dledger.flusher.DISK_FULL_RETRY_SECONDS", 0.05)
    allocate = RealFile.allocate
    async with cluster(tmp_path) as toy:
        await fill(toy, 5, toy.env.clock.wall_ms())
        save_checkpoints(toy)
        leader = await toy.leader()
        small = next(node for node in toy.alive() if node is not leader)
        others = [node for node in toy.alive() if node is not small]

        def allocating(self: RealFile, nbytes: int) -> None:
            if f"/{small.node_id}/" in self.path and len(segments(small)) >= held:
                raise OSError(errno.ENOSPC, "full")
            allocate(self, nbytes)

        held = len(segments(small))
        monkeypatch.setattr(RealFile, "allocate", allocating)
        driver_of(leader).retention.wanted_by = lambda peer, position: None  # type: ignore[method-assign]
        free[small.node_id] = 12 * SEGMENT
        end = leader.running.end_position + 4 * SEGMENT
        number = 0
        while leader.running.end_position < end:
            for _ in range(200):
                number += 1
                leader.machine.put(leader.running, b"more %d" % number, lambda outcome: None)
            await toy.env.clock.sleep(0.01)
        await wait_until(lambda: small.running.first_position > 0, what="the follower to help itself")
        free[small.node_id] = 50 * SEGMENT
        assert driver_of(small).retention.counters["trimmed_alone"] >= 1 and (small.folder / LONE_TRIM_FILE).exists()
        assert all(node.running.first_position == 0 for node in others)
        held = 1000
        await toy.level()
        assert driver_of(small).retention.is_unfit


async def test_after_a_restart_both_checkpoints_count_at_once(tmp_path: Path) -> None:
    """On a disk without room for the next checkpoint, what the two on it cover may go."""
    async with cluster(tmp_path, 1) as toy:
        await fill(toy, 6)
        save_checkpoints(toy)
        node = toy.nodes["n0"]
        await node.kill()
        await node.start()
        await toy.leader()
        driver_of(node).trim_to(2 * SEGMENT)
        await wait_until(lambda: node.running.first_position == 2 * SEGMENT, what="segments to go")
