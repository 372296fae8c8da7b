"""One name server process: listener, scan for silent brokers, and the worker of the control plane."""

from __future__ import annotations

from collections.abc import Callable

import trio

from namesrv.config import NamesrvConfig, Settings
from namesrv.mirror import Mirror
from namesrv.processors import Change, Processors
from namesrv.registry import CommandRefused, LocalRegistry, Registry, RegistryUnavailable
from namesrv.route_manager import RouteManager
from remoting.bodies import decode_properties_text, encode_properties_text
from remoting.codes import ResponseCode
from remoting.command import Command, encode_response
from remoting.connection import Connection
from remoting.frames import Frame, decode_frame
from remoting.server import serve
from runtime.model import Env

CHANGES_WAITING_MAX = 1_000
"""Control-plane changes that wait for their turn; past it the answer is SYSTEM_BUSY."""


class NameServer:
    """Routes and control plane at one address. Stopping is cancelling `run`."""

    def __init__(self, env: Env, config: NamesrvConfig) -> None:
        self._env = env
        self._config = config
        self._log = config.log.bind(node=config.name)
        self._send_change, self._changes = trio.open_memory_channel[tuple[Connection, Command, Change]](
            CHANGES_WAITING_MAX
        )
        self.routes = RouteManager()
        self.registry: Registry | None = None
        self.address: tuple[str, int] | None = None
        """Where it listens; known once `run` has started."""

    async def run(self, *, task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started` gives the address.

        Raises OSError (port taken, folder not writable), runtime.files.Locked, MirrorDamaged. Checkpoint.
        """
        files = self._env.files
        files.make_dirs(self._config.data_dir)
        with files.lock(f"{self._config.data_dir}/lock"):
            listener = await self._env.net.listen(*self._config.listen)
            try:
                registry = self.registry = self._make_registry()
                processors = Processors(
                    self.routes,
                    registry,
                    settings=self._load_settings(),
                    save_settings=self._save_settings,
                    now=self._env.clock.monotonic,
                    log=self._log,
                )
                registry.listen(lambda state: self.routes.set_wiped(frozenset(state.wiped)))
                async with trio.open_nursery() as nursery:
                    await nursery.start(registry.run)
                    nursery.start_soon(self._drop_silent_brokers, processors)
                    nursery.start_soon(self._change_control_plane, registry)
                    handler = _Frames(processors, self.routes, self._submit, self._log.info)
                    await nursery.start(
                        lambda task_status: serve(self._env, listener, handler, log=self._log, task_status=task_status)
                    )
                    self.address = listener.address
                    self._log.info("name server started", listen=listener.address)
                    task_status.started(listener.address)
            finally:
                with trio.CancelScope(shield=True):
                    await listener.aclose()

    def _make_registry(self) -> Registry:
        mirror = Mirror(self._env.files, f"{self._config.data_dir}/control.cbor")
        if len(self._config.peers) < 2:
            return LocalRegistry(self._env, mirror)
        # Loaded only where several name servers share a control plane: it replaces part of a library (raft.md 3.3).
        from namesrv.registry_pysyncobj import ReplicatedRegistry

        return ReplicatedRegistry(self._env, self._config, mirror)

    # --------------------------------------------------------------------------------------------------- settings

    @property
    def _settings_path(self) -> str:
        return f"{self._config.data_dir}/namesrv.properties"

    def _load_settings(self) -> Settings:
        settings = Settings(
            config_store_path=self._settings_path, kv_config_path=f"{self._config.data_dir}/control.cbor"
        )
        if not self._env.files.exists(self._settings_path):
            return settings
        try:
            return settings.updated(decode_properties_text(self._env.files.read_bytes(self._settings_path)))
        except ValueError as error:
            raise ValueError(f"{self._settings_path}: {error}") from error

    def _save_settings(self, settings: Settings) -> None:
        self._env.files.write_atomic(self._settings_path, encode_properties_text(settings.properties()))

    # ------------------------------------------------------------------------------------------------------ tasks

    async def _drop_silent_brokers(self, processors: Processors) -> None:
        while True:
            await self._env.clock.sleep(processors.settings.scan_interval_ms / 1000)
            for broker in self.routes.expire(self._env.clock.monotonic()):
                self._log.warning(
                    "broker expired", broker=broker.broker_name, address=broker.address, silent_s=broker.expiry_s
                )
                if isinstance(broker.connection, Connection):
                    broker.connection.close(f"broker silent for {broker.expiry_s:g} s")

    def _submit(self, connection: Connection, request: Command, change: Change) -> bytes | None:
        """Queue a change of the control plane; an answer at once only where the queue is full."""
        try:
            self._send_change.send_nowait((connection, request, change))
        except trio.WouldBlock:
            remark = f"{CHANGES_WAITING_MAX} changes of the control plane are waiting; try again later"
            return encode_response(request, ResponseCode.SYSTEM_BUSY, remark=remark)
        return None

    async def _change_control_plane(self, registry: Registry) -> None:
        async for connection, request, change in self._changes:
            try:
                await registry.propose(change.command)
                answer = change.answer()
            except RegistryUnavailable as error:
                remark = f"outcome unknown, ask again before trying again: {error}"
                answer = encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
            except CommandRefused as error:
                answer = encode_response(request, ResponseCode.SYSTEM_ERROR, remark=str(error))
            if not request.is_oneway:
                connection.write(answer)
                connection.flush()


class _Frames:
    """`remoting.server.FrameHandler` of a name server."""

    def __init__(
        self,
        processors: Processors,
        routes: RouteManager,
        submit: Callable[[Connection, Command, Change], bytes | None],
        tell: Callable[..., None],
    ) -> None:
        self._processors = processors
        self._routes = routes
        self._submit = submit
        self._tell = tell

    def on_open(self, connection: Connection) -> None:
        """Nothing to do before the first request."""

    def on_frames(self, connection: Connection, frames: list[Frame]) -> None:
        for frame in frames:
            request = decode_frame(frame)
            if request.is_response:
                continue
            answer: bytes | Change | None = self._processors.handle(request, connection)
            if isinstance(answer, Change):
                answer = self._submit(connection, request, answer)
            if answer is not None and not request.is_oneway:
                connection.write(answer)

    def on_close(self, connection: Connection) -> None:
        """RocketMQ's rule: a broker whose connection breaks is gone at once."""
        for broker in self._routes.connection_lost(connection):
            self._tell(
                "broker lost", broker=broker.broker_name, address=broker.address, reason=connection.closed_reason
            )
