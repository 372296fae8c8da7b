"""What a driver knows about itself, for status commands and metrics (raft.md 4.16)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dledger.config import GroupConfig
from dledger.core.progress import Progress
from dledger.machine import GroupStatistics
from dledger.measures import Histogram

if TYPE_CHECKING:
    from dledger.driver import Driver

LAG_SAMPLES_MAX = 2400
"""Ten minutes of where the log ended, looked at four times a second."""
SATURATION_SECONDS = 1.0


class LagHistory:
    """Where the log ended at which moment: tells for how long a peer has not had everything."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=LAG_SAMPLES_MAX)

    def note(self, now: float, last_index: int) -> None:
        """Now and then."""
        if not self._ends or self._ends[-1][1] != last_index:
            self._ends.append((now, last_index))

    def seconds(self, now: float, written_index: int, last_index: int) -> float:
        """Age of the oldest moment at which the log already held more than `written_index`, as far as is remembered."""
        if written_index < last_index:
            for at, end_index in self._ends:
                if end_index > written_index:
                    return now - at
        return 0.0


class Saturation:
    """Share of the last second that the turns of a group took of the loop."""

    def __init__(self, now: float) -> None:
        self.busy = 0.0
        """Seconds; every turn adds what it took."""
        self.share = 0.0
        self._since = now

    def look(self, now: float) -> None:
        """A few times a second."""
        elapsed = now - self._since
        if elapsed >= SATURATION_SECONDS:
            self.share = min(1.0, self.busy / elapsed)
            self.busy, self._since = 0.0, now


class RoundTrips:
    """How long a message with entries takes to be answered: one at a time for each peer."""

    def __init__(self, seconds: Histogram) -> None:
        self._seconds = seconds
        self.under_way: dict[str, tuple[int, float]] = {}
        """By peer: the number of the message, and when it was seen to be under way."""

    def look(self, progress_of: Mapping[str, Progress], now: float) -> None:
        """Note what was answered, and watch what is under way."""
        under_way = self.under_way
        for peer, progress in progress_of.items():
            sample = under_way.get(peer)
            if sample is None:
                if progress.inflight:
                    under_way[peer] = (progress.seq, now)
            elif progress.reply_seq >= sample[0]:
                self._seconds.record(now - sample[1])
                del under_way[peer]

    def forget(self) -> None:
        """This node does not lead any more."""
        self.under_way.clear()


def statistics_of(driver: Driver, config: GroupConfig, lag: LagHistory, now: float) -> GroupStatistics:
    """One consistent look; costs some microseconds per peer."""
    core, store, applier, members = driver.core, driver.store, driver.applier, driver.roster.members
    progress = core.progress if core.is_leader else {}
    last_index = store.last_index
    return GroupStatistics(
        node_id=config.node_id,
        flush=config.flush,
        role=driver.role,
        term=driver.term,
        leader_id=driver.leader_id,
        ready=driver.is_ready and driver.batch.leading,
        recovering=core.recovering,
        first_index=store.first_index,
        last_index=last_index,
        written_index=store.written_index,
        durable_index=store.durable_index,
        commit_index=core.commit_index,
        applied_index=applier.applied_index,
        first_position=store.first_position,
        committed_position=applier.committed_position,
        end_position=store.position_end,
        acknowledged={peer: each.written for peer, each in progress.items()},
        lag_bytes={peer: store.position_end - store.end_of(each.written) for peer, each in progress.items()},
        connected={peer: driver.peers.is_connected(peer) for peer in members.all if peer != config.node_id},
        waiting_records=applier.waiting_records,
        members=members.voters,
        learners=members.learners,
        addresses=driver.roster.addresses_of(members),
        members_index=driver.roster.members_index,
        priorities=dict(config.priorities),
        peer_state={peer: each.state.name.lower() for peer, each in progress.items()},
        inflight={peer: len(each.inflight) for peer, each in progress.items()},
        lag_seconds={peer: lag.seconds(now, each.written, last_index) for peer, each in progress.items()},
        trimmed_position=driver.retention.begin_position,
        disk_ok=core.is_disk_ok,
        disk_usage=driver.disk.usage.share,
        disk_watermarks=config.disk_watermarks,
        is_disk_slow=store.is_slow,
        loop_saturation=driver.saturation.share,
        histograms=driver.measures.distributions(),
        steps_down=dict(driver.measures.steps_down),
        pre_votes_refused=dict(driver.measures.pre_votes_refused),
        counters={**driver.counters, **driver.retention.counters, "turns": driver.turns},
    )
