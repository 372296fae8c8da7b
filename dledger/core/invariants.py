"""What must hold after every step of one node (raft.md 6.1, as far as one node can see it).

Tests and the simulator call `Watch.check` after each step. What needs more than one node (election safety, log
matching, leader completeness) is checked in `chaos.sim.properties`.
"""

from __future__ import annotations

from itertools import pairwise

from dledger.core.errors import LocalError
from dledger.core.membership import check_single_step
from dledger.core.quorum import majority
from dledger.core.raft import Raft
from dledger.core.types import Role


class InvariantBroken(AssertionError):
    """A promise of the state machine does not hold. The message says which."""


def _require(holds: bool, promise: str, raft: Raft) -> None:
    if not holds:
        raise InvariantBroken(
            f"{promise}: {raft.node_id} {raft.role.name} term={raft.term} last={raft.log.last_index} "
            f"written={raft.log.written_index} durable={raft.log.durable_index} commit={raft.log.commit_index}"
        )


class Watch:
    """Remembers one running node between steps. A restarted node gets a new one."""

    def __init__(self, raft: Raft) -> None:
        self._raft = raft
        self._term = raft.term
        self._vote = raft.vote
        self._commit = raft.log.commit_index
        self._role = raft.role
        self._last_index = raft.log.last_index
        self._last_crc = raft.log.last_crc

    def check(self) -> None:
        """Raises InvariantBroken."""
        raft, log = self._raft, self._raft.log
        if raft.failed is not None:
            return
        # 7: order of the marks.
        _require(
            log.commit_index <= log.written_index <= log.last_index and log.durable_index <= log.written_index,
            "commit <= written <= last and durable <= written",
            raft,
        )
        # 6: never backwards.
        _require(raft.term >= self._term, "the term never falls", raft)
        _require(
            raft.term > self._term or self._vote is None or raft.vote == self._vote,
            "a vote never changes within a term (Raft 5.2)",
            raft,
        )
        _require(log.commit_index >= self._commit, "the commit index never falls", raft)
        if raft.role is Role.LEADER:
            self._check_leader(raft)
        else:
            _require(not raft.progress and not raft.is_transferring, "only a leader tracks peers", raft)
            _require(not raft.reads_waiting, "only a leader keeps reads waiting", raft)
        self._check_members(raft)
        self._term, self._vote, self._commit, self._role = raft.term, raft.vote, log.commit_index, raft.role
        self._last_index, self._last_crc = log.last_index, log.last_crc

    def _check_members(self, raft: Raft) -> None:
        index, commit_index, in_force = raft.config_index, raft.log.commit_index, raft.in_force
        _require(
            in_force.members == raft.configs.members and in_force.voters == in_force.members.voters,
            "one list counts",
            raft,
        )
        _require(index <= raft.log.last_index, "the CONFIG entry in force is in the log", raft)
        _require(raft.is_config_committed == (index <= commit_index), "open until committed", raft)
        if raft.role is not Role.FOLLOWER:
            # Dissertation 4.2.2: who is being removed may lead until that is committed, and nobody else does.
            _require(in_force.is_voter or not raft.is_config_committed, "only a voter campaigns or leads", raft)
        if index <= commit_index:
            return  # nothing behind the list in force: no step to judge
        chain = [raft.configs.at(commit_index), *(members for _, members in raft.configs.above(commit_index))]
        for old, new in pairwise(chain):
            try:
                check_single_step(old, new)
            except LocalError as error:
                raise InvariantBroken(f"one member at a time: {error}") from error

    def _check_leader(self, raft: Raft) -> None:
        log, peers = raft.log, set(raft.in_force.peers)
        _require(raft.leader == raft.node_id == raft.vote, "a leader follows and voted for itself", raft)
        _require(raft.is_disk_ok, "a node with a bad disk does not lead", raft)
        if self._role is Role.LEADER and self._term == raft.term:
            # 2: leader append-only (Raft 5.3).
            _require(log.last_index >= self._last_index, "a leader never shortens its log", raft)
            _require(
                log.last_index > self._last_index or log.last_crc == self._last_crc,
                "a leader never rewrites its log",
                raft,
            )
        _require(raft.progress.keys() >= peers, "a leader tracks every member", raft)
        if raft.is_config_committed:
            _require(raft.progress.keys() == peers, "a leader tracks members only", raft)
        if 0 < raft.noop_index <= log.commit_index:
            open_changes = len(raft.configs.above(log.commit_index))
            _require(open_changes <= 1, "one change of members at a time (Raft 6)", raft)
        if log.commit_index > self._commit:
            # 7: what is committed, a quorum of the voters in force has.
            marks = {
                peer: progress.durable if raft.config.sync else progress.written
                for peer, progress in raft.progress.items()
            }
            marks[raft.node_id] = log.durable_index if raft.config.sync else log.written_index
            voters = raft.in_force.voters
            holders = sum(1 for voter in voters if marks[voter] >= log.commit_index)
            _require(holders >= majority(len(voters)), "a quorum of the voters has what is committed", raft)
        _require(raft.reads_waiting <= raft.config.reads_waiting_max, "waiting reads within their bound", raft)
        # Phrases are made only when one is needed: this runs after every step of every simulated node.
        last, window = log.last_index, raft.config.window_messages_max + 1
        for peer, progress in raft.progress.items():
            if not progress.durable <= progress.written <= last:
                _require(False, f"{peer}: durable <= written <= the leader's last", raft)
            if not 1 <= progress.next_index <= last + 1:
                _require(False, f"{peer}: next index within the log", raft)
            # 15: bounded windows. One message may pass the byte limit, for it holds at least one entry.
            if len(progress.inflight) > window:
                _require(False, f"{peer}: window within its bound", raft)
