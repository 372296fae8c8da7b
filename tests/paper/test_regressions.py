"""What hurt others: the scenarios of raft.md 6.2 that concern the core. `test_scenario_NN_...` belongs to number NN.

1 (figure 8) and the burst of 27 stand in `test_paper_replication.py`, the store's (7 to 12) with the store's tests.

 1 counting replicas of older terms    2 late appends        3 commit of an unverified tail   4 answers of an older term
 5 forgotten votes                     6 uncounted own disk 13 pre-vote at unequal terms     14 a candidate cut off
15 a lagging replica that asks        16 partial partition  17 one step at a time            18 a stalled disk
19 a higher term and a shorter log    20 commit and cut     21 blank, idle, head deleted     22 purged predecessor
23 a blank folder under an old id     24 changes of members 25 segments and what was there   26 transfers that fail
27 answers exactly once
"""

from __future__ import annotations

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import DiskState, PeerLost, Propose, Tick, Transfer, Written
from dledger.core.log import MemoryLog
from dledger.core.membership import AddLearner, Members, Promote, Remove
from dledger.core.transitions import PeerState
from dledger.core.types import EntryType, HardState, Role
from tests.paper.harness import Group, Packet, make_log, terms_of

SMALL_MESSAGES = RaftConfig(message_bytes_max=1000, window_messages_max=2)


def append_of(
    log: MemoryLog, from_index: int, to_index: int, *, term: int, commit: int = 0, seq: int = 1
) -> msg.Append:
    prev = from_index - 1
    prev_term, prev_crc = log.term_at(prev), log.head_crc_at(prev)
    assert prev_term is not None and prev_crc is not None
    entries = tuple(log.entries(from_index, 1 << 20))[: to_index - prev]
    return msg.Append(term, prev, prev_term, prev_crc, commit, seq, entries)


def test_scenario_02_a_delayed_append_does_not_shorten_a_log() -> None:
    """pysyncobj cuts everything behind the predecessor; dledger#142 kept stale requests in a map."""
    theirs = make_log(1, 1, 1, 1)
    group = Group()
    group["n1"].receive("n0", append_of(theirs, 1, 4, term=1, seq=2))
    group["n1"].receive("n0", append_of(theirs, 1, 2, term=1, seq=1))
    group["n1"].receive("n0", append_of(theirs, 3, 2, term=1, seq=1))
    assert group.raft("n1").last_index == 4 and group["n1"].did(fx.Cut) == []


def test_scenario_02_a_delayed_append_of_an_older_term_is_refused() -> None:
    theirs, older = make_log(1, 3), make_log(1, 2, 2)
    group = Group()
    group["n1"].receive("n0", append_of(theirs, 1, 2, term=3))
    group["n1"].receive("n2", append_of(older, 2, 3, term=2))
    assert terms_of(group["n1"].log) == [1, 3]


def test_scenario_03_commit_does_not_run_ahead_of_what_the_leader_verified() -> None:
    """copycat#265, rabbitmq/ra#508, scylladb#9965: the follower's own tail may differ from the leader's."""
    theirs = make_log(1, 3, 3, 3)
    group = Group(logs={"n1": make_log(1, 2, 2, 2)})
    group["n1"].receive("n0", append_of(theirs, 2, 1, term=3, commit=4))
    assert group.raft("n1").commit_index == 1
    group["n1"].receive("n0", append_of(theirs, 2, 4, term=3, commit=4, seq=2))
    assert group.raft("n1").commit_index == 4 and terms_of(group["n1"].log) == [1, 3, 3, 3]


def test_scenario_03_what_an_older_leader_verified_counts_no_longer() -> None:
    first, second = make_log(1, 1, 1), make_log(1, 2)
    group = Group()
    group["n1"].receive("n0", append_of(first, 1, 3, term=1))
    group["n1"].receive("n2", append_of(second, 2, 1, term=2, commit=2))
    assert group.raft("n1").verified_index == 1 and group.raft("n1").commit_index == 1


