"""A small blocking speaker of the remoting protocol, made for measuring.

It shares no code with ``remoting`` on purpose: the same bytes are sent to every cluster under test, and a mistake in
our codec cannot cancel itself out. Nothing here is fast; the load generator has its own frames.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from attrs import define, frozen

SEND_MESSAGE_V2 = 310
SEND_BATCH_MESSAGE = 320
PULL_MESSAGE = 11
UPDATE_AND_CREATE_TOPIC = 17
GET_MAX_OFFSET = 30
GET_MIN_OFFSET = 31
GET_ROUTEINFO_BY_TOPIC = 105
GET_BROKER_CLUSTER_INFO = 106

SUCCESS = 0
PULL_NOT_FOUND = 19
PULL_RETRY_IMMEDIATELY = 20
PULL_OFFSET_MOVED = 21

RELEASE_5_3_3 = 479
TEMPLATE_TOPIC = "TBW102"

# Bytes of a stored message before its body length, with an IPv4 born host and store host.
_STORED_BODY_LENGTH_AT = 84


Found = TypeVar("Found")


class WireError(Exception):
    """A connection failed, ended or timed out; whether the request took effect is unknown."""


@frozen
class Answer:
    """One response frame."""

    code: int
    remark: str
    ext: Mapping[str, str]
    body: bytes


class Refused(Exception):
    """The server answered with another code than the caller could use."""

    def __init__(self, what: str, answer: Answer) -> None:
        super().__init__(f"{what}: code {answer.code}, {answer.remark}")
        self.answer = answer


def encode_request(code: int, opaque: int, ext: Mapping[str, str], body: bytes = b"") -> bytes:
    """One whole request frame with a JSON header, member order as Java writes it."""
    header = json.dumps(
        {
            "code": code,
            "extFields": dict(ext),
            "flag": 0,
            "language": "JAVA",
            "opaque": opaque,
            "serializeTypeCurrentRPC": "JSON",
            "version": RELEASE_5_3_3,
        },
        separators=(",", ":"),
    ).encode()
    return struct.pack(">II", 4 + len(header) + len(body), len(header)) + header + body


def decode_answer(frame: bytes | memoryview) -> tuple[int, Answer]:
    """Opaque and content of one frame, given without its length field."""
    header_length = int.from_bytes(frame[1:4], "big")
    header: dict[str, Any] = json.loads(bytes(frame[4 : 4 + header_length]))
    answer = Answer(
        code=header["code"],
        remark=header.get("remark") or "",
        ext=header.get("extFields") or {},
        body=bytes(frame[4 + header_length :]),
    )
    return header["opaque"], answer


def parse_address(address: str) -> tuple[str, int]:
    """``host:port`` in two."""
    host, _, port = address.rpartition(":")
    return host, int(port)


class Wire:
    """One blocking connection, one request at a time.

    :param address: ``host:port``
    :param timeout: seconds for connecting and for each answer
    """

    def __init__(self, address: str, timeout: float = 5.0) -> None:
        self.address = address
        self._opaque = 0
        try:
            self._socket = socket.create_connection(parse_address(address), timeout)
        except OSError as error:
            raise WireError(f"cannot connect to {address}: {error}") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def settimeout(self, seconds: float) -> None:
        self._socket.settimeout(seconds)

    def request(self, code: int, ext: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
        """Send one request and wait for its answer.

        :raises WireError: the connection broke or the time is up; it cannot be used again
        """
        self._opaque += 1
        try:
            self._socket.sendall(encode_request(code, self._opaque, ext or {}, body))
            while True:
                opaque, answer = decode_answer(self._read_frame())
                if opaque == self._opaque:
                    return answer
        except OSError as error:
            raise WireError(f"{self.address}: {error}") from error

    def _read_frame(self) -> bytes:
        length = int.from_bytes(self._read_exactly(4), "big")
        return self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            more = self._socket.recv(262_144)
            if not more:
                raise WireError(f"{self.address} closed the connection")
            self._received += more
        taken, self._received = self._received[:count], self._received[count:]
        return taken


@frozen
class QueueRoute:
    """Queues of one topic on one broker name."""

    broker_name: str
    write_queues: int
    read_queues: int


@frozen
class Route:
    """Where a topic lives: broker name -> broker id -> address, and its queues."""

    brokers: Mapping[str, Mapping[int, str]]
    queues: tuple[QueueRoute, ...]

    def leader(self, broker_name: str) -> str | None:
        """Address of broker id 0, as a stock producer would take it."""
        return self.brokers.get(broker_name, {}).get(0)

    @property
    def leaders(self) -> dict[str, str]:
        """Broker names that have an id 0, with its address."""
        return {name: addresses[0] for name, addresses in self.brokers.items() if 0 in addresses}


def _broker_addresses(table: Mapping[str, str]) -> dict[int, str]:
    return {int(broker_id): address for broker_id, address in table.items()}


def query_route(namesrv: str, topic: str, timeout: float = 2.0) -> Route | None:
    """Route of one topic, ``None`` while the name server has none.

    :raises WireError: the name server does not answer
    """
    with Wire(namesrv, timeout) as wire:
        answer = wire.request(GET_ROUTEINFO_BY_TOPIC, {"topic": topic, "acceptStandardJsonOnly": "true"})
    if answer.code != SUCCESS:
        return None
    document = json.loads(answer.body)
    return Route(
        brokers={data["brokerName"]: _broker_addresses(data["brokerAddrs"]) for data in document["brokerDatas"]},
        queues=tuple(
            QueueRoute(data["brokerName"], data["writeQueueNums"], data["readQueueNums"])
            for data in document["queueDatas"]
        ),
    )


def create_topic(broker: str, topic: str, queues: int) -> None:
    """Make one topic on one broker, as ``mqadmin updateTopic -b`` does.

    :raises Refused: the broker would not
    """
    ext = {
        "topic": topic,
        "defaultTopic": TEMPLATE_TOPIC,
        "readQueueNums": str(queues),
        "writeQueueNums": str(queues),
        "perm": "6",
        "topicFilterType": "SINGLE_TAG",
        "topicSysFlag": "0",
        "order": "false",
    }
    with Wire(broker) as wire:
        answer = wire.request(UPDATE_AND_CREATE_TOPIC, ext)
    if answer.code != SUCCESS:
        raise Refused(f"creating topic {topic}", answer)


def send_fields(topic: str, queue_id: int, properties: str, broker_name: str, *, batch: bool = False) -> dict[str, str]:
    """Header fields of SEND_MESSAGE_V2, as a stock 5.3.3 producer fills them."""
    return {
        "a": "quorate_bench",
        "b": topic,
        "c": TEMPLATE_TOPIC,
        "d": "4",
        "e": str(queue_id),
        "f": "0",
        "g": str(int(time.time() * 1000)),
        "h": "0",
        "i": properties,
        "j": "0",
        "k": "false",
        "m": "true" if batch else "false",
        "n": broker_name,
    }


def send_properties(unique_key: str) -> str:
    """Property text of a plain message."""
    return f"UNIQ_KEY\x01{unique_key}\x02WAIT\x01true\x02"


def queue_bounds(wire: Wire, topic: str, queue_id: int) -> tuple[int, int]:
    """Smallest offset and first free offset of one queue.

    :raises Refused: the broker does not know the queue
    """
    bounds = []
    for code in (GET_MIN_OFFSET, GET_MAX_OFFSET):
        answer = wire.request(code, {"topic": topic, "queueId": str(queue_id)})
        if answer.code != SUCCESS:
            raise Refused(f"offsets of {topic}/{queue_id}", answer)
        bounds.append(int(answer.ext["offset"]))
    return bounds[0], bounds[1]


def pull_fields(topic: str, group: str, queue_id: int, offset: int, count: int) -> dict[str, str]:
    """Header fields of a PULL_MESSAGE that brings its subscription and does not wait."""
    return {
        "consumerGroup": group,
        "topic": topic,
        "queueId": str(queue_id),
        "queueOffset": str(offset),
        "maxMsgNums": str(count),
        "sysFlag": "4",
        "commitOffset": "0",
        "suspendTimeoutMillis": "0",
        "subscription": "*",
        "subVersion": "0",
        "expressionType": "TAG",
    }


def stored_bodies(records: bytes) -> list[bytes]:
    """Bodies of the stored messages in a pull answer, in order."""
    bodies = []
    at = 0
    while at < len(records):
        size = int.from_bytes(records[at : at + 4], "big")
        length = int.from_bytes(records[at + _STORED_BODY_LENGTH_AT : at + _STORED_BODY_LENGTH_AT + 4], "big")
        start = at + _STORED_BODY_LENGTH_AT + 4
        bodies.append(records[start : start + length])
        at += size
    return bodies


def wait_until(check: Callable[[], Found | None], limit: float, what: str, pause: float = 0.05) -> Found:
    """Call ``check`` until it gives something other than ``None``.

    :param limit: seconds
    :raises TimeoutError: it never did
    """
    end = time.monotonic() + limit
    while True:
        try:
            found = check()
        except WireError:
            found = None
        if found is not None:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit:.0f} s: {what}")
        time.sleep(pause)


@define
class Probe:
    """Sends single messages to whoever the name server calls leader, asking again after every failure.

    What an eager client does; used alike for every cluster, so that fail-over figures compare brokers and not clients.
    """

    namesrv: str
    topic: str
    broker_name: str
    _wire: Wire | None = None
    _sent: int = 0

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def try_send(self, timeout: float = 1.0) -> bool:
        """One attempt; true when the message was acknowledged."""
        try:
            if self._wire is None:
                route = query_route(self.namesrv, self.topic) or query_route(self.namesrv, TEMPLATE_TOPIC)
                leader = route.leader(self.broker_name) if route is not None else None
                if leader is None:
                    return False
                self._wire = Wire(leader, timeout)
            self._sent += 1
            key = f"{time.time_ns():016X}{self._sent:016X}"
            fields = send_fields(self.topic, 0, send_properties(key), self.broker_name)
            answer = self._wire.request(SEND_MESSAGE_V2, fields, b"probe")
        except WireError:
            self.close()
            return False
        if answer.code != SUCCESS:
            self.close()
            return False
        return True

    def until_acknowledged(self, limit: float, pause: float = 0.02) -> float:
        """Seconds until a send is acknowledged, counted from the call.

        :raises TimeoutError: none was within ``limit`` seconds
        """
        begin = time.monotonic()
        while not self.try_send():
            if time.monotonic() - begin > limit:
                raise TimeoutError(f"no send acknowledged within {limit:.0f} s")
            time.sleep(pause)
        return time.monotonic() - begin
