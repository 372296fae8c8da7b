"""TCP between simulated machines: streams with bounded buffers, latency, cuts, resets and half-open connections.

True to TCP rather than to packets: within a connection order is kept and nothing is lost; a cut direction holds its
bytes back until it heals, then they come after a retransmission; the sender's window fills meanwhile. Reads end at any
byte. What a dead process leaves behind depends on how it died: a killed one's sockets are closed by its kernel, a
machine without power says nothing at all until it is up again and answers with resets.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Final

import trio

from chaos.sim.chance import stream
from chaos.sim.full.clock import Agenda
from chaos.sim.full.machine import Dead, Gate
from runtime.model import Buffer, Listener, Stream

if TYPE_CHECKING:
    from chaos.sim.full.machine import Machine, Process

WINDOW_BYTES: Final = (16_384, 65_536, 262_144)
BACKLOG: Final = 128
SYN_PAUSE_SECONDS: Final = 0.25
RETRANSMIT_SECONDS: Final = (0.05, 0.4)
_END: Final = b""
"""In a pipe: the other side closed in order."""

Observer = Callable[[str, bytes], None]
"""Told of what each link delivers: the link's name and the bytes."""


class Link:
    """One direction between two machines."""

    def __init__(self, name: str, rng: Random, latency: float, jitter: float) -> None:
        self.name = name
        self.rng = rng
        self.latency = latency
        self.jitter = jitter
        self.is_cut = False
        self.healed_at = 0.0
        self.pipes: dict[Pipe, None] = {}

    def draw(self) -> float:
        rng = self.rng
        seconds = self.latency * (0.5 + rng.random())
        if self.jitter and rng.random() < self.jitter:
            seconds += rng.random() * 0.1
        return seconds


class Pipe:
    """The bytes under way in one direction of one connection."""

    __slots__ = ("arrives", "held", "link", "network", "to", "window")

    def __init__(self, network: Network, link: Link, window: int) -> None:
        self.network = network
        self.link = link
        self.window = window
        self.to: SimStream | None = None
        self.held: deque[bytes] = deque()
        self.arrives = 0.0
        link.pipes[self] = None

    def put(self, data: bytes) -> None:
        """`data` will arrive in order; where the link is cut, after it has healed."""
        if self.link.is_cut or self.held:
            self.held.append(data)
            return
        network = self.network
        self.arrives = max(self.arrives, network.now + self.link.draw())
        network.agenda.call_at(self.arrives, lambda: self._arrive(data))

    def release(self) -> None:
        held, self.held = self.held, deque()
        self.arrives = max(self.arrives, self.network.now + self.link.rng.uniform(*RETRANSMIT_SECONDS))
        for data in held:
            self.arrives += 1e-6
            self.network.agenda.call_at(self.arrives, lambda data=data: self._arrive(data))  # type: ignore[misc]

    def _arrive(self, data: bytes) -> None:
        if not data:
            self.close()
        if self.to is not None:
            self.to.arrive(data)

    def close(self) -> None:
        self.link.pipes.pop(self, None)
        self.held.clear()


