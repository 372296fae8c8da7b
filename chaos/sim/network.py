"""Connections between simulated nodes, as TCP gives them: in order, late rather than lost, broken as a whole.

Every node dials every other one. What it asks goes out on the connection it dialled and the answers come back on it:
two connections between two nodes, four streams. Lost packets delay a stream (retransmission; what is behind waits
too). A cut is directed: it holds back data one way and acknowledgements the other way, and each end gives the
connection up by itself when its data was not acknowledged for the user timeout; until the other end has noticed as
well, the connection is half open. A dead process refuses new connections at once, a dead machine and a cut stay silent.
Buffers are bounded: when a stream is full, its oldest entries are dropped and heartbeats go through.

Some seeds play a network that is worse than TCP (`plan.tcp` is False): single messages are dropped, doubled, or doubled
long after; a correct core bears all that. Nothing reaches a process that was started after it was sent.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from attrs import define, field

from chaos.sim.chance import stream
from chaos.sim.properties import PropertyBroken
from dledger.core.events import PeerLost, PeerUp, Receive
from dledger.core.messages import Append, AppendReply, Message, PreVoteReply, VoteReply
from dledger.wire import MESSAGE_BYTES_MAX, MessageReader, decode_raft, encode_raft

if TYPE_CHECKING:
    from random import Random

    from chaos.sim.world import World

CODEC_EVERY = 20
"""One message in so many passes through the real codec, cut at a random byte (chaos.md 5.3)."""
REPLIES = (AppendReply, PreVoteReply, VoteReply)
USER_TIMEOUT = 2.0
RECONNECT_SECONDS_MIN = 0.02
RECONNECT_SECONDS_MAX = 1.0
SYN_SECONDS = 1.0
"""A dial into silence is tried again after this."""
RTO_SECONDS = 0.2
"""First retransmission of a lost packet; doubles each time."""
INBOX_MAX = 2000
"""What a process that stands still lets its kernel keep for it, over all connections."""


def through_codec(message: Message, cut: float) -> Message:
    """The message as it comes out of the real wire codec, fed in two pieces. Raises PropertyBroken if it changed."""
    data = b"".join(encode_raft(message))
    reader = MessageReader(MESSAGE_BYTES_MAX)
    middle = int(len(data) * cut)
    received = reader.feed(data[:middle]) + reader.feed(data[middle:])
    decoded = [decode_raft(one) for one in received]
    if len(decoded) != 1 or encode_raft(decoded[0]) != encode_raft(message) or type(decoded[0]) is not type(message):
        raise PropertyBroken(f"wire codec: it turns {message} into {decoded}")
    return decoded[0]


@define(eq=False)
class Stream:
    """One direction of a connection: what was sent and not yet read, in order."""

    source: str
    target: str
    rng: Random
    queue: deque[Message | None] = field(factory=deque)
    owed: int = 0
    """Deliveries that fell due while the way was cut; made up for when it is healed."""
    busy_until: float = 0.0
    sent: int = 0


@define(eq=False)
class Conn:
    """The connection that `dialer` makes to `acceptor`."""

    dialer: str
    acceptor: str
    requests: Stream
    replies: Stream
    is_up: bool = False
    """As the dialer sees it."""
    is_accepted: bool = False
    """As the acceptor sees it. With only one of the two the connection is half open."""
    epoch: int = 0
    is_dialling: bool = False
    attempts: int = 0
    is_loss_told: bool = True


class Network:
    """All connections of a group."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._plan = world.plan
        seed = world.plan.seed
        self.conns: dict[tuple[str, str], Conn] = {}
        for a in world.names:
            for b in world.names:
                if a != b:
                    self.conns[a, b] = Conn(
                        a,
                        b,
                        Stream(a, b, stream(seed, f"conn/{a}/{b}/requests")),
                        Stream(b, a, stream(seed, f"conn/{a}/{b}/replies")),
                    )
        self._cuts: dict[tuple[str, str], int] = {}
        self._slow: dict[tuple[str, str], float] = {}
        self.is_calm = False
        self.delivered = 0
        self.dropped = 0

    def send(self, source: str, target: str, message: Message) -> None:
        if isinstance(message, REPLIES):
            conn = self.conns[target, source]
            if not conn.is_accepted:
                return
            line = conn.replies
        else:
            conn = self.conns[source, target]
            if not conn.is_up:
                return
            if not conn.is_accepted:
                return  # nobody reads there any more; the answer is a reset, or silence
            line = conn.requests
        plan, world = self._plan, self._world
        now = world.now
        line.sent += 1
        chance, jitter = line.rng.random(), line.rng.random()
        if line.sent % CODEC_EVERY == 0:
            message = through_codec(message, jitter)
        delay = plan.latency * (0.5 + jitter)
        if self._slow:
            delay += self._slow.get((source, target), 0.0) * (0.5 + jitter)
        if not self.is_calm:
            if chance < plan.late:
                # Read from the buffer of this connection after a newer one stands.
                self._stray(now + delay + jitter * 1.5, line, message)
            elif not plan.tcp:
                if chance < plan.late + plan.drop:
                    self.dropped += 1
                    return
                if chance < plan.late + plan.drop + plan.duplicate:
                    self._stray(now + delay + jitter * 0.02, line, message)
            elif chance < plan.late + plan.drop:
                delay += RTO_SECONDS * (1.0 if jitter < 0.7 else 3.0 if jitter < 0.9 else 7.0)
            if chance > 0.998:
                delay += jitter * 0.4
        if plan.bytes_per_second and isinstance(message, Append) and message.entries:
            size = sum([len(entry.frame) for entry in message.entries])
            delay += size / plan.bytes_per_second
        if len(line.queue) >= plan.buffer_messages:
            self._make_room(line)
        line.queue.append(message)
        at = max(now + delay, line.busy_until)
        line.busy_until = at
        world.at(at, self._deliver, conn.epoch, conn, line)

    def _make_room(self, line: Stream) -> None:
        """The send queue is full: the oldest entries are given up, the newest message goes in (raft.md 4.14)."""
        self._world.reached("buffer-full")
        queue = line.queue
        for number, message in enumerate(queue):
            if isinstance(message, Append) and message.entries:
                queue[number] = None
                self.dropped += 1
                return
        queue[0] = None

    def _stray(self, at: float, line: Stream, message: Message) -> None:
        incarnation = self._world.nodes[line.target].incarnation
        self._world.at(at, self._deliver_stray, line, incarnation, message)

    def _deliver_stray(self, line: Stream, incarnation: int, message: Message) -> None:
        node = self._world.nodes[line.target]
        if node.incarnation == incarnation and not self._cuts.get((line.source, line.target)):
            node.post(Receive, line.source, message)

    def _deliver(self, epoch: int, conn: Conn, line: Stream) -> None:
        if epoch != conn.epoch:
            return
        if self._cuts.get((line.source, line.target)):
            line.owed += 1
            return
        node = self._world.nodes[line.target]
        if node.is_paused and node.inbox_length >= INBOX_MAX:
            self._world.at(node.paused_until, self._deliver, epoch, conn, line)
            return
        if not line.queue:
            return  # given up with the process that would have read it
        message = line.queue.popleft()
        if message is not None:
            self.delivered += 1
            node.post(Receive, line.source, message)

    # Faults

    def is_cut(self, a: str, b: str) -> bool:
        """Whether no connection could be made between the two: that needs both ways."""
        return bool(self._cuts) and bool(self._cuts.get((a, b)) or self._cuts.get((b, a)))

    def cut(self, source: str, target: str) -> None:
        """No packet gets from `source` to `target`: neither its data nor its acknowledgements of the other's data."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1
        now = self._world.now
        for conn in (self.conns[source, target], self.conns[target, source]):
            for is_dialer in (True, False):
                rng = conn.requests.rng if is_dialer else conn.replies.rng
                noticed = now + USER_TIMEOUT + rng.random() * 0.5
                self._world.at(noticed, self._user_timeout, conn.epoch, conn, is_dialer)

    def slow(self, source: str, target: str, seconds: float) -> None:
        """Every message from `source` to `target` takes so much longer; 0 ends it."""
        if seconds:
            self._slow[source, target] = seconds
        else:
            self._slow.pop((source, target), None)

    def heal(self, source: str, target: str) -> None:
        left = self._cuts.get((source, target), 0) - 1
        if left > 0:
            self._cuts[source, target] = left
            return
        self._cuts.pop((source, target), None)
        self._resume(source, target)

    def heal_all(self, names: frozenset[str]) -> None:
        """Between these nodes nothing fails any more."""
        self.is_calm = True
        for pair in [pair for pair in self._cuts if names.issuperset(pair)]:
            del self._cuts[pair]
        self._slow.clear()
        for conn in self.conns.values():
            if conn.dialer in names and conn.acceptor in names:
                self._resume(conn.dialer, conn.acceptor)

    def _resume(self, source: str, target: str) -> None:
        """What waited behind a cut is retransmitted; whoever gave the connection up dials again."""
        for conn, line in (
            (self.conns[source, target], self.conns[source, target].requests),
            (self.conns[target, source], self.conns[target, source].replies),
        ):
            owed, line.owed = line.owed, 0
            if owed:
                self._world.reached("retransmitted-after-cut")
                at = self._world.now + RTO_SECONDS * (0.5 + 3.0 * line.rng.random())
                line.busy_until = max(line.busy_until, at)
                for _ in range(owed):
                    self._world.at(at, self._deliver, conn.epoch, conn, line)
            if conn.is_up and not conn.is_accepted and not self.is_cut(source, target):
                # Half open: only now can the next data be answered with a reset.
                self._world.at(self._world.now + self._plan.latency + 0.2, self._reset_heard, conn.epoch, conn)
            self._dial(conn, 0.3 * conn.requests.rng.random())

    def _user_timeout(self, epoch: int, conn: Conn, is_dialer: bool) -> None:
        if conn.epoch != epoch or not self.is_cut(conn.dialer, conn.acceptor):
            return
        if not is_dialer:
            if conn.is_accepted:
                self._stop_accepting(conn)
                if conn.is_up:
                    self._world.reached("half-open")
                    # If the other end's way to us is free, its next data is answered with a reset.
                    if not self._cuts.get((conn.acceptor, conn.dialer)):
                        self._world.at(self._world.now + self._plan.latency + 0.2, self._reset_heard, conn.epoch, conn)
        elif conn.is_up:
            if conn.is_accepted:
                self._world.reached("half-open")
            self._lost(conn)

    def _reset_heard(self, epoch: int, conn: Conn) -> None:
        if conn.epoch == epoch and conn.is_up:
            self._lost(conn)

    def _stop_accepting(self, conn: Conn) -> None:
        """The acceptor's end is gone, and with it what it has not read."""
        conn.is_accepted = False
        conn.requests.queue.clear()
        conn.requests.owed = 0

    def reset(self, conn: Conn) -> None:
        """The connection breaks although both ends live; what is under way is lost."""
        if conn.is_up:
            self._stop_accepting(conn)
            self._lost(conn)

    def _lost(self, conn: Conn) -> None:
        """The dialer notices. Its answer to that is to dial at once."""
        conn.is_up = False
        conn.is_loss_told = False
        conn.attempts = 0
        self._new_epoch(conn)
        self._world.nodes[conn.dialer].post(PeerLost, conn.acceptor, False)
        self._dial(conn, 0.0)

    def _new_epoch(self, conn: Conn) -> None:
        conn.epoch += 1
        for line in (conn.requests, conn.replies):
            line.queue.clear()
            line.owed = 0
            line.busy_until = 0.0

    # Processes

    def node_gone(self, name: str, *, hard: bool) -> None:
        """A process died. Its kernel closes the connections (`hard`), or the machine is gone and nobody says so."""
        now = self._world.now
        for conn in self.conns.values():
            if conn.dialer == name:
                conn.is_up = conn.is_dialling = False
                conn.is_loss_told = True
                if hard:
                    conn.is_accepted = False
                # What the dead process sent before may still be read by the acceptor.
            elif conn.acceptor == name and conn.is_up:
                self._stop_accepting(conn)
                # What it answered before is delivered first, then the end of the stream.
                at = max(now + self._plan.latency, conn.replies.busy_until) if hard else now + USER_TIMEOUT
                self._world.at(at, self._end_of_stream, conn.epoch, conn)

    def _end_of_stream(self, epoch: int, conn: Conn) -> None:
        if conn.epoch == epoch and conn.is_up:
            if self._cuts.get((conn.acceptor, conn.dialer)):
                return  # the FIN is lost as well; the user timeout will tell
            self._lost(conn)

    def node_started(self, name: str) -> None:
        """A process listens and dials."""
        rng = self._world.nodes[name].chance
        for conn in self.conns.values():
            if conn.dialer == name:
                self._new_epoch(conn)
                conn.is_up = conn.is_accepted = conn.is_dialling = False
                conn.attempts = 0
                conn.is_loss_told = True
                self._dial(conn, rng.random() * 0.02)
            elif conn.acceptor == name:
                if conn.is_up:
                    # The old connection is unknown to the new process: the next data on it is answered with a reset.
                    self._stop_accepting(conn)
                    self._world.at(self._world.now + self._plan.latency + 0.15, self._reset_heard, conn.epoch, conn)
                elif self._world.nodes[conn.dialer].is_alive:
                    self._dial(conn, RECONNECT_SECONDS_MIN + rng.random() * 0.3)

    def tell_connected(self, name: str) -> None:
        """A process that listened all the while begins to serve."""
        for conn in self.conns.values():
            if conn.dialer == name and conn.is_up:
                self._world.nodes[name].post(PeerUp, conn.acceptor)

    def _dial(self, conn: Conn, delay: float) -> None:
        if conn.is_up or conn.is_dialling or not self._world.nodes[conn.dialer].is_alive:
            return
        conn.is_dialling = True
        self._world.at(self._world.now + delay + 2 * self._plan.latency, self._connect, conn, conn.epoch)

    def _connect(self, conn: Conn, epoch: int) -> None:
        if conn.epoch != epoch or not conn.is_dialling:
            return
        conn.is_dialling = False
        world = self._world
        dialer, acceptor = world.nodes[conn.dialer], world.nodes[conn.acceptor]
        if not dialer.is_alive or conn.is_up:
            return
        conn.attempts += 1
        jitter = 0.5 + conn.requests.rng.random()
        if self.is_cut(conn.dialer, conn.acceptor) or not acceptor.has_power:
            self._dial(conn, SYN_SECONDS * jitter)
        elif not acceptor.is_alive:
            if not conn.is_loss_told:
                conn.is_loss_told = True
                dialer.post(PeerLost, conn.acceptor, True)
            pause = min(RECONNECT_SECONDS_MIN * 2.0 ** min(conn.attempts, 8), RECONNECT_SECONDS_MAX)
            self._dial(conn, pause * jitter)
        elif acceptor.is_paused or dialer.is_paused:
            # The kernel accepts; nobody shakes hands.
            self._dial(conn, max(acceptor.paused_until, dialer.paused_until) - world.now + 0.01 * jitter)
        else:
            self._new_epoch(conn)
            conn.is_up = conn.is_accepted = conn.is_loss_told = True
            conn.attempts = 0
            dialer.post(PeerUp, conn.acceptor)
