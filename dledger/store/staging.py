"""A log fetched from a peer, segment by segment, and the switch to it (raft.md 4.7).

Everything is gathered in `incoming/`: what was received is remembered there, so a fetch goes on after a restart. When
all is there, every frame and the chain are verified, everything is synced, and a marker file says that the switch has
begun. From then on it is carried through by `complete_install`, at once or at the next start: each step can be done
again, so a crash at any point ends in the old log (no marker yet) or in the new one. Term and vote are not touched.
"""

from __future__ import annotations

from typing import Any, Self
from zlib import crc32

import cbor2
from attrs import astuple

from dledger.errors import LogDamaged
from dledger.store.base import BASE_FILES, BaseRecord, write_base
from dledger.store.checkpoint import CHECKPOINT_FILES, unpack_checkpoint
from dledger.store.faults import SUSPECTS_FILE
from dledger.store.format import LOG_FOLDER, ROWS_FOLDER
from dledger.store.manifest import CHUNK_BYTES, Manifest, SegmentInfo
from dledger.store.rows import row_of
from dledger.store.segments import Segment, segment_name
from dledger.store.walk import FrameReader
from runtime.model import File, Files

INCOMING_FOLDER = "incoming"
INSTALL_MARK = "install"
_MANIFEST_FILE = "manifest"
_PROGRESS_FILE = "progress"
_REPLACED_FILES = (*BASE_FILES, *CHECKPOINT_FILES)


def encode_manifest(manifest: Manifest) -> bytes:
    """For the staging folder and for the wire."""
    segments = [list(astuple(segment)) for segment in manifest.segments]
    return cbor2.dumps([1, list(astuple(manifest.base)), manifest.segment_bytes, segments])


def decode_manifest(data: bytes) -> Manifest:
    """Raises ValueError for bytes that are no manifest: numbers out of order, a gap between segments."""
    try:
        content: Any = cbor2.loads(data)
        version, base, segment_bytes, segments = content
        manifest = Manifest(BaseRecord(*base), segment_bytes, tuple(SegmentInfo(*segment) for segment in segments))
    except (cbor2.CBORError, TypeError, ValueError) as error:
        raise ValueError(f"not a manifest: {error}") from error
    numbers = [version, segment_bytes, *astuple(manifest.base)]
    for info in manifest.segments:
        numbers.extend(astuple(info))
    if version != 1 or not all(type(number) is int and number >= 0 for number in numbers) or not segment_bytes:
        raise ValueError("not a manifest that this program knows")
    base_position, index = manifest.base.first_base(segment_bytes), manifest.base.index
    for info in manifest.segments:
        if (
            info.base != base_position
            or info.first_index != index + 1
            or info.last_index < info.first_index
            or not info.base < info.end_position <= info.base + segment_bytes
        ):
            raise ValueError(f"manifest: segment {info.base} does not continue what is before it")
        base_position, index = info.base + segment_bytes, info.last_index
    return manifest


def staged_manifest(files: Files, folder: str) -> Manifest:
    """Of the fetch in the staging folder. Raises OSError where there is none, ValueError where it is damaged."""
    return decode_manifest(files.read_bytes(f"{folder}/{INCOMING_FOLDER}/{_MANIFEST_FILE}"))


