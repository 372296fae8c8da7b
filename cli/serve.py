"""`quorate serve NODE`: one node in the foreground. What runs on each host in production, and what `up` starts."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Protocol

import click
import trio
from attrs import field, frozen

from cli.exits import CLUSTER_ANSWERED_ERROR, USAGE, Failure
from cli.target import config_option, data_option, load_config
from cluster.config import ClusterConfig, ConfigError, Node, with_groups, with_port_base
from cluster.layout import Layout, UpRefused, read_identity
from runtime.logs import configure_logging, get_logger
from runtime.memory import keep_freed_memory
from runtime.model import Env
from runtime.processes import EventWriter, absolute_path, die_with_parent, exit_now, is_orphan
from runtime.real import fault_plan, real_env
from runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from broker.config import BrokerConfig
    from namesrv.config import NamesrvConfig

ORPHAN_LOOK_S = 1.0
FILLED_LOOK_S = 0.25
MANAGED_DRAIN_S = 2.0


class Service(Protocol):
    """A name server or a broker node."""

    async def run(self, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None: ...

    async def stop(self, drain_s: float) -> None:
        """Hand leadership over, go on forwarding for so long, end `run`. Checkpoint."""

    def has_all(self) -> bool:
        """Whether what it had lost, or never had, is there by now."""


@frozen(kw_only=True)
class Assignment:
    """Which node this process is, and all it needs to be it."""

    config: ClusterConfig
    node: Node
    layout: Layout
    is_format_allowed: bool
    is_join_allowed: bool = False
    cluster_uuid: str | None = None
    supervisor_pid: int | None = None
    events: EventWriter | None = field(default=None)
    drain_s: float | None = None


@click.command(
    epilog="""\b
Examples:
  quorate serve ns0 --config cluster.toml
  quorate serve n1 --config cluster.toml --data /var/lib/quorate --format    the first time
  quorate serve n1 --config cluster.toml --data /var/lib/quorate
