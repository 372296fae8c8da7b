"""Parts of one node's log for another one: entries to repair damage with, and whole segments for a node far behind.

A question (`Fetch`) goes out on the connection the asking node dialled, the answer (`Fetched`, in pieces of at most
256 KiB) comes back on it behind everything else, so that heartbeats never wait for bulk. `FetchServer` answers, at a
bounded rate, from a `LogSource`; `FetchClient` asks. Nothing but what is verified leaves, and the asking side verifies
every entry and its chain again before it builds on it.

An entry that the answering node does not have is a definite no (ABSENT) only where nothing of its own log can have been
forgotten: a node that is recovering, blank or damaged there, or has another entry before damage, says UNSURE or DAMAGED
instead.

Segments that somebody copies are leased: they are not removed until the copy is complete, or its maker is silent, or
away, for too long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol
from zlib import crc32

import trio
from attrs import define, frozen

from dledger.errors import LogDamaged
from dledger.feed import read_entries
from dledger.kick import Kick
from dledger.peers import BULK_PIECE_BYTES_MAX, Link, Peers
from dledger.store.checkpoint import pack_checkpoint, read_checkpoint
from dledger.store.faults import FaultyRange
from dledger.store.log_store import LogStore
from dledger.store.manifest import Manifest, SegmentInfo
from dledger.store.staging import encode_manifest
from dledger.wire import Fetch, Fetched, FetchKind, FetchStatus
from runtime.model import Env

ENTRIES_BYTES_MAX = 1024 * 1024
"""What one answer brings of a range of entries; a single entry may be larger."""
CHUNK_BYTES_MAX = 1024 * 1024
ANSWER_BYTES_MAX = 8 * 1024 * 1024
"""No answer is larger: one entry of the largest size, or the manifest of a log of some 100,000 segments."""
PER_PEER_MAX = 4
"""Questions of one peer that may wait for their answers."""
SILENT_SECONDS_MAX = 10.0
"""An answer whose next piece takes longer will not come."""
LEASE_SECONDS = 600.0
"""How long segments are kept for a peer that stopped asking in the middle of a transfer (raft.md 4.7)."""
LEASE_AWAY_SECONDS = 120.0
"""And for one whose connection has ended, or that has all it wanted and puts it in place now."""
LEASES_MAX = 64
CHECKPOINTS_MAX = 2
"""So many checkpoints are in memory for peers that fetch them; who wants another one has to wait."""
CHECKPOINT_IDLE_SECONDS = 30.0
"""A checkpoint whose next part nobody asks for is given up."""


@frozen
class Answer:
    """How a question ended, and what it brought."""

    status: FetchStatus
    data: bytes = b""
    total: int = 0
    identity: int = 0
    reason: str = ""
    leased_position: int | None = None
    """Segments from this byte of the log on have been promised with it."""

    @property
    def is_ok(self) -> bool:
        return self.status is FetchStatus.OK


class Source(Protocol):
    """What a node can give."""

    async def answer(self, peer: str, fetch: Fetch) -> Answer:
        """To a peer's question. Checkpoint. Raises LogDamaged when the log turns out to be damaged there."""


@define
class _Sent:
    """A checkpoint file's content while a peer fetches it."""

    content: bytes
    identity: int
    asked_at: float


