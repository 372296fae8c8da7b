"""Pulling by queue and offset: the request both consumers use, and the consumer that leaves everything to its user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import frozen

from quorate.errors import InvalidArgument, NoRoute, PullFailed, RequestRefused, Unavailable
from remoting.bodies import SubscriptionData, tag_subscription
from remoting.codes import PULL_COMMIT_OFFSET, PULL_SUBSCRIPTION, PULL_SUSPEND, RequestCode, ResponseCode
from remoting.errors import BodyError, ConnectFailed, ConnectionLost, RequestTimeout
from remoting.headers import optional
from remoting.message import PROPERTY_RETRY_TOPIC, MessageExt, MessageQueue
from remoting.message_codec import decode_stored_many

if TYPE_CHECKING:
    from quorate.client import Client

PullStatus = Literal["FOUND", "NO_NEW_MESSAGE", "NO_MATCHED_MESSAGE", "OFFSET_ILLEGAL"]

_STATUS: dict[int, PullStatus] = {
    ResponseCode.SUCCESS: "FOUND",
    ResponseCode.PULL_NOT_FOUND: "NO_NEW_MESSAGE",
    ResponseCode.PULL_RETRY_IMMEDIATELY: "NO_MATCHED_MESSAGE",
    ResponseCode.PULL_OFFSET_MOVED: "OFFSET_ILLEGAL",
}
GRACE_S = 5.0
"""How much longer than the broker may suspend a pull the client waits for the answer."""


@frozen
class PullResult:
    """One pull's outcome. Continue at `next_offset`, whatever the status."""

    status: PullStatus
    messages: list[MessageExt]
    next_offset: int
    min_offset: int
    max_offset: int
    suggested_broker_id: int = 0


def subscription_of(topic: str, expression: str, version: int) -> SubscriptionData:
    """A filter such as "new || paid" as brokers take it. Raises InvalidArgument where there is no tag in it."""
    try:
        return tag_subscription(topic, expression, version)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error


async def pull_from(
    client: Client,
    address: str,
    group: str,
    queue: MessageQueue,
    offset: int,
    subscription: SubscriptionData,
    *,
    max_messages: int,
    suspend_s: float,
    commit_offset: int | None = None,
) -> PullResult:
    """Pull once from one broker, waiting there for up to `suspend_s` seconds.

    Messages of other tags with an equal hash are left out; bodies are decompressed; a message from a retry topic shows
    its first topic. Raises RequestRefused, ConnectFailed, ConnectionLost, RequestTimeout, PullFailed; LedElsewhere as
    soon as routes name another leader than the one that was asked. Checkpoint; cancel-safe, nothing is consumed.
    """
    sys_flag = PULL_SUBSCRIPTION
    if suspend_s > 0:
        sys_flag |= PULL_SUSPEND
    if commit_offset is not None and commit_offset > 0:
        sys_flag |= PULL_COMMIT_OFFSET
    request = client.remoting.request(
        RequestCode.PULL_MESSAGE,
        {
            "consumerGroup": group,
            "topic": queue.topic,
            "queueId": queue.queue_id,
            "queueOffset": offset,
            "maxMsgNums": max_messages,
            "sysFlag": sys_flag,
            "commitOffset": commit_offset or 0,
            "suspendTimeoutMillis": int(suspend_s * 1000),
            "subscription": subscription.sub_string,
            "subVersion": subscription.sub_version,
            "expressionType": subscription.expression_type,
        },
    )
    answer = await client.attempts.invoke(
        queue.topic, queue.broker_name, address, request, suspend_s + GRACE_S, is_patient=True
    )
    status = _STATUS.get(answer.code)
    if status is None:
        raise RequestRefused(answer.code, answer.remark or "", address)
    messages: list[MessageExt] = []
    if status == "FOUND":
        try:
            messages = decode_stored_many(answer.body)
        except BodyError as error:
            raise PullFailed(f"messages from {address} cannot be read: {error}") from error
        messages = [prepare(client, queue, message) for message in messages if matches(message, subscription)]
    ext = answer.ext
    return PullResult(
        status,
        messages,
        optional(ext, "nextBeginOffset", int, offset),
        optional(ext, "minOffset", int, 0),
        optional(ext, "maxOffset", int, 0),
        optional(ext, "suggestWhichBrokerId", int, 0),
    )


def matches(message: MessageExt, subscription: SubscriptionData) -> bool:
    """The broker compares hashes only, so the text of the tag is compared here (store.md 4)."""
    return not subscription.tags_set or message.tags in subscription.tags_set


def prepare(client: Client, queue: MessageQueue, message: MessageExt) -> MessageExt:
    """A message as consumers see it. One that cannot be decompressed is handed over as it is."""
    from quorate.client import inflate

    message.broker_name = queue.broker_name
    retry_topic = message.properties.get(PROPERTY_RETRY_TOPIC)
    if retry_topic and message.topic.startswith("%RETRY%"):
        message.topic = retry_topic
    try:
        return inflate(message)
    except BodyError as error:
        client.log.warning("message handed over compressed", message_id=message.message_id, reason=str(error))
        return message


