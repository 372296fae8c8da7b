"""Raft sections 5.3, 5.4.2, 5.4.3 and 8: one test per clause that we promise."""

from __future__ import annotations

import pytest

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.errors import LocalError, RemoteError
from dledger.core.events import Durable, Propose, Receive, TurnEnd, Written
from dledger.core.log import MemoryLog
from dledger.core.transitions import PeerState
from dledger.core.types import Entry, EntryType, HardState, Role, frame_entry
from tests.paper.harness import Group, Member, Packet, make_log, terms_of


def append_of(log: MemoryLog, from_index: int, *, term: int, commit: int = 0, seq: int = 1) -> msg.Append:
    """What a leader with this log sends, from `from_index` on."""
    prev = from_index - 1
    prev_term, prev_crc = log.term_at(prev), log.head_crc_at(prev)
    assert prev_term is not None and prev_crc is not None
    return msg.Append(term, prev, prev_term, prev_crc, commit, seq, tuple(log.entries(from_index, 1 << 20)))


def answers(group: Group) -> list[msg.AppendReply]:
    return [message for _, _, message in group.wire if isinstance(message, msg.AppendReply)]


def appends(group: Group, target: str) -> list[msg.Append]:
    return [message for _, peer, message in group.wire if peer == target and isinstance(message, msg.Append)]


# 5.3


def test_5_3_a_proposal_goes_to_all_followers_at_once() -> None:
    group = Group()
    group.elect("n0")
    index = group["n0"].propose()
    for peer in ("n1", "n2"):
        (message,) = appends(group, peer)
        assert [entry.index for entry in message.entries] == [index]
        assert (message.prev_index, message.prev_term) == (index - 1, 1)


def test_5_3_an_entry_is_committed_once_a_majority_has_it_and_all_learn_it_at_once() -> None:
    group = Group()
    group.elect("n0")
    group.cut |= {("n0", "n2"), ("n2", "n0")}
    index = group["n0"].propose()
    assert group.raft("n0").commit_index == index - 1
    group.settle()
    assert group.raft("n0").commit_index == index
    assert group.raft("n1").commit_index == index  # without a heartbeat


def test_5_3_commit_covers_all_entries_before() -> None:
    group = Group(logs={"n0": make_log(1, 1), "n1": make_log(1), "n2": MemoryLog()})
    group.elect("n0")
    assert group["n0"].committed == [3]


def test_5_3_a_follower_without_the_predecessor_refuses() -> None:
    group = Group()
    group["n1"].receive("n0", append_of(make_log(1, 1, 1), 3, term=1))
    (answer,) = answers(group)
    assert not answer.ok and (answer.hint_index, answer.hint_term) == (0, 0)
    assert group.raft("n1").last_index == 0


def test_5_3_a_conflicting_suffix_is_cut_and_replaced() -> None:
    theirs = make_log(1, 1, 3, 3)
    group = Group(logs={"n1": make_log(1, 1, 2, 2, 2)})
    group["n1"].receive("n0", append_of(theirs, 3, term=3))
    assert group["n1"].did(fx.Cut) == [fx.Cut(3)]
    assert terms_of(group["n1"].log) == [1, 1, 3, 3]


@pytest.mark.parametrize(
    "follower",
    [
        (1, 1, 1, 4, 4, 5, 5, 6, 6),
        (1, 1, 1, 4),
        (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6),
        (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7),
        (1, 1, 1, 4, 4, 4, 4),
        (1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3),
    ],
    ids="abcdef",
)
def test_5_3_figure_7_every_follower_becomes_equal(follower: tuple[int, ...]) -> None:
    leader_log = make_log(1, 1, 1, 4, 4, 5, 5, 6, 6, 6)
    group = Group(
        logs={"n0": leader_log, "n1": make_log(*follower), "n2": make_log(1, 1, 1, 4)},
        hard_states={name: HardState(7, None) for name in ("n0", "n1", "n2")},
    )
    group.cut |= {("n0", "n1"), ("n1", "n0")}
    group.elect("n0")
    group.heal()
    rounds = 0
    group.heartbeat("n0")
    while terms_of(group["n1"].log) != terms_of(group["n0"].log):
        rounds += 1
        assert rounds < 5
        group.heartbeat("n0")
    assert [entry.frame for entry in group["n1"].log] == [entry.frame for entry in group["n0"].log]
    assert terms_of(group["n1"].log) == [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 8]


