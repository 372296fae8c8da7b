"""What an operator reads about roles: each change that says something new, and not each question of a lone member.

A member that hears no leader and finds no quorum asks anew several times a second, for as long as that lasts (pre-vote,
dissertation 9.6). Its first question and the first lack of an answer are told as they come, the rest in one line a
minute.
"""

from __future__ import annotations

from collections.abc import Callable

from dledger.core.effects import RoleChanged
from dledger.core.types import Role
from runtime.logs import Logger

REPEATED_SECONDS = 60.0


class RoleLog:
    """Of one run. `monotonic` gives seconds."""

    def __init__(self, log: Logger, monotonic: Callable[[], float]) -> None:
        self._log = log
        self._monotonic = monotonic
        self._told: set[Role] = set()
        """Roles told of since a leader was heard last, or a vote asked for."""
        self._term = 0
        self._rounds = 0
        self._next_line = 0.0

    def note(self, change: RoleChanged, *, last_index: int, commit_index: int) -> None:
        is_question = change.leader is None and change.role in (Role.FOLLOWER, Role.PRE_CANDIDATE)
        if not is_question or change.term != self._term:
            self._told.clear()
            self._term = change.term
        if change.role not in self._told:
            if is_question:
                self._told.add(change.role)
            self._rounds = 0
            self._next_line = self._monotonic() + REPEATED_SECONDS
            self._log.info(
                "role changed",
                role=change.role.name.lower(),
                term=change.term,
                leader=change.leader,
                reason=change.reason,
                last_index=last_index,
                commit_index=commit_index,
            )
            return
        self._rounds += change.role is Role.PRE_CANDIDATE
        if self._monotonic() >= self._next_line:
            self._log.warning("still no leader, and no quorum answers", term=change.term, asked=self._rounds)
            self._rounds = 0
            self._next_line = self._monotonic() + REPEATED_SECONDS
