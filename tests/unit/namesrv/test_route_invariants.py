"""Whatever brokers do, the four tables agree with each other."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from namesrv.route_manager import Ignored, Registered, Registration, RouteManager
from remoting.bodies import DataVersion, TopicConfig

CONNECTIONS = [f"connection {number}" for number in range(4)]
brokers = st.sampled_from(["a", "b"])
clusters = st.sampled_from(["C", "D"])
numbers = st.integers(0, 3)


class Brokers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.routes = RouteManager()
        self.now = 0.0
        self.leaders: dict[str, int] = {}

    @rule(
        broker=brokers,
        cluster=clusters,
        broker_id=st.sampled_from([0, 0, 0, 1, 2]),
        number=numbers,
        term=st.integers(1, 5),
        group=st.sampled_from(["aa", "aa", "aa", "bb", None]),
        version=st.integers(0, 2),
        names=st.sets(st.sampled_from(["T", "U", "V"]), min_size=0),
        drop=st.booleans(),
    )
    def register(
        self,
        broker: str,
        cluster: str,
        broker_id: int,
        number: int,
        term: int,
        group: str | None,
        version: int,
        names: set[str],
        drop: bool,
    ) -> None:
        result = self.routes.register(
            Registration(
                cluster=cluster,
                broker_name=broker,
                broker_id=broker_id,
                address=f"10.0.0.{number}:1",
                connection=CONNECTIONS[number],
                topics={name: TopicConfig(topic_name=name) for name in sorted(names)},
                data_version=DataVersion(counter=version),
                raft_term=term if group else None,
                raft_group=group,
            ),
            self.now,
            drop_missing_topics=drop,
        )
        if isinstance(result, Registered):
            held = self.routes.cluster_info().broker_addr_table[broker].broker_addrs
            assert held[broker_id] == f"10.0.0.{number}:1"
            if group and broker_id == 0:
                assert term >= self.leaders.get(group, 0)
                self.leaders[group] = term
        elif isinstance(result, Ignored) and group and broker_id == 0:
            assert result.reason

    @rule(number=numbers)
    def lose(self, number: int) -> None:
        self.routes.connection_lost(CONNECTIONS[number])
        assert all(live.connection is not CONNECTIONS[number] for live in self.routes.live_brokers())

    @rule(cluster=clusters, number=numbers)
    def sign_off(self, cluster: str, number: int) -> None:
        self.routes.unregister(cluster, f"10.0.0.{number}:1")

    @rule(seconds=st.integers(1, 130))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.routes.expire(self.now)
        assert all(live.last_seen + live.expiry_s >= self.now for live in self.routes.live_brokers())

    @rule(wiped=st.frozensets(brokers))
    def wipe(self, wiped: frozenset[str]) -> None:
        self.routes.set_wiped(wiped)

    @rule(topic=st.sampled_from(["T", "U"]), cluster=st.sampled_from([None, "C", "D"]))
    def delete_topic(self, topic: str, cluster: str | None) -> None:
        self.routes.delete_topic(topic, cluster)

    @invariant()
    def tables_agree(self) -> None:
        info = self.routes.cluster_info()
        groups = info.broker_addr_table
        listed = [name for names in info.cluster_addr_table.values() for name in names]
        assert sorted(listed) == sorted(groups)
        assert all(info.cluster_addr_table.values())
        for name, data in groups.items():
            assert data.broker_addrs
            assert len(set(data.broker_addrs.values())) == len(data.broker_addrs)
            assert name in info.cluster_addr_table[data.cluster]
        live = {broker.address for broker in self.routes.live_brokers()}
        for data in groups.values():
            assert set(data.broker_addrs.values()) <= live
        for topic in self.routes.topics():
            route = self.routes.route(topic)
            assert route is not None
            assert [queues.broker_name for queues in route.queue_datas] == [
                data.broker_name for data in route.broker_datas
            ]
            assert all(queues.broker_name in groups for queues in route.queue_datas)


TestBrokers = Brokers.TestCase
TestBrokers.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
