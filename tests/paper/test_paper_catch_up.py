"""raft.md 4.4 and 4.7, the leader's side and the follower's: one test per clause that we promise.

- A peer that ends before our first entry, or further behind than is reasonable, is offered whole segments: one offer at
  each heartbeat, and nothing else.
- An offer counts as hearing the leader, and its answer for check-quorum.
- The peer's driver is told at the first offer of a term and when the offer changes.
- When the peer's last entry reaches what is offered and could agree with ours, it is probed as any other.
- What is offered ends before the open segment, and close enough to our end that the peer does not fall back at once.
"""

from __future__ import annotations

import pytest
from attrs import evolve

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.catch_up import bytes_behind, first_to_send, is_far_behind
from dledger.core.config import RaftConfig
from dledger.core.errors import RemoteError
from dledger.core.log import MemoryLog
from dledger.core.transitions import PeerState
from dledger.core.types import Role
from tests.paper.harness import Group, make_log

SMALL = RaftConfig(segment_bytes=1000, segments_behind_bytes=3000)


def trimmed(trimmed_index: int = 10, count: int = 20) -> Group:
    """n0 leads and has forgotten its first entries; n2 is blank and was away."""
    log = make_log(*(1,) * count)
    log.trim(trimmed_index)
    group = Group(logs={"n0": log, "n1": make_log(*(1,) * count)})
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.now += 0.2
    group.heartbeat("n0")
    assert group.raft("n0").progress["n2"].state is PeerState.SEGMENTS
    return group


def needs(group: Group, name: str) -> list[fx.Effect]:
    return group[name].did(fx.NeedSegments)


def offers(group: Group) -> list[msg.SegmentsOffer]:
    return [message for _, _, message in group.history_of("n0") if isinstance(message, msg.SegmentsOffer)]


def test_4_7_who_ends_before_the_first_entry_is_offered_segments() -> None:
    group = trimmed()
    assert needs(group, "n2") == [fx.NeedSegments("n0", 11)]
    before = len(offers(group))
    sent_before = len(group.history_of("n0"))
    group.run(1.5)
    assert 9 <= len(offers(group)) - before <= 11, "one at each heartbeat"
    assert needs(group, "n2") == [fx.NeedSegments("n0", 11)], "and the driver is told once"
    since = [message for _, peer, message in group.history_of("n0")[sent_before:] if peer == "n2"]
    assert {type(message) for message in since} == {msg.SegmentsOffer}


def test_4_7_an_offer_counts_as_hearing_the_leader() -> None:
    group = trimmed()
    group.run(10.0)
    assert group.raft("n2").leader == "n0" and group.raft("n2").role is Role.FOLLOWER
    assert group.raft("n0").term == group.raft("n2").term


def test_4_7_its_answer_counts_for_the_leaders_quorum() -> None:
    group = trimmed()
    group.isolate("n1")
    group.run(10.0)
    assert group.raft("n0").role is Role.LEADER


def test_4_7_an_offer_confirms_reads() -> None:
    group = trimmed()
    group.isolate("n1")
    group["n0"].read(7)
    group.settle()
    assert group["n0"].answers == [(7, 21)]


def test_4_7_a_new_leader_offers_anew() -> None:
    group = trimmed()
    offer = msg.SegmentsOffer(9, 1, 11, 20)
    group["n2"].receive("n1", offer)
    assert needs(group, "n2")[-1] == fx.NeedSegments("n1", 11)
    assert group.raft("n2").term == 9 and group.raft("n2").leader == "n1"


def test_4_7_retention_goes_on_meanwhile() -> None:
    group = trimmed()
    group["n0"].log.trim(15)
    group.heartbeat("n0")
    assert needs(group, "n2") == [fx.NeedSegments("n0", 11), fx.NeedSegments("n0", 16)]


