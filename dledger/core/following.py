"""What a node has from the leader of its term, and owes it: how far that leader has vouched, and the answer due."""

from __future__ import annotations

from dledger.core.messages import Append, AppendReply
from dledger.core.raft_log import RaftLog

NEVER = float("-inf")


class Following:
    """A follower's side of the replication, for one term at a time.

    `verified_index` is the highest entry known to match the leader's (rabbitmq/ra#508), `leader_commit` its highest
    commit index, `heard_at` when it last spoke (read only while there is one), `segments_from` from where it sends
    entries, as last offered (0: it has offered nothing).
    """

    __slots__ = (
        "_hint",
        "_is_due",
        "_is_match",
        "_marks",
        "_seq",
        "heard_at",
        "leader_commit",
        "segments_from",
        "verified_index",
    )

    def __init__(self, commit_index: int) -> None:
        self.heard_at = NEVER
        self.begin_term(commit_index)

    def begin_term(self, commit_index: int) -> None:
        """What the leader of an older term vouched for, or was to be answered, no longer counts."""
        self.verified_index = 0
        self.leader_commit = commit_index
        self.segments_from = 0
        self._seq = 0
        self._is_match = True
        self._hint = (0, 0)
        self._is_due = False
        self._marks = (0, 0)

    def accept(self, message: Append, verified: int, is_due: bool) -> None:
        """The predecessor matched, so everything up to `verified` does. Answered at the turn's end if `is_due`, else
        when the disk has come further."""
        self._seq = message.seq
        self._is_match = True
        if is_due:
            self._is_due = True
        if verified > self.verified_index:
            self.verified_index = verified
        if message.commit > self.leader_commit:
            self.leader_commit = message.commit

    def reject(self, seq: int, hint: tuple[int, int]) -> None:
        """It did not; `hint` is the index and term of our last entry that may (raft.md 4.4)."""
        self._seq = seq
        self._is_match = False
        self._hint = hint
        self._is_due = True

    def reply(self, term: int, log: RaftLog, sync: bool, is_fit: bool) -> AppendReply | None:
        """The answer to everything heard so far, once: when one is due, or when the mark that the group counts has
        moved. `sync`: that is the durable one. `is_fit`: this disk could carry a leader's load."""
        if not self._seq:
            return None
        written = min(log.written_index, self.verified_index)
        durable = min(log.durable_index, self.verified_index)
        if not self._is_due and (durable if sync else written) <= self._marks[sync]:
            return None
        self._is_due = False
        self._marks = (written, durable)
        hint_index, hint_term = (0, 0) if self._is_match else self._hint
        return AppendReply(term, self._seq, self._is_match, written, durable, hint_index, hint_term, is_fit)