def test_5_3_a_rejection_costs_one_round_per_differing_term() -> None:
    """Hints both ways (raft.md 4.4): 3,000 entries of four other terms do not cost 3,000 rounds."""
    follower = (1,) * 10 + (2,) * 1000 + (3,) * 1000 + (4,) * 1000
    leader = (1,) * 10 + (5,) * 3000
    group = Group(
        logs={"n0": make_log(*leader), "n1": make_log(*follower), "n2": MemoryLog()},
        hard_states={"n0": HardState(5, None)},
    )
    group.isolate("n1")
    group.elect("n0")
    group.heal()
    group.now += 0.2
    group.tick("n0")
    rejections = 0
    for _ in range(100):
        rejections += sum(1 for answer in answers(group) if not answer.ok)
        group.deliver(group.take())
    assert group.raft("n1").last_index == group.raft("n0").last_index
    assert 1 <= rejections <= 3


def test_5_3_a_leader_never_changes_its_own_log() -> None:
    group = Group(logs={"n0": make_log(1, 1, 2)})
    group.elect("n0")
    before = [entry.frame for entry in group["n0"].log]
    group.run(3.0)
    assert [entry.frame for entry in group["n0"].log][: len(before)] == before
    assert group["n0"].did(fx.Cut) == []


def test_5_3_appending_twice_changes_nothing() -> None:
    theirs = make_log(1, 1, 1)
    group = Group()
    group["n1"].receive("n0", append_of(theirs, 1, term=1, seq=1))
    frames = [entry.frame for entry in group["n1"].log]
    group["n1"].done.clear()
    group["n1"].receive("n0", append_of(theirs, 1, term=1, seq=2))
    assert [entry.frame for entry in group["n1"].log] == frames
    assert group["n1"].did(fx.Cut) == group["n1"].did(fx.Append) == []


def test_5_3_a_lost_message_is_found_by_the_next_heartbeat() -> None:
    group = Group()
    group.elect("n0")
    group.cut.add(("n0", "n1"))
    group["n0"].propose()
    group.settle()
    assert group.raft("n1").last_index == 1
    group.heal()
    group.now += 0.2
    group.heartbeat("n0")
    assert group.raft("n1").last_index == group.raft("n1").commit_index == 2


def test_4_8_commit_news_finds_a_lost_message_even_before_that() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].propose()
    group.take(lambda packet: packet[1] == "n1")
    group.settle()
    assert group.raft("n1").commit_index == 2


def test_scenario_27_the_last_message_of_a_burst_needs_no_timer() -> None:
    """dledger#199: it waited 38 s for its acknowledgement."""
    group = Group()
    group.elect("n0")
    for _ in range(200):
        group["n0"].propose()
    now = group.now
    group.settle()
    assert group.now == now
    assert {group.raft(name).commit_index for name in group.names} == {201}


# 5.4.2


def test_5_4_2_a_leader_begins_with_a_no_op() -> None:
    group = Group()
    group.elect("n0")
    (entry,) = list(group["n1"].log)
    assert entry.type == EntryType.NOOP and entry.term == 1
    assert group.raft("n0").commit_index == 1


def test_5_4_2_proposals_before_the_no_op_are_refused() -> None:
    group = Group()
    member = group["n0"]
    group.tick("n0")
    member_frame = member.frame
    member.frame = lambda body, entry_type=EntryType.DATA: member_frame(body, EntryType.DATA)  # type: ignore[method-assign]
    group.settle()
    assert group.raft("n0").role is Role.LEADER and group.raft("n0").last_index == 0
    (refused,) = member.did(fx.Refused)
    assert isinstance(refused, fx.Refused) and "no-op" in refused.reason


def test_scenario_01_figure_8_entries_of_older_terms_are_not_committed_by_counting() -> None:
    """S1 leads term 4 and has copied entry 2 of term 2 to a majority; only its own no-op may commit it."""
    old = make_log(1, 2)
    group = Group(
        5,
        logs={"n0": old, "n1": make_log(1, 2), "n2": make_log(1), "n3": make_log(1), "n4": make_log(1, 3)},
        hard_states={"n0": HardState(3, None)},
        config=RaftConfig(message_bytes_max=70),
    )
    leader = group["n0"]
    group.isolate("n4")
    group.tick("n0")

    def has_no_op(packet: Packet) -> bool:
        return isinstance(packet[2], msg.Append) and any(entry.index == 3 for entry in packet[2].entries)

    for turn in range(20):
        group.take(has_no_op)
        group.deliver(group.take())
        if turn % 5 == 4:
            group.tick("n0")
    assert leader.raft.role is Role.LEADER and leader.raft.term == 4
    assert [leader.raft.progress[peer].written for peer in ("n2", "n3")] == [2, 2]
    assert leader.raft.commit_index == 0
    group.run(1.0)
    assert leader.raft.commit_index == 3


