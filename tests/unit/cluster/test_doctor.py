"""Each trouble of a raft group is found, named, and comes with what to do about it."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from cluster.config import default_text, parse, promise_of
from cluster.doctor import Finding, check_config, check_group, check_machine
from cluster.raft_groups import GroupView, NodeView

CONFIG = parse(default_text(), "built-in default")


def node(number: int, *, leads: bool = False, **changes: Any) -> NodeView:
    said: dict[str, Any] = {
        "node_id": f"n{number}",
        "role": "leader" if leads else "follower",
        "ready": leads,
        "term": 3,
        "last_index": 1200,
        "commit_index": 1200,
        "members": ["n0", "n1", "n2"],
        "learners": [],
        "recovering": False,
        "state": "serving",
        "flush": "async",
        "disk_ok": True,
        "disk_usage": 0.5,
        "disk_watermarks": [0.75, 0.85, 0.90],
        "is_disk_slow": False,
        "loop_saturation": 0.1,
        "connected": {},
        "lag_bytes": {},
        "lag_seconds": {},
        **changes,
    }
    return NodeView(f"127.0.0.1:{number}", "broker-a", said)


def silent(number: int) -> NodeView:
    return NodeView(f"127.0.0.1:{number}", "broker-a", None, "connection refused")


def findings(*nodes: NodeView) -> list[Finding]:
    return list(check_group(GroupView("broker-a", nodes), CONFIG.groups[0]))


def troubles(*nodes: NodeView) -> list[Finding]:
    return [finding for finding in findings(*nodes) if finding.level != "ok"]


def test_a_healthy_group_has_nothing_but_good_news() -> None:
    found = findings(node(0, leads=True), node(1), node(2))
    assert {finding.level for finding in found} == {"ok"}
    assert "n0 leads term 3" in found[0].text


def test_nobody_answers() -> None:
    assert [finding.level for finding in troubles(silent(0), silent(1), silent(2))] == ["bad"]


def test_one_silent_node_is_a_warning_while_a_leader_leads() -> None:
    (found,) = troubles(node(0, leads=True), node(1), silent(2))
    assert found.level == "warning"
    assert "connection refused" in found.text


def test_a_minority_waits_for_the_others() -> None:
    found = troubles(node(0), silent(1), silent(2))
    assert "1 of 3 voters answer, 2 are needed" in found[0].text
    assert {finding.level for finding in found} == {"bad"}


def test_recovering_voters_need_everybody_and_the_way_out_is_named() -> None:
    found = troubles(node(0, recovering=True), node(1), silent(2))
    assert "all of n0 n1 n2 must answer" in found[0].text
    assert "quorate raft recover n0 --accept-loss" in found[0].next_step


def test_nodes_whose_logs_are_mended_cannot_lead_and_that_is_said() -> None:
    mended: dict[str, Any] = {"state": "repairing", "waits_for": "entry 24"}
    nobody = troubles(*(node(number, **mended, members=[]) for number in range(3)))
    assert "no node serves its log (n0 is repairing, n1 is repairing, n2 is repairing)" in nobody[0].text
    most = troubles(node(0), node(1, **mended), node(2, **mended))
    assert "2 of 3 voters are needed, and the log of n1 n2 is not served" in most[0].text
    assert "waits for entry 24" in most[1].text


def test_a_node_that_runs_but_is_no_member_is_named_with_the_way_in() -> None:
    (found, *_) = troubles(node(0, leads=True), node(1), node(2), node(3))
    assert (found.about, found.level) == ("broker-a/n3", "warning")
    assert "is no member of the group" in found.text
    assert "quorate raft add-node n3 --peer" in found.next_step


def test_the_promise_follows_the_members() -> None:
    five: dict[str, Any] = {"members": ["n0", "n1", "n2", "n3", "n4"]}
    texts = [finding.text for finding in findings(node(0, leads=True, **five), node(1), node(2))]
    assert any(
        text.startswith('now 5 nodes vote: flush = "async": acknowledged means') and "3 of 5" in text for text in texts
    )


def test_a_power_loss_says_what_may_be_missing() -> None:
    (found,) = troubles(node(0, leads=True, power_lost_index=1100), node(1), node(2))
    assert found.level == "warning"
    assert "entries up to 1,100" in found.text
    assert "0.5 s" in found.text


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"state": "repairing"}, "bad", "damaged"),
        ({"state": "installing"}, "warning", "being filled"),
        ({"disk_ok": False}, "bad", "neither leads nor campaigns"),
        ({"disk_usage": 0.91}, "bad", "sends are refused"),
        ({"disk_usage": 0.86}, "bad", "the oldest messages go"),
        ({"disk_usage": 0.76}, "warning", "at any hour"),
        ({"is_disk_slow": True}, "warning", "slow"),
        ({"loop_saturation": 0.9}, "warning", "90%"),
    ],
)
def test_each_trouble_of_a_node(changes: dict[str, Any], level: str, text: str) -> None:
    (found,) = troubles(node(0, leads=True), node(1, **changes), node(2))
    assert (found.about, found.level) == ("broker-a/n1", level)
    assert text in found.text


def test_peers_that_lag_or_are_cut_off() -> None:
    peers: dict[str, Any] = {
        "lag_seconds": {"n1": 12.0, "n2": 0.0},
        "connected": {"n1": True, "n2": False},
        "lag_bytes": {"n1": 5000},
    }
    found = {finding.about: finding.text for finding in troubles(node(0, leads=True, **peers), node(1), node(2))}
    assert "behind for 12 s, by 5,000 bytes" in found["broker-a/n1"]
    assert "not connected" in found["broker-a/n2"]


def test_members_that_differ_from_the_configuration() -> None:
    changed: dict[str, Any] = {"members": ["n0", "n1"], "learners": ["n7"]}
    (found,) = troubles(node(0, leads=True, **changed), node(1, **changed))
    assert "its members are n0 n1 n7, the configuration has n0 n1 n2" in found.text


def test_what_a_configuration_promises() -> None:
    found = list(check_config(CONFIG))
    assert "page cache of 2 of 3 nodes" in found[0].text
    assert "stable storage of 2 of 3" in promise_of("sync", 3)
    alone = evolve(CONFIG, groups=(evolve(CONFIG.groups[0], nodes=CONFIG.groups[0].nodes[:1]),))
    assert "nothing survives its loss" in [finding.text.partition(": ")[2] for finding in check_config(alone)]


def test_a_small_machine() -> None:
    levels = [finding.level for finding in check_machine(5 << 20, 10 << 30, 256, "/data")]
    assert levels == ["bad", "warning"]
    assert {finding.level for finding in check_machine(5 << 30, 10 << 30, 65_536, "/data")} == {"ok"}


def test_ports_that_outgoing_connections_are_given_are_told() -> None:
    assert not [finding for finding in check_config(CONFIG, (32768, 60999)) if finding.about == "ports"]
    old = parse(default_text().replace("127.0.0.1:10925", "127.0.0.1:40921"), "cluster.toml")
    (found,) = [finding for finding in check_config(old, (32768, 60999)) if finding.about == "ports"]
    assert found.level == "warning" and found.text.startswith("40921 lie between 32768 and 60999")
    assert "ip_local_reserved_ports=40921" in found.next_step


def test_a_folder_of_another_group_is_told_with_the_identity_it_needs() -> None:
    found = troubles(node(0, leads=True, group_uuid="u"), node(1, group_uuid="u"), node(2, group_uuid="v"))
    assert [(finding.about, finding.level) for finding in found] == [("broker-a/n2", "bad")]
    assert "belongs to another group" in found[0].text and "identity" in found[0].next_step


def test_what_nobody_can_supply_may_be_given_up() -> None:
    group = (node(0, leads=True), node(1), node(2, state="repairing", waits_for="entry 35 to 48"))
    (found,) = [finding for finding in troubles(*group) if finding.about == "broker-a/n2"]
    assert "waits for entry 35 to 48" in found.text and "quorate raft recover broker-a/n2" in found.next_step
