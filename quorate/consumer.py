"""The push consumer: membership, assigned queues, pulling ahead, acknowledgements, retries.

`Inbox` is what `Client.subscribe` yields. A message is acknowledged when its iteration step is left: by asking for the
next one, or by leaving the loop and the block without an error. If the block raises, the open messages go back to the
broker, which redelivers them later (after 10 s, 30 s, 1 m ... and at last to `%DLQ%group`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Literal

import trio

from quorate.attempts import LedElsewhere
from quorate.errors import InvalidArgument, NoRoute, PullFailed, QuorateError, RequestRefused, Unavailable
from quorate.process_queue import ProcessQueue
from quorate.pull import max_offset, pull_from, query_offset, search_offset, subscription_of, update_offset
from quorate.rebalance import Strategy, average
from quorate.route_cache import TopicRoute
from remoting.bodies import (
    ConsumerData,
    ConsumerIdList,
    ConsumerRunningInfo,
    ConsumeStatus,
    GetConsumerStatusBody,
    LockBatchRequestBody,
    LockBatchResponseBody,
    ProcessQueueInfo,
    SubscriptionData,
    decode_body,
    encode_body,
)
from remoting.codes import MASTER_ID, RETRY_TOPIC_PREFIX, RequestCode, ResponseCode
from remoting.errors import BodyError, ConnectFailed, ConnectionLost, RequestTimeout
from remoting.message import (
    PROPERTY_DELAY,
    PROPERTY_MAX_RECONSUME_TIMES,
    PROPERTY_ORIGIN_MESSAGE_ID,
    PROPERTY_RECONSUME_TIME,
    PROPERTY_RETRY_TOPIC,
    Message,
    MessageExt,
    MessageQueue,
)

if TYPE_CHECKING:
    from quorate.client import Client

PERSIST_S = 5.0
LOCK_RENEW_S = 20.0
LOCK_VALID_S = 30.0
"""A queue lock is trusted this long after it was granted; the broker keeps it 60 s."""
SUSPEND_S = 15.0
ORDERLY_RETRY_S = 1.0
REDELIVER_S = 5.0
LEAVE_S = 3.0
FLOW_CONTROL_S = 0.02
REFUSED_PULL_S = 1.0
DEFAULT_MAX_RECONSUME_TIMES = 16
DEAD_LETTER = -1
"""Delay level that sends a message to the dead-letter queue."""


class ReceivedMessage:
    """A message handed out by an inbox. The attributes are the message's; `raw` has the rest."""

    __slots__ = ("_assignment", "_finished", "_level", "raw")

    def __init__(self, raw: MessageExt, assignment: _Assignment) -> None:
        self.raw = raw
        self._assignment = assignment
        self._level: int | None = None
        self._finished = False

    def __repr__(self) -> str:
        return f"<ReceivedMessage {self.raw.topic} {self.queue} @{self.raw.queue_offset} {self.message_id}>"

    @property
    def topic(self) -> str:
        """The topic it was sent to first, for a retried message too."""
        return self.raw.topic

    @property
    def body(self) -> bytes:
        return self.raw.body

    @property
    def properties(self) -> dict[str, str]:
        return self.raw.properties

    @property
    def tag(self) -> str:
        return self.raw.tags

    @property
    def keys(self) -> list[str]:
        return self.raw.keys.split()

    @property
    def message_id(self) -> str:
        """The sender's id: the same for all deliveries of a message."""
        return self.raw.message_id

    @property
    def queue(self) -> MessageQueue:
        """The queue it came from: of the retry topic, for a retried message."""
        return self._assignment.state.queue

    @property
    def queue_offset(self) -> int:
        return self.raw.queue_offset

    @property
    def reconsume_times(self) -> int:
        """Deliveries before this one."""
        return self.raw.reconsume_times

    def retry(self, delay_level: int = 0) -> None:
        """Have it redelivered later instead of acknowledged, when the step is left.

        Level 0 lets the broker choose (10 s first, longer each time), 1 to 18 are its levels. In an orderly inbox the
        queue waits 1 s and this message comes again.
        """
        if delay_level < 0:
            raise ValueError("a delay level is 0 to 18")
        self._level = delay_level

    def reject(self) -> None:
        """Have it moved to the group's dead-letter queue, when the step is left."""
        self._level = DEAD_LETTER