def test_5_4_3_a_leader_has_every_committed_entry() -> None:
    group = Group()
    group.elect("n0")
    group.isolate("n2")
    group["n0"].propose()
    group.settle()
    assert group.raft("n0").commit_index == 2
    group.heal()
    group.isolate("n0")
    group.take()
    group.run(6.0)
    assert [name for name in group.leaders() if name != "n0"] == ["n1"]


# raft.md 4.2, 4.4: marks


def test_sync_flush_commits_by_durable_marks() -> None:
    group = Group(config=RaftConfig(sync=True))
    group.elect("n0")
    for name in ("n1", "n2"):
        group[name].syncs = False
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").commit_index == index - 1
    assert group.raft("n1").log.written_index == index
    group["n1"].step(Durable(group.now, index, 1))
    group["n1"].end_turn()
    group.settle()
    assert group.raft("n0").commit_index == index


def test_async_flush_commits_by_written_marks() -> None:
    group = Group()
    group.elect("n0")
    for name in group.names:
        group[name].syncs = False
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").commit_index == index
    assert group.raft("n0").log.durable_index < index


def test_a_mark_for_an_entry_that_was_cut_is_ignored() -> None:
    group = Group(logs={"n1": make_log(1, 2, 2)})
    group["n1"].writes = False
    group["n1"].receive("n0", append_of(make_log(1, 3), 2, term=3))
    member = group["n1"]
    assert member.raft.last_index == 2 and member.raft.log.written_index == 1
    member.step(Written(group.now, 2, 2))
    assert member.raft.log.written_index == 1
    member.step(Written(group.now, 2, 3))
    assert member.raft.log.written_index == 2


def test_a_follower_does_not_commit_what_is_not_written() -> None:
    group = Group()
    group["n1"].writes = False
    group["n1"].receive("n0", append_of(make_log(1, 1), 1, term=1, commit=2))
    assert group.raft("n1").commit_index == 0
    group["n1"].complete_writes()
    assert group["n1"].committed == [1, 2] or group["n1"].committed == [2]


# Flow control


def test_the_window_bounds_what_is_under_way() -> None:
    group = Group(config=RaftConfig(window_messages_max=4))
    group.elect("n0")
    for _ in range(20):
        group["n0"].propose()
    assert len([message for message in appends(group, "n1") if message.entries]) == 4
    group.settle()
    assert group.raft("n1").last_index == 21


def test_the_window_bounds_bytes_too() -> None:
    group = Group(config=RaftConfig(window_bytes_max=10_000))
    group.elect("n0")
    for _ in range(20):
        group["n0"].propose(bytes(4000))
    assert len([message for message in appends(group, "n1") if message.entries]) == 3
    group.settle()
    assert group.raft("n1").commit_index == 21


def test_a_message_holds_many_small_entries_but_always_one() -> None:
    group = Group(config=RaftConfig(message_bytes_max=1000))
    group.elect("n0")
    frames: list[Entry] = []
    member = group["n0"]
    for size in (10, 10, 10, 5000, 10):
        entry = member.frame(bytes(size))
        member.step(Propose(group.now, (entry,)))
        frames.append(entry)
    member.end_turn()
    assert [len(message.entries) for message in appends(group, "n1")] == [3, 1, 1]


def test_heartbeats_pass_a_full_window() -> None:
    group = Group(config=RaftConfig(window_messages_max=1))
    group.elect("n0")
    group["n0"].propose()
    group["n0"].propose()
    group.take()
    group.now += 0.2
    group.tick("n0")
    (message,) = appends(group, "n1")
    assert message.entries == () and message.prev_index == 2


def test_pipelining_sends_ahead_of_the_answers() -> None:
    group = Group()
    group.elect("n0")
    for _ in range(5):
        group["n0"].propose()
    assert [message.prev_index for message in appends(group, "n1")] == [1, 2, 3, 4, 5]


def test_one_reply_per_turn() -> None:
    group = Group()
    group.elect("n0")
    for _ in range(5):
        group["n0"].propose()
    for message in appends(group, "n1"):
        group["n1"].step(Receive(group.now, "n0", message))
    group.take()
    group["n1"].step(TurnEnd(group.now))
    (answer,) = answers(group)
    assert (answer.ok, answer.written) == (True, 6)


def test_a_reconnected_peer_is_probed_first() -> None:
    group = Group()
    group.elect("n0")
    assert group.raft("n0").progress["n1"].state is PeerState.REPLICATE
    group.lose("n0", "n1", hard=True)
    assert group.raft("n0").progress["n1"].state is PeerState.PROBE
    group["n0"].propose()
    assert appends(group, "n1") == []
    group.connect("n0", "n1")
    (probe,) = appends(group, "n1")
    assert probe.prev_index == 1 and [entry.index for entry in probe.entries] == [2]
    group.settle()
    assert group.raft("n1").commit_index == 2


