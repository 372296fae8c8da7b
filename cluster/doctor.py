"""What is right and what is wrong with a cluster, as findings: `quorate doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from attrs import frozen

from cluster.config import ClusterConfig, GroupSection, promise_of
from cluster.raft_groups import GroupView, NodeView

Level = Literal["ok", "warning", "bad"]

DESCRIPTORS_NEEDED = 4096
SATURATION_MAX = 0.8
LAG_SECONDS_MAX = 10.0
FREE_BYTES_MIN = 1 << 30


@frozen
class Finding:
    """One thing that was looked at. `next_step` says what to do about it."""

    about: str
    level: Level
    text: str
    next_step: str = ""


def check_machine(free_bytes: int, total_bytes: int, descriptors_max: int, data: str) -> Iterator[Finding]:
    """This machine, whether or not anything runs."""
    if free_bytes < FREE_BYTES_MIN:
        yield Finding(
            "disk",
            "bad",
            f"{free_bytes >> 20:,} MiB are free where {data} is",
            "make room, or choose another folder with --data DIR",
        )
    else:
        yield Finding("disk", "ok", f"{free_bytes >> 30:,} of {total_bytes >> 30:,} GiB are free where {data} is")
    if descriptors_max < DESCRIPTORS_NEEDED:
        yield Finding(
            "open files",
            "warning",
            f"a process may open {descriptors_max} files; a busy broker wants {DESCRIPTORS_NEEDED}",
            f"ulimit -n {DESCRIPTORS_NEEDED}",
        )
    else:
        yield Finding("open files", "ok", f"a process may open {descriptors_max}")


def check_config(config: ClusterConfig, outgoing_ports: tuple[int, int] | None = None) -> Iterator[Finding]:
    """The configuration: what it promises, and what a demo may do but production should not.

    `outgoing_ports` are first and last of those the machine gives to outgoing connections.
    """
    first, last = outgoing_ports or (0, -1)
    at_risk = sorted(
        address.port
        for node in config.nodes()
        for address in (node.listen, node.peer, node.metrics)
        if address is not None and first <= address.port <= last
    )
    if at_risk:
        yield Finding(
            "ports",
            "warning",
            f"{' '.join(map(str, at_risk))} lie between {first} and {last}, which outgoing connections are given: a "
            "node may find its port taken when it starts",
            f"choose ports below {first}, or: sysctl -w net.ipv4.ip_local_reserved_ports={','.join(map(str, at_risk))}",
        )
    for group in config.groups:
        yield Finding(group.name, "ok", promise_of(group.flush, len(group.founders)))
        if len(group.founders) == 1:
            yield Finding(group.name, "warning", "one node: nothing survives its loss", "use three nodes")
    if len(config.namesrvs) == 1:
        yield Finding(
            "name servers",
            "warning",
            "there is one: while it is down, clients that start find no route",
            "add a second [[namesrv]]",
        )


def check_group(group: GroupView, section: GroupSection | None) -> Iterator[Finding]:
    """A raft group that runs."""
    silent = [node for node in group.nodes if node.said is None]
    best = group.best
    if best is None or best.said is None:
        yield Finding(group.name, "bad", "no node answers", "start it: quorate up, or quorate serve on each host")
        return
    voters = best.said["members"]
    leader = group.leader
    if leader is None:
        yield Finding(group.name, "bad", *_why_leaderless(group, voters))
    else:
        yield Finding(group.name, "ok", f"{leader.node_id} leads term {_said(leader)['term']}")
    for node in silent:
        yield Finding(
            f"{group.name} at {node.address}",
            "bad" if leader is None else "warning",
            f"does not answer: {node.reason}",
            "look at its log, or start it",
        )
    uuid = best.said.get("group_uuid")
    for node in group.answering:
        if _said(node).get("group_uuid") != uuid:
            yield Finding(
                f"{group.name}/{node.node_id}",
                "bad",
                "its folder belongs to another group, so the others have nothing to do with it",
                "stop it, empty its folder, and start it with --join and an `identity` in the [[group]] of its "
                "cluster.toml: the cluster_uuid in raft/format.json of a member",
            )
        elif leader is not None and node.node_id not in (*voters, *best.said["learners"]):
            yield _stranger(group, node, section)
        else:
            yield from _check_node(group, node)
    if section is not None and len(voters) != len(section.founders):
        yield Finding(group.name, "ok", f"now {len(voters)} nodes vote: {promise_of(section.flush, len(voters))}")
    if leader is not None:
        yield from _check_peers(group, _said(leader))
    if section is not None:
        yield from _check_members(group, best.said, section)


def _said(node: NodeView) -> Mapping[str, Any]:
    assert node.said is not None
    return node.said


def _why_leaderless(group: GroupView, voters: list[str]) -> tuple[str, str]:
    answering = [node for node in group.answering if node.node_id in voters]
    recovering = [str(node.node_id) for node in answering if _said(node)["recovering"]]
    quorum = len(voters) // 2 + 1
    if not voters:  # who votes is in the log
        busy = [f"{node.node_id} is {_said(node)['state']}" for node in group.answering]
        return f"no leader: no node serves its log ({', '.join(busy)})", "see what each of them waits for"
    mending = [str(node.node_id) for node in answering if _said(node)["state"] != "serving"]
    if len(answering) - len(mending) < quorum and mending:
        return (
            f"no leader: {quorum} of {len(voters)} voters are needed, and the log of {' '.join(mending)} is not served",
            "see what each of them waits for",
        )
    if len(answering) < quorum:
        return (
            f"no leader: {len(answering)} of {len(voters)} voters answer, {quorum} are needed",
            "start the others; nothing is lost by waiting",
        )
    if recovering:
        return (
            f"no leader: {' '.join(recovering)} recover from a power loss, so all of {' '.join(voters)} must answer",
            f"start the missing ones; if they are gone for good: quorate raft recover {recovering[0]} --accept-loss",
        )
    return "no leader now, though a majority answers", "ask again in a few seconds; if it stays, read the nodes' logs"


def _stranger(group: GroupView, node: NodeView, section: GroupSection | None) -> Finding:
    """A node that runs and gets nothing: it was removed, or has not been added yet."""
    configured = section.nodes if section is not None else ()
    peer = next((str(each.peer) for each in configured if each.name == node.node_id), "HOST:PORT")
    return Finding(
        f"{group.name}/{node.node_id}",
        "warning",
        "runs, but is no member of the group: it was removed, or not added yet",
        f"stop it, or: quorate raft add-node {node.node_id} --peer {peer}",
    )


def _check_node(group: GroupView, node: NodeView) -> Iterator[Finding]:
    said = _said(node)
    about = f"{group.name}/{node.node_id}"
    found = list(_troubles(about, said))
    yield from found or [
        Finding(about, "ok", f"{said['role']}, committed {said['commit_index']:,}, disk {said['disk_usage']:.0%}")
    ]


def _troubles(about: str, said: Mapping[str, Any]) -> Iterator[Finding]:
    if said["state"] == "repairing":
        waits = said.get("waits_for") or "its peers"
        yield Finding(
            about,
            "bad",
            f"its log is damaged and waits for {waits}",
            "keep the other nodes running; what none of them has, only a backup has (quorate restore); to go on "
            f"without it: quorate raft recover {about}",
        )
    elif said["state"] == "installing":
        waits = said.get("waits_for")
        text = "is being filled with log files by its peers"
        yield Finding(about, "warning", f"{text}: {waits}" if waits else text)
    power_lost_index = said.get("power_lost_index")
    if power_lost_index is not None:
        yield Finding(
            about,
            "warning",
            f"came back from a power loss with entries up to {power_lost_index:,}; with flush "
            f'"{said["flush"]}" up to about {said.get("flush_interval_ms", 500) / 1000:g} s of messages that were '
            "acknowledged before it may be lost, if all nodes lost power together",
            'flush = "sync" keeps acknowledged messages through that',
        )
    if said["recovering"]:
        yield Finding(
            about,
            "warning",
            f"recovers: entries up to {said['last_index']:,} are here, later ones may have been acknowledged; it votes "
            "again when a leader has confirmed them",
            "start all members of the group",
        )
    early, forced, refuse = said["disk_watermarks"]
    usage = said["disk_usage"]
    if not said["disk_ok"]:
        yield Finding(
            about, "bad", "its disk is full, fails or stalls: it neither leads nor campaigns", "see to the disk"
        )
    elif usage >= refuse:
        yield Finding(about, "bad", f"disk {usage:.0%} full: sends are refused", "make room or lower retention_hours")
    elif usage >= forced:
        yield Finding(about, "bad", f"disk {usage:.0%} full: the oldest messages go whatever their age", "make room")
    elif usage >= early:
        yield Finding(about, "warning", f"disk {usage:.0%} full: old messages go at any hour")
    if said["is_disk_slow"]:
        yield Finding(about, "warning", "its disk was slow to write lately")
    if said["loop_saturation"] > SATURATION_MAX:
        share = f"{said['loop_saturation']:.0%}"
        yield Finding(about, "warning", f"the log takes {share} of its loop", "spread topics over more groups")


def _check_peers(group: GroupView, said: Mapping[str, Any]) -> Iterator[Finding]:
    for peer, seconds in said["lag_seconds"].items():
        if not said["connected"].get(peer, False):
            yield Finding(f"{group.name}/{peer}", "warning", "is not connected to the leader")
        elif seconds > LAG_SECONDS_MAX:
            behind = said["lag_bytes"].get(peer, 0)
            yield Finding(
                f"{group.name}/{peer}", "warning", f"has been behind for {seconds:.0f} s, by {behind:,} bytes now"
            )


def _check_members(group: GroupView, said: Mapping[str, Any], section: GroupSection) -> Iterator[Finding]:
    configured = sorted(node.name for node in section.present)
    there = sorted([*said["members"], *said["learners"]])
    if there and there != configured:
        yield Finding(
            group.name,
            "warning",
            f"its members are {' '.join(there)}, the configuration has {' '.join(configured)}",
            "the log counts; change members with quorate raft add-node or remove-node, and the file after it: "
            "join = true for who came, removed = true for who went",
        )
