"""A file system in memory that tells the page cache from the disk, and loses power before its n-th operation.

Every change of a page or of a folder is one operation. What was not synced may be lost: all of it, nothing of it, or
at random per file, as a machine without power does it. A rename from one folder to another is one change of both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from runtime.files import replace_atomically
from runtime.model import Buffer

PAGE = 4096


class PowerLoss(Exception):
    """From here on nothing more happens."""


class Inode:
    def __init__(self) -> None:
        self.cached = bytearray()
        self.durable = b""


class Folder:
    def __init__(self) -> None:
        self.cached: dict[str, Inode | Folder] = {}
        self.durable: dict[str, Inode | Folder] = {}


class CrashFile:
    def __init__(self, files: CrashFiles, path: str, inode: Inode) -> None:
        self._files, self._path, self.inode = files, path, inode

    @property
    def path(self) -> str:
        return self._path

    def pread(self, nbytes: int, offset: int) -> bytes:
        return bytes(self.inode.cached[offset : offset + nbytes])

    def pread_nowait(self, nbytes: int, offset: int) -> bytes | None:
        return self.pread(nbytes, offset)

    async def pread_in_thread(self, nbytes: int, offset: int) -> bytes:
        return self.pread(nbytes, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Page by page, from the front: that is how a kill may end it."""
        content, rest = self.inode.cached, memoryview(data)
        while rest:
            part = rest[: PAGE - offset % PAGE]
            self._files.operation(f"pwrite {self._path} {offset}")
            if len(content) < offset + len(part):
                content.extend(bytes(offset + len(part) - len(content)))
            content[offset : offset + len(part)] = part
            rest, offset = rest[len(part) :], offset + len(part)

    def pwritev(self, parts: Sequence[Buffer], offset: int) -> None:
        self.pwrite(b"".join(parts), offset)

    async def sync(self) -> None:
        self.sync_now()

    def sync_now(self) -> None:
        self._files.operation(f"sync {self._path}")
        self.inode.durable = bytes(self.inode.cached)

    def allocate(self, nbytes: int) -> None:
        self._files.operation(f"allocate {self._path}")
        self.inode.cached.extend(bytes(max(0, nbytes - len(self.inode.cached))))

    def truncate(self, nbytes: int) -> None:
        self._files.operation(f"truncate {self._path} {nbytes}")
        content = self.inode.cached
        del content[nbytes:]
        content.extend(bytes(nbytes - len(content)))

    def size(self) -> int:
        return len(self.inode.cached)

    def data_extents(self, offset: int) -> list[tuple[int, int]]:
        return [(offset, len(self.inode.cached))] if offset < len(self.inode.cached) else []

    def is_at(self, path: str) -> bool:
        return self._files.find(path) is self.inode

    def map(self) -> memoryview:
        return memoryview(bytes(self.inode.cached))

    def advise(self, kind: str, offset: int = 0, nbytes: int = 0) -> None:
        return

    def lock_pages(self) -> bool:
        return False

    def unlock_pages(self) -> None:
        return

    def close(self) -> None:
        return


class CrashFiles:
    def __init__(self) -> None:
        self.root = Folder()
        self.operations_left: int | None = None
        self.done: list[str] = []
        self._moves: list[tuple[Folder, str, Folder, str]] = []

    def operation(self, what: str) -> None:
        if self.operations_left is not None:
            if self.operations_left == 0:
                raise PowerLoss(what)
            self.operations_left -= 1
        self.done.append(what)

    def lose_power(self, choose: random.Random | bool) -> None:
        """Start again with what the disk holds; True keeps everything, False drops all that was not synced."""
        self.operations_left = None
        self._lose(self.root, choose, choose if isinstance(choose, bool) else choose.random() < 0.5, {})

    def _lose(self, folder: Folder, choose: random.Random | bool, keeps_names: bool, seen: dict[int, bool]) -> None:
        if not keeps_names:
            folder.cached = dict(folder.durable)
        folder.durable = dict(folder.cached)
        for each in folder.cached.values():
            if isinstance(each, Folder):
                self._lose(each, choose, keeps_names, seen)
            elif id(each) not in seen:
                seen[id(each)] = True
                if not (choose if isinstance(choose, bool) else choose.random() < 0.5):
                    each.cached = bytearray(each.durable)
                each.durable = bytes(each.cached)

    def find(self, path: str) -> Inode | Folder | None:
        here: Inode | Folder | None = self.root
        for part in path.strip("/").split("/"):
            if not isinstance(here, Folder):
                return None
            here = here.cached.get(part)
        return here

    def _above(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.strip("/").rpartition("/")
        folder = self.find(above) if above else self.root
        if not isinstance(folder, Folder):
            raise FileNotFoundError(path)
        return folder, name

    def open(self, path: str, *, create: bool = False) -> CrashFile:
        found = self.find(path)
        if found is None:
            if not create:
                raise FileNotFoundError(path)
            folder, name = self._above(path)
            self.operation(f"create {path}")
            found = folder.cached[name] = Inode()
        assert isinstance(found, Inode)
        return CrashFile(self, path, found)

    def exists(self, path: str) -> bool:
        return self.find(path) is not None

    def listdir(self, path: str) -> list[str]:
        found = self.find(path)
        return sorted(found.cached) if isinstance(found, Folder) else []

    def make_dirs(self, path: str) -> None:
        here = self.root
        for part in path.strip("/").split("/"):
            if part not in here.cached:
                self.operation(f"mkdir {path}")
                here.cached[part] = Folder()
            below = here.cached[part]
            assert isinstance(below, Folder)
            here = below

    def read_bytes(self, path: str) -> bytes:
        return bytes(self.open(path).inode.cached)

    def write_atomic(self, path: str, data: bytes) -> None:
        replace_atomically(self, path, data)

    def rename(self, old: str, new: str) -> None:
        self.operation(f"rename {old} {new}")
        source, old_name = self._above(old)
        target, new_name = self._above(new)
        target.cached[new_name] = source.cached.pop(old_name)
        if source is not target:
            self._moves.append((source, old_name, target, new_name))

    def unlink(self, path: str) -> None:
        folder, name = self._above(path)
        if name not in folder.cached:
            raise FileNotFoundError(path)
        self.operation(f"unlink {path}")
        del folder.cached[name]

    def remove_tree(self, path: str) -> None:
        found = self.find(path)
        if isinstance(found, Folder):
            for name in sorted(found.cached):
                self.remove_tree(f"{path}/{name}")
        if found is not None:
            self.unlink(path)

    def sync_dir(self, path: str) -> None:
        found = self.find(path) if path.strip("/") else self.root
        if not isinstance(found, Folder):
            raise FileNotFoundError(path)
        self.operation(f"sync_dir {path}")
        found.durable = dict(found.cached)
        for source, old_name, target, new_name in [move for move in self._moves if found in (move[0], move[2])]:
            self._moves.remove((source, old_name, target, new_name))
            source.durable.pop(old_name, None)
            if new_name in target.cached:
                target.durable[new_name] = target.cached[new_name]

    def free_space(self, path: str) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def lock(self, path: str) -> AbstractContextManager[None]:
        return nullcontext()
