"""The real world behind the five seams."""

from __future__ import annotations

import os
import random
import secrets
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from runtime.clock import RealClock
from runtime.files import RealFiles
from runtime.model import Env
from runtime.net import TcpNet

T = TypeVar("T")

FAULTS_VARIABLE = "QUORATE_FAULTS"
BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
_WORKERS = 2


class RealIds:
    """`runtime.model.Ids` of this process and machine."""

    def __init__(self, boot_id: str | None = None) -> None:
        self._host = socket.gethostname()
        self._boot_id = _read_boot_id() if boot_id is None else boot_id

    def salt(self, nbytes: int) -> bytes:
        """Unpredictable bytes."""
        return secrets.token_bytes(nbytes)

    @property
    def host(self) -> str:
        return self._host

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def boot_id(self) -> str:
        """Changes when the machine restarts; where the system has none, changes with each process, the safe side."""
        return self._boot_id

    @property
    def memory_bytes(self) -> int:
        """Physical memory of the machine."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_boot_id() -> str:
    try:
        return str(uuid.UUID(Path(BOOT_ID_FILE).read_text(encoding="ascii").strip()))
    except (OSError, ValueError):  # no such file, or in a container an empty one over it, the same after every restart
        return uuid.uuid4().hex


class _Workers:
    """Threads for slow pure computation, apart from those that sync files."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_WORKERS)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """`function(*args)` in a thread. Checkpoint; a cancellation waits for the function to end."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)


def _fresh_rng(name: str) -> random.Random:
    """In the real world every stream is unpredictable, whatever its name."""
    return random.Random(secrets.randbits(128))


def fault_plan() -> str | None:
    """Path of the plan of disk faults that this process was started with, if it was: see `runtime.faults`."""
    return os.environ.get(FAULTS_VARIABLE) or None


def real_env(rng: Callable[[str], random.Random] = _fresh_rng) -> Env:
    """The environment of a real node. One per trio loop: its streams share a receive buffer.

    Raises OSError where a fault plan is named (`QUORATE_FAULTS`) and cannot be used.
    """
    files, boot_id = RealFiles(), None
    if (plan := fault_plan()) is not None:
        from runtime.faults import FaultyFiles

        files = faulty = FaultyFiles(plan)
        boot_id = faulty.boot_id
    return Env(
        clock=RealClock(),
        rng=rng,
        ids=RealIds(boot_id),
        files=files,
        net=TcpNet(),
        run_in_thread=_Workers().run,
    )
