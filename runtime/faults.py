"""Disk faults for real processes: a layer over the real file system, switched on from outside (chaos.md 4.2, 4.4).

`QUORATE_FAULTS=<path>` names a JSON file, the *plan*. A process that starts with it puts this layer below everything
it keeps on disk, and says so in one log line; without it nothing of this module is even imported.

    {"boot_id": "second-boot",
     "folders": {"/data/n0": {"lose_unsynced": true, "sync_delay_ms": 5}}}

`boot_id` (read at the start) replaces the machine's: another one than before means that the page cache was lost. Where
a folder loses what is unsynced, every process has one of its own, for its end is a power loss to that folder.
`folders` gives each data folder its faults; the innermost folder that holds a file counts, other files are left alone.
Folders are listed from the start; what is said of them may change at any time (write the plan aside, rename it over):
the file is looked at again, at most every 20 ms, whenever one of the folders is used. See `Faults` for what there is.

**Power loss.** With `lose_unsynced` everything that is not synced is in this process alone: bytes, sizes, new names,
renames and removals. `kill -9` then loses exactly what a power cut may lose, and nothing else. Each file is worked on
in private memory (so maps see unsynced bytes too); a sync brings the changed ranges to the real file. A new file lives
in `FOLDER/.unsynced` until its folder is synced; what a dead process left there is removed when the folder is locked
again. Two things reach the disk at once, as a file system may well do by itself: new folders, and the renaming or
removal of whole folders. The memory needed is that of all bytes in open files: keep segments small.

A fault that a machine shows only while it waits is waited for here, too: a slow or stalled write holds the event loop,
a slow or stalled sync holds its thread.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import attrs
import trio
from attrs import field, frozen

from runtime.files import RealFile, RealFiles, data_extents
from runtime.model import Buffer, File

STAGING = ".unsynced"
_LOOK_EVERY_S = 0.02
_PAGE = 4096
_COPY_BYTES = 1 << 20


class PlanError(OSError):
    """The plan cannot be used: one sentence says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(errno.EINVAL, f"fault plan {path}: {reason}")

    def __str__(self) -> str:
        return str(self.strerror)


def _errno_name(instance: object, attribute: attrs.Attribute[Any], value: str | None) -> None:
    if value is not None and not isinstance(getattr(errno, value, None), int):
        raise ValueError(f"{attribute.name}: {value!r} is no errno, such as EIO or ENOSPC")


@frozen(kw_only=True)
class Faults:
    """What befalls one folder. The default is a healthy disk."""

    lose_unsynced: bool = False
    """Keep everything unsynced in this process. Only read at the start."""
    early_write_back: float = 0.0
    """With `lose_unsynced`: the probability that one page of a write reaches the disk at once, as a page cache may do
    by itself. Makes torn and reordered tails."""
    seed: int = 0
    """For which pages those are."""
    sync_delay_ms: float = 0.0
    """Added to each sync of a file, by whoever waits for it."""
    write_delay_ms: float = 0.0
    """Added to each write."""
    write_fails: str | None = field(default=None, validator=_errno_name)
    """Every write ends with this errno: EIO, ENOSPC, ..."""
    sync_fails: str | None = field(default=None, validator=_errno_name)
    """Every sync of a file does. What it should have brought to the disk is lost, and the next sync tells nobody."""
    read_fails: str | None = field(default=None, validator=_errno_name)
    """Every read does, but not that through a map."""
    stall_writes: bool = False
    """Writes wait until this is false again."""
    stall_syncs: bool = False
    """Syncs of files do."""
    free_bytes: int | None = None
    """So much room is left from the moment this number is first seen: files may grow by as much, then ENOSPC. Removals
    give back. A greater number, or none, is the relief."""
    total_bytes: int | None = None
    """Size of the file system: with it `free_space` tells that size and the room left; without it, as under a quota,
    nothing is seen from there."""


@frozen
class Plan:
    """The file's content."""

    folders: Mapping[str, Faults]
    boot_id: str | None = None