def test_scenario_04_a_late_success_of_an_older_term_does_not_count() -> None:
    """copycat#29: n0 led term 1, leads again, and an answer from back then arrives."""
    group = Group()
    group.elect("n0")
    late = msg.AppendReply(1, 1, True, 1, 1)
    group["n0"].receive("n1", msg.Vote(2, 0, 0))
    group.take()
    group.tick("n0")
    for _ in range(4):
        group.deliver(group.take())
        group.take(lambda packet: isinstance(packet[2], msg.Append))
    assert group.raft("n0").role is Role.LEADER and group.raft("n0").term == 3
    group["n0"].receive("n1", late)
    assert group.raft("n0").progress["n1"].written == 0


def test_scenario_04_an_answer_to_an_older_term_is_not_taken_for_one_of_ours() -> None:
    """Found by our simulator: a refused append of term 1 was answered with its sequence and the newer term."""
    group = Group(hard_states={"n1": HardState(5, None)})
    group["n1"].receive("n0", msg.Append(1, 0, 0, 0, 0, 205))
    ((_, _, answer),) = group.wire
    assert answer == msg.AppendReply(5, 0, False, 0, 0)
    leader = Group(hard_states={"n0": HardState(4, None)})
    leader.elect("n0")
    state = leader.raft("n0").progress["n1"].state
    leader["n0"].receive("n1", msg.AppendReply(5, 0, False, 0, 0))
    assert leader.raft("n0").progress["n1"].state is state is PeerState.REPLICATE


def test_scenario_05_a_restart_remembers_term_and_vote() -> None:
    """camunda#1068, pysyncobj#201, hiqlite#361: also when all three restart together."""
    group = Group()
    for name in group.names:
        group[name].receive("n0" if name != "n0" else "n1", msg.Vote(4, 9, 3))
    group.take()
    for name in group.names:
        group[name].boot()
        assert group.raft(name).term == 4
    group["n1"].receive("n2", msg.Vote(4, 9, 3))
    assert group.wire[-1] == ("n1", "n2", msg.VoteReply(4, False))
    group["n1"].receive("n0", msg.Vote(4, 9, 3))
    assert group.wire[-1] == ("n1", "n0", msg.VoteReply(4, True))


def test_scenario_05_a_stored_entry_proves_its_term() -> None:
    """The crash may come between writing an entry of a new term and saving that term."""
    group = Group(logs={"n0": make_log(1, 7)}, hard_states={"n0": HardState(3, "n1")})
    assert (group.raft("n0").term, group.raft("n0").vote) == (7, None)


def test_scenario_06_a_leader_counts_itself_only_once_its_disk_says_so() -> None:
    """etcd#14370, d-engine#447."""
    group = Group()
    group.elect("n0")
    group.cut |= {("n0", "n2"), ("n2", "n0")}
    group["n0"].writes = False
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").progress["n1"].written == index
    assert group.raft("n0").commit_index == index - 1
    group["n0"].complete_writes()
    assert group.raft("n0").commit_index == index


def test_scenario_06_a_group_of_one_too() -> None:
    group = Group(1)
    group["n0"].writes = False
    group.tick("n0")
    assert group.raft("n0").role is Role.LEADER and group.raft("n0").commit_index == 0
    group["n0"].complete_writes()
    assert group.raft("n0").commit_index == 1


def test_scenario_06_a_group_of_one_leads_only_with_its_vote_saved() -> None:
    group = Group(1)
    group["n0"].saves = False
    group.tick("n0")
    assert group.raft("n0").role is Role.CANDIDATE
    group["n0"].complete_saves()
    assert group.raft("n0").role is Role.LEADER


def test_scenario_06_a_group_of_one_leads_within_100_ms_of_its_start() -> None:
    group = Group(1)
    assert group.raft("n0").deadline <= group.now + 0.1


def test_scenario_13_pre_vote_at_unequal_terms_does_not_deadlock() -> None:
    """etcd#8243, #8501: leader dead; n1 has the longer log, n2 the higher term."""
    group = Group(
        logs={"n1": make_log(1, 1, 1), "n2": make_log(1)}, hard_states={"n1": HardState(1), "n2": HardState(6, "n2")}
    )
    group.isolate("n0")
    group.run(8.0)
    assert group.leaders() == ["n1"] and group.raft("n1").term > 6


