"""The node folder's `abort` mark and the blob that holds a checkpoint of the tables (store.md 8)."""

from __future__ import annotations

from typing import Any, Final

import cbor2

from broker.errors import DISK_FULL
from runtime.model import Env

CHECKPOINT_VERSION: Final = 2
"""2: queues with the position of their last message, the dedup window in files of its own."""


class CheckpointUnusable(Exception):
    """The blob is not one this version can take up; the log is read again instead."""


class StoreFiles:
    """`abort` exists while the broker runs, so finding it at a start tells of an abnormal exit."""

    def __init__(self, env: Env, data_dir: str) -> None:
        self._files = env.files
        self._pid = env.ids.pid
        self._data_dir = data_dir
        self._path = f"{data_dir}/abort"
        self.abnormal_exit = False
        self._open = False

    def opened(self) -> None:
        """Note whether the last exit was abnormal and set the mark. The second call does nothing. Raises OSError."""
        if self._open:
            return
        self._open = True
        self._files.make_dirs(self._data_dir)
        self.abnormal_exit = self._files.exists(self._path)
        try:
            self._files.write_atomic(self._path, f"{self._pid}".encode())
        except OSError as error:
            if error.errno not in DISK_FULL:  # on a full disk a node starts all the same: only then can it make room
                raise

    def closed(self) -> None:
        """Everything is written: take the mark away. Raises OSError."""
        self._open = False
        if self._files.exists(self._path):
            self._files.unlink(self._path)


def encode_checkpoint(tables: dict[str, Any]) -> bytes:
    return cbor2.dumps({"version": CHECKPOINT_VERSION, **tables})


def decode_checkpoint(blob: bytes) -> dict[str, Any]:
    """Raises CheckpointUnusable."""
    try:
        tables = cbor2.loads(blob)
    except (cbor2.CBORDecodeError, ValueError, EOFError) as error:
        raise CheckpointUnusable(f"checkpoint cannot be read: {error}") from error
    if not isinstance(tables, dict) or tables.get("version") != CHECKPOINT_VERSION:
        raise CheckpointUnusable("checkpoint is of another version")
    return tables
