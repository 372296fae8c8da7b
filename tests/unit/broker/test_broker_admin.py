"""Administration (mqadmin.md 2, 3, 5, 7): right answers, and the right effect."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from broker.errors import StartupError
from broker.processors.admin import merge_attributes
from broker.stats import BrokerStats
from remoting.bodies import (
    ConsumerConnection,
    HARuntimeInfo,
    KVTable,
    SubscriptionGroupConfig,
    SubscriptionGroupWrapper,
    TopicConfig,
    TopicConfigSerializeWrapper,
    TopicList,
    decode_body,
    decode_consume_stats,
    decode_consume_stats_list,
    decode_properties_text,
    decode_reset_offset,
    decode_topic_stats,
)
from remoting.codes import RequestCode, ResponseCode
from remoting.command import Command
from remoting.errors import ConnectionLost, RequestTimeout
from remoting.fastjson import loads
from tests.unit.broker.processor_rig import ProcessorRig, RigConnection

TRANSCRIPTS = Path(__file__).parents[2] / "vectors" / "transcripts.json"


@pytest.fixture
async def rig(tmp_path: Path) -> ProcessorRig:
    rig = ProcessorRig(tmp_path)
    rig.create_topic("T", queues=2)
    return rig


def body_of(answer: Command) -> Any:
    assert answer.code == 0, answer.remark
    return loads(bytes(answer.body))


def heartbeat(client: str = "c1", group: str = "CG", topic: str = "T", without_sub: bool = False) -> bytes:
    subscriptions = [] if without_sub else [{"topic": topic, "subString": "A || B", "subVersion": 1}]
    return json.dumps(
        {
            "clientID": client,
            "heartbeatFingerprint": 7 if without_sub else 0,
            "withoutSub": without_sub,
            "producerDataSet": [{"groupName": "PG"}],
            "consumerDataSet": [
                {
                    "groupName": group,
                    "consumeType": "CONSUME_PASSIVELY",
                    "messageModel": "CLUSTERING",
                    "consumeFromWhere": "CONSUME_FROM_LAST_OFFSET",
                    "subscriptionDataSet": subscriptions,
                }
            ],
        }
    ).encode()


# ------------------------------------------------------------------------------------------------------------- topics


async def test_a_topic_is_replaced_and_its_attributes_are_merged(rig: ProcessorRig) -> None:
    ext = {
        "topic": "N", "defaultTopic": "TBW102", "readQueueNums": 2, "writeQueueNums": 3, "perm": 4,
        "topicFilterType": "SINGLE_TAG", "order": "true", "topicSysFlag": 1, "attributes": "+message.type=FIFO",
    }  # fmt: skip
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_TOPIC, ext).code == 0
    ext |= {"readQueueNums": 5, "attributes": "+a=b,-message.type"}
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_TOPIC, ext).code == 0
    config = decode_body(rig.ask(RequestCode.GET_TOPIC_CONFIG, {"topic": "N"}).body, TopicConfig)
    assert (config.read_queue_nums, config.write_queue_nums, config.perm, config.order) == (5, 3, 4, True)
    assert config.attributes == {"a": "b"}
    entries = len(rig.group.entries)
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_TOPIC, {**ext, "attributes": ""}).code == 0
    assert len(rig.group.entries) == entries, "nothing changed, nothing is logged"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"topic": "bad name!"}, ResponseCode.INVALID_PARAMETER),
        ({"topic": "TBW102"}, ResponseCode.INVALID_PARAMETER),
        ({"topic": "DefaultCluster"}, ResponseCode.INVALID_PARAMETER),
        ({"perm": 99}, ResponseCode.INVALID_PARAMETER),
        ({"writeQueueNums": -1}, ResponseCode.INVALID_PARAMETER),
        ({"readQueueNums": 10**9}, ResponseCode.INVALID_PARAMETER),
        ({"attributes": "no sign"}, ResponseCode.INVALID_PARAMETER),
        ({"perm": "x"}, ResponseCode.SYSTEM_ERROR),
    ],
)
async def test_refused_topics(rig: ProcessorRig, changes: dict[str, Any], code: int) -> None:
    ext = {"topic": "N", "readQueueNums": 2, "writeQueueNums": 2, "perm": 6, "topicFilterType": "SINGLE_TAG"}
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_TOPIC, {**ext, **changes}).code == code
    assert rig.state.topics.get("N") is None


async def test_topics_by_the_list_are_one_entry(rig: ProcessorRig) -> None:
    entries = len(rig.group.entries)
    body = b'{"topicConfigList":[{"topicName":"L1","attributes":{"+k":"v"}},{"topicName":"L2","readQueueNums":3}]}'
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_TOPIC_LIST, {}, body).code == 0
    assert len(rig.group.entries) == entries + 1
    wrapper = decode_body(rig.ask(RequestCode.GET_ALL_TOPIC_CONFIG).body, TopicConfigSerializeWrapper)
    assert wrapper.topic_config_table["L1"].attributes == {"k": "v"}
    assert wrapper.topic_config_table["L2"].read_queue_nums == 3
    assert wrapper.data_version.counter > 0
    bad = b'{"topicConfigList":[{"topicName":"L3"},{"topicName":"bad!"}]}'
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_TOPIC_LIST, {}, bad).code == ResponseCode.INVALID_PARAMETER
    assert rig.state.topics.get("L3") is None


async def test_a_deleted_topic_takes_its_queues_and_offsets_along(rig: ProcessorRig) -> None:
    rig.send("T", b"x")
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat())
    rig.group.commit()
    offset = {"consumerGroup": "CG", "topic": "T", "queueId": 0, "commitOffset": 1}
    assert rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, offset).code == 0
    assert rig.ask(RequestCode.DELETE_TOPIC_IN_BROKER, {"topic": "T"}).code == 0
    assert rig.state.offsets.query("CG", "T", 0) is None
    assert rig.ask(RequestCode.GET_TOPIC_CONFIG, {"topic": "T"}).code == ResponseCode.TOPIC_NOT_EXIST
    assert rig.ask(RequestCode.GET_TOPIC_STATS_INFO, {"topic": "T"}).code == ResponseCode.TOPIC_NOT_EXIST
    assert rig.ask(RequestCode.DELETE_TOPIC_IN_BROKER, {"topic": "T"}).code == 0
    assert rig.ask(RequestCode.DELETE_TOPIC_IN_BROKER, {"topic": "TBW102"}).code == ResponseCode.INVALID_PARAMETER


async def test_topic_statistics_show_every_queue(rig: ProcessorRig) -> None:
    rig.send("T", b"x", queue=1)
    table = decode_topic_stats(bytes(rig.ask(RequestCode.GET_TOPIC_STATS_INFO, {"topic": "T"}).body)).offset_table
    assert {(queue.queue_id, row.max_offset) for queue, row in table.items()} == {(0, 0), (1, 1)}
    assert max(row.last_update_timestamp for row in table.values()) > 1_700_000_000_000


async def test_system_topics_are_those_of_apache(rig: ProcessorRig) -> None:
    pairs = json.loads(TRANSCRIPTS.read_text())["default_broker"]
    theirs = next(pair for pair in pairs if pair["name"] == "system topics")["response"]["body"]
    ours = decode_body(rig.ask(RequestCode.GET_SYSTEM_TOPIC_LIST_FROM_BROKER).body, TopicList).topic_list
    assert sorted(ours) == sorted(json.loads(theirs)["topicList"])


async def test_a_change_that_is_cut_is_refused_with_14(rig: ProcessorRig) -> None:
    ext = {"topic": "N", "readQueueNums": 2, "writeQueueNums": 2, "perm": 6, "topicFilterType": "SINGLE_TAG"}
    assert rig.tell(RequestCode.UPDATE_AND_CREATE_TOPIC, ext) == []
    rig.group.cut()
    assert [answer.code for answer in rig.conn.received()] == [ResponseCode.SERVICE_NOT_AVAILABLE]
    assert rig.tell(RequestCode.UPDATE_AND_CREATE_TOPIC, ext) == []
    rig.group.orphan_all()
    (answer,) = rig.conn.received()
    assert answer.code == ResponseCode.SYSTEM_ERROR and "outcome unknown" in (answer.remark or "")


def test_attribute_changes() -> None:
    assert merge_attributes({"a": "1", "b": "2"}, "+c=3,-a, +b=4") == {"b": "4", "c": "3"}
    for wrong in ("a=1", "+a", "-", "+=1"):
        with pytest.raises(ValueError, match="attribute change"):
            merge_attributes({}, wrong)


# ------------------------------------------------------------------------------------------------------------- groups


async def test_a_group_lives_and_dies(rig: ProcessorRig) -> None:
    body = b'{"groupName":"G","retryMaxTimes":3,"attributes":{"+k":"v"}}'
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, body).code == 0
    config = decode_body(
        rig.ask(RequestCode.GET_SUBSCRIPTIONGROUP_CONFIG, {"group": "G"}).body, SubscriptionGroupConfig
    )
    assert (config.retry_max_times, config.attributes) == (3, {"k": "v"})
    many = b'{"groupConfigList":[{"groupName":"G1"},{"groupName":"G2","consumeEnable":false}]}'
    assert rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP_LIST, {}, many).code == 0
    wrapper = decode_body(rig.ask(RequestCode.GET_ALL_SUBSCRIPTIONGROUP_CONFIG).body, SubscriptionGroupWrapper)
    assert wrapper.subscription_group_table["G2"].consume_enable is False
    rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, {"consumerGroup": "G", "topic": "T", "queueId": 0, "commitOffset": 5})
    assert rig.ask(RequestCode.DELETE_SUBSCRIPTIONGROUP, {"groupName": "G"}).code == 0
    assert rig.state.groups.get("G") is None and rig.state.offsets.query("G", "T", 0) == 5
    assert rig.ask(RequestCode.DELETE_SUBSCRIPTIONGROUP, {"groupName": "G", "removeOffset": "true"}).code == 0
    assert rig.state.offsets.query("G", "T", 0) is None
    bad = rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"no good"}')
    assert bad.code == ResponseCode.INVALID_PARAMETER


async def test_connections_of_consumers_and_producers(rig: ProcessorRig) -> None:
    rig.ask(RequestCode.HEART_BEAT, {}, heartbeat())
    found = decode_body(
        rig.ask(RequestCode.GET_CONSUMER_CONNECTION_LIST, {"consumerGroup": "CG"}).body, ConsumerConnection
    )
    assert [connection.client_id for connection in found.connection_set] == ["c1"]
    assert found.subscription_table["T"].tags_set == ["A", "B"] and len(found.subscription_table["T"].code_set) == 2
    offline = rig.ask(RequestCode.GET_CONSUMER_CONNECTION_LIST, {"consumerGroup": "none"})
    assert offline.code == ResponseCode.CONSUMER_NOT_ONLINE
    assert body_of(rig.ask(RequestCode.GET_PRODUCER_CONNECTION_LIST, {"producerGroup": "PG"}))["connectionSet"]
    assert rig.ask(RequestCode.GET_PRODUCER_CONNECTION_LIST, {"producerGroup": "none"}).code == 1
    assert body_of(rig.ask(RequestCode.GET_ALL_PRODUCER_INFO))["data"]["PG"][0]["clientId"] == "c1"
    assert body_of(rig.ask(RequestCode.QUERY_TOPIC_CONSUME_BY_WHO, {"topic": "T"})) == {"groupList": ["CG"]}
    subscription = body_of(rig.ask(RequestCode.QUERY_SUBSCRIPTION_BY_CONSUMER, {"group": "CG", "topic": "T"}))
    assert subscription["subscriptionData"]["subString"] == "A || B"


# ----------------------------------------------------------------------------------------------------------- progress


async def test_consume_stats_and_time_spans(rig: ProcessorRig) -> None:
    for _ in range(3):
        rig.send("T", b"x")
    rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"G"}')
    rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, {"consumerGroup": "G", "topic": "T", "queueId": 0, "commitOffset": 1})
    stats = decode_consume_stats(bytes(rig.ask(RequestCode.GET_CONSUME_STATS, {"consumerGroup": "G"}).body))
    rows = {queue.queue_id: row for queue, row in stats.offset_table.items()}
    assert (rows[0].broker_offset, rows[0].consumer_offset, rows[1].broker_offset) == (3, 1, 0)
    assert rows[0].last_timestamp > 1_700_000_000_000
    listed = decode_consume_stats_list(bytes(rig.ask(RequestCode.GET_BROKER_CONSUME_STATS, {"isOrder": "false"}).body))
    assert (listed.total_diff, listed.broker_addr) == (2, "127.0.0.1:10911")
    ordered = decode_consume_stats_list(bytes(rig.ask(RequestCode.GET_BROKER_CONSUME_STATS, {"isOrder": "true"}).body))
    assert ordered.total_diff == 0
    spans = body_of(rig.ask(RequestCode.QUERY_CONSUME_TIME_SPAN, {"topic": "T", "group": "G"}))["consumeTimeSpanSet"]
    assert len(spans) == 2 and spans[0]["minTimeStamp"] > 0 and spans[1]["maxTimeStamp"] == -1
    assert body_of(rig.ask(RequestCode.GET_ALL_CONSUMER_OFFSET))["offsetTable"] == {"T@G": {0: 1}}
    assert body_of(rig.ask(RequestCode.QUERY_TOPICS_BY_CONSUMER, {"group": "G"}))["topicList"] == ["T"]


async def test_an_offset_reset_is_logged_and_answered(rig: ProcessorRig) -> None:
    for _ in range(3):
        rig.send("T", b"x")
    rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"G"}')
    ext = {"topic": "T", "group": "G", "timestamp": -1, "isForce": "true"}
    table = decode_reset_offset(bytes(rig.ask(RequestCode.INVOKE_BROKER_TO_RESET_OFFSET, ext).body)).offset_table
    assert {queue.queue_id: offset for queue, offset in table.items()} == {0: 3, 1: 0}
    assert rig.state.offsets.query("G", "T", 0) == 3
    moved = rig.ask(11, rig.pull_ext("T", 0, consumerGroup="G"))
    assert (moved.code, moved.ext["nextBeginOffset"]) == (ResponseCode.PULL_OFFSET_MOVED, "3")
    one = rig.ask(RequestCode.INVOKE_BROKER_TO_RESET_OFFSET, {**ext, "queueId": 0, "offset": 1})
    assert len(decode_reset_offset(bytes(one.body)).offset_table) == 1
    assert rig.state.offsets.query("G", "T", 0) == 1
    kept = {**ext, "isForce": "false"}
    rig.ask(RequestCode.INVOKE_BROKER_TO_RESET_OFFSET, kept)
    assert rig.state.offsets.query("G", "T", 0) == 1, "not forced: never forward"
    assert rig.ask(RequestCode.INVOKE_BROKER_TO_RESET_OFFSET, {**ext, "group": "None"}).code == 26
    assert rig.ask(RequestCode.INVOKE_BROKER_TO_RESET_OFFSET, {**ext, "queueId": 9}).code == 29


async def test_offsets_can_be_cloned(rig: ProcessorRig) -> None:
    rig.ask(RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP, {}, b'{"groupName":"G"}')
    rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, {"consumerGroup": "G", "topic": "T", "queueId": 1, "commitOffset": 4})
    assert rig.ask(RequestCode.CLONE_GROUP_OFFSET, {"srcGroup": "G", "destGroup": "H", "topic": "T"}).code == 0
    assert rig.state.offsets.query("H", "T", 1) == 4
    assert rig.ask(RequestCode.CLONE_GROUP_OFFSET, {"srcGroup": "unknown", "destGroup": "H"}).code == 0


# ------------------------------------------------------------------------------------------------------- configuration


async def test_a_setting_is_changed_kept_and_shown(rig: ProcessorRig, tmp_path: Path) -> None:
    assert rig.ask(RequestCode.UPDATE_BROKER_CONFIG, {}, b"brokerPermission=2\nnoSuchKey=1").code == 0
    assert rig.state.broker_permission == 2
    answer = rig.ask(RequestCode.GET_BROKER_CONFIG)
    shown = decode_properties_text(answer.body)
    assert shown["brokerPermission"] == "2" and shown["brokerName"] == "broker-a" and "noSuchKey" not in shown
    assert json.loads(answer.ext["version"])["counter"] == 1
    again = ProcessorRig(tmp_path)
    assert again.broker.settings.broker_permission == 2 and again.state.broker_permission == 2


async def test_an_order_topic_takes_nothing_while_the_broker_is_read_only(rig: ProcessorRig) -> None:
    """Also where it was sent to before, so that its checks are made already."""
    rig.create_topic("Ordered", order="true")
    for permission, code in ((6, 0), (6, 0), (4, ResponseCode.NO_PERMISSION), (6, 0)):
        assert rig.ask(RequestCode.UPDATE_BROKER_CONFIG, {}, b"brokerPermission=%d" % permission).code == 0
        assert rig.send("Ordered", b"x").code == code


async def test_a_setting_that_cannot_be_kept_holds_until_the_next_start(rig: ProcessorRig, tmp_path: Path) -> None:
    with mock.patch.object(type(rig.broker.env.files), "write_atomic", side_effect=OSError(errno.ENOSPC, "full")):
        answer = rig.ask(RequestCode.UPDATE_BROKER_CONFIG, {}, b"brokerPermission=4")
    assert (answer.code, "until the next start only" in str(answer.remark)) == (ResponseCode.SYSTEM_ERROR, True)
    assert rig.broker.settings.broker_permission == rig.state.broker_permission == 4
    assert ProcessorRig(tmp_path).state.broker_permission == 6


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"brokerConfigPath=/x", ResponseCode.NO_PERMISSION),
        (b"maxMessageSize=1", ResponseCode.SYSTEM_ERROR),
        (b"maxMessageSize=4194304", ResponseCode.SUCCESS),
        (b"brokerPermission=many", ResponseCode.INVALID_PARAMETER),
        (b"litePullMessageEnable=false\nlistenPort=1", ResponseCode.SYSTEM_ERROR),
    ],
)
async def test_what_cannot_be_changed_says_so(rig: ProcessorRig, body: bytes, code: int) -> None:
    assert rig.ask(RequestCode.UPDATE_BROKER_CONFIG, {}, body).code == code
    assert rig.broker.settings.lite_pull_enable and rig.broker.settings.overrides == {}


async def test_runtime_information_has_every_key_of_apache_and_the_rafts(rig: ProcessorRig) -> None:
    rig.send("T", b"12345")
    pairs = json.loads(TRANSCRIPTS.read_text())["default_broker"]
    theirs = json.loads(next(p for p in pairs if p["name"] == "runtime info")["response"]["body"])["table"]
    table = decode_body(rig.ask(RequestCode.GET_BROKER_RUNTIME_INFO).body, KVTable).table
    missing = [
        key
        for key in theirs
        if key not in table and not key.startswith(("scheduleMessageOffset_", "commitLogDiskRatio_"))
    ]
    assert not missing
    for key in ("commitLogDiskRatio", "putMessageAverageSize", "msgPutTotalTodayNow", "msgGetTotalYesterdayMorning"):
        float(table[key])
    assert [float(part) for part in table["putTps"].split(" ")] == [0.0, 0.0, 0.0]
    assert (table["raftRole"], table["raftLeader"], table["raftFlush"]) == ("leader", "n0", "async")
    assert table["raftCommittedIndex"] == table["raftAppliedIndex"] == str(rig.group.commit_index)
    peer = json.loads(table["raftPeers"])["n2"]
    assert (peer["match"], peer["lag"], peer["connected"]) == (len(rig.group.entries), 0, True)
    assert (table["raftState"], table["raftMembers"], table["raftLearners"]) == ("serving", "n0;n1;n2", "n3")
    assert json.loads(table["raftPeers"])["n3"]["learner"]
    assert int(table["earliestMessageTimeStamp"]) > 1_700_000_000_000


async def test_followers_stand_for_slaves(rig: ProcessorRig) -> None:
    body = decode_body(rig.ask(RequestCode.GET_BROKER_HA_STATUS).body, HARuntimeInfo)
    assert body.master and body.in_sync_slave_nums == 2
    assert [connection.addr for connection in body.ha_connection_info] == ["127.0.0.1:40921", "127.0.0.1:40931"]
    rig.group.follow()
    rig.broker.master_address = "127.0.0.1:10921"
    body = decode_body(rig.ask(RequestCode.GET_BROKER_HA_STATUS).body, HARuntimeInfo)
    assert not body.master and body.ha_client_runtime_info.master_addr == "127.0.0.1:10921"
    assert rig.ask(RequestCode.GET_BROKER_EPOCH_CACHE).code == 1


async def test_cleaning(rig: ProcessorRig) -> None:
    assert rig.ask(RequestCode.CLEAN_EXPIRED_CONSUMEQUEUE).code == 0
    assert rig.ask(RequestCode.CLEAN_UNUSED_TOPIC).code == 0
    assert rig.ask(RequestCode.DELETE_EXPIRED_COMMITLOG).code == 0
    assert rig.group.asked == [("delete expired",)]


def test_rates_and_items_over_time() -> None:
    stats = BrokerStats("C", 0)
    for second in range(0, 71):
        stats.sample(float(second), 86_400_000 + second * 1000)
        stats.count_put("T", 10, 1000)
    assert stats.put.rate(10) == pytest.approx(10.0) and stats.put.rate(60) == pytest.approx(10.0)
    assert stats.put.rate(600) == 0.0
    minute, hour, day = stats.view("TOPIC_PUT_NUMS", "T") or pytest.fail("nothing was counted")
    assert (minute.sum, minute.avgpt) == (600, 10.0) and minute.tps == pytest.approx(10.0)
    assert hour.sum == 0 and day.sum == 0
    assert stats.view("TOPIC_PUT_NUMS", "unknown") is None and stats.view("NO_SUCH", "T") is None
    stats.sample(80.0, 2 * 86_400_000)
    assert (stats.put_this_morning, stats.put_yesterday_morning) == (710, 0)
    stats.sample(81.0, 3 * 86_400_000)
    assert stats.put_yesterday_morning == 710
    stats.forget_topic("T")
    assert stats.view("TOPIC_PUT_NUMS", "T") is None


# ----------------------------------------------------------------------------------------------------- calls to clients


class _StartAtOnce:
    """Jobs that a test runs itself."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.full = False

    def start(self, job: Any, request: Command, conn: Any, *args: Any) -> bool:
        if not self.full:
            self.jobs.append(job(request, conn, *args))
        return not self.full


