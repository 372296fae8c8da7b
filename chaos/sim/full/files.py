"""Disks in memory that know what is on stable storage and what only in the page cache.

Of each file there is the content a process sees, the content a power loss leaves at least, and the writes in between,
in order. A power loss decides for each sector, or page, which of its unsynced writes it got. Names are kept alike: a
creation, rename or removal is certain once its folder is synced, and until then only the first so many of a folder's
survive. Taken strictly: syncing a file says nothing about its name, syncing a folder nothing about its parent.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from random import Random
from typing import TYPE_CHECKING, Final

import trio
from attrs import frozen

from chaos.sim.full.machine import Dead
from runtime.files import Locked, replace_atomically
from runtime.model import Buffer, File

if TYPE_CHECKING:
    from chaos.sim.full.machine import Machine, Process

SECTORS: Final = (512, 4096)
PAGE: Final = 4096
DIRTY_WRITES_MAX: Final = 2048
"""Of one file; beyond, the kernel has written the older half back by itself."""


class Inode:
    """A file's content; `None` for `content` of a folder."""

    __slots__ = ("cached", "dirty", "durable", "is_folder", "links")

    def __init__(self, *, is_folder: bool = False) -> None:
        self.cached = bytearray()
        self.durable = bytearray()
        self.dirty: list[tuple[int, bytes] | int] = []
        """(offset, bytes) of a write; a number is a new size."""
        self.is_folder = is_folder
        self.links = 0

    def write(self, offset: int, data: bytes) -> None:
        _write(self.cached, offset, data)
        self.dirty.append((offset, data))
        if len(self.dirty) > DIRTY_WRITES_MAX:
            self.settle(DIRTY_WRITES_MAX // 2)

    def resize(self, nbytes: int) -> None:
        if nbytes != len(self.cached):
            _resize(self.cached, nbytes)
            self.dirty.append(nbytes)

    def settle(self, count: int) -> None:
        """The oldest `count` unsynced changes are on stable storage now."""
        for change in self.dirty[:count]:
            if isinstance(change, int):
                _resize(self.durable, change)
            else:
                _write(self.durable, *change)
        del self.dirty[:count]

    def forget(self, count: int) -> None:
        """A sync has failed: the pages count as clean, what they hold is not on the disk."""
        del self.dirty[:count]

    def survivor(self, rng: Random, keep: float) -> Inode:
        """What a power loss leaves: of each sector the synced content, or that after some of the later writes."""
        left = Inode(is_folder=self.is_folder)
        image = bytearray(self.durable)
        sector = rng.choice(SECTORS)
        fates: dict[int, int] = {}
        grown = len(self.dirty) if rng.random() < keep else rng.randrange(len(self.dirty) + 1)
        for number, change in enumerate(self.dirty):
            if isinstance(change, int):
                if number < grown:
                    _resize(image, change)
                continue
            offset, data = change
            taken = 0
            while taken < len(data):
                at = offset + taken
                page = at // sector
                size = min(len(data) - taken, (page + 1) * sector - at)
                fate = fates.get(page)
                if fate is None:
                    # Everything, nothing, or up to some write: a page reaches the disk as it is at that moment.
                    fate = fates[page] = len(self.dirty) if rng.random() < keep else rng.randrange(len(self.dirty) + 1)
                if number < fate:
                    _write(image, at, data[taken : taken + size])
                taken += size
        left.cached = image
        left.durable = bytearray(image)
        return left


def _write(image: bytearray, offset: int, data: bytes) -> None:
    end = offset + len(data)
    if offset > len(image):
        _resize(image, offset)
    if end > len(image) and offset < len(image):
        _resize(image, end)
    try:
        image[offset:end] = data
    except BufferError:
        raise AssertionError("a mapped file changes its length") from None


def _resize(image: bytearray, nbytes: int) -> None:
    try:
        if nbytes < len(image):
            del image[nbytes:]
        else:
            image.extend(bytes(nbytes - len(image)))
    except BufferError:
        raise AssertionError("a mapped file changes its length") from None


@frozen
class _Change:
    """One step in the tree of names: what each path is afterwards (None: gone), and the folders it belongs to."""

    paths: tuple[tuple[str, Inode | None], ...]
    folders: tuple[str, ...]


class Disk:
    """One machine's disk: what is on it, and what is wrong with it at the moment."""

    def __init__(self, name: str, rng: Random, *, quota: int = 1 << 30, sync_seconds: float = 0.001) -> None:
        self.name = name
        self.quota = quota
        self.reserved = 0
        """Bytes that somebody else has taken: a full disk."""
        self.sync_seconds = sync_seconds
        self.write_seconds = 0.0
        """What each write to the page cache takes: a disk that throttles its writers."""
        self.stalled_until = 0.0
        """Nothing reaches the disk before this time of the world."""
        self.was_full_until = 0.0
        self.failing_syncs = 0
        self.failing_writes = 0
        self.has_failed = False
        """A write or sync has failed since the machine was made: its node may say so and stop."""
        self.cold = 0.0
        """How often `pread_nowait` finds nothing in the cache."""
        self.used = 0
        self.power_losses = 0
        self.flips: list[tuple[str, int, int]] = []
        """(path, offset, what was there)."""
        self.rng = rng
        root = Inode(is_folder=True)
        self._names: dict[str, Inode] = {"/": root}
        self._durable: dict[str, Inode] = {"/": root}
        self._changes: list[_Change] = []
        self.locks: dict[str, Process] = {}

    # Names

    def find(self, path: str) -> Inode | None:
        return self._names.get(path)

    def names_in(self, folder: str) -> list[str]:
        prefix = folder.rstrip("/") + "/"
        return sorted(
            path[len(prefix) :]
            for path in self._names
            if path.startswith(prefix) and path != "/" and "/" not in path[len(prefix) :]
        )

    def paths(self) -> list[str]:
        """All files, sorted."""
        return sorted(path for path, inode in self._names.items() if not inode.is_folder)

    def paths_below(self, folder: str) -> list[str]:
        """Files and folders, each folder before what is in it."""
        return sorted(path for path in self._names if path.startswith(folder + "/"))

    def change(self, *steps: tuple[str, Inode | None]) -> None:
        folders = []
        for path, inode in steps:
            if parent_of(path) not in folders:
                folders.append(parent_of(path))
            former = self._names.pop(path, None)
            if former is not None:
                former.links -= 1
                if not former.links:
                    self.used -= len(former.cached)
            if inode is not None:
                if not inode.links:
                    self.used += len(inode.cached)
                inode.links += 1
                self._names[path] = inode
        self._changes.append(_Change(steps, tuple(folders)))

    def make_durable(self, folder: str) -> None:
        """Sync a folder: every change that belongs to it."""
        kept = []
        for change in self._changes:
            if folder in change.folders:
                _apply(self._durable, change)
            else:
                kept.append(change)
        self._changes = kept

    def prepare_folder(self, path: str) -> None:
        """A folder that was there before the simulation began."""
        parts = path.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            name = "/" + "/".join(parts[:count])
            if name not in self._names:
                self._names[name] = self._durable[name] = Inode(is_folder=True)

    def wipe(self, folder: str) -> None:
        """Nothing below a folder any more, and that for good."""
        for names in (self._names, self._durable):
            for path in [path for path in names if path.startswith(folder + "/")]:
                del names[path]
        self._changes = [change for change in self._changes if not _is_below(change, folder)]
        self.flips = [flip for flip in self.flips if not flip[0].startswith(folder + "/")]
        self.used = sum(len(inode.cached) for inode in self._names.values())
        self.locks = {}

    # Room

    @property
    def free(self) -> int:
        return max(0, self.quota - self.reserved - self.used)

    def grow(self, inode: Inode, nbytes: int) -> None:
        """Raises OSError (ENOSPC) where a file cannot have so many bytes."""
        more = nbytes - len(inode.cached)
        if more > 0 and inode.links:
            if more > self.free:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.used += more

    # Faults

    def lose_power(self, rng: Random) -> None:
        """Everything that is not on stable storage is at chance. Old files and maps stay with the dead process."""
        self.power_losses += 1
        keep = rng.choice((0.0, 0.0, 0.3, 0.8, 1.0))
        lost: list[str] = []
        for change in self._changes:
            if any(folder in lost for folder in change.folders) or rng.random() >= keep:
                lost.extend(change.folders)
            else:
                _apply(self._durable, change)
        self._changes = []
        copies: dict[int, Inode] = {}
        names: dict[str, Inode] = {}
        self.used = 0
        for path, inode in sorted(self._durable.items()):
            if path != "/" and parent_of(path) not in names:
                continue  # its folder was never on the disk
            copy = copies.get(id(inode))
            if copy is None:
                copy = copies[id(inode)] = inode.survivor(rng, keep)
                self.used += len(copy.cached)
            copy.links += 1
            names[path] = copy
        self._names = names
        self._durable = dict(names)
        self.locks = {}

    def flip_bit(self, path: str, offset: int, bit: int) -> None:
        """A bit of a cold sector turns, in the cache and on the disk alike."""
        inode = self._names[path]
        self.flips.append((path, offset, inode.cached[offset]))
        for image in (inode.cached, inode.durable):
            if offset < len(image):
                image[offset] ^= 1 << bit

    @property
    def rotten(self) -> list[tuple[str, int, int]]:
        """Turned bits that nobody has mended yet."""
        return [
            (path, offset, before)
            for path, offset, before in self.flips
            if (inode := self._names.get(path)) is not None
            and offset < len(inode.cached)
            and (inode.cached[offset] ^ before).bit_count() == 1
        ]

    def written_bytes(self, path: str) -> int:
        """Up to the last byte that is not zero, on stable storage."""
        return len(self._names[path].durable.rstrip(b"\0"))

    def drop_cache(self, inode: Inode) -> None:
        """What is read next comes from the disk."""
        image = bytearray(inode.durable)
        for change in inode.dirty:
            if isinstance(change, int):
                _resize(image, change)
            else:
                _write(image, *change)
        if len(image) == len(inode.cached):
            inode.cached[:] = image


def _apply(names: dict[str, Inode], change: _Change) -> None:
    for path, inode in change.paths:
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode


def _is_below(change: _Change, folder: str) -> bool:
    return any(path.startswith(folder + "/") for path, _ in change.paths)


def parent_of(path: str) -> str:
    return path.rpartition("/")[0] or "/"


class SimFile:
    """`runtime.model.File` of one process."""

    __slots__ = ("_disk", "_inode", "_is_closed", "_machine", "_path", "_process")

    def __init__(self, process: Process, path: str, inode: Inode) -> None:
        self._process = process
        self._machine: Machine = process.machine
        self._disk = process.machine.disk
        self._path = path
        self._inode = inode
        self._is_closed = False

    @property
    def path(self) -> str:
        return self._path

    def _check(self) -> None:
        if self._process.is_dead:
            raise Dead
        if self._is_closed:
            raise OSError(errno.EBADF, "Bad file descriptor")

    def pread(self, nbytes: int, offset: int) -> bytes:
        self._check()
        return bytes(self._inode.cached[offset : offset + nbytes])

    def pread_nowait(self, nbytes: int, offset: int) -> bytes | None:
        self._check()
        if self._disk.cold and self._disk.rng.random() < self._disk.cold:
            return None
        return self.pread(nbytes, offset)

    async def pread_in_thread(self, nbytes: int, offset: int) -> bytes:
        data: bytes = await self._process.run_in_thread(self.pread, nbytes, offset)
        return data

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._check()
        content, was_dead = bytes(data), self._process.is_dead
        try:
            self._process.burn()
        except Dead:
            if not was_dead:  # a kill ends a longer write between two pages: the front of it is done
                front = content[: max(0, (offset + len(content) // 2) // PAGE * PAGE - offset)]
                if front and offset + len(front) <= len(self._inode.cached):
                    self._inode.write(offset, front)
            raise
        disk = self._disk
        if disk.failing_writes:
            disk.failing_writes -= 1
            disk.has_failed = True
            raise OSError(errno.EIO, "Input/output error")
        disk.grow(self._inode, offset + len(content))
        self._inode.write(offset, content)
        if disk.write_seconds:
            if self._process.is_in_thread:
                self._process.debt += disk.write_seconds
            else:
                self._machine.clock.spend(disk.write_seconds)

    def pwritev(self, parts: Sequence[Buffer], offset: int) -> None:
        self.pwrite(b"".join(parts), offset)

    async def sync(self) -> None:
        self._check()
        await trio.lowlevel.checkpoint_if_cancelled()
        process, disk, inode = self._process, self._disk, self._inode
        count = len(inode.dirty)
        shield = process.shielded()
        try:
            with shield:
                await self._machine.delay(disk.sync_seconds * (0.5 + disk.rng.random()))
                while disk.stalled_until > self._machine.time.now:
                    await self._machine.delay(disk.stalled_until - self._machine.time.now)
        finally:
            process.release(shield)
        if process.is_dead:
            await trio.lowlevel.checkpoint()
        self._sync(count)

    def sync_now(self) -> None:
        self._check()
        self._wait_here()
        self._sync(len(self._inode.dirty))

    def _sync(self, count: int) -> None:
        self._process.burn()
        disk = self._disk
        count = min(count, len(self._inode.dirty))
        if disk.failing_syncs:
            disk.failing_syncs -= 1
            disk.has_failed = True
            self._inode.forget(count)
            raise OSError(errno.EIO, "Input/output error")
        self._inode.settle(count)

    def _wait_here(self) -> None:
        _wait_here(self._process)

    def allocate(self, nbytes: int) -> None:
        self._check()
        self._process.burn()
        if nbytes > len(self._inode.cached):
            self._disk.grow(self._inode, nbytes)
            self._inode.resize(nbytes)

    def truncate(self, nbytes: int) -> None:
        self._check()
        self._process.burn()
        self._disk.grow(self._inode, nbytes)
        if self._inode.links:
            self._disk.used -= max(0, len(self._inode.cached) - nbytes)
        self._inode.resize(nbytes)

    def size(self) -> int:
        self._check()
        return len(self._inode.cached)

    def data_extents(self, offset: int) -> list[tuple[int, int]]:
        self._check()
        return [(offset, len(self._inode.cached))] if offset < len(self._inode.cached) else []

    def is_at(self, path: str) -> bool:
        self._check()
        return self._disk.find(path) is self._inode

    def map(self) -> memoryview:
        self._check()
        return memoryview(self._inode.cached).toreadonly()

    def advise(self, kind: str, offset: int = 0, nbytes: int = 0) -> None:
        """Only dropping the cache can be noticed: what is read next comes from the disk."""
        self._check()
        if kind == "dontneed":
            self._disk.drop_cache(self._inode)

    def lock_pages(self) -> bool:
        self._check()
        return True

    def unlock_pages(self) -> None:
        """Nothing was locked."""

    def close(self) -> None:
        self._is_closed = True


def _wait_here(process: Process) -> None:
    """A synchronous wait for the disk: paid for by the thread it happens in."""
    if process.is_in_thread:
        disk = process.machine.disk
        stall = max(0.0, disk.stalled_until - process.machine.time.now)
        process.debt = max(process.debt + disk.sync_seconds * (0.5 + disk.rng.random()), stall)


class SimFiles:
    """`runtime.model.Files` of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._disk = process.machine.disk

    def _check(self) -> None:
        if self._process.is_dead:
            raise Dead

    def open(self, path: str, *, create: bool = False) -> File:
        self._check()
        inode = self._disk.find(path)
        if inode is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
            self._check_folder(parent_of(path))
            self._process.burn()
            inode = Inode()
            self._disk.change((path, inode))
        elif inode.is_folder:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        return SimFile(self._process, path, inode)

    def _check_folder(self, path: str) -> None:
        folder = self._disk.find(path)
        if folder is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        if not folder.is_folder:
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)

    def exists(self, path: str) -> bool:
        self._check()
        return self._disk.find(path) is not None

    def listdir(self, path: str) -> list[str]:
        self._check()
        return self._disk.names_in(path)

    def make_dirs(self, path: str) -> None:
        self._check()
        parts = path.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            name = "/" + "/".join(parts[:count])
            found = self._disk.find(name)
            if found is None:
                self._process.burn()
                self._disk.change((name, Inode(is_folder=True)))
            elif not found.is_folder:
                raise FileExistsError(errno.EEXIST, "File exists", name)

    def read_bytes(self, path: str) -> bytes:
        file = self.open(path)
        return file.pread(file.size(), 0)

    def write_atomic(self, path: str, data: bytes) -> None:
        replace_atomically(self, path, data)

    def rename(self, old: str, new: str) -> None:
        self._check()
        inode = self._disk.find(old)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", old)
        self._check_folder(parent_of(new))
        self._process.burn()
        steps: list[tuple[str, Inode | None]] = [(old, None), (new, inode)]
        if inode.is_folder:
            if self._disk.names_in(new):
                raise OSError(errno.ENOTEMPTY, "Directory not empty", new)
            for path in self._disk.paths_below(old):
                steps += [(path, None), (new + path[len(old) :], self._disk.find(path))]
        self._disk.change(*steps)

    def unlink(self, path: str) -> None:
        self._check()
        inode = self._disk.find(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        if inode.is_folder:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        self._process.burn()
        self._disk.change((path, None))

    def remove_tree(self, path: str) -> None:
        self._check()
        if self._disk.find(path) is None:
            return
        for each in [*reversed(self._disk.paths_below(path)), path]:
            self._process.burn()
            self._disk.change((each, None))

    def sync_dir(self, path: str) -> None:
        self._check()
        self._check_folder(path)
        self._process.burn()
        _wait_here(self._process)
        self._disk.make_durable(path)

    def free_space(self, path: str) -> tuple[int, int]:
        self._check()
        return self._disk.free, self._disk.quota

    def lock(self, path: str) -> AbstractContextManager[None]:
        self._check()
        inode = self._disk.find(path)
        file = f"{path}/lock" if inode is not None and inode.is_folder else path
        self.open(file, create=True)
        holder = self._disk.locks.get(file)
        if holder is not None and not holder.is_dead:
            raise Locked(parent_of(file), holder.pid)
        self._disk.locks[file] = self._process
        return self._held(file)

    @contextmanager
    def _held(self, file: str) -> Iterator[None]:
        try:
            yield
        finally:
            if self._disk.locks.get(file) is self._process:
                del self._disk.locks[file]
