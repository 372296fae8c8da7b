"""Timing and limits of one raft group, as the core needs them."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from dledger.core.types import HEADER_BYTES


@frozen(kw_only=True)
class RaftConfig:
    """All times in seconds. Raises ValueError where the figures cannot work together."""

    heartbeat: float = 0.150
    election_timeout_min: float = 1.0
    election_timeout_max: float = 2.0
    round_timeout: float = 0.5
    """How long a pre-vote or vote round may take."""
    peer_lost_jitter_max: float = 0.060
    """A leader's closed connection starts a pre-vote after 0 to this."""
    fresh_start_jitter_max: float = 0.100
    """A node that reached every peer since its start and heard of no leader campaigns after 0 to this."""
    sync: bool = False
    """Commit by what a quorum has on stable storage (flush = "sync") instead of in the page cache."""
    message_bytes_max: int = 1024 * 1024
    window_messages_max: int = 64
    window_bytes_max: int = 8 * 1024 * 1024
    segment_bytes: int = 128 * 1024 * 1024
    segments_behind_bytes: int = 256 * 1024 * 1024
    """A peer further behind than this is filled by whole segments instead of entries."""
    promote_lag_bytes_max: int = 1024 * 1024
    """A learner further behind does not become a voter, nor a voter the preferred leader."""
    reads_waiting_max: int = 10_000
    priorities: Mapping[str, int] = field(factory=dict, hash=False)
    """Preferred leaders by node id, higher first; 0 for a node not named."""
    preferred_after: float = 30.0
    """A leader hands over to a preferred peer once it has led, undisturbed, for so long."""

    def __attrs_post_init__(self) -> None:
        if self.election_timeout_min < 5 * self.heartbeat:
            raise ValueError("the election timeout must be at least five heartbeats")
        if self.election_timeout_max <= self.election_timeout_min:
            raise ValueError("the largest election timeout must be above the smallest")
        if self.segment_bytes < HEADER_BYTES:
            raise ValueError("segments are too small for a frame")
