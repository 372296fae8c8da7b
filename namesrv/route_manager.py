"""The four tables of a name server and their rules, without I/O: topic queues, brokers, clusters, live brokers.

RocketMQ's rules (semantics.md 12) with two of our own for raft groups (design.md 4): a registration as leader of a
lower term than one already seen is ignored, and a second raft group under a broker name that lives is refused. Terms
are only compared within one group uuid. Brokers that send neither (Apache's own) are held to RocketMQ's rules alone.

Times are seconds of a monotonic clock; a connection is any object, compared by identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import define, field, frozen

from remoting.bodies import BrokerData, BrokerMemberGroup, ClusterInfo, DataVersion, QueueData, TopicConfig
from remoting.bodies import TopicRouteData as Route
from remoting.codes import MASTER_ID, PERM_READ_WRITE, PERM_WRITE, TOPIC_UNIT, TOPIC_UNIT_SUBSCRIPTION

EXPIRY_S = 120.0
_TERMS_KEPT = 1_000


@frozen
class Registration:
    """One REGISTER_BROKER, decoded."""

    cluster: str
    broker_name: str
    broker_id: int
    address: str
    connection: object
    topics: Mapping[str, TopicConfig]
    data_version: DataVersion
    ha_server_address: str = ""
    expiry_s: float = EXPIRY_S
    enable_acting_master: bool = False
    zone_name: str | None = None
    raft_term: int | None = None
    raft_group: str | None = None
    """Uuid of the broker's raft group, in hex."""

    @property
    def is_leader(self) -> bool:
        return self.broker_id == MASTER_ID


@frozen
class Registered:
    """Accepted. Followers learn their leader's addresses."""

    master_address: str | None = None
    ha_server_address: str | None = None


@frozen
class Ignored:
    """Out of date, or too early; nothing was changed."""

    reason: str


@frozen
class Refused:
    """Against the rules; the broker's operator has to act."""

    reason: str


@define(eq=False)
class LiveBroker:
    """One broker process that registered and has neither gone silent nor lost its connection."""

    cluster: str
    broker_name: str
    broker_id: int
    address: str
    connection: object
    last_seen: float
    expiry_s: float
    data_version: DataVersion
    ha_server_address: str
    raft_term: int | None
    raft_group: str | None


@define
class _Group:
    """All addresses of one broker name."""

    cluster: str
    addresses: dict[int, str] = field(factory=dict)
    enable_acting_master: bool = False
    zone_name: str | None = None
    topics_version: DataVersion | None = None
    """Version of the topic table last taken over from this group."""


