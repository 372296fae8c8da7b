"""What can go wrong between a broker and its replicated log, as exceptions with one sentence each."""

from __future__ import annotations


class LedgerError(Exception):
    """Base of everything this package raises on purpose."""


class NotLeader(LedgerError):
    """This node does not take proposals now. Nothing was logged."""

    def __init__(self, leader_id: str | None) -> None:
        super().__init__("not leader; " + (f"leader={leader_id}" if leader_id is not None else "no leader known"))
        self.leader_id = leader_id


class Overloaded(LedgerError):
    """Too much waits for its quorum already, or the disk cannot take more. Nothing was logged."""


class DiskFull(Overloaded):
    """The disk is full, or so near to it that nothing but the log's own entries is taken. Nothing was logged."""


class TooLarge(LedgerError):
    """The record or entry could never be logged."""


class FormatError(LedgerError):
    """The data folder is not this node's, not formatted, or of a newer format."""


class MetaDamaged(LedgerError):
    """Term and vote cannot be read. Voting without them could elect two leaders, so the node refuses to start."""


class LogDamaged(LedgerError):
    """An entry that this node once had on stable storage is unreadable. It must not be cut, so it is not served."""


class StoreFailed(LedgerError):
    """A write or sync failed. Final: what the page cache holds now is unknown (fsync is never retried)."""


class NoRoom(StoreFailed):
    """A write found the disk full before anything was synced: it may be tried again. Final for who does not."""


class CoreStopped(LedgerError):
    """The Raft core found a promise broken and takes no further part."""


class Reopen(LedgerError):
    """The log on disk has to be opened anew: damage was found in it, or segments were installed. The driver ends with
    this, and the group recovers, repairs and serves again without the process ending.
    """
