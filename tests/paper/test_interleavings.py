"""Whatever the order of events, nothing that was promised is taken back: cores of three to five nodes, driven by bytes
that hypothesis draws and shortens.

Two bytes are one thing that happens: a message of one link is delivered or its connection breaks, a timer
fires, a disk comes to an end of its work, a node is killed or loses its power, somebody proposes, reads, hands over,
adds or removes. `Watch` checks every node after every step; here is checked what takes more than one node (raft.md
6.1). In the end all faults are healed, and the group must come to rest with one leader and equal logs.
"""

from __future__ import annotations

import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dledger.core import effects as fx
from dledger.core.config import RaftConfig
from dledger.core.errors import LocalError
from dledger.core.events import Durable, ReadIndex, Tick, Transfer
from dledger.core.membership import AddLearner, Change, Promote, Remove
from dledger.core.types import Role
from tests.paper.harness import Group, Member

CONFIG = RaftConfig(
    segment_bytes=1 << 20, message_bytes_max=400, window_messages_max=3, window_bytes_max=1000, reads_waiting_max=5
)
TAKE_OVER_SECONDS = 10
"""Several elections, each of which may be split."""


class Play:
    """A group, and what it has promised so far."""

    def __init__(self, size: int, *, learners: int, sync: bool) -> None:
        self.group = Group(size, voters=size - learners, config=evolve(CONFIG, sync=sync))
        self.committed: dict[int, int] = {}
        self.leaders: dict[int, str] = {}
        self.checked = dict.fromkeys(self.group.names, 0)
        self.read_floor: dict[int, int] = {}
        self.answered = 0
        self.lost_power: set[str] = set()

    def run(self, steps: bytes) -> None:
        actions = (
            *(self.deliver,) * 8,
            *(self.tick,) * 3,
            *(self.propose,) * 2,
            self.tick_another,
            self.lose,
            self.work,
            self.stall,
            self.read,
            self.change,
            self.hand_over,
            self.kill,
            self.lose_power,
        )
        for action, choice in zip(steps[::2], steps[1::2], strict=False):
            actions[action % len(actions)](choice)
            self.check()

    # What happens

    def member(self, choice: int) -> Member:
        return self.group[self.group.names[choice % len(self.group.names)]]

    def leader(self, choice: int) -> Member | None:
        leaders = self.group.leaders()
        return self.group[leaders[choice % len(leaders)]] if leaders else None

    def deliver(self, choice: int) -> None:
        """The oldest message of one link; connections keep order."""
        links = list(dict.fromkeys(packet[:2] for packet in self.group.wire))
        if links:
            link = links[choice % len(links)]
            packet = next(packet for packet in self.group.wire if packet[:2] == link)
            self.group.wire.remove(packet)
            self.group.deliver([packet])

    def lose(self, choice: int) -> None:
        """A connection breaks, with all that is under way on it, and stands again."""
        one = self.member(choice)
        self.part(one.name, self.member(choice // 8 + 1 + choice).name, hard=bool(choice & 64))

    def part(self, a: str, b: str, *, hard: bool) -> None:
        if a != b:
            self.group.take(lambda packet: {packet[0], packet[1]} == {a, b})
            self.group.lose(a, b, hard=hard)
            self.group.lose(b, a, hard=hard)
            self.group.connect(a, b)

    def tick(self, choice: int) -> None:
        """Whose timer is next, on time or a little later."""
        group = self.group
        self.fire(min(group.names, key=lambda name: group.raft(name).deadline), choice % 4 * 0.2)

    def tick_another(self, choice: int) -> None:
        self.fire(self.member(choice).name, 0.0)

    def fire(self, name: str, late: float) -> None:
        group = self.group
        group.now = max(group.now, group.raft(name).deadline + late)
        group[name].step(Tick(group.now))
        group[name].end_turn()

    def work(self, choice: int) -> None:
        """A disk comes to the end of what it was given, and goes on at once from now on."""
        member = self.member(choice)
        member.saves = member.writes = member.syncs = True
        member.complete_saves()
        member.complete_writes()
        written = member.raft.log.written_index
        term = member.log.term_at(written)
        if member.raft.log.durable_index < written and term is not None:
            member.step(Durable(self.group.now, written, term))
        member.end_turn()

    def stall(self, choice: int) -> None:
        member = self.member(choice)
        member.saves, member.writes, member.syncs = bool(choice & 8), bool(choice & 16), bool(choice & 32)

    def propose(self, choice: int) -> None:
        leader = self.leader(choice)
        if leader is not None and leader.raft.noop_index:
            leader.propose(bytes(choice))

    def read(self, choice: int) -> None:
        """Whoever is asked may not answer with less than was committed anywhere at that moment (raft.md 6.1, 12)."""
        token = len(self.read_floor) + 1
        self.read_floor[token] = max(self.committed, default=0)
        member = self.leader(choice) or self.member(choice)
        member.step(ReadIndex(self.group.now, token))
        member.end_turn()

    def change(self, choice: int) -> None:
        leader = self.leader(choice)
        if leader is None:
            return
        node = self.member(choice // 4).name
        changes: tuple[Change, ...] = (AddLearner(node, ("h", 1)), Promote(node), Remove(node))
        try:
            leader.change(changes[choice % 3])
        except LocalError:
            pass  # it makes no sense for these members

    def hand_over(self, choice: int) -> None:
        leader = self.leader(choice)
        if leader is not None:
            leader.step(Transfer(self.group.now, self.member(choice // 4).name if choice & 1 else None))
            leader.end_turn()

    def kill(self, choice: int) -> None:
        """The process dies: what it had not given to its files is gone."""
        member = self.member(choice)
        self.restart(member, member.raft.log.written_index, recovering=member.name in self.lost_power)

    def lose_power(self, choice: int) -> None:
        """So is what it had not synced. With asynchronous flush the node knows that it may have forgotten something."""
        member = self.member(choice)
        if not self.group.config.sync:
            self.lost_power.add(member.name)
        self.restart(member, member.raft.log.durable_index, recovering=member.name in self.lost_power)

    def restart(self, member: Member, kept: int, *, recovering: bool) -> None:
        if kept < member.log.last_index:
            member.log.cut(kept + 1)
        member.saves = member.writes = member.syncs = True
        commit_index = min(member.raft.commit_index, kept)
        member.boot(recovering=recovering, commit_index=commit_index)
        for other in self.group.names:
            self.part(member.name, other, hard=True)

    # What must hold

    def check(self) -> None:
        group = self.group
        for member in group.members.values():
            raft = member.raft
            assert raft.failed is None, raft.failed
            for index in range(self.checked[member.name] + 1, raft.commit_index + 1):
                crc = member.log.head_crc_at(index)
                assert self.committed.setdefault(index, crc or 0) == crc, f"entry {index} is committed twice"
            self.checked[member.name] = raft.commit_index
            if not raft.recovering:
                self.lost_power.discard(member.name)
            if raft.role is Role.LEADER and raft.term not in self.leaders:
                for index, crc in self.committed.items():
                    assert member.log.head_crc_at(index) == crc, f"leader completeness: {member.name} lacks {index}"
            if raft.role is Role.LEADER:
                assert self.leaders.setdefault(raft.term, member.name) == member.name, f"two lead term {raft.term}"
        for _, effect in group.history[self.answered :]:
            if isinstance(effect, fx.ReadReady):
                assert effect.index >= self.read_floor[effect.token], "a read went back behind what was committed"
        self.answered = len(group.history)

    def check_rest(self) -> None:
        """All is well again: one leader, everything it has committed everywhere (raft.md 6.1, 14)."""
        group = self.group
        for name in group.names:
            self.work(group.names.index(name))
        for a in group.names:
            for b in group.names:
                self.part(a, b, hard=False)
        group.settle()
        end = group.now + TAKE_OVER_SECONDS
        while group.now < end and not self.is_at_rest():
            group.run(CONFIG.election_timeout_min)
            self.check()
        assert self.is_at_rest(), [(name, group.raft(name).role.name, group.raft(name).term) for name in group.names]

    def is_at_rest(self) -> bool:
        led = [self.group.raft(name) for name in self.group.leaders()]
        newest = max(led, key=lambda raft: raft.term, default=None)
        if newest is None or newest.commit_index < newest.last_index:
            return False
        members = [self.group.raft(name) for name in newest.members.all]
        return all(
            (raft.commit_index, raft.log.last_crc) == (newest.commit_index, newest.log.last_crc) for raft in members
        )


def play(size: int, learners: int, sync: bool, steps: bytes) -> None:
    one = Play(size, learners=learners, sync=sync)
    one.run(steps)
    one.check_rest()


@given(st.integers(3, 5), st.integers(0, 1), st.booleans(), st.binary(min_size=200, max_size=240))
@settings(max_examples=10, deadline=None)
def test_6_1_no_interleaving_breaks_a_promise(size: int, learners: int, sync: bool, steps: bytes) -> None:
    play(size, learners, sync, steps)


@pytest.mark.slow
@given(st.integers(3, 5), st.integers(0, 2), st.booleans(), st.binary(min_size=500, max_size=3000))
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_6_1_nor_do_many_long_ones(size: int, learners: int, sync: bool, steps: bytes) -> None:
    play(size, learners, sync, steps)
