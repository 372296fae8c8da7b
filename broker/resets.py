"""Pending server-side offset resets (semantics.md 4.1): the next pull of a reset queue is answered 21 once.

The new offset itself is in the log. What is here is only the wish to pull a running consumer over to it, so it lives in
the leader's memory: after a change of leader an online consumer goes on from where it is.
"""

from __future__ import annotations

from typing import Final

RESETS_MAX: Final = 100_000


class PendingResets:
    """(group, topic, queue id) to offset."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, str, int], int] = {}

    def __bool__(self) -> bool:
        return bool(self._offsets)

    def put(self, group: str, topic: str, queue_id: int, offset: int) -> bool:
        """False when there are too many already."""
        key = (group, topic, queue_id)
        if len(self._offsets) >= RESETS_MAX and key not in self._offsets:
            return False
        self._offsets[key] = offset
        return True

    def get(self, group: str, topic: str, queue_id: int) -> int | None:
        return self._offsets.get((group, topic, queue_id))

    def take(self, group: str, topic: str, queue_id: int) -> int | None:
        """The offset to answer the next pull with; afterwards there is none."""
        return self._offsets.pop((group, topic, queue_id), None)

    def clear(self) -> None:
        """This node leads no more."""
        self._offsets.clear()
