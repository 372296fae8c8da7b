"""cluster.toml as frozen values: what a person writes once, and every node reads its part of.

Checked when read: unknown keys (with the nearest known one), types, ranges, and relations between settings. Every
mistake is one `ConfigError` of one sentence. cattrs is imported only when a file is read; the nodes of `up` get the
checked result as JSON (`to_plain`).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Literal

import attrs
from attrs import field, frozen

GROUP_SIZES = (1, 3, 5)
PORTS_PER_CLUSTER = 100
SEGMENT_BYTES_MIN = 5 << 20
"""Above the largest stored form of a message, 4 MiB + 64 KiB (design §2)."""
SEGMENT_BYTES_MAX = 1 << 30
HEARTBEATS_PER_ELECTION_TIMEOUT_MIN = 3
DEFAULT_NAME = "built-in default"
ASYNC_FLUSH_MS = 500
"""How often a node brings what it has written to stable storage, where acknowledgements do not wait for that."""

_NODE_ID = re.compile(r"n(0|[1-9][0-9]{0,2})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,126}")
_NAMESRV_PORTS = 10
_PORTS_PER_GROUP = 10


class ConfigError(Exception):
    """What is wrong with a cluster.toml, in one sentence."""


@frozen
class Address:
    """Where to listen or connect."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def at(self, port: int) -> Address:
        return Address(self.host, port)

    @property
    def pair(self) -> tuple[str, int]:
        """Host and port as nodes know them: "localhost" is 127.0.0.1 on every machine."""
        return ("127.0.0.1" if self.host == "localhost" else self.host, self.port)


def parse_address(text: str) -> Address:
    """'127.0.0.1:9876' or '[::1]:9876'. Raises ValueError."""
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise ValueError(f'"{text}" is not an address such as "127.0.0.1:9876"')
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535")
    return Address(host, int(port))


_DEFAULT_NAMESRV = Address("127.0.0.1", 9876)


def _setting(default: Any, help_text: str, mirrors: str = "") -> Any:
    return field(default=default, metadata={"help": help_text, "mirrors": mirrors})


@frozen(kw_only=True)
class ClusterSection:
    """[cluster]: what all nodes share."""

    name: str = _setting("DefaultCluster", "name of the cluster, as clients and mqadmin see it", "brokerClusterName")
    data: str = _setting("./data", "folder of all nodes' data; relative to the file that says so", "storePathRootDir")
    secret: str | None = _setting(None, "shared secret that peers prove to each other; needed off loopback")


@frozen(kw_only=True)
class NamesrvSection:
    """[[namesrv]]: one name server."""

    name: str = _setting("ns0", "name of the process")
    listen: Address = _setting(_DEFAULT_NAMESRV, "address to listen on", "listenPort")  # noqa: RUF009
    advertise: Address | None = _setting(None, "address for brokers and clients, where it differs")  # noqa: RUF009
    peer: Address | None = _setting(None, "address for the other name servers; needed with two or more")  # noqa: RUF009


@frozen(kw_only=True)
class NodeSection:
    """[[group.node]]: one broker of a raft group."""

    name: str = field(metadata={"help": "id inside the group: n0, n1, ...", "mirrors": "dLegerSelfId"})
    listen: Address = field(metadata={"help": "address for clients", "mirrors": "listenPort"})
    peer: Address = field(metadata={"help": "address for the other nodes of the group", "mirrors": "dLegerPeers"})
    advertise: Address | None = _setting(  # noqa: RUF009
        None, "address announced to clients, where it differs", "brokerIP1"
    )
    dial: Mapping[str, Address] = field(
        factory=dict, metadata={"help": "other addresses to reach peers at, by node id", "mirrors": ""}
    )
    priority: int = _setting(0, "the node with the highest leads when it is up to date", "preferredLeaderIds")
    join: bool = _setting(False, "not a member from the beginning; added with `quorate raft add-node`")
    removed: bool = _setting(
        False, "taken out with `quorate raft remove-node`; a founder stays in the file, as the group began with it"
    )
    metrics: Address | None = _setting(None, "address where Prometheus finds measurements")  # noqa: RUF009

    @property
    def number(self) -> int:
        """K of nK: the node registers as brokerId K + 1 while it follows."""
        return int(self.name[1:])


