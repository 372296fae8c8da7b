"""The client: one set of connections, routes and heartbeats, shared by its producer, consumers and administration."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Literal

import trio

from quorate.attempts import Attempts
from quorate.errors import InvalidArgument, NoRoute, RequestRefused, Unavailable
from quorate.producer import NEXT_AFTER_S, Producer, SendReceipt
from quorate.route_cache import RouteCache
from remoting.bodies import ConsumerData, HeartbeatData, ProducerData, decode_reset_offset, encode_body
from remoting.codes import RequestCode, ResponseCode
from remoting.command import Command, encode_response
from remoting.connection import Connection
from remoting.errors import BodyError, ConnectFailed, ConnectionLost, RequestTimeout
from remoting.message import (
    SYSFLAG_COMPRESSED,
    SYSFLAG_COMPRESSION_MASK,
    SYSFLAG_LZ4,
    SYSFLAG_ZSTD,
    Message,
    MessageExt,
    MessageQueue,
    UniqKeyGenerator,
)
from remoting.pool import Client as RemotingClient
from runtime.model import Env

if TYPE_CHECKING:
    from quorate.admin import Admin
    from quorate.consumer import Inbox
    from quorate.pull import PullConsumer

HEARTBEAT_S = 30.0
RETRY_PAUSE_S = (0.05, 0.1)
"""Bounds of the random pause between attempts while a group has no leader."""
SETTLE_PAUSE_MAX_S = 10.0
TRY_ANOTHER_MEMBER = frozenset({ResponseCode.SYSTEM_BUSY, ResponseCode.SERVICE_NOT_AVAILABLE, ResponseCode.GO_AWAY})
BODY_LIMIT_BYTES = 64 * 1024 * 1024


def inflate(message: MessageExt) -> MessageExt:
    """The message with its body decompressed, where it was compressed. Raises BodyError.

    LZ4 and Zstandard need the extra `compression`.
    """
    if not message.sys_flag & SYSFLAG_COMPRESSED:
        return message
    kind = message.sys_flag & SYSFLAG_COMPRESSION_MASK
    try:
        if kind == SYSFLAG_LZ4:
            message.body = import_module("lz4.frame").decompress(message.body)
        elif kind == SYSFLAG_ZSTD:
            decompressor = import_module("zstandard").ZstdDecompressor()
            message.body = decompressor.decompress(message.body, max_output_size=BODY_LIMIT_BYTES)
        else:
            inflater = zlib.decompressobj()
            message.body = inflater.decompress(message.body, BODY_LIMIT_BYTES)
            if inflater.unconsumed_tail:
                raise BodyError(f"body inflates to more than {BODY_LIMIT_BYTES} bytes")
    except ImportError as error:
        raise BodyError("body is compressed: install quorate[compression]") from error
    except (zlib.error, RuntimeError, ValueError) as error:
        raise BodyError(f"body cannot be decompressed: {error}") from error
    message.sys_flag &= ~SYSFLAG_COMPRESSED
    return message


class Client:
    """Made by `connect`. All methods belong to the trio loop it was made in."""

    def __init__(
        self, env: Env, namesrv: Sequence[str], *, client_id: str | None, producer_group: str, log: Any
    ) -> None:
        self.env = env
        self.log = log
        self.rng = env.rng("quorate.client")
        salt = env.ids.salt(8)
        self.client_id = client_id or f"{env.ids.host}@{env.ids.pid}#{salt.hex()}"
        self.producer_group = producer_group
        self.remoting = RemotingClient(env, log=log, on_request=self._on_request, on_lost=self._on_lost)
        self.routes = RouteCache(self.remoting, namesrv, env.clock, log)
        self.attempts = Attempts(self.remoting, self.routes, env.clock)
        self._salt = salt
        self._unique_keys: UniqKeyGenerator | None = None
        self._heartbeat_wanted = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._settling: set[str] = set()
        self.inboxes: dict[str, Inbox] = {}
        """Running push consumers by group."""
        self.producer = Producer(self)
        self._admin: Admin | None = None
        self.routes.on_change.append(self._route_changed)

    # ------------------------------------------------------------------------------------------------------ sending

    async def send(
        self,
        topic: str,
        body: bytes,
        *,
        tag: str | None = None,
        key: str | None = None,
        keys: Sequence[str] = (),
        properties: Mapping[str, str] | None = None,
        delay_level: int = 0,
        flag: int = 0,
        queue: MessageQueue | None = None,
        selector: Callable[[Sequence[MessageQueue], Message], MessageQueue] | None = None,
        timeout: float = 3.0,
    ) -> SendReceipt:
        """Store one message and return where it is; up to `timeout` seconds, retries included.

        `key`/`keys` make it findable, `delay_level` (1 to 18) delivers it later, `queue` or `selector` choose the
        queue. Retries keep the message's UNIQ_KEY, so within one broker group a retry is not stored twice.

        Raises SendRefused (refused for good), SendFailed (no acknowledgement in time; its `maybe_stored` says whether
        it may be stored all the same), InvalidArgument for what no broker would take. Checkpoint. A cancelled send may
        or may not be stored.
        """
        message = self.producer.message(topic, body, tag, key, keys, properties, delay_level, flag)
        return await self.producer.send(message, queue=queue, selector=selector, timeout=timeout)

    async def send_batch(
        self,
        topic: str,
        messages: Sequence[Message],
        *,
        queue: MessageQueue | None = None,
        timeout: float = 3.0,
    ) -> SendReceipt:
        """Store messages of one topic in one request, in order, in one queue. All are stored or none.

        The receipt is the first message's; its `count` says how many follow each other from there. Errors and
        cancellation as `send`.
        """
        return await self.producer.send_batch(topic, messages, queue=queue, timeout=timeout)

    async def send_oneway(
        self,
        topic: str,
        body: bytes,
        *,
        tag: str | None = None,
        key: str | None = None,
        keys: Sequence[str] = (),
        properties: Mapping[str, str] | None = None,
        queue: MessageQueue | None = None,
    ) -> None:
        """Send without waiting for an acknowledgement: it may get lost. Raises SendFailed where no broker is reachable.

        Checkpoint; cancel-safe.
        """
        message = self.producer.message(topic, body, tag, key, keys, properties, 0, 0)
        await self.producer.send_oneway(message, queue=queue)

    # ---------------------------------------------------------------------------------------------------- consuming

    @asynccontextmanager
    async def subscribe(
        self,
        topic: str | Mapping[str, str],
        *,
        group: str,
        filter: str = "*",
        orderly: bool = False,
        start: Literal["last", "first"] | int = "last",
        batch_size: int = 32,
        max_reconsume_times: int | None = None,
        consume_retries: bool = True,
        rebalance_interval: float = 20.0,
    ) -> AsyncIterator[Inbox]:
        """Join a consumer group for the length of the block; iterate the inbox for messages.

        `topic` is a name (with `filter`, a tag expression such as "new || paid"), or a mapping from topic to filter.
        `start` says where a group without offsets begins: at the end, at the first message, or at a time in
        milliseconds. `orderly` hands out one message per queue at a time under the broker's queue lock.
        `max_reconsume_times` overrides the group's setting before the dead-letter queue; `rebalance_interval` is in
        seconds. On leaving, offsets are stored and the group is left.

        Raises InvalidArgument for a filter without a tag, or a second inbox of the same group in one client.
        Checkpoint.
        """
        from quorate.consumer import Inbox

        if group in self.inboxes:
            raise InvalidArgument(f"this client has joined group {group} already")
        if self._nursery is None:
            raise RuntimeError("the client is closed")
        filters = {topic: filter} if isinstance(topic, str) else dict(topic)
        inbox = Inbox(
            self,
            group,
            filters,
            orderly=orderly,
            start=start,
            batch_size=batch_size,
            max_reconsume_times=max_reconsume_times,
            consume_retries=consume_retries,
            rebalance_interval=rebalance_interval,
        )
        self.inboxes[group] = inbox
        failure: BaseException | None = None
        try:
            async with background_nursery() as nursery:
                nursery.start_soon(inbox.run)
                try:
                    yield inbox
                except Exception as error:  # whatever the block raised: it decides the fate of open messages
                    failure = error
                    raise
                else:
                    await inbox.finish_open_messages()
                finally:
                    await inbox.leave(failure)
        finally:
            self.inboxes.pop(group, None)

    def pull_consumer(self, group: str) -> PullConsumer:
        """A consumer that pulls queue by queue, when its user wants to; it joins no group."""
        from quorate.pull import PullConsumer

        return PullConsumer(self, group)

    @property
    def admin(self) -> Admin:
        """Topics, groups, lookups, and what the nodes say about themselves."""
        if self._admin is None:
            from quorate.admin import Admin

            self._admin = Admin(self)
        return self._admin

    # ----------------------------------------------------------------------------------------------- shared machinery

    def next_unique_key(self) -> str:
        """A new UNIQ_KEY. Its address is that of this machine as the first broker or name server sees it."""
        keys = self._unique_keys
        if keys is None:
            address = self._salt[:4]
            for connected in self.remoting.connected_addresses():
                connection = self.remoting.connection(connected)
                if connection is not None:
                    address = ip_address(connection.local[0].partition("%")[0]).packed
                    break
            keys = self._unique_keys = UniqKeyGenerator(address, self.env.ids.pid, self._salt[4:])
        return keys.next(self.env.clock.wall_ms())

    def settle_route(self, topic: str) -> None:
        """Something did not go to a leader: refresh the route in the background until every group has one again."""
        if self._nursery is not None and topic not in self._settling:
            self._settling.add(topic)
            self._nursery.start_soon(self._settle, topic)

    async def _settle(self, topic: str) -> None:
        pause = 0.0
        try:
            while pause < SETTLE_PAUSE_MAX_S:
                try:
                    route = await self.routes.refresh(topic)
                    if all(route.leader(name) is not None for name in route.members):
                        return
                except (NoRoute, RequestRefused) as error:
                    self.log.debug("route refresh failed", topic=topic, reason=str(error))
                pause = pause * 1.5 + self.retry_pause()
                await self.env.clock.sleep(pause)
        finally:
            self._settling.discard(topic)

    def retry_pause(self) -> float:
        low, high = RETRY_PAUSE_S
        return low + (high - low) * self.rng.random()

    async def call_group(
        self,
        broker_name: str,
        topic: str,
        code: int,
        ext: Mapping[str, object] | None = None,
        body: bytes = b"",
        *,
        accept: tuple[int, ...] = (ResponseCode.SUCCESS,),
        timeout: float = 3.0,
    ) -> Command:
        """Ask a broker group: its leader, else another member (which forwards), with fresh routes until time is up.

        Only for requests that may be executed twice. Raises RequestRefused on a code not in `accept`, Unavailable
        after `timeout` seconds. Checkpoint; cancel-safe, but a cancelled request may be executed.
        """
        clock = self.env.clock
        deadline = clock.monotonic() + timeout
        problems: list[str] = []
        maybe_done = False
        tried: list[str] = []
        while True:
            remaining = deadline - clock.monotonic()
            if remaining <= 0:
                last = f": {problems[-1]}" if problems else ""
                text = f"group {broker_name} did not answer within {timeout:g} s{last}"
                raise Unavailable(text, maybe_done=maybe_done)
            address = next((member for member in self.routes.members_of(broker_name) if member not in tried), None)
            if address is None:
                tried.clear()
                with clock.move_on_at(deadline):
                    await clock.sleep(self.retry_pause())
            else:
                tried.append(address)
                request = self.remoting.request(code, ext, body)
                try:
                    limit = min(remaining, max(NEXT_AFTER_S, timeout / 3))
                    answer = await self.attempts.invoke(topic, broker_name, address, request, limit)
                except ConnectFailed as error:
                    problems.append(str(error))
                except (ConnectionLost, RequestTimeout) as error:
                    problems.append(str(error))
                    maybe_done = True
                else:
                    if answer.code in accept:
                        return answer
                    if answer.code not in TRY_ANOTHER_MEMBER:
                        raise RequestRefused(answer.code, answer.remark or "", address)
                    problems.append(f"{address}: {answer.remark or answer.code}")
            with clock.move_on_at(deadline):
                try:
                    await self.routes.refresh(topic)
                except (NoRoute, RequestRefused) as error:
                    problems.append(str(error))

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Background work of the client until cancelled: connections, route poll, heartbeats."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.remoting.run)
            nursery.start_soon(self.routes.poll)
            nursery.start_soon(self._heartbeats)
            nursery.start_soon(self.attempts.watch)
            task_status.started()

    # ---------------------------------------------------------------------------------------------------- heartbeats

    def heartbeat_soon(self) -> None:
        """Have all brokers told about this client now rather than at the next round."""
        self._heartbeat_wanted.set()

    def _heartbeat_data(self, *, with_consumers: bool) -> bytes:
        producers = [ProducerData(group_name=self.producer_group)] if self.producer.has_sent else []
        consumers: list[ConsumerData] = []
        if with_consumers:
            consumers = [inbox.heartbeat_data() for _, inbox in sorted(self.inboxes.items())]
        return encode_body(
            HeartbeatData(client_id=self.client_id, producer_data_set=producers, consumer_data_set=consumers)
        )

    async def send_heartbeats(self) -> list[str]:
        """Tell every broker (only leaders if nothing is consumed); returns addresses not reached. Checkpoint."""
        consuming = bool(self.inboxes)
        if not consuming and not self.producer.has_sent:
            await trio.lowlevel.checkpoint()
            return []
        addresses = self.routes.broker_addresses() if consuming else self.routes.leader_addresses()
        body = self._heartbeat_data(with_consumers=consuming)
        missed: list[str] = []

        async def tell(address: str) -> None:
            try:
                answer = await self.remoting.invoke(
                    address, self.remoting.request(RequestCode.HEART_BEAT, None, body), 3.0
                )
            except (ConnectFailed, ConnectionLost, RequestTimeout):
                missed.append(address)
                return
            if answer.code != ResponseCode.SUCCESS:
                self.log.warning("heartbeat refused", broker=address, code=answer.code, remark=answer.remark)

        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(tell, address)
        return missed

    async def _heartbeats(self) -> None:
        clock = self.env.clock
        pause = 0.0
        while True:
            with clock.move_on_after(pause):
                await self._heartbeat_wanted.wait()
            self._heartbeat_wanted = trio.Event()
            missed = await self.send_heartbeats()
            pause = 1.0 if missed else HEARTBEAT_S
            if missed:
                await self._refresh_all_routes()
            for inbox in self.inboxes.values():
                inbox.rebalance_soon()

    async def _refresh_all_routes(self) -> None:
        """After a broker could not be reached: whoever is gone should leave the routes."""
        for topic in self.routes.topics():
            try:
                await self.routes.refresh(topic)
            except (NoRoute, RequestRefused) as error:
                self.log.debug("route refresh failed", topic=topic, reason=str(error))

    def _route_changed(self, topic: str) -> None:
        for inbox in self.inboxes.values():
            if inbox.wants(topic):
                # New addresses must know the member before they are asked for the members.
                self.heartbeat_soon()

    def _on_lost(self, address: str, _connection: Connection) -> None:
        if self.inboxes and address in self.routes.broker_addresses():
            # Membership belongs to the connection: a new one has to introduce this client again.
            self.heartbeat_soon()

    # -------------------------------------------------------------------------------------------- requests from brokers

    def _on_request(self, connection: Connection, request: Command) -> bytes | None:
        code = request.code
        try:
            if code == RequestCode.NOTIFY_CONSUMER_IDS_CHANGED:
                inbox = self.inboxes.get(request.ext.get("consumerGroup", ""))
                if inbox is not None:
                    inbox.rebalance_soon()
                return None
            if code == RequestCode.RESET_CONSUMER_CLIENT_OFFSET:
                inbox = self.inboxes.get(request.ext.get("group", ""))
                if inbox is not None:
                    inbox.reset_offsets(decode_reset_offset(request.body).offset_table)
                return encode_response(request, ResponseCode.SUCCESS)
            if code == RequestCode.GET_CONSUMER_STATUS_FROM_CLIENT:
                inbox = self.inboxes.get(request.ext.get("group", ""))
                if inbox is not None:
                    return encode_response(request, ResponseCode.SUCCESS, None, inbox.offsets_body())
            elif code == RequestCode.GET_CONSUMER_RUNNING_INFO:
                inbox = self.inboxes.get(request.ext.get("consumerGroup", ""))
                if inbox is not None:
                    return encode_response(request, ResponseCode.SUCCESS, None, inbox.running_info_body())
            else:
                return encode_response(
                    request,
                    ResponseCode.REQUEST_CODE_NOT_SUPPORTED,
                    remark=f" request type {code} not supported",
                )
        except BodyError as error:
            self.log.warning("request from a broker cannot be read", broker=connection.peer_text, reason=str(error))
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=str(error))
        return encode_response(request, ResponseCode.SYSTEM_ERROR, remark="this client has not joined that group")


@asynccontextmanager
async def background_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery for tasks that serve the block and end with it. What the block raises comes out as it is.

    A nursery would wrap it in an exception group, and `except SendFailed` around the block would not see it.
    """
    raised: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except trio.Cancelled:
            raise
        except BaseException as error:
            raised = error
        finally:
            nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


@asynccontextmanager
async def connect(
    namesrv: str | Sequence[str],
    *,
    client_id: str | None = None,
    producer_group: str = "quorate",
    env: Env | None = None,
) -> AsyncIterator[Client]:
    """A client for the length of a block. `namesrv` are name servers, "host:port", several also joined with ";".

    Nothing is dialled before it is needed. Raises InvalidArgument where an address is none. Checkpoint.
    """
    from remoting.pool import parse_address
    from runtime.logs import get_logger

    given = namesrv.replace(",", ";").split(";") if isinstance(namesrv, str) else list(namesrv)
    addresses = [address.strip() for address in given if address.strip()]
    if not addresses:
        raise InvalidArgument("at least one name server is needed")
    for address in addresses:
        try:
            parse_address(address)
        except ValueError as error:
            raise InvalidArgument(f"name server: {error}") from error
    if env is None:
        from runtime.real import real_env

        env = real_env()
    client = Client(env, addresses, client_id=client_id, producer_group=producer_group, log=get_logger("quorate"))
    async with background_nursery() as nursery:
        await nursery.start(client.run)
        yield client