class LogSource:
    """An open log as a source. Of entries behind `committed()` it gives entries, but no segments."""

    def __init__(
        self,
        env: Env,
        folder: str,
        segment_bytes: int,
        store: LogStore,
        *,
        committed: Callable[[], int],
        is_sure: Callable[[], bool],
        faults: Sequence[FaultyRange] = (),
    ) -> None:
        """`is_sure`: whether this node has everything it ever acknowledged. With `faults` it gives only entries
        outside of them."""
        self._env = env
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._store = store
        self._committed = committed
        self._is_sure = is_sure
        self._faults = faults
        self._monotonic = env.clock.monotonic
        self._checkpoints: dict[str, _Sent] = {}
        """By the peer that fetches it. Peers that began at the same one share the bytes."""

    async def answer(self, peer: str, fetch: Fetch) -> Answer:
        if fetch.kind is FetchKind.ENTRIES:
            return await self._entries(fetch.first, fetch.last, fetch.number)
        if self._faults:
            await trio.lowlevel.checkpoint()
            return Answer(FetchStatus.DAMAGED, reason="this node repairs its own log first")
        if fetch.kind is FetchKind.MANIFEST:
            return await self._manifest()
        if fetch.kind is FetchKind.CHUNK:
            return await self._chunk(fetch.first, fetch.last, fetch.number)
        return await self._checkpoint_piece(peer, fetch.first, fetch.last, fetch.number)

    async def _entries(self, first: int, last: int, prev_crc: int) -> Answer:
        await trio.lowlevel.checkpoint()
        store = self._store
        for fault in self._faults:
            if fault.first_index <= last and (fault.is_open or fault.last_index is None or first <= fault.last_index):
                if first >= fault.first_index:
                    return Answer(FetchStatus.DAMAGED, reason=f"damaged here too: {fault}")
                last = fault.first_index - 1
        if not 1 <= first <= last:
            return Answer(FetchStatus.BUSY, reason=f"no such range: {first} to {last}")
        if first < store.first_index:
            return Answer(FetchStatus.GONE, reason=f"the log begins at entry {store.first_index}")
        before = store.head_crc_at(first - 1)
        if before is None or before != prev_crc or first > store.last_index:
            status = FetchStatus.ABSENT if self._is_sure() else FetchStatus.UNSURE
            if before is not None and before != prev_crc:
                if any(fault.first_index > first for fault in self._faults):
                    status = FetchStatus.UNSURE  # before damage may lie an older copy (`dledger.divergence`)
                return Answer(status, reason=f"entry {first - 1} is another one here")
            return Answer(status, reason=f"the log ends at entry {store.last_index}")
        entries = await read_entries(store, self._segment_bytes, first, ENTRIES_BYTES_MAX)
        frames: list[bytes] = []
        size = 0
        for entry in entries:
            size += len(entry.frame)
            if entry.index > last or (frames and size > ENTRIES_BYTES_MAX):
                break
            frames.append(entry.frame)
        if not frames:
            return Answer(FetchStatus.BUSY, reason=f"entry {first} is not on disk yet")
        return Answer(FetchStatus.OK, b"".join(frames))

    async def _manifest(self) -> Answer:
        await trio.lowlevel.checkpoint()
        manifest = committed_manifest(self._store, self._segment_bytes, self._committed())
        if manifest is None:
            return Answer(FetchStatus.BUSY, reason="nothing is committed yet")
        return Answer(FetchStatus.OK, encode_manifest(manifest), leased_position=manifest.segments[0].base)

    async def _chunk(self, base: int, offset: int, nbytes: int) -> Answer:
        store = self._store
        if not nbytes:
            await trio.lowlevel.checkpoint()
            return Answer(FetchStatus.OK)  # the asker's last word: see FetchServer
        end = min(base + self._segment_bytes, store.end_of(self._committed()))
        if base % self._segment_bytes or not 0 < nbytes <= CHUNK_BYTES_MAX or base + offset + nbytes > end:
            await trio.lowlevel.checkpoint()
            return Answer(FetchStatus.BUSY, reason=f"no such chunk: {nbytes} bytes at {base} + {offset}")
        if base < store.first_position:
            await trio.lowlevel.checkpoint()
            return Answer(FetchStatus.GONE, reason=f"the log begins at position {store.first_position}")
        data = await store.read_in_thread(base + offset, nbytes)  # verified, also where the segment is an old one
        if data is None:
            return Answer(FetchStatus.GONE, reason="trimmed meanwhile")
        return Answer(FetchStatus.OK, data)

    async def _checkpoint_piece(self, peer: str, offset: int, nbytes: int, identity: int) -> Answer:
        if offset == 0:
            refusal = await self._begin_checkpoint(peer)
            if refusal is not None:
                return refusal
        else:
            await trio.lowlevel.checkpoint()
        sent = self._checkpoints.get(peer)
        if sent is None or (offset and identity != sent.identity):
            return Answer(FetchStatus.GONE, reason="that checkpoint is not at hand any more")
        sent.asked_at = self._monotonic()
        content = sent.content
        piece = content[offset : offset + min(nbytes, CHUNK_BYTES_MAX)]
        if offset + len(piece) >= len(content):
            del self._checkpoints[peer]
        return Answer(FetchStatus.OK, piece, total=len(content), identity=sent.identity)

    async def _begin_checkpoint(self, peer: str) -> Answer | None:
        """Have the newest checkpoint at hand for a peer; an answer where that cannot be."""
        content, identity = await self._env.run_in_thread(self._read_checkpoint)
        idle_since = self._monotonic() - CHECKPOINT_IDLE_SECONDS
        for other, sent in list(self._checkpoints.items()):
            if other == peer or sent.asked_at < idle_since:
                del self._checkpoints[other]
        if not content:
            return Answer(FetchStatus.ABSENT, reason="there is no checkpoint")
        at_hand = {sent.identity: sent.content for sent in self._checkpoints.values()}
        if identity not in at_hand and len(at_hand) >= CHECKPOINTS_MAX:
            return Answer(FetchStatus.BUSY, reason="other nodes fetch older checkpoints now")
        self._checkpoints[peer] = _Sent(at_hand.get(identity, content), identity, self._monotonic())
        return None

    def _read_checkpoint(self) -> tuple[bytes, int]:
        found = read_checkpoint(self._env.files, self._folder)
        content = pack_checkpoint(found) if found is not None else b""
        return content, crc32(content)


