"""The client's rules without I/O: assignment, the state of a queue, routes, light import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import quorate
from quorate.process_queue import ProcessQueue
from quorate.rebalance import STRATEGIES
from quorate.route_cache import route_of
from remoting.bodies import BrokerData, QueueData, TopicRouteData
from remoting.message import MessageExt, MessageQueue

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "rebalance.json").read_text(encoding="utf-8"))


def vector_id(vector: dict[str, Any]) -> str:
    return f"{vector['strategy']}-{vector['queues']}-{vector['consumers']}"


@pytest.mark.parametrize("vector", VECTORS, ids=vector_id)
def test_allocation_is_that_of_the_java_client(vector: dict[str, Any]) -> None:
    allocation: dict[str, list[str]] = vector["allocation"]
    members = list(allocation)
    names = [name for own in allocation.values() for name in own if vector["queues"]]
    # The vectors were made with topic "T"; only the hash ring looks at it.
    queues = [MessageQueue("T", name.split(":")[0], int(name.split(":")[1])) for name in names]
    assert len(queues) == vector["queues"]
    for member, expected in allocation.items():
        own = STRATEGIES[vector["strategy"]](member, list(reversed(queues)), list(reversed(members)))
        if vector["queues"]:
            assert [f"{queue.broker_name}:{queue.queue_id}" for queue in own] == expected
        else:
            assert own == [], "Java raises there; nothing to take is no error here"


@given(
    st.sampled_from(sorted(STRATEGIES)),
    st.integers(0, 30),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6, unique=True),
)
def test_every_queue_has_exactly_one_owner(strategy: str, count: int, members: list[str]) -> None:
    queues = [MessageQueue("t", "b", number) for number in range(count)]
    owned = [queue for member in members for queue in STRATEGIES[strategy](member, queues, members)]
    assert sorted(owned) == queues
    assert STRATEGIES[strategy]("stranger", queues, members) == []


def message(offset: int, size: int = 1) -> MessageExt:
    return MessageExt(topic="t", body=b"x" * size, queue_offset=offset)


@given(st.integers(1, 30), st.randoms())
def test_the_offset_to_commit_never_passes_an_unacknowledged_message(count: int, random: Any) -> None:
    state = ProcessQueue(MessageQueue("t", "b", 0), 100)
    state.add([message(100 + number) for number in range(count)], 100 + count + 5)
    taken = [state.take() for _ in range(count)]
    random.shuffle(taken)
    open_offsets = {one.queue_offset for one in taken}
    for one in taken:
        assert state.committed == min(open_offsets)
        state.acknowledge(one.queue_offset)
        open_offsets.discard(one.queue_offset)
    assert state.committed == 100 + count + 5, "what a filter left out behind the last message is done with, too"
    assert (state.cached, state.in_flight, state.bytes_cached) == (0, 0, 0)
    assert state.dirty
    state.persisted = state.committed
    assert not state.dirty


def test_a_message_put_back_is_the_next_one() -> None:
    state = ProcessQueue(MessageQueue("t", "b", 0), 0)
    state.add([message(0), message(1)], 2)
    first = state.take()
    state.put_back(first)
    assert state.take() is first
    assert state.committed == 0


def test_overlapping_answers_add_nothing_twice() -> None:
    state = ProcessQueue(MessageQueue("t", "b", 0), 0)
    state.add([message(0), message(1)], 2)
    state.add([message(1), message(2)], 3)
    assert [one.queue_offset for one in state.waiting] == [0, 1, 2]


def test_a_jump_forgets_the_cache_and_late_acknowledgements() -> None:
    state = ProcessQueue(MessageQueue("t", "b", 0), 0)
    state.add([message(0), message(1)], 2)
    old = state.take()
    state.jump(10)
    state.acknowledge(old.queue_offset)
    assert (state.committed, state.next_pull, state.cached, state.in_flight) == (10, 10, 0, 0)


def test_a_full_cache_has_no_room() -> None:
    state = ProcessQueue(MessageQueue("t", "b", 0), 0)
    state.add([message(0, 64 * 1024 * 1024)], 1)
    assert not state.has_room
    state.acknowledge(state.take().queue_offset)
    assert state.has_room


def test_routes_respect_permissions_and_templates() -> None:
    brokers = [BrokerData(broker_name=name, broker_addrs={0: f"{name}:1", 2: f"{name}:2"}) for name in ("a", "b", "c")]
    data = TopicRouteData(
        broker_datas=brokers,
        queue_datas=[
            QueueData(broker_name="a", read_queue_nums=2, write_queue_nums=1, perm=6),
            QueueData(broker_name="b", read_queue_nums=1, write_queue_nums=1, perm=4),
            QueueData(broker_name="c", read_queue_nums=8, write_queue_nums=8, perm=7),
            QueueData(broker_name="gone", read_queue_nums=8, write_queue_nums=8, perm=7),
        ],
    )
    route = route_of("t", data, 0.0)
    assert [str(queue) for queue in route.writable][:2] == ["t/a/0", "t/c/0"]
    assert [queue.broker_name for queue in route.readable].count("b") == 1
    assert route.leader("a") == "a:1"
    assert route.leader("gone") is None
    assert route.addresses("b") == ["b:1", "b:2"]
    template = route_of("t", data, 0.0, provisional=True)
    assert {queue.broker_name for queue in template.writable} == {"c"}
    assert len(template.writable) == 4


def test_importing_the_package_loads_neither_trio_nor_msgspec() -> None:
    code = "import quorate, sys; print(sorted({'trio', 'msgspec', 'attrs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in quorate.__all__:
        assert getattr(quorate, name) is not None
    assert set(dir(quorate)) == set(quorate.__all__)
    with pytest.raises(AttributeError):
        _ = quorate.nonsense
