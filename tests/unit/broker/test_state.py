"""Committed + pending against a model, replicas against each other, META operations, offsets, locks, delays."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import cbor2
import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.delay import DELAYS_MS, DelayService
from broker.offsets import ROWS_PER_ENTRY
from broker.tables import InvariantBroken, PendingTable
from remoting.bodies import SubscriptionGroupConfig, TopicConfig
from remoting.codes import SCHEDULE_TOPIC
from remoting.message import MessageQueue
from remoting.message_codec import decode_stored, encode_batch_item
from runtime.testing import wait_until
from tests.unit.broker.state_kit import ManualClock, Node, copy_entries, make_node, tables_of


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return make_node(tmp_path)


def make_topic(name: str, queues: int = 2) -> TopicConfig:
    return TopicConfig(topic_name=name, read_queue_nums=queues, write_queue_nums=queues)


class Outcome:
    """A done callback that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, str | None]] = []

    def __call__(self, ok: bool, reason: str | None) -> None:
        self.calls.append((ok, reason))


# ------------------------------------------------------------------------------------------------------- property tests

TOPICS = ("A", "B")


class ReplicasMachine(RuleBasedStateMachine):
    """A leader and two followers: one replicates entry by entry, one takes everything late. A model counts messages."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.clock = ManualClock()
        small = {"queue_file_units": 7, "queue_flush_bytes": 60, "index_segment_keys": 16}
        self.leader = make_node(f"{self.folder}/l", clock=self.clock, **small)
        self.near = make_node(f"{self.folder}/n", leading=False, clock=self.clock, **small)
        self.far = make_node(f"{self.folder}/f", leading=False, clock=self.clock, **small)
        self.number = 0
        self.stored: dict[tuple[str, int], list[bytes]] = {}
        """Model: bodies of committed messages by queue, for topics that exist."""
        for topic in TOPICS:
            self.op(("topic_put", make_topic(topic)))
        self.commit_all()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def op(self, op: tuple[Any, ...]) -> None:
        self.leader.state.propose_op(op, lambda ok, reason: None)

    def commit_all(self) -> None:
        self.leader.settle()
        copy_entries(self.leader.group, self.near.group)
        self.near.group.commit(self.leader.group.commit_index - self.near.group.commit_index)

    @rule(
        topic=st.sampled_from(TOPICS),
        queue=st.integers(-1, 2),
        tag=st.sampled_from(("", "TAGS\x01a\x02", "TAGS\x01b")),
        extra=st.sampled_from(("", "KEYS\x01k1 k2\x02", "DELAY\x012\x02", "x\x01\x02")),
        repeat=st.booleans(),
    )
    def send(self, topic: str, queue: int, tag: str, extra: str, repeat: bool) -> None:
        self.number += 0 if repeat else 1
        properties = f"UNIQ_KEY\x01N{self.number}\x02{extra}{tag}"
        self.leader.put(topic, b"%d" % self.number, properties, queue_id=queue)

    @rule(topic=st.sampled_from(TOPICS), count=st.integers(1, 4))
    def send_batch(self, topic: str, count: int) -> None:
        body = b""
        for _ in range(count):
            self.number += 1
            body += encode_batch_item(0, b"%d" % self.number, f"UNIQ_KEY\x01N{self.number}\x02TAGS\x01c\x02".encode())
        self.leader.put(topic, body, code=320, batch=True)

    @rule()
    def seal(self) -> None:
        self.leader.group.seal()

    @rule(topic=st.sampled_from(TOPICS), delete=st.booleans(), queues=st.integers(1, 3))
    def change_topic(self, topic: str, delete: bool, queues: int) -> None:
        self.op(("topic_del", topic) if delete else ("topic_put", make_topic(topic, queues)))

    @rule(group=st.sampled_from(("g", "h")), delete=st.booleans(), clean=st.booleans())
    def change_group(self, group: str, delete: bool, clean: bool) -> None:
        config = SubscriptionGroupConfig(group_name=group, retry_max_times=3)
        self.op(("group_del", group, clean) if delete else ("group_put", config))

    @rule(group=st.sampled_from(("g", "h")), topic=st.sampled_from(TOPICS), offset=st.integers(0, 9), log=st.booleans())
    def consumer_offset(self, group: str, topic: str, offset: int, log: bool) -> None:
        self.leader.state.offsets.update(group, topic, 0, offset)
        if log:
            self.leader.state.log_offsets()

    @rule(client=st.sampled_from(("c1", "c2")), topic=st.sampled_from(TOPICS), give_up=st.booleans())
    def lock(self, client: str, topic: str, give_up: bool) -> None:
        queues = [MessageQueue(topic=topic, broker_name="broker-a", queue_id=0)]
        if give_up:
            self.leader.state.locks.unlock("g", client, queues, lambda ok: None)
        else:
            self.leader.state.locks.lock("g", client, queues, lambda granted: None)

    @rule(ms=st.sampled_from((1, 700, 61_000)))
    def time_passes(self, ms: int) -> None:
        self.clock.advance(ms)

    @rule(count=st.integers(1, 3))
    def commit_some(self, count: int) -> None:
        self.leader.group.commit(count)

    @rule()
    def replicate(self) -> None:
        copy_entries(self.leader.group, self.near.group)

    @rule()
    def follower_learns_of_commits(self) -> None:
        behind = min(self.leader.group.commit_index, len(self.near.group.entries)) - self.near.group.commit_index
        self.near.group.commit(behind)

    @rule(count=st.integers(1, 4))
    def cut(self, count: int) -> None:
        """As a lost leadership: entries go, newest first, from whoever has them."""
        group, copy = self.leader.group, self.near.group
        group.seal()
        keep = max(group.commit_index, len(group.entries) - count)
        copy.cut(max(0, len(copy.entries) - keep))
        group.cut(len(group.entries) - keep)
        # What waited for a topic may have been sent again from callbacks, on a position the copy gave up as well.
        assert len(copy.entries) <= len(group.entries)

    @rule()
    def everything_is_cut(self) -> None:
        self.near.group.cut()
        self.leader.group.cut()
        self.near.group.cut(max(0, len(self.near.group.entries) - len(self.leader.group.entries)))

    @rule()
    def all_replicas_agree(self) -> None:
        self.commit_all()
        copy_entries(self.leader.group, self.far.group)
        self.far.group.commit()
        wanted = tables_of(self.leader.state)
        assert tables_of(self.near.state) == wanted
        assert tables_of(self.far.state) == wanted
        # Nothing is pending now: the pending view is the committed one.
        for queue in self.leader.state.queues.pending.values():
            assert queue.next_offset == queue.max_offset
        assert len(self.leader.state._in_flight) == 0
        self.check_queues()

    def check_queues(self) -> None:
        """Every unit points at a record that says it is there; each acknowledged body is stored once per position."""
        state = self.leader.state
        seen: list[int] = []
        for queue in state.queues:
            units = state.queues.units(queue.topic, queue.queue_id, 0, 1 << 20)
            assert len(units) == 20 * queue.max_offset
            for offset in range(queue.max_offset):
                position = int.from_bytes(units[20 * offset : 20 * offset + 8])
                data = state.read_message(position)
                assert data is not None
                message = decode_stored(data, check_crc=True)
                assert (message.topic, message.queue_id, message.queue_offset) == (queue.topic, queue.queue_id, offset)
                seen.append(position)
        assert len(seen) == len(set(seen))

    @invariant()
    def nothing_uncommitted_is_visible(self) -> None:
        if not hasattr(self, "leader"):
            return
        for node in (self.leader, self.near):
            end = node.group.committed_position
            for queue in node.state.queues:
                if queue.max_offset:
                    assert node.state.queues.unit(queue, queue.max_offset - 1)[0] < end
                assert queue.next_offset >= queue.max_offset


ReplicasMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestReplicas = ReplicasMachine.TestCase


class PendingMachine(RuleBasedStateMachine):
    """PendingTable against a list of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.table: PendingTable[str, int] = PendingTable()
        self.base: dict[str, int] = {}
        self.staged: list[tuple[str, int | None]] = []

    @rule(key=st.sampled_from("ab"), value=st.none() | st.integers(0, 3))
    def stage(self, key: str, value: int | None) -> None:
        self.table.stage(key, value)
        self.staged.append((key, value))

    @rule()
    def apply(self) -> None:
        if self.staged:
            key, value = self.staged.pop(0)
            assert self.table.apply(key) == value
            self.base.pop(key, None)
            if value is not None:
                self.base[key] = value

    @rule()
    def discard(self) -> None:
        if self.staged:
            self.table.discard(self.staged.pop()[0])

    @invariant()
    def agrees(self) -> None:
        pending = dict(self.base)
        for key, value in self.staged:
            pending.pop(key, None)
            if value is not None:
                pending[key] = value
        for key in "ab":
            assert self.table.get(key) == self.base.get(key)
            assert self.table.get_pending(key) == pending.get(key)
            assert self.table.is_pending(key) == any(name == key for name, _value in self.staged)


