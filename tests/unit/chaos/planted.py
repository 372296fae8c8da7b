"""Wrong cores, one bug each. The simulator must find every one; that is what makes its silence worth something."""

from __future__ import annotations

from typing import Any

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.raft import Raft
from dledger.core.types import HardState, Role


class MessagesNotHeld(Raft):
    """Votes leave before term and vote are saved."""

    def _send(self, peer: str, message: msg.Message) -> None:
        self._effects.append(fx.Send(peer, message))


class VoteForgotten(Raft):
    """A restart forgets whom it voted for (pysyncobj#201)."""

    def __init__(self, node_id: str, voters: Any, config: Any, rng: Any, hard_state: HardState, *rest: Any, **k: Any):
        super().__init__(node_id, voters, config, rng, HardState(hard_state.term, None), *rest, **k)


class SecondVote(Raft):
    """A follower votes again in the same term."""

    def _receive_vote(self, now: float, peer: str, message: msg.Vote) -> None:
        if message.term == self.term and self.role is Role.FOLLOWER:
            self.vote = None
        super()._receive_vote(now, peer, message)


class LogNotCompared(Raft):
    """Anybody may win (Raft 5.4.1)."""

    def _accepts_log(self, message: msg.PreVote | msg.Vote) -> bool:
        return True


class OldTermsCounted(Raft):
    """Entries of older terms are committed by counting replicas (Raft 5.4.2, figure 8)."""

    def _advance_leader_commit(self) -> None:
        kept, self.noop_index = self.noop_index, 1
        try:
            super()._advance_leader_commit()
        finally:
            self.noop_index = kept


class CommitBeforeQuorum(Raft):
    """The leader commits what it alone has written."""

    def _advance_leader_commit(self) -> None:
        if 0 < self.noop_index <= self.written_index and self.written_index > self.commit_index:
            self.commit_index = self.written_index
            self._effects.append(fx.Commit(self.commit_index))


class AcknowledgedBeforeWritten(Raft):
    """A follower reports what it has only received."""

    def _end_follower_turn(self) -> None:
        marks = self.written_index, self.durable_index
        self.written_index = self.durable_index = self.last_index
        try:
            super()._end_follower_turn()
        finally:
            self.written_index, self.durable_index = marks


class LeaderCountsItselfAtTheCall(Raft):
    """The leader's own mark moves with the append call (etcd#14370)."""

    def _propose(self, entries: Any) -> None:
        super()._propose(entries)
        if self.role is Role.LEADER:
            self.written_index = self.durable_index = self.last_index
            self._advance_leader_commit()


class EveryAppendCuts(Raft):
    """Whatever stands behind the predecessor is cut, conflict or not (PySyncObj)."""

    def _take(self, entries: Any) -> None:
        if entries[0].index <= self.last_index:
            kept, self.commit_index = self.commit_index, 0
            self._cut(entries[0].index)
            self.commit_index = min(kept, self.last_index)
        self._append(entries)


class HintTooHigh(Raft):
    """A rejection names an entry that cannot agree."""

    def _last_not_above(self, index: int, term: int) -> tuple[int, int]:
        return min(index, self.last_index), term


class RejectionIgnored(Raft):
    """The leader never steps back."""

    def _step_back(self, progress: Any, message: msg.AppendReply) -> None:
        return


class OldSequenceAnswered(Raft):
    """An append of an older term is answered with its sequence: found by this simulator in our own first version."""

    def _receive_append(self, now: float, peer: str, message: msg.Append) -> None:
        if message.term < self.term:
            self._send(peer, msg.AppendReply(self.term, message.seq, False, 0, 0))
        else:
            super()._receive_append(now, peer, message)


PLANTED: tuple[type[Raft], ...] = (
    MessagesNotHeld,
    VoteForgotten,
    SecondVote,
    LogNotCompared,
    OldTermsCounted,
    CommitBeforeQuorum,
    AcknowledgedBeforeWritten,
    LeaderCountsItselfAtTheCall,
    EveryAppendCuts,
    HintTooHigh,
    RejectionIgnored,
)
SELDOM: tuple[type[Raft], ...] = (OldSequenceAnswered,)
"""Bugs that need a rare schedule: looked for among many seeds only."""
