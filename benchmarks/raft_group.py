"""What a raft group alone can do: three processes on loopback, no message protocol above.

    uv run python -m benchmarks.raft_group [--seconds 3] [--record-bytes 1024] [--batch 100] [--flush async|sync]

Prints the latency of one record in flight, then records and entries per second with `--batch` records per entry.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

import trio

from benchmarks.counting import CountingMachine
from dledger.config import GroupConfig
from dledger.group import RaftGroup
from runtime.logs import get_logger
from runtime.real import real_env


class FollowingMachine(CountingMachine):
    """Of a process that should not lead: hands over to the peer that asks."""

    group: RaftGroup

    def app_message(self, peer_id: str, payload: bytes) -> None:
        self.group.transfer_leadership(peer_id)


def config_of(node_id: str, ports: list[int], folder: str, flush: Any) -> GroupConfig:
    return GroupConfig(
        cluster="bench",
        group="g",
        node_id=node_id,
        peers={f"n{number}": ("127.0.0.1", port) for number, port in enumerate(ports)},
        data_dir=f"{folder}/{node_id}",
        format_if_empty=True,
        flush=flush,
    )


async def follow(config: GroupConfig) -> None:
    machine = FollowingMachine()
    group = RaftGroup(real_env(), config, machine, get_logger("bench"))
    machine.group = group
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        usage = getrusage(RUSAGE_SELF)
        print(json.dumps({"cpu": usage.ru_utime + usage.ru_stime, "applied": machine.applied}), flush=True)
        nursery.cancel_scope.cancel()


async def lead(config: GroupConfig, options: argparse.Namespace) -> None:
    machine = CountingMachine()
    group = RaftGroup(real_env(), config, machine, get_logger("bench"))
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        while not group.is_ready_leader:
            # The follower that won hands over to whom it is told by an app message; see `FollowingMachine`.
            if group.leader_id is not None:
                group.send_app(group.leader_id, b"lead")
            await trio.sleep(0.2)
        await trio.sleep(0.5)
        cpu = time.process_time()
        latencies = await one_in_flight(group, options)
        cpu = time.process_time() - cpu
        latencies.sort()
        print(
            f"one in flight: p50 {latencies[len(latencies) // 2] * 1e6:.0f} us,"
            f" p99 {latencies[len(latencies) * 99 // 100] * 1e6:.0f} us, {len(latencies)} commits,"
            f" leader CPU {cpu / len(latencies) * 1e6:.0f} us"
        )
        await throughput(group, machine, options)
        nursery.cancel_scope.cancel()


async def one_in_flight(group: RaftGroup, options: argparse.Namespace) -> list[float]:
    record = bytes(options.record_bytes)
    latencies: list[float] = []
    stop = time.perf_counter() + options.seconds
    task = trio.lowlevel.current_task()

    def done(_: int) -> None:
        trio.lowlevel.reschedule(task)

    def abort(_: object) -> trio.lowlevel.Abort:
        return trio.lowlevel.Abort.FAILED

    while (started := time.perf_counter()) < stop:
        group.reserve(len(record))
        group.set_open_staged((1, done))
        group.add_record(record)
        group.kick()
        await trio.lowlevel.wait_task_rescheduled(abort)
        latencies.append(time.perf_counter() - started)
    return latencies


async def throughput(group: RaftGroup, machine: CountingMachine, options: argparse.Namespace) -> None:
    record = bytes(options.record_bytes)
    batch = options.batch
    in_flight = 0
    done_records = 0
    done_entries = 0
    reserve, add_record = group.reserve, group.add_record

    def done(count: int) -> None:
        nonlocal in_flight, done_records, done_entries
        in_flight -= count
        done_records += count
        done_entries += 1

    started = time.perf_counter()
    cpu = time.process_time()
    before = group.statistics().counters["turns"]
    stop = started + options.seconds
    while time.perf_counter() < stop:
        while in_flight < options.batches * batch:
            count = 0
            while count < batch:
                reserve(len(record))
                if group.open_staged() is None and count:
                    break
                group.set_open_staged((count + 1, done))
                add_record(record)
                count += 1
            in_flight += count
            group.seal()
        group.wake()
        await trio.lowlevel.checkpoint()
    while in_flight:
        await trio.lowlevel.checkpoint()
    elapsed = time.perf_counter() - started
    turns = group.statistics().counters["turns"] - before
    print(
        f"{options.batches} batches of {batch} x {options.record_bytes} B waiting:"
        f" {done_records / elapsed:,.0f} records/s,"
        f" {done_entries / elapsed:,.0f} entries/s, leader CPU {(time.process_time() - cpu) / done_records * 1e6:.2f}"
        f" us/record, {turns / elapsed:,.0f} turns/s"
    )


def free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--record-bytes", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--batches", type=int, default=8, help="batches in flight")
    parser.add_argument("--flush", default="async", choices=["async", "sync"])
    parser.add_argument("--folder", default=None)
    parser.add_argument("--node", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--ports", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node is not None:
        ports = [int(port) for port in options.ports.split(",")]
        trio.run(follow, config_of(options.node, ports, options.folder, options.flush))
        return
    folder = options.folder or tempfile.mkdtemp(prefix="raft_group_")
    ports = free_ports(3)
    command = [sys.executable, "-m", "benchmarks.raft_group", "--folder", folder, "--flush", options.flush]
    command += ["--ports", ",".join(map(str, ports))]
    children = [
        subprocess.Popen([*command, "--node", node], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for node in ("n1", "n2")
    ]
    try:
        trio.run(lead, config_of("n0", ports, folder, options.flush), options)
        for child in children:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            print("follower", child.stdout.readline().strip())
    finally:
        for child in children:
            child.kill()
            child.wait()
        shutil.rmtree(Path(folder), ignore_errors=True)
    usage = getrusage(RUSAGE_CHILDREN)
    print(f"followers' CPU {usage.ru_utime + usage.ru_stime:.2f} s")


if __name__ == "__main__":
    main()
