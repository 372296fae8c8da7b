"""The real file system: positional I/O, data sync in a thread, atomic replacement, and the lock on a data folder.

Synchronous calls touch the page cache only; whatever waits for the disk is awaitable and runs in a small pool of
threads of its own, so that slow look-ups elsewhere never hold up a sync (design.md 2, style.md 4.4).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import trio

from runtime.model import Buffer, File, Files

_PARTS_PER_CALL = 1024  # IOV_MAX on Linux and macOS
_ZEROS = 1 << 20
_RWF_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)
_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_MAP_FAILED = ctypes.c_void_p(-1).value
_ADVICE: dict[str, int] = {
    kind: getattr(os, name)
    for kind, name in (
        ("normal", "POSIX_FADV_NORMAL"),
        ("sequential", "POSIX_FADV_SEQUENTIAL"),
        ("random", "POSIX_FADV_RANDOM"),
        ("willneed", "POSIX_FADV_WILLNEED"),
        ("dontneed", "POSIX_FADV_DONTNEED"),
    )
    if hasattr(os, name)
}


class Locked(OSError):
    """Another process holds the data folder."""

    def __init__(self, folder: str, pid: int | None) -> None:
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(errno.EAGAIN, f"{folder} is in use by {holder}; two processes must not share one data folder")
        self.folder = folder
        self.pid = pid

    def __str__(self) -> str:
        return str(self.strerror)


def _data_sync(descriptor: int) -> None:
    """Force a file's content to stable storage with whatever this system offers for it."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:  # macOS: fsync leaves the data in the drive's cache
        fcntl.fcntl(descriptor, full_sync)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def data_extents(descriptor: int, offset: int = 0) -> list[tuple[int, int]]:
    """The parts of a file at or behind `offset` that are no holes and no unwritten reserves.

    Found all at once: what is read ahead beside one of them may count as data from then on.
    """
    end = os.fstat(descriptor).st_size
    found: list[tuple[int, int]] = []
    while offset < end:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
            offset = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                break
            if error.errno not in _NOT_SUPPORTED:
                raise
            start, offset = offset, end
        found.append((start, offset))
    return found


class RealFile:
    """`runtime.model.File` over one descriptor. After `close` every call raises OSError (EBADF)."""

    __slots__ = ("_descriptor", "_locked", "_nowait_flag", "_path", "_readers", "_sync_limiter")

    def __init__(
        self, path: str, descriptor: int, sync_limiter: trio.CapacityLimiter, readers: trio.CapacityLimiter
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        self._sync_limiter = sync_limiter
        self._readers = readers
        self._nowait_flag = _RWF_NOWAIT
        self._locked: tuple[int, int] | None = None

    @property
    def path(self) -> str:
        return self._path

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Up to `nbytes` from `offset`; fewer only at the end of the file."""
        data = os.pread(self._descriptor, nbytes, offset)
        if len(data) == nbytes or not data:
            return data
        parts = [data]
        taken = len(data)
        while taken < nbytes:
            data = os.pread(self._descriptor, nbytes - taken, offset + taken)
            if not data:
                break
            parts.append(data)
            taken += len(data)
        return b"".join(parts)

    def pread_nowait(self, nbytes: int, offset: int) -> bytes | None:
        """As `pread` where the page cache has it all, else None. File systems without the flag just read."""
        if self._nowait_flag is None:
            return self.pread(nbytes, offset)
        buffer = bytearray(nbytes)
        try:
            taken = os.preadv(self._descriptor, [buffer], offset, self._nowait_flag)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            self._nowait_flag = None
            return self.pread(nbytes, offset)
        if taken == nbytes:
            return bytes(buffer)
        if offset + taken < self.size():
            return None  # the rest is not cached
        return bytes(buffer[:taken])

    async def pread_in_thread(self, nbytes: int, offset: int) -> bytes:
        """As `pread`, off the loop. Checkpoint; a cancellation waits for the read to end."""
        return await trio.to_thread.run_sync(self.pread, nbytes, offset, limiter=self._readers)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`, or raise OSError (then an unknown part of it is written)."""
        written = os.pwrite(self._descriptor, data, offset)
        if written == len(data) and not isinstance(data, memoryview):
            return
        view = memoryview(data).cast("B")
        while written < len(view):
            written += os.pwrite(self._descriptor, view[written:], offset + written)

    def pwritev(self, parts: Sequence[Buffer], offset: int) -> None:
        """As `pwrite`, for the parts back to back."""
        for first in range(0, len(parts), _PARTS_PER_CALL):
            group = parts[first : first + _PARTS_PER_CALL]
            total = sum(memoryview(part).nbytes for part in group)
            written = os.pwritev(self._descriptor, group, offset)
            if written != total:
                self.pwrite(b"".join(group)[written:], offset + written)
            offset += total

    async def sync(self) -> None:
        """fdatasync in a thread. An OSError is final. Checkpoint; a cancellation waits for the sync to end."""
        await trio.to_thread.run_sync(_data_sync, self._descriptor, limiter=self._sync_limiter)

    def sync_now(self) -> None:
        """fdatasync on the spot; for start-up and shutdown."""
        _data_sync(self._descriptor)

    def allocate(self, nbytes: int) -> None:
        """Reserve the first `nbytes` of the file. Raises OSError (ENOSPC) where the disk cannot hold them."""
        fallocate = getattr(os, "posix_fallocate", None)
        if fallocate is not None:
            try:
                fallocate(self._descriptor, 0, nbytes)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
            else:
                return
        position = self.size()
        while position < nbytes:  # writing zeros is what reserves space where nothing else does
            step = min(_ZEROS, nbytes - position)
            self.pwrite(bytes(step), position)
            position += step

    def truncate(self, nbytes: int) -> None:
        os.ftruncate(self._descriptor, nbytes)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def data_extents(self, offset: int) -> list[tuple[int, int]]:
        """The parts at or behind `offset` that may be other than zero; see `runtime.model.File`."""
        return data_extents(self._descriptor, offset)

    def is_at(self, path: str) -> bool:
        """Whether `path` leads to this very file: not after it was removed, or another one put in its place."""
        try:
            there = os.stat(path)  # noqa: PTH116 - plain strings are this seam's language
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._descriptor))

    def map(self) -> memoryview:
        """Read-only view of the whole file at its present size; it stays valid after `close`."""
        nbytes = self.size()
        if nbytes == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._descriptor, nbytes, prot=mmap.PROT_READ))

    def advise(self, kind: str, offset: int = 0, nbytes: int = 0) -> None:
        """A hint to the page cache; see `runtime.model.File`. Nothing where the system does not know it."""
        advice = _ADVICE.get(kind)
        if advice is None:
            return
        try:
            os.posix_fadvise(self._descriptor, offset, nbytes, advice)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise

    def lock_pages(self) -> bool:
        """Map the file and mlock the map. False where that is not possible (RLIMIT_MEMLOCK, another system)."""
        if self._locked is not None:
            return True
        nbytes = self.size()
        libc = ctypes.CDLL(None, use_errno=True)
        if nbytes == 0 or not hasattr(libc, "mlock"):
            return False
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        libc.mlock.argtypes = libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, self._descriptor, 0)
        if address is None or address == _MAP_FAILED:
            return False
        if libc.mlock(address, nbytes):
            libc.munmap(address, nbytes)
            return False
        self._locked = (address, nbytes)
        return True

    def unlock_pages(self) -> None:
        """Unmapping unlocks."""
        locked, self._locked = self._locked, None
        if locked is not None:
            ctypes.CDLL(None).munmap(ctypes.c_void_p(locked[0]), ctypes.c_size_t(locked[1]))

    def close(self) -> None:
        """May be called twice."""
        self.unlock_pages()
        descriptor, self._descriptor = self._descriptor, -1  # its number may soon be another file's
        if descriptor >= 0:
            os.close(descriptor)


