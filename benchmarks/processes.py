"""What the kernel says about processes: CPU, memory, life."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from runtime import processes

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """For ``preexec_fn``: the kernel kills this child when its starter dies, so an aborted run leaves no server."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time, user and system, of the processes together; ones that are gone count nothing."""
    return sum(processes.cpu_seconds(pid) for pid in pids)


def unique_megabytes(pid: int) -> float:
    """Memory nobody shares with this process (unique set size): what ending it would give back."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kilobytes = sum(int(size) for size in re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", text, re.MULTILINE))
    return kilobytes / 1024


def anonymous_megabytes(pid: int) -> float:
    """Memory of the process's own, without any pages of files that it maps."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)[0]) / 1024


def alive(pid: int) -> bool:
    """True while the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] != "Z"


def wait_gone(pid: int, limit: float) -> bool:
    """True when the process ended within ``limit`` seconds."""
    end = time.monotonic() + limit
    while alive(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send one signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def free_port_base(width: int, start: int = 21000, stop: int = 30000) -> int:
    """First port of a range of ``width`` ports that are all free on loopback now.

    :raises RuntimeError: no such range
    """
    for base in range(start, stop, width):
        if all(_free(port) for port in range(base, base + width)):
            return base
    raise RuntimeError(f"no {width} free ports in a row between {start} and {stop}")


def _free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
