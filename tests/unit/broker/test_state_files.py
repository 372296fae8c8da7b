"""ConsumeQueue files, key index segments, dedup generations, checkpoints and restarts; records against the vectors."""

from __future__ import annotations

import errno
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.consume_queue import QueueFilesShort, QueueState, QueueTable
from broker.dedup import DedupFiles, DedupWindow
from broker.key_index import KeyIndex, index_key, rows_of
from broker.processors.send import SendProcessor
from broker.records import (
    UNIT,
    RecordError,
    TagCodes,
    decode_record,
    find_property,
    join_properties,
    properties_dict,
    store_timestamp_of,
)
from broker.state import BrokerState
from broker.store_files import CheckpointUnusable, decode_checkpoint, encode_checkpoint
from broker.tables import InvariantBroken
from broker.testing import MemoryConnection, MemoryGroup
from remoting.bodies import TopicConfig
from remoting.codes import SCHEDULE_TOPIC
from remoting.message import MessageQueue, string_to_properties
from runtime.files import RealFiles
from tests.unit.broker.state_kit import (
    Log,
    ManualClock,
    Node,
    copy_entries,
    make_config,
    make_env,
    make_node,
    tables_of,
)

VECTORS = Path(__file__).parents[2] / "vectors"
STORE = json.loads((VECTORS / "store.json").read_text())
HASHES = json.loads((VECTORS / "hashes.json").read_text())


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("vector", STORE["stored_messages"], ids=lambda vector: vector["name"])
def test_records_decode_as_the_vectors_say(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["stored_hex"])
    record = decode_record(b"junk" + data, 4)
    assert record.size == vector["totalSize"] == len(data)
    assert record.topic.decode() == vector["topic"]
    assert record.body.hex() == vector["body_hex"]
    assert record.body_crc == vector["bodyCRC"]
    assert (record.queue_id, record.queue_offset) == (vector["queueId"], vector["queueOffset"])
    assert record.physical_offset == vector["physicalOffset"]
    assert record.sys_flag == vector["sysFlag_stored"]
    assert record.store_timestamp == vector["storeTimestamp"] == store_timestamp_of(data[:76])
    assert record.reconsume_times == vector["reconsumeTimes"]
    assert record.properties.decode() == (vector["properties"] or "")


def test_a_unit_is_what_the_vector_says() -> None:
    vector = STORE["consume_queue_unit"]
    code = TagCodes().of(vector["tag"].encode())
    assert UNIT.pack(vector["physicalOffset"], vector["size"], code).hex() == vector["hex"]


def test_tag_codes_are_javas() -> None:
    codes = TagCodes()
    for vector in HASHES["tag_hash"]:
        if vector["tag"]:
            assert codes.of(vector["tag"].encode()) == vector["tagsCode"]


@pytest.mark.parametrize("cut", [0, 3, 60, 90, 150, 199])
def test_cut_records_are_refused(cut: int) -> None:
    data = bytes.fromhex(STORE["stored_messages"][0]["stored_hex"])
    with pytest.raises(RecordError):
        decode_record(data[:cut])


@given(
    st.lists(
        st.tuples(st.sampled_from(("TAGS", "XTAGS", "KEYS", "a")), st.text("ab\x03é", max_size=3)),
        max_size=6,
    ),
    st.booleans(),
)
def test_a_property_is_found_as_the_full_reading_finds_it(pairs: list[tuple[str, str]], closed: bool) -> None:
    text = "".join(f"{name}\x01{value}\x02" for name, value in pairs)
    if not closed:
        text = text.removesuffix("\x02")
    data = text.encode()
    full = string_to_properties(text)
    found = find_property(b"#\x02" + data, b"TAGS\x01", 2)
    if pairs and any(name == "TAGS" and not value for name, value in pairs):
        return  # an empty last value: nothing or an earlier one, clients cannot write it
    assert (found.decode() if found is not None else None) == full.get("TAGS")
    assert {name.decode(): value.decode() for name, value in properties_dict(data).items()} == full
    assert properties_dict(join_properties(properties_dict(data))) == properties_dict(data)


# ------------------------------------------------------------------------------------------------------- ConsumeQueues


