"""The five seams between Quorate and the world: clock, randomness, ids, files, network.

An `Env` is handed to the root of every node and passed down. Nothing outside `runtime` touches time, random numbers,
os files, sockets or threads, so the simulator can run whole nodes on virtual time from one seed (chaos.md 5.2).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import trio
from attrs import frozen

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview


class Clock(Protocol):
    """Wall time for stamps in messages, monotonic time for everything that waits."""

    def wall_ms(self) -> int:
        """Milliseconds since the Unix epoch. May step."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; the deadlines below use it."""

    async def sleep(self, seconds: float) -> None:
        """Checkpoint; cancel-safe."""

    async def sleep_until(self, deadline: float) -> None:
        """Checkpoint; cancel-safe."""

    def move_on_at(self, deadline: float) -> AbstractContextManager[trio.CancelScope]: ...

    def move_on_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]: ...

    def fail_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """Raises trio.TooSlowError when time is up."""


class Ids(Protocol):
    """Identity of this process and machine."""

    def salt(self, nbytes: int) -> bytes:
        """Unpredictable bytes: nonces, uuids, message-id salt."""

    @property
    def host(self) -> str: ...

    @property
    def pid(self) -> int: ...

    @property
    def boot_id(self) -> str:
        """Changes when the machine restarts, and so when a page cache may have been lost."""

    @property
    def memory_bytes(self) -> int:
        """Physical memory of the machine: how far back a page cache may reach."""


class File(Protocol):
    """One open file. Positional I/O only; synchronous calls touch the page cache, awaitable ones may wait for disk."""

    @property
    def path(self) -> str: ...

    def pread(self, nbytes: int, offset: int) -> bytes: ...

    def pread_nowait(self, nbytes: int, offset: int) -> bytes | None:
        """Bytes in the page cache, or None where reading would wait for the disk."""

    async def pread_in_thread(self, nbytes: int, offset: int) -> bytes:
        """Checkpoint; for cold data."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Writes all of `data` or raises OSError."""

    def pwritev(self, parts: Sequence[Buffer], offset: int) -> None:
        """As `pwrite`, for the parts back to back."""

    async def sync(self) -> None:
        """fdatasync in a thread. An OSError is final: never call it again and hope. Checkpoint."""

    def sync_now(self) -> None:
        """fdatasync on the spot; for start-up and shutdown."""

    def allocate(self, nbytes: int) -> None:
        """Reserve space for the first `nbytes`, so that a full disk shows here and not later."""

    def truncate(self, nbytes: int) -> None: ...

    def size(self) -> int: ...

    def data_extents(self, offset: int) -> Sequence[tuple[int, int]]:
        """(start, end) of the parts at or behind `offset` that may be other than zero, ascending.

        Space that is reserved and was never written is in none of them. May be all of it where that cannot be told.
        """

    def is_at(self, path: str) -> bool:
        """Whether `path` leads to this very file: not after it was removed, or another one put in its place."""

    def map(self) -> memoryview:
        """Read-only view of the whole file at its present size. The file's length must not change afterwards."""

    def advise(self, kind: str, offset: int = 0, nbytes: int = 0) -> None:
        """Tell the system what comes: "normal", "sequential", "random", "willneed", "dontneed" (drop clean pages from
        the page cache). `nbytes` 0 means to the end. A hint: systems without it do nothing."""

    def lock_pages(self) -> bool:
        """Keep the file's pages in memory until `close`. False where the system or a limit does not allow it."""

    def unlock_pages(self) -> None:
        """Undo `lock_pages`; nothing to do without it."""

    def close(self) -> None: ...


class Files(Protocol):
    """A file system. Paths are plain strings."""

    def open(self, path: str, *, create: bool = False) -> File:
        """Read-write. Raises FileNotFoundError unless `create`."""

    def exists(self, path: str) -> bool: ...

    def listdir(self, path: str) -> list[str]:
        """Names in a folder, sorted; empty where the folder does not exist."""

    def make_dirs(self, path: str) -> None: ...

    def read_bytes(self, path: str) -> bytes: ...

    def write_atomic(self, path: str, data: bytes) -> None:
        """Write aside, sync, rename over, sync the folder. Afterwards either the old or the new content is there."""

    def rename(self, old: str, new: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def remove_tree(self, path: str) -> None: ...

    def sync_dir(self, path: str) -> None: ...

    def free_space(self, path: str) -> tuple[int, int]:
        """(free bytes, total bytes) of the file system that holds `path`."""

    def lock(self, path: str) -> AbstractContextManager[None]:
        """Keeps a second process off. Raises runtime.files.Locked, which names the holder's pid."""


class Stream(Protocol):
    """A connected byte stream (plain TCP, TLS, or simulated)."""

    @property
    def peer(self) -> tuple[str, int]: ...

    @property
    def local(self) -> tuple[str, int]: ...

    def send_nowait(self, parts: Sequence[Buffer]) -> int:
        """Hand over what fits right now without waiting; returns the number of bytes taken (0 allowed).

        Only valid while no `send_parts` is under way. Raises trio.BrokenResourceError.
        """

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        """Send all parts back to back. Checkpoint. Raises trio.BrokenResourceError."""

    async def receive_some(self, max_bytes: int = 262_144) -> bytes:
        """b"" at end of stream. Checkpoint. Raises trio.BrokenResourceError."""

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...

    def abort(self) -> None:
        """Close at once, from synchronous code; a pending receive raises or returns b""."""


class Listener(Protocol):
    @property
    def address(self) -> tuple[str, int]: ...

    async def accept(self) -> Stream:
        """Checkpoint. Overload errors (too many files) are waited out here."""

    async def aclose(self) -> None: ...


class Net(Protocol):
    async def dial(self, host: str, port: int, *, timeout: float = 3.0) -> Stream:
        """Checkpoint. Raises OSError (ConnectionRefusedError told apart) or trio.TooSlowError."""

    async def listen(self, host: str, port: int) -> Listener:
        """Checkpoint. Raises OSError, with the address in its text, where the port is taken."""


@frozen
class Env:
    """Everything a node may know of the world."""

    clock: Clock
    rng: Callable[[str], random.Random]
    """A stream of random numbers by name; the same name gives the same stream in a simulation."""
    ids: Ids
    files: Files
    net: Net
    run_in_thread: Callable[..., Any]
    """`await env.run_in_thread(f, *args)`: slow pure computation off the loop. Checkpoint."""
