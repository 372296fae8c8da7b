"""What an operator may sensibly change about the members of a group, for the nemeses of both engines."""

from __future__ import annotations

from collections.abc import Mapping

from dledger.core.membership import AddLearner, Address, Change, Members, Promote, Remove

VOTERS_MIN = 3
"""An operator does not shrink a group below this: one more fault would stop it."""


def possible_changes(members: Members, outside: Mapping[str, Address]) -> list[Change]:
    """The steps from here, the ones that lead to more voters more than once: else nobody would ever be promoted."""
    changes: list[Change] = [Promote(name) for name in members.learners for _ in range(3)]
    changes += [AddLearner(name, address) for name, address in outside.items() for _ in range(2)]
    if len(members.voters) > VOTERS_MIN:
        changes += [Remove(name) for name in members.voters]
    changes += [Remove(name) for name in members.learners]
    return changes
