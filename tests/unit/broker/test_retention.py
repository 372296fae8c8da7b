"""A log that begins somewhere: trimmed queues, tables loaded again, files made again from what the log still holds."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import trio

from broker.answers import CUT
from broker.dedup import PROBES, DedupWindow, dedup_key
from broker.delay import DelayService
from broker.key_index import topic_seed
from broker.state import NOTHING_NEEDED, BrokerState
from broker.tables import InvariantBroken
from broker.testing import MemoryGroup
from dledger.core.types import Role
from dledger.errors import LogDamaged
from remoting.bodies import TopicConfig
from remoting.codes import SCHEDULE_TOPIC
from tests.unit.broker.state_kit import (
    Node,
    copy_entries,
    make_config,
    make_env,
    make_node,
    tables_of,
)
from tests.unit.broker.test_state_files import SMALL, busy


def take_over(node: Node, source: Node, blob: bytes | None, first_index: int = 1) -> int:
    """Give `node` the log of `source` from an entry on, as an installation and the replay behind it do."""
    entries = source.group.entries[first_index - 1 : source.group.commit_index]
    position = entries[0].position if entries else source.group.end_position
    node.state.stopped()
    group = MemoryGroup(node.state, leading=False)
    node.group = node.send._group = group  # type: ignore[assignment]
    node.state.attach(group)  # type: ignore[arg-type]
    group.is_serving = False
    replay_from = node.state.restore(blob, first_index=first_index, first_position=position)
    group.first_position = position
    group._log = bytearray(source.group._log[:position])
    group.entries = list(source.group.entries[: first_index - 1])
    group.commit_index = first_index - 1
    for entry in entries:
        if entry.index <= replay_from:
            group._log += bytes(64) + bytes(entry.body)
            group.entries.append(entry)
            group.commit_index += 1
        else:
            group.receive(entry)
            group.commit()
    group.committed_position = len(group._log)
    group.is_serving = True
    return replay_from


def trimmed(node: Node, first_index: int) -> int:
    """Give up the log before an entry; returns where it begins now."""
    position = node.group.entries[first_index - 1].position
    node.state.trim(position)
    node.group.first_position = position
    return position


def same_tables(found: Node, wanted: Node, *, but: tuple[str, ...] = ("dedup", "index")) -> None:
    theirs, ours = tables_of(wanted.state), tables_of(found.state)
    for name, value in theirs.items():
        if name not in but:
            assert ours[name] == value, name


# ------------------------------------------------------------------------------------------------- loading tables again


async def test_tables_are_loaded_again_in_the_same_process(tmp_path: Path) -> None:
    node = make_node(tmp_path / "a", **SMALL)
    busy(node, 60)
    await node.state.checkpoint()
    covered, blob = node.group.checkpoints[-1]
    busy(node, 40, 60)
    again = make_node(tmp_path / "b", clock=node.clock, leading=False, **SMALL)
    copy_entries(node.group, again.group)
    again.group.commit()
    wanted = tables_of(node.state)
    found_by_key = node.state.index.lookup("T", "k3", 64, 0, 1 << 50)
    source = Node(again.state, node.group, node.send, node.clock, node.log, node.conn)
    assert take_over(node, source, blob) == covered
    found = tables_of(node.state)
    assert {name: found[name] for name in wanted if name not in ("dedup", "index")} == {
        name: wanted[name] for name in wanted if name not in ("dedup", "index")
    }
    assert node.state.index.lookup("T", "k3", 64, 0, 1 << 50) == found_by_key
    node.group.lead(term=2)
    assert node.send_now("T", b"98", "UNIQ_KEY\x01N98\x02KEYS\x01k3\x02TAGS\x01t\x02", queue_id=2).code == 0
    assert node.state.dedup_hits == 1


@pytest.mark.parametrize("own_past", ["blank", "same log", "other files"])
async def test_an_installed_log_gives_every_queue_again(tmp_path: Path, own_past: str) -> None:
    """The checkpoint is another node's: its tables count, what was in files is made from the log that came with it."""
    source = make_node(tmp_path / "a", **SMALL)
    for _ in range(30):
        source.send_now("Old", b"gone soon", queue_id=1)
    busy(source, 60)
    first_index = len(source.group.entries) * 2 // 3
    node = make_node(tmp_path / "b", clock=source.clock, leading=False, **SMALL)
    if own_past == "same log":
        for entry in source.group.entries[:20]:
            node.group.receive(entry)
        node.group.commit()
        await node.state.checkpoint()
    elif own_past == "other files":
        (tmp_path / "b" / "consumequeue" / "T" / "1").mkdir(parents=True)
        (tmp_path / "b" / "consumequeue" / "T" / "1" / f"{0:020d}").write_bytes(bytes(140))
        (tmp_path / "b" / "index").mkdir()
        (tmp_path / "b" / "index" / f"{64:020d}").write_bytes(b"nonsense")
    await source.state.checkpoint()
    covered, blob = source.group.checkpoints[-1]
    busy(source, 20, 60)
    trimmed(source, first_index)
    assert take_over(node, source, blob, first_index) == first_index - 1 < covered
    same_tables(node, source)
    assert node.state.queues.min_offset("Old", 1) == node.state.queues.max_offset("Old", 1) == 30
    for number in range(5):
        wanted = [
            position
            for position in source.state.index.lookup("T", f"k{number}", 64, 0, 1 << 50)
            if position >= source.group.first_position
        ]
        assert node.state.index.lookup("T", f"k{number}", 64, 0, 1 << 50) == wanted != []
    # The next checkpoint is its own: a start needs nothing but that.
    assert node.state.checkpoints.is_due is False
    node.clock.advance(1_000)
    assert node.state.checkpoints.is_due
    await node.state.checkpoint()
    own_covered, own_blob = node.group.checkpoints[-1]
    assert take_over(node, source, own_blob, first_index) == own_covered
    same_tables(node, source)
    # Old goes on where it was, though nothing of it is left; a retry of a client is known.
    node.group.lead(term=3)
    assert node.send_now("Old", b"next", queue_id=1).ext["queueOffset"] == "30"
    assert node.send_now("T", b"79", "UNIQ_KEY\x01N79\x02KEYS\x01k4\x02TAGS\x01t\x02", queue_id=3).code == 0
    assert node.state.dedup_hits == 1


