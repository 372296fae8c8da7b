"""Raft section 6, dissertation chapter 4 (single-server changes), raft.md 4.15: one test per clause that we promise.

- A CONFIG entry counts from the moment it is appended, on every node, committed or not (4.1); a cut brings the one
  before back; a node starts with the last one of its log.
- One step at a time, none while one is open (4.1), none before the term's no-op is committed (raft-dev 2015).
- A new node joins as a learner: it gets entries, does not count, is not asked and does not campaign (4.2.1); it is
  promoted when it is near.
- A leader that removes itself leads until that is committed, without counting itself, and then hands over (4.2.2).
- Who is removed hears of it and stops; who missed it is told on contact; neither disturbs a leader (4.2.3).
- Requests are answered without looking at the members (4.1): the asker counts.
- A change that would leave the group without a live quorum is refused.
"""

from __future__ import annotations

import pytest

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import PeerLost, Propose, Tick
from dledger.core.membership import AddLearner, Members, Promote, Remove, encode_members
from dledger.core.transitions import PeerState
from dledger.core.types import EntryType, HardState, Role, frame_entry
from tests.paper.harness import Group, Member, make_log

N3 = AddLearner("n3", ("host3", 10_911))


def led(size: int = 4, voters: int = 3, **more: object) -> Group:
    """A group led by n0; the nodes behind the voters run, and know nothing yet."""
    group = Group(size, voters=voters, **more)  # type: ignore[arg-type]
    group.elect("n0")
    return group


def with_learner() -> Group:
    group = led()
    group["n0"].change(N3)
    group.settle()
    assert group.raft("n3").members.learners == ("n3",)
    return group


def with_four_voters() -> Group:
    group = with_learner()
    group["n0"].change(Promote("n3"))
    group.settle()
    assert all(group.raft(name).members.voters == ("n0", "n1", "n2", "n3") for name in group.names)
    return group


def asked(group: Group, kind: type) -> set[str]:
    return {target for _, target, message in group.wire if isinstance(message, kind)}


def changes(member: Member) -> list[tuple[int, tuple[str, ...], bool]]:
    return [
        (effect.index, effect.members.all, effect.is_committed)
        for effect in member.done
        if isinstance(effect, fx.MembersChanged)
    ]


# In force at append


def test_4_1_members_are_in_force_when_appended_on_the_leader_and_on_followers() -> None:
    group = led()
    group.isolate("n2")
    index = group["n0"].change(N3)
    assert group.raft("n0").members.learners == ("n3",) and not group.raft("n0").is_config_committed
    group.deliver(group.take(lambda packet: packet[1] == "n1"))
    assert group.raft("n1").members.learners == ("n3",)
    assert group.raft("n1").config_index == index > group.raft("n1").commit_index
    assert group.raft("n2").members.learners == ()


def test_4_1_a_new_voter_counts_at_once() -> None:
    """Three of four: with n2 and n3 cut off, two are no quorum any more."""
    group = with_learner()
    group.isolate("n2", "n3")
    index = group["n0"].change(Promote("n3"))
    group.settle()
    assert group.raft("n0").progress["n1"].written == index
    assert group.raft("n0").commit_index == index - 1


def test_4_1_a_removed_voter_stops_counting_at_once() -> None:
    """Three of five have the entry that removes one of the three; of the four that stay only two."""
    group = led(5, 5)
    group.isolate("n3", "n4")
    index = group["n0"].change(Remove("n2"))
    group.settle()
    assert [group.raft("n0").progress[peer].written for peer in ("n1", "n2")] == [index, index]
    assert group.raft("n0").commit_index == index - 1


def test_4_1_fewer_voters_may_commit_what_waits() -> None:
    """Two of three have the entry in front; three of four did not."""
    group = with_four_voters()
    group.isolate("n2", "n3")
    waiting = group["n0"].propose()
    group.settle()
    assert group.raft("n0").commit_index < waiting
    index = group["n0"].change(Remove("n3"))
    group.settle()
    assert group.raft("n0").commit_index == index