def test_scenario_13_a_refused_asker_adopts_the_higher_term_and_asks_again_soon() -> None:
    group = Group(hard_states={"n1": HardState(6, "n1")})
    group.isolate("n2")
    group.tick("n0")
    group.settle()
    assert group.raft("n0").term == 6 and group["n0"].saved.term == 6
    assert group.raft("n0").deadline <= group.now + 0.06
    group.tick("n0")
    group.settle()
    assert group.leaders() == ["n0"]


def test_scenario_14_a_candidate_cut_off_after_its_pre_vote_does_not_inflate_terms() -> None:
    """canonical/raft#196."""
    group = Group()
    group.tick("n0")
    group.deliver(group.take())
    group.deliver(group.take())
    assert group.raft("n0").role is Role.CANDIDATE and group.raft("n0").term == 1
    group.isolate("n0")
    group.take()
    group.run(30.0)
    assert group.raft("n0").term == 1


def test_scenario_16_a_partial_partition_leaves_the_leader_in_peace() -> None:
    """Howard 2020: A-B and B-C up, A-C down; also when the connection is seen to close."""
    for leader, other in (("n0", "n2"), ("n2", "n0")):
        group = Group()
        group.elect(leader)
        group.cut |= {(leader, other), (other, leader)}
        group.lose(other, leader, hard=True)
        group.lose(leader, other, hard=True)
        group.run(20.0)
        assert group.leaders() == [leader] and group.raft(leader).term == 1
        assert group.raft(other).term == 1


def test_scenario_16_one_way_loss_towards_the_leader_deposes_it_once() -> None:
    """Followers hear it, it hears nobody: check-quorum makes room, and the next leader stays."""
    group = Group(5)
    group.elect("n0")
    group.cut |= {(name, "n0") for name in group.names if name != "n0"}
    group.run(12.0)
    (leader,) = group.leaders()
    assert leader != "n0"
    term = group.raft(leader).term
    group.run(20.0)
    assert group.leaders() == [leader] and group.raft(leader).term == term


def test_scenario_17_nothing_gets_between_reading_the_last_entry_and_the_vote() -> None:
    """braft, sofa-jraft#882. One event is one step: a vote granted and an append accepted never mix."""
    group = Group()
    theirs = make_log(1, 1)
    member = group["n1"]
    member.saves = False
    member.receive("n2", msg.Vote(1, 0, 0))
    assert group.wire == []
    member.receive("n0", append_of(theirs, 1, 2, term=2))
    member.complete_saves()
    assert not any(isinstance(message, msg.VoteReply) for _, _, message in group.wire)
    assert member.saved == HardState(2, None)


def test_scenario_18_heartbeats_alone_do_not_keep_a_leader_with_a_dead_disk() -> None:
    """hashicorp/raft#503, #612, #666; tarantool#9399."""
    group = Group()
    group.elect("n0")
    group["n0"].writes = False
    group["n0"].propose()
    group["n0"].step(DiskState(group.now, False))
    group.settle()
    (leader,) = group.leaders()
    assert leader != "n0"
    group["n0"].receive(leader, msg.TimeoutNow(group.raft(leader).term, 5))
    assert group.raft("n0").role is Role.FOLLOWER


def test_scenario_19_a_node_with_a_higher_term_and_a_shorter_log_rejoins() -> None:
    """dledger#85, #144, #325: it stayed candidate for ever."""
    group = Group(
        logs={"n0": make_log(1, 1, 1), "n1": make_log(1, 1, 1), "n2": make_log(1)},
        hard_states={"n2": HardState(9, "n2")},
    )
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.run(6.0)
    (leader,) = group.leaders()
    assert leader in ("n0", "n1") and group.raft(leader).term > 9
    assert group.raft("n2").leader == leader
    assert group.raft("n2").last_index == group.raft(leader).last_index


def test_scenario_20_commit_never_passes_the_end_after_a_cut() -> None:
    """dledger#316. The cut itself is possible only above the commit index."""
    group = Group(logs={"n1": make_log(1, 1, 2, 2, 2)})
    group["n1"].boot(commit_index=2)
    group["n1"].receive("n0", append_of(make_log(1, 1, 3), 3, 3, term=3, commit=2))
    raft = group.raft("n1")
    assert raft.commit_index == 2 <= raft.last_index == 3
    assert raft.log.written_index == raft.log.durable_index == 3


