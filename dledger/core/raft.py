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
the term, and the group would be stuck (dledger#85). Until `HardStateSaved` comes back, no message leaves: `Outbox`
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

*Pipelining and segments* (raft.md 4.4, 4.7; `replication.py`). A peer is probed until the logs are known to agree, and
then sent entries ahead of its answers. One that needs what is no longer in our log, or more than is reasonable, is
offered whole segments instead.

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

*Members* (Raft 6, dissertation 4; `members_in_force.py`). Those of the last CONFIG entry in the log, committed or not;
a cut brings the former ones back. Everything that counts (votes, commit, check-quorum, reads) counts the voters in
force at that very moment, and the node itself only if it is one of them. Requests are answered without looking at the
members: it is the asker that counts.

*Late ticks*. A node that was stopped or starved must listen before it acts: a timer found late by more than half an
election timeout is set anew instead of firing.

*Transfer* (dissertation 3.10). The leader stops taking proposals, waits until the target is level, and sends
TimeoutNow with a ticket. The target runs a pre-vote with that ticket, which voters honour although they hear a leader;
so a transfer to an unfit target leaves everybody in its role. After one election timeout the leader goes on leading.

*Preferred leaders* (`succession.py`). A priority shortens a node's random delay before a campaign, and lets a leader
that nothing disturbs hand over to a better one. It deposes nobody.

*Recovering*. With asynchronous flush a power loss can make a node forget what it acknowledged. Such a node is started
as `recovering`: its votes count only if every voter grants (see `Ballot`), until a leader whose commit index lies in
its own term has confirmed our log up to that index, it is elected itself, or the operator accepts the loss. So is a
node with an empty folder under a known name: it may have acknowledged anything (nats-server#2792).

Where to read it
================

`Raft` decides role, term, vote and commit index. What has state of its own is a plain object beside it that does not
know `Raft`: `RaftLog`, `MembersInForce` and `Outbox` (what waits for the disk) on every node; `ElectionTimer` and
`Ballot` in an election; `Following`, what a follower owes its leader; `Replication`, `Succession` and `ReadRounds` of a
leader. `tests/scenarios/*.txt` show each of the following as a dialogue.

*An election*: `_tick` or `_peer_lost`, `_campaign`, `_receive_pre_vote`, `_receive_pre_vote_reply`, `_judge_round`,
`_stand_for_election`, `_receive_vote`, `_hard_state_saved`, `_receive_vote_reply`, `_lead`. The roles change by the
table in `transitions.py` only.

*A commit*: `_propose`, `Replication.end_turn`; at the follower `_receive_append`, `_end_follower_turn`; at the leader
`_receive_append_reply`, `_advance_leader_commit`; at the follower `_advance_follower_commit`.

*A transfer*: `_begin_transfer`, `Succession.pursue`; at the target `_receive_timeout_now`, an election with a ticket.

*A change of members*: `_propose`, `MembersInForce.refusal`, `_append`, `_members_changed`, `_settle_members`; `_cut`.

*A read*: `_read_index`, `_begin_read_round`, `_confirm_reads`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, assert_never

from dledger.core import effects as fx
from dledger.core import events as ev
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.effects import Effect
from dledger.core.election import Ballot, ElectionTimer, is_up_to_date
from dledger.core.errors import LocalError, PromiseBroken, RemoteError
from dledger.core.events import Event
from dledger.core.following import Following
from dledger.core.log import LogView
from dledger.core.members_in_force import MembersInForce, config_entries, members_by_index
from dledger.core.membership import Members
from dledger.core.messages import Message
from dledger.core.outbox import Outbox
from dledger.core.progress import Progress
from dledger.core.quorum import majority, quorum_mark
from dledger.core.raft_log import RaftLog
from dledger.core.read_index import ReadRounds
from dledger.core.replication import Replication
from dledger.core.shape import check_append
from dledger.core.succession import Succession, jitter_share
from dledger.core.transitions import ROLE_TRANSITIONS, Cause
from dledger.core.types import Entry, EntryType, HardState, Role

if TYPE_CHECKING:
    from random import Random


class Raft:
    """One node of a group. Public attributes are for reading.

    `voters` is the bootstrap list, `configs` are the CONFIG entries known, ascending by index: those of the log and the
    one before its first entry; the last one is in force, committed or not. `rng` gives delays and tickets.
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
        self._outbox = Outbox()
        self.log = RaftLog(log, commit_index, config.segment_bytes)
        self.in_force = MembersInForce(node_id, Members(voters), configs, self.log.commit_index)
        self.configs = self.in_force.history
        if self.configs.index > self.log.last_index:
            raise LocalError(f"CONFIG entry {self.configs.index} lies behind the end of the log, {self.log.last_index}")

        self.role = Role.FOLLOWER
        # A stored entry proves that its term has begun, even if the crash came before the term was saved.
        self.term = max(hard_state.term, log.last_term)
        self.vote = hard_state.vote if hard_state.term == self.term else None
        self.leader: str | None = None
        self.recovering = recovering
        self.failed: str | None = None
        self.is_disk_ok = True
        self.has_room = True
        self._announced: tuple[Role, int, str | None] = (self.role, self.term, self.leader)
        self._now = now

        # Connections.
        self._down: set[str] = set()
        self._reached: set[str] = set()
        self._is_fresh = True

        # Follower; pre-candidate, candidate.
        self._following = Following(self.log.commit_index)
        self._ballot = Ballot(self.in_force.voters)

        # Leader.
        self.noop_index = 0
        self._heartbeat_due = now
        self._reads = ReadRounds()
        self._replication = Replication(config, self.log, self._outbox)
        self._succession = Succession(node_id, config, rng, self.log, self.in_force, self._replication, self._outbox)

        self._timer = ElectionTimer(config, rng, now, self._share_of_delays())
        if self.in_force.voters == (node_id,):
            self._timer.fire_within(now, config.fresh_start_jitter_max)

    # What the driver asks

    @property
    def is_leader(self) -> bool:
        return self.role is Role.LEADER

    @property
    def accepts_proposals(self) -> bool:
        """Leader, and not handing over. The no-op must come first."""
        return self.role is Role.LEADER and self._succession.transfer is None

    @property
    def is_transferring(self) -> bool:
        return self._succession.transfer is not None

    @property
    def reads_waiting(self) -> int:
        return self._reads.waiting

    @property
    def last_index(self) -> int:
        return self.log.last_index

    @property
    def commit_index(self) -> int:
        return self.log.commit_index

    @property
    def verified_index(self) -> int:
        """The highest entry known to match the leader of the term."""
        return self._following.verified_index

    @property
    def progress(self) -> dict[str, Progress]:
        """What a leader knows of its peers; empty on any other node."""
        return self._replication.progress

    def is_waiting_for(self, peer: str) -> bool:
        """Whether nothing may be committed before this voter, or another one, has caught up with us as the leader."""
        in_force = self.in_force
        if not self.is_leader or peer not in in_force.voting_peers:
            return False
        caught_up = sum(map(self._replication.has_caught_up, in_force.voting_peers)) + in_force.is_voter
        return caught_up < majority(len(in_force.voters))

    @property
    def members(self) -> Members:
        return self.in_force.members

    @property
    def config_index(self) -> int:
        """Index of the CONFIG entry whose `members` are in force; 0 for the bootstrap list."""
        return self.configs.index

    @property
    def is_config_committed(self) -> bool:
        return not self.in_force.open_index

    @property
    def deadline(self) -> float:
        """When the next `Tick` is due, in the seconds of the events' `now`."""
        if self.role is not Role.LEADER:
            return self._timer.deadline
        transfer = self._succession.transfer
        if transfer is not None:
            return min(self._heartbeat_due, transfer.deadline)
        return self._heartbeat_due

    def step(self, event: Event) -> list[Effect]:
        """Take one event in; returns what is to be done about it, in order.

        Raises RemoteError for a message no correct peer sends and LocalError for an impossible event of the driver's;
        both leave the state as it was. After `Fatal` every step returns nothing.
        """
        if self.failed is not None:
            return []
        effects: list[Effect] = []
        outbox = self._outbox
        outbox.effects = effects
        self._now = event.now
        try:
            # The frequent ones first, and no `match`: on classes it builds a set for every hit.
            if isinstance(event, ev.Receive):
                self._receive(event.now, event.peer, event.message)
            elif isinstance(event, ev.TurnEnd):
                if self.role is Role.LEADER:
                    self._end_leader_turn(event.now)
                else:
                    self._end_follower_turn()
            elif isinstance(event, ev.Propose):
                self._propose(event.entries)
            elif isinstance(event, (ev.Written, ev.Durable)):
                if self.log.note_mark(event.index, event.term, isinstance(event, ev.Durable)):
                    if self.role is Role.LEADER:
                        self._advance_leader_commit()
                    else:
                        self._advance_follower_commit()
            elif isinstance(event, ev.Tick):
                self._tick(event.now)
            elif isinstance(event, ev.ReadIndex):
                self._read_index(event.token)
            elif isinstance(event, ev.HardStateSaved):
                self._hard_state_saved(event)
            elif isinstance(event, ev.PeerLost):
                self._peer_lost(event.now, event.peer, event.hard)
            elif isinstance(event, ev.PeerUp):
                self._peer_up(event.now, event.peer)
            elif isinstance(event, ev.DiskState):
                self._disk_state(event.now, event.ok, event.has_room)
            elif isinstance(event, ev.Transfer):
                self._begin_transfer(event.now, event.target)
            elif isinstance(event, ev.AcceptLoss):
                self._accept_loss(event.now)
            else:
                assert_never(event)
        except PromiseBroken as broken:
            self.failed = str(broken)
            effects.append(fx.Fatal(self.failed))
        if outbox.is_save_wanted:
            outbox.save(self.term, self.vote)
        return effects

    # Terms and roles

    def _hard_state_saved(self, event: ev.HardStateSaved) -> None:
        if not self._outbox.is_unsaved or (event.term, event.vote) != (self.term, self.vote):
            return
        self._outbox.release()
        if self.role is Role.CANDIDATE:
            # Our own vote counts like any other: once it is on stable storage.
            self._ballot.record(self.node_id, granted=True, recovering=self.recovering)
            self._judge_round(event.now)

    def _announce(self, cause: Cause) -> None:
        state = (self.role, self.term, self.leader)
        if state != self._announced:
            self._announced = state
            self._outbox.effects.append(fx.RoleChanged(self.role, self.term, self.leader, cause.value))

    def _enter_term(self, term: int, vote: str | None) -> None:
        """What the leader of an older term vouched for, asked or was to be answered no longer counts."""
        self.term = term
        self.vote = vote
        self._outbox.want_save()
        self._outbox.drop_held()
        self._following.begin_term(self.log.commit_index)

    def _follow(self, now: float, cause: Cause, term: int, leader: str | None) -> None:
        """Become, or stay, a follower of `term`; adopt and save it when it is higher than ours."""
        was = self.role
        self.role = ROLE_TRANSITIONS[was][cause]
        if term > self.term:
            self._enter_term(term, None)
        self.leader = leader
        if was is Role.LEADER:
            self._replication.end()
            self.noop_index = 0
            for token in self._reads.give_up():
                self._outbox.effects.append(fx.ReadRefused(token, cause.value))
            self._succession.lead_no_more(cause.value)
        if was is not Role.FOLLOWER or leader is not None:
            self._timer.arm(now)
        self._announce(cause)

    def _campaign(self, now: float, cause: Cause, ticket: int) -> None:
        """Begin a pre-vote round, where this node may."""
        if not self.in_force.may_campaign(self.log.commit_index):
            self._follow(now, Cause.LEADER_SILENT, self.term, None)
            self._timer.arm(now)
            return
        if not self.is_disk_ok:
            self._timer.arm(now)
            return
        self.role = ROLE_TRANSITIONS[self.role][cause]
        if not ticket:
            self.leader = None
        self._is_fresh = False
        self._ballot = Ballot(self.in_force.voters, ticket)
        self._ballot.record(self.node_id, granted=True, recovering=self.recovering)
        self._timer.begin_round(now)
        self._announce(cause)
        for peer in self.in_force.voting_peers:
            self._outbox.send(peer, msg.PreVote(self.term + 1, self.log.last_index, self.log.last_term, ticket))
        self._judge_round(now)

    def _stand_for_election(self, now: float) -> None:
        """Raise the term, vote for ourselves, ask for votes (Raft 5.2)."""
        self.role = ROLE_TRANSITIONS[self.role][Cause.PRE_VOTES_WON]
        self._enter_term(self.term + 1, self.node_id)
        self.leader = None
        ticket = self._ballot.ticket
        self._ballot = Ballot(self.in_force.voters, ticket)
        self._timer.begin_round(now)
        self._announce(Cause.PRE_VOTES_WON)
        for peer in self.in_force.voting_peers:
            self._outbox.send(peer, msg.Vote(self.term, self.log.last_index, self.log.last_term, ticket))

    def _lead(self, now: float) -> None:
        self.role = ROLE_TRANSITIONS[self.role][Cause.VOTES_WON]
        self.leader = self.node_id
        # Whatever made us recover: a quorum without us, or everybody, has found our log the best.
        if self.recovering:
            self._recovered()
        self._heartbeat_due = now
        self._succession.undisturbed_since = now
        self._replication.begin(self.term, now)
        self._track_members()
        self._announce(Cause.VOTES_WON)
        self._outbox.effects.append(fx.NoopNeeded(self.term))

    def _recovered(self) -> None:
        self.recovering = False
        self._outbox.effects.append(fx.Recovered(self.term))

    def _judge_round(self, now: float) -> None:
        """After an answer, a lost peer or a saved vote: is the round decided?"""
        is_unsaved = self._outbox.is_unsaved
        if self._ballot.is_won:
            if self.role is Role.PRE_CANDIDATE:
                self._stand_for_election(now)
            elif not is_unsaved:
                self._lead(now)
        elif self._ballot.is_lost(self._down) and not (self.role is Role.CANDIDATE and is_unsaved):
            self._lose_round(now)

    def _lose_round(self, now: float) -> None:
        was_candidate = self.role is Role.CANDIDATE
        self._follow(now, Cause.ROUND_LOST, self.term, self.leader)
        if self.leader is not None:
            return  # an attempted transfer: its leader leads on
        if was_candidate:
            # A split vote: whoever wakes first wins the next round.
            self._timer.retry_split_vote(now)
        elif not self._ballot.saw_leader:
            # Nobody to wait for, but a better log or a quorum that is out of reach; asking again disturbs nobody.
            self._timer.fire_within(now, self.config.election_timeout_min, self.config.round_timeout / 2)

    # Time

    def _hears_leader(self, now: float) -> bool:
        timeout = self.config.election_timeout_min
        if self.role is Role.LEADER:
            return now - self._quorum_contact(now) < timeout
        return self.leader is not None and now - self._following.heard_at < timeout

    def _quorum_contact(self, now: float) -> float:
        in_force = self.in_force
        return self._replication.quorum_contact(now, in_force.voting_peers, is_voter=in_force.is_voter)

    def _tick(self, now: float) -> None:
        if self.role is Role.LEADER:
            self._leader_tick(now)
            return
        lateness = now - self._timer.deadline
        if lateness < 0:
            return
        if lateness > self.config.election_timeout_min / 2:
            # We were stopped or starved: first listen (raft.md 4.3).
            if self.role is Role.FOLLOWER:
                self._timer.arm(now)
            else:
                self._follow(now, Cause.ROUND_LOST, self.term, None)
        elif self.role is Role.FOLLOWER:
            self._campaign(now, Cause.ELECTION_TIMEOUT, 0)
        else:
            self._lose_round(now)

    def _leader_tick(self, now: float) -> None:
        self._succession.expire(now)
        if now < self._heartbeat_due:
            return
        if now - self._heartbeat_due > self.config.election_timeout_min / 2:
            self._replication.forgive_silence(now)
        if self.in_force.voting_peers and now - self._quorum_contact(now) > self.config.election_timeout_min:
            self._follow(now, Cause.QUORUM_LOST, self.term, None)
            return
        self._heartbeat_due = now + self.config.heartbeat
        self._replication.send_heartbeats(now)
        self._succession.prefer_leader(now, has_room=self.has_room)

    # Connections and disk

    def _peer_lost(self, now: float, peer: str, hard: bool) -> None:
        if hard:
            self._down.add(peer)
        progress = self.progress.get(peer)
        if progress is not None:
            self._replication.set_connected(progress, False)
        elif self.role is Role.FOLLOWER:
            if hard and peer == self.leader:
                self._follow(now, Cause.LEADER_CLOSED, self.term, None)
                self._timer.fire_within(now, self.config.peer_lost_jitter_max)
        elif hard and self.role is not Role.LEADER:
            if peer == self.leader:
                # It ordered this very campaign, and is not to be heard any more, nor waited for.
                self.leader = None
            self._judge_round(now)

    def _peer_up(self, now: float, peer: str) -> None:
        self._down.discard(peer)
        progress = self.progress.get(peer)
        if progress is not None:
            self._replication.set_connected(progress, True)
        elif self._is_fresh:
            self._reached.add(peer)
            is_all = self._reached.issuperset(self.in_force.voting_peers)
            if is_all and self.in_force.is_voter and self.leader is None and self.role is Role.FOLLOWER:
                self._is_fresh = False
                self._timer.fire_within(now, self.config.fresh_start_jitter_max)

    def _disk_state(self, now: float, ok: bool, has_room: bool) -> None:
        self.is_disk_ok = ok
        self.has_room = has_room
        if ok:
            return
        if self.role is Role.LEADER:
            # Heartbeats come from the loop and writes from the disk: without this a dead disk keeps the throne
            # (hashicorp/raft#503). Whoever is furthest gets the word to go on.
            self._succession.name_successor()
            self._follow(now, Cause.DISK_BAD, self.term, None)
        elif self.role is not Role.FOLLOWER:
            self._follow(now, Cause.DISK_BAD, self.term, None)

    def _accept_loss(self, now: float) -> None:
        if not self.recovering:
            return
        self._recovered()
        if self.role is not Role.FOLLOWER:
            # Our own vote was counted as a doubtful one.
            self._follow(now, Cause.LOSS_ACCEPTED, self.term, self.leader)
        if self.leader is None:
            self._timer.fire_within(now, self.config.fresh_start_jitter_max)

    # Messages

    def _receive(self, now: float, peer: str, message: Message) -> None:
        if peer == self.node_id:
            raise RemoteError(f"a message of {peer} to itself")
        if self._down:
            self._down.discard(peer)
        if isinstance(message, msg.AppendReply):
            self._receive_append_reply(now, peer, message)
        elif isinstance(message, msg.Append):
            self._receive_append(now, peer, message)
        elif isinstance(message, msg.PreVote):
            self._receive_pre_vote(now, peer, message)
        elif isinstance(message, msg.PreVoteReply):
            self._receive_pre_vote_reply(now, peer, message)
        elif isinstance(message, msg.Vote):
            self._receive_vote(now, peer, message)
        elif isinstance(message, msg.VoteReply):
            self._receive_vote_reply(now, peer, message)
        elif isinstance(message, msg.TimeoutNow):
            self._receive_timeout_now(now, peer, message)
        elif isinstance(message, msg.SegmentsOffer):
            self._receive_segments_offer(now, peer, message)
        else:
            assert_never(message)

    # Votes

    def _receive_pre_vote(self, now: float, peer: str, message: msg.PreVote) -> None:
        """Never changes term or vote (dissertation 9.6)."""
        transfer = self._succession.transfer
        if self.role is Role.LEADER:
            is_ordered = transfer is not None and transfer.ticket == message.ticket and transfer.target == peer
        else:
            is_ordered = message.ticket != 0
        has_leader = not is_ordered and self._hears_leader(now)
        # In a term that is already ours we may have voted, and then a grant would be a lie.
        is_term_free = message.term > self.term or (message.term == self.term and self.vote in (None, peer))
        is_log_good = self._accepts_log(message)
        # By what is committed the asker has no vote, and it knows no more than we do: it can stop asking.
        ours, theirs = (self.log.last_term, self.log.last_index), (message.last_term, message.last_index)
        is_member = peer in self.in_force.voters
        is_removed = not is_member and self.is_config_committed and theirs <= ours
        granted = is_term_free and not has_leader and is_log_good and not is_removed
        self._outbox.send(
            peer, msg.PreVoteReply(self.term, message.term, granted, has_leader, self.recovering, is_removed)
        )
        if not is_member:
            return
        if not granted:
            if not is_log_good and self.role is Role.FOLLOWER and not self._hears_leader(now):
                # Somebody misses a leader, we hear none either, and ours is the better log.
                self._timer.hurry(now)
            return
        if self.role is Role.PRE_CANDIDATE:
            # Two at once would split the vote. The better log, else the smaller name, goes on.
            if not self._ballot.ticket and (theirs > ours or (theirs == ours and peer < self.node_id)):
                self._follow(now, Cause.YIELDED, self.term, None)
                self._timer.yield_round(now)
        elif self.role is Role.FOLLOWER:
            self._timer.hold_back(now)

    def _accepts_log(self, message: msg.PreVote | msg.Vote) -> bool:
        return is_up_to_date(message.last_term, message.last_index, self.log.last_term, self.log.last_index)

    def _receive_pre_vote_reply(self, now: float, peer: str, message: msg.PreVoteReply) -> None:
        if message.term > self.term and not message.granted:
            # Without this, the survivor with the better log in the older term never gets through (etcd#8243, #8501).
            was_asking = self.role is Role.PRE_CANDIDATE
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
            if was_asking and not message.has_leader:
                self._timer.fire_within(now, self.config.peer_lost_jitter_max)
            return
        if self.role is not Role.PRE_CANDIDATE or message.proposed != self.term + 1:
            return
        if message.removed and not message.granted:
            self.in_force.is_told_removed = True
            self._follow(now, Cause.REMOVED, self.term, None)
            return
        if message.has_leader:
            self._ballot.saw_leader = True
        self._ballot.record(peer, granted=message.granted, recovering=message.recovering)
        self._judge_round(now)

    def _receive_vote(self, now: float, peer: str, message: msg.Vote) -> None:
        """Raft 5.2, 5.4.1. The term first; "I hear a leader" is the pre-vote's question, a real vote always counts.

        Except for a node that is no voter as far as we know: it must not depose a leader that we hear (dissertation
        4.2.3). Otherwise votes are given without looking at the members, the asker's or ours: it is the asker that
        counts, and we may have missed that either of us has become a voter (dissertation 4.1).
        """
        if peer not in self.in_force.voters and not message.ticket and self._hears_leader(now):
            self._outbox.send(peer, msg.VoteReply(self.term, False, self.recovering))
            return
        if message.term > self.term:
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
        granted = message.term == self.term and self.vote in (None, peer) and self._accepts_log(message)
        if granted:
            if self.vote is None:
                self.vote = peer
                self._outbox.want_save()
            self._timer.arm(now)
        self._outbox.send(peer, msg.VoteReply(self.term, granted, self.recovering))

    def _receive_vote_reply(self, now: float, peer: str, message: msg.VoteReply) -> None:
        if message.term > self.term:
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
        elif message.term == self.term and self.role is Role.CANDIDATE:
            self._ballot.record(peer, granted=message.granted, recovering=message.recovering)
            self._judge_round(now)

    def _receive_timeout_now(self, now: float, peer: str, message: msg.TimeoutNow) -> None:
        is_ours = message.term == self.term and peer == self.leader and self.role is Role.FOLLOWER
        if is_ours and self.in_force.is_voter and not self.recovering:
            self._campaign(now, Cause.TIMEOUT_NOW, message.ticket)

    # Following

    def _hear_leader(self, now: float, peer: str, term: int) -> bool:
        """A leader of `term` speaks to us, be it a member for us or not (dissertation 4.1). False: of an old term."""
        if term < self.term:
            # The sender learns our term from this and steps down (dledger#85). No sequence: it would be taken for an
            # answer of our term if the sender leads that one by now.
            self._outbox.send(peer, msg.AppendReply(self.term, 0, False, 0, 0))
            return False
        if term > self.term:
            self._follow(now, Cause.HIGHER_TERM, term, peer)
        elif self.role is Role.LEADER or self.leader not in (None, peer):
            raise PromiseBroken(f"{peer} and {self.leader} both lead term {self.term} (Raft 5.2)")
        elif self.role is Role.PRE_CANDIDATE and self._ballot.ticket:
            # This very leader told us to campaign; what it sent behind that is no reason to stop.
            self.leader = peer
        elif self.leader is None or self.role is not Role.FOLLOWER:
            self._follow(now, Cause.LEADER_HEARD, self.term, peer)
        self._following.heard_at = now
        if self.role is Role.FOLLOWER:
            self._timer.restart(now)
        self._is_fresh = False
        self.in_force.is_told_removed = False
        return True

    def _receive_append(self, now: float, peer: str, message: msg.Append) -> None:
        check_append(message, self.config.segment_bytes)
        if not self._hear_leader(now, peer, message.term):
            return
        log, following = self.log, self._following
        if not log.has_predecessor(message):
            following.reject(message.seq, log.last_not_above(message.prev_index, message.prev_term))
            return
        entries = message.entries
        if entries:
            self._take(entries)
        verified = message.prev_index + len(entries)
        # With entries still on their way to the disk the mark that reports them is the better answer.
        mark = log.durable_index if self.config.sync else log.written_index
        following.accept(message, verified, not entries or mark >= verified)
        self._advance_follower_commit()

    def _take(self, entries: Sequence[Entry]) -> None:
        """Skip what we have, cut only at a true conflict, append the rest (Raft 5.3)."""
        known = 0
        if entries[0].index <= self.log.last_index:
            known, is_conflict = self.log.compare(entries)
            if is_conflict:
                self._cut(entries[known].index)
        if known < len(entries):
            news = entries[known:] if known else entries
            self._append(news, config_entries(news))

    def _receive_segments_offer(self, now: float, peer: str, message: msg.SegmentsOffer) -> None:
        """The leader does not send us what we lack: it has to come as whole segments (raft.md 4.7)."""
        if message.seq < 1 or message.first_index < 1:
            raise RemoteError(f"impossible offer: {message.seq=} {message.first_index=}")
        if not self._hear_leader(now, peer, message.term):
            return
        following = self._following
        following.reject(message.seq, (self.log.last_index, self.log.last_term))
        if message.commit > following.leader_commit:
            following.leader_commit = message.commit
        if message.first_index != following.segments_from:
            following.segments_from = message.first_index
            self._outbox.effects.append(fx.NeedSegments(peer, message.first_index))

    def _advance_follower_commit(self) -> None:
        log, following = self.log, self._following
        commit = min(following.leader_commit, following.verified_index, log.written_index)
        if commit > log.commit_index:
            self._commit(commit)
        # Only a commit index in the leader's own term covers everything that was ever committed (Raft 5.4.2), so only
        # that one shows what a power loss may have taken from us.
        if (
            self.recovering
            and self.leader is not None
            and log.commit_index >= following.leader_commit
            and following.verified_index >= log.commit_index
            and log.term_at(log.commit_index) == self.term
        ):
            self._recovered()

    def _end_follower_turn(self) -> None:
        if self.leader is None:
            return
        is_fit = self.is_disk_ok and self.has_room
        reply = self._following.reply(self.term, self.log, self.config.sync, is_fit)
        if reply is not None:
            self._outbox.send(self.leader, reply)

    # The log

    def _cut(self, from_index: int) -> None:
        self.log.cut(from_index)
        self._outbox.effects.append(fx.Cut(from_index))
        if self.in_force.cut(from_index, self.log.commit_index):
            self._members_changed()

    def _append(self, entries: Sequence[Entry], configs: Sequence[Entry]) -> None:
        changes = members_by_index(configs) if configs else ()
        self.log.append(entries)
        self._outbox.effects.append(fx.Append(entries))
        for index, members in changes:
            self.in_force.append(index, members, self.log.commit_index)
            self._members_changed()

    def _commit(self, index: int) -> None:
        self.log.commit_index = index
        self._outbox.effects.append(fx.Commit(index))
        if self._reads.waiting:
            self._confirm_reads()
        if 0 < self.in_force.open_index <= index:
            self._settle_members()

    # Leading

    def _propose(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        configs = config_entries(entries)
        refusal = self._refusal(entries, configs)
        if refusal is not None:
            self._outbox.effects.append(fx.Refused(entries, refusal))
            return
        self._append(entries, configs)
        if not self.noop_index:
            self.noop_index = entries[0].index

    def _refusal(self, entries: Sequence[Entry], configs: Sequence[Entry]) -> str | None:
        """Why these entries must not be logged now, or None. Raises LocalError where they do not continue the log."""
        first = entries[0]
        if not self.accepts_proposals:
            return "leadership is being handed over" if self.is_transferring else "this node is not the leader"
        if entries[-1].term != self.term:
            return f"term {entries[-1].term} is over"
        if not self.noop_index and first.type != EntryType.NOOP:
            # Behind the no-op only: what is before it could not be committed by counting (Raft 5.4.2).
            return "the no-op of this term must come first"
        if (first.index, first.prev_crc) != (self.log.last_index + 1, self.log.last_crc):
            raise LocalError(
                f"proposal at index {first.index} does not continue the log, which ends at {self.log.last_index}"
            )
        if not configs:
            return None
        return self.in_force.refusal(
            configs,
            is_noop_committed=self._is_noop_committed,
            has_caught_up=self._replication.has_caught_up,
            is_alive=lambda peer: self._replication.is_alive(peer, self._now),
        )

    @property
    def _is_noop_committed(self) -> bool:
        """Only then is everything committed that any older leader acknowledged (Raft 5.4.2, 8)."""
        return 0 < self.noop_index <= self.log.commit_index

    def _advance_leader_commit(self) -> None:
        progress, log, in_force = self._replication.progress, self.log, self.in_force
        if self.config.sync:
            marks = [progress[peer].durable for peer in in_force.voting_peers]
            own = log.durable_index
        else:
            marks = [progress[peer].written for peer in in_force.voting_peers]
            own = log.written_index
        if in_force.is_voter:
            marks.append(own)
        commit = min(quorum_mark(marks), log.written_index)
        # Raft 5.4.2: only an entry of our own term is committed by counting; all of ours stand behind the no-op.
        if commit > log.commit_index and 0 < self.noop_index <= commit:
            self._commit(commit)

    def _receive_append_reply(self, now: float, peer: str, message: msg.AppendReply) -> None:
        replication = self._replication
        if message.term > self.term:
            if self.role is Role.LEADER and peer not in replication.progress:
                return  # a removed node deposes nobody
            self._follow(now, Cause.HIGHER_TERM, message.term, None)
            return
        if self.role is not Role.LEADER or message.term != self.term:
            return
        progress = replication.progress.get(peer)
        if progress is None:
            return  # it has been removed meanwhile
        has_more = replication.take_reply(now, progress, message)
        if has_more is None:
            return
        if has_more:
            self._advance_leader_commit()
        if self._reads.waiting:
            self._confirm_reads()
        transfer = self._succession.transfer
        if transfer is not None and transfer.target == peer:
            self._succession.pursue(transfer)

    def _end_leader_turn(self, now: float) -> None:
        if self._reads.waiting:
            self._begin_read_round(now)
        self._replication.end_turn(now)

    def _begin_transfer(self, now: float, target: str | None) -> None:
        is_leader = self.role is Role.LEADER
        refusal = self._succession.begin_transfer(now, target) if is_leader else "this node is not the leader"
        if refusal is not None:
            self._outbox.effects.append(fx.TransferEnded(target, False, refusal))

    # Reads

    def _read_index(self, token: int) -> None:
        if self.role is not Role.LEADER:
            self._outbox.effects.append(fx.ReadRefused(token, "this node is not the leader"))
        elif self._reads.waiting >= self.config.reads_waiting_max:
            self._outbox.effects.append(fx.ReadRefused(token, "too many reads wait for a confirmation"))
        else:
            self._reads.add(token)
            if self.in_force.voters == (self.node_id,):
                self._confirm_reads()

    def _begin_read_round(self, now: float) -> None:
        """Ask the voters whether we still lead, on behalf of all reads that have gathered.

        Not before the no-op is committed: until then our commit index may be behind what was acknowledged (5.4.2).
        """
        if not self._reads.is_round_due or not self._is_noop_committed:
            return
        asked = self._replication.of(self.in_force.voting_peers)
        self._reads.begin(self.log.commit_index, {progress.peer: progress.seq for progress in asked})
        for progress in asked:
            self._replication.send_heartbeat(now, progress)

    def _confirm_reads(self) -> None:
        if self.in_force.voters == (self.node_id,) and self._reads.is_round_due and self._is_noop_committed:
            self._reads.begin(self.log.commit_index, {})
        answered = {progress.peer: progress.reply_seq for progress in self._replication.of(self.in_force.voting_peers)}
        index, tokens = self._reads.finish(self.node_id, self.in_force.voters, answered)
        for token in tokens:
            self._outbox.effects.append(fx.ReadReady(token, index))

    # Members

    def _share_of_delays(self) -> float:
        return jitter_share(self.node_id, self.in_force.voters, self.config.priorities)

    def _members_changed(self) -> None:
        """The log has gained or lost a CONFIG entry."""
        self._timer.share = self._share_of_delays()
        self._outbox.effects.append(
            fx.MembersChanged(self.configs.index, self.in_force.members, self.is_config_committed)
        )
        if self.role is Role.LEADER:
            self._succession.undisturbed_since = self._now
            self._track_members()
        elif self.role is not Role.FOLLOWER:
            self._follow(self._now, Cause.MEMBERS_CHANGED, self.term, self.leader)

    def _track_members(self) -> None:
        self._replication.track(self.in_force.to_track(self.log.commit_index), self._down, self._now)

    def _settle_members(self) -> None:
        """The CONFIG entry in force is committed."""
        self.in_force.settle(self.log.commit_index)
        for peer in sorted(self.progress.keys() - set(self.in_force.peers)):
            # Its last word from us; the effect below closes its connection.
            self._replication.send_heartbeat(self._now, self.progress[peer])
        self._outbox.effects.append(fx.MembersChanged(self.configs.index, self.in_force.members, True))
        if self.role is not Role.LEADER:
            return
        self._track_members()
        if not self.in_force.is_voter:
            for progress in self.progress.values():
                self._replication.send_heartbeat(self._now, progress)
            self._succession.name_successor()
            self._follow(self._now, Cause.REMOVED, self.term, None)
