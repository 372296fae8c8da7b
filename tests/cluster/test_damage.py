"""Damage to the log of one stopped broker: noticed, never served, mended from its peers, all bytes the same again."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import quorate
from quorate import QuorateError
from remoting.codes import RequestCode
from remoting.message import parse_offset_msg_id
from remoting.message_codec import decode_stored
from runtime.model import Env
from runtime.real import real_env
from tests.cluster.harness import BROKERS, STATUS_EVERY_S, Cluster, cluster, config_with, wait_for
from tests.cluster.harness import quorate as run_quorate
from tests.cluster.workload import same_logs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

TOPIC = "ledger"
SEGMENT_BYTES = 5 << 20
SMALL_SEGMENTS = config_with(segment_bytes=SEGMENT_BYTES)
BODY_BYTES = 60_000
PER_SEGMENT = SEGMENT_BYTES // BODY_BYTES
MENDED_WITHIN_S = 90.0

Stored = dict[int, bytes]
"""Physical offset -> body."""


async def fill(client: quorate.Client, stored: Stored, count: int) -> None:
    """So many messages, several at a time; where they are and what they say is noted."""

    async def send(numbers: range) -> None:
        for number in numbers:
            body = f"message {number} ".encode().ljust(BODY_BYTES, b"%d" % (number % 10))
            receipt = await client.send(TOPIC, body, timeout=30)
            stored[parse_offset_msg_id(receipt.offset_message_id)[2]] = body

    start = len(stored)
    async with trio.open_nursery() as nursery:
        for first in range(4):
            nursery.start_soon(send, range(start + first, start + count, 4))


@asynccontextmanager
async def half_a_segment(tmp_path: Path) -> AsyncIterator[tuple[Cluster, quorate.Client, Stored]]:
    """A cluster that restarts nobody, and as many messages."""
    stored: Stored = {}
    with cluster(tmp_path / "data", "--no-restart", config=SMALL_SEGMENTS) as running:
        async with quorate.connect(running.namesrv) as client:
            await client.admin.create_topic(TOPIC, queues=4)
            await fill(client, stored, PER_SEGMENT // 2)
            yield running, client, stored


async def view(
    client: quorate.Client, running: Cluster, name: str, offset: int, within_s: float = 30.0
) -> bytes | None:
    """The body that this one broker shows at an offset of the log; None where it shows none."""
    host, port = running.address(name)
    try:
        answer = await client.admin.call(
            f"{host}:{port}", RequestCode.VIEW_MESSAGE_BY_ID, {"offset": offset, "topic": TOPIC}, timeout=within_s
        )
    except QuorateError:
        return None
    return bytes(decode_stored(answer.body).body)


async def mended(env: Env, client: quorate.Client, running: Cluster, name: str, stored: Stored, watched: int) -> None:
    """Ask the damaged broker for what was damaged, from its first moment on: it shows the truth or nothing."""
    shown = 0
    refused = 0
    with trio.move_on_after(MENDED_WITHIN_S):
        while shown < 20:
            body = await view(client, running, name, watched, 1.0)
            if body is None:
                refused += 1
            else:
                assert body == stored[watched], f"{name} shows {body[:40]!r} at {watched}"
                shown += 1
            await trio.sleep(0.05)
    assert shown, f"{name} shows nothing at {watched} after {MENDED_WITHIN_S:g} s"
    print(f"{name}: {refused} times nothing at {watched}, then the truth")
    await same_logs(env, running, within_s=MENDED_WITHIN_S)
    for offset in sorted(stored)[:: max(1, len(stored) // 20)]:
        assert await view(client, running, name, offset) == stored[offset]


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def damages_told(running: Cluster, name: str) -> int:
    return (running.data / "logs" / f"{name}.log").read_text().count("damage in the log")


async def test_flipped_truncated_and_older_segments(tmp_path: Path) -> None:
    env = real_env()
    async with half_a_segment(tmp_path) as (running, client, stored):
        older = tmp_path / "older"
        victim = BROKERS[2]
        await env.run_in_thread(running.stop, victim)
        shutil.copyfile(running.segments(victim)[0], older)
        await env.run_in_thread(running.restart, victim)
        await fill(client, stored, 3 * PER_SEGMENT)
        await same_logs(env, running)

        async def leader_aside() -> None:
            """The damaged one is a follower; a leader that finds damage hands over, and is mended as a follower."""
            leader = await env.run_in_thread(running.leader)
            if leader == victim:
                await env.run_in_thread(running.restart, victim)

        def inside(path: Path, share: float) -> int:
            """A message that lies at that share of a segment."""
            wanted = int(path.name) + int(SEGMENT_BYTES * share)
            return min((offset for offset in stored if offset >= wanted), default=max(stored))

        for kind in ("flipped bit", "truncated", "older copy"):
            await leader_aside()
            await env.run_in_thread(running.stop, victim)
            path = running.segments(victim)[0 if kind == "older copy" else 1]
            if kind == "flipped bit":
                watched = inside(path, 0.4)
                flip_bit(path, watched - int(path.name) + 1000)
            elif kind == "truncated":
                watched = inside(path, 0.6)
                with path.open("r+b") as file:
                    file.truncate(SEGMENT_BYTES // 2)
            else:
                watched = inside(path, 0.8)
                shutil.copyfile(older, path)
            told = damages_told(running, victim)
            print(f"{kind}: {victim}, segment {path.name}, watching {watched}")
            await env.run_in_thread(running.restart, victim)
            await mended(env, client, running, victim, stored, watched)
            assert damages_told(running, victim) > told
            assert path.stat().st_size == SEGMENT_BYTES
            await fill(client, stored, 10)


async def test_what_no_broker_has_any_more_is_given_up_by_the_operators_word(tmp_path: Path) -> None:
    """All three lose the same message. They wait for each other, alive and answering, until they are told to go on."""
    env = real_env()
    async with half_a_segment(tmp_path) as (running, client, stored):
        await same_logs(env, running)

        def are_synced() -> bool:
            """Else what is damaged passes for what a power loss took: nothing proves that it was ever whole."""
            return all(
                one["durable_index"] == one["last_index"] > 0
                for one in running.status().values()
                if one["kind"] == "broker"
            )

        await env.run_in_thread(wait_for, are_synced, 30, "all to be on stable storage", STATUS_EVERY_S)
        lost = sorted(stored)[len(stored) // 2]
        running.kill_all_brokers_at_once()
        await env.run_in_thread(running.wait_down, *BROKERS)
        for name in BROKERS:
            flip_bit(running.segments(name)[0], lost + 1000)
        for name in BROKERS:
            await env.run_in_thread(running.restart, name)
        pids = {name: running.pid(name) for name in BROKERS}

        def states() -> list[str]:
            status = running.status()
            return [str(status[name]["log_state"]) for name in BROKERS]

        await env.run_in_thread(
            wait_for, lambda: states() == ["repairing"] * 3, MENDED_WITHIN_S, "all to repair", STATUS_EVERY_S
        )
        doctor = run_quorate("doctor", "--data", str(running.data), check=False)
        assert doctor.returncode == 5 and "damaged here too" in doctor.stdout, doctor.stdout
        assert "quorate raft recover broker-a/n0" in doctor.stdout, doctor.stdout
        asked = run_quorate("raft", "recover", "n0", "--data", str(running.data), check=False)
        assert asked.returncode == 2 and "Damaged are entries" in asked.stderr, asked.stderr
        assert states() == ["repairing"] * 3 and {name: running.pid(name) for name in BROKERS} == pids
        for name in BROKERS:
            told = running.verb("raft", "recover", name, "--accept-loss")
            assert told["accepted"] and told["damaged"], told
        await env.run_in_thread(running.leader, MENDED_WITHIN_S)
        kept = {offset: body for offset, body in stored.items() if offset < lost - BODY_BYTES * 10}
        assert kept
        await fill(client, dict(kept), 10)
        await same_logs(env, running)
        for name in BROKERS:
            for offset in sorted(kept)[:: len(kept) // 5]:
                assert await view(client, running, name, offset) == kept[offset]
        assert {name: running.pid(name) for name in BROKERS} == pids
        assert [running.processes()[name]["restarts"] for name in BROKERS] == [1, 1, 1]
