"""Processes of this machine: find and signal them, for the supervisor and the `quorate` verbs.

Not part of `Env`: a node never starts processes, and the simulator has none. It lives in `runtime` because nobody else
may touch `os` or `subprocess` (design §6).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from attrs import define, field, frozen

EVENT_LINE_BYTES_MAX = 4096
"""One event is one `write` to a pipe; POSIX keeps writes up to PIPE_BUF (4,096 on Linux) in one piece."""

_PR_SET_PDEATHSIG = 1
_LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""


@frozen
class ProcessId:
    """A pid together with the start time of its process, so that a reused pid is told apart."""

    pid: int
    started_ticks: int

    @property
    def is_running(self) -> bool:
        return self.started_ticks == started_ticks(self.pid) and not _is_zombie(self.pid)

    def send_signal(self, number: int) -> bool:
        """False when that process is gone (also when another one has its pid now). Raises PermissionError."""
        if not self.is_running:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def _stat_fields(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the command name in parentheses may hold spaces


def started_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot, or 0 where it is gone or this system has no /proc."""
    fields = _stat_fields(pid)
    if fields:
        return int(fields[19])
    if Path("/proc/self").exists():
        return -1
    try:  # macOS: existence is all we can tell
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        return 0
    return 0


def _is_zombie(pid: int) -> bool:
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] == "Z"


def process_id(pid: int) -> ProcessId:
    return ProcessId(pid, started_ticks(pid))


def own_process_id() -> ProcessId:
    return process_id(os.getpid())


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process, None where it cannot be told."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far, 0 where it is gone or that cannot be told."""
    fields = _stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent dies; ends it at once where the parent is gone already.

    Elsewhere than on Linux this does nothing; `is_orphan` asked now and then does the same job there.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if is_orphan(parent_pid):  # it died before the line above took effect
        os._exit(1)


def is_orphan(parent_pid: int) -> bool:
    return os.getppid() != parent_pid


def exit_now(code: int) -> NoReturn:
    """Leave without unwinding: for a second SIGTERM."""
    os._exit(code)


def parent_pid() -> int:
    return os.getppid()


def describe_exit(code: int) -> str:
    """'exit code 3' or 'killed by SIGKILL' for a subprocess return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


@define
class EventWriter:
    """The child's end of the event pipe. A full or broken pipe drops the line: no node depends on its watcher."""

    _fd: int
    dropped: int = 0

    @classmethod
    def on(cls, fd: int) -> EventWriter:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        return cls(fd)

    def write(self, event: dict[str, Any]) -> None:
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        if len(line) > EVENT_LINE_BYTES_MAX:
            self.dropped += 1
            return
        try:
            os.write(self._fd, line)
        except (BlockingIOError, BrokenPipeError):
            self.dropped += 1


@define
class Daemon:
    """Where `detach` returned: in the process that stays in the terminal, or in the one that went to the background."""

    is_background: bool
    _fd: int
    _pid: int = 0
    _done: bool = field(default=False)

    def report(self, document: dict[str, Any]) -> None:
        """Background side: hand one JSON document to the waiting foreground process, once."""
        if self._done:
            return
        self._done = True
        try:
            with os.fdopen(self._fd, "wb") as pipe:
                pipe.write(json.dumps(document).encode())
        except BrokenPipeError:
            pass  # the one who asked has gone; the work goes on

    def wait(self) -> dict[str, Any] | None:
        """Foreground side: the document, or None when the background process ended without one.

        Ctrl-C stops the background process and raises KeyboardInterrupt.
        """
        try:
            with os.fdopen(self._fd, "rb") as pipe:
                data = pipe.read()
        except KeyboardInterrupt:
            os.kill(self._pid, signal.SIGTERM)
            raise
        return json.loads(data) if data else None


def detach(log_path: str) -> Daemon:
    """Split into a waiting foreground process and a background one in its own session, which writes to `log_path`.

    Call it before any thread or trio loop exists.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Daemon(is_background=False, fd=reading, pid=pid)
    os.close(reading)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    return Daemon(is_background=True, fd=writing)


def absolute_path(path: str, base: str = ".") -> str:
    return os.path.abspath(Path(base, Path(path).expanduser()))  # noqa: PTH100 - keeps symbolic links as they are


def temporary_folder(prefix: str) -> str:
    """A new empty folder that only this user may read."""
    return tempfile.mkdtemp(prefix=prefix)


def open_files_max() -> int:
    """How many files and connections this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def unwritable_reason(path: str) -> str | None:
    """Make the folder where needed and try to write in it; the reason in words where that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except OSError as error:
        return error.strerror or str(error)
    return None


def listening_process(port: int) -> ProcessId | None:
    """Who listens on a TCP port of this machine, where /proc tells."""
    return _socket_holder(port, lambda state: state == _LISTENING)


def connected_process(port: int) -> ProcessId | None:
    """Who has a connection of its own that begins at this TCP port, where /proc tells."""
    return _socket_holder(port, lambda state: state != _LISTENING)


def outgoing_ports() -> tuple[int, int] | None:
    """First and last of the TCP ports that this machine gives to outgoing connections, where /proc tells."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(first), int(last)


def terminal_columns() -> int | None:
    """Width of the terminal that stdout is; None where it is none."""
    if not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def _socket_holder(port: int, is_meant: Callable[[str], bool]) -> ProcessId | None:
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as file:
                rows = file.readlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            if is_meant(columns[3]) and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    if not inodes:
        return None
    for folder in sorted(Path("/proc").glob("[0-9]*")):
        try:
            if any(str(descriptor.readlink()) in inodes for descriptor in (folder / "fd").iterdir()):
                return process_id(int(folder.name))
        except OSError:
            continue  # another user's process, or one that just ended
    return None
