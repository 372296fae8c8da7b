"""A broker node's processors over a raft group in memory, for tests: no sockets, commits when the test says so."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import trio
import trio.lowlevel

from broker.config import BrokerConfig
from broker.context import BrokerContext
from broker.handlers import handlers_of
from broker.long_poll import LongPollTable
from broker.processors.pull import PullProcessor
from broker.processors.send import SendProcessor
from broker.processors.send_back import SendBackProcessor
from broker.router import Router
from broker.state import BrokerState
from broker.testing import MemoryConnection, MemoryGroup
from dledger.config import GroupConfig
from dledger.errors import LedgerError
from dledger.machine import GroupStatistics
from dledger.store.base import BaseRecord
from dledger.store.manifest import Manifest, SegmentInfo
from remoting.codes import RequestCode
from remoting.command import Command, encode_request
from remoting.frames import FrameReader, decode_frame
from runtime.logs import get_logger
from runtime.testing import test_env

_opaques = itertools.count(100)


def broker_config(folder: Path, *, node: int = 0, nodes: int = 3, **changes: Any) -> BrokerConfig:
    """Node n<node> of a group of `nodes`; nothing listens there."""
    node_id = f"n{node}"
    return BrokerConfig(
        cluster="DefaultCluster",
        broker_name="broker-a",
        node_id=node_id,
        broker_id=node,
        listen=("127.0.0.1", 0),
        advertised=("127.0.0.1", 10911 + 10 * node),
        namesrv=(),
        group=GroupConfig(
            cluster="DefaultCluster",
            group="broker-a",
            node_id=node_id,
            peers={f"n{k}": ("127.0.0.1", 40911 + 10 * k) for k in range(nodes)},
            data_dir=f"{folder}/{node_id}/raft",
            format_if_empty=True,
        ),
        data_dir=f"{folder}/{node_id}",
        **changes,
    )


class RigGroup(MemoryGroup):
    """Adds what processors ask of a group beyond its log."""

    def __init__(self, machine: Any, config: BrokerConfig, *, leading: bool) -> None:
        super().__init__(machine, leading=leading)
        self.node_id = config.node_id
        self.config = config.group
        self.group_uuid = config.group.group_uuid
        self.leader_id = config.node_id if leading else None
        self.hot = True
        self.cached = True
        self.sent: list[tuple[str, bytes]] = []
        self.connected = True
        self.learners: tuple[str, ...] = ("n3",)
        self.recovering = False
        self.damaged: tuple[tuple[int, int], ...] = ()
        self.held: dict[str, tuple[int, float]] = {}
        self.asked: list[Any] = []
        """What tools asked of the group."""
        self.refusal: LedgerError | None = None

    def _ask(self, *what: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(what)

    async def transfer_and_wait(self, target: str | None = None) -> str | None:
        await trio.lowlevel.checkpoint()
        self.asked.append(("transfer", target))
        if self.refusal is not None:
            return str(self.refusal)
        self.leader_id = target
        return None

    async def change_members(self, change: Any) -> None:
        await trio.lowlevel.checkpoint()
        self._ask(change)

    def accept_loss(self) -> None:
        self._ask("accept loss")

    def hold_segments(self, holder: str, position: int, seconds: float) -> None:
        self.held[holder] = (position, seconds)

    def delete_expired(self) -> None:
        self._ask("delete expired")

    def trim_to(self, position: int, *, is_forced: bool = False) -> int:
        self._ask("trim", position)
        return position // 2

    def manifest(self) -> Manifest | None:
        segments = (SegmentInfo(0, 1, 2, 128, 7),)
        return Manifest(BaseRecord(0, 0, 0, 0), 65_536, segments) if self.is_serving else None

    def is_hot(self, physical_offset: int) -> bool:
        return self.hot

    def read_cached(self, physical_offset: int, nbytes: int) -> bytes | None:
        return super().read_cached(physical_offset, nbytes) if self.cached else None

    def send_app(self, peer_id: str, payload: bytes) -> bool:
        if not self.connected:
            return False
        self.sent.append((peer_id, bytes(payload)))
        return True

    def statistics(self) -> GroupStatistics:
        last = len(self.entries)
        leads = self.leader_id == self.node_id
        peers = [peer for peer in self.config.peers if peer != self.node_id] if leads else []
        return GroupStatistics(
            node_id=self.node_id,
            role=self.role,
            term=self.term,
            leader_id=self.leader_id,
            ready=self.is_ready_leader,
            recovering=self.recovering,
            damaged=self.damaged,
            flush="async",
            first_index=1,
            last_index=last,
            written_index=last,
            durable_index=last,
            commit_index=self.commit_index,
            applied_index=self.commit_index,
            first_position=self.first_position,
            committed_position=self.committed_position,
            end_position=self.end_position,
            members=tuple(sorted(self.config.peers)),
            learners=self.learners,
            addresses={"n3": ("127.0.0.1", 40941)} if self.learners else {},
            acknowledged=dict.fromkeys(peers, last),
            lag_bytes=dict.fromkeys(peers, 0),
            connected=dict.fromkeys(peers, True),
            waiting_records=0,
            disk_ok=True,
            loop_saturation=0.0,
            counters={},
        )


class RigConnection(MemoryConnection):
    """A client's connection: what the broker wrote, decoded."""

    def __init__(self, peer: tuple[str, int] = ("127.0.0.1", 50001)) -> None:
        super().__init__(peer)
        self.closed_reason: str | None = None
        self.pushed: list[Command] = []
        self.answers_to_broker: dict[int, Command | Exception] = {}
        self._reader = FrameReader()
        self._got: list[Command] = []

    def send_oneway(self, command: Command) -> None:
        self.pushed.append(command)

    async def request(self, command: Command, timeout: float) -> Command:
        self.pushed.append(command)
        answer = self.answers_to_broker[command.code]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self, reason: str) -> None:
        self.closed_reason = reason

    def received(self) -> list[Command]:
        """Everything the broker answered since the last call."""
        self._reader.feed(b"".join(bytes(part) for part in self.written))
        self.written.clear()
        return [decode_frame(frame) for frame in self._reader.take()]


