"""The load: one light process that speaks the remoting protocol from preformatted frames.

A run prints one JSON object with the rate, the CPU of the servers whose pids it was given, and its own CPU beside it.

    python -m benchmarks.generator sends   --address 127.0.0.1:10911 --topic t --queues 8 --seconds 8 --pids 1,2,3
    python -m benchmarks.generator batches ...      32 messages to a frame
    python -m benchmarks.generator latency ...      one message in flight
    python -m benchmarks.generator pull    ...      32 messages to a request, over and over the topic
    python -m benchmarks.generator ceiling          sends against a responder that does nothing

How it stays light: each connection owns a ring of complete frames of equal length. Sending is one ``send`` of a
stretch of the ring; only eight digits of every UNIQ_KEY in it are patched, so that every message of a run has a key
of its own. Answers are skipped by their length field, and one count over the bytes received tells whether each of
them says code 0; only if not are they parsed. After each round over its sockets the loop rests for 200 us, so that
answers gather; with 1,024 messages in flight that delays nobody, and it halves the generator's CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import statistics
import struct
import sys
import threading
import time
from collections import Counter
from typing import Any

from attrs import asdict, define, field, frozen

from benchmarks import processes, wire

BATCH_MESSAGES = 32
BATCH_FRAMES = 32
PULL_MESSAGES = 32
REST_S = 0.0002
_SILENCE_LIMIT_S = 15.0
_RECEIVE_BYTES = 1 << 20
_FIRST_OPAQUE = 1_000_000
_LAP_DIGITS = 8
_LAP_PLACEHOLDER = "L" * _LAP_DIGITS
_LENGTH = struct.Struct(">I")


@frozen
class LoadResult:
    """One measured stretch of load."""

    messages: int
    seconds: float
    per_second: float
    errors: dict[str, int]
    generator_cpu: float
    """Cores the generator used, 0.5 being half of one."""
    broker_cpu: float
    """Cores the given pids used together."""
    broker_us_per_message: float


@frozen
class LatencyResult:
    """Round trips of single messages, milliseconds."""

    messages: int
    seconds: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    errors: dict[str, int]
    generator_cpu: float


def _unique_key(run: int, connection: int, slot: int, message: int) -> str:
    return f"{run & 0xFFFFFFFFFF:010X}{connection:02X}{slot:06X}{message:06X}{_LAP_PLACEHOLDER}"


class Ring:
    """Frames of one connection, back to back, all of one length.

    :param frames: number of slots; more than are ever in flight
    :param batch: messages in each frame; one makes plain sends
    """

    def __init__(
        self, *, topic: str, broker_name: str, queues: int, size: int, connection: int, frames: int, batch: int
    ) -> None:
        if queues > 10:
            raise ValueError("at most 10 queues, so that every frame has the same length")
        run = time.time_ns() >> 10
        made = []
        for slot in range(frames):
            queue_id = (slot + connection) % queues
            keys = [_unique_key(run, connection, slot, message) for message in range(batch)]
            made.append(_send_frame(topic, broker_name, queue_id, _FIRST_OPAQUE + slot, keys, size))
        self.slots = frames
        self.batch = batch
        self.length = len(made[0])
        self.bytes = bytearray().join(made)
        self.view = memoryview(self.bytes)
        placeholder = _LAP_PLACEHOLDER.encode()
        self._marks = _find_all(made[0], placeholder)
        if len(self._marks) != batch or any(len(frame) != self.length for frame in made):
            raise AssertionError("frames are not alike")
        self._next = 0
        self._lap = 0

    def take(self, wanted: int) -> tuple[int, int]:
        """Give up to ``wanted`` frames (fewer at the ring's end) new keys; returns the stretch of bytes they take."""
        first = self._next
        last = min(first + wanted, self.slots)
        lap = b"%08X" % self._lap
        length = self.length
        ring = self.bytes
        for mark in self._marks:
            for at in range(first * length + mark, last * length, length):
                ring[at : at + _LAP_DIGITS] = lap
        if last == self.slots:
            self._next = 0
            self._lap += 1
        else:
            self._next = last
        return first * length, last * length


def _find_all(data: bytes, wanted: bytes) -> list[int]:
    found = []
    at = data.find(wanted)
    while at >= 0:
        found.append(at)
        at = data.find(wanted, at + len(wanted))
    return found


def _send_frame(topic: str, broker_name: str, queue_id: int, opaque: int, keys: list[str], size: int) -> bytes:
    payload = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    if len(keys) == 1:
        fields = wire.send_fields(topic, queue_id, wire.send_properties(keys[0]), broker_name)
        return wire.encode_request(wire.SEND_MESSAGE_V2, opaque, fields, payload)
    messages = []
    for key in keys:
        properties = wire.send_properties(key).encode()
        content = struct.pack(">IIIi", 0, 0, 0, len(payload)) + payload
        content += struct.pack(">h", len(properties)) + properties
        messages.append(struct.pack(">I", 4 + len(content)) + content)
    fields = wire.send_fields(topic, queue_id, "WAIT\x01true\x02", broker_name, batch=True)
    return wire.encode_request(wire.SEND_BATCH_MESSAGE, opaque, fields, b"".join(messages))


class _Answers:
    """Cuts answers out of one connection and counts them."""

    def __init__(self) -> None:
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._fill = 0
        self.errors: Counter[str] = Counter()

    def receive(self, source: socket.socket) -> int:
        """Take what has arrived.

        :returns: complete answers in it
        :raises BlockingIOError: nothing has arrived
        :raises wire.WireError: the connection ended
        """
        got = source.recv_into(self._view[self._fill :])
        if not got:
            raise wire.WireError("the broker closed the connection")
        end = self._fill + got
        buffer = self._buffer
        unpack = _LENGTH.unpack_from
        at = 0
        count = 0
        while end - at >= 4:
            following = at + 4 + unpack(buffer, at)[0]
            if following > end:
                break
            at = following
            count += 1
        if buffer.count(b'"code":0,', 0, at) != count:
            self._look_closer(at)
        self._fill = end - at
        if self._fill and at:
            buffer[: self._fill] = buffer[at:end]
        return count

    def _look_closer(self, end: int) -> None:
        at = 0
        while at < end:
            following = at + 4 + _LENGTH.unpack_from(self._buffer, at)[0]
            _, answer = wire.decode_answer(self._view[at + 4 : following])
            if answer.code != wire.SUCCESS:
                self.errors[f"{answer.code} {answer.remark[:60]}"] += 1
            at = following


def _connect(address: str) -> socket.socket:
    try:
        connection = socket.create_connection(wire.parse_address(address), 5.0)
    except OSError as error:
        raise wire.WireError(f"cannot connect to {address}: {error}") from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@define
class _Sender:
    connection: socket.socket
    ring: Ring
    window: int
    answers: _Answers = field(factory=_Answers)
    in_flight: int = 0
    unsent: tuple[int, int] = (0, 0)

    def fill(self) -> bool:
        """Send until the window is full; false when the socket takes no more."""
        while True:
            begin, end = self.unsent
            if begin == end:
                free = self.window - self.in_flight
                if free <= 0:
                    return True
                begin, end = self.ring.take(free)
                self.in_flight += (end - begin) // self.ring.length
            try:
                begin += self.connection.send(self.ring.view[begin:end])
            except BlockingIOError:
                self.unsent = (begin, end)
                return False
            self.unsent = (begin, end)

    def collect(self) -> int:
        try:
            count = self.answers.receive(self.connection)
        except BlockingIOError:
            return 0
        self.in_flight -= count
        return count


class _Meter:
    """CPU of the generator and of the servers between two moments."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self.begin()

    def begin(self) -> None:
        self._own = time.process_time()
        self._servers = processes.cpu_seconds(self._pids)
        self._wall = time.perf_counter()

    def read(self, messages: int, errors: Counter[str]) -> LoadResult:
        seconds = time.perf_counter() - self._wall
        servers = processes.cpu_seconds(self._pids) - self._servers
        return LoadResult(
            messages=messages,
            seconds=seconds,
            per_second=messages / seconds,
            errors=dict(errors),
            generator_cpu=(time.process_time() - self._own) / seconds,
            broker_cpu=servers / seconds,
            broker_us_per_message=servers / messages * 1e6 if messages else 0.0,
        )


def run_sends(
    address: str,
    topic: str,
    *,
    broker_name: str = "",
    queues: int = 8,
    connections: int = 4,
    window: int = 256,
    size: int = 1024,
    batch: int = 1,
    warm: float = 1.0,
    seconds: float = 8.0,
    rest: float = REST_S,
    pids: list[int] | None = None,
) -> LoadResult:
    """Keep ``window`` frames in flight on each connection.

    :param window: frames, each of ``batch`` messages
    :param size: bytes of each body
    :param warm: seconds before the measured stretch
    :param seconds: length of the measured stretch
    :param rest: seconds of sleep after each round over the sockets
    :raises wire.WireError: a connection ended
    """
    with contextlib.ExitStack() as opened:
        senders = {}
        for number in range(connections):
            connection = opened.enter_context(_connect(address))
            connection.setblocking(False)
            ring = Ring(
                topic=topic,
                broker_name=broker_name,
                queues=queues,
                size=size,
                connection=number,
                frames=window * 2,
                batch=batch,
            )
            senders[connection.fileno()] = _Sender(connection, ring, window)
        poll = opened.enter_context(select.epoll())
        for descriptor, sender in senders.items():
            poll.register(descriptor, select.EPOLLIN if sender.fill() else select.EPOLLIN | select.EPOLLOUT)
        meter = _Meter(pids or [])
        answered = 0
        measuring = False
        turn_at = time.perf_counter() + warm
        last_answer = time.perf_counter()
        while True:
            now = time.perf_counter()
            if now >= turn_at:
                if measuring:
                    break
                measuring = True
                answered = 0
                for sender in senders.values():
                    sender.answers.errors.clear()
                meter.begin()
                turn_at = now + seconds
            for descriptor, _ in poll.poll(0.05):
                sender = senders[descriptor]
                count = sender.collect()
                if count:
                    answered += count
                    last_answer = now
                everything_sent = sender.fill()
                poll.modify(descriptor, select.EPOLLIN if everything_sent else select.EPOLLIN | select.EPOLLOUT)
            if now - last_answer > _SILENCE_LIMIT_S:
                raise wire.WireError(f"{address} answers nothing for {_SILENCE_LIMIT_S:.0f} s")
            if rest:
                time.sleep(rest)
        errors: Counter[str] = Counter()
        for sender in senders.values():
            errors += sender.answers.errors
        return meter.read((answered - errors.total()) * batch, errors)


def run_latency(
    address: str,
    topic: str,
    *,
    broker_name: str = "",
    queues: int = 8,
    size: int = 1024,
    warm: float = 1.0,
    seconds: float = 4.0,
) -> LatencyResult:
    """One message in flight on one connection.

    :raises wire.WireError: the connection ended
    """
    ring = Ring(topic=topic, broker_name=broker_name, queues=queues, size=size, connection=99, frames=64, batch=1)
    answers = _Answers()
    times: list[float] = []
    measuring = False
    with _connect(address) as connection:
        connection.settimeout(_SILENCE_LIMIT_S)
        begin = time.perf_counter()
        own = time.process_time()
        while True:
            sent = time.perf_counter()
            if not measuring and sent - begin > warm:
                measuring, begin, own = True, sent, time.process_time()
                answers.errors.clear()
                times = []
            elif measuring and sent - begin > seconds:
                break
            first, last = ring.take(1)
            connection.sendall(ring.view[first:last])
            while not answers.receive(connection):
                pass
            times.append(time.perf_counter() - sent)
        wall = time.perf_counter() - begin
    times.sort()
    return LatencyResult(
        messages=len(times),
        seconds=wall,
        p50_ms=times[len(times) // 2] * 1e3,
        p99_ms=times[len(times) * 99 // 100] * 1e3,
        mean_ms=statistics.fmean(times) * 1e3,
        errors=dict(answers.errors),
        generator_cpu=(time.process_time() - own) / wall,
    )


@define
class _PulledQueue:
    queue_id: int
    first: int
    end: int
    at: int


class _Puller:
    """One connection that always has one pull in flight for each of its queues."""

    def __init__(self, connection: socket.socket, topic: str, queues: list[_PulledQueue]) -> None:
        self.connection = connection
        self.queues = queues
        self.errors: Counter[str] = Counter()
        self._topic = topic
        self._buffer = bytearray(_RECEIVE_BYTES * 4)
        self._view = memoryview(self._buffer)
        self._fill = 0

    def ask(self, number: int) -> None:
        queue = self.queues[number]
        fields = wire.pull_fields(self._topic, "quorate_bench_pull", queue.queue_id, queue.at, PULL_MESSAGES)
        self.connection.sendall(wire.encode_request(wire.PULL_MESSAGE, number, fields))

    def collect(self) -> int:
        """Take what arrived, ask on for every queue answered, give the number of messages."""
        got = self.connection.recv_into(self._view[self._fill :])
        if not got:
            raise wire.WireError("the broker closed the connection")
        end = self._fill + got
        at = 0
        messages = 0
        while end - at >= 4:
            following = at + 4 + _LENGTH.unpack_from(self._buffer, at)[0]
            if following > end:
                break
            messages += self._take(at + 4, following)
            at = following
        self._fill = end - at
        if self._fill and at:
            self._buffer[: self._fill] = self._buffer[at:end]
        return messages

    def _take(self, begin: int, end: int) -> int:
        header_end = begin + 4 + int.from_bytes(self._buffer[begin + 1 : begin + 4], "big")
        header: dict[str, Any] = json.loads(self._buffer[begin + 4 : header_end])
        queue = self.queues[header["opaque"]]
        count = 0
        if header["code"] == wire.SUCCESS:
            at = header_end
            while at < end:
                at += _LENGTH.unpack_from(self._buffer, at)[0]
                count += 1
            if at != end:
                raise wire.WireError("a pull answer ends in the middle of a message")
            queue.at = int(header["extFields"]["nextBeginOffset"])
        elif header["code"] not in (wire.PULL_NOT_FOUND, wire.PULL_OFFSET_MOVED):
            self.errors[f"{header['code']} {header.get('remark', '')[:60]}"] += 1
        if count == 0 or queue.at >= queue.end:
            queue.at = queue.first
        self.ask(header["opaque"])
        return count


def run_pull(
    address: str,
    topic: str,
    *,
    queues: int = 8,
    connections: int = 4,
    warm: float = 1.0,
    seconds: float = 8.0,
    pids: list[int] | None = None,
) -> LoadResult:
    """Pull the whole topic again and again, 32 messages to a request, one request in flight for each queue.

    :raises wire.WireError: a connection ended
    :raises wire.Refused: the topic has no messages
    """
    found = []
    with wire.Wire(address) as asking:
        for queue_id in range(queues):
            first, end = wire.queue_bounds(asking, topic, queue_id)
            if end > first:
                found.append(_PulledQueue(queue_id, first, end, first))
    if not found:
        raise wire.WireError(f"topic {topic} is empty")
    with contextlib.ExitStack() as opened:
        poll = opened.enter_context(select.epoll())
        pullers = {}
        for number in range(min(connections, len(found))):
            connection = opened.enter_context(_connect(address))
            puller = _Puller(connection, topic, found[number::connections])
            pullers[connection.fileno()] = puller
            poll.register(connection, select.EPOLLIN)
            for queue_number in range(len(puller.queues)):
                puller.ask(queue_number)
        meter = _Meter(pids or [])
        messages = 0
        measuring = False
        turn_at = time.perf_counter() + warm
        last_answer = time.perf_counter()
        while True:
            now = time.perf_counter()
            if now >= turn_at:
                if measuring:
                    break
                measuring = True
                messages = 0
                meter.begin()
                turn_at = now + seconds
            for descriptor, _ in poll.poll(0.05):
                count = pullers[descriptor].collect()
                if count:
                    messages += count
                    last_answer = now
            if now - last_answer > _SILENCE_LIMIT_S:
                raise wire.WireError(f"{address} answers nothing for {_SILENCE_LIMIT_S:.0f} s")
        errors: Counter[str] = Counter()
        for puller in pullers.values():
            errors += puller.errors
        return meter.read(messages, errors)


def _answer_at_once(connection: socket.socket) -> None:
    """Answer every frame with the same canned bytes, parsing nothing."""
    canned = wire.encode_request(
        0, 1, {"queueId": "0", "queueOffset": "1", "msgId": "7F00000100002A9F0000000000000000", "TRACE_ON": "true"}
    )
    buffer = bytearray(_RECEIVE_BYTES)
    view = memoryview(buffer)
    fill = 0
    while True:
        try:
            got = connection.recv_into(view[fill:])
        except OSError:
            return
        if not got:
            return
        end = fill + got
        at = count = 0
        while end - at >= 4:
            following = at + 4 + _LENGTH.unpack_from(buffer, at)[0]
            if following > end:
                break
            at = following
            count += 1
        fill = end - at
        if fill and at:
            buffer[:fill] = buffer[at:end]
        try:
            connection.sendall(canned * count)
        except OSError:
            return


def run_ceiling(seconds: float, batch: int, window: int, rest: float) -> LoadResult:
    """How fast the generator could go: the same load against a process that answers without looking."""
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        while True:
            accepted, _ = listener.accept()
            threading.Thread(target=_answer_at_once, args=(accepted,), daemon=True).start()
    port = listener.getsockname()[1]
    listener.close()
    try:
        return run_sends(
            f"127.0.0.1:{port}", "ceiling", seconds=seconds, batch=batch, window=window, rest=rest, pids=[child]
        )
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def main() -> None:
    """Run one stretch of load and print its result as JSON."""
    parser = argparse.ArgumentParser(description="Load over the remoting protocol, from preformatted frames")
    parser.add_argument("mode", choices=["sends", "batches", "latency", "pull", "ceiling"])
    parser.add_argument("--address", default="127.0.0.1:10911")
    parser.add_argument("--broker-name", default="broker-a")
    parser.add_argument("--topic", default="bench")
    parser.add_argument("--queues", type=int, default=8)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--window", type=int, default=None, help="frames in flight on each connection")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--warm", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rest-us", type=float, default=REST_S * 1e6)
    parser.add_argument("--pids", default="")
    parser.add_argument("--batched", action="store_true", help="ceiling with frames of 32 messages")
    given = parser.parse_args()
    pids = [int(pid) for pid in given.pids.split(",") if pid]
    batch = BATCH_MESSAGES if given.mode == "batches" or given.batched else 1
    window = given.window if given.window is not None else (256 if batch == 1 else BATCH_FRAMES)
    result: LoadResult | LatencyResult
    try:
        match given.mode:
            case "latency":
                result = run_latency(
                    given.address,
                    given.topic,
                    broker_name=given.broker_name,
                    queues=given.queues,
                    size=given.size,
                    warm=given.warm,
                    seconds=given.seconds,
                )
            case "pull":
                result = run_pull(
                    given.address,
                    given.topic,
                    queues=given.queues,
                    connections=given.connections,
                    warm=given.warm,
                    seconds=given.seconds,
                    pids=pids,
                )
            case "ceiling":
                result = run_ceiling(given.seconds, batch, window, given.rest_us / 1e6)
            case _:
                result = run_sends(
                    given.address,
                    given.topic,
                    broker_name=given.broker_name,
                    queues=given.queues,
                    connections=given.connections,
                    window=window,
                    size=given.size,
                    batch=batch,
                    warm=given.warm,
                    seconds=given.seconds,
                    rest=given.rest_us / 1e6,
                    pids=pids,
                )
    except (wire.WireError, wire.Refused, OSError) as error:
        print(str(error), file=sys.stderr)
        sys.exit(1)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
