"""Fetches beside the traffic of the group: what they may hold up, what they may ask, and who is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import trio
from trio.testing import MockClock

from dledger.core.messages import AppendReply
from dledger.errors import LogDamaged
from dledger.fetch import (
    CHECKPOINT_IDLE_SECONDS,
    CHECKPOINTS_MAX,
    LEASE_AWAY_SECONDS,
    LEASE_SECONDS,
    LEASES_MAX,
    PER_PEER_MAX,
    Answer,
    Exchange,
    FetchClient,
    FetchServer,
    LogSource,
)
from dledger.peers import BULK_PIECE_BYTES_MAX, Link
from dledger.store.checkpoint import write_checkpoint
from dledger.wire import (
    KIND_FETCH,
    KIND_FETCHED,
    MESSAGE_BYTES_MAX,
    Fetch,
    Fetched,
    FetchKind,
    FetchStatus,
    MessageReader,
    WireError,
    decode_fetch,
    decode_fetched,
    encode,
    encode_fetch,
    encode_fetched,
)
from runtime.testing import test_env, wait_until
from tests.unit.dledger.test_peers import Member, connected, members


class Shelf:
    """A source that gives what it is told to."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[Fetch] = []
        self.gate: trio.Event | None = None

    async def answer(self, peer: str, fetch: Fetch) -> Answer:
        self.asked.append(fetch)
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if fetch.number == 13:
            raise LogDamaged("entry 13 is damaged")
        return Answer(FetchStatus.OK, self.data)


def joined(
    member: Member, shelf: Shelf, nursery: trio.Nursery, rate: int = 1 << 30, waited_for: str = ""
) -> FetchClient:
    env = member.peers._env
    server, client = FetchServer(env, shelf, rate, lambda peer: peer == waited_for), FetchClient(env)
    member.peers._fetching = Exchange(server, client)
    client.peers = member.peers
    nursery.start_soon(server.run)
    return client


async def test_answers_come_back_whole_and_at_the_agreed_rate(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096 + b"end"
    async with members(tmp_path) as found, trio.open_nursery() as nursery:
        await connected(found)
        shelf = Shelf(data)
        client = joined(found[0], shelf, nursery)
        joined(found[1], shelf, nursery, rate=4_000_000)
        started = trio.current_time()
        answers = [await client.ask("n1", FetchKind.CHUNK, 1, 2, 3) for _ in range(2)]
        assert all(answer == Answer(FetchStatus.OK, data) for answer in answers)
        assert trio.current_time() - started > 0.3, "two answers of a MiB, at 4 MB a second"
        assert shelf.asked == [Fetch(1, FetchKind.CHUNK, 1, 2, 3), Fetch(2, FetchKind.CHUNK, 1, 2, 3)]
        assert (await client.ask("n9", FetchKind.MANIFEST)).status is FetchStatus.BUSY
        nursery.cancel_scope.cancel()


async def test_4_7_whom_the_group_waits_for_gets_its_answers_at_once(tmp_path: Path) -> None:
    async with members(tmp_path) as found, trio.open_nursery() as nursery:
        await connected(found)
        client = joined(found[0], Shelf(bytes(1 << 20)), nursery)
        joined(found[1], Shelf(bytes(1 << 20)), nursery, rate=1, waited_for="n0")
        with trio.fail_after(5):  # at the agreed rate: 12 days
            for _ in range(2):
                assert (await client.ask("n1", FetchKind.CHUNK, 1, 2, 3)).is_ok
        nursery.cancel_scope.cancel()


async def test_lost_connection_ends_the_wait_and_later_questions_are_answered(tmp_path: Path) -> None:
    async with members(tmp_path) as found, trio.open_nursery() as nursery:
        await connected(found)
        shelf = Shelf(b"data")
        shelf.gate = trio.Event()
        client = joined(found[0], shelf, nursery)
        joined(found[1], shelf, nursery)
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await client.ask("n1", FetchKind.MANIFEST))

        nursery.start_soon(ask)
        await wait_until(lambda: shelf.asked, what="the question")
        found[0].peers.disconnect("n1", "for the test")
        await wait_until(lambda: answers, what="the end of the wait")
        assert answers[0].status is FetchStatus.BUSY and "lost" in answers[0].reason
        await wait_until(lambda: found[0].seen.ups == ["n1", "n1"], what="the reconnect")
        shelf.gate.set()
        assert (await client.ask("n1", FetchKind.MANIFEST)).data == b"data"
        nursery.cancel_scope.cancel()