class _Assignment:
    """A queue this member holds: its state and the task that pulls it."""

    __slots__ = ("pull_scope", "queued", "room", "scope", "state", "subscription", "suggested_id")

    def __init__(self, state: ProcessQueue, subscription: SubscriptionData) -> None:
        self.state = state
        self.subscription = subscription
        self.scope = trio.CancelScope()
        self.pull_scope: trio.CancelScope | None = None
        self.room = trio.Event()
        self.queued = False
        self.suggested_id = 0


class Inbox:
    """A running membership in a consumer group. Several tasks may iterate it at once, each has its own message."""

    def __init__(
        self,
        client: Client,
        group: str,
        filters: Mapping[str, str],
        *,
        orderly: bool,
        start: Literal["last", "first"] | int,
        batch_size: int,
        max_reconsume_times: int | None,
        consume_retries: bool,
        rebalance_interval: float,
        strategy: Strategy = average,
    ) -> None:
        if not filters:
            raise InvalidArgument("a consumer needs a topic")
        if not 1 <= batch_size <= 1024:
            raise InvalidArgument("batch_size is 1 to 1024")
        self._client = client
        self._clock = client.env.clock
        self.group = group
        self.orderly = orderly
        self._start = start
        self._batch_size = batch_size
        self._max_reconsume_times = max_reconsume_times
        self._rebalance_interval = rebalance_interval
        self._strategy = strategy
        self._retry_topic = RETRY_TOPIC_PREFIX + group
        version = self._clock.wall_ms()
        self._started_ms = version
        self._subscriptions = {topic: subscription_of(topic, text, version) for topic, text in filters.items()}
        if consume_retries:
            self._subscriptions.setdefault(self._retry_topic, subscription_of(self._retry_topic, "*", version))
        self._assignments: dict[MessageQueue, _Assignment] = {}
        self._ready: deque[_Assignment] = deque()
        self._receivers = trio.lowlevel.ParkingLot()
        self._open: dict[int, ReceivedMessage] = {}
        self._rebalance_wanted = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._leaving = False
        self._introduced_at = 0.0
        self.assigned = trio.Event()
        """Set once this member has seen a rebalance through, whether or not it got a queue."""
        self._consumed = 0
        self._failed = 0

    # ---------------------------------------------------------------------------------------------- what a user does

    def __aiter__(self) -> _Steps:
        """Messages, one per step; the step's message is acknowledged when the next one is asked for."""
        return _Steps(self)

    @property
    def queues(self) -> list[MessageQueue]:
        """The queues this member holds now, sorted; those of the retry topic included."""
        return sorted(self._assignments)

    async def receive(self, timeout: float | None = None) -> ReceivedMessage | None:
        """The next message, None after `timeout` seconds. It stays open until `acknowledge` or `send_back`.

        Checkpoint; cancel-safe: a cancelled call has taken no message.
        """
        if timeout is None:
            return await self._next()
        with self._clock.move_on_after(timeout):
            return await self._next()
        return None

    def acknowledge(self, message: ReceivedMessage) -> None:
        """The message is consumed; its offset may be stored now. Not for one that was acknowledged before."""
        self._close(message)
        self._consumed += 1
        assignment = message._assignment
        assignment.state.last_consumed_at = self._clock.wall_ms()
        assignment.state.acknowledge(message.raw.queue_offset)
        self._after_finish(assignment)

    async def send_back(self, message: ReceivedMessage, delay_level: int = 0) -> None:
        """Have the broker redeliver the message later; see `ReceivedMessage.retry`. Checkpoint.

        When cancelled, the message stays unacknowledged and is delivered again by whoever gets the queue next.
        """
        self._close(message)
        self._failed += 1
        assignment = message._assignment
        done = False
        try:
            if self.orderly and not self._exhausted(message.raw) and delay_level != DEAD_LETTER:
                await trio.lowlevel.checkpoint()
            else:
                done = await self._hand_back(message.raw, assignment, delay_level)
        finally:
            if done:
                assignment.state.acknowledge(message.raw.queue_offset)
                self._after_finish(assignment)
            else:
                message.raw.reconsume_times += 1
                assignment.state.put_back(message.raw)
                self._pause(assignment, ORDERLY_RETRY_S if self.orderly else REDELIVER_S)

    async def run_handler(
        self, handler: Callable[[ReceivedMessage], Awaitable[object]], *, concurrency: int = 16
    ) -> None:
        """Call `handler` for each message until cancelled, `concurrency` at a time (per queue one, if orderly).

        A handler that raises an Exception has its message redelivered; that is logged, not raised. Checkpoint.
        """

        async def work() -> None:
            while True:
                message = await self._next()
                try:
                    await handler(message)
                except Exception as error:  # the fate of the message is decided here, whatever the handler raised
                    self._client.log.warning(
                        "handler failed, message goes back",
                        group=self.group,
                        message_id=message.message_id,
                        error=repr(error),
                    )
                    await self.send_back(message, message._level or 0)
                else:
                    await self._finish(message)

        async with trio.open_nursery() as nursery:
            for _ in range(concurrency):
                nursery.start_soon(work)

    # ---------------------------------------------------------------------------------------- handing out, taking in

    async def _next(self) -> ReceivedMessage:
        await trio.lowlevel.checkpoint()
        while True:
            while self._ready:
                assignment = self._ready.popleft()
                assignment.queued = False
                if self._deliverable(assignment):
                    message = ReceivedMessage(assignment.state.take(), assignment)
                    self._open[id(message)] = message
                    self._offer(assignment)
                    return message
            await self._receivers.park()

    def _deliverable(self, assignment: _Assignment) -> bool:
        state = assignment.state
        if not state.waiting or state.dropped or self._leaving:
            return False
        now = self._clock.monotonic()
        if now < state.paused_until:
            return False
        return not self.orderly or (state.in_flight == 0 and now < state.locked_until)

    def _offer(self, assignment: _Assignment) -> None:
        if not assignment.queued and self._deliverable(assignment):
            assignment.queued = True
            self._ready.append(assignment)
            self._receivers.unpark()

    def _close(self, message: ReceivedMessage) -> None:
        if message._finished:
            raise ValueError(f"{message!r} was acknowledged or sent back before")
        message._finished = True
        self._open.pop(id(message), None)

    def _after_finish(self, assignment: _Assignment) -> None:
        if assignment.state.has_room:
            assignment.room.set()
        if self.orderly:
            self._offer(assignment)

    async def _finish(self, message: ReceivedMessage) -> None:
        if message._finished:
            return
        if message._level is None:
            self.acknowledge(message)
        else:
            await self.send_back(message, message._level)

    def _pause(self, assignment: _Assignment, seconds: float) -> None:
        assignment.state.paused_until = self._clock.monotonic() + seconds
        if self._nursery is not None and not self._leaving:
            self._nursery.start_soon(self._resume, assignment, seconds)

    async def _resume(self, assignment: _Assignment, seconds: float) -> None:
        await self._clock.sleep(seconds)
        assignment.state.paused_until = 0.0
        self._offer(assignment)

    def _exhausted(self, message: MessageExt) -> bool:
        limit = self._max_reconsume_times
        return limit is not None and message.reconsume_times >= limit

    async def _hand_back(self, message: MessageExt, assignment: _Assignment, delay_level: int) -> bool:
        """CONSUMER_SEND_MSG_BACK; if no broker takes it, a send to the retry topic (semantics.md 5.3)."""
        queue = assignment.state.queue
        if self.orderly and self._exhausted(message):
            delay_level = DEAD_LETTER
        limit = self._max_reconsume_times
        origin = message.properties.get(PROPERTY_ORIGIN_MESSAGE_ID) or message.offset_message_id
        try:
            await self._client.call_group(
                queue.broker_name,
                queue.topic,
                RequestCode.CONSUMER_SEND_MSG_BACK,
                {
                    "offset": message.physical_offset,
                    "group": self.group,
                    "delayLevel": delay_level,
                    "originMsgId": origin,
                    "originTopic": message.topic,
                    "unitMode": False,
                    "maxReconsumeTimes": DEFAULT_MAX_RECONSUME_TIMES if limit is None else limit,
                },
            )
            return True
        except (RequestRefused, Unavailable) as error:
            self._client.log.warning(
                "send-back failed, sending to the retry topic",
                group=self.group,
                message_id=message.message_id,
                reason=str(error),
            )
        copy = Message(
            topic=self._retry_topic, body=message.body, flag=message.flag, properties=dict(message.properties)
        )
        copy.properties |= {
            PROPERTY_RETRY_TOPIC: message.topic,
            PROPERTY_RECONSUME_TIME: str(message.reconsume_times + 1),
            PROPERTY_MAX_RECONSUME_TIMES: str(DEFAULT_MAX_RECONSUME_TIMES if limit is None else limit),
            PROPERTY_DELAY: str(delay_level if delay_level > 0 else 3 + message.reconsume_times),
            PROPERTY_ORIGIN_MESSAGE_ID: origin,
        }
        try:
            await self._client.producer.send(copy)
            return True
        except QuorateError as error:
            self._client.log.warning("message kept for another try", message_id=message.message_id, reason=str(error))
            return False

    # ----------------------------------------------------------------------------------------------- background work

    async def run(self) -> None:
        """Everything behind the inbox, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._persist_offsets)
            if self.orderly:
                nursery.start_soon(self._renew_locks)
            for topic in sorted(self._subscriptions):
                try:
                    await self._client.routes.refresh(topic)
                except (NoRoute, RequestRefused) as error:
                    self._client.log.debug("no route yet", topic=topic, reason=str(error))
            # The heartbeat loop asks for a rebalance when all brokers know this member.
            self._client.heartbeat_soon()
            while True:
                await self._rebalance_wanted.wait()
                self._rebalance_wanted = trio.Event()
                balanced = await self._rebalance()
                if balanced:
                    self.assigned.set()
                with self._clock.move_on_after(self._rebalance_interval if balanced else 1.0):
                    await self._rebalance_wanted.wait()
                self._rebalance_wanted.set()

    def wants(self, topic: str) -> bool:
        return topic in self._subscriptions

    def rebalance_soon(self) -> None:
        self._rebalance_wanted.set()

    async def _rebalance(self) -> bool:
        """Take and give up queues according to the present members; False where something could not be found out."""
        complete = True
        for topic in sorted(self._subscriptions):
            try:
                route = await self._client.routes.get(topic)
            except (NoRoute, RequestRefused) as error:
                self._client.log.debug("no route yet", topic=topic, reason=str(error))
                complete = complete and topic == self._retry_topic
                continue
            members = await self._members(route)
            if members is None or self._client.client_id not in members:
                # Not known there yet: take nothing, but keep what we hold.
                if members is not None:
                    self._introduce()
                complete = False
                continue
            mine = self._strategy(self._client.client_id, route.readable, members)
            complete = await self._apply(topic, mine) and complete
        return complete

    def _introduce(self) -> None:
        """A heartbeat out of turn, at most one a second: the rebalance that follows it may ask for the next."""
        now = self._clock.monotonic()
        if now >= self._introduced_at + 1.0:
            self._introduced_at = now
            self._client.heartbeat_soon()

    async def _members(self, route: TopicRoute) -> list[str] | None:
        """Client ids of the group, None where no broker could say."""
        for name in sorted(route.members):
            try:
                answer = await self._client.call_group(
                    name,
                    route.topic,
                    RequestCode.GET_CONSUMER_LIST_BY_GROUP,
                    {"consumerGroup": self.group},
                    accept=(ResponseCode.SUCCESS, ResponseCode.SYSTEM_ERROR),
                    timeout=2.0,
                )
                if answer.code != ResponseCode.SUCCESS:
                    return []
                return decode_body(answer.body, ConsumerIdList).consumer_id_list
            except (RequestRefused, Unavailable, BodyError) as error:
                self._client.log.debug("members unknown", group=self.group, broker=name, reason=str(error))
        return None

    async def _apply(self, topic: str, mine: list[MessageQueue]) -> bool:
        wanted = dict.fromkeys(mine)
        for queue in [queue for queue in self._assignments if queue.topic == topic and queue not in wanted]:
            await self._give_up(self._assignments.pop(queue))
        new = [queue for queue in mine if queue not in self._assignments]
        granted_until: dict[MessageQueue, float] = {}
        if self.orderly and new:
            granted_until = await self._lock(new)
        complete = True
        for queue in new:
            if self.orderly and queue not in granted_until:
                complete = False
                continue
            try:
                offset = await self._start_offset(queue)
            except (RequestRefused, Unavailable) as error:
                self._client.log.debug("start offset unknown", queue=str(queue), reason=str(error))
                complete = False
                continue
            state = ProcessQueue(queue, offset)
            state.locked_until = granted_until.get(queue, 0.0)
            assignment = _Assignment(state, self._subscriptions[topic])
            self._assignments[queue] = assignment
            if self._nursery is not None:
                self._nursery.start_soon(self._pull_queue, assignment)
        if new:
            self._client.log.debug("queues taken", group=self.group, topic=topic, queues=[str(q) for q in new])
        return complete

    async def _start_offset(self, queue: MessageQueue) -> int:
        stored = await query_offset(self._client, self.group, queue)
        if stored is not None:
            return stored
        if queue.topic == self._retry_topic or self._start == "first":
            return 0
        if self._start == "last":
            return await max_offset(self._client, queue)
        return await search_offset(self._client, queue, self._start)

    async def _give_up(self, assignment: _Assignment) -> None:
        """Another member gets the queue: stop pulling, store how far we are, unlock."""
        state = assignment.state
        state.dropped = True
        assignment.scope.cancel()
        await self._persist(assignment, timeout=2.0)
        if self.orderly:
            await self._unlock([state.queue])

    async def _pull_queue(self, assignment: _Assignment) -> None:
        with assignment.scope:
            while not assignment.state.dropped:
                with trio.CancelScope() as assignment.pull_scope:
                    await self._pull_once(assignment)

    async def _pull_once(self, assignment: _Assignment) -> None:
        state = assignment.state
        while not state.has_room:
            assignment.room = trio.Event()
            await assignment.room.wait()
        client, clock = self._client, self._clock
        queue = state.queue
        address = self._pull_address(assignment)
        pause = 0.0
        if address is None:
            pause = client.retry_pause()
        else:
            offset = state.next_pull
            try:
                result = await pull_from(
                    client,
                    address,
                    self.group,
                    queue,
                    offset,
                    assignment.subscription,
                    max_messages=self._batch_size,
                    suspend_s=SUSPEND_S,
                    commit_offset=state.committed if state.dirty else None,
                )
            except LedElsewhere as error:
                client.log.debug("pull left", queue=str(queue), reason=str(error))
                assignment.suggested_id = MASTER_ID
                return
            except (ConnectFailed, ConnectionLost, RequestTimeout) as error:
                client.log.debug("pull failed", queue=str(queue), reason=str(error))
                assignment.suggested_id += 1  # another member, until a broker suggests otherwise
                pause = client.retry_pause()
            except RequestRefused as error:
                client.log.debug("pull refused", queue=str(queue), reason=str(error))
                if error.code == ResponseCode.FLOW_CONTROL:
                    await clock.sleep(FLOW_CONTROL_S)
                    return
                if error.code == ResponseCode.SERVICE_NOT_AVAILABLE:
                    pause = client.retry_pause()
                else:
                    if error.code in (
                        ResponseCode.SUBSCRIPTION_NOT_EXIST,
                        ResponseCode.SUBSCRIPTION_NOT_LATEST,
                        ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST,
                    ):
                        self._introduce()
                    pause = REFUSED_PULL_S
            except PullFailed as error:
                client.log.warning("pull failed", queue=str(queue), reason=str(error))
                pause = REFUSED_PULL_S
            else:
                assignment.suggested_id = result.suggested_broker_id
                state.last_pulled_at = clock.wall_ms()
                if result.status == "OFFSET_ILLEGAL":
                    client.log.warning("offset moved", queue=str(queue), old=offset, new=result.next_offset)
                    state.jump(result.next_offset)
                else:
                    state.add(result.messages, result.next_offset)
                    self._offer(assignment)
                return
        try:
            await client.routes.refresh(queue.topic)
        except (NoRoute, RequestRefused) as error:
            client.log.debug("route refresh failed", topic=queue.topic, reason=str(error))
        await clock.sleep(pause)

    def _pull_address(self, assignment: _Assignment) -> str | None:
        """The leader, unless a broker suggested another member or the last attempt failed."""
        queue = assignment.state.queue
        route = self._client.routes.known(queue.topic)
        members = route.members.get(queue.broker_name, {}) if route is not None else {}
        if assignment.suggested_id in members:
            return members[assignment.suggested_id]
        ordered = [members[broker_id] for broker_id in sorted(members)]
        return ordered[assignment.suggested_id % len(ordered)] if ordered else None

    # --------------------------------------------------------------------------------------------- offsets and locks

    async def _persist_offsets(self) -> None:
        while True:
            await self._clock.sleep(PERSIST_S)
            await self.persist_now()

    async def persist_now(self, *, timeout: float = 3.0) -> bool:
        """Store the offsets of all held queues; False where one could not be stored. Checkpoint; cancel-safe."""
        before = [assignment for assignment in self._assignments.values() if assignment.state.dirty]
        async with trio.open_nursery() as nursery:
            for assignment in before:
                nursery.start_soon(self._persist, assignment, timeout)
        return not any(assignment.state.dirty for assignment in before)

    async def _persist(self, assignment: _Assignment, timeout: float) -> None:
        state = assignment.state
        if not state.dirty:
            await trio.lowlevel.checkpoint()
            return
        offset = state.committed
        try:
            await update_offset(self._client, self.group, state.queue, offset, timeout=timeout)
        except (RequestRefused, Unavailable) as error:
            self._client.log.warning("offset not stored", queue=str(state.queue), offset=offset, reason=str(error))
        else:
            state.persisted = offset

    async def _renew_locks(self) -> None:
        while True:
            await self._clock.sleep(LOCK_RENEW_S)
            held = list(self._assignments)
            granted = await self._lock(held)
            for queue in held:
                assignment = self._assignments.get(queue)
                if assignment is not None and queue in granted:
                    assignment.state.locked_until = granted[queue]
                    self._offer(assignment)

    async def _lock(self, queues: list[MessageQueue]) -> dict[MessageQueue, float]:
        """Ask for the locks of queues; returns those granted with the end of their trust."""
        granted: dict[MessageQueue, float] = {}
        asked_at = self._clock.monotonic()
        for name, topic, body in self._lock_bodies(queues):
            try:
                answer = await self._client.call_group(name, topic, RequestCode.LOCK_BATCH_MQ, None, body)
                for queue in decode_body(answer.body, LockBatchResponseBody).lock_ok_mq_set:
                    granted[queue] = asked_at + LOCK_VALID_S
            except (RequestRefused, Unavailable, BodyError) as error:
                self._client.log.debug("locks not granted", broker=name, reason=str(error))
        return granted

    async def _unlock(self, queues: list[MessageQueue]) -> None:
        for name, topic, body in self._lock_bodies(queues):
            try:
                await self._client.call_group(name, topic, RequestCode.UNLOCK_BATCH_MQ, None, body, timeout=1.0)
            except (RequestRefused, Unavailable) as error:
                self._client.log.debug("locks not released", broker=name, reason=str(error))

    def _lock_bodies(self, queues: list[MessageQueue]) -> list[tuple[str, str, bytes]]:
        by_group: dict[str, list[MessageQueue]] = {}
        for queue in sorted(queues):
            by_group.setdefault(queue.broker_name, []).append(queue)
        return [
            (
                name,
                held[0].topic,
                encode_body(
                    LockBatchRequestBody(consumer_group=self.group, client_id=self._client.client_id, mq_set=held)
                ),
            )
            for name, held in by_group.items()
        ]

    # ------------------------------------------------------------------------------------------------------- leaving

    async def finish_open_messages(self) -> None:
        """The block ended well: messages still open are consumed, or sent back if they were marked. Checkpoint."""
        await trio.lowlevel.checkpoint()
        for message in list(self._open.values()):
            await self._finish(message)

    async def leave(self, failure: BaseException | None) -> None:
        """Give everything back and say goodbye, for at most 3 s, even when cancelled.

        With a `failure` the open messages go back for redelivery; if that does not work in time, they are simply not
        acknowledged, which has the same effect.
        """
        self._leaving = True
        with trio.CancelScope(shield=True), self._clock.move_on_after(LEAVE_S):
            for assignment in self._assignments.values():
                assignment.scope.cancel()
            if failure is not None and not self.orderly:
                for message in list(self._open.values()):
                    await self.send_back(message, message._level or 0)
            await self.persist_now(timeout=1.5)
            if self.orderly:
                await self._unlock(list(self._assignments))
            await self._unregister()

    async def _unregister(self) -> None:
        """UNREGISTER_CLIENT to every broker, so that the others take over at once and not after 120 s."""
        addresses = [
            address
            for address in self._client.remoting.connected_addresses()
            if address in self._client.routes.broker_addresses()
        ]
        fields = {"clientID": self._client.client_id, "consumerGroup": self.group}

        async def tell(address: str) -> None:
            request = self._client.remoting.request(RequestCode.UNREGISTER_CLIENT, fields)
            try:
                await self._client.remoting.invoke(address, request, 1.0)
            except (ConnectFailed, ConnectionLost, RequestTimeout) as error:
                self._client.log.debug("goodbye not heard", broker=address, reason=str(error))

        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(tell, address)

    # ---------------------------------------------------------------------------------------- answers to the brokers

    def heartbeat_data(self) -> ConsumerData:
        where = {"last": "CONSUME_FROM_LAST_OFFSET", "first": "CONSUME_FROM_FIRST_OFFSET"}
        return ConsumerData(
            group_name=self.group,
            consume_from_where=where.get(str(self._start), "CONSUME_FROM_TIMESTAMP"),
            subscription_data_set=[self._subscriptions[topic] for topic in sorted(self._subscriptions)],
        )

    def reset_offsets(self, offsets: Mapping[MessageQueue, int]) -> None:
        """An operator moved the group's offsets (code 220): drop what is cached and go on from there."""
        for queue, offset in offsets.items():
            assignment = self._assignments.get(queue)
            if assignment is not None:
                assignment.state.jump(offset)
                assignment.room.set()
                if assignment.pull_scope is not None:
                    assignment.pull_scope.cancel()

    def offsets_body(self) -> bytes:
        table = {queue: assignment.state.committed for queue, assignment in sorted(self._assignments.items())}
        return encode_body(GetConsumerStatusBody(message_queue_table=table))

    def running_info_body(self) -> bytes:
        """What GET_CONSUMER_RUNNING_INFO shows of this member."""
        now = self._clock.monotonic()
        info = ConsumerRunningInfo(
            properties={
                "PROP_CONSUME_TYPE": "CONSUME_PASSIVELY",
                "PROP_CLIENT_VERSION": "V5_3_3",
                "PROP_CONSUMER_START_TIMESTAMP": str(self._started_ms),
                "PROP_CONSUMEORDERLY": "true" if self.orderly else "false",
                "PROP_THREADPOOL_CORE_SIZE": "1",
            },
            subscription_set=[self._subscriptions[topic] for topic in sorted(self._subscriptions)],
            mq_table={
                queue: _queue_info(assignment.state, locked=self.orderly and now < assignment.state.locked_until)
                for queue, assignment in sorted(self._assignments.items())
            },
            status_table={
                topic: ConsumeStatus(consume_failed_msgs=self._failed) for topic in sorted(self._subscriptions)
            },
        )
        return encode_body(info)


def _queue_info(state: ProcessQueue, *, locked: bool) -> ProcessQueueInfo:
    return ProcessQueueInfo(
        commit_offset=state.committed,
        cached_msg_min_offset=state.committed if state.cached else 0,
        cached_msg_max_offset=state.next_pull - 1 if state.cached else 0,
        cached_msg_count=state.cached,
        cached_msg_size_in_mi_b=state.bytes_cached // (1024 * 1024),
        locked=locked,
        droped=state.dropped,
        last_pull_timestamp=state.last_pulled_at,
        last_consume_timestamp=state.last_consumed_at,
    )


class _Steps:
    """One task's way through an inbox."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._current: ReceivedMessage | None = None

    def __aiter__(self) -> _Steps:
        return self

    async def __anext__(self) -> ReceivedMessage:
        """Finish the message of the last step, then wait for the next. Checkpoint; cancel-safe."""
        current, self._current = self._current, None
        if current is not None:
            await self._inbox._finish(current)
        self._current = await self._inbox._next()
        return self._current


__all__ = ["DEAD_LETTER", "Inbox", "ReceivedMessage"]
