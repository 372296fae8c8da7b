"""Who may talk to a member, and what happens to the connection of who may not."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

from dledger.config import GroupConfig
from dledger.core.messages import Append, AppendReply, Message, Vote
from dledger.core.types import EntryType, frame_entry
from dledger.peers import Peers
from dledger.store.format import Format
from dledger.wire import KIND_HELLO, encode
from runtime.model import Env, Listener
from runtime.testing import test_env, wait_until


class Recorder:
    """Peer events, and the log, in lists."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Message]] = []
        self.payloads: list[tuple[str, bytes]] = []
        self.trims_wanted: list[tuple[str, int]] = []
        self.ups: list[str] = []
        self.losses: list[tuple[str, bool]] = []
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def on_message(self, peer: str, message: Message) -> None:
        self.messages.append((peer, message))

    def on_app_message(self, peer: str, payload: bytes) -> None:
        self.payloads.append((peer, payload))

    def on_trim_wanted(self, peer: str, position: int) -> None:
        self.trims_wanted.append((peer, position))

    def on_peer_up(self, peer: str) -> None:
        self.ups.append(peer)

    def on_peer_lost(self, peer: str, hard: bool) -> None:
        self.losses.append((peer, hard))

    def pump(self) -> None:
        return

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    info = debug = warning


class Member:
    def __init__(self, env: Env, listener: Listener, config: GroupConfig, segment_bytes: int = 65_536) -> None:
        self.seen = Recorder()
        self.listener = listener
        identity = Format(
            cluster=config.cluster,
            cluster_uuid=config.effective_cluster_uuid,
            group=config.group,
            group_uuid=config.group_uuid,
            node_id=config.node_id,
            segment_bytes=segment_bytes,
        )
        self.peers = Peers(env, config, identity, self.seen, self.seen)  # type: ignore[arg-type]
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        try:
            with self.scope:
                await self.peers.run(self.listener)
        finally:
            with trio.CancelScope(shield=True):
                await self.listener.aclose()

    @property
    def warnings(self) -> list[str]:
        return [str(fields["reason"]) for event, fields in self.seen.lines if event == "peer connection refused"]


@asynccontextmanager
async def members(tmp_path: Path, *changes: dict[str, Any]) -> AsyncIterator[list[Member]]:
    """Two members that dial each other, each with changes to its configuration."""
    env = test_env(tmp_path)
    async with trio.open_nursery() as nursery:
        listeners = [await env.net.listen("127.0.0.1", 0) for _ in range(2)]
        peers = {f"n{number}": listener.address for number, listener in enumerate(listeners)}
        found = []
        for number in range(2):
            settings: dict[str, Any] = {
                "cluster": "c",
                "cluster_uuid": "cu",
                "group": "g",
                "node_id": f"n{number}",
                "peers": peers,
                "data_dir": "unused",
            }
            change = dict(changes[number]) if number < len(changes) else {}
            segment_bytes = change.pop("folder_segment_bytes", 65_536)
            config = GroupConfig(**{**settings, **change})
            found.append(Member(env, listeners[number], config, segment_bytes))
            nursery.start_soon(found[-1].run)
        yield found
        nursery.cancel_scope.cancel()


async def connected(found: list[Member]) -> None:
    await wait_until(
        lambda: all(any(map(member.peers.is_connected, ("n0", "n1"))) for member in found),
        what="connections",
    )


