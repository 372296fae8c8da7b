"""What a data folder holds, and the two small state files in it.

DATA/cluster.json    who this cluster is: uuid, raft groups and whether they were formatted, configuration in force
DATA/up.json         who runs now: supervisor and node pids; gone after an orderly stop
DATA/up.lock         held by the supervisor
DATA/logs/           n0.log (events), n0.err (what else it printed), supervisor.log
DATA/n0/ DATA/ns0/   one folder per node
DATA/bytecode/       compiled modules, where Python may not keep them beside their sources; can be removed at any time
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs
from attrs import field, frozen

from cluster.config import ClusterConfig, GroupSection, from_plain, to_plain
from runtime.files import Locked
from runtime.model import Env, Files
from runtime.processes import ProcessId, unwritable_reason

STATE_FORMAT = 1


class ClusterError(Exception):
    """Base of what keeps a cluster from running; the text is for people."""


class UpRefused(ClusterError):
    """Why a cluster cannot be started (or found) in a folder, in one sentence with the next step."""


@frozen
class Layout:
    """Paths inside one data folder. `data` is absolute."""

    data: str

    @property
    def cluster_file(self) -> str:
        return f"{self.data}/cluster.json"

    @property
    def up_file(self) -> str:
        return f"{self.data}/up.json"

    @property
    def lock_file(self) -> str:
        return f"{self.data}/up.lock"

    @property
    def logs(self) -> str:
        return f"{self.data}/logs"

    def log(self, node: str) -> str:
        return f"{self.logs}/{node}.log"

    def stderr(self, node: str) -> str:
        return f"{self.logs}/{node}.err"

    @property
    def bytecode(self) -> str:
        return f"{self.data}/bytecode"

    def node(self, name: str) -> str:
        return f"{self.data}/{name}"


@frozen(kw_only=True)
class GroupIdentity:
    """A raft group that has data here. Its members are fixed when it is formatted."""

    nodes: tuple[str, ...]
    is_formatted: bool = False
    """True once all its nodes were up together. Until then an empty folder may be formatted without harm: an
    acknowledged entry is on a quorum of the nodes that were formatted, and a blank one never voted for less."""


@frozen(kw_only=True)
class ClusterIdentity:
    """DATA/cluster.json."""

    uuid: str
    groups: Mapping[str, GroupIdentity]
    config: ClusterConfig

    def formatted(self) -> ClusterIdentity:
        """All groups of the configuration in force are formatted now."""
        identity = self
        for group in self.config.groups:
            identity = identity.formatted_group(group.name)
        return identity

    def formatted_group(self, name: str) -> ClusterIdentity:
        """One group is formatted now."""
        return attrs.evolve(self, groups={**self.groups, name: attrs.evolve(self.groups[name], is_formatted=True)})


@frozen(kw_only=True)
class RunningNode:
    """One process as DATA/up.json tells of it."""

    name: str
    group: str | None
    kind: str
    process: ProcessId | None
    listen: str
    state: str
    """starting, up, or down."""
    restarts: int = 0
    since_ms: int = 0
    """When it came into that state."""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.is_running else None


@frozen(kw_only=True)
class UpState:
    """DATA/up.json: a supervisor and its nodes."""

    supervisor: ProcessId
    namesrv: str
    """Addresses for clients, joined by semicolons as RocketMQ writes them."""
    control: str
    """Unix socket of the supervisor."""
    restarts_dead_nodes: bool
    ephemeral: bool
    started_ms: int
    nodes: tuple[RunningNode, ...] = field(factory=tuple)

    @property
    def is_running(self) -> bool:
        return self.supervisor.is_running

    def node(self, name: str) -> RunningNode | None:
        return next((node for node in self.nodes if node.name == name), None)

    def document(self, data: str) -> dict[str, Any]:
        """What `up --detach --json` prints."""
        nodes = []
        for node in self.nodes:
            group = {"group": node.group} if node.group is not None else {}
            pid = node.process.pid if node.process is not None else None
            nodes.append({"name": node.name, **group, "kind": node.kind, "pid": pid, "listen": node.listen})
        return {"namesrv": self.namesrv, "data": data, "nodes": nodes}


# --- files ---


def _dump(document: Any) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"


def write_up_state(files: Files, layout: Layout, state: UpState) -> None:
    def plain(_: Any, __: Any, value: Any) -> Any:
        return attrs.asdict(value) if isinstance(value, ProcessId) else value

    files.write_atomic(layout.up_file, _dump({"format": STATE_FORMAT, **attrs.asdict(state, value_serializer=plain)}))


def read_up_state(files: Files, layout: Layout) -> UpState | None:
    """None where nothing was started here, or it was stopped in order. Raises UpRefused for a file that is not ours."""
    document = _read_state(files, layout.up_file)
    if document is None:
        return None

    def node(plain: dict[str, Any]) -> RunningNode:
        return RunningNode(**{**plain, "process": ProcessId(**plain["process"]) if plain["process"] else None})

    try:
        nodes = tuple(node(plain) for plain in document.pop("nodes"))
        return UpState(**{**document, "supervisor": ProcessId(**document["supervisor"]), "nodes": nodes})
    except (KeyError, TypeError) as error:
        raise UpRefused(f"{layout.up_file} is not a state file of quorate ({error!r})") from None


def _read_state(files: Files, path: str) -> dict[str, Any] | None:
    try:
        document = json.loads(files.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UpRefused(f"{path} is not a state file of quorate; choose another folder with --data") from None
    except OSError as error:
        raise UpRefused(f"cannot read {path}: {error.strerror}") from None
    version = document.pop("format", None) if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise UpRefused(f"{path} is not a state file of quorate; choose another folder with --data")
    if version > STATE_FORMAT:
        raise UpRefused(f"{path} was written by a newer quorate (format {version}, this one knows {STATE_FORMAT})")
    assert isinstance(document, dict)
    return document


def write_identity(files: Files, layout: Layout, identity: ClusterIdentity) -> None:
    groups = {name: attrs.asdict(group) for name, group in identity.groups.items()}
    document = {"format": STATE_FORMAT, "uuid": identity.uuid, "groups": groups, "config": to_plain(identity.config)}
    files.write_atomic(layout.cluster_file, _dump(document))


def read_identity(files: Files, layout: Layout) -> ClusterIdentity | None:
    """None in a fresh folder. Raises UpRefused."""
    document = _read_state(files, layout.cluster_file)
    if document is None:
        return None
    try:
        groups = {
            name: GroupIdentity(nodes=tuple(plain["nodes"]), is_formatted=plain["is_formatted"])
            for name, plain in document["groups"].items()
        }
        return ClusterIdentity(uuid=document["uuid"], groups=groups, config=from_plain(document["config"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UpRefused(f"{layout.cluster_file} is not a state file of quorate ({error!r})") from None


# --- preparing ---


def lock_data(env: Env, layout: Layout) -> AbstractContextManager[None]:
    """Make the folder where needed and keep every other supervisor off it. Raises UpRefused."""
    reason = unwritable_reason(layout.data)
    if reason is not None:
        raise UpRefused(f"cannot write to data folder {layout.data} ({reason}); choose another with --data DIR")
    try:
        return env.files.lock(layout.lock_file)
    except Locked as error:
        holder = f"process {error.pid}" if error.pid is not None else "another process"
        raise UpRefused(
            f"{layout.data} is in use by another `quorate up` ({holder}); stop it with "
            f"`quorate down --data {layout.data}`, or choose another folder with --data DIR"
        ) from None


def prepare(env: Env, layout: Layout, config: ClusterConfig) -> ClusterIdentity:
    """Make the folder ready for `config`: a fresh one gets an identity, a known one is checked against it.

    To be called under `lock_data`. Raises UpRefused: foreign content, members changed, or a raft group of which a part
    has lost its data.
    """
    known = read_identity(env.files, layout)
    if known is None:
        for node in config.nodes():
            if env.files.listdir(layout.node(node.name)):
                raise UpRefused(
                    f"{layout.node(node.name)} holds files, but {layout.data} has no cluster.json: not a folder of "
                    "quorate; choose an empty one with --data DIR"
                )
        known = ClusterIdentity(uuid=uuid.UUID(bytes=env.ids.salt(16)).hex, groups={}, config=config)
    groups = dict(known.groups)
    names = {(node.group, node.id): node.name for node in config.nodes()}
    for group in config.groups:
        folders = {node.name: layout.node(names[group.name, node.name]) for node in group.present}
        groups[group.name] = _group_identity(env, group, folders, groups.get(group.name))
    identity = ClusterIdentity(uuid=known.uuid, groups=groups, config=config)
    env.files.make_dirs(layout.logs)
    for node in config.nodes():
        env.files.make_dirs(layout.node(node.name))
    write_identity(env.files, layout, identity)
    return identity


def is_node_blank(files: Files, folder: str) -> bool:
    """Whether a broker's folder has no log of a raft group: never started, or lost with its disk."""
    return not files.exists(f"{folder}/raft/format.json")


