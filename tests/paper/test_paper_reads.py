"""Dissertation 6.4, raft.md 4.8: reads by index, one test per clause that we promise.

- Only a leader answers, and only behind the committed no-op of its term.
- The index is the commit index when the round began; the round counts answers to messages sent after the read came.
- All reads that have gathered share a round; a lost message of a round is made good by the next heartbeat.
- Losing leadership refuses every read once. A leader that was replaced without knowing it answers none.
- The quorum is one of the voters in force when it answers; a group of one answers at once.
- The number of waiting reads is bounded.
"""

from __future__ import annotations

from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import ReadIndex, TurnEnd
from dledger.core.membership import AddLearner, Promote
from dledger.core.types import Role
from tests.paper.harness import Group


def led(size: int = 3, **more: object) -> Group:
    group = Group(size, **more)  # type: ignore[arg-type]
    group.elect("n0")
    return group


def test_6_4_a_read_is_answered_after_a_round_with_a_quorum() -> None:
    group = led()
    group["n0"].propose()
    group.settle()
    group.isolate("n2")
    group["n0"].read(7)
    assert group["n0"].answers == []
    group.settle()
    assert group["n0"].answers == [(7, 2)]


def test_6_4_a_minority_confirms_nothing() -> None:
    group = led()
    group.isolate("n0")
    group["n0"].read(7)
    group.settle()
    assert group["n0"].answers == []


def test_6_4_only_the_leader_answers() -> None:
    group = led()
    group["n1"].read(7)
    assert group["n1"].answers == [(7, "this node is not the leader")]


def test_6_4_answers_to_messages_sent_before_the_read_do_not_count() -> None:
    """They tell that it led then, and not that nobody else has been elected since."""
    group = led()
    group["n0"].propose()
    group.deliver(group.take())
    early = group.take()
    assert {type(message) for _, _, message in early} == {msg.AppendReply}
    group["n0"].step(ReadIndex(group.now, 7))
    group.deliver(early)
    assert group["n0"].answers == []
    group.settle()
    assert group["n0"].answers == [(7, 2)]


def test_6_4_a_read_waits_for_the_no_op_of_the_term() -> None:
    """Until then the leader does not know what was acknowledged in older terms (Raft 5.4.2)."""
    group = Group()
    group["n0"].writes = False
    group.tick("n0")
    group.settle()
    leader = group["n0"]
    assert leader.raft.role is Role.LEADER
    group.isolate("n1", "n2")
    leader.read(7)
    group.take()
    leader.receive("n1", msg.AppendReply(1, leader.raft.progress["n1"].seq, True, 1, 1))
    assert leader.answers == []
    group.heal()
    leader.complete_writes()
    assert leader.raft.commit_index == 1 and leader.answers == []
    leader.end_turn()
    group.settle()
    assert leader.answers == [(7, 1)]


def test_6_4_the_index_covers_what_was_committed_when_the_read_came() -> None:
    group = led()
    for _ in range(3):
        group["n0"].propose()
    group.settle()
    group["n0"].read(7)
    group["n0"].propose()
    group.settle()
    ((token, index),) = group["n0"].answers
    assert token == 7 and isinstance(index, int) and index >= 4


def test_4_8_reads_that_gather_share_a_round() -> None:
    group = led()
    group.take()
    for token in range(50):
        group["n0"].step(ReadIndex(group.now, token))
    group["n0"].end_turn()
    assert len(group.wire) == 2
    for token in range(50, 100):
        group["n0"].read(token)
    assert len(group.wire) == 2, "the next round waits for this one"
    group.deliver(group.take())
    group.deliver(group.take())
    assert [token for token, _ in group["n0"].answers] == list(range(50))
    group.settle()
    assert [token for token, _ in group["n0"].answers] == list(range(100))


def test_4_8_no_reads_no_messages() -> None:
    group = led()
    group.take()
    group["n0"].step(TurnEnd(group.now))
    assert group.wire == []


