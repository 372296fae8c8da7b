"""Term, vote and marks of one node, in two alternating pairs of 64-byte slots (raft.md 4.2).

Slot, little endian: magic u32 | crc u32 | version u8 | flags u8 | vote length u16 | sequence u64 | term u64 |
durable index u64 | identity 8 bytes | boot 4 bytes | vote 16 bytes. The checksum covers everything behind it.

Every slot lies on a page of its own, so that no torn write can hit two. A save writes both slots of one pair with one
sync, the next save those of the other pair: a torn save leaves the pair before it, and a single damaged slot leaves
its twin, so that neither brings an older vote back. The readable slot with the highest sequence counts. When none is
readable the node does not start: a forgotten vote can elect two leaders in one term.

Version 1 had one slot where a pair is now, on the first two pages; it is read, and replaced slot by slot by the saves.
"""

from __future__ import annotations

import hashlib
import struct
from zlib import crc32

import trio
from attrs import evolve, frozen

from dledger.errors import MetaDamaged, NoRoom, StoreFailed
from dledger.store.format import META_FILE, Format
from dledger.store.rows import DISK_FULL
from runtime.model import File, Files

META_MAGIC = 0x51524D54
META_VERSION = 2
SLOT_BYTES = 64
SLOT_DISTANCE = 4096
SLOTS = 4
FLAG_CLEAN = 1
FLAG_RECOVERING = 2
FLAG_ASYNC = 4

_FORGOT = (
    "without term and vote this node must not start; move its folder away and start it with --join: its peers fill it"
)

_SLOT = struct.Struct("<IIBBHQQQ8s4s16s")
assert _SLOT.size == SLOT_BYTES


@frozen(kw_only=True)
class Meta:
    """What one slot says."""

    sequence: int = 0
    term: int = 0
    vote: str | None = None
    durable_index: int = 0
    """Every entry up to here has been on stable storage: evidence that it must never be cut as a torn tail."""
    clean: bool = False
    """Stopped in order, after a last sync of everything."""
    boot: bytes = bytes(4)
    """Short form of the machine's boot id when the slot was written."""
    recovering: bool = False
    """The log may lack entries this node acknowledged: no vote and no campaign until a leader has confirmed it."""
    is_async: bool = False
    """The run that writes this log acknowledges from the page cache, so an end that is not clean may cost it entries,
    whatever the next start is configured to do. Slots of earlier programs do not say."""

    def is_of_boot(self, boot_id: str) -> bool:
        """Whether the machine has not restarted since the run that wrote the log."""
        return self.boot == boot_tag(boot_id)


def identity_of(identity: Format) -> bytes:
    """Eight bytes that tell this node's slots from any other node's."""
    text = "\0".join((identity.cluster_uuid, identity.group_uuid, identity.node_id))
    return hashlib.sha256(text.encode()).digest()[:8]


def boot_tag(boot_id: str) -> bytes:
    return hashlib.sha256(boot_id.encode()).digest()[:4]


def pack_slot(meta: Meta, identity: bytes) -> bytes:
    vote = b"" if meta.vote is None else meta.vote.encode()
    slot = _SLOT.pack(
        META_MAGIC,
        0,
        META_VERSION,
        (FLAG_CLEAN if meta.clean else 0)
        | (FLAG_RECOVERING if meta.recovering else 0)
        | (FLAG_ASYNC if meta.is_async else 0),
        len(vote),
        meta.sequence,
        meta.term,
        meta.durable_index,
        identity,
        meta.boot,
        vote,
    )
    return slot[:4] + crc32(slot[8:]).to_bytes(4, "little") + slot[8:]


def unpack_slot(slot: bytes) -> tuple[Meta, bytes, int] | None:
    """(content, identity, version), or None for a slot that is torn, damaged or was never written."""
    if len(slot) != SLOT_BYTES:
        return None
    magic, crc, version, flags, vote_len, sequence, term, durable, identity, boot, vote = _SLOT.unpack(slot)
    if magic != META_MAGIC or crc != crc32(slot[8:]):
        return None
    return (
        Meta(
            sequence=sequence,
            term=term,
            vote=vote[:vote_len].decode() if vote_len else None,
            durable_index=durable,
            clean=bool(flags & FLAG_CLEAN),
            boot=boot,
            recovering=bool(flags & FLAG_RECOVERING),
            is_async=bool(flags & FLAG_ASYNC),
        ),
        identity,
        version,
    )


def _pair(sequence: int) -> tuple[int, int]:
    """Offsets of the two slots of a save. The first one is where version 1 put its only one."""
    first = (sequence % 2) * SLOT_DISTANCE
    return first, first + 2 * SLOT_DISTANCE