@frozen(kw_only=True)
class GroupSection:
    """[[group]]: one raft group, which is one broker name."""

    name: str = _setting("broker-a", "name of the raft group", "brokerName")
    flush: Literal["async", "sync"] = _setting(
        "async", "an acknowledged message is on a quorum: in the page cache, or on stable storage", "flushDiskType"
    )
    segment_bytes: int = _setting(128 << 20, "size of one log file; fixed when formatted", "mappedFileSizeCommitLog")
    heartbeat_ms: int = _setting(150, "a leader is heard at least this often", "heartBeatTimeIntervalMs")
    election_timeout_ms_min: int = _setting(1000, "shortest silence before a follower stands", "minVoteIntervalMs")
    election_timeout_ms_max: int = _setting(2000, "longest silence before a follower stands", "maxVoteIntervalMs")
    auto_create_topic: bool = _setting(True, "a send to an unknown topic creates it", "autoCreateTopicEnable")
    auto_create_group: bool = _setting(True, "a new consumer group is welcome", "autoCreateSubscriptionGroup")
    drain_s: float = _setting(35.0, "after SIGTERM, how long to go on forwarding to the new leader")
    retention_hours: float = _setting(72.0, "how old a log file gets before it may go", "fileReservedTime")
    delete_hour: int = _setting(4, "local hour at which files that are old enough go; -1: at any time", "deleteWhen")
    retention_bytes: int | None = _setting(None, "size of the log above which its oldest files go, whatever their age")
    disk_watermarks: tuple[float, float, float] = _setting(
        (0.75, 0.85, 0.90),
        "used shares of the disk: old files go at any hour; the oldest go whatever their age; sends are refused",
        "diskMaxUsedSpaceRatio",
    )
    scrub_bytes_per_second: int = _setting(8 << 20, "how fast files are read again in search of damage; 0: never")
    fetch_bytes_per_second: int = _setting(50_000_000, "how fast a node gives log files to one that needs them")
    warm: bool = _setting(False, "touch the pages of a new log file before it is written to", "warmMapedFileEnable")
    mlock: bool = _setting(False, "keep the log file that is written to in memory")
    identity: str | None = _setting(
        None, "`cluster_uuid` of a member's `format.json`; for `serve --join`, once a founder's `peer` has changed"
    )
    nodes: tuple[NodeSection, ...] = field(factory=tuple, metadata={"help": "its brokers", "mirrors": ""})

    @property
    def founders(self) -> tuple[NodeSection, ...]:
        """The members of the group when it is formatted; the log says who came and went since."""
        return tuple(node for node in self.nodes if not node.join)

    @property
    def present(self) -> tuple[NodeSection, ...]:
        """Those that are to run."""
        return tuple(node for node in self.nodes if not node.removed)


@frozen(kw_only=True)
class Node:
    """One process of the cluster."""

    name: str
    """Unique in the cluster: n0, b-n0, ns0."""
    kind: Literal["broker", "namesrv"]
    group: str | None
    id: str
    """Inside its raft group: n0."""
    listen: Address
    peer: Address | None = None
    metrics: Address | None = None


