"""What comes out of the core. The driver performs the effects of a step in order, before it steps again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dledger.core.membership import Members
from dledger.core.messages import Message
from dledger.core.types import Entry, Role


class SaveHardState(msgspec.Struct, frozen=True):
    """Write term and vote, sync, then step `HardStateSaved`. The core itself holds the messages that depend on it."""

    term: int
    vote: str | None


class Append(msgspec.Struct, frozen=True):
    """Write these frames verbatim at their positions; `Written`, and later `Durable`, report them."""

    entries: Sequence[Entry]


class Cut(msgspec.Struct, frozen=True):
    """Remove `from_index` and all behind it and sync that, before any later Append and before any later Send leaves."""

    from_index: int


class Send(msgspec.Struct, frozen=True):
    """Give `message` to `peer`. May get lost; order on one connection is kept."""

    peer: str
    message: Message


class Commit(msgspec.Struct, frozen=True):
    """Everything up to `index` is committed, and written here."""

    index: int


class RoleChanged(msgspec.Struct, frozen=True):
    """This node's role, term or known leader has changed. `reason` is a phrase for the log."""

    role: Role
    term: int
    leader: str | None
    reason: str


class NoopNeeded(msgspec.Struct, frozen=True):
    """We lead `term`: frame a NOOP entry and `Propose` it before anything else (Raft 5.4.2, 8)."""

    term: int


class Refused(msgspec.Struct, frozen=True):
    """A proposal that was not logged, for certain."""

    entries: Sequence[Entry]
    reason: str


class TransferEnded(msgspec.Struct, frozen=True):
    """A transfer is over. When not `done` we lead on and take proposals again."""

    target: str | None
    done: bool
    reason: str


class Recovered(msgspec.Struct, frozen=True):
    """This node votes normally again: a leader or an election has confirmed its log, or the operator the loss."""

    term: int


class ReadReady(msgspec.Struct, frozen=True):
    """A read that waits until `index` is applied here sees everything acknowledged before it was asked."""

    token: int
    index: int


class ReadRefused(msgspec.Struct, frozen=True):
    """This node cannot vouch for the read: ask the leader, or again."""

    token: int
    reason: str


class MembersChanged(msgspec.Struct, frozen=True):
    """The members of CONFIG entry `index` (0: of the bootstrap list) are in force.

    Comes when the entry is appended, or when a cut brings an older one back, and once more, `is_committed`, when it
    can no longer be cut. Only then close the connections of those who have gone: until then a removed leader still
    needs our answers, and a cut may bring a removed member back.
    """

    index: int
    members: Members
    is_committed: bool = False


class NeedSegments(msgspec.Struct, frozen=True):
    """`leader` sends entries only from `first_index` on: what is before must come as whole segments.

    Comes at the first offer of a term and whenever `first_index` changes. Whether a transfer runs is the driver's care.
    """

    leader: str
    first_index: int


class Fatal(msgspec.Struct, frozen=True):
    """A promise is broken (corruption, or a bug). The core takes no further part; the node must stop and say why."""

    reason: str


Effect = (
    SaveHardState
    | Append
    | Cut
    | Send
    | Commit
    | RoleChanged
    | NoopNeeded
    | Refused
    | TransferEnded
    | Recovered
    | ReadReady
    | ReadRefused
    | MembersChanged
    | NeedSegments
    | Fatal
)
