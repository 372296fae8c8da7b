"""A file system whose changes stay in memory: for tools that must not touch what they look at.

Reads go to the files below; whatever is written, cut, renamed or removed is remembered here and forgotten with this
object. So a tool can run the very code that would change a folder, and tell what it would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import trio

from runtime.model import Buffer, File, Files

PAGE_BYTES = 4096


class OverlayFile:
    """`runtime.model.File`: changed pages in memory, the others from the file below."""

    def __init__(self, path: str, below: File | None, on_read: Callable[[int], None] | None = None) -> None:
        self._path = path
        self._below = below
        self._size = below.size() if below is not None else 0
        self._kept = self._size
        """Bytes of the file below that still show: what was cut off once does not come back."""
        self._pages: dict[int, bytearray] = {}
        self._on_read = on_read

    @property
    def path(self) -> str:
        return self._path

    def pread(self, nbytes: int, offset: int) -> bytes:
        end = min(offset + nbytes, self._size)
        if end <= offset:
            return b""
        data = bytearray(end - offset)
        if self._below is not None and offset < self._kept:
            found = self._below.pread(min(end, self._kept) - offset, offset)
            data[: len(found)] = found
            if self._on_read is not None:
                self._on_read(len(found))
        for number in range(offset // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1) if self._pages else ():
            page = self._pages.get(number)
            if page is not None:
                start, stop = max(offset, number * PAGE_BYTES), min(end, (number + 1) * PAGE_BYTES)
                base = number * PAGE_BYTES
                data[start - offset : stop - offset] = page[start - base : stop - base]
        return bytes(data)

    def pread_nowait(self, nbytes: int, offset: int) -> bytes | None:
        return self.pread(nbytes, offset)

    async def pread_in_thread(self, nbytes: int, offset: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.pread(nbytes, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        view = memoryview(data).cast("B")
        end = offset + len(view)
        self._size = max(self._size, end)
        for number in range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)):
            base = number * PAGE_BYTES
            page = self._pages.get(number)
            if page is None:
                page = bytearray(PAGE_BYTES)
                below = self.pread(PAGE_BYTES, base)
                page[: len(below)] = below
                self._pages[number] = page
            start, stop = max(offset, base), min(end, base + PAGE_BYTES)
            page[start - base : stop - base] = view[start - offset : stop - offset]

    def pwritev(self, parts: Sequence[Buffer], offset: int) -> None:
        self.pwrite(b"".join(parts), offset)

    async def sync(self) -> None:
        await trio.lowlevel.checkpoint()

    def sync_now(self) -> None:
        """There is nothing to bring anywhere."""

    def allocate(self, nbytes: int) -> None:
        self._size = max(self._size, nbytes)

    def truncate(self, nbytes: int) -> None:
        if nbytes < self._size:
            last, rest = divmod(nbytes, PAGE_BYTES)
            for number in [number for number in self._pages if number > last or (number == last and not rest)]:
                del self._pages[number]
            if rest and last in self._pages:
                self._pages[last][rest:] = bytes(PAGE_BYTES - rest)
            self._kept = min(self._kept, nbytes)
        self._size = nbytes

    def size(self) -> int:
        return self._size

    def data_extents(self, offset: int) -> list[tuple[int, int]]:
        return [(offset, self._size)] if offset < self._size else []

    def is_at(self, path: str) -> bool:
        return self._path == path

    def map(self) -> memoryview:
        """A copy."""
        return memoryview(self.pread(self._size, 0))

    def advise(self, kind: str, offset: int = 0, nbytes: int = 0) -> None:
        if self._below is not None:
            self._below.advise(kind, offset, nbytes)

    def lock_pages(self) -> bool:
        return False

    def unlock_pages(self) -> None:
        """Nothing is locked."""

    def close(self) -> None:
        """The file stays open for whoever opens it again: its changed pages are here and nowhere else."""

    def release(self) -> None:
        if self._below is not None:
            self._below.close()


class OverlayFiles:
    """`runtime.model.Files` over other files, none of which is changed. `close` gives the descriptors back.

    `on_read` is told how many bytes were read below, each time: for progress.
    """

    def __init__(self, below: Files, on_read: Callable[[int], None] | None = None) -> None:
        self._below = below
        self._on_read = on_read
        self._opened: dict[str, OverlayFile] = {}
        self._gone: set[str] = set()
        """Paths of the files below that were removed or renamed away; with "/" behind them, folders."""
        self._folders: set[str] = set()

    def open(self, path: str, *, create: bool = False) -> File:
        file = self._opened.get(path)
        if file is None:
            if self._is_below(path):
                file = OverlayFile(path, self._below.open(path), self._on_read)
            elif create:
                file = OverlayFile(path, None)
            else:
                raise FileNotFoundError(2, "No such file", path)
            self._opened[path] = file
        return file

    def exists(self, path: str) -> bool:
        return path in self._opened or path in self._folders or self._is_below(path)

    def listdir(self, path: str) -> list[str]:
        names = {name for name in self._below.listdir(path) if self._is_below(f"{path}/{name}")}
        for known in (*self._opened, *self._folders):
            folder, _, name = known.rpartition("/")
            if folder == path:
                names.add(name)
        return sorted(names)

    def make_dirs(self, path: str) -> None:
        self._folders.add(path)

    def read_bytes(self, path: str) -> bytes:
        file = self.open(path)
        return file.pread(file.size(), 0)

    def write_atomic(self, path: str, data: bytes) -> None:
        file = self.open(path, create=True)
        file.truncate(0)
        file.pwrite(data, 0)

    def rename(self, old: str, new: str) -> None:
        self.open(old)
        moved = self._opened.pop(old)
        if (replaced := self._opened.pop(new, None)) is not None:
            replaced.release()
        self._gone.add(old)
        self._opened[new] = moved

    def unlink(self, path: str) -> None:
        if not self.exists(path):
            raise FileNotFoundError(2, "No such file", path)
        if (removed := self._opened.pop(path, None)) is not None:
            removed.release()
        self._gone.add(path)

    def remove_tree(self, path: str) -> None:
        for known in [known for known in self._opened if known.startswith(f"{path}/")]:
            self._opened.pop(known).release()
        self._folders = {known for known in self._folders if known != path and not known.startswith(f"{path}/")}
        self._gone.add(f"{path}/")

    def sync_dir(self, path: str) -> None:
        """There is nothing to bring anywhere."""

    def free_space(self, path: str) -> tuple[int, int]:
        return self._below.free_space(path)

    def lock(self, path: str) -> AbstractContextManager[None]:
        """The lock of the files below: what is looked at must hold still."""
        return self._below.lock(path)

    def close(self) -> None:
        for file in self._opened.values():
            file.release()
        self._opened.clear()

    def _is_below(self, path: str) -> bool:
        return (
            path not in self._gone
            and not any(gone.endswith("/") and f"{path}/".startswith(gone) for gone in self._gone)
            and self._below.exists(path)
        )