def test_4_1_the_driver_hears_at_append_and_again_when_it_is_final() -> None:
    group = led()
    index = group["n0"].change(N3)
    group.settle()
    everybody = ("n0", "n1", "n2", "n3")
    for name in ("n0", "n1", "n2"):
        assert changes(group[name]) == [(index, everybody, False), (index, everybody, True)]
    assert group.raft("n3").members.addresses == {"n3": ("host3", 10_911)}


def test_4_1_a_cut_brings_the_former_members_back() -> None:
    group = led()
    group.isolate("n0")
    index = group["n0"].change(N3)
    assert group.raft("n0").members.learners == ("n3",)
    group.elect("n1")
    group.heal()
    group.run(1.0)
    assert group.raft("n0").members == group.raft("n1").members == Members(["n0", "n1", "n2"])
    assert changes(group["n0"]) == [(index, ("n0", "n1", "n2", "n3"), False), (0, ("n0", "n1", "n2"), True)]
    assert group.raft("n0").config_index == 0


def test_4_1_a_cut_of_two_changes_brings_back_the_one_before_both() -> None:
    """A follower learns late what is committed: several entries may be open there, and one cut removes them."""
    group = with_four_voters()
    member = group["n2"]
    member.boot(commit_index=1)
    assert member.raft.members.voters == ("n0", "n1", "n2", "n3") and not member.raft.is_config_committed
    prev_term, prev_crc = member.log.term_at(1), member.log.head_crc_at(1)
    assert prev_term is not None and prev_crc is not None
    position = member.log.position_of(2)
    assert position is not None
    entry = frame_entry(2, 9, position, EntryType.NOOP, 0, (), prev_crc, 0)
    member.receive("n1", msg.Append(9, 1, prev_term, prev_crc, 1, 1, (entry,)))
    assert member.raft.members == Members(["n0", "n1", "n2"]) and member.raft.config_index == 0


def test_4_1_a_node_starts_with_the_last_config_of_its_log_committed_or_not() -> None:
    group = with_four_voters()
    group.isolate("n1")
    group["n1"].boot(commit_index=0)
    assert group.raft("n1").members.voters == ("n0", "n1", "n2", "n3")
    group.tick("n1")
    assert asked(group, msg.PreVote) == {"n0", "n2", "n3"}
    # Two grants and its own are three of four; one grant would be enough of three.
    group["n1"].receive("n0", msg.PreVoteReply(1, 2, True))
    assert group.raft("n1").role is Role.PRE_CANDIDATE
    group["n1"].receive("n3", msg.PreVoteReply(1, 2, True))
    assert group.raft("n1").role is Role.CANDIDATE


def test_4_1_a_candidate_counts_by_the_open_config_of_its_own_log() -> None:
    """n1 has the entry that adds n3, n2 has not: one vote more is needed than n2 would think."""
    group = with_learner()
    group.cut |= {("n0", "n2"), ("n0", "n3")}
    group["n0"].change(Promote("n3"))
    group.settle()
    group.heal()
    group.isolate("n0")
    group.now += 3.0
    group.tick("n1")
    group.deliver(group.take(lambda packet: packet[1] == "n2"))
    group.deliver(group.take(lambda packet: packet[0] == "n2"))
    assert group.raft("n1").role is Role.PRE_CANDIDATE
    group.settle()
    assert group.raft("n1").role is Role.LEADER


# One at a time, and in its time


def test_4_1_one_change_at_a_time() -> None:
    group = led()
    group.isolate("n0")
    first = group["n0"].change(N3)
    group["n0"].change(Remove("n2"))
    assert group.raft("n0").last_index == first
    assert "not committed yet" in group["n0"].refusals[-1]