@frozen(kw_only=True)
class ClusterConfig:
    """A whole cluster.toml, checked."""

    cluster: ClusterSection = field(factory=ClusterSection)
    namesrvs: tuple[NamesrvSection, ...]
    groups: tuple[GroupSection, ...]
    source: str = DEFAULT_NAME

    def nodes(self) -> tuple[Node, ...]:
        """Name servers first, then brokers, in the file's order."""
        return tuple(self._nodes())

    def _nodes(self) -> Iterator[Node]:
        for namesrv in self.namesrvs:
            yield Node(
                name=namesrv.name,
                kind="namesrv",
                group=None,
                id=namesrv.name,
                listen=namesrv.listen,
                peer=namesrv.peer if len(self.namesrvs) > 1 else None,
            )
        for number, group in enumerate(self.groups):
            for node in group.present:
                yield Node(
                    name=node.name if number == 0 else f"{short_name(group.name)}-{node.name}",
                    kind="broker",
                    group=group.name,
                    id=node.name,
                    listen=node.listen,
                    peer=node.peer,
                    metrics=node.metrics,
                )

    def find(self, name: str) -> Node:
        """The node called `n1`, `b-n1`, `broker-b/n1` or `ns0`. Raises ConfigError, naming those there are."""
        nodes = self.nodes()
        for node in nodes:
            if name == node.name or (node.group and name == f"{node.group}/{node.id}"):
                return node
        raise ConfigError(f'no node "{name}" in this cluster; there are {", ".join(node.name for node in nodes)}')

    def group(self, name: str) -> GroupSection:
        """Raises ConfigError, naming those there are."""
        for group in self.groups:
            if group.name == name:
                return group
        raise ConfigError(f'no raft group "{name}" in this cluster; there are {", ".join(g.name for g in self.groups)}')

    def namesrv_addresses(self) -> tuple[str, ...]:
        """For clients and brokers."""
        return tuple(str(namesrv.advertise or namesrv.listen) for namesrv in self.namesrvs)


def is_node_id(name: str) -> bool:
    """Whether a node of a raft group may be called that: n0, n1, ..."""
    return _NODE_ID.fullmatch(name) is not None


def short_name(group_name: str) -> str:
    """'b' for 'broker-b': nodes of the second group are called b-n0."""
    return group_name.removeprefix("broker-") or group_name


def promise_of(flush: str, nodes: int) -> str:
    """What an acknowledgement means in a raft group of so many voters: the one sentence of `up` and `doctor`."""
    quorum = nodes // 2 + 1
    if flush == "sync":
        return (
            f'flush = "sync": acknowledged means on stable storage of {quorum} of {nodes} nodes: safe from a power cut '
            "of all"
        )
    lost = nodes - quorum
    machines = f" and of {lost} machine{'' if lost == 1 else 's'}" if lost else ""
    return (
        f'flush = "async": acknowledged means in the page cache of {quorum} of {nodes} nodes: safe from crashes of '
        f"processes{machines}; a power cut of all may take what was acknowledged in about the last "
        f"{ASYNC_FLUSH_MS / 1000:g} s"
    )


# --- reading ---


def default_text() -> str:
    """The cluster.toml inside the wheel; from a checkout, the one at its root."""
    packaged = resources.files("cluster").joinpath("default.toml")
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return resources.files("cluster").joinpath("../cluster.toml").read_text(encoding="utf-8")


def parse(text: str, source: str) -> ClusterConfig:
    """cluster.toml text to values. `source` is the file's name for messages. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {_lower_first(str(error))}") from None
    config = _structure(document, source)
    check(config)
    return config


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


_TOML_KEYS = {"namesrvs": "namesrv", "groups": "group", "nodes": "node"}
"""Attribute -> key, where they differ: TOML's [[group]] reads better in the singular."""

_SECTIONS: dict[str, type] = {
    "": ClusterConfig,
    "cluster": ClusterSection,
    "namesrv": NamesrvSection,
    "group": GroupSection,
    "group.node": NodeSection,
}


def _toml_keys(kind: type) -> tuple[str, ...]:
    return tuple(_TOML_KEYS.get(a.name, a.name) for a in attrs.fields(kind) if a.name != "source")


def _structure(document: Mapping[str, Any], source: str) -> ClusterConfig:
    import cattrs

    try:
        config: ClusterConfig = _converter().structure(document, ClusterConfig)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    except cattrs.BaseValidationError as error:
        steps, message = min(_leaves(error, ()), key=lambda leaf: leaf[2])[:2]
        where = _where(document, steps)
        raise ConfigError(f"{source}: {where + ': ' if where else ''}{message}") from None
    return attrs.evolve(config, source=source)