TestPending = PendingMachine.TestCase


# ------------------------------------------------------------------------------------------------------ META operations


def test_operations_are_answered_after_commit_and_kept_from_readers_before(node: Node) -> None:
    done = Outcome()
    node.state.propose_ops(
        [("topic_put", make_topic("T")), ("group_put", SubscriptionGroupConfig(group_name="g"))], done
    )
    assert done.calls == []
    assert node.state.topics.get("T") is None
    assert node.state.topics.get_pending("T") == make_topic("T")
    version = node.state.topics.data_version
    node.group.commit()
    assert done.calls == [(True, None)]
    assert node.state.topics.get("T") == make_topic("T")
    assert node.state.groups.get("g") == SubscriptionGroupConfig(group_name="g")
    after = node.state.topics.data_version
    assert (after.counter, after.state_version) == (version.counter + 1, 1)


def test_operations_fail_with_their_reason(node: Node) -> None:
    cut, unknown, refused, busy = Outcome(), Outcome(), Outcome(), Outcome()
    node.state.propose_op(("topic_put", make_topic("T")), cut)
    node.group.cut()
    node.state.propose_op(("topic_put", make_topic("T")), unknown)
    node.group.orphan_all()
    node.group.commit()
    node.group.full = True
    node.state.propose_op(("topic_del", "T"), busy)
    node.group.full = False
    node.group.follow()
    node.state.propose_op(("topic_del", "T"), refused)
    assert (cut.calls, unknown.calls) == ([(False, "cut")], [(False, "unknown")])
    assert (busy.calls, refused.calls) == ([(False, "busy")], [(False, "not leader")])
    assert node.state.topics.get("T") is not None


