"""The second subject: a name server, three brokers, and programs that use the `quorate` client.

Everything between them is real: registration, routes, heartbeats, sends, forwarded sends, long polls, rebalancing,
consumer offsets, delayed and retried messages. The programs run on machines of their own, which are partitioned from
brokers as those are from each other, but never killed: what they were told is the evidence.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any, Final

import cbor2
import trio
from attrs import define

import quorate
from broker.config import BrokerConfig
from broker.node import BrokerNode
from broker.records import UNIT, decode_record
from chaos.sim.full.machine import Dead, Process
from chaos.sim.full.plan import NAME_SERVER
from chaos.sim.full.subject import RaftSubject, excuses
from chaos.sim.full.world import Broken, World
from dledger.core.types import Role
from dledger.group import RaftGroup
from namesrv.config import NamesrvConfig
from namesrv.server import NameServer
from quorate.attempts import LATE_AFTER_S
from quorate.client import Client, background_nursery
from quorate.errors import NoRoute, PullFailed, RequestRefused, SendFailed, SendRefused, Unavailable
from quorate.pull import PullConsumer

NAMESRV_PORT: Final = 9876
BROKER_PORT: Final = 10_911
PEER_PORT: Final = 10_912
TOPIC: Final = "Orders"
READERS: Final = "readers"
MARKS: Final = "marks"
GROUP: Final = "broker-a"
SENDERS: Final = 6
SEND_SECONDS: Final = 3.0
LOOK_SECONDS: Final = 0.1
DELAYED_SHARE: Final = 0.04
BATCH_SHARE: Final = 0.05
RETRIED_SHARE: Final = 0.02


@define
class Sent:
    """One message, and what became of it as far as its sender knows."""

    number: int
    kind: str = "plain"
    """"plain" | "batch" | "delayed"."""
    outcome: str = "waiting"
    """"waiting" | "acknowledged" | "refused" (for certain) | "unknown"."""
    queue_id: int = -1
    queue_offset: int = -1


class Book:
    """What senders were told, what consumers got, what brokers dispatched; compared as it happens."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.sent: list[Sent] = []
        self.units: dict[tuple[str, int, int], bytes] = {}
        """(topic, queue, offset) -> the unit that brokers dispatched there."""
        self.delivered: dict[int, int] = {}
        """operation -> how often."""
        self.read: dict[tuple[int, int], int] = {}
        """(queue, offset) of the topic -> operation."""
        self.leaders: dict[int, str] = {}
        self.stored: dict[int, tuple[int, int]] = {}
        """operation -> (queue, offset) of the topic, as read from a broker's log soon after it was dispatched."""
        self._positions: dict[int, int] = {}
        """operation -> where in the log that is."""
        self.to_read: list[tuple[int, int, int, int]] = []
        """(queue, offset, position, size) of what is to be read for that."""
        self.retried: set[int] = set()

    def leads(self, node: str, role: Role, term: int) -> None:
        if role is Role.LEADER:
            former = self.leaders.setdefault(term, node)
            if former != node:
                self._world.broke(f"{former} and {node} both lead term {term}")

    def dispatched(self, node: str, topic: str, queue_id: int, max_offset: int, units: bytes) -> None:
        """One broker shows new units of a queue; every other one must show the same there, now or ever."""
        first = max_offset - len(units) // UNIT.size
        for number in range(len(units) // UNIT.size):
            unit = units[number * UNIT.size : (number + 1) * UNIT.size]
            is_new = (topic, queue_id, first + number) not in self.units
            known = self.units.setdefault((topic, queue_id, first + number), unit)
            if is_new and topic == TOPIC:
                position, size, _ = UNIT.unpack(unit)
                self.to_read.append((queue_id, first + number, position, size))
            if known != unit:
                self._world.broke(f"{node} has another message at {topic}/{queue_id}/{first + number} than was there")

    def found(self, queue_id: int, offset: int, position: int, body: bytes, *, kept_from: int) -> None:
        """This is what the log holds, at `position`, for a unit of the topic. It outlives the log, which retention
        shortens: what was sent again after the original had gone is a new message to the broker."""
        number = number_in(body)
        known = self.stored.get(number, (queue_id, offset))
        if known != (queue_id, offset) and self._positions[number] >= kept_from:
            self._world.broke(f"message {number} is stored at {known} and at {(queue_id, offset)}")
        self.stored[number], self._positions[number] = (queue_id, offset), position

    def got(self, queue_id: int, offset: int, body: bytes) -> None:
        """A consumer has read this from a queue of the topic."""
        number = number_in(body)
        known = self.read.setdefault((queue_id, offset), number)
        if known != number:
            self._world.broke(f"queue {queue_id} showed message {known} at {offset}, and now {number}")
        if self.sent[number].outcome == "refused":
            self._world.broke(f"message {number} was refused for certain and is delivered at {queue_id}/{offset}")

    def acknowledged(self, sent: Sent, queue_id: int, offset: int) -> None:
        sent.outcome, sent.queue_id, sent.queue_offset = "acknowledged", queue_id, offset
        if sent.kind != "delayed" and (TOPIC, queue_id, offset) not in self.units:
            self._world.broke(f"message {sent.number} is acknowledged at {queue_id}/{offset}, which is not committed")


def _kept_from(group: RaftGroup) -> int:
    """Where the log begins, everything given up already being gone."""
    return max(group.first_position, group.statistics().trimmed_position)


def number_in(body: bytes) -> int:
    return int(bytes(body[:12]))


class ClusterSubject(RaftSubject):
    """`world.Subject`: name server, brokers, programs."""

    port = PEER_PORT
    stops_removed = True  # a broker that nobody tells anything any more would go on answering pulls

    def __init__(self, world: World) -> None:
        super().__init__(world)
        for name in (NAME_SERVER, "p0", "c0"):
            world.add_machine(name)
        self.book = Book(world)
        self.nodes: dict[str, BrokerNode] = {}
        self._open_sends = 0
        self._is_final = False
        self._marks: dict[quorate.MessageQueue, int] = {}

    @property
    def _namesrv(self) -> str:
        return f"{self._world.machines[NAME_SERVER].host}:{NAMESRV_PORT}"

    @property
    def groups(self) -> Mapping[str, RaftGroup]:
        return {name: node.group for name, node in self.nodes.items()}

    @property
    def entries(self) -> int:
        return len(self.book.units)

    @property
    def elections(self) -> int:
        return len(self.book.leaders)

    @property
    def operations(self) -> list[Sent]:
        return self.book.sent

    def folder(self, name: str) -> str:
        return f"/{name}/data/raft"

    # Lives

    async def run_node(self, process: Process, task_status: trio.TaskStatus[Any]) -> None:
        task_status.started()
        name = process.machine.name
        if name == NAME_SERVER:
            await self._run_namesrv(process)
        elif name == "p0":
            await self._run_senders(process)
        elif name == "c0":
            await self._run_readers(process)
        else:
            await self._run_broker(process, name)

    async def _run_namesrv(self, process: Process) -> None:
        config = NamesrvConfig(
            listen=(process.machine.host, NAMESRV_PORT),
            data_dir=f"/{NAME_SERVER}/data",
            log=self._world.logger(NAME_SERVER),
        )
        await NameServer(process.env, config).run()

    def _config(self, name: str) -> BrokerConfig:
        address = (self._world.machines[name].host, BROKER_PORT)
        return BrokerConfig(
            cluster="sim",
            broker_name=GROUP,
            node_id=name,
            broker_id=int(name[1:]),
            listen=address,
            advertised=address,
            namesrv=(self._namesrv,),
            group=self.group_config(name, GROUP),
            data_dir=f"/{name}/data",
            default_topic_queues=4,
            # Small enough that files are rolled, indexes sealed and checkpoints taken within a short run.
            queue_file_units=200,
            open_queue_files=4,
            index_segment_keys=256,
            checkpoint_interval_ms=2_000,
            checkpoint_log_bytes=65_536,
            checkpoint_meta_bytes=8_192,
            drain_s=1.0,
        )

    async def _run_broker(self, process: Process, name: str) -> None:
        node = BrokerNode(process.env, self._config(name), log=self._world.logger(name))
        book = self.book

        def leads(role: Role, term: int, _leader: str | None, _ready: bool) -> None:
            if not process.is_dead:
                book.leads(name, role, term)

        def dispatched(topic: str, queue_id: int, max_offset: int, units: bytes) -> None:
            if not process.is_dead:
                book.dispatched(name, topic, queue_id, max_offset, units)

        node.state.on_role.append(leads)
        node.state.on_dispatch.append(dispatched)
        self.nodes[name] = node
        await self.run_group(node.run, name)

    async def stop_node(self, name: str) -> None:
        if name in self.nodes:
            await self.nodes[name].stop(0.5)

    # Senders

    @asynccontextmanager
    async def _connect(self, process: Process) -> AsyncIterator[Client]:
        """As `quorate.connect`, with the trace for its log."""
        client = Client(
            process.env,
            [self._namesrv],
            client_id=None,
            producer_group="sim",
            log=self._world.logger(process.machine.name),
        )
        async with background_nursery() as nursery:
            await nursery.start(client.run)
            yield client

    async def _run_senders(self, process: Process) -> None:
        async with self._connect(process) as client, trio.open_nursery() as nursery:
            for number in range(SENDERS):
                nursery.start_soon(self._send_forever, process, client, process.env.rng(f"sender{number}"))

    async def _send_forever(self, process: Process, client: Client, rng: Random) -> None:
        clock = process.env.clock
        while True:
            await clock.sleep(rng.expovariate(self._plan.rate / SENDERS))
            if not self._is_busy:
                continue
            kind = rng.choices(
                ("plain", "batch", "delayed"), (1 - BATCH_SHARE - DELAYED_SHARE, BATCH_SHARE, DELAYED_SHARE)
            )[0]
            count = rng.randrange(2, 6) if kind == "batch" else 1
            sends = [Sent(len(self.book.sent) + each, kind) for each in range(count)]
            self.book.sent.extend(sends)
            self._open_sends += 1
            try:
                await self._send(client, rng, sends)
            finally:
                self._open_sends -= 1

    async def _send(self, client: Client, rng: Random, sends: list[Sent]) -> None:
        bodies = [b"%012d" % sent.number + b"." * rng.randrange(self._plan.record_bytes_max) for sent in sends]
        try:
            if sends[0].kind == "batch":
                batch = [quorate.Message(topic=TOPIC, body=body) for body in bodies]
                receipt = await client.send_batch(TOPIC, batch, timeout=SEND_SECONDS)
            elif sends[0].kind == "delayed":
                receipt = await client.send(TOPIC, bodies[0], delay_level=1, timeout=SEND_SECONDS)
            else:
                key = str(sends[0].number) if rng.random() < 0.3 else None
                receipt = await client.send(TOPIC, bodies[0], key=key, timeout=SEND_SECONDS)
        except SendRefused as error:
            self._world.note("p0", f"refused: {error}")
            outcome = "refused"
        except SendFailed as error:
            outcome = "unknown" if error.maybe_stored else "refused"
        else:
            for number, sent in enumerate(sends):
                self.book.acknowledged(sent, receipt.queue_id, receipt.queue_offset + number)
            return
        for sent in sends:
            sent.outcome = outcome

    # Readers

    async def _run_readers(self, process: Process) -> None:
        async with self._connect(process) as client, trio.open_nursery() as nursery:
            rng = process.env.rng("readers")
            nursery.start_soon(self._mark_forever, process, client.pull_consumer(MARKS), process.env.rng("marks"))
            async with client.subscribe(TOPIC, group=READERS, start="first", rebalance_interval=5.0) as inbox:
                async for message in inbox:
                    number = number_in(message.body)
                    if message.reconsume_times == 0:
                        self.book.got(message.queue.queue_id, message.queue_offset, message.body)
                        if rng.random() < RETRIED_SHARE and not self._is_final:
                            self.book.retried.add(number)
                            message.retry(1)
                            continue
                    self.book.delivered[number] = self.book.delivered.get(number, 0) + 1

    async def _mark_forever(self, process: Process, marks: PullConsumer, rng: Random) -> None:
        """A consumer that keeps an offset by itself: once acknowledged it never goes back, and no end of a queue lies
        before a message that was acknowledged before the question."""
        clock = process.env.clock
        kept = self._marks
        tried: dict[quorate.MessageQueue, int] = {}
        late: dict[quorate.MessageQueue, list[int]] = {}
        """Updates without an answer, or with one to a second attempt: a copy may still be carried out, even after
        later ones."""
        while True:
            await clock.sleep(rng.expovariate(4.0))
            try:
                queue = rng.choice(await marks.queues(TOPIC))
                if rng.random() < 0.5:
                    offset = tried[queue] = tried.get(queue, 0) + 1
                    late.setdefault(queue, []).append(offset)
                    self._world.note("c0", f"offset {offset} of queue {queue.queue_id} is to be kept")
                    asked_at = clock.monotonic()
                    await marks.commit(queue, offset)
                    # Later it may have asked another member, while a first copy is still under way.
                    if clock.monotonic() - asked_at < LATE_AFTER_S:
                        late[queue].remove(offset)
                    self._world.note("c0", f"offset {offset} of queue {queue.queue_id} is kept")
                    kept[queue] = max(kept.get(queue, 0), offset)
                    continue
                least = kept.get(queue, 0)
                found = await marks.query(queue)
                if (found or 0) != least and found not in late.get(queue, ()):
                    self._world.broke(
                        f"the offset of queue {queue.queue_id} is {found}; acknowledged was {least}, "
                        f"without an answer are {late.get(queue)}"
                    )
                stored = [sent.queue_offset for sent in self.book.sent if self._is_at(sent, queue.queue_id)]
                end = await marks.max_offset(queue)
                if stored and end <= max(stored):
                    self._world.broke(f"queue {queue.queue_id} is said to end at {end}, {max(stored)} was acknowledged")
                offset = rng.choice(stored) if stored else 0
                for message in (await marks.pull(queue, offset, max_messages=4)).messages:
                    self.book.got(queue.queue_id, message.queue_offset, message.body)
            except (NoRoute, Unavailable, RequestRefused, PullFailed) as error:
                self._world.note("c0", f"not answered: {error}")

    @staticmethod
    def _is_at(sent: Sent, queue_id: int) -> bool:
        return sent.outcome == "acknowledged" and sent.kind != "delayed" and sent.queue_id == queue_id

    # The run

    async def run_workload(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run_workload)
            while True:
                await trio.sleep(LOOK_SECONDS)
                self._read_what_is_new()

    def _read_what_is_new(self) -> None:
        """Find out which message lies at each new unit, before retention takes the log away."""
        waiting, self.book.to_read = self.book.to_read, []
        groups = [self.nodes[name].group for name in self.running()]
        kept_from = 0
        for group in groups:
            with suppress(Dead):  # a machine whose next process has not opened its log yet
                kept_from = max(kept_from, _kept_from(group))
        for queue_id, offset, position, size in waiting:
            record = None
            for group in groups:
                with suppress(Dead):  # as above
                    record = record or group.read(position, size)
            if record is not None:
                self.book.found(queue_id, offset, position, decode_record(record).body, kept_from=kept_from)
            else:
                self.book.to_read.append((queue_id, offset, position, size))

    async def finish_workload(self) -> None:
        """Senders hear the end of what they have sent; readers get all that was acknowledged."""
        self._is_final = True
        while self._unheard() is not None:  # noqa: ASYNC110 - programs on two machines, no event to wait for
            await trio.sleep(LOOK_SECONDS)

    def _unheard(self) -> str | None:
        """What senders or readers have yet to hear of, as far as a leader can tell."""
        if self._open_sends:
            return f"{self._open_sends} sends have no answer"
        self._read_what_is_new()
        leader = self.leader()
        if leader is None:
            return "no leader"
        missing = self._missing(leader)
        return f"{len(missing)} acknowledged messages are not delivered, first {missing[0]}" if missing else None

    def _missing(self, leader: str) -> list[int]:
        book, queues = self.book, self.nodes[leader].state.queues
        firsts = {queue_id: queues.min_offset(TOPIC, queue_id) for queue_id in queues.queues_of(TOPIC)}
        has_trimmed = any(firsts.values())

        def is_given_up(sent: Sent) -> bool:
            """Retention took it before a consumer came by: as in RocketMQ it waits for nobody but delayed messages.
            What was sent back lies in another topic, of which nothing is known here."""
            gone = self._may_be_gone(sent, lambda queue_id, offset: offset < firsts[queue_id])
            return has_trimmed and (gone or sent.number in book.retried)

        return [
            sent.number
            for sent in book.sent
            if sent.outcome == "acknowledged" and sent.number not in book.delivered and not is_given_up(sent)
        ]

    # Judgement

    def is_excused(self, process: Process, error: BaseException) -> bool:
        return excuses(process, error)

    def unsettled(self) -> str | None:
        return self._unheard() or self.not_level()

    async def check(self) -> None:
        """On every broker: each acknowledged message at its offset and nowhere else; equal logs, queues and tables."""
        await trio.lowlevel.checkpoint()
        for name in self.members():
            self._check_messages(name)
        self._check_tables()
        self.check_logs_equal()

    def _check_messages(self, name: str) -> None:
        node = self.nodes[name]
        queues, group = node.state.queues, node.group
        places: dict[int, tuple[int, int]] = {}
        for queue_id in queues.queues_of(TOPIC):
            first, end = queues.min_offset(TOPIC, queue_id), queues.max_offset(TOPIC, queue_id)
            units = queues.units(TOPIC, queue_id, first, end - first)
            if len(units) != (end - first) * UNIT.size:
                raise Broken(f"{name} shows {len(units) // UNIT.size} units of queue {queue_id}, {first} to {end}")
            for number, (position, size, _) in enumerate(UNIT.iter_unpack(units), first):
                record = group.read(position, size)
                if record is None:
                    raise Broken(f"{name} cannot read {size} bytes at {position}, for {queue_id}/{number}")
                message = decode_record(record)
                if (message.queue_id, message.queue_offset) != (queue_id, number):
                    raise Broken(f"{name} has {message.queue_id}/{message.queue_offset} at {queue_id}/{number}")
                operation = number_in(message.body)
                if operation in places:
                    raise Broken(f"{name} has message {operation} at {places[operation]} and at {(queue_id, number)}")
                places[operation] = (queue_id, number)
        has_trimmed = _kept_from(group) > 0

        def is_given_up(queue_id: int, offset: int) -> bool:
            """Retention, or a disk that is full, makes room with the oldest messages (design §3)."""
            return has_trimmed and offset < queues.min_offset(TOPIC, queue_id)

        for sent in self.book.sent:
            place = places.get(sent.number)
            if sent.outcome == "acknowledged" and self._may_be_gone(sent, is_given_up):
                continue
            if sent.outcome == "refused" and place is not None:
                raise Broken(f"message {sent.number} was refused for certain; {name} has it at {place}")
            if sent.outcome == "acknowledged" and place is None:
                raise Broken(f"{name} lacks message {sent.number}, acknowledged at {sent.queue_id}/{sent.queue_offset}")
            if self._is_at(sent, sent.queue_id) and place != (sent.queue_id, sent.queue_offset):
                raise Broken(
                    f"{name} has message {sent.number} at {place}, acknowledged was {sent.queue_id}/{sent.queue_offset}"
                )
        for (queue_id, offset), number in self.book.read.items():
            if places.get(number) != (queue_id, offset) and not is_given_up(queue_id, offset):
                raise Broken(
                    f"a consumer read message {number} at {queue_id}/{offset}, {name} has it at {places.get(number)}"
                )

    def _may_be_gone(self, sent: Sent, is_given_up: Callable[[int, int], bool]) -> bool:
        """A delayed message goes only once it was delivered, or with all others where a disk is full."""
        if sent.kind != "delayed":
            return is_given_up(sent.queue_id, sent.queue_offset)
        place = self.book.stored.get(sent.number)
        if place is None:
            return bool(self._world.faults_applied["full disk"])
        return is_given_up(*place)

    def _check_tables(self) -> None:
        """Tables that follow from the log alone are equal on all members."""
        members = self.members()
        tables: dict[str, dict[str, bytes]] = {}
        for name in members:
            state = self.nodes[name].state
            ends = [
                [topic, queue_id, state.queues.max_offset(topic, queue_id)]
                for topic in sorted(state.queues.topics())
                for queue_id in state.queues.queues_of(topic)
            ]
            for what, table in (
                ("topics", state.topics.snapshot()),
                ("groups", state.groups.snapshot()),
                ("offsets", state.offsets.snapshot()),
                ("locks", state.locks.snapshot()),
                ("delay", state.delay.snapshot()),
                ("queues", ends),
            ):
                tables.setdefault(what, {})[name] = cbor2.dumps(table, canonical=True)
        for what, by_node in tables.items():
            for name, encoded in by_node.items():
                difference = _difference(cbor2.loads(by_node[members[0]]), cbor2.loads(encoded), what)
                if difference is not None:
                    raise Broken(f"tables of {members[0]} and {name} differ: {difference}")

    def leftovers(self) -> str | None:
        return self.waiting_records()


def _difference(one: Any, other: Any, at: str) -> str | None:
    """Where two plain structures differ first."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        found = [_difference(one[key], other[key], f"{at}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = [_difference(each, other[number], f"{at}[{number}]") for number, each in enumerate(one)]
    else:
        return None if one == other else f"{at} is {one!r:.200} and {other!r:.200}"
    return next((each for each in found if each is not None), None)
