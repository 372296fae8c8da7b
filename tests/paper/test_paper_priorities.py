"""raft.md 4.3: preferred leaders, and what an operator may do after a power loss. One test per clause that we promise.

- A priority shortens the node's own jitter, and never brings it below the smallest timeout.
- A leader that has led undisturbed for 30 s hands over to a voter of higher priority that is connected, level within
  1 MiB and has a working disk; never to another, and not again at once when it fails. Nobody is ever deposed.
- A leader whose disk has no room for messages hands over, after a timeout, to a voter that has; where nobody has, it
  leads on.
- `AcceptLoss` ends a recovery that no leader can end.
"""

from __future__ import annotations

import pytest

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import AcceptLoss, DiskState, PeerLost, Tick, Transfer
from dledger.core.membership import AddLearner, Promote
from dledger.core.succession import jitter_share
from dledger.core.types import Role
from tests.paper.harness import Group, make_log

PREFER_N2 = RaftConfig(priorities={"n2": 5, "n1": 1})


def led(config: RaftConfig = PREFER_N2, size: int = 3, **more: object) -> Group:
    group = Group(size, config=config, **more)  # type: ignore[arg-type]
    group.elect("n0")
    return group


def test_4_3_a_preferred_leader_takes_over_after_thirty_quiet_seconds() -> None:
    group = led()
    began = group.now
    group.run(29.5)
    assert group.leaders() == ["n0"]
    group.run(1.0)
    assert group.leaders() == ["n2"] and group.now - began < 31
    (ended,) = group["n0"].did(fx.TransferEnded)
    assert isinstance(ended, fx.TransferEnded) and ended.done
    group.run(100.0)
    assert group.leaders() == ["n2"] and group.raft("n2").term == 2


def test_4_3_the_most_preferred_of_those_that_are_fit() -> None:
    group = led()
    group["n2"].step(DiskState(group.now, False))
    group.run(32.0)
    assert group.leaders() == ["n1"]
    group["n2"].step(DiskState(group.now, True))
    group.run(32.0)
    assert group.leaders() == ["n2"]


def test_4_12_a_leader_without_room_hands_over_to_a_voter_that_has_some() -> None:
    group = led(RaftConfig())
    group["n1"].step(DiskState(group.now, True, False))
    group["n0"].step(DiskState(group.now, True, False))
    group.run(1.0)
    group.run(2.0)
    assert group.leaders() == ["n2"]
    group["n1"].step(DiskState(group.now, True, True))
    group.run(60.0)
    assert group.leaders() == ["n2"], "and it stays there"


def test_4_12_where_nobody_has_room_the_leader_leads_on() -> None:
    group = led(RaftConfig(priorities={"n2": 5}))
    for node in ("n0", "n1", "n2"):
        group[node].step(DiskState(group.now, True, False))
    group.run(60.0)
    assert group.leaders() == ["n0"] and group.raft("n0").term == 1


def test_4_3_without_priorities_nobody_moves() -> None:
    group = led(RaftConfig())
    group.run(100.0)
    assert group.leaders() == ["n0"] and group.raft("n0").term == 1


def test_4_3_equal_priorities_do_not_move() -> None:
    group = led(RaftConfig(priorities={"n0": 3, "n1": 3, "n2": 3}))
    group.run(100.0)
    assert group.leaders() == ["n0"]


@pytest.mark.parametrize("obstacle", ["cut off", "connection lost", "bad disk", "behind", "learner"])
def test_4_3_nobody_unfit_is_preferred(obstacle: str) -> None:
    only_last = RaftConfig(priorities={"n3" if obstacle == "learner" else "n2": 5})
    group = led(only_last, 4 if obstacle == "learner" else 3, voters=3)
    if obstacle == "cut off":
        group.isolate("n2")
        group["n0"].step(PeerLost(group.now, "n2", True))
    elif obstacle == "connection lost":
        group["n0"].step(PeerLost(group.now, "n2", False))
        group.raft("n0").progress["n2"].is_probe_sent = True
    elif obstacle == "bad disk":
        group["n2"].step(DiskState(group.now, False))
    elif obstacle == "behind":
        group["n2"].writes = False
        for _ in range(3):
            group["n0"].propose(bytes(600_000))
    else:
        group["n0"].change(AddLearner("n3", ("h", 1)))
    group.run(60.0)
    assert group.leaders() == ["n0"] and group.raft("n0").term == 1
    assert group["n0"].did(fx.TransferEnded) == [], "not even tried"


def test_4_3_a_transfer_that_fails_is_not_tried_again_at_once() -> None:
    group = led()
    group["n2"].receive = lambda peer, message: None  # type: ignore[method-assign]  # deaf, and still connected
    progress = group.raft("n0").progress["n2"]
    group.run(33.0)
    ended = group["n0"].did(fx.TransferEnded)
    assert len(ended) == 1 and group.leaders() == ["n0"] and progress.is_connected
    group.run(20.0)
    assert len(group["n0"].did(fx.TransferEnded)) == 1