def test_scenario_20_a_commit_hint_above_the_recovered_log_is_bounded() -> None:
    group = Group(logs={"n1": make_log(1)})
    group["n1"].boot(commit_index=7)
    assert group.raft("n1").commit_index == 1


def test_scenario_21_a_blank_follower_is_filled_on_an_idle_group() -> None:
    """dledger#61, braft#292: nothing new is ever proposed."""
    group = Group(logs={"n0": make_log(*(1,) * 500), "n1": make_log(*(1,) * 500)})
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.run(3.0)
    assert group.raft("n2").commit_index == group.raft("n0").last_index == 501


def test_scenario_21_a_follower_before_the_first_entry_waits_for_segments_quietly() -> None:
    """redpanda#2232, dledger#61: the pusher must not loop on what retention has removed."""
    log = make_log(*(1,) * 20)
    log.trim(10)
    group = Group(logs={"n0": log, "n1": make_log(*(1,) * 20)})
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.now += 0.2
    group.heartbeat("n0")
    progress = group.raft("n0").progress["n2"]
    assert progress.state is PeerState.SEGMENTS and progress.next_index == 11
    sent = progress.seq
    group.run(1.5)
    assert progress.seq - sent <= 11  # heartbeats only
    assert group.leaders() == ["n0"]


def test_scenario_21_a_follower_that_differs_before_the_first_entry_needs_segments_too() -> None:
    """Found by our simulator: the search for agreement ended at the first retained entry, for ever at full speed."""
    log = make_log(1, 1, 3, 3, 3)
    log.trim(4)
    group = Group(logs={"n0": log, "n1": make_log(1, 1, 3, 3, 3), "n2": make_log(1, 1, 2, 2)})
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.now += 0.2
    group.heartbeat("n0")
    assert group.raft("n0").progress["n2"].state is PeerState.SEGMENTS
    assert group["n2"].did(fx.Cut) == []


def test_scenario_22_a_purged_predecessor_is_no_conflict() -> None:
    """openraft#511."""
    theirs = make_log(*(1,) * 12)
    ours = make_log(*(1,) * 10)
    ours.trim(8)
    group = Group(logs={"n1": ours})
    group["n1"].boot(commit_index=8)
    group["n1"].receive("n0", append_of(theirs, 3, 12, term=1))
    assert group["n1"].did(fx.Cut) == [] and group.raft("n1").failed is None
    assert group.raft("n1").last_index == 12


def test_scenario_26_a_transfer_while_the_target_dies_leaves_the_leader() -> None:
    """hashicorp GH-581, dledger#247."""
    group = Group()
    group.elect("n0")
    group["n0"].step(Transfer(group.now, "n1"))
    group.take()  # TimeoutNow is lost with its receiver
    group.isolate("n1")
    group.lose("n0", "n1", hard=True)
    group.run(1.1)
    assert group.leaders() == ["n0"] and group.raft("n0").accepts_proposals
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").commit_index == index


def test_scenario_26_what_the_leader_sent_behind_the_order_does_not_stop_the_target() -> None:
    """The commit news of the last entry overtook every transfer in our own first version."""
    group = Group()
    group.elect("n0")
    group["n0"].propose()
    group["n0"].step(Transfer(group.now, "n1"))
    group.settle()
    assert group.leaders() == ["n1"]


def test_scenario_26_a_target_whose_log_is_too_short_disturbs_nobody() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n2")
    group["n0"].propose()
    group.settle()
    group.heal()
    group["n2"].receive("n0", msg.TimeoutNow(1, 99))
    group.settle()
    assert group.leaders() == ["n0"] and group.raft("n2").term == 1
    group.run(3.0)
    assert group.raft("n2").role is Role.FOLLOWER and group.raft("n2").leader == "n0"


def test_scenario_26_a_stray_order_is_ignored() -> None:
    group = Group()
    group.elect("n0")
    for peer, term in (("n2", 1), ("n0", 0)):
        group["n1"].receive(peer, msg.TimeoutNow(term, 5))
        assert group.raft("n1").role is Role.FOLLOWER