class SimStream:
    """`runtime.model.Stream`: one end of a connection."""

    def __init__(
        self, process: Process, network: Network, local: tuple[str, int], peer: tuple[str, int], out: Pipe, name: str
    ) -> None:
        self._process = process
        self._machine = process.machine
        self._network = network
        self._local = local
        self._peer = peer
        self._out = out
        self._name = name
        self._rng = out.link.rng
        self.other: SimStream | None = None
        self.taken = 0
        """Bytes this side has handed over that the other program has not read yet."""
        self._in = bytearray()
        self._has_ended = False
        self._is_reset = False
        self.is_closed = False
        self.is_silent = False
        """Its machine lost power: it does not even answer with a reset while that is down."""
        self._has_sent_end = False
        self._is_sending = False
        self._reading: Gate | None = None
        self._writing: Gate | None = None

    @property
    def peer(self) -> tuple[str, int]:
        return self._peer

    @property
    def local(self) -> tuple[str, int]:
        return self._local

    @property
    def process(self) -> Process:
        return self._process

    # Sending

    def send_nowait(self, parts: Sequence[Buffer]) -> int:
        """What fits the window, sometimes less. Raises trio.BrokenResourceError."""
        if self._is_sending:
            raise RuntimeError("send_nowait while send_parts is under way")
        return self._send(b"".join(parts))

    def _send(self, data: bytes | memoryview) -> int:
        if self.is_closed or self._is_reset or self._has_sent_end:
            raise trio.BrokenResourceError(f"{self._peer[0]}:{self._peer[1]}: connection is closed")
        taken = min(len(data), self._out.window - self.taken)
        if taken > 1 and self._rng.random() < self._network.short_writes:
            taken = self._rng.randrange(1, taken)
        if taken > 0:
            self.taken += taken
            self._out.put(bytes(data[:taken]))
        return max(taken, 0)

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        """Send all parts back to back. Checkpoint. Raises trio.BrokenResourceError."""
        if self._is_sending:
            raise RuntimeError("two tasks send on one stream")
        await trio.lowlevel.checkpoint()
        waiting = memoryview(b"".join(parts))
        self._is_sending = True
        try:
            while waiting:
                taken = self._send(waiting)
                waiting = waiting[taken:]
                if waiting:
                    self._writing = Gate(self._machine)
                    try:
                        await self._writing.wait()
                    finally:
                        self._writing = None
        finally:
            self._is_sending = False

    def acknowledge(self, nbytes: int) -> None:
        """The other program has read so much."""
        self.taken -= nbytes
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writing is not None:
            self._writing.open()

    def _wake_reader(self) -> None:
        if self._reading is not None:
            self._reading.open()

    # Receiving

    def arrive(self, data: bytes) -> None:
        """From the wire."""
        if self.is_closed:
            if self.is_silent and not self._machine.is_up:
                return
            # Nobody holds this connection any more: the kernel answers with a reset.
            if data and self.other is not None:
                self._network.reset_later(self.other, self._out.link)
            return
        if self._is_reset:
            return
        self._network.observe(self._name, data)
        if data:
            self._in += data
        else:
            self._has_ended = True
        self._wake_reader()

    async def receive_some(self, max_bytes: int = 262_144) -> bytes:
        """b"" at end of stream. Checkpoint. Raises trio.BrokenResourceError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        has_waited = False
        while True:
            if self.is_closed:
                data = b""
                break
            if self._in:
                nbytes = min(len(self._in), max_bytes)
                if nbytes > 1 and self._rng.random() < self._network.short_reads:
                    nbytes = self._rng.randrange(1, nbytes)
                data = bytes(self._in[:nbytes])
                del self._in[:nbytes]
                if self.other is not None:
                    self._network.acknowledge(self.other, self._out.link, nbytes)
                break
            if self._is_reset:
                raise trio.BrokenResourceError(f"{self._peer[0]}:{self._peer[1]}: Connection reset by peer")
            if self._has_ended:
                data = b""
                break
            if self._reading is not None:
                raise trio.BusyResourceError("two tasks receive from one stream")
            self._reading = Gate(self._machine)
            try:
                await self._reading.wait()
            finally:
                self._reading = None
            has_waited = True
        if not has_waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    # The end

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_closed or self._is_reset:
            raise trio.BrokenResourceError("closed")
        if not self._has_sent_end:
            self._has_sent_end = True
            self._out.put(_END)

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Close at once, from synchronous code; a pending receive returns b""."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._in:
            # Closing with unread bytes is a reset, as Linux does it.
            if self.other is not None:
                self._network.reset_later(self.other, self._out.link)
        elif not self._has_sent_end and not self._is_reset:
            self._has_sent_end = True
            self._out.put(_END)
        self._in = bytearray()
        self._leave()

    def vanish(self) -> None:
        """Its machine has lost power."""
        if not self.is_closed:
            self.is_closed = self.is_silent = True
            self._out.close()
            self._in = bytearray()
            self._leave()

    def reset(self) -> None:
        """The connection is broken: what has arrived but was not read is gone."""
        if not self.is_closed and not self._is_reset:
            self._is_reset = True
            self._in = bytearray()
            self._out.close()
            self._leave()

    def _leave(self) -> None:
        self._network.streams.pop(self, None)
        self._wake_reader()
        self._wake_writer()


class SimListener:
    """`runtime.model.Listener`."""

    def __init__(self, process: Process, network: Network, address: tuple[str, int]) -> None:
        self.process = process
        self._network = network
        self._address = address
        self.backlog: deque[SimStream] = deque()
        self._accepting: Gate | None = None
        self.is_closed = False

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    async def accept(self) -> Stream:
        """Checkpoint. Raises trio.ClosedResourceError after `aclose`."""
        await trio.lowlevel.checkpoint()
        while not self.is_closed:
            if self.backlog:
                return self.backlog.popleft()
            self._accepting = Gate(self.process.machine)
            try:
                await self._accepting.wait()
            finally:
                self._accepting = None
        raise trio.ClosedResourceError(f"listener {self._address[0]}:{self._address[1]} is closed")

    def offer(self, stream: SimStream) -> None:
        self.backlog.append(stream)
        self._wake()

    def _wake(self) -> None:
        if self._accepting is not None:
            self._accepting.open()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._network.listeners.pop(self._address, None)
            waiting, self.backlog = self.backlog, deque()
            for one in waiting:
                one.abort()
            self._wake()


class Network:
    """All links, connections and listeners of a simulation."""

    def __init__(self, seed: int, agenda: Agenda, now: Callable[[], float], observe: Observer) -> None:
        self._seed = seed
        self._now = now
        self.agenda = agenda
        self.observe = observe
        self.latency = 0.0005
        self.jitter = 0.0
        self.short_reads = 0.05
        self.short_writes = 0.02
        self.hosts: dict[str, Machine] = {}
        self.listeners: dict[tuple[str, int], SimListener] = {}
        self.streams: dict[SimStream, None] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._ports: dict[str, int] = {}
        self._rng = stream(seed, "network")
        self.connected = 0

    @property
    def now(self) -> float:
        return self._now()

    def link(self, origin: str, target: str) -> Link:
        """The direction from one host to another."""
        found = self._links.get((origin, target))
        if found is None:
            name = f"{origin}>{target}"
            found = Link(name, stream(self._seed, f"link/{name}"), self.latency, self.jitter)
            if origin == target:
                found.latency, found.jitter = 0.00005, 0.0
            self._links[origin, target] = found
        return found

    def cut(self, origin: str, target: str) -> None:
        """Nothing gets from one host to the other any more."""
        self.link(origin, target).is_cut = True

    def heal(self, origin: str, target: str) -> None:
        link = self.link(origin, target)
        if link.is_cut:
            link.is_cut = False
            for pipe in list(link.pipes):
                if pipe.held:
                    pipe.release()

    def heal_all(self) -> None:
        for origin, target in list(self._links):
            self.heal(origin, target)

    def is_open(self, origin: str, target: str) -> bool:
        """Whether a handshake would get through: both ways, and somebody there to answer."""
        machine = self.hosts.get(target)
        return (
            machine is not None
            and machine.is_up
            and not self.link(origin, target).is_cut
            and not self.link(target, origin).is_cut
        )

    def acknowledge(self, sender: SimStream, back: Link, nbytes: int) -> None:
        """Room in the sender's window, once the way back lets the acknowledgement through."""
        if not back.is_cut:
            sender.acknowledge(nbytes)
        else:
            self.agenda.call_after(SYN_PAUSE_SECONDS, lambda: self.acknowledge(sender, back, nbytes))

    def reset_later(self, stream: SimStream, link: Link) -> None:
        if not link.is_cut:
            self.agenda.call_after(link.draw(), stream.reset)

    def connect(self, process: Process, host: str, listener: SimListener) -> SimStream:
        """Both ends of a new connection; the far one waits in the listener's backlog."""
        here = process.machine.host
        port = self._ports[here] = self._ports.get(here, 40_000) + 1
        local, peer = (here, port), (host, listener.address[1])
        window = self._rng.choice(WINDOW_BYTES)
        out, back = Pipe(self, self.link(here, host), window), Pipe(self, self.link(host, here), window)
        near = SimStream(process, self, local, peer, out, f"{host}:{peer[1]}>{here}:{port}")
        far = SimStream(listener.process, self, peer, local, back, f"{here}:{port}>{host}:{peer[1]}")
        near.other, far.other = far, near
        out.to, back.to = far, near
        self.streams[near] = self.streams[far] = None
        self.connected += 1
        self.agenda.call_after(out.link.draw(), lambda: self._offer(listener, far))
        return near

    def _offer(self, listener: SimListener, far: SimStream) -> None:
        if listener.is_closed or far.process.is_dead:
            far.abort()
        else:
            listener.offer(far)

    def process_died(self, process: Process, *, is_silent: bool) -> None:
        """The kernel closes its sockets; without power nobody does."""
        for listener in list(self.listeners.values()):
            if listener.process is process:
                if is_silent:
                    self.listeners.pop(listener.address, None)
                    listener.is_closed = True
                else:
                    listener.close()
        for each in list(self.streams):
            if each.process is process:
                if is_silent:
                    each.vanish()
                else:
                    each.abort()


