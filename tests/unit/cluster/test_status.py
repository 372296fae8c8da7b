"""What `status` makes of the nodes' runtime information."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.layout import RunningNode
from cluster.status import NodeStatus, _from_runtime_info, with_lag, with_membership


def info(number: int, **changes: str) -> dict[str, str]:
    return {
        "raftRole": "follower",
        "raftNode": f"n{number}",
        "raftTerm": "3",
        "raftLastIndex": "100",
        "raftCommittedIndex": "98",
        "raftState": "serving",
        "raftRecovering": "false",
        "raftMembers": "n0;n1;n2",
        "raftLearners": "",
        **changes,
    }


def statuses(*said: dict[str, str]) -> list[NodeStatus]:
    nodes = [
        RunningNode(name=f"n{number}", group="broker-a", kind="broker", process=None, listen="l", state="up")
        for number in range(len(said))
    ]
    found = [_from_runtime_info(node, table) for node, table in zip(nodes, said, strict=True)]
    return with_lag(with_membership(found, {node.name: table for node, table in zip(nodes, said, strict=True)}))


def test_a_healthy_node_is_its_role_alone() -> None:
    leader, follower = statuses(info(0, raftRole="leader", raftLastIndex="120"), info(1))
    assert (leader.standing, follower.standing) == ("leader", "follower")
    assert (follower.lag_entries, follower.uncommitted, follower.membership) == (20, 2, "voter")


@pytest.mark.parametrize(
    ("changes", "standing"),
    [
        ({"raftRecovering": "true"}, "follower, recovering"),
        ({"raftState": "installing", "raftRecovering": "true"}, "follower, installing"),
        ({"raftState": "repairing", "raftMembers": ""}, "follower, repairing"),
        ({"raftState": "recovering", "raftMembers": ""}, "follower, recovering"),
    ],
)
def test_what_keeps_a_node_from_its_full_part_is_told(changes: dict[str, Any], standing: str) -> None:
    (found,) = statuses(info(0, **changes))
    assert found.standing == standing
    if not changes.get("raftMembers", "n0"):
        assert (found.term, found.last_index, found.lag_entries) == (None, None, None)


def test_the_leaders_account_of_the_members_counts() -> None:
    members = {"raftMembers": "n0;n2", "raftLearners": "n3"}
    _, gone, _, learner = statuses(
        info(0, raftRole="leader", **members), info(1), info(2, **members), info(3, **members)
    )
    assert (gone.membership, gone.standing) == ("none", "follower, no member")
    assert (learner.membership, learner.standing) == ("learner", "follower, learner")
    # A former leader that has not heard of its successor yet.
    _stale, gone, _ = statuses(
        info(0, raftRole="leader", raftTerm="2"), info(1), info(2, raftRole="leader", raftTerm="4", raftMembers="n0;n2")
    )
    assert gone.membership == "none"
