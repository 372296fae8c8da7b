"""Settings of one raft group on one node."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen

from dledger.core.config import RaftConfig
from dledger.core.types import BODY_BYTES_MAX, HEADER_BYTES

NODE_ID_BYTES_MAX = 16
Address = tuple[str, int]


@frozen(kw_only=True)
class GroupConfig:
    """All a node has to know to be a member of a raft group. Raises ValueError where the values cannot work.

    `peers` names every member, this node included, with the address where it takes peer connections. `data_dir` belongs
    to the group alone. Sizes in bytes, times in milliseconds.
    """

    cluster: str
    group: str
    node_id: str
    peers: Mapping[str, Address]
    data_dir: str
    founders: tuple[str, ...] = ()
    """Those of `peers` that were members when the group was formatted; all of them when empty. The log's CONFIG entries
    say who came and went since."""
    dial: Mapping[str, Address] = field(factory=dict)
    """Where this node alone reaches some members; `peers` has the addresses that all of them know."""
    joined: Mapping[str, Address] = field(factory=dict)
    """Configured addresses of members that came after the founders. As those in `peers`, they are tried where the one
    in the log leads nowhere: a member may have moved since."""
    bind: Address | None = None
    """Where to listen; `peers[node_id]` when None."""
    flush: Literal["async", "sync"] = "async"
    """What a quorum must have before an answer: "async" the page cache, "sync" stable storage."""
    segment_bytes: int = 128 * 1024 * 1024
    heartbeat_ms: int = 150
    election_timeout_ms_min: int = 1000
    election_timeout_ms_max: int = 2000
    secret: bytes | None = field(default=None, repr=False)
    """Shared by all members; when set, peers prove that they know it."""
    format_if_empty: bool = False
    """Format an empty data folder instead of refusing it."""
    cluster_uuid: str | None = None
    """Identity of the cluster; derived from name and peers when absent."""
    flush_interval_ms: int = 500
    """flush = "async": how often what was written is synced behind the answers."""
    uncommitted_bytes_max: int = 64 * 1024 * 1024
    waiting_records_max: int = 10_000
    orphan_after_ms: int = 2500
    """How long a proposal may wait for its quorum before its senders are told "outcome unknown"."""
    join: bool = False
    """Format an empty folder as that of a blank node: it neither votes nor campaigns before a leader has filled it."""
    priorities: Mapping[str, int] = field(factory=dict)
    """Which members should rather lead: higher is preferred. Never a reason for an election."""
    retention_hours: float = 72.0
    """How old a segment gets before it may go."""
    delete_hour: int = 4
    """Local hour of the day at which segments that are old enough go; -1: at any time."""
    retention_bytes: int | None = None
    """How large the log gets before its oldest segments go, whatever their age; None: no limit."""
    disk_watermarks: tuple[float, float, float] = (0.75, 0.85, 0.90)
    """Used shares of the disk: from the first on, what is old enough goes at any hour; from the second on, the oldest
    segments go whatever their age; from the third on, clients' proposals are refused."""
    scrub_bytes_per_second: int = 8 * 1024 * 1024
    """How fast closed segments are read again in search of damage; 0: never."""
    fetch_bytes_per_second: int = 50_000_000
    """How fast this node gives segments to a peer that needs them."""
    warm: bool = False
    """Touch the pages of a new segment before it is written to."""
    mlock: bool = False
    """Keep the segment that is written to in memory."""
    advise: bool = True
    """Tell the system which segments are read in order, and which are not read any more."""

    def __attrs_post_init__(self) -> None:
        if self.node_id not in self.peers:
            raise ValueError(f"node {self.node_id} is not among the peers of group {self.group}")
        for name in self.founders:
            if name not in self.peers:
                raise ValueError(f"founder {name} of group {self.group} is not among its peers")
        for name in self.peers:
            if not 1 <= len(name.encode()) <= NODE_ID_BYTES_MAX:
                raise ValueError(f"node id {name!r} must have 1 to {NODE_ID_BYTES_MAX} bytes")
        if self.segment_bytes % 4096 or self.segment_bytes < 65_536:
            raise ValueError("segment_bytes must be a multiple of 4096 and at least 65536")
        if self.flush not in ("async", "sync"):
            raise ValueError('flush must be "async" or "sync"')
        if self.join and self.format_if_empty:
            raise ValueError("a folder is formatted for a new group, or for a node that joins one, not both")
        if not -1 <= self.delete_hour <= 23:
            raise ValueError("delete_hour must be an hour of the day, or -1")
        if self.retention_hours <= 0 or (self.retention_bytes is not None and self.retention_bytes <= 0):
            raise ValueError("retention must be above 0")
        early, forced, refuse = self.disk_watermarks
        if not 0 < early <= forced <= refuse <= 1:
            raise ValueError("disk_watermarks must be three shares of the disk, none smaller than the one before")
        if self.scrub_bytes_per_second < 0 or self.fetch_bytes_per_second <= 0:
            raise ValueError("scrub_bytes_per_second must not be below 0, fetch_bytes_per_second above it")
        self.raft_config()

    @property
    def entry_bytes_max(self) -> int:
        """Largest body of an entry in this group."""
        return min(BODY_BYTES_MAX, self.segment_bytes - HEADER_BYTES)

    @property
    def first_voters(self) -> tuple[str, ...]:
        """The voters before the first CONFIG entry."""
        return self.founders or tuple(self.peers)

    @property
    def listen_address(self) -> Address:
        return self.bind if self.bind is not None else self.peers[self.node_id]

    @property
    def effective_cluster_uuid(self) -> str:
        """`cluster_uuid`, or a value every member derives alike, so that formatting a folder needs no exchange.

        Once a folder is formatted, the uuid in it counts when `cluster_uuid` is absent.
        """
        if self.cluster_uuid is not None:
            return self.cluster_uuid
        founders = sorted((name, self.peers[name]) for name in self.first_voters)
        members = ";".join(f"{name}={host}:{port}" for name, (host, port) in founders)
        return _uuid_of("cluster", self.cluster, members)

    @property
    def group_uuid(self) -> str:
        """Identity of this raft group: terms are comparable within one only. 32 hex digits."""
        return _uuid_of("group", self.effective_cluster_uuid, self.group)

    def raft_config(self) -> RaftConfig:
        return RaftConfig(
            heartbeat=self.heartbeat_ms / 1000,
            election_timeout_min=self.election_timeout_ms_min / 1000,
            election_timeout_max=self.election_timeout_ms_max / 1000,
            round_timeout=min(0.5, self.election_timeout_ms_min / 2000),
            sync=self.flush == "sync",
            segment_bytes=self.segment_bytes,
            priorities=dict(self.priorities),
        )


def _uuid_of(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "big"))
        digest.update(encoded)
    return digest.hexdigest()[:32]
