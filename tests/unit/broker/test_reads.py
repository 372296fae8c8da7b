"""Reads that a leader answers only when a quorum has heard it lead since they came; a log that is not served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from broker.forward import HOLD_S
from broker.router import CONFIRMED_READS, LEADER_ONLY
from remoting.codes import RequestCode, ResponseCode
from remoting.fastjson import loads
from remoting.message import MessageQueue
from tests.unit.broker.processor_rig import ProcessorRig, RigConnection

QUEUE = {"topic": "T", "queueId": 0}
READS: dict[RequestCode, dict[str, Any]] = {
    RequestCode.GET_MAX_OFFSET: QUEUE,
    RequestCode.SEARCH_OFFSET_BY_TIMESTAMP: {**QUEUE, "timestamp": 1},
    RequestCode.QUERY_CONSUMER_OFFSET: {**QUEUE, "consumerGroup": "CG"},
    RequestCode.GET_CONSUME_STATS: {"consumerGroup": "CG", "topic": "T"},
    RequestCode.GET_BROKER_CONSUME_STATS: {"isOrder": "false"},
    RequestCode.QUERY_CONSUME_TIME_SPAN: {"topic": "T", "group": "CG"},
    RequestCode.GET_TOPIC_STATS_INFO: {"topic": "T"},
    RequestCode.GET_ALL_CONSUMER_OFFSET: {},
    RequestCode.GET_ALL_DELAY_OFFSET: {},
}


@pytest.fixture
def rig(tmp_path: Path) -> ProcessorRig:
    rig = ProcessorRig(tmp_path)
    rig.create_topic("T", 1)
    rig.send("T", b"one")
    return rig


@pytest.mark.parametrize("code", sorted(READS), ids=lambda code: RequestCode(code).name)
async def test_a_leader_answers_when_it_is_confirmed_and_not_before(rig: ProcessorRig, code: RequestCode) -> None:
    rig.group.holds_reads = True
    assert rig.tell(code, READS[code]) == []
    assert len(rig.group.reads) == 1
    rig.group.settle_reads()
    (answer,) = rig.conn.received()
    assert answer.code == 0


def test_every_confirmed_read_is_among_the_tested_ones() -> None:
    assert {*READS, RequestCode.LOCK_BATCH_MQ} == CONFIRMED_READS


async def test_what_is_answered_is_of_the_moment_of_the_confirmation(rig: ProcessorRig) -> None:
    rig.group.holds_reads = True
    rig.tell(RequestCode.GET_MAX_OFFSET, QUEUE)
    rig.send("T", b"two")
    rig.group.settle_reads()
    assert [answer.ext["offset"] for answer in rig.conn.received()] == ["2"]


async def test_a_lock_is_not_renewed_by_a_leader_that_may_be_none(rig: ProcessorRig) -> None:
    queue = MessageQueue(topic="T", broker_name="broker-a", queue_id=0)
    body = b'{"consumerGroup":"CG","clientId":"c1","mqSet":[{"brokerName":"broker-a","queueId":0,"topic":"T"}]}'
    assert len(loads(rig.ask(RequestCode.LOCK_BATCH_MQ, body=body).body)["lockOKMQSet"]) == 1
    assert rig.state.locks.is_locked_by("CG", queue, "c1")
    rig.group.holds_reads = True
    assert rig.tell(RequestCode.LOCK_BATCH_MQ, body=body) == []


@pytest.mark.parametrize("code", sorted({*READS} & LEADER_ONLY), ids=lambda code: RequestCode(code).name)
async def test_a_deposed_leader_passes_the_question_on(rig: ProcessorRig, code: RequestCode) -> None:
    """It was frozen and does not know yet: its tables are old, and stay its own."""
    rig.group.holds_reads = True
    assert rig.tell(code, READS[code]) == []
    rig.group.follow("n1")
    rig.group.settle_reads("deposed")
    assert rig.conn.received() == []
    assert [peer for peer, _payload in rig.group.sent] == ["n1"]
    assert rig.forwarder.pending == 1


@pytest.mark.parametrize("code", sorted({*READS} & LEADER_ONLY), ids=lambda code: RequestCode(code).name)
async def test_without_another_leader_the_wait_counts_from_the_arrival(
    rig: ProcessorRig, code: RequestCode, autojump_clock: Any
) -> None:
    rig.group.holds_reads = True
    assert rig.tell(code, READS[code]) == []
    await trio.sleep(1.5)
    rig.group.follow(None)
    rig.group.settle_reads("no quorum answered")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.forwarder.run)
        await trio.sleep(HOLD_S - 1.5 - 0.1)
        assert rig.conn.received() == []
        await trio.sleep(0.2)
        nursery.cancel_scope.cancel()
    assert [answer.code for answer in rig.conn.received()] == [ResponseCode.SERVICE_NOT_AVAILABLE]


async def test_a_read_that_is_refused_by_a_leader_is_answered_as_overload(rig: ProcessorRig) -> None:
    rig.group.holds_reads = True
    rig.tell(RequestCode.GET_MAX_OFFSET, QUEUE)
    rig.group.settle_reads("too many reads wait")
    (answer,) = rig.conn.received()
    assert (answer.code, answer.remark) == (2, "[OVERLOAD]not answered: too many reads wait")


# --------------------------------------------------------------------------------------------- a log that is not served


@pytest.fixture
async def broken(rig: ProcessorRig) -> ProcessorRig:
    """The log of this node is being repaired."""
    rig.group.is_serving = False
    rig.group.is_ready_leader = False
    rig.group.leader_id = None
    rig.state.stopped()
    return rig


async def test_pulls_are_refused_and_nobody_is_sent_past_a_message(broken: ProcessorRig) -> None:
    for offset in (0, 1, 5):
        (answer,) = broken.tell(RequestCode.PULL_MESSAGE, broken.pull_ext("T", offset))
        assert answer.code == ResponseCode.SERVICE_NOT_AVAILABLE


async def test_a_held_pull_is_refused_when_its_time_is_up(rig: ProcessorRig) -> None:
    ext = rig.pull_ext("T", 1, sysFlag=6, suspendTimeoutMillis=1_000)
    assert rig.tell(RequestCode.PULL_MESSAGE, ext) == []
    rig.group.is_serving = False
    rig.broker.long_poll.sweep(rig.env.clock.monotonic() + 10)
    assert [answer.code for answer in rig.conn.received()] == [ResponseCode.SERVICE_NOT_AVAILABLE]


@pytest.mark.parametrize("code", [RequestCode.GET_MIN_OFFSET, RequestCode.GET_MAX_OFFSET, RequestCode.GET_TOPIC_CONFIG])
async def test_questions_about_the_tables_wait_for_somebody_who_has_them(
    broken: ProcessorRig, code: RequestCode
) -> None:
    assert broken.tell(code, QUEUE) == []
    assert broken.forwarder.held == 1
    broken.group.leader_id = "n1"
    broken.forwarder.pump()
    assert [peer for peer, _payload in broken.group.sent] == ["n1"]


@pytest.mark.parametrize(
    "code", [RequestCode.GET_BROKER_RUNTIME_INFO, RequestCode.GET_BROKER_CONFIG, RequestCode.RAFT_DESCRIBE]
)
async def test_questions_about_the_node_are_answered(broken: ProcessorRig, code: RequestCode) -> None:
    (answer,) = broken.tell(code)
    assert answer.code == 0


async def test_a_cold_pull_that_meets_the_end_of_the_run_is_refused(rig: ProcessorRig) -> None:
    rig.group.hot = rig.group.cached = False
    conn = RigConnection()
    async with trio.open_nursery() as nursery:
        assert rig.tell(RequestCode.PULL_MESSAGE, rig.pull_ext("T", 0), conn=conn) == []
        rig.group.is_serving = False
        rig.group.committed_position = 0
        nursery.start_soon(rig.pull.read_cold_forever)
        answers: list[Any] = []
        with trio.fail_after(5):
            while not answers:
                await trio.lowlevel.checkpoint()
                answers = conn.received()
        nursery.cancel_scope.cancel()
    assert [answer.code for answer in answers] == [ResponseCode.SERVICE_NOT_AVAILABLE]


@pytest.mark.parametrize("trimmed", [1, 2])
async def test_a_cold_pull_goes_on_behind_what_was_trimmed_meanwhile_and_not_further(
    rig: ProcessorRig, trimmed: int
) -> None:
    rig.send("T", b"two")
    rig.send("T", b"three")
    rig.group.hot = rig.group.cached = False
    conn = RigConnection()
    async with trio.open_nursery() as nursery:
        assert rig.tell(RequestCode.PULL_MESSAGE, rig.pull_ext("T", 0), conn=conn) == []
        position = int.from_bytes(rig.state.queues.units("T", 0, trimmed, 1)[:8])
        rig.group.first_position = position
        rig.state.trim(position)
        nursery.start_soon(rig.pull.read_cold_forever)
        answers: list[Any] = []
        with trio.fail_after(5):
            while not answers:
                await trio.lowlevel.checkpoint()
                answers = conn.received()
        nursery.cancel_scope.cancel()
    assert [(answer.code, answer.ext["nextBeginOffset"]) for answer in answers] == [
        (ResponseCode.PULL_RETRY_IMMEDIATELY, str(trimmed))
    ]


@pytest.mark.parametrize("leading", [True, False])
async def test_a_pull_below_the_minimum_is_sent_to_it_on_every_role(rig: ProcessorRig, leading: bool) -> None:
    for body in (b"two", b"three"):
        rig.send("T", body)
    position = int.from_bytes(rig.state.queues.units("T", 0, 2, 1)[:8])
    rig.group.first_position = position
    rig.state.trim(position)
    if not leading:
        rig.group.follow("n1")
    (answer,) = rig.tell(RequestCode.PULL_MESSAGE, rig.pull_ext("T", 0))
    assert answer.code == ResponseCode.PULL_OFFSET_MOVED
    assert (answer.ext["nextBeginOffset"], answer.ext["minOffset"], answer.ext["maxOffset"]) == ("2", "2", "3")
    (answer,) = rig.tell(RequestCode.PULL_MESSAGE, rig.pull_ext("T", 2))
    assert answer.code == 0 and b"three" in answer.body
    assert rig.ask(RequestCode.GET_MIN_OFFSET, QUEUE).ext["offset"] == "2"
    assert rig.tell(RequestCode.QUERY_CONSUME_QUEUE, {**QUEUE, "index": 0, "count": 5})[0].code == 0


async def test_a_search_by_time_waits_for_the_disk_instead_of_guessing(rig: ProcessorRig) -> None:
    """Ending too far right would send the consumer past messages."""
    for _ in range(6):
        rig.send("T", b"more")
    read = rig.group.read
    rig.group.read = lambda physical_offset, nbytes: None  # type: ignore[method-assign,assignment]

    async def from_disk(physical_offset: int, nbytes: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        data = read(physical_offset, nbytes)
        return None if data is None else bytes(data)

    rig.group.read_cold = from_disk  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        rig.broker.jobs.attach(nursery)
        assert rig.tell(RequestCode.SEARCH_OFFSET_BY_TIMESTAMP, {**QUEUE, "timestamp": 1}) == []
    assert [answer.ext["offset"] for answer in rig.conn.received()] == ["0"]
    rig.group.is_serving = True

    async def unreadable(physical_offset: int, nbytes: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return None

    rig.group.read_cold = unreadable  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        rig.broker.jobs.attach(nursery)
        assert rig.tell(RequestCode.SEARCH_OFFSET_BY_TIMESTAMP, {**QUEUE, "timestamp": 1}) == []
    assert [answer.code for answer in rig.conn.received()] == [ResponseCode.SERVICE_NOT_AVAILABLE]
