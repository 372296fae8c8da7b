"""What a step wants done, and what may not leave yet (raft.md 4.2)."""

from __future__ import annotations

from dledger.core import effects as fx
from dledger.core.effects import Effect
from dledger.core.messages import Message


class Outbox:
    """The effects of the step under way, and the messages that wait for term and vote to be on stable storage.

    `effects` is begun anew by every step. `is_unsaved` while the save of the present term and vote is not confirmed.
    """

    __slots__ = ("_held", "effects", "is_save_wanted", "is_unsaved")

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self.is_unsaved = False
        self.is_save_wanted = False
        self._held: dict[tuple[str, type], fx.Send] = {}

    def send(self, peer: str, message: Message) -> None:
        """Nothing leaves while term or vote are not on stable storage: every message carries the term (raft.md 4.2)."""
        if self.is_unsaved:
            self._held[peer, type(message)] = fx.Send(peer, message)
        else:
            self.effects.append(fx.Send(peer, message))

    def want_save(self) -> None:
        """Term or vote have changed. Saved at the end of the step, once: adopting and voting are one write."""
        self.is_unsaved = True
        self.is_save_wanted = True

    def save(self, term: int, vote: str | None) -> None:
        """At the end of a step that wants it; before whatever else the step has decided."""
        self.is_save_wanted = False
        self.effects.insert(0, fx.SaveHardState(term, vote))

    def release(self) -> None:
        """The present term and vote have been saved: what waited for that leaves."""
        self.is_unsaved = False
        self.effects.extend(self._held.values())
        self._held.clear()

    def drop_held(self) -> None:
        """A newer term has begun: what waited belongs to an older one."""
        self._held.clear()
