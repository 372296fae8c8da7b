"""The leader's side of replication: what goes to which peer, and when (Raft 5.3; raft.md 4.4, 4.7).

Each peer is in one of three states (`transitions.PEER_TRANSITIONS`).

PROBE: one message at a time until the logs are known to agree.

REPLICATE: send ahead of the answers; `next_index` moves back only on a rejection. Window 64 messages or 8 MiB.
Heartbeats and commit news pass the window by. Replies carry term and sequence; those of another term, from before a
rejection or from an old connection are dropped.

SEGMENTS: the peer ends before our first entry, or too far behind. It gets one `SegmentsOffer` at each heartbeat, and no
entry. The offer names the first entry that the leader will send itself; what is before that, the peer's driver fetches
as whole segments, from whom it likes, while the peer goes on following: the offer counts as hearing the leader, and its
answer, a rejection that names the peer's last entry, for check-quorum. Once that entry reaches what was offered and can
agree with ours, the peer is probed as any other. Nothing is cut on the way, and a gap is never bridged, for entries
still need their predecessor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from dledger.core import effects as fx
from dledger.core.catch_up import bytes_behind, first_to_send, is_far_behind
from dledger.core.config import RaftConfig
from dledger.core.errors import RemoteError
from dledger.core.messages import Append, AppendReply, SegmentsOffer
from dledger.core.outbox import Outbox
from dledger.core.progress import Progress
from dledger.core.quorum import quorum_mark
from dledger.core.raft_log import RaftLog
from dledger.core.transitions import PeerCause, PeerState
from dledger.core.types import Entry

PROBE_BYTES_MAX = 64 * 1024
"""A probe that may be in vain carries no more than this."""


class Replication:
    """The table of peers, from `begin` to `end` of one leadership; empty while this node does not lead.

    A leader's term is saved, so its messages go to the outbox's effects at once.
    """

    __slots__ = ("_config", "_log", "_outbox", "_quorum_since", "_seq_of_gone", "progress", "term")

    def __init__(self, config: RaftConfig, log: RaftLog, outbox: Outbox) -> None:
        self._config = config
        self._log = log
        self._outbox = outbox
        self.term = 0
        self.progress: dict[str, Progress] = {}
        self._seq_of_gone: dict[str, int] = {}
        self._quorum_since = 0.0

    def begin(self, term: int, now: float) -> None:
        """This node leads `term` from now on. `track` says whom."""
        self.term = term
        self._seq_of_gone = {}
        self._quorum_since = now

    def end(self) -> None:
        """It leads no more: what it knew of its peers is worth nothing to the next leader."""
        self.progress = {}

    def track(self, wanted: Set[str], unreachable: Set[str], now: float) -> None:
        """A Progress for each of the `wanted` peers and for nobody else."""
        for peer in sorted(wanted - self.progress.keys()):
            self.progress[peer] = Progress(
                peer,
                self._log.last_index + 1,
                now,
                is_connected=peer not in unreachable,
                seq=self._seq_of_gone.get(peer, 0),
            )
        for peer in sorted(self.progress.keys() - wanted):
            self._seq_of_gone[peer] = self.progress.pop(peer).seq

    # What is known of peers

    def of(self, peers: Iterable[str]) -> list[Progress]:
        return [self.progress[peer] for peer in peers]

    def is_near(self, progress: Progress) -> bool:
        """Near enough to vote, or to lead."""
        behind = bytes_behind(self._log.view, progress.written, self._log.position_end)
        return behind is not None and behind <= self._config.promote_lag_bytes_max

    def has_caught_up(self, peer: str) -> bool:
        progress = self.progress[peer]
        return progress.is_connected and progress.state is PeerState.REPLICATE and self.is_near(progress)

    def is_alive(self, peer: str, now: float) -> bool:
        progress = self.progress[peer]
        return progress.is_connected and now - progress.last_reply_at < self._config.election_timeout_min

    def quorum_contact(self, now: float, voting_peers: Iterable[str], *, is_voter: bool) -> float:
        """The last moment at which a quorum of the voters, we included if we are one, was known to follow us."""
        contacts = [max(self.progress[peer].last_reply_at, self._quorum_since) for peer in voting_peers]
        if is_voter:
            contacts.append(now)
        return quorum_mark(contacts)

    def forgive_silence(self, now: float) -> None:
        """We were stopped or starved, and so could not listen: silence counts from now on (raft.md 4.3)."""
        self._quorum_since = now

    # Connections and answers

    def set_connected(self, progress: Progress, is_connected: bool) -> None:
        """What was under way may be lost: find out again where we agree."""
        progress.is_connected = is_connected
        progress.change(PeerCause.CONNECTION)
        progress.next_index = progress.written + 1 if progress.written else self._log.last_index + 1

    def take_reply(self, now: float, progress: Progress, message: AppendReply) -> bool | None:
        """A peer's answer in our term: does it have more than we knew? None for one that no longer counts.

        Raises RemoteError for an answer to what was never sent.
        """
        seq = message.seq
        if seq > progress.seq or message.written > self._log.last_index or message.durable > message.written:
            raise RemoteError(f"{progress.peer} answers what was never sent: {message}")
        if seq <= progress.stale_seq or seq < progress.reply_seq:
            return None
        progress.reply_seq = seq
        progress.last_reply_at = now
        progress.disk_ok = message.disk_ok
        progress.note_answered(seq)
        has_more = False
        if message.written > progress.written:
            progress.written = message.written
            has_more = True
        if message.durable > progress.durable:
            progress.durable = message.durable
            has_more = True
        if not message.ok:
            self.step_back(progress, message)
        elif progress.state is PeerState.PROBE and seq >= progress.probe_seq:
            if self._is_far_behind(progress.written):
                self._offer_segments(progress, PeerCause.FAR_BEHIND)
            else:
                progress.change(PeerCause.MATCHED)
        return has_more

    def step_back(self, progress: Progress, message: AppendReply) -> None:
        """A rejection: jump to the last entry that can agree, by the follower's hint and our own terms."""
        agreed, agreed_term = self._log.last_not_above(message.hint_index, message.hint_term)
        # Within one connection a follower loses nothing it reported; behind a new one it may have, by a power loss.
        progress.written = min(progress.written, message.hint_index)
        progress.durable = min(progress.durable, message.hint_index)
        # A term above the hinted one: the search ended at our first entry without finding agreement.
        can_agree = agreed_term <= message.hint_term
        if progress.state is PeerState.SEGMENTS:
            if can_agree and agreed >= progress.segments_until - 1:
                progress.change(PeerCause.REACHED)
                progress.next_index = agreed + 1
        elif not can_agree:
            self._offer_segments(progress, PeerCause.BELOW_FIRST)
        elif self._is_far_behind(agreed):
            self._offer_segments(progress, PeerCause.FAR_BEHIND)
        else:
            progress.change(PeerCause.REJECTED)
            progress.next_index = agreed + 1

    def _is_far_behind(self, index: int) -> bool:
        log = self._log
        return is_far_behind(log.view, index, log.commit_index, log.position_end, self._config)

    def _offer_segments(self, progress: Progress, cause: PeerCause) -> None:
        log = self._log
        progress.change(cause)
        progress.segments_until = first_to_send(log.view, log.commit_index, log.position_end, self._config)
        progress.next_index = progress.segments_until

    # Sending

    def end_turn(self, now: float) -> None:
        """Send what this turn has made sendable: entries as far as windows reach, probes, offers, commit news."""
        config, log = self._config, self._log
        for progress in self.progress.values():
            if progress.state is PeerState.REPLICATE:
                while (
                    progress.next_index <= log.last_index
                    and len(progress.inflight) < config.window_messages_max
                    and progress.inflight_bytes < config.window_bytes_max
                ):
                    entries = log.view.entries(progress.next_index, config.message_bytes_max)
                    if not entries and progress.next_index >= log.view.first_index:
                        break  # on their way from the disk
                    self._send_append(now, progress, entries)
                    if not entries:
                        break
                if progress.commit_sent < log.commit_index:
                    # Followers serve reads up to their commit index: news at once, window or not (raft.md 4.8).
                    self._send_append(now, progress, ())
            elif not progress.is_probe_sent and progress.is_connected:
                if progress.state is PeerState.PROBE:
                    self._probe(now, progress)
                else:
                    self._send_offer(now, progress)

    def send_heartbeats(self, now: float) -> None:
        """To every peer that has not had a message lately."""
        recent = now - self._config.heartbeat / 2
        for progress in self.progress.values():
            if progress.last_sent_at <= recent:
                self.send_heartbeat(now, progress)

    def send_heartbeat(self, now: float, progress: Progress) -> None:
        """It carries the predecessor too, so that an idle group converges (braft#292), and passes the window by."""
        if progress.state is PeerState.SEGMENTS:
            self._send_offer(now, progress)
        else:
            self._send_append(now, progress, ())

    def _probe(self, now: float, progress: Progress) -> None:
        entries: Sequence[Entry] = ()
        if progress.next_index <= self._log.last_index:
            bytes_max = min(PROBE_BYTES_MAX, self._config.message_bytes_max)
            entries = self._log.view.entries(progress.next_index, bytes_max)
            if entries and len(entries[0].frame) > bytes_max:
                entries = ()
        self._send_append(now, progress, entries)
        progress.is_probe_sent = True
        progress.probe_seq = progress.seq

    def _send_append(self, now: float, progress: Progress, entries: Sequence[Entry]) -> None:
        log = self._log
        prev_index = progress.next_index - 1
        if prev_index == log.last_index:
            prev_term, prev_crc = log.last_term, log.last_crc
        elif prev_index == progress.prev_index and prev_index >= log.view.first_index - 1:
            prev_term, prev_crc = progress.prev_term, progress.prev_crc
        else:
            term, crc = log.view.term_at(prev_index), log.view.head_crc_at(prev_index)
            if term is None or crc is None:
                # Trimmed since.
                self._offer_segments(progress, PeerCause.BELOW_FIRST)
                self._send_offer(now, progress)
                return
            prev_term, prev_crc = term, crc
        progress.seq += 1
        message = Append(self.term, prev_index, prev_term, prev_crc, log.commit_index, progress.seq, entries)
        progress.last_sent_at = now
        progress.commit_sent = log.commit_index
        if entries:
            last = entries[-1]
            progress.note_sent(sum([len(entry.frame) for entry in entries]))
            progress.next_index = last.index + 1
            progress.prev_index, progress.prev_term, progress.prev_crc = last.index, last.term, last.head_crc
        self._outbox.effects.append(fx.Send(progress.peer, message))

    def _send_offer(self, now: float, progress: Progress) -> None:
        # Retention goes on meanwhile.
        progress.segments_until = max(progress.segments_until, self._log.first_index)
        progress.next_index = progress.segments_until
        progress.seq += 1
        progress.last_sent_at = now
        progress.is_probe_sent = True
        offer = SegmentsOffer(self.term, progress.seq, progress.segments_until, self._log.commit_index)
        self._outbox.effects.append(fx.Send(progress.peer, offer))
