"""Scenario scripts: commands above, expected trace below, both readable by a stranger.

A file holds blocks. A block is one command, a line of four dashes, what the group did, an empty line:

    tick n0
    ----
    n0 PRE_CANDIDATE term=0: no leader is heard
    n0 -> n1 PreVote term=1 last=0/0

`last=T/I`, `prev=T/I` and `[T/I,...]` name entries by term and index. A line that repeats one of its block is left out.

Commands:
    group n0=1,1,2 n1=1@5 n2=    who is in the group, the terms of the entries each finds in its log, the term it saved;
                                 with the word `sync`: synced flush
    tick NODE                    go on to the node's deadline and let its timer fire
    deliver [FROM] [TO]          deliver what is under way now (once), optionally only from or to a node; `*` = any
    drop [FROM] [TO]             lose it instead
    settle                       deliver until nothing is under way
    run SECONDS                  let time pass for everybody
    propose NODE [COUNT]         propose entries at a leader
    cut NODE... / heal           isolate nodes together / end all cuts
    lose NODE PEER               NODE sees the connection to PEER refused
    transfer NODE TARGET         ask for a leadership transfer
    restart NODE                 with log and hard state only
    logs                         show every node's log as terms, and its commit index

`python -m tests.scenarios.script --rewrite` writes the present traces into the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dledger.core import effects as fx
from dledger.core import messages as msg
from dledger.core.config import RaftConfig
from dledger.core.events import Transfer
from dledger.core.types import HardState
from tests.paper.harness import Group, Packet, make_log

FOLDER = Path(__file__).parent


def show(message: msg.Message) -> str:
    name = type(message).__name__
    match message:
        case msg.PreVote() | msg.Vote():
            ticket = " by order" if message.ticket else ""
            return f"{name} term={message.term} last={message.last_term}/{message.last_index}{ticket}"
        case msg.PreVoteReply():
            why = "yes" if message.granted else "no, I hear a leader" if message.has_leader else "no"
            return f"{name} term={message.term} {why}"
        case msg.VoteReply():
            return f"{name} term={message.term} {'yes' if message.granted else 'no'}"
        case msg.Append():
            entries = ",".join(f"{entry.term}/{entry.index}" for entry in message.entries)
            return (
                f"{name} term={message.term} prev={message.prev_term}/{message.prev_index} commit={message.commit}"
                f" [{entries}]"
            )
        case msg.AppendReply():
            if message.ok:
                return f"{name} term={message.term} written={message.written} durable={message.durable}"
            return f"{name} term={message.term} refused, hint {message.hint_term}/{message.hint_index}"
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
                    entries = ",".join(f"{entry.term}/{entry.index}" for entry in effect.entries)
                    self._say(f"{name} appends {entries}")
                case fx.SaveHardState():
                    self._say(f"{name} saves term={effect.term} vote={effect.vote or '-'}")
                case fx.TransferEnded():
                    self._say(f"{name} ends the transfer to {effect.target}: {'done' if effect.done else 'failed'}")
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
        for word in words:
            name, _, disk = word.partition("=")
            if name != "sync":
                terms, _, term = disk.partition("@")
                logs[name] = make_log(*(int(one) for one in terms.split(",") if one))
                states[name] = HardState(int(term or 0))
        self.group = Group(len(logs), logs=logs, hard_states=states, config=RaftConfig(sync="sync" in words))

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

    def _propose(self, name: str, count: str = "1") -> None:
        for _ in range(int(count)):
            self.group[name].propose()

    def _cut(self, *names: str) -> None:
        self.group.isolate(*names)

    def _heal(self) -> None:
        self.group.heal()

    def _lose(self, name: str, peer: str) -> None:
        self.group.lose(name, peer, hard=True)

    def _transfer(self, name: str, target: str) -> None:
        self.group[name].step(Transfer(self.group.now, target))

    def _restart(self, name: str) -> None:
        self.group[name].boot()

    def _logs(self) -> None:
        for name, member in self.group.members.items():
            terms = ",".join(str(entry.term) for entry in member.log)
            self._say(f"{name} [{terms}] commit={member.raft.commit_index}")


def files() -> list[Path]:
    return sorted(FOLDER.glob("*.txt"))


def main() -> None:
    if sys.argv[1:] != ["--rewrite"]:
        raise SystemExit("usage: python -m tests.scenarios.script --rewrite")
    for path in files():
        path.write_text(Script().play(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
