"""A copy of a group's committed log that a new group can begin with.

A backup is a folder: `backup.json` (what it is), `manifest` (the segments, as for catch-up), `log/` (their bytes,
without the zeros behind them) and `checkpoint` (the tables). It is complete once `backup.json` is there, which is
written last.
Restoring goes the way of a catch-up: every frame, the chain and the tables are verified before anything counts.
"""

from __future__ import annotations

import json
from typing import Any
from zlib import crc32

from attrs import asdict, evolve, frozen

from dledger.core.membership import Members, decode_members
from dledger.core.types import EntryType
from dledger.errors import FormatError, LedgerError, LogDamaged
from dledger.store.checkpoint import unpack_checkpoint
from dledger.store.format import CHECKPOINT_FILE, LOG_FOLDER, Format
from dledger.store.log_store import format_folder
from dledger.store.manifest import Manifest, SegmentInfo
from dledger.store.segments import Segment, segment_name
from dledger.store.staging import Staging, complete_install, decode_manifest, encode_manifest
from runtime.model import Env, Files

BACKUP_FILE = "backup.json"
BACKUP_FORMAT = 1
_MANIFEST_FILE = "manifest"
_READ_BYTES = 1 << 20


class BackupUnusable(LedgerError):
    """A folder that is no backup, not a complete one, or one that does not fit."""


@frozen(kw_only=True)
class Backup:
    """What a backup holds."""

    cluster: str
    group: str
    group_uuid: str
    """Of the group it was made of. A restored group is another one, with an identity of its own."""
    node_id: str
    """The node it was read from."""
    made_ms: int
    last_index: int
    first_position: int
    end_position: int
    checkpoint_index: int | None
    format: int = BACKUP_FORMAT


def describe_tail(files: Files, folder: str, base: int, used_bytes: int, before: SegmentInfo | None) -> SegmentInfo:
    """What the last segment of the backup in `folder` holds, of which only the committed `used_bytes` were copied.

    `before` is the segment in front of it. Blocks. Raises LogDamaged where it is not a run of whole entries.
    """
    file = files.open(f"{folder}/{LOG_FOLDER}/{segment_name(base)}")
    try:
        segment = Segment(base, used_bytes, file, file)
        position, end = base, base + used_bytes
        first = last = crc = 0
        while position < end:
            for entry in segment.read_frames(position, end, _READ_BYTES):
                first, last, crc, position = first or entry.index, entry.index, entry.head_crc, entry.end
    finally:
        file.close()
    if before is not None and first != before.last_index + 1:
        raise LogDamaged(f"entry {first} at {base} does not follow entry {before.last_index}")
    return SegmentInfo(base, first, last, end, crc)


def finish_backup(files: Files, folder: str, backup: Backup, manifest: Manifest) -> None:
    """Write what makes the folder a backup. Blocks; its bytes and the checkpoint are there already. Raises OSError."""
    files.write_atomic(f"{folder}/{_MANIFEST_FILE}", encode_manifest(manifest))
    files.write_atomic(f"{folder}/{BACKUP_FILE}", (json.dumps(asdict(backup), indent=2) + "\n").encode())


def read_backup(files: Files, folder: str) -> tuple[Backup, Manifest]:
    """Raises BackupUnusable."""
    path = f"{folder}/{BACKUP_FILE}"
    if not files.exists(path):
        raise BackupUnusable(f"{folder} is no backup, or one that was not finished: there is no {BACKUP_FILE}")
    try:
        content: Any = json.loads(files.read_bytes(path))
        if content["format"] > BACKUP_FORMAT:
            raise BackupUnusable(f"{path} has format {content['format']}; this program knows {BACKUP_FORMAT}")
        return Backup(**content), decode_manifest(files.read_bytes(f"{folder}/{_MANIFEST_FILE}"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackupUnusable(f"{path} is damaged: {error}") from error


def members_in(files: Files, folder: str, manifest: Manifest) -> Members | None:
    """The members that the backup's log names last; None where they never changed. Reads all of it. Blocks.

    Raises BackupUnusable.
    """
    checkpoint = _checkpoint_of(files, folder)
    found = None
    if checkpoint is not None:
        unpacked = unpack_checkpoint(checkpoint)
        if unpacked is None:
            raise BackupUnusable(f"{folder}/{CHECKPOINT_FILE} is damaged")
        if unpacked.config:
            found = decode_members(unpacked.config)
    for info in manifest.segments:
        file = files.open(f"{folder}/{LOG_FOLDER}/{segment_name(info.base)}")
        try:
            segment = Segment(info.base, info.used_bytes, file, file)
            position = info.base
            while position < info.end_position:
                for entry in segment.read_frames(position, info.end_position, _READ_BYTES):
                    position = entry.end
                    if entry.type == EntryType.CONFIG:
                        found = decode_members(entry.body)
        except (LogDamaged, ValueError) as error:
            raise BackupUnusable(f"{folder}: {error}") from error
        finally:
            file.close()
    return found


def restore_folder(env: Env, source: str, folder: str, identity: Format) -> None:
    """Make the node's empty `folder` from the backup in `source`. Blocks long; may be repeated after a failure.

    Every node of the new group gets the same. `identity` is the new node's; the segment size is the backup's. Raises
    BackupUnusable where the backup is damaged, FormatError where the folder is in use, OSError (a full disk).
    """
    files = env.files
    backup, manifest = read_backup(files, source)
    if files.exists(f"{folder}/{LOG_FOLDER}") and files.listdir(f"{folder}/{LOG_FOLDER}"):
        raise FormatError(f"{folder} holds a log already; restore into an empty folder")
    if not manifest.segments or backup.last_index != manifest.segments[-1].last_index:
        raise BackupUnusable(f"{source}/{BACKUP_FILE} and its manifest tell different ends")
    files.make_dirs(folder)
    staging = Staging.open(files, folder, manifest)
    try:
        for base, offset, nbytes in staging.missing():
            file = files.open(f"{source}/{LOG_FOLDER}/{segment_name(base)}")
            try:
                data = file.pread(nbytes, offset)
            finally:
                file.close()
            if len(data) != nbytes:
                raise BackupUnusable(f"{source}/{LOG_FOLDER}/{segment_name(base)} is cut short at {offset + len(data)}")
            staging.put(base, offset, data, crc32(data))
        staging.finish(_checkpoint_of(files, source))
    except LogDamaged as error:
        raise BackupUnusable(f"{source} is damaged: {error}") from error
    finally:
        staging.close()
    complete_install(files, folder)
    format_folder(env, folder, evolve(identity, segment_bytes=manifest.segment_bytes))


def _checkpoint_of(files: Files, folder: str) -> bytes | None:
    path = f"{folder}/{CHECKPOINT_FILE}"
    return files.read_bytes(path) if files.exists(path) else None
