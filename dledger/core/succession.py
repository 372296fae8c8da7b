"""Who should lead next: the best of the voters when a leader has to go, a preferred one when nothing forces it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import define

from dledger.core.progress import Progress


@define
class TransferInProgress:
    """Leadership is being handed to `target`, which campaigns with `ticket`; given up at `deadline`."""

    target: str
    ticket: int
    deadline: float
    is_sent: bool = False


def best_successor(voters: Iterable[Progress]) -> str | None:
    """Connected, with a working disk, and the furthest; None when there is nobody."""
    best = max(voters, key=lambda each: (each.is_connected, each.disk_ok, each.written), default=None)
    return None if best is None else best.peer


def preferred(candidates: Iterable[Progress], priorities: Mapping[str, int], than: str) -> str | None:
    """The one of highest priority among the candidates, if that is higher than the priority of `than`."""
    best, best_priority = None, priorities.get(than, 0)
    for candidate in candidates:
        priority = priorities.get(candidate.peer, 0)
        if priority > best_priority:
            best, best_priority = candidate.peer, priority
    return best


def jitter_share(node: str, voters: Iterable[str], priorities: Mapping[str, int]) -> float:
    """Which part of the random delay before a campaign a node takes: the more it outranks, the shorter it waits."""
    own = priorities.get(node, 0)
    return 1 / (1 + sum(1 for voter in voters if priorities.get(voter, 0) < own))