def test_two_changes_in_one_proposal_are_refused_whole() -> None:
    group = led()
    member = group["n0"]
    entry = member.frame(encode_members(Members(["n0", "n1", "n2"], ["n3"])), EntryType.CONFIG)
    body = encode_members(Members(["n0", "n1", "n2"], ["n3", "n4"]))
    after = frame_entry(entry.index + 1, 1, entry.end, EntryType.CONFIG, 1, (body,), entry.head_crc, 0)
    member.step(Propose(group.now, (entry, after)))
    assert member.refusals == ["one change of members at a time"] and member.raft.last_index == entry.index - 1


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (Members(["n0", "n1", "n2", "n3"]), "not a learner"),
        (Members(["n0", "n1"], ["n3"]), "one member at a time"),
        (Members(["n0"]), "one member at a time"),
        (Members(["n0", "n1"], ["n2"]), "cannot become a learner"),
        (Members(["n0", "n1", "n2"], ["n3", "n4"]), "one member at a time"),
    ],
)
def test_4_1_only_single_steps(members: Members, reason: str) -> None:
    group = led()
    group["n0"].propose_members(members)
    assert reason in group["n0"].refusals[-1]
    assert group.raft("n0").members == Members(["n0", "n1", "n2"])


def test_a_change_that_cannot_be_read_is_refused() -> None:
    group = led()
    member = group["n0"]
    member.step(Propose(group.now, (member.frame(b"garbage", EntryType.CONFIG),)))
    assert "members" in member.refusals[-1] and member.raft.config_index == 0


def test_a_follower_that_cannot_read_the_members_stops() -> None:
    group = led()
    raft = group.raft("n1")
    entry = frame_entry(2, 1, raft.log.position_end, EntryType.CONFIG, 1, (b"garbage",), raft.log.last_crc, 1)
    group["n1"].receive("n0", msg.Append(1, 1, 1, raft.log.last_crc, 1, 99, (entry,)))
    assert "CONFIG" in (raft.failed or "")


def test_no_change_before_the_no_op_of_the_term_is_committed() -> None:
    """raft-dev 2015; canonical/raft#323."""
    group = Group(4, voters=3)
    group.isolate("n0")
    group.tick("n0")
    for peer in ("n1", "n2"):
        group["n0"].receive(peer, msg.PreVoteReply(0, 1, True))
        group["n0"].receive(peer, msg.VoteReply(1, True))
    assert group.raft("n0").role is Role.LEADER and group.raft("n0").commit_index == 0
    group["n0"].change(N3)
    assert "no-op" in group["n0"].refusals[-1] and group.raft("n0").config_index == 0


def test_no_change_that_leaves_too_few_alive() -> None:
    """n2 is dead: without n1 nothing could ever be committed again, not even the way back."""
    group = led()
    group.isolate("n2")
    group["n0"].step(PeerLost(group.now, "n2", True))
    group["n0"].change(Remove("n1"))
    assert "too few are alive" in group["n0"].refusals[-1]
    group["n0"].change(Remove("n2"))
    group.settle()
    assert group.raft("n0").members.voters == ("n0", "n1") and group.raft("n0").is_config_committed


def test_no_change_that_relies_on_a_peer_that_is_silent() -> None:
    group = led()
    group.isolate("n2")
    group.run(1.5)
    assert group.raft("n0").role is Role.LEADER
    group["n0"].change(Remove("n1"))
    assert "too few are alive" in group["n0"].refusals[-1]


# Learners


def test_4_2_1_a_learner_gets_entries_and_does_not_count() -> None:
    group = with_learner()
    group.isolate("n1", "n2")
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n3").last_index == index
    assert group.raft("n0").progress["n3"].written == index
    assert group.raft("n0").commit_index == index - 1
    group.run(1.5)
    assert group.raft("n0").role is not Role.LEADER, "a learner's answers are no quorum (check-quorum)"


def test_4_2_1_a_learner_neither_campaigns_nor_is_asked() -> None:
    group = with_learner()
    group.isolate("n0", "n1")
    group.run(20.0)
    assert group.raft("n3").role is Role.FOLLOWER and group.raft("n3").leader is None
    assert group.raft("n3").term == 1
    assert {peer for _, peer, message in group.history_of("n2") if isinstance(message, msg.PreVote)} == {"n0", "n1"}