class PullConsumer:
    """Pulls queue by queue under a group's name. Made by `Client.pull_consumer`; joins no group, takes no locks."""

    def __init__(self, client: Client, group: str) -> None:
        self._client = client
        self.group = group

    async def queues(self, topic: str) -> list[MessageQueue]:
        """The topic's readable queues, asked for now. Raises NoRoute. Checkpoint; cancel-safe."""
        return list((await self._client.routes.refresh(topic)).readable)

    async def pull(
        self,
        queue: MessageQueue,
        offset: int,
        *,
        max_messages: int = 32,
        filter: str = "*",
        suspend: float = 0.0,
        timeout: float = 3.0,
    ) -> PullResult:
        """Messages of a queue from `offset` on; waits up to `suspend` seconds for one to arrive.

        On a lost connection or a change of leader it asks again, for up to `timeout` seconds beyond `suspend`.
        Raises NoRoute, RequestRefused, Unavailable, PullFailed, InvalidArgument (filter without a tag). Checkpoint;
        cancel-safe.
        """
        client, clock = self._client, self._client.env.clock
        subscription = subscription_of(queue.topic, filter, clock.wall_ms())
        await client.routes.get(queue.topic)
        deadline = clock.monotonic() + suspend + timeout
        tried: list[str] = []
        problem = "no member known"
        while clock.monotonic() < deadline:
            address = next((a for a in client.routes.members_of(queue.broker_name) if a not in tried), None)
            if address is None:
                tried.clear()
                with clock.move_on_at(deadline):
                    await clock.sleep(client.retry_pause())
            else:
                tried.append(address)
                wait_s = min(suspend, max(0.0, deadline - timeout - clock.monotonic()))
                try:
                    return await pull_from(
                        client,
                        address,
                        self.group,
                        queue,
                        offset,
                        subscription,
                        max_messages=max_messages,
                        suspend_s=wait_s,
                    )
                except (ConnectFailed, ConnectionLost, RequestTimeout) as error:
                    problem = str(error)
                except RequestRefused as error:
                    if error.code not in (ResponseCode.SYSTEM_BUSY, ResponseCode.SERVICE_NOT_AVAILABLE):
                        raise
                    problem = str(error)
            with clock.move_on_at(deadline):
                try:
                    await client.routes.refresh(queue.topic)
                except (NoRoute, RequestRefused) as error:
                    problem = str(error)
        raise Unavailable(f"queue {queue} could not be pulled: {problem}", maybe_done=False)

    async def query(self, queue: MessageQueue, *, timeout: float = 3.0) -> int | None:
        """The group's stored offset, None where it has none. Raises RequestRefused, Unavailable. Checkpoint."""
        return await query_offset(self._client, self.group, queue, timeout=timeout)

    async def commit(self, queue: MessageQueue, offset: int, *, timeout: float = 3.0) -> None:
        """Store the group's offset; returns once it is committed. Raises RequestRefused, Unavailable. Checkpoint."""
        await update_offset(self._client, self.group, queue, offset, timeout=timeout)

    async def max_offset(self, queue: MessageQueue, *, timeout: float = 3.0) -> int:
        """The offset the next message will get. Raises RequestRefused, Unavailable. Checkpoint."""
        return await _offset(self._client, RequestCode.GET_MAX_OFFSET, queue, timeout)

    async def min_offset(self, queue: MessageQueue, *, timeout: float = 3.0) -> int:
        """The first offset still stored. Raises RequestRefused, Unavailable. Checkpoint."""
        return await _offset(self._client, RequestCode.GET_MIN_OFFSET, queue, timeout)

    async def search(self, queue: MessageQueue, timestamp_ms: int, *, timeout: float = 3.0) -> int:
        """The first offset stored at or after a time. Raises RequestRefused, Unavailable. Checkpoint."""
        return await search_offset(self._client, queue, timestamp_ms, timeout=timeout)


def _queue_fields(queue: MessageQueue) -> dict[str, object]:
    return {"topic": queue.topic, "queueId": queue.queue_id}


async def query_offset(client: Client, group: str, queue: MessageQueue, *, timeout: float = 3.0) -> int | None:
    """See `PullConsumer.query`."""
    answer = await client.call_group(
        queue.broker_name,
        queue.topic,
        RequestCode.QUERY_CONSUMER_OFFSET,
        {"consumerGroup": group, **_queue_fields(queue)},
        accept=(ResponseCode.SUCCESS, ResponseCode.QUERY_NOT_FOUND),
        timeout=timeout,
    )
    return int(answer.ext["offset"]) if answer.code == ResponseCode.SUCCESS and "offset" in answer.ext else None


async def update_offset(client: Client, group: str, queue: MessageQueue, offset: int, *, timeout: float = 3.0) -> None:
    """See `PullConsumer.commit`."""
    await client.call_group(
        queue.broker_name,
        queue.topic,
        RequestCode.UPDATE_CONSUMER_OFFSET,
        {"consumerGroup": group, "commitOffset": offset, **_queue_fields(queue)},
        timeout=timeout,
    )


async def search_offset(client: Client, queue: MessageQueue, timestamp_ms: int, *, timeout: float = 3.0) -> int:
    """See `PullConsumer.search`."""
    answer = await client.call_group(
        queue.broker_name,
        queue.topic,
        RequestCode.SEARCH_OFFSET_BY_TIMESTAMP,
        {"timestamp": timestamp_ms, **_queue_fields(queue)},
        timeout=timeout,
    )
    return optional(answer.ext, "offset", int, 0)


async def _offset(client: Client, code: RequestCode, queue: MessageQueue, timeout: float) -> int:
    answer = await client.call_group(queue.broker_name, queue.topic, code, _queue_fields(queue), timeout=timeout)
    return optional(answer.ext, "offset", int, 0)


async def max_offset(client: Client, queue: MessageQueue, *, timeout: float = 3.0) -> int:
    """See `PullConsumer.max_offset`."""
    return await _offset(client, RequestCode.GET_MAX_OFFSET, queue, timeout)