async def test_a_topic_deleted_and_made_again_among_what_is_read_again(tmp_path: Path) -> None:
    source = make_node(tmp_path / "a", **SMALL)
    for number in range(12):
        source.send_now("T", b"%d" % number)
    source.state.propose_op(("topic_del", "T"), lambda ok, reason: None)
    source.settle()
    source.state.propose_op(("topic_put", TopicConfig(topic_name="T")), lambda ok, reason: None)
    source.settle()
    for number in range(3):
        source.send_now("T", b"new %d" % number)
    source.state.propose_op(("topic_del", "Gone"), lambda ok, reason: None)
    source.send_now("U", b"last")
    await source.state.checkpoint()
    _covered, blob = source.group.checkpoints[-1]
    first_index = 5
    trimmed(source, first_index)
    node = make_node(tmp_path / "b", clock=source.clock, leading=False, **SMALL)
    assert take_over(node, source, blob, first_index) == first_index - 1
    same_tables(node, source)
    assert node.state.queues.max_offset("T", 0) == 3


async def test_files_of_a_topic_of_the_same_name_are_not_taken_for_its_own(tmp_path: Path) -> None:
    """A crash after a deletion and new messages: the files hold enough units, but of other messages."""
    node = make_node(tmp_path / "a", **SMALL)
    for number in range(8):
        node.send_now("T", b"%d" % number)
    await node.state.checkpoint()
    _covered, blob = node.group.checkpoints[-1]
    node.state.propose_op(("topic_del", "T"), lambda ok, reason: None)
    node.settle()
    for number in range(9):
        node.send_now("T", b"new %d" % number)
    node.state.queues.flush()
    state = BrokerState(make_env(node.clock), make_config(str(tmp_path / "a"), **SMALL), node.log)
    state.attach(MemoryGroup(state, leading=False))  # type: ignore[arg-type]
    assert state.restore(blob) == 0


