"""Guards of the core that no other test would miss: each was found by taking it away (tests/mutants.toml)."""

from __future__ import annotations

import pytest

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import AcceptLoss, Durable, HardStateSaved, PeerUp, Propose, Receive, Tick, Transfer, TurnEnd
from dledger.core.log import MemoryLog
from dledger.core.membership import AddLearner
from dledger.core.types import EntryType, HardState, Role, frame_entry
from tests.paper.harness import Group, make_log


def empty_append(log: MemoryLog, *, term: int, commit: int = 0, seq: int = 1) -> msg.Append:
    crc = log.head_crc_at(log.last_index)
    assert crc is not None
    return msg.Append(term, log.last_index, log.last_term, crc, commit, seq)


# Terms and votes


def test_5_1_a_vote_in_a_term_adopted_before_is_saved() -> None:
    """The term is on stable storage already; the vote is not."""
    group = Group(hard_states={"n1": HardState(4, None)})
    group["n1"].receive("n0", msg.Vote(4, 9, 3))
    assert group["n1"].saved == HardState(4, "n0")
    group["n1"].boot()
    group["n1"].receive("n2", msg.Vote(4, 9, 3))
    assert group.wire[-1] == ("n1", "n2", msg.VoteReply(4, False))


def test_5_1_a_candidate_adopts_the_higher_term_of_a_voter() -> None:
    group = Group()
    group.tick("n0")
    group["n0"].receive("n1", msg.PreVoteReply(0, 1, True))
    assert group.raft("n0").role is Role.CANDIDATE
    group["n0"].receive("n2", msg.VoteReply(9, False))
    assert group.raft("n0").role is Role.FOLLOWER and group.raft("n0").term == 9


def test_4_2_a_save_of_an_older_vote_releases_nothing() -> None:
    group = Group()
    member = group["n1"]
    member.saves = False
    member.receive("n0", msg.Vote(4, 0, 0))
    member.receive("n2", msg.Vote(5, 0, 0))
    member.step(HardStateSaved(group.now, 4, "n0"))
    assert group.wire == []
    member.step(HardStateSaved(group.now, 5, "n2"))
    assert group.wire == [("n1", "n2", msg.VoteReply(5, True))]


def test_4_2_a_candidate_leads_only_with_its_own_vote_saved() -> None:
    """Answers can be there before: to the same request of an earlier life, whose disk was emptied since."""
    group = Group()
    group.tick("n0")
    member = group["n0"]
    member.saves = False
    member.receive("n1", msg.PreVoteReply(0, 1, True))
    for voter in ("n1", "n2"):
        member.receive(voter, msg.VoteReply(1, True))
    assert member.raft.role is Role.CANDIDATE and not member.did(fx.NoopNeeded)
    member.complete_saves()
    assert member.raft.role is Role.LEADER


def test_4_2_messages_that_wait_for_a_save_are_bounded() -> None:
    """The last one of its kind for each peer: who asks again and again while a disk is slow gets one answer."""
    group = Group()
    member = group["n1"]
    member.saves = False
    for _ in range(5):
        member.receive("n0", msg.Vote(4, 0, 0))
        member.receive("n2", msg.Vote(4, 0, 0))
    assert group.wire == []
    member.complete_saves()
    assert group.wire == [("n1", "n0", msg.VoteReply(4, True)), ("n1", "n2", msg.VoteReply(4, False))]


@pytest.mark.parametrize("has_leader", [False, True])
def test_4_3_who_is_told_of_a_leader_asks_again_only_after_a_whole_timeout(has_leader: bool) -> None:
    """Nobody to wait for: sooner."""
    group = Group()
    group.tick("n0")
    member = group["n0"]
    for voter in ("n1", "n2"):
        member.receive(voter, msg.PreVoteReply(0, 1, False, has_leader=has_leader and voter == "n1"))
    assert member.raft.role is Role.FOLLOWER
    assert (member.raft.deadline - group.now > group.config.election_timeout_min) is has_leader