def committed_manifest(store: LogStore, segment_bytes: int, committed: int) -> Manifest | None:
    """What a node far behind is to install: the closed segments, and of the next one what is committed.

    The part of an open segment makes the log reach as far as any checkpoint does, also on an idle cluster. None where
    nothing is committed.
    """
    manifest = store.manifest()
    segments = [segment for segment in manifest.segments if segment.last_index <= committed]
    next_index = segments[-1].last_index + 1 if segments else manifest.base.index + 1
    if next_index <= committed:
        position, crc = store.position_of(next_index), store.head_crc_at(committed)
        if position is None or crc is None:
            return None
        base = position - position % segment_bytes
        segments.append(SegmentInfo(base, next_index, committed, store.end_of(committed), crc))
    return Manifest(manifest.base, manifest.segment_bytes, tuple(segments)) if segments else None


@define
class _Lease:
    """Segments from `position` on are promised to somebody, until `until`."""

    position: int
    until: float
    link: Link | None = None
    """The connection that it was asked for on."""


class FetchServer:
    """Answers the questions of peers, one after the other for each peer, all together at a bounded rate: it spares the
    group's service, so a peer that the service itself waits for is answered as fast as can be.

    A peer that is told of segments has a lease of them, which every further question for a part prolongs. A question
    for a part of no bytes says that it has them all: from then on only what follows them is leased, for a while.
    """

    def __init__(
        self, env: Env, source: Source, bytes_per_second: int, is_waited_for: Callable[[str], bool] = lambda _: False
    ) -> None:
        """`is_waited_for(peer)`: whether the group commits nothing before that peer has caught up."""
        self._env = env
        self._source = source
        self._is_waited_for = is_waited_for
        self._monotonic = env.clock.monotonic
        self._seconds_per_byte = 1.0 / bytes_per_second
        self._paid_until = 0.0
        self._waiting: dict[str, deque[tuple[Link, Fetch]]] = {}
        self._wake: dict[str, Kick] = {}
        self._new_peers: list[str] = []
        self._new_peer = Kick()
        self._leases: dict[str, _Lease] = {}
        self.on_damage: Callable[[LogDamaged], None] | None = None
        """Told when an answer finds damage in this node's own log."""
        self.bytes_sent = 0

    async def run(self) -> None:
        """For ever. Checkpoint."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._new_peer.wait()
                while self._new_peers:
                    nursery.start_soon(self._serve, self._new_peers.pop())

    def submit(self, link: Link, fetch: Fetch) -> None:
        """A peer asks."""
        peer = link.peer
        waiting = self._waiting.get(peer)
        if waiting is None:
            waiting = self._waiting[peer] = deque()
            self._wake[peer] = Kick()
            self._new_peers.append(peer)
            self._new_peer.give()
        while waiting and waiting[0][0].is_closed:
            waiting.popleft()
        if len(waiting) >= PER_PEER_MAX:
            link.close()  # no correct peer asks for more at once
            return
        waiting.append((link, fetch))
        self._wake[peer].give()

    def leased_position(self) -> int | None:
        """Segments from this byte of the log on are needed by a transfer under way; None where there is none."""
        now = self._monotonic()
        for holder, lease in list(self._leases.items()):
            if lease.link is not None and lease.link.is_closed:
                lease.link, lease.until = None, min(lease.until, now + LEASE_AWAY_SECONDS)
            if lease.until < now:
                del self._leases[holder]
        return min([lease.position for lease in self._leases.values()], default=None)

    def lease(self, holder: str, position: int, seconds: float, link: Link | None = None) -> None:
        """Have segments from this byte of the log on kept for somebody, for so long; instead of what was kept for
        them so far."""
        self._leases.pop(holder, None)
        while len(self._leases) >= LEASES_MAX:
            del self._leases[next(iter(self._leases))]
        self._leases[holder] = _Lease(position, self._monotonic() + seconds, link)

    def _lease_for(self, link: Link, fetch: Fetch, answer: Answer) -> None:
        """What a question means for the asker's lease."""
        peer = link.peer
        if answer.leased_position is not None:
            self.lease(peer, answer.leased_position, LEASE_SECONDS, link)
        elif fetch.kind is FetchKind.CHUNK and peer in self._leases:
            if fetch.number:
                self.lease(peer, self._leases[peer].position, LEASE_SECONDS, link)
            else:
                self.lease(peer, fetch.first, LEASE_AWAY_SECONDS)

    async def _serve(self, peer: str) -> None:
        waiting = self._waiting[peer]
        while True:
            await self._wake[peer].wait()
            while waiting:
                link, fetch = waiting.popleft()
                if not link.is_closed:
                    await self._answer(link, fetch)

    async def _answer(self, link: Link, fetch: Fetch) -> None:
        try:
            answer = await self._source.answer(link.peer, fetch)
        except LogDamaged as error:
            answer = Answer(FetchStatus.DAMAGED, reason=str(error))
            if self.on_damage is not None:
                self.on_damage(error)
        self._lease_for(link, fetch, answer)
        data = memoryview(answer.data)
        offset = 0
        while True:
            piece = data[offset : offset + BULK_PIECE_BYTES_MAX]
            offset += len(piece)
            if not self._is_waited_for(link.peer):
                await self._pay(len(piece))
            fetched = Fetched(
                fetch.id,
                answer.status,
                offset < len(data),
                crc32(piece),
                answer.total,
                answer.identity,
                answer.reason[:500],
            )
            if not await link.send_fetched(fetched, piece) or offset >= len(data):
                self.bytes_sent += offset
                return

    async def _pay(self, nbytes: int) -> None:
        """Wait until so many bytes may go."""
        now = self._monotonic()
        if self._paid_until > now:
            await self._env.clock.sleep_until(self._paid_until)
            now = self._monotonic()
        self._paid_until = max(now, self._paid_until) + nbytes * self._seconds_per_byte


