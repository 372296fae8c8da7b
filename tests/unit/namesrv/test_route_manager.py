from __future__ import annotations

from typing import Any

import pytest

from namesrv.route_manager import Ignored, LiveBroker, Refused, Registered, Registration, RouteManager
from remoting.bodies import DataVersion, TopicConfig

UUID_A, UUID_B = "aa" * 16, "bb" * 16
CONNECTIONS = [f"connection {number}" for number in range(10)]  # compared by identity


def registration(number: int = 0, **changes: Any) -> Registration:
    """Node n0 of broker-a as leader of term 1, unless told otherwise."""
    values: dict[str, Any] = {
        "cluster": "C",
        "broker_name": "broker-a",
        "broker_id": 0,
        "address": f"10.0.0.{number}:10911",
        "connection": CONNECTIONS[number],
        "topics": topics("T", "U"),
        "data_version": DataVersion(counter=1, state_version=1, timestamp=1),
        "ha_server_address": f"10.0.0.{number}:10912",
        "raft_term": 1,
        "raft_group": UUID_A,
    }
    return Registration(**{**values, **changes})


def topics(*names: str, perm: int = 6) -> dict[str, TopicConfig]:
    return {name: TopicConfig(topic_name=name, read_queue_nums=4, write_queue_nums=4, perm=perm) for name in names}


def addresses(routes: RouteManager, topic: str = "T") -> dict[str, dict[int, str]]:
    route = routes.route(topic)
    return {} if route is None else {data.broker_name: data.broker_addrs for data in route.broker_datas}


def perm(routes: RouteManager, topic: str = "T", broker: str = "broker-a") -> int:
    route = routes.route(topic)
    assert route is not None
    return {queues.broker_name: queues.perm for queues in route.queue_datas}[broker]


def group_of_three() -> RouteManager:
    routes = RouteManager()
    routes.register(registration(0), 0.0)
    routes.register(registration(1, broker_id=2), 0.0)
    routes.register(registration(2, broker_id=3), 0.0)
    return routes


def test_a_group_shows_up_in_all_four_tables() -> None:
    routes = group_of_three()
    assert addresses(routes) == {"broker-a": {0: "10.0.0.0:10911", 2: "10.0.0.1:10911", 3: "10.0.0.2:10911"}}
    info = routes.cluster_info()
    assert info.cluster_addr_table == {"C": ["broker-a"]}
    assert info.broker_addr_table["broker-a"].cluster == "C"
    assert [(live.broker_id, live.connection) for live in routes.live_brokers()] == [
        (0, "connection 0"),
        (2, "connection 1"),
        (3, "connection 2"),
    ]
    assert routes.topics() == ["T", "U"]


def test_followers_learn_their_leader_and_bring_no_topics() -> None:
    routes = RouteManager()
    assert routes.register(registration(1, broker_id=2), 0.0) == Registered(None, None)
    assert routes.topics() == []
    assert routes.register(registration(0), 0.0) == Registered()
    assert routes.register(registration(1, broker_id=2), 0.0) == Registered("10.0.0.0:10911", "10.0.0.0:10912")


def test_a_new_leader_takes_over_and_the_old_one_becomes_a_follower() -> None:
    routes = group_of_three()
    routes.register(registration(1, raft_term=2), 1.0)
    assert addresses(routes) == {"broker-a": {0: "10.0.0.1:10911", 3: "10.0.0.2:10911"}}
    routes.register(registration(0, broker_id=1, raft_term=2), 1.0)
    assert addresses(routes) == {
        "broker-a": {0: "10.0.0.1:10911", 1: "10.0.0.0:10911", 3: "10.0.0.2:10911"},
    }


def test_scenario_31_a_leader_of_an_older_term_is_ignored() -> None:
    routes = group_of_three()
    routes.register(registration(1, raft_term=5), 1.0)
    result = routes.register(registration(2, raft_term=4), 1.0)
    assert isinstance(result, Ignored)
    assert "term 4 is over" in result.reason
    assert addresses(routes)["broker-a"][0] == "10.0.0.1:10911"
    assert addresses(routes)["broker-a"][3] == "10.0.0.2:10911"


