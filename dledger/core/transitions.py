"""Who may become what, and why, as data: `raft.py` changes a role, `progress.py` a peer's state by these tables only.

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
    LEADER_SILENT = "no leader is heard, and this node may not become one"
    MEMBERS_CHANGED = "the members of the group have changed"
    REMOVED = "this node is no voter of the group any more"
    LOSS_ACCEPTED = "the operator accepts what may be lost"


ROLE_TRANSITIONS: dict[Role, dict[Cause, Role]] = {
    Role.FOLLOWER: {
        Cause.ELECTION_TIMEOUT: Role.PRE_CANDIDATE,
        Cause.TIMEOUT_NOW: Role.PRE_CANDIDATE,
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.LEADER_HEARD: Role.FOLLOWER,
        Cause.LEADER_CLOSED: Role.FOLLOWER,
        Cause.LEADER_SILENT: Role.FOLLOWER,
    },
    Role.PRE_CANDIDATE: {
        Cause.PRE_VOTES_WON: Role.CANDIDATE,
        Cause.ROUND_LOST: Role.FOLLOWER,
        Cause.YIELDED: Role.FOLLOWER,
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.LEADER_HEARD: Role.FOLLOWER,
        Cause.DISK_BAD: Role.FOLLOWER,
        # What was counted, was counted among the former voters.
        Cause.MEMBERS_CHANGED: Role.FOLLOWER,
        Cause.REMOVED: Role.FOLLOWER,
        Cause.LOSS_ACCEPTED: Role.FOLLOWER,
    },
    Role.CANDIDATE: {
        Cause.VOTES_WON: Role.LEADER,
        # After a failed election back to pre-vote: the term is not raised again before a quorum agrees (raft.md 4.3).
        Cause.ROUND_LOST: Role.FOLLOWER,
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.LEADER_HEARD: Role.FOLLOWER,
        Cause.DISK_BAD: Role.FOLLOWER,
        Cause.LOSS_ACCEPTED: Role.FOLLOWER,
    },
    Role.LEADER: {
        # No way back to a candidate, and no LEADER_HEARD: a second leader in one term is a broken promise (Raft 5.2).
        Cause.HIGHER_TERM: Role.FOLLOWER,
        Cause.QUORUM_LOST: Role.FOLLOWER,
        Cause.DISK_BAD: Role.FOLLOWER,
        # It leads until the entry that removes it is committed (dissertation 4.2.2).
        Cause.REMOVED: Role.FOLLOWER,
    },
}


class PeerState(IntEnum):
    """How the leader treats one peer."""

    PROBE = 0
    """Where our logs agree is unknown: one message at a time."""
    REPLICATE = 1
    """They agree: send ahead of the answers, up to the window."""
    SEGMENTS = 2
    """It needs entries that are no longer in our log, or more than is reasonable: whole segments are offered."""


class PeerCause(Enum):
    """Why that changes."""

    MATCHED = "the predecessor matched"
    REJECTED = "the predecessor did not match"
    CONNECTION = "the connection was lost or stands again"
    BELOW_FIRST = "the peer ends before our first entry"
    FAR_BEHIND = "the peer is too far behind for entries"
    REACHED = "segments have brought the peer to our entries"


PEER_TRANSITIONS: dict[PeerState, dict[PeerCause, PeerState]] = {
    PeerState.PROBE: {
        PeerCause.MATCHED: PeerState.REPLICATE,
        PeerCause.REJECTED: PeerState.PROBE,
        PeerCause.CONNECTION: PeerState.PROBE,
        PeerCause.BELOW_FIRST: PeerState.SEGMENTS,
        PeerCause.FAR_BEHIND: PeerState.SEGMENTS,
        PeerCause.REACHED: PeerState.PROBE,
    },
    PeerState.REPLICATE: {
        PeerCause.MATCHED: PeerState.REPLICATE,
        PeerCause.REJECTED: PeerState.PROBE,
        PeerCause.CONNECTION: PeerState.PROBE,
        PeerCause.BELOW_FIRST: PeerState.SEGMENTS,
        PeerCause.FAR_BEHIND: PeerState.SEGMENTS,
        PeerCause.REACHED: PeerState.REPLICATE,
    },
    PeerState.SEGMENTS: {
        # An offer matches and rejects nothing: only what the peer says of its end leads out, to a probe.
        PeerCause.MATCHED: PeerState.SEGMENTS,
        PeerCause.REJECTED: PeerState.SEGMENTS,
        PeerCause.CONNECTION: PeerState.PROBE,
        PeerCause.BELOW_FIRST: PeerState.SEGMENTS,
        PeerCause.FAR_BEHIND: PeerState.SEGMENTS,
        PeerCause.REACHED: PeerState.PROBE,
    },
}