def test_a_log_that_begins_behind_what_is_known_is_refused(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    with pytest.raises(LogDamaged, match="begins with entry 7, and there is no checkpoint"):
        node.state.restore(None, first_index=7, first_position=900)
    with pytest.raises(LogDamaged, match="cannot be read"):
        node.state.restore(b"\xff", first_index=7, first_position=900)


async def test_a_checkpoint_older_than_the_log_is_refused(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"m")
    await node.state.checkpoint()
    covered, blob = node.group.checkpoints[-1]
    with pytest.raises(LogDamaged, match=f"only up to entry {covered}"):
        node.state.restore(blob, first_index=covered + 2, first_position=9_000)


async def test_a_log_and_a_checkpoint_that_contradict_each_other_stop_the_node(tmp_path: Path) -> None:
    source = make_node(tmp_path / "a", **SMALL)
    for number in range(6):
        source.send_now("T", b"%d" % number)
    await source.state.checkpoint()
    _covered, blob = source.group.checkpoints[-1]
    other = make_node(tmp_path / "b", clock=source.clock, **SMALL)
    for number in range(7):
        other.send_now("T", b"%d" % number, queue_id=number % 2)
    node = make_node(tmp_path / "c", clock=source.clock, leading=False, **SMALL)
    with pytest.raises(InvariantBroken):
        take_over(node, other, blob)


def test_the_end_of_a_run_ends_leadership_and_keeps_what_is_committed(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"m")
    heard: list[tuple[Role, str | None, bool]] = []
    node.state.on_role.append(lambda role, term, leader, ready: heard.append((role, leader, ready)))
    node.state.offsets.update("g", "T", 0, 1)
    node.put("T", b"pending")
    node.group.orphan_all()
    node.state.stopped()
    assert heard == [(Role.FOLLOWER, None, False)] and not node.state.ready
    assert node.state.queues.max_offset("T", 0) == 1
    assert node.state.offsets.delta_size == 0
    assert node.state.statistics()["in_flight_entries"] == 0


async def test_the_send_cache_does_not_outlive_the_tables(tmp_path: Path) -> None:
    """A queue of the earlier run would take offsets that nobody sees."""
    node = make_node(tmp_path / "a")
    node.send_now("T", b"1")
    node.send_now("T", b"2")
    await node.state.checkpoint()
    source = Node(node.state, node.group, node.send, node.clock, node.log, node.conn)
    take_over(node, source, node.group.checkpoints[-1][1])
    node.group.lead(term=2)
    node.send_now("T", b"3")
    assert node.send_now("T", b"4").ext["queueOffset"] == "3"
    assert node.state.queues.max_offset("T", 0) == 4


# ------------------------------------------------------------------------------------------------------------- trimming


async def test_trimming_is_alike_on_leader_and_follower_and_survives_restarts(tmp_path: Path) -> None:
    leader = make_node(tmp_path / "a", **SMALL)
    follower = make_node(tmp_path / "b", clock=leader.clock, leading=False, **SMALL)
    busy(leader, 150)
    await leader.state.checkpoint()
    before = leader.group.checkpoints[-1]
    copy_entries(leader.group, follower.group)
    follower.group.commit()
    first_index = len(leader.group.entries) * 3 // 4
    position = trimmed(leader, first_index)
    trimmed(follower, first_index)
    same_tables(follower, leader)
    low, high = (getattr(leader.state.queues, name)("T", 1) for name in ("min_offset", "max_offset"))
    assert 0 < low < high
    unit = leader.state.queues.units("T", 1, low, 1)
    assert int.from_bytes(unit[:8]) >= position
    assert leader.state.queues.units("T", 1, low - 1, 1) == b""
    # A crash before the next checkpoint: the old one finds the files it names.
    files = sorted((tmp_path / "a" / "consumequeue" / "T" / "1").iterdir())
    assert take_over(leader, leader, before[1], first_index) == before[0]
    same_tables(follower, leader)
    # With one that knows, they go.
    await leader.state.checkpoint()
    assert len(sorted((tmp_path / "a" / "consumequeue" / "T" / "1").iterdir())) < len(files)
    after = leader.group.checkpoints[-1]
    assert take_over(leader, leader, after[1], first_index) == after[0]
    same_tables(follower, leader)


def test_a_queue_that_is_trimmed_altogether_goes_on_where_it_was(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    for _ in range(3):
        node.send_now("T", b"m")
    node.send_now("U", b"m")
    trimmed(node, len(node.group.entries))
    queues = node.state.queues
    assert (queues.min_offset("T", 0), queues.max_offset("T", 0)) == (3, 3)
    assert queues.earliest_store_time("T", 0) == -1
    assert queues.search_by_time("T", 0, 0) == 3
    assert node.send_now("T", b"m").ext["queueOffset"] == "3"
    assert (queues.min_offset("T", 0), queues.max_offset("T", 0)) == (3, 4)


async def test_a_crash_between_trim_and_checkpoint_finds_every_file(tmp_path: Path) -> None:
    """Nothing is removed before a checkpoint that does not count on it is saved."""
    node = make_node(tmp_path, **SMALL)
    busy(node, 80)
    await node.state.checkpoint()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]  # noqa: ASYNC240
    trimmed(node, len(node.group.entries) - 2)
    node.group.is_serving = False  # the group has stopped: the next checkpoint is not taken any more
    await node.state.checkpoint()
    assert [path for path in kept if not path.exists()] == []


def test_the_floor_is_the_oldest_message_still_to_be_delivered(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    assert node.state.trim_floor() == NOTHING_NEEDED
    node.send_now("T", b"now")
    node.send_now("T", b"late", "DELAY\x015\x02")
    node.send_now("T", b"sooner", "DELAY\x012\x02")
    late, sooner = (int.from_bytes(node.state.queues.units(SCHEDULE_TOPIC, level - 1, 0, 1)[:8]) for level in (5, 2))
    assert node.state.trim_floor() == late < sooner
    node.state.propose_op(("delay", 5, 1), lambda ok, reason: None)
    assert node.state.trim_floor() == late  # not committed yet
    node.settle()
    assert node.state.trim_floor() == sooner
    node.state.propose_op(("delay", 2, 1), lambda ok, reason: None)
    node.settle()
    assert node.state.trim_floor() == NOTHING_NEEDED


def test_the_time_of_an_entry_is_its_first_record(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"m")
    operations, message = node.group.entries[0], node.group.entries[-1]
    assert node.state.store_time_ms(operations) is None  # type: ignore[arg-type]
    assert node.state.store_time_ms(message) == node.clock.now_ms  # type: ignore[arg-type]


async def test_a_checkpoint_of_tables_that_are_loaded_anew_meanwhile_is_not_saved(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"m")

    async def in_thread(function: Any, *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if getattr(function, "__name__", "") == "encode_checkpoint":
            node.state.stopped()
            node.state.restore(None)
        return function(*args)

    object.__setattr__(node.state.env, "run_in_thread", in_thread)
    await node.state.checkpoint()
    assert node.group.checkpoints == []


async def test_due_messages_that_must_come_from_the_disk_are_delivered(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"now")
    node.send_now("T", b"late", "DELAY\x011\x02")
    node.send_now("T", b"late too", "DELAY\x011\x02")
    hot_from = node.group.committed_position
    read = node.group.read

    def only_hot(physical_offset: int, nbytes: int) -> memoryview | None:
        return read(physical_offset, nbytes) if physical_offset >= hot_from else None

    async def from_disk(physical_offset: int, nbytes: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        data = read(physical_offset, nbytes)
        return None if data is None else bytes(data)

    node.group.read = only_hot  # type: ignore[method-assign]
    node.group.read_cold = from_disk  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        await nursery.start(DelayService(node.state).run)
        with trio.fail_after(5):
            while node.state.queues.max_offset("T", 0) < 3:
                node.clock.advance(100)
                await trio.lowlevel.checkpoint()
                node.group.commit()
        nursery.cancel_scope.cancel()


# --------------------------------------------------------------------------------------------------------- dedup window


async def test_the_window_comes_from_its_files_and_not_from_the_log(tmp_path: Path) -> None:
    node = make_node(tmp_path, **SMALL)
    busy(node, 35)
    await node.state.checkpoint()
    busy(node, 35, 35)
    await node.state.checkpoint()
    covered, blob = node.group.checkpoints[-1]
    wanted = {**node.state.dedup.previous, **node.state.dedup.current}
    assert 20 <= len(wanted) <= 45
    assert 1 <= len(list((tmp_path / "dedup").iterdir())) <= 2
    assert take_over(node, node, blob) == covered
    assert {**node.state.dedup.previous, **node.state.dedup.current} == wanted
    busy(node, 1, 70)


async def test_a_lost_file_of_the_window_costs_a_reading_of_the_log(tmp_path: Path) -> None:
    node = make_node(tmp_path, **SMALL)
    busy(node, 30)
    await node.state.checkpoint()
    _covered, blob = node.group.checkpoints[-1]
    sorted((tmp_path / "dedup").iterdir())[-1].write_bytes(b"short")
    recent = dict(node.state.dedup.current)
    assert take_over(node, node, blob) == 0
    assert recent.keys() <= {**node.state.dedup.previous, **node.state.dedup.current}.keys()


async def test_a_window_that_nobody_adds_to_is_forgotten(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"first")
    window = node.state.dedup

    async def look_after(ms: int) -> None:
        """Let the maintenance look, at a later time."""
        node.clock.advance(ms)
        for _ in range(50):
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        await nursery.start(node.state.run)
        await look_after(window.window_ms)
        assert len(window) == 1
        node.put("T", b"second")
        await look_after(1_000)
        await look_after(window.window_ms + 1_000)
        assert len(window) == 2, "a send is pending: its key is needed"
        node.group.commit()
        await look_after(1_000)
        wall_ms = node.clock.wall_ms
        node.clock.wall_ms = lambda: wall_ms() + 10 * window.window_ms  # type: ignore[method-assign]
        await look_after(window.window_ms - 5_000)
        assert len(window) == 2, "only a jump of the wall clock"
        node.clock.wall_ms = lambda: wall_ms() - 2 * window.window_ms  # type: ignore[method-assign]
        await look_after(7_000)
        assert len(window) == 2, "set back, it would still know a duplicate"
        node.clock.wall_ms = wall_ms  # type: ignore[method-assign]
        await look_after(1_000)
        assert len(window) == 0
        nursery.cancel_scope.cancel()
    assert window.collect() == ([], [])
    key = "UNIQ_KEY\x01AGAIN\x02"
    assert [node.send_now("T", b"third", key).ext["queueOffset"] for _ in range(2)] == ["2", "2"]


def colliding_keys(seed: int) -> tuple[str, str]:
    """Two keys with one crc32: a message index that they share, of messages that they do not."""
    seen: dict[int, str] = {}
    number = 0
    while True:
        key = f"{number * 2654435761 % (1 << 60):016X}"
        other = seen.setdefault(zlib.crc32(key.encode(), seed), key)
        if other != key:
            return other, key
        number += 1


def test_two_messages_under_one_hash_are_two_messages(tmp_path: Path) -> None:
    one, two = colliding_keys(topic_seed(b"T"))
    seed = topic_seed(b"T")
    assert dedup_key(seed, one.encode(), 7) == dedup_key(seed, two.encode(), 7)
    node = make_node(tmp_path / "a")
    follower = make_node(tmp_path / "b", clock=node.clock, leading=False)
    node.send_now("T", b"first")
    # Neither is committed when the other comes.
    opaques = [node.put("T", b"same", f"UNIQ_KEY\x01{key}\x02") for key in (one, two, one)]
    node.settle()
    answers = node.answers()
    assert [answers[opaque].ext["queueOffset"] for opaque in opaques] == ["1", "2", "1"]
    for key, offset in ((one, "1"), (two, "2")):
        assert node.send_now("T", b"same", f"UNIQ_KEY\x01{key}\x02").ext["queueOffset"] == offset
    copy_entries(node.group, follower.group)
    follower.group.commit()
    follower.group.lead(term=2)
    for key, offset in ((one, "1"), (two, "2")):
        assert follower.send_now("T", b"same", f"UNIQ_KEY\x01{key}\x02").ext["queueOffset"] == offset


def test_a_duplicate_of_a_send_that_is_cut_is_refused_like_it(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"first")
    opaques = [node.put("T", b"m", "UNIQ_KEY\x01K\x02") for _ in range(2)]
    node.group.cut()
    answers = node.answers()
    assert [answers[opaque].code for opaque in opaques] == [14, 14], CUT
    assert node.state.queues.max_offset("T", 0) == 1


def test_a_window_has_room_beside_a_taken_key() -> None:
    window = DedupWindow(1_000, 100)
    keys = []
    for position in range(PROBES):
        key = window.free_key(99)
        window.current[key] = position
        keys.append(key)
    assert len(set(keys)) == PROBES and keys[0] == 99
    assert window.free_key(99) == keys[-1]  # no more room: the newest one stays
    assert list(window.others(99, 0)) == [1, 2, 3]
