"""What must hold between the nodes of a group, over all of its history (raft.md 6.1). Checked as things happen.

Numbers in comments are those of raft.md 6.1. What one node can check of itself is in `dledger.core.invariants`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dledger.core import messages
from dledger.core.quorum import majority
from dledger.core.types import Entry, Role, next_position

if TYPE_CHECKING:
    from chaos.sim.node import SimNode


class PropertyBroken(AssertionError):
    """A promise of the group does not hold. The message says which."""


class Properties:
    """The observer that sees every node, every disk and every message at once."""

    def __init__(self, *, sync: bool, segment_bytes: int) -> None:
        self._sync = sync
        self._segment_bytes = segment_bytes
        self._leaders: dict[int, str] = {}
        self._votes: dict[tuple[int, str], str] = {}
        self._frames: dict[tuple[int, int], int] = {}
        self.committed: dict[int, tuple[int, int]] = {}
        self.committed_index = 0
        self._committed_in: dict[int, int] = {}
        self.nodes: dict[str, SimNode] = {}

    def leads(self, node: SimNode, term: int) -> None:
        """1 and 4: a node has become leader of `term`."""
        before = self._leaders.setdefault(term, node.name)
        if before != node.name:
            raise PropertyBroken(f"election safety (Raft 5.2): {before} and {node.name} both lead term {term}")
        # A candidate may learn late that it won, when a higher term has committed more: that is not its duty.
        index = self.committed_index
        while index and self._committed_in[index] >= term:
            index -= 1
        if index:
            found = (node.log.term_at(index), node.log.head_crc_at(index))
            if found != self.committed[index]:
                raise PropertyBroken(
                    f"leader completeness (Raft 5.4): {node.name} leads term {term} without committed entry {index}: "
                    f"has {found}, committed {self.committed[index]}"
                )

    def appended(self, node: SimNode, entry: Entry, before: int) -> None:
        """3 and 10: an entry enters a log that so far ended at position `before`."""
        known = self._frames.setdefault((entry.index, entry.term), entry.head_crc)
        if known != entry.head_crc:
            raise PropertyBroken(f"log matching (Raft 5.3): two entries of index {entry.index} and term {entry.term}")
        if entry.prev_crc != node.log.head_crc_at(entry.index - 1):
            raise PropertyBroken(f"{node.name}: entry {entry.index} does not continue the chain")
        if entry.position != next_position(before, len(entry.frame), self._segment_bytes):
            raise PropertyBroken(f"{node.name}: entry {entry.index} at {entry.position}, the log ends at {before}")

    def cuts(self, node: SimNode, from_index: int) -> None:
        """2 and 5: a log is shortened."""
        if node.raft is not None and node.raft.role is Role.LEADER:
            raise PropertyBroken(f"leader append-only (Raft 5.3): {node.name} cuts its log at {from_index}")
        if from_index <= node.applied_index:
            raise PropertyBroken(f"{node.name} cuts at {from_index} what it has applied up to {node.applied_index}")

    def moves_commit(self, node: SimNode, index: int) -> None:
        """Raft 5.4.2: a leader counts replicas of entries of its own term only (figure 8)."""
        raft = node.raft
        if raft is not None and raft.role is Role.LEADER and node.log.term_at(index) != raft.term:
            raise PropertyBroken(
                f"{node.name} leads term {raft.term} and commits by count entry {index} of {node.log.term_at(index)}"
            )

    def commits(self, node: SimNode, entry: Entry) -> None:
        """5 and 7: a node learns that an entry is committed."""
        if node.written < entry.index:
            raise PropertyBroken(f"{node.name} applies entry {entry.index} before it is written there")
        found = (entry.term, entry.head_crc)
        known = self.committed.setdefault(entry.index, found)
        if known != found:
            raise PropertyBroken(
                f"state machine safety (Raft 5.4.3): {node.name} applies {found} at {entry.index}, it was {known}"
            )
        if entry.index <= self.committed_index:
            return
        if entry.index != self.committed_index + 1:
            raise PropertyBroken(f"{node.name} commits {entry.index} behind {self.committed_index}")
        self.committed_index = entry.index
        assert node.raft is not None
        self._committed_in[entry.index] = node.raft.term
        holders = sum(1 for other in self.nodes.values() if other.has_kept(entry, durable=self._sync))
        if holders < majority(len(self.nodes)):
            raise PropertyBroken(f"{node.name} commits entry {entry.index}, which only {holders} nodes have")

    def starts(self, node: SimNode, commit_index: int) -> None:
        """4: what a restarted node believes to be committed from its frames' hints."""
        if commit_index > self.committed_index:
            raise PropertyBroken(f"{node.name} starts with commit index {commit_index}, the group's is lower")
        if commit_index and self.committed[commit_index] != (
            node.log.term_at(commit_index),
            node.log.head_crc_at(commit_index),
        ):
            raise PropertyBroken(f"{node.name} starts with another entry at committed index {commit_index}")

    def sends(self, node: SimNode, peer: str, message: messages.Message) -> None:
        """13: nothing leaves before what it depends on is on the disk (raft.md 4.2). 1: one vote per term."""
        saved = node.saved
        term = message.term
        match message:
            case messages.PreVote():
                term -= 1
            case messages.Vote():
                self._note_vote(message.term, node.name, node.name)
                if (saved.term, saved.vote) != (term, node.name):
                    raise PropertyBroken(f"{node.name} asks for votes in {term} with {saved} on its disk")
            case messages.VoteReply():
                if message.granted:
                    self._note_vote(message.term, node.name, peer)
                    if (saved.term, saved.vote) != (term, peer):
                        raise PropertyBroken(f"{node.name} votes for {peer} in {term} with {saved} on its disk")
            case messages.AppendReply():
                if message.written > node.written or message.durable > node.durable:
                    raise PropertyBroken(
                        f"{node.name} reports {message.written} written and {message.durable} durable; "
                        f"its disk has {node.written} and {node.durable}"
                    )
            case _:
                pass
        # A term may be proved by a stored entry instead of the saved term.
        if max(saved.term, node.log.last_term) < term:
            raise PropertyBroken(f"{node.name} sends {message} with term {saved.term} on its disk")

    def _note_vote(self, term: int, voter: str, candidate: str) -> None:
        before = self._votes.setdefault((term, voter), candidate)
        if before != candidate:
            raise PropertyBroken(f"{voter} votes for {before} and for {candidate} in term {term} (Raft 5.2)")
