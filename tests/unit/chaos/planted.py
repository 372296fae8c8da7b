"""Wrong cores, disks and processes, one bug each. The simulator must find every one: that makes its silence worth
something."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import msgspec

from chaos.sim.disk import Gap, SimDisk, SimLog
from chaos.sim.engine import Play
from chaos.sim.node import SimNode
from chaos.sim.plan import draw_plan
from chaos.sim.run import run_plan, run_scenario
from chaos.sim.store_disk import StoreDisk
from chaos.sim.world import Build
from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.log import MemoryLog
from dledger.core.members_in_force import MembersInForce, config_entries
from dledger.core.outbox import Outbox
from dledger.core.quorum import majority
from dledger.core.raft import Raft
from dledger.core.raft_log import RaftLog
from dledger.core.replication import Replication
from dledger.core.types import Entry, HardState, Role


class OutboxThatHoldsNothing(Outbox):
    __slots__ = ()

    def send(self, peer: str, message: msg.Message) -> None:
        self.effects.append(fx.Send(peer, message))


class MessagesNotHeld(Raft):
    """Votes leave before term and vote are saved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outbox.__class__ = OutboxThatHoldsNothing


class VoteForgotten(Raft):
    """A restart forgets whom it voted for (pysyncobj#201)."""

    def __init__(self, node_id: str, voters: Any, config: Any, rng: Any, hard_state: HardState, *rest: Any, **k: Any):
        super().__init__(node_id, voters, config, rng, HardState(hard_state.term, None), *rest, **k)


class SecondVote(Raft):
    """A follower votes again in the same term."""

    def _receive_vote(self, now: float, peer: str, message: msg.Vote) -> None:
        if message.term == self.term and self.role is Role.FOLLOWER:
            self.vote = None
        super()._receive_vote(now, peer, message)


class LogNotCompared(Raft):
    """Anybody may win (Raft 5.4.1)."""

    def _accepts_log(self, message: msg.PreVote | msg.Vote) -> bool:
        return True


class OldTermsCounted(Raft):
    """Entries of older terms are committed by counting replicas (Raft 5.4.2, figure 8)."""

    def _advance_leader_commit(self) -> None:
        kept, self.noop_index = self.noop_index, 1
        try:
            super()._advance_leader_commit()
        finally:
            self.noop_index = kept


class CommitBeforeQuorum(Raft):
    """The leader commits what it alone has written."""

    def _advance_leader_commit(self) -> None:
        log = self.log
        if 0 < self.noop_index <= log.written_index and log.written_index > log.commit_index:
            log.commit_index = log.written_index
            self._outbox.effects.append(fx.Commit(log.commit_index))


class AcknowledgedBeforeWritten(Raft):
    """A follower reports what it has only received."""

    def _end_follower_turn(self) -> None:
        log = self.log
        marks = log.written_index, log.durable_index
        log.written_index = log.durable_index = log.last_index
        try:
            super()._end_follower_turn()
        finally:
            log.written_index, log.durable_index = marks


class LeaderCountsItselfAtTheCall(Raft):
    """The leader's own mark moves with the append call (etcd#14370)."""

    def _propose(self, entries: Any) -> None:
        super()._propose(entries)
        if self.role is Role.LEADER:
            self.log.written_index = self.log.durable_index = self.log.last_index
            self._advance_leader_commit()


class EveryAppendCuts(Raft):
    """Whatever stands behind the predecessor is cut, conflict or not (PySyncObj)."""

    def _take(self, entries: Any) -> None:
        log = self.log
        if entries[0].index <= log.last_index:
            kept, log.commit_index = log.commit_index, 0
            self._cut(entries[0].index)
            log.commit_index = min(kept, log.last_index)
        self._append(entries, config_entries(entries))


class LogThatHintsTooHigh(RaftLog):
    __slots__ = ()

    def last_not_above(self, index: int, term: int) -> tuple[int, int]:
        return min(index, self.last_index), term


class HintTooHigh(Raft):
    """A rejection names an entry that cannot agree."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log.__class__ = LogThatHintsTooHigh


class ReplicationThatNeverStepsBack(Replication):
    __slots__ = ()

    def step_back(self, progress: Any, message: msg.AppendReply) -> None:
        return


class RejectionIgnored(Raft):
    """The leader never steps back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._replication.__class__ = ReplicationThatNeverStepsBack