def test_the_newest_term_outlives_all_connections_of_its_group() -> None:
    routes = group_of_three()
    routes.register(registration(1, raft_term=5), 1.0)
    for number in range(3):
        routes.connection_lost(CONNECTIONS[number])
    assert addresses(routes) == {}
    assert isinstance(routes.register(registration(0, raft_term=4), 2.0), Ignored)
    assert addresses(routes) == {}
    assert isinstance(routes.register(registration(0, raft_term=6), 2.0), Registered)


def test_a_late_registration_of_the_same_broker_is_ignored() -> None:
    routes = group_of_three()
    routes.register(registration(1, raft_term=2), 1.0)
    assert isinstance(routes.register(registration(1, broker_id=2, raft_term=1), 1.0), Ignored)
    assert addresses(routes)["broker-a"][0] == "10.0.0.1:10911"


def test_another_raft_group_under_a_living_name_is_refused() -> None:
    routes = group_of_three()
    result = routes.register(registration(7, raft_group=UUID_B, raft_term=99), 1.0)
    assert isinstance(result, Refused)
    assert UUID_A in result.reason and UUID_B in result.reason
    assert isinstance(routes.register(registration(7, raft_group=None, raft_term=None), 1.0), Refused)
    for number in range(3):
        routes.connection_lost(CONNECTIONS[number])
    assert isinstance(routes.register(registration(7, raft_group=UUID_B, raft_term=1), 2.0), Registered)
    assert addresses(routes) == {"broker-a": {0: "10.0.0.7:10911"}}


def test_terms_of_different_groups_are_not_compared() -> None:
    routes = RouteManager()
    routes.register(registration(0, raft_term=50), 0.0)
    routes.connection_lost(CONNECTIONS[0])
    assert isinstance(routes.register(registration(0, raft_group=UUID_B, raft_term=1), 0.0), Registered)


def test_a_wiped_node_may_come_back_at_its_address_with_a_new_group() -> None:
    routes = RouteManager()
    routes.register(registration(0, raft_term=50), 0.0)
    assert isinstance(routes.register(registration(0, raft_group=UUID_B, raft_term=1), 0.0), Registered)


@pytest.mark.parametrize("way", ["connection", "unregister", "expiry"])
def test_the_last_address_takes_the_broker_out_of_every_table(way: str) -> None:
    routes = RouteManager()
    routes.register(registration(0), 0.0)
    routes.register(registration(5, broker_name="broker-b", topics=topics("T"), raft_group=UUID_B), 100.0)
    if way == "connection":
        gone = routes.connection_lost(CONNECTIONS[0])
        assert [live.address for live in gone] == ["10.0.0.0:10911"]
    elif way == "unregister":
        assert routes.unregister("C", "10.0.0.0:10911")
        assert not routes.unregister("C", "10.0.0.0:10911")
    else:
        assert routes.expire(119.9) == []
        assert [live.broker_name for live in routes.expire(120.1)] == ["broker-a"]
    assert addresses(routes) == {"broker-b": {0: "10.0.0.5:10911"}}
    assert routes.route("U") is None
    assert routes.topics() == ["T"]
    assert routes.cluster_info().cluster_addr_table == {"C": ["broker-b"]}
    assert [live.broker_name for live in routes.live_brokers()] == ["broker-b"]


def test_without_its_leader_a_group_stays_readable() -> None:
    routes = group_of_three()
    routes.connection_lost(CONNECTIONS[0])
    assert addresses(routes) == {"broker-a": {2: "10.0.0.1:10911", 3: "10.0.0.2:10911"}}


def test_an_old_connection_that_ends_late_removes_nothing() -> None:
    routes = RouteManager()
    routes.register(registration(0), 0.0)
    routes.register(registration(0, connection="a newer connection"), 1.0)
    assert routes.connection_lost(CONNECTIONS[0]) == []
    assert addresses(routes) == {"broker-a": {0: "10.0.0.0:10911"}}