def test_scenario_27_a_refused_proposal_is_refused_once_and_whole() -> None:
    group = Group()
    group.elect("n0")
    member = group["n0"]
    first = member.frame(b"a")
    member.receive("n1", msg.Vote(9, 9, 9))
    member.step(Propose(group.now, (first,)))
    assert [effect.entries for effect in member.did(fx.Refused) if isinstance(effect, fx.Refused)] == [(first,)]
    member.step(Tick(group.now))
    assert len(member.did(fx.Refused)) == 1


def test_scenario_27_commits_are_announced_once_and_in_order() -> None:
    group = Group()
    group.elect("n0")
    for _ in range(50):
        group["n0"].propose()
    group.settle()
    for name in group.names:
        committed = group[name].committed
        assert committed == sorted(set(committed)) and committed[-1] == 51


def test_a_stale_rejection_does_not_send_the_leader_back() -> None:
    """openraft, raft-rs: many pipelined messages are refused for one lost one; only the first refusal counts."""
    group = Group(config=RaftConfig(window_messages_max=8))
    group.elect("n0")
    group.settle()
    for _ in range(5):
        group["n0"].propose()
    group.take(lambda packet: packet[1] == "n1" and isinstance(packet[2], msg.Append) and packet[2].prev_index == 1)
    group.deliver(group.take(lambda packet: packet[1] == "n1"))
    refusals = group.take(lambda packet: packet[0] == "n1")
    assert len(refusals) == 4
    group.deliver(refusals[:1])
    probes = group.take(lambda packet: packet[1] == "n1")
    assert len(probes) == 1
    group.deliver(refusals[1:])
    assert group.take(lambda packet: packet[1] == "n1") == []
    group.deliver(probes)
    group.settle()
    assert group.raft("n1").commit_index == 6


def test_a_mark_from_before_a_cut_does_not_make_new_entries_written() -> None:
    group = Group(logs={"n1": make_log(1, 2, 2, 2)})
    member = group["n1"]
    member.writes = False
    member.receive("n0", append_of(make_log(1, 3, 3, 3, 3), 2, 5, term=3))
    member.step(Written(group.now, 4, 2))
    assert member.raft.log.written_index == 1


def test_no_op_is_the_only_entry_of_an_idle_term() -> None:
    group = Group()
    group.elect("n0")
    group.run(10.0)
    assert [entry.type for entry in group["n2"].log] == [EntryType.NOOP]


def test_scenario_22_what_was_trimmed_counts_as_committed_after_a_restart() -> None:
    log = make_log(*(1,) * 10)
    log.trim(6)
    group = Group(logs={"n1": log})
    group["n1"].boot(commit_index=3)
    assert group.raft("n1").commit_index == 6


def test_a_leader_that_loses_a_stranger_leads_on() -> None:
    group = Group()
    group.elect("n0")
    before = group.raft("n0").term
    group["n0"].step(PeerLost(group.now, "n9", True))
    assert (group.raft("n0").role, group.raft("n0").term) == (Role.LEADER, before)


# 15


class SlowLink(Group):
    """What n0 sends to n2 waits until the test lets it through."""

    def __init__(self, **more: object) -> None:
        self.held: list[Packet] = []
        super().__init__(**more)  # type: ignore[arg-type]

    def deliver(self, packets: list[Packet]) -> None:
        self.held += [packet for packet in packets if packet[:2] == ("n0", "n2")]
        super().deliver([packet for packet in packets if packet[:2] != ("n0", "n2")])

    def let_through(self) -> None:
        held, self.held = self.held, []
        super().deliver(held)


def test_scenario_15_a_lagging_replica_that_keeps_asking_still_catches_up() -> None:
    """redpanda#30815: its pre-votes were refused, and its rounds made it deaf to the entries that would have helped.

    Everything its leader says arrives later than its election timeout, so it asks before each single message.
    """
    group = SlowLink(logs={"n0": make_log(*(1,) * 300), "n1": make_log(*(1,) * 300)}, config=SMALL_MESSAGES)
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    rounds = 0
    while group.raft("n2").last_index < group.raft("n0").last_index:
        rounds += 1
        assert rounds < 60
        group.run(2.5)
        group.let_through()
        group.settle()
    assert rounds > 3
    asked = [message for _, _, message in group.history_of("n2") if isinstance(message, msg.PreVote)]
    assert len(asked) > 2 * rounds
    assert group.leaders() == ["n0"] and group.raft("n0").term == 2