@pytest.mark.parametrize(("nbytes", "under_way"), [(2_000, 31), (100_000, 0)])
def test_a_probe_that_may_be_in_vain_is_small(nbytes: int, under_way: int) -> None:
    """64 KiB, and no entry at all where the next one is larger; once the logs agree everything follows."""
    group = Group()
    group.elect("n0")
    group.lose("n0", "n1", hard=True)
    for _ in range(40):
        group["n0"].propose(bytes(nbytes))
    group.connect("n0", "n1")
    (probe,) = appends(group, "n1")
    assert len(probe.entries) == under_way
    group.settle()
    assert group.raft("n1").commit_index == 41


# Illegal input


def _entry(index: int, term: int, position: int, prev_crc: int) -> Entry:
    return frame_entry(index, term, position, EntryType.DATA, 1, (b"body",), prev_crc, 0)


def _bad_appends() -> list[msg.Append]:
    good = _entry(1, 1, 0, 0)
    return [
        msg.Append(1, 0, 0, 0, 0, 1, (_entry(2, 1, 0, 0),)),
        msg.Append(1, 0, 0, 0, 0, 1, (_entry(1, 2, 0, 0),)),
        msg.Append(1, 0, 0, 0, 0, 1, (_entry(1, 1, 0, 77),)),
        msg.Append(1, 0, 0, 0, 0, 1, (good, _entry(2, 1, 5, good.head_crc))),
        msg.Append(1, 0, 9, 0, 0, 1),
        msg.Append(1, 0, 0, 0, 0, 0),
    ]


@pytest.mark.parametrize("message", _bad_appends())
def test_an_append_that_contradicts_itself_changes_nothing(message: msg.Append) -> None:
    group = Group()
    with pytest.raises(RemoteError):
        group["n1"].receive("n0", message)
    assert (group.raft("n1").last_index, group.raft("n1").term, group.raft("n1").leader) == (0, 0, None)


def test_a_message_to_oneself_is_refused() -> None:
    group = Group()
    with pytest.raises(RemoteError):
        group["n1"].receive("n1", msg.Vote(1, 0, 0))


def test_an_answer_to_what_was_never_sent_is_refused() -> None:
    group = Group()
    group.elect("n0")
    with pytest.raises(RemoteError):
        group["n0"].receive("n1", msg.AppendReply(1, 999, True, 1, 1))
    with pytest.raises(RemoteError):
        group["n0"].receive("n1", msg.AppendReply(1, 1, True, 50, 50))


def test_a_proposal_that_does_not_continue_the_log_is_our_own_fault() -> None:
    group = Group()
    group.elect("n0")
    entry = group["n0"].frame(b"a")
    group["n0"].propose()
    with pytest.raises(LocalError):
        group["n0"].step(Propose(group.now, (entry,)))


def test_a_proposal_framed_in_an_older_term_is_refused() -> None:
    group = Group()
    group.elect("n0")
    entry = group["n0"].frame(b"a")
    group["n0"].receive("n1", msg.Vote(5, 9, 1))
    group["n0"].step(Propose(group.now, (entry,)))
    (refused,) = group["n0"].did(fx.Refused)
    assert isinstance(refused, fx.Refused) and refused.entries == (entry,)


def make_member(log: MemoryLog) -> Member:
    return Group(logs={"n1": log})["n1"]


def test_damage_is_not_a_conflict() -> None:
    """Equal index and term, other bytes: one of the two is damaged, and cutting would be guessing."""
    ours, theirs = make_log(1, 1, bodies="a"), make_log(1, 1, bodies="b")
    for message in (append_of(theirs, 3, term=1), append_of(theirs, 1, term=1)):
        member = make_member(ours)
        member.receive("n0", message)
        assert "damaged" in (member.raft.failed or "")
        assert member.did(fx.Cut) == []


def test_a_committed_entry_is_never_cut() -> None:
    member = make_member(make_log(1, 1))
    member.boot(commit_index=2)
    member.receive("n0", append_of(make_log(1, 2), 2, term=2))
    assert "committed" in (member.raft.failed or "") and member.did(fx.Cut) == []


def test_a_predecessor_with_another_term_below_commit_is_fatal() -> None:
    member = make_member(make_log(1, 1))
    member.boot(commit_index=2)
    member.receive("n0", append_of(make_log(1, 2, 2), 3, term=2))
    assert "committed entry 2" in (member.raft.failed or "")


def test_a_position_that_does_not_follow_is_fatal() -> None:
    log = make_log(1)
    (first,) = list(log)
    wrong = _entry(2, 1, first.end + 8, first.head_crc)
    member = make_member(log)
    member.receive("n0", msg.Append(1, 1, 1, first.head_crc, 0, 1, (wrong,)))
    assert "position" in (member.raft.failed or "")