@define
class _Pending:
    """A question whose answer is coming in."""

    parts: list[bytes]
    news: trio.Event
    nbytes: int = 0
    answer: Answer | None = None


class FetchClient:
    """Asks peers for parts of their logs."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._last_id = 0
        self.peers: Peers | None = None
        """Set once the connections exist."""
        self.bytes_received = 0

    def sources(self) -> list[str]:
        """Peers that can be asked now."""
        return self.peers.fetchable() if self.peers is not None else []

    def too_old(self) -> list[str]:
        """Peers that are connected, but run a version that cannot be asked."""
        return self.peers.unfetchable() if self.peers is not None else []

    def tell_complete(self, peer: str, position: int) -> None:
        """Nothing before this byte of the log is wanted from a peer any more. To peers that do not know this word it
        is a question without an answer."""
        self._last_id += 1
        if self.peers is not None:
            self.peers.send_fetch(peer, Fetch(self._last_id, FetchKind.CHUNK, position))

    async def ask(self, peer: str, kind: FetchKind, first: int = 0, last: int = 0, number: int = 0) -> Answer:
        """One question; the status is BUSY where there is no answer. Checkpoint, cancel-safe."""
        await trio.lowlevel.checkpoint()
        self._last_id += 1
        key = (peer, self._last_id)
        pending = self._pending[key] = _Pending([], trio.Event())
        try:
            if self.peers is None or not self.peers.send_fetch(peer, Fetch(key[1], kind, first, last, number)):
                return Answer(FetchStatus.BUSY, reason="not connected")
            while pending.answer is None:
                with self._env.clock.move_on_after(SILENT_SECONDS_MAX) as scope:
                    await pending.news.wait()
                if scope.cancelled_caught:
                    return Answer(FetchStatus.BUSY, reason="no answer")
                pending.news = trio.Event()
            return pending.answer
        finally:
            del self._pending[key]

    def receive(self, peer: str, fetched: Fetched, raw: bytes) -> None:
        """A piece of an answer. One that nobody waits for any more is dropped."""
        pending = self._pending.get((peer, fetched.id))
        if pending is None or pending.answer is not None:
            return
        pending.parts.append(raw)
        pending.nbytes += len(raw)
        self.bytes_received += len(raw)
        if pending.nbytes > ANSWER_BYTES_MAX:
            pending.answer = Answer(FetchStatus.BUSY, reason="an answer over the limit")
        elif not fetched.more:
            data = b"".join(pending.parts)
            pending.answer = Answer(fetched.status, data, fetched.total, fetched.identity, fetched.reason)
        pending.news.set()

    def lost(self, peer: str) -> None:
        """The connection has gone, and every answer with it."""
        for (asked, _), pending in self._pending.items():
            if asked == peer and pending.answer is None:
                pending.answer = Answer(FetchStatus.BUSY, reason="the connection was lost")
                pending.news.set()


class Exchange:
    """Both sides, as the connections see them (`dledger.peers.Fetching`)."""

    def __init__(self, server: FetchServer, client: FetchClient) -> None:
        self.server = server
        self.client = client

    def on_fetch(self, link: Link, fetch: Fetch) -> None:
        self.server.submit(link, fetch)

    def on_fetched(self, peer: str, fetched: Fetched, raw: bytes) -> None:
        self.client.receive(peer, fetched, raw)

    def on_unreachable(self, peer: str) -> None:
        self.client.lost(peer)
