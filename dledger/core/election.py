"""The parts of an election that stand alone: whose log is good enough, when a round is decided, and when the next one
begins."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

from dledger.core.config import RaftConfig
from dledger.core.quorum import majority

if TYPE_CHECKING:
    from random import Random

YIELD_SECONDS_MIN = 0.15
YIELD_SECONDS_MAX = 0.30
"""How long a node that would vote for another holds back its own campaign: a few rounds on any usable network."""
SPLIT_VOTE_DELAY_MIN = 0.02
SPLIT_VOTE_DELAY_MAX = 0.20


def is_up_to_date(last_term: int, last_index: int, than_term: int, than_index: int) -> bool:
    """Raft 5.4.1: the log with the later last term is more up to date; at equal terms, the longer one."""
    return (last_term, last_index) >= (than_term, than_index)


class Ballot:
    """Answers of one pre-vote or vote round; each voter counts once.

    A voter that is *recovering* lost its page cache in a power failure and may have forgotten entries it acknowledged.
    Its grant cannot be one of a bare majority, since that majority might then lack a committed entry. It counts when
    every member of the group has granted: then the most advanced log of all wins (raft.md 4.2).

    `ticket` is not 0 in a round on order of the leader. `saw_leader`: somebody refused because it hears one.
    """

    __slots__ = ("_granted", "_recovering", "_refused", "_voters", "saw_leader", "ticket")

    def __init__(self, voters: Iterable[str], ticket: int = 0) -> None:
        self.ticket = ticket
        self.saw_leader = False
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


class ElectionTimer:
    """When a node that hears of no leader acts: one deadline, in the seconds of `now`, moved for a reason each time.

    `share` of the random part of a delay is taken: the more voters a node outranks, the shorter it waits
    (`succession.jitter_share`).
    """

    __slots__ = ("_config", "_has_held_back", "_rng", "_timeout", "deadline", "share")

    def __init__(self, config: RaftConfig, rng: Random, now: float, share: float) -> None:
        self._config = config
        self._rng = rng
        self.share = share
        self._timeout = 0.0
        self.deadline = now
        self._has_held_back = False
        self.arm(now)

    def arm(self, now: float) -> None:
        """A new random election timeout (Raft 5.2)."""
        shortest = self._config.election_timeout_min
        span = self._config.election_timeout_max - shortest
        self._timeout = self._rng.uniform(shortest, shortest + span * self.share)
        self.deadline = now + self._timeout
        self._has_held_back = False

    def restart(self, now: float) -> None:
        """The leader was heard: the same timeout once more."""
        self.deadline = now + self._timeout

    def fire_within(self, now: float, latest: float, earliest: float = 0.0) -> None:
        """Campaign after `earliest` to `latest` seconds, and not after a whole timeout."""
        span = latest - earliest
        self.deadline = now + self._rng.uniform(earliest, earliest + span * self.share)
        self._has_held_back = False

    def retry_split_vote(self, now: float) -> None:
        """Whoever wakes first wins the next round."""
        self.fire_within(now, SPLIT_VOTE_DELAY_MAX, SPLIT_VOTE_DELAY_MIN)

    def hurry(self, now: float) -> None:
        """Somebody misses a leader and ours is the better log: no later than as if we had missed it ourselves."""
        self.deadline = min(self.deadline, now + self._rng.uniform(0.0, self._config.peer_lost_jitter_max))

    def begin_round(self, now: float) -> None:
        """Votes or pre-votes have been asked for."""
        self.deadline = now + self._config.round_timeout

    def yield_round(self, now: float) -> None:
        """Our own round is left to another candidate, for a while."""
        self.fire_within(now, YIELD_SECONDS_MAX, YIELD_SECONDS_MIN)
        self._has_held_back = True

    def hold_back(self, now: float) -> None:
        """Let a candidate that we would vote for go first. Once per timer: one that never wins must not hold us back
        for ever."""
        if self._has_held_back:
            return
        held_back = now + self._rng.uniform(YIELD_SECONDS_MIN, YIELD_SECONDS_MAX)
        if self.deadline < held_back:
            self.deadline = held_back
            self._has_held_back = True