"""
)
@click.argument("node")
@config_option
@data_option
@click.option("--port-base", type=int, metavar="N", help="As for `up`.")
@click.option("--groups", type=int, metavar="N", help="As for `up`.")
@click.option("--format", "is_format_allowed", is_flag=True, help="Format an empty data folder. Once, on all nodes.")
@click.option(
    "--join",
    "is_join_allowed",
    is_flag=True,
    help="Take an empty data folder: a new disk, or a new node after `quorate raft add-node`. The others fill it.",
)
@click.option("--drain-s", type=click.FloatRange(0, 3600), help="Seconds to go on forwarding after SIGTERM.")
@click.option("--managed", "supervisor_pid", type=int, hidden=True, help="Started by this supervisor.")
@click.option("--event-fd", type=int, hidden=True, help="Write event lines there.")
def serve(
    node: str,
    config_path: str | None,
    data_path: str | None,
    port_base: int | None,
    groups: int | None,
    is_format_allowed: bool,
    is_join_allowed: bool,
    drain_s: float | None,
    supervisor_pid: int | None,
    event_fd: int | None,
) -> None:
    """Run NODE of the cluster in the foreground.

    SIGTERM hands leadership over, goes on forwarding for a while, then ends; a second SIGTERM ends at once. Ctrl-C ends
    in order without forwarding. Each node has its own folder below the data folder.
    """
    if is_format_allowed and is_join_allowed:
        raise click.UsageError("--format begins a new raft group, --join belongs to one that is there: say one of them")
    if supervisor_pid is not None:
        die_with_parent(supervisor_pid)
    keep_freed_memory()
    try:
        env = real_env()
    except OSError as error:  # a fault plan that cannot be used
        raise Failure(str(error), USAGE) from None
    cluster_uuid = None
    try:
        if supervisor_pid is not None and data_path is not None:
            layout = Layout(data_path)
            identity = read_identity(env.files, layout)
            if identity is None:
                raise Failure(f"no {layout.cluster_file}", USAGE)
            config, cluster_uuid = identity.config, identity.uuid
        else:
            config = load_config(env.files, config_path)
            config = with_groups(config, groups) if groups is not None else config
            config = with_port_base(config, port_base) if port_base is not None else config
            layout = Layout(absolute_path(data_path or config.cluster.data))
        assignment = Assignment(
            config=config,
            node=config.find(node),
            layout=layout,
            is_format_allowed=is_format_allowed,
            is_join_allowed=is_join_allowed,
            cluster_uuid=cluster_uuid,
            supervisor_pid=supervisor_pid,
            events=EventWriter.on(event_fd) if event_fd is not None else None,
            drain_s=drain_s,
        )
    except (ConfigError, UpRefused) as error:
        raise Failure(str(error), USAGE) from None
    reason = _serve(env, assignment)
    if reason is not None:
        raise Failure(f"{node}: {reason}", CLUSTER_ANSWERED_ERROR)


def _serve(env: Env, assignment: Assignment) -> str | None:
    """Run until stopped; one sentence where the node could not start or go on."""
    is_managed = assignment.supervisor_pid is not None
    path = assignment.layout.log(assignment.node.name) if is_managed else None
    if is_managed:
        # structlog would load rich for a console that a managed node does not have: a sixth of its start
        sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
    try:
        env.files.make_dirs(assignment.layout.node(assignment.node.name))
        configure_logging(path, json=is_managed or not sys.stderr.isatty())
    except OSError as error:
        return f"cannot write to {assignment.layout.data} ({error.strerror}); choose another folder with --data DIR"
    log = get_logger("serve", node=assignment.node.name)
    if fault_plan() is not None:
        log.warning("fault layer active: this node's disk misbehaves as planned", plan=fault_plan())
    reason: str | None = None
    try:
        trio.run(_run, env, assignment)
    except* _operating_errors() as group:
        reason = _first_sentence(group)
    if reason is None:
        log.info("node ended")
    else:
        log.error("node stopped", reason=reason)
    return reason


def _operating_errors() -> tuple[type[Exception], ...]:
    """What is no mistake in the program: ports, folders, formats, damage."""
    from namesrv.mirror import MirrorDamaged

    return (OSError, MirrorDamaged, ConfigError)  # a broker's StartupError and NodeStopped are OSErrors


def _first_sentence(group: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


async def _run(env: Env, assignment: Assignment) -> None:
    service = _service(env, assignment)
    watchdog = Watchdog(get_logger("loop", node=assignment.node.name))
    with watchdog.watch():
        await _run_all(env, assignment, service)


async def _run_all(env: Env, assignment: Assignment, service: Service) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_obey_signals, service, assignment)
        await nursery.start(_run_service, service, nursery.cancel_scope)
        if assignment.events is not None:
            assignment.events.write({"event": "ready"})
        nursery.start_soon(_leave_with_supervisor, env, assignment)
        if assignment.events is not None and assignment.is_join_allowed:
            nursery.start_soon(_tell_when_filled, env, service, assignment.events)


async def _run_service(
    service: Service, scope: trio.CancelScope, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED
) -> None:
    await service.run(task_status=task_status)
    scope.cancel()


async def _obey_signals(
    service: Service, assignment: Assignment, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """SIGTERM drains, SIGINT does not; any second signal ends the process on the spot."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async with trio.open_nursery() as nursery:
            is_first = True
            async for number in signals:
                if not is_first:
                    exit_now(CLUSTER_ANSWERED_ERROR)
                is_first = False
                nursery.start_soon(service.stop, _drain_s(assignment) if number == signal.SIGTERM else 0.0)


def _drain_s(assignment: Assignment) -> float:
    if assignment.drain_s is not None:
        return assignment.drain_s
    if assignment.supervisor_pid is not None or assignment.node.group is None:
        return MANAGED_DRAIN_S
    return assignment.config.group(assignment.node.group).drain_s


def _report_role(assignment: Assignment, role: str, term: int, leader: str | None, is_ready: bool) -> None:
    if assignment.events is not None:
        assignment.events.write({"event": "role", "role": role, "term": term, "leader": leader, "ready": is_ready})


async def _tell_when_filled(env: Env, service: Service, events: EventWriter) -> None:
    while not service.has_all():
        await env.clock.sleep(FILLED_LOOK_S)
    events.write({"event": "filled"})


async def _leave_with_supervisor(env: Env, assignment: Assignment) -> None:
    """Where the kernel does not see to it."""
    while assignment.supervisor_pid is not None:
        if is_orphan(assignment.supervisor_pid):
            exit_now(CLUSTER_ANSWERED_ERROR)
        await env.clock.sleep(ORPHAN_LOOK_S)


# --- from cluster.toml to what a node is told ---


