"""Leadership on its way to another member (Raft dissertation 3.10), and who is told how that ended."""

from __future__ import annotations

from dledger.reads import Told


class Transfers:
    """One transfer at a time: asked for, begun in a turn of the leader, ended. Whoever asked is told once."""

    def __init__(self) -> None:
        self.wanted: tuple[str | None] | None = None
        """The target, where one was asked for and has not begun. A plain attribute: every turn looks at it."""
        self._asked: list[Told] = []
        self._under_way: list[Told] = []

    def ask(self, target: str | None, told: Told | None) -> None:
        """To `target`, or to the most advanced member. Who asks last before the turn decides."""
        self.wanted = (target,)
        if told is not None:
            self._asked.append(told)

    def begin(self) -> str | None:
        """Returns the target. `ended` or another `begin` follows."""
        assert self.wanted is not None
        (target,), self.wanted = self.wanted, None
        self._asked, self._under_way = [], self._asked
        return target

    def refuse(self, reason: str) -> None:
        """No transfer for those who wait for one to begin."""
        self.wanted = None
        asked, self._asked = self._asked, []
        for told in asked:
            told(reason)

    def ended(self, reason: str | None) -> None:
        """How the one under way has ended: None when another member leads."""
        under_way, self._under_way = self._under_way, []
        for told in under_way:
            told(reason)