class SimNet:
    """`runtime.model.Net` of one process."""

    def __init__(self, process: Process, network: Network) -> None:
        self._process = process
        self._network = network

    async def dial(self, host: str, port: int, *, timeout: float = 3.0) -> Stream:
        """Checkpoint. Raises ConnectionRefusedError, another OSError, or trio.TooSlowError."""
        machine, network = self._process.machine, self._network
        here = machine.host
        with machine.clock.fail_after(timeout):
            while True:
                await machine.delay(network.link(here, host).draw())
                if network.is_open(here, host):
                    listener = network.listeners.get((host, port))
                    if listener is None:
                        await machine.delay(network.link(host, here).draw())
                        raise ConnectionRefusedError(
                            errno.ECONNREFUSED, f"cannot connect to {host}:{port}: Connection refused"
                        )
                    if len(listener.backlog) < BACKLOG:
                        break
                await machine.delay(SYN_PAUSE_SECONDS)
            if self._process.is_dead:
                raise Dead
            stream = network.connect(self._process, host, listener)
            is_heard = False
            try:
                await machine.delay(network.link(host, here).draw())
                is_heard = True
            finally:
                if not is_heard:
                    stream.abort()
            return stream
        raise AssertionError("unreachable")

    async def listen(self, host: str, port: int) -> Listener:
        """Checkpoint. Raises OSError, with the address in its text, where the port is taken."""
        await trio.lowlevel.checkpoint()
        if self._process.is_dead:
            raise Dead
        here = self._process.machine.host
        if port == 0:
            port = 20_000
            while (here, port) in self._network.listeners:
                port += 1
        if (here, port) in self._network.listeners or host not in (here, "0.0.0.0", "127.0.0.1", ""):
            raise OSError(errno.EADDRINUSE, f"cannot listen on {host}:{port}: Address already in use")
        listener = SimListener(self._process, self._network, (here, port))
        self._network.listeners[here, port] = listener
        return listener
