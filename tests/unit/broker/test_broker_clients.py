"""Membership, heartbeats, offsets of groups and queue locks (semantics.md 5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from broker.clients import ClientTable, ConsumerGroup
from broker.subscriptions import Subscription, split_tags, tag_hashes
from remoting.bodies import LockBatchResponseBody, decode_body
from remoting.codes import RequestCode, ResponseCode
from tests.unit.broker.processor_rig import ProcessorRig, RigConnection

SETTINGS = ("CONSUME_PASSIVELY", "CLUSTERING", "CONSUME_FROM_LAST_OFFSET")


@pytest.fixture
async def rig(tmp_path: Path) -> ProcessorRig:
    rig = ProcessorRig(tmp_path)
    rig.create_topic("T")
    return rig


class Table:
    """A client table whose notifications are kept."""

    def __init__(self) -> None:
        self.notified: list[tuple[str, list[str]]] = []
        self.clients = ClientTable(120.0, self._notify)

    def _notify(self, group: ConsumerGroup) -> None:
        self.notified.append((group.name, group.client_ids()))

    def beat(
        self, conn: Any, client: str, *topics: str, now: float = 0.0, version: int = 1, expression: str = "*"
    ) -> bool:
        subscriptions = [Subscription.of(topic, expression, version, "TAG") for topic in topics]
        return self.clients.heartbeat_consumer(conn, client, "JAVA", 479, "G", SETTINGS, subscriptions, now, 0)


def test_members_come_and_go_with_their_connections() -> None:
    table = Table()
    first, second = RigConnection(), RigConnection()
    assert table.beat(first, "c1", "T") is True
    assert table.beat(first, "c1", "T") is False, "nothing new"
    assert table.beat(second, "c2", "T") is True
    assert table.notified == [("G", ["c1"]), ("G", ["c1", "c2"])]
    table.clients.disconnected(first)
    assert table.notified[-1] == ("G", ["c2"])
    table.clients.disconnected(second)
    table.clients.disconnected(second)
    assert table.clients.consumer_group("G") is None


def test_two_connections_of_one_client_are_one_member() -> None:
    table = Table()
    first, second = RigConnection(), RigConnection()
    table.beat(first, "c1", "T")
    table.beat(second, "c1", "T")
    group = table.clients.consumer_group("G")
    assert group is not None and group.client_ids() == ["c1"]
    found = group.find("c1")
    assert found is not None and found.conn is second, "the newest connection is called"
    assert group.find("c9") is None


def test_the_last_heartbeat_writes_the_subscriptions() -> None:
    table = Table()
    first, second = RigConnection(), RigConnection()
    table.beat(first, "c1", "A", "B")
    assert table.beat(second, "c2", "B", "C") is True
    group = table.clients.consumer_group("G")
    assert group is not None and sorted(group.subscriptions) == ["B", "C"]
    table.beat(first, "c1", "B", "C", version=5, expression="x")
    table.beat(second, "c2", "B", "C", version=4, expression="y")
    assert group.subscriptions["B"].expression == "x", "an older version does not replace"
    table.beat(second, "c2", "B", "C", version=5, expression="z")
    assert group.subscriptions["B"].expression == "z", "Go sends the same version always"
    assert table.clients.groups_of_topic("C") == ["G"] and table.clients.groups_of_topic("A") == []


def test_silent_members_expire() -> None:
    table = Table()
    silent, alive = RigConnection(), RigConnection()
    table.beat(silent, "c1", "T", now=0.0)
    table.beat(alive, "c2", "T", now=100.0)
    table.clients.heartbeat_producer(silent, "c1", "JAVA", 479, "PG", 0.0, 0)
    assert table.clients.expire(119.0) == []
    assert table.clients.expire(121.0) == [silent]
    assert table.notified[-1] == ("G", ["c2"])
    assert table.clients.producers("PG") == []


def test_unregistering_needs_the_right_client() -> None:
    table = Table()
    conn = RigConnection()
    table.beat(conn, "c1", "T")
    table.clients.unregister(conn, "someone else", "", "G")
    assert table.clients.consumer_group("G") is not None
    table.clients.unregister(conn, "c1", "no producer", "G")
    assert table.clients.consumer_group("G") is None


def test_tag_expressions() -> None:
    assert split_tags(" a || b||  ||c ") == ["a", "b", "c"]
    assert tag_hashes(None) is tag_hashes("") is tag_hashes("*") is tag_hashes(" || ") is None
    assert tag_hashes("TagA") == frozenset({2598919})
    assert tag_hashes("polygenelubricants") == frozenset({0x80000000})
    assert tag_hashes("Aa") == tag_hashes("BB"), "hashes collide; the client looks at the text"


# ---------------------------------------------------------------------------------------------------------- heartbeats


def heartbeat(group: str = "CG", client: str = "c1", **changes: Any) -> bytes:
    consumer = {
        "groupName": group,
        "consumeType": "CONSUME_PASSIVELY",
        "messageModel": "CLUSTERING",
        "consumeFromWhere": "CONSUME_FROM_LAST_OFFSET",
        "subscriptionDataSet": [{"topic": "T", "subString": "*", "subVersion": 1, "tagsSet": None}],
        **changes,
    }
    return json.dumps({"clientID": client, "consumerDataSet": [consumer], "producerDataSet": []}).encode()


async def test_a_first_heartbeat_makes_the_group_and_its_retry_topic(rig: ProcessorRig) -> None:
    answer = rig.ask(RequestCode.HEART_BEAT, {}, heartbeat())
    assert (answer.code, answer.version) == (0, 479)
    rig.group.commit()
    assert rig.state.groups.get("CG") is not None
    retry = rig.state.topics.get("%RETRY%CG")
    assert retry is not None and (retry.read_queue_nums, retry.perm) == (1, 6)
    entries = len(rig.group.entries)
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat())
    assert len(rig.group.entries) == entries
    assert [command.code for command in rig.conn.pushed] == [RequestCode.NOTIFY_CONSUMER_IDS_CHANGED]


async def test_a_follower_keeps_members_and_logs_nothing(rig: ProcessorRig) -> None:
    rig.group.follow()
    entries = len(rig.group.entries)
    rig.tell(RequestCode.HEART_BEAT, {}, heartbeat())
    assert rig.broker.clients.consumer_group("CG") is not None
    assert len(rig.group.entries) == entries


async def test_the_part_of_an_unknown_group_is_ignored(tmp_path: Path) -> None:
    rig = ProcessorRig(tmp_path, auto_create_group=False)
    assert rig.ask(RequestCode.HEART_BEAT, {}, heartbeat()).code == 0
    assert rig.broker.clients.consumer_group("CG") is None
    listed = rig.ask(RequestCode.GET_CONSUMER_LIST_BY_GROUP, {"consumerGroup": "CG"})
    assert (listed.code, listed.remark) == (1, "no consumer for this group, CG")


async def test_a_heartbeat_without_subscriptions_keeps_them(rig: ProcessorRig) -> None:
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat())
    data = json.loads(heartbeat(subscriptionDataSet=[]))
    data |= {"withoutSub": True, "heartbeatFingerprint": 5}
    answer = rig.ask(RequestCode.HEART_BEAT, {}, json.dumps(data).encode())
    assert answer.ext["IS_SUB_CHANGE"] == "false"
    group = rig.broker.clients.consumer_group("CG")
    assert group is not None and "T" in group.subscriptions
    other = rig.ask(RequestCode.HEART_BEAT, {}, json.dumps(data).encode(), conn=RigConnection())
    assert other.ext["IS_SUB_CHANGE"] == "true", "a broker that does not know the client asks for everything"


@pytest.mark.parametrize("quiet", ["broadcasting", "group", "broker"])
async def test_who_is_not_notified(rig: ProcessorRig, quiet: str) -> None:
    if quiet == "group":
        body = b'{"groupName":"CG","notifyConsumerIdsChangedEnable":false}'
        rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, body)
    elif quiet == "broker":
        rig.broker.settings.notify_consumer_ids_changed = False
    model = "BROADCASTING" if quiet == "broadcasting" else "CLUSTERING"
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat(messageModel=model))
    assert rig.conn.pushed == []


async def test_the_end_of_a_connection_is_noticed(rig: ProcessorRig) -> None:
    other = RigConnection()
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat())
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat(client="c2"), conn=other)
    rig.conn.pushed.clear()
    other.close("gone")
    rig.router.on_close(other)
    assert [command.ext for command in rig.conn.pushed] == [{"consumerGroup": "CG"}]
    listed = rig.ask(RequestCode.GET_CONSUMER_LIST_BY_GROUP, {"consumerGroup": "CG"})
    assert bytes(listed.body) == b'{"consumerIdList":["c1"]}'


@pytest.mark.parametrize(
    ("subscription", "code"),
    [
        ({"topic": "T", "subString": "a", "expressionType": "TAG"}, 0),
        ({"topic": "T", "subString": "a > 1", "expressionType": "SQL92"}, 1),
        (None, 1),
    ],
)
async def test_client_configurations(rig: ProcessorRig, subscription: dict[str, str] | None, code: int) -> None:
    body = json.dumps({"clientId": "c", "group": "CG", "subscriptionData": subscription}).encode()
    assert rig.ask(RequestCode.CHECK_CLIENT_CONFIG, {}, body).code == code


# ------------------------------------------------------------------------------------------------------------- offsets


async def test_a_two_way_update_is_answered_after_its_commit(rig: ProcessorRig) -> None:
    rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"G"}')
    ext = {"consumerGroup": "G", "topic": "T", "queueId": 0, "commitOffset": 3}
    assert rig.tell(RequestCode.UPDATE_CONSUMER_OFFSET, ext) == []
    assert rig.tell(RequestCode.QUERY_CONSUMER_OFFSET, ext) == []
    rig.group.commit()
    update, query = rig.conn.received()
    assert (update.code, query.code, query.ext["offset"]) == (0, 0, "3")


async def test_a_query_logs_what_was_only_noted(rig: ProcessorRig) -> None:
    rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"G"}')
    ext = {"consumerGroup": "G", "topic": "T", "queueId": 0, "commitOffset": 8}
    assert rig.tell(RequestCode.UPDATE_CONSUMER_OFFSET, ext, oneway=True) == []
    assert rig.state.offsets.query("G", "T", 0) is None
    assert rig.ask(RequestCode.QUERY_CONSUMER_OFFSET, ext).ext["offset"] == "8"
    rig.tell(RequestCode.UPDATE_CONSUMER_OFFSET, {**ext, "commitOffset": 9}, oneway=True)
    assert rig.tell(RequestCode.QUERY_CONSUMER_OFFSET, ext) == []
    rig.group.cut()
    assert [answer.code for answer in rig.conn.received()] == [ResponseCode.SERVICE_NOT_AVAILABLE]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"consumerGroup": "None"}, ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST),
        ({"topic": "None"}, ResponseCode.TOPIC_NOT_EXIST),
        ({"queueId": -1}, ResponseCode.INVALID_PARAMETER),
        ({"queueId": 4}, ResponseCode.INVALID_PARAMETER),
        ({"commitOffset": "much"}, ResponseCode.SYSTEM_ERROR),
    ],
)
async def test_refused_updates(rig: ProcessorRig, changes: dict[str, Any], code: int) -> None:
    ext = {"consumerGroup": "TOOLS_CONSUMER", "topic": "T", "queueId": 0, "commitOffset": 3}
    assert rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, {**ext, **changes}).code == code


async def test_a_queue_that_a_topic_once_had_keeps_its_offset(rig: ProcessorRig) -> None:
    """A consumer still commits what it took from a queue before the topic was made smaller."""
    rig.create_topic("S", 2)
    rig.send("S", b"m", queue=1)
    rig.create_topic("S", 1)
    ext = {"consumerGroup": "TOOLS_CONSUMER", "topic": "S", "queueId": 1, "commitOffset": 1}
    assert rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, ext).code == 0
    answer = rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, {**ext, "queueId": 2})
    assert (answer.code, answer.remark) == (29, "queueId[2] is illegal, topic:[S] has 1 queues")


# --------------------------------------------------------------------------------------------------------------- locks


def lock_body(client: str, *queues: int) -> bytes:
    rows = [{"topic": "T", "brokerName": "broker-a", "queueId": queue} for queue in queues]
    return json.dumps({"consumerGroup": "CG", "clientId": client, "mqSet": rows}).encode()


async def test_locks_are_granted_once_and_given_back(rig: ProcessorRig) -> None:
    def granted(client: str, *queues: int) -> list[int]:
        answer = rig.ask(RequestCode.LOCK_BATCH_MQ, {}, lock_body(client, *queues))
        assert answer.code == 0
        return sorted(queue.queue_id for queue in decode_body(answer.body, LockBatchResponseBody).lock_ok_mq_set)

    assert granted("c1", 0, 1) == [0, 1]
    assert granted("c2", 0, 1, 2) == [2]
    assert rig.ask(RequestCode.UNLOCK_BATCH_MQ, {}, lock_body("c1", 0)).code == 0
    assert rig.ask(RequestCode.UNLOCK_BATCH_MQ, {}, lock_body("c1", 2)).code == 0, "not ours: left alone"
    assert granted("c2", 0, 1, 2) == [0, 2]
    assert rig.ask(RequestCode.LOCK_BATCH_MQ, {}, b'{"clientId":"","consumerGroup":"CG"}').code == 1


async def test_queues_that_do_not_exist_are_not_locked(rig: ProcessorRig) -> None:
    """Whatever a client asks for: the table of owners does not grow past the queues there are."""
    answer = rig.ask(RequestCode.LOCK_BATCH_MQ, {}, lock_body("c1", 0, -1, *range(4, 500)))
    assert answer.code == 0
    assert [queue.queue_id for queue in decode_body(answer.body, LockBatchResponseBody).lock_ok_mq_set] == [0]
    assert answer.remark is not None
    assert answer.remark.startswith("queueId[-1] is illegal, topic:[T] has 4 queues; queueId[4] is")
    assert len(answer.remark) < 500
    assert len(rig.state.locks.snapshot()) == 1


async def test_a_lock_that_is_cut_is_not_granted(rig: ProcessorRig) -> None:
    assert rig.tell(RequestCode.LOCK_BATCH_MQ, {}, lock_body("c1", 0)) == []
    rig.group.cut()
    assert [answer.code for answer in rig.conn.received()] == [ResponseCode.SYSTEM_ERROR]
    assert rig.tell(RequestCode.UNLOCK_BATCH_MQ, {}, lock_body("c1", 0), oneway=True) == []