def test_callers_of_ensure_share_one_operation(node: Node) -> None:
    first, second, third = Outcome(), Outcome(), Outcome()
    node.state.ensure_topic(make_topic("T"), first)
    node.state.ensure_topic(make_topic("T", 9), second)
    node.state.ensure_group("g", third)
    node.state.ensure_group("g", third)
    assert len(node.group.entries) == 2
    node.group.commit()
    node.state.ensure_topic(make_topic("T"), first)
    assert first.calls == [(True, None)] * 2
    assert second.calls == [(True, None)]
    assert third.calls == [(True, None)] * 2
    assert node.state.topics.committed["T"].write_queue_nums == 2


def test_changes_are_announced(node: Node) -> None:
    topics: list[list[str]] = []
    groups: list[list[str]] = []
    node.state.on_topics_changed.append(topics.append)
    node.state.on_groups_changed.append(groups.append)
    node.state.propose_op(("topic_put", make_topic("T")), Outcome())
    node.state.propose_op(("group_del", "TOOLS_CONSUMER", True), Outcome())
    node.group.commit()
    assert (topics, groups) == ([["T"]], [["TOOLS_CONSUMER"]])


def test_deleting_a_topic_removes_offsets_locks_queues_and_files(node: Node, tmp_path: Path) -> None:
    state = node.state
    state.propose_op(("topic_put", make_topic("T")), Outcome())
    node.settle()
    node.send_now("T", b"m")
    state.queues.flush()
    assert (tmp_path / "consumequeue" / "T" / "0").exists()
    state.update_offset("g", "T", 0, 1, Outcome())
    state.locks.lock("g", "c", [MessageQueue(topic="T", broker_name="b", queue_id=0)], lambda granted: None)
    state.propose_op(("topic_del", "T"), Outcome())
    node.settle()
    assert not (tmp_path / "consumequeue" / "T").exists()
    assert state.queues.queues_of("T") == []
    assert state.offsets.query("g", "T", 0) is None
    assert state.locks.snapshot() == []