def test_scenario_15_entries_end_a_pre_vote_round_and_are_taken() -> None:
    group = Group()
    group.elect("n0")
    group.cut.add(("n0", "n2"))
    group["n0"].propose()
    group.settle()
    group.heal()
    group.lose("n2", "n0", hard=True)
    group.tick("n2")
    assert group.raft("n2").role is Role.PRE_CANDIDATE
    group["n2"].receive("n0", append_of(group["n0"].log, 2, 2, term=1, seq=50))
    assert group.raft("n2").role is Role.FOLLOWER and group.raft("n2").last_index == 2


def test_scenario_15_a_replica_filled_by_segments_does_not_ask_at_all() -> None:
    log = make_log(*(1,) * 20)
    log.trim(10)
    group = Group(logs={"n0": log, "n1": make_log(*(1,) * 20)})
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.now += 0.2
    group.heartbeat("n0")
    sent = len(group.history_of("n2"))
    group.run(60.0)
    assert not any(isinstance(message, msg.PreVote) for _, _, message in group.history_of("n2")[sent:])


# 23


def lost_folder(*, knows_it: bool) -> Group:
    """n0 and n1 have committed five entries, n2 has one of them. n0 is down; n1 comes back with an empty folder."""
    group = Group(logs={name: make_log(1, *(1,) * (4 if name != "n2" else 0)) for name in ("n0", "n1", "n2")})
    group["n0"].boot(commit_index=5)
    group["n1"].log = MemoryLog()
    group["n1"].saved = HardState()
    group["n1"].boot(recovering=knows_it)
    group.isolate("n0")
    return group


def test_scenario_23_a_blank_folder_and_a_lagging_node_elect_nobody() -> None:
    """nats-server#2792, Redis-Raft: those who had it no more wiped what was acknowledged."""
    group = lost_folder(knows_it=True)
    group.run(30.0)
    assert group.leaders() == []
    group.heal()
    group.run(5.0)
    assert group.leaders() == ["n0"]
    assert [group.raft(name).commit_index for name in group.names] == [6, 6, 6]
    assert not group.raft("n1").recovering


def test_scenario_23_without_the_rule_the_acknowledged_entries_would_be_gone() -> None:
    """The same as a formatted member: this is what the flag is for."""
    group = lost_folder(knows_it=False)
    group.run(30.0)
    assert group.leaders() == ["n2"]


def test_scenario_23_it_votes_as_any_other_once_a_leader_has_filled_it() -> None:
    group = lost_folder(knows_it=True)
    group.heal()
    group.run(5.0)
    group.isolate("n2")
    group.lose("n1", "n0", hard=True)
    group["n0"].receive("n1", msg.Vote(99, 9, 9))
    group.run(5.0)
    assert len(group.leaders()) == 1


def test_scenario_23_a_node_blank_to_others_is_not_promoted_before_it_is_filled() -> None:
    group = Group(4, voters=3)
    group["n3"].boot(recovering=True)
    group.elect("n0")
    group.cut.add(("n0", "n3"))
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    group["n0"].change(Promote("n3"))
    assert group["n0"].refusals == ["n3 has not caught up"]


# 24


