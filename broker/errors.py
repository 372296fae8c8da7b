"""What keeps a broker node from running, as one sentence for the operator.

Both are OSErrors: whoever runs a node treats them like a taken port or a full disk, not like a bug.
"""

from __future__ import annotations

from errno import EDQUOT, ENOSPC
from typing import Final

DISK_FULL: Final = frozenset({ENOSPC, EDQUOT})
"""What a full disk says. Queues, index and checkpoints follow the log and wait in memory until there is room again."""


class StartupError(OSError):
    """The node cannot start; the text says why and what to do. Nothing was changed."""


class NodeStopped(OSError):
    """The node had to stop: going on could serve or store something wrong. The text says what was found."""