@pytest.mark.parametrize("has_leader", [False, True])
def test_4_3_who_learns_of_a_higher_term_asks_again_at_once_unless_that_has_a_leader(has_leader: bool) -> None:
    group = Group()
    group.tick("n0")
    member = group["n0"]
    member.receive("n1", msg.PreVoteReply(5, 1, False, has_leader=has_leader))
    assert (member.raft.role, member.raft.term) == (Role.FOLLOWER, 5)
    assert (member.raft.deadline - group.now >= group.config.election_timeout_min) is has_leader


def test_3_10_the_order_to_take_over_is_given_once() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].step(Transfer(group.now, "n1"))
    assert [type(message) for _, _, message in group.take()] == [msg.TimeoutNow]
    group.now += group.config.heartbeat
    group.heartbeat("n0")
    ordered = [message for _, _, message in group.history_of("n0") if isinstance(message, msg.TimeoutNow)]
    assert len(ordered) == 1 and group.raft("n0").is_transferring


def test_4_3_whoever_lets_another_go_first_does_so_again_with_the_next_timer() -> None:
    group = Group()
    voter = group["n1"]
    for _ in range(2):
        group.now = voter.raft.deadline - 0.01
        voter.receive("n2", msg.PreVote(1, 0, 0))
        assert group.now + 0.15 <= voter.raft.deadline <= group.now + 0.30
        group.now = voter.raft.deadline + 0.6
        voter.step(Tick(group.now))  # found late: it is set anew


def test_3_10_a_link_that_merely_broke_is_no_end_of_the_leader_that_orders_a_campaign() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].step(Transfer(group.now, "n1"))
    group.deliver(group.take())
    member = group["n1"]
    assert member.raft.role is Role.PRE_CANDIDATE
    group.lose("n1", "n0", hard=False)
    assert member.raft.leader == "n0"
    group.lose("n1", "n0", hard=True)
    assert member.raft.leader is None


def test_4_3_whoever_sends_a_message_is_there_and_its_answer_is_waited_for() -> None:
    group = Group()
    group.lose("n0", "n1", hard=True)
    member = group["n0"]
    member.receive("n1", msg.VoteReply(0, False))
    group.tick("n0")
    member.receive("n2", msg.PreVoteReply(0, 1, False))
    assert member.raft.role is Role.PRE_CANDIDATE
    member.receive("n1", msg.PreVoteReply(0, 1, True))
    assert member.raft.role is Role.CANDIDATE


def test_4_6_who_accepts_a_loss_while_a_leader_is_heard_does_not_campaign() -> None:
    group = Group()
    group.elect("n0")
    raft = group.raft("n1")
    raft.recovering = True
    armed = raft.deadline
    group["n1"].step(AcceptLoss(group.now))
    assert not raft.recovering and raft.deadline == armed


def test_4_3_only_who_has_heard_no_leader_since_its_start_asks_once_all_peers_are_there() -> None:
    group = Group()
    group.elect("n0")
    for name in ("n1", "n2"):
        group[name].receive("n0", msg.PreVoteReply(5, 1, False))
    group["n2"].boot()
    for name in ("n1", "n2"):
        armed = group.raft(name).deadline
        for peer in set(group.names) - {name}:
            group[name].step(PeerUp(group.now, peer))
        assert group.raft(name).leader is None
        assert (group.raft(name).deadline < armed) is (name == "n2")


# Recovering


def test_4_2_a_recovering_voter_says_so() -> None:
    group = Group()
    group["n1"].boot(recovering=True)
    group["n1"].receive("n0", msg.PreVote(1, 0, 0))
    group["n1"].receive("n0", msg.Vote(1, 0, 0))
    assert [message for _, _, message in group.wire] == [
        msg.PreVoteReply(0, 1, True, recovering=True),
        msg.VoteReply(1, True, recovering=True),
    ]


