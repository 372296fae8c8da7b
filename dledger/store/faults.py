"""Ranges of the log that are damaged or missing, and what is known about their two ends (raft.md 4.6).

A fault is told apart from a torn tail by evidence that its entries were once on stable storage. It is never cut, never
served and never led with; a peer's entries that fit between its two ends repair it (`dledger.store.repair`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from attrs import frozen

from dledger.errors import LogDamaged
from runtime.model import Files

SUSPECTS_FILE = "suspects"


@frozen
class FaultyRange:
    """Entries `first_index` to `last_index` are damaged or missing."""

    first_index: int
    last_index: int | None
    """With an open end, the last entry there is evidence of."""
    position: int
    """Where the entry before the range ends."""
    end: int | None
    """Where the next intact frame begins; None: nothing intact lies behind."""
    prev_crc: int
    """`head_crc` of entry `first_index - 1`."""
    next_crc: int | None
    """`prev_crc` of the next intact frame, so `head_crc` of `last_index`; None for an open end."""
    reason: str

    @property
    def is_open(self) -> bool:
        return self.next_crc is None

    def __str__(self) -> str:
        last = f" to {self.last_index}" if self.last_index not in (None, self.first_index) else ""
        return f"entry {self.first_index}{last} at position {self.position}: {self.reason}"


class EntryDamaged(LogDamaged):
    """Damage met while the log is in use; `fault` tells at least where it begins."""

    def __init__(self, fault: FaultyRange) -> None:
        super().__init__(str(fault))
        self.fault = fault


def refuse_faults(faults: Iterable[FaultyRange]) -> None:
    """Raise LogDamaged where there is a fault, for callers that cannot repair."""
    for fault in faults:
        raise LogDamaged(
            f"entry {fault.first_index} at position {fault.position} is damaged or missing ({fault.reason}), although"
            f" entries up to {fault.last_index} were once there; refusing to serve, and no peer has them: restore a"
            " backup"
        )


def read_suspects(files: Files, folder: str) -> frozenset[int]:
    """Segments (start positions) in which damage was met, so that the next recovery walks them frame by frame."""
    try:
        content: Any = json.loads(files.read_bytes(f"{folder}/{SUSPECTS_FILE}"))
        return frozenset(int(base) for base in content)
    except (OSError, ValueError, TypeError):
        return frozenset()


def add_suspects(files: Files, folder: str, bases: Iterable[int]) -> None:
    """Remember segments for the next recovery. Waits for the disk. Raises OSError."""
    wanted = sorted({*read_suspects(files, folder), *bases})
    files.write_atomic(f"{folder}/{SUSPECTS_FILE}", json.dumps(wanted).encode())


def clear_suspects(files: Files, folder: str) -> None:
    """All of them were walked and nothing is wrong with them any more."""
    path = f"{folder}/{SUSPECTS_FILE}"
    if files.exists(path):
        files.unlink(path)
