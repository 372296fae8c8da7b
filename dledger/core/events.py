"""What goes into the core. Every event carries `now`, monotonic seconds; the core never asks for the time.

A driver's turn: step whatever arrived, perform the effects of each step before the next one, and step `TurnEnd` last.
Replication, commit news and append replies leave the core in the effects of `TurnEnd` (and of `Tick`), so that all work
of one turn shares one message per peer.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dledger.core.messages import Message
from dledger.core.types import Entry


class Tick(msgspec.Struct, frozen=True):
    """Time has passed. Due at `Raft.deadline`; more often is harmless. Step what has been received before it."""

    now: float


class TurnEnd(msgspec.Struct, frozen=True):
    """The driver has stepped all it had: send what this turn has made sendable. Cheap when there is nothing."""

    now: float


class Receive(msgspec.Struct, frozen=True):
    """A message of `peer`."""

    now: float
    peer: str
    message: Message


class Written(msgspec.Struct, frozen=True):
    """Every entry up to `index` (whose term is `term`) is in the page cache.

    Never reported for bytes that a `Cut` removed meanwhile: the driver voids marks under way when it performs a Cut.
    The term is checked as a second guard.
    """

    now: float
    index: int
    term: int


class Durable(msgspec.Struct, frozen=True):
    """Every entry up to `index` (whose term is `term`) is on stable storage. As `Written`; implies it."""

    now: float
    index: int
    term: int


class HardStateSaved(msgspec.Struct, frozen=True):
    """The SaveHardState of this term and vote has been synced."""

    now: float
    term: int
    vote: str | None


class Propose(msgspec.Struct, frozen=True):
    """Append these entries as leader; they are framed already. Answered with `Append` or `Refused` of the whole lot."""

    now: float
    entries: Sequence[Entry]


class PeerLost(msgspec.Struct, frozen=True):
    """The connection to `peer` has gone. `hard`: closed or reset, and an immediate reconnect was refused."""

    now: float
    peer: str
    hard: bool


class PeerUp(msgspec.Struct, frozen=True):
    """A connection to `peer` stands (again); messages sent on an earlier one may be lost."""

    now: float
    peer: str


class DiskState(msgspec.Struct, frozen=True):
    """Writes are failing or stalled (not `ok`), or work again. A node with a bad disk neither leads nor campaigns. One
    that has no room for clients' messages any more may, but prefers to hand over to one that has.
    """

    now: float
    ok: bool
    has_room: bool = True


class ReadIndex(msgspec.Struct, frozen=True):
    """Who has been acknowledged so far must be seen by the read `token` (dissertation 6.4).

    Answered by exactly one `ReadReady` or `ReadRefused`. Step `TurnEnd` behind it: that sends the round.
    """

    now: float
    token: int


class AcceptLoss(msgspec.Struct, frozen=True):
    """The operator gives up what a power loss may have taken (`raft recover --accept-loss`): stop recovering."""

    now: float


class Transfer(msgspec.Struct, frozen=True):
    """Hand leadership to `target` (or to the most advanced peer). Ends in `TransferEnded` within a timeout."""

    now: float
    target: str | None = None


Event = (
    Tick
    | TurnEnd
    | Receive
    | Written
    | Durable
    | HardStateSaved
    | Propose
    | PeerLost
    | PeerUp
    | DiskState
    | Transfer
    | ReadIndex
    | AcceptLoss
)
