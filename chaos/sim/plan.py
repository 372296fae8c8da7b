"""What one seed stands for: the group, its flush mode, and how bad network and disks are. Drawn once, then constant."""

from __future__ import annotations

from attrs import frozen

from chaos.sim.chance import stream


@frozen(kw_only=True)
class Plan:
    """Times in seconds, probabilities per message."""

    seed: int
    nodes: int
    sync: bool
    latency: float
    drop: float
    duplicate: float
    late: float
    sync_latency: float
    lazy_sync_interval: float
    """Async flush: how long written bytes may wait for their sync."""
    threaded_writes: bool
    use_commit_hint: bool
    """Whether a restarted node starts from the commit index found in its frames, or from 0."""
    drift: float
    fault_interval: float
    fault_seconds: float
    proposals_per_second: float
    burst_max: int
    body_bytes_max: int
    segment_bytes: int
    message_bytes_max: int
    window_messages_max: int

    def describe(self) -> str:
        return (
            f"{self.nodes} nodes, flush={'sync' if self.sync else 'async'}, latency {self.latency * 1000:.1f} ms, "
            f"drop {self.drop:.1%}, duplicate {self.duplicate:.1%}, late {self.late:.1%}, a fault every "
            f"{self.fault_interval:.1f} s for {self.fault_seconds:.0f} s"
        )


def draw_plan(seed: int) -> Plan:
    rng = stream(seed, "plan")
    bad_network = rng.random() < 0.6
    latency = rng.choice((0.0002, 0.0005, 0.001, 0.005, 0.03))
    message_bytes_max = rng.choice((1024, 8192, 1 << 20))
    window_messages_max = rng.choice((2, 8, 64))
    if latency > 0.001:
        # A small window over a long wire is slow by design, and the judgement at the end has no patience.
        message_bytes_max, window_messages_max = 1 << 20, 64
    return Plan(
        seed=seed,
        nodes=5 if rng.random() < 0.15 else 3,
        sync=rng.random() < 0.5,
        latency=latency,
        drop=rng.choice((0.002, 0.01, 0.05)) if bad_network else 0.0,
        duplicate=rng.choice((0.0, 0.01, 0.05)) if bad_network else 0.0,
        late=rng.choice((0.0, 0.005, 0.02)) if bad_network else 0.0,
        sync_latency=rng.choice((0.0002, 0.001, 0.005, 0.02)),
        lazy_sync_interval=rng.choice((0.05, 0.5, 5.0)),
        threaded_writes=rng.random() < 0.4,
        use_commit_hint=rng.random() < 0.7,
        drift=rng.choice((0.0, 0.001, 0.05)),
        fault_interval=rng.choice((0.4, 0.8, 1.5, 3.0)),
        fault_seconds=30.0,
        proposals_per_second=rng.choice((3.0, 20.0, 60.0)),
        burst_max=rng.choice((1, 1, 4, 40)),
        body_bytes_max=rng.choice((64, 400, 3000)),
        segment_bytes=rng.choice((4096, 16384, 1 << 20)),
        message_bytes_max=message_bytes_max,
        window_messages_max=window_messages_max,
    )
