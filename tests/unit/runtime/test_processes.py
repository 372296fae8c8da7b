"""Processes, event lines and the control socket of the supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from runtime.children import spawn
from runtime.local_socket import ask_local, serve_local, socket_path
from runtime.processes import (
    EVENT_LINE_BYTES_MAX,
    EventWriter,
    ProcessId,
    connected_process,
    cpu_seconds,
    describe_exit,
    listening_process,
    outgoing_ports,
    own_process_id,
    process_id,
    resident_bytes,
    unwritable_reason,
)
from runtime.real import real_env


def test_a_process_id_knows_its_own_process_only() -> None:
    own = own_process_id()
    assert own.is_running
    assert not ProcessId(own.pid, own.started_ticks + 1).is_running
    assert not ProcessId(own.pid, own.started_ticks + 1).send_signal(signal.SIGKILL)  # or this test would be gone
    assert (resident_bytes(own.pid) or 0) > 1 << 20


def test_the_cpu_time_of_a_process_grows_while_it_works() -> None:
    before = cpu_seconds(os.getpid())
    assert before == pytest.approx(sum(os.times()[:2]), abs=0.1)
    while cpu_seconds(os.getpid()) == before:
        pass
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    assert cpu_seconds(child.pid) == 0.0


def test_a_zombie_does_not_run() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    held = process_id(child.pid)
    assert held.is_running
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not held.is_running
    child.communicate()
    assert not held.is_running
    assert not held.send_signal(signal.SIGKILL)


def test_exits_in_words() -> None:
    assert [describe_exit(code) for code in (0, 3, -9, -250)] == [
        "exit code 0",
        "exit code 3",
        "killed by SIGKILL",
        "killed by signal 250",
    ]


def test_event_lines_are_dropped_rather_than_waited_for() -> None:
    reading, writing = os.pipe()
    events = EventWriter.on(writing)
    events.write({"event": "ready"})
    events.write({"event": "x" * EVENT_LINE_BYTES_MAX})
    assert os.read(reading, 100) == b'{"event":"ready"}\n'
    assert events.dropped == 1
    for _ in range(100):
        events.write({"event": "y" * 4000})
    assert events.dropped > 50
    os.close(reading)
    before = events.dropped
    events.write({"event": "nobody listens"})
    assert events.dropped == before + 1
    os.close(writing)


async def test_a_child_is_heard_and_awaited(tmp_path: Path) -> None:
    code = "import os, sys; os.write(int(sys.argv[2]), b'hello\\n'); print('words', flush=True); sys.exit(3)"
    child = spawn(
        [sys.executable, "-S", "-c", code],
        stderr_path=str(tmp_path / "err"),
        event_fd_option="--fd",
        bytecode=str(tmp_path / "bytecode"),
    )
    async with child.events:
        assert b"".join([chunk async for chunk in child.events]) == b"hello\n"
    assert await child.wait() == 3
    assert await child.wait() == 3
    assert (tmp_path / "err").read_text() == "words\n"


@pytest.mark.parametrize("forbidden", ["", "1"])
async def test_a_child_keeps_its_compiled_modules_where_it_may(
    forbidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", forbidden)
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    module = tmp_path / "tardy.py"
    module.write_text("")
    child = spawn(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import tardy"],
        stderr_path=str(tmp_path / "err"),
        event_fd_option="--fd",
        bytecode=str(tmp_path / "bytecode"),
    )
    async with child.events:
        assert await child.wait() == 0
    kept = tmp_path / "bytecode" if forbidden else tmp_path / "__pycache__"
    assert list(kept.rglob("tardy.*.pyc"))
    assert forbidden or not (tmp_path / "bytecode").exists()


async def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    inner = (
        "import sys, time; from runtime.processes import die_with_parent; "
        "die_with_parent(int(sys.argv[1])); print(1, flush=True); time.sleep(60)"
    )
    outer = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}, str(os.getpid())], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    assert parent.stdout is not None
    child = process_id(int(parent.stdout.readline()))
    assert child.is_running
    parent.kill()
    parent.wait()
    parent.stdout.close()
    with trio.fail_after(5):
        while child.is_running:  # noqa: ASYNC110 - another process's end
            await trio.sleep(0.01)


async def test_the_listener_of_a_port_is_found() -> None:
    listener = await real_env().net.listen("127.0.0.1", 0)
    port = listener.address[1]
    assert listening_process(port) == own_process_id()
    stream = await real_env().net.dial("127.0.0.1", port, timeout=2)
    begins_at = stream.local[1]
    assert (listening_process(begins_at), connected_process(begins_at)) == (None, own_process_id())
    outgoing = outgoing_ports()
    assert outgoing is None or outgoing[0] <= begins_at <= outgoing[1]
    stream.abort()
    await listener.aclose()
    assert listening_process(port) is None


def test_unwritable_folders(tmp_path: Path) -> None:
    assert unwritable_reason(str(tmp_path / "new" / "one")) is None
    assert list((tmp_path / "new" / "one").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert unwritable_reason(str(tmp_path / "file" / "x")) == "Not a directory"


def mode_of(path: str) -> int:
    """0 for what is not there."""
    return Path(path).stat().st_mode if Path(path).exists() else 0


async def test_control_socket_answers_and_survives_nonsense(tmp_path: Path) -> None:
    async def answer(request: dict[str, Any]) -> dict[str, Any]:
        return {"echo": request}

    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    for folder in (tmp_path, deep):
        path = socket_path(str(folder), "up.sock")
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_local, path, answer)
            assert mode_of(path) & 0o077 == 0
            for nonsense in (b"\xff\xfe\n", b"no end", b"{" * 70_000):
                stream = await trio.open_unix_socket(path)
                async with stream:
                    try:
                        await stream.send_all(nonsense)
                        await stream.send_eof()
                        assert await stream.receive_some() == b""
                    except trio.BrokenResourceError:
                        pass  # closed before all of it was sent
            assert await ask_local(path, {"do": "it"}, timeout_s=5) == {"echo": {"do": "it"}}
            stream = await trio.open_unix_socket(path)
            async with stream:
                await stream.send_all(b"[1]\n")
                assert json.loads(await stream.receive_some()) == {"error": "not a JSON object"}
            nursery.cancel_scope.cancel()
        assert mode_of(path) == 0
        with pytest.raises(OSError, match="No such file"):
            await ask_local(path, {}, timeout_s=5)
