"""Broker properties as GET_BROKER_CONFIG shows them, and the few that UPDATE_BROKER_CONFIG really changes.

RocketMQ takes any key and often does nothing with it. Here a change is either done, kept over a restart and answered 0,
or refused with a sentence. Unknown keys are ignored with 0, as RocketMQ does; the black list is answered 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from broker.delay import DELAY_LEVELS_TEXT
from remoting.bodies import DataVersion
from remoting.codes import ResponseCode

if TYPE_CHECKING:
    from broker.config import BrokerConfig

BLACK_LIST: Final = frozenset({"brokerConfigPath", "configBlackList"})
OVERRIDES_FILE: Final = "broker_properties.json"

__all__ = ["BLACK_LIST", "OVERRIDES_FILE", "BrokerSettings", "RefusedChange", "read_overrides"]


class RefusedChange(Exception):
    """A configuration change that is not made; `code` is the answer's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def _boolean(text: str) -> bool:
    return text.strip().lower() == "true"


class BrokerSettings:
    """What may change while the broker runs. Everything else comes from `config` and stays as it was at the start."""

    def __init__(self, config: BrokerConfig, overrides: Mapping[str, str] | None = None) -> None:
        self.config = config
        self.broker_permission = config.broker_permission
        self.lite_pull_enable = True
        self.long_polling_enable = True
        self.slave_read_enable = False
        self.notify_consumer_ids_changed = True
        self.server_side_reset = True
        self.overrides: dict[str, str] = {}
        self.version = DataVersion()
        self._changeable: dict[str, tuple[str, Callable[[str], Any]]] = {
            "brokerPermission": ("broker_permission", int),
            "litePullMessageEnable": ("lite_pull_enable", _boolean),
            "longPollingEnable": ("long_polling_enable", _boolean),
            "slaveReadEnable": ("slave_read_enable", _boolean),
            "notifyConsumerIdsChangedEnable": ("notify_consumer_ids_changed", _boolean),
            "useServerSideResetOffset": ("server_side_reset", _boolean),
        }
        for key, value in (overrides or {}).items():
            if key in self._changeable:
                self._set(key, value)

    def _set(self, key: str, value: str) -> None:
        name, convert = self._changeable[key]
        setattr(self, name, convert(value))
        self.overrides[key] = value.strip()

    def change(self, wanted: Mapping[str, str], wall_ms: int) -> bool:
        """Make all changes or none. Answers whether anything is different now. Raises RefusedChange."""
        for key in wanted:
            if key in BLACK_LIST:
                raise RefusedChange(ResponseCode.NO_PERMISSION, "Can not update config in black list.")
        known = self.properties()
        changes: dict[str, str] = {}
        for key, value in wanted.items():
            if key not in known or known[key] == value.strip():
                continue
            if key not in self._changeable:
                raise RefusedChange(
                    ResponseCode.SYSTEM_ERROR,
                    f"{key} cannot be changed while the broker runs: set it in cluster.toml and restart the node",
                )
            try:
                self._changeable[key][1](value)
            except ValueError:
                raise RefusedChange(ResponseCode.INVALID_PARAMETER, f"{key}={value!r} is not a number") from None
            changes[key] = value
        for key, value in changes.items():
            self._set(key, value)
        if changes:
            self.version = self.version.next(wall_ms)
        return bool(changes)

    def properties(self) -> dict[str, str]:
        """Everything GET_BROKER_CONFIG shows, under RocketMQ's names."""
        config = self.config
        group = config.group
        plain: dict[str, object] = {
            "brokerClusterName": config.cluster,
            "brokerName": config.broker_name,
            "brokerId": config.broker_id + 1,
            "brokerRole": "ASYNC_MASTER" if group.flush == "async" else "SYNC_MASTER",
            "brokerIP1": config.advertised[0],
            "listenPort": config.listen[1],
            "namesrvAddr": ";".join(config.namesrv),
            "enableDLegerCommitLog": True,
            "dLegerGroup": group.group,
            "dLegerSelfId": config.node_id,
            "dLegerPeers": ";".join(f"{name}-{host}:{port}" for name, (host, port) in sorted(group.peers.items())),
            "storePathRootDir": config.data_dir,
            "mappedFileSizeCommitLog": group.segment_bytes,
            "flushDiskType": "ASYNC_FLUSH" if group.flush == "async" else "SYNC_FLUSH",
            "autoCreateTopicEnable": config.auto_create_topic,
            "autoCreateSubscriptionGroup": config.auto_create_group,
            "defaultTopicQueueNums": config.default_topic_queues,
            "brokerPermission": self.broker_permission,
            "regionId": config.region_id,
            "traceOn": config.trace_on,
            "traceTopicEnable": False,
            "msgTraceTopicName": "RMQ_SYS_TRACE_TOPIC",
            "rejectTransactionMessage": config.reject_transactions,
            "maxMessageSize": config.max_message_bytes,
            "messageDelayLevel": DELAY_LEVELS_TEXT,
            "messageIndexEnable": True,
            "enablePropertyFilter": False,
            "litePullMessageEnable": self.lite_pull_enable,
            "longPollingEnable": self.long_polling_enable,
            "slaveReadEnable": self.slave_read_enable,
            "notifyConsumerIdsChangedEnable": self.notify_consumer_ids_changed,
            "useServerSideResetOffset": self.server_side_reset,
            "maxTransferBytesOnMessageInMemory": config.pull_max_bytes,
            "maxTransferCountOnMessageInMemory": config.pull_max_messages,
            "registerNameServerPeriod": int(config.register_interval_s * 1000),
            "useTLS": False,
        }
        return {key: _text(value) for key, value in plain.items()}

    def encode_overrides(self) -> bytes:
        """For the file that keeps changes over a restart."""
        return msgspec.json.encode(self.overrides)


def read_overrides(data: bytes) -> dict[str, str]:
    """What `encode_overrides` wrote. Raises ValueError."""
    try:
        return msgspec.json.decode(data, type=dict[str, str])
    except msgspec.DecodeError as error:
        raise ValueError(f"{OVERRIDES_FILE} cannot be read: {error}") from error


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
