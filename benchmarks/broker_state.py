"""What one 1 KiB message costs the broker's tables: `uv run --frozen python -m benchmarks.broker_state`.

A raft group in memory stands for the log, so that only the send processor, staging, ConsumeQueues, key index, dedup
window and answers are measured, on the leader and on a follower. CPU time, this process.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import resource
import tempfile
import time
from collections.abc import Callable

import trio

from broker.config import BrokerConfig
from broker.processors.send import SendProcessor
from broker.state import BrokerState
from broker.testing import MemoryConnection, MemoryGroup
from dledger.config import GroupConfig
from remoting.command import encode_request
from remoting.frames import Frame, FrameReader
from remoting.message_codec import encode_batch_item
from runtime.logs import get_logger
from runtime.real import real_env

BATCH = 128
"""Frames handled between two commits: what a loaded leader sees per turn."""


def make_state(folder: str) -> tuple[BrokerState, MemoryGroup]:
    config = BrokerConfig(
        cluster="DefaultCluster",
        broker_name="broker-a",
        node_id="n0",
        broker_id=0,
        listen=("127.0.0.1", 0),
        advertised=("127.0.0.1", 10911),
        namesrv=(),
        group=GroupConfig(
            cluster="DefaultCluster",
            group="broker-a",
            node_id="n0",
            peers={"n0": ("127.0.0.1", 1)},
            data_dir=f"{folder}/raft",
        ),
        data_dir=folder,
    )
    state = BrokerState(real_env(), config, get_logger("bench"))
    group = MemoryGroup(state)
    state.attach(group)  # type: ignore[arg-type]
    state.restore(None)
    group.lead()
    return state, group


def send_frames(count: int, start: int, body: bytes) -> list[Frame]:
    data = bytearray()
    for number in range(start, start + count):
        properties = f"UNIQ_KEY\x017F0000010B2C18B4AAC2{number:012X}\x02WAIT\x01true\x02TAGS\x01TagA\x02"
        ext = {
            "a": "PG_bench",
            "b": "Bench",
            "c": "TBW102",
            "d": "4",
            "e": str(number % 4),
            "f": "0",
            "g": "1700000000000",
            "h": "0",
            "i": properties,
            "j": "0",
            "k": "false",
            "m": "false",
        }
        data += encode_request(310, number, ext, body)
    return FrameReader().cut(bytes(data))


def batch_frames(count: int, start: int, body: bytes, size: int) -> list[Frame]:
    data = bytearray()
    for number in range(start, start + count):
        items = [
            encode_batch_item(0, body, f"UNIQ_KEY\x01{number:016X}{item:016X}\x02TAGS\x01TagA\x02".encode())
            for item in range(size)
        ]
        ext = {"a": "PG", "b": "Bench", "c": "TBW102", "d": "4", "e": str(number % 4), "f": "0", "g": "1700000000000"}
        ext |= {"h": "0", "i": "", "j": "0", "k": "false", "m": "true"}
        data += encode_request(320, number, ext, b"".join(items))
    return FrameReader().cut(bytes(data))


def cpu_us(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return (time.process_time() - started) * 1e6


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--body", type=int, default=1024)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    body = bytes(range(256)) * (options.body // 256) + b"x" * (options.body % 256)
    with tempfile.TemporaryDirectory() as folder:
        leader, log = make_state(f"{folder}/leader")
        _follower, copy = make_state(f"{folder}/follower")
        copy.follow()
        send = SendProcessor(leader)
        connections = [MemoryConnection(("127.0.0.1", 40_000 + number)) for number in range(4)]
        send.handle_send(send_frames(1, 10**9, body)[0], connections[0])
        log.commit()
        log.commit()
        for entry in log.entries:
            copy.receive(entry)
        taken = len(log.entries)
        copy.commit()
        gc.collect()
        gc.freeze()
        profile = cProfile.Profile() if options.profile else None
        leader_us = follower_us = 0.0
        rounds = options.messages // BATCH
        for round_ in range(rounds):
            frames = send_frames(BATCH, round_ * BATCH, body)

            def lead(frames: list[Frame] = frames) -> None:
                handle = send.handle_send
                for first in range(0, BATCH, 32):
                    connection = connections[first // 32]
                    for frame in frames[first : first + 32]:
                        handle(frame, connection)
                log.commit()

            def follow(taken: int = taken) -> None:
                for entry in log.entries[taken:]:
                    copy.receive(entry)
                copy.commit()

            if profile is not None:
                profile.enable()
            leader_us += cpu_us(lead)
            if profile is not None:
                profile.disable()
            follower_us += cpu_us(follow)
            taken = len(log.entries)
            for connection in connections:
                connection.written.clear()
        count = rounds * BATCH
        print(f"single sends, {options.body} byte bodies, {count} messages, {BATCH} per turn")
        print(f"  leader    {leader_us / count:6.2f} us/message (of it MemoryGroup's copy into its log, about 0.5)")
        print(f"  follower  {follower_us / count:6.2f} us/message")
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)
        size = 32
        leader_us = 0.0
        rounds = max(1, options.messages // 4 // (size * 4))
        for round_ in range(rounds):
            frames = batch_frames(4, round_ * 4, body, size)

            def lead_batches(frames: list[Frame] = frames) -> None:
                for frame in frames:
                    send.handle_send(frame, connections[0])
                log.commit()

            leader_us += cpu_us(lead_batches)
            connections[0].written.clear()
        count = rounds * 4 * size
        print(f"batches of {size}, {count} messages")
        print(f"  leader    {leader_us / count:6.2f} us/message")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"dedup keys {len(leader.dedup)}, peak memory {peak} MiB")


if __name__ == "__main__":
    trio.run(main)
