"""Who may become what, and why, as data. `raft.py` changes a role or a peer's state only through these tables.

The values of `Cause` and `PeerCause` are the phrases an operator reads in the log.
"""

from __future__ import annotations

from enum import Enum, IntEnum

from dledger.core.types import Role


class Cause(Enum):
    """Why a node's role, term or leader changes."""

    ELECTION_TIMEOUT = "no leader is heard"
    TIMEOUT_NOW = "the leader asked this node to take over"
    PRE_VOTES_WON = "a quorum would vote for this node"
    VOTES_WON = "a quorum voted for this node"
    ROUND_LOST = "no quorum in this round"
    YIELDED = "another node asked first"
    HIGHER_TERM = "a higher term was heard"
    LEADER_HEARD = "a leader was heard"
    LEADER_CLOSED = "the leader closed its connection"
    QUORUM_LOST = "no quorum answered within the election timeout"
    DISK_BAD = "the disk is failing or stalled"


ROLE_TRANSITIONS: dict[Role, dict[Cause, Role]] = {
    Role.FOLLOWER: {
        Cause.ELECTION_TIMEOUT: Role.PRE_CANDIDATE,
        Cause.TIMEOUT_NOW: Role.PRE_CANDIDATE,
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.LEADER_HEARD: Role.FOLLOWER,
        Cause.LEADER_CLOSED: Role.FOLLOWER,
    },
    Role.PRE_CANDIDATE: {
        Cause.PRE_VOTES_WON: Role.CANDIDATE,
        Cause.ROUND_LOST: Role.FOLLOWER,
        Cause.YIELDED: Role.FOLLOWER,
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.LEADER_HEARD: Role.FOLLOWER,
        Cause.DISK_BAD: Role.FOLLOWER,
    },
    Role.CANDIDATE: {
        Cause.VOTES_WON: Role.LEADER,
        # After a failed election back to pre-vote: the term is not raised again before a quorum agrees (raft.md 4.3).
        Cause.ROUND_LOST: Role.FOLLOWER,
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.LEADER_HEARD: Role.FOLLOWER,
        Cause.DISK_BAD: Role.FOLLOWER,
    },
    Role.LEADER: {
        # No way back to a candidate, and no LEADER_HEARD: a second leader in one term is a broken promise (Raft 5.2).
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.QUORUM_LOST: Role.FOLLOWER,
        Cause.DISK_BAD: Role.FOLLOWER,
    },
}


class PeerState(IntEnum):
    """How the leader treats one peer."""

    PROBE = 0
    """Where our logs agree is unknown: one message at a time."""
    REPLICATE = 1
    """They agree: send ahead of the answers, up to the window."""
    SEGMENTS = 2
    """The peer needs entries that are no longer in our log; only whole segments can help it."""


class PeerCause(Enum):
    """Why that changes."""

    MATCHED = "the predecessor matched"
    REJECTED = "the predecessor did not match"
    CONNECTION = "the connection was lost or stands again"
    BELOW_FIRST = "the peer ends before our first entry"


PEER_TRANSITIONS: dict[PeerState, dict[PeerCause, PeerState]] = {
    PeerState.PROBE: {
        PeerCause.MATCHED: PeerState.REPLICATE,
        PeerCause.REJECTED: PeerState.PROBE,
        PeerCause.CONNECTION: PeerState.PROBE,
        PeerCause.BELOW_FIRST: PeerState.SEGMENTS,
    },
    PeerState.REPLICATE: {
        PeerCause.MATCHED: PeerState.REPLICATE,
        PeerCause.REJECTED: PeerState.PROBE,
        PeerCause.CONNECTION: PeerState.PROBE,
        PeerCause.BELOW_FIRST: PeerState.SEGMENTS,
    },
    PeerState.SEGMENTS: {
        PeerCause.MATCHED: PeerState.REPLICATE,
        PeerCause.REJECTED: PeerState.PROBE,
        PeerCause.CONNECTION: PeerState.PROBE,
        PeerCause.BELOW_FIRST: PeerState.SEGMENTS,
    },
}
