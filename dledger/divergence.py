"""How far back a damaged log is another one than a peer's (raft.md 4.6).

What lies before a damaged range is intact, and chained, but nothing on this disk proves that it is the group's: beside
a segment that is lost, an older copy of its neighbour looks like the neighbour. Then no peer has the entry before the
range, and none could ever fill it. So the last entry in common is searched for, by halving, with questions for single
entries: the range begins behind it. Nothing is believed that would not be believed anyway: entries of the wider range
still have to lead to the intact frame behind it.
"""

from __future__ import annotations

from attrs import evolve

from dledger.core.types import BadFrame, parse_entry
from dledger.fetch import FetchClient
from dledger.store.faults import FaultyRange
from dledger.store.log_store import LogStore
from dledger.wire import FetchKind, FetchStatus

_NOT_THERE = (FetchStatus.ABSENT, FetchStatus.UNSURE)


async def widened(client: FetchClient, peer: str, own: LogStore, fault: FaultyRange) -> FaultyRange | None:
    """The range from behind the last entry in common on, for one whose predecessor `peer` says it does not have. None
    where the peer does not say, or the predecessor is that entry. Checkpoint. Raises LogDamaged where an entry of
    ours is damaged that the recovery took for intact: the log is to be recovered again."""
    low, high = own.first_index - 1, fault.first_index - 1
    if low >= high or await _has(client, peer, own, high) is not False or not await _follows(client, peer, own, low):
        return None
    while high - low > 1:
        index = _intact(own, low, high)
        if index is None:
            break
        there = await _has(client, peer, own, index)
        if there is None:
            return None
        low, high = (index, high) if there else (low, index)
    crc = own.head_crc_at(low)
    assert crc is not None
    damaged = next((each for each in own.faults if each.first_index == low + 1), None)
    position = own.end_of(low) if damaged is None else damaged.position
    return evolve(fault, first_index=low + 1, position=position, prev_crc=crc)


def _intact(own: LogStore, low: int, high: int) -> int | None:
    """An entry about halfway between two that is not damaged here; None where there is none."""
    middle = (low + high) // 2
    for fault in own.faults:
        if fault.first_index <= middle <= (fault.last_index or middle):
            middle = fault.first_index - 1 if fault.first_index - 1 > low else (fault.last_index or high) + 1
    return middle if low < middle < high else None


async def _has(client: FetchClient, peer: str, own: LogStore, index: int) -> bool | None:
    """Whether a peer has this entry of ours; None where it does not say."""
    (entry,) = own.entries(index, 1)[:1]
    answer = await client.ask(peer, FetchKind.ENTRIES, index, index, entry.prev_crc)
    if not answer.is_ok:
        return False if answer.status in _NOT_THERE else None
    try:
        return parse_entry(answer.data).head_crc == entry.head_crc
    except BadFrame:
        return None


async def _follows(client: FetchClient, peer: str, own: LogStore, index: int) -> bool:
    """Whether a peer says that it has something that follows what our log begins behind."""
    crc = own.head_crc_at(index)
    assert crc is not None
    return (await client.ask(peer, FetchKind.ENTRIES, index + 1, index + 1, crc)).is_ok
