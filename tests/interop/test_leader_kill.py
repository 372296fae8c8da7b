"""What a stock producer with its default settings sees when a leader is killed."""

from __future__ import annotations

import json
import signal
import time
from contextlib import contextmanager

import pytest

from benchmarks import processes, wire

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

ROUTE_POLL_S = 30
"""How often the stock client asks for routes, unless told otherwise."""


@pytest.fixture
def steady(start_java, new_topics, suffix):
    """Starts the producer and waits for its first acknowledgement."""

    @contextmanager
    def start(target, name, seconds):
        topic = f"Steady_{name}_{suffix}"
        new_topics(target, [topic])
        with start_java("Steady", target.namesrv, topic, str(seconds)) as process:
            assert any(line.startswith("ready") for line in process.stdout), "no first acknowledgement"
            yield process

    return start


def kill_a_leader(target):
    address = sorted(wire.query_route(target.namesrv, wire.TEMPLATE_TOPIC).leaders.values())[0]
    pid = next(pid for pid, listen in target.brokers().items() if listen == address)
    processes.signal_all([pid], signal.SIGKILL)


def outcome(process):
    """Longest pause in seconds, and what the producer said."""
    said = json.loads(next(line for line in process.stdout if line.startswith('{"scenario"')))
    print(said)
    return said["ms"] / 1000, said["detail"]


def test_with_two_groups_it_sees_no_error(two_groups, steady):
    with steady(two_groups, "two", 12) as process:
        time.sleep(2)
        kill_a_leader(two_groups)
        pause, detail = outcome(process)
    assert "failed 0" in detail
    assert pause < 4


def test_with_one_group_it_goes_on_at_its_next_route_poll(target, steady):
    if not target.pids_known:
        pytest.skip("an outside cluster's processes are not ours to kill")
    with steady(target, "one", ROUTE_POLL_S + 10) as process:
        time.sleep(2)
        kill_a_leader(target)
        pause, _ = outcome(process)
    assert pause < ROUTE_POLL_S + 5
