"""The control plane's table in one file: what a name server answers from when it has no quorum, and after a restart."""

from __future__ import annotations

import zlib

from runtime.model import Files

_MAGIC = b"QNS1"


class MirrorDamaged(Exception):
    """The file is there but is not what was written."""


def pack(snapshot: bytes) -> bytes:
    """Magic, CRC, content."""
    return _MAGIC + zlib.crc32(snapshot).to_bytes(4, "big") + snapshot


def unpack(data: bytes, path: str) -> bytes:
    """The content. Raises MirrorDamaged."""
    if len(data) < 8 or data[:4] != _MAGIC or zlib.crc32(data[8:]) != int.from_bytes(data[4:8], "big"):
        raise MirrorDamaged(f"{path} is damaged: restore it from another name server, or remove it to start empty")
    return data[8:]


class Mirror:
    """One file, replaced as a whole."""

    def __init__(self, files: Files, path: str) -> None:
        self._files = files
        self.path = path

    def load(self) -> bytes | None:
        """The last snapshot saved; None where there is none. Raises MirrorDamaged."""
        if not self._files.exists(self.path):
            return None
        return unpack(self._files.read_bytes(self.path), self.path)

    def save(self, snapshot: bytes) -> None:
        """Durable on return. Raises OSError; then the old content stands."""
        self._files.write_atomic(self.path, pack(snapshot))
