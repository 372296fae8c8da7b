"""The `quorate` command. This module lists the verbs and imports none of them."""

from __future__ import annotations

import click

from cli.lazy import LazyGroup

VERBS = {
    "up": ("cli.up:up", "Start a cluster on this machine and watch it."),
    "down": ("cli.processes:down", "Stop what `up` started."),
    "ps": ("cli.processes:ps", "List the processes of a cluster."),
    "status": ("cli.status:status", "Show role, term and log positions of each node."),
    "doctor": ("cli.doctor:doctor", "Look at machine, configuration and cluster, and say what is wrong."),
    "kill": ("cli.processes:kill", "Kill a node with SIGKILL: n1, leader, broker-b/leader."),
    "restart": ("cli.processes:restart", "Stop a node in order and start it again."),
    "serve": ("cli.serve:serve", "Run one node in the foreground."),
    "produce": ("cli.produce:produce", "Send messages to a topic."),
    "consume": ("cli.consume:consume", "Receive messages of a topic."),
    "bench": ("cli.bench:bench", "Measure how fast a cluster takes messages."),
    "topic": ("cli.topic:topic", "List, create, delete and inspect topics."),
    "raft": ("cli.raft:raft", "Raft groups: members, leadership, recovery."),
    "backup": ("cli.backup:backup", "Copy a running raft group's log and tables into a folder."),
    "restore": ("cli.backup:restore", "Make the data folders of a new raft group from a backup."),
    "log": ("cli.log:log", "Look at a stopped node's log: dump, verify, stats."),
    "chaos": ("chaos.commands:chaos_group", "Search for faults: seeded simulation."),
    "version": ("cli.basics:version", "Print the version."),
    "completion": ("cli.basics:completion", "Print a completion script for bash, zsh or fish."),
}

SECTIONS = (
    ("A cluster on this machine", ("up", "down", "ps", "status", "doctor", "kill", "restart")),
    ("Messages", ("produce", "consume", "bench", "topic")),
    ("Raft groups", ("raft", "backup", "restore")),
    ("A node in production", ("serve", "log")),
    ("Faults", ("chaos",)),
    ("About", ("version", "completion")),
)


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  quorate up                          one name server, three brokers; Ctrl-C stops all
  quorate produce orders "hello"      in a second terminal
  quorate consume orders --group demo
  quorate kill leader                 watch the first terminal
""",
)
@click.version_option(package_name="quorate", prog_name="quorate", message="%(prog)s %(version)s")
def cli() -> None:
    """Quorate: a message broker cluster for RocketMQ clients, replicated with Raft."""


def main() -> None:
    """Entry point of the console script."""
    cli.main(prog_name="quorate")
