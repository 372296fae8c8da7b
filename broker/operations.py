"""META operations: what an entry's cbor2 tail does to the tables, when it is staged, applied and discarded.

An operation lies in the log as a list, its name first:

    ["topic_put", config, wall ms]  ["topic_del", name, wall ms]  ["group_put", config, wall ms]
    ["group_del", name, clean offsets, wall ms]  ["offsets", rows]  ["locks", rows]  ["delay", level, next offset]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from broker.tables import InvariantBroken
from remoting.bodies import SubscriptionGroupConfig, TopicConfig

if TYPE_CHECKING:
    from broker.locks import LockRow
    from broker.offsets import OffsetRow
    from broker.staging import Staged
    from broker.state import BrokerState


class Operations:
    """The operations of one node's tables."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._topics = state.topics
        self._groups = state.groups
        self._offsets = state.offsets
        self._locks = state.locks
        self._delay = state.delay
        self._queues = state.queues
        self._wall_ms = state.env.clock.wall_ms
        self._term = 0
        """Term of the entry being applied. Tables follow from the log alone, not from what this node has heard."""
        self._handlers: dict[str, tuple[Callable[..., None], Callable[..., None], Callable[..., None]]] = {
            "topic_put": (self._stage_topic_put, self._apply_topic_put, self._discard_topic_put),
            "topic_del": (self._stage_topic_del, self._apply_topic_del, self._discard_topic_del),
            "group_put": (self._stage_group_put, self._apply_group_put, self._discard_group_put),
            "group_del": (self._stage_group_del, self._apply_group_del, self._discard_group_del),
            "offsets": (self._stage_offsets, self._apply_offsets, self._discard_offsets),
            "locks": (self._stage_locks, self._apply_locks, self._discard_locks),
            "delay": (self._stage_delay, self._apply_delay, self._discard_delay),
        }

    def plain(self, op: tuple[Any, ...]) -> list[Any]:
        """An operation as it lies in the log; table changes carry the wall time their DataVersion gets."""
        name = op[0]
        if name in ("topic_put", "group_put"):
            return [name, msgspec.to_builtins(op[1]), self._wall_ms()]
        if name == "topic_del":
            return [name, op[1], self._wall_ms()]
        if name == "group_del":
            return [name, op[1], bool(op[2]), self._wall_ms()]
        return list(op)

    def stage(self, staged: Staged, ops: list[list[Any]]) -> None:
        """Move the pending tables on. Raises InvariantBroken for an operation that this version does not know."""
        for op in ops:
            handlers = self._handlers.get(op[0])
            if handlers is None:
                raise InvariantBroken(f"operation {op[0]!r} is not known: the log is of a newer version")
            handlers[0](staged, *op[1:])
            staged.ops.append(op)

    def stage_deletions(self, staged: Staged, ops: list[list[Any]]) -> None:
        """Of an entry that the tables hold already: only what it does to the queues."""
        for op in ops:
            if op[0] == "topic_del":
                staged.removed.append(self._queues.stage_delete(op[1].encode()))
                staged.ops.append(op)

    def apply(self, staged: Staged, term: int) -> None:
        """Committed, by an entry of `term`."""
        self._term = term
        for op in staged.ops:
            self._handlers[op[0]][1](staged, *op[1:])

    def discard(self, staged: Staged) -> None:
        """Cut or refused: newest first."""
        for op in reversed(staged.ops):
            self._handlers[op[0]][2](staged, *op[1:])

    def topic_touched(self, name: str) -> None:
        """A change of this topic was staged, applied or discarded: cached views of it are stale."""
        for listener in self._state.on_topic_touched:
            listener(name)

    def _stage_topic_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        config = msgspec.convert(plain, TopicConfig)
        self._topics.stage(config.topic_name, config)
        self.topic_touched(config.topic_name)

    def _apply_topic_put(self, _staged: Staged, plain: dict[str, Any], wall_ms: int) -> None:
        name = plain["topicName"]
        self._topics.apply(name)
        self._topics_changed(name, wall_ms)

    def _discard_topic_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        self._topics.discard(plain["topicName"])
        self.topic_touched(plain["topicName"])

    def _stage_topic_del(self, staged: Staged, name: str, _wall_ms: int) -> None:
        self._topics.stage(name, None)
        staged.removed.append(self._queues.stage_delete(name.encode()))
        self.topic_touched(name)

    def _apply_topic_del(self, staged: Staged, name: str, wall_ms: int) -> None:
        self._topics.apply(name)
        self._queues.apply_delete(name, staged.removed.pop(0))
        self._offsets.remove_topic(name)
        self._locks.remove_topic(name)
        self._topics_changed(name, wall_ms)

    def _discard_topic_del(self, staged: Staged, name: str, _wall_ms: int) -> None:
        self._topics.discard(name)
        self._queues.discard_delete(staged.removed.pop())
        self.topic_touched(name)

    def _topics_changed(self, name: str, wall_ms: int) -> None:
        self._topics.changed(wall_ms, self._term)
        self.topic_touched(name)
        for listener in self._state.on_topics_changed:
            listener([name])

    def _stage_group_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        config = msgspec.convert(plain, SubscriptionGroupConfig)
        self._groups.stage(config.group_name, config)

    def _apply_group_put(self, _staged: Staged, plain: dict[str, Any], wall_ms: int) -> None:
        self._groups.apply(plain["groupName"])
        self._groups_changed(plain["groupName"], wall_ms)

    def _discard_group_put(self, _staged: Staged, plain: dict[str, Any], _wall_ms: int) -> None:
        self._groups.discard(plain["groupName"])

    def _stage_group_del(self, _staged: Staged, name: str, _clean: bool, _wall_ms: int) -> None:
        self._groups.stage(name, None)

    def _apply_group_del(self, _staged: Staged, name: str, clean: bool, wall_ms: int) -> None:
        self._groups.apply(name)
        self._locks.remove_group(name)
        if clean:
            self._offsets.remove_group(name)
        self._groups_changed(name, wall_ms)

    def _discard_group_del(self, _staged: Staged, name: str, _clean: bool, _wall_ms: int) -> None:
        self._groups.discard(name)

    def _groups_changed(self, name: str, wall_ms: int) -> None:
        self._groups.changed(wall_ms, self._term)
        for listener in self._state.on_groups_changed:
            listener([name])

    def _stage_offsets(self, _staged: Staged, rows: list[OffsetRow]) -> None:
        self._offsets.stage(rows)

    def _apply_offsets(self, _staged: Staged, rows: list[OffsetRow]) -> None:
        self._offsets.apply(rows)

    def _discard_offsets(self, _staged: Staged, rows: list[OffsetRow]) -> None:
        self._offsets.discard(rows)

    def _stage_locks(self, _staged: Staged, rows: list[LockRow]) -> None:
        self._locks.stage(rows)

    def _apply_locks(self, _staged: Staged, rows: list[LockRow]) -> None:
        self._locks.apply(rows)

    def _discard_locks(self, _staged: Staged, rows: list[LockRow]) -> None:
        self._locks.discard(rows)

    def _stage_delay(self, _staged: Staged, level: int, next_offset: int) -> None:
        self._delay.stage(level, next_offset)

    def _apply_delay(self, _staged: Staged, level: int, _next_offset: int) -> None:
        self._delay.apply(level)

    def _discard_delay(self, _staged: Staged, level: int, _next_offset: int) -> None:
        self._delay.discard(level)
