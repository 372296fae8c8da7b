"""Command groups that import a verb's module only when the verb runs, so that help and completion are quick."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from cli import exits


class LazyGroup(click.Group):
    """`verbs` maps a name to ("module:object", one-line help); the help stands here so that listing imports nothing."""

    def __init__(
        self,
        *args: Any,
        verbs: Mapping[str, tuple[str, str]] | None = None,
        sections: Sequence[tuple[str, Sequence[str]]] = (),
        aliases: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = dict(verbs or {})
        self._sections = sections
        self._aliases = dict(aliases or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._verbs, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = self._aliases.get(cmd_name, cmd_name)
        if cmd_name not in self._verbs:
            return super().get_command(ctx, cmd_name)
        module, _, name = self._verbs[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if near and not ctx.resilient_parsing:
                raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = [name for _, names in self._sections for name in names]
        rest = [name for name in self.list_commands(ctx) if name not in listed]
        for title, names in [*self._sections, ("Commands" if not listed else "More", rest)]:
            rows = [(name, self._short_help(ctx, name)) for name in names]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def _short_help(self, ctx: click.Context, name: str) -> str:
        if name in self._verbs:
            return self._verbs[name][1]
        command = super().get_command(ctx, name)
        return command.get_short_help_str(80) if command is not None else ""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """As click's, with our exit codes, errors as JSON for a verb asked for JSON, and no traceback on Ctrl-C."""
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        code: Any
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(arguments, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            exits.show(error, as_json="--json" in arguments)
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = exits.INTERRUPTED
        except BrokenPipeError:  # `quorate consume ... | head`
            code = exits.DONE
            sys.stdout = None
        sys.exit(code if isinstance(code, int) else exits.DONE)
