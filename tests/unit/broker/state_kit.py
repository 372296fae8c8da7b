"""What the tests of the broker's tables share: a clock they move, states over groups in memory, frames to send."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import trio
import trio.lowlevel
from attrs import define

from broker.config import BrokerConfig
from broker.processors.send import SendProcessor
from broker.records import decode_record
from broker.state import BrokerState
from broker.testing import MemoryConnection, MemoryGroup
from dledger.config import GroupConfig
from remoting.command import Command, encode_request
from remoting.frames import Frame, FrameReader, decode_frame
from runtime.files import RealFiles
from runtime.model import Env

START_MS = 1_700_000_000_000


class ManualClock:
    """Wall and monotonic time that only move when told; waiting is real, short, and by yielding."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic(self) -> float:
        return self.now_ms / 1000

    def advance(self, ms: int) -> None:
        self.now_ms += ms

    async def sleep(self, seconds: float) -> None:
        await self.sleep_until(self.monotonic() + seconds)

    async def sleep_until(self, deadline: float) -> None:
        while self.monotonic() < deadline:
            await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()

    def move_on_at(self, deadline: float) -> AbstractContextManager[trio.CancelScope]:
        return trio.move_on_after(max(0.0, deadline - self.monotonic()) / 1000)

    def move_on_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """A thousandth of the time asked for: virtual time stands while a test waits."""
        return trio.move_on_after(seconds / 1000)

    def fail_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        return trio.fail_after(seconds)


@define
class FixedIds:
    host: str = "test"
    pid: int = 77
    boot_id: str = "boot"
    memory_bytes: int = 1 << 34

    def salt(self, nbytes: int) -> bytes:
        return bytes(range(nbytes))


class Log:
    """A logger that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _add(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    debug = info = warning = error = _add


async def _inline(function: Callable[..., Any], *args: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*args)


def make_env(clock: ManualClock) -> Env:
    return Env(
        clock=clock,
        rng=lambda name: random.Random(name),
        ids=FixedIds(),  # type: ignore[arg-type]
        files=RealFiles(),
        net=None,  # type: ignore[arg-type]
        run_in_thread=_inline,
    )


def make_config(folder: str, **changes: Any) -> BrokerConfig:
    values: dict[str, Any] = {
        "cluster": "DefaultCluster",
        "broker_name": "broker-a",
        "node_id": "n0",
        "broker_id": 0,
        "listen": ("127.0.0.1", 0),
        "advertised": ("10.0.0.1", 10911),
        "namesrv": (),
        "group": GroupConfig(
            cluster="DefaultCluster",
            group="broker-a",
            node_id="n0",
            peers={"n0": ("127.0.0.1", 1)},
            data_dir=f"{folder}/raft",
        ),
        "data_dir": folder,
    }
    return BrokerConfig(**{**values, **changes})


@define
class Node:
    """A state, its group, its send processor and one client connection."""

    state: BrokerState
    group: MemoryGroup
    send: SendProcessor
    clock: ManualClock
    log: Log
    conn: MemoryConnection
    opaque: int = 0

    def request(self, code: int, ext: dict[str, str], body: bytes = b"", **options: Any) -> int:
        """Hand a request to the send processor; returns its opaque."""
        self.opaque += 1
        self.send.handle_send(frame_of(code, self.opaque, ext, body, **options), self.conn)
        return self.opaque

    def put(self, topic: str, body: bytes = b"hello", properties: str = "", *, code: int = 310, **fields: Any) -> int:
        options = {name: fields.pop(name) for name in ("oneway", "version") if name in fields}
        return self.request(code, send_fields(topic, properties, **fields), body, **options)

    def answers(self) -> dict[int, Command]:
        """Answers written since the last look, by opaque."""
        data = self.conn.take()
        return {command.opaque: command for command in map(decode_frame, FrameReader().cut(data))}

    def send_now(self, topic: str, body: bytes = b"hello", properties: str = "", **fields: Any) -> Command:
        """Send, commit everything, and return the answer."""
        opaque = self.put(topic, body, properties, **fields)
        self.settle()
        return self.answers()[opaque]

    def settle(self) -> None:
        """Commit until nothing is left, what was parked included."""
        for _ in range(4):
            self.group.commit()


def frame_of(code: int, opaque: int, ext: dict[str, str], body: bytes = b"", **options: Any) -> Frame:
    (frame,) = FrameReader().cut(encode_request(code, opaque, ext, body, **options))
    return frame


def send_fields(
    topic: str,
    properties: str = "",
    *,
    queue_id: int = 0,
    template: str = "TBW102",
    template_queues: int = 4,
    sys_flag: int = 0,
    reconsume: int = 0,
    max_reconsume: int | None = None,
    batch: bool = False,
    flag: int = 0,
) -> dict[str, str]:
    fields = {
        "a": "PG_demo",
        "b": topic,
        "c": template,
        "d": str(template_queues),
        "e": str(queue_id),
        "f": str(sys_flag),
        "g": str(START_MS - 5),
        "h": str(flag),
        "i": properties,
        "j": str(reconsume),
        "k": "false",
        "m": "true" if batch else "false",
    }
    if max_reconsume is not None:
        fields["l"] = str(max_reconsume)
    return fields


def make_node(folder: str | Path, *, leading: bool = True, clock: ManualClock | None = None, **changes: Any) -> Node:
    """A node with empty tables."""
    clock = clock or ManualClock()
    log = Log()
    state = BrokerState(make_env(clock), make_config(str(folder), **changes), log)
    group = MemoryGroup(state, leading=leading)
    state.attach(group)  # type: ignore[arg-type]
    assert state.restore(None) == 0
    if leading:
        group.lead(term=1)
    return Node(state, group, SendProcessor(state), clock, log, MemoryConnection())


def copy_entries(source: MemoryGroup, target: MemoryGroup) -> None:
    """Replicate every entry the target lacks."""
    source.seal()
    for entry in source.entries[len(target.entries) :]:
        target.receive(entry)


def young_dedup_positions(state: BrokerState) -> list[int]:
    """Messages that can still be the original of a duplicate: a send that was cut may have displaced one that is too
    old anyway, and under which of its keys a message stands depends on when the generations rotated."""
    found: list[int] = []
    # A follower has not seen what was cut at the leader.
    now = max(state.env.clock.wall_ms(), state.staging.last_store_ms)
    for position in {*state.dedup.previous.values(), *state.dedup.current.values()}:
        data = state.read_message(position)
        if data is None or now - decode_record(data).store_timestamp <= state.dedup.window_ms:
            found.append(position)
    return sorted(found)


def tables_of(state: BrokerState) -> dict[str, Any]:
    """Everything two replicas must agree on."""
    units = {
        (queue.topic, queue.queue_id): state.queues.units(queue.topic, queue.queue_id, queue.min_offset, 1 << 20)
        for queue in state.queues
    }
    pending = {
        (queue.topic, queue.queue_id): queue.next_offset for queue in state.queues.pending.values() if queue.next_offset
    }
    index = state.index.snapshot()
    return {
        "topics": state.topics.snapshot(),
        "groups": state.groups.snapshot(),
        "offsets": state.offsets.snapshot(),
        "locks": state.locks.snapshot(),
        "delay": state.delay.snapshot(),
        "bounds": [row[:4] for row in state.queues.bounds()],
        "units": units,
        "pending": pending,
        "dedup": young_dedup_positions(state),
        "index": [index["hashes"], index["positions"], index["seconds"]],
        "applied": state.applied_index,
    }
