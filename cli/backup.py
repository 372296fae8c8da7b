"""`quorate backup` and `quorate restore`: a raft group's committed log as a folder, and a new group out of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from zlib import crc32

import click

from cli.exits import CHECK_FAILED, CLUSTER_ANSWERED_ERROR, NOBODY_REACHED, USAGE, Failure, print_json
from cli.output import number
from cli.run import run
from cli.target import config_option, data_option, json_option, layout_of, load_config, remote_options
from runtime.processes import absolute_path
from runtime.real import real_env

if TYPE_CHECKING:
    import quorate
    from cluster.config import ClusterConfig
    from cluster.raft_groups import NodeView
    from dledger.store.manifest import Manifest, SegmentInfo
    from runtime.model import Files

CHUNK_BYTES = 1 << 20
MIB = 1 << 20


@click.command(
    epilog="""\b
Examples:
  quorate backup /var/backups/orders-1          the only raft group of the cluster
  quorate backup /var/backups/b --group broker-b --node n2
"""
)
@click.argument("folder", metavar="DIR")
@click.option("--group", "group_name", metavar="GROUP", help="Which raft group [default: the only one].")
@click.option("--node", metavar="NODE", help="Read from this node [default: one that does not lead].")
@remote_options
@json_option
def backup(
    folder: str,
    group_name: str | None,
    node: str | None,
    namesrv: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Copy a running raft group's committed log and tables into the empty folder DIR.

    Everything that was acknowledged when the command began is in it. `quorate restore` makes a new group of it.
    """
    run(_backup, absolute_path(folder), group_name, node, (namesrv, data_path, config_path), as_json)


async def _backup(
    folder: str, group_name: str | None, node: str | None, target: tuple[str | None, ...], as_json: bool
) -> None:
    from cli.raft import reached
    from dledger.backup import Backup, finish_backup
    from dledger.errors import LedgerError

    env = real_env()
    if env.files.listdir(folder):
        raise Failure(f"{folder} is not empty; name a new folder for the backup", USAGE)
    started = env.clock.monotonic()
    async with reached((target[0], target[1], target[2])) as cluster:
        group = cluster.group(group_name)
        source = cluster.node(f"{group.name}/{node}")[1] if node is not None else _source(group.answering)
        said = await cluster.client.admin.raft.backup_manifest(source.address)
        try:
            env.files.make_dirs(f"{folder}/log")
            copy = _Copy(env.files, cluster.client, source.address, folder, said, is_shown=not as_json)
            manifest = await copy.take()
            kept = Backup(
                cluster=said["cluster"],
                group=said["group"],
                group_uuid=said["group_uuid"],
                node_id=said["node_id"],
                made_ms=env.clock.wall_ms(),
                last_index=manifest.segments[-1].last_index,
                first_position=said["first_position"],
                end_position=manifest.segments[-1].end_position,
                checkpoint_index=None if said["checkpoint"] is None else said["checkpoint"]["index"],
            )
            finish_backup(env.files, folder, kept, manifest)
        except LedgerError as error:
            raise Failure(f"the copy is not usable: {error}; remove {folder} and try again", CHECK_FAILED) from None
        except OSError as error:
            raise Failure(f"cannot write to {folder}: {error.strerror}", CLUSTER_ANSWERED_ERROR) from None
    seconds = env.clock.monotonic() - started
    document = {
        "folder": folder,
        "group": kept.group,
        "node": kept.node_id,
        "last_index": kept.last_index,
        "bytes": copy.copied,
        "elapsed_ms": round(seconds * 1000),
    }
    if as_json:
        print_json(document)
    else:
        click.echo(
            f"{kept.group}: entries up to {number(kept.last_index)}, {number(copy.copied)} bytes from {kept.node_id} "
            f"in {seconds:.1f} s"
        )


