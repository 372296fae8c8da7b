"""Who is connected: members of consumer and producer groups by connection (semantics.md 5).

Soft state of this node alone, filled by heartbeats: clients send them to every node they know, so followers keep their
own tables. A member goes with its connection, on UNREGISTER_CLIENT, or after 120 s without a heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from attrs import Factory, define

from broker.subscriptions import Subscription

SCAN_INTERVAL_S: Final = 10.0
GROUPS_PER_CONNECTION_MAX: Final = 10_000
"""A connection that claims more groups than any client has is not believed further."""

_MEMBERSHIP: Final = "memberships"


@define(eq=False)
class Member:
    """One client on one connection."""

    conn: Any
    client_id: str
    language: str
    version: int
    last_seen: float
    """Monotonic seconds."""
    last_seen_ms: int
    """Wall time, for people."""


@define(eq=False)
class ConsumerGroup:
    """Members of one consumer group and the one subscription table they share; the last writer wins."""

    name: str
    consume_type: str
    message_model: str
    consume_from_where: str
    members: dict[Any, Member] = Factory(dict)
    subscriptions: dict[str, Subscription] = Factory(dict)

    def client_ids(self) -> list[str]:
        """Without duplicates, in order of first arrival."""
        return list(dict.fromkeys(member.client_id for member in self.members.values()))

    def find(self, client_id: str) -> Member | None:
        """The newest connection of a client."""
        found = None
        for member in self.members.values():
            if member.client_id == client_id:
                found = member
        return found


class _Memberships:
    """The groups of one connection, kept at the connection so that its end costs no search."""

    __slots__ = ("consumers", "producers")

    def __init__(self) -> None:
        self.consumers: dict[str, None] = {}
        self.producers: dict[str, None] = {}


def _memberships(conn: Any) -> _Memberships:
    found: _Memberships | None = conn.attributes.get(_MEMBERSHIP)
    if found is None:
        found = conn.attributes[_MEMBERSHIP] = _Memberships()
    return found


class ClientTable:
    """`notify(group)` is called when members or topics of a consumer group have changed."""

    def __init__(self, expiry_s: float, notify: Callable[[ConsumerGroup], None]) -> None:
        self._expiry_s = expiry_s
        self._notify = notify
        self._consumers: dict[str, ConsumerGroup] = {}
        self._producers: dict[str, dict[Any, Member]] = {}

    # --------------------------------------------------------------------------------------------------- reading

    def consumer_group(self, name: str) -> ConsumerGroup | None:
        """The group if it has a connected member."""
        return self._consumers.get(name)

    def consumer_groups(self) -> Iterable[ConsumerGroup]:
        return self._consumers.values()

    def producers(self, group: str) -> list[Member]:
        return list(self._producers.get(group, {}).values())

    def producer_groups(self) -> dict[str, list[Member]]:
        return {name: list(members.values()) for name, members in self._producers.items()}

    def groups_of_topic(self, topic: str) -> list[str]:
        """Consumer groups with a connected member that subscribes to the topic."""
        return [group.name for group in self._consumers.values() if topic in group.subscriptions]

    # ------------------------------------------------------------------------------------------------ heartbeats

    def heartbeat_consumer(
        self,
        conn: Any,
        client_id: str,
        language: str,
        version: int,
        group_name: str,
        settings: tuple[str, str, str],
        subscriptions: list[Subscription] | None,
        now: float,
        wall_ms: int,
        *,
        notify: bool = True,
    ) -> bool:
        """One consumer group of a heartbeat. `settings` are consume type, message model and consume-from-where.

        `subscriptions` None means that the heartbeat left them out on purpose (heartbeat V2): nothing is replaced.
        Answers whether members or topics changed; with `notify` the members hear of it.
        """
        group = self._consumers.get(group_name)
        if group is None:
            own = _memberships(conn).consumers
            if len(own) >= GROUPS_PER_CONNECTION_MAX:
                return False
            group = self._consumers[group_name] = ConsumerGroup(group_name, *settings)
        member = group.members.get(conn)
        changed = member is None or member.client_id != client_id
        if member is None:
            _memberships(conn).consumers[group_name] = None
            group.members[conn] = Member(conn, client_id, language, version, now, wall_ms)
        else:
            member.client_id, member.language, member.version = client_id, language, version
            member.last_seen, member.last_seen_ms = now, wall_ms
        group.consume_type, group.message_model, group.consume_from_where = settings
        if subscriptions is not None:
            changed |= self._replace_subscriptions(group, subscriptions)
        if changed and notify:
            self._notify(group)
        return changed

    @staticmethod
    def _replace_subscriptions(group: ConsumerGroup, subscriptions: list[Subscription]) -> bool:
        changed = False
        table = group.subscriptions
        wanted = {subscription.topic for subscription in subscriptions}
        for topic in [topic for topic in table if topic not in wanted]:
            del table[topic]
            changed = True
        for subscription in subscriptions:
            old = table.get(subscription.topic)
            if old is None:
                changed = True
                table[subscription.topic] = subscription
            elif subscription.version > old.version or (subscription.version == old.version and subscription != old):
                # Go sends version 0 always, so an equal version with other content counts as newer.
                table[subscription.topic] = subscription
        return changed

    def heartbeat_producer(
        self, conn: Any, client_id: str, language: str, version: int, group_name: str, now: float, wall_ms: int
    ) -> None:
        """One producer group of a heartbeat."""
        own = _memberships(conn).producers
        if group_name not in own:
            if len(own) >= GROUPS_PER_CONNECTION_MAX:
                return
            own[group_name] = None
        members = self._producers.setdefault(group_name, {})
        member = members.get(conn)
        if member is None:
            members[conn] = Member(conn, client_id, language, version, now, wall_ms)
        else:
            member.client_id, member.language, member.version = client_id, language, version
            member.last_seen, member.last_seen_ms = now, wall_ms

    # -------------------------------------------------------------------------------------------------- leaving

    def unregister(self, conn: Any, client_id: str, producer_group: str, consumer_group: str) -> None:
        """UNREGISTER_CLIENT: the client of this connection leaves the groups it names."""
        own = _memberships(conn)
        if producer_group and producer_group in own.producers:
            member = self._producers[producer_group].get(conn)
            if member is not None and member.client_id == client_id:
                self._leave_producers(own, producer_group, conn)
        if consumer_group and consumer_group in own.consumers:
            member = self._consumers[consumer_group].members.get(conn)
            if member is not None and member.client_id == client_id:
                self._leave_consumers(own, consumer_group, conn)

    def disconnected(self, conn: Any) -> None:
        """The connection has ended: its clients are gone from every group."""
        own: _Memberships | None = conn.attributes.get(_MEMBERSHIP)
        if own is None:
            return
        for name in list(own.producers):
            self._leave_producers(own, name, conn)
        for name in list(own.consumers):
            self._leave_consumers(own, name, conn)

    def expire(self, now: float) -> list[Any]:
        """Remove members silent for longer than the expiry; answers their connections, which are to be closed."""
        limit = now - self._expiry_s
        silent: dict[Any, None] = {}
        for group in self._consumers.values():
            silent.update((conn, None) for conn, member in group.members.items() if member.last_seen < limit)
        for members in self._producers.values():
            silent.update((conn, None) for conn, member in members.items() if member.last_seen < limit)
        for conn in silent:
            own = _memberships(conn)
            for name in list(own.producers):
                if self._producers[name][conn].last_seen < limit:
                    self._leave_producers(own, name, conn)
            for name in list(own.consumers):
                if self._consumers[name].members[conn].last_seen < limit:
                    self._leave_consumers(own, name, conn)
        return list(silent)

    def _leave_producers(self, own: _Memberships, name: str, conn: Any) -> None:
        del own.producers[name]
        members = self._producers[name]
        del members[conn]
        if not members:
            del self._producers[name]

    def _leave_consumers(self, own: _Memberships, name: str, conn: Any) -> None:
        del own.consumers[name]
        group = self._consumers[name]
        del group.members[conn]
        if group.members:
            self._notify(group)
        else:
            del self._consumers[name]