def test_4_2_1_no_vote_is_asked_of_a_learner() -> None:
    group = with_learner()
    group.isolate("n0")
    group.lose("n1", "n0", hard=True)
    group.lose("n2", "n0", hard=True)
    group.run(1.0)
    (leader,) = [name for name in group.leaders() if name != "n0"]
    votes = [peer for _, peer, message in group.history_of(leader) if isinstance(message, msg.Vote)]
    assert votes and "n3" not in votes


def test_4_2_1_a_node_that_is_no_member_yet_waits() -> None:
    group = led()
    group.run(10.0)
    assert group.raft("n3").role is Role.FOLLOWER and group.raft("n3").term == 0
    assert not any(isinstance(effect, fx.Send) for effect in group["n3"].done)


def test_a_learner_does_not_take_over() -> None:
    group = with_learner()
    group["n3"].receive("n0", msg.TimeoutNow(1, 7))
    assert group.raft("n3").role is Role.FOLLOWER and group.raft("n3").leader == "n0"


def test_4_1_a_learner_that_has_missed_its_promotion_votes() -> None:
    """etcd: the leader that promoted it is gone, and without its vote nobody reaches three of four."""
    group = with_learner()
    group.cut |= {("n0", "n2"), ("n0", "n3")}
    group["n0"].change(Promote("n3"))
    group.settle()
    assert not group.raft("n3").in_force.is_voter
    group.heal()
    group.isolate("n0")
    group.run(8.0)
    assert group.leaders()[-1:] == ["n1"] and group.raft("n3").in_force.is_voter


@pytest.mark.parametrize("obstacle", ["disconnected", "probing", "behind"])
def test_a_learner_is_promoted_only_when_it_has_caught_up(obstacle: str) -> None:
    group = with_learner()
    if obstacle == "disconnected":
        group["n0"].step(PeerLost(group.now, "n3", False))
        group.raft("n0").progress["n3"].state = PeerState.REPLICATE
    elif obstacle == "probing":
        group["n0"].step(PeerLost(group.now, "n3", False))
        group.raft("n0").progress["n3"].is_connected = True
    else:
        group.cut.add(("n0", "n3"))
        for _ in range(2):
            group["n0"].propose(bytes(600_000))
        group.settle()
    group["n0"].change(Promote("n3"))
    assert group["n0"].refusals == ["n3 has not caught up"]


def test_a_learner_less_than_a_mebibyte_behind_is_promoted() -> None:
    group = with_learner()
    group.cut.add(("n0", "n3"))
    group["n0"].propose(bytes(1_000_000))
    group.settle()
    group["n0"].change(Promote("n3"))
    group.settle()
    assert group["n0"].refusals == [] and "n3" in group.raft("n0").members.voters


# Removal


def test_4_2_2_a_leader_that_removes_itself_leads_until_that_is_committed() -> None:
    group = led(3)
    index = group["n0"].change(Remove("n0"))
    assert group.raft("n0").role is Role.LEADER and not group.raft("n0").in_force.is_voter
    group.settle()
    assert group.raft("n0").role is Role.FOLLOWER and group.raft("n0").commit_index == index
    (leader,) = group.leaders()
    assert group.raft(leader).members.voters == ("n1", "n2")
    changed = [effect.reason for effect in group["n0"].done if isinstance(effect, fx.RoleChanged)]
    assert changed[-1] == "this node is no voter of the group any more"
    group.run(30.0)
    assert group.leaders() == [leader] and group.raft("n0").role is Role.FOLLOWER


def test_4_2_2_a_leader_that_removes_itself_does_not_count_itself() -> None:
    group = led(3)
    group.isolate("n2")
    index = group["n0"].change(Remove("n0"))
    group.settle()
    assert group.raft("n0").progress["n1"].written == index
    assert group.raft("n0").commit_index == index - 1, "n1 alone is no quorum of n1 and n2"


