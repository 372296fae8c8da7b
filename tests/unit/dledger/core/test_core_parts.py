"""The small parts of the core, each on its own."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dledger.core.config import RaftConfig
from dledger.core.election import Ballot, is_up_to_date
from dledger.core.errors import LocalError
from dledger.core.events import Tick
from dledger.core.invariants import InvariantBroken, Watch
from dledger.core.log import MemoryLog
from dledger.core.membership import AddLearner, Members, Remove
from dledger.core.progress import Progress
from dledger.core.quorum import majority, quorum_mark
from dledger.core.raft import Raft
from dledger.core.transitions import PEER_TRANSITIONS, ROLE_TRANSITIONS, Cause, PeerCause, PeerState
from dledger.core.types import HardState, Role
from tests.paper.harness import Group, make_log


@given(st.lists(st.integers(0, 20), min_size=1, max_size=7))
def test_a_quorum_mark_is_what_a_majority_has_and_no_more(marks: list[int]) -> None:
    mark = quorum_mark(marks)
    assert sum(1 for one in marks if one >= mark) >= majority(len(marks))
    assert sum(1 for one in marks if one > mark) < majority(len(marks))


@given(st.integers(1, 9))
def test_two_majorities_overlap(voters: int) -> None:
    assert 2 * majority(voters) > voters >= majority(voters)


def test_up_to_date_compares_terms_before_lengths() -> None:
    assert is_up_to_date(3, 1, 2, 9) and is_up_to_date(2, 9, 2, 9)
    assert not is_up_to_date(2, 9, 3, 1) and not is_up_to_date(2, 8, 2, 9)


def ballot(granted: str = "", recovering: str = "", refused: str = "", voters: str = "abc") -> Ballot:
    result = Ballot(voters)
    for voter in granted:
        result.record(voter, granted=True, recovering=voter in recovering)
    for voter in refused:
        result.record(voter, granted=False, recovering=False)
    return result


@pytest.mark.parametrize(
    ("granted", "recovering", "refused", "won", "lost"),
    [
        ("a", "", "", False, False),
        ("ab", "", "c", True, False),
        ("a", "", "bc", False, True),
        ("a", "", "b", False, False),
        ("ab", "b", "", False, False),
        ("ab", "b", "c", False, True),
        ("abc", "bc", "", True, False),
        ("abc", "abc", "", True, False),
        ("abc", "c", "", True, False),
    ],
)
def test_ballots(granted: str, recovering: str, refused: str, won: bool, lost: bool) -> None:
    result = ballot(granted, recovering, refused)
    assert (result.is_won, result.is_lost(frozenset())) == (won, lost)


def test_a_ballot_is_lost_when_those_who_could_win_it_are_gone() -> None:
    assert not ballot("a").is_lost({"b"})
    assert ballot("a").is_lost({"b", "c"})
    assert ballot("a", refused="b").is_lost({"c"})


def test_a_ballot_counts_members_only_and_their_first_answer() -> None:
    result = ballot("ax", refused="a")
    assert not result.is_won
    result.record("b", granted=False, recovering=False)
    result.record("b", granted=True, recovering=False)
    assert not result.is_won
    result.record("c", granted=True, recovering=False)
    assert result.is_won


def test_every_role_and_peer_state_has_its_transitions() -> None:
    assert set(ROLE_TRANSITIONS) == set(Role) and set(PEER_TRANSITIONS) == set(PeerState)
    assert all(set(row) == set(PeerCause) for row in PEER_TRANSITIONS.values())
    used = {cause for row in ROLE_TRANSITIONS.values() for cause in row}
    assert used == set(Cause)
    # Raft figure 4: only a candidate becomes leader, and a leader becomes nothing but a follower.
    into_leader = [role for role, row in ROLE_TRANSITIONS.items() if Role.LEADER in row.values()]
    assert into_leader == [Role.CANDIDATE]
    assert set(ROLE_TRANSITIONS[Role.LEADER].values()) == {Role.FOLLOWER}


def test_a_progress_frees_its_window_in_order() -> None:
    progress = Progress("n1", 1, 0.0, is_connected=True)
    for nbytes in (10, 20, 30):
        progress.seq += 1
        progress.note_sent(nbytes)
    progress.note_answered(2)
    assert (len(progress.inflight), progress.inflight_bytes) == (1, 30)
    progress.change(PeerCause.REJECTED)
    assert (progress.state, progress.inflight_bytes, progress.stale_seq) == (PeerState.PROBE, 0, 3)


# The model log


def test_the_log_gives_at_least_one_entry_and_otherwise_keeps_the_limit() -> None:
    log = make_log(1, 1, 1, 1)
    size = len(log.entries(1, 1)[0].frame)
    assert [entry.index for entry in log.entries(2, 1)] == [2]
    assert [entry.index for entry in log.entries(1, 3 * size)] == [1, 2, 3]
    assert log.entries(5, 100) == [] and log.entries(0, 100) == []


def test_the_log_cut_and_trimmed() -> None:
    log = make_log(1, 1, 2, 3)
    assert [entry.index for entry in log.cut(4)] == [4]
    log.trim(2)
    assert (log.first_index, log.last_index, log.last_term, len(log)) == (3, 3, 2, 1)
    assert [log.term_at(i) for i in range(5)] == [None, None, 1, 2, None]
    assert log.head_crc_at(1) is None and log.head_crc_at(2) is not None
    end = log.position_end
    log.trim(3)
    assert (log.first_index, log.last_index, log.last_term, log.position_end) == (4, 3, 2, end)
    assert MemoryLog().position_end == MemoryLog().last_term == 0


# Configuration and construction


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat": 0.3},
        {"election_timeout_max": 1.0},
        {"segment_bytes": 10},
    ],
)
def test_figures_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|too small"):
        RaftConfig(**wrong)  # type: ignore[arg-type]


def test_a_group_has_a_voter() -> None:
    with pytest.raises(LocalError, match="without a voter"):
        Raft("n9", [], RaftConfig(), Random("x"), HardState(), MemoryLog(), 0.0)


def test_a_config_entry_behind_the_end_of_the_log_is_refused() -> None:
    with pytest.raises(LocalError, match="behind the end"):
        Raft("n0", ["n0"], RaftConfig(), Random("x"), HardState(), make_log(1), 0.0, configs=[(2, Members(["n0"]))])


def test_election_timeouts_differ_between_nodes_and_stay_in_their_range() -> None:
    deadlines = [
        Raft(f"n{i}", [f"n{j}" for j in range(50)], RaftConfig(), Random(i), HardState(), MemoryLog(), 0.0).deadline
        for i in range(50)
    ]
    assert all(1.0 <= deadline <= 2.0 for deadline in deadlines)
    assert len(set(deadlines)) == 50


def test_an_early_tick_does_nothing() -> None:
    group = Group()
    assert group["n0"].step(Tick(group.now)) == []


# Invariants: each one notices


@pytest.mark.parametrize(
    ("name", "value", "promise"),
    [
        ("commit_index", 9, "commit <= written"),
        ("durable_index", 9, "durable <= written"),
        ("term", 0, "the term never falls"),
        ("vote", "n2", "a vote never changes"),
        ("leader", "n1", "a leader follows"),
        ("is_disk_ok", False, "bad disk"),
        ("last_index", 0, "."),
        ("last_crc", 77, "rewrites"),
    ],
)
def test_a_watch_notices(name: str, value: object, promise: str) -> None:
    group = Group()
    group.elect("n0")
    raft = group.raft("n0")
    watch = Watch(raft)
    watch.check()
    setattr(raft.log if hasattr(raft.log, name) else raft, name, value)
    with pytest.raises(InvariantBroken, match=promise):
        watch.check()


def test_a_watch_notices_a_commit_index_that_falls() -> None:
    group = Group()
    group.elect("n0")
    group["n0"].propose()
    group.settle()
    watch = Watch(group.raft("n0"))
    group.raft("n0").log.commit_index -= 1
    with pytest.raises(InvariantBroken, match="commit index never falls"):
        watch.check()


@pytest.mark.parametrize(("name", "value"), [("written", 9), ("durable", 2), ("next_index", 9), ("next_index", 0)])
def test_a_watch_notices_wrong_progress(name: str, value: int) -> None:
    group = Group()
    group.elect("n0")
    setattr(group.raft("n0").progress["n1"], name, value)
    with pytest.raises(InvariantBroken):
        Watch(group.raft("n0")).check()


def grown() -> Group:
    group = Group(4, voters=3)
    group.elect("n0")
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    return group


def test_a_watch_notices_a_voter_that_was_never_added() -> None:
    group = grown()
    group.raft("n1").in_force.voters = ("n0", "n1", "n2", "n3")
    with pytest.raises(InvariantBroken, match="one list counts"):
        Watch(group.raft("n1")).check()


def test_a_watch_notices_a_config_entry_that_is_not_in_the_log() -> None:
    group = grown()
    raft = group.raft("n1")
    raft.configs.append(99, raft.members)
    with pytest.raises(InvariantBroken, match="is in the log"):
        Watch(raft).check()


def test_a_watch_notices_a_change_taken_for_committed() -> None:
    group = grown()
    group["n0"].change(Remove("n3"))
    group.deliver(group.take())
    raft = group.raft("n1")
    raft.in_force.open_index = 0
    with pytest.raises(InvariantBroken, match="open until committed"):
        Watch(raft).check()


def test_a_watch_notices_a_learner_that_campaigns() -> None:
    group = grown()
    group.raft("n3").role = Role.CANDIDATE
    with pytest.raises(InvariantBroken, match="only a voter"):
        Watch(group.raft("n3")).check()


def test_a_watch_notices_two_members_changed_at_once() -> None:
    group = grown()
    raft = group.raft("n0")
    raft.in_force.append(raft.last_index, Members(["n0", "n3"]), raft.commit_index - 1)
    with pytest.raises(InvariantBroken, match=r"open until|one member at a time"):
        Watch(raft).check()


def test_a_watch_notices_two_open_changes_of_a_leader() -> None:
    group = grown()
    group.isolate("n0")
    raft = group.raft("n0")
    group["n0"].change(Remove("n3"))
    group["n0"].propose()
    raft.in_force.append(raft.last_index, Members(["n0", "n1"]), raft.commit_index)
    raft._members_changed()
    with pytest.raises(InvariantBroken, match="one change of members at a time"):
        Watch(raft).check()


@pytest.mark.parametrize(("peer", "promise"), [("n1", "tracks every member"), ("n9", "tracks members only")])
def test_a_watch_notices_who_is_tracked_wrongly(peer: str, promise: str) -> None:
    group = grown()
    progress = group.raft("n0").progress
    if peer in progress:
        del progress[peer]
    else:
        progress[peer] = Progress(peer, 1, group.now, is_connected=True)
    with pytest.raises(InvariantBroken, match=promise):
        Watch(group.raft("n0")).check()


def test_a_watch_notices_a_commit_without_a_quorum_of_the_voters() -> None:
    """n0 and the learner have the entry: two nodes, one voter."""
    group = grown()
    group.isolate("n1", "n2")
    watch = Watch(group.raft("n0"))
    index = group["n0"].propose()
    group.settle()
    assert group.raft("n0").progress["n3"].written == index
    watch.check()
    group.raft("n0").log.commit_index = index
    with pytest.raises(InvariantBroken, match="a quorum of the voters"):
        watch.check()


def test_a_watch_notices_reads_that_outlive_a_leader() -> None:
    group = grown()
    group.raft("n1")._reads.add(1)
    with pytest.raises(InvariantBroken, match="keeps reads"):
        Watch(group.raft("n1")).check()
