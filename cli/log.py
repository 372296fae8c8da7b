"""`quorate log`: look at a stopped node's log. Nothing is changed, and nothing has to run."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from cli.exits import CHECK_FAILED, DONE, USAGE, Failure, print_json
from cli.lazy import LazyGroup
from cli.output import number, table
from cli.target import json_option
from runtime.processes import absolute_path
from runtime.real import real_env

if TYPE_CHECKING:
    from dledger.core.types import Entry
    from dledger.offline import OfflineLog
    from remoting.message import MessageExt

PROGRESS_STEP = 64 << 20
BODY_SHOWN = 60

folder_argument = click.argument("folder", metavar="DIR")


@click.group(
    cls=LazyGroup,
    epilog="""\b
Examples:
  quorate log verify data/n1
  quorate log stats data/n1 --json
  quorate log dump data/n1 --from 1200 --count 20 --messages
""",
)
def log() -> None:
    """Look at the log of a stopped node, without changing anything.

    DIR is a node's data folder, such as data/n1, or the raft folder inside it.
    """


@contextmanager
def _opened(folder: str, *, every_frame: bool = True) -> Iterator[OfflineLog]:
    from dledger.errors import LedgerError
    from dledger.offline import open_offline

    try:
        with open_offline(real_env(), absolute_path(folder), every_frame=every_frame, on_read=_progress()) as found:
            yield found
    except LedgerError as error:
        raise Failure(str(error), CHECK_FAILED) from None
    except OSError as error:  # a lock held by the running node tells its pid
        raise Failure(str(error) if error.filename is None else f"{error.filename}: {error.strerror}", USAGE) from None


def _progress() -> Callable[[int], None] | None:
    """On a terminal, how much has been read, every 64 MiB."""
    if not sys.stderr.isatty():
        return None
    taken = shown = 0

    def on_read(nbytes: int) -> None:
        nonlocal taken, shown
        taken += nbytes
        if taken - shown >= PROGRESS_STEP:
            shown = taken
            click.echo(f"\r{taken >> 20:,} MiB read ", nl=False, err=True)

    return on_read


@log.command()
@folder_argument
@json_option
def verify(folder: str, as_json: bool) -> int:
    """Read every byte of the log in DIR and say whether it is whole.

    Exit code 0: nothing is damaged; a torn tail (writes that nobody was promised) is no damage. Exit code 5: damage.
    The node itself repairs what is damaged from its peers when it starts.
    """
    with _opened(folder) as found:
        document = _summary(found) | {
            "is_whole": not found.faults,
            "torn_bytes": found.torn_bytes,
            "faults": [
                {
                    "first_index": fault.first_index,
                    "last_index": fault.last_index,
                    "position": fault.position,
                    "end": fault.end,
                    "reason": fault.reason,
                }
                for fault in found.faults
            ],
        }
    if as_json:
        print_json(document)
    else:
        _print_verdict(document)
    return CHECK_FAILED if document["faults"] else DONE


def _summary(found: OfflineLog) -> dict[str, Any]:
    return {
        "folder": found.folder,
        "group": found.identity.group,
        "node": found.identity.node_id,
        "term": found.meta.term,
        "vote": found.meta.vote,
        "recovering": found.meta.recovering,
        "stopped_in_order": found.meta.clean,
        "first_index": found.first_index,
        "last_index": found.last_index,
        "last_term": found.last_term,
        "committed_for_certain": found.commit_hint,
        "durable_index": found.meta.durable_index,
        "checkpoint_index": found.checkpoint_index,
        "first_position": found.base.first_base(found.identity.segment_bytes),
        "end_position": found.end_position,
        "segments": sum(1 for segment in found.segments if segment.first_index),
    }


def _print_verdict(document: dict[str, Any]) -> None:
    click.echo(
        f"{document['group']}/{document['node']}: entries {number(document['first_index'])} to "
        f"{number(document['last_index'])} in {number(document['segments'])} segments, "
        f"{number(document['end_position'] - document['first_position'])} bytes, term {document['term']}"
    )
    if document["recovering"]:
        click.echo("the node is recovering: its log may lack what it acknowledged, until a leader confirms it")
    if document["torn_bytes"]:
        click.echo(f"a torn tail of {number(document['torn_bytes'])} bytes: a start cuts it, nobody was promised them")
    for fault in document["faults"]:
        last = f" to {fault['last_index']}" if fault["last_index"] != fault["first_index"] else ""
        click.echo(f"DAMAGED: entry {fault['first_index']}{last} at position {fault['position']}: {fault['reason']}")
    if document["faults"]:
        click.echo("start the node: it repairs this from its peers before it serves")
    else:
        click.echo("whole: every checksum and the chain agree")


@log.command()
@folder_argument
@json_option
def stats(folder: str, as_json: bool) -> None:
    """Count what is in the log of DIR: terms, segments, kinds of entries, messages."""
    with _opened(folder) as found:
        document = _summary(found)
        kinds: dict[str, int] = {}
        messages = 0
        for entry in found.entries(found.first_index):
            kinds[_kind(entry)] = kinds.get(_kind(entry), 0) + 1
            messages += entry.count
        document["messages"] = messages
        document["kinds"] = kinds
        document["terms"] = [
            {"term": run.term, "first_index": run.first_index, "entries": run.entries, "bytes": run.nbytes}
            for run in found.term_reports()
        ]
        document["segment_files"] = [
            {
                "base": each.base,
                "first_index": each.first_index,
                "last_index": each.last_index,
                "entries": each.entries,
                "used_bytes": each.used_bytes,
            }
            for each in found.segment_reports()
            if each.entries  # not the spare one
        ]
    if as_json:
        print_json(document)
        return
    for key in ("group", "node", "term", "first_index", "last_index", "committed_for_certain", "checkpoint_index"):
        click.echo(f"{key.replace('_', ' '):22}{document[key]}")
    click.echo(f"{'messages':22}{number(messages)}")
    click.echo(f"{'entries':22}" + ", ".join(f"{number(count)} {kind}" for kind, count in sorted(kinds.items())))
    click.echo()
    click.echo(table(("term", "from entry", "entries", "bytes"), [_shown(run) for run in document["terms"]]))
    click.echo()
    headings = ("segment", "first", "last", "entries", "bytes")
    click.echo(table(headings, [_shown(each) for each in document["segment_files"]]))


def _shown(row: dict[str, int]) -> list[str]:
    return [number(value) for value in row.values()]


def _kind(entry: Entry) -> str:
    from dledger.core.types import EntryType

    if entry.type == EntryType.DATA and not entry.count:
        return "meta"  # changes of tables alone: topics, groups, offsets
    known = {kind.value: kind.name.lower() for kind in EntryType}
    return known.get(entry.type, f"type {entry.type}")


@log.command()
@folder_argument
@click.option("--from", "from_index", type=click.IntRange(1), default=1, show_default=True, help="First entry.")
@click.option("--count", type=click.IntRange(1), default=50, show_default=True, help="How many entries.")
@click.option("--messages", "with_messages", is_flag=True, help="Show the messages in each entry too.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines, one per entry.")
def dump(folder: str, from_index: int, count: int, with_messages: bool, as_json: bool) -> None:
    """Print entries of the log in DIR."""
    with _opened(folder, every_frame=False) as found:
        if not found.first_index <= from_index <= found.last_index:
            raise Failure(
                f"no entry {from_index}: the log has {found.first_index} to {found.last_index}",
                USAGE,
            )
        for entry in itertools.islice(found.entries(from_index), count):
            row: dict[str, Any] = {
                "index": entry.index,
                "term": entry.term,
                "position": entry.position,
                "bytes": len(entry.frame),
                "kind": _kind(entry),
                "messages": entry.count,
                "checksum": f"{entry.head_crc:08x}",
            }
            details = [_message(message) for message in _messages_of(entry)] if with_messages else []
            if as_json:
                print_json(row | ({"message_list": details} if with_messages else {}))
                continue
            click.echo(
                f"{entry.index:>10}  term {entry.term}  at {entry.position}  {len(entry.frame)} bytes  "
                f"{row['kind']}  {entry.count} messages  {row['checksum']}"
            )
            for detail in details:
                click.echo(
                    f"{'':12}{detail['topic']} queue {detail['queue_id']} offset {detail['queue_offset']}  "
                    f"{detail['physical_offset']}  {detail['body']}"
                )


def _messages_of(entry: Entry) -> Iterator[MessageExt]:
    from remoting.message_codec import decode_stored

    body, offset = entry.body, 0
    for _ in range(entry.count):
        yield decode_stored(body, offset)
        offset += int.from_bytes(body[offset : offset + 4], "big")


def _message(message: MessageExt) -> dict[str, Any]:
    body = bytes(message.body[:BODY_SHOWN])
    return {
        "topic": message.topic,
        "queue_id": message.queue_id,
        "queue_offset": message.queue_offset,
        "physical_offset": message.physical_offset,
        "store_ms": message.store_timestamp,
        "body_bytes": len(message.body),
        "body": body.decode("utf-8", "replace") + ("..." if len(message.body) > BODY_SHOWN else ""),
    }