class RouteManager:
    """Routes of all brokers that live. Not thread-safe; every method is synchronous."""

    def __init__(self) -> None:
        self._topics: dict[str, dict[str, QueueData]] = {}
        self._groups: dict[str, _Group] = {}
        self._clusters: dict[str, dict[str, None]] = {}  # ordered sets of broker names
        self._live: dict[tuple[str, str], LiveBroker] = {}
        self._leader_terms: dict[str, int] = {}
        self._wiped: frozenset[str] = frozenset()

    # ------------------------------------------------------------------------------------------------ registration

    def register(
        self, registration: Registration, now: float, *, drop_missing_topics: bool = False
    ) -> Registered | Ignored | Refused:
        """Take over one registration. With `drop_missing_topics` a leader's topics it no longer names are removed."""
        obstacle = self._obstacle(registration)
        if obstacle is not None:
            return obstacle
        key = (registration.cluster, registration.address)
        before = self._live.get(key)
        if before is not None and before.broker_name != registration.broker_name:
            self._remove(before)
        group = self._groups.get(registration.broker_name)
        if group is not None and group.cluster != registration.cluster:
            self._leave_cluster(registration.broker_name, group)
        if group is None:
            group = self._groups[registration.broker_name] = _Group(registration.cluster)
        group.cluster = registration.cluster
        group.enable_acting_master = registration.enable_acting_master
        group.zone_name = registration.zone_name
        self._clusters.setdefault(registration.cluster, {})[registration.broker_name] = None

        # The same address under another id is the same process in a new role.
        for other_id in [number for number, address in group.addresses.items() if address == registration.address]:
            del group.addresses[other_id]
        group.addresses[registration.broker_id] = registration.address

        if registration.is_leader:
            self._remember_term(registration)
            self._take_topics(registration, group, drop_missing_topics)
        self._live[key] = LiveBroker(
            cluster=registration.cluster,
            broker_name=registration.broker_name,
            broker_id=registration.broker_id,
            address=registration.address,
            connection=registration.connection,
            last_seen=now,
            expiry_s=registration.expiry_s,
            data_version=registration.data_version,
            ha_server_address=registration.ha_server_address,
            raft_term=registration.raft_term,
            raft_group=registration.raft_group,
        )
        if registration.is_leader:
            return Registered()
        leader = group.addresses.get(MASTER_ID)
        live = self._live.get((registration.cluster, leader)) if leader is not None else None
        return Registered(leader, live.ha_server_address if live is not None else None)

    def _obstacle(self, registration: Registration) -> Ignored | Refused | None:
        """Why this registration must not be taken over, if it must not."""
        others = [
            live
            for live in self._live.values()
            if live.broker_name == registration.broker_name and live.address != registration.address
        ]
        for live in others:
            if live.raft_group != registration.raft_group:
                return Refused(
                    f"broker name {registration.broker_name} belongs to raft group {live.raft_group or '(none)'},"
                    f" which lives at {live.address}; group {registration.raft_group or '(none)'} must use another name"
                )
        group = self._groups.get(registration.broker_name)
        if registration.raft_group is not None:
            return self._stale_term(registration)
        taken_by = group.addresses.get(registration.broker_id) if group is not None else None
        if taken_by is not None and taken_by != registration.address:
            holder = self._live.get((registration.cluster, taken_by))
            if holder is not None and holder.data_version.state_version > registration.data_version.state_version:
                self._live.pop((registration.cluster, registration.address), None)
                return Ignored(f"id {registration.broker_id} is held by {taken_by} with a newer state version")
        if taken_by is None and len(registration.topics) == 1:
            # 5.x brokers announce a single new topic incrementally; without the full table before, it means nothing.
            return Refused("register broker failed")
        return None

    def _stale_term(self, registration: Registration) -> Ignored | None:
        term = registration.raft_term or 0
        newest = self._leader_terms.get(registration.raft_group or "", 0)
        if registration.is_leader and term < newest:
            return Ignored(f"term {term} is over: a leader of term {newest} has registered")
        before = self._live.get((registration.cluster, registration.address))
        if before is not None and before.raft_group == registration.raft_group and term < (before.raft_term or 0):
            return Ignored(f"term {term} is older than this broker's last registration ({before.raft_term})")
        return None

    def _remember_term(self, registration: Registration) -> None:
        if registration.raft_group is None:
            return
        self._leader_terms.pop(registration.raft_group, None)
        self._leader_terms[registration.raft_group] = registration.raft_term or 0
        while len(self._leader_terms) > _TERMS_KEPT:
            del self._leader_terms[next(iter(self._leader_terms))]

    def _take_topics(self, registration: Registration, group: _Group, drop_missing: bool) -> None:
        name = registration.broker_name
        changed = group.topics_version != registration.data_version
        group.topics_version = registration.data_version
        for topic, config in registration.topics.items():
            queues = self._topics.setdefault(topic, {})
            if changed or name not in queues:
                perm = config.perm & ~PERM_WRITE if name in self._wiped else config.perm
                queues[name] = QueueData(
                    broker_name=name,
                    read_queue_nums=config.read_queue_nums,
                    write_queue_nums=config.write_queue_nums,
                    perm=perm,
                    topic_sys_flag=config.topic_sys_flag,
                )
        if drop_missing:
            self._drop_queues(name, (topic for topic in list(self._topics) if topic not in registration.topics))

    # --------------------------------------------------------------------------------------------------- departure

    def unregister(self, cluster: str, address: str) -> bool:
        """A broker signs off. False where it was not known."""
        live = self._live.get((cluster, address))
        if live is None:
            return False
        self._remove(live)
        return True

    def connection_lost(self, connection: object) -> list[LiveBroker]:
        """Remove every broker that registered last over this connection; returns them."""
        return self._remove_all([live for live in self._live.values() if live.connection is connection])

    def expire(self, now: float) -> list[LiveBroker]:
        """Remove every broker that has been silent too long; returns them, their connections are to be closed."""
        return self._remove_all([live for live in self._live.values() if live.last_seen + live.expiry_s < now])

    def _remove_all(self, gone: list[LiveBroker]) -> list[LiveBroker]:
        for live in gone:
            self._remove(live)
        return gone

    def _remove(self, live: LiveBroker) -> None:
        self._live.pop((live.cluster, live.address), None)
        group = self._groups.get(live.broker_name)
        if group is None:
            return
        for number in [number for number, address in group.addresses.items() if address == live.address]:
            del group.addresses[number]
        if not group.addresses:
            del self._groups[live.broker_name]
            self._leave_cluster(live.broker_name, group)
            self._drop_queues(live.broker_name, list(self._topics))

    def _leave_cluster(self, broker_name: str, group: _Group) -> None:
        names = self._clusters.get(group.cluster)
        if names is not None:
            names.pop(broker_name, None)
            if not names:
                del self._clusters[group.cluster]

    def _drop_queues(self, broker_name: str, topics: Iterable[str]) -> None:
        for topic in topics:
            queues = self._topics[topic]
            queues.pop(broker_name, None)
            if not queues:
                del self._topics[topic]

    # ------------------------------------------------------------------------------------------------- sign of life

    def query_data_version(
        self, cluster: str, address: str, broker_name: str, broker_id: int, version: DataVersion, now: float
    ) -> tuple[bool, DataVersion | None]:
        """(whether a full registration is needed, the version held). An unchanged one counts as a sign of life."""
        live = self._live.get((cluster, address))
        if live is None:
            return True, None
        group = self._groups.get(broker_name)
        placed = group is not None and group.addresses.get(broker_id) == address
        changed = live.data_version != version or not placed
        if not changed:
            live.last_seen = now
        return changed, live.data_version

    def heartbeat(self, cluster: str, address: str, now: float, expiry_s: float | None = None) -> None:
        """A sign of life (BROKER_HEARTBEAT); a broker that is not registered stays so."""
        live = self._live.get((cluster, address))
        if live is not None:
            live.last_seen = now
            if expiry_s is not None:
                live.expiry_s = expiry_s

    # ----------------------------------------------------------------------------------------------------- answers

    def route(self, topic: str) -> Route | None:
        """Queues of a topic and the brokers that hold them; None where no broker that lives has it."""
        queues = self._topics.get(topic)
        if not queues:
            return None
        names = sorted(queues)
        return Route(
            queue_datas=[queues[name] for name in names], broker_datas=[self._broker_data(name) for name in names]
        )

    def _broker_data(self, broker_name: str) -> BrokerData:
        group = self._groups[broker_name]
        return BrokerData(
            broker_name=broker_name,
            cluster=group.cluster,
            broker_addrs=dict(sorted(group.addresses.items())),
            enable_acting_master=group.enable_acting_master,
            zone_name=group.zone_name,
        )

    def cluster_info(self) -> ClusterInfo:
        return ClusterInfo(
            broker_addr_table={name: self._broker_data(name) for name in sorted(self._groups)},
            cluster_addr_table={cluster: sorted(names) for cluster, names in sorted(self._clusters.items())},
        )

    def member_group(self, cluster: str, broker_name: str) -> BrokerMemberGroup:
        """Addresses of one group; empty where it is not known."""
        group = self._groups.get(broker_name)
        addresses = dict(sorted(group.addresses.items())) if group is not None and group.cluster == cluster else {}
        return BrokerMemberGroup(broker_addrs=addresses, broker_name=broker_name, cluster=cluster)

    def topics(self) -> list[str]:
        """All topics, sorted."""
        return sorted(self._topics)

    def topics_of_cluster(self, cluster: str) -> list[str]:
        """Topics with queues on brokers of one cluster, sorted."""
        names = self._clusters.get(cluster, {})
        return sorted(topic for topic, queues in self._topics.items() if any(name in names for name in queues))

    def system_topics(self) -> tuple[list[str], str | None]:
        """(the topics that bear the names of clusters and brokers, the address of some broker)."""
        topics = dict.fromkeys([*self._clusters, *self._groups])
        addresses = [address for group in self._groups.values() for address in group.addresses.values()]
        return list(topics), min(addresses, default=None)

    def unit_topics(self) -> list[str]:
        """Topics with the unit flag, sorted."""
        return self._flagged(TOPIC_UNIT, TOPIC_UNIT)

    def unit_subscription_topics(self) -> list[str]:
        """Topics with the unit-subscription flag, sorted."""
        return self._flagged(TOPIC_UNIT_SUBSCRIPTION, TOPIC_UNIT_SUBSCRIPTION)

    def ununit_subscription_topics(self) -> list[str]:
        """Topics with the unit-subscription flag and without the unit flag, sorted."""
        return self._flagged(TOPIC_UNIT | TOPIC_UNIT_SUBSCRIPTION, TOPIC_UNIT_SUBSCRIPTION)

    def _flagged(self, mask: int, wanted: int) -> list[str]:
        return sorted(
            topic
            for topic, queues in self._topics.items()
            if next(iter(queues.values())).topic_sys_flag & mask == wanted
        )

    def live_brokers(self) -> list[LiveBroker]:
        """All brokers that live, by cluster and address."""
        return [self._live[key] for key in sorted(self._live)]

    # ---------------------------------------------------------------------------------------------- administration

    def set_wiped(self, broker_names: frozenset[str]) -> None:
        """Take the list of brokers without write permission, as the control plane has it now."""
        for name in sorted(broker_names - self._wiped):
            for queues in self._topics.values():
                if name in queues:
                    queues[name] = _with_perm(queues[name], queues[name].perm & ~PERM_WRITE)
        for name in sorted(self._wiped - broker_names):
            self.add_write_perm(name)
        self._wiped = broker_names

    def add_write_perm(self, broker_name: str) -> int:
        """Set permission 6, as RocketMQ does, on all topics of a broker name; returns their number."""
        for queues in self._topics.values():
            if broker_name in queues:
                queues[broker_name] = _with_perm(queues[broker_name], PERM_READ_WRITE)
        return self.topic_count(broker_name)

    def topic_count(self, broker_name: str) -> int:
        """How many topics have queues on a broker name."""
        return sum(broker_name in queues for queues in self._topics.values())

    def delete_topic(self, topic: str, cluster: str | None = None) -> None:
        """Forget a topic, or its queues on one cluster's brokers. It returns if a broker still registers it."""
        queues = self._topics.get(topic)
        if queues is None:
            return
        names = self._clusters.get(cluster, {}) if cluster else queues
        for name in list(names):
            queues.pop(name, None)
        if not queues:
            del self._topics[topic]


def _with_perm(queues: QueueData, perm: int) -> QueueData:
    return QueueData(
        broker_name=queues.broker_name,
        read_queue_nums=queues.read_queue_nums,
        write_queue_nums=queues.write_queue_nums,
        perm=perm,
        topic_sys_flag=queues.topic_sys_flag,
    )
