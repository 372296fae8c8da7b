"""Stock mqadmin 5.3.3 gives right answers and has the right effect."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import wire

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster_name(mqadmin):
    return mqadmin.table("clusterList")[0]["Cluster Name"]


@pytest.fixture(scope="module")
def topic(mqadmin, cluster_name, target, suffix):
    """A topic of six queues made by updateTopic."""
    name = f"Admin_{suffix}"
    said = mqadmin.run("updateTopic", "-c", cluster_name, "-t", name, "-r", "6", "-w", "6")
    assert "success" in said
    wire.wait_until(lambda: wire.query_route(target.namesrv, name), 15.0, f"route of {name}")
    return name


@pytest.fixture(scope="module")
def sent(target, topic):
    """One message on the topic's queue 2, by its offset message id and unique key."""
    route = wire.query_route(target.namesrv, topic)
    broker_name, address = next(iter(sorted(route.leaders.items())))
    unique_key = "7F00000100002A9F00000000" + f"{abs(hash(topic)) % 16**8:08X}"
    properties = f"UNIQ_KEY\x01{unique_key}\x02KEYS\x01one two\x02TAGS\x01blue\x02WAIT\x01true\x02"
    with wire.Wire(address) as connection:
        fields = wire.send_fields(topic, 2, properties, broker_name)
        answer = connection.request(wire.SEND_MESSAGE_V2, fields, b"by hand")
    assert answer.code == wire.SUCCESS, answer
    return {"offset_id": answer.ext["msgId"], "unique_key": unique_key, "offset": answer.ext["queueOffset"]}


def test_cluster_list(mqadmin, target):
    rows = mqadmin.table("clusterList")
    leaders = {row["Broker Name"]: row["Addr"] for row in rows if row["BID"] == "0"}
    assert leaders == wire.query_route(target.namesrv, wire.TEMPLATE_TOPIC).leaders
    assert {row["Version"] for row in rows} == {"V5_3_3"}
    assert len({row["Addr"] for row in rows}) == len(rows)


def test_cluster_list_names_every_replica(mqadmin, target):
    rows = mqadmin.table("clusterList")
    route = wire.query_route(target.namesrv, wire.TEMPLATE_TOPIC)
    registered = {(name, str(number)) for name, brokers in route.brokers.items() for number in brokers}
    assert {(row["Broker Name"], row["BID"]) for row in rows} == registered


def test_update_topic(mqadmin, target, topic, cluster_name):
    route = wire.query_route(target.namesrv, topic)
    assert {(queue.read_queues, queue.write_queues) for queue in route.queues} == {(6, 6)}
    mqadmin.run("updateTopic", "-c", cluster_name, "-t", topic, "-r", "8", "-w", "8")

    def grown():
        queues = wire.query_route(target.namesrv, topic).queues
        return True if all(queue.write_queues == 8 for queue in queues) else None

    assert wire.wait_until(grown, 15.0, "eight queues in the route")


def test_topic_list(mqadmin, topic):
    assert topic in mqadmin.run("topicList").split()


def test_topic_route(mqadmin, target, topic):
    text = mqadmin.run("topicRoute", "-t", topic)
    # The tool prints broker ids as bare numbers.
    document = json.loads(re.sub(r"([{,]\s*)(\d+):", r'\1"\2":', text))
    route = wire.query_route(target.namesrv, topic)
    printed = {data["brokerName"]: data["brokerAddrs"]["0"] for data in document["brokerDatas"]}
    assert printed == route.leaders
    assert {data["brokerName"] for data in document["queueDatas"]} == set(printed)


def test_send_message_and_topic_status(mqadmin, topic):
    before = sum(int(row["Max Offset"]) for row in mqadmin.table("topicStatus", "-t", topic))
    sent = mqadmin.table("sendMessage", "-t", topic, "-p", "from the tool", "-k", "tool", "-c", "green")
    assert sent[0]["Send Result"] == "SEND_OK"

    def counted():
        rows = mqadmin.table("topicStatus", "-t", topic)
        return rows if sum(int(row["Max Offset"]) for row in rows) == before + 1 else None

    rows = wire.wait_until(counted, 10.0, "one more message in topicStatus")
    assert all(int(row["Min Offset"]) <= int(row["Max Offset"]) for row in rows)


