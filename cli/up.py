"""`quorate up`: start a cluster on this machine, show its steps, then watch it."""

from __future__ import annotations

import signal
import sys
from typing import Protocol

import attrs
import click
import trio

from cli.exits import CLUSTER_ANSWERED_ERROR, USAGE, Failure, print_json
from cli.run import run
from cli.target import config_option, data_option, json_option, load_config
from cluster.config import ClusterConfig, ConfigError, with_groups, with_port_base
from cluster.layout import Layout
from cluster.supervisor import Event, Supervisor
from runtime.model import Env
from runtime.processes import Daemon, absolute_path, detach, temporary_folder, unwritable_reason
from runtime.real import real_env


class View(Protocol):
    """How `up` is shown: plain lines, a live table, or nothing."""

    def show(self, event: Event) -> None:
        """An event, as it happens."""

    async def watch(self, supervisor: Supervisor) -> None:
        """From the moment the cluster is ready until cancelled. Checkpoint."""


@click.command(
    epilog="""\b
Examples:
  quorate up                              one name server, three brokers; Ctrl-C stops all
  quorate up --ephemeral --groups 2       two raft groups, data removed at the end
  quorate up --detach --json              returns when ready; `quorate down` stops it
  quorate up --data /tmp/b --port-base 20000      a second cluster beside the first
"""
)
@config_option
@data_option
@click.option("--port-base", type=int, metavar="N", help="Put every port of the cluster between N and N+99.")
@click.option("--groups", type=int, metavar="N", help="Number of raft groups, made after the first one.")
@click.option("--ephemeral", is_flag=True, help="Data in a temporary folder, removed at the end.")
@click.option("--detach", "is_detached", is_flag=True, help="Return when ready and leave the cluster running.")
@click.option("--no-restart", is_flag=True, help="Leave dead what dies.")
@json_option
def up(
    config_path: str | None,
    data_path: str | None,
    port_base: int | None,
    groups: int | None,
    ephemeral: bool,
    is_detached: bool,
    no_restart: bool,
    as_json: bool,
) -> None:
    """Start a cluster on this machine and watch it; Ctrl-C stops all."""
    if sys.platform == "win32":
        raise Failure("quorate does not run on Windows; use WSL", USAGE)
    if ephemeral and data_path is not None:
        raise Failure("--ephemeral takes a temporary folder; leave out --data", USAGE)
    env = real_env()
    config = load_config(env.files, config_path)
    try:
        if groups is not None:
            config = with_groups(config, groups)
        if port_base is not None:
            config = with_port_base(config, port_base)
    except ConfigError as error:
        raise Failure(str(error), USAGE) from None
    data = temporary_folder("quorate-up-") if ephemeral else absolute_path(data_path or config.cluster.data)
    layout = Layout(data)
    config = attrs.evolve(config, cluster=attrs.evolve(config.cluster, data=data))
    start = Start(config, layout, restarts=not no_restart, ephemeral=ephemeral)
    if is_detached:
        _up_detached(env, start, as_json)
    else:
        view = _view(env, config, layout, as_json)
        try:
            run(_up, env, start, view, None, as_json)
        finally:
            if ephemeral:
                env.files.remove_tree(data)


@attrs.frozen
class Start:
    """What was asked for."""

    config: ClusterConfig
    layout: Layout
    restarts: bool = attrs.field(kw_only=True)
    ephemeral: bool = attrs.field(kw_only=True)


def _view(env: Env, config: ClusterConfig, layout: Layout, as_json: bool) -> View:
    if as_json:
        return NoView()
    is_fresh = read_identity_or_none(env, layout)
    head = f"quorate up · {config.source} · data in {layout.data} ({'fresh' if is_fresh else 'kept'})"
    if sys.stdout.isatty():
        from cli.live import LiveView

        return LiveView(env, config, head)
    from cli.plain import PlainView

    return PlainView(config, head)


def read_identity_or_none(env: Env, layout: Layout) -> bool:
    """True for a folder that has no cluster yet."""
    return not env.files.exists(layout.cluster_file)


async def _up(env: Env, start: Start, view: View, daemon: Daemon | None, as_json: bool) -> None:
    supervisor = Supervisor(
        env,
        start.config,
        start.layout,
        restarts_dead_nodes=start.restarts,
        ephemeral=start.ephemeral,
        on_event=view.show,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, supervisor)
        nursery.start_soon(_when_ready, supervisor, view, daemon, as_json)
        await supervisor.run()
        nursery.cancel_scope.cancel()


async def _stop_on_signals(
    supervisor: Supervisor, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            supervisor.request_stop()


async def _when_ready(supervisor: Supervisor, view: View, daemon: Daemon | None, as_json: bool) -> None:
    await supervisor.ready.wait()
    document = supervisor.state().document(supervisor.layout.data)
    if supervisor.notice:
        document["notice"] = supervisor.notice
    if daemon is not None:
        daemon.report(document)
    elif as_json:
        print_json(document)
        sys.stdout.flush()
    await view.watch(supervisor)


# --- detached ---


def _up_detached(env: Env, start: Start, as_json: bool) -> None:
    layout = start.layout
    reason = unwritable_reason(layout.logs)
    if reason is not None:
        raise Failure(f"cannot write to data folder {layout.data} ({reason}); choose another with --data DIR")
    daemon = detach(layout.stderr("supervisor"))
    if daemon.is_background:
        _run_in_background(env, start, daemon)
        return
    document = daemon.wait()
    if document is None:
        raise Failure(f"the supervisor ended at once; see {layout.stderr('supervisor')}")
    if "error" in document:
        raise Failure(str(document["error"]), int(document["exit_code"]))
    if as_json:
        print_json(document)
        return
    from cli.plain import ready_lines

    click.echo(ready_lines(start.config, document))


def _run_in_background(env: Env, start: Start, daemon: Daemon) -> None:
    """The supervisor itself. Whatever stops it before the cluster is ready goes to the process that waits."""
    from cli.plain import LogView

    code = 0
    try:
        run(_up, env, start, LogView(start.layout.log("supervisor")), daemon, False)
    except Failure as error:
        code = error.exit_code
        daemon.report({"error": error.format_message(), "exit_code": code})
    finally:
        if start.ephemeral:
            env.files.remove_tree(start.layout.data)
    daemon.report({"error": "stopped before it was ready", "exit_code": CLUSTER_ANSWERED_ERROR})
    sys.exit(code)


class NoView:
    """For --json: the document says it all."""

    def show(self, event: Event) -> None:
        pass

    async def watch(self, supervisor: Supervisor) -> None:
        await trio.lowlevel.checkpoint()
