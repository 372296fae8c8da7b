"""The two ways to use the core wrongly. Broken promises are not errors but the effect `Fatal`."""

from __future__ import annotations


class CoreError(Exception):
    """Base of both; never raised itself."""


class LocalError(CoreError):
    """Our own driver did what no correct driver does. Nothing was changed."""


class RemoteError(CoreError):
    """A peer sent what no correct peer sends: close its connection. Nothing was changed."""
