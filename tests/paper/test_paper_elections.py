"""Raft sections 5.1, 5.2, 5.4.1 and dissertation 3.10, 6.2, 9.6: one test per clause that we promise."""

from __future__ import annotations

import pytest

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.events import DiskState, PeerLost, Tick, Transfer
from dledger.core.types import HardState, Role
from tests.paper.harness import Group, Member, make_log


def replies(member: Member, kind: type) -> list[msg.Message]:
    return [
        effect.message for effect in member.done if isinstance(effect, fx.Send) and isinstance(effect.message, kind)
    ]


# 5.1


def test_5_1_a_higher_term_in_any_request_is_adopted_and_saved() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].receive("n1", msg.Vote(7, 0, 0))
    assert group.raft("n0").role is Role.FOLLOWER
    assert group.raft("n0").term == 7 and group["n0"].saved.term == 7


def test_5_1_a_higher_term_in_any_reply_deposes_the_leader() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].receive("n1", msg.AppendReply(9, 0, False, 0, 0))
    assert group.raft("n0").role is Role.FOLLOWER and group.raft("n0").term == 9


@pytest.mark.parametrize("message", [msg.Vote(1, 99, 1), msg.Append(1, 0, 0, 0, 0, 1)])
def test_5_1_a_request_of_an_older_term_is_refused_with_ours(message: msg.Message) -> None:
    group = Group(hard_states={"n0": HardState(5, None)})
    group["n0"].receive("n1", message)
    (_, target, answer) = group.wire[-1]
    assert target == "n1" and answer.term == 5
    assert not (answer.granted if isinstance(answer, msg.VoteReply) else answer.ok)  # type: ignore[union-attr]
    assert group.raft("n0").leader is None


# 5.2


def test_5_2_nodes_start_as_followers_and_a_leader_heard_keeps_them_there() -> None:
    group = Group()
    group.elect("n0")
    assert [group.raft(name).role for name in group.names] == [Role.LEADER, Role.FOLLOWER, Role.FOLLOWER]
    group.run(30.0)
    assert group.leaders() == ["n0"] and group.raft("n0").term == 1


def test_5_2_an_election_timeout_without_a_leader_starts_a_campaign() -> None:
    group = Group()
    group.tick("n2")
    assert group.raft("n2").role is Role.PRE_CANDIDATE
    assert {target for source, target, _ in group.wire if source == "n2"} == {"n0", "n1"}


def test_5_2_a_candidate_votes_for_itself_in_a_new_term() -> None:
    group = Group()
    group.tick("n0")
    group.deliver(group.take())
    group.deliver(group.take())
    assert group["n0"].saved == HardState(1, "n0")
    assert group.raft("n0").role is Role.CANDIDATE


def test_5_2_one_vote_per_term_first_come_first_served() -> None:
    group = Group()
    group["n0"].receive("n1", msg.Vote(3, 0, 0))
    group["n0"].receive("n2", msg.Vote(3, 10, 2))
    granted = {target: answer.granted for _, target, answer in group.wire if isinstance(answer, msg.VoteReply)}
    assert granted == {"n1": True, "n2": False}


def test_5_2_a_repeated_vote_request_is_answered_alike() -> None:
    """Idempotent: the reply may have been lost (PySyncObj then waits for another term)."""
    group = Group()
    group["n0"].receive("n1", msg.Vote(3, 0, 0))
    group["n0"].receive("n1", msg.Vote(3, 0, 0))
    assert [answer.granted for _, _, answer in group.wire if isinstance(answer, msg.VoteReply)] == [True, True]


def test_5_2_a_candidate_that_hears_the_leader_of_its_term_follows() -> None:
    group = Group()
    group.tick("n0")
    group.deliver(group.take())
    group.deliver(group.take())
    assert group.raft("n0").role is Role.CANDIDATE
    group["n0"].receive("n1", msg.Append(1, 0, 0, 0, 0, 1))
    assert group.raft("n0").role is Role.FOLLOWER and group.raft("n0").leader == "n1"


def test_5_2_a_minority_elects_nobody() -> None:
    group = Group(5)
    group.isolate("n0", "n1")
    group.tick("n0")
    group.settle()
    assert group.leaders() == []


def test_5_2_votes_of_one_node_count_once() -> None:
    group = Group(5)
    group.tick("n0")
    for _ in range(3):
        group["n0"].receive("n1", msg.PreVoteReply(0, 1, True))
    assert group.raft("n0").role is Role.PRE_CANDIDATE