def test_4_7_when_the_segments_are_there_entries_follow() -> None:
    group = trimmed()
    member = group["n2"]
    installed = make_log(*(1,) * 12)
    installed.trim(10)
    member.log = installed
    member.boot(commit_index=12)
    group.connect("n0", "n2")
    group.settle()
    assert group.raft("n0").progress["n2"].state is PeerState.REPLICATE
    assert member.raft.commit_index == 21


def test_4_7_without_a_new_connection_the_hint_is_enough() -> None:
    group = trimmed()
    progress = group.raft("n0").progress["n2"]
    group["n0"].receive("n2", msg.AppendReply(group.raft("n0").term, progress.seq, False, 0, 0, 9, 1))
    assert progress.state is PeerState.SEGMENTS
    group["n0"].receive("n2", msg.AppendReply(group.raft("n0").term, progress.seq, False, 0, 0, 10, 1))
    assert progress.state is PeerState.PROBE
    (probe,) = [message for _, peer, message in group.take() if peer == "n2"]
    assert isinstance(probe, msg.Append) and probe.prev_index == 10


def test_4_7_a_long_log_that_cannot_agree_has_not_reached_anything() -> None:
    log = make_log(1, 1, 3, 3, 3)
    log.trim(4)
    group = Group(logs={"n0": log, "n1": make_log(1, 1, 3, 3, 3), "n2": make_log(1, 1, 2, 2, 2, 2, 2)})
    group.isolate("n2")
    group.elect("n0")
    group.heal()
    group.now += 0.2
    group.heartbeat("n0")
    group.run(1.0)
    assert group.raft("n0").progress["n2"].state is PeerState.SEGMENTS
    assert group["n2"].did(fx.Cut) == []


def far_behind(entries: int) -> Group:
    group = Group(config=SMALL)
    group.elect("n0")
    group.isolate("n2")
    for _ in range(entries):
        group["n0"].propose(bytes(36))  # frames of 100 bytes
        group.settle()
    group.heal()
    group.now += 0.2
    group.heartbeat("n0")
    return group


def test_4_7_who_is_far_behind_is_offered_segments() -> None:
    group = far_behind(60)
    (need,) = needs(group, "n2")
    assert isinstance(need, fx.NeedSegments)
    position = group["n0"].log.position_of(need.first_index)
    before = group["n0"].log.position_of(need.first_index - 1)
    end = group["n0"].log.position_end
    assert position is not None and before is not None
    assert before < end - 1500 <= position and before // 1000 < end // 1000


def test_4_7_who_is_less_far_behind_gets_entries() -> None:
    group = far_behind(25)
    assert needs(group, "n2") == [] and group.raft("n2").commit_index == group.raft("n0").last_index


def test_4_7_who_agrees_but_is_far_behind_is_offered_segments() -> None:
    """Behind a new connection the leader knows where they agree: no rejection shows the distance."""
    group = Group(config=evolve(SMALL, message_bytes_max=500))
    group.elect("n0")
    group.lose("n0", "n2", hard=False)
    group.isolate("n2")
    for _ in range(60):
        group["n0"].propose(bytes(36))
        group.settle()
    group.heal()
    group.take()
    group.connect("n0", "n2")
    group.settle()
    assert group.raft("n0").progress["n2"].state is PeerState.SEGMENTS
    assert group.raft("n2").last_index < 10 and len(needs(group, "n2")) == 1


def test_4_7_a_blank_peer_of_a_long_log_too() -> None:
    group = far_behind(60)
    group["n2"].log = MemoryLog()
    group["n2"].boot(recovering=True)
    group.connect("n0", "n2")
    group.settle()
    assert len(needs(group, "n2")) == 2 and group.raft("n0").progress["n2"].state is PeerState.SEGMENTS


def test_4_7_a_leader_knows_whom_the_group_waits_for() -> None:
    """Segments for others are a favour that may take its time."""
    group = far_behind(60)
    leader = group.raft("n0")
    assert leader.progress["n2"].state is PeerState.SEGMENTS
    assert not leader.is_waiting_for("n2"), "n1 is a quorum with it"
    group.lose("n0", "n1", hard=False)
    assert leader.is_waiting_for("n2") and leader.is_waiting_for("n1")
    assert not leader.is_waiting_for("n9") and not leader.is_waiting_for("n0")
    assert not group.raft("n1").is_waiting_for("n2"), "who does not lead does not know"