def test_4_2_2_nor_in_its_check_of_the_quorum() -> None:
    """n0 and n1 were a quorum of three. Of n1 and n2, n1 is none."""
    group = led(3)
    group.isolate("n2")
    group["n0"].change(Remove("n0"))
    group.run(1.5)
    assert group.raft("n0").role is not Role.LEADER


def test_4_2_2_who_is_being_removed_by_an_open_entry_still_campaigns() -> None:
    """Dissertation figure 4.6: n3 alone has the entry that removes it; without its campaign nobody gets elected."""
    group = with_four_voters()
    group.cut |= {("n0", "n1"), ("n0", "n2")}
    group["n0"].change(Remove("n3"))
    group.settle()
    assert not group.raft("n3").in_force.is_voter
    group.heal()
    group.isolate("n0")
    group.lose("n3", "n0", hard=True)
    group.tick("n3")
    assert asked(group, msg.PreVote) == {"n0", "n1", "n2"}
    group.run(4.0)
    (leader,) = [name for name in group.leaders() if name != "n0"]
    assert leader in ("n1", "n2") and group.raft(leader).members.voters == ("n0", "n1", "n2")
    assert not group.raft("n3").in_force.is_voter


def test_4_2_2_its_own_vote_does_not_count_then() -> None:
    group = with_four_voters()
    group.cut |= {("n0", "n1"), ("n0", "n2")}
    group["n0"].change(Remove("n3"))
    group.settle()
    group.isolate("n3")
    group.lose("n3", "n0", hard=True)
    group.tick("n3")
    group["n3"].receive("n1", msg.PreVoteReply(1, 2, True))
    assert group.raft("n3").role is Role.PRE_CANDIDATE, "one of n0, n1, n2 is no quorum"
    group["n3"].receive("n2", msg.PreVoteReply(1, 2, True))
    assert group.raft("n3").role is Role.CANDIDATE


def test_a_removed_node_hears_of_it_and_is_then_left_alone() -> None:
    group = led(3)
    index = group["n0"].change(Remove("n2"))
    assert "n2" in group.raft("n0").progress, "it still has to hear of it"
    group.settle()
    assert "n2" not in group.raft("n0").progress
    assert group.raft("n2").commit_index == index and not group.raft("n2").in_force.is_voter
    group.isolate("n2")
    group.run(30.0)
    assert group.raft("n2").role is Role.FOLLOWER and group.raft("n2").term == 1
    assert not any(isinstance(effect, fx.Send) for _, effect in group.history[-50:] if _ == "n2")


def test_4_2_3_a_removed_node_that_missed_it_is_told_and_stops() -> None:
    group = led(3)
    group.isolate("n2")
    group["n0"].change(Remove("n2"))
    group.settle()
    group.heal()
    group.take()
    group.now += 3.0
    group.tick("n2")
    (answer,) = [
        effect.message
        for effect in group["n2"].done[-3:]
        if isinstance(effect, fx.Send) and effect.peer == "n0" and isinstance(effect.message, msg.PreVote)
    ]
    assert answer.term == 2
    group.settle()
    assert group.raft("n2").role is Role.FOLLOWER
    asked_before = len(group["n2"].did(fx.Send))
    group.run(30.0)
    assert len(group["n2"].did(fx.Send)) == asked_before, "it has stopped asking"
    assert group.leaders() == ["n0"] and group.raft("n0").term == 1


def test_4_2_3_an_open_removal_is_told_to_nobody() -> None:
    """It may be cut: who stopped because of it would be missing."""
    group = led(3)
    group.isolate("n2")
    group.cut |= {("n1", "n0")}
    group["n0"].change(Remove("n2"))
    group.settle()
    group["n1"].receive("n2", msg.PreVote(2, 1, 1))
    ((_, _, answer),) = group.take(lambda packet: packet[1] == "n2" and isinstance(packet[2], msg.PreVoteReply))
    assert isinstance(answer, msg.PreVoteReply) and not answer.removed


