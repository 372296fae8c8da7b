"""What must hold between the nodes of a group, over all of its history (raft.md 6.1). Checked as things happen.

Numbers in comments are those of raft.md 6.1. What one node can check of itself is in `dledger.core.invariants`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dledger.core import messages
from dledger.core.membership import Members, decode_members
from dledger.core.quorum import majority
from dledger.core.types import Entry, EntryType, HardState, Role, next_position

if TYPE_CHECKING:
    from chaos.sim.node import SimNode


class PropertyBroken(AssertionError):
    """A promise of the group does not hold. The message says which."""


class Properties:
    """The observer that sees every node, every disk and every message at once."""

    def __init__(
        self, *, sync: bool, segment_bytes: int, bootstrap: tuple[str, ...], reached: Callable[[str], None]
    ) -> None:
        self._note_reached = reached
        self._sync = sync
        self._segment_bytes = segment_bytes
        self._leaders: dict[int, str] = {}
        self._votes: dict[tuple[int, str], str] = {}
        self._hard_states: dict[str, HardState] = {}
        self._blank: set[str] = set()
        self._entries: dict[tuple[int, int], Entry] = {}
        self.committed: dict[int, tuple[int, int]] = {}
        self.committed_index = 0
        self._committed_in: dict[int, int] = {}
        self.members = Members(bootstrap)
        """The last committed ones, and the entry that made them so."""
        self.config_index = 0
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
        known = self._entries.setdefault((entry.index, entry.term), entry)
        if known is not entry and known.frame != entry.frame:
            raise PropertyBroken(f"log matching (Raft 5.3): two entries of index {entry.index} and term {entry.term}")
        if entry.prev_crc != node.log.head_crc_at(entry.index - 1):
            raise PropertyBroken(f"broken chain: entry {entry.index} of {node.name} does not continue the chain")
        if entry.position != next_position(before, len(entry.frame), self._segment_bytes):
            raise PropertyBroken(
                f"wrong position: {node.name} has entry {entry.index} at {entry.position}, the log ends at {before}"
            )

    def cuts(self, node: SimNode, from_index: int) -> None:
        """2 and 5: a log is shortened."""
        if node.raft is not None and node.raft.role is Role.LEADER:
            raise PropertyBroken(f"leader append-only (Raft 5.3): {node.name} cuts its log at {from_index}")
        if from_index <= node.applied_index:
            raise PropertyBroken(
                f"applied entry cut: {node.name} cuts at {from_index} what it has applied up to {node.applied_index}"
            )

    def moves_commit(self, node: SimNode, index: int) -> None:
        """Raft 5.4.2: a leader counts replicas of entries of its own term only (figure 8)."""
        raft = node.raft
        if raft is not None and raft.role is Role.LEADER and node.log.term_at(index) != raft.term:
            raise PropertyBroken(
                f"old term counted (Raft 5.4.2): {node.name} leads term {raft.term} and commits by count entry {index} "
                f"of {node.log.term_at(index)}"
            )

    def commits(self, node: SimNode, entry: Entry) -> None:
        """5 and 7: a node learns that an entry is committed."""
        if node.disk.written < entry.index:
            raise PropertyBroken(
                f"applied unwritten: {node.name} applies entry {entry.index} before it is written there"
            )
        found = (entry.term, entry.head_crc)
        known = self.committed.setdefault(entry.index, found)
        if known != found:
            raise PropertyBroken(
                f"state machine safety (Raft 5.4.3): {node.name} applies {found} at {entry.index}, it was {known}"
            )
        if entry.index <= self.committed_index:
            return
        if entry.index != self.committed_index + 1:
            raise PropertyBroken(f"gap in commits: {node.name} commits {entry.index} behind {self.committed_index}")
        self.committed_index = entry.index
        assert node.raft is not None
        self._committed_in[entry.index] = node.raft.term
        # Counted by the members in force on the node that counts (Raft 6); a learner does not count.
        voters = node.raft.members.voters
        holders = [name for name in voters if self.nodes[name].has_kept(entry, durable=self._sync)]
        if len(holders) < majority(len(voters)):
            raise PropertyBroken(
                f"commit without quorum: {node.name} commits entry {entry.index}, which only {holders} of {voters} have"
            )
        if entry.type == EntryType.CONFIG:
            self._changes_members(entry)

    def _changes_members(self, entry: Entry) -> None:
        """24: from one committed list to the next one voter at most comes or goes, so that their quorums meet."""
        members = decode_members(entry.body)
        changed = set(members.voters) ^ set(self.members.voters)
        if len(changed) > 1:
            raise PropertyBroken(f"membership: from {self.members.voters} to {members.voters} at once")
        if changed:
            self._note_reached(
                "learner-promoted" if len(members.voters) > len(self.members.voters) else "member-removed"
            )
        self.members = members
        self.config_index = entry.index

    def starts(self, node: SimNode, commit_index: int) -> None:
        """4: what a restarted node believes to be committed from its frames' hints."""
        if commit_index > self.committed_index:
            raise PropertyBroken(
                f"start beyond commit: {node.name} starts with commit index {commit_index}, the group's is lower"
            )
        if commit_index and self.committed[commit_index] != (
            node.log.term_at(commit_index),
            node.log.head_crc_at(commit_index),
        ):
            raise PropertyBroken(
                f"start with another log: {node.name} has another entry at committed index {commit_index}"
            )

    def reads(self, node: SimNode, index: int, acknowledged: int) -> None:
        """12: a read sees every write that was acknowledged before it was asked."""
        if index < acknowledged:
            raise PropertyBroken(
                f"stale read: {node.name} vouches for a read at {index}; entry {acknowledged} was acknowledged before"
            )

    def installs(self, node: SimNode, source: SimNode, last: int) -> None:
        """What replaces a log holds everything the group has committed up to there."""
        index = min(last, self.committed_index)
        found = (source.log.term_at(index), source.log.head_crc_at(index))
        if index and found != self.committed[index]:
            raise PropertyBroken(f"install of another log: {node.name} takes {source.name}'s up to {last}")
        if last < node.applied_index:
            raise PropertyBroken(f"install of less: {node.name} has applied {node.applied_index}, takes {last}")

    def wiped(self, node: SimNode) -> None:
        """The votes of an empty folder are forgotten: what they were is no promise any more (its node is blank)."""
        for vote in [vote for vote in self._votes if vote[1] == node.name]:
            del self._votes[vote]
        self._hard_states.pop(node.name, None)
        self._blank.add(node.name)

    def saves(self, node: SimNode, state: HardState) -> None:
        """6: what a synced term and vote must not fall behind, whatever happens to the process."""
        self._hard_states[node.name] = state

    def recovered_log(self, node: SimNode, durable: int) -> None:
        """4.6: what was on stable storage up to `durable` is there, or is known to be missing."""
        known = self._hard_states.get(node.name, HardState())
        if node.disk.saved != known:
            raise PropertyBroken(f"hard state lost: {node.name} starts with {node.disk.saved}, saved was {known}")
        if node.log.last_index < durable and not node.disk.recovering:
            raise PropertyBroken(
                f"durable entries forgotten: {node.name} starts with {node.log.last_index} of {durable}, unaware"
            )

    def gives_up(self, node: SimNode, first: int, front: Sequence[Entry]) -> None:
        """A repair cuts, from `first` on, only what was never committed; `front` comes in its place."""
        kept = {entry.index: entry.head_crc for entry in front}
        for index in range(first, first + len(front) + 1):
            entry = node.log.peek(index)
            if entry is None or self.committed.get(index) != (entry.term, entry.head_crc):
                return
            if kept.get(index) != entry.head_crc:
                raise PropertyBroken(f"committed entry given up: {node.name} cuts at {index} instead of repairing")

    def repaired(self, node: SimNode, first: int, last: int) -> None:
        """3: what a repair has brought chains with what is around it."""
        for index in range(first, min(last + 1, node.log.last_index) + 1):
            entry = node.log.peek(index)
            if entry is not None and entry.prev_crc != node.log.head_crc_at(index - 1):
                raise PropertyBroken(f"repair breaks the chain: entry {index} of {node.name}")

    def is_confirmed(self, node: SimNode) -> None:
        """A leader has vouched for the log of a recovering node."""
        self._blank.discard(node.name)

    def _note_grant(self, node: SimNode, message: messages.PreVoteReply | messages.VoteReply) -> None:
        is_unsure = node.disk.recovering or node.name in self._blank
        if message.granted and is_unsure and not message.recovering:
            raise PropertyBroken(f"unsure vote: {node.name} grants as if it had lost nothing")

    def sends(self, node: SimNode, peer: str, message: messages.Message) -> None:
        """13: nothing leaves before what it depends on is on the disk (raft.md 4.2). 1: one vote per term."""
        disk = node.disk
        saved = disk.saved
        term = message.term
        match message:
            case messages.PreVote():
                term -= 1
            case messages.Vote():
                self._note_vote(message.term, node.name, node.name)
                if (saved.term, saved.vote) != (term, node.name):
                    raise PropertyBroken(
                        f"vote not saved: {node.name} asks for votes in {term} with {saved} on its disk"
                    )
            case messages.PreVoteReply():
                self._note_grant(node, message)
            case messages.VoteReply():
                self._note_grant(node, message)
                if message.granted:
                    self._note_vote(message.term, node.name, peer)
                    if (saved.term, saved.vote) != (term, peer):
                        raise PropertyBroken(
                            f"vote not saved: {node.name} votes for {peer} in {term} with {saved} on its disk"
                        )
            case messages.Append():
                for entry in message.entries:
                    known = self._entries[entry.index, entry.term]
                    if known is not entry and known.frame != entry.frame:
                        raise PropertyBroken(f"damage served: {node.name} sends a damaged entry {entry.index}")
            case messages.AppendReply():
                if message.written > disk.written or message.durable > disk.durable:
                    raise PropertyBroken(
                        f"unwritten acknowledged: {node.name} reports {message.written} written and {message.durable} "
                        f"durable; its disk has {disk.written} and {disk.durable}"
                    )
            case _:
                pass
        # A term may be proved by a stored entry instead of the saved term.
        if max(saved.term, node.log.last_term) < term:
            raise PropertyBroken(f"term not saved: {node.name} sends {message} with term {saved.term} on its disk")

    def _note_vote(self, term: int, voter: str, candidate: str) -> None:
        before = self._votes.setdefault((term, voter), candidate)
        if before != candidate:
            raise PropertyBroken(f"two votes: {voter} votes for {before} and for {candidate} in term {term} (Raft 5.2)")