def test_an_operation_of_a_newer_version_stops_the_node(node: Node, tmp_path: Path) -> None:
    follower = make_node(tmp_path / "f", leading=False)
    node.group.propose(ops=cbor2.dumps([["from_the_future", 1]]), staged=None)
    with pytest.raises(InvariantBroken, match="newer version"):
        copy_entries(node.group, follower.group)


def test_a_record_out_of_order_stops_the_node(node: Node, tmp_path: Path) -> None:
    follower = make_node(tmp_path / "f", leading=False)
    node.send_now("T", b"1")
    copy_entries(node.group, follower.group)
    follower.state.queues.pending_queue(b"T", 0).next_offset = 5
    node.send_now("T", b"2")
    with pytest.raises(InvariantBroken, match="queue offset 1"):
        copy_entries(node.group, follower.group)


def test_store_time_never_goes_back(node: Node) -> None:
    node.send_now("T", b"1")
    node.clock.advance(-5_000)
    node.send_now("T", b"2")
    node.send_now("T", b"3", "DELAY\x011\x02")
    times = [node.state.queues.store_time_at("T", 0, offset) for offset in (0, 1)]
    assert times[0] == times[1]


def test_dispatch_listeners_see_each_queue_once_per_entry(node: Node) -> None:
    seen: list[tuple[str, int, int, int]] = []
    node.state.on_dispatch.append(lambda topic, queue, end, units: seen.append((topic, queue, end, len(units))))
    node.send_now("T", b"0")
    seen.clear()
    for number in range(6):
        node.put("T", b"m%d" % number, queue_id=number % 2)
    assert seen == []
    node.group.commit()
    assert seen == [("T", 0, 4, 60), ("T", 1, 3, 60)]


# ---------------------------------------------------------------------------------------------------- consumer offsets


def test_one_way_offsets_are_logged_once_for_many(node: Node) -> None:
    offsets = node.state.offsets
    for value in range(50):
        offsets.update("g", "T", value % 2, value)
    assert offsets.query("g", "T", 0) is None
    assert offsets.has_unlogged("g", "T", 0)
    done = Outcome()
    node.state.log_offsets(done)
    assert len(node.group.entries) == 1
    assert offsets.has_unlogged("g", "T", 0)
    node.group.commit()
    assert done.calls == [(True, None)]
    assert not offsets.has_unlogged("g", "T", 0)
    assert offsets.of_topic("g", "T") == {0: 48, 1: 49}
    assert offsets.all() == {"T@g": {0: 48, 1: 49}}
    assert offsets.topics_of("g") == ["T"]


def test_logging_offsets_waits_for_those_already_in_flight(node: Node) -> None:
    first, second = Outcome(), Outcome()
    node.state.update_offset("g", "T", 0, 5, first)
    node.state.log_offsets(second)
    assert (first.calls, second.calls) == ([], [])
    node.group.commit()
    assert (first.calls, second.calls) == ([(True, None)], [(True, None)])
    node.state.log_offsets(second)
    assert second.calls == [(True, None)] * 2


