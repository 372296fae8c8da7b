"""What one node offers another for catch-up by segments: the closed segments and what lies before them."""

from __future__ import annotations

from attrs import frozen

from dledger.store.base import BaseRecord

CHUNK_BYTES = 1 << 20


@frozen
class SegmentSpan:
    """Which entries a closed segment holds: complete, never written again."""

    base: int
    first_index: int
    last_index: int


@frozen
class SegmentInfo(SegmentSpan):
    """A closed segment as a peer or a backup has to know it."""

    end_position: int
    """Where the last entry ends; zeros follow up to the segment's end."""
    last_crc: int
    """`head_crc` of the last entry."""

    @property
    def used_bytes(self) -> int:
        return self.end_position - self.base


@frozen
class Manifest:
    """A run of closed segments without a gap, ascending, and the entry before the first of them."""

    base: BaseRecord
    segment_bytes: int
    segments: tuple[SegmentInfo, ...]
