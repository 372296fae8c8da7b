"""Numbered messages, what was promised about each of them, and the checks of what a log shop must keep (chaos.md 4).

Each producer sends its numbers one after the other to one topic, spreading over the queues; what was acknowledged is
noted with queue and offset. Whoever reads the topic afterwards finds every acknowledged number, none twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import trio
from attrs import Factory, define, field

import quorate
from quorate import Client, MessageExt, MessageQueue, SendFailed
from runtime.model import Clock, Env
from tests.cluster.harness import BROKERS, STATUS_EVERY_S, Cluster, differing, wait_for

SEND_WITHIN_S = 8.0
SAME_LOGS_WITHIN_S = 60.0


@define
class Promises:
    """What the cluster acknowledged."""

    acknowledged: dict[str, tuple[str, int, int]] = Factory(dict)
    """body -> (broker name, queue id, queue offset)"""
    unknown: set[str] = Factory(set)
    """Sent, not acknowledged: stored or not, both are right."""
    failures: list[str] = Factory(list)

    def note(self, body: str, receipt: quorate.SendReceipt) -> None:
        self.acknowledged[body] = (receipt.broker_name, receipt.queue_id, receipt.queue_offset)

    async def wait_more(self, count: int, within_s: float = 60.0) -> None:
        """Until so many more are acknowledged. Raises trio.TooSlowError."""
        wanted = len(self.acknowledged) + count
        with trio.fail_after(within_s):
            while len(self.acknowledged) < wanted:  # noqa: ASYNC110 - whatever the producers come to
                await trio.sleep(0.01)


@define
class TimedPromises(Promises):
    """What the cluster acknowledged, and when."""

    clock: Clock = field(kw_only=True)
    at: dict[str, float] = Factory(dict)
    """body -> seconds of the clock; in order."""

    def note(self, body: str, receipt: quorate.SendReceipt) -> None:
        super().note(body, receipt)
        self.at[body] = self.clock.monotonic()

    def longest_gap(self, start: float, end: float) -> float:
        """Seconds without an acknowledgement."""
        moments = [start, *(at for at in self.at.values() if start < at < end), end]
        return max(after - before for before, after in pairwise(moments))


async def queues_of(client: Client, topic: str) -> Sequence[MessageQueue]:
    """A name server hears of a new topic a moment after its creation."""
    with trio.fail_after(10):
        while True:
            try:
                return await client.pull_consumer("TOOLS_CONSUMER").queues(topic)
            except quorate.NoRoute:
                await trio.sleep(0.02)


async def produce_numbers(
    client: Client,
    topic: str,
    name: str,
    promises: Promises,
    stop: trio.Event,
    *,
    pause_s: float = 0.002,
    padding: int = 200,
) -> None:
    """Send `name-0`, `name-1`, ... until told to stop. The key of each message is its body's first word."""
    queues = await queues_of(client, topic)
    number = 0
    while not stop.is_set():
        word = f"{name}-{number}"
        body = f"{word} ".ljust(padding, ".")
        try:
            queue = queues[number % len(queues)]
            receipt = await client.send(topic, body.encode(), key=word, queue=queue, timeout=SEND_WITHIN_S)
        except SendFailed as error:
            promises.unknown.add(word)
            promises.failures.append(str(error))
        else:
            assert word not in promises.acknowledged
            promises.note(word, receipt)
        number += 1
        await trio.sleep(pause_s)


@asynccontextmanager
async def producing(
    client: Client, topic: str, promises: Promises, *, producers: int = 4, pause_s: float = 0.002, padding: int = 200
) -> AsyncIterator[None]:
    """Numbered messages to a topic for the length of the block."""
    stop = trio.Event()
    produce = partial(produce_numbers, client, topic, promises=promises, stop=stop, pause_s=pause_s, padding=padding)
    async with trio.open_nursery() as nursery:
        for number in range(producers):
            nursery.start_soon(partial(produce, f"p{number}"))
        yield
        stop.set()


