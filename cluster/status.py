"""What the nodes of a cluster say about themselves: role, term and positions, asked over the network.

One GET_BROKER_RUNTIME_INFO per broker, all at once. Who does not answer is shown as down, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import trio
from attrs import evolve, frozen

import quorate
from cluster.layout import RunningNode
from runtime.model import Env

ASK_WITHIN_S = 2.0


@frozen(kw_only=True)
class NodeStatus:
    """One node. Indexes are of entries, positions in bytes of the log; None where not known."""

    name: str
    group: str | None
    kind: str
    listen: str
    state: str
    """up or down."""
    reason: str | None = None
    """Why it is thought down."""
    role: str | None = None
    """leader, follower, candidate, pre_candidate."""
    term: int | None = None
    log_state: str | None = None
    """serving; or recovering (from its own disk), repairing (damage, from its peers), installing (their log files)."""
    recovering: bool | None = None
    """It may have forgotten what it acknowledged, and does not vote as others do."""
    membership: str | None = None
    """voter, learner, or none: by the leader's account, else by its own."""
    leader: str | None = None
    """Id of the node it follows."""
    last_index: int | None = None
    written_index: int | None = None
    durable_index: int | None = None
    committed_index: int | None = None
    applied_index: int | None = None
    lag_entries: int | None = None
    """Entries of the leader's log that are not in this one."""
    first_position: int | None = None
    committed_position: int | None = None
    end_position: int | None = None
    flush: str | None = None
    messages_in: int | None = None
    """Since its start."""
    messages_out: int | None = None
    group_uuid: str | None = None

    @property
    def uncommitted(self) -> int | None:
        """Entries in its log above the commit index."""
        if self.last_index is None or self.committed_index is None:
            return None
        return self.last_index - self.committed_index

    @property
    def standing(self) -> str:
        """The role, and what keeps the node from its full part."""
        parts = [self.role or self.state]
        if self.membership == "learner":
            parts.append("learner")
        elif self.membership == "none":
            parts.append("no member")
        if self.log_state not in (None, "serving", "recovering"):
            parts.append(str(self.log_state))
        elif self.recovering or self.log_state == "recovering":
            parts.append("recovering")
        return ", ".join(parts)


_STANDS = (
    "raftTerm",
    "raftLastIndex",
    "raftWrittenIndex",
    "raftDurableIndex",
    "raftCommittedIndex",
    "raftAppliedIndex",
    "raftFirstPosition",
    "raftCommittedPosition",
    "raftEndPosition",
)


def _int(info: Mapping[str, str], key: str) -> int | None:
    text = info.get(key, "")
    return int(text) if text.lstrip("-").isdigit() else None


def _from_runtime_info(node: RunningNode, info: Mapping[str, str]) -> NodeStatus:
    if not info.get("raftMembers", "?"):  # its log is not served, so where it stands is not known; not 0
        info = {key: value for key, value in info.items() if key not in _STANDS}
    return NodeStatus(
        name=node.name,
        group=node.group,
        kind=node.kind,
        listen=node.listen,
        state="up",
        role=info.get("raftRole", "").lower() or None,
        term=_int(info, "raftTerm"),
        log_state=info.get("raftState"),
        recovering=info["raftRecovering"] == "true" if "raftRecovering" in info else None,
        membership=_membership(info.get("raftNode", ""), info),
        leader=info.get("raftLeader") or None,
        last_index=_int(info, "raftLastIndex"),
        written_index=_int(info, "raftWrittenIndex"),
        durable_index=_int(info, "raftDurableIndex"),
        committed_index=_int(info, "raftCommittedIndex"),
        applied_index=_int(info, "raftAppliedIndex"),
        first_position=_int(info, "raftFirstPosition"),
        committed_position=_int(info, "raftCommittedPosition"),
        end_position=_int(info, "raftEndPosition"),
        flush=info.get("raftFlush"),
        messages_in=_int(info, "msgPutTotalTodayNow"),
        messages_out=_int(info, "msgGetTotalTodayNow"),
        group_uuid=info.get("raftGroupUuid"),
    )


