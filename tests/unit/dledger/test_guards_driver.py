"""Guards of the driver and its parts that no other test names: each was found by taking it away
(tests/mutants.toml)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from attrs import evolve
from trio.testing import MockClock

from dledger.config import GroupConfig
from dledger.core import effects as fx
from dledger.core.errors import LocalError
from dledger.core.events import Event, Propose
from dledger.core.types import HEADER_BYTES, Entry, EntryType, frame_entry
from dledger.disk_watch import Usage
from dledger.driver import Driver
from dledger.errors import CoreStopped, DiskFull, FormatError, LogDamaged, NotLeader, Overloaded, Reopen
from dledger.feed import LogFeed
from dledger.identity import identify
from dledger.lifecycle import REOPEN_SECONDS_MAX, REOPEN_SECONDS_MIN, LifeCycle
from dledger.open_batch import BATCH_BYTES_MAX, BATCH_RECORDS_MAX, OpenBatch, Proposal
from dledger.replay import Replay
from dledger.retention import Retention, encode_trim
from dledger.store.format import Format
from dledger.store.log_store import LogStore
from dledger.store.manifest import SegmentSpan
from dledger.store.meta import Meta, MetaFile
from runtime.logs import get_logger
from runtime.testing import test_env, wait_until
from tests.unit.dledger.dledger_toy import Node, ToyMachine, driver_of, lone_config, toy_env
from tests.unit.dledger.test_driver import cluster, meta_of
from tests.unit.dledger.test_driver_parts import OldLog

SEGMENT = 65_536


async def alone(toy: Any) -> tuple[Node, Driver]:
    leader = await toy.leader()
    return leader, driver_of(leader)


def data_entry(index: int) -> Entry:
    return frame_entry(index, 1, 0, EntryType.DATA, 1, [b"x" * 32], 0, 0)


def trim_entry(index: int, position: int) -> Entry:
    body = encode_trim(position, is_forced=False)
    return frame_entry(index, 1, 10 * SEGMENT, EntryType.TRIM, 0, [body], 0, 0)


# What became of a proposal


async def test_a_refused_proposal_is_discarded_and_the_next_one_is_taken(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        leader, driver = await alone(toy)
        step = driver.core.step

        def refusing(event: Event) -> list[fx.Effect]:
            return [fx.Refused(event.entries, "a test says so")] if type(event) is Propose else step(event)

        driver.core.step = refusing  # type: ignore[method-assign]
        outcomes: list[str] = []
        leader.machine.put(leader.running, b"refused", outcomes.append)
        driver.pump()
        assert outcomes == ["discarded"] and leader.machine.pending == []
        driver.core.step = step  # type: ignore[method-assign]
        await toy.put(b"taken")
        assert [record.rstrip(b".") for record in leader.machine.applied] == [b"taken"]


async def test_an_entry_is_orphaned_once(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        _, driver = await alone(toy)
        driver.applier.proposed([Proposal(data_entry(9), ([], b"", []))], 0.0)
        assert driver.applier.waiting_records == 1
        driver.applier.orphan_all()
        driver.applier.orphan_all()
        assert driver.applier.waiting_records == 0 and driver.counters["orphaned"] == 1


async def test_lost_leadership_tells_who_waits_that_the_outcome_is_unknown(tmp_path: Path) -> None:
    """At once, and not when their time is up; the entry may still be committed by the next leader."""
    async with cluster(tmp_path, orphan_after_ms=600_000) as toy:
        leader = await toy.leader()
        for node in toy.alive():
            if node is not leader:
                await node.kill()
        outcomes: list[str] = []
        leader.machine.put(leader.running, b"alone", outcomes.append)
        await wait_until(lambda: outcomes, what="an answer")
        assert outcomes == ["unknown"] and len(leader.machine.pending) == 1


async def test_a_lone_proposal_takes_one_turn(tmp_path: Path) -> None:
    """Opening the batch wakes the driver, and the kick is quicker: then there is nothing left for the driver to do."""
    async with cluster(tmp_path, 1, flush_interval_ms=60_000) as toy:
        leader, driver = await alone(toy)
        outcomes: list[str] = []
        before = driver.turns
        for number in range(40):
            leader.machine.put(leader.running, b"%d" % number, outcomes.append)
            leader.running.kick()
            for _ in range(3):
                await trio.lowlevel.checkpoint()
        assert outcomes == ["applied"] * 40
        assert driver.turns - before < 60, "heartbeats and housekeeping have theirs"


async def test_what_the_core_is_asked_wrongly_ends_the_node_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deep within the tasks of a run, and where a core is made."""

    def refuse(*_: object, **__: object) -> Any:
        raise LocalError("nobody asks for that")

    async with cluster(tmp_path, 1) as toy:
        node, driver = await alone(toy)
        toy.is_error_expected = True
        driver.core.step = refuse  # type: ignore[method-assign]
        driver.wake()
        await node.ended.wait()
        assert isinstance(node.error, CoreStopped) and str(node.error) == "nobody asks for that"
        monkeypatch.setattr("dledger.lifecycle.Raft", refuse)
        with pytest.raises(CoreStopped, match="nobody asks for that"):
            await node.run_here()


