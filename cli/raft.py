"""`quorate raft`: the raft groups: who leads, who is a member, and how to change that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from cli.exits import (
    CHECK_FAILED,
    CLUSTER_ANSWERED_ERROR,
    GAVE_UP_WAITING,
    NOBODY_REACHED,
    USAGE,
    Failure,
    confirm,
    print_json,
)
from cli.lazy import LazyGroup
from cli.output import number, paragraph, table
from cli.run import run
from cli.target import json_option, layout_of, load_config, namesrv_of, remote_options
from runtime.real import real_env

if TYPE_CHECKING:
    import quorate
    from cluster.config import Address, GroupSection
    from cluster.raft_groups import GroupView, NodeView

CAUGHT_UP_LOOK_S = 0.25
PROGRESS_EVERY_S = 2.0
LEVEL_BYTES = 1024 * 1024
"""A learner this near the leader's end is promoted (raft.md 4.15)."""

Target = tuple[str | None, str | None, str | None]


@click.group(
    cls=LazyGroup,
    aliases={"ls": "list", "info": "describe"},
    epilog="""\b
Examples:
  quorate raft list
  quorate raft describe broker-a
  quorate raft transfer-leadership --to n2
  quorate raft add-node n3 --peer 10.0.0.4:10915     then, on its host: quorate serve n3 --join
  quorate raft remove-node n1 --yes
  quorate raft recover n0 --accept-loss
""",
)
def raft() -> None:
    """Raft groups: members, leadership, recovery.

    A raft group is one broker name; its nodes are called n0, n1, ... With one group in the cluster its name may be
    left out; else write broker-a/n1.
    """


@frozen
class ReachedCluster:
    """The raft groups that a verb found, and a client to talk to them."""

    client: quorate.Client
    groups: list[GroupView]
    refresh: Callable[[], Awaitable[list[GroupView]]]

    def group(self, name: str | None) -> GroupView:
        """By name, or the only one. Raises Failure."""
        names = ", ".join(group.name for group in self.groups)
        if not self.groups:
            raise Failure("no raft group is known: no broker is registered, and none is configured", NOBODY_REACHED)
        if name is None:
            if len(self.groups) > 1:
                raise Failure(f"which raft group? There are {names}", USAGE)
            return answering(self.groups)[0]
        for group in self.groups:
            if group.name == name:
                return answering([group])[0]
        raise Failure(f'no raft group "{name}"; there are {names}', USAGE)

    def split(self, text: str) -> tuple[GroupView, str]:
        """'n1', 'broker-a/n1', or 'b-n1' as other verbs call it. Raises Failure."""
        from cluster.config import short_name

        group_name, slash, node = text.rpartition("/")
        if not slash and len(self.groups) > 1:
            for group in self.groups:
                stem, dash, number = text.rpartition("-")
                if dash and stem in (group.name, short_name(group.name)):
                    return self.group(group.name), number
        return self.group(group_name if slash else None), node

    def node(self, text: str) -> tuple[GroupView, NodeView]:
        """A node that answers. Raises Failure."""
        group, name = self.split(text)
        node = group.node(name)
        if node is None:
            best = group.best.said if group.best is not None and group.best.said is not None else {}
            members = [*best.get("members", ()), *best.get("learners", ())]
            if members and name not in members:
                raise Failure(f'no node "{name}" in {group.name}; there are {" ".join(members)}', USAGE)
            there = ", ".join(str(each.node_id) for each in group.answering) or "none"
            raise Failure(f"node {name} of {group.name} does not answer; those that do: {there}", NOBODY_REACHED)
        return group, node


def answering(groups: list[GroupView]) -> list[GroupView]:
    """The same groups. Raises Failure where no node of any of them answers."""
    silent = [node for group in groups for node in group.nodes]
    if silent and not any(group.answering for group in groups):
        reasons = "; ".join(str(node.reason) for node in silent)
        raise Failure(f"could not reach anybody: {reasons}", NOBODY_REACHED)
    return groups


@asynccontextmanager
async def reached(target: Target) -> AsyncIterator[ReachedCluster]:
    """Ask the nodes of all raft groups what they know. Raises Failure or QuorateError."""
    import quorate
    from cluster.raft_groups import known_addresses, view_groups

    env = real_env()
    namesrv, data_path, config_path = target
    async with quorate.connect(namesrv_of(env.files, *target)) as client:
        configured = {} if namesrv else _configured(env.files, data_path, config_path)

        async def look() -> list[GroupView]:
            return await view_groups(env, client, await known_addresses(client, configured))

        yield ReachedCluster(client, await look(), look)


