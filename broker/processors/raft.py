"""What Quorate's own tools ask of a node's raft group: private codes, JSON bodies with snake_case keys.

| code | body of the request | body of the answer |
|---|---|---|
| RAFT_DESCRIBE | - | everything `GroupStatistics` has, and which group on which node this is |
| RAFT_TRANSFER | `target` (node id, or null: the most advanced) | `leader` |
| RAFT_CHANGE_MEMBERS | `action` (add_learner, promote, remove), `node`, `address` (host:port) | `voters`, `learners` |
| RAFT_ACCEPT_LOSS | - | `recovering`, `damaged`, `first_index`, `last_index`, `durable_index`, `commit_index` |
| RAFT_DELETE_EXPIRED | `position` (null: by the rules of retention) | `first_position`, `trim_position` |
| RAFT_BACKUP_MANIFEST | - | where the log begins and ends, closed segments, the checkpoint |
| RAFT_BACKUP_CHUNK | `position`, or `checkpoint_index` and `offset`; `nbytes` | the bytes; header `crc32` |

A refusal has a sentence as its remark. Transfers, changes of members and deletions are the leader's: the router passes
them on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar
from zlib import crc32

import attrs
import msgspec

from dledger.core.membership import AddLearner, Change, Promote, Remove
from dledger.errors import LedgerError, NotLeader
from dledger.store.checkpoint import pack_checkpoint, read_checkpoint
from remoting.codes import ResponseCode
from remoting.command import Command, encode_response
from remoting.errors import BodyError

if TYPE_CHECKING:
    from broker.context import BrokerContext

CHUNK_BYTES_MAX: Final = 1024 * 1024
BACKUP_IDLE_S: Final = 600.0
"""How long the checkpoint of an abandoned backup is kept in memory."""
BACKUP_LEASE_S: Final = 60.0
"""How long, after each chunk, the files that a backup has yet to copy are not deleted."""

Body = TypeVar("Body", bound=msgspec.Struct)


class TransferBody(msgspec.Struct):
    target: str | None = None


class ChangeMembersBody(msgspec.Struct):
    action: str
    node: str
    address: str = ""


class DeleteExpiredBody(msgspec.Struct):
    position: int | None = None


class BackupChunkBody(msgspec.Struct):
    nbytes: int
    position: int | None = None
    checkpoint_index: int | None = None
    offset: int = 0


class RaftProcessor:
    """The private admin codes of one node."""

    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker
        self._group = broker.group
        self._clock = broker.env.clock
        self._backup: tuple[int, bytes] | None = None
        """Checkpoint of the backup under way: the entry it covers, and the file."""
        self._backup_at = 0.0
        broker.on_thin_out.append(self._forget_abandoned_backup)

    # ------------------------------------------------------------------------------------------------------- looking

    def describe(self, request: Command, conn: Any) -> bytes:
        """RAFT_DESCRIBE."""
        return _json(request, description(self._broker))

    # ------------------------------------------------------------------------------------------------------ changing

    def transfer(self, request: Command, conn: Any) -> bytes | None:
        """RAFT_TRANSFER: answered when another node leads, or with the reason why none does."""
        body = _body(request, TransferBody)
        members = self._group.statistics().members
        if body.target is not None and body.target not in members:
            remark = f"{body.target} is no voter of this group; the voters are {', '.join(members)}"
            return _refuse(request, remark, ResponseCode.INVALID_PARAMETER)
        return self._in_job(self._transfer, request, conn, body.target)

    async def _transfer(self, request: Command, conn: Any, target: str | None) -> None:
        reason = await self._group.transfer_and_wait(target)
        if reason is None:
            answer = _json(request, {"leader": self._group.leader_id})
        else:
            answer = _refuse(request, f"leadership was not handed over: {reason}")
        conn.write(answer)
        conn.flush()

    def change_members(self, request: Command, conn: Any) -> bytes | None:
        """RAFT_CHANGE_MEMBERS: answered when the change is committed."""
        body = _body(request, ChangeMembersBody)
        change = _change_of(body)
        if isinstance(change, str):
            return _refuse(request, change, ResponseCode.INVALID_PARAMETER)
        return self._in_job(self._change_members, request, conn, change)

    async def _change_members(self, request: Command, conn: Any, change: Change) -> None:
        try:
            await self._group.change_members(change)
        except NotLeader as error:
            answer = _refuse(request, str(error), ResponseCode.SERVICE_NOT_AVAILABLE)
        except LedgerError as error:
            answer = _refuse(request, str(error))
        else:
            statistics = self._group.statistics()
            answer = _json(request, {"voters": statistics.members, "learners": statistics.learners})
            self._broker.log.info("members changed", change=str(change), by=conn.peer_text)
        conn.write(answer)
        conn.flush()

    def accept_loss(self, request: Command, conn: Any) -> bytes:
        """RAFT_ACCEPT_LOSS: a node that recovers from a power loss takes part with what it has; one that repairs its
        log gives up what nobody can supply."""
        before = self._group.statistics()
        if not before.recovering and not before.damaged:
            return _refuse(request, f"{before.node_id} is not recovering: there is nothing to accept")
        try:
            self._group.accept_loss()
        except LedgerError as error:
            return _refuse(request, str(error))
        self._broker.log.warning(
            "the loss of what this node may have had is accepted",
            last_index=before.last_index,
            damaged=before.damaged,
            by=conn.peer_text,
        )
        names = ("recovering", "damaged", "first_index", "last_index", "durable_index", "commit_index")
        return _json(request, {name: getattr(before, name) for name in names})

    def delete_expired(self, request: Command, conn: Any) -> bytes:
        """RAFT_DELETE_EXPIRED: by the rules of retention whatever the hour, or all before a byte of the log."""
        body = _body(request, DeleteExpiredBody) if request.body else DeleteExpiredBody()
        position: int | None = None
        if body.position is None:
            self._group.delete_expired()
        else:
            try:
                position = self._group.trim_to(body.position)
            except NotLeader:
                raise
            except LedgerError as error:
                return _refuse(request, str(error))
        return _json(request, {"first_position": self._group.first_position, "trim_position": position})

    def delete_expired_log(self, request: Command, conn: Any) -> bytes:
        """DELETE_EXPIRED_COMMITLOG (mqadmin deleteExpiredCommitLog)."""
        self._group.delete_expired()
        return encode_response(request, ResponseCode.SUCCESS)

    # -------------------------------------------------------------------------------------------------------- backup

    def backup_manifest(self, request: Command, conn: Any) -> bytes | None:
        """RAFT_BACKUP_MANIFEST; its checkpoint stays at hand for ten minutes after the last chunk."""
        return self._in_job(self._backup_manifest, request, conn, None)

    async def _backup_manifest(self, request: Command, conn: Any, _nothing: None) -> None:
        run_in_thread = self._broker.env.run_in_thread
        found = await run_in_thread(read_checkpoint, self._broker.env.files, self._group.config.data_dir)
        self._backup = None if found is None else (found.index, await run_in_thread(pack_checkpoint, found))
        self._backup_at = self._clock.monotonic()
        manifest = self._group.manifest()
        self._hold(conn, self._group.first_position)
        if manifest is None:
            answer = _refuse(request, "the log is not served now", ResponseCode.SERVICE_NOT_AVAILABLE)
        else:
            statistics = self._group.statistics()
            config = self._broker.config
            names = ("first_index", "commit_index", "first_position", "committed_position")
            answer = _json(
                request,
                {
                    "cluster": config.cluster,
                    "group": config.broker_name,
                    "group_uuid": self._group.group_uuid,
                    "node_id": self._group.node_id,
                    "segment_bytes": manifest.segment_bytes,
                    "base": attrs.asdict(manifest.base),
                    "segments": [attrs.asdict(segment) for segment in manifest.segments],
                    **{name: getattr(statistics, name) for name in names},
                    "checkpoint": None
                    if self._backup is None
                    else {
                        "index": self._backup[0],
                        "nbytes": len(self._backup[1]),
                        "crc32": crc32(self._backup[1]),
                    },
                },
            )
        conn.write(answer)
        conn.flush()

    def backup_chunk(self, request: Command, conn: Any) -> bytes | None:
        """RAFT_BACKUP_CHUNK: committed bytes of the log within one segment, or a part of the checkpoint."""
        body = _body(request, BackupChunkBody)
        if not 0 < body.nbytes <= CHUNK_BYTES_MAX or body.offset < 0:
            remark = f"a chunk has 1 to {CHUNK_BYTES_MAX} bytes, from an offset of 0 or more"
            return _refuse(request, remark, ResponseCode.INVALID_PARAMETER)
        if (body.position is None) == (body.checkpoint_index is None):
            remark = "a chunk is of the log (position) or of the checkpoint (checkpoint_index)"
            return _refuse(request, remark, ResponseCode.INVALID_PARAMETER)
        if body.position is not None:
            return self._in_job(self._log_chunk, request, conn, (body.position, body.nbytes))
        if self._backup is None or self._backup[0] != body.checkpoint_index:
            return _refuse(request, f"checkpoint {body.checkpoint_index} is not at hand: ask for the manifest again")
        self._backup_at = self._clock.monotonic()
        return _chunk(request, self._backup[1][body.offset : body.offset + body.nbytes])

    def _hold(self, conn: Any, position: int) -> None:
        """Have what is still to be copied kept a little longer, also when it is trimmed meanwhile."""
        self._group.hold_segments(f"backup to {conn.peer_text}", position, BACKUP_LEASE_S)

    async def _log_chunk(self, request: Command, conn: Any, where: tuple[int, int]) -> None:
        self._hold(conn, where[0])
        data = await self._group.read_cold(*where)
        if data is None:
            answer = _refuse(request, f"{where[1]} bytes at {where[0]} are not committed in one segment of the log")
        else:
            answer = _chunk(request, data)
        conn.write(answer)
        conn.flush()

    def _forget_abandoned_backup(self) -> None:
        if self._backup is not None and self._clock.monotonic() - self._backup_at > BACKUP_IDLE_S:
            self._backup = None

    def _in_job(self, job: Any, request: Command, conn: Any, what: Any) -> bytes | None:
        if self._broker.jobs.start(job, request, conn, what):
            return None
        return _refuse(request, "[OVERLOAD]too many requests of this kind are under way", ResponseCode.SYSTEM_BUSY)


def description(broker: BrokerContext) -> dict[str, Any]:
    """A look at the raft group of this node, for `RAFT_DESCRIBE`."""
    group = broker.group
    statistics = group.statistics()
    return {
        "cluster": broker.config.cluster,
        "group": broker.config.broker_name,
        "group_uuid": group.group_uuid,
        "address": broker.address,
        "leader_address": broker.address if statistics.leader_id == statistics.node_id else broker.master_address,
        **attrs.asdict(statistics, value_serializer=_plain),
        "tables": broker.state.statistics(),
    }


def _plain(_instance: Any, _field: Any, value: Any) -> Any:
    return value.name.lower() if hasattr(value, "name") and hasattr(value, "value") else value


def _change_of(body: ChangeMembersBody) -> Change | str:
    """The change that is asked for, or why there is none."""
    if not body.node:
        return "node must name a node"
    match body.action:
        case "add_learner":
            host, _, port = body.address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
                return f"address must be host:port, not {body.address!r}"
            return AddLearner(body.node, (host, int(port)))
        case "promote":
            return Promote(body.node)
        case "remove":
            return Remove(body.node)
    return f"action must be add_learner, promote or remove, not {body.action!r}"


def _body(request: Command, kind: type[Body]) -> Body:
    """The JSON body of a request. Raises BodyError."""
    try:
        return msgspec.json.decode(request.body or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise BodyError(f"the body is not what this code wants: {error}") from error


def _json(request: Command, body: dict[str, Any]) -> bytes:
    return encode_response(request, ResponseCode.SUCCESS, body=msgspec.json.encode(body))


def _chunk(request: Command, data: bytes) -> bytes:
    return encode_response(request, ResponseCode.SUCCESS, {"crc32": crc32(data)}, body=data)


def _refuse(request: Command, remark: str, code: int = ResponseCode.SYSTEM_ERROR) -> bytes:
    return encode_response(request, code, remark=remark)
