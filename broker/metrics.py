"""A broker's measurements in Prometheus' words: RocketMQ 5's and DLedger's names where they have one, ours beside them.

The page is made when it is asked for, from what the node counts anyway; nothing is measured for it. prometheus_client
is imported at the first request only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dledger.core.types import Role

if TYPE_CHECKING:
    from broker.context import BrokerContext
    from dledger.machine import GroupStatistics
    from dledger.measures import Distribution

HISTOGRAMS = {
    "write": ("dledger_append_entry_latency", "Seconds to bring a batch of entries to the page cache."),
    "fsync": ("dledger_sync_latency", "Seconds to bring the log to stable storage."),
    "replicate": ("dledger_replicate_entry_latency", "Seconds from sending entries to a peer to its answer."),
    "commit": ("dledger_commit_latency", "Seconds from proposing a batch to its commit."),
    "apply": ("dledger_apply_task_latency", "Seconds to apply committed entries in one turn."),
}


def metrics_page(broker: BrokerContext) -> bytes:
    """All families as text. Synchronous; some hundred microseconds."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(broker))
    return generate_latest(registry)


class _Collector:
    """What prometheus_client asks for its families."""

    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker

    def collect(self) -> Iterator[Any]:
        statistics = self._broker.group.statistics()
        labels = {
            "cluster": self._broker.config.cluster,
            "group": self._broker.config.broker_name,
            "node_id": statistics.node_id,
        }
        yield from _broker_families(self._broker, labels)
        yield from _position_families(statistics, labels)
        yield from _peer_families(statistics, labels)
        yield from _counter_families(statistics, labels)
        yield from _histogram_families(statistics, labels)


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, labels: Mapping[str, str], value: float) -> Any:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _broker_families(broker: BrokerContext, labels: Mapping[str, str]) -> Iterator[Any]:
    stats, group = broker.stats, broker.group
    yield _counter("rocketmq_messages_in", "Messages taken as leader since the start.", labels, stats.put.total)
    yield _counter("rocketmq_messages_out", "Messages given to consumers.", labels, stats.transferred.total)
    yield _counter("rocketmq_throughput_in", "Bytes taken as leader since the start.", labels, stats.put_bytes)
    yield _gauge(
        "rocketmq_storage_size",
        "Bytes of the log that are kept.",
        labels,
        max(0, group.end_position - group.first_position),
    )
    behind = max(0, group.end_position - group.committed_position)
    yield _gauge("rocketmq_storage_dispatch_behind_bytes", "Bytes of the log not yet committed here.", labels, behind)
    yield _gauge("rocketmq_topic_number", "Topics there are.", labels, sum(1 for _ in broker.state.topics.all()))
    producers = broker.clients.producer_groups()
    yield _gauge("rocketmq_producer_connections", "Producers.", labels, sum(map(len, producers.values())))
    consumers = sum(len(group.client_ids()) for group in broker.clients.consumer_groups())
    yield _gauge("rocketmq_consumer_connections", "Consumers.", labels, consumers)


def _position_families(statistics: GroupStatistics, labels: Mapping[str, str]) -> Iterator[Any]:
    yield _gauge("dledger_term", "Raft term.", labels, statistics.term)
    yield from _one_of(
        "dledger_role", "Role of this node.", labels, "role", list(Role.__members__), statistics.role.name
    )
    yield from _one_of(
        "dledger_state",
        "What the log is at.",
        labels,
        "state",
        ["serving", "repairing", "installing"],
        statistics.state,
    )
    for name, text, value in (
        ("ready", "1 as leader whose no-op of the term is applied.", statistics.ready),
        ("recovering", "1 after a power loss, until a leader has confirmed the log.", statistics.recovering),
        ("first_index", "First entry that is kept.", statistics.first_index),
        ("last_index", "Last entry, committed or not.", statistics.last_index),
        ("written_index", "Last entry in the page cache.", statistics.written_index),
        ("durable_index", "Last entry on stable storage.", statistics.durable_index),
        ("commit_index", "Last entry known to be committed.", statistics.commit_index),
        ("applied_index", "Last entry applied.", statistics.applied_index),
        ("entries_count", "Entries that are kept.", max(0, statistics.last_index - statistics.first_index + 1)),
        ("entry_store_size", "Bytes that are kept.", max(0, statistics.end_position - statistics.first_position)),
        ("trimmed_position", "Byte up to which retention has given the log up.", statistics.trimmed_position),
        ("waiting_records", "Messages that wait for their quorum.", statistics.waiting_records),
        ("loop_saturation", "Share of the last second the log took of the loop.", statistics.loop_saturation),
        ("disk_ok", "0 while the disk fails, is full or stalls.", statistics.disk_ok),
        ("disk_slow", "1 while writes go through a thread because one was slow.", statistics.is_disk_slow),
        ("disk_usage_ratio", "Used share of the file system.", statistics.disk_usage),
        ("voters", "Members that vote.", len(statistics.members)),
        ("learners", "Members that only follow.", len(statistics.learners)),
    ):
        yield _gauge(f"dledger_{name}", text, labels, float(value))


def _one_of(
    name: str, text: str, labels: Mapping[str, str], label: str, values: list[str], current: str
) -> Iterator[Any]:
    """A set of states as one series each, 1 for the present one: the way alerts can be written over."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=[*labels, label])
    for value in values:
        family.add_metric([*labels.values(), value.lower()], float(value == current))
    yield family


def _peer_families(statistics: GroupStatistics, labels: Mapping[str, str]) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    for name, text, values in (
        ("dledger_match_index", "Last entry the peer has acknowledged, as leader.", statistics.acknowledged),
        ("dledger_match_lag", "Bytes of the log the peer has not acknowledged, as leader.", statistics.lag_bytes),
        ("dledger_match_lag_seconds", "How long the peer has not had everything.", statistics.lag_seconds),
        ("dledger_peer_inflight", "Messages with entries under way to the peer.", statistics.inflight),
        ("dledger_peer_connected", "1 while a connection to the peer stands.", statistics.connected),
    ):
        family = GaugeMetricFamily(name, text, labels=[*labels, "remote_id"])
        for peer, value in sorted(values.items()):
            family.add_metric([*labels.values(), peer], float(value))
        yield family


def _counter_families(statistics: GroupStatistics, labels: Mapping[str, str]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    for name, value in sorted(statistics.counters.items()):
        yield _counter(f"dledger_{name}", name.replace("_", " ").capitalize() + ".", labels, value)
    for name, text, values in (
        ("dledger_steps_down", "Times this node gave up leadership.", statistics.steps_down),
        ("dledger_pre_votes_refused", "Pre-votes this node refused.", statistics.pre_votes_refused),
    ):
        family = CounterMetricFamily(name, text, labels=[*labels, "reason"])
        for reason, value in sorted(values.items()):
            family.add_metric([*labels.values(), reason], value)
        yield family


def _histogram_families(statistics: GroupStatistics, labels: Mapping[str, str]) -> Iterator[Any]:
    from prometheus_client.core import HistogramMetricFamily

    for name, distribution in sorted(statistics.histograms.items()):
        known, text = HISTOGRAMS.get(name, (f"dledger_{name}_latency", f"Seconds of {name}."))
        family = HistogramMetricFamily(known, text, labels=list(labels))
        family.add_metric(list(labels.values()), _buckets(distribution), sum_value=distribution.total)
        yield family


def _buckets(distribution: Distribution) -> list[tuple[str, float]]:
    """Cumulative, as the format wants them."""
    seen = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, distribution.bounds), "+Inf"], distribution.counts, strict=True):
        seen += count
        buckets.append((bound, float(seen)))
    return buckets
