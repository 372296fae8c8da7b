"""Sending: which queue, which broker, and what to do when one does not answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio
from attrs import frozen

from quorate.errors import InvalidArgument, NoRoute, RequestRefused, SendFailed, SendRefused
from quorate.route_cache import TEMPLATE_QUEUES, TopicRoute
from remoting.codes import (
    RETRY_ON_ANOTHER_BROKER,
    STORED,
    SYSTEM_TOPIC_TEMPLATE,
    VERSION,
    RequestCode,
    ResponseCode,
)
from remoting.command import Command
from remoting.errors import ConnectFailed, ConnectionLost, RemoteProtocolError, RequestTimeout
from remoting.message import (
    NAME_VALUE_SEPARATOR,
    PROPERTIES_LIMIT_BYTES,
    PROPERTY_DELAY,
    PROPERTY_KEYS,
    PROPERTY_SEPARATOR,
    PROPERTY_SHARDING_KEY,
    PROPERTY_TAGS,
    PROPERTY_UNIQ_KEY,
    PROPERTY_WAIT,
    RESERVED_PROPERTIES,
    Message,
    MessageQueue,
    java_hash,
    properties_to_string,
)
from remoting.message_codec import encode_batch

if TYPE_CHECKING:
    from quorate.client import Client

Selector = Callable[[Sequence[MessageQueue], Message], MessageQueue]

RETRIES_ELSEWHERE = 2
"""Attempts on another broker group that follow a failed one without a pause (RocketMQ's retryTimesWhenSendFailed)."""

NEXT_AFTER_S = 1.0
"""A node silent for that long, or for a third of the time there is, is left for the next; its answer still counts."""
HELD_S = 2.25
"""A node that knows no leader holds a send for 2 s before it says that it is not stored (design 4)."""

_STATUS = {
    ResponseCode.SUCCESS: "SEND_OK",
    ResponseCode.FLUSH_DISK_TIMEOUT: "FLUSH_DISK_TIMEOUT",
    ResponseCode.SLAVE_NOT_AVAILABLE: "SLAVE_NOT_AVAILABLE",
    ResponseCode.FLUSH_SLAVE_TIMEOUT: "FLUSH_SLAVE_TIMEOUT",
}


@frozen
class SendReceipt:
    """Where an acknowledged message is."""

    topic: str
    broker_name: str
    queue_id: int
    queue_offset: int
    message_id: str
    """The client's own id (UNIQ_KEY); retries share it."""
    offset_message_id: str
    """The broker's id: address and position in its log."""
    elapsed_ms: float
    attempts: int = 1
    count: int = 1
    """Messages stored: more than one for a batch."""
    status: str = "SEND_OK"

    @property
    def queue(self) -> MessageQueue:
        return MessageQueue(self.topic, self.broker_name, self.queue_id)


def by_key(key: str) -> Selector:
    """A selector that sends equal keys to the same queue as long as the number of queues stays."""

    def select(queues: Sequence[MessageQueue], message: Message) -> MessageQueue:
        message.properties.setdefault(PROPERTY_SHARDING_KEY, key)
        return queues[java_hash(key) % len(queues)]

    return select


class Producer:
    """The sending half of a client; use it through `Client.send` and its siblings."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._clock = client.env.clock
        self._round = client.rng.randrange(1 << 16)
        self.has_sent = False
        """Whether heartbeats should introduce this client as a producer."""

    def message(
        self,
        topic: str,
        body: bytes,
        tag: str | None,
        key: str | None,
        keys: Sequence[str],
        properties: Mapping[str, str] | None,
        delay_level: int,
        flag: int,
    ) -> Message:
        """A message from the arguments of `Client.send`. Raises InvalidArgument for what cannot be stored as meant."""
        if not topic:
            raise InvalidArgument("a message needs a topic")
        found: dict[str, str] = {}
        for name, value in (properties or {}).items():
            if name in RESERVED_PROPERTIES:
                raise InvalidArgument(f"property {name} belongs to the protocol")
            found[name] = value
        all_keys = [*([key] if key else []), *keys]
        if any(not part or " " in part for part in all_keys):
            raise InvalidArgument("a key is text without blanks")
        if all_keys:
            found[PROPERTY_KEYS] = " ".join(all_keys)
        if tag:
            if "|" in tag or tag != tag.strip():
                raise InvalidArgument(f"{tag!r} is no tag: bars and outer blanks belong to filters")
            found[PROPERTY_TAGS] = tag
        if delay_level < 0:
            raise InvalidArgument("a delay level is 1 to 18, or 0 for none")
        if delay_level:
            found[PROPERTY_DELAY] = str(delay_level)
        _check_properties(found)
        return Message(topic=topic, body=bytes(body), flag=flag, properties=found)

    async def send(
        self,
        message: Message,
        *,
        queue: MessageQueue | None = None,
        selector: Selector | None = None,
        timeout: float = 3.0,
    ) -> SendReceipt:
        """See `Client.send`. Adds UNIQ_KEY and WAIT to the message's properties."""
        return await self._send_until(message, None, queue, selector, timeout)

    async def send_batch(
        self, topic: str, messages: Sequence[Message], *, queue: MessageQueue | None, timeout: float
    ) -> SendReceipt:
        """See `Client.send_batch`."""
        if not messages:
            raise InvalidArgument("an empty batch")
        for message in messages:
            if message.topic and message.topic != topic:
                raise InvalidArgument(f"a batch has one topic: {topic}, not {message.topic}")
            if message.properties.get(PROPERTY_DELAY):
                raise InvalidArgument("a batch cannot be delayed")
            _check_properties(message.properties)
        container = Message(topic=topic, body=b"", properties={})
        return await self._send_until(container, messages, queue, None, timeout)

    def _prepare(self, message: Message) -> None:
        if PROPERTY_UNIQ_KEY not in message.properties:
            message.properties[PROPERTY_UNIQ_KEY] = self._client.next_unique_key()
        message.properties.setdefault(PROPERTY_WAIT, "true")

    def _complete(self, message: Message, batch: Sequence[Message] | None) -> bytes:
        """Add what every stored message has; returns the body to send. A batch goes by the id of its first message."""
        if batch is None:
            self._prepare(message)
            return message.body
        for item in batch:
            self._prepare(item)
        message.properties[PROPERTY_UNIQ_KEY] = batch[0].properties[PROPERTY_UNIQ_KEY]
        return encode_batch(batch)

    def _request(
        self, message: Message, code: int, body: bytes, queue: MessageQueue, born_ms: int, properties: str
    ) -> Command:
        ext = {
            "a": self._client.producer_group,
            "b": message.topic,
            "c": SYSTEM_TOPIC_TEMPLATE,
            "d": str(TEMPLATE_QUEUES),
            "e": str(queue.queue_id),
            "f": "0",
            "g": str(born_ms),
            "h": str(message.flag),
            "i": properties,
            "j": message.properties.get("RECONSUME_TIME", "0"),
            "k": "false",
            "m": "true" if code == RequestCode.SEND_BATCH_MESSAGE else "false",
            "n": queue.broker_name,
        }
        limit = message.properties.get("MAX_RECONSUME_TIMES")
        if limit:
            ext["l"] = limit
        return Command(int(code), 0, 0, VERSION, "PYTHON", None, ext, body)

    async def _send_until(
        self,
        message: Message,
        batch: Sequence[Message] | None,
        queue: MessageQueue | None,
        selector: Selector | None,
        timeout: float,
    ) -> SendReceipt:
        client, clock = self._client, self._clock
        started = clock.monotonic()
        deadline = started + timeout
        born_ms = clock.wall_ms()
        problems: list[str] = []
        maybe_stored = False
        failed_groups: list[str] = []
        attempts = 0
        targets: dict[str, MessageQueue] = {}
        chosen: MessageQueue | None = queue
        properties: str | None = None
        body = b""
        code = RequestCode.SEND_MESSAGE_V2 if batch is None else RequestCode.SEND_BATCH_MESSAGE
        count = 1 if batch is None else len(batch)
        if not self.has_sent:
            self.has_sent = True
            client.heartbeat_soon()
        with client.attempts.begin(message.topic) as tries:
            while clock.monotonic() < deadline or tries.has_answer:
                route = client.routes.at_hand(message.topic)
                if route is None or not route.writable:
                    route = await self._route(message.topic, deadline, problems)
                if route is None:
                    break
                if properties is None:
                    # Here, because the id holds our address, which is known once a name server is connected.
                    body = self._complete(message, batch)
                    if selector is not None:
                        chosen = selector(route.writable, message)
                    properties = properties_to_string(message.properties)
                target = chosen if chosen is not None else self._pick(route, failed_groups)
                leader = route.leader(target.broker_name)
                remaining = max(0.001, deadline - clock.monotonic())
                # The leader first; then the others, since any node takes any request and holds it until there is one.
                address = tries.next_of(route.addresses(target.broker_name))
                if leader is None and attempts and remaining < HELD_S:
                    address = None  # it would be held beyond the deadline: nobody could say whether it was stored
                try:
                    said = tries.take()
                    if said is None and address is not None:
                        attempts += 1
                        targets[address] = target
                        request = self._request(message, code, body, target, born_ms, properties)
                        limit = min(remaining, max(NEXT_AFTER_S, timeout / 3))
                        said = await tries.ask(target.broker_name, address, request, limit)
                except RemoteProtocolError as error:
                    raise InvalidArgument(f"message cannot be sent: {error}") from error
                except (ConnectFailed, ConnectionLost, RequestTimeout) as error:
                    problems.append(str(error))
                    said = None
                if said is not None:
                    answered_by, answer = said
                    if answer.code in STORED:
                        if attempts > 1 or answered_by != leader:
                            client.settle_route(message.topic)
                        elapsed_ms = (clock.monotonic() - started) * 1e3
                        return _receipt(message, targets[answered_by], answer, elapsed_ms, attempts, count)
                    if answer.code not in RETRY_ON_ANOTHER_BROKER:
                        raise SendRefused(answer.code, answer.remark or "", answered_by)
                    problems.append(f"{answered_by}: {answer.remark or answer.code}")
                    # SYSTEM_ERROR is also how a broker says that it lost leadership before the outcome was known.
                    maybe_stored = maybe_stored or answer.code == ResponseCode.SYSTEM_ERROR
                elsewhere = len(route.members) > 1 and chosen is None and len(failed_groups) < RETRIES_ELSEWHERE
                failed_groups.append(target.broker_name)
                with clock.move_on_at(deadline):
                    try:
                        await client.routes.refresh(message.topic, for_publish=True)
                    except (NoRoute, RequestRefused) as error:
                        problems.append(str(error))
                    if not elsewhere:
                        failed_groups = [target.broker_name]
                        if address is None:
                            tries.start_over()
                            await tries.pause_until(min(deadline, clock.monotonic() + client.retry_pause()))
            maybe_stored = maybe_stored or tries.maybe_done or tries.is_open
        raise SendFailed(
            message.topic,
            problems,
            maybe_stored=maybe_stored,
            unique_key=message.properties.get(PROPERTY_UNIQ_KEY, ""),
        )

    async def _route(self, topic: str, deadline: float, problems: list[str]) -> TopicRoute | None:
        """The route, waited for until `deadline`; None when time is up first."""
        client, clock = self._client, self._clock
        while clock.monotonic() < deadline:
            try:
                with clock.move_on_at(deadline):
                    route = await client.routes.get(topic, for_publish=True)
                    if route.writable:
                        return route
                    problems.append(f"topic {topic} has no writable queue")
                    await client.routes.refresh(topic, for_publish=True)
            except (NoRoute, RequestRefused) as error:
                if not problems or problems[-1] != str(error):
                    problems.append(str(error))
            with clock.move_on_at(deadline):
                await clock.sleep(client.retry_pause())
        return None

    def _pick(self, route: TopicRoute, failed_groups: Sequence[str]) -> MessageQueue:
        """The next queue in turn; groups that just failed or have no leader only if there is no other."""
        queues = route.writable
        first = self._following(queues)
        if first.broker_name not in failed_groups and route.leader(first.broker_name) is not None:
            return first
        choices = [first, *(self._following(queues) for _ in range(len(queues) - 1))]
        elsewhere = [queue for queue in choices if queue.broker_name not in failed_groups]
        led = [queue for queue in elsewhere if route.leader(queue.broker_name) is not None]
        return (led or elsewhere or choices)[0]

    def _following(self, queues: Sequence[MessageQueue]) -> MessageQueue:
        self._round += 1
        return queues[self._round % len(queues)]

    async def send_oneway(self, message: Message, *, queue: MessageQueue | None) -> None:
        """See `Client.send_oneway`."""
        client = self._client
        problems: list[str] = []
        route = await self._route(message.topic, self._clock.monotonic() + 3.0, problems)
        if route is not None:
            self._prepare(message)
            properties = properties_to_string(message.properties)
            if not self.has_sent:
                self.has_sent = True
                client.heartbeat_soon()
            target = queue if queue is not None else self._pick(route, ())
            for address in route.addresses(target.broker_name):
                request = self._request(
                    message,
                    RequestCode.SEND_MESSAGE_V2,
                    message.body,
                    target,
                    self._clock.wall_ms(),
                    properties,
                )
                try:
                    await client.remoting.invoke_oneway(address, request)
                    return
                except (ConnectFailed, ConnectionLost) as error:
                    problems.append(str(error))
        await trio.lowlevel.checkpoint()
        unique_key = message.properties.get(PROPERTY_UNIQ_KEY, "")
        raise SendFailed(message.topic, problems, maybe_stored=False, unique_key=unique_key)


def _check_properties(properties: Mapping[str, str]) -> None:
    size = 0
    for name, value in properties.items():
        if not isinstance(value, str):
            raise InvalidArgument(f"property {name} must be text")
        for separator in (NAME_VALUE_SEPARATOR, PROPERTY_SEPARATOR):
            if separator in name or separator in value:
                raise InvalidArgument(f"property {name!r} holds a character that separates properties")
        size += len(name.encode()) + len(value.encode()) + 2
    if size > PROPERTIES_LIMIT_BYTES - 128:
        raise InvalidArgument(f"properties of {size} bytes are over the limit of {PROPERTIES_LIMIT_BYTES}")


def _receipt(
    message: Message, queue: MessageQueue, answer: Command, elapsed_ms: float, attempts: int, count: int
) -> SendReceipt:
    ext = answer.ext
    return SendReceipt(
        topic=message.topic,
        broker_name=queue.broker_name,
        queue_id=int(ext.get("queueId", queue.queue_id)),
        queue_offset=int(ext.get("queueOffset", "-1")),
        message_id=message.properties.get(PROPERTY_UNIQ_KEY, ""),
        offset_message_id=ext.get("msgId", ""),
        elapsed_ms=elapsed_ms,
        attempts=attempts,
        count=count,
        status=_STATUS.get(ResponseCode(answer.code), "SEND_OK"),
    )