def _source(nodes: tuple[NodeView, ...]) -> NodeView:
    """The most advanced node that serves, rather not the leader. Raises Failure."""
    serving = [node for node in nodes if node.said is not None and node.said["state"] == "serving"]
    if not serving:
        raise Failure("no node of the group serves its log now", NOBODY_REACHED)

    def fitness(node: NodeView) -> tuple[bool, int]:
        assert node.said is not None
        return not node.said["ready"], int(node.said["commit_index"])

    return max(serving, key=fitness)


class _Copy:
    """Fetches chunk after chunk."""

    def __init__(
        self,
        files: Files,
        client: quorate.Client,
        address: str,
        folder: str,
        said: dict[str, Any],
        *,
        is_shown: bool,
    ) -> None:
        self._files = files
        self._raft = client.admin.raft
        self._address = address
        self._folder = folder
        self._said = said
        self._shown = -1
        self._is_shown = is_shown and sys.stderr.isatty()
        self.copied = 0
        self._total = said["committed_position"] - said["first_position"]

    async def take(self) -> Manifest:
        """All of it. Raises Failure, LedgerError, OSError."""
        from dledger.backup import describe_tail
        from dledger.store.base import BaseRecord
        from dledger.store.manifest import Manifest, SegmentInfo

        said = self._said
        segments: list[SegmentInfo] = []
        for plain in said["segments"]:
            info = SegmentInfo(**plain)
            if info.end_position <= said["committed_position"]:
                await self._segment(info.base, info.used_bytes)
                segments.append(info)
        base = segments[-1].base + said["segment_bytes"] if segments else said["first_position"]
        used = said["committed_position"] - base
        if used > 0:
            await self._segment(base, used)
            before = segments[-1] if segments else None
            segments.append(describe_tail(self._files, self._folder, base, used, before))
        if not segments:
            raise Failure("nothing is committed in this group yet: there is nothing to back up", USAGE)
        await self._checkpoint()
        return Manifest(BaseRecord(**said["base"]), said["segment_bytes"], tuple(segments))

    async def _segment(self, base: int, used_bytes: int) -> None:
        file = self._files.open(f"{self._folder}/log/{base:020d}", create=True)
        try:
            for offset in range(0, used_bytes, CHUNK_BYTES):
                nbytes = min(CHUNK_BYTES, used_bytes - offset)
                file.pwrite(await self._chunk(nbytes, position=base + offset), offset)
            await file.sync()
        finally:
            file.close()

    async def _checkpoint(self) -> None:
        known = self._said["checkpoint"]
        if known is None:
            return
        parts = []
        for offset in range(0, known["nbytes"], CHUNK_BYTES):
            nbytes = min(CHUNK_BYTES, known["nbytes"] - offset)
            parts.append(await self._chunk(nbytes, checkpoint_index=known["index"], offset=offset))
        data = b"".join(parts)
        if crc32(data) != known["crc32"]:
            raise Failure("the checkpoint was damaged on the way; try again", CHECK_FAILED)
        self._files.write_atomic(f"{self._folder}/checkpoint", data)

    async def _chunk(self, nbytes: int, **where: int) -> bytes:
        import quorate

        try:
            data, crc = await self._raft.backup_chunk(self._address, nbytes=nbytes, **where)
        except quorate.RequestRefused as error:
            raise Failure(
                f"{self._address} does not have what is to be copied any more, as when old files are deleted meanwhile "
                f"({error}); remove {self._folder} and try again",
                CLUSTER_ANSWERED_ERROR,
            ) from None
        if len(data) != nbytes or crc32(data) != crc:
            raise Failure(f"{len(data)} of {nbytes} bytes came, or damaged on the way; try again", CHECK_FAILED)
        self.copied += nbytes
        if self._is_shown and self.copied // (16 * MIB) != self._shown:
            self._shown = self.copied // (16 * MIB)
            click.echo(f"\r{self.copied // MIB:,} of {self._total // MIB:,} MiB ", nl=False, err=True)
        return data


