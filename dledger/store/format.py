"""Which node of which group a data folder belongs to. Written once, when the folder is formatted."""

from __future__ import annotations

import json
from typing import Any

from attrs import asdict, frozen

from dledger.errors import FormatError
from runtime.model import Files

FORMAT_VERSION = 1
FORMAT_FILE = "format.json"
META_FILE = "meta"
LOG_FOLDER = "log"
ROWS_FOLDER = "rows"
CHECKPOINT_FILE = "checkpoint"


@frozen(kw_only=True)
class Format:
    """Identity and geometry of a data folder. `segment_bytes` decides where entries lie, so it never changes."""

    cluster: str
    cluster_uuid: str
    group: str
    group_uuid: str
    node_id: str
    segment_bytes: int
    version: int = FORMAT_VERSION


def read_format(files: Files, folder: str) -> Format | None:
    """None where the folder is not formatted. Raises FormatError where the file is damaged or of a newer version."""
    path = f"{folder}/{FORMAT_FILE}"
    if not files.exists(path):
        return None
    try:
        content: Any = json.loads(files.read_bytes(path))
        version = content["version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatError(
                f"data folder {folder} has format {version}, newer than this program knows ({FORMAT_VERSION});"
                " start it with the newer version"
            )
        return Format(
            cluster=str(content["cluster"]),
            cluster_uuid=str(content["cluster_uuid"]),
            group=str(content["group"]),
            group_uuid=str(content["group_uuid"]),
            node_id=str(content["node_id"]),
            segment_bytes=int(content["segment_bytes"]),
            version=int(version),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path} is damaged ({error}); put it back, or move the node's folder away and start it with --join: its "
            "peers fill it"
        ) from error


def write_format(files: Files, folder: str, wanted: Format) -> None:
    """The last step of formatting: a folder with this file is complete."""
    files.write_atomic(f"{folder}/{FORMAT_FILE}", (json.dumps(asdict(wanted), indent=2) + "\n").encode())


def check_format(folder: str, found: Format, wanted: Format) -> None:
    """Raise FormatError where the folder is somebody else's. (Of two segment sizes the folder's counts.)"""
    for what, there, here in (
        ("cluster", f"{found.cluster} ({found.cluster_uuid})", f"{wanted.cluster} ({wanted.cluster_uuid})"),
        ("group", f"{found.group} ({found.group_uuid})", f"{wanted.group} ({wanted.group_uuid})"),
        ("node", found.node_id, wanted.node_id),
    ):
        if there != here:
            raise FormatError(f"data folder {folder} belongs to {what} {there}, not to {here}")