class Staging:
    """The folder `incoming/` for one manifest. Synchronous; `put` touches the page cache only."""

    def __init__(self, files: Files, folder: str, manifest: Manifest, progress: bytearray) -> None:
        self._files = files
        self._folder = folder
        self._incoming = f"{folder}/{INCOMING_FOLDER}"
        self.manifest = manifest
        self._progress = progress
        self._first_chunk: dict[int, int] = {}
        count = 0
        for info in manifest.segments:
            self._first_chunk[info.base] = count
            count += _chunks(info)
        self._infos = {info.base: info for info in manifest.segments}
        self._open_file: tuple[int, File] | None = None
        self._progress_file = files.open(f"{self._incoming}/{_PROGRESS_FILE}", create=True)

    @classmethod
    def open(cls, files: Files, folder: str, manifest: Manifest) -> Self:
        """Begin, or go on with what an earlier process received of the same manifest. Blocks for a moment.

        Raises ValueError for a manifest that makes no log.
        """
        encoded = encode_manifest(manifest)
        decode_manifest(encoded)
        if not manifest.segments:
            raise ValueError("the manifest has no segments")
        incoming = f"{folder}/{INCOMING_FOLDER}"
        count = sum(_chunks(info) for info in manifest.segments)
        try:
            known = files.read_bytes(f"{incoming}/{_MANIFEST_FILE}") == encoded
            progress = bytearray(files.read_bytes(f"{incoming}/{_PROGRESS_FILE}"))
        except OSError:
            known = False
        if not known or len(progress) != count:
            files.remove_tree(incoming)
            for sub in (incoming, f"{incoming}/{LOG_FOLDER}", f"{incoming}/{ROWS_FOLDER}"):
                files.make_dirs(sub)
            progress = bytearray(count)
            files.write_atomic(f"{incoming}/{_PROGRESS_FILE}", bytes(progress))
            files.write_atomic(f"{incoming}/{_MANIFEST_FILE}", encoded)
        return cls(files, folder, manifest, progress)

    def missing(self) -> list[tuple[int, int, int]]:
        """(segment base, offset, bytes) of what has not been received, ascending."""
        wanted = []
        for info in self.manifest.segments:
            first = self._first_chunk[info.base]
            for number in range(_chunks(info)):
                if not self._progress[first + number]:
                    offset = number * CHUNK_BYTES
                    wanted.append((info.base, offset, min(CHUNK_BYTES, info.used_bytes - offset)))
        return wanted

    def put(self, base: int, offset: int, data: bytes, crc: int) -> None:
        """Keep a chunk that `missing` asked for. Raises ValueError where it is another one or was damaged on the way,
        OSError (ENOSPC) where the disk does not take it.
        """
        info = self._infos.get(base)
        if info is None or offset % CHUNK_BYTES or not 0 <= offset < info.used_bytes:
            raise ValueError(f"nobody asked for the bytes at {offset} of segment {base}")
        if len(data) != min(CHUNK_BYTES, info.used_bytes - offset) or crc32(data) != crc:
            raise ValueError(f"the bytes at {offset} of segment {base} were damaged on the way")
        self._file(base).pwrite(data, offset)
        number = self._first_chunk[base] + offset // CHUNK_BYTES
        self._progress[number] = 1
        self._progress_file.pwrite(b"\1", number)

    def _file(self, base: int) -> File:
        if self._open_file is None or self._open_file[0] != base:
            if self._open_file is not None:
                self._open_file[1].close()
                self._open_file = None
            file = self._files.open(f"{self._incoming}/{LOG_FOLDER}/{segment_name(base)}", create=True)
            self._open_file = base, file
            if file.size() < self.manifest.segment_bytes:
                file.allocate(self.manifest.segment_bytes)
                file.truncate(self.manifest.segment_bytes)
        return self._open_file[1]

    def finish(self, checkpoint: bytes | None) -> None:
        """Verify all, sync all, and begin the switch. Blocks long; run it in a thread.

        `checkpoint` is a peer's checkpoint file as it is. Afterwards close the store and call `complete_install`.
        Raises LogDamaged where a segment's frames are not what the manifest says, OSError where the disk does not take
        them: that segment is then missing again.
        """
        if self.missing():
            raise LogDamaged("not all of the log has been received yet")
        if checkpoint is not None:
            found = unpack_checkpoint(checkpoint)
            if found is None:
                raise LogDamaged("the checkpoint was damaged on the way")
            self._files.write_atomic(f"{self._incoming}/{CHECKPOINT_FILES[0]}", checkpoint)
        base = self.manifest.base
        index, crc, term = base.index, base.head_crc, base.term
        for info in self.manifest.segments:
            index, crc, term = self._verify(info, index, crc, term)
        if base.index:
            write_base(self._files, self._incoming, base)
        for sub in (f"{self._incoming}/{LOG_FOLDER}", f"{self._incoming}/{ROWS_FOLDER}", self._incoming, self._folder):
            self._files.sync_dir(sub)
        self._files.write_atomic(f"{self._folder}/{INSTALL_MARK}", b"switch to incoming\n")

    def _verify(self, info: SegmentInfo, index: int, crc: int, term: int) -> tuple[int, int, int]:
        name = segment_name(info.base)
        file = self._file(info.base)
        rows_file = self._files.open(f"{self._incoming}/{ROWS_FOLDER}/{name}", create=True)
        try:
            segment = Segment(info.base, self.manifest.segment_bytes, file, rows_file)
            reader = FrameReader(segment)
            rows: list[bytes] = []
            position = info.base
            while position < info.end_position:
                entry = reader.entry_at(position - info.base)
                if entry is None or entry.index != index + 1 or entry.prev_crc != crc or entry.term < term:
                    break
                rows.append(row_of(entry))
                index, crc, term, position = entry.index, entry.head_crc, entry.term, entry.end
            if (position, index, crc) != (info.end_position, info.last_index, info.last_crc) or segment.used_from(
                info.used_bytes
            ):
                self._forget(info)
                raise LogDamaged(f"segment {name} as received is damaged at position {position}")
            rows_file.truncate(0)
            rows_file.pwrite(b"".join(rows), 0)
            rows_file.sync_now()
            try:
                file.sync_now()
            except OSError:
                self._forget(info)  # its pages are clean now: another sync would bring nothing to the disk
                raise
        finally:
            rows_file.close()
        return index, crc, term

    def _forget(self, info: SegmentInfo) -> None:
        """Have a segment fetched again, from the first byte on."""
        if self._open_file is not None:
            self._open_file[1].close()
            self._open_file = None
        self._files.unlink(f"{self._incoming}/{LOG_FOLDER}/{segment_name(info.base)}")
        first, count = self._first_chunk[info.base], _chunks(info)
        self._progress[first : first + count] = bytes(count)
        self._progress_file.pwrite(bytes(count), first)

    def close(self) -> None:
        """What was received stays, for the next `open`."""
        if self._open_file is not None:
            self._open_file[1].close()
            self._open_file = None
        self._progress_file.close()

    def discard(self) -> None:
        """Give the fetch up and its space back. Blocks."""
        self.close()
        self._files.remove_tree(self._incoming)