def _configured(files: Any, data_path: str | None, config_path: str | None) -> Mapping[str, list[str]]:
    """Addresses of the nodes that run here, else of those in the configuration."""
    from cluster.layout import read_up_state

    state = read_up_state(files, layout_of(files, data_path, config_path))
    nodes = state.nodes if state is not None else load_config(files, config_path).nodes()
    found: dict[str, list[str]] = {}
    for node in nodes:
        if node.group is not None:
            found.setdefault(node.group, []).append(str(node.listen))
    return found


# --- looking ---


@raft.command("list")
@remote_options
@json_option
def list_groups(namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """List raft groups: leader, term, members, and how far the last one is behind."""
    run(_list, (namesrv, data_path, config_path), as_json)


async def _list(target: Target, as_json: bool) -> None:
    async with reached(target) as cluster:
        rows = [_group_row(group) for group in answering(cluster.groups)]
    if as_json:
        print_json(rows)
    else:
        headings = ("group", "leader", "term", "voters", "learners", "committed", "max lag bytes", "not answering")
        click.echo(
            table(
                headings,
                [
                    (
                        row["group"],
                        row["leader"] or "-",
                        number(row["term"]),
                        " ".join(row["voters"]),
                        " ".join(row["learners"]) or "-",
                        number(row["commit_index"]),
                        number(row["lag_bytes_max"]),
                        " ".join(row["not_answering"]) or "-",
                    )
                    for row in rows
                ],
            )
        )
    leaderless = [row["group"] for row in rows if row["leader"] is None]
    if leaderless:
        raise Failure(f"without leader: {', '.join(leaderless)}", CHECK_FAILED)


def _group_row(group: GroupView) -> dict[str, Any]:
    leader, best = group.leader, group.best
    said = best.said if best is not None and best.said is not None else {}
    return {
        "group": group.name,
        "leader": None if leader is None else leader.node_id,
        "term": said.get("term"),
        "voters": list(said.get("members", ())),
        "learners": list(said.get("learners", ())),
        "commit_index": said.get("commit_index"),
        "lag_bytes_max": max(said.get("lag_bytes", {}).values(), default=None),
        "not_answering": [node.address for node in group.nodes if node.said is None],
    }


@raft.command()
@click.argument("name", metavar="[GROUP | NODE]", required=False)
@remote_options
@json_option
def describe(
    name: str | None, namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool
) -> None:
    """Show a raft group node by node, or all that one node knows."""
    run(_describe, name, (namesrv, data_path, config_path), as_json)


async def _describe(name: str | None, target: Target, as_json: bool) -> None:
    async with reached(target) as cluster:
        if name is not None and name not in {group.name for group in cluster.groups}:
            _, node = cluster.node(name)
            assert node.said is not None
            if as_json:
                print_json(node.said)
            else:
                _print_node(node.said)
            return
        group = cluster.group(name)
        if as_json:
            print_json(
                {
                    **_group_row(group),
                    "nodes": [
                        {"address": node.address, "reason": node.reason, **(node.said or {})} for node in group.nodes
                    ],
                }
            )
        else:
            _print_group(group)


def _print_group(group: GroupView) -> None:
    rows = []
    lags = group.leader.said["lag_bytes"] if group.leader is not None and group.leader.said is not None else {}
    for node in group.nodes:
        said = node.said
        if said is None:
            rows.append(("?", "no answer", *["-"] * 7, node.address))
            continue
        if not said["members"]:
            rows.append((said["node_id"], "  " + _standing(said), *["-"] * 7, node.address))
            continue
        rows.append(
            (
                said["node_id"],
                ("* " if said["ready"] else "  ") + _standing(said),
                number(said["term"]),
                number(said["last_index"]),
                number(said["durable_index"]),
                number(said["commit_index"]),
                number(said["applied_index"]),
                number(lags.get(said["node_id"])),
                f"{said['disk_usage']:.0%}" + ("" if said["disk_ok"] else " BAD"),
                node.address,
            )
        )
    headings = (group.name, "role", "term", "last", "durable", "committed", "applied", "lag bytes", "disk", "listen")
    click.echo(table(headings, rows))
    for node in group.nodes:
        if node.reason is not None:
            click.echo(f"{node.address} does not answer: {node.reason}")


def _standing(said: Mapping[str, Any]) -> str:
    """The role, and what keeps a node from its full part."""
    parts = [said["role"]]
    if said["node_id"] in said["learners"]:
        parts.append("learner")
    if said["state"] != "serving":
        parts.append(said["state"])
    if said["recovering"]:
        parts.append("recovering")
    return ", ".join(parts)


def _print_node(said: Mapping[str, Any]) -> None:
    for key, value in said.items():
        if isinstance(value, dict):
            if key == "histograms":
                _print_histograms(value)
                continue
            value = ", ".join(f"{name} {_plain(each)}" for name, each in value.items()) or "-"
        elif isinstance(value, list):
            value = " ".join(map(_plain, value)) or "-"
        click.echo(paragraph(_plain(value) or "-", f"{key.replace('_', ' '):22}", " " * 22))


def _plain(value: Any) -> str:
    """A share, an address, or what it is."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return ":".join(map(str, value))
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _print_histograms(histograms: Mapping[str, Any]) -> None:
    for name, histogram in histograms.items():
        count = sum(histogram["counts"])
        mean_ms = 1000 * histogram["total"] / count if count else 0.0
        click.echo(f"{name:22}{number(count)} x, mean {mean_ms:.3f} ms, max {1000 * histogram['maximum']:.3f} ms")


# --- changing ---


@raft.command("transfer-leadership")
@click.argument("group_name", metavar="[GROUP]", required=False)
@click.option("--to", "to", metavar="NODE", help="Who is to lead [default: the most advanced node].")
@remote_options
@json_option
def transfer_leadership(
    group_name: str | None,
    to: str | None,
    namesrv: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Hand the leadership of GROUP over, without an election timeout and without a failed send."""
    run(_transfer, group_name, to, (namesrv, data_path, config_path), as_json)


async def _transfer(group_name: str | None, to: str | None, target: Target, as_json: bool) -> None:
    async with reached(target) as cluster:
        group = cluster.group(group_name)
        former = _leader_of(group)
        leader = former.node_id
        if to is None or to != leader:
            leader = await cluster.client.admin.raft.transfer_leadership(former.address, to)
    if as_json:
        print_json({"group": group.name, "from": former.node_id, "leader": leader})
    elif leader == former.node_id:
        click.echo(f"{group.name}: {leader} leads already")
    elif leader is None:
        click.echo(f"{group.name}: {former.node_id} gave up leadership; the others are still electing")
    else:
        click.echo(f"{group.name}: {leader} leads, after {former.node_id}")


def _leader_of(group: GroupView) -> NodeView:
    leader = group.leader
    if leader is None:
        silent = [node.address for node in group.nodes if node.said is None]
        more = f"; no answer from {', '.join(silent)}" if silent else ""
        raise Failure(f"raft group {group.name} has no leader now{more}", CLUSTER_ANSWERED_ERROR)
    return leader


@raft.command("add-node")
@click.argument("node")
@click.option("--peer", required=True, metavar="HOST:PORT", help="Where the other nodes reach it (its `peer` address).")
@click.option("--learner", "stays_learner", is_flag=True, help="Leave it a learner: it gets the log and never votes.")
@click.option("--wait", "wait_s", type=click.FloatRange(0), default=600.0, show_default=True, help="Seconds to wait.")
@remote_options
@json_option
def add_node(
    node: str,
    peer: str,
    stays_learner: bool,
    wait_s: float,
    namesrv: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Add NODE to a raft group: as a learner first, and as a voter when it has the log.

    Run `quorate serve NODE --join` on its host, before or after, with a cluster.toml that has the node with
    join = true. The same command goes on where an earlier one was interrupted.
    """
    from cluster.config import parse_address

    try:
        address = parse_address(peer)
    except ValueError as error:
        raise Failure(f"--peer: {error}", USAGE) from None
    run(_add_node, node, _dialled(address), stays_learner, wait_s, (namesrv, data_path, config_path), as_json)


async def _add_node(name: str, peer: str, stays_learner: bool, wait_s: float, target: Target, as_json: bool) -> None:
    from cluster.config import is_node_id

    async with reached(target) as cluster:
        group, node = cluster.split(name)
        if not is_node_id(node):
            raise Failure(f'"{node}" is not n and a number, such as "n3"', USAGE)
        leader = _leader_of(group)
        assert leader.said is not None
        administration = cluster.client.admin.raft
        members = {"voters": leader.said["members"], "learners": leader.said["learners"]}
        known = _plain(leader.said["addresses"].get(node, peer))
        if node in members["voters"] and known != peer:
            raise Failure(
                f"{node} votes in {group.name} already, at {known}; to move it, change its `peer` in cluster.toml on "
                "all hosts and restart the nodes one by one",
                CLUSTER_ANSWERED_ERROR,
            )
        if node not in members["voters"]:
            _check_configured(node, peer, _section(group.name, target))
        if node in members["learners"] and known != peer:
            _say(f"{node} was a learner at {known}: it is removed, to be added at {peer}", as_json)
            members = await administration.remove(leader.address, node)
        if node not in members["voters"] and node not in members["learners"]:
            members = await administration.add_learner(leader.address, node, peer)
            _say(f"{node} is a learner of {group.name} now; start it with `quorate serve {node} --join`", as_json)
        if not stays_learner and node not in members["voters"]:
            await _wait_level(cluster, group.name, node, wait_s, as_json)
            leader = _leader_of(await _look_again(cluster, group.name))
            members = await administration.promote(leader.address, node)
    if as_json:
        print_json({"group": group.name, "node": node, **members})
    else:
        click.echo(
            f"{group.name}: voters {' '.join(members['voters'])}, learners {' '.join(members['learners']) or '-'}"
        )


def _section(group_name: str, target: Target) -> GroupSection | None:
    """What is configured about a group, where a configuration is meant: that of the data folder, else the file."""
    from cluster.config import DEFAULT_NAME
    from cluster.layout import read_identity

    env = real_env()
    namesrv, data_path, config_path = target
    if namesrv is not None:
        return None
    identity = read_identity(env.files, layout_of(env.files, data_path, config_path))
    config = identity.config if identity is not None else load_config(env.files, config_path)
    if config.source == DEFAULT_NAME:
        return None
    return next((group for group in config.groups if group.name == group_name), None)


def _check_configured(node: str, peer: str, section: GroupSection | None) -> None:
    """What goes into the log for good should be meant. Raises Failure."""
    configured = next((each for each in section.nodes if each.name == node), None) if section is not None else None
    if configured is not None and _dialled(configured.peer) != peer:
        raise Failure(
            f"the configuration has {node} at {configured.peer}, not at {peer}; correct --peer, or `peer` in "
            "cluster.toml on all hosts",
            USAGE,
        )


def _dialled(address: Address) -> str:
    """As the log names it."""
    host, port = address.pair
    return f"{host}:{port}"


async def _look_again(cluster: ReachedCluster, group_name: str) -> GroupView:
    return next(group for group in await cluster.refresh() if group.name == group_name)


async def _wait_level(cluster: ReachedCluster, group_name: str, node: str, wait_s: float, as_json: bool) -> None:
    """Until the leader says that the learner is near its end. Raises Failure (4)."""
    clock = real_env().clock
    deadline = clock.monotonic() + wait_s
    tell_at = clock.monotonic()
    while True:
        leader = (await _look_again(cluster, group_name)).leader
        said = leader.said if leader is not None and leader.said is not None else {}
        lag, state = said.get("lag_bytes", {}).get(node), said.get("peer_state", {}).get(node)
        if lag is not None and lag < LEVEL_BYTES and state == "replicate":
            return
        stands = f"{number(lag)} bytes behind"
        if not said.get("connected", {}).get(node, False):
            stands = f"not reached at {_plain(said.get('addresses', {}).get(node))}"
        if clock.monotonic() > deadline:
            raise Failure(
                f"{node} has not caught up within {wait_s:g} s (it is {stands}); it stays a learner, and the same "
                "command goes on; where its --peer is wrong, say it with the right one",
                GAVE_UP_WAITING,
            )
        if clock.monotonic() >= tell_at:
            tell_at += PROGRESS_EVERY_S
            _say(f"{node} is {stands}", as_json)
        await clock.sleep(CAUGHT_UP_LOOK_S)


def _say(text: str, as_json: bool) -> None:
    """Progress, beside the result."""
    if not as_json:
        click.echo(text, err=True)


@raft.command("remove-node")
@click.argument("node")
@click.option("--yes", is_flag=True, help="Do not ask.")
@remote_options
@json_option
def remove_node(
    node: str, yes: bool, namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool
) -> None:
    """Take NODE out of its raft group. Its data folder stays, and is of no use to the group any more."""
    run(_remove_node, node, yes, (namesrv, data_path, config_path), as_json)


async def _remove_node(name: str, yes: bool, target: Target, as_json: bool) -> None:
    async with reached(target) as cluster:
        group, node = cluster.split(name)
        leader = _leader_of(group)
        assert leader.said is not None
        everybody = [*leader.said["members"], *leader.said["learners"]]
        if node not in everybody:
            raise Failure(f"{node} is no member of {group.name}; the members are {' '.join(everybody)}", USAGE)
        left = [voter for voter in leader.said["members"] if voter != node]
        question = (
            f"{group.name} goes on with the voters {' '.join(left)} and bears the loss of {(len(left) - 1) // 2} of "
            f"them. Remove {node}?"
        )
        confirm(question, f"{question} Say --yes", yes, as_json)
        members = await cluster.client.admin.raft.remove(leader.address, node)
    if as_json:
        print_json({"group": group.name, "removed": node, **members})
    else:
        click.echo(
            f"{group.name}: voters {' '.join(members['voters'])}, learners {' '.join(members['learners']) or '-'}"
        )


@raft.command()
@click.argument("node")
@click.option("--accept-loss", "is_accepted", is_flag=True, help="Go on, although acknowledged messages may be lost.")
@remote_options
@json_option
def recover(
    node: str,
    is_accepted: bool,
    namesrv: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Let NODE take part again although it may have forgotten what it acknowledged: the way out of a power loss.

    With asynchronous flush a node that lost power is "recovering": its vote counts only if all members answer, until
    a leader has confirmed its log. Where members are gone for good, this says what is at risk, and with --accept-loss
    goes on without them. Tell it to as many nodes as make a majority.

    A node whose log is damaged waits for what its peers have of it. With --accept-loss what none of them can supply is
    given up: the log is cut before it, and the node is recovering then.
    """
    run(_recover, node, is_accepted, (namesrv, data_path, config_path), as_json)


async def _recover(name: str, is_accepted: bool, target: Target, as_json: bool) -> None:
    async with reached(target) as cluster:
        group, node = cluster.node(name)
        assert node.said is not None
        if node.said["state"] == "repairing" or node.said.get("damaged"):
            text, risk = _what_is_given_up(group, node.said)
            otherwise, then = "Keep the other nodes running", "the node goes on without it"
        elif node.said["recovering"]:
            text, risk = _what_is_at_risk(group, node.said)
            otherwise, then = "Bring the silent nodes back", "the node votes again"
        else:
            raise Failure(f"{name} is not recovering: there is nothing to accept", USAGE)
        risk = {"group": group.name, "node": node.node_id, **risk}
        if not is_accepted:
            raise Failure(f"{text}. {otherwise}, or say --accept-loss", USAGE, **risk)
        await cluster.client.admin.raft.accept_loss(node.address)
    if as_json:
        print_json({**risk, "accepted": True})
    else:
        click.echo(f"{text}. Accepted: {then}")


def _what_is_at_risk(group: GroupView, said: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a node votes that may have forgotten what it acknowledged."""
    silent = [other for other in said["members"] if group.node(other) is None]
    text = (
        f"{group.name}/{said['node_id']} has entries up to {number(said['last_index'])} (committed for certain: "
        f"{number(said['commit_index'])}). At risk is whatever was acknowledged from entry "
        f"{number(said['last_index'] + 1)} on"
        + (f"; {' '.join(silent)} may have it and does not answer" if silent else "")
    )
    return text, {
        "last_index": said["last_index"],
        "committed_for_certain": said["commit_index"],
        "at_risk_from_index": said["last_index"] + 1,
        "not_answering": silent,
    }


def _what_is_given_up(group: GroupView, said: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a node's log is damaged, and maybe nobody can supply what it waits for."""
    waits_for = said["waits_for"] or "its peers"
    damaged = [(int(first), int(last)) for first, last in said.get("damaged", ())]
    text = f"The log of {group.name}/{said['node_id']} is damaged, and it waits for {waits_for}. "
    if damaged:
        shown = ", ".join(number(at) if at == last else f"{number(at)} to {number(last)}" for at, last in damaged)
        text += f"Damaged are entries {shown}. "
    text += "What no node can supply is given up: the log is cut before it, and the rest comes from the leader"
    silent = [node.address for node in group.nodes if node.said is None]
    return text, {"damaged": damaged, "waits_for": waits_for, "not_answering": silent}
