"""Scenario scripts: commands above, expected trace below, both readable by a stranger.

A file holds blocks. A block is one command, a line of four dashes, what the group did, an empty line:

    tick n0
    ----
    n0 PRE_CANDIDATE term=0: no leader is heard
    n0 -> n1 PreVote term=1 last=0/0

`last=T/I`, `prev=T/I` and `[T/I,...]` name entries by term and index; `T/I+` is one that changes the members. A line
that repeats one of its block is left out.

Commands:
    group n0=1,1,2 n1=1@5 n2=    who is in the group, the terms of the entries each finds in its log, the term it saved;
                                 with the word `sync`: synced flush; `prefer=n2`: n2 should lead; `near=BYTES`: who is
                                 further behind gets segments, of a third of that; nodes behind the word `later` run but
                                 are no members yet
    elect NODE                   let it win an election, as election.txt shows it
    tick NODE                    go on to the node's deadline and let its timer fire
    deliver [FROM] [TO]          deliver what is under way now (once), optionally only from or to a node; `*` = any
    drop [FROM] [TO]             lose it instead
    settle                       deliver until nothing is under way
    run SECONDS                  let time pass for everybody
    propose NODE [COUNT [BYTES]] propose entries at a leader
    cut NODE... / heal           isolate nodes together / end all cuts
    lose NODE PEER               NODE sees the connection to PEER refused
    join NODE PEER               a connection between the two stands again
    transfer NODE TARGET         ask for a leadership transfer
    add / promote / remove NODE MEMBER    propose at a leader: a new learner, a learner to vote, a member to go
    read NODE TOKEN              ask for a read by index
    disk NODE bad|good           its disk stalls, or works again
    trim NODE INDEX              its log is forgotten up to INDEX, as by retention
    install NODE PEER INDEX      NODE has fetched PEER's closed segments up to INDEX, and starts with them
    restart NODE                 with log and hard state only
    power NODE                   as after a power loss: it may have forgotten entries
    blank NODE                   with an empty disk
    accept NODE                  the operator accepts what a power loss may have taken
    logs                         show every node's log as terms, and its commit index

`pytest tests/scenarios --rewrite` writes the present traces into the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attrs import evolve

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import AcceptLoss, DiskState, Transfer
from dledger.core.log import MemoryLog
from dledger.core.membership import AddLearner, Change, Members, Promote, Remove
from dledger.core.types import Entry, EntryType, HardState, Role
from tests.paper.harness import Group, Packet, make_log

FOLDER = Path(__file__).parent


def show_entries(entries: Iterable[Entry]) -> str:
    return ",".join(f"{entry.term}/{entry.index}{'+' * (entry.type == EntryType.CONFIG)}" for entry in entries)


def show_members(members: Members) -> str:
    learners = f", learning {' '.join(members.learners)}" if members.learners else ""
    return f"{' '.join(members.voters)}{learners}"


def show(message: msg.Message) -> str:
    name = type(message).__name__
    match message:
        case msg.PreVote() | msg.Vote():
            ticket = " by order" if message.ticket else ""
            return f"{name} term={message.term} last={message.last_term}/{message.last_index}{ticket}"
        case msg.PreVoteReply():
            why = "yes" if message.granted else "no, I hear a leader" if message.has_leader else "no"
            if message.removed:
                why += "; you are no voter"
            if message.recovering:
                why += ", but I may have forgotten entries"
            return f"{name} term={message.term} {why}"
        case msg.VoteReply():
            doubt = ", but I may have forgotten entries" if message.recovering else ""
            return f"{name} term={message.term} {'yes' if message.granted else 'no'}{doubt}"
        case msg.Append():
            return (
                f"{name} term={message.term} prev={message.prev_term}/{message.prev_index} commit={message.commit}"
                f" [{show_entries(message.entries)}]"
            )
        case msg.AppendReply():
            disk = "" if message.disk_ok else ", bad disk"
            if message.ok:
                return f"{name} term={message.term} written={message.written} durable={message.durable}{disk}"
            return f"{name} term={message.term} refused, hint {message.hint_term}/{message.hint_index}{disk}"
        case msg.SegmentsOffer():
            return f"{name} term={message.term} from={message.first_index} commit={message.commit}"
        case msg.TimeoutNow():
            return f"{name} term={message.term}"


class Script:
    """Plays one scenario file."""

    def __init__(self) -> None:
        self.group = Group()
        self._out: list[str] = []

    def play(self, text: str) -> str:
        """The text again, with what really happened below each command."""
        result: list[str] = []
        block: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line.startswith("#"):
                result.append(line)
            elif line.strip():
                block.append(line)
            elif block:
                command = block[0]
                block = []
                self._out = []
                self._do(*command.split())
                result += [command, "----", *(self._out or ["ok"]), ""]
            elif result and result[-1]:
                result.append("")
        return "\n".join(result).rstrip("\n") + "\n"

    def _do(self, verb: str, *words: str) -> None:
        getattr(self, f"_{verb}")(*words)
        if verb != "group":
            self._collect()

    def _collect(self) -> None:
        """What happened since the last look, in order; a line that would repeat one of the same block is left out."""
        for name, effect in self.group.history:
            match effect:
                case fx.RoleChanged():
                    leader = f" leader={effect.leader}" if effect.leader else ""
                    self._say(f"{name} {effect.role.name} term={effect.term}{leader}: {effect.reason}")
                case fx.Commit():
                    self._say(f"{name} commits {effect.index}")
                case fx.Cut():
                    self._say(f"{name} cuts from {effect.from_index}")
                case fx.Append():
                    self._say(f"{name} appends {show_entries(effect.entries)}")
                case fx.SaveHardState():
                    self._say(f"{name} saves term={effect.term} vote={effect.vote or '-'}")
                case fx.TransferEnded():
                    self._say(f"{name} ends the transfer to {effect.target}: {'done' if effect.done else 'failed'}")
                case fx.MembersChanged():
                    final = ", for good" if effect.is_committed else ""
                    self._say(f"{name} counts {show_members(effect.members)} (entry {effect.index}){final}")
                case fx.ReadReady():
                    self._say(f"{name} answers read {effect.token}: index {effect.index}")
                case fx.ReadRefused():
                    self._say(f"{name} refuses read {effect.token}: {effect.reason}")
                case fx.NeedSegments():
                    self._say(f"{name} needs {effect.leader}'s segments before entry {effect.first_index}")
                case fx.Recovered():
                    self._say(f"{name} is recovered in term {effect.term}")
                case fx.Fatal() | fx.Refused():
                    self._say(f"{name} {type(effect).__name__}: {effect.reason}")
                case fx.Send():
                    self._say(f"{name} -> {effect.peer} {show(effect.message)}")
                case _:
                    pass
        self.group.history.clear()

    def _say(self, line: str) -> None:
        if line not in self._out:
            self._out.append(line)

    def _group(self, *words: str) -> None:
        logs, states = {}, {}
        config = RaftConfig()
        voters = None
        for word in words:
            name, _, disk = word.partition("=")
            match name:
                case "sync":
                    config = evolve(config, sync=True)
                case "prefer":
                    config = evolve(config, priorities={disk: 1})
                case "near":
                    config = evolve(config, segments_behind_bytes=int(disk), segment_bytes=int(disk) // 3)
                case "later":
                    voters = len(logs)
                case _:
                    terms, _, term = disk.partition("@")
                    logs[name] = make_log(*(int(one) for one in terms.split(",") if one))
                    states[name] = HardState(int(term or 0))
        self.group = Group(len(logs), logs=logs, hard_states=states, config=config, voters=voters)

    def _elect(self, name: str) -> None:
        self.group.elect(name)
        self.group.history.clear()
        self._say(f"{name} leads term {self.group.raft(name).term}")

    def _tick(self, name: str) -> None:
        self.group.tick(name)

    def _chosen(self, source: str, target: str) -> list[Packet]:
        return self.group.take(lambda packet: source in ("*", packet[0]) and target in ("*", packet[1]))

    def _deliver(self, source: str = "*", target: str = "*") -> None:
        self.group.deliver(self._chosen(source, target))

    def _drop(self, source: str = "*", target: str = "*") -> None:
        for sender, receiver, message in self._chosen(source, target):
            self._say(f"lost: {sender} -> {receiver} {show(message)}")

    def _settle(self) -> None:
        self.group.settle()

    def _run(self, seconds: str) -> None:
        self.group.run(float(seconds))

    def _propose(self, name: str, count: str = "1", nbytes: str = "1") -> None:
        for _ in range(int(count)):
            self.group[name].propose(bytes(int(nbytes)))

    def _cut(self, *names: str) -> None:
        self.group.isolate(*names)

    def _heal(self) -> None:
        self.group.heal()

    def _lose(self, name: str, peer: str) -> None:
        self.group.lose(name, peer, hard=True)

    def _transfer(self, name: str, target: str) -> None:
        self.group[name].step(Transfer(self.group.now, target))

    def _join(self, name: str, peer: str) -> None:
        self.group.connect(name, peer)

    def _change(self, name: str, change: Change) -> None:
        self.group[name].change(change)

    def _add(self, name: str, member: str) -> None:
        self._change(name, AddLearner(member, (member, 10_911)))

    def _promote(self, name: str, member: str) -> None:
        self._change(name, Promote(member))

    def _remove(self, name: str, member: str) -> None:
        self._change(name, Remove(member))

    def _read(self, name: str, token: str) -> None:
        self.group[name].read(int(token))

    def _disk(self, name: str, state: str) -> None:
        self.group[name].step(DiskState(self.group.now, state == "good"))

    def _trim(self, name: str, index: str) -> None:
        self.group[name].log.trim(int(index))

    def _install(self, name: str, peer: str, index: str) -> None:
        log = MemoryLog(entry for entry in self.group[peer].log if entry.index <= int(index))
        self.group[name].log = log
        self.group[name].boot(commit_index=log.last_index)

    def _restart(self, name: str) -> None:
        self.group[name].boot()

    def _power(self, name: str) -> None:
        self.group[name].boot(recovering=True)

    def _blank(self, name: str) -> None:
        self.group[name].log = MemoryLog()
        self.group[name].saved = HardState()
        self.group[name].boot(recovering=True)

    def _accept(self, name: str) -> None:
        self.group[name].step(AcceptLoss(self.group.now))

    def _logs(self) -> None:
        for name, member in self.group.members.items():
            terms = ",".join(str(entry.term) for entry in member.log)
            trimmed = f"{member.log.first_index - 1} trimmed, then " if member.log.first_index > 1 else ""
            leads = ", leads" if member.raft.role is Role.LEADER else ""
            self._say(f"{name} {trimmed}[{terms}] commit={member.raft.commit_index}{leads}")


def files() -> list[Path]:
    return sorted(FOLDER.glob("*.txt"))
