"""The rules of voting that stand alone: whose log is good enough, and when a round is decided."""

from __future__ import annotations

from collections.abc import Iterable, Set

from dledger.core.quorum import majority


def is_up_to_date(last_term: int, last_index: int, than_term: int, than_index: int) -> bool:
    """Raft 5.4.1: the log with the later last term is more up to date; at equal terms, the longer one."""
    return (last_term, last_index) >= (than_term, than_index)


class Ballot:
    """Answers of one pre-vote or vote round; each voter counts once.

    A voter that is *recovering* lost its page cache in a power failure and may have forgotten entries it acknowledged.
    Its grant cannot be one of a bare majority, since that majority might then lack a committed entry. It counts when
    every member of the group has granted: then the most advanced log of all wins (raft.md 4.2).
    """

    __slots__ = ("_granted", "_recovering", "_refused", "_voters")

    def __init__(self, voters: Iterable[str]) -> None:
        self._voters = tuple(voters)
        self._granted: set[str] = set()
        self._recovering: set[str] = set()
        self._refused: set[str] = set()

    def record(self, voter: str, *, granted: bool, recovering: bool) -> None:
        """Note an answer. A repeated or late one of the same voter changes nothing."""
        if voter not in self._voters or voter in self._granted or voter in self._refused:
            return
        if granted:
            self._granted.add(voter)
            if recovering:
                self._recovering.add(voter)
        else:
            self._refused.add(voter)

    @property
    def granted(self) -> int:
        return len(self._granted)

    @property
    def is_won(self) -> bool:
        sure = len(self._granted) - len(self._recovering)
        return sure >= majority(len(self._voters)) or len(self._granted) == len(self._voters)

    def is_lost(self, unreachable: Set[str]) -> bool:
        """No answer still to come could win the round, when `unreachable` nodes will not answer."""
        sure = len(self._granted) - len(self._recovering)
        silent = [voter for voter in self._voters if voter not in self._granted and voter not in self._refused]
        hoped = sum(1 for voter in silent if voter not in unreachable)
        all_may_grant = not self._refused and hoped == len(silent)
        return sure + hoped < majority(len(self._voters)) and not all_may_grant
