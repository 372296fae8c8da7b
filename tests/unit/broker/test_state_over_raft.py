"""The tables over a real raft group of one node: what was answered is there after a kill and after a clean stop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from broker.delay import DelayService
from broker.processors.send import SendProcessor
from broker.state import BrokerState
from broker.testing import MemoryConnection
from dledger.config import GroupConfig
from dledger.group import RaftGroup
from remoting.frames import FrameReader, decode_frame
from runtime.logs import get_logger
from runtime.testing import test_env, wait_until
from tests.unit.broker.state_kit import frame_of, make_config, send_fields


class Broker:
    """State, group and send processor of one node."""

    def __init__(self, folder: Path, *, segment_bytes: int = 4 * 1024 * 1024, **changes: Any) -> None:
        group = GroupConfig(
            cluster="DefaultCluster",
            group="broker-a",
            node_id="n0",
            peers={"n0": ("127.0.0.1", 0)},
            data_dir=f"{folder}/raft",
            format_if_empty=True,
            segment_bytes=segment_bytes,
        )
        env = test_env(folder)
        config = make_config(str(folder), group=group, **changes)
        self.state = BrokerState(env, config, get_logger("test"))
        self.group = RaftGroup(env, group, self.state, get_logger("test"))
        self.state.attach(self.group)
        self.send = SendProcessor(self.state)
        self.conn = MemoryConnection()

    async def put_all(self, bodies: list[bytes], properties: str = "", queue_id: int = 0) -> list[dict[str, str]]:
        """Send, wait for every answer, return their fields in order."""
        for number, body in enumerate(bodies):
            fields = send_fields("T", f"UNIQ_KEY\x01{body.decode()}\x02{properties}", queue_id=queue_id)
            self.send.handle_send(frame_of(310, number, fields, body), self.conn)
        data = bytearray()

        def answered() -> bool:
            data.extend(self.conn.take())
            return len(FrameReader().cut(bytes(data))) == len(bodies)

        await wait_until(answered, what="all answers")
        answers = {command.opaque: command for command in map(decode_frame, FrameReader().cut(bytes(data)))}
        assert {answer.code for answer in answers.values()} == {0}
        return [answers[number].ext for number in range(len(bodies))]


@asynccontextmanager
async def running(folder: Path, *, clean: bool = False, **changes: Any) -> AsyncIterator[Broker]:
    broker = Broker(folder, **changes)
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.group.run)
        await nursery.start(broker.state.run)
        await nursery.start(DelayService(broker.state).run)
        await wait_until(lambda: broker.state.is_ready_leader, what="leadership")
        yield broker
        if clean:
            await broker.state.checkpoint()
            await broker.group.stop_gracefully()
            await broker.state.close()
        nursery.cancel_scope.cancel()


async def test_everything_answered_survives_kills_and_clean_stops(tmp_path: Path) -> None:
    expected: list[str] = []
    for life in range(5):
        changes = {"checkpoint_log_bytes": 1, "checkpoint_interval_ms": 1, "queue_flush_interval_ms": 20}
        async with running(tmp_path, clean=life % 2 == 1, **changes) as broker:
            assert broker.state.store_files.abnormal_exit == (life in (1, 3))
            state = broker.state
            assert state.queues.max_offset("T", 0) == len(expected)
            for offset, message_id in enumerate(expected):
                unit = state.queues.units("T", 0, offset, 1)
                assert f"{int.from_bytes(unit[:8]):016X}" == message_id[16:]
            answers = await broker.put_all([b"%d-%d" % (life, number) for number in range(300)], "KEYS\x01k\x02")
            assert [int(answer["queueOffset"]) for answer in answers] == list(range(life * 300, life * 300 + 300))
            expected += [answer["msgId"] for answer in answers]
            done: list[bool] = []
            state.update_offset("g", "T", 0, life, lambda ok, reason, done=done: done.append(ok))
            await wait_until(lambda done=done: done, what="the offset")
            assert state.offsets.query("g", "T", 0) == life
            newest = [int(message_id[16:], 16) for message_id in reversed(expected[-64:])]
            assert state.index.lookup("T", "k", 64, 0, 1 << 50) == newest


async def test_a_client_that_retries_after_a_restart_gets_the_first_result(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        first = await broker.put_all([b"a", b"b"])
        await broker.state.checkpoint()
        assert broker.state.checkpoints.saved_index == broker.state.applied_index > 0
        first += await broker.put_all([b"c"])
    async with running(tmp_path) as broker:
        again = await broker.put_all([b"a", b"b", b"c"])
        assert again == first
        assert broker.state.queues.max_offset("T", 0) == 3


async def test_a_delayed_message_comes_about_a_second_later(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        await broker.put_all([b"now"])
        await broker.put_all([b"later"], "DELAY\x011\x02")
        await wait_until(lambda: broker.state.queues.max_offset("T", 0) == 2, what="the delivery")
        stored, delivered = (
            broker.state.queues.store_time_at(topic, 0, offset)
            for topic, offset in (("SCHEDULE_TOPIC_XXXX", 0), ("T", 1))
        )
        print("delivered after", delivered - stored, "ms")
        assert 1_000 <= delivered - stored <= 1_500


async def test_a_trimmed_log_is_trimmed_in_its_queues_and_after_a_restart(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"segment_bytes": 65_536, "queue_flush_interval_ms": 20, "queue_file_units": 50}
    async with running(tmp_path, **changes) as broker:
        for life in range(5):
            await broker.put_all([b"%d-%d-%s" % (life, number, b"x" * 500) for number in range(60)])
        state, group = broker.state, broker.group
        position = group.trim_to(state.group.committed_position)
        assert position > 65_536
        await wait_until(lambda: state.queues.min_offset("T", 0) > 0, what="the trim")
        low = state.queues.min_offset("T", 0)
        await state.checkpoint()
        await wait_until(lambda: group.first_position == position, what="the removal of the segments")
        assert len(list((tmp_path / "consumequeue" / "T" / "0").iterdir())) < 300 // 50
    async with running(tmp_path, **changes) as broker:
        queues = broker.state.queues
        assert broker.group.first_position == position
        assert (queues.min_offset("T", 0), queues.max_offset("T", 0)) == (low, 300)
        first = int.from_bytes(queues.units("T", 0, low, 1)[:8])
        assert first >= position
        assert broker.state.read_message(first) is not None or broker.state.is_cold(first)
        assert (await broker.put_all([b"next"]))[0]["queueOffset"] == "300"
