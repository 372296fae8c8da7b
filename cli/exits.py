"""Exit codes of all verbs but chaos (ecosystem.md 4.4), and errors that carry one."""

from __future__ import annotations

import json
import sys
from typing import IO, Any

import click

DONE = 0
CLUSTER_ANSWERED_ERROR = 1
USAGE = 2
NOBODY_REACHED = 3
GAVE_UP_WAITING = 4
CHECK_FAILED = 5
INTERRUPTED = 130


class Failure(click.ClickException):
    """Ends the command with one sentence and a code. Further lines, if any, are details."""

    def __init__(self, message: str, exit_code: int = CLUSTER_ANSWERED_ERROR, **fields: Any) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]
        self.fields = fields


def show(error: click.ClickException, *, as_json: bool) -> None:
    """On stderr: for people, or as one JSON document."""
    if as_json:
        fields = error.fields if isinstance(error, Failure) else {}
        document = {"error": error.format_message(), **fields, "exit_code": error.exit_code}
        click.echo(json.dumps(document), err=True)
    elif isinstance(error, click.UsageError):
        error.show()
    else:
        click.echo(f"quorate: {error.format_message()}", err=True)


def print_json(document: Any, file: IO[str] | None = None) -> None:
    """One document, on a line of its own."""
    click.echo(json.dumps(document, ensure_ascii=False), file=file)


def confirm(question: str, refusal: str, yes: bool, as_json: bool) -> None:
    """Ask on a terminal, unless `yes`. Raises Failure (2) with `refusal` where nobody can be asked, Abort for a no."""
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise Failure(refusal, USAGE)
    click.confirm(question, abort=True)