def format_meta(files: Files, folder: str, identity: Format, *, recovering: bool = False) -> None:
    """Write all slots of a new node and sync them. Blocks; for start-up."""
    file = files.open(f"{folder}/{META_FILE}", create=True)
    try:
        own = identity_of(identity)
        file.allocate(SLOTS * SLOT_DISTANCE)
        for sequence in (0, 1):
            slot = pack_slot(Meta(sequence=sequence, clean=True, recovering=recovering), own)
            for offset in _pair(sequence):
                file.pwrite(slot, offset)
        file.sync_now()
    finally:
        file.close()


class MetaFile:
    """The slots of a running node. Saves are serialized; each one writes the older pair and syncs it."""

    def __init__(self, file: File, identity: bytes, meta: Meta) -> None:
        self._file = file
        self._identity = identity
        self._wanted = meta
        self._saved = meta
        # What was read may be in the page cache alone: written by a process that died before its sync, or whose sync
        # failed (and a second sync of clean pages brings nothing to the disk). So the first save always writes; and so
        # does the one behind a save that was not carried through.
        self._is_synced = False
        self._lock = trio.Lock()

    @classmethod
    def open(cls, files: Files, folder: str, identity: Format) -> MetaFile:
        """Read the slots. Raises MetaDamaged, in one sentence, where this node must not start on them."""
        path = f"{folder}/{META_FILE}"
        try:
            file = files.open(path)
        except FileNotFoundError:
            raise MetaDamaged(f"{path} is missing: {_FORGOT}") from None
        own = identity_of(identity)
        found = []
        for number in range(SLOTS):
            slot = unpack_slot(file.pread(SLOT_BYTES, number * SLOT_DISTANCE))
            if slot is None:
                continue
            if slot[2] > META_VERSION:
                file.close()
                raise MetaDamaged(f"{path} has version {slot[2]}, newer than this program knows ({META_VERSION})")
            if slot[1] != own:
                file.close()
                raise MetaDamaged(f"{path} was written by another node; refusing to vote with its term")
            found.append(slot[0])
        if not found:
            file.close()
            raise MetaDamaged(f"all slots of {path} are unreadable: {_FORGOT}")
        return cls(file, own, max(found, key=lambda meta: meta.sequence))

    @property
    def saved(self) -> Meta:
        """What is on stable storage; before the first save of this process, what was read."""
        return self._saved

    @property
    def durable_mark(self) -> int:
        """The mark on stable storage, or on its way there."""
        return max(self._saved.durable_index, self._wanted.durable_index)

    async def save_hard_state(self, term: int, vote: str | None) -> None:
        """Returns when term and vote are on stable storage. Checkpoint. Raises StoreFailed (final)."""
        self._wanted = evolve(self._wanted, term=term, vote=vote)
        await self._save()

    async def save_mark(self, durable_index: int, *, clean: bool = False) -> None:
        """As `save_hard_state`, for the durable mark. A mark may go down, before a cut."""
        self._wanted = evolve(self._wanted, durable_index=durable_index, clean=clean)
        await self._save()

    async def save_started(self, boot: bytes, *, recovering: bool | None = None, is_async: bool = False) -> None:
        """This process writes to the log from now on: no clean stop any more. Checkpoint.

        `recovering` is kept with it, so that a node killed before a leader has confirmed its log does not forget;
        None leaves it as it is. `is_async`: it acknowledges what only the page cache has. To be called once all that
        recovery found is on stable storage, for what an earlier run acknowledged is judged by the former value.
        """
        if recovering is None:
            recovering = self._wanted.recovering
        self._wanted = evolve(self._wanted, clean=False, boot=boot, recovering=recovering, is_async=is_async)
        await self._save()

    async def save_recovering(self, recovering: bool) -> None:
        """As `save_hard_state`, for the recovering flag alone."""
        self._wanted = evolve(self._wanted, recovering=recovering)
        await self._save()

    async def _save(self) -> None:
        async with self._lock:
            latest = evolve(self._wanted, sequence=self._saved.sequence)
            if latest == self._saved and self._is_synced:
                return  # whoever held the lock before us took our values along
            latest = evolve(latest, sequence=latest.sequence + 1)
            # Where the sync is not reached (no room, cancelled), a slot may be left that says what nobody wants any
            # more: then even the former values have to be written again.
            self._is_synced = False
            try:
                slot = pack_slot(latest, self._identity)
                for offset in _pair(latest.sequence):
                    self._file.pwrite(slot, offset)
            except OSError as error:
                # File systems that copy on write need room for this, too. The next try takes the same pair of slots.
                kind = NoRoom if error.errno in DISK_FULL else StoreFailed
                raise kind(f"writing term and vote to {self._file.path} failed: {error}") from error
            try:
                await self._file.sync()
            except OSError as error:
                raise StoreFailed(f"sync of term and vote in {self._file.path} failed: {error}") from error
            self._saved = latest
            self._is_synced = True

    def close(self) -> None:
        self._file.close()