def test_4_7_it_goes_on_with_entries_where_the_segments_end() -> None:
    group = far_behind(60)
    (need,) = needs(group, "n2")
    assert isinstance(need, fx.NeedSegments)
    whole = list(group["n0"].log)
    group["n2"].log = MemoryLog(whole[: need.first_index - 1])
    group["n2"].boot()
    group.connect("n0", "n2")
    group.settle()
    assert len(needs(group, "n2")) == 1
    assert group.raft("n2").last_index == group.raft("n0").last_index


@pytest.mark.parametrize("offer", [msg.SegmentsOffer(1, 0, 5, 0), msg.SegmentsOffer(1, 1, 0, 0)])
def test_an_impossible_offer_is_refused(offer: msg.SegmentsOffer) -> None:
    group = Group()
    with pytest.raises(RemoteError):
        group["n1"].receive("n0", offer)
    assert group.raft("n1").term == 0 and group.raft("n1").leader is None


def test_an_offer_of_an_older_term_learns_the_newer() -> None:
    group = Group()
    group["n1"].receive("n2", msg.Vote(5, 9, 5))
    group.take()
    group["n1"].receive("n0", msg.SegmentsOffer(4, 1, 5, 0))
    assert group.wire == [("n1", "n0", msg.AppendReply(5, 0, False, 0, 0))]
    assert needs(group, "n1") == []


# The arithmetic


def test_bytes_behind_a_peer() -> None:
    log = make_log(1, 1, 1, 1)
    end = log.position_end
    assert bytes_behind(log, 4, end) == 0 and bytes_behind(log, 0, end) == end
    assert bytes_behind(log, 3, end) == len(log.entries(4, 1)[0].frame)
    log.trim(2)
    assert bytes_behind(log, 1, end) is None and bytes_behind(log, 2, end) is not None


def test_nobody_is_far_behind_within_the_open_segment() -> None:
    log = far_behind(1)["n0"].log
    config = RaftConfig(segment_bytes=100_000, segments_behind_bytes=10)
    assert not is_far_behind(log, 0, 2, log.position_end, config)
    assert is_far_behind(log, 0, 2, log.position_end, RaftConfig(segment_bytes=100, segments_behind_bytes=10))


def test_what_is_sent_begins_at_an_entry_we_have() -> None:
    log = make_log(*(1,) * 30)
    config = RaftConfig(segment_bytes=64, segments_behind_bytes=0)
    log.trim(5)
    first = first_to_send(log, 30, log.position_end, config)
    assert log.first_index < first <= log.last_index + 1
    whole = RaftConfig(segments_behind_bytes=1 << 30)
    assert first_to_send(log, 30, log.position_end, whole) == log.first_index


def test_only_what_is_committed_comes_as_segments() -> None:
    """Found by a random run: a leader whose quorum was far behind offered what only that quorum could commit."""
    log = make_log(*(1,) * 30)
    config = RaftConfig(segment_bytes=64, segments_behind_bytes=0)
    assert first_to_send(log, 7, log.position_end, config) == 8
    assert not is_far_behind(log, 7, 7, log.position_end, config)
    assert is_far_behind(log, 6, 7, log.position_end, config)


def test_4_7_a_quorum_that_is_far_behind_gets_entries() -> None:
    """n0 alone has a long log and knows of no commit: what it lacks to commit must come from the others."""
    group = far_behind(60)
    for name in ("n1", "n2"):
        group[name].log = MemoryLog()
        group[name].boot()
    group["n0"].boot(commit_index=0)
    group.elect("n0")
    group.run(1.0)
    assert {group.raft(name).commit_index for name in group.names} == {group.raft("n0").last_index}
    assert needs(group, "n1") == []
