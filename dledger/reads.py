"""Linearizable reads that wait for the leader's confirmation.

All reads of one turn share a token of the core, and so one round of replies (raft.md 4.8).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Told = Callable[[str | None], None]
"""Called once, in a turn of the driver: None when it is done, else the reason why not."""

READS_WAITING_MAX = 10_000


class Reads:
    """Reads on their way: asked, in a round of the core, confirmed, and answered once the index is applied."""

    __slots__ = ("_confirmed", "_next_token", "_refused", "_waiting", "asked", "is_settled", "rounds")

    def __init__(self) -> None:
        self.asked: list[Told] = []
        """A round is to be opened for these. Plain attributes: the driver looks at them in every turn."""
        self.rounds: dict[int, list[Told]] = {}
        """Replies are awaited: a message must go out for them."""
        self.is_settled = False
        """Something may be answered once applied, or is refused."""
        self._confirmed: deque[tuple[int, list[Told]]] = deque()
        self._refused: list[tuple[str, list[Told]]] = []
        self._waiting = 0
        self._next_token = 1

    def ask(self, told: Told) -> None:
        """Note a read. One too many is refused at the next `answer`."""
        if self._waiting >= READS_WAITING_MAX:
            self._refused.append(("too many reads wait for a confirmation", [told]))
            self.is_settled = True
            return
        self._waiting += 1
        self.asked.append(told)

    def begin_round(self) -> int:
        """The token under which everything asked so far goes to the core."""
        token = self._next_token
        self._next_token += 1
        self.rounds[token] = self.asked
        self.asked = []
        return token

    def confirm(self, token: int, index: int) -> None:
        """What was asked may be answered from the tables as of `index`, or later ones."""
        self._confirmed.append((index, self.rounds.pop(token)))
        self.is_settled = True

    def refuse(self, token: int, reason: str) -> None:
        told = self.rounds.pop(token)
        self._waiting -= len(told)
        self._refused.append((reason, told))
        self.is_settled = True

    def answer(self, applied_index: int) -> None:
        """Tell everybody whose turn has come."""
        refused, self._refused = self._refused, []
        for reason, waiting in refused:
            for told in waiting:
                told(reason)
        confirmed = self._confirmed
        while confirmed and confirmed[0][0] <= applied_index:
            waiting = confirmed.popleft()[1]
            self._waiting -= len(waiting)
            for told in waiting:
                told(None)
        self.is_settled = bool(confirmed or self._refused)  # whoever was told may have asked again

    def stop(self, reason: str) -> None:
        """Refuse everything there is."""
        everything = [self.asked, *self.rounds.values(), *(waiting for _, waiting in self._confirmed)]
        self.asked, self.rounds, self._waiting = [], {}, 0
        self._confirmed.clear()
        self._refused.extend((reason, waiting) for waiting in everything if waiting)
        self.answer(0)