class TimedLog:
    """A log where the message of unit n lies at n * 100 and was stored at `times[n]`."""

    def __init__(self, times: list[int]) -> None:
        self.times = times
        self.first_position = 0

    def read(self, physical_offset: int, nbytes: int) -> memoryview | None:
        if physical_offset < self.first_position:
            return None
        head = bytearray(76)
        struct.pack_into(">q", head, 56, self.times[physical_offset // 100])
        return memoryview(bytes(head))[:nbytes]


def filled(tmp_path: Path, count: int, *, file_units: int = 10, flush_bytes: int = 80) -> tuple[QueueTable, QueueState]:
    table = QueueTable(RealFiles(), str(tmp_path), file_units=file_units, flush_bytes=flush_bytes, open_files=2)
    queue = table.pending_queue(b"T", 1)
    for number in range(count):
        table.append(queue, UNIT.pack(number * 100, 100, number))
    return table, queue


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 47), start=st.integers(0, 50), length=st.integers(0, 50), flush=st.booleans())
def test_units_come_back_from_memory_and_files(
    tmp_path_factory: pytest.TempPathFactory, count: int, start: int, length: int, flush: bool
) -> None:
    table, _queue = filled(tmp_path_factory.mktemp("q"), count)
    if flush:
        table.flush()
    wanted = b"".join(UNIT.pack(number * 100, 100, number) for number in range(start, min(start + length, count)))
    assert table.units("T", 1, start, length) == wanted
    table.close()


def test_files_are_named_by_their_first_byte_and_bounded(tmp_path: Path) -> None:
    table, _queue = filled(tmp_path, 25)
    table.flush()
    folder = tmp_path / "consumequeue" / "T" / "1"
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    assert sizes == {f"{0:020d}": 200, f"{200:020d}": 200, f"{400:020d}": 100}


def test_unknown_queues_are_empty(tmp_path: Path) -> None:
    table, _queue = filled(tmp_path, 0)
    assert (table.min_offset("X", 0), table.max_offset("X", 0), table.units("X", 0, 0, 9)) == (0, 0, b"")
    assert not table.exists("T", 1)
    assert table.search_by_time("X", 0, 5) == 0
    assert table.store_time_at("X", 0, 0) == -1


TIMES = [10, 20, 20, 20, 40, 50]


@pytest.mark.parametrize(
    ("timestamp", "lower", "upper"),
    [(5, 0, 0), (10, 0, 0), (15, 1, 0), (20, 1, 3), (30, 4, 3), (50, 5, 5), (60, 6, 5)],
)
def test_search_by_time(tmp_path: Path, timestamp: int, lower: int, upper: int) -> None:
    table, _queue = filled(tmp_path, len(TIMES), flush_bytes=60)
    table.attach(TimedLog(TIMES))
    assert table.search_by_time("T", 1, timestamp) == lower
    assert table.search_by_time("T", 1, timestamp, "UPPER") == upper


async def test_trimming_raises_the_minimum_at_once_and_drops_files_when_told(tmp_path: Path) -> None:
    table, _queue = filled(tmp_path, 47)
    table.flush()
    log = TimedLog([number * 10 for number in range(47)])
    table.attach(log)
    log.first_position = 2_350
    table.trim(2_350)
    assert table.min_offset("T", 1) == 24
    folder = tmp_path / "consumequeue" / "T" / "1"
    assert len(list(folder.iterdir())) == 5
    shrunk = table.collect_shrunk()
    await table.drop_files(shrunk)
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == [f"{number:020d}" for number in (400, 600, 800)]
    assert table.collect_shrunk() == []
    assert table.units("T", 1, 23, 2) == b""
    assert table.search_by_time("T", 1, 0) == 24
    assert table.earliest_store_time("T", 1) == 240


