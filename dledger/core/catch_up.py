"""When a peer is better helped by whole segments than by entries, and how far they bring it (raft.md 4.7)."""

from __future__ import annotations

from dledger.core.config import RaftConfig
from dledger.core.log import LogView


def bytes_behind(log: LogView, index: int, position_end: int) -> int | None:
    """How much of the log lies behind entry `index`; None when it begins before the first retained entry."""
    if index >= log.last_index:
        return 0
    position = log.position_of(index + 1)
    return None if position is None else position_end - position


def first_to_send(log: LogView, commit_index: int, position_end: int, config: RaftConfig) -> int:
    """The first entry that is sent as an entry again: closed segments hold everything before it, and it is committed.

    Half of the allowed distance is left, so that the peer is not far behind again at once. Only what is committed is
    fetched as segments, and the missing peer may be the one without which nothing gets committed.
    """
    closed_end = position_end - position_end % config.segment_bytes
    wanted = min(closed_end, position_end - config.segments_behind_bytes // 2)
    low, high = log.first_index, commit_index + 1
    while low < high:
        middle = (low + high) // 2
        position = log.position_of(middle)
        if position is not None and position < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def is_far_behind(log: LogView, index: int, commit_index: int, position_end: int, config: RaftConfig) -> bool:
    """Should a peer that ends at `index` get segments? Only if they bring it further."""
    behind = bytes_behind(log, index, position_end)
    if behind is None or behind <= config.segments_behind_bytes:
        return False
    return index + 1 < first_to_send(log, commit_index, position_end, config)
