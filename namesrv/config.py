"""What a name server is told at start, and the settings an operator may change while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from attrs import field, frozen

from runtime.logs import Logger, get_logger


@frozen
class NamesrvConfig:
    """One name server."""

    listen: tuple[str, int]
    """Host and port for brokers and clients; port 0 takes a free one."""
    data_dir: str
    name: str = "ns0"
    peers: Mapping[str, tuple[str, int]] = field(factory=dict)
    """Control-plane addresses of all name servers by name, this one included. With fewer than two there is no
    replication: the same state machine runs locally."""
    secret: str | None = None
    """Password of the control plane; required unless all its addresses are loopback."""
    cluster: str = "DefaultCluster"
    log: Logger = field(factory=lambda: get_logger("namesrv"))


def _boolean(text: str) -> bool:
    return text.strip().lower() == "true"


def _setting(default: Any, key: str, convert: Callable[[str], Any], *, fixed: bool = False) -> Any:
    return field(default=default, metadata={"key": key, "convert": convert, "fixed": fixed})


@frozen
class Settings:
    """RocketMQ's name-server settings that mean something here, under RocketMQ's names (codes 318 and 319)."""

    scan_interval_ms: int = _setting(5_000, "scanNotActiveBrokerInterval", int)
    order_message_enable: bool = _setting(False, "orderMessageEnable", _boolean)
    """Whether routes carry the order configuration of their topic."""
    return_order_topic_config_to_broker: bool = _setting(True, "returnOrderTopicConfigToBroker", _boolean)
    enable_all_topic_list: bool = _setting(True, "enableAllTopicList", _boolean)
    enable_topic_list: bool = _setting(True, "enableTopicList", _boolean)
    delete_topic_with_broker_registration: bool = _setting(False, "deleteTopicWithBrokerRegistration", _boolean)
    config_blacklist: str = _setting("configBlackList;configStorePath;kvConfigPath", "configBlackList", str, fixed=True)
    config_store_path: str = _setting("", "configStorePath", str, fixed=True)
    kv_config_path: str = _setting("", "kvConfigPath", str, fixed=True)

    def properties(self) -> dict[str, str]:
        """Each setting as text under RocketMQ's name."""
        return {attribute.metadata["key"]: _text(getattr(self, attribute.name)) for attribute in attrs.fields(Settings)}

    def blocked(self, properties: Mapping[str, str]) -> list[str]:
        """Those of the given names that must not be changed from outside, sorted."""
        listed = {name.strip() for name in self.config_blacklist.split(";") if name.strip()}
        return sorted(listed & set(properties))

    def updated(self, properties: Mapping[str, str]) -> Settings:
        """The settings with new values; unknown names are ignored. Raises ValueError naming the bad one."""
        changes: dict[str, Any] = {}
        for attribute in attrs.fields(Settings):
            text = properties.get(attribute.metadata["key"])
            if text is None or attribute.metadata["fixed"]:
                continue
            try:
                changes[attribute.name] = attribute.metadata["convert"](text)
            except ValueError as error:
                raise ValueError(f"{attribute.metadata['key']}={text!r} is not a number") from error
        if changes.get("scan_interval_ms", 1) < 1:
            raise ValueError("scanNotActiveBrokerInterval must be above 0")
        return attrs.evolve(self, **changes)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
