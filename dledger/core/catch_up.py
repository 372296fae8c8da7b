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


def is_far_behind(log: LogView, index: int, position_end: int, config: RaftConfig) -> bool:
    """Should a peer that ends at `index` get segments? Only if there are closed ones behind its end."""
    behind = bytes_behind(log, index, position_end)
    return behind is not None and behind > config.segments_behind_bytes and behind > position_end % config.segment_bytes


def first_to_send(log: LogView, position_end: int, config: RaftConfig) -> int:
    """The first entry that is sent as an entry again: closed segments hold everything before it.

    Half of the allowed distance is left, so that the peer is not far behind again at once.
    """
    closed_end = position_end - position_end % config.segment_bytes
    wanted = min(closed_end, position_end - config.segments_behind_bytes // 2)
    low, high = log.first_index, log.last_index + 1
    while low < high:
        middle = (low + high) // 2
        position = log.position_of(middle)
        if position is not None and position < wanted:
            low = middle + 1
        else:
            high = middle
    return low
