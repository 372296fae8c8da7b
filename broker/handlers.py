"""Which processor method serves which request code; sends and pulls, the hot ones, are the router's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from broker.consume_queue import NotAtHand
from broker.processors.admin import AdminProcessor
from broker.processors.client_calls import ClientCallProcessor
from broker.processors.consumer import ConsumerProcessor
from broker.processors.progress import ProgressProcessor
from broker.processors.query import QueryProcessor
from broker.processors.raft import RaftProcessor
from remoting.codes import RequestCode, ResponseCode
from remoting.command import Command, encode_response

if TYPE_CHECKING:
    from broker.context import BrokerContext
    from broker.router import Handler


def handlers_of(broker: BrokerContext, send_back: Callable[..., bytes | None]) -> dict[int, Handler]:
    """Every code this broker serves beside sends and pulls. What is not here is answered 3.

    `send_back(request, conn, message=None)` raises NotAtHand where the message must be read for it.
    """
    admin = AdminProcessor(broker)
    calls = ClientCallProcessor(broker)
    consumer = ConsumerProcessor(broker)
    progress = ProgressProcessor(broker)
    query = QueryProcessor(broker)
    raft = RaftProcessor(broker)

    def counted_send_back(request: Command, conn: Any, message: bytes | None = None) -> bytes | None:
        try:
            answer = send_back(request, conn, message)
        except NotAtHand as missing:
            if broker.jobs.start(send_back_cold, request, conn, missing.physical_offset):
                return None
            remark = "[OVERLOAD]too many queries wait for the disk"
            return encode_response(request, ResponseCode.SYSTEM_BUSY, remark=remark)
        if answer is None:
            broker.stats.count_send_back(request.ext.get("originTopic") or "", request.ext.get("group") or "")
        return answer

    async def send_back_cold(request: Command, conn: Any, physical_offset: int) -> None:
        # b"" says that it was looked for and is not there.
        message = await broker.state.read_message_cold(physical_offset) or b""
        answer = counted_send_back(request, conn, message)
        if answer is not None:
            conn.write(answer)
            conn.flush()
        broker.group.wake()

    return {
        RequestCode.CONSUMER_SEND_MSG_BACK: counted_send_back,
        # looking up
        RequestCode.QUERY_MESSAGE: query.query_message,
        RequestCode.VIEW_MESSAGE_BY_ID: query.view_message,
        RequestCode.QUERY_CONSUMER_OFFSET: query.query_consumer_offset,
        RequestCode.SEARCH_OFFSET_BY_TIMESTAMP: query.search_offset,
        RequestCode.GET_MAX_OFFSET: query.max_offset,
        RequestCode.GET_MIN_OFFSET: query.min_offset,
        RequestCode.GET_EARLIEST_MSG_STORETIME: query.earliest_store_time,
        RequestCode.QUERY_CONSUME_QUEUE: query.query_consume_queue,
        # clients and groups
        RequestCode.HEART_BEAT: consumer.heartbeat,
        RequestCode.UNREGISTER_CLIENT: consumer.unregister,
        RequestCode.GET_CONSUMER_LIST_BY_GROUP: consumer.consumer_list,
        RequestCode.CHECK_CLIENT_CONFIG: consumer.check_client_config,
        RequestCode.UPDATE_CONSUMER_OFFSET: consumer.update_offset,
        RequestCode.LOCK_BATCH_MQ: consumer.lock,
        RequestCode.UNLOCK_BATCH_MQ: consumer.unlock,
        # administration of topics
        RequestCode.UPDATE_AND_CREATE_TOPIC: admin.create_topic,
        RequestCode.UPDATE_AND_CREATE_TOPIC_LIST: admin.create_topics,
        RequestCode.DELETE_TOPIC_IN_BROKER: admin.delete_topic,
        RequestCode.GET_ALL_TOPIC_CONFIG: admin.all_topic_configs,
        RequestCode.GET_TOPIC_CONFIG: admin.topic_config,
        RequestCode.GET_TOPIC_STATS_INFO: admin.topic_stats,
        RequestCode.GET_SYSTEM_TOPIC_LIST_FROM_BROKER: admin.system_topics,
        RequestCode.QUERY_TOPIC_CONSUME_BY_WHO: admin.who_consumes,
        # administration of groups
        RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP: admin.create_group,
        RequestCode.UPDATE_AND_CREATE_SUBSCRIPTIONGROUP_LIST: admin.create_groups,
        RequestCode.DELETE_SUBSCRIPTIONGROUP: admin.delete_group,
        RequestCode.GET_ALL_SUBSCRIPTIONGROUP_CONFIG: admin.all_group_configs,
        RequestCode.GET_SUBSCRIPTIONGROUP_CONFIG: admin.group_config,
        RequestCode.GET_CONSUMER_CONNECTION_LIST: admin.consumer_connections,
        RequestCode.GET_PRODUCER_CONNECTION_LIST: admin.producer_connections,
        RequestCode.GET_ALL_PRODUCER_INFO: admin.all_producers,
        RequestCode.QUERY_TOPICS_BY_CONSUMER: admin.topics_of_group,
        RequestCode.QUERY_SUBSCRIPTION_BY_CONSUMER: admin.subscription_of_group,
        # where groups stand
        RequestCode.GET_CONSUME_STATS: progress.consume_stats,
        RequestCode.GET_BROKER_CONSUME_STATS: progress.broker_consume_stats,
        RequestCode.QUERY_CONSUME_TIME_SPAN: progress.consume_time_span,
        RequestCode.GET_ALL_CONSUMER_OFFSET: progress.all_consumer_offsets,
        RequestCode.GET_ALL_DELAY_OFFSET: progress.all_delay_offsets,
        RequestCode.INVOKE_BROKER_TO_RESET_OFFSET: progress.reset_offset,
        RequestCode.CLONE_GROUP_OFFSET: progress.clone_offsets,
        # passed on to clients
        RequestCode.GET_CONSUMER_RUNNING_INFO: calls.running_info,
        RequestCode.CONSUME_MESSAGE_DIRECTLY: calls.consume_directly,
        RequestCode.INVOKE_BROKER_TO_GET_CONSUMER_STATUS: calls.consumer_status,
        # the broker itself
        RequestCode.UPDATE_BROKER_CONFIG: admin.update_config,
        RequestCode.GET_BROKER_CONFIG: admin.get_config,
        RequestCode.GET_BROKER_RUNTIME_INFO: admin.get_runtime_info,
        RequestCode.VIEW_BROKER_STATS_DATA: admin.view_stats,
        RequestCode.CLEAN_EXPIRED_CONSUMEQUEUE: admin.clean_consume_queues,
        RequestCode.CLEAN_UNUSED_TOPIC: admin.clean_unused_topics,
        RequestCode.DELETE_EXPIRED_COMMITLOG: raft.delete_expired_log,
        RequestCode.GET_BROKER_HA_STATUS: admin.ha_status,
        RequestCode.GET_BROKER_EPOCH_CACHE: admin.epoch_cache,
        # the raft group
        RequestCode.RAFT_DESCRIBE: raft.describe,
        RequestCode.RAFT_TRANSFER: raft.transfer,
        RequestCode.RAFT_CHANGE_MEMBERS: raft.change_members,
        RequestCode.RAFT_ACCEPT_LOSS: raft.accept_loss,
        RequestCode.RAFT_DELETE_EXPIRED: raft.delete_expired,
        RequestCode.RAFT_BACKUP_MANIFEST: raft.backup_manifest,
        RequestCode.RAFT_BACKUP_CHUNK: raft.backup_chunk,
    }