def test_query_by_offset_id(mqadmin, topic, sent):
    text = mqadmin.run("queryMsgById", "-t", topic, "-i", sent["offset_id"])
    assert field(text, "OffsetID") == sent["offset_id"]
    assert field(text, "Topic") == topic
    assert field(text, "Tags") == "[blue]"
    assert field(text, "Keys") == "[one two]"
    assert field(text, "Queue ID") == "2"
    assert field(text, "Queue Offset") == sent["offset"]


def test_query_by_key(mqadmin, topic, sent):
    def found():
        rows = mqadmin.table("queryMsgByKey", "-t", topic, "-k", "two")
        return rows or None

    rows = wire.wait_until(found, 10.0, "the key in the index")
    assert [(row["Message ID"], row["QID"], row["Offset"]) for row in rows] == [
        (sent["unique_key"], "2", sent["offset"])
    ]
    assert sent["unique_key"] not in mqadmin.attempt("queryMsgByKey", "-t", topic, "-k", "nobody")


def test_query_by_unique_key(mqadmin, topic, sent):
    text = mqadmin.attempt("queryMsgByUniqueKey", "-t", topic, "-i", sent["unique_key"])
    assert sent["offset_id"] in text or field(text, "Queue Offset") == sent["offset"]


def test_broker_status(mqadmin, target):
    address = next(iter(wire.query_route(target.namesrv, wire.TEMPLATE_TOPIC).leaders.values()))
    lines = (line.partition(":") for line in mqadmin.run("brokerStatus", "-b", address).splitlines())
    said = {key.strip(): value.strip() for key, colon, value in lines if colon}
    assert said["brokerVersionDesc"] == "V5_3_3"
    assert said["brokerActive"] == "true"
    for key in ("putTps", "getTransferredTps", "commitLogDiskRatio", "consumeQueueDiskRatio", "putMessageAverageSize"):
        assert float(said[key].split()[0]) >= 0, key
    for key in ("msgPutTotalTodayNow", "msgPutTotalTodayMorning", "earliestMessageTimeStamp", "pageCacheLockTimeMills"):
        assert int(said[key]) >= -1, key
    assert int(said["commitLogMaxOffset"]) > 0


def test_consumer_progress(mqadmin, programs):
    outcome = programs.outcome("java-5.3.3", "offsets")
    assert outcome.ok, outcome.detail
    word = programs.word("java-5.3.3")
    rows = mqadmin.table("consumerProgress", "-g", f"C_java_offsets_{word}")
    mine = [row for row in rows if row["Topic"] == f"Java_offsets_{word}"]
    assert len(mine) >= 4
    assert sum(int(row["Broker Offset"]) for row in mine) == 24
    assert sum(int(row["Consumer Offset"]) for row in mine) == 24
    assert {row["Diff"] for row in mine} == {"0"}


def test_delete_expired_commit_log(mqadmin, cluster_name, sent, topic):
    """On each broker, leader or not: what is older than the retention goes, and nothing is."""
    assert "success" in mqadmin.run("deleteExpiredCommitLog", "-c", cluster_name)
    assert mqadmin.table("topicStatus", "-t", topic)


def test_delete_topic(mqadmin, target, cluster_name, suffix):
    name = f"Admin_gone_{suffix}"
    mqadmin.run("updateTopic", "-c", cluster_name, "-t", name)
    assert "SEND_OK" in mqadmin.run("sendMessage", "-t", name, "-p", "soon gone")
    said = mqadmin.run("deleteTopic", "-c", cluster_name, "-t", name)
    assert "success" in said
    assert wire.query_route(target.namesrv, name) is None
    assert name not in mqadmin.run("topicList").split()
    for address in wire.query_route(target.namesrv, wire.TEMPLATE_TOPIC).leaders.values():
        with wire.Wire(address) as connection:
            assert connection.request(202, {"topic": name}).code == 17


def field(text: str, name: str) -> str:
    """Value of one ``name:   value`` line."""
    match = re.search(rf"^{re.escape(name)}:\s*(.*?)\s*$", text, re.MULTILINE)
    assert match is not None, f"no {name} in {text}"
    return match.group(1)