def _membership(node_id: str, info: Mapping[str, str]) -> str | None:
    """What `info`'s sender knows of a node's part in the group; None where it knows of no members."""
    voters = [name for name in info.get("raftMembers", "").split(";") if name]
    if not voters:
        return None
    if node_id in voters:
        return "voter"
    return "learner" if node_id in info.get("raftLearners", "").split(";") else "none"


def _down(node: RunningNode, reason: str) -> NodeStatus:
    return NodeStatus(name=node.name, group=node.group, kind=node.kind, listen=node.listen, state="down", reason=reason)


def with_lag(statuses: Sequence[NodeStatus]) -> list[NodeStatus]:
    """Fill in how far each broker is behind the leader of its raft group."""
    last: dict[str | None, int] = {}
    for status in statuses:
        if status.role == "leader" and status.last_index is not None:
            last[status.group] = max(last.get(status.group, 0), status.last_index)
    return [
        evolve(status, lag_entries=max(0, last[status.group] - status.last_index))
        if status.group in last and status.last_index is not None
        else status
        for status in statuses
    ]


def with_membership(statuses: Sequence[NodeStatus], said: Mapping[str, Mapping[str, str]]) -> list[NodeStatus]:
    """By the account of each group's leader: a node that was away when it was removed does not know of it. `said` has
    the runtime information of the nodes that answered."""
    leaders: dict[str | None, NodeStatus] = {}
    for status in statuses:
        if status.role == "leader" and (status.term or 0) >= (leaders.get(status.group, status).term or 0):
            leaders[status.group] = status
    return [
        evolve(
            status,
            membership=_membership(said[status.name].get("raftNode", ""), said[leaders[status.group].name]),
        )
        if status.group in leaders and status.name in said
        else status
        for status in statuses
    ]


class StatusReader:
    """Asks the brokers of one cluster again and again over kept connections."""

    def __init__(self, env: Env, client: Any) -> None:
        """`client` is an open `quorate.Client`."""
        self._env = env
        self._client = client

    async def read(self, nodes: Sequence[RunningNode], *, within_s: float = ASK_WITHIN_S) -> list[NodeStatus]:
        """In the order given. Never raises for a node that does not answer. Checkpoint."""
        found: dict[str, NodeStatus] = {}
        said: dict[str, Mapping[str, str]] = {}
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(self._ask, node, within_s, found, said)
        return with_lag(with_membership([found[node.name] for node in nodes], said))

    async def _ask(
        self, node: RunningNode, within_s: float, found: dict[str, NodeStatus], said: dict[str, Mapping[str, str]]
    ) -> None:
        try:
            with self._env.clock.fail_after(within_s):
                info = await self._client.admin.broker_info(node.listen)
        except trio.TooSlowError:
            found[node.name] = _down(node, f"no answer within {within_s:g} s")
        except quorate.QuorateError as error:
            found[node.name] = _down(node, str(error))
        else:
            found[node.name] = _from_runtime_info(node, info)
            said[node.name] = info


async def read_broker_status(env: Env, namesrv: str, nodes: Sequence[RunningNode]) -> list[NodeStatus]:
    """Status of some brokers, once. Checkpoint."""
    async with quorate.connect(namesrv, env=env) as client:
        return await StatusReader(env, client).read(nodes)


async def read_namesrv_status(env: Env, node: RunningNode) -> NodeStatus:
    """Whether a name server answers. Checkpoint."""
    try:
        with env.clock.fail_after(ASK_WITHIN_S):
            async with quorate.connect(node.listen, env=env) as client:
                await client.admin.cluster()
    except trio.TooSlowError:
        return _down(node, f"no answer within {ASK_WITHIN_S:g} s")
    except quorate.QuorateError as error:
        return _down(node, str(error))
    return NodeStatus(name=node.name, group=None, kind=node.kind, listen=node.listen, state="up")