def test_6_4_a_lost_round_is_made_good_by_the_next_heartbeat() -> None:
    group = led()
    group["n0"].read(7)
    group.take()
    group.run(0.4)
    assert group["n0"].answers == [(7, 1)]


def test_6_4_a_rejected_append_confirms_too() -> None:
    """The peer lacks entries, but it follows this leader in this term."""
    group = led()
    group.isolate("n2")
    group["n0"].propose()
    group.settle()
    group.heal()
    group.isolate("n1")
    group["n0"].read(7)
    (message,) = [packet[2] for packet in group.take() if packet[1] == "n2"]
    assert isinstance(message, msg.Append) and message.prev_index == 2
    group["n2"].receive("n0", message)
    (answer,) = [packet for packet in group.take() if packet[0] == "n2"]
    assert isinstance(answer[2], msg.AppendReply) and not answer[2].ok
    group.deliver([answer])
    assert group["n0"].answers == [(7, 2)]


def test_6_4_losing_leadership_refuses_every_read_once() -> None:
    group = led()
    group.isolate("n0")
    group["n0"].read(1)
    group["n0"].read(2)
    group["n0"].receive("n1", msg.Vote(2, 9, 9))
    assert group["n0"].answers == [(1, "a higher term was heard"), (2, "a higher term was heard")]
    group.heal()
    group.run(3.0)
    assert len(group["n0"].answers) == 2


def test_6_4_a_leader_that_was_replaced_without_knowing_answers_nothing() -> None:
    """The reason for all this: it would answer from tables that lack what its successor has acknowledged."""
    group = led()
    group.isolate("n0")
    group.lose("n1", "n0", hard=True)
    group.lose("n2", "n0", hard=True)
    group.run(0.3)
    (successor,) = [name for name in group.leaders() if name != "n0"]
    group[successor].propose()
    group.settle()
    assert group.raft("n0").role is Role.LEADER
    group["n0"].read(7)
    group.run(0.5)
    assert group["n0"].answers == []
    group.run(1.0)
    assert group["n0"].answers == [(7, "no quorum answered within the election timeout")]


def test_6_4_a_group_of_one_answers_at_once() -> None:
    group = led(1)
    group["n0"].step(ReadIndex(group.now, 7))
    assert group["n0"].answers == [(7, 1)]


def test_6_4_a_group_of_one_answers_behind_its_no_op() -> None:
    group = Group(1)
    group["n0"].writes = False
    group.tick("n0")
    group["n0"].read(7)
    assert group.raft("n0").role is Role.LEADER and group["n0"].answers == []
    group["n0"].complete_writes()
    assert group["n0"].answers == [(7, 1)]


def test_6_4_a_learner_confirms_nothing() -> None:
    group = led(4, voters=3)
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    group.isolate("n1", "n2")
    group["n0"].read(7)
    group.settle()
    assert group["n0"].answers == []


def test_6_4_the_quorum_is_one_of_the_voters_in_force_when_it_answers() -> None:
    """The read came while there were three voters; one of them and the leader are no quorum of four."""
    group = led(4, voters=3)
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    group["n0"].read(7)
    round_trip = group.take(lambda packet: packet[1] == "n1")
    group.take()
    group["n0"].change(Promote("n3"))
    group.take()
    group.deliver(round_trip)
    group.deliver(group.take(lambda packet: packet[0] == "n1"))
    assert group["n0"].answers == []
    group.run(0.4)
    assert group["n0"].answers == [(7, 2)]


def test_6_4_waiting_reads_are_bounded() -> None:
    group = led(config=RaftConfig(reads_waiting_max=3))
    for token in range(5):
        group["n0"].step(ReadIndex(group.now, token))
    assert group["n0"].answers == [
        (3, "too many reads wait for a confirmation"),
        (4, "too many reads wait for a confirmation"),
    ]
    group["n0"].end_turn()
    group.settle()
    assert [token for token, index in group["n0"].answers if isinstance(index, int)] == [0, 1, 2]
