"""What the members of a raft group say to each other, as values.

Every message carries the sender's term, except that a `PreVote` carries the term it *would* campaign in: a receiver
never adopts that one (Raft dissertation 9.6). Sender and receiver are the connection's business and not in here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dledger.core.types import Entry


class PreVote(msgspec.Struct, frozen=True):
    """Would you vote for me in `term`? Changes nothing at the receiver. `ticket` is not 0 on order of the leader."""

    term: int
    last_index: int
    last_term: int
    ticket: int = 0


class PreVoteReply(msgspec.Struct, frozen=True):
    """`term` is the answering node's own, `proposed` the term that was asked about.

    `has_leader` tells that the refusal is only due to a live leader. `recovering`: see `VoteReply`. `removed`: by a
    committed CONFIG entry the asker is no voter, and need not ask again before a leader speaks to it.
    """

    term: int
    proposed: int
    granted: bool
    has_leader: bool = False
    recovering: bool = False
    removed: bool = False


class Vote(msgspec.Struct, frozen=True):
    """RequestVote (Raft 5.2, 5.4.1). The last entry's index and term come from the stored entry and nothing else."""

    term: int
    last_index: int
    last_term: int
    ticket: int = 0


class VoteReply(msgspec.Struct, frozen=True):
    """A voter that lost its page cache in a power failure is `recovering`: it counts only if *all* members grant."""

    term: int
    granted: bool
    recovering: bool = False


class Append(msgspec.Struct, frozen=True):
    """AppendEntries (Raft 5.3); without entries a heartbeat. Always names the predecessor, with its chain checksum.

    `seq` counts the leader's messages to this peer within its term.
    """

    term: int
    prev_index: int
    prev_term: int
    prev_crc: int
    commit: int
    seq: int
    entries: Sequence[Entry] = ()


class AppendReply(msgspec.Struct, frozen=True):
    """Answers every Append up to `seq` of this term; 0 answers one of an older term and only names the newer.

    `ok`: the predecessor matched; `written` and `durable` are the highest *verified* indexes in the page cache and on
    stable storage. Not `ok`: `hint_index`, `hint_term` is the last entry that could still agree with the leader's.
    """

    term: int
    seq: int
    ok: bool
    written: int
    durable: int
    hint_index: int = 0
    hint_term: int = 0
    disk_ok: bool = True
    """Leadership is not handed to a node whose disk is full or stalled."""


class SegmentsOffer(msgspec.Struct, frozen=True):
    """In place of an Append, to a peer that needs whole segments: entries will be sent from `first_index` on only.

    Counts as hearing the leader. Answered as an Append with that `seq` whose predecessor did not match; the hint is the
    peer's last entry.
    """

    term: int
    seq: int
    first_index: int
    commit: int


class TimeoutNow(msgspec.Struct, frozen=True):
    """Leadership transfer (dissertation 3.10): campaign at once, with this ticket."""

    term: int
    ticket: int


Message = PreVote | PreVoteReply | Vote | VoteReply | Append | AppendReply | SegmentsOffer | TimeoutNow

FIELDS_IN_VERSION_1: dict[type[Message], int] = {PreVoteReply: 5, AppendReply: 7}
"""Messages that have grown since protocol version 1: how many of their fields, from the left, a peer of that version
sends and understands. The others have their defaults."""
