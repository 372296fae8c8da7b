"""What one seed of the full engine stands for: what runs, how bad its world is, and what befalls it. Drawn once."""

from __future__ import annotations

from typing import Final, Literal

from attrs import frozen

from chaos.sim.chance import stream

SECONDS_OF_FAULTS: Final = {"groups": 15.0, "cluster": 12.0}
SECONDS_TO_SETTLE: Final = 60.0
"""After the last fault, everything must be level again within this time, without a new proposal (raft.md 6.1, 14)."""

Kind = Literal["groups", "cluster"]


@frozen(kw_only=True)
class FullPlan:
    """Times in seconds, sizes in bytes."""

    seed: int
    kind: Kind
    """"groups": three raft groups' members with a small state machine; "cluster": name server, brokers, clients."""
    flush: Literal["async", "sync"]
    latency: float
    jitter: float
    """How often a delivery is late by up to 0.1 s."""
    drift: float
    sync_seconds: float
    cold: float
    segment_bytes: int
    rate: float
    """Proposals, or sends, per second."""
    record_bytes_max: int
    fault_interval: float
    faults: tuple[str, ...]
    """The kinds of faults of this run; each seed has some of them only, so that some runs are calm in some respect."""
    seconds: float

    def describe(self) -> str:
        return (
            f"{self.kind}, flush={self.flush}, latency {self.latency * 1000:.1f} ms, late {self.jitter:.1%}, "
            f"drift {self.drift:.1%}, sync {self.sync_seconds * 1000:.1f} ms, segments of {self.segment_bytes}, "
            f"a fault every {self.fault_interval:.1f} s for {self.seconds:.0f} s: {' '.join(self.faults)}"
        )


FAULTS: Final = (
    "kill",
    "kill",
    "power",
    "pause",
    "partition",
    "partition",
    "one-way",
    "reset",
    "stall",
    "slow disk",
    "full disk",
    "failing sync",
    "bit flip",
    "transfer",
    "restart",
    "wall clock",
)


def draw_plan(seed: int, kind: Kind | None = None) -> FullPlan:
    rng = stream(seed, "full plan")
    drawn: Kind = "groups" if rng.random() < 0.5 else "cluster"
    kind = kind or drawn
    kinds = sorted({fault for fault in FAULTS if rng.random() < 0.7}) or ["kill"]
    return FullPlan(
        seed=seed,
        kind=kind,
        flush="sync" if rng.random() < 0.5 else "async",
        latency=rng.choice((0.0002, 0.0005, 0.001, 0.005)),
        jitter=rng.choice((0.0, 0.0, 0.001, 0.01)),
        drift=rng.choice((0.0, 0.001, 0.05)),
        sync_seconds=rng.choice((0.0002, 0.001, 0.005, 0.02)),
        cold=rng.choice((0.0, 0.1)),
        segment_bytes=rng.choice((65_536, 262_144)),
        rate=rng.choice((20.0, 60.0, 150.0) if kind == "groups" else (10.0, 25.0, 50.0)),
        record_bytes_max=rng.choice((64, 1000, 5000)),
        fault_interval=rng.choice((0.5, 1.0, 2.0)),
        faults=tuple(kinds),
        seconds=SECONDS_OF_FAULTS[kind],
    )