@pytest.mark.parametrize("secret", [None, b"a shared secret"])
async def test_members_meet_and_messages_keep_their_order(tmp_path: Path, secret: bytes | None) -> None:
    async with members(tmp_path, {"secret": secret}, {"secret": secret}) as found:
        await connected(found)
        assert found[0].seen.ups == ["n1"] and found[1].seen.ups == ["n0"]
        sent = [Append(1, 0, 0, 0, 0, seq) for seq in range(1, 200)]
        for message in sent:
            found[0].peers.send("n1", message)
        await wait_until(lambda: len(found[1].seen.messages) == len(sent), what="all messages")
        assert [message.seq for _, message in found[1].seen.messages] == list(range(1, 200))  # type: ignore[union-attr]
        found[1].peers.send("n0", AppendReply(1, 5, True, 0, 0))
        await wait_until(lambda: found[0].seen.messages, what="the answer")
        assert found[0].seen.messages == [("n1", AppendReply(1, 5, True, 0, 0))]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cluster": "other"}, "its cluster is"),
        ({"cluster_uuid": "other"}, "its cluster uuid is"),
        ({"group": "other"}, "its group is"),
        ({"secret": b"only one knows"}, "secret"),
        ({"folder_segment_bytes": 131_072}, "its segment size is"),
    ],
)
async def test_strangers_are_refused_with_one_line_and_a_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    async with members(tmp_path, {}, change) as found:
        await wait_until(lambda: all(member.warnings for member in found), what="both complaints")
        for _ in range(6):  # further attempts add no further lines
            for member in found:
                stream = await member.peers._env.net.dial(*found[0].listener.address)
                await stream.send_parts([b"GET / HTTP/1.1\r\n\r\n"])
                while await stream.receive_some():
                    pass
                await stream.aclose()
        assert len(found[0].warnings) == len(set(found[0].warnings)) <= 3, found[0].warnings
        assert len(found[1].warnings) == len(set(found[1].warnings)) <= 2, found[1].warnings
        assert any(reason in warning for warning in found[0].warnings)
        assert not any(member.peers.is_connected("n0") or member.peers.is_connected("n1") for member in found)
        assert not found[0].seen.ups and not found[1].seen.ups


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\xff" * 100,
        b"".join(encode(5, (1, 2, 3, 4, 5, 6))),
        b"".join(encode(KIND_HELLO, (1, 2, 3))),
        b"".join(encode(KIND_HELLO, (1, "c", "cu", "g", "gu", "n7", "n0", "b", 65_536, bytes(16)))),
    ],
    ids=["http", "tls", "ff", "append", "bad-hello", "unknown-node"],
)
async def test_scenario_33_garbage_on_the_peer_port_closes_the_connection_with_one_line(
    tmp_path: Path, garbage: bytes
) -> None:
    async with members(tmp_path) as found:
        await connected(found)
        env = test_env(tmp_path)
        stream = await env.net.dial(*found[0].listener.address)
        await stream.send_parts([garbage])
        with trio.fail_after(3):
            while await stream.receive_some():
                pass
        assert len(found[0].warnings) == 1
        await stream.aclose()
        found[1].peers.send("n0", Vote(1, 0, 0))
        await wait_until(lambda: found[0].seen.messages, what="the others still talk")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such option")
async def test_connections_break_when_nothing_is_acknowledged_for_two_seconds(tmp_path: Path) -> None:
    """A host that lost its power closes nothing (raft.md 4.14)."""
    async with members(tmp_path) as found:
        await connected(found)
        peers = found[0].peers
        await wait_until(lambda: peers._accepted, what="the other's connection")
        for link in (*peers._dialled.values(), *peers._accepted.values()):
            wire = link.stream._socket  # type: ignore[attr-defined]
            assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2000
            assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 1


async def test_members_in_force_are_dialled_and_those_that_went_are_let_go(tmp_path: Path) -> None:
    async with members(tmp_path) as found:
        await connected(found)
        peers, other = found[0].peers, found[1].peers
        peers.set_members({"n0": found[0].listener.address})
        await wait_until(lambda: not peers.is_connected("n1"), what="the end of the connection")
        await wait_until(lambda: other.is_connected("n0"), what="the other side to call again: it was configured")
        assert not peers.is_connected("n1")
        peers.set_members({"n0": found[0].listener.address, "n1": found[1].listener.address})
        await wait_until(lambda: peers.is_connected("n1"), what="the new connection")