def _converter() -> Any:
    import cattrs
    from cattrs.gen import make_dict_structure_fn, override

    def address(value: Any, _: Any) -> Address:
        if not isinstance(value, str):
            raise ValueError(f'{_show(value)} is not an address such as "127.0.0.1:9876"')
        return parse_address(value)

    def strict(expected: type, word: str) -> Any:
        def convert(value: Any, _: Any) -> Any:
            if isinstance(value, bool) is not (expected is bool) or not isinstance(value, expected):
                raise ValueError(f"{_show(value)} is not {word}")
            return value

        return convert

    def number(value: Any, _: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{_show(value)} is not a number")
        return float(value)

    def watermarks(value: Any, _: Any) -> Any:
        if not isinstance(value, list) or len(value) != 3:
            raise ValueError(f"{_show(value)} is not three shares of the disk, such as [0.75, 0.85, 0.90]")
        return tuple(number(share, float) for share in value)

    def flush(value: Any, _: Any) -> Any:
        if value not in ("async", "sync"):
            raise ValueError(f'{_show(value)} is neither "async" nor "sync"')
        return value

    def section(kind: type, **overrides: Any) -> None:
        renamed: dict[str, Any] = {
            a.name: override(rename=_TOML_KEYS[a.name]) for a in attrs.fields(kind) if a.name in _TOML_KEYS
        }
        structure: Any = make_dict_structure_fn(kind, converter, **renamed, **overrides)

        def hook(value: Any, target: Any) -> Any:
            if not isinstance(value, dict):
                raise ValueError(f"{_show(value)} is not a table of settings")
            for a in attrs.fields(kind):
                key = _TOML_KEYS.get(a.name)
                if key and not isinstance(value.get(key, []), list):
                    raise ValueError(f"write [[{key if kind is ClusterConfig else f'group.{key}'}]], once for each")
            return structure(value, target)

        converter.register_structure_hook(kind, hook)

    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Address, address)
    converter.register_structure_hook(str, strict(str, "a text in quotes"))
    converter.register_structure_hook(int, strict(int, "a whole number"))
    converter.register_structure_hook(bool, strict(bool, "true or false"))
    converter.register_structure_hook(float, number)
    for kind in _SECTIONS.values():
        attrs.resolve_types(kind, globals())
    section(ClusterSection)
    section(NamesrvSection)
    section(NodeSection)
    section(GroupSection, flush=override(struct_hook=flush), disk_watermarks=override(struct_hook=watermarks))
    section(ClusterConfig, source=override(omit=True))
    return converter


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return str(value)


def _leaves(error: Exception, steps: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str, int]]:
    """(path, message, rank) of each mistake. Unknown keys rank first: a misspelt key also shows as a missing one."""
    import cattrs

    if isinstance(error, cattrs.BaseValidationError):
        for inner in error.exceptions:
            further = steps
            for note in getattr(inner, "__notes__", ()):
                if isinstance(note, cattrs.AttributeValidationNote):
                    further = (*steps, _TOML_KEYS.get(note.name, note.name))
                elif isinstance(note, cattrs.IterableValidationNote):
                    further = (*steps, note.index)
            yield from _leaves(inner, further)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        yield steps, _unknown_key(sorted(error.extra_fields)[0], error.cl), 0
    elif isinstance(error, KeyError):
        yield steps[:-1], f'"{steps[-1]}" is missing', 2
    else:
        yield steps, str(error), 1


def _unknown_key(key: str, kind: type | None) -> str:
    known = _toml_keys(kind) if kind is not None else ()
    for name, section in _SECTIONS.items():
        if section is not kind and key in _toml_keys(section) and name:
            return f'unknown key "{key}" here; it belongs in {f"[{name}]" if name == "cluster" else f"[[{name}]]"}'
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'unknown key "{key}"; ' + (f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}")


