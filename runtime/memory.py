"""How the C library keeps memory for a server that allocates and frees blocks of 256 KiB all the time."""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEEP_BYTES: Final = 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Take entries and read buffers from the heap, and keep what they leave behind; False where that cannot be said.

    By default glibc maps each block of 128 KiB and more anew and hands a free end of the heap back at once: every
    entry then pays for fresh zeroed pages on each of its ways. Bounded by what was in use at once, at most 64 MiB idle.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES // 2) and mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