async def test_damage_found_by_an_answer_is_told_and_not_sent(tmp_path: Path) -> None:
    async with members(tmp_path) as found, trio.open_nursery() as nursery:
        await connected(found)
        shelf = Shelf(b"data")
        client = joined(found[0], shelf, nursery)
        joined(found[1], shelf, nursery)
        told: list[LogDamaged] = []
        found[1].peers._fetching.server.on_damage = told.append  # type: ignore[union-attr]
        answer = await client.ask("n1", FetchKind.ENTRIES, 1, 2, 13)
        assert answer == Answer(FetchStatus.DAMAGED, reason="entry 13 is damaged") and len(told) == 1
        nursery.cancel_scope.cancel()


async def test_who_asks_for_too_much_at_once_is_cut_off(tmp_path: Path) -> None:
    async with members(tmp_path) as found, trio.open_nursery() as nursery:
        await connected(found)
        shelf = Shelf(b"data")
        shelf.gate = trio.Event()
        joined(found[0], shelf, nursery)
        joined(found[1], shelf, nursery)
        for number in range(PER_PEER_MAX):
            assert found[0].peers.send_fetch("n1", Fetch(number, FetchKind.MANIFEST))
        await wait_until(lambda: shelf.asked, what="the first question")
        assert found[0].seen.ups == ["n1"]
        for number in range(2):
            found[0].peers.send_fetch("n1", Fetch(100 + number, FetchKind.MANIFEST))
        await wait_until(lambda: found[0].seen.ups == ["n1", "n1"], what="the reconnect")
        nursery.cancel_scope.cancel()


class Narrow:
    """A stream whose socket takes nothing by itself: what is sent waits for `send_parts`, one message at a time."""

    peer = local = ("127.0.0.1", 1)

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.room = trio.Semaphore(0)

    def send_nowait(self, parts: Any) -> int:
        return 0

    async def send_parts(self, parts: Any) -> None:
        await self.room.acquire()
        self.sent.append(b"".join(bytes(part) for part in parts))

    def abort(self) -> None:
        return


async def test_heartbeats_wait_for_one_piece_of_bulk_at_most(tmp_path: Path) -> None:
    stream = Narrow()
    link = Link("n1", stream, MessageReader(MESSAGE_BYTES_MAX), 0.0)  # type: ignore[arg-type]
    piece = bytes(BULK_PIECE_BYTES_MAX)
    done: list[bool] = []

    async def send_bulk() -> None:
        for number in range(6):
            done.append(await link.send_fetched(Fetched(number, FetchStatus.OK, True, crc32(piece)), piece))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.write_queued)
        nursery.start_soon(send_bulk)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert len(done) <= 3, "what waits is bounded: the sender waits too"
        link.send(AppendReply(1, 2, True, 3, 3))
        for _ in range(9):
            stream.room.release()
        await wait_until(lambda: len(done) == 6 and len(stream.sent) == 7, what="all to be sent")
        kinds = [message[4] for message in stream.sent]
        assert kinds.index(6) <= 1, "behind the piece that was being written, and no other"
        assert kinds.count(KIND_FETCHED) == 6
        nursery.cancel_scope.cancel()


