"""The load generator: what it sends is what it says it sends, and what it counts was answered."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest

from benchmarks import generator, wire
from remoting.message_codec import iter_batch


def ring(**changed):
    settings = {
        "topic": "t",
        "broker_name": "b",
        "queues": 4,
        "size": 100,
        "connection": 1,
        "frames": 6,
        "batch": 1,
    }
    return generator.Ring(**(settings | changed))


def frames_of(data):
    found = []
    while data:
        length = 4 + int.from_bytes(data[:4], "big")
        found.append(bytes(data[4:length]))
        data = data[length:]
    return found


def headers_of(data):
    return [json.loads(frame[4 : 4 + int.from_bytes(frame[1:4], "big")]) for frame in frames_of(data)]


def test_every_message_of_three_laps_has_a_key_of_its_own():
    made = ring()
    keys = []
    for _ in range(9):
        begin, end = made.take(2)
        keys += [header["extFields"]["i"] for header in headers_of(made.view[begin:end])]
    assert len(keys) == len(set(keys)) == 18


def test_a_stretch_ends_at_the_end_of_the_ring():
    made = ring()
    assert made.take(4) == (0, 4 * made.length)
    assert made.take(4) == (4 * made.length, 6 * made.length)
    assert made.take(1) == (0, made.length)


def test_frames_go_round_the_queues_with_opaques_of_their_own():
    made = ring()
    headers = headers_of(made.bytes)
    assert [header["extFields"]["e"] for header in headers] == ["1", "2", "3", "0", "1", "2"]
    assert len({header["opaque"] for header in headers}) == 6


def test_a_batch_holds_messages_with_keys_of_their_own():
    made = ring(batch=32, frames=2)
    begin, end = made.take(2)
    keys = []
    for frame in frames_of(made.view[begin:end]):
        messages = list(iter_batch(frame[4 + int.from_bytes(frame[1:4], "big") :]))
        assert [len(body) for _, body, _ in messages] == [100] * 32
        keys += [bytes(properties) for _, _, properties in messages]
    assert len(set(keys)) == 64


def serve_once(answer_to):
    """A server for one connection that answers each request frame with ``answer_to(opaque)``."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        listener.close()
        # The generator leaves without reading its last answers, which resets the connection.
        with connection, connection.makefile("rb") as reader, contextlib.suppress(OSError):
            while head := reader.read(4):
                opaque, _ = wire.decode_answer(reader.read(int.from_bytes(head, "big")))
                connection.sendall(answer_to(opaque))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"127.0.0.1:{listener.getsockname()[1]}", thread


def run(address):
    return generator.run_sends(address, "t", connections=1, window=4, size=10, warm=0.05, seconds=0.2)


def test_accepted_sends_are_counted():
    address, thread = serve_once(lambda opaque: wire.encode_request(0, opaque, {"queueId": "0"}))
    result = run(address)
    thread.join(5)
    assert result.errors == {}
    assert result.messages > 10
    assert result.per_second == pytest.approx(result.messages / result.seconds)


def test_refused_sends_are_told_apart_and_not_counted():
    address, thread = serve_once(lambda opaque: wire.encode_request(2 if opaque % 2 else 0, opaque, {}))
    result = run(address)
    thread.join(5)
    refused = sum(result.errors.values())
    assert list(result.errors) == ["2 "]
    assert refused > 5
    assert result.messages > 5
    assert abs(refused - result.messages) <= 8


def test_a_server_that_goes_away_ends_the_run():
    listener = socket.create_server(("127.0.0.1", 0))

    def close_at_once():
        connection, _ = listener.accept()
        connection.close()
        listener.close()

    thread = threading.Thread(target=close_at_once, daemon=True)
    thread.start()
    with pytest.raises((wire.WireError, OSError)):
        run(f"127.0.0.1:{listener.getsockname()[1]}")
    thread.join(5)
