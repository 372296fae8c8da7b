"""Bodies of remoting.md 7.2: what each holds, how it is written for Java, and lenient reading.

Members are written sorted by name, absent ones left out. Reading ignores unknown members, takes missing and null ones
as the default, and quoted numbers as numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from remoting.codes import VERSION, VERSION_STATIC_TOPIC_TAIL
from remoting.errors import BodyError
from remoting.fastjson import ObjectKey, dumps, loads, queue_object, queue_of_key
from remoting.message import MessageQueue, java_hash

B = TypeVar("B")
INFLATED_LIMIT_BYTES = 16 * 1024 * 1024


class Body(msgspec.Struct, kw_only=True, rename="camel"):
    """Base: members named in camel case."""


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key if isinstance(key, str | ObjectKey) else str(key): _without_nulls(member)
            for key, member in value.items()
            if member is not None
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def from_plain(value: Any, kind: type[B]) -> B:
    """A body from JSON values already read. Raises BodyError."""
    try:
        return msgspec.convert(_without_nulls(value), kind, strict=False)
    except (msgspec.ValidationError, RecursionError, TypeError) as error:
        raise BodyError(f"{kind.__name__}: {error}") from error


def decode_body(data: bytes | memoryview | str, kind: type[B]) -> B:
    """Read a body of the dialect as `kind`. Raises BodyError."""
    return from_plain(loads(data), kind)


def to_plain(value: Any) -> Any:
    """Structs become mappings with members sorted by name, None members left out; the rest is kept."""
    if isinstance(value, MessageQueue):
        return queue_object(value)
    if isinstance(value, msgspec.Struct):
        members = {
            wire: getattr(value, name)
            for name, wire in zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
        }
        return {name: to_plain(member) for name, member in sorted(members.items()) if member is not None}
    if isinstance(value, Mapping):
        return {key: to_plain(member) for key, member in value.items() if member is not None}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(to_plain(item) for item in value)
    return value


def encode_body(value: Any, *, raw_keys: bool = True, ascii_only: bool = False) -> bytes:
    """Write a body (a struct of this module, or plain values) as Java does."""
    return dumps(to_plain(value), raw_keys=raw_keys, ascii_only=ascii_only)


# ---------------------------------------------------------------------------------------------- clients and groups


class SubscriptionData(Body):
    """What a consumer wants of one topic. `code_set` are the Java hashes of the tags."""

    topic: str
    sub_string: str = "*"
    tags_set: list[str] = []
    code_set: list[int] = []
    sub_version: int = 0
    expression_type: str = "TAG"
    class_filter_mode: bool = False

    @property
    def takes_all(self) -> bool:
        return self.expression_type in ("", "TAG") and not self.code_set


def tag_subscription(topic: str, expression: str, sub_version: int) -> SubscriptionData:
    """The subscription for a tag expression: "*" or empty for all, else tags joined with "||".

    Raises ValueError where the expression holds no tag between its bars.
    """
    text = expression.strip()
    if text in ("", "*"):
        return SubscriptionData(topic=topic, sub_string="*", sub_version=sub_version)
    tags = sorted({part.strip() for part in text.split("||") if part.strip()})
    if not tags:
        raise ValueError(f"no tag in the filter {expression!r}")
    codes = sorted({java_hash(tag) for tag in tags})
    return SubscriptionData(topic=topic, sub_string=text, tags_set=tags, code_set=codes, sub_version=sub_version)


class ConsumerData(Body):
    group_name: str
    consume_type: str = "CONSUME_PASSIVELY"
    message_model: str = "CLUSTERING"
    consume_from_where: str = "CONSUME_FROM_LAST_OFFSET"
    subscription_data_set: list[SubscriptionData] = []
    unit_mode: bool = False


class ProducerData(Body):
    group_name: str


class HeartbeatData(Body):
    """Body of HEART_BEAT. With a fingerprint and `without_sub` the subscriptions are absent, not empty."""

    client_id: str = msgspec.field(name="clientID")
    producer_data_set: list[ProducerData] = []
    consumer_data_set: list[ConsumerData] = []
    heartbeat_fingerprint: int = 0
    without_sub: bool = False


class ConnectionInfo(Body):
    client_id: str
    client_addr: str
    language: str = "JAVA"
    version: int = 0


class ConsumerConnection(Body):
    connection_set: list[ConnectionInfo] = []
    subscription_table: dict[str, SubscriptionData] = {}
    consume_type: str = "CONSUME_PASSIVELY"
    message_model: str = "CLUSTERING"
    consume_from_where: str = "CONSUME_FROM_LAST_OFFSET"


class ProducerConnection(Body):
    connection_set: list[ConnectionInfo] = []


class ProducerInfo(Body):
    client_id: str
    remote_ip: str = msgspec.field(name="remoteIP")
    language: str = "JAVA"
    version: int = 0
    last_update_timestamp: int = 0


class ProducerTableInfo(Body):
    data: dict[str, list[ProducerInfo]] = {}


class ConsumerIdList(Body):
    """Answer of GET_CONSUMER_LIST_BY_GROUP."""

    consumer_id_list: list[str] = []


class GroupRetryPolicy(Body):
    type: str = "CUSTOMIZED"


class SubscriptionGroupConfig(Body):
    """Settings of a consumer group."""

    group_name: str
    consume_enable: bool = True
    consume_from_min_enable: bool = True
    consume_broadcast_enable: bool = True
    consume_message_orderly: bool = False
    retry_queue_nums: int = 1
    retry_max_times: int = 16
    broker_id: int = 0
    which_broker_when_consume_slowly: int = 1
    notify_consumer_ids_changed_enable: bool = True
    group_sys_flag: int = 0
    consume_timeout_minute: int = 15
    group_retry_policy: GroupRetryPolicy = msgspec.field(default_factory=GroupRetryPolicy)
    attributes: dict[str, str] = {}


# ----------------------------------------------------------------------------------------------------------- routes


class DataVersion(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """Which state of a table a registration speaks of; equal when all three are."""

    counter: int = 0
    state_version: int = 0
    timestamp: int = 0

    def next(self, wall_ms: int, state_version: int | None = None) -> DataVersion:
        """The version after one more change."""
        version = self.state_version if state_version is None else state_version
        return DataVersion(counter=self.counter + 1, state_version=version, timestamp=wall_ms)


class SubscriptionGroupWrapper(Body):
    subscription_group_table: dict[str, SubscriptionGroupConfig] = {}
    data_version: DataVersion = DataVersion()
    forbidden_table: dict[str, dict[str, int]] | None = None


class TopicConfig(Body):
    """Settings of a topic on one broker group."""

    topic_name: str
    read_queue_nums: int = 16
    write_queue_nums: int = 16
    perm: int = 6
    topic_filter_type: str = "SINGLE_TAG"
    topic_sys_flag: int = 0
    order: bool = False
    attributes: dict[str, str] = {}

    def to_text(self) -> str:
        """The form of compressed registration; order and sysFlag do not fit in."""
        attributes = dumps(self.attributes, raw_keys=False).decode()
        return (
            f"{self.topic_name} {self.read_queue_nums} {self.write_queue_nums} {self.perm}"
            f" {self.topic_filter_type} {attributes}"
        )

    @classmethod
    def from_text(cls, text: str) -> TopicConfig:
        """Five parts suffice. Raises BodyError."""
        parts = text.split(" ", 5)
        if len(parts) < 5:
            raise BodyError(f"topic in text form has {len(parts)} parts: {text[:80]!r}")
        try:
            attributes = loads(parts[5]) if len(parts) == 6 and parts[5] else {}
            return cls(
                topic_name=parts[0],
                read_queue_nums=int(parts[1]),
                write_queue_nums=int(parts[2]),
                perm=int(parts[3]),
                topic_filter_type=parts[4],
                attributes={str(name): str(value) for name, value in attributes.items()},
            )
        except (ValueError, AttributeError) as error:
            raise BodyError(f"topic in text form: {text[:80]!r}") from error


class TopicConfigSerializeWrapper(Body):
    """All topics of a broker. The three mapping members belong to static topics (5.x) and stay empty here."""

    topic_config_table: dict[str, TopicConfig] = {}
    data_version: DataVersion = DataVersion()
    mapping_data_version: DataVersion | None = None
    topic_queue_mapping_detail_map: dict[str, Any] | None = None
    topic_queue_mapping_info_map: dict[str, Any] | None = None


class RegisterBrokerBody(Body):
    topic_config_serialize_wrapper: TopicConfigSerializeWrapper = msgspec.field(
        default_factory=TopicConfigSerializeWrapper
    )
    filter_server_list: list[str] = []


class BrokerData(Body):
    """Addresses of one broker group by broker id; 0 is the leader."""

    broker_name: str
    cluster: str = ""
    broker_addrs: dict[int, str] = {}
    enable_acting_master: bool = False
    zone_name: str | None = None

    def leader_address(self) -> str | None:
        return self.broker_addrs.get(0)


class QueueData(Body):
    broker_name: str
    read_queue_nums: int = 0
    write_queue_nums: int = 0
    perm: int = 6
    topic_sys_flag: int = 0


class TopicRouteData(Body):
    broker_datas: list[BrokerData] = []
    queue_datas: list[QueueData] = []
    filter_server_table: dict[str, list[str]] = {}
    order_topic_conf: str | None = None
    topic_queue_mapping_by_broker: dict[str, Any] | None = None


class ClusterInfo(Body):
    broker_addr_table: dict[str, BrokerData] = {}
    cluster_addr_table: dict[str, list[str]] = {}


class BrokerMemberGroup(Body):
    broker_addrs: dict[int, str] = {}
    broker_name: str = ""
    cluster: str = ""


class GetBrokerMemberGroupResponseBody(Body):
    broker_member_group: BrokerMemberGroup


def encode_topic_route(route: TopicRouteData, *, standard_json: bool) -> bytes:
    """Standard: quoted keys, ASCII only. Else the form for clients below 4.9.4, which also takes no blank anywhere."""
    if not standard_json:
        return encode_body(route, raw_keys=True)
    plain = to_plain(route)
    for broker in plain["brokerDatas"]:
        broker["brokerAddrs"] = dict(sorted(broker["brokerAddrs"].items(), key=lambda item: str(item[0])))
    return dumps(plain, raw_keys=False, ascii_only=True)


def decode_topic_route(data: bytes | memoryview) -> TopicRouteData:
    return decode_body(data, TopicRouteData)


def register_body_crc(data: bytes) -> int:
    return zlib.crc32(data) & 0x7FFFFFFF


def encode_register_broker(body: RegisterBrokerBody, *, compressed: bool = False, version: int = VERSION) -> bytes:
    """Body of REGISTER_BROKER, plain JSON or the zlib form."""
    if not compressed:
        return encode_body(body)
    wrapper = body.topic_config_serialize_wrapper
    parts: list[bytes] = []

    def put(text: bytes) -> None:
        parts.append(len(text).to_bytes(4))
        parts.append(text)

    put(encode_body(wrapper.data_version))
    parts.append(len(wrapper.topic_config_table).to_bytes(4))
    for config in wrapper.topic_config_table.values():
        put(config.to_text().encode())
    put(dumps(body.filter_server_list, raw_keys=False))
    if version >= VERSION_STATIC_TOPIC_TAIL:
        infos = wrapper.topic_queue_mapping_info_map or {}
        parts.append(len(infos).to_bytes(4))
        for info in infos.values():
            put(encode_body(info))
    return zlib.compress(b"".join(parts))


def decode_register_broker(data: bytes | memoryview, *, version: int = VERSION) -> RegisterBrokerBody:
    """Either form, told apart by the first byte (5.x brokers compress and say they do not). Raises BodyError."""
    raw = bytes(data)
    if raw[:1] != b"\x78":
        return decode_body(raw, RegisterBrokerBody) if raw else RegisterBrokerBody()
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(raw, INFLATED_LIMIT_BYTES)
    except zlib.error as error:
        raise BodyError(f"registration body: {error}") from error
    if inflater.unconsumed_tail:
        raise BodyError(f"registration body inflates to more than {INFLATED_LIMIT_BYTES} bytes")
    position = 0

    def number() -> int:
        nonlocal position
        value = text[position : position + 4]
        if len(value) < 4:
            raise BodyError("registration body ends within a number")
        position += 4
        return int.from_bytes(value)

    def block() -> bytes:
        nonlocal position
        length = number()
        value = text[position : position + length]
        if len(value) < length:
            raise BodyError("registration body ends within a text")
        position += length
        return value

    wrapper = TopicConfigSerializeWrapper(data_version=decode_body(block(), DataVersion), topic_config_table={})
    for _ in range(number()):
        try:
            config = TopicConfig.from_text(block().decode())
        except UnicodeDecodeError as error:
            raise BodyError("registration body: topic is not UTF-8") from error
        wrapper.topic_config_table[config.topic_name] = config
    filter_servers = loads(block())
    if version >= VERSION_STATIC_TOPIC_TAIL and position < len(text):
        infos: dict[str, Any] = {}
        for _ in range(number()):
            info = loads(block())
            if isinstance(info, dict):
                infos[str(info.get("topic", ""))] = info
        wrapper.topic_queue_mapping_info_map = infos
    servers = [str(server) for server in filter_servers] if isinstance(filter_servers, list) else []
    return RegisterBrokerBody(topic_config_serialize_wrapper=wrapper, filter_server_list=servers)


# ----------------------------------------------------------------------------------------- tables keyed by a queue


class OffsetWrapper(Body):
    broker_offset: int = 0
    consumer_offset: int = 0
    last_timestamp: int = 0
    pull_offset: int | None = None


class ConsumeStats(Body):
    consume_tps: float = 0.0
    offset_table: dict[MessageQueue, OffsetWrapper] = {}


class TopicOffset(Body):
    min_offset: int = 0
    max_offset: int = 0
    last_update_timestamp: int = 0


class TopicStatsTable(Body):
    offset_table: dict[MessageQueue, TopicOffset] = {}
    topic_put_tps: float = 0.0


class ResetOffsetBody(Body):
    offset_table: dict[MessageQueue, int] = {}


class GetConsumerStatusBody(Body):
    message_queue_table: dict[MessageQueue, int] = {}
    consumer_table: dict[str, dict[MessageQueue, int]] = {}


class ConsumeStatsList(Body):
    consume_stats_list: list[dict[str, list[ConsumeStats]]] = []
    broker_addr: str = ""
    total_diff: int = 0
    total_inflight_diff: int = 0


def _members(data: bytes | memoryview | str | Mapping[str, Any]) -> Mapping[str, Any]:
    plain = data if isinstance(data, Mapping) else loads(data)
    if not isinstance(plain, Mapping):
        raise BodyError("an object was expected")
    return plain


def _queue_table(table: Any, kind: type[B]) -> dict[MessageQueue, B]:
    if table is None:
        return {}
    if isinstance(table, list):
        # The C form of ResetOffsetBody, and Go's [[queue, value], ...].
        pairs: Iterable[tuple[Any, Any]] = [
            (item[0], item[1]) if isinstance(item, list) and len(item) == 2 else (item, _offset_of(item))
            for item in table
        ]
    elif isinstance(table, Mapping):
        pairs = table.items()
    else:
        raise BodyError("a table of queues was expected")
    return {queue_of_key(key): from_plain(value, kind) for key, value in pairs}


def _offset_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return item.get("offset", 0)
    raise BodyError("a queue with its offset was expected")


def decode_consume_stats(data: bytes | memoryview | str | Mapping[str, Any]) -> ConsumeStats:
    members = _members(data)
    return ConsumeStats(
        consume_tps=from_plain(members.get("consumeTps") or 0.0, float),
        offset_table=_queue_table(members.get("offsetTable"), OffsetWrapper),
    )


def decode_topic_stats(data: bytes | memoryview | str) -> TopicStatsTable:
    members = _members(data)
    return TopicStatsTable(
        offset_table=_queue_table(members.get("offsetTable"), TopicOffset),
        topic_put_tps=from_plain(members.get("topicPutTps") or 0.0, float),
    )


def decode_reset_offset(data: bytes | memoryview | str) -> ResetOffsetBody:
    """Raw keys, keys as strings, or the list form for C++."""
    return ResetOffsetBody(offset_table=_queue_table(_members(data).get("offsetTable"), int))


def encode_reset_offset(body: ResetOffsetBody, *, list_form: bool = False) -> bytes:
    if not list_form:
        return encode_body(body)
    rows = [
        {"brokerName": q.broker_name, "offset": o, "queueId": q.queue_id, "topic": q.topic}
        for q, o in body.offset_table.items()
    ]
    return dumps({"offsetTable": rows}, raw_keys=True)


def decode_consumer_status(data: bytes | memoryview | str) -> GetConsumerStatusBody:
    members = _members(data)
    consumers = members.get("consumerTable") or {}
    if not isinstance(consumers, Mapping):
        raise BodyError("consumerTable: an object was expected")
    return GetConsumerStatusBody(
        message_queue_table=_queue_table(members.get("messageQueueTable"), int),
        consumer_table={str(client): _queue_table(table, int) for client, table in consumers.items()},
    )


def decode_consume_stats_list(data: bytes | memoryview | str) -> ConsumeStatsList:
    members = _members(data)
    rows: list[dict[str, list[ConsumeStats]]] = []
    for row in members.get("consumeStatsList") or []:
        rows.append({str(group): [decode_consume_stats(item) for item in items] for group, items in row.items()})
    return ConsumeStatsList(
        consume_stats_list=rows,
        broker_addr=str(members.get("brokerAddr") or ""),
        total_diff=from_plain(members.get("totalDiff") or 0, int),
        total_inflight_diff=from_plain(members.get("totalInflightDiff") or 0, int),
    )


class QueueTimeSpan(Body):
    message_queue: MessageQueue
    min_time_stamp: int = 0
    max_time_stamp: int = 0
    consume_time_stamp: int = 0
    delay_time: int = 0


class QueryConsumeTimeSpanBody(Body):
    consume_time_span_set: list[QueueTimeSpan] = []


class LockBatchRequestBody(Body):
    """Body of LOCK_BATCH_MQ and UNLOCK_BATCH_MQ."""

    consumer_group: str = ""
    client_id: str = ""
    only_this_broker: bool = False
    mq_set: list[MessageQueue] = []


UnlockBatchRequestBody = LockBatchRequestBody


class LockBatchResponseBody(Body):
    lock_ok_mq_set: list[MessageQueue] = msgspec.field(name="lockOKMQSet", default_factory=list)


class ConsumerOffsetTable(Body):
    """consumerOffset.json and GET_ALL_CONSUMER_OFFSET: "topic@group" to queue id to offset."""

    offset_table: dict[str, dict[int, int]] = {}
    data_version: DataVersion | None = None


# -------------------------------------------------------------------------------------------------- small answers


class KVTable(Body):
    table: dict[str, str] = {}


class TopicList(Body):
    topic_list: list[str] = []
    broker_addr: str | None = None


class GroupList(Body):
    group_list: list[str] = []


class TopicConfigList(Body):
    topic_config_list: list[TopicConfig] = []


class SubscriptionGroupList(Body):
    group_config_list: list[SubscriptionGroupConfig] = []


class CorrectionOffsets(Body):
    correction_offsets: dict[int, int] = {}


class StatsItem(Body):
    sum: int = 0
    tps: float = 0.0
    avgpt: float = 0.0


class BrokerStatsData(Body):
    stats_minute: StatsItem = msgspec.field(default_factory=StatsItem)
    stats_hour: StatsItem = msgspec.field(default_factory=StatsItem)
    stats_day: StatsItem = msgspec.field(default_factory=StatsItem)


class ConsumeQueueData(Body):
    physic_offset: int = 0
    physic_size: int = 0
    tags_code: int = 0
    eval: bool = False
    extend_data_json: str | None = None
    bit_map: str | None = None
    msg: str | None = None


class QueryConsumeQueueResponseBody(Body):
    queue_data: list[ConsumeQueueData] = []
    min_queue_index: int = 0
    max_queue_index: int = 0
    subscription_data: SubscriptionData | None = None
    filter_data: str | None = None


class QuerySubscriptionResponseBody(Body):
    group: str
    topic: str
    subscription_data: SubscriptionData | None = None


class GroupForbidden(Body):
    group: str
    topic: str
    readable: bool = True


class CheckClientRequestBody(Body):
    client_id: str = ""
    group: str = ""
    subscription_data: SubscriptionData | None = None
    namespace: str | None = None


class QueryAssignmentRequestBody(Body):
    topic: str = ""
    consumer_group: str = ""
    client_id: str = ""
    strategy_name: str = "AVG"
    message_model: str = "CLUSTERING"


class MessageQueueAssignment(Body):
    message_queue: MessageQueue
    mode: str = "PULL"


class QueryAssignmentResponseBody(Body):
    message_queue_assignments: list[MessageQueueAssignment] = []


class SetMessageRequestModeRequestBody(Body):
    topic: str = ""
    consumer_group: str = ""
    mode: str = "PULL"
    pop_share_queue_num: int = 0


class ConsumeMessageDirectlyResult(Body):
    consume_result: str = "CR_SUCCESS"
    order: bool = False
    auto_commit: bool = True
    remark: str | None = None
    spent_time_mills: int = 0


class HaConnectionInfo(Body):
    addr: str = ""
    slave_ack_offset: int = 0
    diff: int = 0
    in_sync: bool = False
    transferred_byte_in_second: int = 0
    transfer_from_where: int = 0


class HaClientInfo(Body):
    master_addr: str | None = None
    transferred_byte_in_second: int = 0
    max_offset: int = 0
    last_read_timestamp: int = 0
    last_write_timestamp: int = 0
    master_flush_offset: int = 0


class HARuntimeInfo(Body):
    master: bool = True
    master_commit_log_max_offset: int = 0
    in_sync_slave_nums: int = 0
    ha_connection_info: list[HaConnectionInfo] = []
    ha_client_runtime_info: HaClientInfo = msgspec.field(default_factory=HaClientInfo)


class EpochEntry(Body):
    epoch: int = 0
    start_offset: int = 0
    end_offset: int = 0


class EpochEntryCache(Body):
    cluster_name: str = ""
    broker_name: str = ""
    broker_id: int = 0
    epoch_list: list[EpochEntry] = []
    max_offset: int = 0


class ProcessQueueInfo(Body):
    """State of one queue inside a consumer, as GET_CONSUMER_RUNNING_INFO shows it."""

    commit_offset: int = 0
    cached_msg_min_offset: int = 0
    cached_msg_max_offset: int = 0
    cached_msg_count: int = 0
    cached_msg_size_in_mi_b: int = msgspec.field(name="cachedMsgSizeInMiB", default=0)
    transaction_msg_min_offset: int = 0
    transaction_msg_max_offset: int = 0
    transaction_msg_count: int = 0
    locked: bool = False
    try_unlock_times: int = 0
    last_lock_timestamp: int = 0
    droped: bool = False
    last_pull_timestamp: int = 0
    last_consume_timestamp: int = 0


class ConsumeStatus(Body):
    pull_rt: float = msgspec.field(name="pullRT", default=0.0)
    pull_tps: float = msgspec.field(name="pullTPS", default=0.0)
    consume_rt: float = msgspec.field(name="consumeRT", default=0.0)
    consume_ok_tps: float = msgspec.field(name="consumeOKTPS", default=0.0)
    consume_failed_tps: float = msgspec.field(name="consumeFailedTPS", default=0.0)
    consume_failed_msgs: int = 0


class ConsumerRunningInfo(Body):
    properties: dict[str, str] = {}
    subscription_set: list[SubscriptionData] = []
    mq_table: dict[MessageQueue, ProcessQueueInfo] = {}
    mq_pop_table: dict[MessageQueue, Any] = {}
    status_table: dict[str, ConsumeStatus] = {}
    user_consumer_info: dict[str, str] = {}
    jstack: str | None = None


def encode_names(key: str, names: Sequence[str]) -> bytes:
    """`{"key":[names]}`: the shape of many small answers."""
    return dumps({key: list(names)}, raw_keys=False)


# ------------------------------------------------------------------------------------------------- properties text


def encode_properties_text(properties: Mapping[str, str]) -> bytes:
    """`key=value` lines, as GET_BROKER_CONFIG and GET_NAMESRV_CONFIG answer."""
    return "".join(f"{name}={value}\n" for name, value in properties.items()).encode()


def decode_properties_text(data: bytes | memoryview) -> dict[str, str]:
    """Java Properties syntax: comments, `=` or `:` or a blank after the name, backslash escapes, continued lines."""
    text = bytes(data).decode("utf-8", "replace")
    properties: dict[str, str] = {}
    logical = ""
    for raw_line in text.splitlines():
        line = raw_line.lstrip(" \t\f")
        if not logical and (not line or line[0] in "#!"):
            continue
        logical += line
        if (len(logical) - len(logical.rstrip("\\"))) % 2 == 1:
            logical = logical[:-1]
            continue
        name, value = _split_property(logical)
        logical = ""
        if name:
            properties[name] = value
    if logical:
        name, value = _split_property(logical)
        properties[name] = value
    return properties


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}


def _split_property(line: str) -> tuple[str, str]:
    position = 0
    while position < len(line) and line[position] not in "=: \t\f":
        position += 2 if line[position] == "\\" else 1
    name = line[:position]
    rest = line[position:].lstrip(" \t\f")
    if rest[:1] in ("=", ":"):
        rest = rest[1:].lstrip(" \t\f")
    return _unescape(name), _unescape(rest)


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    out: list[str] = []
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if character != "\\" or position >= len(text):
            out.append(character)
            continue
        character = text[position]
        position += 1
        if character == "u" and len(text) >= position + 4:
            try:
                out.append(chr(int(text[position : position + 4], 16)))
                position += 4
                continue
            except ValueError:
                pass
        out.append(_ESCAPES.get(character, character))
    return "".join(out)
