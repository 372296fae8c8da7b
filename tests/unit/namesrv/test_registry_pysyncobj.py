"""The replicated control plane: three name servers in one process, and hostile bytes on its port."""

from __future__ import annotations

import pickle
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from namesrv.config import NamesrvConfig
from namesrv.mirror import Mirror, MirrorDamaged, pack
from namesrv.registry import Outcome, RegistryUnavailable
from namesrv.registry_pysyncobj import ReplicatedRegistry, _loads, _Machine, password_for, read_dump_file
from runtime.testing import test_env, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves sockets to the collector


class Touch:
    """Runs code when it is unpickled, as an attacker's object would."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self._path, "w")


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class Member:
    def __init__(self, name: str, peers: dict[str, tuple[str, int]], folder: Path) -> None:
        env = test_env(folder)
        self.folder = folder / name
        self.folder.mkdir(exist_ok=True)
        config = NamesrvConfig(("127.0.0.1", 0), str(self.folder), name, peers)
        self.registry = ReplicatedRegistry(env, config, Mirror(env.files, str(self.folder / "control.cbor")))
        self.scope = trio.CancelScope()
        self.done = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            await self.registry.run(task_status=task_status)
        self.done.set()

    async def stop(self) -> None:
        self.scope.cancel()
        await self.done.wait()


@asynccontextmanager
async def members(folder: Path, peers: dict[str, tuple[str, int]]) -> AsyncIterator[list[Member]]:
    async with trio.open_nursery() as nursery:
        started = [Member(name, peers, folder) for name in peers]
        for member in started:
            await nursery.start(member.run)
        yield started
        for member in started:
            await member.stop()


def three() -> dict[str, tuple[str, int]]:
    return {f"ns{number}": ("127.0.0.1", port) for number, port in enumerate(free_ports(3))}


@pytest.mark.slow
async def test_three_name_servers_agree_and_remember(tmp_path: Path) -> None:
    peers = three()
    async with members(tmp_path, peers) as nodes:
        first, second, third = nodes
        assert await first.registry.propose(("kv_put", "ns", "k", "v1")) == Outcome(1, True)
        assert await second.registry.propose(("kv_put", "ns", "k", "v2")) == Outcome(2, True)
        assert await third.registry.propose(("wipe", "broker-a")) == Outcome(3, True)
        await wait_until(lambda: all(node.registry.state.version == 3 for node in nodes), what="agreement")
        assert {node.registry.state.snapshot() for node in nodes} == {first.registry.state.snapshot()}
        assert not any(node.registry.stale for node in nodes)

        await third.stop()
        assert await first.registry.propose(("unwipe", "broker-a")) == Outcome(4, True)
        await second.stop()
        await wait_until(lambda: first.registry.stale, limit=10, what="the loss of the quorum")
        with pytest.raises(RegistryUnavailable, match="no quorum"):
            await first.registry.propose(("kv_put", "ns", "k", "lost"))
        assert first.registry.state.kv == {"ns": {"k": "v2"}}  # reading goes on
    async with members(tmp_path, peers) as nodes:
        for node in nodes[:1]:
            assert node.registry.state.version >= 4  # from the mirror, before any quorum
        await wait_until(lambda: all(node.registry.state.version >= 4 for node in nodes), limit=15, what="catching up")
        assert await nodes[2].registry.propose(("kv_put", "ns", "again", "v")) == Outcome(
            nodes[2].registry.state.version, True
        )
        assert nodes[2].registry.state.kv["ns"]["again"] == "v"
        assert nodes[2].registry.state.wiped == {}


async def test_a_hostile_pickle_on_the_port_is_not_executed(tmp_path: Path) -> None:
    peers = three()
    trap = tmp_path / "executed"
    pickled = pickle.dumps(Touch(trap), 2)
    pickle.loads(pickled).close()
    assert trap.exists()  # the trap works where unpickling is not restricted ...
    trap.unlink()
    async with members(tmp_path, peers) as nodes:
        await nodes[0].registry.propose(("kv_put", "ns", "k", "v"))
        for host, port in peers.values():
            stream = await trio.open_tcp_stream(host, port)
            data = zlib.compress(pickled)
            await stream.send_all(struct.pack("i", len(data)) + data)
            with trio.move_on_after(5):
                assert await stream.receive_some() == b""  # ... and here the connection just ends
            await stream.aclose()
        assert not trap.exists()
        await nodes[1].registry.propose(("kv_put", "ns", "k", "w"))
        await wait_until(lambda: nodes[0].registry.state.kv == {"ns": {"k": "w"}}, what="the change")


def test_unpickling_knows_no_class(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    with pytest.raises(pickle.UnpicklingError, match=r"io\.open does not belong"):
        _loads(pickle.dumps(Touch(trap), 2))
    for hostile in (b"cos\nsystem\n(S'true'\ntR.", b"c__builtin__\neval\n(S'1'\ntR.", b"cposix\nsystem\n."):
        with pytest.raises(pickle.UnpicklingError):
            _loads(hostile)
    assert not trap.exists()
    message = {"type": "append_entries", "term": 3, "entries": [(b"\x00\xff", 1, 2)], "x": None, "y": ("a", 1.5)}
    assert _loads(pickle.dumps(message, 2)) == message


def test_every_module_of_the_library_uses_the_restricted_unpickler() -> None:
    import pysyncobj.journal
    import pysyncobj.serializer
    import pysyncobj.syncobj
    import pysyncobj.tcp_connection

    assert pysyncobj.journal.loads is _loads
    for module in (pysyncobj.serializer, pysyncobj.syncobj, pysyncobj.tcp_connection):
        assert module.pickle.loads is _loads


def test_an_unrestricted_library_is_refused() -> None:
    program = "import pysyncobj\ntry:\n    import namesrv.registry_pysyncobj\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "pysyncobj was imported before its unpickler could be restricted\n"


def test_dumps_are_checked(tmp_path: Path) -> None:
    handed: list[bytes] = []
    machine = _Machine(str(tmp_path / "dump"), handed.append)
    import cbor2

    machine.apply(b"1", cbor2.dumps(["kv_put", "ns", "k", "v"]))
    path = str(tmp_path / "dump")
    machine.write_dump(path, ((b"cmd", 5, 2), (b"cmd", 4, 2), {"members"}))
    other = _Machine(path, handed.append)
    assert other.read_dump(path) == ((b"cmd", 5, 2), (b"cmd", 4, 2), set())
    assert other.state.kv == {"ns": {"k": "v"}}
    assert len(handed) == 2
    data = bytearray((tmp_path / "dump").read_bytes())
    data[20] ^= 1
    for bad in (bytes(data), b"", pack(b"\xff"), pack(cbor2.dumps([1, [], []])), pack(cbor2.dumps(7))):
        (tmp_path / "dump").write_bytes(bad)
        with pytest.raises(MirrorDamaged):
            read_dump_file(path)


def test_a_state_that_grows_too_large_is_refused_everywhere_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    import cbor2

    monkeypatch.setattr("namesrv.registry_pysyncobj.STATE_LIMIT_BYTES", 200)
    machine = _Machine("", lambda snapshot: None)
    assert machine.apply(b"1", cbor2.dumps(["kv_put", "ns", "k", "v"])) == (1, True)
    assert "would hold more" in str(machine.apply(b"2", cbor2.dumps(["kv_put", "ns", "k", "v" * 200])))
    assert machine.state.kv == {"ns": {"k": "v"}}


def test_other_machines_need_a_secret_and_encryption() -> None:
    loopback = [("127.0.0.1", 1), ("::1", 2), ("localhost", 3)]
    assert password_for(loopback, None, can_encrypt=False) is None
    assert password_for(loopback, "secret", can_encrypt=False) is None
    assert password_for(loopback, "secret", can_encrypt=True) == "secret"
    assert password_for([("10.0.0.1", 1)], "secret", can_encrypt=True) == "secret"
    for host in ("10.0.0.1", "ns1.example"):
        with pytest.raises(ValueError, match="needs a secret"):
            password_for([*loopback, (host, 4)], None, can_encrypt=True)
        with pytest.raises(ValueError, match="needs the extra"):
            password_for([*loopback, (host, 4)], "secret", can_encrypt=False)