class OldSequenceAnswered(Raft):
    """An append of an older term is answered with its sequence: found by this simulator in our own first version."""

    def _receive_append(self, now: float, peer: str, message: msg.Append) -> None:
        if message.term < self.term:
            self._outbox.send(peer, msg.AppendReply(self.term, message.seq, False, 0, 0))
        else:
            super()._receive_append(now, peer, message)


class DurableBeforeSync(Raft):
    """A follower reports as durable what is only in its page cache (nats-server#7564)."""

    def _end_follower_turn(self) -> None:
        mark, self.log.durable_index = self.log.durable_index, self.log.written_index
        try:
            super()._end_follower_turn()
        finally:
            self.log.durable_index = mark


class StaleReadServed(Raft):
    """A leader vouches for a read without asking whether it still leads (dissertation 6.4)."""

    def _read_index(self, token: int) -> None:
        if self.role is Role.LEADER:
            self._outbox.effects.append(fx.ReadReady(token, self.commit_index))
        else:
            super()._read_index(token)


class ReadBeforeNoop(Raft):
    """A new leader vouches for reads before an entry of its term is committed (Raft 8)."""

    def _begin_read_round(self, now: float) -> None:
        kept, self.noop_index = self.noop_index, min(1, self.commit_index)
        try:
            super()._begin_read_round(now)
        finally:
            self.noop_index = kept


class MembersThatRefuseNothing(MembersInForce):
    __slots__ = ()

    def refusal(self, *args: Any, **kwargs: Any) -> str | None:
        return None