def _where(document: Any, steps: tuple[str | int, ...]) -> str:
    """'group "broker-a", node "n1", listen': by the names the person gave, else by position."""
    words: list[str] = []
    at = document
    for step in steps:
        try:
            at = at[step]
        except (KeyError, IndexError, TypeError):
            at = None
        if isinstance(step, int):
            name = at.get("name") if isinstance(at, dict) else None
            words[-1] += f' "{name}"' if isinstance(name, str) else f" number {step + 1}"
        else:
            words.append(step)
    return ", ".join(words)


# --- checking ---


def check(config: ClusterConfig) -> None:
    """Ranges and relations between settings. Raises ConfigError."""
    for mistake in _mistakes(config):
        raise ConfigError(f"{config.source}: {mistake}")


def _mistakes(config: ClusterConfig) -> Iterator[str]:
    if not _NAME.fullmatch(config.cluster.name):
        yield f'cluster: name "{config.cluster.name}" {_NAME_RULE}'
    if not config.cluster.data.strip():
        yield "cluster: data is empty; name a folder"
    if not config.namesrvs:
        yield "no [[namesrv]]; a cluster needs one name server at least"
    if not config.groups:
        yield "no [[group]]; a cluster needs one raft group at least"
    for namesrv in config.namesrvs:
        if not _NAME.fullmatch(namesrv.name):
            yield f'namesrv: name "{namesrv.name}" {_NAME_RULE}'
        if len(config.namesrvs) > 1 and namesrv.peer is None:
            yield f'namesrv "{namesrv.name}": "peer" is missing; several name servers share settings over it'
    for group in config.groups:
        yield from _group_mistakes(group)
    yield from _duplicate_names(config)
    yield from _duplicate_addresses(config)
    for group in config.groups:
        for node in group.nodes:
            if node.listen.host in ("0.0.0.0", "::") and node.advertise is None:
                yield (
                    f'group "{group.name}", node "{node.name}": listens on {node.listen}, all of its addresses; '
                    'set "advertise" to the one that clients should use'
                )
    if config.cluster.secret is None:
        sizes: dict[str | None, int] = {group.name: len(group.nodes) for group in config.groups}
        sizes[None] = len(config.namesrvs)
        for one in config.nodes():
            if one.peer is not None and not _is_loopback(one.peer.host) and sizes[one.group] > 1:
                yield (
                    f'node "{one.name}": peer {one.peer} is open to other machines; '
                    'set "secret" in [cluster] to a text that only the nodes know'
                )


_NAME_RULE = "may hold letters, digits, dot, dash and underscore, 127 at most"


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


def _group_mistakes(group: GroupSection) -> Iterator[str]:
    where = f'group "{group.name}"'
    if not _NAME.fullmatch(group.name):
        yield f"{where}: name {_NAME_RULE}"
    if len(group.founders) not in GROUP_SIZES:
        yield f"{where}: {len(group.founders)} nodes; a raft group begins with 1, 3 or 5 (later ones say join = true)"
    ids = [node.name for node in group.nodes]
    for node in group.nodes:
        if not is_node_id(node.name):
            yield f'{where}: node name "{node.name}" is not n and a number, such as "n0"'
        if ids.count(node.name) > 1:
            yield f'{where}: two nodes are called "{node.name}"'
        for peer in node.dial:
            if peer not in ids:
                yield f'{where}, node "{node.name}": dial names "{peer}", which is not a node of this group'
    if not SEGMENT_BYTES_MIN <= group.segment_bytes <= SEGMENT_BYTES_MAX:
        yield f"{where}: segment_bytes {group.segment_bytes} is not between {SEGMENT_BYTES_MIN} and {SEGMENT_BYTES_MAX}"
    if group.segment_bytes % 4096:
        yield f"{where}: segment_bytes {group.segment_bytes} is not a multiple of 4096"
    if not 10 <= group.heartbeat_ms <= 60_000:
        yield f"{where}: heartbeat_ms {group.heartbeat_ms} is not between 10 and 60000"
    if group.election_timeout_ms_min > group.election_timeout_ms_max:
        yield (
            f"{where}: election_timeout_ms_min {group.election_timeout_ms_min} is above "
            f"election_timeout_ms_max {group.election_timeout_ms_max}"
        )
    if group.election_timeout_ms_min < HEARTBEATS_PER_ELECTION_TIMEOUT_MIN * group.heartbeat_ms:
        yield (
            f"{where}: election_timeout_ms_min {group.election_timeout_ms_min} is below "
            f"{HEARTBEATS_PER_ELECTION_TIMEOUT_MIN} x heartbeat_ms {group.heartbeat_ms}; "
            "one late heartbeat would cost the leader its place"
        )
    if group.election_timeout_ms_max > 600_000:
        yield f"{where}: election_timeout_ms_max {group.election_timeout_ms_max} is above 600000"
    if not 0 <= group.drain_s <= 3600:
        yield f"{where}: drain_s {group.drain_s:g} is not between 0 and 3600"
    yield from _retention_mistakes(group, where)


