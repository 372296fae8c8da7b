"""What was released stays readable and speakable: data folders of format 1, peers of protocol 1 (tests/formats)."""

from __future__ import annotations

import hashlib
import hmac
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import cbor2
import pytest
import trio

from dledger.config import GroupConfig
from dledger.core.messages import Append, AppendReply, SegmentsOffer
from dledger.core.types import EntryType
from dledger.errors import LedgerError
from dledger.group import AddLearner, RaftGroup
from dledger.peers import Peers
from dledger.store.checkpoint import read_checkpoint
from dledger.store.format import Format, read_format
from dledger.store.log_store import LogStore
from dledger.store.meta import MetaFile
from dledger.wire import (
    KIND_APP,
    KIND_HELLO,
    KIND_PING,
    KIND_PONG,
    KIND_PROOF,
    KIND_WELCOME,
    MESSAGE_BYTES_MAX,
    Hello,
    MessageReader,
    Received,
    decode_hello,
    decode_raft,
    encode,
    encode_raft,
    hello_fields,
    prove,
)
from runtime.logs import get_logger
from runtime.model import Env, Stream
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import ToyMachine, toy_cluster, toy_env
from tests.unit.dledger.test_peers import Recorder

V1 = Path(__file__).parents[2] / "formats" / "v1"
FOLDERS = ["folder-stopped", "folder-killed"]
KIND_OF_TOMORROW = 30


def unpacked(name: str, into: Path) -> tuple[Path, dict[str, Any]]:
    with tarfile.open(V1 / f"{name}.tar.gz") as tar:
        tar.extractall(into, filter="data")
    return into, json.loads((V1 / f"{name}.json").read_text())


async def served(env: Env, folder: Path, recorded: dict[str, Any], machine: ToyMachine, **settings: Any) -> RaftGroup:
    """The group of such a folder, to be run."""
    config = GroupConfig(
        cluster="released",
        cluster_uuid="c" * 32,
        group="g0",
        node_id=recorded["node_id"],
        peers={f"n{number}": ("127.0.0.1", 1) for number in range(3)},
        data_dir=str(folder),
        segment_bytes=65_536,
        **settings,
    )
    return RaftGroup(env, config, machine, get_logger("toy"), listener=await env.net.listen("127.0.0.1", 0))


def digests(store: LogStore) -> list[list[Any]]:
    found = []
    index = store.first_index
    while index <= store.last_index:
        for entry in store.entries(index, 100_000):
            digest = hashlib.sha256(entry.frame).hexdigest()
            found.append([entry.index, entry.term, entry.position, int(entry.type), entry.count, digest])
            index += 1
    return found


@pytest.mark.parametrize("name", FOLDERS)
async def test_folder_of_format_1_opens_with_every_entry(tmp_path: Path, name: str) -> None:
    folder, recorded = unpacked(name, tmp_path)
    env = toy_env(tmp_path)
    identity = read_format(env.files, str(folder))
    assert identity is not None and identity.node_id == recorded["node_id"]
    for _ in range(2):  # the second time it may have been upgraded
        meta = MetaFile.open(env.files, str(folder), identity)
        assert meta.saved.term == 2 and not meta.saved.recovering and meta.saved.clean == (name == "folder-stopped")
        store, recovered = await LogStore.open(env, str(folder), identity.segment_bytes, meta)
        assert not recovered.faults and recovered.bytes_cut == 0
        assert digests(store) == recorded["entries"]
        checkpoint = read_checkpoint(env.files, str(folder))
        assert checkpoint is not None and 0 < checkpoint.index <= store.last_index and not checkpoint.config
        assert int.from_bytes(checkpoint.blob[:8], "big") == checkpoint.index
        store.abandon()
        meta.close()


@pytest.mark.parametrize("name", FOLDERS)
async def test_folder_of_format_1_is_served(tmp_path: Path, name: str) -> None:
    """With its checkpoint, behind which the log is replayed; then it takes part, and stops in order."""
    folder, recorded = unpacked(name, tmp_path)
    env = toy_env(tmp_path)
    machine = ToyMachine()
    group = await served(env, folder, recorded, machine)
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        records = machine.applied + machine.pending
        assert machine.restored[0] is not None and len(records) == recorded["records"]
        assert hashlib.sha256(b"".join(records)).hexdigest() == recorded["applied_sha256"]
        assert group.statistics().last_index == recorded["entries"][-1][0]
        await group.stop_gracefully()