def test_questions_and_answers_are_read_back_or_refused() -> None:
    (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(b"".join(encode_fetch(Fetch(7, FetchKind.ENTRIES, 1, 9, 5))))  # type: ignore[arg-type]
    assert received.kind == KIND_FETCH and decode_fetch(received) == Fetch(7, FetchKind.ENTRIES, 1, 9, 5)
    fetched = Fetched(7, FetchStatus.GONE, False, crc32(b"xyz"), 5, 6, "why")
    (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(b"".join(map(bytes, encode_fetched(fetched, b"xyz"))))
    assert decode_fetched(received) == fetched and received.raw == b"xyz"
    bad: list[tuple[int, list[Any], bytes]] = [
        (KIND_FETCH, [], b""),
        (KIND_FETCH, [1, 99, 0, 0, 0], b""),
        (KIND_FETCH, [1, 1, -1, 0, 0], b""),
        (KIND_FETCH, [1, 1, 2**63, 0, 0], b""),
        (KIND_FETCH, [1, 1, 0, 0, 0, 0], b""),
        (KIND_FETCH, [1, 1, 0, 0, 0], b"x"),
        (KIND_FETCHED, [1, 0, False, 1, 0, 0, ""], b"other bytes"),
        (KIND_FETCHED, [1, 0, False, 0, 0, 0, "x" * 501], b""),
        (KIND_FETCHED, [1, 77], b""),
    ]
    for kind, fields, raw in bad:
        (received,) = MessageReader(MESSAGE_BYTES_MAX).feed(b"".join(map(bytes, encode(kind, fields, raw))))
        with pytest.raises(WireError):
            (decode_fetch if kind == KIND_FETCH else decode_fetched)(received)


async def test_answer_over_the_limit_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dledger.fetch.ANSWER_BYTES_MAX", 1000)
    client = FetchClient(test_env(tmp_path))

    class Wires:
        def send_fetch(self, peer: str, fetch: Fetch) -> bool:
            for _ in range(3):
                client.receive(peer, Fetched(fetch.id, FetchStatus.OK, True), bytes(400))
            return True

    client.peers = Wires()  # type: ignore[assignment]
    answer = await client.ask("n1", FetchKind.MANIFEST)
    assert answer.status is FetchStatus.BUSY and "over the limit" in answer.reason


# Leases


class Promises:
    """A source whose segments begin at byte 4096."""

    async def answer(self, peer: str, fetch: Fetch) -> Answer:
        await trio.lowlevel.checkpoint()
        position = 4096 if fetch.kind is FetchKind.MANIFEST else None
        return Answer(FetchStatus.OK, b"data", leased_position=position)


@asynccontextmanager
async def lender(tmp_path: Path) -> AsyncIterator[tuple[FetchServer, Callable[..., Awaitable[None]], Link]]:
    """A server, a way to ask it, and the connection."""
    stream = Narrow()
    link = Link("n1", stream, MessageReader(MESSAGE_BYTES_MAX), 0.0)  # type: ignore[arg-type]
    server = FetchServer(test_env(tmp_path), Promises(), 1 << 30)

    async def ask(kind: FetchKind, first: int = 0, number: int = 0, link: Link = link) -> None:
        before = server.bytes_sent
        server.submit(link, Fetch(1, kind, first, 0, number))
        await wait_until(lambda: server.bytes_sent > before, what="the answer")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        nursery.start_soon(link.write_queued)
        for _ in range(20):
            stream.room.release()
        yield server, ask, link
        nursery.cancel_scope.cancel()


async def test_segments_stay_while_a_peer_fetches_them(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with lender(tmp_path) as (server, ask, _):
        await ask(FetchKind.CHUNK, 4096, 100)
        assert server.leased_position() is None, "nobody was told of segments yet"
        await ask(FetchKind.MANIFEST)
        assert server.leased_position() == 4096
        await trio.sleep(LEASE_SECONDS - 1)
        await ask(FetchKind.CHUNK, 8192, 100)
        await trio.sleep(LEASE_SECONDS - 1)
        assert server.leased_position() == 4096, "prolonged by the question"
        await trio.sleep(2)
        assert server.leased_position() is None


async def test_a_complete_transfer_frees_what_it_brought(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What follows stays for as long as it takes to put the segments in place."""
    async with lender(tmp_path) as (server, ask, link):
        await ask(FetchKind.MANIFEST)
        await ask(FetchKind.CHUNK, 9000)
        assert server.leased_position() == 9000
        link.close()
        await trio.sleep(LEASE_AWAY_SECONDS - 1)
        assert server.leased_position() == 9000
        await trio.sleep(2)
        assert server.leased_position() is None


async def test_a_peer_that_has_gone_holds_nothing_for_long(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with lender(tmp_path) as (server, ask, link):
        await ask(FetchKind.MANIFEST)
        link.close()
        assert server.leased_position() == 4096, "it may be back at once"
        await trio.sleep(LEASE_AWAY_SECONDS + 1)
        assert server.leased_position() is None


async def test_a_peer_that_comes_back_goes_on_with_its_lease(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with lender(tmp_path) as (server, ask, link):
        await ask(FetchKind.MANIFEST)
        link.close()
        assert server.leased_position() == 4096
        again = Link("n1", Narrow(), MessageReader(MESSAGE_BYTES_MAX), 0.0)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            again.stream.room.release()  # type: ignore[attr-defined]
            nursery.start_soon(again.write_queued)
            await ask(FetchKind.CHUNK, 8192, 100, again)
            nursery.cancel_scope.cancel()
        await trio.sleep(LEASE_AWAY_SECONDS + 1)
        assert server.leased_position() == 4096


async def test_leases_are_bounded_and_the_first_byte_that_anybody_needs_counts(tmp_path: Path) -> None:
    server = FetchServer(test_env(tmp_path), Promises(), 1 << 30)
    for number in range(LEASES_MAX + 10):
        server.lease(f"backup {number}", 1000 + number, 60.0)
    assert len(server._leases) == LEASES_MAX and server.leased_position() == 1010
    server.lease("backup 10", 5000, 60.0)
    assert server.leased_position() == 1011, "in place of what was kept for it so far"


# Checkpoints


def a_source(tmp_path: Path) -> LogSource:
    store: Any = SimpleNamespace(first_position=0)
    return LogSource(test_env(tmp_path), str(tmp_path), 4096, store, committed=lambda: 0, is_sure=lambda: True)


async def piece(source: LogSource, peer: str, offset: int, identity: int = 0, nbytes: int = 60) -> Answer:
    return await source.answer(peer, Fetch(1, FetchKind.CHECKPOINT, offset, nbytes, identity))


async def test_peers_fetch_their_checkpoints_beside_each_other(tmp_path: Path) -> None:
    """A newer one is saved between the first pieces of the two: each gets the one that it began with."""
    source = a_source(tmp_path)
    files = source._env.files
    write_checkpoint(files, str(tmp_path), 1, b"a" * 100)
    first = await piece(source, "n1", 0)
    write_checkpoint(files, str(tmp_path), 2, b"b" * 100)
    second = await piece(source, "n2", 0)
    assert first.identity != second.identity
    for peer, begun in (("n1", first), ("n2", second)):
        rest = await piece(source, peer, 60, begun.identity, 1000)
        assert crc32(begun.data + rest.data) == begun.identity and len(begun.data + rest.data) == begun.total
    assert not source._checkpoints, "nothing stays in memory"
    assert (await piece(source, "n1", 60, first.identity)).status is FetchStatus.GONE


async def test_checkpoints_in_memory_are_few(tmp_path: Path, autojump_clock: MockClock) -> None:
    source = a_source(tmp_path)
    files = source._env.files
    assert (await piece(source, "n1", 0)).status is FetchStatus.ABSENT
    for number in range(CHECKPOINTS_MAX):
        write_checkpoint(files, str(tmp_path), number + 1, b"%d" % number * 100)
        assert (await piece(source, f"n{number}", 0)).is_ok
    shared = await piece(source, "n7", 0)
    assert shared.is_ok and source._checkpoints["n7"].content is source._checkpoints["n1"].content
    write_checkpoint(files, str(tmp_path), 9, b"newest" * 20)
    assert (await piece(source, "n8", 0)).status is FetchStatus.BUSY
    assert (await piece(source, "n1", 60, shared.identity)).is_ok, "those under way go on"
    await trio.sleep(CHECKPOINT_IDLE_SECONDS + 1)
    assert (await piece(source, "n8", 0)).is_ok, "nobody went on with the others"
    assert set(source._checkpoints) == {"n8"}