@click.command(
    epilog="""\b
Examples:
  quorate restore /var/backups/orders-1 --data ./restored      then: quorate up --data ./restored
  quorate restore /var/backups/orders-1 --node n1 --config cluster.toml --data /var/lib/quorate
"""
)
@click.argument("folder", metavar="DIR")
@click.option("--group", "group_name", metavar="GROUP", help="Make this raft group [default: of the backup's name].")
@click.option("--node", metavar="NODE", help="Only this node's folder, for `quorate serve`; the same on every host.")
@data_option
@config_option
@json_option
def restore(
    folder: str,
    group_name: str | None,
    node: str | None,
    data_path: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Make the data folders of a new raft group from the backup in DIR. Nothing has to run.

    All nodes get the same log, so the group is whole at once. The new group has an identity of its own: nodes of the
    old one are refused by it.
    """
    from cluster.config import ConfigError
    from cluster.layout import UpRefused
    from dledger.errors import LedgerError

    env = real_env()
    try:
        document = _restore(absolute_path(folder), group_name, node, data_path, config_path)
    except (ConfigError, UpRefused) as error:
        raise Failure(str(error), USAGE) from None
    except LedgerError as error:
        raise Failure(str(error), CHECK_FAILED) from None
    except OSError as error:
        where = error.filename or layout_of(env.files, data_path, config_path).data
        raise Failure(f"{where}: {error.strerror}", CLUSTER_ANSWERED_ERROR) from None
    if as_json:
        print_json(document)
    else:
        click.echo(
            f"{document['group']}: {', '.join(document['nodes'])} hold entries up to {number(document['last_index'])}"
        )


def _restore(
    source: str, group_name: str | None, node: str | None, data_path: str | None, config_path: str | None
) -> dict[str, Any]:
    from cli.serve import Assignment, broker_config
    from cluster.layout import lock_data, prepare, write_identity
    from dledger.backup import members_in, read_backup, restore_folder
    from dledger.store.format import Format

    env = real_env()
    kept, manifest = read_backup(env.files, source)
    config = load_config(env.files, config_path)
    name = group_name or kept.group
    group = config.group(name)
    layout = layout_of(env.files, data_path, config_path)
    _check_members(config, name, members_in(env.files, source, manifest))
    places = {each.id: each.name for each in config.nodes() if each.group == name}
    wanted = [founder.name for founder in group.founders]
    if node is not None:
        wanted = [config.find(node).id]
    with lock_data(env, layout):
        for node_id in wanted:
            if env.files.listdir(layout.node(places[node_id])):
                raise Failure(f"{layout.node(places[node_id])} is not empty; restore into a new data folder", USAGE)
        identity = prepare(env, layout, config) if node is None else None
        for node_id in wanted:
            assignment = Assignment(
                config=config,
                node=config.find(places[node_id]),
                layout=layout,
                is_format_allowed=True,
                cluster_uuid=None if identity is None else identity.uuid,
            )
            settings = broker_config(assignment).group
            restore_folder(
                env,
                source,
                f"{layout.node(places[node_id])}/raft",
                Format(
                    cluster=config.cluster.name,
                    cluster_uuid=settings.effective_cluster_uuid,
                    group=name,
                    group_uuid=settings.group_uuid,
                    node_id=node_id,
                    segment_bytes=manifest.segment_bytes,
                ),
            )
        if identity is not None:
            write_identity(env.files, layout, identity.formatted_group(name))
    return {"group": name, "nodes": wanted, "data": layout.data, "last_index": kept.last_index}


def _check_members(config: ClusterConfig, name: str, members: Any) -> None:
    """A log that names its members keeps them: they must be the configured ones. Raises Failure."""
    if members is None:
        return
    founders = {founder.name: str(founder.peer) for founder in config.group(name).founders}
    named = {node: f"{host}:{port}" for node, (host, port) in members.addresses.items()}
    if sorted(founders) != list(members.voters) or any(named.get(node, at) != at for node, at in founders.items()):
        shown = ", ".join(f"{node} ({named.get(node, 'configured address')})" for node in members.voters)
        raise Failure(
            f"the members of the backup's group were changed while it ran: its log names {shown}; restore it with a "
            "cluster.toml that has these nodes at these peer addresses",
            USAGE,
        )
