"""One broker node: the raft group, the tables, the server and the services, in one nursery.

node = BrokerNode(env, config)
await nursery.start(node.run)        # returns after node.stop(drain_s)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import trio

from broker.answers import Done
from broker.clients import SCAN_INTERVAL_S
from broker.config import BrokerConfig
from broker.context import BrokerContext
from broker.delay import DelayService
from broker.errors import NodeStopped, StartupError
from broker.handlers import handlers_of
from broker.long_poll import SWEEP_INTERVAL_S, LongPollTable
from broker.processors.pull import COLD_READERS, PullProcessor
from broker.processors.send import SendProcessor
from broker.processors.send_back import SendBackProcessor
from broker.records import UNIT
from broker.registration import Registration
from broker.router import Router
from broker.state import BrokerState
from broker.tables import InvariantBroken
from dledger.errors import LedgerError
from dledger.group import RaftGroup, Role
from remoting.bodies import TopicConfig
from remoting.server import serve
from runtime.files import Locked
from runtime.logs import Logger, get_logger
from runtime.model import Env, Listener

TRANSFER_WAIT_S: Final = 1.0
"""How long a stop waits for its leadership to be taken over before it goes on."""
TRANSFER_LOOK_S: Final = 0.01
MENDING: Final = frozenset({"repairing", "installing"})
MENDING_LOOK_S: Final = 0.05


class NodeState(BrokerState):
    """The tables of a node that has name servers beside it.

    What created a topic (a first send, a send-back) goes on when the name servers know the topic, so a client that was
    answered finds its route, as with RocketMQ.
    """

    when_registered: Callable[[Callable[[], None]], None]

    def ensure_topic(self, config: TopicConfig, done: Done) -> None:
        if self.topics.get(config.topic_name) is not None:
            super().ensure_topic(config, done)
            return

        def known(ok: bool, reason: str | None) -> None:
            if ok:
                self.when_registered(lambda: done(True, None))
            else:
                done(ok, reason)

        super().ensure_topic(config, known)


class BrokerNode:
    """A member of one broker group. All methods are for the trio thread.

    `listener` and `peer_listener`, when given, are served instead of the configured addresses (tests).
    """

    def __init__(
        self,
        env: Env,
        config: BrokerConfig,
        *,
        listener: Listener | None = None,
        peer_listener: Listener | None = None,
        log: Logger | None = None,
    ) -> None:
        self.env = env
        self.config = config
        self.log = log or get_logger("broker", node=config.node_id, group=config.broker_name)
        self.state = NodeState(env, config, self.log)
        self.group = RaftGroup(env, config.group, self.state, self.log, listener=peer_listener)
        self.state.attach(self.group)
        self.broker = BrokerContext(env, config, self.state, self.group, self.log)
        self.send = SendProcessor(self.state)
        self.pull = PullProcessor(self.broker)
        self.broker.long_poll = LongPollTable(self.pull.wake)
        self.router = Router(
            self.broker,
            send=self.send.handle_send,
            pull=self.pull.handle,
            handlers=handlers_of(self.broker, SendBackProcessor(self.state, self.send.appender).handle),
        )
        self.registration = Registration(self.broker)
        self.broker.when_registered = self.state.when_registered = self.registration.when_registered
        self.address: tuple[str, int] | None = None
        """Where it listens, once it runs."""
        self.metrics_address: tuple[str, int] | None = None
        self._listener = listener
        self._stop_wanted = trio.Event()
        self._drain_s = 0.0
        self._stopped = trio.Event()
        self.state.on_dispatch.append(self._dispatched)
        self.state.on_role.append(self._role_changed)
        self.state.on_topics_changed.append(self._topics_changed)
        self.state.on_app_message.append(self.router.forwarder.receive)
        self.state.on_turn_done.append(self._turn_done)

    # ----------------------------------------------------------------------------------------------------- lifetime

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. `started()` once the log is recovered, or is being repaired, and both ports are open.

        Raises StartupError where it cannot start, NodeStopped where it must not go on. When cancelled, it stops as a
        killed process would: the next start reads the log again.
        """
        with ExitStack() as held:
            self._take_folder(held)
            listener = await self._listen()
            started = False

            def running() -> None:
                nonlocal started
                started = True
                task_status.started()

            try:
                await self._run_services(listener, running)
            except* InvariantBroken as errors:
                raise NodeStopped(f"invariant broken, the node stops: {_first(errors)}") from errors
            except* (LedgerError, OSError) as errors:
                if started:
                    raise NodeStopped(str(_first(errors))) from errors
                raise StartupError(str(_first(errors))) from errors
            finally:
                self._stopped.set()
                with trio.CancelScope(shield=True):
                    await listener.aclose()

    def _take_folder(self, held: ExitStack) -> None:
        """Keep every other process off the data folder for as long as `held` lasts."""
        folder = self.config.data_dir
        try:
            self.env.files.make_dirs(folder)
            held.enter_context(self.env.files.lock(f"{folder}/lock"))
        except Locked as error:
            raise StartupError(str(error)) from error
        except OSError as error:
            raise StartupError(
                f"cannot write to {folder} ({error.strerror or error}); choose another folder"
            ) from error

    async def _listen(self) -> Listener:
        if self._listener is not None:
            return self._listener
        return await self._listen_at(*self.config.listen)

    async def _listen_at(self, host: str, port: int) -> Listener:
        try:
            return await self.env.net.listen(host, port)
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); another process may use the port"
            ) from error

    async def _run_services(self, listener: Listener, running: Any) -> None:
        self.address = listener.address
        async with trio.open_nursery() as nursery:
            self.broker.jobs.attach(nursery)
            await self._start_group(nursery)
            await nursery.start(self.state.run)
            await nursery.start(DelayService(self.state).run)
            nursery.start_soon(self.router.forwarder.run)
            for _ in range(COLD_READERS):
                nursery.start_soon(self.pull.read_cold_forever)
            nursery.start_soon(self._keep_house)
            if self.config.metrics is not None:
                await nursery.start(self._serve_metrics, *self.config.metrics)
            server = await nursery.start(self._serve, listener)
            nursery.start_soon(self.registration.run)
            running()
            await self._stop_wanted.wait()
            await self._leave(server)
            nursery.cancel_scope.cancel()

    async def _start_group(self, nursery: trio.Nursery) -> None:
        """Until the log is served; or, where it must be mended first, which may take long: clients and tools are to
        hear that meanwhile, and not find a closed port."""
        served = trio.Event()

        async def start() -> None:
            await nursery.start(self._run_group, nursery.cancel_scope)
            served.set()

        nursery.start_soon(start)
        while not served.is_set() and self.group.state not in MENDING:
            with self.env.clock.move_on_after(MENDING_LOOK_S):
                await served.wait()

    async def _run_group(
        self, node_scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await self.group.run(task_status=task_status)
        if not self._stop_wanted.is_set():
            # Nothing here asked it to: without its log the node is nothing.
            node_scope.cancel()

    async def _serve(
        self, listener: Listener, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._serve_connections, listener)
                task_status.started(scope)

    async def _serve_connections(
        self, listener: Listener, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await serve(self.env, listener, self.router, log=self.log, task_status=task_status)

    async def _serve_metrics(
        self, host: str, port: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        from broker.metrics import metrics_page  # only the nodes that are asked for it pay for these
        from runtime.metrics import serve_metrics

        listener = await self._listen_at(host, port)
        self.metrics_address = listener.address
        page = partial(metrics_page, self.broker)
        await serve_metrics(self.env, listener, page, self.log, task_status=task_status)

    async def stop(self, drain_s: float | None = None) -> None:
        """Hand leadership over, go on forwarding for `drain_s` seconds (the configured ones when None), then end `run`.

        Checkpoint; when cancelled the stop goes on.
        """
        self._drain_s = self.config.drain_s if drain_s is None else drain_s
        self._stop_wanted.set()
        await self._stopped.wait()

    async def _leave(self, server: trio.CancelScope) -> None:
        """Step by step out of the group, the name servers, and the folder."""
        clock = self.env.clock
        drain_until = clock.monotonic() + self._drain_s
        if self.group.leader_id == self.group.node_id and len(self.config.group.peers) > 1:
            self.log.info("handing leadership over")
            self.group.transfer_leadership()
            if self._drain_s > 0:
                with clock.move_on_after(TRANSFER_WAIT_S):
                    while self.group.leader_id == self.group.node_id:
                        await clock.sleep(TRANSFER_LOOK_S)
        await clock.sleep_until(drain_until)
        await self.registration.unregister()
        server.cancel()
        await self.state.checkpoint()
        await self.group.stop_gracefully()
        await self.state.close()

    # ------------------------------------------------------------------------------------------- what the group says

    def _dispatched(self, topic: str, queue_id: int, max_offset: int, units: bytes) -> None:
        """Committed messages of one queue are readable now."""
        if self.group.is_ready_leader:
            nbytes = 0
            for _at, size, _code in UNIT.iter_unpack(units):
                nbytes += size
            self.broker.stats.count_put(topic, len(units) // UNIT.size, nbytes)
        if self.broker.long_poll:
            self.broker.long_poll.notify(topic, queue_id, max_offset, units)

    def _role_changed(self, _role: Role, _term: int, _leader_id: str | None, ready: bool) -> None:
        if ready:
            self.broker.long_poll.wake_all()
        else:
            self.broker.resets.clear()
        self.router.forwarder.leadership_changed()
        self.registration.wake()

    def _turn_done(self) -> None:
        """What was dispatched in this turn can be read now."""
        self.broker.long_poll.wake_notified()
        self.broker.flush_changed()

    def _topics_changed(self, names: list[str]) -> None:
        for name in names:
            if self.state.topics.get(name) is None:
                self.broker.long_poll.drop_queue_of(name)
        self.registration.wake()

    # ------------------------------------------------------------------------------------------------- housekeeping

    async def _keep_house(self) -> None:
        """Once a second: samples, pulls whose time is up; each 10 s: clients that have fallen silent."""
        clock = self.env.clock
        broker = self.broker
        next_scan = clock.monotonic() + SCAN_INTERVAL_S
        while True:
            await clock.sleep(SWEEP_INTERVAL_S)
            now = clock.monotonic()
            broker.stats.sample(now, clock.wall_ms())
            broker.long_poll.sweep(now)
            if now >= next_scan:
                next_scan = now + SCAN_INTERVAL_S
                broker.thin_out()
                for conn in broker.clients.expire(now):
                    conn.close("no heartbeat for too long")
            broker.flush_changed()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
