"""What one seed stands for: the group, its flush mode, how bad network and disks are, which kinds of fault may come.

Drawn once, then constant. A plan and a list of faults (`chaos.sim.schedule`) are all there is to a run: both can be
written to a scenario file and played without the seed's draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from attrs import frozen

from chaos.sim.chance import stream

KINDS: dict[str, int] = {
    "crash": 2,
    "crash-at-effect": 3,
    "crash-all": 1,
    "power-loss": 3,
    "power-loss-all": 1,
    "pause": 2,
    "late-ticks": 1,
    "clock-rate": 1,
    "stall": 1,
    "disk-full": 1,
    "write-error": 1,
    "sync-error": 2,
    "flip": 2,
    "rows-lost": 1,
    "truncate": 1,
    "older-copy": 1,
    "misdirect": 1,
    "wipe": 1,
    "partition": 3,
    "cut-link": 1,
    "cut-one-way": 2,
    "flap": 1,
    "slow-link": 1,
    "reset": 1,
    "transfer": 2,
    "trim": 2,
    "members": 3,
}
"""Every kind of fault, with its weight in a schedule."""


ANY_LENGTH = (0.1, 1.0, 3.0, 6.0)
LENGTHS: dict[str, tuple[float, ...]] = {
    "crash": (0.1, 0.3, 3.0),
    "crash-at-effect": (0.1, 0.3, 3.0),
    "crash-all": (0.1, 0.3, 3.0),
    "power-loss": (0.1, 0.3, 3.0, 8.0),
    "power-loss-all": (0.1, 3.0),
    "wipe": (0.3, 2.0),
    "pause": (0.05, 0.7, 1.5, 4.0),
    "late-ticks": (2.0, 6.0),
    "clock-rate": (5.0, 15.0),
    "stall": (0.1, 1.0, 4.0),
    "disk-full": (0.5, 3.0, 8.0),
    "flap": (3.0, 6.0),
}
"""How long a fault lasts, about; the kinds not named draw from ANY_LENGTH."""


@frozen(kw_only=True)
class RunPlan(ABC):
    """What the plans of both engines share: all that drawing faults, replaying and shrinking know of one."""

    seed: int
    fault_interval: float
    fault_seconds: float
    """When the faults end."""
    kinds: tuple[str, ...]
    """The kinds of fault that this seed may draw (chaos.md 5.5: a random subset each)."""

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """What a fault may be aimed at, besides the leader."""

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, int]:
        """Every kind of fault, with its weight in a schedule."""

    @abstractmethod
    def lengths(self, kind: str) -> tuple[float, ...]:
        """How many seconds a fault of this kind lasts, about."""

    @abstractmethod
    def describe(self) -> str:
        """The plan in one line."""

    @abstractmethod
    def problem(self) -> str | None:
        """Why this cannot be played, for a plan that somebody has written by hand."""


@frozen(kw_only=True)
class Plan(RunPlan):
    """Times in seconds, probabilities per message."""

    nodes: int
    """Voters of the bootstrap list."""
    spares: int
    """Nodes with an empty folder that wait to be made members."""
    sync: bool
    tcp: bool
    """Loss delays a stream as TCP does; else single messages are dropped and doubled."""
    latency: float
    bytes_per_second: float
    """Bandwidth of a connection; 0 for any amount."""
    buffer_messages: int
    """What a stream holds that was not read yet."""
    drop: float
    """A packet is lost: its message comes late (TCP) or never."""
    duplicate: float
    late: float
    sync_latency: float
    lazy_sync_interval: float
    """Async flush: how long written bytes may wait for their sync."""
    threaded_writes: bool
    use_commit_hint: bool
    """Whether a restarted node starts from the commit index found in its frames, or from 0."""
    drift: float
    heal_core: bool
    """At the end only a random majority is made well; the others may stay as they are for ever (chaos.md 5.5)."""
    clients: int
    proposals_per_second: float
    burst_max: int
    reads_per_second: float
    body_bytes_max: int
    segment_bytes: int
    segments_behind_bytes: int
    message_bytes_max: int
    window_messages_max: int
    preferred: str
    """The node with the higher priority; empty for none."""
    preferred_after: float
    real_store: bool
    """Whether starts read their log with the store's own functions, on bytes."""

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(f"n{number}" for number in range(self.nodes + self.spares))

    @property
    def weights(self) -> Mapping[str, int]:
        return KINDS

    def lengths(self, kind: str) -> tuple[float, ...]:
        return LENGTHS.get(kind, ANY_LENGTH)

    def problem(self) -> str | None:
        if 1 <= self.nodes <= 9 and 0 <= self.spares <= 9 and self.clients >= 1 and self.segment_bytes >= 4096:
            return None
        return "1 to 9 nodes, 0 to 9 spares, at least one client, segments of at least 4096 bytes"

    def describe(self) -> str:
        network = f"drop {self.drop:.1%}, duplicate {self.duplicate:.1%}, late {self.late:.1%}"
        return (
            f"{self.nodes} nodes, flush={'sync' if self.sync else 'async'}, latency {self.latency * 1000:.1f} ms, "
            f"{'TCP' if self.tcp else 'packets'}, {network}, a fault every {self.fault_interval:.1f} s for "
            f"{self.fault_seconds:.0f} s, {len(self.kinds)} of {len(KINDS)} kinds"
        )


