"""The members that count on one node at this very moment, and what that node is among them (Raft 6, dissertation 4).

They are those of the last CONFIG entry in the log, committed or not, on every node; a cut brings the former ones back.
Each entry moves one member, so quorums before and after share a node. Two such entries by two leaders need not share
one, though (raft-dev 2015): hence a leader proposes one only behind its committed no-op, and while no other is open. A
node joins as a learner, which gets entries and does not count, and is promoted when it is near. A change whose voters
could not commit anything because too few are alive is refused, as there would be no way back.

Requests are answered without looking at the members, the sender's or our own (dissertation 4.1): either of us may have
become one by an entry we have not got. It is the asker that counts. So a learner votes when asked (etcd found that it
must), and nobody asks it unless it has been promoted. Whoever is no voter does not campaign, except that the entry
which removed it may be cut and the others need its log until that is committed (dissertation 4.2.2); its own vote does
not count then. A leader that removes itself leads until the entry is committed, and names a successor. A removed peer
is kept informed until then; one that was away is told when it asks for votes and stops asking. Its requests depose
nobody who hears a leader (dissertation 4.2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dledger.core.errors import LocalError, PromiseBroken
from dledger.core.membership import ConfigHistory, Members, check_single_step, decode_members, promoted
from dledger.core.quorum import majority
from dledger.core.types import Entry, EntryType

_CONFIG = int(EntryType.CONFIG)


def config_entries(entries: Iterable[Entry]) -> Sequence[Entry]:
    """Nearly always none."""
    found: tuple[Entry, ...] = ()
    for entry in entries:
        if entry.type == _CONFIG:
            found = (*found, entry)
    return found


def members_by_index(configs: Sequence[Entry]) -> list[tuple[int, Members]]:
    """What these CONFIG entries say. Raises PromiseBroken for one that nobody can have proposed."""
    try:
        return [(entry.index, decode_members(entry.body)) for entry in configs]
    except ValueError as error:
        raise PromiseBroken(f"a CONFIG entry from {configs[0].index} on: {error}") from error


class MembersInForce:
    """Attributes are for reading, but for `is_told_removed`: a voter has told us that we are none, and no leader has
    spoken to us since. `peers` are the other members, `voting_peers` the other voters; `open_index` is the CONFIG entry
    in force while it is not committed, else 0. Raises LocalError as `ConfigHistory`, and when there is no voter.
    """

    __slots__ = (
        "_node_id",
        "history",
        "is_told_removed",
        "is_voter",
        "members",
        "open_index",
        "peers",
        "voters",
        "voting_peers",
    )

    def __init__(
        self, node_id: str, bootstrap: Members, configs: Sequence[tuple[int, Members]], commit_index: int
    ) -> None:
        self._node_id = node_id
        self.history = ConfigHistory(bootstrap, configs)
        if not self.history.members.voters:
            raise LocalError("a group without a voter")
        self.history.settle(commit_index)
        self._refresh(commit_index)

    def _refresh(self, commit_index: int) -> None:
        """The last entry of the history is in force, committed or not."""
        index, members = self.history.index, self.history.members
        self.open_index = index if index > commit_index else 0
        self.members = members
        self.voters = members.voters
        self.is_voter = self._node_id in members.voters
        self.peers = tuple(node for node in members.all if node != self._node_id)
        self.voting_peers = tuple(node for node in members.voters if node != self._node_id)
        self.is_told_removed = False

    def append(self, index: int, members: Members, commit_index: int) -> None:
        """The log has gained this CONFIG entry: from here on, everything is counted among its members (Raft 6)."""
        self.history.append(index, members)
        self._refresh(commit_index)

    def cut(self, from_index: int, commit_index: int) -> bool:
        """The log was cut there. True when that brings former members back (dissertation 4.1)."""
        if not self.history.cut(from_index):
            return False
        self._refresh(commit_index)
        return True

    def settle(self, commit_index: int) -> None:
        """The CONFIG entry in force is committed."""
        self.history.settle(commit_index)
        self.open_index = 0

    def may_campaign(self, commit_index: int) -> bool:
        """A voter; also one that is none any more by an entry that may not be committed: the others may need its log.

        Its own vote does not count then (dissertation 4.2.2).
        """
        was_voter = bool(self.open_index) and self._node_id in self.history.at(commit_index).voters
        return (self.is_voter or was_voter) and not self.is_told_removed

    def to_track(self, commit_index: int) -> set[str]:
        """Every other member; who is being removed too, until that is committed, to hear of it."""
        tracked = set(self.peers)
        if self.open_index:
            tracked.update(self.history.at(commit_index).all)
            tracked.discard(self._node_id)
        return tracked

    def refusal(
        self,
        configs: Sequence[Entry],
        *,
        is_noop_committed: bool,
        has_caught_up: Callable[[str], bool],
        is_alive: Callable[[str], bool],
    ) -> str | None:
        """Why a leader must not append these CONFIG entries now, or None. It says of each peer `has_caught_up` and
        `is_alive`."""
        if len(configs) > 1:
            return "one change of members at a time"
        if not is_noop_committed:
            # Two leaders could otherwise change the same members in ways whose quorums do not meet (raft-dev 2015).
            return "the no-op of this term must be committed before members change"
        if self.open_index:
            return f"the change of members at entry {self.open_index} is not committed yet"
        try:
            wanted = decode_members(configs[0].body)
            check_single_step(self.members, wanted)
        except (ValueError, LocalError) as error:
            return str(error)
        learner = promoted(self.members, wanted)
        if learner is not None and not has_caught_up(learner):
            return f"{learner} has not caught up"
        if wanted.voters != self.voters:
            alive = sum(1 for voter in wanted.voters if voter == self._node_id or is_alive(voter))
            if alive < majority(len(wanted.voters)):
                return f"of the voters {', '.join(wanted.voters)} too few are alive to commit anything"
        return None
