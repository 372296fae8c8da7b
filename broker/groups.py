"""Consumer group names and the replicated table of their configurations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from broker.tables import PendingTable
from remoting.bodies import DataVersion, SubscriptionGroupConfig

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


class GroupTable(PendingTable[str, SubscriptionGroupConfig]):
    """Consumer group configurations by name, committed + pending."""

    __slots__ = ("_auto_create", "data_version")

    def __init__(self, config: BrokerConfig) -> None:
        super().__init__()
        self._auto_create = config.auto_create_group
        self.data_version = DataVersion()
        self.add_defaults()

    def add_defaults(self) -> None:
        for name in DEFAULT_GROUPS:
            if name not in self.committed:
                self.committed[name] = SubscriptionGroupConfig(group_name=name)

    def all(self) -> dict[str, SubscriptionGroupConfig]:
        """Committed groups by name, sorted."""
        return dict(sorted(self.committed.items()))

    def names(self) -> list[str]:
        return sorted(self.committed)

    def find(self, name: str) -> SubscriptionGroupConfig | None:
        """The committed config, or the one an automatic creation would give; None when that is off or illegal."""
        config = self.committed.get(name)
        if config is None and self._auto_create and validate_group(name) is None:
            return SubscriptionGroupConfig(group_name=name)
        return config

    def changed(self, wall_ms: int, term: int) -> None:
        self.data_version = self.data_version.next(wall_ms, term)

    def snapshot(self) -> dict[str, Any]:
        return {
            "version": msgspec.to_builtins(self.data_version),
            "groups": [msgspec.to_builtins(config) for config in self.all().values()],
        }

    def restore(self, snapshot: dict[str, Any] | None) -> None:
        self.committed.clear()
        self._pending.clear()
        self.data_version = DataVersion()
        if snapshot is not None:
            self.data_version = msgspec.convert(snapshot["version"], DataVersion)
            for plain in snapshot["groups"]:
                config = msgspec.convert(plain, SubscriptionGroupConfig)
                self.committed[config.group_name] = config
        self.add_defaults()
