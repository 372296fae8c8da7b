"""Pulling (semantics.md 4): the checks in their order, the reading rules, filters, long polling, followers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from remoting.codes import (
    PULL_COMMIT_OFFSET,
    PULL_SUBSCRIPTION,
    PULL_SUSPEND,
    RequestCode,
    ResponseCode,
)
from remoting.command import Command
from remoting.message_codec import decode_stored_many
from tests.unit.broker.processor_rig import ProcessorRig, RigConnection

PULL = RequestCode.PULL_MESSAGE


@pytest.fixture
async def rig(tmp_path: Path) -> ProcessorRig:
    rig = ProcessorRig(tmp_path)
    rig.create_topic("T")
    return rig


def bodies(answer: Command) -> list[bytes]:
    return [bytes(message.body) for message in decode_stored_many(bytes(answer.body))]


def heartbeat(group: str = "CG", expression: str = "*", version: int = 1, model: str = "CLUSTERING") -> bytes:
    return (
        f'{{"clientID":"c1","consumerDataSet":[{{"groupName":"{group}","consumeType":"CONSUME_PASSIVELY",'
        f'"messageModel":"{model}","consumeFromWhere":"CONSUME_FROM_LAST_OFFSET","subscriptionDataSet":[{{"topic":"T",'
        f'"subString":"{expression}","subVersion":{version}}}]}}],"producerDataSet":[]}}'
    ).encode()


async def test_messages_come_as_they_were_stored(rig: ProcessorRig) -> None:
    for number in range(5):
        rig.send("T", b"body %d" % number, queue=number % 2)
    answer = rig.ask(PULL, rig.pull_ext("T", 0))
    assert (answer.code, answer.remark) == (0, "FOUND")
    assert bodies(answer) == [b"body 0", b"body 2", b"body 4"]
    assert answer.ext["nextBeginOffset"] == "3" and answer.ext["maxOffset"] == "3" and answer.ext["minOffset"] == "0"
    assert bodies(rig.ask(PULL, rig.pull_ext("T", 1, queueId=1))) == [b"body 3"]


async def test_a_log_cut_in_segments_is_read_range_by_range(rig: ProcessorRig) -> None:
    for number in range(6):
        rig.send("T", b"body %d" % number, queue=number % 2)
    whole = rig.group.read

    def no_long_reads(offset: int, nbytes: int) -> memoryview | None:
        return whole(offset, nbytes) if nbytes < 400 else None

    rig.group.read = no_long_reads  # type: ignore[method-assign]
    assert bodies(rig.ask(PULL, rig.pull_ext("T", 0))) == [b"body 0", b"body 2", b"body 4"]


async def test_nothing_uncommitted_is_visible(rig: ProcessorRig) -> None:
    ext = {
        "a": "PG", "b": "T", "c": "TBW102", "d": 4, "e": 0, "f": 0, "g": 1, "h": 0, "i": "", "j": 0, "k": "false",
        "m": "false",
    }  # fmt: skip
    assert rig.tell(310, ext, b"first") == []
    assert rig.tell(PULL, rig.pull_ext("T", 0))[0].code == ResponseCode.PULL_NOT_FOUND
    assert rig.tell(RequestCode.GET_MAX_OFFSET, {"topic": "T", "queueId": 0})[0].ext["offset"] == "0"
    rig.group.commit()
    assert [answer.code for answer in rig.conn.received()] == [0]
    assert bodies(rig.tell(PULL, rig.pull_ext("T", 0))[0]) == [b"first"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"topic": "Nowhere"}, ResponseCode.TOPIC_NOT_EXIST, "topic[Nowhere] not exist"),
        ({"queueId": 4}, ResponseCode.INVALID_PARAMETER, "queueId[4] is illegal"),
        ({"queueId": -1}, ResponseCode.INVALID_PARAMETER, "queueId[-1] is illegal"),
        ({"consumerGroup": "no blanks!"}, ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST, "no blanks!"),
        ({"expressionType": "SQL92", "subscription": ""}, ResponseCode.SUBSCRIPTION_PARSE_FAILED, "parse"),
        (
            {"expressionType": "SQL92", "subscription": "a > 1"},
            ResponseCode.SYSTEM_ERROR,
            "The broker does not support consumer to filter message by SQL92",
        ),
        ({"sysFlag": 0}, ResponseCode.SUBSCRIPTION_NOT_EXIST, "the consumer's group info not exist"),
        ({"queueOffset": "x"}, ResponseCode.SYSTEM_ERROR, "queueOffset"),
    ],
)
async def test_refusals(rig: ProcessorRig, changes: dict[str, Any], code: int, words: str) -> None:
    answer = rig.ask(PULL, {**rig.pull_ext("T", 0), **changes})
    assert answer.code == code
    assert words in (answer.remark or "")


async def test_permissions(rig: ProcessorRig) -> None:
    rig.create_topic("WriteOnly", perm=2)
    assert rig.ask(PULL, rig.pull_ext("WriteOnly", 0)).ext == {"forbiddenType": "3"}
    rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"Off","consumeEnable":false}')
    answer = rig.ask(PULL, rig.pull_ext("T", 0, consumerGroup="Off"))
    assert (answer.code, answer.ext) == (ResponseCode.NO_PERMISSION, {"forbiddenType": "2"})
    rig.broker.settings.lite_pull_enable = False
    assert rig.ask(RequestCode.LITE_PULL_MESSAGE, rig.pull_ext("T", 0)).code == ResponseCode.NO_PERMISSION
    rig.broker.settings.broker_permission = 2
    assert rig.ask(PULL, rig.pull_ext("T", 0)).ext == {"forbiddenType": "1"}


async def test_a_group_that_may_not_be_created_is_unknown(tmp_path: Path) -> None:
    rig = ProcessorRig(tmp_path, auto_create_group=False)
    rig.create_topic("T")
    assert rig.ask(PULL, rig.pull_ext("T", 0)).code == ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST


async def test_the_filter_of_the_heartbeat_counts_without_the_flag(rig: ProcessorRig) -> None:
    rig.send("T", b"a", tag="TagA")
    rig.send("T", b"b", tag="TagB")
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat(expression="TagB", version=5))
    assert bodies(rig.ask(PULL, rig.pull_ext("T", 0, sysFlag=0, subVersion=5))) == [b"b"]
    late = rig.ask(PULL, rig.pull_ext("T", 0, sysFlag=0, subVersion=6))
    assert late.code == ResponseCode.SUBSCRIPTION_NOT_LATEST
    rig.create_topic("Other")
    answer = rig.ask(PULL, rig.pull_ext("Other", 0, sysFlag=0))
    assert (answer.code, answer.remark) == (
        ResponseCode.SUBSCRIPTION_NOT_EXIST,
        "the consumer's subscription not exist",
    )


async def test_broadcasting_can_be_forbidden(rig: ProcessorRig) -> None:
    rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"CG","consumeBroadcastEnable":false}')
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat(model="BROADCASTING"))
    assert rig.ask(PULL, rig.pull_ext("T", 0, sysFlag=0)).ext == {"forbiddenType": "4"}


@pytest.mark.parametrize(
    ("offset", "code", "remark", "next_begin"),
    [
        (3, ResponseCode.PULL_NOT_FOUND, "OFFSET_OVERFLOW_ONE", "3"),
        (4, ResponseCode.PULL_OFFSET_MOVED, "OFFSET_OVERFLOW_BADLY", "3"),
        (-1, ResponseCode.PULL_OFFSET_MOVED, "OFFSET_TOO_SMALL", "0"),
    ],
)
async def test_offsets_outside_the_queue(
    rig: ProcessorRig, offset: int, code: int, remark: str, next_begin: str
) -> None:
    for _ in range(3):
        rig.send("T", b"x")
    answer = rig.ask(PULL, rig.pull_ext("T", offset))
    assert (answer.code, answer.remark, answer.ext["nextBeginOffset"]) == (code, remark, next_begin)
    assert not answer.body


async def test_limits_of_one_pull(rig: ProcessorRig) -> None:
    for _ in range(40):
        rig.send("T", b"small")
    assert len(bodies(rig.ask(PULL, rig.pull_ext("T", 0, maxMsgNums=128)))) == 32
    assert len(bodies(rig.ask(PULL, rig.pull_ext("T", 0, maxMsgNums=3)))) == 3
    assert len(bodies(rig.ask(PULL, rig.pull_ext("T", 0, maxMsgNums=0)))) == 1
    for _ in range(4):
        rig.send("T", bytes(100_000), queue=1)
    answer = rig.ask(PULL, rig.pull_ext("T", 0, queueId=1))
    assert len(bodies(answer)) == 2 and answer.ext["nextBeginOffset"] == "2"
    rig.send("T", bytes(1_000_000), queue=2)
    assert len(bodies(rig.ask(PULL, rig.pull_ext("T", 0, queueId=2)))) == 1


async def test_a_filter_scans_at_most_800_units(rig: ProcessorRig) -> None:
    for number in range(900):
        rig.tell(
            310,
            {
                "a": "PG", "b": "T", "c": "", "d": 4, "e": 0, "f": 0, "g": 1, "h": 0, "j": 0, "k": "false",
                "m": "false", "i": f"TAGS\x01{'Rare' if number in (100, 850) else 'Common'}\x02",
            },
            b"%d" % number,
        )  # fmt: skip
    rig.group.commit()
    rig.conn.received()
    first = rig.ask(PULL, rig.pull_ext("T", 0, subscription="Rare || Rarer"))
    assert bodies(first) == [b"100"] and first.ext["nextBeginOffset"] == "800"
    second = rig.ask(PULL, rig.pull_ext("T", 800, subscription="Rare"))
    assert bodies(second) == [b"850"] and second.ext["nextBeginOffset"] == "900"
    none = rig.ask(PULL, rig.pull_ext("T", 0, subscription="Never"))
    assert (none.code, none.remark) == (ResponseCode.PULL_RETRY_IMMEDIATELY, "NO_MATCHED_MESSAGE")
    assert none.ext["nextBeginOffset"] == "800"


async def test_the_offset_is_committed_with_the_first_pass_only_on_the_leader(rig: ProcessorRig) -> None:
    ext = rig.pull_ext("T", 0, sysFlag=PULL_SUBSCRIPTION | PULL_COMMIT_OFFSET, commitOffset=7)
    rig.tell(PULL, ext)
    rig.state.log_offsets()
    rig.group.commit()
    assert rig.state.offsets.query("CG", "T", 0) == 7
    rig.group.follow()
    rig.tell(PULL, {**ext, "commitOffset": 9})
    assert rig.state.offsets.delta_size == 0


async def test_a_reset_is_answered_once(rig: ProcessorRig) -> None:
    for _ in range(3):
        rig.send("T", b"x")
    rig.broker.resets.put("CG", "T", 0, 1)
    answer = rig.ask(PULL, rig.pull_ext("T", 3))
    assert (answer.code, answer.remark, answer.ext["nextBeginOffset"]) == (21, "OFFSET_RESET", "1")
    assert rig.ask(PULL, rig.pull_ext("T", 3)).code == ResponseCode.PULL_NOT_FOUND


# ------------------------------------------------------------------------------------------------------- long polling

PARKING = PULL_SUBSCRIPTION | PULL_SUSPEND


async def test_a_parked_pull_is_woken_by_a_matching_message(rig: ProcessorRig) -> None:
    consumer = RigConnection()
    ext = rig.pull_ext("T", 0, sysFlag=PARKING, suspendTimeoutMillis=15_000, subscription="TagB")
    assert rig.tell(PULL, ext, conn=consumer) == []
    rig.send("T", b"elsewhere", queue=1, tag="TagB")
    rig.send("T", b"other tag", tag="TagA")
    assert consumer.received() == [] and len(rig.broker.long_poll) == 1
    rig.send("T", b"wanted", tag="TagB")
    (answer,) = consumer.received()
    assert bodies(answer) == [b"wanted"] and answer.ext["nextBeginOffset"] == "2"
    assert consumer.flushes >= 1 and len(rig.broker.long_poll) == 0


async def test_a_parked_pull_ends_when_its_time_is_up(rig: ProcessorRig) -> None:
    rig.send("T", b"other", tag="TagA")
    now = trio.current_time()
    rig.tell(PULL, rig.pull_ext("T", 1, sysFlag=PARKING, suspendTimeoutMillis=15_000))
    rig.broker.long_poll.sweep(now + 14)
    assert rig.conn.received() == []
    rig.broker.long_poll.sweep(now + 16)
    (answer,) = rig.conn.received()
    assert (answer.code, answer.ext["nextBeginOffset"]) == (ResponseCode.PULL_NOT_FOUND, "1")


@pytest.mark.parametrize(("given", "seconds"), [(1_000, 1), (20_000_000_000, 20), (60_000, 30), (10**15, 30)])
async def test_suspend_times_have_a_cap_and_nanoseconds_are_understood(
    rig: ProcessorRig, given: int, seconds: int
) -> None:
    now = trio.current_time()
    rig.tell(PULL, rig.pull_ext("T", 0, sysFlag=PARKING, suspendTimeoutMillis=given))
    rig.broker.long_poll.sweep(now + seconds - 0.5)
    assert rig.conn.received() == []
    rig.broker.long_poll.sweep(now + seconds + 0.5)
    assert len(rig.conn.received()) == 1


async def test_short_polling(rig: ProcessorRig) -> None:
    rig.broker.settings.long_polling_enable = False
    now = trio.current_time()
    rig.tell(PULL, rig.pull_ext("T", 0, sysFlag=PARKING, suspendTimeoutMillis=15_000))
    rig.broker.long_poll.sweep(now + 1.5)
    assert len(rig.conn.received()) == 1


async def test_a_closed_connection_is_forgotten(rig: ProcessorRig) -> None:
    consumer = RigConnection()
    rig.tell(PULL, rig.pull_ext("T", 0, sysFlag=PARKING, suspendTimeoutMillis=15_000), conn=consumer)
    consumer.close("gone")
    rig.broker.long_poll.sweep(trio.current_time())
    assert len(rig.broker.long_poll) == 0
    rig.send("T", b"x")
    assert consumer.received() == []


async def test_a_deleted_topic_ends_the_wait(rig: ProcessorRig) -> None:
    consumer = RigConnection()
    rig.tell(PULL, rig.pull_ext("T", 0, sysFlag=PARKING, suspendTimeoutMillis=15_000), conn=consumer)
    assert rig.ask(RequestCode.DELETE_TOPIC_IN_BROKER, {"topic": "T"}).code == 0
    assert [answer.code for answer in consumer.received()] == [ResponseCode.TOPIC_NOT_EXIST]


# ---------------------------------------------------------------------------------------------------------- followers


async def test_a_follower_never_moves_a_consumer_back(rig: ProcessorRig) -> None:
    for _ in range(3):
        rig.send("T", b"x")
    rig.group.follow()
    ahead = rig.ask(PULL, rig.pull_ext("T", 10))
    assert (ahead.code, ahead.ext["nextBeginOffset"]) == (ResponseCode.PULL_NOT_FOUND, "10")
    consumer = RigConnection()
    parking = rig.pull_ext("T", 10, sysFlag=PARKING, suspendTimeoutMillis=5_000)
    rig.tell(PULL, parking, conn=consumer)
    now = trio.current_time()
    rig.broker.long_poll.notify("T", 0, 9, b"")
    assert consumer.received() == []
    rig.broker.long_poll.sweep(now + 6)
    (answer,) = consumer.received()
    assert answer.code in (19, 20) and answer.ext["nextBeginOffset"] == "10"
    # As soon as this node leads for certain it knows what is out of range.
    rig.tell(PULL, parking, conn=consumer)
    rig.group.lead()
    rig.broker.long_poll.wake_all()
    assert [answer.code for answer in consumer.received()] == [ResponseCode.PULL_OFFSET_MOVED]


async def test_a_follower_serves_what_is_committed(rig: ProcessorRig) -> None:
    rig.send("T", b"x")
    rig.group.follow()
    assert bodies(rig.ask(PULL, rig.pull_ext("T", 0))) == [b"x"]


async def test_cold_data_is_read_beside_the_loop(rig: ProcessorRig) -> None:
    for number in range(12):
        rig.send("T", b"%d" % number)
    rig.group.hot = False
    assert len(bodies(rig.ask(PULL, rig.pull_ext("T", 0)))) == 12, "the page cache has it: answered at once"
    rig.group.cached = False
    assert rig.tell(PULL, rig.pull_ext("T", 0)) == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.pull.read_cold_forever)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    (answer,) = rig.conn.received()
    assert bodies(answer) == [b"%d" % number for number in range(12)] and answer.ext["nextBeginOffset"] == "12"


async def test_a_pull_from_far_behind_gets_eight_messages(rig: ProcessorRig) -> None:
    for number in range(12):
        rig.send("T", b"%d" % number)
    rig.broker._memory_reach = 0
    answer = rig.ask(PULL, rig.pull_ext("T", 0))
    assert bodies(answer) == [b"%d" % number for number in range(8)] and answer.ext["nextBeginOffset"] == "8"


async def test_a_disk_error_is_one_requests_failure(rig: ProcessorRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError("the disk is gone")

    consumer = RigConnection()
    rig.tell(PULL, rig.pull_ext("T", 0, sysFlag=PARKING, suspendTimeoutMillis=15_000), conn=consumer)
    monkeypatch.setattr(rig.state.queues, "units", broken)
    assert rig.send("T", b"x").code == 0, "the turn goes on"
    (answer,) = consumer.received()
    assert answer.code == ResponseCode.SYSTEM_ERROR and "the disk is gone" in (answer.remark or "")
    assert rig.ask(PULL, rig.pull_ext("T", 0)).code == ResponseCode.SYSTEM_ERROR
