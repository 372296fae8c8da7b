"""What no correct leader sends, seen from the message alone."""

from __future__ import annotations

from dledger.core.errors import RemoteError
from dledger.core.messages import Append
from dledger.core.types import next_position


def check_append(message: Append, segment_bytes: int) -> None:
    """Refuse an Append that contradicts itself, before it has touched anything. Raises RemoteError."""
    index, term, crc = message.prev_index, message.prev_term, message.prev_crc
    end = None
    for entry in message.entries:
        index += 1
        if entry.index != index or entry.term < term or entry.term > message.term or entry.prev_crc != crc:
            raise RemoteError(f"entry {entry.index} of term {entry.term} does not follow {index - 1} of term {term}")
        if len(entry.frame) > segment_bytes:
            raise RemoteError(f"entry {entry.index} is larger than a segment")
        if end is not None and entry.position != next_position(end, len(entry.frame), segment_bytes):
            raise RemoteError(f"entry {entry.index} claims position {entry.position} behind {end}")
        term, crc, end = entry.term, entry.head_crc, entry.end
    if message.prev_term > message.term or message.seq < 1:
        raise RemoteError(f"impossible append: {message.prev_term=} {message.term=} {message.seq=}")
