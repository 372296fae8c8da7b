"""What a raft group can be told and asked beyond RocketMQ's own administration. Addresses are of nodes, as clients
reach them; changes go to any node of the group and are passed on to its leader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from remoting.codes import RequestCode

if TYPE_CHECKING:
    from quorate.admin import Admin
    from remoting.command import Command

CHANGE_WITHIN_S = 10.0
TRANSFER_WITHIN_S = 5.0


class RaftAdmin:
    """Made by `Admin.raft`. All calls raise Unavailable or RequestRefused; all are checkpoints, cancel-safe."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    async def describe(self, address: str, *, timeout: float = 3.0) -> dict[str, Any]:
        """All that one node knows of its raft group: role, term, members, positions, peers, counters, latencies."""
        return _json(await self._admin.call(address, RequestCode.RAFT_DESCRIBE, timeout=timeout))

    async def transfer_leadership(self, address: str, target: str | None = None) -> str | None:
        """Hand leadership to `target` (node id), or to the most advanced node. Returns who leads then."""
        answer = await self._ask(address, RequestCode.RAFT_TRANSFER, {"target": target}, TRANSFER_WITHIN_S)
        leader = answer["leader"]
        return None if leader is None else str(leader)

    async def add_learner(self, address: str, node: str, peer_address: str) -> dict[str, Any]:
        """Have node id `node`, dialled by its peers at `peer_address`, get the log. Returns voters and learners."""
        return await self._change(address, "add_learner", node, peer_address)

    async def promote(self, address: str, node: str) -> dict[str, Any]:
        """Make a voter of a learner that has caught up. Returns voters and learners."""
        return await self._change(address, "promote", node, "")

    async def remove(self, address: str, node: str) -> dict[str, Any]:
        """Take a voter or learner out of the group. Returns voters and learners."""
        return await self._change(address, "remove", node, "")

    async def accept_loss(self, address: str) -> dict[str, Any]:
        """Let a recovering node take part with what it has, or one that repairs its log go on without what nobody can
        supply; entries it had acknowledged may be lost for good."""
        return await self._ask(address, RequestCode.RAFT_ACCEPT_LOSS, {}, CHANGE_WITHIN_S)

    async def delete_expired(self, address: str, position: int | None = None) -> dict[str, Any]:
        """Delete what retention allows whatever the hour, or all before a byte of the log."""
        return await self._ask(address, RequestCode.RAFT_DELETE_EXPIRED, {"position": position}, CHANGE_WITHIN_S)

    async def backup_manifest(self, address: str) -> dict[str, Any]:
        """What a backup of this node's group consists of now."""
        return await self._ask(address, RequestCode.RAFT_BACKUP_MANIFEST, {}, CHANGE_WITHIN_S)

    async def backup_chunk(self, address: str, **where: int) -> tuple[bytes, int]:
        """(bytes, their CRC as the node said) of the log (`position`, `nbytes`) or of the checkpoint
        (`checkpoint_index`, `offset`, `nbytes`)."""
        body = msgspec.json.encode(where)
        answer = await self._admin.call(address, RequestCode.RAFT_BACKUP_CHUNK, body=body, timeout=CHANGE_WITHIN_S)
        return bytes(answer.body), int(answer.ext["crc32"])

    async def _change(self, address: str, action: str, node: str, peer_address: str) -> dict[str, Any]:
        body = {"action": action, "node": node, "address": peer_address}
        return await self._ask(address, RequestCode.RAFT_CHANGE_MEMBERS, body, CHANGE_WITHIN_S)

    async def _ask(self, address: str, code: RequestCode, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        return _json(await self._admin.call(address, code, body=msgspec.json.encode(body), timeout=timeout))


def _json(answer: Command) -> dict[str, Any]:
    document = msgspec.json.decode(answer.body)
    assert isinstance(document, dict)
    return document
