"""The small parts beside the driver's turns: reads that wait, the disk's watch, old entries for a peer, histograms."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from attrs import define
from trio.testing import MockClock

from dledger.core.messages import PreVoteReply
from dledger.core.raft import Raft
from dledger.core.types import HEADER_BYTES, Entry, EntryType, frame_entry, next_position
from dledger.disk_watch import CUT, LOG_SYNC, LOG_WRITE, DiskWatch
from dledger.errors import LogDamaged
from dledger.feed import RUNS_MAX, LogFeed
from dledger.hard_state import HardStateKeeper
from dledger.kick import Kick
from dledger.measures import BOUNDS, Histogram, Measures
from dledger.own_entries import OLD_PEER, WAITING_MAX, OwnEntries
from dledger.reads import READS_WAITING_MAX, Reads
from dledger.store.log_store import LogStore
from runtime.logs import get_logger
from runtime.model import Env
from runtime.testing import test_env
from tests.unit.dledger.dledger_toy import lone_config


class Told:
    """Remembers what it was told, and that it was told once."""

    def __init__(self) -> None:
        self.answers: list[str | None] = []

    def __call__(self, reason: str | None) -> None:
        self.answers.append(reason)


# Kicks


async def test_a_kick_is_kept_for_the_next_wait_and_a_cancelled_wait_takes_none() -> None:
    kick = Kick()
    with trio.move_on_after(0) as scope:
        await kick.wait()
    assert scope.cancelled_caught
    kick.give()
    kick.give()
    with trio.fail_after(1):
        await kick.wait()
    for _ in range(2):  # two that nobody waited for are one; one that is forgotten is none
        with trio.move_on_after(0) as scope:
            await kick.wait()
        assert scope.cancelled_caught
        kick.give()
        kick.clear()
    woken: list[str] = []

    async def wait() -> None:
        await kick.wait()
        woken.append("woken")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not woken
        kick.give()
    assert woken


# Reads


def test_reads_of_a_turn_share_a_token_and_wait_for_their_index() -> None:
    reads = Reads()
    one, two, three = Told(), Told(), Told()
    reads.ask(one)
    reads.ask(two)
    assert reads.asked
    first = reads.begin_round()
    assert not reads.asked and reads.rounds
    reads.ask(three)
    second = reads.begin_round()
    assert first != second
    reads.confirm(first, 7)
    assert reads.is_settled
    reads.answer(6)
    assert one.answers == [], "applied only up to 6"
    reads.answer(7)
    assert one.answers == two.answers == [None] and three.answers == []
    reads.refuse(second, "not the leader")
    reads.answer(7)
    assert three.answers == ["not the leader"]
    assert not reads.is_settled and not reads.rounds


def test_too_many_reads_are_refused_and_room_comes_back() -> None:
    reads = Reads()
    told = Told()
    for _ in range(READS_WAITING_MAX):
        reads.ask(told)
    late = Told()
    reads.ask(late)
    assert reads.is_settled
    reads.answer(0)
    assert late.answers == ["too many reads wait for a confirmation"]
    reads.confirm(reads.begin_round(), 1)
    reads.answer(1)
    assert told.answers == [None] * READS_WAITING_MAX
    again = Told()
    reads.ask(again)
    reads.refuse(reads.begin_round(), "gone")
    reads.answer(1)
    assert again.answers == ["gone"]


def test_a_stop_refuses_reads_wherever_they_are() -> None:
    reads = Reads()
    asked, under_way, confirmed = Told(), Told(), Told()
    reads.ask(confirmed)
    reads.confirm(reads.begin_round(), 100)
    reads.ask(under_way)
    reads.begin_round()
    reads.ask(asked)
    reads.stop("this node stops")
    assert asked.answers == under_way.answers == confirmed.answers == ["this node stops"]
    reads.answer(100)
    assert confirmed.answers == ["this node stops"]


def test_outcomes_of_own_entries_are_told_in_order_once() -> None:
    log = SimpleNamespace(last_index=2, position_end=0, last_head_crc=0)
    own = OwnEntries(cast(LogStore, log), cast(Raft, SimpleNamespace(term=1, commit_index=2)), 65_536)
    indexes: list[int] = []

    def propose(entry: Entry) -> str | None:
        if len(indexes) == 2:
            return "no more"
        log.last_index += 1
        indexes.append(entry.index)
        return None

    one, two, three, old = Told(), Told(), Told(), Told()
    for told in (one, two, three):
        own.ask(EntryType.TRIM, lambda: b"body", told)
    own.log(2, propose)
    assert indexes == [3, 4] and not own.asked and three.answers == ["no more"]
    own.applied(3)
    assert one.answers == [None] and two.answers == []
    own.lost("lost")
    own.applied(9)
    assert two.answers == ["lost"] and one.answers == [None]
    own.ask(EntryType.TRIM, lambda: b"body", old)
    own.log(1, propose)
    assert indexes == [3, 4] and old.answers == [OLD_PEER]


def test_own_entries_that_wait_are_bounded() -> None:
    own = OwnEntries(cast(LogStore, SimpleNamespace()), cast(Raft, SimpleNamespace()), 65_536)
    waiting, late = Told(), Told()
    for told in [waiting] * WAITING_MAX + [late]:
        own.ask(EntryType.TRIM, lambda: b"body", told)
    assert late.answers == ["too many changes wait to be logged"] and waiting.answers == []
    own.refuse("gone")
    assert waiting.answers == ["gone"] * WAITING_MAX


async def test_4_2_no_mark_is_saved_while_a_cut_may_take_it_down(autojump_clock: MockClock) -> None:
    marks: list[int] = []
    is_cut_due = True

    async def save_mark(durable_index: int) -> None:
        await trio.lowlevel.checkpoint()
        marks.append(durable_index)
        meta.saved.durable_index = durable_index

    meta: Any = SimpleNamespace(saved=SimpleNamespace(durable_index=3), save_mark=save_mark)
    store: Any = SimpleNamespace(durable_index=9)
    keeper = HardStateKeeper(
        test_env(),
        lone_config(),
        meta,
        store,
        cast(DiskWatch, None),
        saved=lambda term, vote: None,
        is_cut_due=lambda: is_cut_due,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper._keep_marked)
        await trio.sleep(10)
        assert marks == []
        is_cut_due = False
        await trio.sleep(10)
        assert marks == [9], "and once"
        nursery.cancel_scope.cancel()


# The disk's watch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Space:
    def __init__(self) -> None:
        self.free, self.total = 50, 100
        self.error: OSError | None = None

    def free_space(self, path: str) -> tuple[int, int]:
        if self.error is not None:
            raise self.error
        return self.free, self.total


@define
class World:
    clock: Clock
    files: Space

    async def run_in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)


def watch(**settings: Any) -> tuple[DiskWatch, World]:
    world = World(Clock(), Space())
    return DiskWatch(cast(Env, world), lone_config(**settings), get_logger("test")), world


@pytest.mark.parametrize(
    ("flush", "what", "seconds"),
    [("sync", LOG_SYNC, 2.0), ("sync", LOG_WRITE, 2.0), ("async", LOG_WRITE, 2.0), ("async", CUT, 2.0)],
)
def test_scenario_18_what_somebody_waits_for_is_a_stall_within_two_seconds(
    flush: str, what: str, seconds: float
) -> None:
    disk, world = watch(flush=flush)
    disk.begin(what)
    world.clock.now += 1.0
    assert disk.verdict(is_unfit=False) is None, "a short stall changes nothing"
    world.clock.now += seconds - 1.0 - 0.25  # the driver looks four times a second
    assert disk.verdict(is_unfit=False) is False and disk.stalled == what
    assert disk.verdict(is_unfit=False) is None, "told once"
    disk.end(what)
    assert disk.verdict(is_unfit=False) is True


def test_a_background_sync_may_take_ten_seconds() -> None:
    disk, world = watch(flush="async")
    disk.begin(LOG_SYNC)
    world.clock.now += 9.9
    assert disk.verdict(is_unfit=False) is None
    world.clock.now += 0.1
    assert disk.verdict(is_unfit=False) is False


def test_what_begins_anew_is_no_stall() -> None:
    disk, world = watch()
    disk.begin(LOG_WRITE)
    world.clock.now += 2.0
    assert disk.stalled == LOG_WRITE
    disk.begin(LOG_WRITE)
    assert disk.stalled is None


def test_a_full_disk_and_a_node_that_trimmed_alone_are_not_fit_to_lead() -> None:
    disk, _ = watch()
    disk.is_full = True
    assert disk.verdict(is_unfit=False) is False
    disk.is_full = False
    assert disk.verdict(is_unfit=True) is None, "still not"
    assert disk.verdict(is_unfit=False) is True


async def test_above_the_third_watermark_client_proposals_are_refused() -> None:
    disk, world = watch()
    world.files.free = 11
    await disk.look()
    assert not disk.is_refusing and disk.usage.share == pytest.approx(0.89)
    world.files.free = 9
    await disk.look()
    assert disk.is_refusing and disk.refusal.startswith("the disk is 91% full")
    world.files.error = OSError("gone")
    await disk.look()
    assert disk.is_refusing, "nothing known, nothing changed"
    world.files.error = None
    world.files.free = 30
    await disk.look()
    assert not disk.is_refusing


# Old entries for a peer

SEGMENT = 65_536


class OldLog:
    """A `LogStore` of which only the last entries are in memory."""

    def __init__(self, count: int, body_bytes: int, recent_from: int) -> None:
        self.all: list[Entry] = []
        data = bytearray()
        end = crc = 0
        for index in range(1, count + 1):
            position = next_position(end, HEADER_BYTES + body_bytes, SEGMENT)
            entry = frame_entry(index, 1, position, EntryType.DATA, 1, [bytes([index % 251]) * body_bytes], crc, 0)
            data.extend(bytes(position - len(data)))
            data.extend(entry.frame)
            end, crc = entry.end, entry.head_crc
            self.all.append(entry)
        self.data = data
        self.recent_from = recent_from
        self.first_index = 1
        self.last_index = self.written_index = count
        self.last_term = 1
        self.position_end = end
        self.read_from: list[int] = []
        self.gate: trio.Event | None = None

    def is_recent(self, index: int) -> bool:
        return index >= self.recent_from

    def entries(self, from_index: int, max_bytes: int) -> list[Entry]:
        assert self.is_recent(from_index) or not 1 <= from_index <= self.last_index, "a read on the loop"
        return self.all[from_index - 1 : from_index]

    def term_at(self, index: int) -> int | None:
        return 1

    def head_crc_at(self, index: int) -> int | None:
        return self.all[index - 1].head_crc

    def position_of(self, index: int) -> int | None:
        return self.all[index - 1].position if index >= self.first_index else None

    def end_of(self, index: int) -> int:
        return self.all[index - 1].end

    async def read_in_thread(self, position: int, nbytes: int) -> bytes | None:
        assert position // SEGMENT == (position + nbytes - 1) // SEGMENT, "no segment holds that"
        self.read_from.append(position)
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        return bytes(self.data[position : position + nbytes])


async def feeding(log: OldLog, body: Callable[[LogFeed, list[str]], Awaitable[None]]) -> None:
    ready: list[str] = []
    feed = LogFeed(cast(LogStore, log), SEGMENT, lambda: ready.append("ready"))
    feed.is_leading = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        await body(feed, ready)
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(2):
        while not condition():
            await trio.lowlevel.checkpoint()


async def test_old_entries_are_read_beside_the_loop_and_whole_logs_get_through() -> None:
    log = OldLog(count=300, body_bytes=700, recent_from=290)

    async def body(feed: LogFeed, ready: list[str]) -> None:
        index, asked = 1, 0
        got: list[Entry] = []
        while index <= log.last_index:
            entries = feed.entries(index, 10_000)
            if not entries:
                asked += 1
                count = len(ready)
                await until(lambda count=count: len(ready) > count)  # type: ignore[misc]
                continue
            assert sum(len(entry.frame) for entry in entries) <= 10_000
            got.extend(entries)
            index = entries[-1].index + 1
        assert got == log.all
        assert asked == feed.reads == 4, "once for each segment and not for each message"
        assert feed.entries(301, 100) == []

    await feeding(log, body)


async def test_an_entry_larger_than_the_question_comes_whole() -> None:
    log = OldLog(count=3, body_bytes=50_000, recent_from=3)

    async def body(feed: LogFeed, ready: list[str]) -> None:
        assert feed.entries(1, 10) == ()
        await until(lambda: ready)
        assert feed.entries(1, 10) == log.all[:1]

    await feeding(log, body)


async def test_what_was_read_before_a_cut_or_trim_is_forgotten() -> None:
    log = OldLog(count=50, body_bytes=700, recent_from=51)

    async def body(feed: LogFeed, ready: list[str]) -> None:
        log.gate = trio.Event()
        assert feed.entries(1, 10_000) == ()
        await until(lambda: log.read_from)
        feed.forget()
        log.gate.set()
        assert feed.entries(1, 10_000) == ()
        await until(lambda: ready)
        assert feed.entries(1, 10_000) and feed.reads == 2, "the reading that was under way does not count"
        feed.forget()
        assert feed.entries(1, 10_000) == ()

    await feeding(log, body)


async def test_only_so_many_readings_wait() -> None:
    log = OldLog(count=100, body_bytes=60_000, recent_from=101)

    async def body(feed: LogFeed, ready: list[str]) -> None:
        for index in range(1, 100):
            assert feed.entries(index, 10) == ()
        await until(lambda: len(ready) == RUNS_MAX)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert len(ready) == RUNS_MAX

    await feeding(log, body)


async def test_damage_met_while_feeding_is_told() -> None:
    log = OldLog(count=10, body_bytes=700, recent_from=11)
    log.data[log.all[4].position + 100] ^= 1
    feed = LogFeed(cast(LogStore, log), SEGMENT, lambda: None)
    feed.is_leading = True
    assert feed.entries(5, 10_000) == ()
    with pytest.raises(LogDamaged, match="entry 5"):
        await feed.run()


# Measures


def test_a_histogram_counts_into_buckets() -> None:
    histogram = Histogram()
    for seconds in (0.00001, 0.00005, 0.0003, 0.0003, 0.3, 99.0):
        histogram.record(seconds)
    seen = histogram.snapshot()
    assert seen.bounds == BOUNDS and len(seen.counts) == len(BOUNDS) + 1
    assert seen.counts[0] == 2, "a bound belongs to its bucket"
    assert seen.counts[3] == 2 and seen.counts[-1] == 1 and seen.count == 6
    assert seen.total == pytest.approx(99.30066) and seen.maximum == 99.0
    assert seen.quantile(0.5) == 0.0005 and seen.quantile(0.8) == 0.5 and seen.quantile(1.0) == 99.0
    assert Histogram().snapshot().quantile(0.5) == 0.0


def test_refused_pre_votes_and_lost_leaderships_are_counted_by_reason() -> None:
    measures = Measures()
    measures.refuse_pre_vote(PreVoteReply(1, 2, False, has_leader=True))
    measures.refuse_pre_vote(PreVoteReply(1, 2, False))
    measures.refuse_pre_vote(PreVoteReply(1, 2, False))
    measures.step_down("a higher term was heard")
    assert measures.pre_votes_refused == {"a leader is heard": 1, "the term or log is behind": 2}
    assert measures.steps_down == {"a higher term was heard": 1}