def test_restoring_cuts_to_the_checkpoint(tmp_path: Path) -> None:
    table, _queue = filled(tmp_path, 47)
    table.pending_queue(b"Gone", 0)
    table.append(table.pending[b"Gone", 0], UNIT.pack(9, 9, 9))
    table.flush()
    bounds = [["T", 1, 3, 22, 2_100]]
    table.close()
    again = QueueTable(RealFiles(), str(tmp_path), file_units=10)
    again.restore(bounds)
    assert (again.min_offset("T", 1), again.max_offset("T", 1)) == (3, 22)
    assert again.pending_queue(b"T", 1).next_offset == 22
    assert not (tmp_path / "consumequeue" / "Gone").exists()
    again.append(again.pending_queue(b"T", 1), UNIT.pack(7, 7, 7))
    assert UNIT.unpack(again.units("T", 1, 22, 5)) == (7, 7, 7)
    again.flush()
    assert UNIT.unpack(again.units("T", 1, 22, 5)) == (7, 7, 7)


def test_files_shorter_than_the_checkpoint_are_told(tmp_path: Path) -> None:
    table, _queue = filled(tmp_path, 12)
    table.flush()
    again = QueueTable(RealFiles(), str(tmp_path), file_units=10)
    with pytest.raises(QueueFilesShort):
        again.restore([["T", 1, 0, 13, 1_200]])


def test_a_short_file_is_an_invariant_broken(tmp_path: Path) -> None:
    table, _queue = filled(tmp_path, 20)
    table.flush()
    (tmp_path / "consumequeue" / "T" / "1" / f"{0:020d}").write_bytes(b"")
    with pytest.raises(InvariantBroken, match="short"):
        table.units("T", 1, 0, 5)


# ----------------------------------------------------------------------------------------------------------- key index


