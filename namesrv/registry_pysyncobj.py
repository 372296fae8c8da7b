"""The control plane among several name servers: the state machine of `registry`, replicated by PySyncObj.

The only importer of PySyncObj, and the only module of the product outside the seams: the library brings its own thread,
sockets and files. What keeps it safe (raft.md 3.3, measured there):

- Every message is unpickled before the library checks anything, so unpickling is replaced by one that knows no class
  and one function, for bytes; a hostile pickle is refused before it runs.
- A journal without a dump file loses everything at its first compaction: both are always set.
- One command in flight per name server, batching on: no pipelining, no needless cutting of logs.
- Every outcome but success means "unknown": the same request id is proposed again, and the state machine applies it
  once.
- The state lives on the library's thread; the trio side keeps its own copy, made from snapshots handed over.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
import types
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

import cbor2
import trio

from namesrv.config import NamesrvConfig
from namesrv.mirror import Mirror, MirrorDamaged, pack, unpack
from namesrv.registry import (
    STATE_LIMIT_BYTES,
    Command,
    CommandRefused,
    ControlState,
    Listener,
    Outcome,
    RegistryUnavailable,
    check,
)
from runtime.model import Env

PROPOSAL_S = 5.0
_RETRY_S = 0.2
_PROTOCOL = 2
_ALLOWED_GLOBALS = frozenset({("_codecs", "encode")})
"""What protocol 2 needs for bytes. Dumps are our own format, and membership never changes, so no class travels."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a control-plane message")


def _to_bytes(data: bytes | str) -> bytes:
    return data if isinstance(data, bytes) else data.encode()


def _load(file: Any) -> Any:
    return _Unpickler(file).load()


def _loads(data: bytes | str) -> Any:
    return _load(io.BytesIO(_to_bytes(data)))


def _dump(value: Any, file: Any, protocol: int | None = None) -> None:
    pickle.dump(value, file, _PROTOCOL)


def _dumps(value: Any, protocol: int | None = None) -> bytes:
    return pickle.dumps(value, _PROTOCOL)


def _restricted_pickle() -> types.ModuleType:
    module = types.ModuleType("pysyncobj.pickle")
    module.__dict__.update(to_bytes=_to_bytes, load=_load, loads=_loads, dump=_dump, dumps=_dumps)
    return module


# Put in place before the package is first imported: its journal binds the functions by name at import.
if "pysyncobj" in sys.modules:
    raise ImportError("pysyncobj was imported before its unpickler could be restricted")
sys.modules["pysyncobj.pickle"] = _restricted_pickle()

from pysyncobj import FAIL_REASON, HAS_CRYPTO, SyncObj, SyncObjConf, replicated  # noqa: E402
from pysyncobj.version import VERSION as PYSYNCOBJ_VERSION  # noqa: E402

if tuple(map(int, PYSYNCOBJ_VERSION.split("."))) < (0, 3, 16):
    raise ImportError(f"pysyncobj {PYSYNCOBJ_VERSION} forgets its term on restart; 0.3.16 or newer is needed")


class _ReplicatedState(SyncObj):  # type: ignore[misc]  # the library has no types
    """Lives on the library's thread. `hand_over` is called there with each new snapshot."""

    def __init__(self, address: str, others: list[str], conf: Any, machine: _Machine) -> None:
        self._machine = machine
        super().__init__(address, others, conf)

    @replicated  # type: ignore[untyped-decorator]
    def apply_command(self, request_id: bytes, command: bytes) -> tuple[int, bool] | str:
        return self._machine.apply(request_id, command)


