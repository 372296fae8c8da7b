"""A raft group held in the hand: messages wait until the test delivers them, disk writes until it completes them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import (
    Durable,
    Event,
    HardStateSaved,
    PeerLost,
    PeerUp,
    Propose,
    ReadIndex,
    Receive,
    Tick,
    TurnEnd,
    Written,
)
from dledger.core.invariants import Watch
from dledger.core.log import MemoryLog
from dledger.core.membership import Change, Members, apply_change, decode_members, encode_members
from dledger.core.raft import Raft
from dledger.core.types import HEADER_BYTES, Entry, EntryType, HardState, Role, frame_entry, next_position

Packet = tuple[str, str, msg.Message]


def make_log(*terms: int, bodies: str = "") -> MemoryLog:
    """A log whose entries have these terms, at index 1, 2, ...; `bodies` makes otherwise equal entries differ."""
    log = MemoryLog()
    for i, term in enumerate(terms):
        body = f"{bodies}{i + 1}".encode()
        crc = log.head_crc_at(log.last_index)
        assert crc is not None
        log.append((frame_entry(i + 1, term, log.position_end, EntryType.DATA, 1, (body,), crc, 0),))
    return log


def configs_of(log: MemoryLog) -> list[tuple[int, Members]]:
    return [(entry.index, decode_members(entry.body)) for entry in log if entry.type == EntryType.CONFIG]


def terms_of(log: MemoryLog) -> list[int]:
    return [entry.term for entry in log]


class Member:
    """One node: its core, its disk, and what it said and did."""

    def __init__(self, group: Group, name: str, log: MemoryLog, hard_state: HardState) -> None:
        self.group = group
        self.name = name
        self.log = log
        self.saved = hard_state
        self.saves = self.writes = self.syncs = True
        self.waiting_saves: list[HardState] = []
        self.waiting_writes: list[int] = []
        self.done: list[fx.Effect] = []
        self.committed: list[int] = []
        self.boot()

    def boot(self, **extra: object) -> None:
        """Start (again) with nothing but log and hard state."""
        self.waiting_saves = []
        self.waiting_writes = []
        group = self.group
        extra.setdefault("configs", configs_of(self.log))
        self.raft = Raft(
            self.name,
            group.voters,
            group.config,
            Random(f"{self.name}"),
            self.saved,
            self.log,
            group.now,
            **extra,  # type: ignore[arg-type]
        )
        self.watch = Watch(self.raft)

    def step(self, event: Event) -> list[fx.Effect]:
        effects = self.raft.step(event)
        self.watch.check()
        later: list[Event] = []
        now = event.now
        for effect in effects:
            self.done.append(effect)
            self.group.history.append((self.name, effect))
            match effect:
                case fx.Send():
                    self.group.wire.append((self.name, effect.peer, effect.message))
                case fx.SaveHardState():
                    self.waiting_saves.append(HardState(effect.term, effect.vote))
                    if self.saves:
                        self.complete_saves()
                case fx.Append():
                    self.log.append(effect.entries)
                    self.waiting_writes.append(effect.entries[-1].index)
                case fx.Cut():
                    self.log.cut(effect.from_index)
                case fx.Commit():
                    self.committed.append(effect.index)
                case fx.NoopNeeded():
                    later.append(Propose(now, (self.frame(b"", EntryType.NOOP),)))
                case _:
                    pass
        for after in later:
            self.step(after)
        if self.writes:
            self.complete_writes()
        return effects

    def complete_saves(self) -> None:
        waiting, self.waiting_saves = self.waiting_saves, []
        for state in waiting:
            self.saved = state
            self.step(HardStateSaved(self.group.now, state.term, state.vote))

    def complete_writes(self) -> None:
        waiting, self.waiting_writes = self.waiting_writes, []
        for index in waiting:
            term = self.log.term_at(index)
            if term is None:
                continue
            self.step(Written(self.group.now, index, term))
            if self.syncs:
                self.step(Durable(self.group.now, index, term))

    def frame(self, body: bytes, entry_type: int = EntryType.DATA) -> Entry:
        raft = self.raft
        position = next_position(raft.log.position_end, HEADER_BYTES + len(body), raft.config.segment_bytes)
        return frame_entry(
            raft.last_index + 1, raft.term, position, entry_type, 1, (body,), raft.log.last_crc, raft.commit_index
        )

    def change(self, change: Change) -> int:
        """Propose this change of the members in force and end the turn; returns the entry's index."""
        return self.propose_members(apply_change(self.raft.members, change))

    def propose_members(self, members: Members) -> int:
        entry = self.frame(encode_members(members), EntryType.CONFIG)
        self.step(Propose(self.group.now, (entry,)))
        self.end_turn()
        return entry.index

    def read(self, token: int) -> None:
        self.step(ReadIndex(self.group.now, token))
        self.end_turn()

    @property
    def refusals(self) -> list[str]:
        return [effect.reason for effect in self.done if isinstance(effect, fx.Refused)]

    @property
    def answers(self) -> list[tuple[int, int | str]]:
        """What became of the reads: (token, index) or (token, reason)."""
        return [
            (effect.token, effect.index if isinstance(effect, fx.ReadReady) else effect.reason)
            for effect in self.done
            if isinstance(effect, fx.ReadReady | fx.ReadRefused)
        ]

    def propose(self, body: bytes = b"x") -> int:
        """Propose one entry and end the turn; returns its index."""
        entry = self.frame(body)
        self.step(Propose(self.group.now, (entry,)))
        self.end_turn()
        return entry.index

    def end_turn(self) -> None:
        self.step(TurnEnd(self.group.now))

    def receive(self, peer: str, message: msg.Message) -> None:
        self.step(Receive(self.group.now, peer, message))
        self.end_turn()

    def did(self, kind: type[fx.Effect]) -> list[fx.Effect]:
        return [effect for effect in self.done if isinstance(effect, kind)]


