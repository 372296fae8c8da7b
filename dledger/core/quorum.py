"""Majority arithmetic: how many make a quorum, and what a quorum has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Mark = TypeVar("Mark", int, float)


def majority(voters: int) -> int:
    """The smallest number of nodes of which any two sets overlap."""
    return voters // 2 + 1


def quorum_mark(marks: Iterable[Mark]) -> Mark:
    """The highest mark that a majority of all voters has reached; one mark per voter, the asking node included."""
    ordered = sorted(marks, reverse=True)
    return ordered[len(ordered) // 2]
