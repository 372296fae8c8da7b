"""A state machine for tests, and helpers that run groups over loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from dledger.config import GroupConfig
from dledger.core.types import Role
from dledger.driver import Driver
from dledger.errors import NotLeader
from dledger.group import EntryView, RaftGroup
from runtime.logs import get_logger
from runtime.model import Env, Listener
from runtime.testing import test_env, wait_until

RECORD_BYTES = 32


class ToyMachine:
    """Keeps records of 32 bytes in a list; pending ones beside. Waiters are callables told how it ended."""

    def __init__(self) -> None:
        self.applied: list[bytes] = []
        self.pending: list[bytes] = []
        self.entries: list[tuple[int, int, int]] = []
        self.ops: list[bytes] = []
        self.roles: list[tuple[Role, int, str | None, bool]] = []
        self.messages: list[tuple[str, bytes]] = []
        self.turns = 0
        self.restored: list[bytes | None] = []
        self.begins: list[tuple[int, int]] = []
        self.trims: list[int] = []
        self.floor = 1 << 62
        self.checkpoints_wanted = 0
        self.stops = 0
        self.covers = 0
        self.group: RaftGroup | None = None
        self.busy: Callable[[], None] | None = None

    def stage(self, entry: EntryView) -> Any:
        size = entry.count * RECORD_BYTES
        records = [bytes(entry.body[at : at + RECORD_BYTES]) for at in range(0, size, RECORD_BYTES)]
        ops = bytes(entry.body[size:])
        self.pending.extend(records)
        return (records, ops, [])

    def apply(self, index: int, term: int, staged: Any) -> None:
        records, ops, waiters = staged
        assert self.pending[: len(records)] == records
        del self.pending[: len(records)]
        self.applied.extend(records)
        if ops:
            self.ops.append(ops)
        self.entries.append((index, term, len(records)))
        for waiter in waiters:
            waiter("applied")
        waiters.clear()

    def discard(self, staged: Any) -> None:
        records, _, waiters = staged
        if records:
            assert self.pending[-len(records) :] == records
            del self.pending[-len(records) :]
        for waiter in waiters:
            waiter("discarded")
        waiters.clear()

    def orphan(self, staged: Any) -> None:
        for waiter in staged[2]:
            waiter("unknown")
        staged[2].clear()

    def role_changed(self, role: Role, term: int, leader_id: str | None, ready: bool) -> None:
        self.roles.append((role, term, leader_id, ready))

    def app_message(self, peer_id: str, payload: bytes) -> None:
        self.messages.append((peer_id, payload))

    def turn_done(self) -> None:
        self.turns += 1

    def restore(self, checkpoint: bytes | None, *, first_index: int, first_position: int) -> int:
        self.restored.append(checkpoint)
        self.begins.append((first_index, first_position))
        self.applied.clear()
        self.pending.clear()
        self.ops.clear()
        self.trims.clear()
        if checkpoint is None:
            self.covers = 0
            return 0
        self.covers = int.from_bytes(checkpoint[:8], "big")
        body = checkpoint[8:]
        self.applied = [body[at : at + RECORD_BYTES] for at in range(0, len(body), RECORD_BYTES)]
        return self.covers

    def stopped(self) -> None:
        self.stops += 1

    def trim(self, first_position: int) -> None:
        self.trims.append(first_position)

    def trim_floor(self) -> int:
        return self.floor

    def store_time_ms(self, entry: EntryView) -> int | None:
        """Records that begin with 13 digits tell when they were stored."""
        digits = bytes(entry.body[:13])
        return int(digits) if digits.isdigit() else None

    def checkpoint_soon(self) -> None:
        self.checkpoints_wanted += 1

    def checkpoint(self) -> tuple[int, bytes]:
        index = self.entries[-1][0]
        return index, index.to_bytes(8, "big") + b"".join(self.applied)

    def put(self, group: RaftGroup, record: bytes, waiter: Callable[[str], None]) -> int:
        """What a broker does for one message."""
        record = record.ljust(RECORD_BYTES, b".")
        offset = group.reserve(RECORD_BYTES)
        staged = group.open_staged()
        if staged is None:
            staged = ([], b"", [])
            group.set_open_staged(staged)
        group.add_record(record)
        staged[0].append(record)
        staged[2].append(waiter)
        self.pending.append(record)
        return offset


class Node:
    """One member that can be killed and started again on the same address and folder."""

    def __init__(self, cluster: ToyCluster, node_id: str) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.machine = ToyMachine()
        self.group: RaftGroup | None = None
        self.scope: trio.CancelScope | None = None
        self.ended = trio.Event()
        self.error: BaseException | None = None

    @property
    def running(self) -> RaftGroup:
        assert self.group is not None
        return self.group

    @property
    def folder(self) -> Path:
        return self.cluster.folder / self.node_id

    async def run_here(self) -> None:
        """Run the group in the calling task until it is stopped or killed; its errors come out here."""
        group = self._make(None)
        try:
            with trio.CancelScope() as self.scope:
                await group.run()
        finally:
            self.ended.set()

    async def stop(self) -> None:
        """In order: everything is on stable storage afterwards, so damage to any of it leaves evidence."""
        await self.running.stop_gracefully()
        await self.ended.wait()

    async def start(self, listener: Listener | None = None) -> None:
        """Returns once the group serves."""
        await self.cluster.nursery.start(self._run, self._make(listener))

    def _make(self, listener: Listener | None) -> RaftGroup:
        self.machine = ToyMachine()
        self.group = RaftGroup(
            self.cluster.env, self.cluster.config(self.node_id), self.machine, get_logger("toy"), listener=listener
        )
        self.machine.group = self.group
        self.ended = trio.Event()
        self.error = None
        return self.group

    async def _run(self, group: RaftGroup, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as self.scope:
            try:
                await group.run(task_status=task_status)
            except Exception as error:
                self.error = error
                if not self.cluster.is_error_expected:
                    raise
        self.ended.set()

    async def kill(self) -> None:
        assert self.scope is not None
        self.scope.cancel()
        await self.ended.wait()


class ToyCluster:
    """Three groups, or as many as asked for, in one trio run."""

    def __init__(self, env: Env, folder: Path, nursery: trio.Nursery, size: int, **settings: Any) -> None:
        self.env = env
        self.folder = folder
        self.nursery = nursery
        self.settings = settings
        self.peers: dict[str, tuple[str, int]] = {}
        self.nodes = {f"n{number}": Node(self, f"n{number}") for number in range(size)}
        self.is_error_expected = False
        self.node_settings: dict[str, dict[str, Any]] = {}
        """What one node's configuration has otherwise."""

    async def add(self, name: str) -> Node:
        """One more node, blank, that knows the others; none of them knows it yet."""
        listener = await self.env.net.listen("127.0.0.1", 0)
        known = dict(self.peers)
        self.peers = {**self.peers, name: listener.address}
        for other in self.nodes:
            self.node_settings.setdefault(other, {})["peers"] = known
        self.node_settings[name] = {"format_if_empty": False, "join": True}
        node = self.nodes[name] = Node(self, name)
        await node.start(listener)
        return node

    def config(self, node_id: str) -> GroupConfig:
        settings: dict[str, Any] = {
            "cluster": "test",
            "group": "g",
            "node_id": node_id,
            "peers": self.peers,
            "data_dir": str(self.folder / node_id),
            "segment_bytes": 1024 * 1024,
            "format_if_empty": True,
            "heartbeat_ms": 50,
            "election_timeout_ms_min": 300,
            "election_timeout_ms_max": 600,
            "flush_interval_ms": 50,
        }
        return GroupConfig(**{**settings, **self.settings, **self.node_settings.get(node_id, {})})

    async def start(self, *names: str) -> None:
        listeners = {name: await self.env.net.listen("127.0.0.1", 0) for name in self.nodes}
        self.peers = {name: listener.address for name, listener in listeners.items()}
        for name, node in self.nodes.items():
            if not names or name in names:
                await node.start(listeners[name])
            else:
                await listeners[name].aclose()

    def alive(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.group is not None and not node.ended.is_set()]

    def leaders(self) -> list[Node]:
        return [node for node in self.alive() if node.running.is_ready_leader]

    async def leader(self, limit: float = 10.0) -> Node:
        await wait_until(lambda: len(self.leaders()) == 1, limit=limit, what="one ready leader")
        return self.leaders()[0]

    async def put(self, record: bytes, limit: float = 10.0) -> int:
        """Store one record wherever the leader is; retries until it is applied there."""
        with trio.fail_after(limit):
            while True:
                node = await self.leader(limit)
                done = trio.Event()
                outcome: list[str] = []

                def told(how: str, outcome: list[str] = outcome, done: trio.Event = done) -> None:
                    outcome.append(how)
                    done.set()

                with suppress(NotLeader):
                    offset = node.machine.put(node.running, record, told)
                    with trio.move_on_after(3):
                        await done.wait()
                    if outcome == ["applied"]:
                        return offset
                await trio.sleep(0.01)

    async def level(self, limit: float = 10.0) -> None:
        """Wait until all live nodes have applied the same, and all of it."""

        def is_level() -> bool:
            groups = [node.running for node in self.alive()]
            ends = {group.end_position for group in groups}
            return len(ends) == 1 and {group.committed_position for group in groups} == ends

        await wait_until(is_level, limit=limit, what="equal logs")

    def segment_bytes(self, name: str) -> bytes:
        end = self.nodes[name].running.committed_position
        files = sorted((self.folder / name / "log").iterdir())
        return b"".join(path.read_bytes() for path in files if path.name.isdigit())[:end]