def test_who_was_told_to_stop_goes_on_when_a_leader_speaks_to_it() -> None:
    """It was removed, and is added again."""
    group = led(3)
    member = group["n2"]
    group.lose("n2", "n0", hard=True)
    group.tick("n2")
    member.receive("n1", msg.PreVoteReply(1, 2, False, removed=True))
    assert member.raft.role is Role.FOLLOWER
    group.take()
    group.isolate("n2")
    group.run(5.0)
    assert member.raft.role is Role.FOLLOWER
    group.heal()
    group.run(0.5)
    assert member.raft.leader == "n0"
    group.isolate("n2")
    group.take()
    before = len(group.history_of("n2"))
    group.run(2.2)
    assert any(isinstance(message, msg.PreVote) for _, _, message in group.history_of("n2")[before:])


def test_4_2_3_a_vote_request_of_a_removed_node_deposes_nobody() -> None:
    group = led(3)
    group["n0"].change(Remove("n2"))
    group.settle()
    for voter in ("n0", "n1"):
        group[voter].receive("n2", msg.Vote(9, 99, 9))
        assert group.raft(voter).term == 1 and group.raft(voter).leader == "n0"
    group["n0"].receive("n2", msg.AppendReply(9, 0, False, 0, 0))
    assert group.raft("n0").role is Role.LEADER and group.raft("n0").term == 1


def test_4_1_a_vote_is_given_without_looking_at_the_members() -> None:
    """We may have missed that the asker has joined; its log says that it knows more."""
    group = Group(4, voters=3)
    group["n1"].receive("n3", msg.Vote(5, 3, 2))
    assert group.wire[-1] == ("n1", "n3", msg.VoteReply(5, True))


def test_4_1_who_may_know_more_than_we_is_not_told_to_stop() -> None:
    """Its log is longer than ours: the entry that made it a voter may be in there."""
    group = Group(4, voters=3)
    group["n1"].receive("n3", msg.PreVote(5, 3, 2))
    assert group.wire[-1] == ("n1", "n3", msg.PreVoteReply(0, 5, True))
    group["n1"].receive("n3", msg.PreVote(5, 0, 0))
    assert group.wire[-1] == ("n1", "n3", msg.PreVoteReply(0, 5, False, removed=True))


def test_a_node_that_asks_makes_room_for_voters_only() -> None:
    group = Group(4, voters=3)
    group.tick("n1")
    group["n1"].receive("n3", msg.PreVote(1, 3, 1))
    assert group.raft("n1").role is Role.PRE_CANDIDATE
    group["n1"].receive("n2", msg.PreVote(1, 3, 1))
    assert group.raft("n1").role is Role.FOLLOWER


def test_a_vote_by_order_of_the_leader_counts_from_a_voter_we_do_not_know_yet() -> None:
    group = led()
    last = group.raft("n1")
    group["n1"].receive("n3", msg.Vote(2, last.last_index, last.log.last_term, ticket=7))
    assert group.wire[-1] == ("n1", "n3", msg.VoteReply(2, True))


def test_a_fresh_voter_waits_for_no_learner() -> None:
    group = Group(4, voters=3, logs={"n0": make_log(1)})
    group["n0"].boot(configs=[(1, Members(["n0", "n1", "n2"], ["n3"]))])
    for peer in ("n1", "n2"):
        group.connect("n0", peer)
    assert group.raft("n0").deadline <= group.now + 0.1


def test_4_1_a_leader_that_we_do_not_know_yet_is_followed() -> None:
    theirs = make_log(4)
    group = Group(4, voters=3)
    entries = tuple(theirs.entries(1, 1 << 20))
    group["n1"].receive("n3", msg.Append(4, 0, 0, 0, 0, 1, entries))
    assert group.raft("n1").leader == "n3" and group.raft("n1").last_index == 1


