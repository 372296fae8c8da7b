"""Which queues a member of a consumer group takes (semantics.md 5.1). Pure functions."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence

from remoting.message import MessageQueue

Strategy = Callable[[str, Sequence[MessageQueue], Sequence[str]], list[MessageQueue]]
"""(own client id, all queues, all client ids) to the own queues. Order of the arguments' items does not matter."""


def _position(client_id: str, client_ids: Sequence[str]) -> tuple[int, list[str]]:
    members = sorted(set(client_ids))
    return (members.index(client_id) if client_id in members else -1), members


def average(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
    """AVG: contiguous blocks; the first n mod m members get one queue more."""
    index, members = _position(client_id, client_ids)
    if index < 0 or not queues:
        return []
    ordered = sorted(queues)
    share, extra = divmod(len(ordered), len(members))
    start = index * share + min(index, extra)
    return ordered[start : start + share + (1 if index < extra else 0)]


def average_by_circle(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
    """AVG_BY_CIRCLE: member i takes queues i, i + m, i + 2m ..."""
    index, members = _position(client_id, client_ids)
    return sorted(queues)[index :: len(members)] if index >= 0 else []


_VIRTUAL_NODES = 10


def _ring_position(text: str) -> int:
    # The first four bytes of the MD5, as the Java class takes them.
    digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4])


def consistent_hash(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
    """CONSISTENT_HASH: a ring of ten virtual nodes per member, queues placed by their text."""
    index, members = _position(client_id, client_ids)
    if index < 0:
        return []
    ring = sorted(
        (_ring_position(f"{member}-{number}"), member) for member in members for number in range(_VIRTUAL_NODES)
    )
    places = [place for place, _ in ring]
    mine: list[MessageQueue] = []
    for queue in sorted(queues):
        text = f"MessageQueue [topic={queue.topic}, brokerName={queue.broker_name}, queueId={queue.queue_id}]"
        found = bisect_left(places, _ring_position(text)) % len(ring)
        if ring[found][1] == client_id:
            mine.append(queue)
    return mine


STRATEGIES: dict[str, Strategy] = {
    "AVG": average,
    "AVG_BY_CIRCLE": average_by_circle,
    "CONSISTENT_HASH": consistent_hash,
}
