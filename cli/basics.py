"""`quorate version` and `quorate completion`."""

from __future__ import annotations

import platform
from importlib import metadata

import click

from cli.exits import print_json

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def version(as_json: bool) -> None:
    """Print the version of quorate, Python and trio."""
    versions = {
        "quorate": metadata.version("quorate"),
        "python": platform.python_version(),
        "trio": metadata.version("trio"),
    }
    if as_json:
        print_json(versions)
    else:
        click.echo(", ".join(f"{name} {number}" for name, number in versions.items()))


@click.command(
    epilog="""\b
Examples:
  quorate completion bash >> ~/.bashrc
  quorate completion fish > ~/.config/fish/completions/quorate.fish
"""
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script for SHELL."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "quorate", "_QUORATE_COMPLETE").source())