def filling_mark(folder: str) -> str:
    """A file in a broker's folder from its start without a log until it has one that a leader has confirmed."""
    return f"{folder}/filling"


def lost_folders(files: Files, group: GroupSection, folders: Mapping[str, str]) -> list[str]:
    """Folders of founders of a formatted group that hold no log, or not all of it yet, where they are so many that the
    rest cannot fill them: what is gone may be all there was. None where all have one, though one be filled just now.
    `folders` has each node's that is to run, by its id."""
    blank = {name for name in folders if is_node_blank(files, folders[name])}
    lacking = blank | {name for name in folders if files.exists(filling_mark(folders[name]))}
    lost = [folders[founder.name] for founder in group.founders if founder.name in lacking]
    return lost if blank and len(lost) >= len(folders) - len(lacking) else []


def as_lost(folders: Sequence[str]) -> str:
    """What is the matter with folders that `lost_folders` named."""
    return f"{' and '.join(folders)} {'has' if len(folders) == 1 else 'have'} no data, or not all of it yet"


def _group_identity(
    env: Env, group: GroupSection, folders: Mapping[str, str], known: GroupIdentity | None
) -> GroupIdentity:
    founders = tuple(node.name for node in group.founders)
    if known is None:
        return GroupIdentity(nodes=founders)
    if sorted(known.nodes) != sorted(founders):
        raise UpRefused(
            f"raft group {group.name} has the nodes {', '.join(known.nodes)} here, but the configuration says "
            f"{', '.join(founders)}; put them back, or choose another folder with --data DIR"
        )
    if known.is_formatted:
        empty = lost_folders(env.files, group, folders)
        if empty:
            raise UpRefused(
                f"raft group {group.name}: {as_lost(empty)}, though the group was formatted, and the rest is no "
                "majority; put the data back, or start afresh in another folder with --data DIR"
            )
    return known
