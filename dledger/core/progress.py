"""What a leader knows of one peer, and the window of messages under way to it."""

from __future__ import annotations

from collections import deque

from dledger.core.transitions import PEER_TRANSITIONS, PeerCause, PeerState


class Progress:
    """One peer as its leader sees it, for one term.

    `next_index` moves forward on sends, back only on a rejection. `written` and `durable` are what the peer has
    verified to have. Of the replies, only those for messages above `stale_seq` count, so that an answer from before a
    rejection or an old connection changes nothing (copycat#29).
    """

    __slots__ = (
        "commit_sent",
        "disk_ok",
        "durable",
        "inflight",
        "inflight_bytes",
        "is_connected",
        "is_probe_sent",
        "last_reply_at",
        "last_sent_at",
        "next_index",
        "peer",
        "prev_crc",
        "prev_index",
        "prev_term",
        "probe_seq",
        "reply_seq",
        "segments_until",
        "seq",
        "stale_seq",
        "state",
        "written",
    )

    def __init__(self, peer: str, next_index: int, now: float, *, is_connected: bool, seq: int = 0) -> None:
        # `seq` goes on where it was when the same node was a member before in this term: old answers stay old.
        self.peer = peer
        self.state = PeerState.PROBE
        self.next_index = next_index
        self.written = 0
        self.durable = 0
        self.seq = seq
        self.stale_seq = seq
        self.reply_seq = 0
        self.probe_seq = 0
        self.is_probe_sent = False
        self.is_connected = is_connected
        self.inflight: deque[tuple[int, int]] = deque()
        self.inflight_bytes = 0
        self.last_sent_at = now
        self.last_reply_at = now
        self.commit_sent = 0
        self.disk_ok = True
        # SEGMENTS: entries from here on are ours to send.
        self.segments_until = 0
        # Identity of the entry before `next_index`, remembered from the last message; valid where the index agrees.
        self.prev_index = -1
        self.prev_term = 0
        self.prev_crc = 0

    def change(self, cause: PeerCause) -> None:
        """Take the transition that the table names; whatever is under way no longer counts unless the peer matched."""
        self.state = PEER_TRANSITIONS[self.state][cause]
        if cause is not PeerCause.MATCHED:
            self.is_probe_sent = False
            self.stale_seq = self.seq
            self.inflight.clear()
            self.inflight_bytes = 0

    def note_sent(self, nbytes: int) -> None:
        """A message with entries, numbered `seq`, is under way."""
        self.inflight.append((self.seq, nbytes))
        self.inflight_bytes += nbytes

    def note_answered(self, seq: int) -> None:
        """Messages up to `seq` have been dealt with by the peer: connections keep order."""
        inflight = self.inflight
        while inflight and inflight[0][0] <= seq:
            self.inflight_bytes -= inflight.popleft()[1]
