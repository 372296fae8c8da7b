"""Structured logs: short events with fields, JSON lines in files, readable lines on a terminal.

`get_logger` costs nothing at import. structlog is loaded by `configure_logging`, which only server processes call;
until then events of level warning and above go to the standard library's logging, as a library should (style.md 4.6).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

ROTATE_BYTES = 10 * 1024 * 1024
ROTATE_KEEP = 5


class RotatingFile:
    """Appends whole lines; past `max_bytes` the file becomes `path.1`, and so on up to `path.<keep>`.

    Safe to use from several threads of one process.
    """

    def __init__(self, path: str, *, max_bytes: int = ROTATE_BYTES, keep: int = ROTATE_KEEP) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._lock = threading.Lock()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # noqa: PTH103, PTH120
        self._descriptor = self._open()
        self._size = os.fstat(self._descriptor).st_size

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write_line(self, line: str) -> None:
        """One system call per line. A full disk loses the line rather than the node."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if self._size + len(data) > self._max_bytes and self._size:
                self._size = 0  # also where rotation fails: the old file takes as much again before the next try
                try:
                    self._rotate()
                except OSError:
                    pass
            try:
                self._size += os.write(self._descriptor, data)
            except OSError:
                return

    def _rotate(self) -> None:
        for number in range(self._keep - 1, 0, -1):
            older = f"{self._path}.{number}"
            if os.path.exists(older):  # noqa: PTH110
                os.replace(older, f"{self._path}.{number + 1}")  # noqa: PTH105
        os.replace(self._path, f"{self._path}.1")  # noqa: PTH105
        # The new one is open before the old one is closed: a closed number may become a data file's.
        old, self._descriptor = self._descriptor, self._open()
        os.close(old)

    def close(self) -> None:
        """Later lines are dropped."""
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1


def _write_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class _Sink:
    """Where events go; replaced as a whole by `configure_logging`."""

    def __init__(self) -> None:
        self.threshold = _LEVELS["warning"]
        self.emit: Callable[[str, str, str, dict[str, Any], bool], None] = _emit_to_stdlib


def _emit_to_stdlib(level: str, name: str, event: str, fields: dict[str, Any], traceback: bool) -> None:
    import logging

    text = " ".join([event, *(f"{key}={value!r}" for key, value in fields.items())])
    logging.getLogger(f"quorate.{name}").log(_LEVELS[level], "%s", text, exc_info=traceback)


class Logger:
    """A logger with bound fields: `log.bind(term=3).info("leader elected", leader="n1")`.

    Events are short past-tense phrases; everything that varies is a field.
    """

    __slots__ = ("_fields", "_name")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self._name = name
        self._fields = fields

    def bind(self, **fields: Any) -> Logger:
        """A logger that adds `fields` to each of its events."""
        return Logger(self._name, {**self._fields, **fields})

    def _log(self, level: str, event: str, fields: dict[str, Any], traceback: bool = False) -> None:
        if _LEVELS[level] >= _sink.threshold:
            _sink.emit(level, self._name, event, {**self._fields, **fields}, traceback)

    def debug(self, event: str, **fields: Any) -> None:
        """For developers."""
        self._log("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Something an operator may look for."""
        self._log("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something an operator should know of; the node copes."""
        self._log("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something an operator has to act on."""
        self._log("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """As `error`, with the traceback of the exception being handled."""
        self._log("error", event, fields, traceback=True)


def get_logger(name: str, **fields: Any) -> Logger:
    """A logger for one part of the system; `fields` go into each of its events."""
    return Logger(name, fields)


def _import_structlog() -> Any:
    """structlog without rich, which it would load for tracebacks: 3 instead of 8 MB and 0.07 instead of 0.28 s."""
    if "rich" in sys.modules or "structlog" in sys.modules:
        import structlog
    else:
        sys.modules["rich"] = None  # type: ignore[assignment]  # Python's way to say "not installed"
        try:
            import structlog
        finally:
            del sys.modules["rich"]
    return structlog


def configure_logging(
    path: str | None, *, json: bool, level: str = "info", max_bytes: int = ROTATE_BYTES, keep: int = ROTATE_KEEP
) -> None:
    """Send events of `level` and above to a rotating file, or to stderr where `path` is None.

    `json` chooses JSON lines over lines for humans. May be called again. Raises OSError where the file cannot be had.
    """
    structlog = _import_structlog()
    threshold = _LEVELS[level]
    write = _write_stderr if path is None else RotatingFile(path, max_bytes=max_bytes, keep=keep).write_line
    renderer: Any
    if json:
        renderer = structlog.processors.JSONRenderer(default=str)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=path is None and sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    processors: list[Any] = [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if json:
        processors.append(structlog.processors.format_exc_info)
    processors.append(renderer)

    def emit(level: str, name: str, event: str, fields: dict[str, Any], traceback: bool) -> None:
        values: Any = {**fields, "event": event, "level": level, "logger": name}
        if traceback:
            values["exc_info"] = True
        for processor in processors:
            values = processor(None, level, values)
        write(values)

    _sink.threshold = threshold
    _sink.emit = emit


_sink = _Sink()