def trace() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The secret, and for each connection what the dialling and what the accepting side said."""
    content = cbor2.loads((V1 / "trace.cbor").read_bytes())
    return content["secret"], [
        (b"".join(data for side, data in parts if side == 0), b"".join(data for side, data in parts if side == 1))
        for parts in content["connections"]
    ]


def test_trace_of_protocol_1_is_understood_and_spoken_to_the_byte() -> None:
    secret, connections = trace()
    seen: Counter[str] = Counter()
    for dialled, accepted in connections:
        from_dialler = MessageReader(MESSAGE_BYTES_MAX).feed(dialled)
        from_acceptor = MessageReader(MESSAGE_BYTES_MAX).feed(accepted)
        hello, proof = decode_hello(from_dialler[0]), from_dialler[1]
        welcome = decode_hello(Received(KIND_WELCOME, from_acceptor[0].fields[0], memoryview(b"")))
        assert (hello.version, hello.version_max, welcome.version_max) == (1, 1, 1)
        said = {
            "dialler": [
                *encode(KIND_HELLO, hello_fields(hello, 1)),
                *encode(KIND_PROOF, (prove(secret, b"dial", hello, welcome, 1),)),
            ],
            "acceptor": encode(KIND_WELCOME, (hello_fields(welcome, 1), prove(secret, b"accept", hello, welcome, 1))),
        }
        assert proof.kind == KIND_PROOF
        for side, messages, stream in (
            ("dialler", from_dialler[2:], dialled),
            ("acceptor", from_acceptor[1:], accepted),
        ):
            parts = said[side]
            for received in messages:
                if received.kind in (KIND_PING, KIND_PONG):
                    seen["ping"] += 1
                    parts.extend(encode(received.kind, ()))
                elif received.kind == KIND_APP:
                    seen["app"] += 1
                    parts.extend(encode(KIND_APP, (), received.raw))
                else:
                    message = decode_raft(received)
                    seen[type(message).__name__] += 1
                    parts.extend(encode_raft(message, 1))
            again = b"".join(bytes(part) for part in parts)
            # A killed node's last message may have been cut off.
            assert stream.startswith(again) and len(stream) - len(again) < 100_000
    print(dict(seen))
    kinds = ("PreVote", "PreVoteReply", "Vote", "VoteReply", "Append", "AppendReply", "TimeoutNow", "app", "ping")
    assert all(seen[kind] for kind in kinds), seen
    assert seen["Append"] > 50


def test_what_version_1_has_no_words_for_is_said_otherwise_or_left_out() -> None:
    reply = AppendReply(3, 4, True, 5, 5, 0, 0, disk_ok=False)
    (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(b"".join(encode_raft(reply, 1)))
    assert received.fields == [3, 4, True, 5, 5, 0, 0]
    assert decode_raft(received) == AppendReply(3, 4, True, 5, 5, 0, 0, disk_ok=True)
    (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(b"".join(encode_raft(reply, 2)))
    assert decode_raft(received) == reply
    for first_index in (1, 2, 900):
        (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(
            b"".join(encode_raft(SegmentsOffer(3, 4, first_index, 7), 1))
        )
        heartbeat = decode_raft(received)
        # No entry has term 0: the predecessor never matches, and never looks like damage.
        assert isinstance(heartbeat, Append) and not heartbeat.entries
        assert heartbeat.prev_index >= 1 and heartbeat.prev_term == 0
        assert (heartbeat.term, heartbeat.seq, heartbeat.commit) == (3, 4, 7)


class NodeOf1:
    """The handshake and framing of protocol 1, written down once more, for one connection."""

    def __init__(self, stream: Stream, secret: bytes) -> None:
        self.stream = stream
        self.secret = secret
        self.reader = MessageReader(MESSAGE_BYTES_MAX)
        self.arrived: list[Received] = []

    async def receive(self) -> Received:
        with trio.fail_after(3):
            while not self.arrived:
                data = await self.stream.receive_some()
                assert data, "closed"
                self.arrived.extend(self.reader.feed(data))
        return self.arrived.pop(0)

    @staticmethod
    def fields(node: str, to: str) -> list[Any]:
        return [1, "released", "c" * 32, "g0", "g" * 32, node, to, "boot", 65_536, bytes(16)]

    def hmac(self, role: bytes, hello: list[Any], welcome: list[Any]) -> bytes:
        return hmac.new(self.secret, cbor2.dumps([role, hello[:10], welcome[:10]]), hashlib.sha256).digest()

    async def dial(self, node: str, to: str) -> None:
        hello = self.fields(node, to)
        await self.stream.send_parts(encode(KIND_HELLO, hello))
        answer = await self.receive()
        assert answer.kind == KIND_WELCOME and len(answer.fields) == 2
        welcome, shown = answer.fields
        assert welcome[0] == 1, "all that version 1 takes"
        assert shown == self.hmac(b"accept", hello, welcome)
        await self.stream.send_parts(encode(KIND_PROOF, (self.hmac(b"dial", hello, welcome),)))
        assert (await self.receive()).kind == KIND_PONG

    async def accept(self, node: str) -> None:
        first = await self.receive()
        hello = first.fields
        assert first.kind == KIND_HELLO and hello[0] == 1 and hello[6] == node
        welcome = self.fields(node, hello[5])
        await self.stream.send_parts(encode(KIND_WELCOME, (welcome, self.hmac(b"accept", hello, welcome))))
        proof = await self.receive()
        assert proof.kind == KIND_PROOF and proof.fields == [self.hmac(b"dial", hello, welcome)]
        await self.stream.send_parts(encode(KIND_PONG, ()))


async def test_a_node_of_protocol_1_is_met_on_its_terms(tmp_path: Path) -> None:
    env = toy_env(tmp_path)
    secret = b"shared"
    ours, theirs = [await env.net.listen("127.0.0.1", 0) for _ in range(2)]
    config = GroupConfig(
        cluster="released",
        cluster_uuid="c" * 32,
        group="g0",
        node_id="n0",
        peers={"n0": ours.address, "n1": theirs.address},
        data_dir="unused",
        secret=secret,
    )
    identity = Format(
        cluster="released",
        cluster_uuid="c" * 32,
        group="g0",
        group_uuid="g" * 32,
        node_id="n0",
        segment_bytes=65_536,
    )
    seen = Recorder()
    peers = Peers(env, config, identity, seen, seen)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peers.run, ours)
        accepted = NodeOf1(await theirs.accept(), secret)
        await accepted.accept("n1")
        dialled = NodeOf1(await env.net.dial(*ours.address), secret)
        await dialled.dial("n1", "n0")
        await wait_until(lambda: seen.ups == ["n1"], what="the connection")
        assert peers.oldest_version == 1 and peers.fetchable() == []
        peers.send("n1", SegmentsOffer(3, 1, 10, 7))
        received = await accepted.receive()
        assert isinstance(decode_raft(received), Append)
        assert not peers.send_trim_wanted("n1", 7), "it knows no trims"
        await dialled.stream.send_parts(encode(KIND_OF_TOMORROW, (1, "two"), b"three"))
        await dialled.stream.send_parts(encode_raft(Append(3, 0, 0, 0, 0, 1), 1))
        await wait_until(lambda: seen.messages, what="the heartbeat, behind what is passed over")
        peers.send("n1", AppendReply(3, 1, True, 0, 0))
        assert (await dialled.receive()).fields == [3, 1, True, 0, 0, 0, 0]
        assert not [line for line in seen.lines if line[0] == "peer connection refused"]
        nursery.cancel_scope.cancel()
    await accepted.stream.aclose()
    await dialled.stream.aclose()
    await ours.aclose()
    await theirs.aclose()


def test_hellos_agree_on_the_newest_common_version() -> None:
    from dledger.wire import agree_version

    def hello(oldest: int, newest: int) -> Hello:
        return Hello(oldest, "c", "u", "g", "u", "n0", "n1", "b", 65_536, bytes(16), newest)

    assert agree_version(hello(1, 2), hello(1, 1)) == 1
    assert agree_version(hello(1, 2), hello(1, 3)) == 2
    assert agree_version(hello(2, 3), hello(1, 2)) == 2
    assert agree_version(hello(3, 4), hello(1, 2)) is None
    assert agree_version(hello(1, 2), hello(3, 4)) is None


async def test_nodes_of_both_protocols_form_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rolling upgrade: two nodes still speak version 1 only, and nobody changes the members meanwhile."""

    def make(env: Any, config: GroupConfig, *args: Any, **settings: Any) -> Peers:
        versions = (1, 2) if config.node_id == "n0" else (1, 1)
        return Peers(env, config, *args, **settings, versions=versions)

    monkeypatch.setattr("dledger.lifecycle.Peers", make)
    async with toy_cluster(tmp_path, secret=b"shared") as toy:
        for number in range(5):
            await toy.put(b"%d" % number)
        leader = await toy.leader()
        if leader.node_id != "n0":
            leader.running.transfer_leadership("n0")
            await wait_until(lambda: toy.nodes["n0"].running.is_ready_leader, what="n0 to lead")
        await toy.put(b"led by the newer one")
        with pytest.raises(LedgerError, match="upgrade it first"):
            await toy.nodes["n0"].running.change_members(AddLearner("n9", ("127.0.0.1", 1)))
        await toy.level()
        assert {toy.segment_bytes(name) for name in toy.nodes} == {toy.segment_bytes("n0")}


def test_entry_types_keep_their_numbers() -> None:
    assert (EntryType.DATA, EntryType.NOOP, EntryType.CONFIG, EntryType.TRIM) == (1, 2, 3, 4)
