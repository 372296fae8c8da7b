"""Histograms that cost one bisect a batch: fixed bounds from 50 us to 10 s, in steps of about 2 to 2.5."""

from __future__ import annotations

from bisect import bisect_left

from attrs import frozen

from dledger.core.messages import PreVoteReply

BOUNDS = (
    0.000_05,
    0.000_1,
    0.000_25,
    0.000_5,
    0.001,
    0.002_5,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""Upper bounds of the buckets, in seconds; one more bucket takes what is above them all."""


@frozen
class Distribution:
    """What a histogram has counted up to now."""

    bounds: tuple[float, ...]
    """Upper bounds in seconds; `counts` has one more bucket, for what is above."""
    counts: tuple[int, ...]
    total: float
    """Sum of all values, in seconds."""
    maximum: float

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Upper bound of the bucket in which the value at `share` (0 to 1) of all lies, never above the maximum."""
        wanted = share * self.count
        seen = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if count and seen >= wanted:
                return min(bound, self.maximum)
        return self.maximum


class Histogram:
    """Counts durations."""

    __slots__ = ("_counts", "_maximum", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0
        self._maximum = 0.0

    def record(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds
        if seconds > self._maximum:
            self._maximum = seconds

    def snapshot(self) -> Distribution:
        return Distribution(BOUNDS, tuple(self._counts), self._total, self._maximum)


COUNTERS = (
    "elections",
    "elections_won",
    "role_changes",
    "cuts",
    "entries_proposed",
    "records_proposed",
    "entries_applied",
    "syncs",
    "orphaned",
    "entries_dropped",
    "messages_dropped",
    "app_dropped",
    "damage_found",
    "writes_in_thread",
)


class Measures:
    """What one run of a group counts (raft.md 4.16)."""

    def __init__(self) -> None:
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.write = Histogram()
        """From handing entries to the page cache to its answer; of every eighth turn, and of each write in a thread."""
        self.fsync = Histogram()
        self.replicate = Histogram()
        """From a message with entries to its answer; one sample at a time for each peer."""
        self.commit = Histogram()
        """From the proposal of the oldest entry that a turn applies, to its application."""
        self.apply = Histogram()
        """What the state machine took in one turn; of every eighth."""
        self.steps_down: dict[str, int] = {}
        self.pre_votes_refused: dict[str, int] = {}

    def step_down(self, reason: str) -> None:
        """`reason` is one of the core's causes."""
        self.steps_down[reason] = self.steps_down.get(reason, 0) + 1

    def refuse_pre_vote(self, reply: PreVoteReply) -> None:
        reason = "a leader is heard" if reply.has_leader else "the term or log is behind"
        self.pre_votes_refused[reason] = self.pre_votes_refused.get(reason, 0) + 1

    def distributions(self) -> dict[str, Distribution]:
        return {
            "write": self.write.snapshot(),
            "fsync": self.fsync.snapshot(),
            "replicate": self.replicate.snapshot(),
            "commit": self.commit.snapshot(),
            "apply": self.apply.snapshot(),
        }