def _service(env: Env, assignment: Assignment) -> Service:
    """Import only what this kind of node needs: a name server has no log."""
    if assignment.node.kind == "namesrv":
        return _NamesrvService(env, assignment)
    return _BrokerService(env, assignment)


class _NamesrvService:
    def __init__(self, env: Env, assignment: Assignment) -> None:
        from namesrv.server import NameServer

        self._server = NameServer(env, namesrv_config(assignment))
        self._stopped = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        with self._stopped:
            await self._server.run(task_status=task_status)

    async def stop(self, drain_s: float) -> None:
        """Routes are soft state: nothing to hand over."""
        self._stopped.cancel()
        await trio.lowlevel.checkpoint()

    def has_all(self) -> bool:
        return True


class _BrokerService:
    def __init__(self, env: Env, assignment: Assignment) -> None:
        from broker.node import BrokerNode

        self._node = BrokerNode(env, broker_config(assignment))
        self._node.state.on_role.append(
            lambda role, term, leader, is_ready: _report_role(assignment, role.name.lower(), term, leader, is_ready)
        )

    async def run(self, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        await self._node.run(task_status=task_status)

    async def stop(self, drain_s: float) -> None:
        await self._node.stop(drain_s)

    def has_all(self) -> bool:
        """A leader has confirmed its log: until then it may lack what it, or its folder's predecessor, acknowledged."""
        said = self._node.group.statistics()
        return said.state == "serving" and not said.recovering


def namesrv_config(assignment: Assignment) -> NamesrvConfig:
    """A name server's part of the cluster's configuration."""
    from namesrv.config import NamesrvConfig

    config, node = assignment.config, assignment.node
    peers = {one.name: one.peer.pair for one in config.namesrvs if one.peer is not None}
    return NamesrvConfig(
        name=node.name,
        listen=node.listen.pair,
        data_dir=assignment.layout.node(node.name),
        peers=peers if len(peers) > 1 else {},
        secret=config.cluster.secret,
        cluster=config.cluster.name,
    )


def broker_config(assignment: Assignment) -> BrokerConfig:
    """This node's part of the cluster's configuration. Raises ConfigError."""
    from broker.config import BrokerConfig
    from dledger.config import GroupConfig

    config, node, layout = assignment.config, assignment.node, assignment.layout
    assert node.group is not None
    group = config.group(node.group)
    member = next(member for member in group.nodes if member.name == node.id)
    folder = layout.node(node.name)
    secret = config.cluster.secret
    try:
        return BrokerConfig(
            cluster=config.cluster.name,
            broker_name=group.name,
            node_id=node.id,
            broker_id=member.number,
            listen=member.listen.pair,
            advertised=(member.advertise or member.listen).pair,
            namesrv=config.namesrv_addresses(),
            group=GroupConfig(
                cluster=config.cluster.name,
                group=group.name,
                node_id=node.id,
                peers={peer.name: peer.peer.pair for peer in group.nodes if peer in group.founders or peer is member},
                founders=tuple(founder.name for founder in group.founders),
                dial={name: address.pair for name, address in member.dial.items()},
                joined={peer.name: peer.peer.pair for peer in group.nodes if peer.join},
                bind=member.peer.pair,
                data_dir=f"{folder}/raft",
                flush=group.flush,
                segment_bytes=group.segment_bytes,
                heartbeat_ms=group.heartbeat_ms,
                election_timeout_ms_min=group.election_timeout_ms_min,
                election_timeout_ms_max=group.election_timeout_ms_max,
                secret=secret.encode() if secret is not None else None,
                format_if_empty=assignment.is_format_allowed,
                join=assignment.is_join_allowed,
                cluster_uuid=assignment.cluster_uuid or group.identity,
                priorities={peer.name: peer.priority for peer in group.nodes if peer.priority},
                retention_hours=group.retention_hours,
                delete_hour=group.delete_hour,
                retention_bytes=group.retention_bytes,
                disk_watermarks=group.disk_watermarks,
                scrub_bytes_per_second=group.scrub_bytes_per_second,
                fetch_bytes_per_second=group.fetch_bytes_per_second,
                warm=group.warm,
                mlock=group.mlock,
            ),
            data_dir=folder,
            metrics=member.metrics.pair if member.metrics is not None else None,
            auto_create_topic=group.auto_create_topic,
            auto_create_group=group.auto_create_group,
            drain_s=_drain_s(assignment),
        )
    except ValueError as error:
        raise ConfigError(f"{config.source}: group {group.name}: {error}") from None