def test_5_2_a_split_vote_is_resolved_by_random_timeouts() -> None:
    group = Group(4)
    for name, rival in (("n0", "n1"), ("n1", "n0")):
        group.tick(name)
        for voter in group.names:
            if voter not in (name, rival):
                group[name].receive(voter, msg.PreVoteReply(0, 1, True))
    group.take()
    assert [group.raft(name).role for name in ("n0", "n1")] == [Role.CANDIDATE, Role.CANDIDATE]
    group["n2"].receive("n0", msg.Vote(1, 0, 0))
    group["n3"].receive("n1", msg.Vote(1, 0, 0))
    group.settle()
    assert group.leaders() == []
    group.run(5.0)
    assert len(group.leaders()) == 1


def test_5_2_two_leaders_in_one_term_stop_the_node() -> None:
    group = Group()
    group.elect("n0")
    group["n1"].receive("n2", msg.Append(1, 0, 0, 0, 0, 1))
    assert "both lead term 1" in (group.raft("n1").failed or "")
    assert group["n1"].step(Tick(group.now + 100)) == []


# 5.4.1


@pytest.mark.parametrize(
    ("mine", "last_term", "last_index", "granted"),
    [
        ((1, 1), 1, 2, True),
        ((1, 1), 1, 1, False),
        ((1, 1), 2, 1, True),
        ((1, 2), 1, 9, False),
        ((), 0, 0, True),
    ],
)
def test_5_4_1_a_vote_goes_to_a_log_at_least_as_up_to_date(
    mine: tuple[int, ...], last_term: int, last_index: int, granted: bool
) -> None:
    group = Group(logs={"n0": make_log(*mine)})
    group["n0"].receive("n1", msg.Vote(5, last_index, last_term))
    assert replies(group["n0"], msg.VoteReply) == [msg.VoteReply(5, granted)]
    group["n0"].receive("n1", msg.PreVote(6, last_index, last_term))
    assert replies(group["n0"], msg.PreVoteReply)[-1].granted is granted  # type: ignore[union-attr]


# Figure 2, persistent state; raft.md 4.2


def test_nothing_leaves_before_term_and_vote_are_saved() -> None:
    group = Group()
    group["n0"].saves = False
    group["n0"].receive("n1", msg.Vote(3, 0, 0))
    assert group.wire == []
    group["n0"].complete_saves()
    assert group.wire == [("n0", "n1", msg.VoteReply(3, True))]


def test_a_candidate_asks_for_votes_only_with_its_own_vote_saved() -> None:
    group = Group()
    group["n0"].saves = False
    group.tick("n0")
    group.settle()
    assert group.raft("n0").role is Role.CANDIDATE and group.wire == []
    group["n0"].complete_saves()
    assert [type(message) for _, _, message in group.wire] == [msg.Vote, msg.Vote]


def test_a_higher_term_voids_what_was_held_for_the_older_one() -> None:
    group = Group()
    group["n0"].saves = False
    group["n0"].receive("n1", msg.Vote(3, 0, 0))
    group["n0"].receive("n2", msg.Vote(4, 0, 0))
    group["n0"].complete_saves()
    assert group.wire == [("n0", "n2", msg.VoteReply(4, True))]


def test_adopting_a_term_and_voting_in_it_is_one_write() -> None:
    group = Group()
    group["n0"].receive("n1", msg.Vote(3, 0, 0))
    assert group["n0"].did(fx.SaveHardState) == [fx.SaveHardState(3, "n1")]


# Dissertation 9.6, pre-vote


def test_9_6_a_pre_vote_changes_neither_term_nor_vote() -> None:
    group = Group()
    group["n0"].receive("n1", msg.PreVote(8, 0, 0))
    assert group.raft("n0").term == 0 and group.raft("n0").vote is None
    assert group["n0"].did(fx.SaveHardState) == []


def test_9_6_a_pre_vote_is_refused_while_a_leader_is_heard() -> None:
    group = Group()
    group.elect("n0")
    group["n1"].receive("n2", msg.PreVote(2, 99, 1))
    assert replies(group["n1"], msg.PreVoteReply)[-1] == msg.PreVoteReply(1, 2, False, True)


def test_9_6_a_leader_refuses_it_while_it_has_a_quorum() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].receive("n2", msg.PreVote(2, 99, 1))
    assert replies(group["n0"], msg.PreVoteReply)[-1] == msg.PreVoteReply(1, 2, False, True)


