"""Who should lead next, and how leadership is handed over (dissertation 3.10): to the best of the voters when a leader
has to go, to a preferred one when nothing forces it.

A priority shortens a node's random delay before a campaign, and lets a leader that has led undisturbed for 30 s
transfer to a voter of higher priority that is connected, near and has a working disk. It deposes nobody. In the same
way a leader whose disk has no room for messages hands over to a voter that has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from attrs import define

from dledger.core import effects as fx
from dledger.core.config import RaftConfig
from dledger.core.members_in_force import MembersInForce
from dledger.core.messages import TimeoutNow
from dledger.core.outbox import Outbox
from dledger.core.progress import Progress
from dledger.core.raft_log import RaftLog
from dledger.core.replication import Replication
from dledger.core.transitions import PeerState

if TYPE_CHECKING:
    from random import Random


@define
class TransferInProgress:
    """Leadership is being handed to `target`, which campaigns with `ticket`; given up at `deadline`."""

    target: str
    ticket: int
    deadline: float
    is_sent: bool = False


def best_successor(voters: Iterable[Progress]) -> str | None:
    """Connected, with a working disk, and the furthest; None when there is nobody."""
    best = max(voters, key=lambda each: (each.is_connected, each.disk_ok, each.written), default=None)
    return None if best is None else best.peer


def preferred(candidates: Iterable[Progress], priorities: Mapping[str, int], than: str) -> str | None:
    """The one of highest priority among the candidates, if that is higher than the priority of `than`."""
    best, best_priority = None, priorities.get(than, 0)
    for candidate in candidates:
        priority = priorities.get(candidate.peer, 0)
        if priority > best_priority:
            best, best_priority = candidate.peer, priority
    return best


def jitter_share(node: str, voters: Iterable[str], priorities: Mapping[str, int]) -> float:
    """Which part of the random delay before a campaign a node takes: the more it outranks, the shorter it waits."""
    own = priorities.get(node, 0)
    return 1 / (1 + sum(1 for voter in voters if priorities.get(voter, 0) < own))


class Succession:
    """A leader's handing over: `transfer` is the one under way, `undisturbed_since` when it last gave reason to wait.

    A transfer deposes nobody: proposals stop, the target is brought level and told to campaign with a ticket, and after
    one election timeout the leader goes on leading.
    """

    __slots__ = (
        "_config",
        "_in_force",
        "_log",
        "_node_id",
        "_outbox",
        "_replication",
        "_rng",
        "transfer",
        "undisturbed_since",
    )

    def __init__(
        self,
        node_id: str,
        config: RaftConfig,
        rng: Random,
        log: RaftLog,
        in_force: MembersInForce,
        replication: Replication,
        outbox: Outbox,
    ) -> None:
        self._node_id = node_id
        self._config = config
        self._rng = rng
        self._log = log
        self._in_force = in_force
        self._replication = replication
        self._outbox = outbox
        self.transfer: TransferInProgress | None = None
        self.undisturbed_since = 0.0

    def begin_transfer(self, now: float, target: str | None) -> str | None:
        """Hand over to `target`, or to the best of the voters. Why not, or None."""
        voting_peers = self._in_force.voting_peers
        if self.transfer is not None:
            return f"a transfer to {self.transfer.target} is under way"
        if target is not None and target not in voting_peers:
            return f"{target} is not another voter of this group"
        if not voting_peers:
            return "there is no other voter"
        if target is None:
            target = best_successor(self._replication.of(voting_peers))
            assert target is not None
        deadline = now + self._config.election_timeout_min
        self.transfer = TransferInProgress(target, self._ticket(), deadline)
        self.pursue(self.transfer)
        return None

    def pursue(self, transfer: TransferInProgress) -> None:
        """Once the target has everything, tell it to campaign; proposals have stopped, so it stays level."""
        progress = self._replication.progress[transfer.target]
        if not transfer.is_sent and progress.state is PeerState.REPLICATE and progress.written == self._log.last_index:
            transfer.is_sent = True
            self._outbox.send(transfer.target, TimeoutNow(self._replication.term, transfer.ticket))

    def expire(self, now: float) -> None:
        """Give up a transfer whose target did not take over in time."""
        transfer = self.transfer
        if transfer is not None and now >= transfer.deadline:
            self.transfer = None
            self.undisturbed_since = now
            ended = fx.TransferEnded(transfer.target, False, "the target did not take over in time")
            self._outbox.effects.append(ended)

    def lead_no_more(self, reason: str) -> None:
        """Somebody else leads, or will: that is what a transfer is for."""
        if self.transfer is not None:
            self._outbox.effects.append(fx.TransferEnded(self.transfer.target, True, reason))
            self.transfer = None

    def name_successor(self) -> None:
        """We stop leading now: let the best of the others go on without waiting for a timeout."""
        successor = best_successor(self._replication.of(self._in_force.voting_peers))
        if successor is not None:
            self._outbox.send(successor, TimeoutNow(self._replication.term, self._ticket()))

    def prefer_leader(self, now: float, *, has_room: bool) -> None:
        """Hand over to a preferred voter, when nothing speaks against it (raft.md 4.3): never a forced election. Where
        this node's disk has no room for messages, whoever has room is preferred, and sooner."""
        priorities = self._config.priorities
        if self.transfer is not None or self._in_force.open_index or (has_room and not priorities):
            return
        wait = self._config.preferred_after if has_room else self._config.election_timeout_max
        if now - self.undisturbed_since < wait:
            return
        fit = [
            progress
            for progress in self._replication.of(self._in_force.voting_peers)
            if progress.is_connected
            and progress.disk_ok
            and progress.state is PeerState.REPLICATE
            and self._replication.is_near(progress)
        ]
        target = preferred(fit, priorities, self._node_id) if has_room else best_successor(fit)
        if target is not None:
            self.begin_transfer(now, target)

    def _ticket(self) -> int:
        return self._rng.getrandbits(48) | 1
