"""Consumer offsets: committed in the log, with the leader's delta of one-way updates in front (design 4).

A one-way update only changes the delta; every 200 ms the delta becomes one META entry, so that much may be lost with a
leader and never more. Only committed offsets are ever answered, so an answered offset does not go back.
"""

from __future__ import annotations

from typing import Any, Final

from broker.tables import InvariantBroken

OffsetRow = list[Any]
"""[group, topic, queue id, offset], as it lies in the log."""

DELTA_LIMIT: Final = 65_536
ROWS_PER_ENTRY: Final = 4_096
"""With the longest names these are 1.7 MB, well below what an entry may hold."""


class OffsetTable:
    """Offsets by (group, topic) and queue; last write wins, as in RocketMQ."""

    __slots__ = ("_committed", "_delta", "_in_flight")

    def __init__(self) -> None:
        self._committed: dict[tuple[str, str], dict[int, int]] = {}
        self._delta: dict[tuple[str, str, int], int] = {}
        self._in_flight: dict[tuple[str, str, int], int] = {}
        """How many staged entries hold a change of the key."""

    # ------------------------------------------------------------------------------------------------------ reading

    def query(self, group: str, topic: str, queue_id: int) -> int | None:
        """The committed offset."""
        queues = self._committed.get((group, topic))
        return queues.get(queue_id) if queues is not None else None

    def has_unlogged(self, group: str, topic: str, queue_id: int) -> bool:
        """An update of this key was taken and is not committed yet: log it before answering a query."""
        key = (group, topic, queue_id)
        return key in self._delta or key in self._in_flight

    def topics_of(self, group: str) -> list[str]:
        return sorted(topic for owner, topic in self._committed if owner == group)

    def groups_of(self, topic: str) -> list[str]:
        return sorted(group for group, name in self._committed if name == topic)

    def groups(self) -> list[str]:
        return sorted({group for group, _topic in self._committed})

    def of_topic(self, group: str, topic: str) -> dict[int, int]:
        return dict(sorted(self._committed.get((group, topic), {}).items()))

    def all(self) -> dict[str, dict[int, int]]:
        """ "topic@group" -> queue id -> offset, as consumerOffset.json has it."""
        return {f"{topic}@{group}": dict(sorted(queues.items())) for (group, topic), queues in sorted(self._rows())}

    def _rows(self) -> list[tuple[tuple[str, str], dict[int, int]]]:
        return list(self._committed.items())

    # -------------------------------------------------------------------------------------------------- leader's side

    def update(self, group: str, topic: str, queue_id: int, offset: int) -> None:
        """A one-way update on the leader: in the log within `offsets_interval_ms`."""
        self._delta[group, topic, queue_id] = offset

    @property
    def delta_size(self) -> int:
        return len(self._delta)

    def take_delta(self) -> list[OffsetRow]:
        """The delta as rows for one META entry; it is empty afterwards."""
        rows = [[group, topic, queue_id, offset] for (group, topic, queue_id), offset in self._delta.items()]
        self._delta.clear()
        return rows

    def put_back(self, rows: list[OffsetRow]) -> None:
        """The entry could not be proposed; newer updates win."""
        for group, topic, queue_id, offset in rows:
            self._delta.setdefault((group, topic, queue_id), offset)

    def drop_delta(self) -> None:
        """Leadership is gone: what was not logged is lost, by contract."""
        self._delta.clear()

    # ------------------------------------------------------------------------------------------------ state machine

    def stage(self, rows: list[OffsetRow]) -> None:
        for group, topic, queue_id, _offset in rows:
            key = (group, topic, queue_id)
            self._in_flight[key] = self._in_flight.get(key, 0) + 1

    def discard(self, rows: list[OffsetRow]) -> None:
        for group, topic, queue_id, _offset in rows:
            self._landed((group, topic, queue_id))

    def apply(self, rows: list[OffsetRow]) -> None:
        for group, topic, queue_id, offset in rows:
            self._landed((group, topic, queue_id))
            queues = self._committed.get((group, topic))
            if queues is None:
                queues = self._committed[group, topic] = {}
            queues[queue_id] = offset

    def _landed(self, key: tuple[str, str, int]) -> None:
        count = self._in_flight.get(key, 0)
        if count > 1:
            self._in_flight[key] = count - 1
        elif count == 1:
            del self._in_flight[key]
        else:
            raise InvariantBroken(f"offset of {key!r} lands without having been staged")

    def remove_topic(self, topic: str) -> None:
        """Its deletion is committed; updates not logged yet must not outlive it either."""
        for key in [key for key in self._committed if key[1] == topic]:
            del self._committed[key]
        for unlogged in [key for key in self._delta if key[1] == topic]:
            del self._delta[unlogged]

    def remove_group(self, group: str) -> None:
        """As `remove_topic`."""
        for key in [key for key in self._committed if key[0] == group]:
            del self._committed[key]
        for unlogged in [key for key in self._delta if key[0] == group]:
            del self._delta[unlogged]

    def snapshot(self) -> list[list[Any]]:
        return [[group, topic, sorted(queues.items())] for (group, topic), queues in sorted(self._committed.items())]

    def restore(self, snapshot: list[list[Any]] | None) -> None:
        self._committed.clear()
        self._delta.clear()
        self._in_flight.clear()
        for group, topic, queues in snapshot or ():
            self._committed[group, topic] = dict(queues)
