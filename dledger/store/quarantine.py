"""Damaged bytes, kept aside before they are overwritten, for whoever wants to know what happened to them."""

from __future__ import annotations

from collections.abc import Iterable

from dledger.store.rows import DISK_FULL
from dledger.store.segments import read_around, segment_name
from runtime.model import File, Files

QUARANTINE_FOLDER = "quarantine"
QUARANTINE_BYTES_MAX = 1 << 30
_CHUNK = 1 << 20
_NUMBER_DIGITS = 8


def keep_aside(files: Files, folder: str, base: int, source: File, ranges: Iterable[tuple[int, int]]) -> None:
    """Copy [start, stop) offsets of a segment's file into `quarantine/`; the oldest copies make room for new ones.

    A full disk keeps nothing aside: the repair matters more. Waits for the disk. Raises OSError otherwise.
    """
    where = f"{folder}/{QUARANTINE_FOLDER}"
    files.make_dirs(where)
    for start, stop in ranges:
        stop = min(stop, source.size(), start + QUARANTINE_BYTES_MAX)
        if stop <= start or not _holds_anything(source, start, stop):
            continue
        _make_room(files, where, stop - start)
        names = files.listdir(where)
        number = int(names[-1][:_NUMBER_DIGITS]) + 1 if names else 1
        target = files.open(f"{where}/{number:0{_NUMBER_DIGITS}d}-{segment_name(base)}-{start}", create=True)
        try:
            for offset in range(start, stop, _CHUNK):
                target.pwrite(read_around(source, min(_CHUNK, stop - offset), offset)[0], offset - start)
            target.sync_now()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            files.unlink(target.path)
        finally:
            target.close()
    files.sync_dir(where)


def _holds_anything(source: File, start: int, stop: int) -> bool:
    return any(
        read_around(source, min(_CHUNK, stop - offset), offset)[0].strip(b"\0") for offset in range(start, stop, _CHUNK)
    )


def _make_room(files: Files, where: str, nbytes: int) -> None:
    sizes = []
    for name in files.listdir(where):
        file = files.open(f"{where}/{name}")
        sizes.append((name, file.size()))
        file.close()
    total = sum(size for _, size in sizes) + nbytes
    for name, size in sizes:
        if total <= QUARANTINE_BYTES_MAX:
            return
        files.unlink(f"{where}/{name}")
        total -= size
