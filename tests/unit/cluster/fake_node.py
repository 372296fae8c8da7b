"""Stands in for `quorate serve`: says what a node says, and does what a file in the data folder tells it.

DATA/leader holds "n1 2": that node leads in that term. DATA/n1.exit holds words and an exit code to end with at once.
DATA/n1.filled, where there, has n1 say that it has been filled. While DATA/n1.late is there, n1 is not ready: it works
where that says "work", else it waits. While DATA/n1.loading is there, n1 has not even its signal handlers.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    arguments = sys.argv[1:]
    name, data = arguments[1], Path(arguments[3])
    events = int(arguments[arguments.index("--event-fd") + 1])

    def say(**event: object) -> None:
        os.write(events, json.dumps(event).encode() + b"\n")

    with (data / f"{name}.starts").open("a") as starts:
        starts.write(" ".join(arguments) + "\n")
    order = data / f"{name}.exit"
    if order.exists():
        words, code = order.read_text().rsplit(" ", 1)
        sys.stderr.write(words + "\n")
        sys.exit(int(code))
    while (data / f"{name}.loading").exists():
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    (data / name / "raft").mkdir(parents=True, exist_ok=True)
    (data / name / "raft" / "format.json").touch()
    late = data / f"{name}.late"
    is_at_work = late.exists() and late.read_text() == "work"
    while late.exists():
        if not is_at_work:
            time.sleep(0.05)
    say(event="ready")
    is_filled = "--join" not in arguments
    told = ""
    parent = os.getppid()
    while os.getppid() == parent:
        leader = (data / "leader").read_text()
        if leader and leader != told and not name.startswith("ns"):
            told = leader
            who, term = leader.split()
            role = "leader" if who == name else "follower"
            say(event="role", role=role, term=int(term), leader=who, ready=who == name)
        if not is_filled and (data / f"{name}.filled").exists():
            is_filled = True
            say(event="filled")
        time.sleep(0.005)


main()