async def call_client(rig: ProcessorRig, code: int, ext: dict[str, Any], reply: Command | Exception) -> Command:
    """Ask for something that a connected client has to answer."""
    jobs: Any = _StartAtOnce()
    rig.broker.jobs = jobs
    client = RigConnection(("127.0.0.1", 50002))
    client.answers_to_broker = {code: reply, 221: reply}
    rig.tell(RequestCode.HEART_BEAT, {}, heartbeat("cA"), conn=client)
    rig.group.commit()
    answers = rig.tell(code, ext)
    for job in jobs.jobs:
        await job
    answers += rig.conn.received()
    assert len(answers) == 1
    return answers[0]


async def test_running_info_passes_through_untouched(rig: ProcessorRig) -> None:
    ext = {"consumerGroup": "CG", "clientId": "cA", "jstackEnable": "false"}
    reply = Command(code=0, opaque=0, body=b'{"properties":{"any":"thing"} }')
    answer = await call_client(rig, RequestCode.GET_CONSUMER_RUNNING_INFO, ext, reply)
    assert (answer.code, bytes(answer.body)) == (0, b'{"properties":{"any":"thing"} }')


@pytest.mark.parametrize(
    ("error", "code"),
    [(RequestTimeout("late"), ResponseCode.CONSUME_MSG_TIMEOUT), (ConnectionLost("gone"), ResponseCode.SYSTEM_ERROR)],
)
async def test_a_client_that_does_not_answer(rig: ProcessorRig, error: Exception, code: int) -> None:
    ext = {"consumerGroup": "CG", "clientId": "cA"}
    assert (await call_client(rig, RequestCode.GET_CONSUMER_RUNNING_INFO, ext, error)).code == code