def test_4_3_an_open_change_of_members_comes_first() -> None:
    group = led(PREFER_N2, 4, voters=3)
    group.run(29.0)
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.run(20.0)
    assert group.leaders() == ["n0"], "the thirty seconds begin anew"
    group.run(15.0)
    assert group.leaders() == ["n2"]


def test_4_3_an_open_change_of_members_holds_it_up() -> None:
    group = led(PREFER_N2, 4, voters=3)
    group["n1"].writes = group["n2"].writes = False
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.run(60.0)
    assert not group.raft("n0").is_config_committed
    assert group.leaders() == ["n0"] and group["n0"].did(fx.TransferEnded) == []


def test_4_3_a_learner_is_not_handed_leadership() -> None:
    group = led(RaftConfig(), 4, voters=3)
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    group["n0"].step(Transfer(group.now, "n3"))
    (ended,) = group["n0"].did(fx.TransferEnded)
    assert isinstance(ended, fx.TransferEnded) and "not another voter" in ended.reason


def test_4_3_priority_shortens_the_jitter_and_nothing_else() -> None:
    def deadlines(priorities: dict[str, int]) -> list[float]:
        return [
            Group(config=RaftConfig(priorities=priorities), size=size).raft("n0").deadline - 100.0
            for size in range(2, 40)
        ]

    plain, preferred = deadlines({}), deadlines({"n0": 1})
    assert min(preferred) >= 1.0 and min(plain) >= 1.0
    assert max(preferred) <= 1.5
    assert deadlines({"n1": 1}) == plain, "nobody waits longer for it"


def test_4_3_a_new_voter_shortens_the_jitter_of_those_that_outrank_it() -> None:
    group = led(RaftConfig(priorities={"n1": 1}), 4, voters=3)

    def longest(name: str) -> float:
        member = group[name]
        waits = []
        for _ in range(40):
            group.now = member.raft.deadline + 0.6
            member.step(Tick(group.now))  # found late: the timer is set anew
            waits.append(member.raft.deadline - group.now)
        return max(waits)

    assert 1.25 < longest("n1") <= 1 + 1 / 3
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    group["n0"].change(Promote("n3"))
    group.settle()
    assert group.raft("n1").members.voters == ("n0", "n1", "n2", "n3")
    assert longest("n1") <= 1 + 1 / 4


def test_jitter_shares() -> None:
    priorities = {"a": 3, "b": 2}
    assert [jitter_share(node, "abc", priorities) for node in "abc"] == [1 / 3, 1 / 2, 1]


def test_4_12_a_leader_hands_over_to_a_working_disk() -> None:
    """The peers are equal but for what they say of their disks."""
    for bad, good in (("n1", "n2"), ("n2", "n1")):
        group = led(RaftConfig())
        group[bad].step(DiskState(group.now, False))
        group.run(0.5)
        group["n0"].step(Transfer(group.now))
        group.settle()
        assert group.leaders() == [good]


def test_4_12_a_leader_with_a_bad_disk_names_a_voter() -> None:
    group = led(RaftConfig(), 4, voters=3)
    group["n0"].change(AddLearner("n3", ("h", 1)))
    group.settle()
    for peer in ("n1", "n2"):
        group.raft("n0").progress[peer].is_connected = False
    group["n0"].step(DiskState(group.now, False))
    assert [peer for _, peer, message in group.wire if isinstance(message, msg.TimeoutNow)] in (["n1"], ["n2"])


def test_4_2_accepting_the_loss_ends_a_recovery_without_a_leader() -> None:
    """Two of three recover and the third is gone for good: no majority of sure votes, and never all three."""
    group = Group(logs={"n0": make_log(1, 1), "n1": make_log(1)})
    group.isolate("n2")
    for name in ("n0", "n1"):
        group[name].boot(recovering=True)
    group.run(20.0)
    assert group.leaders() == []
    for name in ("n0", "n1"):
        group[name].step(AcceptLoss(group.now))
        assert group[name].did(fx.Recovered) == [fx.Recovered(group.raft(name).term)]
    group.run(3.0)
    assert group.leaders() == ["n0"]


def test_4_2_accepting_the_loss_counts_the_own_vote_anew() -> None:
    group = Group()
    group["n0"].boot(recovering=True)
    group.tick("n0")
    assert group.raft("n0").role is Role.PRE_CANDIDATE
    group["n0"].step(AcceptLoss(group.now))
    assert group.raft("n0").role is Role.FOLLOWER and group.raft("n0").deadline <= group.now + 0.1
    group.take()
    group.isolate("n2")
    group.tick("n0")
    group.settle()
    assert group.leaders() == ["n0"]


def test_4_2_accepting_a_loss_that_nobody_fears_does_nothing() -> None:
    group = Group()
    before = group.raft("n0").deadline
    assert group["n0"].step(AcceptLoss(group.now)) == []
    assert group.raft("n0").deadline == before