def test_a_broker_may_ask_for_another_expiry() -> None:
    routes = RouteManager()
    routes.register(registration(0, expiry_s=10.0), 0.0)
    assert routes.expire(9.9) == []
    assert len(routes.expire(10.1)) == 1


def test_an_unchanged_data_version_counts_as_a_sign_of_life() -> None:
    routes = RouteManager()
    version = DataVersion(counter=1, state_version=1, timestamp=1)
    assert routes.query_data_version("C", "10.0.0.0:10911", "broker-a", 0, version, 0.0) == (True, None)
    routes.register(registration(0), 0.0)
    assert routes.query_data_version("C", "10.0.0.0:10911", "broker-a", 0, version, 100.0) == (False, version)
    newer = DataVersion(counter=2, state_version=1, timestamp=2)
    assert routes.query_data_version("C", "10.0.0.0:10911", "broker-a", 0, newer, 150.0) == (True, version)
    assert routes.expire(219.9) == []
    assert len(routes.expire(220.1)) == 1


def test_scenario_31_a_deposed_leader_is_told_to_register_again() -> None:
    routes = group_of_three()
    routes.register(registration(1, raft_term=2), 1.0)
    version = DataVersion(counter=1, state_version=1, timestamp=1)
    assert routes.query_data_version("C", "10.0.0.0:10911", "broker-a", 0, version, 1.0)[0] is True


def test_heartbeats_keep_a_broker_alive() -> None:
    routes = RouteManager()
    routes.heartbeat("C", "10.0.0.0:10911", 0.0)
    assert routes.live_brokers() == []
    routes.register(registration(0), 0.0)
    routes.heartbeat("C", "10.0.0.0:10911", 100.0, expiry_s=5.0)
    assert routes.expire(104.0) == []
    assert len(routes.expire(106.0)) == 1


def test_topics_change_only_with_the_data_version() -> None:
    routes = RouteManager()
    routes.register(registration(0), 0.0)
    routes.register(registration(0, topics=topics("T", "V", perm=4)), 1.0)
    assert perm(routes, "T") == 6  # same version: what is there stays
    assert perm(routes, "V") == 4  # what is missing is added
    routes.register(registration(0, topics=topics("T", perm=4), data_version=DataVersion(counter=2)), 2.0)
    assert perm(routes, "T") == 4
    assert routes.topics() == ["T", "U", "V"]  # a topic no longer named stays, as in RocketMQ
    routes.register(registration(0, topics=topics("T")), 3.0, drop_missing_topics=True)
    assert routes.topics() == ["T"]


def test_a_follower_with_a_newer_version_does_not_hide_the_leaders_change() -> None:
    routes = group_of_three()
    newer = DataVersion(counter=2, state_version=2, timestamp=2)
    routes.register(registration(1, broker_id=2, data_version=newer, raft_term=2), 1.0)
    routes.register(registration(1, data_version=newer, raft_term=2, topics=topics("T", perm=4)), 1.0)
    assert perm(routes, "T") == 4


def test_wiped_permissions_last_until_they_are_added_again() -> None:
    routes = RouteManager()
    routes.register(registration(0, topics=topics("T", perm=7)), 0.0)
    assert routes.topic_count("broker-a") == 1
    routes.set_wiped(frozenset({"broker-a"}))
    assert perm(routes) == 5
    routes.register(registration(0, topics=topics("T", perm=7), data_version=DataVersion(counter=2)), 1.0)
    assert perm(routes) == 5
    routes.set_wiped(frozenset())
    assert perm(routes) == 6
    assert routes.add_write_perm("broker-b") == 0
    assert routes.add_write_perm("broker-a") == 1


