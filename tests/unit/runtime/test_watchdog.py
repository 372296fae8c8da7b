import time
from typing import Any

import pytest
import trio

from runtime.logs import Logger, get_logger
from runtime.testing import wait_until
from runtime.watchdog import Watchdog


def hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    seen: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(Logger, "warning", lambda _self, event, **fields: seen.append((event, fields)))
    return seen


async def test_a_stall_is_reported_once_with_its_place(events: list[tuple[str, dict[str, Any]]]) -> None:
    watchdog = Watchdog(get_logger("test"), stall_ms=40)
    with watchdog.watch():
        await trio.lowlevel.checkpoint()
        hold_the_loop(0.3)
        await wait_until(lambda: watchdog.stalls, what="the report")
        await trio.sleep(0.1)  # time for a second report, which must not come
    assert [event for event, _ in events] == ["loop stalled"]
    fields = events[0][1]
    assert fields["held_ms"] >= 150
    assert "test_watchdog.py" in fields["where"]
    assert "hold_the_loop" in fields["where"]


async def test_an_idle_loop_is_no_stall(events: list[tuple[str, dict[str, Any]]]) -> None:
    watchdog = Watchdog(get_logger("test"), stall_ms=20)
    with watchdog.watch():
        await trio.sleep(0.2)
    assert not events
    assert watchdog.last is None
