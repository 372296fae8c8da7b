"""`quorate doctor`: look at this machine, the configuration and whatever runs, and say what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import click

from cli.exits import CHECK_FAILED, DONE, Failure, print_json
from cli.output import paragraph
from cli.run import as_failure, run
from cli.target import json_option, layout_of, load_config, remote_options
from runtime.processes import open_files_max, outgoing_ports
from runtime.real import real_env

if TYPE_CHECKING:
    from cluster.doctor import Finding

MARKS = {"ok": "ok ", "warning": "!  ", "bad": "BAD"}


@click.command(
    epilog="""\b
Examples:
  quorate doctor
  quorate doctor --json | jq '.[] | select(.level != "ok")'
"""
)
@remote_options
@json_option
def doctor(namesrv: str | None, data_path: str | None, config_path: str | None, as_json: bool) -> int:
    """Look at this machine, the configuration and the cluster, and say what is wrong and what to do about it.

    Also says what an acknowledgement promises in each raft group, and after a power loss what may be missing. Ends
    with 5 when something is bad; warnings do not count.
    """
    findings = run(_look, namesrv, data_path, config_path)
    if as_json:
        print_json([attrs.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            click.echo(paragraph(f"{finding.about}: {finding.text}", f"{MARKS[finding.level]} ", " " * 4))
            if finding.next_step:
                click.echo(paragraph(finding.next_step, " " * 6, " " * 6))
    return CHECK_FAILED if any(finding.level == "bad" for finding in findings) else DONE


async def _look(namesrv: str | None, data_path: str | None, config_path: str | None) -> list[Finding]:
    from cli.raft import reached
    from cluster.config import DEFAULT_NAME
    from cluster.doctor import Finding, check_config, check_group, check_machine
    from cluster.layout import read_identity

    env = real_env()
    layout = layout_of(env.files, data_path, config_path)
    where = layout.data
    while not env.files.exists(where):
        where = where.rpartition("/")[0] or "/"
    findings = list(check_machine(*env.files.free_space(where), open_files_max(), layout.data))
    identity = read_identity(env.files, layout)
    config = identity.config if identity is not None else load_config(env.files, config_path)
    if namesrv is None:
        findings += check_config(config, outgoing_ports())
    try:
        async with reached((namesrv, data_path, config_path)) as cluster:
            is_unknown_here = namesrv is None and identity is None and config.source == DEFAULT_NAME
            if is_unknown_here and not any(group.answering for group in cluster.groups):
                findings.append(Finding("cluster", "ok", "none runs here", "quorate up"))
                return findings
            sections = {} if namesrv is not None else {group.name: group for group in config.groups}
            for group in cluster.groups:
                findings += check_group(group, sections.get(group.name))
    except (Failure, ExceptionGroup, OSError) as error:
        reason = as_failure(error)
        if reason is None:
            raise
        findings.append(Finding("cluster", "warning", reason.format_message(), "quorate up"))
    return findings
