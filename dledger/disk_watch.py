"""Whether the disk can be trusted with leadership: how long its operations take, and how full it is (raft.md 4.12).

Heartbeats come from the loop and writes from threads, so a leader with a dead disk would keep the throne; this is what
takes it from it, well within two seconds, and gives it back without a restart when the disk works again.
"""

from __future__ import annotations

from attrs import frozen

from dledger.config import GroupConfig
from runtime.logs import Logger
from runtime.model import Env

LOOK_SECONDS = 0.2
"""How often stalls are looked for; part of the two seconds."""
STALL_SECONDS = 1.75
STALL_SECONDS_BACKGROUND = 10.0
"""With flush = "async" nobody waits for a sync of the log, so only a very long one tells that the disk is dead."""
USAGE_SECONDS = 2.0

LOG_SYNC = "sync of the log"
LOG_WRITE = "write of the log"
HARD_STATE = "save of term and vote"
CUT = "cut of the log"


@frozen
class Usage:
    """Of the file system that holds the log, in bytes."""

    free: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        return 1.0 - self.free / self.total if self.total else 0.0

    def excess(self, share: float) -> int:
        """Bytes that have to go for no more than this share to be used."""
        return int((self.share - share) * self.total)


class DiskWatch:
    """Takes note of what waits for the disk. `verdict` is cheap; ask it a few times a second."""

    def __init__(self, env: Env, config: GroupConfig, log: Logger) -> None:
        self._env = env
        self._config = config
        self._log = log
        self._monotonic = env.clock.monotonic
        stall = min(STALL_SECONDS, 2 * config.election_timeout_ms_min / 1000)
        self._stall_seconds = stall
        self._sync_seconds = stall if config.flush == "sync" else max(stall, STALL_SECONDS_BACKGROUND)
        self._busy: dict[str, float] = {}
        self.is_ok = True
        self.is_full = False
        """No room for the next segment, or for a write."""
        self.usage = Usage()
        self.is_refusing = False
        """Above the third watermark: no client proposals."""

    def begin(self, what: str) -> None:
        """An operation that ends with `end`; one that does not, for long, is a stall."""
        self._busy[what] = self._monotonic()

    def end(self, what: str) -> None:
        self._busy.pop(what, None)

    @property
    def stalled(self) -> str | None:
        """What waits for the disk for too long."""
        now = self._monotonic()
        for what, since in self._busy.items():
            if now - since >= (self._sync_seconds if what == LOG_SYNC else self._stall_seconds):
                return what
        return None

    def verdict(self, *, is_unfit: bool) -> bool | None:
        """Whether the disk is good enough to lead with, where that has changed; else None. `is_unfit`: it is not, for
        another reason."""
        stalled = self.stalled
        is_ok = stalled is None and not self.is_full and not is_unfit
        if is_ok == self.is_ok:
            return None
        self.is_ok = is_ok
        if is_ok:
            self._log.warning("disk works again")
        else:
            reason = f"{stalled} is stalled" if stalled else "it is full" if self.is_full else "this node trimmed alone"
            self._log.warning("disk full or stalled: giving up leadership", reason=reason)
        return is_ok

    @property
    def refusal(self) -> str:
        """For the client whose proposal is refused."""
        return (
            f"the disk is {self.usage.share:.0%} full; nothing is taken above {self._config.disk_watermarks[2]:.0%},"
            " make room"
        )

    async def look(self) -> None:
        """How full the disk is, now. Checkpoint."""
        try:
            free, total = await self._env.run_in_thread(self._env.files.free_space, self._config.data_dir)
        except OSError as error:
            self._log.warning("cannot tell how full the disk is", error=str(error))
            return
        self.usage = Usage(free, total)
        is_refusing = self.usage.share >= self._config.disk_watermarks[2]
        if is_refusing != self.is_refusing:
            self.is_refusing = is_refusing
            self._log.warning(
                "disk nearly full: client messages are refused" if is_refusing else "disk takes client messages again",
                usage=round(self.usage.share, 3),
            )

    async def run(self) -> None:
        """Look now and then, for ever. Checkpoint."""
        while True:
            await self.look()
            await self._env.clock.sleep(USAGE_SECONDS)