def _retention_mistakes(group: GroupSection, where: str) -> Iterator[str]:
    if not 0 < group.retention_hours <= 1_000_000:
        yield f"{where}: retention_hours {group.retention_hours:g} is not between 0 and 1000000"
    if not -1 <= group.delete_hour <= 23:
        yield f"{where}: delete_hour {group.delete_hour} is no hour of the day, nor -1 for any"
    if group.retention_bytes is not None and group.retention_bytes < 4 * group.segment_bytes:
        yield f"{where}: retention_bytes {group.retention_bytes} is below four log files of {group.segment_bytes}"
    early, forced, refuse = group.disk_watermarks
    if not 0 < early <= forced <= refuse <= 1:
        yield f"{where}: disk_watermarks must be shares of the disk, none smaller than the one before"
    for name in ("scrub_bytes_per_second", "fetch_bytes_per_second"):
        value = getattr(group, name)
        if value < (0 if name.startswith("scrub") else 65_536):
            yield f"{where}: {name} {value} is too small"


def _duplicate_names(config: ClusterConfig) -> Iterator[str]:
    groups = [group.name for group in config.groups]
    for name in groups:
        if groups.count(name) > 1:
            yield f'two groups are called "{name}"'
    names = [node.name for node in config.nodes()]
    for name in names:
        if names.count(name) > 1:
            yield f'two nodes of the cluster are called "{name}"'
        if name in ("leader", "follower", "any", "logs", "bytecode"):
            yield f'"{name}" cannot be the name of a node'


def _duplicate_addresses(config: ClusterConfig) -> Iterator[str]:
    seen: dict[tuple[str, int], str] = {}
    for node in config.nodes():
        for what, address in (("listen", node.listen), ("peer", node.peer), ("metrics", node.metrics)):
            if address is None:
                continue
            label = f"{node.name} ({what})"
            other = seen.setdefault(address.pair, label)
            if other != label:
                yield f"{address} is used twice, by {other} and {label}"


# --- shaping by flags ---


def with_groups(config: ClusterConfig, count: int) -> ClusterConfig:
    """The first group `count` times, as broker-a, broker-b, ...; ports 100 apart. Raises ConfigError."""
    if not 1 <= count <= 26:
        raise ConfigError(f"--groups {count}: between 1 and 26")
    if count <= len(config.groups):
        return attrs.evolve(config, groups=config.groups[:count])
    first = config.groups[0]
    stem = first.name.removesuffix("-a")
    groups = list(config.groups)
    for number in range(len(groups), count):
        nodes = tuple(
            attrs.evolve(
                node,
                listen=_moved(node.listen, number * PORTS_PER_CLUSTER),
                peer=_moved(node.peer, number * PORTS_PER_CLUSTER),
                advertise=None if node.advertise is None else _moved(node.advertise, number * PORTS_PER_CLUSTER),
                metrics=None if node.metrics is None else _moved(node.metrics, number * PORTS_PER_CLUSTER),
                dial={},
            )
            for node in first.nodes
        )
        groups.append(attrs.evolve(first, name=f"{stem}-{chr(ord('a') + number)}", nodes=nodes))
    config = attrs.evolve(config, groups=tuple(groups))
    check(config)
    return config


