"""Topic names and the replicated table of topic configurations (semantics.md 1)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from broker.tables import ConfigTable
from remoting.bodies import TopicConfig
from remoting.codes import (
    DLQ_TOPIC_PREFIX,
    PERM_INHERIT,
    PERM_READ,
    PERM_READ_WRITE,
    PERM_WRITE,
    RETRY_TOPIC_PREFIX,
    SCHEDULE_TOPIC,
    SYSTEM_TOPIC_TEMPLATE,
    TOPIC_UNIT,
)

if TYPE_CHECKING:
    from broker.config import BrokerConfig

HALF_TOPIC: Final = "RMQ_SYS_TRANS_HALF_TOPIC"
OP_HALF_TOPIC: Final = "RMQ_SYS_TRANS_OP_HALF_TOPIC"
CHECK_MAX_TIME_TOPIC: Final = "TRANS_CHECK_MAX_TIME_TOPIC"
TIMER_TOPIC: Final = "rmq_sys_wheel_timer"
TOPIC_NAME_LIMIT: Final = 127
_NAME = re.compile(r"^[%|a-zA-Z0-9_-]+$")

_SYSTEM_TOPICS: Final = frozenset(
    {
        SYSTEM_TOPIC_TEMPLATE,
        SCHEDULE_TOPIC,
        "BenchmarkTest",
        HALF_TOPIC,
        OP_HALF_TOPIC,
        CHECK_MAX_TIME_TOPIC,
        "RMQ_SYS_TRACE_TOPIC",
        "SELF_TEST_TOPIC",
        "OFFSET_MOVED_EVENT",
        "CHECKPOINT_TOPIC",
    }
)
_FORBIDDEN_TO_SEND: Final = frozenset(
    {SCHEDULE_TOPIC, HALF_TOPIC, OP_HALF_TOPIC, CHECK_MAX_TIME_TOPIC, "SELF_TEST_TOPIC", "OFFSET_MOVED_EVENT"}
)


def validate_topic(name: str) -> str | None:
    """Why a topic name is refused, in RocketMQ's words; None when it is fine."""
    if not name.strip():
        return "The specified topic is blank."
    if _NAME.fullmatch(name) is None:
        return "The specified topic contains illegal characters, allowing only ^[%|a-zA-Z0-9_-]+$"
    if len(name) > TOPIC_NAME_LIMIT:
        return "The specified topic is longer than topic max length."
    return None


def is_system_topic(name: str, config: BrokerConfig | None = None) -> bool:
    """Topics an administrator may not create, change or delete."""
    if name in _SYSTEM_TOPICS or name.startswith("rmq_sys_"):
        return True
    return config is not None and name in (config.cluster, config.broker_name)


def is_forbidden_to_send(name: str) -> bool:
    """Topics only the broker itself writes to."""
    return name in _FORBIDDEN_TO_SEND


def retry_topic(group: str) -> str:
    return RETRY_TOPIC_PREFIX + group


def dlq_topic(group: str) -> str:
    return DLQ_TOPIC_PREFIX + group


def permission_text(perm: int) -> str:
    return ("R" if perm & PERM_READ else "-") + ("W" if perm & PERM_WRITE else "-") + ("X" if perm & 1 else "-")


def topic_config_text(config: TopicConfig) -> str:
    """As Java prints a TopicConfig in remarks."""
    attributes = ", ".join(f"{name}={value}" for name, value in sorted(config.attributes.items()))
    return (
        f"TopicConfig [topicName={config.topic_name}, readQueueNums={config.read_queue_nums}, "
        f"writeQueueNums={config.write_queue_nums}, perm={permission_text(config.perm)}, "
        f"topicFilterType={config.topic_filter_type}, topicSysFlag={config.topic_sys_flag}, "
        f"order={'true' if config.order else 'false'}, attributes={{{attributes}}}]"
    )


def default_topics(config: BrokerConfig) -> list[TopicConfig]:
    """What a new broker starts with (semantics.md 1.1)."""
    rows: list[tuple[str, int, int]] = [
        (SCHEDULE_TOPIC, 18, PERM_READ_WRITE),
        (config.cluster, 16, PERM_READ_WRITE | PERM_INHERIT),
        (config.broker_name, 1, PERM_READ_WRITE | PERM_INHERIT),
        ("SELF_TEST_TOPIC", 1, PERM_READ_WRITE),
        ("BenchmarkTest", 1024, PERM_READ_WRITE),
        ("OFFSET_MOVED_EVENT", 1, PERM_READ_WRITE),
        (f"{config.cluster}_REPLY_TOPIC", 1, PERM_READ_WRITE),
        (HALF_TOPIC, 1, PERM_READ_WRITE),
        (OP_HALF_TOPIC, 1, PERM_READ_WRITE),
        (f"rmq_sys_REVIVE_LOG_{config.cluster}", 8, PERM_READ_WRITE),
        (TIMER_TOPIC, 1, PERM_READ_WRITE),
        (f"rmq_sys_SYNC_BROKER_MEMBER_{config.broker_name}", 1, PERM_INHERIT),
    ]
    if config.auto_create_topic:
        rows.insert(0, (SYSTEM_TOPIC_TEMPLATE, config.default_topic_queues, PERM_READ_WRITE | PERM_INHERIT))
    return [
        TopicConfig(topic_name=name, read_queue_nums=queues, write_queue_nums=queues, perm=perm)
        for name, queues, perm in rows
    ]


class TopicTable(ConfigTable[TopicConfig]):
    """Topic configurations by name, committed + pending."""

    __slots__ = ()

    def __init__(self, config: BrokerConfig) -> None:
        super().__init__(TopicConfig, "topic_name", default_topics(config))

    def created_by_send(
        self, name: str, template: str, template_queues: int, *, unit_mode: bool, retry_queues: int
    ) -> TopicConfig | None:
        """The config an unknown topic gets on its first send (semantics.md 1.2); None when it may not be created."""
        default = self.committed.get(template)
        if default is not None and default.perm & PERM_INHERIT:
            queues = max(0, min(template_queues, default.write_queue_nums))
            return TopicConfig(
                topic_name=name,
                read_queue_nums=queues,
                write_queue_nums=queues,
                perm=default.perm & ~PERM_INHERIT,
                topic_filter_type=default.topic_filter_type,
                topic_sys_flag=TOPIC_UNIT if unit_mode else 0,
            )
        if name.startswith(RETRY_TOPIC_PREFIX):
            return TopicConfig(
                topic_name=name,
                read_queue_nums=retry_queues,
                write_queue_nums=retry_queues,
                perm=PERM_READ_WRITE,
                topic_sys_flag=TOPIC_UNIT if unit_mode else 0,
            )
        return None