async def run_inline(function: Any, *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize("sealed", ["memory", "sealed", "files"])
async def test_lookup_newest_first_by_time(tmp_path: Path, sealed: str) -> None:
    index = KeyIndex(RealFiles(), str(tmp_path), segment_keys=1_000_000 if sealed == "memory" else 16)
    rng = random.Random(7)
    model: dict[str, list[tuple[int, int]]] = {}
    for number in range(300):
        key = f"k{rng.randrange(20)}"
        index.extend([index_key(b"T", key.encode())], [number * 64], number * 1000)
        model.setdefault(key, []).append((number * 64, number))
    if sealed == "files":
        await index.persist(run_inline)
        assert not index.has_sealed
        assert len(list((tmp_path / "index").iterdir())) == 18
    for key, rows in model.items():
        newest = [position for position, _second in reversed(rows)]
        assert index.lookup("T", key, 64, 0, 1 << 50) == newest[:64]
        assert index.lookup("T", key, 3, 0, 1 << 50) == newest[:3]
        middle = [position for position, second in reversed(rows) if 100 <= second <= 200]
        assert index.lookup("T", key, 64, 100_000, 200_000) == middle[:64]
    assert index.lookup("U", "k1", 64, 0, 1 << 50) == []
    assert index.is_long is (sealed == "files")
    for key in model:
        assert await index.lookup_in_steps("T", key, 64, 0, 200_000) == index.lookup("T", key, 64, 0, 200_000)


def test_a_hash_lying_across_two_rows_is_no_row() -> None:
    column = struct.pack("<5I", 7, 0x01010100, 0x00000001, 0x01010101, 7)
    assert list(rows_of(column, 0x01010101)) == [3]
    assert list(rows_of(column, 7)) == [4, 0]
    assert list(rows_of(struct.pack("<3I", 0, 0, 0), 0)) == [2, 1, 0]


async def test_index_restart_keeps_what_the_checkpoint_covers(tmp_path: Path) -> None:
    index = KeyIndex(RealFiles(), str(tmp_path), segment_keys=16)
    for number in range(40):
        index.extend([5], [number], number * 1000)
    await index.persist(run_inline)
    snapshot = index.snapshot()
    for number in range(40, 70):
        index.extend([5], [number], number * 1000)
    await index.persist(run_inline)
    await index.sync()
    again = KeyIndex(RealFiles(), str(tmp_path), segment_keys=16)
    assert again.restore(snapshot)
    assert len(list((tmp_path / "index").iterdir())) == 2
    assert len(again.snapshot()["positions"]) == 8 * 8
    assert again.last_physical_offset == 39
    again.trim(16)
    assert len(again.snapshot()["segments"]) == 1
    again.remove(again.collect_dropped())
    assert len(list((tmp_path / "index").iterdir())) == 1
    (tmp_path / "index" / snapshot["segments"][1][0]).unlink()
    assert not KeyIndex(RealFiles(), str(tmp_path)).restore(snapshot)


async def test_more_sealed_segments_than_may_wait_are_written_at_once(tmp_path: Path) -> None:
    index = KeyIndex(RealFiles(), str(tmp_path), segment_keys=16)
    for number in range(16 * 70):
        index.extend([number], [number], 1000)
    assert len(list((tmp_path / "index").iterdir())) == 6
    assert index.lookup("x", "nothing", 9, 0, 9) == []


async def test_an_entry_with_more_keys_than_a_segment(tmp_path: Path) -> None:
    index = KeyIndex(RealFiles(), str(tmp_path))
    index.extend([9] * 70_000, [64] * 70_000, 1000)
    index.extend([9] * 70_000, [64] * 70_000, 1000)
    await index.persist(run_inline)
    assert len(list((tmp_path / "index").iterdir())) == 2


# --------------------------------------------------------------------------------------------------------------- dedup


def test_generations_rotate_by_time_and_by_number() -> None:
    window = DedupWindow(1_000, 8)
    window.entry_applied(1, 0, [], 0)
    window.current[1] = 10
    window.entry_applied(2, 999, [1], 1)
    assert window.find(1) == 10
    window.entry_applied(3, 1_000, [], 12)
    assert (window.find(1), window.current) == (10, {})
    assert [one.plain() for one in window.collect()[0]] == [[1, 0, 1], [4, 1_000, 0]]
    for number in range(4):
        window.current[100 + number] = number
    window.entry_applied(4, 1_001, [100, 101, 102, 103], 12)
    assert window.find(1) is None
    assert window.find(103) == 3
    assert [one.plain() for one in window.collect()[0]] == [[4, 1_000, 4], [5, 1_001, 0]]
    window.forget(103, 3)
    window.forget(102, 3)
    assert (window.find(103), window.find(102)) == (None, 2)


def test_a_key_staged_two_generations_before_it_is_applied_is_kept() -> None:
    window = DedupWindow(1_000, 100)
    window.entry_applied(1, 0, [], 0)
    window.current.update({1: 10, 2: 20, 3: 30})
    window.entry_applied(2, 1_000, [1], 9)
    window.entry_applied(3, 2_000, [2], 19)
    assert (window.find(1), window.find(2), window.find(3)) == (None, 20, 30)
    window.entry_applied(4, 3_000, [3], 29)
    assert (window.find(2), window.find(3)) == (None, 30)
    assert [one.plain() for one in window.collect()[0]] == [[4, 2_000, 1], [5, 3_000, 0]]


def test_memory_of_the_window_is_bounded(tmp_path: Path) -> None:
    node = make_node(tmp_path, dedup_keys=100)
    for number in range(500):
        node.put("T", b"m", f"UNIQ_KEY\x01N{number}\x02")
        if number % 20 == 0:
            node.settle()
    node.settle()
    assert 50 <= len(node.state.dedup) <= 140


# --------------------------------------------------------------------------------------------- checkpoints and restarts


def restart(node: Node, folder: Path, *, checkpoint: bytes | None, clock: ManualClock) -> Node:
    """The node again, over the same folder and log, replayed as the raft group does it."""
    again = make_again(folder, clock)
    replay_from = again.state.restore(checkpoint)
    for entry in node.group.entries[: node.group.commit_index]:
        if entry.index <= replay_from:
            again.group._log += bytes(64) + bytes(entry.body)
            again.group.entries.append(entry)
            again.group.commit_index += 1
            again.group.committed_position = len(again.group._log)
        else:
            again.group.receive(entry)
    again.group.commit()
    return again


def make_again(folder: Path, clock: ManualClock) -> Node:
    log = Log()
    state = BrokerState(make_env(clock), make_config(str(folder), **SMALL), log)
    group = MemoryGroup(state, leading=False)
    state.attach(group)  # type: ignore[arg-type]
    return Node(state, group, SendProcessor(state), clock, log, MemoryConnection())


SMALL: dict[str, Any] = {"queue_file_units": 7, "queue_flush_bytes": 60, "index_segment_keys": 16, "dedup_keys": 40}


def busy(node: Node, count: int, start: int = 0) -> None:
    """Sends of all kinds and operations, committed."""
    for number in range(start, start + count):
        properties = f"UNIQ_KEY\x01N{number}\x02KEYS\x01k{number % 5}\x02TAGS\x01t\x02"
        node.put("T" if number % 3 else "U", b"%d" % number, properties, queue_id=number % 4)
        if number % 7 == 0:
            node.put("T", b"late", f"DELAY\x012\x02UNIQ_KEY\x01L{number}\x02")
        if number % 10 == 0:
            node.clock.advance(900)
            node.state.update_offset("g", "T", 0, number, lambda ok, reason: None)
            node.state.propose_op(("delay", 2, number // 7), lambda ok, reason: None)
            queue = MessageQueue(topic="T", broker_name="b", queue_id=number % 3)
            node.state.locks.lock("g", f"c{number}", [queue], lambda granted: None)
            node.state.ensure_group(f"g{number}", lambda ok, reason: None)
            node.settle()
    node.settle()


@pytest.mark.parametrize("covered", [0, 1, 60, 100])
@pytest.mark.parametrize("lost", ["nothing", "memory"])
async def test_a_restart_ends_where_the_node_was(tmp_path: Path, covered: int, lost: str) -> None:
    node = make_node(tmp_path / "a", **SMALL)
    busy(node, covered)
    if covered:
        await node.state.checkpoint()
    busy(node, 100 - covered, covered)
    if lost == "nothing":
        node.state.queues.flush()
        await node.state.index.persist(run_inline)
    wanted = tables_of(node.state)
    found_by_key = [node.state.index.lookup("T", f"k{number}", 64, 0, 1 << 50) for number in range(5)]
    assert all(found_by_key)
    checkpoint = node.group.checkpoints[-1][1] if node.group.checkpoints else None
    again = restart(node, tmp_path / "a", checkpoint=checkpoint, clock=node.clock)
    assert again.state.store_files.abnormal_exit
    found = tables_of(again.state)
    for name, value in wanted.items():
        if name not in ("dedup", "index"):
            assert found[name] == value, name
    recent = {key for key in node.state.dedup.current if node.state.dedup.current[key]}
    assert recent <= {*again.state.dedup.current, *again.state.dedup.previous}
    for number in range(5):
        assert again.state.index.lookup("T", f"k{number}", 64, 0, 1 << 50) == found_by_key[number]
    again.group.lead(term=2)
    answer = again.send_now("T", b"98", "UNIQ_KEY\x01N98\x02KEYS\x01k3\x02TAGS\x01t\x02", queue_id=2)
    assert again.state.dedup_hits == 1
    assert answer.code == 0
    answer = again.send_now("T", b"new", "UNIQ_KEY\x01new\x02", queue_id=1)
    assert (
        int(answer.ext["queueOffset"])
        == {(topic, queue): high for topic, queue, _low, high in wanted["bounds"]}["T", 1]
    )


@pytest.mark.parametrize("where", ["window", "blob"])
async def test_a_checkpoint_undone_for_lack_of_room_leaves_nothing_out_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    node = make_node(tmp_path / "a", **SMALL)
    busy(node, 10)
    await node.state.checkpoint()
    busy(node, 8, 10)
    node.state.queues.trim(node.group.committed_position // 2)

    def fail(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    async def fail_later(*arguments: Any) -> Any:
        fail()

    with monkeypatch.context() as full:
        full.setattr(
            *((DedupFiles, "append", fail_later) if where == "window" else (node.group, "save_checkpoint", fail))
        )
        await node.state.checkpoint()
    assert len(node.group.checkpoints) == 1
    node.state.checkpoints.soon()
    node.clock.advance(3000)
    assert not node.state.checkpoints.is_due, "not at once, and not each second"
    node.clock.advance(3000)
    assert node.state.checkpoints.is_due
    busy(node, 8, 18)
    await node.state.checkpoint()
    assert len(node.group.checkpoints) == 2
    again = restart(node, tmp_path / "a", checkpoint=node.group.checkpoints[-1][1], clock=node.clock)
    assert not [line for line, _ in again.log.lines if "made again" in line]
    wanted = {**node.state.dedup.previous, **node.state.dedup.current}
    assert {**again.state.dedup.previous, **again.state.dedup.current} == wanted and len(wanted) > 20
    assert tables_of(again.state)["bounds"] == tables_of(node.state)["bounds"]


async def test_a_clean_stop_leaves_no_abort_mark_and_a_checkpoint_of_everything(tmp_path: Path) -> None:
    node = make_node(tmp_path / "a", **SMALL)
    assert (tmp_path / "a" / "abort").read_text() == "77"
    assert not node.state.store_files.abnormal_exit
    busy(node, 30)
    await node.state.checkpoint()
    await node.state.close()
    assert not (tmp_path / "a" / "abort").exists()
    index, blob = node.group.checkpoints[-1]
    assert index == node.state.applied_index
    again = restart(node, tmp_path / "a", checkpoint=blob, clock=node.clock)
    assert not again.state.store_files.abnormal_exit
    assert tables_of(again.state)["bounds"] == tables_of(node.state)["bounds"]


async def test_an_unusable_checkpoint_means_reading_the_whole_log(tmp_path: Path) -> None:
    node = make_node(tmp_path / "a", **SMALL)
    busy(node, 40)
    await node.state.checkpoint()
    wanted = tables_of(node.state)
    _index, blob = node.group.checkpoints[-1]
    victim = next((tmp_path / "a" / "consumequeue" / "T" / "1").iterdir())
    victim.write_bytes(b"")
    again = restart(node, tmp_path / "a", checkpoint=blob, clock=node.clock)
    assert [event for event, _fields in again.log.lines] == [
        "queues and indexes are made again from the log",
        "queues, key index and dedup window made again from the log",
    ]
    assert tables_of(again.state)["units"] == wanted["units"]
    broken = restart(node, tmp_path / "a", checkpoint=b"\xff", clock=node.clock)
    assert tables_of(broken.state)["units"] == wanted["units"]


def test_restore_may_be_asked_twice(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.send_now("T", b"m")
    assert node.state.restore(None) == 0
    assert node.state.queues.topics() == []
    assert node.state.topics.get("T") is None
    assert node.state.topics.get("TBW102") is not None


def test_checkpoints_of_other_versions_are_refused() -> None:
    assert decode_checkpoint(encode_checkpoint({"index": 4}))["index"] == 4
    for blob in (b"", b"\x80", encode_checkpoint({"version": 99})):
        with pytest.raises(CheckpointUnusable):
            decode_checkpoint(blob)


async def test_the_service_flushes_logs_offsets_and_checkpoints(tmp_path: Path) -> None:
    clock = ManualClock()
    node = make_node(tmp_path, clock=clock, checkpoint_log_bytes=1, checkpoint_interval_ms=5_000)
    node.state.propose_op(("topic_put", TopicConfig(topic_name="T")), lambda ok, reason: None)
    node.settle()
    node.send_now("T", b"m")
    node.state.offsets.update("g", "T", 0, 1)
    async with trio.open_nursery() as nursery:
        await nursery.start(node.state.run)
        path = tmp_path / "consumequeue" / "T" / "0" / f"{0:020d}"
        for condition in (
            lambda: node.state.offsets.query("g", "T", 0) == 1,
            path.exists,
            lambda: node.group.checkpoints,
        ):
            with trio.fail_after(5):
                while not condition():
                    clock.advance(50)
                    await trio.lowlevel.checkpoint()
                    node.group.commit()
        nursery.cancel_scope.cancel()


def test_a_follower_that_takes_over_continues_every_queue(tmp_path: Path) -> None:
    node = make_node(tmp_path / "a", **SMALL)
    other = make_node(tmp_path / "b", leading=False, clock=node.clock, **SMALL)
    busy(node, 50)
    node.put("T", b"uncommitted", "UNIQ_KEY\x01X\x02", queue_id=1)
    copy_entries(node.group, other.group)
    other.group.lead(term=2)
    answer = other.put("T", b"next", "UNIQ_KEY\x01Y\x02", queue_id=1)
    other.settle()
    high = node.state.queues.max_offset("T", 1)
    assert other.answers()[answer].ext["queueOffset"] == str(high + 1)
    assert other.state.queues.max_offset(SCHEDULE_TOPIC, 1) == node.state.queues.max_offset(SCHEDULE_TOPIC, 1)