class ChangesNotRefused(Raft):
    """Changes of members are taken at any time, any number at once (raft-dev 2015)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_force.__class__ = MembersThatRefuseNothing


class LearnerCounted(Raft):
    """What a learner has written counts for a commit."""

    def _advance_leader_commit(self) -> None:
        sync = self.config.sync
        log = self.log
        marks = [progress.durable if sync else progress.written for progress in self.progress.values()]
        marks.append(log.durable_index if sync else log.written_index)
        mark = sorted(marks, reverse=True)[majority(len(self.members.voters)) - 1]
        commit = min(mark, log.written_index)
        if commit > log.commit_index and 0 < self.noop_index <= commit:
            log.commit_index = commit
            self._outbox.effects.append(fx.Commit(commit))


class OutboxThatHidesRecovering(Outbox):
    __slots__ = ()

    def send(self, peer: str, message: msg.Message) -> None:
        if isinstance(message, msg.PreVoteReply | msg.VoteReply):
            message = msgspec.structs.replace(message, recovering=False)
        super().send(peer, message)


class RecoveringVoteCounts(Raft):
    """A voter that may have forgotten what it acknowledged counts like any other (nats-server#7567)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outbox.__class__ = OutboxThatHidesRecovering


class VoteNotSynced(SimDisk):
    """Term and vote are written and not synced: a power loss takes them back."""

    _before: HardState | None = None

    def _saved(self, incarnation: int, state: HardState) -> None:
        self._before = self.saved
        super()._saved(incarnation, state)

    def lose_power(self) -> None:
        if self._before is not None:
            self.saved, self._before = self._before, None
        super().lose_power()


class SecondSyncTrusted(SimDisk):
    """A failed sync is tried again, and the second one says that all is well (cockroach#37102, ATC'20)."""

    def _fail(self) -> int:
        if self._fails_at == "write":
            return super()._fail()
        assert self._sync is not None
        self._fails_at = None
        self.not_on_platter.update(range(self.durable + 1, self._sync.index + 1))
        self._sync_done(self._node.incarnation, self._sync)
        return 0

    @property
    def is_impaired(self) -> bool:
        return self.recovering or self.has_failed or bool(self.log.bad)


class CutBelowEvidence(SimDisk):
    """Whatever does not read is a torn tail (nats-server#7549, FAST'18)."""

    def evidence(self) -> int:
        return 0


class EvidenceLostOnTheWay(StoreDisk):
    """The store's own recovery is told neither the durable mark nor anything by side rows."""

    def judge(self) -> tuple[list[Gap], int, bool]:
        self.mark = self.rows = 0
        return super().judge()


class PageCacheTrusted(SimDisk):
    """After a failed sync the next start reads from pages that the platter does not hold."""

    def recover(self) -> list[Gap]:
        if self.has_failed:
            self.has_failed = False
            self.not_on_platter.update(range(self.durable + 1, self.written + 1))
        return super().recover()

    @property
    def is_impaired(self) -> bool:
        return self.recovering or bool(self.log.bad)


class RecoveringForgotten(SimDisk):
    """A node killed while recovering believes to be whole at its next start."""

    def process_ended(self) -> None:
        super().process_ended()
        self.recovering = False


class BlankVotes(SimDisk):
    """An empty folder under an old name votes like a member that has lost nothing (nats-server#2792)."""

    def wipe(self) -> None:
        super().wipe()
        self.recovering = False


class InstallForgetsVote(SimDisk):
    """A transfer of segments brings a fresh folder, term and vote gone."""

    def installed(self, source: SimDisk) -> None:
        super().installed(source)
        self.saved = HardState()


class UncheckedLog(SimLog):
    """Reads do not look at checksums."""

    def entries(self, from_index: int, max_bytes: int) -> list[Entry]:
        return [
            msgspec.structs.replace(entry, frame=entry.frame[:-1] + bytes([entry.frame[-1] ^ 1]))
            if entry.index in self.bad
            else entry
            for entry in MemoryLog.entries(self, from_index, max_bytes)
        ]


class DamageServed(SimDisk):
    """A damaged entry goes out to a follower."""

    log_class = UncheckedLog


class RepairNotVerified(SimNode):
    """A repair takes whatever a peer has at that index."""

    def _fill(self, gap: Gap) -> bool:
        for peer in self._peers_heard():
            entries = [peer.log.peek(index) for index in range(gap.first, gap.last + 1)]
            if all(entry is not None for entry in entries):
                self.log.put(entry for entry in entries if entry is not None)
                return True
        return False


class RepairGivesUp(SimNode):
    """Silence is taken for "never had it" (nats-server#7549, #7556)."""

    def _was_never_committed(self, gap: Gap) -> bool:
        return True


Bug = type[Raft] | type[SimDisk] | type[SimNode]


def build_of(bug: Bug) -> Build:
    """A world with this bug in the place of the right part."""
    if issubclass(bug, Raft):
        return Build(raft=bug)
    if issubclass(bug, SimDisk):
        return Build(disk=bug)
    return Build(node=bug)


def play_with(bug: Bug) -> Play:
    """Engine core with this bug planted."""
    return partial(run_scenario, build=build_of(bug))


PLANTED: dict[Bug, int] = {
    MessagesNotHeld: 0,
    VoteForgotten: 0,
    SecondVote: 13,
    LogNotCompared: 0,
    OldTermsCounted: 0,
    CommitBeforeQuorum: 0,
    AcknowledgedBeforeWritten: 0,
    LeaderCountsItselfAtTheCall: 0,
    EveryAppendCuts: 2,
    HintTooHigh: 2,
    RejectionIgnored: 0,
    OldSequenceAnswered: 39,
    DurableBeforeSync: 0,
    StaleReadServed: 0,
    ReadBeforeNoop: 2,
    ChangesNotRefused: 0,
    LearnerCounted: 2,
    RecoveringVoteCounts: 1,
    VoteNotSynced: 0,
    SecondSyncTrusted: 0,
    CutBelowEvidence: 0,
    EvidenceLostOnTheWay: 0,
    PageCacheTrusted: 0,
    RecoveringForgotten: 20,
    BlankVotes: 1,
    InstallForgetsVote: 2,
    DamageServed: 79,
    RepairNotVerified: 1,
    RepairGivesUp: 0,
}
"""The bugs, and the first seed that finds each. `python -m tests.unit.chaos.planted` looks for them anew."""


UNDER: dict[Bug, dict[str, Any]] = {
    ChangesNotRefused: {
        "nodes": 5,
        "spares": 0,
        "kinds": ("members", "partition", "crash", "transfer"),
        "fault_interval": 0.5,
        "proposals_per_second": 40.0,
    },
    RepairNotVerified: {
        "sync": True,
        "kinds": ("flip", "partition", "power-loss", "crash"),
        "fault_interval": 0.5,
        "proposals_per_second": 40.0,
    },
}
"""Bugs that need much to come together, and the plan that raises the chance of it: two changes of members around a
change of leader; turned bits in what an isolated leader has written and nobody else."""


def runs_well(bug: Bug, seed: int) -> bool:
    """Whether every promise holds with this bug planted, under the plan that suits it."""
    plan = attrs.evolve(draw_plan(seed), **UNDER.get(bug, {}))
    return run_plan(plan, build_of(bug)).ok


def first_seed(bug: Bug, seeds: int) -> int | None:
    """The first seed that breaks a promise with this bug planted."""
    return next((seed for seed in range(seeds) if not runs_well(bug, seed)), None)


def main() -> None:
    for bug in PLANTED:
        print(f"    {bug.__name__}: {first_seed(bug, 400)},", flush=True)


if __name__ == "__main__":
    main()