def toy_env(folder: Path, seed: int = 0) -> Env:
    return test_env(folder, seed=seed)


@asynccontextmanager
async def toy_cluster(folder: Path, size: int = 3, *names: str, **settings: Any) -> AsyncIterator[ToyCluster]:
    """A group that runs: all nodes of it, or those named. Killed at the end."""
    async with trio.open_nursery() as nursery:
        toy = ToyCluster(toy_env(folder), folder, nursery, size, **settings)
        await toy.start(*names)
        yield toy
        nursery.cancel_scope.cancel()


def driver_of(node: Node) -> Driver:
    """Of the run that serves the node's log now."""
    driver = node.running._driver
    assert driver is not None
    return driver


class Boot:
    """The machine after its n-th start: for an environment's `ids`."""

    host, pid, memory_bytes = "h", 1, 1 << 34

    def __init__(self, number: int) -> None:
        self.boot_id = f"boot {number}"

    def salt(self, nbytes: int) -> bytes:
        return bytes(nbytes)


def lone_config(**settings: Any) -> GroupConfig:
    """Of a group of one that need not run."""
    known = {"peers": {"n0": ("127.0.0.1", 1)}, "data_dir": "/nowhere"}
    return GroupConfig(cluster="c", group="g", node_id="n0", **{**known, **settings})
