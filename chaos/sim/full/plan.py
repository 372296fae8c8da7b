"""What one seed of the full engine stands for: what runs, and how bad its world is. Drawn once, then constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from attrs import frozen

from chaos.sim.chance import stream
from chaos.sim.plan import RunPlan

SECONDS_OF_FAULTS: Final = {"groups": 15.0, "cluster": 12.0}
SECONDS_TO_SETTLE: Final = 60.0
"""After the last fault, everything must be level again within this time, without a new proposal (raft.md 6.1, 14)."""
FOUNDERS: Final = ("n0", "n1", "n2")
NAME_SERVER: Final = "ns0"

Kind = Literal["groups", "cluster"]

KINDS: Final[Mapping[str, int]] = {
    "kill": 3,
    "power": 2,
    "pause": 2,
    "partition": 3,
    "one-way": 2,
    "reset": 1,
    "stall": 1,
    "slow disk": 1,
    "full disk": 1,
    "failing sync": 1,
    "bit flip": 1,
    "transfer": 2,
    "restart": 1,
    "wall clock": 1,
    "members": 4,
    "retention": 2,
}
"""Every kind of fault, with its weight in a schedule. What operators do counts as one."""

ANY_LENGTH: Final = (0.3, 2.0, 5.0)
DOWN_LENGTH: Final = (0.05, 0.5, 3.0)
LENGTHS: Final[Mapping[str, tuple[float, ...]]] = {
    "kill": DOWN_LENGTH,
    "power": DOWN_LENGTH,
    "bit flip": DOWN_LENGTH,
    "pause": (0.2, 1.5, 4.0),
    "stall": (0.3, 3.0, 12.0),
    "slow disk": (0.5, 4.0),
    "full disk": (0.5, 3.0, 6.0),
}


@frozen(kw_only=True)
class FullPlan(RunPlan):
    """Times in seconds, sizes in bytes."""

    kind: Kind
    """"groups": the members of a raft group with a small state machine; "cluster": name server, brokers, clients."""
    spares: int
    """Machines with an empty folder, whose nodes begin when they are made members."""
    flush: Literal["async", "sync"]
    latency: float
    jitter: float
    """How often a delivery is late by up to 0.1 s."""
    drift: float
    sync_seconds: float
    cold: float
    """How often a read finds nothing in the page cache."""
    segment_bytes: int
    retention_bytes: int
    """How large the log may get; 0: no limit."""
    retention_seconds: float
    """How old a segment may get."""
    rate: float
    """Proposals, or sends, per second."""
    record_bytes_max: int

    @property
    def members(self) -> tuple[str, ...]:
        """All machines whose nodes are, or may become, members of the group."""
        return (*FOUNDERS, *(f"n{len(FOUNDERS) + number}" for number in range(self.spares)))

    @property
    def targets(self) -> tuple[str, ...]:
        return self.members if self.kind == "groups" else (*self.members, NAME_SERVER)

    @property
    def weights(self) -> Mapping[str, int]:
        return KINDS

    def lengths(self, kind: str) -> tuple[float, ...]:
        return LENGTHS.get(kind, ANY_LENGTH)

    def problem(self) -> str | None:
        if self.segment_bytes < 65_536 or self.segment_bytes % 4096:
            return "segments have a multiple of 4096 bytes, at least 65536"
        if not 0 <= self.spares <= 6 or self.rate <= 0 or self.record_bytes_max < 1:
            return "0 to 6 spares, a rate and a size of records above 0"
        return None

    def describe(self) -> str:
        retention = f"{self.retention_bytes} bytes" if self.retention_bytes else "any size"
        return (
            f"{self.kind}, {self.spares} spares, flush={self.flush}, latency {self.latency * 1000:.1f} ms, "
            f"late {self.jitter:.1%}, drift {self.drift:.1%}, sync {self.sync_seconds * 1000:.1f} ms, segments of "
            f"{self.segment_bytes}, kept {retention} and {self.retention_seconds:g} s, a fault every "
            f"{self.fault_interval:.1f} s for {self.fault_seconds:g} s: {', '.join(self.kinds)}"
        )


def draw_plan(seed: int) -> FullPlan:
    rng = stream(seed, "full plan")
    kind: Kind = "groups" if rng.random() < 0.5 else "cluster"
    segment_bytes = rng.choice((65_536, 262_144))
    forgets = rng.random() < 0.5
    return FullPlan(
        seed=seed,
        kind=kind,
        spares=rng.choice((0, 1, 2)),
        flush="sync" if rng.random() < 0.5 else "async",
        latency=rng.choice((0.0002, 0.0005, 0.001, 0.005)),
        jitter=rng.choice((0.0, 0.0, 0.001, 0.01)),
        drift=rng.choice((0.0, 0.001, 0.05)),
        sync_seconds=rng.choice((0.0002, 0.001, 0.005, 0.02)),
        cold=rng.choice((0.0, 0.1)),
        # A log that is to be trimmed has to become long enough for it.
        segment_bytes=65_536 if forgets else segment_bytes,
        retention_bytes=rng.choice((0, 4 * 65_536)) if forgets else 0,
        retention_seconds=rng.choice((3.0, 10.0)) if forgets else 72 * 3600.0,
        rate=rng.choice((20.0, 60.0) if forgets else (20.0, 60.0, 150.0))
        if kind == "groups"
        else rng.choice((25.0, 50.0) if forgets else (10.0, 25.0, 50.0)),
        record_bytes_max=rng.choice((2000, 5000) if forgets else (64, 1000, 5000)),
        fault_interval=rng.choice((0.5, 1.0, 2.0)),
        fault_seconds=SECONDS_OF_FAULTS[kind],
        kinds=tuple(each for each in KINDS if rng.random() < 0.7) or ("kill",),
    )