def test_a_lower_offset_is_logged_too(node: Node) -> None:
    for value in (9, 3):
        node.state.update_offset("g", "T", 0, value, Outcome())
    node.group.commit()
    assert node.state.offsets.query("g", "T", 0) == 3


def test_unlogged_offsets_go_with_the_leadership(node: Node) -> None:
    node.state.offsets.update("g", "T", 0, 9)
    node.group.follow()
    assert node.state.offsets.delta_size == 0
    done = Outcome()
    node.state.log_offsets(done)
    assert done.calls == [(False, "not leader")]


def test_offsets_that_could_not_be_proposed_are_kept_and_do_not_hide_newer_ones(node: Node) -> None:
    node.state.offsets.update("g", "T", 0, 1)
    node.group.full = True
    node.state.log_offsets()
    node.group.full = False
    node.state.log_offsets()
    node.group.commit()
    assert node.state.offsets.query("g", "T", 0) == 1


@pytest.mark.parametrize("op", [("topic_del", "T"), ("group_del", "g", True)])
def test_an_unlogged_offset_does_not_outlive_its_topic_or_group(node: Node, op: tuple[Any, ...]) -> None:
    """A topic made anew starts at 0: an old offset logged afterwards would skip its messages."""
    node.state.propose_op(("topic_put", make_topic("T")), Outcome())
    node.settle()
    node.state.offsets.update("g", "T", 0, 7)
    node.state.offsets.update("other", "U", 0, 8)
    node.state.propose_op(op, Outcome())
    node.settle()
    node.state.log_offsets()
    node.settle()
    assert node.state.offsets.query("g", "T", 0) is None
    assert node.state.offsets.query("other", "U", 0) == 8


def test_more_offsets_than_an_entry_holds_are_logged_in_several(node: Node) -> None:
    group = "g" * 255
    for number in range(3 * ROWS_PER_ENTRY):
        node.state.offsets.update(group, "t" * 120 + str(number % 7), number, number)
    done = Outcome()
    node.state.log_offsets(done)
    assert node.state.offsets.delta_size == 0
    assert done.calls == []
    node.settle()
    assert done.calls == [(True, None)]
    assert node.state.offsets.query(group, "t" * 120 + "1", 8_198) == 8_198


def test_nobody_waits_for_an_entry_that_is_given_up(node: Node) -> None:
    first, second = Outcome(), Outcome()
    node.state.update_offset("g", "T", 0, 5, first)
    node.group.orphan_all()
    node.state.log_offsets(second)
    assert first.calls == second.calls == [(False, "unknown")]
    node.group.commit()
    assert len(first.calls) == len(second.calls) == 1


# ---------------------------------------------------------------------------------------------------------- queue locks

QUEUES = [MessageQueue(topic="T", broker_name="b", queue_id=number) for number in range(2)]


def lock(node: Node, client: str, queues: list[MessageQueue] = QUEUES) -> list[int] | None:
    """Lock, commit what that takes, and return the queue ids granted."""
    result: list[list[MessageQueue] | None] = []
    node.state.locks.lock("g", client, queues, result.append)
    node.group.commit()
    (granted,) = result
    return None if granted is None else [queue.queue_id for queue in granted]


def test_a_lock_is_exclusive_until_its_lease_ends(node: Node) -> None:
    assert lock(node, "c1", QUEUES[:1]) == [0]
    assert lock(node, "c2") == [1]
    node.clock.advance(40_000)
    entries = len(node.group.entries)
    assert lock(node, "c1", QUEUES[:1]) == [0]
    assert len(node.group.entries) == entries  # a renewal is not logged
    node.clock.advance(30_000)
    assert lock(node, "c1") == [0, 1]  # c2's lease is over, c1's own was renewed
    assert node.state.locks.holder("g", QUEUES[1]) == "c1"