async def test_a_message_is_handed_to_a_client_directly(rig: ProcessorRig) -> None:
    message_id = rig.send("T", b"take this").ext["msgId"]
    ext = {"consumerGroup": "CG", "clientId": "cA", "msgId": message_id}
    reply = Command(code=0, opaque=0, body=b'{"consumeResult":"CR_SUCCESS"}')
    answer = await call_client(rig, RequestCode.CONSUME_MESSAGE_DIRECTLY, ext, reply)
    assert bytes(answer.body) == b'{"consumeResult":"CR_SUCCESS"}'
    assert rig.ask(RequestCode.CONSUME_MESSAGE_DIRECTLY, {**ext, "clientId": "cB"}).code == 1
    assert rig.ask(RequestCode.CONSUME_MESSAGE_DIRECTLY, {**ext, "msgId": "zz"}).code == 29


async def test_status_of_a_group_is_collected(rig: ProcessorRig) -> None:
    body = b'{"messageQueueTable":{{"brokerName":"broker-a","queueId":0,"topic":"T"}:3}}'
    ext = {"topic": "T", "group": "CG"}
    code = RequestCode.INVOKE_BROKER_TO_GET_CONSUMER_STATUS
    answer = await call_client(rig, code, ext, Command(code=0, opaque=0, body=body))
    assert b'"cA":{{"brokerName":"broker-a","queueId":0,"topic":"T"}:3}' in bytes(answer.body)


