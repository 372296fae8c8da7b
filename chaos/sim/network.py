"""Connections between simulated nodes, as TCP gives them: in order within one stream, broken as a whole, never lying.

Between two nodes there are two streams each way, one for requests and one for replies (each node dials the other and
gets its answers on its own connection), so order holds within a kind and not between kinds. On top of TCP: single
messages may be dropped (a bounded send queue), doubled, or doubled long after (`late`); a correct core bears all that.
Nothing reaches a process that was started after it was sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define

from chaos.sim.chance import stream
from chaos.sim.properties import PropertyBroken
from dledger.core.events import PeerLost, PeerUp, Receive
from dledger.core.messages import AppendReply, Message, PreVoteReply, VoteReply
from dledger.wire import MESSAGE_BYTES_MAX, MessageReader, decode_raft, encode_raft

if TYPE_CHECKING:
    from chaos.sim.world import World

CODEC_SHARE = 0.05
"""This part of all messages passes through the real codec, cut at a random byte (chaos.md 5.3)."""
REPLIES = (AppendReply, PreVoteReply, VoteReply)
USER_TIMEOUT = 2.0
RECONNECT_SECONDS_MIN = 0.02


def through_codec(message: Message, cut: float) -> Message:
    """The message as it comes out of the real wire codec, fed in two pieces. Raises PropertyBroken if it changed."""
    data = b"".join(encode_raft(message))
    reader = MessageReader(MESSAGE_BYTES_MAX)
    middle = int(len(data) * cut)
    received = reader.feed(data[:middle]) + reader.feed(data[middle:])
    decoded = [decode_raft(one) for one in received]
    if len(decoded) != 1 or encode_raft(decoded[0]) != encode_raft(message) or type(decoded[0]) is not type(message):
        raise PropertyBroken(f"the wire codec turns {message} into {decoded}")
    return decoded[0]


@define(eq=False)
class Link:
    """Two nodes and the connection between them."""

    a: str
    b: str
    is_up: bool = False
    epoch: int = 0
    is_dialling: bool = False


class Network:
    """All links. Cuts are directed; a connection stands while nobody noticed that it does not work."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._plan = world.plan
        self.links: dict[tuple[str, str], Link] = {}
        names = world.names
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                self.links[a, b] = self.links[b, a] = Link(a, b)
        self._rngs = {pair: stream(world.plan.seed, f"link/{pair[0]}/{pair[1]}") for pair in self.links}
        self._cuts: dict[tuple[str, str], int] = {}
        self._busy_until: dict[tuple[str, str, bool], float] = {}
        self.is_calm = False
        self.delivered = 0
        self.dropped = 0

    def start(self) -> None:
        for link in self._all():
            self.dial(link)

    def _all(self) -> list[Link]:
        return [link for pair, link in self.links.items() if pair == (link.a, link.b)]

    def send(self, source: str, target: str, message: Message) -> None:
        link = self.links[source, target]
        if not link.is_up:
            return
        plan, rng, now = self._plan, self._rngs[source, target], self._world.now
        if self._cuts.get((source, target)):
            self.dropped += 1
            return
        if rng.random() < CODEC_SHARE:
            message = through_codec(message, rng.random())
        delay = plan.latency * (0.5 + rng.random())
        if not self.is_calm:
            chance = rng.random()
            if chance < plan.drop:
                self.dropped += 1
                return
            if chance < plan.drop + plan.duplicate:
                self._deliver_at(now + delay + rng.random() * 0.02, link, source, target, message)
            elif chance < plan.drop + plan.duplicate + plan.late:
                self._deliver_at(now + delay + rng.random() * 1.5, link, source, target, message, is_late=True)
            elif chance > 0.998:
                delay += rng.random() * 0.4
        stream_key = (source, target, isinstance(message, REPLIES))
        at = max(now + delay, self._busy_until.get(stream_key, 0.0))
        self._busy_until[stream_key] = at
        self._deliver_at(at, link, source, target, message)

    def _deliver_at(
        self, at: float, link: Link, source: str, target: str, message: Message, *, is_late: bool = False
    ) -> None:
        """A late copy stands for bytes of an old connection that are read after a new one stands."""
        incarnation = self._world.nodes[target].incarnation
        self._world.at(at, self._deliver, -1 if is_late else link.epoch, link, source, target, incarnation, message)

    def _deliver(self, epoch: int, link: Link, source: str, target: str, incarnation: int, message: Message) -> None:
        node = self._world.nodes[target]
        if node.incarnation == incarnation and epoch in (-1, link.epoch) and not self._cuts.get((source, target)):
            self.delivered += 1
            node.post(Receive, source, message)

    # Faults

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from `source` to `target`; both notice after the user timeout."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1
        link = self.links[source, target]
        self._world.at(self._world.now + USER_TIMEOUT, self._time_out, link.epoch, link)

    def heal(self, source: str, target: str) -> None:
        left = self._cuts.get((source, target), 0) - 1
        if left > 0:
            self._cuts[source, target] = left
            return
        self._cuts.pop((source, target), None)
        self.dial(self.links[source, target])

    def heal_all(self) -> None:
        self._cuts.clear()
        self.is_calm = True
        for link in self._all():
            self.dial(link)

    def _is_cut(self, link: Link) -> bool:
        return bool(self._cuts.get((link.a, link.b)) or self._cuts.get((link.b, link.a)))

    def _time_out(self, epoch: int, link: Link) -> None:
        if link.epoch == epoch and link.is_up and self._is_cut(link):
            self.reset(link)

    def reset(self, link: Link) -> None:
        """The connection breaks although both ends live; what is under way is lost."""
        if not link.is_up:
            return
        link.is_up = False
        link.epoch += 1
        for end, other in ((link.a, link.b), (link.b, link.a)):
            self._world.nodes[end].post(PeerLost, other, False)
        self.dial(link)

    def node_gone(self, name: str, *, hard: bool) -> None:
        """A process died. Its kernel closes the connections (`hard`), or the machine is gone and nobody says so."""
        for link in self._all():
            if name not in (link.a, link.b):
                continue
            other = link.b if link.a == name else link.a
            if not link.is_up:
                continue
            now = self._world.now
            if hard:
                # What the dead node sent before is delivered first, then the end of the stream.
                last = max(self._busy_until.get((name, other, kind), 0.0) for kind in (False, True))
                at = max(now + self._plan.latency, last)
            else:
                at = now + USER_TIMEOUT
            link.is_up = False
            self._world.at(at, self._tell_lost, link.epoch, link, other, name, hard)

    def _tell_lost(self, epoch: int, link: Link, end: str, lost: str, hard: bool) -> None:
        if link.epoch != epoch:
            return
        link.epoch += 1
        # A restarted process refuses nothing: then the immediate reconnect succeeded and the loss was not hard.
        node = self._world.nodes[lost]
        self._world.nodes[end].post(PeerLost, lost, hard and node.raft is None)
        self.dial(link)

    def node_started(self, name: str) -> None:
        for link in self._all():
            if name in (link.a, link.b):
                other = link.b if link.a == name else link.a
                if link.is_up:
                    continue
                link.epoch += 1
                # The living end notices at the latest when the new process dials it.
                self._world.nodes[other].post(PeerLost, name, False)
                self.dial(link)

    def dial(self, link: Link) -> None:
        if link.is_up or link.is_dialling:
            return
        link.is_dialling = True
        rng = self._rngs[link.a, link.b]
        self._world.at(self._world.now + RECONNECT_SECONDS_MIN + rng.random() * 0.3, self._connect, link)

    def _connect(self, link: Link) -> None:
        link.is_dialling = False
        if link.is_up or self._is_cut(link):
            return
        ends = (self._world.nodes[link.a], self._world.nodes[link.b])
        if any(end.raft is None for end in ends):
            return
        if any(end.is_paused for end in ends):
            self.dial(link)
            return
        link.is_up = True
        link.epoch += 1
        ends[0].post(PeerUp, link.b)
        ends[1].post(PeerUp, link.a)