def test_unlocking_is_for_the_owner(node: Node) -> None:
    lock(node, "c1")
    done: list[bool] = []
    node.state.locks.unlock("g", "c2", QUEUES, done.append)
    assert done == [True]
    assert lock(node, "c2") == []
    node.state.locks.unlock("g", "c1", QUEUES, done.append)
    assert done == [True]
    node.group.commit()
    assert done == [True, True]
    assert lock(node, "c2") == [0, 1]
    assert node.state.locks.is_locked_by("g", QUEUES[0], "c2")


def test_an_uncommitted_lock_is_neither_granted_twice_nor_answered_early(node: Node) -> None:
    results: list[tuple[str, Any]] = []
    for client in ("c1", "c2", "c1"):
        node.state.locks.lock("g", client, QUEUES[:1], lambda granted, client=client: results.append((client, granted)))
    assert results == [("c2", [])]
    node.group.commit()
    assert results[1:] == [("c1", QUEUES[:1]), ("c1", QUEUES[:1])]


def test_a_new_leader_gives_every_owner_a_fresh_lease(node: Node, tmp_path: Path) -> None:
    clock = ManualClock()
    clock.advance(10_000_000)  # its monotonic clock has nothing to do with the old leader's
    other = make_node(tmp_path / "o", leading=False, clock=clock)
    lock(node, "c1")
    copy_entries(node.group, other.group)
    other.group.commit()
    other.group.lead(term=2)
    clock.advance(59_000)
    assert lock(other, "c2") == []
    clock.advance(2_000)
    assert lock(other, "c2") == [0, 1]


def test_a_refused_lock_does_not_lengthen_the_former_owners_lease(node: Node) -> None:
    lock(node, "c1", QUEUES[:1])
    node.clock.advance(61_000)
    node.group.full = True
    assert lock(node, "c2", QUEUES[:1]) is None
    node.group.full = False
    assert not node.state.locks.is_locked_by("g", QUEUES[0], "c1")
    assert lock(node, "c3", QUEUES[:1]) == [0]


def test_a_lock_that_is_cut_is_not_held(node: Node) -> None:
    results: list[Any] = []
    node.state.locks.lock("g", "c1", QUEUES, results.append)
    node.group.cut()
    assert results == [None]
    assert node.state.locks.holder("g", QUEUES[0]) is None


# --------------------------------------------------------------------------------------------------------------- delays


async def run_delays(node: Node, until: Any) -> None:
    """Let the service look, and commit what it proposes, until `until()` holds."""
    async with trio.open_nursery() as nursery:
        await nursery.start(DelayService(node.state).run)
        with trio.fail_after(5):
            while not until():
                node.group.commit()
                await trio.sleep(0.0005)
        nursery.cancel_scope.cancel()


async def test_a_delayed_message_is_delivered_when_due_and_once(node: Node) -> None:
    node.state.propose_op(("topic_put", make_topic("T", 4)), Outcome())
    node.settle()
    properties = "DELAY\x011\x02TAGS\x01TagA\x02UNIQ_KEY\x01D\x02KEYS\x01k\x02"
    node.send_now("T", b"later", properties, queue_id=3, reconsume=2)
    node.clock.advance(999)
    looks = [0]

    def some_looks() -> bool:
        looks[0] += 1
        return looks[0] > 40

    await run_delays(node, some_looks)
    assert node.state.queues.max_offset("T", 3) == 0
    node.clock.advance(1)
    await run_delays(node, lambda: node.state.queues.max_offset("T", 3) == 1)
    looks[0] = 0
    await run_delays(node, some_looks)
    assert node.state.queues.max_offset("T", 3) == 1
    assert node.state.delay.levels == {1: 1}
    unit = node.state.queues.units("T", 3, 0, 1)
    data = node.state.read_message(int.from_bytes(unit[:8]))
    assert data is not None
    message = decode_stored(data, check_crc=True)
    assert (message.body, message.reconsume_times) == (b"later", 2)
    assert message.properties["DELAY"] == "1"
    assert message.properties["REAL_TOPIC"] == "T"
    assert int.from_bytes(unit[12:], signed=True) != message.store_timestamp + DELAYS_MS[0]
    assert node.state.index.lookup("T", "k", 9, 0, 1 << 50) == [message.physical_offset]


