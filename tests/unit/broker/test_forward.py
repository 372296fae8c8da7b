"""Forwarding to the leader (design 4): one hop, FIFO holding, budgets, and what may be forwarded twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from broker import forward
from broker.forward import BUDGET_S, HELD_REQUESTS_MAX, HOLD_S
from remoting.codes import RequestCode, ResponseCode
from tests.unit.broker.processor_rig import ProcessorRig, RigConnection

KEYED = "UNIQ_KEY\x010A0000051F901B6D7A4F0B1B2C3D0001\x02"


def send_ext(properties: str = KEYED, queue: int = 0) -> dict[str, Any]:
    return {
        "a": "PG", "b": "T", "c": "TBW102", "d": 4, "e": queue, "f": 0, "g": 1, "h": 0, "i": properties, "j": 0,
        "k": "false", "m": "false",
    }  # fmt: skip


class Two:
    """A leader n0 and a follower n1, their peer streams carried by hand."""

    def __init__(self, folder: Path) -> None:
        self.leader = ProcessorRig(folder, node=0)
        self.follower = ProcessorRig(folder, node=1, leading=False)
        self.follower.group.leader_id = "n0"
        self.leader.create_topic("T")

    def carry(self) -> None:
        """Deliver what the nodes have sent each other."""
        for rig, name, other in ((self.follower, "n1", self.leader), (self.leader, "n0", self.follower)):
            sent, rig.group.sent = rig.group.sent, []
            for peer, payload in sent:
                assert peer == other.group.node_id
                other.state.app_message(name, payload)
                other.group.turn()


@pytest.fixture
async def two(tmp_path: Path) -> Two:
    return Two(tmp_path)


async def test_a_send_to_a_follower_is_stored_by_the_leader(two: Two) -> None:
    producer = RigConnection(("10.1.2.3", 4567))
    assert two.follower.tell(310, send_ext(), b"hello", conn=producer) == []
    two.carry()
    two.leader.group.commit()
    two.carry()
    (answer,) = producer.received()
    assert answer.code == 0 and answer.ext["queueOffset"] == "0"
    assert answer.ext["transactionId"] == "0A0000051F901B6D7A4F0B1B2C3D0001"
    stored = two.leader.state.read_message(int(answer.ext["msgId"][16:], 16))
    assert stored is not None and bytes(stored[48:56]) == bytes([10, 1, 2, 3]) + (4567).to_bytes(4)
    assert two.follower.forwarder.pending == 0


async def test_administration_and_offsets_go_to_the_leader(two: Two) -> None:
    ext = {
        "topic": "New", "defaultTopic": "TBW102", "readQueueNums": 2, "writeQueueNums": 2, "perm": 6,
        "topicFilterType": "SINGLE_TAG", "order": "false",
    }  # fmt: skip
    assert two.follower.tell(RequestCode.UPDATE_AND_CREATE_TOPIC, ext) == []
    two.carry()
    two.leader.group.commit()
    two.carry()
    assert [answer.code for answer in two.follower.conn.received()] == [0]
    assert two.leader.state.topics.get("New") is not None
    two.follower.tell(RequestCode.GET_MAX_OFFSET, {"topic": "T", "queueId": 0})
    two.carry()
    assert [answer.ext["offset"] for answer in two.follower.conn.received()] == ["0"]


async def test_what_any_node_can_answer_is_not_forwarded(two: Two) -> None:
    assert two.follower.tell(RequestCode.GET_MIN_OFFSET, {"topic": "T", "queueId": 0})[0].code == 0
    assert two.follower.tell(RequestCode.GET_BROKER_RUNTIME_INFO)[0].code == 0
    assert two.follower.group.sent == []


async def test_one_hop_only(two: Two) -> None:
    """Whom we take for the leader no longer leads: it says so, and the request waits here for the next leader."""
    two.leader.group.follow("n2")
    two.follower.tell(310, send_ext(), b"hello")
    two.carry()
    assert two.leader.group.sent == [] and two.follower.forwarder.held == 1
    assert two.follower.conn.received() == []


async def test_held_while_no_leader_is_known_then_first_in_first_out(two: Two) -> None:
    two.follower.group.leader_id = None
    for number in range(3):
        assert two.follower.tell(310, send_ext(f"UNIQ_KEY\x01{number:032d}\x02"), b"%d" % number) == []
    assert two.follower.forwarder.held == 3
    two.follower.group.follow("n0")
    two.carry()
    two.leader.group.commit()
    two.carry()
    answers = two.follower.conn.received()
    assert [answer.ext["queueOffset"] for answer in answers] == ["0", "1", "2"]
    assert [int(answer.ext["transactionId"]) for answer in answers] == [0, 1, 2]


async def test_held_requests_are_executed_here_when_this_node_leads(two: Two) -> None:
    two.follower.group.leader_id = None
    two.follower.tell(RequestCode.GET_MAX_OFFSET, {"topic": "T", "queueId": 0})
    two.follower.group.lead()
    assert [answer.ext for answer in two.follower.conn.received()] == [{"offset": "0"}]


async def test_without_a_leader_the_wait_ends_with_14(two: Two, autojump_clock: trio.testing.MockClock) -> None:
    two.follower.group.leader_id = None
    two.follower.broker.master_address = "127.0.0.1:10911"
    producer = RigConnection()
    two.follower.tell(310, send_ext(), b"x", conn=producer)
    reader = RigConnection()
    two.follower.tell(RequestCode.GET_MAX_OFFSET, {"topic": "T", "queueId": 0}, conn=reader)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.follower.forwarder.run)
        await trio.sleep(HOLD_S - 0.1)
        assert producer.received() == []
        await trio.sleep(0.2)
        nursery.cancel_scope.cancel()
    (answer,) = producer.received()
    assert answer.code == ResponseCode.SERVICE_NOT_AVAILABLE
    assert answer.remark == "not leader; leader=127.0.0.1:10911 term=1"
    assert answer.ext["TRACE_ON"] == "true"
    # An old maximum would be an answer too, but nobody knows how old.
    assert [answer.code for answer in reader.received()] == [ResponseCode.SERVICE_NOT_AVAILABLE]


async def test_no_more_than_a_thousand_are_held(two: Two) -> None:
    two.follower.group.leader_id = None
    for _ in range(HELD_REQUESTS_MAX):
        two.follower.tell(310, send_ext(), b"x")
    (answer,) = two.follower.tell(310, send_ext(), b"one too many")
    assert answer.code == ResponseCode.SERVICE_NOT_AVAILABLE
    assert two.follower.forwarder.held == HELD_REQUESTS_MAX


async def test_a_lost_answer_of_a_send_is_asked_for_again(two: Two) -> None:
    """The leader stored it and died before its answer came back; the window of the next one knows it."""
    two.follower.tell(310, send_ext(), b"hello")
    two.carry()
    two.leader.group.commit()
    two.leader.group.sent.clear()
    two.follower.group.term += 1
    two.follower.group.follow("n0")
    two.carry()
    two.leader.group.commit()
    two.carry()
    (answer,) = two.follower.conn.received()
    assert (answer.code, answer.ext["queueOffset"]) == (0, "0")
    assert two.leader.state.queues.max_offset("T", 0) == 1


async def test_a_full_disk_is_not_asked_again(two: Two) -> None:
    """Unlike a leader that is none any more, it has no better answer a moment later."""
    two.leader.group.disk_full = True
    two.follower.tell(310, send_ext(), b"hello")
    two.carry()
    two.carry()
    (answer,) = two.follower.conn.received()
    assert answer.code == ResponseCode.SERVICE_NOT_AVAILABLE and "disk" in (answer.remark or "")
    assert two.follower.forwarder.held == 0


@pytest.mark.parametrize(
    ("code", "ext"),
    [
        (310, send_ext("TAGS\x01a\x02")),
        (
            RequestCode.UPDATE_CONSUMER_OFFSET,
            {"consumerGroup": "TOOLS_CONSUMER", "topic": "T", "queueId": 0, "commitOffset": 1},
        ),
    ],
)
async def test_everything_else_is_not_forwarded_twice(two: Two, code: int, ext: dict[str, Any]) -> None:
    two.follower.tell(code, ext, b"body")
    two.carry()
    two.follower.group.term += 1
    two.follower.group.follow("n2")
    (answer,) = two.follower.conn.received()
    assert answer.code == ResponseCode.SYSTEM_ERROR
    assert "outcome unknown" in (answer.remark or "")
    assert two.follower.group.sent == []


async def test_an_answer_that_never_comes_is_unknown(two: Two, autojump_clock: trio.testing.MockClock) -> None:
    two.follower.tell(310, send_ext(), b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.follower.forwarder.run)
        await trio.sleep(BUDGET_S + 0.1)
        nursery.cancel_scope.cancel()
    (answer,) = two.follower.conn.received()
    assert answer.code == ResponseCode.SYSTEM_ERROR and "outcome unknown" in (answer.remark or "")
    assert two.follower.forwarder.pending == 0


async def test_what_was_certainly_not_stored_waits_for_the_next_leader(two: Two) -> None:
    two.follower.tell(310, send_ext(), b"x")
    two.carry()
    two.leader.group.cut()
    two.carry()
    assert two.follower.conn.received() == [] and two.follower.forwarder.held == 1
    two.follower.group.follow("n0")
    two.carry()
    two.leader.group.commit()
    two.carry()
    assert [answer.code for answer in two.follower.conn.received()] == [0]


async def test_a_leader_whose_no_op_is_on_its_way_lets_them_wait(two: Two) -> None:
    two.leader.group.is_ready_leader = False
    two.leader.group.leader_id = "n0"
    two.follower.tell(310, send_ext(), b"x")
    two.carry()
    assert two.leader.forwarder.held == 1 and two.follower.conn.received() == []
    own = RigConnection()
    assert two.leader.tell(310, send_ext("UNIQ_KEY\x01other\x02"), b"y", conn=own) == []
    two.leader.group.lead()
    two.leader.group.commit()
    two.carry()
    assert [answer.ext["queueOffset"] for answer in two.follower.conn.received()] == ["0"]
    assert [answer.ext["queueOffset"] for answer in own.received()] == ["1"]


async def test_one_way_requests_are_forwarded_without_waiting(two: Two) -> None:
    two.follower.tell(310, send_ext(), b"x", oneway=True)
    assert two.follower.forwarder.pending == 0
    two.carry()
    two.leader.group.commit()
    assert two.leader.state.queues.max_offset("T", 0) == 1
    two.carry()
    assert two.follower.conn.received() == []


async def test_a_closed_clients_held_requests_are_dropped(two: Two) -> None:
    two.follower.group.leader_id = None
    producer = RigConnection()
    two.follower.tell(310, send_ext(), b"x", conn=producer)
    producer.close("gone")
    two.follower.router.on_close(producer)
    assert two.follower.forwarder.held == 0


async def test_an_unreachable_leader_is_like_none(two: Two) -> None:
    two.follower.group.connected = False
    two.follower.tell(310, send_ext(), b"x")
    assert two.follower.forwarder.held == 1
    two.follower.group.connected = True
    two.follower.forwarder.pump()
    assert two.follower.forwarder.held == 0 and two.follower.forwarder.pending == 1


@pytest.mark.parametrize("payload", [b"", b"\x01", bytes(10), b"\x01\x01" + bytes(8), b"\x01\x02" + bytes(30)])
async def test_garbage_from_a_peer_is_ignored(two: Two, payload: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    two.leader.forwarder.receive("n1", payload)
    assert two.leader.forwarder.served_total == 0 and two.leader.group.sent == []


async def test_view_message_of_what_is_not_committed_here_asks_the_leader(two: Two) -> None:
    stored = two.leader.send("T", b"fresh")
    offset = int(stored.ext["msgId"][16:], 16)
    assert two.follower.tell(RequestCode.VIEW_MESSAGE_BY_ID, {"offset": offset}) == []
    two.carry()
    (answer,) = two.follower.conn.received()
    assert answer.code == 0 and b"fresh" in bytes(answer.body)


async def test_requests_a_leader_refused_keep_their_order(two: Two) -> None:
    """Pipelined by one client: the second must not overtake the first because both came back."""
    for number in range(3):
        two.follower.tell(310, send_ext(f"UNIQ_KEY\x01{number:032d}\x02"), b"%d" % number)
    two.carry()
    two.leader.group.cut()
    two.carry()
    assert two.follower.forwarder.held == 3
    two.follower.group.follow("n0")
    two.carry()
    two.leader.group.commit()
    two.carry()
    answers = two.follower.conn.received()
    assert [(int(answer.ext["transactionId"]), answer.ext["queueOffset"]) for answer in answers] == [
        (0, "0"),
        (1, "1"),
        (2, "2"),
    ]


async def test_requests_asked_again_stay_ahead_of_later_ones(two: Two) -> None:
    two.follower.tell(310, send_ext("UNIQ_KEY\x01first\x02"), b"1")
    two.leader.group.sent.clear()
    two.follower.group.sent.clear()
    two.follower.group.connected = False
    two.follower.tell(310, send_ext("UNIQ_KEY\x01second\x02"), b"2")
    two.follower.group.connected = True
    two.follower.group.term += 1
    two.follower.group.follow("n0")
    two.carry()
    two.leader.group.commit()
    two.carry()
    assert [answer.ext["transactionId"] for answer in two.follower.conn.received()] == ["first", "second"]


async def test_a_send_that_a_former_leader_may_have_stored_is_never_called_not_stored(
    two: Two, autojump_clock: trio.testing.MockClock
) -> None:
    two.follower.tell(310, send_ext(), b"x")
    two.carry()
    two.leader.group.commit()
    assert two.leader.state.queues.max_offset("T", 0) == 1
    two.leader.group.sent.clear()  # it died with the answer
    two.follower.group.connected = False
    two.follower.group.term += 1
    two.follower.group.follow("n2")
    assert two.follower.forwarder.held == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.follower.forwarder.run)
        await trio.sleep(HOLD_S + 0.1)
        nursery.cancel_scope.cancel()
    (answer,) = two.follower.conn.received()
    assert answer.code == ResponseCode.SYSTEM_ERROR and "outcome unknown" in (answer.remark or "")
    assert answer.ext["TRACE_ON"] == "true"


async def test_bytes_under_way_are_bounded(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PENDING_BYTES_MAX", 5_000)
    assert two.follower.tell(310, send_ext(), bytes(4_000)) == []
    (answer,) = two.follower.tell(310, send_ext(), bytes(4_000))
    assert answer.code == ResponseCode.SYSTEM_BUSY
    two.carry()
    two.leader.group.commit()
    two.carry()
    assert two.follower.tell(310, send_ext("UNIQ_KEY\x01next\x02"), bytes(4_000))[0].code == 0


async def test_view_message_waits_while_a_leader_is_elected(two: Two) -> None:
    """Acknowledged by a leader that died at once: whether it is committed only the next leader knows."""
    stored = two.leader.send("T", b"fresh")
    offset = int(stored.ext["msgId"][16:], 16)
    two.follower.group.leader_id = None
    assert two.follower.tell(RequestCode.VIEW_MESSAGE_BY_ID, {"offset": offset}) == []
    two.follower.group.follow("n0")
    two.carry()
    (answer,) = two.follower.conn.received()
    assert answer.code == 0 and b"fresh" in bytes(answer.body)
