"""Bring the machine into the state of one that has been up for long: its page cache full.

On a virtual machine, memory that was never touched, or was given back to the host, costs a fault in the host at its
first touch: 5 to 20 us for each page of 4 KiB, seen here, several times what writing a message to the log costs.
Which cluster pays it depends on what ran before. With the cache full, new log pages take the place of old clean
ones, and nobody pays it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LEAVE_FREE = 600 << 20
_STEP = 1 << 20


def free_bytes() -> int:
    """Memory that is used for nothing at all."""
    found = re.search(r"^MemFree:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc/meminfo says nothing about free memory")
    return int(found.group(1)) * 1024


@contextmanager
def filled(folder: Path | None = None) -> Iterator[int]:
    """Fill free memory with clean pages of a file that takes no disk space; the file goes at the end.

    :param folder: where to make it; on the disk the clusters write to
    :returns: bytes filled
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        size = max(0, free_bytes() - _LEAVE_FREE)
        file.truncate(size)
        buffer = bytearray(_STEP)
        left = size
        while left > 0:
            left -= file.readinto(buffer) or left
        yield size