async def test_many_due_messages_keep_their_order(node: Node) -> None:
    node.state.propose_op(("topic_put", make_topic("T")), Outcome())
    node.settle()
    for number in range(600):
        node.put("T", b"%d" % number, f"DELAY\x012\x02UNIQ_KEY\x01N{number}\x02")
    node.settle()
    node.clock.advance(5_000)
    await run_delays(node, lambda: node.state.queues.max_offset("T", 0) == 600)
    units = node.state.queues.units("T", 0, 0, 600)
    bodies = []
    for row in range(600):
        data = node.state.read_message(int.from_bytes(units[20 * row : 20 * row + 8]))
        assert data is not None
        bodies.append(decode_stored(data).body)
    assert bodies == [b"%d" % number for number in range(600)]


async def test_a_pending_delivery_is_not_proposed_again_and_a_cut_one_is(node: Node) -> None:
    node.send_now("T", b"m", "DELAY\x011\x02UNIQ_KEY\x01D\x02")
    node.clock.advance(2_000)
    before = len(node.group.entries)
    async with trio.open_nursery() as nursery:
        await nursery.start(DelayService(node.state).run)
        await wait_until(lambda: len(node.group.entries) > before)
        for _ in range(30):
            await trio.sleep(0.0005)
        assert len(node.group.entries) == before + 1
        node.group.cut()
        await wait_until(lambda: len(node.group.entries) > before)
        nursery.cancel_scope.cancel()
    node.group.commit()
    assert node.state.queues.max_offset("T", 0) == 1


async def test_deliveries_are_replicated_and_followers_do_not_deliver(node: Node, tmp_path: Path) -> None:
    other = make_node(tmp_path / "o", leading=False, clock=node.clock)
    node.send_now("T", b"m", "DELAY\x011\x02UNIQ_KEY\x01D\x02")
    copy_entries(node.group, other.group)
    other.group.commit()
    node.clock.advance(2_000)
    with trio.move_on_after(0.02):
        await DelayService(other.state).run()
    await run_delays(node, lambda: node.state.queues.max_offset("T", 0) == 1)
    copy_entries(node.group, other.group)
    other.group.commit()
    assert tables_of(other.state) == tables_of(node.state)


async def test_messages_of_a_deleted_topic_are_passed_over(node: Node) -> None:
    node.send_now("T", b"m", "DELAY\x011\x02UNIQ_KEY\x01D\x02")
    node.state.propose_op(("topic_del", "T"), Outcome())
    node.settle()
    node.clock.advance(2_000)
    await run_delays(node, lambda: node.state.delay.levels == {1: 1})
    assert not node.state.queues.exists("T", 0)


async def test_a_unit_due_far_too_late_counts_as_due(node: Node) -> None:
    node.send_now("T", b"m", "DELAY\x011\x02UNIQ_KEY\x01D\x02")
    node.clock.advance(-3_600_000)
    await run_delays(node, lambda: node.state.queues.max_offset("T", 0) == 1)
    assert node.state.queues.max_offset(SCHEDULE_TOPIC, 0) == 1


async def test_a_level_goes_on_behind_what_retention_removed(node: Node) -> None:
    for number in range(2):
        node.send_now("T", b"%d" % number, f"DELAY\x011\x02UNIQ_KEY\x01D{number}\x02")
    (queue,) = [queue for queue in node.state.queues if queue.topic == SCHEDULE_TOPIC]
    queue.min_offset = 1
    node.clock.advance(2_000)
    await run_delays(node, lambda: node.state.delay.levels == {1: 2})
    assert node.state.queues.max_offset("T", 0) == 1
