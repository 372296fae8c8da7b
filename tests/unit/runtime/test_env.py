import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from runtime.real import RealIds, real_env
from runtime.testing import test_env, wait_until


async def test_the_clock_follows_trio(autojump_clock: trio.testing.MockClock) -> None:
    clock = test_env().clock
    start = clock.monotonic()
    await clock.sleep(5)
    assert clock.monotonic() == pytest.approx(start + 5)
    await clock.sleep_until(start + 8)
    assert clock.monotonic() == pytest.approx(start + 8)
    with clock.move_on_at(start + 9) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    with clock.move_on_after(2):
        await trio.sleep_forever()
    assert clock.monotonic() == pytest.approx(start + 11)
    with pytest.raises(trio.TooSlowError), clock.fail_after(1):
        await trio.sleep_forever()


def test_wall_time_is_in_milliseconds() -> None:
    assert 1_600_000_000_000 < test_env().clock.wall_ms() < 10_000_000_000_000


def test_streams_of_chance_are_named() -> None:
    draw = [test_env(seed=7).rng(name).random() for name in ("a", "a", "b")]
    assert draw[0] == draw[1] != draw[2]
    assert test_env(seed=8).rng("a").random() != draw[0]
    assert real_env().rng("a").random() != real_env().rng("a").random()


def test_ids() -> None:
    ids = real_env().ids
    assert len(ids.salt(16)) == 16
    assert ids.salt(16) != ids.salt(16)
    assert ids.boot_id and ids.boot_id == real_env().ids.boot_id
    assert ids.host and ids.pid > 0


@pytest.mark.parametrize("content", [None, b"", b"\n", b"unknown", b"\xff"])
def test_without_a_boot_id_every_process_is_another_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """What is the same after every restart of the machine would hide its power losses."""
    path = tmp_path / "boot_id"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("runtime.real.BOOT_ID_FILE", str(path))
    first, second = RealIds().boot_id, RealIds().boot_id
    assert first and second and first != second


def test_the_boot_id_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "boot_id"
    path.write_text("0b1c29a5-5a35-4b4e-9a3a-7f1f4d1a9c11\n")
    monkeypatch.setattr("runtime.real.BOOT_ID_FILE", str(path))
    assert RealIds().boot_id == RealIds().boot_id == "0b1c29a5-5a35-4b4e-9a3a-7f1f4d1a9c11"


async def test_slow_work_runs_in_a_thread() -> None:
    assert await test_env().run_in_thread(threading.get_ident) != threading.get_ident()


async def test_wait_until_names_what_it_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    await wait_until(lambda: True)
    with pytest.raises(TimeoutError, match=r"a leader did not come true within 2 s"):
        await wait_until(lambda: False, limit=2, what="a leader")