class _Machine:
    """The state machine and its dump file, on the library's thread."""

    def __init__(self, dump_path: str, hand_over: Any) -> None:
        self.state = ControlState()
        self._dump_path = dump_path
        self._hand_over = hand_over

    def apply(self, request_id: bytes, command: bytes) -> tuple[int, bool] | str:
        """Pure but for the hand-over; every name server gets the same result, refusals included."""
        before = self.state.snapshot()
        outcome = self.state.apply(request_id, tuple(cbor2.loads(command)))
        snapshot = self.state.snapshot()
        if len(snapshot) > STATE_LIMIT_BYTES:
            self.state = ControlState.restore(before)
            return f"the control plane would hold more than {STATE_LIMIT_BYTES} bytes"
        self._hand_over(snapshot)
        return outcome.version, outcome.changed

    def write_dump(self, path: str, library_data: tuple[Any, ...]) -> None:
        """Called by the library with (last entry, entry before it, members); it renames the file afterwards."""
        last, before_last, _members = library_data
        data = pack(cbor2.dumps([self.state.snapshot(), list(last), list(before_last)]))
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)  # noqa: PTH120
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read_dump(self, path: str) -> tuple[Any, ...]:
        """A dump of ours or of a peer: bytes of no effect until the CRC and the shape are right."""
        snapshot, last, before_last = read_dump_file(path)
        self.state = ControlState.restore(snapshot)
        self._hand_over(snapshot)
        return tuple(last), tuple(before_last), set()


def read_dump_file(path: str) -> tuple[bytes, list[Any], list[Any]]:
    """(snapshot, last entry, entry before it). Raises MirrorDamaged."""
    with open(path, "rb") as file:
        data = unpack(file.read(), path)
    try:
        snapshot, last, before_last = cbor2.loads(data)
        if not (isinstance(snapshot, bytes) and len(last) == len(before_last) == 3):
            raise MirrorDamaged(f"{path} does not hold a control-plane dump")
    except (cbor2.CBORDecodeError, TypeError, ValueError) as error:
        raise MirrorDamaged(f"{path} does not hold a control-plane dump: {error}") from error
    return snapshot, last, before_last


def password_for(addresses: Iterable[tuple[str, int]], secret: str | None, *, can_encrypt: bool) -> str | None:
    """What the library encrypts with. Raises ValueError where other machines could reach it unencrypted.

    On loopback alone it may do without: the restricted unpickler stands in any case.
    """
    for host, port in addresses:
        try:
            local = host == "localhost" or ip_address(host).is_loopback
        except ValueError:
            local = False
        if local:
            continue
        if secret is None:
            raise ValueError(f"the control plane at {host}:{port} is not loopback and needs a secret")
        if not can_encrypt:
            raise ValueError(
                f"the control plane at {host}:{port} is not loopback and needs the extra: pip install 'quorate[secure]'"
            )
    return secret if can_encrypt else None