async def fill(client: Client, topic: str, nbytes: int) -> None:
    """A topic with so many bytes of messages that nobody needs."""
    await client.admin.create_topic(topic, queues=4)
    await queues_of(client, topic)
    body = bytes(500_000)

    async def send(count: int) -> None:
        for _ in range(count):
            await client.send(topic, body, timeout=30)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(send, nbytes // len(body) // 4 + 1)


async def trim(env: Env, client: Client, running: Cluster, position: int) -> None:
    """Have the head of every log deleted, up to `position`."""
    leader = await env.run_in_thread(running.leader)
    await client.admin.raft.delete_expired("{}:{}".format(*running.address(leader)), position)

    def is_trimmed() -> bool:
        status = running.status()
        return all(status[name]["first_position"] == position for name in BROKERS)

    await env.run_in_thread(wait_for, is_trimmed, 60, "the head of every log is deleted", STATUS_EVERY_S)


async def read_all(client: Client, topic: str) -> dict[MessageQueue, list[MessageExt]]:
    """Every message of a topic, queue by queue, from the smallest to the largest offset."""
    found: dict[MessageQueue, list[MessageExt]] = {}
    consumer = client.pull_consumer("READER")
    for queue in await queues_of(client, topic):
        offset, end = await consumer.min_offset(queue), await consumer.max_offset(queue)
        messages: list[MessageExt] = []
        while offset < end:
            result = await consumer.pull(queue, offset, max_messages=32)
            messages += result.messages
            assert result.next_offset > offset, f"{queue}: a pull at {offset} of {end} does not move on"
            offset = result.next_offset
        found[queue] = messages
    return found


def word_of(message: MessageExt) -> str:
    return bytes(message.body).decode().split(" ", 1)[0]


def check_stored(found: Mapping[MessageQueue, Sequence[MessageExt]], promises: Promises) -> None:
    """Nothing acknowledged is missing or moved, nothing is there twice, no offset is used twice, order is kept."""
    place: dict[str, tuple[str, int, int]] = {}
    twice: list[str] = []
    for queue, messages in found.items():
        offsets = [message.queue_offset for message in messages]
        assert offsets == list(range(offsets[0], offsets[0] + len(offsets))) if offsets else True, f"{queue}: {offsets}"
        last: dict[str, int] = {}
        for message in messages:
            word = word_of(message)
            if word in place:
                twice.append(word)
            place[word] = (queue.broker_name, queue.queue_id, message.queue_offset)
            producer, _, number = word.partition("-")
            assert last.get(producer, -1) < int(number), f"{queue}: {word} after {producer}-{last[producer]}"
            last[producer] = int(number)
    assert not twice, f"stored twice: {twice[:10]} and {max(0, len(twice) - 10)} more"
    missing = [word for word in promises.acknowledged if word not in place]
    assert not missing, f"acknowledged but not there: {missing[:10]} and {max(0, len(missing) - 10)} more"
    moved = {word: (at, place[word]) for word, at in promises.acknowledged.items() if place[word] != at}
    assert not moved, f"not where the acknowledgement said: {dict(list(moved.items())[:5])}"
    strangers = [word for word in place if word not in promises.acknowledged and word not in promises.unknown]
    assert not strangers, f"nobody sent these: {strangers[:10]}"
    used = sorted(promises.acknowledged.values())
    assert all(a != b for a, b in pairwise(used)), "two acknowledgements with the same queue offset"


async def same_logs(env: Env, running: Cluster, *, within_s: float = SAME_LOGS_WITHIN_S) -> None:
    """The three logs are byte-identical from the highest first position to the commit position."""
    deadline = env.clock.monotonic() + within_s
    while True:
        status = [one for one in (await env.run_in_thread(running.status)).values() if one["kind"] == "broker"]
        if all(one["state"] == "up" and one["first_position"] is not None for one in status):
            start = max(one["first_position"] for one in status)
            end = max(one["committed_position"] for one in status)
            logs = [running.log_bytes(one["name"], start, end) for one in status]
            at = differing(logs)
            if at is None and end > start and len(logs[0]) == end - start:
                print(f"logs of {[one['name'] for one in status]} are the same from {start} to {end}")
                return
            problem = f"they differ at position {None if at is None else start + at} of {start}..{end}"
        else:
            problem = f"not all up: {[(one['name'], one['reason']) for one in status if one['state'] != 'up']}"
        assert env.clock.monotonic() < deadline, f"logs not the same within {within_s:g} s: {problem}"
        await trio.sleep(STATUS_EVERY_S)
