"""How the verbs of `quorate raft` find groups and nodes, and what they say where they cannot."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import quorate
from cli import raft
from cli.backup import _Copy
from cli.exits import Failure
from cli.main import cli
from cluster.config import default_text
from cluster.raft_groups import GroupView, NodeView
from runtime.real import real_env

JOINING = """
[[group.node]]
name = "n3"
listen = "127.0.0.1:10941"
peer = "127.0.0.1:10945"
join = true
"""


def node(group: str, number: int, *, leads: bool = False, **changes: Any) -> NodeView:
    said: dict[str, Any] = {
        "node_id": f"n{number}",
        "role": "leader" if leads else "follower",
        "ready": leads,
        "term": 2,
        "last_index": 9,
        "commit_index": 9,
        "members": ["n0", "n1", "n2"],
        "learners": [],
        "addresses": {f"n{k}": ["127.0.0.1", 40911 + k] for k in range(3)},
        "lag_bytes": {},
        "state": "serving",
        "recovering": False,
        **changes,
    }
    return NodeView(f"127.0.0.1:{number}", group, said)


def group_of(name: str, **changes: Any) -> GroupView:
    return GroupView(name, tuple(node(name, number, leads=number == 1, **changes) for number in range(3)))


SILENT = GroupView("broker-a", (NodeView("127.0.0.1:1", "broker-a", None, "cannot connect to 127.0.0.1:1"),))


class Administration:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    async def add_learner(self, address: str, name: str, peer: str) -> Mapping[str, Sequence[str]]:
        self.asked.append(("add_learner", address, name, peer))
        return {"voters": ["n0", "n1", "n2"], "learners": [name]}

    async def accept_loss(self, address: str) -> Mapping[str, Any]:
        self.asked.append(("accept_loss", address))
        return {}

    async def remove(self, address: str, name: str) -> Mapping[str, Sequence[str]]:
        self.asked.append(("remove", address, name))
        return {"voters": ["n0", "n1", "n2"], "learners": []}

    async def transfer_leadership(self, address: str, target: str | None) -> str | None:
        self.asked.append(("transfer", address, str(target)))
        return target


def invoke(monkeypatch: pytest.MonkeyPatch, groups: list[GroupView], *arguments: str) -> tuple[Any, Administration]:
    administration = Administration()
    client: Any = SimpleNamespace(admin=SimpleNamespace(raft=administration))

    async def refresh() -> list[GroupView]:
        return groups

    @asynccontextmanager
    async def reached(target: Any) -> AsyncIterator[raft.ReachedCluster]:
        yield raft.ReachedCluster(client, groups, refresh)

    monkeypatch.setattr(raft, "reached", reached)
    return CliRunner().invoke(cli, ["raft", *arguments]), administration


@pytest.mark.parametrize(
    "verb",
    [["list"], ["describe"], ["transfer-leadership"], ["remove-node", "n1", "--yes"], ["recover", "n1"]],
)
def test_nobody_reached_is_3_with_the_reason(monkeypatch: pytest.MonkeyPatch, verb: list[str]) -> None:
    result, _ = invoke(monkeypatch, [SILENT], *verb)
    assert result.exit_code == 3
    assert "could not reach anybody: cannot connect to 127.0.0.1:1" in result.output


@pytest.mark.parametrize("name", ["broker-b/n1", "b-n1", "broker-b-n1"])
def test_a_node_of_the_second_group_has_the_names_other_verbs_give_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    groups = [group_of("broker-a"), group_of("broker-b", term=7)]
    result, _ = invoke(monkeypatch, groups, "describe", name, "--json")
    assert json.loads(result.output)["term"] == 7


def test_with_two_groups_a_bare_name_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, [group_of("broker-a"), group_of("broker-b")], "describe", "n1")
    assert (result.exit_code, "which raft group?" in result.output) == (2, True)


def test_who_leads_already_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result, administration = invoke(monkeypatch, [group_of("broker-a")], "transfer-leadership", "--to", "n1", "--json")
    assert json.loads(result.output) == {"group": "broker-a", "from": "n1", "leader": "n1"}
    assert administration.asked == []


def test_a_learner_is_moved_to_the_address_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of("broker-a", learners=["n3"], addresses={"n3": ["127.0.0.1", 5]})
    arguments = ("add-node", "n3", "--peer", "localhost:6", "--learner")
    result, administration = invoke(monkeypatch, [group], *arguments)
    assert result.exit_code == 0
    assert administration.asked == [
        ("remove", "127.0.0.1:1", "n3"),
        ("add_learner", "127.0.0.1:1", "n3", "127.0.0.1:6"),
    ]


def test_what_goes_into_the_log_should_be_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(default_text() + JOINING)
    monkeypatch.chdir(tmp_path)
    result, administration = invoke(monkeypatch, [group_of("broker-a")], "add-node", "new", "--peer", "127.0.0.1:6")
    assert (result.exit_code, '"new" is not n and a number' in result.output) == (2, True)
    result, administration = invoke(monkeypatch, [group_of("broker-a")], "add-node", "n3", "--peer", "127.0.0.1:6")
    assert (result.exit_code, "has n3 at 127.0.0.1:10945, not at 127.0.0.1:6" in result.output) == (2, True)
    assert administration.asked == []


def test_a_node_that_is_no_member_is_told_from_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of("broker-a")
    result, _ = invoke(monkeypatch, [group], "describe", "n9")
    assert (result.exit_code, 'no node "n9" in broker-a; there are n0 n1 n2' in result.output) == (2, True)
    silent = GroupView("broker-a", (*group.nodes[:2], NodeView("127.0.0.1:9", "broker-a", None, "silent")))
    result, _ = invoke(monkeypatch, [silent], "describe", "n2")
    assert (result.exit_code, "n2 of broker-a does not answer" in result.output) == (3, True)


def test_a_voter_elsewhere_is_refused_and_a_stranger_is_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    result, administration = invoke(monkeypatch, [group_of("broker-a")], "add-node", "n2", "--peer", "127.0.0.1:6")
    assert (result.exit_code, "n2 votes in broker-a already, at 127.0.0.1:40913" in result.output) == (1, True)
    result, administration = invoke(monkeypatch, [group_of("broker-a")], "remove-node", "n7", "--yes")
    assert (result.exit_code, "n7 is no member of broker-a" in result.output) == (2, True)
    assert administration.asked == []


async def test_a_backup_that_a_trim_overtakes_says_so(tmp_path: Path) -> None:
    class Trimmed:
        async def backup_chunk(self, address: str, **where: int) -> tuple[bytes, int]:
            raise quorate.RequestRefused(1, "not committed in one segment of the log", address)

    said = {"committed_position": 4096, "first_position": 0}
    client: Any = SimpleNamespace(admin=SimpleNamespace(raft=Trimmed()))
    copy = _Copy(real_env().files, client, "127.0.0.1:1", str(tmp_path), said, is_shown=False)
    with pytest.raises(Failure, match="does not have what is to be copied any more"):
        await copy._chunk(4096, position=0)


def test_a_group_that_is_not_there_is_named_with_those_that_are() -> None:
    cluster = raft.ReachedCluster(None, [group_of("broker-a")], None)  # type: ignore[arg-type]
    with pytest.raises(Failure, match='no raft group "broker-z"; there are broker-a'):
        cluster.group("broker-z")


@pytest.mark.parametrize("damaged", [[], [[12, 14], [20, 20]]])
def test_what_nobody_can_supply_is_named_before_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, damaged: list[list[int]]
) -> None:
    repairing = {"state": "repairing", "damaged": damaged, "waits_for": "entry 12 (n1 damaged here too)"}
    groups = [group_of("broker-a", **repairing)]
    result, administration = invoke(monkeypatch, groups, "recover", "n0")
    assert result.exit_code == 2 and "waits for entry 12 (n1 damaged here too)" in result.output
    assert ("Damaged are entries 12 to 14, 20." in result.output) is bool(damaged)
    assert administration.asked == []
    result, administration = invoke(monkeypatch, groups, "recover", "n0", "--accept-loss", "--json")
    assert result.exit_code == 0 and administration.asked == [("accept_loss", "127.0.0.1:0")]
    told = json.loads(result.output)
    assert (told["damaged"], told["accepted"]) == (damaged, True)