def test_topics_are_deleted_for_all_or_for_one_cluster() -> None:
    routes = RouteManager()
    routes.register(registration(0), 0.0)
    routes.register(registration(5, broker_name="broker-b", cluster="D", raft_group=UUID_B), 0.0)
    routes.delete_topic("T", "D")
    assert list(addresses(routes)) == ["broker-a"]
    routes.delete_topic("T")
    assert routes.route("T") is None
    routes.delete_topic("nothing")
    assert list(addresses(routes, "U")) == ["broker-a", "broker-b"]
    assert routes.topics_of_cluster("C") == ["U"]
    assert routes.topics_of_cluster("none") == []


def test_system_topics_are_the_names_of_clusters_and_brokers() -> None:
    assert RouteManager().system_topics() == ([], None)
    assert group_of_three().system_topics() == (["C", "broker-a"], "10.0.0.0:10911")


def test_unit_topics_follow_their_flags() -> None:
    routes = RouteManager()
    table = {
        f"T{flag}": TopicConfig(topic_name=f"T{flag}", read_queue_nums=1, write_queue_nums=1, topic_sys_flag=flag)
        for flag in range(4)
    }
    routes.register(registration(0, topics=table), 0.0)
    assert routes.unit_topics() == ["T1", "T3"]
    assert routes.unit_subscription_topics() == ["T2", "T3"]
    assert routes.ununit_subscription_topics() == ["T2"]


def test_a_broker_that_changes_its_name_or_cluster_leaves_the_old_one() -> None:
    routes = RouteManager()
    routes.register(registration(0), 0.0)
    routes.register(registration(0, broker_name="broker-b"), 1.0)
    assert list(addresses(routes)) == ["broker-b"]
    assert routes.cluster_info().cluster_addr_table == {"C": ["broker-b"]}
    routes.register(registration(1, broker_name="broker-b", broker_id=2, cluster="D"), 1.0)
    assert routes.cluster_info().cluster_addr_table == {"D": ["broker-b"]}


def test_member_group() -> None:
    routes = group_of_three()
    assert list(routes.member_group("C", "broker-a").broker_addrs) == [0, 2, 3]
    assert routes.member_group("D", "broker-a").broker_addrs == {}
    assert routes.member_group("C", "broker-x").broker_addrs == {}


class TestApacheBrokers:
    """Brokers without a raft group are held to RocketMQ's own rules."""

    def register(self, routes: RouteManager, number: int, **changes: Any) -> object:
        return routes.register(registration(number, raft_group=None, raft_term=None, **changes), 0.0)

    def test_an_id_goes_to_the_newer_state_version(self) -> None:
        routes = RouteManager()
        self.register(routes, 0, data_version=DataVersion(state_version=2))
        assert isinstance(self.register(routes, 1, data_version=DataVersion(state_version=1)), Ignored)
        assert addresses(routes) == {"broker-a": {0: "10.0.0.0:10911"}}
        assert isinstance(self.register(routes, 1, data_version=DataVersion(state_version=2)), Registered)
        assert addresses(routes) == {"broker-a": {0: "10.0.0.1:10911"}}

    def test_a_first_registration_must_be_complete(self) -> None:
        routes = RouteManager()
        assert self.register(routes, 0, topics=topics("T")) == Refused("register broker failed")
        assert isinstance(self.register(routes, 0), Registered)
        assert isinstance(self.register(routes, 0, topics=topics("V")), Registered)
        assert routes.topics() == ["T", "U", "V"]

    def test_a_raft_group_may_have_a_single_topic(self) -> None:
        routes = RouteManager()
        assert isinstance(routes.register(registration(0, topics=topics("T")), 0.0), Registered)


def test_terms_are_kept_for_a_bounded_number_of_groups() -> None:
    routes = RouteManager()
    for number in range(1_500):
        routes.register(registration(0, raft_group=f"{number:032x}", raft_term=9), 0.0)
    routes.connection_lost(CONNECTIONS[0])
    assert len(routes._leader_terms) == 1_000
    assert isinstance(routes.register(registration(0, raft_group=f"{1_499:032x}", raft_term=8), 0.0), Ignored)


def test_live_brokers_compare_by_identity() -> None:
    routes = group_of_three()
    assert all(isinstance(live, LiveBroker) for live in routes.live_brokers())
