"""`down`, `ps`, `kill`, `restart`: the processes that `up` started."""

from __future__ import annotations

import signal
from typing import Any

import click
import trio

from cli.exits import CLUSTER_ANSWERED_ERROR, GAVE_UP_WAITING, NOBODY_REACHED, USAGE, Failure, print_json
from cli.output import ago, table
from cli.run import run
from cli.target import Running, json_option, local_options, running_cluster
from cluster.config import ConfigError
from cluster.layout import RunningNode
from runtime.local_socket import ask_local
from runtime.model import Env
from runtime.processes import resident_bytes
from runtime.real import real_env

DOWN_WITHIN_S = 30.0
RESTART_WITHIN_S = 60.0


@click.command(
    epilog="""\b
Examples:
  quorate down
  quorate down --data /tmp/second
"""
)
@local_options
@json_option
def down(data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """Stop the cluster that `up` started: brokers first, then name servers, then the supervisor."""
    run(_down, data_path, config_path, as_json)


async def _down(data_path: str | None, config_path: str | None, as_json: bool) -> None:
    env = real_env()
    running = running_cluster(env.files, data_path, config_path)
    supervisor = running.state.supervisor
    supervisor.send_signal(signal.SIGTERM)
    started = env.clock.monotonic()
    with env.clock.move_on_after(DOWN_WITHIN_S):
        while supervisor.is_running:
            await env.clock.sleep(0.02)
    if supervisor.is_running:
        raise Failure(
            f"supervisor {supervisor.pid} still runs after {DOWN_WITHIN_S:.0f} s; logs are in {running.layout.logs}",
            GAVE_UP_WAITING,
        )
    elapsed_ms = round((env.clock.monotonic() - started) * 1000)
    if as_json:
        print_json({"data": running.layout.data, "stopped": len(running.state.nodes), "elapsed_ms": elapsed_ms})
    else:
        click.echo(f"stopped {len(running.state.nodes)} processes in {elapsed_ms / 1000:.1f} s")


@click.command(
    epilog="""\b
Examples:
  quorate ps
  quorate ps --json --data /tmp/second
"""
)
@local_options
@json_option
def ps(data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """List the processes of the cluster in the data folder."""
    env = real_env()
    running = running_cluster(env.files, data_path, config_path)
    now_ms = env.clock.wall_ms()
    rows = [_process_row(node, now_ms) for node in running.state.nodes]
    if as_json:
        print_json(rows)
        return
    headings = ("name", "kind", "group", "pid", "listen", "state", "restarts", "memory")
    cells = [
        (
            row["name"],
            row["kind"],
            row.get("group", ""),
            row["pid"] if row["pid"] is not None else "-",
            row["listen"],
            f"{row['state']} {ago(row['in_state_ms'])}",
            row["restarts"],
            f"{row['resident_bytes'] / 1e6:.0f} MB" if row["resident_bytes"] else "-",
        )
        for row in rows
    ]
    click.echo(table(headings, cells))
    click.echo(
        f"supervisor {running.state.supervisor.pid} · name server {running.state.namesrv} · {running.layout.data}"
    )


def _process_row(node: RunningNode, now_ms: int) -> dict[str, Any]:
    group = {"group": node.group} if node.group is not None else {}
    pid = node.pid
    return {
        "name": node.name,
        **group,
        "kind": node.kind,
        "pid": pid,
        "listen": node.listen,
        "state": node.state if pid is not None else "down",
        "in_state_ms": max(0, now_ms - node.since_ms),
        "restarts": node.restarts,
        "resident_bytes": resident_bytes(pid) if pid is not None else None,
    }


async def find_node(env: Env, running: Running, name: str) -> RunningNode:
    """`n1`, `b-n1`, `broker-b/n1`, `leader`, `broker-b/leader`, `follower`, `any`. Raises Failure. Checkpoint."""
    group, _, last = name.rpartition("/")
    if last not in ("leader", "follower", "any"):
        try:
            found = running.state.node(running.config.find(name).name)
        except ConfigError as error:
            raise Failure(str(error), USAGE) from None
        assert found is not None
        return found
    from cluster.status import read_broker_status

    try:
        wanted = running.config.group(group).name if group else running.config.groups[0].name
    except ConfigError as error:
        raise Failure(str(error), USAGE) from None
    members = [node for node in running.state.nodes if node.group == wanted]
    if last == "any":
        alive = [node for node in members if node.pid is not None]
        if not alive:
            raise Failure(f"no node of {wanted} runs", NOBODY_REACHED)
        return env.rng("cli").choice(alive)
    statuses = await read_broker_status(env, running.state.namesrv, members)
    leading = [s for s in statuses if s.role == "leader"]
    leader = max(leading, key=lambda s: s.term or 0, default=None)
    if leader is None:
        raise Failure(f"{wanted} has no leader at the moment", CLUSTER_ANSWERED_ERROR)
    name = leader.name
    if last == "follower":
        followers = [s.name for s in statuses if s.role == "follower"]
        if not followers:
            raise Failure(f"{wanted} has no follower at the moment", CLUSTER_ANSWERED_ERROR)
        name = followers[0]
    return next(node for node in members if node.name == name)


@click.command(
    epilog="""\b
Examples:
  quorate kill leader
  quorate kill n1
  quorate kill broker-b/leader --json
"""
)
@click.argument("node")
@local_options
@json_option
def kill(node: str, data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """Kill a node with SIGKILL, as a crash would. The reply names whom it hit.

    NODE is a name (n1, b-n0, broker-b/n0, ns0), or leader, follower, any: of the first raft group, or of the one named
    before a slash. The supervisor starts the node again after a second, unless `up` runs with --no-restart.
    """
    run(_kill, node, data_path, config_path, as_json)


async def _kill(name: str, data_path: str | None, config_path: str | None, as_json: bool) -> None:
    env = real_env()
    running = running_cluster(env.files, data_path, config_path)
    node = await find_node(env, running, name)
    if node.process is None or not node.process.send_signal(signal.SIGKILL):
        raise Failure(f"{node.name} does not run", CLUSTER_ANSWERED_ERROR, name=node.name)
    comes_back = running.state.restarts_dead_nodes
    if as_json:
        group = {"group": node.group} if node.group is not None else {}
        print_json({"killed": node.name, **group, "kind": node.kind, "pid": node.process.pid, "restarts": comes_back})
    else:
        then = "starts again in 1 s" if comes_back else f"stays down; `quorate restart {node.name}` starts it"
        what = f" ({name})" if name != node.name else ""
        click.echo(f"killed {node.name}{what}, pid {node.process.pid}; it {then}")


@click.command(
    epilog="""\b
Examples:
  quorate restart n1
  quorate restart leader
"""
)
@click.argument("node")
@local_options
@json_option
def restart(node: str, data_path: str | None, config_path: str | None, as_json: bool) -> None:
    """Stop a node in order and start it again; a node that is down is started. Returns when it is ready."""
    run(_restart, node, data_path, config_path, as_json)


async def _restart(name: str, data_path: str | None, config_path: str | None, as_json: bool) -> None:
    env = real_env()
    running = running_cluster(env.files, data_path, config_path)
    node = await find_node(env, running, name)
    started = env.clock.monotonic()
    try:
        reply = await ask_local(running.state.control, {"do": "restart", "node": node.name}, timeout_s=RESTART_WITHIN_S)
    except (OSError, ValueError) as error:
        raise Failure(f"the supervisor does not answer ({error})", NOBODY_REACHED) from None
    except trio.TooSlowError:
        raise Failure(f"{node.name} not ready again within {RESTART_WITHIN_S:.0f} s", GAVE_UP_WAITING) from None
    if "error" in reply:
        raise Failure(str(reply["error"]), CLUSTER_ANSWERED_ERROR)
    elapsed_ms = round((env.clock.monotonic() - started) * 1000)
    if as_json:
        print_json({"restarted": node.name, "pid": reply["pid"], "elapsed_ms": elapsed_ms})
    else:
        click.echo(f"restarted {node.name}, pid {reply['pid']}, ready after {elapsed_ms / 1000:.1f} s")
