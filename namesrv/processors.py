"""One function per request code of a name server: (request, connection) in, encoded answer out.

Reads and registrations answer on the spot. What changes the control plane answers later: it is handed to `submit`, and
the one worker of the server proposes it and writes the answer (raft.md 3.3: one command in flight).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from namesrv.config import Settings
from namesrv.registry import Command as ControlCommand
from namesrv.registry import Registry
from namesrv.route_manager import EXPIRY_S, Ignored, Refused, Registration, RouteManager
from remoting.bodies import (
    DataVersion,
    GetBrokerMemberGroupResponseBody,
    KVTable,
    RegisterBrokerBody,
    TopicConfigSerializeWrapper,
    TopicList,
    decode_body,
    decode_properties_text,
    decode_register_broker,
    encode_body,
    encode_properties_text,
    encode_topic_route,
    register_body_crc,
)
from remoting.codes import VERSION_REGISTER_BODY, VERSION_STANDARD_JSON_ROUTE, RequestCode, ResponseCode
from remoting.command import Command, encode_response
from remoting.errors import BodyError, HeaderError
from remoting.headers import optional, require
from runtime.logs import Logger

ORDER_NAMESPACE = "ORDER_TOPIC_CONFIG"


class Peer(Protocol):
    """What is used of a connection here."""

    @property
    def peer_text(self) -> str: ...


@frozen
class Change:
    """A change of the control plane, and how to answer once it is done."""

    command: ControlCommand
    answer: Callable[[], bytes]


Handler = Callable[[Command, Peer], bytes | Change]


class Processors:
    """All request codes of a name server over one route manager and one registry."""

    def __init__(
        self,
        routes: RouteManager,
        registry: Registry,
        *,
        settings: Settings,
        save_settings: Callable[[Settings], None],
        now: Callable[[], float],
        log: Logger,
    ) -> None:
        self._routes = routes
        self._registry = registry
        self.settings = settings
        self._save_settings = save_settings
        self._now = now
        self._log = log
        self._handlers: dict[int, Handler] = {
            RequestCode.PUT_KV_CONFIG: self._put_kv,
            RequestCode.GET_KV_CONFIG: self._get_kv,
            RequestCode.DELETE_KV_CONFIG: self._delete_kv,
            RequestCode.GET_KVLIST_BY_NAMESPACE: self._list_kv,
            RequestCode.REGISTER_BROKER: self._register_broker,
            RequestCode.UNREGISTER_BROKER: self._unregister_broker,
            RequestCode.QUERY_DATA_VERSION: self._query_data_version,
            RequestCode.BROKER_HEARTBEAT: self._broker_heartbeat,
            RequestCode.GET_ROUTEINFO_BY_TOPIC: self._route,
            RequestCode.GET_BROKER_CLUSTER_INFO: self._cluster_info,
            RequestCode.GET_BROKER_MEMBER_GROUP: self._member_group,
            RequestCode.GET_ALL_TOPIC_LIST_FROM_NAMESERVER: self._all_topics,
            RequestCode.GET_TOPICS_BY_CLUSTER: self._topics_of_cluster,
            RequestCode.GET_SYSTEM_TOPIC_LIST_FROM_NS: self._system_topics,
            RequestCode.GET_UNIT_TOPIC_LIST: self._unit_topics,
            RequestCode.GET_HAS_UNIT_SUB_TOPIC_LIST: self._unit_subscription_topics,
            RequestCode.GET_HAS_UNIT_SUB_UNUNIT_TOPIC_LIST: self._ununit_subscription_topics,
            RequestCode.DELETE_TOPIC_IN_NAMESRV: self._delete_topic,
            RequestCode.WIPE_WRITE_PERM_OF_BROKER: self._wipe_write_perm,
            RequestCode.ADD_WRITE_PERM_OF_BROKER: self._add_write_perm,
            RequestCode.GET_NAMESRV_CONFIG: self._get_config,
            RequestCode.UPDATE_NAMESRV_CONFIG: self._update_config,
        }

    def handle(self, request: Command, connection: Peer) -> bytes | Change:
        """Answer one request. Operating failures are answers too; nothing is raised for what a peer can send."""
        handler = self._handlers.get(request.code)
        if handler is None:
            return encode_response(
                request,
                ResponseCode.REQUEST_CODE_NOT_SUPPORTED,
                remark=f" request type {request.code} not supported",
            )
        try:
            return handler(request, connection)
        except (HeaderError, BodyError) as error:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=str(error))

    # -------------------------------------------------------------------------------------------------- KV config

    def _put_kv(self, request: Command, connection: Peer) -> Change:
        names = (require(request.ext, name, str) for name in ("namespace", "key", "value"))
        return Change(("kv_put", *names), lambda: encode_response(request, ResponseCode.SUCCESS))

    def _delete_kv(self, request: Command, connection: Peer) -> Change:
        names = (require(request.ext, name, str) for name in ("namespace", "key"))
        return Change(("kv_delete", *names), lambda: encode_response(request, ResponseCode.SUCCESS))

    def _get_kv(self, request: Command, connection: Peer) -> bytes:
        namespace = require(request.ext, "namespace", str)
        key = require(request.ext, "key", str)
        value = self._registry.state.kv.get(namespace, {}).get(key)
        if value is None:
            return encode_response(
                request,
                ResponseCode.QUERY_NOT_FOUND,
                {},
                remark=f"No config item, Namespace: {namespace} Key: {key}",
            )
        return encode_response(request, ResponseCode.SUCCESS, {"value": value})

    def _list_kv(self, request: Command, connection: Peer) -> bytes:
        namespace = require(request.ext, "namespace", str)
        table = self._registry.state.kv.get(namespace)
        if not table:
            return encode_response(
                request, ResponseCode.QUERY_NOT_FOUND, remark=f"No config item, Namespace: {namespace}"
            )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(KVTable(table=table)))

    # ---------------------------------------------------------------------------------------------------- brokers

    def _register_broker(self, request: Command, connection: Peer) -> bytes:
        ext = request.ext
        body = bytes(request.body)
        expected_crc = optional(ext, "bodyCrc32", int, 0)
        if expected_crc and expected_crc != register_body_crc(body):
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark="crc32 not match")
        table = _registered_topics(request, body)
        timeout_ms = optional(ext, "heartbeatTimeoutMillis", int, 0)
        registration = Registration(
            cluster=require(ext, "clusterName", str),
            broker_name=require(ext, "brokerName", str),
            broker_id=require(ext, "brokerId", int),
            address=require(ext, "brokerAddr", str),
            connection=connection,
            topics=table.topic_config_table,
            data_version=table.data_version,
            ha_server_address=optional(ext, "haServerAddr", str, ""),
            expiry_s=timeout_ms / 1000 if timeout_ms > 0 else EXPIRY_S,
            enable_acting_master=optional(ext, "enableActingMaster", bool, False),
            zone_name=ext.get("__ZONE_NAME"),
            raft_term=optional(ext, "raftTerm", int, None),
            raft_group=ext.get("raftGroup"),
        )
        if registration.broker_id < 0:
            raise HeaderError(f"the custom field <brokerId> is out of range: {registration.broker_id}")
        result = self._routes.register(
            registration,
            self._now(),
            drop_missing_topics=self.settings.delete_topic_with_broker_registration,
        )
        fields = {"broker": registration.broker_name, "id": registration.broker_id, "address": registration.address}
        if isinstance(result, Refused):
            self._log.warning("registration refused", reason=result.reason, **fields)
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=result.reason)
        if isinstance(result, Ignored):
            self._log.info("registration ignored", reason=result.reason, **fields)
            return encode_response(request, ResponseCode.SUCCESS, {}, remark=result.reason)
        order = self._registry.state.kv.get(ORDER_NAMESPACE)
        answer = b""
        if order and self.settings.return_order_topic_config_to_broker:
            answer = encode_body(KVTable(table=order))
        ext_answer = {"haServerAddr": result.ha_server_address, "masterAddr": result.master_address}
        return encode_response(request, ResponseCode.SUCCESS, ext_answer, answer)

    def _unregister_broker(self, request: Command, connection: Peer) -> bytes:
        cluster = require(request.ext, "clusterName", str)
        address = require(request.ext, "brokerAddr", str)
        if self._routes.unregister(cluster, address):
            self._log.info("broker signed off", cluster=cluster, address=address)
        return encode_response(request, ResponseCode.SUCCESS)

    def _query_data_version(self, request: Command, connection: Peer) -> bytes:
        ext = request.ext
        changed, held = self._routes.query_data_version(
            require(ext, "clusterName", str),
            require(ext, "brokerAddr", str),
            require(ext, "brokerName", str),
            require(ext, "brokerId", int),
            decode_body(request.body, DataVersion),
            self._now(),
        )
        body = encode_body(held) if held is not None else b""
        return encode_response(request, ResponseCode.SUCCESS, {"changed": changed}, body)

    def _broker_heartbeat(self, request: Command, connection: Peer) -> bytes:
        ext = request.ext
        timeout_ms = optional(ext, "heartbeatTimeoutMills", int, 0)
        self._routes.heartbeat(
            require(ext, "clusterName", str),
            require(ext, "brokerAddr", str),
            self._now(),
            timeout_ms / 1000 if timeout_ms > 0 else None,
        )
        return encode_response(request, ResponseCode.SUCCESS)

    # ----------------------------------------------------------------------------------------------------- routes

    def _route(self, request: Command, connection: Peer) -> bytes:
        topic = require(request.ext, "topic", str)
        route = self._routes.route(topic)
        if route is None:
            return encode_response(
                request,
                ResponseCode.TOPIC_NOT_EXIST,
                remark=f"No topic route info in name server for the topic: {topic}",
            )
        if self.settings.order_message_enable:
            route.order_topic_conf = self._registry.state.kv.get(ORDER_NAMESPACE, {}).get(topic)
        strict = request.version >= VERSION_STANDARD_JSON_ROUTE or optional(
            request.ext, "acceptStandardJsonOnly", bool, False
        )
        return encode_response(request, ResponseCode.SUCCESS, body=encode_topic_route(route, standard_json=strict))

    def _cluster_info(self, request: Command, connection: Peer) -> bytes:
        return encode_response(request, ResponseCode.SUCCESS, body=encode_body(self._routes.cluster_info()))

    def _member_group(self, request: Command, connection: Peer) -> bytes:
        group = self._routes.member_group(
            require(request.ext, "clusterName", str), require(request.ext, "brokerName", str)
        )
        body = encode_body(GetBrokerMemberGroupResponseBody(broker_member_group=group))
        return encode_response(request, ResponseCode.SUCCESS, body=body)

    def _topic_list(
        self, request: Command, enabled: bool, topics: Callable[[], list[str]], broker_address: str | None = None
    ) -> bytes:
        if not enabled:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark="disable")
        body = encode_body(TopicList(topic_list=topics(), broker_addr=broker_address))
        return encode_response(request, ResponseCode.SUCCESS, body=body)

    def _all_topics(self, request: Command, connection: Peer) -> bytes:
        return self._topic_list(request, self.settings.enable_all_topic_list, self._routes.topics)

    def _topics_of_cluster(self, request: Command, connection: Peer) -> bytes:
        cluster = require(request.ext, "cluster", str)
        return self._topic_list(
            request, self.settings.enable_topic_list, lambda: self._routes.topics_of_cluster(cluster)
        )

    def _system_topics(self, request: Command, connection: Peer) -> bytes:
        topics, address = self._routes.system_topics()
        return self._topic_list(request, True, lambda: topics, address)

    def _unit_topics(self, request: Command, connection: Peer) -> bytes:
        return self._topic_list(request, self.settings.enable_topic_list, self._routes.unit_topics)

    def _unit_subscription_topics(self, request: Command, connection: Peer) -> bytes:
        return self._topic_list(request, self.settings.enable_topic_list, self._routes.unit_subscription_topics)

    def _ununit_subscription_topics(self, request: Command, connection: Peer) -> bytes:
        return self._topic_list(request, self.settings.enable_topic_list, self._routes.ununit_subscription_topics)

    def _delete_topic(self, request: Command, connection: Peer) -> bytes:
        topic = require(request.ext, "topic", str)
        cluster = optional(request.ext, "clusterName", str, "")
        self._routes.delete_topic(topic, cluster or None)
        self._log.info("topic deleted from routes", topic=topic, cluster=cluster or None, peer=connection.peer_text)
        return encode_response(request, ResponseCode.SUCCESS)

    # ------------------------------------------------------------------------------------------------ permissions

    def _wipe_write_perm(self, request: Command, connection: Peer) -> bytes | Change:
        broker = require(request.ext, "brokerName", str)
        count = self._routes.topic_count(broker)

        def answer() -> bytes:
            self._log.warning("write permission wiped", broker=broker, topics=count, peer=connection.peer_text)
            return encode_response(request, ResponseCode.SUCCESS, {"wipeTopicCount": count})

        # A mistyped name must not stay in the control plane for ever.
        if not count and broker not in self._registry.state.wiped:
            return answer()
        return Change(("wipe", broker), answer)

    def _add_write_perm(self, request: Command, connection: Peer) -> bytes | Change:
        broker = require(request.ext, "brokerName", str)

        def answer() -> bytes:
            count = self._routes.add_write_perm(broker)
            self._log.warning("write permission added", broker=broker, topics=count, peer=connection.peer_text)
            return encode_response(request, ResponseCode.SUCCESS, {"addTopicCount": count})

        if broker not in self._registry.state.wiped:
            return answer()
        return Change(("unwipe", broker), answer)

    # --------------------------------------------------------------------------------------------------- settings

    def _get_config(self, request: Command, connection: Peer) -> bytes:
        return encode_response(request, ResponseCode.SUCCESS, body=encode_properties_text(self.settings.properties()))

    def _update_config(self, request: Command, connection: Peer) -> bytes:
        properties = decode_properties_text(request.body)
        if not properties:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark="string2Properties error")
        blocked = self.settings.blocked(properties)
        if blocked:
            return encode_response(
                request,
                ResponseCode.NO_PERMISSION,
                remark=f"Can not update config in black list: {', '.join(blocked)}",
            )
        try:
            settings = self.settings.updated(properties)
            self._save_settings(settings)
        except ValueError as error:
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=str(error))
        except OSError as error:
            remark = f"the settings cannot be saved and stay as they were: {error.strerror}"
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        self.settings = settings
        self._log.warning("settings changed", peer=connection.peer_text, **properties)
        return encode_response(request, ResponseCode.SUCCESS)


def _registered_topics(request: Command, body: bytes) -> TopicConfigSerializeWrapper:
    if not body:
        return TopicConfigSerializeWrapper()
    if request.version < VERSION_REGISTER_BODY and body[:1] == b"{" and b"topicConfigSerializeWrapper" not in body:
        return decode_body(body, TopicConfigSerializeWrapper)
    registered: RegisterBrokerBody = decode_register_broker(body, version=request.version)
    return registered.topic_config_serialize_wrapper
