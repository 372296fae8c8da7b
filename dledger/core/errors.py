"""The two ways to use the core wrongly, and what a broken promise is until it leaves as the effect `Fatal`."""

from __future__ import annotations


class CoreError(Exception):
    """Base of both; never raised itself."""


class LocalError(CoreError):
    """Our own driver did what no correct driver does. Nothing was changed."""


class RemoteError(CoreError):
    """A peer sent what no correct peer sends: close its connection. Nothing was changed."""


class PromiseBroken(Exception):
    """What is committed, or intact, is contradicted. Ends the step and this node; never leaves `Raft.step`."""