def test_4_2_a_recovering_node_does_not_take_over() -> None:
    log = make_log(1, 1)
    group = Group(logs={"n1": log})
    group["n1"].boot(recovering=True)
    group["n1"].receive("n0", empty_append(log, term=2))
    group.take()
    group["n1"].receive("n0", msg.TimeoutNow(2, 7))
    assert group.raft("n1").role is Role.FOLLOWER and group.wire == []


def test_4_2_a_recovery_waits_for_everything_the_leader_has_committed() -> None:
    """What lies between may be what the power loss took, and what this node acknowledged."""
    log = make_log(1, 2)
    group = Group(logs={"n1": log})
    member = group["n1"]
    member.boot(recovering=True)
    member.receive("n0", empty_append(log, term=2, commit=3))
    assert member.raft.commit_index == 2 and member.raft.recovering
    theirs = make_log(1, 2, 2)
    member.receive("n0", msg.Append(2, 2, 2, member.raft.log.last_crc, 3, 2, tuple(theirs.entries(3, 1 << 20))))
    assert not member.raft.recovering


def test_4_2_a_recovery_is_not_ended_by_a_message_that_vouches_for_less() -> None:
    """It may be of an earlier life: what this node has lost was acknowledged behind it."""
    log = make_log(1, 1, 1)
    group = Group(logs={"n2": log}, hard_states={"n2": HardState(1, None)})
    member = group["n2"]
    member.boot(recovering=True, commit_index=3)
    member.receive("n0", empty_append(make_log(1, 1), term=1, commit=2))
    assert member.raft.recovering
    member.receive("n0", empty_append(log, term=1, commit=3, seq=2))
    assert not member.raft.recovering


# Replication


def test_4_4_a_follower_reports_only_what_this_leader_has_vouched_for() -> None:
    """rabbitmq/ra#508: its own tail may be another one."""
    theirs = make_log(1, 3)
    group = Group(logs={"n1": make_log(1, 2, 2, 2)})
    crc = theirs.head_crc_at(1)
    assert crc is not None
    group["n1"].receive("n0", msg.Append(3, 1, 1, crc, 0, 1))
    ((_, _, answer),) = group.take()
    assert answer == msg.AppendReply(3, 1, True, 1, 1)


def test_4_3_answers_that_pass_each_other_count_in_the_order_of_the_questions() -> None:
    group = Group()
    group.elect("n0")
    progress = group.raft("n0").progress["n1"]
    for _ in range(2):
        group["n0"].propose()
    older = progress.seq
    group["n0"].propose()
    newer = progress.seq
    group.take()
    group["n0"].receive("n1", msg.AppendReply(1, newer, True, 4, 4))
    group["n0"].receive("n1", msg.AppendReply(1, older, False, 0, 0, 1, 1))
    assert progress.written == 4 and progress.reply_seq == newer


def test_4_2_what_a_peer_lost_with_its_power_counts_no_more() -> None:
    """Behind a new connection it may end earlier than what it reported: three replicas, of which two remember."""
    group = Group()
    group.elect("n0")
    group.isolate("n2")
    group["n0"].writes = False
    index = group["n0"].propose()
    group.settle()
    progress = group.raft("n0").progress["n1"]
    assert progress.written == index
    group.lose("n0", "n1", hard=True)
    group.connect("n0", "n1")
    group.take()
    group["n0"].receive("n1", msg.AppendReply(1, progress.seq, False, 0, 0, 1, 1))
    assert progress.written == progress.durable == 1
    group["n0"].complete_writes()
    assert group.raft("n0").commit_index < index, "one of three has it"