class ReplicatedRegistry:
    """`namesrv.registry.Registry` among several name servers. Construct it in the main thread."""

    def __init__(self, env: Env, config: NamesrvConfig, mirror: Mirror) -> None:
        self._password = password_for(config.peers.values(), config.secret, can_encrypt=HAS_CRYPTO)
        if config.name not in config.peers:
            raise ValueError(f"name server {config.name} is not among its peers {sorted(config.peers)}")
        self._env = env
        self._config = config
        self._mirror = mirror
        self._log = config.log.bind(part="control plane")
        self._turn = trio.Lock()
        self._listeners: list[Listener] = []
        self._state = ControlState()
        self._library: _ReplicatedState | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._handed: bytes | None = None
        self._handed_lock = threading.Lock()
        self._news = trio.Event()

    @property
    def state(self) -> ControlState:
        return self._state

    @property
    def stale(self) -> bool:
        """Whether this name server has no contact with a quorum; it then answers from its last state."""
        return self._library is None or not self._library.isReady() or not self._library.hasQuorum

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each new state, and with the present one at once."""
        self._listeners.append(listener)
        listener(self._state)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started once the last state known is loaded, with a quorum or without.

        Raises MirrorDamaged or ValueError where it cannot be read. Checkpoint.
        """
        snapshot = self._mirror.load()
        if snapshot is not None:
            self._adopt(ControlState.restore(snapshot))
        dump_path = f"{self._config.data_dir}/control.dump"
        if self._env.files.exists(dump_path):
            read_dump_file(dump_path)  # the library would go on without a damaged one, silently empty
        self._token = trio.lowlevel.current_trio_token()
        addresses = {name: f"{host}:{port}" for name, (host, port) in self._config.peers.items()}
        own = addresses.pop(self._config.name)
        machine = _Machine(dump_path, self._hand_over)
        conf = SyncObjConf(
            autoTick=True,
            bindAddress=own,
            password=self._password,
            journalFile=f"{self._config.data_dir}/control.journal",
            fullDumpFile=dump_path,
            serializer=machine.write_dump,
            deserializer=machine.read_dump,
            useFork=False,
            dynamicMembershipChange=False,
            raftMinTimeout=0.5,
            raftMaxTimeout=1.0,
            appendEntriesPeriod=0.1,
            connectionRetryTime=0.5,
            connectionTimeout=2.0,
            leaderFallbackTimeout=2.0,
        )
        library = self._library = _ReplicatedState(own, sorted(addresses.values()), conf, machine)
        try:
            task_status.started()
            while True:
                await self._news.wait()
                self._news = trio.Event()
                await self._take_over()
        finally:
            self._library = None
            with trio.CancelScope(shield=True):
                await self._env.run_in_thread(library.destroy_synchronous)

    # ------------------------------------------------------------------------------------- from the library's thread

    def _hand_over(self, snapshot: bytes) -> None:
        with self._handed_lock:
            self._handed = snapshot
        self._call(self._announce)

    def _announce(self) -> None:
        self._news.set()

    def _call(self, function: Any, *arguments: Any) -> None:
        """Run a function on the loop, if it still turns."""
        assert self._token is not None
        try:
            self._token.run_sync_soon(function, *arguments)
        except trio.RunFinishedError:
            return

    # ------------------------------------------------------------------------------------------------- on the loop

    async def _take_over(self) -> None:
        with self._handed_lock:
            snapshot, self._handed = self._handed, None
        if snapshot is None:
            return
        state = ControlState.restore(snapshot)
        # A restart replays the journal: what the mirror knows already must not appear to go back.
        if state.version < self._state.version:
            return
        self._adopt(state)
        try:
            await self._env.run_in_thread(self._mirror.save, snapshot)
        except OSError as error:
            self._log.error("mirror not written", path=self._mirror.path, reason=error.strerror)

    def _adopt(self, state: ControlState) -> None:
        self._state = state
        for listener in self._listeners:
            listener(state)

    async def propose(self, command: Command) -> Outcome:
        """Replicate and apply one command. Checkpoint; a cancelled one may still take effect."""
        check(command)
        request_id = self._env.ids.salt(16)
        data = cbor2.dumps(list(command))
        async with self._turn:
            with self._env.clock.move_on_after(PROPOSAL_S):
                while True:
                    result = await self._propose_once(request_id, data)
                    if isinstance(result, str):
                        raise CommandRefused(result)
                    if result is not None:
                        outcome = Outcome(*result)
                        await self._applied_here(outcome.version)
                        return outcome
                    # Also after "unknown outcome": the request id makes a second try harmless.
                    await self._env.clock.sleep(_RETRY_S)
        raise RegistryUnavailable(f"no quorum of name servers within {PROPOSAL_S:g} s")

    async def _propose_once(self, request_id: bytes, data: bytes) -> tuple[int, bool] | str | None:
        library = self._library
        if library is None:
            return None
        done = trio.Event()
        answers: list[tuple[Any, int]] = []

        def answered(result: Any, reason: int) -> None:
            answers.append((result, reason))
            self._call(done.set)

        library.apply_command(request_id, data, callback=answered)
        with self._env.clock.move_on_after(PROPOSAL_S / 2):
            await done.wait()
        if not answers or answers[0][1] != FAIL_REASON.SUCCESS:
            return None
        result: tuple[int, bool] | str | None = answers[0][0]
        return result

    async def _applied_here(self, version: int) -> None:
        """Wait until this name server itself shows the change, so that the next read sees it."""
        while self._state.version < version:
            await self._env.clock.sleep(0.01)