async def test_resets_by_the_clients_themselves(rig: ProcessorRig) -> None:
    rig.broker.settings.server_side_reset = False
    client = RigConnection(("127.0.0.1", 50002))
    rig.tell(RequestCode.HEART_BEAT, {}, heartbeat("cA"), conn=client)
    rig.group.commit()
    client.received()
    rig.send("T", b"x")
    offset = {"consumerGroup": "CG", "topic": "T", "queueId": 0, "commitOffset": 0}
    assert rig.ask(RequestCode.UPDATE_CONSUMER_OFFSET, offset).code == 0
    ext = {"topic": "T", "group": "CG", "timestamp": -1, "isForce": "true"}
    for language, form in (("JAVA", b'{"offsetTable":{{"brokerName"'), ("CPP", b'{"offsetTable":[{"brokerName"')):
        client.pushed.clear()
        answer = rig.ask(RequestCode.INVOKE_BROKER_TO_RESET_OFFSET, ext, language=language)
        assert bytes(answer.body).startswith(b'{"offsetTable":{{"brokerName"')
        (command,) = client.pushed
        assert command.code == RequestCode.RESET_CONSUMER_CLIENT_OFFSET
        assert bytes(command.body).startswith(form) and b":1" in bytes(command.body)


async def test_too_many_calls_are_answered_busy(rig: ProcessorRig) -> None:
    jobs: Any = _StartAtOnce()
    jobs.full = True
    rig.broker.jobs = jobs
    rig.tell(RequestCode.HEART_BEAT, {}, heartbeat("cA"))
    rig.conn.received()
    answer = rig.ask(RequestCode.GET_CONSUMER_RUNNING_INFO, {"consumerGroup": "CG", "clientId": "cA"})
    assert answer.code == ResponseCode.SYSTEM_BUSY


# -------------------------------------------------------------------------------------------------------------- router


async def test_a_bug_in_a_handler_is_logged_once_and_answered(
    rig: ProcessorRig, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: Command, conn: Any) -> bytes:
        raise AttributeError("a bug")

    rig.router._handlers[RequestCode.GET_MIN_OFFSET] = broken
    for _ in range(3):
        answer = rig.ask(RequestCode.GET_MIN_OFFSET, {"topic": "T", "queueId": 0})
        assert answer.code == 1 and "AttributeError: a bug" in (answer.remark or "")
    logged = [record for record in caplog.records if "request failed unexpectedly" in record.getMessage()]
    assert len(logged) == 1 and logged[0].exc_info


async def test_one_way_requests_are_never_answered(rig: ProcessorRig) -> None:
    for code, ext in ((9999, {}), (RequestCode.GET_MIN_OFFSET, {}), (RequestCode.PULL_MESSAGE, rig.pull_ext("T", 0))):
        assert rig.tell(code, ext, oneway=True) == []


def test_a_startup_error_reads_as_its_sentence() -> None:
    assert str(StartupError("no, because")) == "no, because"