def test_a_removed_node_counts_neither_in_a_vote_nor_in_a_commit() -> None:
    group = with_four_voters()
    group["n0"].change(Remove("n3"))
    group.settle()
    group.isolate("n1", "n2")
    index = group["n0"].propose()
    group.settle()
    group["n0"].receive("n3", msg.AppendReply(1, 1, True, index, index))
    assert group.raft("n0").commit_index == index - 1


def test_a_node_added_again_in_the_same_term_does_not_get_credit_for_old_answers() -> None:
    group = with_learner()
    group["n0"].propose()
    group.settle()
    old = [
        message
        for name, effect in group.history
        for message in [getattr(effect, "message", None)]
        if name == "n3" and isinstance(message, msg.AppendReply)
    ][-1]
    group["n0"].change(Remove("n3"))
    group.settle()
    group["n0"].change(N3)
    group.take()
    group["n0"].receive("n3", old)
    assert group.raft("n0").progress["n3"].written == 0


def test_an_old_leaders_open_change_is_settled_by_the_next_leader() -> None:
    """n1 wins with the open entry in its log, counts by it, commits it with its no-op, and only then changes more."""
    group = led()
    group.cut |= {("n0", "n2"), ("n0", "n3"), ("n1", "n0")}
    group["n0"].change(N3)
    group.settle()
    group.heal()
    group.isolate("n0")
    group.lose("n1", "n0", hard=True)
    group.lose("n2", "n0", hard=True)
    group.run(3.0)
    (leader,) = [name for name in group.leaders() if name != "n0"]
    assert leader == "n1" and group.raft("n1").is_config_committed
    assert group.raft("n3").members.learners == ("n3",)


def test_members_that_change_end_a_round_of_pre_votes() -> None:
    """By order of its leader n1 asks while entries still come in: what was answered was counted among others."""
    group = led()
    group["n0"].change(N3)
    (append,) = [message for _, peer, message in group.take() if peer == "n1" and isinstance(message, msg.Append)]
    group["n1"].receive("n0", msg.TimeoutNow(1, 7))
    assert group.raft("n1").role is Role.PRE_CANDIDATE
    group["n1"].receive("n0", append)
    assert group.raft("n1").role is Role.FOLLOWER and group.raft("n1").leader == "n0"


def test_a_single_voter_with_a_learner_commits_alone() -> None:
    group = led(2, 1)
    group["n0"].change(AddLearner("n1", ("h", 1)))
    group.settle()
    assert group.raft("n1").last_index == group.raft("n0").commit_index == 2
    group.isolate("n1")
    index = group["n0"].propose()
    assert group.raft("n0").commit_index == index
    group.run(5.0)
    assert group.raft("n0").role is Role.LEADER


def test_a_group_grows_from_one_to_three_and_shrinks_to_the_other_two() -> None:
    group = led(3, 1)
    for name in ("n1", "n2"):
        group["n0"].change(AddLearner(name, (name, 1)))
        group.settle()
        group["n0"].change(Promote(name))
        group.settle()
    assert group.raft("n0").members.voters == ("n0", "n1", "n2")
    group["n0"].change(Remove("n0"))
    group.settle()
    (leader,) = group.leaders()
    assert leader != "n0" and group.raft(leader).members.voters == ("n1", "n2")
    index = group[leader].propose()
    group.settle()
    assert group.raft(leader).commit_index == index > group.raft("n0").last_index


def test_a_stale_term_does_not_make_a_node_forget_whom_it_follows() -> None:
    group = with_learner()
    group["n3"].receive("n2", msg.Append(0, 0, 0, 0, 0, 1))
    assert group.raft("n3").leader == "n0"


def test_a_learner_found_late_by_its_timer_only_waits() -> None:
    group = with_learner()
    group.isolate("n3")
    for _ in range(5):
        group.now = group.raft("n3").deadline
        group["n3"].step(Tick(group.now))
        assert group.raft("n3").role is Role.FOLLOWER
    assert group["n3"].saved == HardState(1, None)
    assert RaftConfig().election_timeout_min <= group.raft("n3").deadline - group.now