def test_scenario_24_two_changes_around_a_change_of_leaders_raft_dev_2015() -> None:
    """n0 alone has the entry that makes n4 a voter; n1 leads next and removes n0.

    Without the rule n1's change would be committed by n1 and n2, then n0 be elected by n3, n4 and itself, and overwrite
    it. The no-op, committed by three of the four old voters, stands between: n3 does not vote for n0 any more.
    """
    group = Group(5, voters=4)
    group.elect("n0")
    group["n0"].change(AddLearner("n4", ("h", 1)))
    group.settle()
    group.isolate("n0")
    group["n0"].change(Promote("n4"))
    assert group.raft("n0").members.voters == ("n0", "n1", "n2", "n3", "n4")

    # n1 is elected by n1, n2 and n3, and tries at once.
    group.take()
    group.now += 3.0
    group.tick("n1")
    for _ in range(4):
        group.deliver(group.take(lambda packet: not isinstance(packet[2], msg.Append)))
    assert group.raft("n1").role is Role.LEADER
    group["n1"].change(Remove("n0"))
    assert "no-op" in group["n1"].refusals[-1]
    group.settle()
    group.run(0.5)
    removal = group["n1"].change(Remove("n0"))
    group.cut |= {("n1", "n3"), ("n3", "n1"), ("n1", "n4"), ("n4", "n1")}
    group.settle()
    assert group.raft("n1").commit_index == removal

    # n0, n3 and n4 would be three of five.
    group.cut.clear()
    group.isolate("n1", "n2")
    group.run(20.0)
    assert [name for name in group.leaders() if name not in ("n1", "n2")] == []
    group.heal()
    group.run(5.0)
    (leader,) = group.leaders()
    assert leader in ("n1", "n2", "n3")
    assert group[leader].log.head_crc_at(removal) == group["n1"].log.head_crc_at(removal)
    assert group.raft(leader).members.voters == ("n1", "n2", "n3")
    assert "n4" in group.raft(leader).members.learners


def test_scenario_24_no_change_before_the_no_op_of_the_term() -> None:
    """canonical/raft#323. In the leader's very first moments, and until a quorum has the no-op."""
    group = Group(4, voters=3)
    group.elect("n0")
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    group.isolate("n0")
    group.take()
    group.now += 3.0
    group.tick("n1")
    for _ in range(4):
        group.deliver(group.take(lambda packet: not isinstance(packet[2], msg.Append)))
    assert group.raft("n1").role is Role.LEADER
    index = group.raft("n1").last_index
    group["n1"].change(Remove("n3"))
    assert group["n1"].refusals == ["the no-op of this term must be committed before members change"]
    assert group.raft("n1").last_index == index
    group.run(0.5)
    group["n1"].change(Remove("n3"))
    group.settle()
    assert group.raft("n1").members.all == ("n0", "n1", "n2")


def test_scenario_24_a_leader_removes_itself_under_load_and_the_next_one_goes_on() -> None:
    """nats-server#7545: the entry behind which it steps down is committed, and so is all in front of it."""
    group = Group()
    group.elect("n0")
    for _ in range(20):
        group["n0"].propose()
    removal = group["n0"].change(Remove("n0"))
    for _ in range(20):
        group["n0"].propose()
    group.settle()
    (leader,) = group.leaders()
    assert leader != "n0" and group.raft(leader).members.voters == ("n1", "n2")
    assert group.raft(leader).commit_index > removal
    now = group.now
    index = group[leader].propose()
    group.settle()
    assert group.raft(leader).commit_index == index and group.now == now, "no timeout was needed"
    assert group.raft("n0").commit_index >= removal


def test_scenario_24_the_last_voter_cannot_remove_itself() -> None:
    group = Group(1)
    group.elect("n0")
    group["n0"].propose_members(Members([]))
    assert group["n0"].refusals and group.raft("n0").members.voters == ("n0",)


# 25


def test_scenario_25_an_offer_older_than_what_we_have_changes_nothing() -> None:
    """redisraft#43: a snapshot behind what was applied took the state back."""
    group = Group(logs={"n1": make_log(*(1,) * 30)})
    group["n1"].boot(commit_index=30)
    group["n1"].receive("n0", msg.SegmentsOffer(2, 1, 11, 20))
    member = group["n1"]
    assert member.raft.commit_index == member.raft.last_index == 30
    assert member.did(fx.Cut) == member.did(fx.Append) == member.did(fx.Commit) == []
    ((_, _, answer),) = group.wire
    assert answer == msg.AppendReply(2, 1, False, 0, 0, 30, 1)


def test_scenario_25_a_gap_between_segments_and_log_is_never_bridged() -> None:
    """camunda#4900: the snapshot ended before the first entry that the leader still had."""
    log = make_log(*(1,) * 20)
    log.trim(10)
    part = make_log(*(1,) * 7)
    group = Group(logs={"n0": log, "n1": make_log(*(1,) * 20), "n2": part})
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.run(3.0)
    assert group.raft("n0").progress["n2"].state is PeerState.SEGMENTS
    assert group.raft("n2").last_index == 7 and group["n2"].did(fx.Append) == []
    group["n2"].receive("n0", append_of(log, 11, 20, term=2, seq=90))
    assert group.raft("n2").last_index == 7


