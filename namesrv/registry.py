"""The control plane: one small state machine, driven locally here, or by PySyncObj among several name servers.

It holds what an operator has said and no broker can tell again: KV configuration (the order configuration is one of its
namespaces) and broker names whose write permission is wiped. Tens of writes per hour, kilobytes in total (raft.md 3.3).
Commands are plain values; the same commands in the same order give the same state everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import cbor2
import trio
from attrs import frozen

from namesrv.mirror import Mirror
from runtime.model import Env

Command = tuple[str, ...]
"""("kv_put", namespace, key, value), ("kv_delete", namespace, key), ("wipe", broker), ("unwipe", broker)."""

COMMAND_LIMIT_BYTES = 64 * 1024
STATE_LIMIT_BYTES = 8 * 1024 * 1024
_REQUESTS_REMEMBERED = 1_000
_ARITY = {"kv_put": 4, "kv_delete": 3, "wipe": 2, "unwipe": 2}


class RegistryUnavailable(Exception):
    """The command may or may not take effect: no quorum, no leader, or the disk failed."""


class CommandRefused(Exception):
    """The command is too large or the state would be; nothing was changed."""


@frozen
class Outcome:
    """What a command did."""

    version: int
    """Version of the state after it."""
    changed: bool


class ControlState:
    """The replicated state. `apply` is a pure function of the state and its arguments."""

    def __init__(self) -> None:
        self.version = 0
        self.kv: dict[str, dict[str, str]] = {}
        self.wiped: dict[str, bool] = {}
        self._requests: dict[bytes, tuple[int, bool]] = {}

    def apply(self, request_id: bytes, command: Command) -> Outcome:
        """Apply one command once: the same request id again gives the first outcome and changes nothing."""
        known = self._requests.get(request_id)
        if known is not None:
            return Outcome(*known)
        changed = self._change(command)
        if changed:
            self.version += 1
        self._requests[request_id] = (self.version, changed)
        if len(self._requests) > _REQUESTS_REMEMBERED:
            del self._requests[next(iter(self._requests))]
        return Outcome(self.version, changed)

    def _change(self, command: Command) -> bool:
        match command:
            case ("kv_put", namespace, key, value):
                table = self.kv.setdefault(namespace, {})
                changed = table.get(key) != value
                table[key] = value
                return changed
            case ("kv_delete", namespace, key):
                table = self.kv.get(namespace, {})
                if table.pop(key, None) is None:
                    return False
                if not table:
                    del self.kv[namespace]
                return True
            case ("wipe", broker):
                changed = broker not in self.wiped
                self.wiped[broker] = True
                return changed
            case ("unwipe", broker):
                return self.wiped.pop(broker, None) is not None
            case _:
                return False  # a newer name server's command: all of this version skip it alike

    def snapshot(self) -> bytes:
        """The whole state as bytes."""
        return cbor2.dumps(
            {
                "version": self.version,
                "kv": self.kv,
                "wiped": sorted(self.wiped),
                "requests": [[request, *outcome] for request, outcome in self._requests.items()],
            },
            canonical=True,
        )

    @classmethod
    def restore(cls, snapshot: bytes) -> ControlState:
        """The state from `snapshot`. Raises ValueError on bytes that are none."""
        state = cls()
        try:
            document: dict[str, Any] = cbor2.loads(snapshot)
            state.version = int(document["version"])
            state.kv = {
                str(namespace): {str(key): str(value) for key, value in table.items()}
                for namespace, table in document["kv"].items()
            }
            state.wiped = {str(name): True for name in document["wiped"]}
            state._requests = {
                bytes(request): (int(version), bool(changed)) for request, version, changed in document["requests"]
            }
        except (cbor2.CBORDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a control-plane snapshot: {error}") from error
        return state


def check(command: Command) -> None:
    """Raises CommandRefused for a command that must not enter the log."""
    if len(command) != _ARITY.get(command[0]):
        raise CommandRefused(f"unknown control-plane command {command[0]}")
    size = sum(len(part.encode()) for part in command)
    if size > COMMAND_LIMIT_BYTES:
        raise CommandRefused(f"{size} bytes are over the control plane's limit of {COMMAND_LIMIT_BYTES}")


Listener = Callable[[ControlState], None]


class Registry(Protocol):
    """The control plane as the rest of a name server sees it."""

    @property
    def state(self) -> ControlState:
        """The newest state known here; to be read, not changed."""

    @property
    def stale(self) -> bool:
        """Whether newer state may exist elsewhere (no contact with a quorum)."""

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each new state, from the loop, and with the present one at once."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started once the last state known is loaded."""

    async def propose(self, command: Command) -> Outcome:
        """Replicate and apply one command. Checkpoint. Raises RegistryUnavailable or CommandRefused."""


class LocalRegistry:
    """The control plane of a single name server, and of the simulator: the mirror file is the whole log."""

    def __init__(self, env: Env, mirror: Mirror) -> None:
        self._env = env
        self._mirror = mirror
        self._turn = trio.Lock()
        self._listeners: list[Listener] = []
        self._state = ControlState()

    @property
    def state(self) -> ControlState:
        return self._state

    @property
    def stale(self) -> bool:
        return False

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each new state, and with the present one at once."""
        self._listeners.append(listener)
        listener(self._state)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled. Raises MirrorDamaged or ValueError where the last state cannot be read."""
        snapshot = self._mirror.load()
        if snapshot is not None:
            self._adopt(ControlState.restore(snapshot))
        task_status.started()
        await trio.sleep_forever()

    async def propose(self, command: Command) -> Outcome:
        """Apply one command; it is durable on return. Checkpoint; once begun it is finished, cancelled or not."""
        check(command)
        async with self._turn:
            state = ControlState.restore(self._state.snapshot())
            outcome = state.apply(self._env.ids.salt(16), command)
            snapshot = state.snapshot()
            if len(snapshot) > STATE_LIMIT_BYTES:
                raise CommandRefused(f"the control plane would hold more than {STATE_LIMIT_BYTES} bytes")
            try:
                await self._env.run_in_thread(self._mirror.save, snapshot)
            except OSError as error:
                raise RegistryUnavailable(f"cannot write {self._mirror.path}: {error.strerror}") from error
            self._adopt(state)
            return outcome

    def _adopt(self, state: ControlState) -> None:
        self._state = state
        for listener in self._listeners:
            listener(state)
