"""What all processors of one node share, and the small decisions that more than one of them takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from broker.clients import ClientTable, ConsumerGroup
from broker.failures import FailureLog
from broker.groups import validate_group
from broker.jobs import Jobs
from broker.long_poll import LongPollTable
from broker.resets import PendingResets
from broker.settings import OVERRIDES_FILE, BrokerSettings, read_overrides
from broker.stats import BrokerStats
from broker.topics import retry_topic
from remoting.bodies import SubscriptionGroupConfig, TopicConfig
from remoting.codes import PERM_READ_WRITE, RequestCode
from remoting.command import Command
from remoting.errors import ConnectionLost

if TYPE_CHECKING:
    from broker.config import BrokerConfig
    from broker.state import BrokerState
    from dledger.group import RaftGroup
    from runtime.model import Env

PULL_OFFSETS_MAX: Final = 200_000
CREATING_MAX: Final = 1_000
"""Automatic creations under way at once; further ones wait for the next request that needs them."""


class BrokerContext:
    """Everything of one node that a processor may touch. Made by `BrokerNode` (or a test)."""

    def __init__(self, env: Env, config: BrokerConfig, state: BrokerState, group: RaftGroup, log: Any) -> None:
        self.env = env
        self.config = config
        self.state = state
        self.group = group
        self.log = log
        self.settings = BrokerSettings(config, self._saved_overrides())
        self.settings_changed()
        self.clients = ClientTable(config.client_expiry_s, self._notify_members)
        self.long_poll: LongPollTable
        self.stats = BrokerStats(config.cluster, env.clock.wall_ms())
        self.resets = PendingResets()
        self._memory_reach = env.ids.memory_bytes * 2 // 5
        self.pull_offsets: dict[tuple[str, str, int], int] = {}
        """(group, topic, queue id) to the newest pull's offset, for people; thinned out by the housekeeping."""
        self.failures = FailureLog(log)
        self.jobs = Jobs(self.failures)
        self.address = f"{config.advertised[0]}:{config.advertised[1]}"
        self.master_address = ""
        """Where the leader is registered, as far as the name servers told this follower."""
        self.when_registered: Callable[[Callable[[], None]], None] = lambda callback: callback()
        """Calls back when the name servers know the topics of now; the node puts its registration here."""
        self.on_thin_out: list[Callable[[], None]] = []
        """Called each 10 s: whoever keeps something for somebody who may have gone."""
        self._dirty: dict[Any, None] = {}
        self._creating: dict[str, None] = {}

    # -------------------------------------------------------------------------------------------------- connections

    def changed(self, conn: Any) -> None:
        """Something was written to a connection outside its own read; it leaves with the next `flush_changed`."""
        self._dirty[conn] = None

    def flush_changed(self) -> None:
        """One system call per connection for everything answered in this turn."""
        dirty = self._dirty
        if dirty:
            self._dirty = {}
            for conn in dirty:
                conn.flush()

    # ------------------------------------------------------------------------------------------------------- groups

    def group_config(self, name: str) -> SubscriptionGroupConfig | None:
        """The consumer group's settings. An unknown group counts as created where that is allowed."""
        found = self.state.groups.committed.get(name)
        if found is not None:
            return found
        config = self.state.groups.find(name)
        if config is not None:
            self._create(f"group {name}", ("group_put", config))
        return config

    def ensure_group(self, name: str) -> SubscriptionGroupConfig | None:
        """As `group_config`, for a consumer's heartbeat: its retry topic is made as well."""
        if validate_group(name) is not None:
            return None
        config = self.group_config(name)
        if config is not None and config.retry_queue_nums > 0:
            topic = retry_topic(name)
            if self.state.topics.get_pending(topic) is None:
                queues = config.retry_queue_nums
                wanted = TopicConfig(
                    topic_name=topic, read_queue_nums=queues, write_queue_nums=queues, perm=PERM_READ_WRITE
                )
                self._create(f"topic {topic}", ("topic_put", wanted))
        return config

    def _create(self, what: str, op: tuple[Any, ...]) -> None:
        """Log an automatic creation once, as leader only: a follower's clients send heartbeats to the leader too."""
        if not self.group.is_ready_leader or what in self._creating or len(self._creating) >= CREATING_MAX:
            return
        self._creating[what] = None

        def done(ok: bool, reason: str | None) -> None:
            self._creating.pop(what, None)
            if not ok:
                self.log.info("automatic creation was not logged", what=what, reason=reason)

        self.state.propose_op(op, done)

    def _notify_members(self, group: ConsumerGroup) -> None:
        """NOTIFY_CONSUMER_IDS_CHANGED to every member, so that they rebalance at once."""
        if group.message_model == "BROADCASTING" or not self.settings.notify_consumer_ids_changed:
            return
        config = self.state.groups.get(group.name)
        if config is not None and not config.notify_consumer_ids_changed_enable:
            return
        for conn in list(group.members):
            command = Command(code=RequestCode.NOTIFY_CONSUMER_IDS_CHANGED, opaque=0, ext={"consumerGroup": group.name})
            try:
                conn.send_oneway(command)
            except ConnectionLost:
                continue  # its end is on the way; on_close removes the member

    # ------------------------------------------------------------------------------------------------------ offsets

    def refusal_of_queue(self, topic: str, queue_id: int) -> str | None:
        """Why nothing is kept for a queue: it is none of the topic's, nor was one when messages were stored in it.

        RocketMQ keeps anything; a replicated table has to be bounded.
        """
        config = self.state.topics.get_pending(topic)
        count = max(config.read_queue_nums, config.write_queue_nums) if config is not None else 0
        if 0 <= queue_id < count or (config is not None and self.state.queues.exists(topic, queue_id)):
            return None
        return f"queueId[{queue_id}] is illegal, topic:[{topic}] has {count} queues"

    def commit_offset(self, group: str, topic: str, queue_id: int, offset: int) -> bool:
        """Take an offset update as leader, to be logged within 200 ms. False while a reset of the queue is pending."""
        if self.resets and self.resets.get(group, topic, queue_id) is not None:
            return False
        self.state.offsets.update(group, topic, queue_id, offset)
        return True

    def thin_out(self) -> None:
        """Keep what only serves people's curiosity within bounds."""
        for listener in self.on_thin_out:
            listener()
        if len(self.pull_offsets) > PULL_OFFSETS_MAX:
            self.pull_offsets.clear()

    # ------------------------------------------------------------------------------------------------ slow consumers

    def is_far_behind(self, physical_offset: int) -> bool:
        """RocketMQ's rule for cold data: further behind than 40 % of the memory (semantics.md 4.2)."""
        return self.group.end_position - physical_offset > self._memory_reach

    def suggested_broker_id(self, next_begin: int, max_offset: int, header: Any) -> int:
        """Where the next pull should go: 0, the leader, unless reading from followers is on and this one lags far."""
        if not self.settings.slave_read_enable or next_begin >= max_offset:
            return 0
        units = self.state.queues.units(header.topic, header.queue_id, next_begin, 1)
        if not units or not self.is_far_behind(int.from_bytes(units[:8])):
            return 0
        config = self.state.groups.get(header.consumer_group)
        return config.which_broker_when_consume_slowly if config is not None else 1

    # ----------------------------------------------------------------------------------------------- changed settings

    def _overrides_path(self) -> str:
        return f"{self.config.data_dir}/{OVERRIDES_FILE}"

    def _saved_overrides(self) -> dict[str, str]:
        path = self._overrides_path()
        files = self.env.files
        if not files.exists(path):
            return {}
        try:
            return read_overrides(files.read_bytes(path))
        except ValueError as error:
            self.log.warning("changed settings are ignored", path=path, reason=str(error))
            return {}

    def settings_changed(self) -> None:
        """Tell those who keep a copy."""
        self.state.change_permission(self.settings.broker_permission)

    def save_overrides(self) -> None:
        """Keep changed settings over a restart. Raises OSError."""
        self.env.files.write_atomic(self._overrides_path(), self.settings.encode_overrides())
