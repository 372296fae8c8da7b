"""After a failed write or sync nobody knows what the page cache holds and the disk does not (fsyncgate, raft.md 4.2).

The node stops, and leaves a mark. The next start drops the cached pages before it reads, so that it recovers what the
disk has and not what was once in memory.
"""

from __future__ import annotations

import errno

from dledger.store.format import LOG_FOLDER, META_FILE, ROWS_FOLDER
from dledger.store.meta import Meta
from runtime.model import Files

FAILED_FILE = "failed"
NOT_OPENED = frozenset({errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOENT})
"""What opening a file may end with, and neither a write nor a sync: the page cache has lost nothing."""


def mark_failed(files: Files, folder: str, text: str) -> None:
    """Best effort: the disk that failed is the one that should keep the mark."""
    try:
        files.write_atomic(f"{folder}/{FAILED_FILE}", text.encode())
    except OSError:
        return


def has_failed(files: Files, folder: str) -> bool:
    """Whether the mark is there: what was written to the log lately may be gone."""
    return files.exists(f"{folder}/{FAILED_FILE}")


def is_cache_kept(files: Files, folder: str, saved: Meta, boot_id: str) -> bool:
    """Whether the page cache has kept every write to the log in its order, as a mere kill of the process leaves it."""
    return saved.is_of_boot(boot_id) and not has_failed(files, folder)


def forget_cached_pages(files: Files, folder: str) -> None:
    """Where the mark is: have every file of the log read from the disk. Blocks; before a recovery."""
    if not has_failed(files, folder):
        return
    paths = [f"{folder}/{sub}/{name}" for sub in (LOG_FOLDER, ROWS_FOLDER) for name in files.listdir(f"{folder}/{sub}")]
    for path in [*paths, f"{folder}/{META_FILE}"]:
        if files.exists(path):
            file = files.open(path)
            try:
                file.advise("dontneed")
            finally:
                file.close()


def clear_failed(files: Files, folder: str) -> None:
    """What was found now counts."""
    path = f"{folder}/{FAILED_FILE}"
    if files.exists(path):
        files.unlink(path)
        files.sync_dir(folder)
