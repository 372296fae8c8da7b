"""What a broker node is told at its start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import field, frozen, validators

from remoting.codes import DEFAULT_REGION, PERM_READ_WRITE

if TYPE_CHECKING:
    from dledger.config import GroupConfig

MEBIBYTE: Final = 1024 * 1024


@frozen(kw_only=True)
class BrokerConfig:
    """One broker node. Addresses are (host, port); sizes are bytes; times end in their unit."""

    cluster: str
    broker_name: str
    node_id: str
    broker_id: int
    """K of node nK; it registers as K + 1, and as 0 while it leads."""
    listen: tuple[str, int]
    advertised: tuple[str, int]
    """Where clients reach this node; it is written into every message as storeHost, so it must be an IP address."""
    namesrv: tuple[str, ...]
    group: GroupConfig
    data_dir: str
    metrics: tuple[str, int] | None = None
    """Where measurements are served over HTTP, for Prometheus; nowhere when None."""

    auto_create_topic: bool = True
    auto_create_group: bool = True
    default_topic_queues: int = 8
    """Queues of TBW102; an automatic topic gets at most as many."""
    retry_queues: int = 1
    broker_permission: int = PERM_READ_WRITE
    region_id: str = DEFAULT_REGION
    trace_on: bool = True
    reject_transactions: bool = False

    max_message_bytes: int = 4 * MEBIBYTE
    """Limit of a body; the stored form may have 64 KiB more."""
    max_properties_bytes: int = 32_767
    max_parked_sends: int = 1_000
    max_parked_bytes: int = 64 * MEBIBYTE
    max_waiting_ops: int = 10_000

    dedup_window_ms: int = field(default=60_000, validator=validators.ge(0))
    """0 switches the window off."""
    dedup_keys: int = 1_000_000

    offsets_interval_ms: int = 200
    lock_lease_ms: int = 60_000
    queue_flush_interval_ms: int = 1_000
    queue_flush_bytes: int = 4_096
    queue_file_units: int = 300_000
    open_queue_files: int = 256
    index_segment_keys: int = field(default=65_536, validator=validators.ge(16))
    checkpoint_interval_ms: int = 10_000
    checkpoint_log_bytes: int = 256 * MEBIBYTE
    checkpoint_meta_bytes: int = 64 * MEBIBYTE
    delay_look_ms: int = 100

    proposal_wait_s: float = 2.5
    drain_s: float = 35.0
    pull_max_messages: int = 32
    pull_max_bytes: int = 256 * 1024
    client_expiry_s: float = 120.0
    register_interval_s: float = 30.0