def test_9_6_a_node_that_was_cut_off_comes_back_quietly() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n2")
    group.run(20.0)
    assert group.raft("n2").term == 1
    group.heal()
    group.run(3.0)
    assert group.leaders() == ["n0"] and group.raft("n0").term == 1
    assert group.raft("n2").leader == "n0"


def test_a_real_vote_request_counts_although_a_leader_is_heard() -> None:
    """raft.md 4.3: "I hear a leader" belongs to the pre-vote only."""
    group = Group()
    group.elect("n0")
    last = group.raft("n1")
    group["n1"].receive("n2", msg.Vote(2, last.last_index, last.log.last_term))
    assert replies(group["n1"], msg.VoteReply)[-1] == msg.VoteReply(2, True)


# Dissertation 6.2, check-quorum


def test_6_2_a_leader_without_a_quorum_steps_down() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n0")
    group.run(1.4)
    assert group.raft("n0").role is not Role.LEADER
    assert group.raft("n0").leader is None


def test_6_2_one_of_two_followers_is_a_quorum() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n2")
    group.run(10.0)
    assert group.leaders() == ["n0"]


# raft.md 4.3: prompt campaigns, late ticks


def test_a_closed_connection_of_the_leader_starts_a_campaign_within_60_ms() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n0")
    for name in ("n1", "n2"):
        group.lose(name, "n0", hard=True)
    group.run(0.2)
    (leader,) = [name for name in group.leaders() if name != "n0"]
    assert group.raft(leader).term == 2


def test_one_closed_connection_does_not_depose_a_leader_that_others_hear() -> None:
    group = Group()
    group.elect("n0")
    group.cut |= {("n0", "n2"), ("n2", "n0")}
    group.lose("n2", "n0", hard=True)
    group.run(10.0)
    assert group.leaders() == ["n0"] and group.raft("n0").term == 1


def test_a_soft_loss_waits_for_the_election_timeout() -> None:
    group = Group()
    group.elect("n0")
    before = group.raft("n1").deadline
    group.lose("n1", "n0", hard=False)
    assert group.raft("n1").deadline == before and group.raft("n1").leader == "n0"


def test_a_fresh_node_that_reached_everybody_campaigns_at_once() -> None:
    group = Group()
    for a, b in (("n0", "n1"), ("n0", "n2"), ("n1", "n2")):
        group.connect(a, b)
    began = group.now
    assert all(group.raft(name).deadline <= began + 0.1 for name in group.names)
    group.run(0.5)
    assert len(group.leaders()) == 1


def test_a_late_tick_sets_the_timer_anew_instead_of_firing() -> None:
    group = Group()
    group.elect("n0")
    follower = group["n1"]
    group.now = follower.raft.deadline + 0.6
    follower.step(Tick(group.now))
    assert follower.raft.role is Role.FOLLOWER and follower.raft.deadline > group.now + 0.9


def test_a_late_tick_in_a_round_of_votes_listens_first_too() -> None:
    """raft.md 4.3: half a timeout late means that this node was stopped, and has not read what came meanwhile."""
    group = Group()
    group.tick("n0")
    candidate = group["n0"]
    assert candidate.raft.role is Role.PRE_CANDIDATE
    group.now = candidate.raft.deadline + 0.6
    candidate.step(Tick(group.now))
    assert candidate.raft.role is Role.FOLLOWER and candidate.raft.deadline >= group.now + 1.0, "a whole timeout"


def test_a_voter_lets_a_candidate_go_first_and_only_once() -> None:
    """One that never wins must not hold back the others for ever."""
    group = Group()
    voter = group["n1"]
    group.now = voter.raft.deadline - 0.01
    voter.receive("n2", msg.PreVote(1, 0, 0))
    held_back = voter.raft.deadline
    assert group.now + 0.15 <= held_back <= group.now + 0.30
    group.now = held_back - 0.01
    voter.receive("n2", msg.PreVote(1, 0, 0))
    assert voter.raft.deadline == held_back
    group.tick("n1")
    assert voter.raft.role is Role.PRE_CANDIDATE


def test_a_leader_that_stood_still_asks_before_it_steps_down() -> None:
    group = Group()
    group.elect("n0")
    group.now += 8.0
    group["n0"].step(Tick(group.now))
    assert group.raft("n0").role is Role.LEADER
    group.isolate("n0")
    group.take()
    group.run(1.6)
    assert group.raft("n0").role is not Role.LEADER


# Dissertation 3.10, transfer