def draw_plan(seed: int) -> Plan:
    rng = stream(seed, "plan")
    bad_network = rng.random() < 0.6
    latency = rng.choice((0.0002, 0.0005, 0.001, 0.005, 0.03))
    window_messages_max, message_bytes_max = rng.choice(
        ((2, 1 << 20), (8, 1 << 16), (8, 1 << 20), (64, 1024), (64, 8192), (64, 1 << 20))
    )
    bytes_per_second = rng.choice((0.0, 0.0, 0.0, 200_000.0, 5_000_000.0))
    if latency > 0.001:
        # A small window over a long wire is slow by design, and the judgement at the end has no patience.
        window_messages_max, message_bytes_max, bytes_per_second = 64, 1 << 20, 0.0
    segment_bytes = rng.choice((4096, 16384, 1 << 20))
    tcp = rng.random() < 0.7
    nodes = 5 if rng.random() < 0.15 else 3
    everything = rng.random() < 0.15
    return Plan(
        seed=seed,
        nodes=nodes,
        spares=rng.choice((0, 1, 2)),
        sync=rng.random() < 0.5,
        tcp=tcp,
        latency=latency,
        bytes_per_second=bytes_per_second,
        # On a slow line heartbeats gather behind one large message; a queue for 8 would give up the next one each time.
        buffer_messages=window_messages_max + max(rng.choice((8, 200)), 64 if bytes_per_second else 0),
        drop=rng.choice((0.002, 0.01, 0.05)) if bad_network else 0.0,
        duplicate=rng.choice((0.0, 0.01, 0.05)) if bad_network and not tcp else 0.0,
        late=rng.choice((0.0, 0.005, 0.02)) if bad_network else 0.0,
        sync_latency=rng.choice((0.0002, 0.001, 0.005, 0.02)),
        lazy_sync_interval=rng.choice((0.05, 0.5, 5.0)),
        threaded_writes=rng.random() < 0.4,
        use_commit_hint=rng.random() < 0.7,
        drift=rng.choice((0.0, 0.001, 0.05)),
        fault_interval=rng.choice((0.5, 1.0, 1.5, 3.0)),
        fault_seconds=55.0,
        kinds=tuple(kind for kind in KINDS if rng.random() < 0.6 or everything) or tuple(KINDS),
        heal_core=rng.random() < 0.3,
        clients=rng.choice((1, 3)),
        proposals_per_second=rng.choice((3.0, 10.0, 40.0)),
        burst_max=rng.choice((1, 1, 4, 40)),
        reads_per_second=rng.choice((0.0, 2.0, 10.0)),
        body_bytes_max=rng.choice((64, 400, 3000)),
        segment_bytes=segment_bytes,
        segments_behind_bytes=rng.choice((4 * segment_bytes, 1 << 28)),
        message_bytes_max=message_bytes_max,
        window_messages_max=window_messages_max,
        preferred=f"n{rng.randrange(nodes)}" if rng.random() < 0.3 else "",
        preferred_after=rng.choice((2.0, 6.0)),
        real_store=rng.random() < 0.25,
    )
