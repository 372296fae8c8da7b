"""Consumer group names and the replicated table of their configurations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from broker.tables import ConfigTable
from remoting.bodies import SubscriptionGroupConfig

if TYPE_CHECKING:
    from broker.config import BrokerConfig

GROUP_NAME_LIMIT: Final = 255
_NAME = re.compile(r"^[%|a-zA-Z0-9_-]+$")

DEFAULT_GROUPS: Final = (
    "TOOLS_CONSUMER",
    "FILTERSRV_CONSUMER",
    "SELF_TEST_C_GROUP",
    "CID_ONS-HTTP-PROXY",
    "CID_ONSAPI_PULL",
    "CID_ONSAPI_PERMISSION",
    "CID_ONSAPI_OWNER",
    "CID_RMQ_SYS_TRANS",
)


def validate_group(name: str) -> str | None:
    """Why a group name is refused, in RocketMQ's words; None when it is fine."""
    if not name.strip():
        return "the specified group is blank"
    if _NAME.fullmatch(name) is None:
        return f"the specified group[{name}] contains illegal characters, allowing only ^[%|a-zA-Z0-9_-]+$"
    if len(name) > GROUP_NAME_LIMIT:
        return f"the specified group[{name}] is longer than group max length {GROUP_NAME_LIMIT}."
    return None


class GroupTable(ConfigTable[SubscriptionGroupConfig]):
    """Consumer group configurations by name, committed + pending."""

    __slots__ = ("_auto_create",)

    def __init__(self, config: BrokerConfig) -> None:
        defaults = [SubscriptionGroupConfig(group_name=name) for name in DEFAULT_GROUPS]
        super().__init__(SubscriptionGroupConfig, "group_name", defaults)
        self._auto_create = config.auto_create_group

    def find(self, name: str) -> SubscriptionGroupConfig | None:
        """The committed config, or the one an automatic creation would give; None when that is off or illegal."""
        config = self.committed.get(name)
        if config is None and self._auto_create and validate_group(name) is None:
            return SubscriptionGroupConfig(group_name=name)
        return config