def test_4_4_a_heartbeat_is_answered_although_entries_behind_it_wait_for_the_disk() -> None:
    group = Group(logs={"n1": make_log(1)})
    member = group["n1"]
    member.receive("n0", empty_append(make_log(1), term=1))
    assert group.take() == [("n1", "n0", msg.AppendReply(1, 1, True, 1, 1))]
    member.writes = False
    entry = make_log(1, 1).entries(2, 1 << 20)[0]
    member.step(Receive(group.now, "n0", empty_append(make_log(1), term=1, seq=2)))
    member.step(Receive(group.now, "n0", msg.Append(1, 1, 1, entry.prev_crc, 0, 3, (entry,))))
    member.end_turn()
    assert group.take() == [("n1", "n0", msg.AppendReply(1, 3, True, 1, 1))]


def test_4_4_a_mark_below_that_of_an_older_term_is_reported_too() -> None:
    group = Group()
    member = group["n1"]
    member.receive("n0", msg.Append(1, 0, 0, 0, 0, 1, make_log(1, 1, 1).entries(1, 1 << 20)))
    entry = make_log(1, 2).entries(2, 1 << 20)[0]
    member.writes = False
    member.receive("n2", msg.Append(2, 1, 1, entry.prev_crc, 0, 1, (entry,)))
    group.take()
    member.complete_writes()
    member.end_turn()
    assert group.take() == [("n1", "n2", msg.AppendReply(2, 1, True, 2, 2))]


def test_4_4_what_is_durable_takes_nothing_back_of_what_is_written() -> None:
    group = Group()
    member = group["n1"]
    member.syncs = False
    member.receive("n0", msg.Append(1, 0, 0, 0, 0, 1, make_log(1, 1, 1).entries(1, 1 << 20)))
    member.step(Durable(group.now, 1, 1))
    assert (member.raft.log.written_index, member.raft.log.durable_index) == (3, 1)


def test_2_5_e_a_leader_commits_nothing_that_it_has_not_written() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].writes = False
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").commit_index == index - 1
    group["n0"].complete_writes()
    assert group.raft("n0").commit_index == index


def test_4_2_a_follower_with_sync_flush_answers_by_its_durable_mark() -> None:
    group = Group(config=RaftConfig(sync=True))
    member = group["n1"]
    member.syncs = False
    theirs = make_log(1)
    member.receive("n0", msg.Append(1, 0, 0, 0, 0, 1, tuple(theirs.entries(1, 1 << 20))))
    assert all(message.durable == 0 for _, _, message in group.take() if isinstance(message, msg.AppendReply))
    member.step(Durable(group.now, 1, 1))
    member.step(TurnEnd(group.now))
    ((_, _, answer),) = group.take()
    assert answer == msg.AppendReply(1, 1, True, 1, 1)


def test_4_2_with_sync_flush_what_peers_have_only_written_commits_nothing() -> None:
    group = Group(config=RaftConfig(sync=True))
    group.elect("n0")
    index = group["n0"].propose()
    group.take()
    for peer in ("n1", "n2"):
        seq = group.raft("n0").progress[peer].seq
        group["n0"].receive(peer, msg.AppendReply(1, seq, True, index, index - 1))
    assert group.raft("n0").progress["n1"].written == index and group.raft("n0").commit_index == index - 1


def test_scenario_06_with_sync_flush_a_leader_counts_itself_only_once_its_sync_is_done() -> None:
    group = Group(config=RaftConfig(sync=True))
    group.elect("n0")
    group.isolate("n2")
    group["n0"].syncs = False
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").progress["n1"].durable == index
    assert group.raft("n0").commit_index == index - 1
    group["n0"].step(Durable(group.now, index, 1))
    assert group.raft("n0").commit_index == index


def test_5_1_entries_of_an_older_term_change_nothing_and_learn_the_newer() -> None:
    theirs, older = make_log(3), make_log(2)
    group = Group()
    group["n1"].receive("n0", msg.Append(3, 0, 0, 0, 0, 1, tuple(theirs.entries(1, 1 << 20))))
    group.take()
    group["n1"].receive("n2", msg.Append(2, 0, 0, 0, 0, 1, tuple(older.entries(1, 1 << 20))))
    assert group["n1"].did(fx.Fatal) == [] and group.raft("n1").leader == "n0"
    assert group.take() == [("n1", "n2", msg.AppendReply(3, 0, False, 0, 0))]