class Group:
    """`names` are n0, n1, ...; `logs` and `hard_states` are what they find on their disks.

    The first `voters` of them are the bootstrap list (all, unless said otherwise); the rest run and wait to be added.
    """

    def __init__(
        self,
        size: int = 3,
        *,
        logs: dict[str, MemoryLog] | None = None,
        hard_states: dict[str, HardState] | None = None,
        config: RaftConfig | None = None,
        voters: int | None = None,
    ) -> None:
        self.now = 100.0
        self.names = [f"n{i}" for i in range(size)]
        self.voters = self.names[:voters]
        self.config = config or RaftConfig()
        self.wire: list[Packet] = []
        self.cut: set[tuple[str, str]] = set()
        self.history: list[tuple[str, fx.Effect]] = []
        self.members = {
            name: Member(
                self, name, (logs or {}).get(name) or MemoryLog(), (hard_states or {}).get(name) or HardState()
            )
            for name in self.names
        }

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def raft(self, name: str) -> Raft:
        return self.members[name].raft

    def take(self, wanted: Callable[[Packet], bool] = lambda packet: True) -> list[Packet]:
        """Remove the waiting messages that match, without delivering them."""
        taken = [packet for packet in self.wire if wanted(packet)]
        self.wire = [packet for packet in self.wire if not wanted(packet)]
        return taken

    def deliver(self, packets: list[Packet]) -> None:
        for source, target, message in packets:
            if (source, target) not in self.cut:
                self[target].receive(source, message)

    def settle(self, rounds: int = 100) -> None:
        """Deliver everything, and what that brings, until nothing is left."""
        for _ in range(rounds):
            if not self.wire:
                return
            self.deliver(self.take())
        raise AssertionError(f"the group does not come to rest: {self.wire[:3]}")

    def isolate(self, *names: str) -> None:
        for name in names:
            for other in self.names:
                if other not in names:
                    self.cut |= {(name, other), (other, name)}

    def heal(self) -> None:
        self.cut.clear()

    def tick(self, name: str) -> None:
        """Go on to the node's next deadline and let its timer fire."""
        member = self[name]
        self.now = max(self.now, member.raft.deadline)
        if self.now > member.raft.deadline + self.config.election_timeout_min / 2:
            member.step(Tick(self.now))  # found late: it is set anew
            self.now = max(self.now, member.raft.deadline)
        member.step(Tick(self.now))
        member.end_turn()

    def elect(self, name: str) -> None:
        """Let this node's election timer fire and the election take its course."""
        self.tick(name)
        self.settle()
        assert self.raft(name).role is Role.LEADER, self.raft(name).role

    def heartbeat(self, name: str) -> None:
        self.tick(name)
        self.settle()

    def run(self, seconds: float) -> None:
        """Let time pass for everybody, with instant delivery."""
        end = self.now + seconds
        while True:
            name = min(self.names, key=lambda one: self.raft(one).deadline)
            if self.raft(name).deadline > end:
                break
            self.now = max(self.now, self.raft(name).deadline)
            self[name].step(Tick(self.now))
            self[name].end_turn()
            self.settle()
        self.now = end

    def connect(self, a: str, b: str) -> None:
        self[a].step(PeerUp(self.now, b))
        self[b].step(PeerUp(self.now, a))
        self[a].end_turn()
        self[b].end_turn()

    def lose(self, name: str, lost: str, *, hard: bool) -> None:
        self[name].step(PeerLost(self.now, lost, hard))
        self[name].end_turn()

    def history_of(self, name: str) -> list[Packet]:
        """All that this node ever sent."""
        return [
            (name, effect.peer, effect.message)
            for who, effect in self.history
            if who == name and isinstance(effect, fx.Send)
        ]

    def leaders(self) -> list[str]:
        return [name for name in self.names if self.raft(name).role is Role.LEADER]
