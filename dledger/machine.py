"""What a raft group asks of the state machine above it (the broker), and what it tells about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from attrs import field, frozen

from dledger.core.types import HEADER_BYTES, Entry, Role
from dledger.measures import Distribution


class EntryView:
    """A DATA entry as the state machine sees it. `body` keeps the whole frame alive while it is referenced."""

    __slots__ = ("body", "count", "index", "position", "term")

    def __init__(self, entry: Entry) -> None:
        self.index = entry.index
        self.term = entry.term
        self.position = entry.position
        """Byte of the log where the frame begins; `body[0]` has the physical offset `position + 64`."""
        self.count = entry.count
        self.body = memoryview(entry.frame)[HEADER_BYTES:]

    @property
    def body_position(self) -> int:
        """Physical offset of `body[0]`."""
        return self.position + HEADER_BYTES


class StateMachine(Protocol):
    """Implemented by the broker. Every call is synchronous, within a driver turn (`restore`: before the first one).

    Only DATA entries are shown. For each of them exactly one of `apply` or `discard` follows, at most one `orphan`
    before that; at the end of a run neither for what is still pending. An exception out of any of these ends the node:
    the tables could no longer be trusted.

    One process may go through several runs: `restore`, calls, `stopped`, then `restore` again after a repair of the log
    or an installation of segments.
    """

    def stage(self, entry: EntryView) -> Any:
        """An entry has arrived at a follower, or is found at start: parse it once, move the pending tables on.

        What is returned comes back in `apply` or `discard`. Entries the leader proposed itself were staged by
        `set_open_staged` or `propose`.
        """

    def apply(self, index: int, term: int, staged: Any) -> None:
        """Committed: pending becomes committed; dispatch, answer waiters. In index order."""

    def discard(self, staged: Any) -> None:
        """Cut or refused, for certain; newest first. Undo what is pending; waiters get 14."""

    def orphan(self, staged: Any) -> None:
        """Leadership lost, or no quorum for too long: waiters get 1 "outcome unknown". The entry stays staged."""

    def role_changed(self, role: Role, term: int, leader_id: str | None, ready: bool) -> None:
        """`ready` once this node leads and the no-op of its term is applied."""

    def app_message(self, peer_id: str, payload: bytes) -> None:
        """What a peer's `send_app` sent."""

    def turn_done(self) -> None:
        """End of a driver turn: flush connections."""

    def restore(self, checkpoint: bytes | None, *, first_index: int, first_position: int) -> int:
        """Before replay: load own tables. Returns the entry behind which the log is to be shown (0: all).

        That may lie before what the checkpoint covers; such entries are staged and applied once more. None: there is no
        checkpoint, or the log ends before what it covers. The log begins with entry `first_index` at byte
        `first_position`; what lay before was trimmed. Called again in the same process after `stopped`: every table,
        everything pending and every derived file of the earlier run goes first.
        """

    def stopped(self) -> None:
        """The run has ended, waiters have been orphaned. The end of the process follows, or another `restore`."""

    # Retention. What these tell must follow from the entries applied so far alone, except for `checkpoint_soon`.

    def trim(self, first_position: int) -> None:
        """A committed TRIM: nothing before this byte of the log is to be shown any more, and it goes soon.

        `first_position` begins a segment. A replay may bring one that is trimmed already: that changes nothing.
        """

    def trim_floor(self) -> int:
        """Byte of the log before which nothing is needed any more except by consumers: a TRIM that is not forced stays
        below it (delayed messages that are not delivered yet lie behind it)."""

    def store_time_ms(self, entry: EntryView) -> int | None:
        """When an entry was stored, wall milliseconds; None where it tells nothing of that. Only reads the entry."""

    def checkpoint_soon(self) -> None:
        """Trimmed segments wait for a checkpoint that covers them: save one when convenient. May be called often."""


@frozen(kw_only=True)
class GroupStatistics:
    """One consistent look at a group. Indexes are of entries, positions and lags in bytes of the log."""

    node_id: str
    flush: str
    role: Role = Role.FOLLOWER
    term: int = 0
    leader_id: str | None = None
    ready: bool = False
    recovering: bool = False
    first_index: int = 1
    last_index: int = 0
    written_index: int = 0
    durable_index: int = 0
    commit_index: int = 0
    applied_index: int = 0
    first_position: int = 0
    committed_position: int = 0
    end_position: int = 0
    acknowledged: Mapping[str, int] = field(factory=dict)
    """Per peer: the highest index it has acknowledged (as leader; empty otherwise)."""
    lag_bytes: Mapping[str, int] = field(factory=dict)
    """Per peer: bytes of the log it has not acknowledged (as leader)."""
    connected: Mapping[str, bool] = field(factory=dict)
    waiting_records: int = 0
    state: str = "serving"
    """What the group is at: "recovering" the log from the disk, "repairing" it from the peers, "installing" their
    segments, or "serving"."""
    waits_for: str = ""
    """What keeps a repair or an installation from ending, in words."""
    damaged: Sequence[tuple[int, int]] = ()
    """First and last entry of each range of the log that is damaged and has not been repaired yet."""
    flush_interval_ms: int = 500
    """flush = "async": how often what was written is synced behind the answers."""
    power_lost_index: int | None = None
    """The last entry found at this process's start, where the machine had lost what was not synced before it and flush
    is "async": what lay behind it may have been acknowledged. None: nothing of the kind."""
    members: tuple[str, ...] = ()
    """Voters, by the members in force."""
    learners: tuple[str, ...] = ()
    addresses: Mapping[str, tuple[str, int]] = field(factory=dict)
    """Of all members, as far as a CONFIG entry names them; else the configured ones."""
    members_index: int = 0
    """The CONFIG entry these come from; 0: the configured ones."""
    priorities: Mapping[str, int] = field(factory=dict)
    peer_state: Mapping[str, str] = field(factory=dict)
    """Per peer, as leader: "probe", "replicate" or "segments"."""
    inflight: Mapping[str, int] = field(factory=dict)
    """Per peer, as leader: messages with entries that are under way."""
    lag_seconds: Mapping[str, float] = field(factory=dict)
    """Per peer, as leader: for how long it has not had everything; 0.0 when it is level."""
    trimmed_position: int = 0
    """Byte up to which the log was given up by TRIM entries; segments before it go once a checkpoint covers them."""
    disk_ok: bool = True
    disk_usage: float = 0.0
    """Used share of the file system that holds the log."""
    disk_watermarks: tuple[float, float, float] = (0.75, 0.85, 0.90)
    is_disk_slow: bool = False
    """Writes go through a thread for now, because one of them was slow."""
    loop_saturation: float = 0.0
    """Share of the last second that this group's turns took of the loop."""
    counters: Mapping[str, int] = field(factory=dict)
    histograms: Mapping[str, Distribution] = field(factory=dict)
    """Seconds of: write, fsync, replicate, commit, apply."""
    steps_down: Mapping[str, int] = field(factory=dict)
    """How often this node gave up leadership, by reason."""
    pre_votes_refused: Mapping[str, int] = field(factory=dict)
    """How often this node refused a pre-vote, by reason."""
