"""Connections between the members of a group.

Every node dials every other one. What a node asks (votes, appends, app messages, fetches) goes out on the connection it
dialled, and the answers come back on it, both in order. Sending is synchronous as long as the socket takes the bytes;
the rest waits in a bounded queue for the connection's writer task. Votes pass everything that waits; appends, and so
heartbeats, pass app messages; and what a fetch asked for goes when nothing else is waiting, in pieces of no more than
256 KiB.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import trio

from dledger.config import Address, GroupConfig
from dledger.core.messages import Append, AppendReply, Message, PreVoteReply, VoteReply
from dledger.core.types import Buffer
from dledger.kick import Kick
from dledger.store.format import Format
from dledger.wire import (
    APP_BYTES_MAX,
    KIND_APP,
    KIND_FETCH,
    KIND_FETCHED,
    KIND_HELLO,
    KIND_PING,
    KIND_PONG,
    KIND_PROOF,
    KIND_REFUSED,
    KIND_TRIM_WANTED,
    KIND_WELCOME,
    MESSAGE_BYTES_MAX,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN,
    Fetch,
    Fetched,
    Hello,
    MessageReader,
    Received,
    WireError,
    agree_version,
    decode_fetch,
    decode_fetched,
    decode_hello,
    decode_raft,
    decode_trim_wanted,
    encode,
    encode_fetch,
    encode_fetched,
    encode_raft,
    encode_trim_wanted,
    hello_fields,
    is_proof,
    prove,
)
from runtime.logs import Logger
from runtime.model import Env, Listener, Stream
from runtime.net import give_up_after

RECONNECT_SECONDS_MIN = 0.020
RECONNECT_SECONDS_MAX = 1.0
SETTLED_SECONDS = 1.0
"""A connection that lived for so long was a good one; the next one is dialled without a pause."""
DIAL_SECONDS_MAX = 2.0
HANDSHAKE_SECONDS_MAX = 2.0
PING_AFTER_SECONDS = 1.0
SILENT_SECONDS_MAX = 5.0
"""A dialled connection that answers nothing for so long is dead, whatever TCP says."""
UNANSWERED_SECONDS_MAX = 2.0
"""How long bytes may stay unacknowledged before the system gives a connection up (raft.md 4.14)."""
QUEUE_BYTES_MAX = 16 * 1024 * 1024
QUEUE_MESSAGES_MAX = 1024
APP_QUEUE_BYTES_MAX = 64 * 1024 * 1024
BULK_PIECE_BYTES_MAX = 256 * 1024
"""Largest piece of an answer to a fetch: so much may be before a heartbeat."""
BULK_QUEUE_BYTES_MAX = 256 * 1024
HARD_LOSS_ATTEMPTS = 3
COMPLAINT_SECONDS = 60.0
INCOMING_MAX = 64
"""Connections that may wait for their handshake at once."""


class PeerEvents(Protocol):
    """Who hears of it: the driver. `pump` ends each delivery; the others only note what came."""

    def on_message(self, peer: str, message: Message) -> None: ...

    def on_app_message(self, peer: str, payload: bytes) -> None: ...

    def on_trim_wanted(self, peer: str, position: int) -> None: ...

    def on_peer_up(self, peer: str) -> None: ...

    def on_peer_lost(self, peer: str, hard: bool) -> None: ...

    def pump(self) -> None: ...


class Fetching(Protocol):
    """Who asks peers for parts of their logs, and answers when they ask."""

    def on_fetch(self, link: Link, fetch: Fetch) -> None: ...

    def on_fetched(self, peer: str, fetched: Fetched, raw: bytes) -> None: ...

    def on_unreachable(self, peer: str) -> None:
        """What is under way to this peer will not be answered."""


class Refused(Exception):
    """The other side is not who it should be, or will not have us. The message is for the log."""


class Link:
    """One authenticated connection to a peer."""

    def __init__(
        self, peer: str, stream: Stream, reader: MessageReader, now: float, version: int = PROTOCOL_VERSION
    ) -> None:
        self.peer = peer
        self.version = version
        """The protocol version of this connection."""
        self.stream = stream
        self.reader = reader
        self.since = now
        self.last_received = now
        self.is_closed = False
        self.dropped = 0
        self._urgent: deque[list[Buffer]] = deque()
        self._queue: deque[tuple[list[Buffer], int]] = deque()
        self._queued_bytes = 0
        self._app: deque[list[Buffer]] = deque()
        self._app_bytes = 0
        self._bulk: deque[tuple[list[Buffer], int]] = deque()
        self._bulk_bytes = 0
        self._bulk_room = trio.Event()
        self._rest: list[Buffer] = []
        self._is_writing = False
        self._writer = Kick()

    @property
    def _has_backlog(self) -> bool:
        return self._is_writing or bool(self._rest or self._queue or self._urgent or self._app or self._bulk)

    def send(self, message: Message) -> None:
        """Send now, or queue. Votes pass what is queued; of too much, the oldest Append goes. Order is kept otherwise:
        a heartbeat must not arrive before the entries it names as predecessor.
        """
        parts = encode_raft(message, self.version)
        if not self._has_backlog:
            self._send_now(parts)
            return
        kind = type(message)
        if kind is not Append and kind is not AppendReply:
            self._send_urgent(parts)
            return
        nbytes = sum(map(len, parts))
        self._queue.append((parts, nbytes))
        self._queued_bytes += nbytes
        while len(self._queue) > 1 and (self._queued_bytes > QUEUE_BYTES_MAX or len(self._queue) > QUEUE_MESSAGES_MAX):
            self._queued_bytes -= self._queue.popleft()[1]
            self.dropped += 1
        self._writer.give()

    def _send_urgent(self, parts: list[Buffer]) -> None:
        if len(self._urgent) >= QUEUE_MESSAGES_MAX:
            self._urgent.popleft()
            self.dropped += 1
        self._urgent.append(parts)
        self._writer.give()

    def send_fetch(self, fetch: Fetch) -> bool:
        """Ask; False where the peer's protocol version has no fetches."""
        return self._send_of_version_2(encode_fetch(fetch))

    def send_trim_wanted(self, position: int) -> bool:
        """False where the peer's protocol version has no such message: it knows no trims either."""
        return self._send_of_version_2(encode_trim_wanted(position))

    def _send_of_version_2(self, parts: list[Buffer]) -> bool:
        if self.version < 2 or self.is_closed:
            return False
        if self._has_backlog:
            self._send_urgent(parts)
        else:
            self._send_now(parts)
        return not self.is_closed

    async def send_fetched(self, fetched: Fetched, raw: Buffer = b"") -> bool:
        """A piece of an answer, of at most BULK_PIECE_BYTES_MAX; everything else passes it. False when the connection
        has gone. Checkpoint: waits while earlier pieces wait.
        """
        await trio.lowlevel.checkpoint()
        while self._bulk_bytes >= BULK_QUEUE_BYTES_MAX and not self.is_closed:
            self._bulk_room = trio.Event()
            await self._bulk_room.wait()
        if self.is_closed:
            return False
        parts = encode_fetched(fetched, raw)
        if not self._has_backlog:
            self._send_now(parts)
        else:
            nbytes = sum(map(len, parts))
            self._bulk.append((parts, nbytes))
            self._bulk_bytes += nbytes
            self._writer.give()
        return not self.is_closed

    def send_app(self, payload: bytes) -> bool:
        """False when the queue is full."""
        parts = encode(KIND_APP, (), payload)
        if not self._has_backlog:
            self._send_now(parts)
            return not self.is_closed
        if self._app_bytes + len(payload) > APP_QUEUE_BYTES_MAX or self.is_closed:
            return False
        self._app.append(parts)
        self._app_bytes += len(payload)
        self._writer.give()
        return True

    def send_control(self, kind: int) -> None:
        """A ping or pong; not worth a place in the queue when there is one."""
        if not self._has_backlog:
            self._send_now(encode(kind, ()))

    def _send_now(self, parts: list[Buffer]) -> None:
        if self.is_closed:
            return
        try:
            taken = self.stream.send_nowait(parts)
        except trio.BrokenResourceError:
            self.close()
            return
        for number, part in enumerate(parts):
            nbytes = len(part)
            if taken < nbytes:
                self._rest = [memoryview(part)[taken:] if taken else part, *parts[number + 1 :]]
                self._writer.give()
                return
            taken -= nbytes

    def _next(self) -> Sequence[Buffer]:
        if self._rest:
            parts: Sequence[Buffer] = self._rest
            self._rest = []
            return parts
        if self._urgent:
            return self._urgent.popleft()
        if self._queue:
            parts, nbytes = self._queue.popleft()
            self._queued_bytes -= nbytes
            return parts
        if self._app:
            parts = self._app.popleft()
            self._app_bytes -= len(parts[-1])
            return parts
        parts, nbytes = self._bulk.popleft()
        self._bulk_bytes -= nbytes
        self._bulk_room.set()
        return parts

    async def write_queued(self) -> None:
        """The writer task: sends what `send` had to leave behind. Ends when the connection breaks."""
        while True:
            while self._rest or self._urgent or self._queue or self._app or self._bulk:
                self._is_writing = True
                try:
                    await self.stream.send_parts(self._next())
                except trio.BrokenResourceError:
                    self.close()
                    return
                finally:
                    self._is_writing = False
            self._writer.clear()  # nothing is left of what it was kicked for meanwhile
            await self._writer.wait()

    def close(self) -> None:
        """At once; the reader then sees the end of the stream."""
        if not self.is_closed:
            self.is_closed = True
            self._bulk_room.set()
            self.stream.abort()