def test_4_3_an_entry_framed_in_an_older_term_of_the_same_leader_is_refused() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].receive("n1", msg.Vote(5, 0, 0))
    group.take()
    group.elect("n0")
    raft = group.raft("n0")
    stale = frame_entry(raft.last_index + 1, 1, raft.log.position_end, EntryType.DATA, 1, (b"x",), raft.log.last_crc, 0)
    group["n0"].step(Propose(group.now, (stale,)))
    assert group["n0"].refusals == ["term 1 is over"] and raft.last_index == stale.index - 1


def test_4_2_1_two_voters_commit_nothing_with_a_learner_alone() -> None:
    group = Group(3, voters=2)
    group.elect("n0")
    group["n0"].change(AddLearner("n2", ("host", 1)))
    group.settle()
    group.isolate("n1")
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").progress["n2"].written == index
    assert group.raft("n0").commit_index == index - 1


# Reads, segments


def test_6_4_a_second_leadership_answers_no_read_before_its_own_no_op_is_committed() -> None:
    group = Group()
    group.elect("n0")
    member = group["n0"]
    member.receive("n1", msg.PreVoteReply(4, 2, False))
    assert member.raft.role is Role.FOLLOWER
    member.writes = False
    group.elect("n0")
    member.read(1)
    group.settle()
    assert member.answers == [] and member.raft.commit_index == 1
    member.complete_writes()
    member.end_turn()
    group.settle()
    assert member.answers == [(1, 2)]


def test_6_4_one_answer_of_four_confirms_no_read() -> None:
    group = Group(5)
    group.elect("n0")
    group.isolate("n0", "n1")
    group["n0"].read(7)
    group.settle()
    assert group["n0"].answers == []
    group.heal()
    group.run(0.5)
    assert group["n0"].answers == [(7, 1)]


def test_4_8_reads_that_wait_are_bounded() -> None:
    group = Group(config=RaftConfig(reads_waiting_max=3))
    group.elect("n0")
    group.isolate("n0")
    for token in range(4):
        group["n0"].read(token)
    assert group["n0"].answers == [(3, "too many reads wait for a confirmation")]


def test_4_7_a_peer_whose_next_entry_was_trimmed_meanwhile_is_offered_segments_and_sent_no_entry() -> None:
    group = Group(config=RaftConfig(window_messages_max=1))
    group.elect("n0")
    for _ in range(8):
        group["n0"].propose()
    (first, *_) = group.take(lambda packet: packet[1] == "n2")
    group.cut.add(("n0", "n2"))
    group.settle()
    assert group.raft("n0").commit_index == 9
    group["n0"].log.trim(6)
    group.cut.clear()
    group.deliver([first])
    group.deliver(group.take())
    assert [type(message) for _, peer, message in group.wire if peer == "n2"] == [msg.SegmentsOffer]


def test_4_7_segments_that_end_too_early_have_not_reached_the_entries() -> None:
    log = make_log(*(1,) * 20)
    log.trim(10)
    group = Group(logs={"n0": log, "n1": make_log(*(1,) * 20)})
    group.elect("n0")
    group.take()
    progress = group.raft("n0").progress["n2"]
    assert progress.segments_until == 11
    group["n0"].receive("n2", msg.AppendReply(1 + 1, progress.seq, False, 0, 0, 9, 1))
    assert progress.next_index == 11
    assert not [message for _, peer, message in group.take() if peer == "n2" and isinstance(message, msg.Append)]


def test_4_2_3_an_answer_of_a_node_that_is_no_member_deposes_nobody() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].receive("n9", msg.AppendReply(9, 0, False, 0, 0))
    assert group.raft("n0").role is Role.LEADER and group.raft("n0").term == 1
    assert group["n0"].did(fx.Fatal) == []