# What must be on stable storage


async def test_4_2_a_leader_leads_with_its_term_and_vote_saved(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        _, driver = await alone(toy)
        assert (meta_of(driver).saved.term, meta_of(driver).saved.vote) == (driver.term, "n0")


async def test_4_6_the_durable_mark_follows_the_sync(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        _, driver = await alone(toy)
        await toy.put(b"one")
        last = driver.store.last_index
        await wait_until(lambda: meta_of(driver).saved.durable_index >= last, what="the mark")


async def test_4_2_a_confirmed_node_does_not_recover_at_its_next_start(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        _, driver = await alone(toy)
        await meta_of(driver).save_recovering(True)
        driver._perform([fx.Recovered(1)])
        await wait_until(lambda: not meta_of(driver).saved.recovering, what="the flag to go")


async def test_4_2_a_clean_stop_is_marked(tmp_path: Path) -> None:
    """Such a node need not recover first when the machine has booted since."""
    async with cluster(tmp_path, 1) as toy:
        node, driver = await alone(toy)
        assert not meta_of(driver).saved.clean
        await node.stop()
        assert meta_of(driver).saved.clean and meta_of(driver).saved.durable_index == driver.store.last_index


async def test_4_6_a_damaged_log_of_one_is_not_served(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await toy.put(b"x" * 32)
        node = toy.nodes["n0"]
        await node.stop()
        path = tmp_path / "n0" / "log" / ("0" * 20)
        content = bytearray(path.read_bytes())
        content[10] ^= 1
        path.write_bytes(content)
        with trio.fail_after(3), pytest.raises(LogDamaged, match="refusing to serve"):
            await node.run_here()


async def test_4_6_who_looks_at_a_log_that_turns_out_damaged_is_answered_and_it_is_mended(tmp_path: Path) -> None:
    def damaged(*_: object) -> Any:
        raise LogDamaged("a row is damaged")

    async def damaged_in_thread(*_: object) -> Any:
        await trio.lowlevel.checkpoint()
        damaged()

    async with cluster(tmp_path, 1) as toy:
        await toy.put(b"one")
        node, driver = await alone(toy)
        group, store = node.running, cast(Any, driver.store)
        store.read = store.read_cached = store.manifest = damaged
        store.read_in_thread = damaged_in_thread
        driver.statistics = damaged  # type: ignore[method-assign]
        assert group.read(0, 64) is None and group.read_cached(0, 64) is None and group.manifest() is None
        assert group.statistics().node_id == "n0"
        assert await group.read_cold(0, 64) is None
        assert driver.counters["damage_found"] == 5
        await wait_until(lambda: group._driver not in (None, driver), what="the log to be open again")


def a_life(folder: Path) -> tuple[LifeCycle, Format]:
    peers = {"n0": ("127.0.0.1", 1), "n1": ("127.0.0.1", 2)}
    config = lone_config(data_dir=str(folder), format_if_empty=True, peers=peers)
    life = LifeCycle(
        test_env(folder),
        config,
        ToyMachine(),
        get_logger("test"),
        OpenBatch(),
        listener=None,
        serving=lambda driver: None,
        before_reopen=trio.lowlevel.checkpoint,
    )
    return life, identified(folder, config)


async def test_a_log_that_is_damaged_again_and_again_is_opened_anew_ever_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    life, identity = a_life(tmp_path)
    lasting = [0.0, 0.0, 0.0, REOPEN_SECONDS_MAX + 1, 0.0]
    pauses: list[float] = []
    ended_at = 0.0

    async def run_once(*_: object) -> None:
        nonlocal ended_at
        pauses.append(trio.current_time() - ended_at)
        if lasting:
            await trio.sleep(lasting.pop(0))
            ended_at = trio.current_time()
            raise Reopen("damaged")

    monkeypatch.setattr(life, "_run_once", run_once)
    await life._reopen_until_stopped(cast(Any, None), identity, trio.TASK_STATUS_IGNORED)
    first = REOPEN_SECONDS_MIN
    assert pauses[1:] == pytest.approx([first, 2 * first, 4 * first, 0.0, first]), "one that lasted counts for nothing"


async def test_4_6_a_damaged_log_is_mended_before_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noting(what: str) -> Any:
        async def note(*_: object) -> None:
            await trio.lowlevel.checkpoint()
            done.append(what)

        return note

    async def opened(*_: object) -> Any:
        await trio.lowlevel.checkpoint()
        faults = ["entry 3 is damaged"] if not done else []
        return SimpleNamespace(abandon=lambda: done.append("closed")), SimpleNamespace(faults=faults)

    life, identity = a_life(tmp_path)
    monkeypatch.setattr("dledger.lifecycle.LogStore.open", opened)
    monkeypatch.setattr(life, "_mend", noting("mended"))
    monkeypatch.setattr(life, "_serve", noting("served"))
    for _ in range(2):
        await life._run_once(cast(Any, SimpleNamespace(saved=Meta())), identity, trio.TASK_STATUS_IGNORED)
    assert done == ["mended", "closed", "served", "closed"]


def identified(folder: Path, config: GroupConfig) -> Format:
    return identify(test_env(folder), config, get_logger("test"))


async def test_4_6_a_folder_is_formatted_only_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not formatted"):
        identified(tmp_path, lone_config(data_dir=str(tmp_path)))
    assert toy_env(tmp_path).files.listdir(str(tmp_path)) == []


async def test_4_6_a_log_without_a_format_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / ("0" * 20)).write_bytes(b"somebody's log")
    for settings in ({"format_if_empty": True}, {"join": True}):
        with pytest.raises(FormatError, match="refusing to touch it"):
            identified(tmp_path, lone_config(data_dir=str(tmp_path), **settings))
    assert toy_env(tmp_path).files.listdir(str(tmp_path)) == ["log"]


async def test_scenario_23_a_blank_folder_recovers_from_its_first_moment_on(tmp_path: Path) -> None:
    identity = identified(tmp_path, lone_config(data_dir=str(tmp_path), join=True))
    meta = MetaFile.open(test_env(tmp_path).files, str(tmp_path), identity)
    assert meta.saved.recovering
    meta.close()


# Members


async def test_4_15_a_member_that_leaves_is_let_go_when_that_is_committed(tmp_path: Path) -> None:
    """Until then a removed leader needs the answers of the others, and a cut may bring a removed member back."""
    async with cluster(tmp_path) as toy:
        driver = driver_of(await toy.leader())
        members = driver.roster.members
        gone = next(name for name in members.voters if name != driver.leader_id)
        left = evolve(members, voters=tuple(name for name in members.voters if name != gone))
        driver._perform([fx.MembersChanged(9, left)])
        assert gone in driver.peers._addresses
        driver._perform([fx.MembersChanged(9, left, is_committed=True)])
        assert gone not in driver.peers._addresses


# Bounds


async def test_4_11_room_for_proposals_is_bounded(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        leader, driver = await alone(toy)
        assert driver.leadership.check_room() is None
        end = driver.batch.log_end
        driver.batch.log_end = driver.applier.committed_position + toy.config("n0").uncommitted_bytes_max + 1
        assert "bytes" in str(driver.leadership.check_room())
        driver.batch.log_end = end
        driver.applier.waiting_records = toy.config("n0").waiting_records_max + 1
        assert "messages" in str(driver.leadership.check_room())
        driver.applier.waiting_records = 0
        driver.disk.is_full = True
        with pytest.raises(DiskFull, match="full"):
            leader.running.reserve(32)
        driver.disk.is_full = False
        leader.running.reserve(32)


def a_batch() -> OpenBatch:
    batch = OpenBatch()
    batch.bind(16 << 20, 8 << 20, lambda: None, lambda: None)
    batch.lead(1, 1, 0, 0)
    return batch


def add(batch: OpenBatch, nbytes: int) -> None:
    batch.reserve(nbytes)
    batch.add_record(bytes(nbytes))


def test_4_4_an_entry_holds_so_many_messages_and_bytes_at_most() -> None:
    batch = a_batch()
    for _ in range(BATCH_RECORDS_MAX + 1):
        add(batch, 10)
    assert [proposal.entry.count for proposal in batch.take_sealed()] == [BATCH_RECORDS_MAX, 1]
    for _ in range(5):
        add(batch, 100 * 1024)
    entries = [proposal.entry for proposal in batch.take_sealed()]
    assert [entry.count for entry in entries] == [2, 2, 1]
    assert all(len(entry.frame) <= BATCH_BYTES_MAX + HEADER_BYTES for entry in entries)


def test_who_does_not_lead_takes_no_records() -> None:
    batch = a_batch()
    batch.stop("n2")
    with pytest.raises(NotLeader, match="n2"):
        batch.reserve(10)


def test_a_record_is_as_long_as_what_was_reserved_for_it() -> None:
    batch = a_batch()
    batch.reserve(10)
    with pytest.raises(ValueError, match="where 10 were reserved"):
        batch.add_record(bytes(11))
    with pytest.raises(ValueError, match="where 10 were reserved"):
        batch.add_records([bytes(5), bytes(6)])


def test_a_batch_that_is_stopped_gives_everything_back_newest_first() -> None:
    batch = a_batch()
    for staged in ("first", "second"):
        batch.propose([b"x"], b"", staged)
    add(batch, 10)
    batch.staged = "open"
    assert batch.stop(None) == ["open", "second", "first"] and batch.is_empty


def test_a_full_group_opens_no_batch() -> None:
    batch = a_batch()
    batch.bind(16 << 20, 8 << 20, lambda: Overloaded("too much"), lambda: None)
    with pytest.raises(Overloaded):
        batch.reserve(10)


# What is not committed


async def test_6_1_nothing_behind_the_commit_index_is_applied(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        leader, driver = await alone(toy)
        last = driver.store.last_index
        driver.store.end_of = lambda index: 0  # type: ignore[method-assign]
        driver.applier.stage([data_entry(last + 1), data_entry(last + 2)])
        driver.applier.commit_index = last + 1
        assert not driver.applier.apply(0.0)
        assert [index for index, _, _ in leader.machine.entries] == [last + 1]
        assert driver.applier.applied_index == last + 1 and len(leader.machine.pending) == 1


def test_4_9_a_trim_that_is_not_known_to_be_committed_waits() -> None:
    machine = ToyMachine()
    replay = Replay(machine, SEGMENT, 5, (0, 0))
    replay.show(trim_entry(5, 2 * SEGMENT))
    assert machine.trims == [2 * SEGMENT] and replay.trimmed_position == 2 * SEGMENT
    replay.show(trim_entry(6, 3 * SEGMENT))
    assert machine.trims == [2 * SEGMENT] and [entry.index for entry in replay.trims] == [6]


async def test_4_9_tables_are_trimmed_between_the_entries_before_and_behind(tmp_path: Path) -> None:
    """In one turn or several, as in a replay: what an entry finds in the tables must be the same on every replica."""
    async with cluster(tmp_path, 1, segment_bytes=SEGMENT) as toy:
        leader, driver = await alone(toy)
        machine = leader.machine
        last = driver.store.last_index
        driver.store.end_of = lambda index: 0  # type: ignore[method-assign]
        trimmed_at: list[tuple[int, int]] = []
        machine.trim = lambda position: trimmed_at.append((position, machine.entries[-1][0]))  # type: ignore
        entries = [data_entry(last + 1), trim_entry(last + 2, SEGMENT), trim_entry(last + 3, 2 * SEGMENT)]
        driver.applier.stage([*entries, data_entry(last + 4)])
        driver.applier.commit_index = last + 4
        driver.wake()
        for _ in range(12):  # turns follow each other at once, and not with the next heartbeat
            await trio.lowlevel.checkpoint()
        assert driver.applier.applied_index == last + 4
        assert trimmed_at == [(SEGMENT, last + 1), (2 * SEGMENT, last + 1)]
        assert [index for index, _, _ in machine.entries] == [last + 1, last + 4]


async def test_a_cut_takes_a_trim_back(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        _, driver = await alone(toy)

        async def cut(from_index: int) -> None:
            return

        driver.store.cut = cut  # type: ignore[method-assign]
        driver.applier.stage([trim_entry(index, SEGMENT) for index in (50, 51, 52)])
        driver._cut = (51, ())
        await driver._perform_cut()
        assert [entry.index for entry in driver.applier._trims] == [50]
        driver.applier.cut(50)


async def test_what_is_being_read_while_the_log_is_cut_is_not_fed() -> None:
    log = OldLog(count=30, body_bytes=700, recent_from=29)
    ready: list[str] = []
    feed = LogFeed(cast(LogStore, log), SEGMENT, lambda: ready.append("ready"))
    feed.is_leading = True
    log.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        assert feed.entries(1, 1000) == ()
        await wait_until(lambda: log.read_from, what="the reading")
        feed.forget()
        log.gate.set()
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert ready == [] and not feed._runs
        nursery.cancel_scope.cancel()


# Retention


class Shelf:
    """A log of closed segments, two entries in each; the active one behind them."""

    def __init__(self, segments: int) -> None:
        self.segments = [SegmentSpan(number * SEGMENT, 2 * number + 1, 2 * number + 2) for number in range(segments)]
        self.first_position = 0
        self.position_end = segments * SEGMENT
        self.durable_index = 2 * segments
        self.trims: list[int] = []

    def closed_segments(self) -> tuple[SegmentSpan, ...]:
        return tuple(self.segments)

    async def trim(self, position: int) -> None:
        await trio.lowlevel.checkpoint()
        self.trims.append(position)
        self.first_position = position


def retention(store: Shelf, *, applied: int, alone_for: float = 0.0, used: int = 50) -> tuple[Retention, ToyMachine]:
    now = [100.0]

    async def look() -> None:
        await trio.lowlevel.checkpoint()

    machine = ToyMachine()
    found = Retention(
        cast(Any, SimpleNamespace(clock=SimpleNamespace(monotonic=lambda: now[0]))),
        lone_config(),
        machine,
        get_logger("test"),
        cast(LogStore, store),
        cast(Any, SimpleNamespace(look=look, usage=Usage(100 - used, 100), is_full=False)),
        segment_bytes=SEGMENT,
        propose=lambda plan: None,
        tell_leader=lambda position: None,
        applied=lambda: applied,
        leased=lambda: None,
        removed=lambda: None,
    )
    now[0] += alone_for
    return found, machine


async def test_4_9_segments_go_once_the_older_checkpoint_covers_them_too() -> None:
    store = Shelf(6)
    kept, machine = retention(store, applied=12)
    kept.apply(trim_entry(12, 4 * SEGMENT))
    machine.checkpoints_wanted = 0
    kept.checkpoint_saved(2)
    kept.checkpoint_saved(8)
    await kept._remove()
    assert store.trims == [SEGMENT] and machine.checkpoints_wanted == 1
    kept.checkpoint_saved(9)
    await kept._remove()
    assert store.trims == [SEGMENT, 4 * SEGMENT]


def test_what_is_not_applied_is_not_trimmed() -> None:
    kept, _ = retention(Shelf(6), applied=5)
    assert kept.limit(6 * SEGMENT) == 2 * SEGMENT


async def test_nobody_trims_alone_at_once() -> None:
    kept, machine = retention(Shelf(6), applied=12, alone_for=5.0, used=95)
    kept.checkpoint_saved(8)
    kept.checkpoint_saved(8)
    await kept._help_yourself()
    assert machine.trims == [] and not kept.is_unfit


def test_who_owes_the_group_a_trim_decides_as_soon_as_it_leads() -> None:
    kept, _ = retention(Shelf(6), applied=12)
    kept.role_changed(is_leader=True, leader_known=True)
    kept._owed = SEGMENT
    kept.role_changed(is_leader=False, leader_known=True)
    assert not kept._is_due
    kept.role_changed(is_leader=True, leader_known=True)
    assert kept._is_due


async def test_who_trims_alone_keeps_what_no_checkpoint_covers() -> None:
    store = Shelf(6)
    kept, machine = retention(store, applied=12, alone_for=20.0, used=95)
    kept._disk.usage = Usage(5 * SEGMENT, 100 * SEGMENT)
    kept.checkpoint_saved(4)
    kept.checkpoint_saved(8)
    await kept._help_yourself()
    assert machine.trims == [2 * SEGMENT] and kept.is_unfit and kept.trimmed_position == 2 * SEGMENT
