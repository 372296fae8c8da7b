"""What an operator may choose about how the log's files are treated."""

from __future__ import annotations

from attrs import frozen


@frozen(kw_only=True)
class StoreOptions:
    """None of these changes what is on disk."""

    warm: bool = False
    """Write zeros over a new segment before it is used, so that the first append meets no allocation."""
    mlock: bool = False
    """Keep the active segment's pages in memory, where the limits allow it."""
    advise: bool = True
    """Tell the page cache which files are read in order (scrub, recovery) and are not needed again."""
    is_cache_kept: bool = False
    """No power loss, and no failed write, since the log was written: the page cache kept every write in its order, and
    what is damaged before an intact frame is no torn tail."""
    hint_is_evidence: bool = False
    """A commit index in a later intact frame proves that an entry must not be cut: only with flush = "sync"."""