def test_3_10_leadership_moves_to_a_level_target() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].propose()
    group.settle()
    group["n0"].step(Transfer(group.now, "n2"))
    group.settle()
    assert group.leaders() == ["n2"] and group.raft("n2").term == 2
    (ended,) = group["n0"].did(fx.TransferEnded)
    assert isinstance(ended, fx.TransferEnded) and ended.done


def test_3_10_the_target_first_gets_what_it_lacks() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].propose()
    group["n0"].step(Transfer(group.now, "n1"))
    assert not any(isinstance(message, msg.TimeoutNow) for _, _, message in group.wire)
    group.settle()
    assert group.leaders() == ["n1"]


def test_3_10_no_proposals_during_a_transfer() -> None:
    group = Group()
    group.elect("n0")
    group.take()
    group["n0"].step(Transfer(group.now, "n1"))
    assert not group.raft("n0").accepts_proposals
    index = group["n0"].propose()
    assert group.raft("n0").last_index == index - 1
    assert len(group["n0"].did(fx.Refused)) == 1


def test_3_10_a_transfer_to_a_dead_target_ends_after_one_election_timeout() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n2")
    group["n0"].step(Transfer(group.now, "n2"))
    group.run(1.05)
    (ended,) = group["n0"].did(fx.TransferEnded)
    assert isinstance(ended, fx.TransferEnded) and not ended.done
    assert group.raft("n0").accepts_proposals and group.raft("n0").term == 1


def test_3_10_a_ticket_counts_only_where_it_was_given() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].receive("n1", msg.PreVote(2, 99, 1, ticket=4711))
    assert replies(group["n0"], msg.PreVoteReply)[-1].granted is False  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["n0", "n9"])
def test_3_10_an_impossible_target_is_refused_at_once(target: str) -> None:
    group = Group()
    group.elect("n0")
    group["n0"].step(Transfer(group.now, target))
    (ended,) = group["n0"].did(fx.TransferEnded)
    assert isinstance(ended, fx.TransferEnded) and not ended.done
    assert group.raft("n0").accepts_proposals


# raft.md 4.12


def test_a_leader_with_a_bad_disk_hands_over_and_stays_silent() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].step(DiskState(group.now, False))
    assert group.raft("n0").role is Role.FOLLOWER
    group.settle()
    (leader,) = group.leaders()
    assert leader != "n0"
    group.isolate("n0")
    group.run(10.0)
    assert group.raft("n0").role is Role.FOLLOWER
    group["n0"].step(DiskState(group.now, True))
    group.run(3.0)
    assert group.raft("n0").role is Role.PRE_CANDIDATE or group.raft("n0").deadline < group.now + 2.0


# raft.md 4.2: recovering after a power loss with asynchronous flush


def test_a_recovering_voter_does_not_make_a_majority() -> None:
    group = Group(logs={"n0": make_log(1), "n1": make_log(1)})
    group["n1"].boot(recovering=True)
    group.isolate("n2")
    group.tick("n0")
    group.settle()
    assert group.leaders() == []
    group.heal()
    group.run(5.0)
    assert len(group.leaders()) == 1


def test_all_members_together_elect_the_longest_log_when_a_majority_recovers() -> None:
    group = Group(logs={"n0": make_log(1), "n1": make_log(1, 1), "n2": make_log(1)})
    for name in group.names:
        group[name].boot(recovering=True)
    group.run(8.0)
    assert group.leaders() == ["n1"]
    assert not any(group.raft(name).recovering for name in group.names)


def test_recovery_ends_only_with_a_commit_index_of_the_leaders_term() -> None:
    group = Group(logs={name: make_log(1, 1) for name in ("n0", "n1", "n2")})
    group["n2"].boot(recovering=True)
    member = group["n2"]
    crc = member.raft.log.last_crc
    member.receive("n0", msg.Append(2, 2, 1, crc, 2, 1))
    assert member.raft.commit_index == 2 and member.raft.recovering
    group.take()
    group.run(3.0)
    assert not member.raft.recovering


def test_peer_lost_ends_a_round_that_can_no_longer_be_won() -> None:
    group = Group()
    group.isolate("n0")
    group.tick("n0")
    group.take()
    group["n0"].step(PeerLost(group.now, "n1", True))
    assert group.raft("n0").role is Role.PRE_CANDIDATE
    group["n0"].step(PeerLost(group.now, "n2", True))
    assert group.raft("n0").role is Role.FOLLOWER