class RealFiles:
    """`runtime.model.Files` over the operating system."""

    def __init__(self) -> None:
        self._sync_limiter = trio.CapacityLimiter(4)
        self._readers = trio.CapacityLimiter(4)

    def open(self, path: str, *, create: bool = False) -> File:
        """Read-write. Raises FileNotFoundError unless `create`."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        return RealFile(path, os.open(path, flags, 0o644), self._sync_limiter, self._readers)

    def exists(self, path: str) -> bool:
        return os.path.exists(path)  # noqa: PTH110 - plain strings are this seam's language

    def listdir(self, path: str) -> list[str]:
        """Names in a folder, sorted; empty where the folder does not exist."""
        try:
            return sorted(os.listdir(path))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def make_dirs(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)  # noqa: PTH103

    def read_bytes(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def write_atomic(self, path: str, data: bytes) -> None:
        """Write aside, sync, rename over, sync the folder. Afterwards either the old or the new content is there."""
        replace_atomically(self, path, data)

    def rename(self, old: str, new: str) -> None:
        """Replaces `new` if it is there; durable after `sync_dir`."""
        os.replace(old, new)  # noqa: PTH105

    def unlink(self, path: str) -> None:
        os.unlink(path)  # noqa: PTH108

    def remove_tree(self, path: str) -> None:
        """A folder and all below it; nothing to do where it does not exist."""
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            return

    def sync_dir(self, path: str) -> None:
        """Make creations, renames and removals in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_space(self, path: str) -> tuple[int, int]:
        """(free bytes, usable bytes) of the file system that holds `path`."""
        stats = os.statvfs(path)
        # What is kept for others counts as neither free nor used, as `df` has it: a share of the rest is what fills up.
        usable = stats.f_blocks - stats.f_bfree + stats.f_bavail
        return stats.f_bavail * stats.f_frsize, usable * stats.f_frsize

    def lock(self, path: str) -> AbstractContextManager[None]:
        """Hold `path` (a lock file, created if need be; inside it where `path` is a folder) until the block ends.

        Raises `Locked` at once, not on entering. The lock goes with the process, whatever ends it.
        """
        file = os.path.join(path, "lock") if os.path.isdir(path) else path  # noqa: PTH112, PTH118
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).strip()
            os.close(descriptor)
            raise Locked(_folder_of(file), int(text) if text.isdigit() else None) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        return _held(descriptor)


def replace_atomically(files: Files, path: str, data: bytes) -> None:
    """What `Files.write_atomic` promises, by the other calls of any `Files`."""
    aside = f"{path}.tmp"
    file = files.open(aside, create=True)
    try:
        file.truncate(0)
        file.pwrite(data, 0)
        file.sync_now()
    finally:
        file.close()
    files.rename(aside, path)
    files.sync_dir(_folder_of(path))


def _folder_of(path: str) -> str:
    return os.path.dirname(path) or "."  # noqa: PTH120


@contextmanager
def _held(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)  # the file stays: unlinking it would let two holders lock two different files