def _chunks(info: SegmentInfo) -> int:
    return -(-info.used_bytes // CHUNK_BYTES)


def complete_install(files: Files, folder: str) -> bool:
    """Carry a switch that has begun through to its end; False where none has. Blocks; before every recovery.

    The store must not be open. The durable mark in the meta slots stays: where it says more than the new log holds,
    recovery reports that as an open end.
    """
    if not files.exists(f"{folder}/{INSTALL_MARK}"):
        return False
    incoming = f"{folder}/{INCOMING_FOLDER}"
    if files.exists(f"{incoming}/{_MANIFEST_FILE}"):  # the last thing to go: before, not everything has been moved
        if files.exists(f"{incoming}/{LOG_FOLDER}"):
            # The old tables and base go first: beside a log that is not theirs they would be false.
            for name in (*_REPLACED_FILES, SUSPECTS_FILE):
                if files.exists(f"{folder}/{name}"):
                    files.unlink(f"{folder}/{name}")
            files.sync_dir(folder)
            files.remove_tree(f"{folder}/{LOG_FOLDER}")
            files.rename(f"{incoming}/{LOG_FOLDER}", f"{folder}/{LOG_FOLDER}")
            files.sync_dir(folder)
            files.sync_dir(incoming)
        if files.exists(f"{incoming}/{ROWS_FOLDER}"):
            files.remove_tree(f"{folder}/{ROWS_FOLDER}")
            files.rename(f"{incoming}/{ROWS_FOLDER}", f"{folder}/{ROWS_FOLDER}")
            files.sync_dir(folder)
            files.sync_dir(incoming)
        for name in _REPLACED_FILES:
            if files.exists(f"{incoming}/{name}"):
                files.rename(f"{incoming}/{name}", f"{folder}/{name}")
        files.sync_dir(folder)
        files.sync_dir(incoming)
        files.unlink(f"{incoming}/{_MANIFEST_FILE}")
        files.sync_dir(incoming)
    files.remove_tree(incoming)
    files.unlink(f"{folder}/{INSTALL_MARK}")
    files.sync_dir(folder)
    return True
