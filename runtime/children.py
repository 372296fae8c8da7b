"""Child processes of the supervisor, started and awaited under trio."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import trio
from attrs import define

from runtime.processes import ProcessId, process_id


@define
class Child:
    """A started process and the event lines it writes."""

    popen: subprocess.Popen[bytes]
    id: ProcessId
    events: trio.lowlevel.FdStream
    _pidfd: int | None = None

    @property
    def pid(self) -> int:
        return self.popen.pid

    async def wait(self) -> int:
        """The exit code, negative for a signal. Checkpoint; cancel-safe; one waiter at a time."""
        if self._pidfd is not None:
            try:
                while self.popen.poll() is None:
                    await trio.lowlevel.wait_readable(self._pidfd)
            finally:
                if self.popen.returncode is not None:
                    os.close(self._pidfd)
                    self._pidfd = None
        else:
            while self.popen.poll() is None:  # noqa: ASYNC110 - nothing to wait on where there are no pidfds
                await trio.sleep(0.02)
        assert self.popen.returncode is not None
        return self.popen.returncode

    def send_signal(self, number: int) -> None:
        """Nothing happens when it has ended."""
        self.popen.send_signal(number)


def spawn(argv: Sequence[str], *, stderr_path: str, event_fd_option: str, bytecode: str) -> Child:
    """Start `argv + [event_fd_option, FD]` without stdin, in its own process group, its output appended to a file.

    The process group keeps a terminal's Ctrl-C away from it: the supervisor decides the order of stopping. The child
    writes its event lines to FD. Started on the calling thread: Linux ties "die with parent" to the thread that forked.

    `bytecode`: folder for the child's compiled modules where this process was told to leave none beside their sources
    (PYTHONDONTWRITEBYTECODE): compiling them is half of a node's start, and of its time out of service after a crash.
    """
    reading, writing = os.pipe()
    try:
        log = os.open(stderr_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            popen = subprocess.Popen(
                [*argv, event_fd_option, str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                process_group=0,
                env=_environment(bytecode),
            )
        finally:
            os.close(log)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    pidfd: int | None = None
    if sys.platform == "linux":
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError:
            pidfd = None  # a kernel before 5.3: `wait` polls
    return Child(popen, process_id(popen.pid), trio.lowlevel.FdStream(reading), pidfd)


def _environment(bytecode: str) -> dict[str, str]:
    environment = dict(os.environ)
    if environment.pop("PYTHONDONTWRITEBYTECODE", ""):
        environment.setdefault("PYTHONPYCACHEPREFIX", bytecode)
    return environment