def parse_plan(data: bytes, path: str) -> Plan:
    """Raises PlanError."""
    try:
        document = json.loads(data)
        folders = {str(folder).rstrip("/"): Faults(**faults) for folder, faults in document.pop("folders").items()}
        if relative := [folder for folder in folders if not folder.startswith("/")]:
            raise PlanError(path, f"{relative[0]!r} is no absolute path")
        return Plan(folders=folders, **document)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(path, f"{type(error).__name__}: {error}") from error


class _Control:
    """The plan's file, looked at again now and then by whoever is about to do something."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._next_look = 0.0
        self._lock = threading.Lock()
        self.plan = Plan({})
        self.on_change: list[Callable[[], None]] = []
        self._read()

    def _read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                stat = os.fstat(file.fileno())
                self._seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
                data = file.read()
        except OSError as error:
            raise PlanError(self._path, error.strerror or str(error)) from error
        self.plan = parse_plan(data, self._path)

    def look(self) -> None:
        """Take over a changed plan. A plan that cannot be read ends the operation that looked: no test may go on."""
        now = time.monotonic()
        if now < self._next_look:
            return
        with self._lock:
            self._next_look = now + _LOOK_EVERY_S
            try:
                stat = os.stat(self._path)  # noqa: PTH116
            except OSError as error:
                raise PlanError(self._path, error.strerror or str(error)) from error
            if (stat.st_mtime_ns, stat.st_ino, stat.st_size) == self._seen:
                return
            self._read()
            for callback in self.on_change:
                callback()


class _Folder:
    """One folder of the plan: its present faults, its room, and which names and bytes the disk does not know yet."""

    def __init__(self, control: _Control, path: str) -> None:
        self.path = path
        self._control = control
        self._faults = control.plan.folders[path]
        self.loses_unsynced = self._faults.lose_unsynced
        self._free = self._faults.free_bytes
        self._room_lock = threading.Lock()
        self._chance = random.Random(f"{self._faults.seed}/{path}")
        self._staged = 0
        self._is_clean = False
        self.names_lock = threading.RLock()
        self.names: dict[str, _Inode | None] = {}
        """What a path leads to, where that is not simply what the disk has: None for a removed file."""
        self.pending: set[str] = set()
        """Paths whose present meaning the disk does not know."""
        control.on_change.append(self._change)

    def _change(self) -> None:
        before, self._faults = self._faults, self._control.plan.folders.get(self.path, Faults())
        if self._faults.free_bytes != before.free_bytes:
            with self._room_lock:
                self._free = self._faults.free_bytes

    @property
    def faults(self) -> Faults:
        self._control.look()
        return self._faults

    def before_write(self, path: str) -> None:
        """Wait or raise as a write would."""
        faults = self.faults
        if faults.stall_writes:
            faults = self._wait_while(lambda now: now.stall_writes)
        if faults.write_delay_ms:
            time.sleep(faults.write_delay_ms / 1000)
        if faults.write_fails is not None:
            raise _os_error(faults.write_fails, path)

    def before_sync(self) -> str | None:
        """Wait as a sync would; the name of the errno it must end with."""
        faults = self.faults
        if faults.stall_syncs:
            faults = self._wait_while(lambda now: now.stall_syncs)
        if faults.sync_delay_ms:
            time.sleep(faults.sync_delay_ms / 1000)
        return faults.sync_fails

    def before_read(self, path: str) -> None:
        fails = self.faults.read_fails
        if fails is not None:
            raise _os_error(fails, path)

    def _wait_while(self, stalls: Callable[[Faults], bool]) -> Faults:
        while stalls(faults := self.faults):
            time.sleep(_LOOK_EVERY_S)
        return faults

    def grow(self, nbytes: int, path: str) -> None:
        """Take room for a file, or give it back. Raises OSError (ENOSPC)."""
        self._control.look()
        with self._room_lock:
            if self._free is None:
                return
            if nbytes > max(0, self._free):
                raise _os_error("ENOSPC", path)
            self._free -= nbytes

    def space(self, free: int, total: int) -> tuple[int, int]:
        """(free, total) in bytes, made up or as they are."""
        faults = self.faults
        if faults.total_bytes is None:
            return free, total
        return min(self._free if self._free is not None else free, faults.total_bytes), faults.total_bytes

    def page_written_back(self, start: int, end: int) -> tuple[int, int] | None:
        """The range of a write that reaches the disk at once, if any does."""
        probability = self._faults.early_write_back
        if not probability or self._chance.random() >= probability:
            return None
        page = self._chance.randrange(start // _PAGE, (end + _PAGE - 1) // _PAGE) * _PAGE
        return max(start, page), min(end, page + _PAGE)

    def new_staged_path(self) -> str:
        staging = f"{self.path}/{STAGING}"
        os.makedirs(staging, exist_ok=True)  # noqa: PTH103
        self._staged += 1
        return f"{staging}/{os.getpid()}-{self._staged}"

    def forget_dead_process(self) -> None:
        """What another process had not synced is lost. Called once, when this process has locked the folder."""
        if self.loses_unsynced and not self._is_clean:
            self._is_clean = True
            shutil.rmtree(f"{self.path}/{STAGING}", ignore_errors=True)


def _os_error(name: str, path: str) -> OSError:
    number: int = getattr(errno, name)
    return OSError(number, f"{os.strerror(number)} (injected)", path)


def _private_memory(name: str) -> int:
    """The descriptor of a file that nobody else sees and that goes with the process."""
    create = getattr(os, "memfd_create", None)
    if create is not None:
        return int(create(os.path.basename(name)[:200], os.MFD_CLOEXEC))  # noqa: PTH119
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _copy(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(source, min(_COPY_BYTES, end - start), start)
        if not data:
            return
        os.pwrite(target, data, start)
        start += len(data)


class _Inode:
    """One file that loses what is unsynced: its content in private memory, its durable state in a real file."""

    def __init__(self, folder: _Folder, path: str, *, is_new: bool) -> None:
        self.folder = folder
        self.real_path = folder.new_staged_path() if is_new else path
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if is_new else 0)
        self._real = os.open(self.real_path, flags, 0o644)
        self.memory = _private_memory(path)
        os.ftruncate(self.memory, os.fstat(self._real).st_size)
        for start, end in data_extents(self._real):
            _copy(self._real, self.memory, start, end)
        self.handles = 0
        self._dirty: list[tuple[int, int]] = []
        self._shrunk_to: int | None = None
        self._lock = threading.Lock()
        self._write_back_lock = threading.Lock()

    @property
    def is_dirty(self) -> bool:
        size, real_size = os.fstat(self.memory).st_size, os.fstat(self._real).st_size
        return bool(self._dirty) or self._shrunk_to is not None or size != real_size

    def written(self, start: int, end: int) -> None:
        """Bytes of the memory have changed."""
        with self._lock:
            if self._dirty and self._dirty[-1][0] <= start <= self._dirty[-1][1]:
                self._dirty[-1] = (self._dirty[-1][0], max(end, self._dirty[-1][1]))
            else:
                self._dirty.append((start, end))
        page = self.folder.page_written_back(start, end)
        if page is not None:
            _copy(self.memory, self._real, *page)

    def truncate(self, nbytes: int) -> None:
        with self._lock:
            if nbytes < os.fstat(self.memory).st_size:
                self._shrunk_to = nbytes if self._shrunk_to is None else min(nbytes, self._shrunk_to)
            os.ftruncate(self.memory, nbytes)

    def write_back(self) -> None:
        """Bring everything to the real file. What is written meanwhile may be in it or not."""
        with self._write_back_lock:
            with self._lock:
                dirty, self._dirty = self._dirty, []
                shrunk_to, self._shrunk_to = self._shrunk_to, None
                size = os.fstat(self.memory).st_size
            if shrunk_to is not None:
                os.ftruncate(self._real, shrunk_to)
            os.ftruncate(self._real, size)
            for start, end in dirty:
                _copy(self.memory, self._real, start, min(end, size))
            os.fsync(self._real)

    def lose_dirty(self) -> None:
        """After a failed sync the kernel takes the pages for clean: they are read, but never written."""
        with self._lock:
            self._dirty = []
            self._shrunk_to = None

    @property
    def is_nameless(self) -> bool:
        """Whether the disk knows no name of it yet."""
        return _folder_of(self.real_path) == f"{self.folder.path}/{STAGING}"

    def drop(self) -> None:
        os.close(self.memory)
        os.close(self._real)
        if self.is_nameless:
            os.unlink(self.real_path)  # noqa: PTH108


class FaultyFile(RealFile):
    """A file of a folder of the plan. Its descriptor is the real one, or the private memory of what may be lost."""

    __slots__ = ("_folder", "_inode")

    def __init__(
        self,
        path: str,
        descriptor: int,
        sync_limiter: trio.CapacityLimiter,
        readers: trio.CapacityLimiter,
        folder: _Folder,
        inode: _Inode | None,
    ) -> None:
        super().__init__(path, descriptor, sync_limiter, readers)
        self._folder = folder
        self._inode = inode

    def pread(self, nbytes: int, offset: int) -> bytes:
        """As `RealFile.pread`."""
        self._folder.before_read(self._path)
        return super().pread(nbytes, offset)

    def pread_nowait(self, nbytes: int, offset: int) -> bytes | None:
        """As `RealFile.pread_nowait`."""
        self._folder.before_read(self._path)
        return super().pread_nowait(nbytes, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """As `RealFile.pwrite`."""
        self._before_write(offset, memoryview(data).nbytes)
        super().pwrite(data, offset)
        self._written(offset, memoryview(data).nbytes)

    def pwritev(self, parts: Sequence[Buffer], offset: int) -> None:
        """As `RealFile.pwritev`."""
        nbytes = sum(memoryview(part).nbytes for part in parts)
        self._before_write(offset, nbytes)
        for part in parts:
            super().pwrite(part, offset)
            offset += memoryview(part).nbytes
        self._written(offset - nbytes, nbytes)

    def _before_write(self, offset: int, nbytes: int) -> None:
        self._folder.before_write(self._path)
        self._folder.grow(max(0, offset + nbytes - self.size()), self._path)

    def _written(self, offset: int, nbytes: int) -> None:
        if self._inode is not None and nbytes:
            self._inode.written(offset, offset + nbytes)

    async def sync(self) -> None:
        """As `RealFile.sync`, with the faults in its thread."""
        await trio.to_thread.run_sync(self.sync_now, limiter=self._sync_limiter)

    def sync_now(self) -> None:
        """As `RealFile.sync_now`."""
        fails = self._folder.before_sync()
        if fails is not None:
            if self._inode is not None:
                self._inode.lose_dirty()
            raise _os_error(fails, self._path)
        if self._inode is not None:
            self._inode.write_back()
        else:
            super().sync_now()

    def allocate(self, nbytes: int) -> None:
        """As `RealFile.allocate`."""
        self._folder.before_write(self._path)
        self._folder.grow(max(0, nbytes - self.size()), self._path)
        if self._inode is None:
            super().allocate(nbytes)
        elif nbytes > self.size():
            self._inode.truncate(nbytes)

    def truncate(self, nbytes: int) -> None:
        """As `RealFile.truncate`."""
        self._folder.before_write(self._path)
        self._folder.grow(min(0, nbytes - self.size()), self._path)  # growing makes a hole: no room needed
        if self._inode is None:
            super().truncate(nbytes)
        else:
            self._inode.truncate(nbytes)

    def is_at(self, path: str) -> bool:
        """As `RealFile.is_at`: the private memory itself is nowhere."""
        inode = self._inode
        if inode is None:
            return super().is_at(path)
        with inode.folder.names_lock:
            return inode.folder.names.get(path) is inode

    def close(self) -> None:
        """As `RealFile.close`. What is unsynced stays, as in a page cache."""
        is_open = self._descriptor >= 0
        super().close()
        inode, self._inode = self._inode, None
        if inode is not None and is_open:
            folder = inode.folder
            with folder.names_lock:
                inode.handles -= 1
                _drop_if_settled(folder, inode)


def _drop_if_settled(folder: _Folder, inode: _Inode) -> None:
    """Free the memory of a file that is closed, and of which the disk knows all there is to know."""
    if inode.handles:
        return
    paths = [path for path, each in folder.names.items() if each is inode]
    if paths and (inode.is_dirty or any(path in folder.pending for path in paths)):
        return
    for path in paths:
        del folder.names[path]
    inode.drop()


def _folder_of(path: str) -> str:
    return os.path.dirname(path) or "."  # noqa: PTH120


class FaultyFiles(RealFiles):
    """`runtime.model.Files` with the faults of a plan."""

    def __init__(self, plan_path: str) -> None:
        """Raises PlanError."""
        super().__init__()
        self._control = _Control(plan_path)
        plan = self._control.plan
        self.boot_id = plan.boot_id
        if any(faults.lose_unsynced for faults in plan.folders.values()):
            self.boot_id = f"{plan.boot_id or 'boot'}/{uuid.uuid4().hex}"
        folders = sorted(plan.folders, key=len, reverse=True)
        self._folders = [_Folder(self._control, folder) for folder in folders]

    def _folder(self, path: str) -> _Folder | None:
        path = os.path.abspath(path)  # noqa: PTH100
        for folder in self._folders:
            if path.startswith(f"{folder.path}/") or path == folder.path:
                return folder
        return None

    def _lossy(self, path: str) -> _Folder | None:
        folder = self._folder(path)
        return folder if folder is not None and folder.loses_unsynced else None

    def open(self, path: str, *, create: bool = False) -> File:
        """Read-write. Raises FileNotFoundError unless `create`."""
        folder = self._folder(path)
        if folder is None:
            return super().open(path, create=create)
        inode = None
        if folder.loses_unsynced:
            with folder.names_lock:
                inode = self._inode(folder, path, create)
                inode.handles += 1
                descriptor = os.dup(inode.memory)
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
        return FaultyFile(path, descriptor, self._sync_limiter, self._readers, folder, inode)

    def _inode(self, folder: _Folder, path: str, create: bool) -> _Inode:
        known = folder.names.get(path)
        if known is not None:
            return known
        is_there = path not in folder.names and super().exists(path)
        if not is_there and not create:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not is_there and not os.path.isdir(_folder_of(path)):  # noqa: PTH112
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), _folder_of(path))
        inode = folder.names[path] = _Inode(folder, path, is_new=not is_there)
        if not is_there:
            folder.pending.add(path)
        return inode

    def exists(self, path: str) -> bool:
        """As `RealFiles.exists`."""
        folder = self._lossy(path)
        if folder is not None and path in folder.names:
            return folder.names[path] is not None
        return super().exists(path)

    def listdir(self, path: str) -> list[str]:
        """As `RealFiles.listdir`."""
        names = set(super().listdir(path))
        folder = self._lossy(path)
        if folder is not None:
            names.discard(STAGING)
            with folder.names_lock:
                for known, inode in folder.names.items():
                    if _folder_of(known) == path.rstrip("/"):
                        (names.discard if inode is None else names.add)(os.path.basename(known))  # noqa: PTH119
        return sorted(names)

    def read_bytes(self, path: str) -> bytes:
        """As `RealFiles.read_bytes`."""
        folder = self._folder(path)
        if folder is None:
            return super().read_bytes(path)
        file = self.open(path)
        try:
            return file.pread(file.size(), 0)
        finally:
            file.close()

    def rename(self, old: str, new: str) -> None:
        """As `RealFiles.rename`. Whole folders move at once."""
        folder = self._lossy(old)
        if folder is None or os.path.isdir(old):  # noqa: PTH112
            super().rename(old, new)
            if folder is not None:
                self._move_below(folder, old, new)
            return
        if self._lossy(new) is not folder:
            raise OSError(errno.EXDEV, "a rename from one folder of the fault plan to another", old, None, new)
        with folder.names_lock:
            inode = self._inode(folder, old, create=False)
            self._replace(folder, new, inode)
            self._replace(folder, old, None)

    def unlink(self, path: str) -> None:
        """As `RealFiles.unlink`."""
        folder = self._folder(path)
        if folder is None:
            super().unlink(path)
            return
        if not self.exists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not folder.loses_unsynced:
            size = os.path.getsize(path)  # noqa: PTH202
            super().unlink(path)
            folder.grow(-size, path)
            return
        with folder.names_lock:
            inode = folder.names.get(path)
            size = os.fstat(inode.memory).st_size if inode is not None else os.path.getsize(path)  # noqa: PTH202
            folder.grow(-size, path)
            self._replace(folder, path, None)

    def _replace(self, folder: _Folder, path: str, inode: _Inode | None) -> None:
        before = folder.names.get(path)
        folder.names[path] = inode
        folder.pending.add(path)
        if before is not None and before is not inode and before not in folder.names.values():
            _drop_if_settled(folder, before)

    def remove_tree(self, path: str) -> None:
        """As `RealFiles.remove_tree`, at once."""
        folder = self._lossy(path)
        super().remove_tree(path)
        if folder is not None:
            self._move_below(folder, path, None)

    def _move_below(self, folder: _Folder, old: str, new: str | None) -> None:
        """A folder got another name or none: the names below it go along."""
        with folder.names_lock:
            for known in [known for known in folder.names if known.startswith(f"{old}/")]:
                inode = folder.names.pop(known)
                was_pending = known in folder.pending
                folder.pending.discard(known)
                if new is not None:
                    moved = new + known[len(old) :]
                    folder.names[moved] = inode
                    if was_pending:
                        folder.pending.add(moved)
                    if inode is not None and inode.real_path == known:
                        inode.real_path = moved
                elif inode is not None:
                    _drop_if_settled(folder, inode)

    def sync_dir(self, path: str) -> None:
        """As `RealFiles.sync_dir`."""
        folder = self._lossy(path)
        if folder is not None:
            with folder.names_lock:
                # New names first: what is renamed within the folder must at no moment have none.
                here = sorted(known for known in folder.pending if _folder_of(known) == path.rstrip("/"))
                for known in sorted(here, key=lambda known: folder.names[known] is None):
                    self._settle(folder, known)
        super().sync_dir(path)

    def _settle(self, folder: _Folder, path: str) -> None:
        """Make the disk's meaning of a name the present one."""
        folder.pending.discard(path)
        inode = folder.names[path]
        if inode is None:
            del folder.names[path]
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            return
        if inode.real_path != path:
            if inode.is_nameless:
                os.replace(inode.real_path, path)  # noqa: PTH105
            else:  # the old name goes when its own folder is synced
                aside = folder.new_staged_path()
                os.link(inode.real_path, aside)
                os.replace(aside, path)  # noqa: PTH105
            inode.real_path = path
        _drop_if_settled(folder, inode)

    def free_space(self, path: str) -> tuple[int, int]:
        """As `RealFiles.free_space`, or what the plan says."""
        folder = self._folder(path)
        if folder is None:
            return super().free_space(path)
        return folder.space(*super().free_space(folder.path))

    def lock(self, path: str) -> AbstractContextManager[None]:
        """As `RealFiles.lock`. Lock files themselves know no faults."""
        held = super().lock(path)
        folder = self._folder(path)
        if folder is not None:
            folder.forget_dead_process()
        return held
