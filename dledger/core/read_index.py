"""Reads that wait for proof that this leader is still the leader (dissertation 6.4).

One round of replies confirms all reads that were waiting when its messages were sent. Reads that come while a round is
under way gather for the next one, so however many there are, a peer gets one message for each round trip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dledger.core.quorum import majority


class ReadRounds:
    """The reads of one leadership, by the driver's tokens. `waiting`: how many."""

    __slots__ = ("_confirming", "_gathering", "_index", "_sent", "waiting")

    def __init__(self) -> None:
        self._gathering: list[int] = []
        self._confirming: list[int] = []
        self._index = 0
        self._sent: Mapping[str, int] = {}
        self.waiting = 0

    @property
    def is_round_due(self) -> bool:
        return bool(self._gathering) and not self._confirming

    def add(self, token: int) -> None:
        self._gathering.append(token)
        self.waiting += 1

    def begin(self, commit_index: int, sent: Mapping[str, int]) -> None:
        """A round begins: `sent` is the number of the last message to each peer so far; only later ones count."""
        self._confirming, self._gathering = self._gathering, []
        self._index = commit_index
        self._sent = sent

    def finish(self, node: str, voters: Iterable[str], answered: Mapping[str, int]) -> tuple[int, list[int]]:
        """The index and the tokens of the round, when a quorum of the `voters` in force now has answered it.

        `answered` is the number of the last message each peer has answered. Empty when there is no round, or not yet.
        """
        if not self._confirming:
            return 0, []
        voters = tuple(voters)
        confirmed = 0
        for voter in voters:
            sent = self._sent.get(voter)
            if voter == node or (sent is not None and answered.get(voter, 0) > sent):
                confirmed += 1
        if confirmed < majority(len(voters)):
            return 0, []
        tokens, self._confirming = self._confirming, []
        self.waiting -= len(tokens)
        return self._index, tokens

    def give_up(self) -> list[int]:
        """Leadership is over: every token that waits, oldest first; none waits any more."""
        tokens = self._confirming + self._gathering
        self._confirming, self._gathering = [], []
        self.waiting = 0
        return tokens
