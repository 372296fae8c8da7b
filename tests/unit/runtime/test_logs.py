import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from runtime import logs


@pytest.fixture(autouse=True)
def fresh_sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logs, "_sink", logs._Sink())
    yield


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_become_json_lines_with_their_fields(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "node.log"
    logs.configure_logging(str(path), json=True)
    log = logs.get_logger("dledger", node="n1").bind(term=3)
    log.info("leader elected", leader="n1", body=b"x")
    log.debug("not shown")
    (entry,) = lines(path)
    assert str(entry.pop("timestamp")).endswith("Z")
    assert entry == {
        "event": "leader elected",
        "level": "info",
        "logger": "dledger",
        "node": "n1",
        "term": 3,
        "leader": "n1",
        "body": "b'x'",
    }


def test_exceptions_carry_their_traceback(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    logs.configure_logging(str(path), json=True)
    try:
        int("seven")
    except ValueError:
        logs.get_logger("x").exception("parsing failed")
    (entry,) = lines(path)
    assert "ValueError: invalid literal" in str(entry["exception"])
    assert entry["level"] == "error"


def test_console_lines_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_logging(None, json=False, level="debug")
    logs.get_logger("x").debug("segment rolled", position=4096)
    text = capsys.readouterr().err
    assert "segment rolled" in text
    assert "position=4096" in text


def test_unconfigured_loggers_use_the_standard_library(caplog: pytest.LogCaptureFixture) -> None:
    log = logs.get_logger("client")
    with caplog.at_level(logging.DEBUG):
        log.info("quiet")
        log.warning("route missing", topic="t")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("quorate.client", "route missing topic='t'")
    ]


def test_files_rotate_by_size_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    file = logs.RotatingFile(str(path), max_bytes=100, keep=3)
    for number in range(50):
        file.write_line(f"{number:019d}")
    file.close()
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["node.log", "node.log.1", "node.log.2", "node.log.3"]
    assert all(entry.stat().st_size <= 100 for entry in tmp_path.iterdir())
    kept = [int(line) for name in reversed(names) for line in (tmp_path / name).read_text().splitlines()]
    assert kept == list(range(30, 50))


def test_a_failing_rotation_loses_no_line(tmp_path: Path) -> None:
    file = logs.RotatingFile(str(tmp_path / "node.log"), max_bytes=30, keep=3)
    with mock.patch("os.replace", side_effect=OSError("read-only")):
        for number in range(10):
            file.write_line(f"{number:09d}")
    assert len((tmp_path / "node.log").read_text().splitlines()) == 10
    for number in range(10, 14):
        file.write_line(f"{number:09d}")
    file.close()
    file.write_line("dropped")
    assert (tmp_path / "node.log.1").exists()
    assert "dropped" not in (tmp_path / "node.log").read_text()


def test_a_file_goes_on_after_a_restart(tmp_path: Path) -> None:
    for text in ("one", "two"):
        file = logs.RotatingFile(str(tmp_path / "node.log"))
        file.write_line(text)
        file.close()
    assert (tmp_path / "node.log").read_text() == "one\ntwo\n"


def test_getting_a_logger_does_not_load_structlog() -> None:
    program = "import sys, runtime.logs, runtime.real; runtime.logs.get_logger('x'); print('structlog' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