class ProcessorRig:
    """One node: `ask` sends a request and gives its answer, `commit` decides what the group has committed."""

    def __init__(self, folder: Path, *, leading: bool = True, node: int = 0, **changes: Any) -> None:
        self.env = test_env(folder)
        self.config = broker_config(folder, node=node, **changes)
        self.env.files.make_dirs(self.config.data_dir)
        self.log = get_logger("test")
        self.state = BrokerState(self.env, self.config, self.log)
        self.group = RigGroup(self.state, self.config, leading=leading)
        group: Any = self.group
        self.state.attach(group)
        self.broker = BrokerContext(self.env, self.config, self.state, group, self.log)
        self.send_processor = SendProcessor(self.state)
        self.pull = PullProcessor(self.broker)
        self.broker.long_poll = LongPollTable(self.pull.wake)
        self.router = Router(
            self.broker,
            send=self.send_processor.handle_send,
            pull=self.pull.handle,
            handlers=handlers_of(self.broker, SendBackProcessor(self.state, self.send_processor.appender).handle),
        )
        self.forwarder = self.router.forwarder
        self.conn = RigConnection()
        self.state.on_dispatch.append(self._dispatched)
        self.state.on_role.append(lambda *_: self.forwarder.leadership_changed())
        self.state.on_app_message.append(self.forwarder.receive)
        self.state.on_turn_done.append(self._turn_done)

    def _turn_done(self) -> None:
        self.broker.long_poll.wake_notified()
        self.broker.flush_changed()

    def _dispatched(self, topic: str, queue_id: int, max_offset: int, units: bytes) -> None:
        self.broker.stats.count_put(topic, len(units) // 20, 0)
        self.broker.long_poll.notify(topic, queue_id, max_offset, units)

    def frame(self, code: int, ext: dict[str, Any] | None = None, body: bytes = b"", **kinds: Any) -> Any:
        texts = {key: str(value) for key, value in (ext or {}).items()}
        data = encode_request(code, next(_opaques), texts, body, **kinds)
        reader = FrameReader()
        reader.feed(data)
        return reader.take()[0]

    def tell(self, code: int, ext: dict[str, Any] | None = None, body: bytes = b"", **kinds: Any) -> list[Command]:
        """Send a request; what came back before anything is committed."""
        conn = kinds.pop("conn", self.conn)
        self.router.on_frames(conn, [self.frame(code, ext, body, **kinds)])
        self.router.turn()
        return conn.received()

    def ask(self, code: int, ext: dict[str, Any] | None = None, body: bytes = b"", **kinds: Any) -> Command:
        """Send a request, commit what it logged, and give its one answer."""
        conn = kinds.get("conn", self.conn)
        answers = self.tell(code, ext, body, **kinds)
        for _ in range(4):
            if not answers:
                self.group.commit()
                answers = conn.received()
        assert len(answers) == 1, f"code {code}: {len(answers)} answers"
        return answers[0]

    def send(self, topic: str, body: bytes, *, queue: int = 0, tag: str = "", key: str = "") -> Command:
        properties = "".join(
            f"{name}\x01{value}\x02" for name, value in (("TAGS", tag), ("KEYS", key), ("WAIT", "true")) if value
        )
        ext = {
            "a": "PG", "b": topic, "c": "TBW102", "d": 4, "e": queue, "f": 0, "g": 1_700_000_000_000, "h": 0,
            "i": properties, "j": 0, "k": "false", "m": "false",
        }  # fmt: skip
        return self.ask(RequestCode.SEND_MESSAGE_V2, ext, body)

    def create_topic(self, topic: str, queues: int = 4, perm: int = 6, order: str = "false") -> None:
        ext = {
            "topic": topic, "defaultTopic": "TBW102", "readQueueNums": queues, "writeQueueNums": queues,
            "perm": perm, "topicFilterType": "SINGLE_TAG", "topicSysFlag": 0, "order": order,
        }  # fmt: skip
        assert self.ask(RequestCode.UPDATE_AND_CREATE_TOPIC, ext).code == 0

    def pull_ext(self, topic: str, offset: int, **changes: Any) -> dict[str, Any]:
        ext = {
            "consumerGroup": "CG", "topic": topic, "queueId": 0, "queueOffset": offset, "maxMsgNums": 32, "sysFlag": 4,
            "commitOffset": 0, "suspendTimeoutMillis": 0, "subscription": "*", "subVersion": 0, "expressionType": "TAG",
        }  # fmt: skip
        return {**ext, **changes}


__all__ = ["ProcessorRig", "RigConnection", "broker_config"]
