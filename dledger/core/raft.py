"""One member of a raft group, as a synchronous state machine: `step(event) -> list of effects`.

This file decides everything and does nothing. It has no clock (each event says what time it is), no chance of its own
(a `random.Random` is handed in), no disk (a `LogView` is asked, effects are returned) and no network. Two rules follow
for whoever drives it: perform the effects of a step, in order, before the next step; and step `TurnEnd` when there is
nothing more to step. Whatever happens inside one step is atomic: no append can slip in between reading our last entry
and granting a vote (sofa-jraft#882).

Theory
======

*Terms and votes* (Raft 5.1, 5.2). Time is divided into terms; a term has at most one leader, because a node votes once
per term and keeps (term, vote) on stable storage. The order of all handlers is the same: compare terms first, adopt a
higher one, only then look at anything else. A voter that compared logs first would refuse for ever without learning
the term, and the group would be stuck (dledger#85). Until `HardStateSaved` comes back, no message leaves: `_send`
holds them (at most one per peer and kind), for each carries the new term.

*Pre-vote* (dissertation 9.6). Before raising its term a node asks whether it would be elected. A voter says yes when
the asker's log is at least as good as its own (5.4.1), the proposed term is not used up, and it has not heard a leader
for the minimum election timeout. Hence a node that was cut off, or is cut off in part, comes back without disturbing a
live leader (Howard 2020). A refusal names the voter's term and the asker adopts a higher one at once: otherwise two
survivors, the one with the better log in the older term, would refuse each other for ever (etcd#8243). A voter that
saw its leader's connection die (`PeerLost(hard)`) no longer hears that leader, so killing a leader costs milliseconds
and not a timeout. The third node still answers "I have a leader" when only one link broke. After a failed election we
go back to pre-vote.

*Which log may win* (5.4.1). The last entry's term and index, taken from the stored entry and from nothing else
(dledger#52).

*Replication* (5.3). `Append` names the entry before its own by index, term and chain checksum. A follower accepts when
it has that very entry. It skips what it already has, and cuts only at the first entry that truly differs: a late or
doubled message can shorten nothing. Cutting at or below its commit index would break a promise made to a client: that
is `Fatal`. So is an entry of equal index and term but another checksum, because that is damage and not a conflict. On
a mismatch it answers with its last entry that could still agree (highest index at or below the leader's, term at or
below the leader's); the leader does the same search on its side: one round for each term that differs. Heartbeats
carry the predecessor too, so an idle group converges without new proposals (braft#292).

*Verified*. A follower's log may be longer than what this term's leader has vouched for. Everything it reports or
commits is bounded by `verified`, the highest entry known to match the leader of the term (rabbitmq/ra#508).

*Pipelining*. Per peer: PROBE (one message at a time until the logs are known to agree), REPLICATE (send ahead,
`next_index` moves back only on a rejection), SEGMENTS (the peer ends before our first entry, or too far behind). Window
64 messages or 8 MiB. Heartbeats and commit news pass the window by. Replies carry term and sequence; those of another
term, from before a rejection or from an old connection are dropped.

*Segments* (raft.md 4.7). To a peer in SEGMENTS goes one `SegmentsOffer` at each heartbeat, and no entry. It names the
first entry that the leader will send itself; what is before that, the peer's driver fetches as whole segments, from
whom it likes, while the peer goes on following: the offer counts as hearing the leader, and its answer, a rejection
that names the peer's last entry, for check-quorum. Once that entry reaches what was offered and can agree with ours,
the peer is probed as any other. Nothing is cut on the way, and a gap is never bridged, for entries still need their
predecessor.

*Written and durable*. A replica reports both marks. The quorum counts `durable` when the group syncs, else `written`;
the leader's own mark counts like any other, when its own disk reports it and never at the append call (etcd#14370).

*Commit* (5.4.2, figure 8). The leader commits an entry when a quorum has it and it is of its own term; older ones are
committed along with it. It therefore begins its term with a no-op. A follower's commit index is the least of the
leader's, `verified`, and its own written mark, so `Commit` never names bytes that are not there to read.

*Check-quorum*. A leader that a quorum has not answered for the minimum election timeout steps down: it could not commit
anyway, and its clients should look elsewhere.

*Reads* (dissertation 6.4). A leader may have been replaced without knowing it. Before it vouches for a read, it
takes its commit index (once its no-op is committed, so that nothing acknowledged in an older term is missing) and waits
until a quorum has answered a message sent after the read came: then nobody else was elected before it came. All reads
that gathered meanwhile share a round, of one message for each voter. Losing leadership refuses all that wait.

*Members* (Raft 6, dissertation 4; `membership.py`). The members in force are those of the last CONFIG entry in the log,
committed or not, on every node; a cut brings the former ones back. Everything that counts (votes, commit, check-quorum,
reads) counts the voters in force at that very moment, and the node itself only if it is one of them. Each entry moves
one member, so quorums before and after share a node. Two such entries by two leaders need not share one, though
(raft-dev 2015): hence a leader proposes one only behind its committed no-op, and while no other is open. A node joins
as a learner, which gets entries and does not count, and is promoted when it is near. A change whose voters could not
commit anything because too few are alive is refused, as there would be no way back.

Requests are answered without looking at the members, the sender's or our own (dissertation 4.1): either of us may have
become one by an entry we have not got. It is the asker that counts. So a learner votes when asked (etcd found that it
must), and nobody asks it unless it has been promoted. Whoever is no voter does not campaign, except that the entry
which removed it may be cut and the others need its log until that is committed (dissertation 4.2.2); its own vote does
not count then. A leader that removes itself leads until the entry is committed, and names a successor. A removed peer
is kept informed until then; one that was away is told when it asks for votes and stops asking. Its requests depose
nobody who hears a leader (dissertation 4.2.3).

*Late ticks*. A node that was stopped or starved must listen before it acts: a timer found late by more than half an
election timeout is set anew instead of firing.

*Transfer* (dissertation 3.10). The leader stops taking proposals, waits until the target is level, and sends
TimeoutNow with a ticket. The target runs a pre-vote with that ticket, which voters honour although they hear a leader;
so a transfer to an unfit target leaves everybody in its role. After one election timeout the leader goes on leading.

*Preferred leaders*. A priority shortens a node's random delay before a campaign, and lets a leader that has led
undisturbed for 30 s transfer to a voter of higher priority that is connected, near and has a working disk. It deposes
nobody. In the same way a leader whose disk has no room for messages hands over to a voter that has.

*Recovering*. With asynchronous flush a power loss can make a node forget what it acknowledged. Such a node is started
as `recovering`: its votes count only if every voter grants (see `Ballot`), until a leader whose commit index lies in
its own term has confirmed our log up to that index, or the operator accepts the loss. So is a node with an empty folder
under a known name: it may have acknowledged anything (nats-server#2792).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, assert_never

from dledger.core import effects as fx
from dledger.core.catch_up import bytes_behind, first_to_send, is_far_behind
from dledger.core.config import RaftConfig
from dledger.core.effects import Effect
from dledger.core.election import Ballot, is_up_to_date
from dledger.core.errors import LocalError, RemoteError
from dledger.core.events import (
    AcceptLoss,
    DiskState,
    Durable,
    Event,
    HardStateSaved,
    PeerLost,
    PeerUp,
    Propose,
    ReadIndex,
    Receive,
    Tick,
    Transfer,
    TurnEnd,
    Written,
)
from dledger.core.log import LogView
from dledger.core.membership import ConfigHistory, Members, check_single_step, decode_members, promoted
from dledger.core.messages import (
    Append,
    AppendReply,
    Message,
    PreVote,
    PreVoteReply,
    SegmentsOffer,
    TimeoutNow,
    Vote,
    VoteReply,
)
from dledger.core.progress import Progress
from dledger.core.quorum import majority, quorum_mark
from dledger.core.read_index import ReadRounds
from dledger.core.shape import check_append
from dledger.core.succession import TransferInProgress, best_successor, jitter_share, preferred
from dledger.core.transitions import ROLE_TRANSITIONS, Cause, PeerCause, PeerState
from dledger.core.types import Entry, EntryType, HardState, Role, next_position

if TYPE_CHECKING:
    from random import Random

NEVER = float("-inf")
_CONFIG = int(EntryType.CONFIG)
UNKNOWN_POSITION = -1
PROBE_BYTES_MAX = 64 * 1024
"""A probe that may be in vain carries no more than this."""
YIELD_SECONDS_MIN = 0.15
YIELD_SECONDS_MAX = 0.30
"""How long a node that would vote for another holds back its own campaign: a few rounds on any usable network."""
SPLIT_VOTE_DELAY_MIN = 0.02
SPLIT_VOTE_DELAY_MAX = 0.20


class _Broken(Exception):
    """Leaves a step after `Fatal`."""


class Raft:
    """One node of a group. Public attributes are for reading.

    `voters` is the bootstrap list, `configs` are the CONFIG entries known, ascending by index: those of the log and the
    one before its first entry; the last one is in force, committed or not. `rng` decides timeouts and nothing else.
    `hard_state` is the one last saved, `log` the log as recovered, all of it on stable storage. `commit_index` may name
    an entry that is committed for sure. `recovering`: see the essay. Raises LocalError when there is no voter or the
    CONFIG entries do not fit the log.
    """

    def __init__(
        self,
        node_id: str,
        voters: Iterable[str],
        config: RaftConfig,
        rng: Random,
        hard_state: HardState,
        log: LogView,
        now: float,
        *,
        commit_index: int = 0,
        recovering: bool = False,
        configs: Sequence[tuple[int, Members]] = (),
    ) -> None:
        self.node_id = node_id
        self.config = config
        self.configs = ConfigHistory(Members(voters), configs)
        if self.configs.index > log.last_index:
            raise LocalError(f"CONFIG entry {self.configs.index} lies behind the end of the log, {log.last_index}")
        self.members = self.configs.members
        self.voters = self.members.voters
        self.peers: tuple[str, ...] = ()
        self.is_voter = False
        self._voting_peers: tuple[str, ...] = ()
        self._jitter_share = 1.0
        if not self.members.voters:
            raise LocalError("a group without a voter")
        self._note_members()
        self.log = log
        self._rng = rng

        self.role = Role.FOLLOWER
        # A stored entry proves that its term has begun, even if the crash came before the term was saved.
        self.term = max(hard_state.term, log.last_term)
        self.vote = hard_state.vote if hard_state.term == self.term else None
        self.leader: str | None = None
        self.recovering = recovering
        self.failed: str | None = None
        self.is_disk_ok = True
        self.has_room = True

        self.last_index = log.last_index
        self.last_term = log.last_term
        crc = log.head_crc_at(log.last_index)
        self.last_crc = 0 if crc is None else crc
        self.position_end = log.position_end
        self.written_index = self.last_index
        self.durable_index = self.last_index
        # Only what is committed is ever trimmed.
        self.commit_index = min(max(commit_index, log.first_index - 1), self.last_index)
        self.configs.settle(self.commit_index)
        # The CONFIG entry in force while it is not committed, else 0.
        self._open_config = self.configs.index if self.configs.index > self.commit_index else 0
        self._is_told_removed = False

        # Follower.
        self.verified_index = 0
        self._leader_commit = self.commit_index
        self._heard_leader_at = NEVER
        self._is_fresh = True
        self._reached: set[str] = set()
        self._down: set[str] = set()
        self._reply_seq = 0
        self._reply_ok = True
        self._reply_hint = (0, 0)
        self._reply_due = False
        self._reply_marks = (0, 0)
        self._segments_from = 0

        # Pre-candidate, candidate.
        self._ballot = Ballot(self.voters)
        self._ticket = 0
        self._saw_leader = False

        # Leader.
        self.progress: dict[str, Progress] = {}
        self.noop_index = 0
        self._heartbeat_due = now
        self._quorum_since = now
        self._transfer: TransferInProgress | None = None
        self._reads = ReadRounds()
        self._undisturbed_since = now
        self._seq_of_gone: dict[str, int] = {}

        self._now = now
        self._is_unsaved = False
        self._is_save_wanted = False
        self._held: dict[tuple[str, type], fx.Send] = {}
        self._effects: list[Effect] = []
        self._appended: Sequence[Entry] = ()
        self._announced: tuple[Role, int, str | None] = (self.role, self.term, self.leader)
        self._has_deferred = False
        self._timeout = 0.0
        self._election_deadline = now
        self._arm_election_timer(now)
        if self.voters == (node_id,):
            self._campaign_soon(now, config.fresh_start_jitter_max)

    # What the driver asks

    @property
    def is_leader(self) -> bool:
        return self.role is Role.LEADER

    @property
    def accepts_proposals(self) -> bool:
        """Leader, and neither handing over nor on a bad disk. The no-op must come first."""
        return self.role is Role.LEADER and self._transfer is None

    @property
    def is_transferring(self) -> bool:
        return self._transfer is not None

    @property
    def reads_waiting(self) -> int:
        return len(self._reads)

    @property
    def config_index(self) -> int:
        """Index of the CONFIG entry whose `members` are in force; 0 for the bootstrap list."""
        return self.configs.index

    @property
    def is_config_committed(self) -> bool:
        return not self._open_config

    @property
    def deadline(self) -> float:
        """When the next `Tick` is due, in the seconds of the events' `now`."""
        if self.role is not Role.LEADER:
            return self._election_deadline
        if self._transfer is not None:
            return min(self._heartbeat_due, self._transfer.deadline)
        return self._heartbeat_due

    def step(self, event: Event) -> list[Effect]:
        """Take one event in; returns what is to be done about it, in order.

        Raises RemoteError for a message no correct peer sends and LocalError for an impossible event of the driver's;
        both leave the state as it was. After `Fatal` every step returns nothing.
        """
        if self.failed is not None:
            return []
        effects: list[Effect] = []
        self._effects = effects
        self._appended = ()
        self._now = event.now
        try:
            match event:
                case Receive():
                    self._receive(event.now, event.peer, event.message)
                case TurnEnd():
                    self._end_turn(event.now)
                case Propose():
                    self._propose(event.entries)
                case Written():
                    self._note_mark(event.index, event.term, is_durable=False)
                case Durable():
                    self._note_mark(event.index, event.term, is_durable=True)
                case Tick():
                    self._tick(event.now)
                case HardStateSaved():
                    self._hard_state_saved(event)
                case PeerLost():
                    self._peer_lost(event.now, event.peer, event.hard)
                case PeerUp():
                    self._peer_up(event.now, event.peer)
                case DiskState():
                    self._disk_state(event.now, event.ok, event.has_room)
                case Transfer():
                    self._begin_transfer(event.now, event.target)
                case ReadIndex():
                    self._read_index(event.token)
                case AcceptLoss():
                    self._accept_loss(event.now)
                case _:
                    assert_never(event)
        except _Broken:
            pass
        if self._is_save_wanted:
            self._is_save_wanted = False
            effects.insert(0, fx.SaveHardState(self.term, self.vote))
        return effects

    # Small tools

    def _break(self, reason: str) -> _Broken:
        self.failed = reason
        self._effects.append(fx.Fatal(reason))
        return _Broken()

    def _send(self, peer: str, message: Message) -> None:
        """Nothing leaves while term or vote are not on stable storage: every message carries the term (raft.md 4.2)."""
        if self._is_unsaved:
            self._held[peer, type(message)] = fx.Send(peer, message)
        else:
            self._effects.append(fx.Send(peer, message))

    def _save_hard_state(self) -> None:
        """At the end of the step, once: adopting a term and voting in it are one write."""
        self._is_unsaved = True
        self._is_save_wanted = True

    def _hard_state_saved(self, event: HardStateSaved) -> None:
        if not self._is_unsaved or (event.term, event.vote) != (self.term, self.vote):
            return
        self._is_unsaved = False
        self._effects.extend(self._held.values())
        self._held.clear()
        if self.role is Role.CANDIDATE:
            # Our own vote counts like any other: once it is on stable storage.
            self._ballot.record(self.node_id, granted=True, recovering=self.recovering)
            self._judge_round(event.now)

    def _announce(self, cause: Cause) -> None:
        state = (self.role, self.term, self.leader)
        if state != self._announced:
            self._announced = state
            self._effects.append(fx.RoleChanged(self.role, self.term, self.leader, cause.value))

    def _arm_election_timer(self, now: float) -> None:
        shortest = self.config.election_timeout_min
        span = self.config.election_timeout_max - shortest
        self._timeout = self._rng.uniform(shortest, shortest + span * self._jitter_share)
        self._election_deadline = now + self._timeout
        self._has_deferred = False

    def _campaign_soon(self, now: float, jitter_max: float, jitter_min: float = 0.0) -> None:
        span = jitter_max - jitter_min
        self._election_deadline = now + self._rng.uniform(jitter_min, jitter_min + span * self._jitter_share)
        self._has_deferred = False

    def _hears_leader(self, now: float) -> bool:
        timeout = self.config.election_timeout_min
        if self.role is Role.LEADER:
            return now - self._quorum_contact(now) < timeout
        return self.leader is not None and now - self._heard_leader_at < timeout

    def _term_at(self, index: int) -> int | None:
        """Also during the step that appends: the view shows those entries only afterwards."""
        if index == self.last_index:
            return self.last_term
        if index > self.last_index:
            return None
        appended = self._appended
        if appended and index >= appended[0].index:
            return appended[index - appended[0].index].term
        return self.log.term_at(index)

    def _last_not_above(self, index: int, term: int) -> tuple[int, int]:
        """Our last entry at or below `index` whose term is at or below `term`: the hint of either side (raft.md 4.4).

        Terms never fall along a log, so this is a binary search.
        """
        low = self.log.first_index - 1
        high = min(index, self.last_index)
        if high <= low:
            high_term = self._term_at(max(high, low))
            return max(high, 0), 0 if high_term is None else high_term
        while low < high:
            middle = (low + high + 1) // 2
            middle_term = self._term_at(middle)
            if middle_term is not None and middle_term <= term:
                low = middle
            else:
                high = middle - 1
        low_term = self._term_at(low)
        return low, 0 if low_term is None else low_term

    # Roles

    def _enter_term(self, term: int, vote: str | None) -> None:
        """What the leader of an older term vouched for, asked or was to be answered no longer counts."""
        self.term = term
        self.vote = vote
        self._save_hard_state()
        self._held.clear()
        self.verified_index = 0
        self._leader_commit = self.commit_index
        self._reply_seq = 0
        self._reply_due = False
        self._reply_marks = (0, 0)
        self._segments_from = 0

    def _follow(self, now: float, cause: Cause, term: int, leader: str | None) -> None:
        """Become, or stay, a follower of `term`; adopt and save it when it is higher than ours."""
        was = self.role
        self.role = ROLE_TRANSITIONS[was][cause]
        if term > self.term:
            self._enter_term(term, None)
        self.leader = leader
        if was is Role.LEADER:
            self.progress = {}
            self.noop_index = 0
            for token in self._reads.give_up():
                self._effects.append(fx.ReadRefused(token, cause.value))
            if self._transfer is not None:
                self._effects.append(fx.TransferEnded(self._transfer.target, True, cause.value))
                self._transfer = None
        if was is not Role.FOLLOWER or leader is not None:
            self._arm_election_timer(now)
        self._announce(cause)

    def _campaign(self, now: float, cause: Cause, ticket: int) -> None:
        """Begin a pre-vote round, where this node may."""
        if not self._may_campaign:
            self._follow(now, Cause.LEADER_SILENT, self.term, None)
            self._arm_election_timer(now)
            return
        if not self.is_disk_ok:
            self._arm_election_timer(now)
            return
        self.role = ROLE_TRANSITIONS[self.role][cause]
        if not ticket:
            self.leader = None
        self._is_fresh = False
        self._ticket = ticket
        self._saw_leader = False
        self._ballot = Ballot(self.voters)
        self._ballot.record(self.node_id, granted=True, recovering=self.recovering)
        self._election_deadline = now + self.config.round_timeout
        self._announce(cause)
        for peer in self._voting_peers:
            self._send(peer, PreVote(self.term + 1, self.last_index, self.last_term, ticket))
        self._judge_round(now)

    def _stand_for_election(self, now: float) -> None:
        """Raise the term, vote for ourselves, ask for votes (Raft 5.2)."""
        self.role = ROLE_TRANSITIONS[self.role][Cause.PRE_VOTES_WON]
        self._enter_term(self.term + 1, self.node_id)
        self.leader = None
        self._ballot = Ballot(self.voters)
        self._election_deadline = now + self.config.round_timeout
        self._announce(Cause.PRE_VOTES_WON)
        for peer in self._voting_peers:
            self._send(peer, Vote(self.term, self.last_index, self.last_term, self._ticket))

    def _lead(self, now: float) -> None:
        self.role = ROLE_TRANSITIONS[self.role][Cause.VOTES_WON]
        self.leader = self.node_id
        # Whatever made us recover: a quorum without us, or everybody, has found our log the best.
        if self.recovering:
            self.recovering = False
            self._effects.append(fx.Recovered(self.term))
        self.noop_index = 0
        self._quorum_since = now
        self._heartbeat_due = now
        self._undisturbed_since = now
        self._seq_of_gone = {}
        self._track_members()
        self._announce(Cause.VOTES_WON)
        self._effects.append(fx.NoopNeeded(self.term))

    def _judge_round(self, now: float) -> None:
        """After an answer, a lost peer or a saved vote: is the round decided?"""
        if self._ballot.is_won:
            if self.role is Role.PRE_CANDIDATE:
                self._stand_for_election(now)
            elif not self._is_unsaved:
                self._lead(now)
        elif self._ballot.is_lost(self._down) and not (self.role is Role.CANDIDATE and self._is_unsaved):
            self._lose_round(now)

    def _lose_round(self, now: float) -> None:
        was_candidate = self.role is Role.CANDIDATE
        self._follow(now, Cause.ROUND_LOST, self.term, self.leader)
        if self.leader is not None:
            return  # an attempted transfer: its leader leads on
        if was_candidate:
            # A split vote: whoever wakes first wins the next round.
            self._campaign_soon(now, SPLIT_VOTE_DELAY_MAX, SPLIT_VOTE_DELAY_MIN)
        elif not self._saw_leader:
            # Nobody to wait for, but a better log or a quorum that is out of reach; asking again disturbs nobody.
            self._campaign_soon(now, self.config.election_timeout_min, self.config.round_timeout / 2)

    def _tick(self, now: float) -> None:
        if self.role is Role.LEADER:
            self._leader_tick(now)
            return
        lateness = now - self._election_deadline
        if lateness < 0:
            return
        if lateness > self.config.election_timeout_min / 2:
            # We were stopped or starved: first listen (raft.md 4.3).
            if self.role is Role.FOLLOWER:
                self._arm_election_timer(now)
            else:
                self._follow(now, Cause.ROUND_LOST, self.term, None)
        elif self.role is Role.FOLLOWER:
            self._campaign(now, Cause.ELECTION_TIMEOUT, 0)
        else:
            self._lose_round(now)

    def _leader_tick(self, now: float) -> None:
        transfer = self._transfer
        if transfer is not None and now >= transfer.deadline:
            self._transfer = None
            self._undisturbed_since = now
            self._effects.append(fx.TransferEnded(transfer.target, False, "the target did not take over in time"))
        if now < self._heartbeat_due:
            return
        if now - self._heartbeat_due > self.config.election_timeout_min / 2:
            self._quorum_since = now
        if self._voting_peers and now - self._quorum_contact(now) > self.config.election_timeout_min:
            self._follow(now, Cause.QUORUM_LOST, self.term, None)
            return
        self._heartbeat_due = now + self.config.heartbeat
        recent = now - self.config.heartbeat / 2
        for progress in self.progress.values():
            if progress.last_sent_at <= recent:
                self._send_heartbeat(now, progress)
        self._prefer_leader(now)

    def _quorum_contact(self, now: float) -> float:
        """The last moment at which a quorum of the voters, we included if we are one, was known to follow us."""
        contacts = [max(self.progress[peer].last_reply_at, self._quorum_since) for peer in self._voting_peers]
        if self.is_voter:
            contacts.append(now)
        return quorum_mark(contacts)

    # Connections and disk

    def _peer_lost(self, now: float, peer: str, hard: bool) -> None:
        if hard:
            self._down.add(peer)
        progress = self.progress.get(peer)
        if progress is not None:
            progress.is_connected = False
            self._restart_peer(progress)
        elif self.role is Role.FOLLOWER:
            if hard and peer == self.leader:
                self._heard_leader_at = NEVER
                self._follow(now, Cause.LEADER_CLOSED, self.term, None)
                self._campaign_soon(now, self.config.peer_lost_jitter_max)
        elif hard and self.role is not Role.LEADER:
            self._judge_round(now)

    def _peer_up(self, now: float, peer: str) -> None:
        self._down.discard(peer)
        progress = self.progress.get(peer)
        if progress is not None:
            progress.is_connected = True
            self._restart_peer(progress)
        elif self._is_fresh:
            self._reached.add(peer)
            is_all = self._reached.issuperset(self._voting_peers)
            if is_all and self.is_voter and self.leader is None and self.role is Role.FOLLOWER:
                self._is_fresh = False
                self._campaign_soon(now, self.config.fresh_start_jitter_max)

    def _restart_peer(self, progress: Progress) -> None:
        """What was under way may be lost: find out again where we agree."""
        progress.change(PeerCause.CONNECTION)
        progress.next_index = progress.written + 1 if progress.written else self.last_index + 1

    def _disk_state(self, now: float, ok: bool, has_room: bool) -> None:
        self.is_disk_ok = ok
        self.has_room = has_room
        if ok:
            return
        if self.role is Role.LEADER:
            # Heartbeats come from the loop and writes from the disk: without this a dead disk keeps the throne
            # (hashicorp/raft#503). Whoever is furthest gets the word to go on.
            self._name_successor()
            self._follow(now, Cause.DISK_BAD, self.term, None)
        elif self.role is not Role.FOLLOWER:
            self._follow(now, Cause.DISK_BAD, self.term, None)

    def _accept_loss(self, now: float) -> None:
        if not self.recovering:
            return
        self.recovering = False
        self._effects.append(fx.Recovered(self.term))
        if self.role is not Role.FOLLOWER:
            # Our own vote was counted as a doubtful one.
            self._follow(now, Cause.LOSS_ACCEPTED, self.term, self.leader)
        if self.leader is None:
            self._campaign_soon(now, self.config.fresh_start_jitter_max)

    # Messages

    def _receive(self, now: float, peer: str, message: Message) -> None:
        if peer == self.node_id:
            raise RemoteError(f"a message of {peer} to itself")
        if self._down:
            self._down.discard(peer)
        match message:
            case AppendReply():
                self._receive_append_reply(now, peer, message)
            case Append():
                self._receive_append(now, peer, message)
            case PreVote():
                self._receive_pre_vote(now, peer, message)
            case PreVoteReply():
                self._receive_pre_vote_reply(now, peer, message)
            case Vote():
                self._receive_vote(now, peer, message)
            case VoteReply():
                self._receive_vote_reply(now, peer, message)
            case TimeoutNow():
                self._receive_timeout_now(now, peer, message)
            case SegmentsOffer():
                self._receive_segments_offer(now, peer, message)
            case _:
                assert_never(message)

    def _receive_pre_vote(self, now: float, peer: str, message: PreVote) -> None:
        """Never changes term or vote (dissertation 9.6)."""
        transfer = self._transfer
        if self.role is Role.LEADER:
            is_ordered = transfer is not None and transfer.ticket == message.ticket and transfer.target == peer
        else:
            is_ordered = message.ticket != 0
        has_leader = not is_ordered and self._hears_leader(now)
        # In a term that is already ours we may have voted, and then a grant would be a lie.
        is_term_free = message.term > self.term or (message.term == self.term and self.vote in (None, peer))
        is_log_good = self._accepts_log(message)
        # By what is committed the asker has no vote, and it knows no more than we do: it can stop asking.
        is_longer = (message.last_term, message.last_index) > (self.last_term, self.last_index)
        is_member = peer in self.voters
        is_removed = not is_member and not self._open_config and not is_longer
        granted = is_term_free and not has_leader and is_log_good and not is_removed
        self._send(peer, PreVoteReply(self.term, message.term, granted, has_leader, self.recovering, is_removed))
        if not is_member:
            return
        if not granted:
            if not is_log_good and self.role is Role.FOLLOWER and not self._hears_leader(now):
                # Somebody misses a leader, we hear none either, and ours is the better log.
                soon = now + self._rng.uniform(0.0, self.config.peer_lost_jitter_max)
                self._election_deadline = min(self._election_deadline, soon)
            return
        if self.role is Role.PRE_CANDIDATE:
            # Two at once would split the vote. The better log, else the smaller name, goes on.
            ours = (self.last_term, self.last_index)
            theirs = (message.last_term, message.last_index)
            if not self._ticket and (theirs > ours or (theirs == ours and peer < self.node_id)):
                self._follow(now, Cause.YIELDED, self.term, None)
                self._campaign_soon(now, YIELD_SECONDS_MAX, YIELD_SECONDS_MIN)
                self._has_deferred = True
        elif self.role is Role.FOLLOWER and not self._has_deferred:
            held_back = now + self._rng.uniform(YIELD_SECONDS_MIN, YIELD_SECONDS_MAX)
            if self._election_deadline < held_back:
                self._election_deadline = held_back
                # Once per timer: an asker that never wins must not hold us back for ever.
                self._has_deferred = True

    def _accepts_log(self, message: PreVote | Vote) -> bool:
        return is_up_to_date(message.last_term, message.last_index, self.last_term, self.last_index)

    def _receive_pre_vote_reply(self, now: float, peer: str, message: PreVoteReply) -> None:
        if message.term > self.term and not message.granted:
            # Without this, the survivor with the better log in the older term never gets through (etcd#8243, #8501).
            was_asking = self.role is Role.PRE_CANDIDATE
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
            if was_asking and not message.has_leader:
                self._campaign_soon(now, self.config.peer_lost_jitter_max)
            return
        if self.role is not Role.PRE_CANDIDATE or message.proposed != self.term + 1:
            return
        if message.removed and not message.granted:
            self._is_told_removed = True
            self._follow(now, Cause.REMOVED, self.term, None)
            return
        self._saw_leader = self._saw_leader or message.has_leader
        self._ballot.record(peer, granted=message.granted, recovering=message.recovering)
        self._judge_round(now)

    def _receive_vote(self, now: float, peer: str, message: Vote) -> None:
        """Raft 5.2, 5.4.1. The term first; "I hear a leader" is the pre-vote's question, a real vote always counts.

        Except for a node that is no voter as far as we know: it must not depose a leader that we hear (dissertation
        4.2.3). Otherwise votes are given without looking at the members, the asker's or ours: it is the asker that
        counts, and we may have missed that either of us has become a voter (dissertation 4.1).
        """
        if peer not in self.voters and not message.ticket and self._hears_leader(now):
            self._send(peer, VoteReply(self.term, False, self.recovering))
            return
        if message.term > self.term:
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
        granted = message.term == self.term and self.vote in (None, peer) and self._accepts_log(message)
        if granted:
            if self.vote is None:
                self.vote = peer
                self._save_hard_state()
            self._arm_election_timer(now)
        self._send(peer, VoteReply(self.term, granted, self.recovering))

    def _receive_vote_reply(self, now: float, peer: str, message: VoteReply) -> None:
        if message.term > self.term:
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
        elif message.term == self.term and self.role is Role.CANDIDATE:
            self._ballot.record(peer, granted=message.granted, recovering=message.recovering)
            self._judge_round(now)

    def _receive_timeout_now(self, now: float, peer: str, message: TimeoutNow) -> None:
        is_ours = message.term == self.term and peer == self.leader and self.role is Role.FOLLOWER
        if is_ours and self.is_voter and not self.recovering:
            self._campaign(now, Cause.TIMEOUT_NOW, message.ticket)

    # Following

    def _receive_append(self, now: float, peer: str, message: Append) -> None:
        check_append(message, self.config.segment_bytes)
        if not self._hear_leader(now, peer, message.term):
            return
        self._reply_seq = message.seq
        if not self._has_predecessor(message):
            self._reply_ok = False
            self._reply_hint = self._last_not_above(message.prev_index, message.prev_term)
            self._reply_due = True
            return
        entries = message.entries
        if entries:
            self._take(entries)
        self._reply_ok = True
        verified = message.prev_index + len(entries)
        if verified > self.verified_index:
            self.verified_index = verified
        if message.commit > self._leader_commit:
            self._leader_commit = message.commit
        self._advance_follower_commit()
        # With entries still on their way to the disk the mark that reports them is the better answer.
        mark = self.durable_index if self.config.sync else self.written_index
        if not entries or mark >= verified:
            self._reply_due = True

    def _hear_leader(self, now: float, peer: str, term: int) -> bool:
        """A leader of `term` speaks to us, be it a member for us or not (dissertation 4.1). False: of an old term."""
        if term < self.term:
            # The sender learns our term from this and steps down (dledger#85). No sequence: it would be taken for an
            # answer of our term if the sender leads that one by now.
            self._send(peer, AppendReply(self.term, 0, False, 0, 0))
            return False
        if term > self.term:
            self._follow(now, Cause.HIGHER_TERM, term, peer)
        elif self.role is Role.LEADER or self.leader not in (None, peer):
            raise self._break(f"{peer} and {self.leader} both lead term {self.term} (Raft 5.2)")
        elif self.role is Role.PRE_CANDIDATE and self._ticket:
            # This very leader told us to campaign; what it sent behind that is no reason to stop.
            self.leader = peer
        elif self.leader is None or self.role is not Role.FOLLOWER:
            self._follow(now, Cause.LEADER_HEARD, self.term, peer)
        self._heard_leader_at = now
        if self.role is Role.FOLLOWER:
            self._election_deadline = now + self._timeout
        self._is_fresh = False
        self._is_told_removed = False
        return True

    def _receive_segments_offer(self, now: float, peer: str, message: SegmentsOffer) -> None:
        """The leader does not send us what we lack: it has to come as whole segments (raft.md 4.7)."""
        if message.seq < 1 or message.first_index < 1:
            raise RemoteError(f"impossible offer: {message.seq=} {message.first_index=}")
        if not self._hear_leader(now, peer, message.term):
            return
        self._reply_seq = message.seq
        self._reply_ok = False
        self._reply_hint = (self.last_index, self.last_term)
        self._reply_due = True
        if message.commit > self._leader_commit:
            self._leader_commit = message.commit
        if message.first_index != self._segments_from:
            self._segments_from = message.first_index
            self._effects.append(fx.NeedSegments(peer, message.first_index))

    def _has_predecessor(self, message: Append) -> bool:
        """Do we hold the very entry before the leader's? (Raft 5.3, consistency check)"""
        index = message.prev_index
        if index > self.last_index:
            return False
        if index < self.log.first_index - 1:
            # Purged here, hence committed: no conflict and nothing to delete (openraft#511).
            return True
        term = self._term_at(index)
        if term != message.prev_term:
            if index <= self.commit_index:
                raise self._break(f"committed entry {index} has term {term} here and {message.prev_term} at the leader")
            return False
        crc = self.last_crc if index == self.last_index else self.log.head_crc_at(index)
        if crc != message.prev_crc:
            raise self._break(f"entry {index} of term {term} differs from the leader's: one of the two is damaged")
        return True

    def _take(self, entries: Sequence[Entry]) -> None:
        """Skip what we have, cut only at a true conflict, append the rest (Raft 5.3; never shorten for a late
        message)."""
        known = 0
        if entries[0].index <= self.last_index:
            for entry in entries:
                index = entry.index
                if index > self.last_index:
                    break
                term = self._term_at(index)
                if term is None and index < self.log.first_index:
                    known += 1
                    continue
                if term != entry.term:
                    self._cut(index)
                    break
                crc = self.last_crc if index == self.last_index else self.log.head_crc_at(index)
                if crc != entry.head_crc:
                    raise self._break(
                        f"entry {index} of term {term} differs from the leader's: one of the two is damaged"
                    )
                known += 1
        if known < len(entries):
            self._append(entries[known:] if known else entries)

    def _cut(self, from_index: int) -> None:
        if from_index <= self.commit_index:
            raise self._break(f"asked to cut committed entry {from_index}; the commit index is {self.commit_index}")
        keep = from_index - 1
        term, crc = self.log.term_at(keep), self.log.head_crc_at(keep)
        if term is None or crc is None:
            raise self._break(f"asked to cut at {from_index}, before the first retained entry")
        kept = self.log.entries(keep, 1) if keep >= self.log.first_index else ()
        self._effects.append(fx.Cut(from_index))
        self.last_index, self.last_term, self.last_crc = keep, term, crc
        self.position_end = kept[0].end if kept else UNKNOWN_POSITION if keep else 0
        self.written_index = min(self.written_index, keep)
        self.durable_index = min(self.durable_index, keep)
        if self.configs.cut(from_index):
            self._change_members()

    def _append(self, entries: Sequence[Entry]) -> None:
        first, last = entries[0], entries[-1]
        if self.position_end != UNKNOWN_POSITION and first.position != next_position(
            self.position_end, len(first.frame), self.config.segment_bytes
        ):
            raise self._break(
                f"entry {first.index} claims position {first.position}; our log ends at {self.position_end}"
            )
        configs = [entry for entry in entries if entry.type == _CONFIG]
        try:
            changes = [(entry.index, decode_members(entry.body)) for entry in configs]
        except ValueError as error:
            raise self._break(f"a CONFIG entry between {first.index} and {last.index}: {error}") from error
        self._effects.append(fx.Append(entries))
        self._appended = entries
        self.last_index, self.last_term, self.last_crc = last.index, last.term, last.head_crc
        self.position_end = last.end
        for index, members in changes:
            self.configs.append(index, members)
            self._change_members()

    def _advance_follower_commit(self) -> None:
        commit = min(self._leader_commit, self.verified_index, self.written_index)
        if commit > self.commit_index:
            self.commit_index = commit
            self._effects.append(fx.Commit(commit))
            if 0 < self._open_config <= commit:
                self._settle_members()
        # Only a commit index in the leader's own term covers everything that was ever committed (Raft 5.4.2), so only
        # that one shows what a power loss may have taken from us.
        if (
            self.recovering
            and self.leader is not None
            and self.commit_index >= self._leader_commit
            and self.verified_index >= self.commit_index
            and self._term_at(self.commit_index) == self.term
        ):
            self.recovering = False
            self._effects.append(fx.Recovered(self.term))

    def _end_follower_turn(self) -> None:
        leader = self.leader
        if leader is None or not self._reply_seq:
            return
        written = min(self.written_index, self.verified_index)
        durable = min(self.durable_index, self.verified_index)
        if not self._reply_due and (durable if self.config.sync else written) <= self._reply_marks[self.config.sync]:
            return
        self._reply_due = False
        self._reply_marks = (written, durable)
        hint_index, hint_term = (0, 0) if self._reply_ok else self._reply_hint
        self._send(
            leader,
            AppendReply(
                self.term,
                self._reply_seq,
                self._reply_ok,
                written,
                durable,
                hint_index,
                hint_term,
                self.is_disk_ok and self.has_room,
            ),
        )

    # Leading

    def _propose(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        first = entries[0]
        if not self.accepts_proposals:
            reason = "leadership is being handed over" if self.is_transferring else "this node is not the leader"
            self._effects.append(fx.Refused(entries, reason))
            return
        if entries[-1].term != self.term:
            self._effects.append(fx.Refused(entries, f"term {entries[-1].term} is over"))
            return
        if not self.noop_index and first.type != EntryType.NOOP:
            # Behind the no-op only: what is before it could not be committed by counting (Raft 5.4.2).
            self._effects.append(fx.Refused(entries, "the no-op of this term must come first"))
            return
        if (first.index, first.prev_crc) != (self.last_index + 1, self.last_crc):
            raise LocalError(
                f"proposal at index {first.index} does not continue the log, which ends at {self.last_index}"
            )
        configs = [entry for entry in entries if entry.type == _CONFIG]
        if configs:
            refusal = self._refuse_members(configs)
            if refusal is not None:
                self._effects.append(fx.Refused(entries, refusal))
                return
        self._append(entries)
        if not self.noop_index:
            self.noop_index = first.index

    def _note_mark(self, index: int, term: int, *, is_durable: bool) -> None:
        if self._term_at(index) != term:
            # The entry was cut after the write began (raft.md 4.4).
            return
        if index > self.written_index:
            self.written_index = index
        if is_durable and index > self.durable_index:
            self.durable_index = index
        if self.role is Role.LEADER:
            self._advance_leader_commit()
        else:
            self._advance_follower_commit()

    def _advance_leader_commit(self) -> None:
        progress = self.progress
        if self.config.sync:
            marks = [progress[peer].durable for peer in self._voting_peers]
            own = self.durable_index
        else:
            marks = [progress[peer].written for peer in self._voting_peers]
            own = self.written_index
        if self.is_voter:
            marks.append(own)
        commit = min(quorum_mark(marks), self.written_index)
        # Raft 5.4.2: only an entry of our own term is committed by counting; all of ours stand behind the no-op.
        if commit > self.commit_index and 0 < self.noop_index <= commit:
            self.commit_index = commit
            self._effects.append(fx.Commit(commit))
            if self._reads:
                self._confirm_reads()
            if 0 < self._open_config <= commit:
                self._settle_members()

    def _receive_append_reply(self, now: float, peer: str, message: AppendReply) -> None:
        if message.term > self.term:
            if self.role is Role.LEADER and peer not in self.progress:
                return  # a removed node deposes nobody
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
            return
        if self.role is not Role.LEADER or message.term != self.term:
            return
        progress = self.progress.get(peer)
        if progress is None:
            return  # it has been removed meanwhile
        seq = message.seq
        if seq > progress.seq or message.written > self.last_index or message.durable > message.written:
            raise RemoteError(f"{peer} answers what was never sent: {message}")
        if seq <= progress.stale_seq or seq < progress.reply_seq:
            return
        progress.reply_seq = seq
        progress.last_reply_at = now
        progress.disk_ok = message.disk_ok
        progress.note_answered(seq)
        has_more = False
        if message.written > progress.written:
            progress.written = message.written
            has_more = True
        if message.durable > progress.durable:
            progress.durable = message.durable
            has_more = True
        if message.ok:
            if progress.state is PeerState.PROBE and seq >= progress.probe_seq:
                if self._is_far_behind(progress.written):
                    self._offer_segments(progress, PeerCause.FAR_BEHIND)
                else:
                    progress.change(PeerCause.MATCHED)
        else:
            self._step_back(progress, message)
        if has_more:
            self._advance_leader_commit()
        if self._reads:
            self._confirm_reads()
        transfer = self._transfer
        if transfer is not None and transfer.target == peer:
            self._pursue_transfer(transfer)

    def _step_back(self, progress: Progress, message: AppendReply) -> None:
        """A rejection: jump to the last entry that can agree, by the follower's hint and our own terms."""
        agreed, agreed_term = self._last_not_above(message.hint_index, message.hint_term)
        # Within one connection a follower loses nothing it reported; behind a new one it may have, by a power loss.
        progress.written = min(progress.written, message.hint_index)
        progress.durable = min(progress.durable, message.hint_index)
        # A term above the hinted one: the search ended at our first entry without finding agreement.
        can_agree = agreed_term <= message.hint_term
        if progress.state is PeerState.SEGMENTS:
            if can_agree and agreed >= progress.segments_until - 1:
                progress.change(PeerCause.REACHED)
                progress.next_index = agreed + 1
        elif not can_agree or agreed + 1 < self.log.first_index:
            self._offer_segments(progress, PeerCause.BELOW_FIRST)
        elif self._is_far_behind(agreed):
            self._offer_segments(progress, PeerCause.FAR_BEHIND)
        else:
            progress.change(PeerCause.REJECTED)
            progress.next_index = agreed + 1

    # Segments

    def _offer_segments(self, progress: Progress, cause: PeerCause) -> None:
        progress.change(cause)
        progress.segments_until = first_to_send(self.log, self.commit_index, self.position_end, self.config)
        progress.next_index = progress.segments_until

    def _is_far_behind(self, index: int) -> bool:
        return is_far_behind(self.log, index, self.commit_index, self.position_end, self.config)

    # Sending

    def _send_heartbeat(self, now: float, progress: Progress) -> None:
        if progress.state is PeerState.SEGMENTS:
            self._send_offer(now, progress)
        else:
            self._send_append(now, progress, ())

    def _send_offer(self, now: float, progress: Progress) -> None:
        # Retention goes on meanwhile.
        progress.segments_until = max(progress.segments_until, self.log.first_index)
        progress.next_index = progress.segments_until
        progress.seq += 1
        progress.last_sent_at = now
        progress.is_probe_sent = True
        offer = SegmentsOffer(self.term, progress.seq, progress.segments_until, self.commit_index)
        self._effects.append(fx.Send(progress.peer, offer))

    def _send_append(self, now: float, progress: Progress, entries: Sequence[Entry]) -> None:
        prev_index = progress.next_index - 1
        if prev_index == self.last_index:
            prev_term, prev_crc = self.last_term, self.last_crc
        elif prev_index == progress.prev_index and prev_index >= self.log.first_index - 1:
            prev_term, prev_crc = progress.prev_term, progress.prev_crc
        else:
            term, crc = self.log.term_at(prev_index), self.log.head_crc_at(prev_index)
            if term is None or crc is None:
                # Trimmed since.
                self._offer_segments(progress, PeerCause.BELOW_FIRST)
                self._send_offer(now, progress)
                return
            prev_term, prev_crc = term, crc
        progress.seq += 1
        message = Append(self.term, prev_index, prev_term, prev_crc, self.commit_index, progress.seq, entries)
        progress.last_sent_at = now
        progress.commit_sent = self.commit_index
        if entries:
            last = entries[-1]
            progress.note_sent(sum([len(entry.frame) for entry in entries]))
            progress.next_index = last.index + 1
            progress.prev_index, progress.prev_term, progress.prev_crc = last.index, last.term, last.head_crc
        self._effects.append(fx.Send(progress.peer, message))

    def _end_turn(self, now: float) -> None:
        if self.role is not Role.LEADER:
            self._end_follower_turn()
            return
        config = self.config
        if self._reads:
            self._begin_read_round(now)
        for progress in self.progress.values():
            if progress.state is PeerState.REPLICATE:
                while (
                    progress.next_index <= self.last_index
                    and len(progress.inflight) < config.window_messages_max
                    and progress.inflight_bytes < config.window_bytes_max
                ):
                    entries = self.log.entries(progress.next_index, config.message_bytes_max)
                    if not entries and progress.next_index >= self.log.first_index:
                        break  # on their way from the disk
                    self._send_append(now, progress, entries)
                    if not entries:
                        break
                if progress.commit_sent < self.commit_index:
                    # Followers serve reads up to their commit index: news at once, window or not (raft.md 4.8).
                    self._send_append(now, progress, ())
            elif not progress.is_probe_sent and progress.is_connected:
                if progress.state is PeerState.PROBE:
                    self._probe(now, progress)
                else:
                    self._send_offer(now, progress)

    def _probe(self, now: float, progress: Progress) -> None:
        entries: Sequence[Entry] = ()
        if progress.next_index <= self.last_index:
            bytes_max = min(PROBE_BYTES_MAX, self.config.message_bytes_max)
            entries = self.log.entries(progress.next_index, bytes_max)
            if entries and len(entries[0].frame) > bytes_max:
                entries = ()
        self._send_append(now, progress, entries)
        progress.is_probe_sent = True
        progress.probe_seq = progress.seq

    # Handing over

    def _begin_transfer(self, now: float, target: str | None) -> None:
        refusal = None
        if self.role is not Role.LEADER:
            refusal = "this node is not the leader"
        elif self._transfer is not None:
            refusal = f"a transfer to {self._transfer.target} is under way"
        elif target is not None and target not in self._voting_peers:
            refusal = f"{target} is not another voter of this group"
        elif not self._voting_peers:
            refusal = "there is no other voter"
        if refusal is not None:
            self._effects.append(fx.TransferEnded(target, False, refusal))
            return
        if target is None:
            target = best_successor(self._voters_progress())
            assert target is not None
        deadline = now + self.config.election_timeout_min
        self._transfer = TransferInProgress(target, self._rng.getrandbits(48) | 1, deadline)
        self._pursue_transfer(self._transfer)

    def _pursue_transfer(self, transfer: TransferInProgress) -> None:
        """Once the target has everything, tell it to campaign; proposals have stopped, so it stays level."""
        progress = self.progress[transfer.target]
        if not transfer.is_sent and progress.state is PeerState.REPLICATE and progress.written == self.last_index:
            transfer.is_sent = True
            self._send(transfer.target, TimeoutNow(self.term, transfer.ticket))

    def _name_successor(self) -> None:
        """We stop leading now: let the best of the others go on without waiting for a timeout."""
        successor = best_successor(self._voters_progress())
        if successor is not None and not self._is_unsaved:
            self._send(successor, TimeoutNow(self.term, self._rng.getrandbits(48) | 1))

    def _prefer_leader(self, now: float) -> None:
        """Hand over to a preferred voter, when nothing speaks against it (raft.md 4.3): never a forced election. Where
        this node's disk has no room for messages, whoever has room is preferred, and sooner."""
        priorities = self.config.priorities
        if self._transfer is not None or self._open_config or (self.has_room and not priorities):
            return
        wait = self.config.preferred_after if self.has_room else self.config.election_timeout_max
        if now - self._undisturbed_since < wait:
            return
        fit = [
            progress
            for progress in self._voters_progress()
            if progress.is_connected
            and progress.disk_ok
            and progress.state is PeerState.REPLICATE
            and self._is_near(progress)
        ]
        target = preferred(fit, priorities, self.node_id) if self.has_room else best_successor(fit)
        if target is not None:
            self._begin_transfer(now, target)

    def _voters_progress(self) -> list[Progress]:
        return [self.progress[peer] for peer in self._voting_peers]

    def _is_near(self, progress: Progress) -> bool:
        behind = bytes_behind(self.log, progress.written, self.position_end)
        return behind is not None and behind <= self.config.promote_lag_bytes_max

    # Reads

    def _read_index(self, token: int) -> None:
        if self.role is not Role.LEADER:
            self._effects.append(fx.ReadRefused(token, "this node is not the leader"))
        elif len(self._reads) >= self.config.reads_waiting_max:
            self._effects.append(fx.ReadRefused(token, "too many reads wait for a confirmation"))
        else:
            self._reads.add(token)
            if self.voters == (self.node_id,):
                self._confirm_reads()

    def _begin_read_round(self, now: float) -> None:
        """Ask the voters whether we still lead, on behalf of all reads that have gathered.

        Not before the no-op is committed: until then our commit index may be behind what was acknowledged (5.4.2).
        """
        if not self._reads.is_round_due or not 0 < self.noop_index <= self.commit_index:
            return
        self._reads.begin(self.commit_index, {peer: self.progress[peer].seq for peer in self._voting_peers})
        for peer in self._voting_peers:
            self._send_heartbeat(now, self.progress[peer])

    def _confirm_reads(self) -> None:
        if self.voters == (self.node_id,) and self._reads.is_round_due and 0 < self.noop_index <= self.commit_index:
            self._reads.begin(self.commit_index, {})
        answered = {peer: self.progress[peer].reply_seq for peer in self._voting_peers}
        index, tokens = self._reads.finish(self.node_id, self.voters, answered)
        for token in tokens:
            self._effects.append(fx.ReadReady(token, index))

    # Members

    def _note_members(self) -> None:
        members = self.configs.members
        self.members = members
        self.voters = members.voters
        self.is_voter = self.node_id in members.voters
        self.peers = tuple(node for node in members.all if node != self.node_id)
        self._voting_peers = tuple(node for node in members.voters if node != self.node_id)
        self._jitter_share = jitter_share(self.node_id, self.voters, self.config.priorities)

    @property
    def _may_campaign(self) -> bool:
        """A voter; also one that is none any more by an entry that may not be committed: the others may need its log.

        Its own vote does not count then (dissertation 4.2.2).
        """
        was_voter = bool(self._open_config) and self.node_id in self.configs.at(self.commit_index).voters
        return (self.is_voter or was_voter) and not self._is_told_removed

    def _refuse_members(self, configs: Sequence[Entry]) -> str | None:
        """Why these CONFIG entries must not be appended now, or None."""
        if len(configs) > 1:
            return "one change of members at a time"
        if not 0 < self.noop_index <= self.commit_index:
            # Two leaders could otherwise change the same members in ways whose quorums do not meet (raft-dev 2015).
            return "the no-op of this term must be committed before members change"
        if self._open_config:
            return f"the change of members at entry {self._open_config} is not committed yet"
        try:
            wanted = decode_members(configs[0].body)
            check_single_step(self.members, wanted)
        except (ValueError, LocalError) as error:
            return str(error)
        learner = promoted(self.members, wanted)
        if learner is not None:
            progress = self.progress[learner]
            if not progress.is_connected or progress.state is not PeerState.REPLICATE or not self._is_near(progress):
                return f"{learner} has not caught up"
        if wanted.voters != self.voters:
            alive = sum(1 for voter in wanted.voters if voter == self.node_id or self._is_alive(voter))
            if alive < majority(len(wanted.voters)):
                return f"of the voters {', '.join(wanted.voters)} too few are alive to commit anything"
        return None

    def _is_alive(self, peer: str) -> bool:
        progress = self.progress[peer]
        return progress.is_connected and self._now - progress.last_reply_at < self.config.election_timeout_min

    def _change_members(self) -> None:
        """The log has gained or lost a CONFIG entry: from here on, everything is counted among its members."""
        self._open_config = self.configs.index if self.configs.index > self.commit_index else 0
        self._note_members()
        self._is_told_removed = False
        self._effects.append(fx.MembersChanged(self.configs.index, self.members, not self._open_config))
        if self.role is Role.LEADER:
            self._undisturbed_since = self._now
            self._track_members()
        elif self.role is not Role.FOLLOWER:
            self._follow(self._now, Cause.MEMBERS_CHANGED, self.term, self.leader)

    def _track_members(self) -> None:
        """A Progress for every other member. Who is being removed keeps his until that is committed, to hear of it."""
        tracked = set(self.peers)
        if self._open_config:
            tracked.update(self.configs.at(self.commit_index).all)
            tracked.discard(self.node_id)
        for peer in sorted(tracked - self.progress.keys()):
            self.progress[peer] = Progress(
                peer,
                self.last_index + 1,
                self._now,
                is_connected=peer not in self._down,
                seq=self._seq_of_gone.get(peer, 0),
            )
        for peer in sorted(self.progress.keys() - tracked):
            self._seq_of_gone[peer] = self.progress.pop(peer).seq

    def _settle_members(self) -> None:
        """The CONFIG entry in force is committed."""
        self.configs.settle(self.commit_index)
        self._open_config = 0
        for peer in sorted(self.progress.keys() - set(self.peers)):
            # Its last word from us; the effect below closes its connection.
            self._send_heartbeat(self._now, self.progress[peer])
        self._effects.append(fx.MembersChanged(self.configs.index, self.members, True))
        if self.role is not Role.LEADER:
            return
        self._track_members()
        if not self.is_voter:
            for progress in self.progress.values():
                self._send_heartbeat(self._now, progress)
            self._name_successor()
            self._follow(self._now, Cause.REMOVED, self.term, None)