async def test_a_member_that_comes_and_goes_in_one_step_is_not_dialled(tmp_path: Path) -> None:
    """As a node sees it that catches up: the log brings both changes before another task has had its turn."""
    async with members(tmp_path) as found:
        await connected(found)
        peers = found[0].peers
        addresses = {one.peers._config.node_id: one.listener.address for one in found}
        for _ in range(2):
            peers.set_members({**addresses, "n4": ("127.0.0.1", 1)})
            peers.set_members(addresses)
        await trio.testing.wait_all_tasks_blocked()
        assert set(peers._dialling) == set(addresses) - {"n0"}


async def test_lost_peer_is_hard_only_when_it_refuses(tmp_path: Path) -> None:
    async with members(tmp_path) as found:
        await connected(found)
        started = trio.current_time()
        found[1].scope.cancel()
        await wait_until(lambda: found[0].seen.losses, what="the loss")
        assert found[0].seen.losses == [("n1", True)]
        assert trio.current_time() - started < 1.0
        assert not found[0].peers.is_connected("n1")
        found[0].peers.send("n1", Vote(1, 0, 0))
        assert not found[0].peers.send_app("n1", b"x")


async def test_broken_connection_to_a_live_peer_is_soft_and_comes_back(tmp_path: Path) -> None:
    async with members(tmp_path) as found:
        await connected(found)
        found[0].peers.disconnect("n1", "for the test")
        await wait_until(lambda: found[0].seen.ups == ["n1", "n1"], what="the reconnect")
        assert found[0].seen.losses == [("n1", False)]


@pytest.mark.parametrize("where", ["dial", "joined", "peers"])
async def test_a_member_is_found_where_it_has_moved_to(tmp_path: Path, where: str) -> None:
    """The address in the log may be an old one: then the configuration's is tried, and the other way round."""
    async with members(tmp_path) as found:
        await connected(found)
        n0, n1 = found
        old, new = n1.listener.address, ("127.0.0.1", free_port())
        config = {"peers": n0.peers._config.peers, "dial": {}, "joined": {}}
        config[where] = {**config[where], "n1": new}
        n0.peers._config = evolve(n0.peers._config, **config)  # type: ignore[arg-type]
        n0.peers.set_members({"n0": n0.listener.address, "n1": old})
        n1.scope.cancel()
        await wait_until(lambda: not n0.peers.is_connected("n1"), what="the loss")
        n1.listener, n1.scope = await n1.peers._env.net.listen(*new), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(n1.run)
            await wait_until(lambda: n0.peers.is_connected("n1"), what="the connection to the new address")
            nursery.cancel_scope.cancel()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_members_that_fall_out_at_once_do_not_redial_in_a_busy_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with members(tmp_path) as found:
        peers = found[0].peers
        ups: list[str] = []

        def fall_out(peer: str) -> None:
            ups.append(peer)
            peers.disconnect(peer, "for the test")

        monkeypatch.setattr(found[0].seen, "on_peer_up", fall_out)
        await connected(found[1:])
        peers.disconnect("n1", "for the test")
        await trio.sleep(1.0)
        assert 2 <= len(ups) <= 12


async def test_slow_peer_costs_a_bounded_queue_and_votes_pass_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dledger.peers.QUEUE_BYTES_MAX", 4_000_000)
    async with members(tmp_path) as found:
        await connected(found)
        link = found[0].peers._dialled["n1"]
        body = bytes(1_000_000)
        for index in range(1, 41):
            entry = frame_entry(index, 1, 0, EntryType.DATA, 1, [body], 0, 0)
            found[0].peers.send("n1", Append(1, index - 1, 1, 0, 0, index, [entry]))
        found[0].peers.send("n1", Vote(2, 0, 0))
        assert link.dropped > 0 and link._queued_bytes <= 5_100_000
        received = found[1].seen.messages
        await wait_until(lambda: received and type(received[-1][1]) is Append and received[-1][1].seq == 40, what="all")
        kinds = [type(message) for _, message in received]
        assert kinds.index(Vote) < len(kinds) - 3
        order = [message.seq for _, message in received if type(message) is Append]
        assert order == sorted(order) and len(order) == 40 - link.dropped