def test_scenario_25_a_crash_between_the_new_segments_and_the_new_mark_loses_nothing() -> None:
    """dqlite#309: the new log is there, what is remembered of the commit index is older than its first entry."""
    log = make_log(*(1,) * 20)
    log.trim(10)
    old, new = Members(["n0", "n1", "n2"]), Members(["n0", "n1", "n2"], ["n3"])
    group = Group(logs={"n1": log})
    group["n1"].boot(commit_index=2, configs=[(1, old), (8, new)])
    raft = group.raft("n1")
    assert raft.commit_index == 10, "only what is committed is ever left out"
    assert raft.members == new and raft.is_config_committed
    group["n1"].receive("n0", append_of(make_log(*(1,) * 25), 5, 25, term=1))
    assert raft.last_index == 25 and group["n1"].did(fx.Cut) == [] and raft.failed is None


# 26, the rest


def test_scenario_26_a_transfer_that_is_aborted_leaves_nobody_in_another_role() -> None:
    """hashicorp GH-581: time runs out while the target still lacks entries."""
    group = Group()
    group.elect("n0")
    group.cut.add(("n0", "n2"))
    group["n0"].propose()
    group.settle()
    group["n0"].step(Transfer(group.now, "n2"))
    group.run(0.9)
    assert not group.raft("n0").accepts_proposals
    group.run(0.2)
    assert group.raft("n0").accepts_proposals and group.leaders() == ["n0"]
    (ended,) = group["n0"].did(fx.TransferEnded)
    assert isinstance(ended, fx.TransferEnded) and not ended.done
    group.heal()
    group.run(1.0)
    group["n0"].step(Transfer(group.now, "n2"))
    group.settle()
    assert group.leaders() == ["n2"], "and the next one is as good as the first"


def test_scenario_26_a_transfer_during_writes_loses_and_doubles_none() -> None:
    group = Group()
    group.elect("n0")
    accepted = [group["n0"].propose() for _ in range(30)]
    group["n0"].step(Transfer(group.now, "n1"))
    before = len(group["n0"].refusals)
    for _ in range(10):
        group["n0"].propose()
    assert len(group["n0"].refusals) == before + 10, "refused for certain, each"
    group.settle()
    assert group.leaders() == ["n1"]
    more = [group["n1"].propose() for _ in range(10)]
    group.settle()
    assert more[0] == accepted[-1] + 2  # behind the no-op
    frames = [[entry.frame for entry in group[name].log] for name in group.names]
    assert frames[0] == frames[1] == frames[2] and len(frames[0]) == 1 + 30 + 1 + 10


def test_scenario_26_a_target_that_dies_as_a_candidate_costs_one_election() -> None:
    """dledger#247: it had raised the term; the old leader and the third go on without it."""
    group = Group()
    group.elect("n0")
    group["n0"].step(Transfer(group.now, "n1"))
    for _ in range(4):
        group.deliver(group.take(lambda packet: not isinstance(packet[2], msg.VoteReply)))
    assert group.raft("n1").role is Role.CANDIDATE
    group.isolate("n1")
    for name in ("n0", "n2"):
        group.lose(name, "n1", hard=True)
    group.take()
    assert group.raft("n0").role is Role.FOLLOWER and group.raft("n0").term == 2
    group.run(4.0)
    (leader,) = [name for name in group.leaders() if name != "n1"]
    assert group.raft(leader).term == 3
    index = group[leader].propose()
    group.settle()
    assert group.raft(leader).commit_index == index


def test_scenario_26_a_target_removed_from_the_group_is_refused() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].change(Remove("n2"))
    group.settle()
    group["n0"].step(Transfer(group.now, "n2"))
    (ended,) = group["n0"].did(fx.TransferEnded)
    assert isinstance(ended, fx.TransferEnded) and "not another voter" in ended.reason


# 27, the rest


def test_scenario_27_reads_and_proposals_that_wait_end_exactly_once_at_a_step_down() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n0")
    group["n0"].read(1)
    group.run(4.0)
    group.heal()
    group.run(4.0)
    assert len(group["n0"].answers) == 1