def _moved(address: Address, ports: int) -> Address:
    if address.port + ports > 65535:
        raise ConfigError(f"--groups: port {address.port} + {ports} is above 65535; add --port-base")
    return address.at(address.port + ports)


def with_port_base(config: ClusterConfig, base: int) -> ClusterConfig:
    """Every port of the cluster in base..base+99, hosts as they were. Raises ConfigError.

    Name server i at base + i, node k of group g at base + 10 + 10 g + k; each meets its peers 5 above. There is no room
    for addresses of `metrics`: they go.
    """
    if not 1024 <= base <= 65535 - PORTS_PER_CLUSTER + 1:
        raise ConfigError(f"--port-base {base}: between 1024 and {65535 - PORTS_PER_CLUSTER + 1}")
    groups_max = (PORTS_PER_CLUSTER - _NAMESRV_PORTS) // _PORTS_PER_GROUP
    if len(config.groups) > groups_max or len(config.namesrvs) > _NAMESRV_PORTS // 2:
        raise ConfigError(f"--port-base: room for {_NAMESRV_PORTS // 2} name servers and {groups_max} groups")
    namesrvs = tuple(
        attrs.evolve(
            namesrv,
            listen=namesrv.listen.at(base + i),
            peer=None if namesrv.peer is None else namesrv.peer.at(base + _NAMESRV_PORTS // 2 + i),
            advertise=None,
        )
        for i, namesrv in enumerate(config.namesrvs)
    )
    groups = []
    for g, group in enumerate(config.groups):
        first = base + _NAMESRV_PORTS + _PORTS_PER_GROUP * g
        nodes = tuple(
            attrs.evolve(
                node,
                listen=node.listen.at(first + k),
                peer=node.peer.at(first + _PORTS_PER_GROUP // 2 + k),
                advertise=None,
                metrics=None,
                dial={},
            )
            for k, node in enumerate(group.nodes)
        )
        groups.append(attrs.evolve(group, nodes=nodes))
    config = attrs.evolve(config, namesrvs=namesrvs, groups=tuple(groups))
    check(config)
    return config


# --- plain form, for the state files of a data folder ---


def to_plain(config: ClusterConfig) -> dict[str, Any]:
    """As JSON holds it; `from_plain` is its inverse. Trusted: only what was checked is written."""

    def plain(_: Any, __: Any, value: Any) -> Any:
        if isinstance(value, dict):  # `dial`
            return {key: str(address) for key, address in value.items()}
        return str(value) if isinstance(value, Address) else value

    document: dict[str, Any] = attrs.asdict(config, value_serializer=plain)
    return document


def from_plain(document: Mapping[str, Any]) -> ClusterConfig:
    """Without cattrs: nodes read it at start, where 0.15 s counts."""

    def address(text: str | None) -> Address | None:
        return None if text is None else parse_address(text)

    def node(plain: Mapping[str, Any]) -> NodeSection:
        changed = {"listen": parse_address(plain["listen"]), "peer": parse_address(plain["peer"])}
        dial = {name: parse_address(text) for name, text in plain["dial"].items()}
        optional = {key: address(plain[key]) for key in ("advertise", "metrics")}
        return NodeSection(**{**plain, **changed, **optional, "dial": dial})

    def group(plain: Mapping[str, Any]) -> GroupSection:
        shares = tuple(plain["disk_watermarks"])
        return GroupSection(**{**plain, "disk_watermarks": shares, "nodes": tuple(map(node, plain["nodes"]))})

    return ClusterConfig(
        cluster=ClusterSection(**document["cluster"]),
        namesrvs=tuple(
            NamesrvSection(
                name=n["name"],
                listen=parse_address(n["listen"]),
                advertise=address(n["advertise"]),
                peer=address(n["peer"]),
            )
            for n in document["namesrvs"]
        ),
        groups=tuple(map(group, document["groups"])),
        source=document["source"],
    )
