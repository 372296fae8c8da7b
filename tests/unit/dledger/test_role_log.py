"""What is told of changes of role."""

from __future__ import annotations

from typing import Any

from dledger.core.effects import RoleChanged
from dledger.core.types import Role
from dledger.role_log import REPEATED_SECONDS, RoleLog


class Lines:
    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def info(self, event: str, **details: Any) -> None:
        self.said.append({"event": event, **details})

    warning = info


def change(role: Role, term: int, leader: str | None = None) -> RoleChanged:
    return RoleChanged(role, term, leader, "because")


def test_a_lone_member_tells_of_its_questions_once_and_then_once_a_minute() -> None:
    now = 0.0
    lines = Lines()
    log = RoleLog(lines, lambda: now)
    log.note(change(Role.FOLLOWER, 3, "n1"), last_index=9, commit_index=8)
    for _ in range(1000):
        log.note(change(Role.PRE_CANDIDATE, 3), last_index=9, commit_index=8)
        log.note(change(Role.FOLLOWER, 3), last_index=9, commit_index=8)
        now += 0.25
    told = [(line["event"], line.get("role"), line.get("leader")) for line in lines.said[:3]]
    assert told == [
        ("role changed", "follower", "n1"),
        ("role changed", "pre_candidate", None),
        ("role changed", "follower", None),
    ]
    again = lines.said[3:]
    assert len(again) == 1000 * 0.25 // REPEATED_SECONDS
    assert all(line["asked"] == REPEATED_SECONDS / 0.25 for line in again[1:])


def test_every_election_and_every_leader_is_told() -> None:
    lines = Lines()
    log = RoleLog(lines, lambda: 0.0)
    for term in (1, 2):
        for role, leader in (
            (Role.PRE_CANDIDATE, None),
            (Role.CANDIDATE, None),
            (Role.CANDIDATE, None),
            (Role.LEADER, "n0"),
            (Role.FOLLOWER, None),
            (Role.FOLLOWER, "n1"),
            (Role.FOLLOWER, "n2"),
        ):
            log.note(change(role, term, leader), last_index=0, commit_index=0)
    assert len(lines.said) == 2 * 7