class Peers:
    """The member's side of all its connections. `run` is one service; the rest is synchronous."""

    def __init__(
        self,
        env: Env,
        config: GroupConfig,
        identity: Format,
        log: Logger,
        events: PeerEvents,
        fetching: Fetching | None = None,
        *,
        versions: tuple[int, int] = (PROTOCOL_VERSION_MIN, PROTOCOL_VERSION),
    ) -> None:
        """`versions`: the oldest and the newest protocol version to speak."""
        self._env = env
        self._config = config
        self._identity = identity
        self._log = log
        self._events = events
        self._fetching = fetching
        self._versions = versions
        self._rng = env.rng(f"peers/{config.group}/{config.node_id}")
        self._monotonic = env.clock.monotonic
        self._dialled: dict[str, Link] = {}
        self._accepted: dict[str, Link] = {}
        self._complaints: dict[tuple[str, str], float] = {}
        self._addresses: dict[str, tuple[Address, ...]] = {}
        """Whom to dial, and where: the likeliest place first."""
        self._dialling: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._handshakes = trio.CapacityLimiter(INCOMING_MAX)
        self.set_members(dict(config.peers))

    def is_connected(self, peer: str) -> bool:
        return peer in self._dialled

    @property
    def oldest_version(self) -> int:
        """The lowest protocol version in use on any connection to a member; ours where there is none. Others get no
        entries, so what they do not know is no matter."""
        links = [*self._dialled.values(), *self._accepted.values()]
        return min([self._versions[1], *(link.version for link in links if link.peer in self._addresses)])

    def set_members(self, addresses: Mapping[str, Address]) -> None:
        """The members in force, and where they take connections: new ones are dialled, those that went are let go.

        A member that is not found there is dialled where the configuration says: it may have moved. Whoever proves to
        belong to the group may call, a member or not: this log may lack the entry that made a member of it, and maybe
        only the caller, as the leader, can bring that (dissertation 4.1). One that was removed has to learn it, too.
        """
        config = self._config
        wanted: dict[str, tuple[Address, ...]] = {}
        for name in sorted(addresses):
            places = (config.dial.get(name), addresses[name], config.peers.get(name), config.joined.get(name))
            known = tuple(dict.fromkeys(place for place in places if place))
            if name != config.node_id and known:
                wanted[name] = known
        gone = [name for name in self._addresses if name not in wanted]
        added = [name for name in wanted if name not in self._addresses]
        self._addresses = wanted
        for name in gone:
            self._dialling.pop(name, trio.CancelScope()).cancel()
            for link in (self._dialled.get(name), self._accepted.get(name)):
                if link is not None:
                    link.close()
        if self._nursery is not None:
            for name in added:
                self._dial(self._nursery, name)

    def send(self, peer: str, message: Message) -> None:
        """Answers on the connection the question came by, everything else on our own. Dropped when there is none."""
        kind = type(message)
        links = self._accepted if kind in (AppendReply, VoteReply, PreVoteReply) else self._dialled
        link = links.get(peer)
        if link is not None:
            link.send(message)

    def send_fetch(self, peer: str, fetch: Fetch) -> bool:
        """Ask a peer for a part of its log. False when not connected, or it speaks version 1."""
        link = self._dialled.get(peer)
        return link is not None and link.send_fetch(fetch)

    def send_trim_wanted(self, peer: str, position: int) -> bool:
        """Tell the leader up to where this node's disk needs the log to go. False when not connected, or it speaks
        version 1."""
        link = self._dialled.get(peer)
        return link is not None and link.send_trim_wanted(position)

    def fetchable(self) -> list[str]:
        """Peers that can be asked for parts of their logs now."""
        return [peer for peer, link in sorted(self._dialled.items()) if link.version >= 2 and not link.is_closed]

    def unfetchable(self) -> list[str]:
        """Peers that are connected, but speak a version without fetches."""
        return [peer for peer, link in sorted(self._dialled.items()) if link.version < 2 and not link.is_closed]

    def send_app(self, peer: str, payload: bytes) -> bool:
        """False when not connected, too large, or the queue is full."""
        link = self._dialled.get(peer)
        return link is not None and len(payload) <= APP_BYTES_MAX and link.send_app(payload)

    def disconnect(self, peer: str, reason: str) -> None:
        """Close all connections to a peer that misbehaved; it may come back."""
        self._complain(peer, reason)
        for link in (self._dialled.get(peer), self._accepted.get(peer)):
            if link is not None:
                link.close()

    async def look_at(self, node: str, address: Address) -> None:
        """Ask who takes connections at `address`, before the log says that `node` does: a few seconds at most.

        Raises Refused where that is somebody else, OSError or trio.TooSlowError where nobody answers. Checkpoint;
        cancel-safe.
        """
        with self._env.clock.fail_after(DIAL_SECONDS_MAX + HANDSHAKE_SECONDS_MAX):
            stream = await self._env.net.dial(*address, timeout=DIAL_SECONDS_MAX)
            try:
                _, answer = await self._greet(stream, MessageReader(), node)
                if answer.kind == KIND_REFUSED:
                    raise Refused(self._told(_reason(answer)))
                if answer.kind != KIND_WELCOME or len(answer.fields) != 2:
                    raise Refused("no node of a raft group answers there")
                welcome = decode_hello(Received(KIND_WELCOME, answer.fields[0], answer.raw))
                if welcome.node_id != node:
                    raise Refused(f"it is {welcome.node_id}")
            except (trio.BrokenResourceError, WireError) as error:
                raise Refused(f"no node of a raft group answers there ({error})") from error
            finally:
                stream.abort()

    def _told(self, reason: str) -> str:
        """Why a node will have nothing to do with this one, and what to do where its folder is another group's."""
        if " uuid " not in reason:
            return f"it answers: {reason}"
        return (
            f"it answers: {reason}; empty its folder, and start it with --join and"
            f' identity = "{self._identity.cluster_uuid}" in the [[group]] of its cluster.toml'
        )

    async def run(self, listener: Listener) -> None:
        """Accept and dial for ever. Checkpoint."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept, listener)
            nursery.start_soon(self._watch)
            for peer in self._addresses:
                self._dial(nursery, peer)
            self._nursery = nursery

    def _complain(self, who: str, what: str) -> None:
        """One line per peer and reason, not one per attempt."""
        now = self._monotonic()
        last = self._complaints.get((who, what))
        if last is None or now - last > COMPLAINT_SECONDS:
            if len(self._complaints) > 1000:
                self._complaints.clear()
            self._complaints[who, what] = now
            self._log.warning("peer connection refused", peer=who, reason=what)

    # Dialling

    def _dial(self, nursery: trio.Nursery, peer: str) -> None:
        """Until the peer is a member no more, which it may be before the task takes its first step."""
        scope = self._dialling[peer] = trio.CancelScope()
        nursery.start_soon(self._keep_dialled, peer, scope)

    async def _keep_dialled(self, peer: str, scope: trio.CancelScope) -> None:
        with scope:
            await self._dial_for_ever(peer)

    async def _dial_for_ever(self, peer: str) -> None:
        pause = quarrel_pause = RECONNECT_SECONDS_MIN
        is_lost_told = False
        since_loss = HARD_LOSS_ATTEMPTS
        turn = 0
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()  # else its addresses are here
            refused = False
            link = None
            places = self._addresses[peer]
            try:
                stream = await self._env.net.dial(*places[turn % len(places)], timeout=DIAL_SECONDS_MAX)
                link = await self._introduce(peer, stream)
            except ConnectionRefusedError:
                refused = True
            except Refused as error:
                self._complain(peer, str(error))
                pause = RECONNECT_SECONDS_MAX
            except (OSError, trio.TooSlowError, trio.BrokenResourceError, WireError) as error:
                self._log.debug("peer not reached", peer=peer, reason=str(error))
            if link is not None:
                if not is_lost_told and since_loss < HARD_LOSS_ATTEMPTS:
                    self._events.on_peer_lost(peer, False)
                is_lost_told = False
                pause = RECONNECT_SECONDS_MIN
                await self._use_dialled(link)
                since_loss = 0
                if self._monotonic() - link.since >= SETTLED_SECONDS:
                    quarrel_pause = RECONNECT_SECONDS_MIN
                    continue  # at once: being refused now tells that the process is gone
                # The two may fall out over every message (a newer frame version, say): no busy loop of that.
                await self._env.clock.sleep(quarrel_pause * self._rng.uniform(0.75, 1.25))
                quarrel_pause = min(quarrel_pause * 2, RECONNECT_SECONDS_MAX)
                continue
            since_loss += 1
            if not is_lost_told and (refused or since_loss >= HARD_LOSS_ATTEMPTS):
                is_lost_told = True
                self._events.on_peer_lost(peer, refused)
                self._events.pump()
            if since_loss < HARD_LOSS_ATTEMPTS and not is_lost_told:
                await self._env.clock.sleep(0.005)  # dying processes close their listener and connections one by one
                continue
            turn += 1  # only now: where it was a moment ago, being refused tells that its process is gone
            await self._env.clock.sleep(pause * self._rng.uniform(0.75, 1.25))
            pause = min(pause * 2, RECONNECT_SECONDS_MAX)

    async def _use_dialled(self, link: Link) -> None:
        peer = link.peer
        self._dialled[peer] = link
        self._events.on_peer_up(peer)
        self._events.pump()
        try:
            await self._serve(link)
        finally:
            del self._dialled[peer]
            if self._fetching is not None:
                self._fetching.on_unreachable(peer)

    def _hello(self, to: str) -> Hello:
        identity = self._identity
        return Hello(
            self._versions[0],
            identity.cluster,
            identity.cluster_uuid,
            identity.group,
            identity.group_uuid,
            identity.node_id,
            to,
            self._env.ids.boot_id,
            identity.segment_bytes,
            self._env.ids.salt(NONCE_BYTES),
            self._versions[1],
        )

    def _check(self, ours: Hello, theirs: Hello, expected_id: str | None) -> int:
        """The protocol version to use. Raises Refused, with a reason an operator understands."""
        identity = self._identity
        version = agree_version(ours, theirs)
        if version is None:
            raise Refused(
                f"it speaks protocol versions {theirs.version} to {theirs.version_max}, this node {ours.version} to"
                f" {ours.version_max}"
            )
        for what, there, here in (
            ("cluster", theirs.cluster, identity.cluster),
            ("cluster uuid", theirs.cluster_uuid, identity.cluster_uuid),
            ("group", theirs.group, identity.group),
            ("group uuid", theirs.group_uuid, identity.group_uuid),
            ("segment size", theirs.segment_bytes, identity.segment_bytes),
        ):
            if there != here:
                raise Refused(f"its {what} is {there!r}, ours {here!r}")
        if theirs.to != identity.node_id:
            raise Refused(f"this is {identity.node_id!r}, not {theirs.to!r}")
        if theirs.node_id == identity.node_id:
            raise Refused(f"{theirs.node_id!r} is not another member of group {identity.group}")
        if expected_id is not None and theirs.node_id != expected_id:
            raise Refused(f"{theirs.node_id!r} answers where {expected_id!r} should be")
        if len(theirs.nonce) != NONCE_BYTES:
            raise Refused("its nonce has the wrong size")
        return version

    async def _greet(self, stream: Stream, reader: MessageReader, to: str) -> tuple[Hello, Received]:
        """Say who is calling whom. Returns what was said, and the first answer."""
        give_up_after(stream, UNANSWERED_SECONDS_MAX)
        hello = self._hello(to)
        await stream.send_parts(encode(KIND_HELLO, hello_fields(hello, self._versions[1])))
        return hello, await _receive_one(stream, reader)

    async def _introduce(self, peer: str, stream: Stream) -> Link:
        """The dialling side of the handshake. Raises Refused, WireError or trio's errors; the stream is closed then."""
        reader = MessageReader()
        try:
            with self._env.clock.fail_after(HANDSHAKE_SECONDS_MAX):
                hello, answer = await self._greet(stream, reader, peer)
                if answer.kind == KIND_REFUSED:
                    raise Refused(f"refused us: {_reason(answer)}")
                if answer.kind != KIND_WELCOME or len(answer.fields) != 2:
                    raise Refused("answers with something else than a welcome")
                welcome = decode_hello(Received(KIND_WELCOME, answer.fields[0], answer.raw))
                version = self._check(hello, welcome, peer)
                secret = self._config.secret
                if not is_proof(prove(secret, b"accept", hello, welcome, version), answer.fields[1]):
                    raise Refused("does not know our secret")
                await stream.send_parts(encode(KIND_PROOF, (prove(secret, b"dial", hello, welcome, version),)))
                answer = await _receive_one(stream, reader)
                if answer.kind != KIND_PONG:
                    raise Refused(f"refused us: {_reason(answer)}")
        except BaseException:
            stream.abort()
            raise
        reader.limit = MESSAGE_BYTES_MAX
        return Link(peer, stream, reader, self._monotonic(), version)

    # Accepting

    async def _accept(self, listener: Listener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                stream = await listener.accept()
                if self._handshakes.available_tokens < 1:
                    stream.abort()
                    continue
                nursery.start_soon(self._serve_accepted, stream)

    async def _serve_accepted(self, stream: Stream) -> None:
        link = None
        try:
            async with self._handshakes:
                link = await self._admit(stream)
        except (Refused, WireError) as error:
            self._complain(f"{stream.peer[0]} (calling)", str(error))
        except (trio.TooSlowError, trio.BrokenResourceError) as error:
            self._log.debug("handshake not finished", address=stream.peer, reason=str(error))
        finally:
            if link is None:
                stream.abort()
        if link is None:
            return
        former = self._accepted.get(link.peer)
        if former is not None:
            former.close()
        self._accepted[link.peer] = link
        try:
            await self._serve(link)
        finally:
            if self._accepted.get(link.peer) is link:
                del self._accepted[link.peer]

    async def _admit(self, stream: Stream) -> Link:
        """The accepting side of the handshake."""
        reader = MessageReader()
        give_up_after(stream, UNANSWERED_SECONDS_MAX)
        with self._env.clock.fail_after(HANDSHAKE_SECONDS_MAX):
            first = await _receive_one(stream, reader)
            if first.kind != KIND_HELLO:
                raise Refused("does not begin with a hello")
            hello = decode_hello(first)
            try:
                welcome = self._hello(hello.node_id)
                version = self._check(welcome, hello, None)
                secret = self._config.secret
                fields = hello_fields(welcome, self._versions[1])
                await stream.send_parts(
                    encode(KIND_WELCOME, (fields, prove(secret, b"accept", hello, welcome, version)))
                )
                proof = await _receive_one(stream, reader)
                if proof.kind != KIND_PROOF or len(proof.fields) != 1:
                    raise Refused("does not prove who it is")
                if not is_proof(prove(secret, b"dial", hello, welcome, version), proof.fields[0]):
                    raise Refused("does not know our secret")
            except Refused as error:
                with suppress(trio.BrokenResourceError):
                    await stream.send_parts(encode(KIND_REFUSED, (str(error),)))
                raise
            await stream.send_parts(encode(KIND_PONG, ()))
        reader.limit = MESSAGE_BYTES_MAX
        return Link(hello.node_id, stream, reader, self._monotonic(), version)

    # Both

    async def _serve(self, link: Link) -> None:
        """Read until the end; the writer goes with the reader."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.write_queued)
            try:
                await self._read(link)
            finally:
                link.close()
                nursery.cancel_scope.cancel()

    async def _read(self, link: Link) -> None:
        """Deliver until the connection ends. What the deliveries raise is not the connection's fault and goes up."""
        peer = link.peer
        events = self._events
        feed = link.reader.feed
        receive = link.stream.receive_some
        monotonic = self._monotonic
        while True:
            try:
                data = await receive()
                if not data:
                    return
                link.last_received = monotonic()
                arrived = [(received, _decode(link, received)) for received in feed(data)]
            except trio.BrokenResourceError as error:
                self._log.debug("peer connection broke", peer=peer, reason=str(error))
                return
            except WireError as error:
                self._complain(peer, str(error))
                return
            for received, decoded in arrived:
                kind = received.kind
                if kind < KIND_APP:
                    events.on_message(peer, decoded)
                elif kind == KIND_APP:
                    events.on_app_message(peer, bytes(received.raw))
                elif kind == KIND_PING:
                    link.send_control(KIND_PONG)
                elif kind == KIND_TRIM_WANTED:
                    events.on_trim_wanted(peer, decoded)
                elif self._fetching is not None and kind == KIND_FETCH:
                    self._fetching.on_fetch(link, decoded)
                elif self._fetching is not None and kind == KIND_FETCHED:
                    self._fetching.on_fetched(peer, decoded, bytes(received.raw))
            events.pump()

    async def _watch(self) -> None:
        """Ping dialled connections, and give up those that have gone silent (raft.md 4.14)."""
        while True:
            await self._env.clock.sleep(PING_AFTER_SECONDS)
            now = self._monotonic()
            for link in list(self._dialled.values()):
                if now - link.last_received > SILENT_SECONDS_MAX:
                    link.close()
                elif now - link.last_received > PING_AFTER_SECONDS / 2:
                    link.send_control(KIND_PING)
            for link in list(self._accepted.values()):
                if now - link.last_received > 2 * SILENT_SECONDS_MAX:
                    link.close()


_DECODE_OF_VERSION_2: dict[int, Callable[[Received], Any]] = {
    KIND_FETCH: decode_fetch,
    KIND_FETCHED: decode_fetched,
    KIND_TRIM_WANTED: decode_trim_wanted,
}


def _decode(link: Link, received: Received) -> Any:
    """What a message says, where it is not just bytes. Raises WireError."""
    kind = received.kind
    if kind < KIND_APP:
        return decode_raft(received)
    decode = _DECODE_OF_VERSION_2.get(kind)
    if decode is None:
        return None
    if link.version < 2:
        raise WireError(f"a message of kind {kind} in protocol version {link.version}")
    return decode(received)


def _reason(refused: Received) -> str:
    """Why the other side will not have us, as it says; nothing where it does not."""
    return " ".join(str(field) for field in refused.fields[:1])


async def _receive_one(stream: Stream, reader: MessageReader) -> Received:
    """The next message of a handshake. Raises WireError also for the end of the stream, or for more than one."""
    while True:
        data = await stream.receive_some()
        if not data:
            raise trio.BrokenResourceError("closed during the handshake")
        received = reader.feed(data)
        if len(received) > 1:
            raise WireError("more than one message at once in a handshake")
        if received:
            return received[0]
