"""What the nodes of the raft groups say about them, asked over the network: for `quorate raft` and `doctor`.

Nodes are found through the name servers, which know only those that are registered, and through what is configured or
runs here, which knows the others too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import trio
from attrs import frozen

import quorate
from runtime.model import Env

ASK_WITHIN_S = 2.0


@frozen
class NodeView:
    """One node's own account of its raft group, or why there is none."""

    address: str
    group: str
    said: Mapping[str, Any] | None
    reason: str | None = None

    @property
    def node_id(self) -> str | None:
        return None if self.said is None else str(self.said["node_id"])


@frozen
class GroupView:
    """A raft group as its nodes see it."""

    name: str
    nodes: tuple[NodeView, ...]

    @property
    def answering(self) -> tuple[NodeView, ...]:
        return tuple(node for node in self.nodes if node.said is not None)

    @property
    def leader(self) -> NodeView | None:
        """The leader of the highest term that is ready to serve."""
        leading = [node for node in self.answering if node.said is not None and node.said["ready"]]
        return max(leading, key=_term_of, default=None)

    @property
    def best(self) -> NodeView | None:
        """Whose account of the members counts: the leader's, else that of the most advanced log."""
        return self.leader or max(self.answering, key=_log_of, default=None)

    def node(self, node_id: str) -> NodeView | None:
        return next((node for node in self.nodes if node.node_id == node_id), None)


def _term_of(node: NodeView) -> int:
    return 0 if node.said is None else int(node.said["term"])


def _log_of(node: NodeView) -> tuple[int, int]:
    return (0, 0) if node.said is None else (int(node.said["term"]), int(node.said["last_index"]))


async def known_addresses(client: quorate.Client, configured: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Client addresses of each raft group's nodes: registered ones and `configured` ones. Checkpoint.

    A name server that does not answer is no error while something is configured.
    """
    found: dict[str, set[str]] = {name: set(addresses) for name, addresses in configured.items()}
    try:
        table = (await client.admin.cluster()).broker_addr_table
    except quorate.QuorateError:
        if not configured:
            raise
    else:
        for name, brokers in table.items():
            found.setdefault(name, set()).update(brokers.broker_addrs.values())
    return {name: sorted(addresses) for name, addresses in sorted(found.items())}


async def view_groups(env: Env, client: quorate.Client, addresses: Mapping[str, Sequence[str]]) -> list[GroupView]:
    """Ask all nodes at once. Never raises for a node that does not answer. Checkpoint."""
    found: dict[tuple[str, str], NodeView] = {}

    async def ask(group: str, address: str) -> None:
        try:
            with env.clock.fail_after(ASK_WITHIN_S):
                said = await client.admin.raft.describe(address)
        except trio.TooSlowError:
            found[group, address] = NodeView(address, group, None, f"no answer within {ASK_WITHIN_S:g} s")
        except quorate.QuorateError as error:
            found[group, address] = NodeView(address, group, None, str(error))
        else:
            found[group, address] = NodeView(address, group, said)

    async with trio.open_nursery() as nursery:
        for group, members in addresses.items():
            for address in members:
                nursery.start_soon(ask, group, address)
    return [
        GroupView(group, tuple(found[group, address] for address in members)) for group, members in addresses.items()
    ]
