"""Stock mqadmin 5.3.3 against a raft group whose members change: a fourth node that joins, leads, and one that goes."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import wire

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

GROUP = "broker-a"


@pytest.fixture(scope="module")
def addresses(four_nodes):
    """Client address of each node."""
    return {node["name"]: node["listen"] for node in four_nodes.quorate("ps") if node["kind"] == "broker"}


def listed(mqadmin):
    """Broker id to address, as clusterList prints them."""
    return {row["BID"]: row["Addr"] for row in mqadmin.table("clusterList") if row["Broker Name"] == GROUP}


def wait_listed(mqadmin, nodes, addresses, leader):
    """Until exactly `nodes` are registered: the leader as 0, nK as K + 1."""
    wanted = {"0" if name == leader else str(int(name[1:]) + 1): addresses[name] for name in nodes}
    wire.wait_until(lambda: listed(mqadmin) == wanted or None, 20.0, f"clusterList to name {wanted}")


def status_of(mqadmin, address):
    lines = (line.partition(":") for line in mqadmin.run("brokerStatus", "-b", address).splitlines())
    return {key.strip(): value.strip() for key, colon, value in lines if colon}


def leader_of(four_nodes):
    return four_nodes.quorate("raft", "list")[0]["leader"]


def route_of(mqadmin, topic):
    """Broker id to address, as topicRoute prints them."""
    document = json.loads(re.sub(r"([{,]\s*)(\d+):", r'\1"\2":', mqadmin.run("topicRoute", "-t", topic)))
    (broker,) = document["brokerDatas"]
    return broker["brokerAddrs"]


def check_topics(mqadmin, four_nodes, topic):
    """A topic is made, written to, read about and deleted, whoever the members are."""
    mqadmin.run("updateTopic", "-c", "DefaultCluster", "-t", topic, "-r", "3", "-w", "3")
    wire.wait_until(lambda: wire.query_route(four_nodes.namesrv, topic), 15.0, f"route of {topic}")
    assert topic in mqadmin.run("topicList").split()
    assert route_of(mqadmin, topic) == listed(mqadmin)
    four_nodes.quorate("produce", topic, "one", "two", "three", "--key", "here")
    rows = mqadmin.table("topicStatus", "-t", topic)
    assert len(rows) == 3
    assert sum(int(row["Max Offset"]) - int(row["Min Offset"]) for row in rows) == 3
    found = wire.wait_until(
        lambda: mqadmin.table("queryMsgByKey", "-t", topic, "-k", "here") or None, 10.0, "the key in the index"
    )
    assert len(found) == 3
    mqadmin.run("deleteTopic", "-c", "DefaultCluster", "-t", topic)
    assert wire.query_route(four_nodes.namesrv, topic) is None


def test_a_fourth_member_is_listed_and_asked_like_the_others(mqadmin_of_four, four_nodes, addresses):
    leader = leader_of(four_nodes)
    wait_listed(mqadmin_of_four, ["n0", "n1", "n2"], addresses, leader)
    peer = addresses["n3"].rpartition(":")[0] + f":{int(addresses['n3'].rpartition(':')[2]) + 5}"
    assert four_nodes.quorate("raft", "add-node", "n3", "--peer", peer)["voters"] == ["n0", "n1", "n2", "n3"]
    leader = leader_of(four_nodes)
    wait_listed(mqadmin_of_four, ["n0", "n1", "n2", "n3"], addresses, leader)
    for name, address in addresses.items():
        said = status_of(mqadmin_of_four, address)
        assert (said["brokerActive"], said["brokerVersionDesc"]) == (str(name == leader).lower(), "V5_3_3")
        assert (said["raftNode"], said["raftMembers"], said["raftLeader"]) == (name, "n0;n1;n2;n3", leader)
    text = mqadmin_of_four.run("haStatus", "-b", addresses[leader])
    assert re.search(r"#SlaveNum\s+3\s", text) and re.search(r"#InSyncSlaveNum\s+3\s", text), text
    check_topics(mqadmin_of_four, four_nodes, "Members_four")


def test_the_fourth_member_leads_and_a_founder_goes(mqadmin_of_four, four_nodes, addresses):
    former = leader_of(four_nodes)
    assert four_nodes.quorate("raft", "transfer-leadership", "--to", "n3")["leader"] == "n3"
    wait_listed(mqadmin_of_four, ["n0", "n1", "n2", "n3"], addresses, "n3")
    left = sorted({"n0", "n1", "n2", "n3"} - {former})
    assert four_nodes.quorate("raft", "remove-node", former, "--yes")["voters"] == left
    wait_listed(mqadmin_of_four, left, addresses, "n3")
    for name in left:
        said = status_of(mqadmin_of_four, addresses[name])
        assert (said["raftMembers"], said["raftLeader"]) == (";".join(left), "n3")
    check_topics(mqadmin_of_four, four_nodes, "Members_three")
