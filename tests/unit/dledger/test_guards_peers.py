"""Guards of connections, fetches, repair and installation that no other test names: each was found by taking it away
(tests/mutants.toml)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
from attrs import evolve
from trio.testing import MockClock

from dledger.config import GroupConfig
from dledger.core.types import Entry
from dledger.errors import LedgerError
from dledger.fetch import Answer, FetchClient, LogSource
from dledger.install import Installer, Pulled, _Failed, adds_to
from dledger.peers import Link, Peers, Refused
from dledger.repair import INSTALL_AFTER_SECONDS, Mended, RepairPhase, _Found
from dledger.store.base import BaseRecord
from dledger.store.checkpoint import Checkpoint, pack_checkpoint
from dledger.store.faults import FaultyRange
from dledger.store.format import Format
from dledger.store.log_store import LogStore
from dledger.store.manifest import Manifest, SegmentInfo
from dledger.store.meta import Meta
from dledger.store.staging import decode_manifest
from dledger.store.walk import LastEntry
from dledger.wire import (
    KIND_HELLO,
    KIND_PONG,
    KIND_PROOF,
    KIND_WELCOME,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    Fetch,
    FetchKind,
    FetchStatus,
    Hello,
    MessageReader,
    WireError,
    decode_hello,
    encode,
    hello_fields,
    prove,
)
from runtime.logs import get_logger
from runtime.testing import test_env, wait_until
from tests.unit.dledger.store.crash_files import CrashFiles
from tests.unit.dledger.store.store_kit import SEGMENT, Framer, opened, some_entries, write_log
from tests.unit.dledger.store.test_guards_store import other_than
from tests.unit.dledger.test_driver import cluster
from tests.unit.dledger.test_fetch import Narrow
from tests.unit.dledger.test_peers import Recorder, connected, members

ENTRIES = some_entries(Framer(), random.Random(21), 30, 1)
PEERS = dict.fromkeys(("n0", "n1", "n2"), ("127.0.0.1", 1))


def a_config(**settings: Any) -> GroupConfig:
    wanted: dict[str, Any] = {"cluster": "c", "group": "g", "node_id": "n0", "peers": PEERS, "data_dir": "/nowhere"}
    return GroupConfig(**{**wanted, **settings})


# Handshakes


class Rogue:
    """The other end of a dialled connection: answers a hello as it likes."""

    peer = ("127.0.0.1", 9)

    def __init__(self, node_id: str, secret: bytes | None) -> None:
        self.node_id, self.secret = node_id, secret
        self.reader = MessageReader()
        self.kinds: list[int] = []
        self.answers: list[bytes] = []

    async def send_parts(self, parts: Any) -> None:
        await trio.lowlevel.checkpoint()
        for received in self.reader.feed(b"".join(bytes(part) for part in parts)):
            self.kinds.append(received.kind)
            if len(self.kinds) == 1:
                hello = decode_hello(received)
                ours = Hello(
                    1,
                    hello.cluster,
                    hello.cluster_uuid,
                    hello.group,
                    hello.group_uuid,
                    self.node_id,
                    hello.node_id,
                    "boot",
                    hello.segment_bytes,
                    bytes(16),
                    2,
                )
                proof = prove(self.secret, b"accept", hello, ours, 2)
                self.answers.append(b"".join(map(bytes, encode(KIND_WELCOME, (hello_fields(ours), proof)))))

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.answers.pop(0) if self.answers else b""

    def abort(self) -> None:
        return


def peers_of(config: GroupConfig) -> Peers:
    identity = Format(
        cluster=config.cluster,
        cluster_uuid=config.effective_cluster_uuid,
        group=config.group,
        group_uuid=config.group_uuid,
        node_id=config.node_id,
        segment_bytes=config.segment_bytes,
    )
    seen = Recorder()
    return Peers(test_env(), config, identity, seen, seen)  # type: ignore[arg-type]


async def test_4_14_who_answers_a_dial_proves_that_it_knows_the_secret() -> None:
    peers = peers_of(a_config(secret=b"ours"))
    rogue = Rogue("n1", b"guessed")
    with pytest.raises(Refused, match="does not know our secret"):
        await peers._introduce("n1", cast(Any, rogue))
    assert KIND_PROOF not in rogue.kinds, "and gets no proof of ours to use elsewhere"


async def test_4_14_who_answers_a_dial_is_who_was_dialled() -> None:
    peers = peers_of(a_config())
    with pytest.raises(Refused, match="'n2' answers where 'n1' should be"):
        await peers._introduce("n1", cast(Any, Rogue("n2", None)))


async def test_4_14_a_strangers_message_is_small() -> None:
    peers = peers_of(a_config())
    rogue = Rogue("n1", None)
    rogue.answers.append((5000).to_bytes(4, "little"))
    with pytest.raises(WireError, match="a message of 5000 bytes"):
        await peers._admit(cast(Any, rogue))


class Caller(Rogue):
    """The dialling end of a connection: says hello, and answers the welcome with a proof, one that it has made up."""

    def __init__(self, hello: Hello, proof: bytes = bytes(32)) -> None:
        super().__init__("n1", None)
        self.proof = proof
        self.answers.append(b"".join(map(bytes, encode(KIND_HELLO, hello_fields(hello)))))

    async def send_parts(self, parts: Any) -> None:
        await trio.lowlevel.checkpoint()
        for received in self.reader.feed(b"".join(bytes(part) for part in parts)):
            self.kinds.append(received.kind)
            if received.kind == KIND_WELCOME:
                self.answers.append(b"".join(map(bytes, encode(KIND_PROOF, (self.proof,)))))


async def test_4_14_who_calls_proves_that_it_knows_the_secret() -> None:
    peers = peers_of(a_config(secret=b"ours"))
    hello = peers_of(a_config(node_id="n1", secret=b"guessed"))._hello("n0")
    caller = Caller(hello)
    with pytest.raises(Refused, match="does not know our secret"):
        await peers._admit(cast(Any, caller))
    assert KIND_PONG not in caller.kinds


async def test_4_14_who_calls_is_another_node() -> None:
    peers = peers_of(a_config())
    hello = msgspec.structs.replace(peers_of(a_config(node_id="n1"))._hello("n0"), node_id="n0")
    with pytest.raises(Refused, match="is not another member"):
        await peers._admit(cast(Any, Caller(hello)))


async def test_4_1_who_belongs_to_the_group_may_call_whatever_this_log_says() -> None:
    """A leader that joined after the last entry of this log is the only one who can tell so."""
    peers = peers_of(a_config())
    hello = msgspec.structs.replace(peers_of(a_config(node_id="n1"))._hello("n0"), node_id="n9")
    link = await peers._admit(cast(Any, Caller(hello, proof=b"")))
    assert link.peer == "n9"


async def test_a_caller_that_is_no_member_does_not_hold_back_what_its_version_does_not_know() -> None:
    peers = peers_of(a_config())
    stream = cast(Any, SimpleNamespace())
    peers._accepted["n9"] = Link("n9", stream, MessageReader(), 0.0, 1)
    assert peers.oldest_version == PROTOCOL_VERSION
    peers._accepted["n1"] = Link("n1", stream, MessageReader(), 0.0, 1)
    assert peers.oldest_version == 1


def test_a_proof_covers_the_newest_versions_that_both_told() -> None:
    """So that nobody in between can talk two newer nodes down."""
    one = Hello(1, "c", "cu", "g", "gu", "n0", "n1", "b", 8192, bytes(16), 2)
    other = Hello(1, "c", "cu", "g", "gu", "n1", "n0", "b", 8192, bytes(16), 2)
    talked_down = msgspec.structs.replace(one, version_max=1)
    assert prove(b"s", b"dial", one, other, 2) != prove(b"s", b"dial", talked_down, other, 2)
    assert prove(b"s", b"dial", one, other, 1) == prove(b"s", b"dial", talked_down, other, 1)


async def test_a_peer_of_version_1_is_asked_no_fetches() -> None:
    stream = Narrow()
    link = Link("n1", stream, MessageReader(MESSAGE_BYTES_MAX), 0.0, 1)  # type: ignore[arg-type]
    assert not link.send_fetch(Fetch(1, FetchKind.MANIFEST)) and not link._has_backlog
    assert not link.send_trim_wanted(7) and not link._has_backlog


async def test_4_15_a_removed_peers_connections_are_closed(tmp_path: Path) -> None:
    async with members(tmp_path) as found:
        await connected(found)
        one = found[0]
        one.peers.set_members({"n0": one.listener.address})
        await wait_until(lambda: not one.peers.is_connected("n1"), limit=2, what="our connection to be closed")
        await wait_until(lambda: not one.peers._accepted, limit=2, what="its connection to be closed")


# What is given to peers


@asynccontextmanager
async def source(
    folder: Path, *, committed: int = 30, is_sure: bool = True, faults: tuple[FaultyRange, ...] = ()
) -> AsyncIterator[LogSource]:
    await write_log(folder, ENTRIES)
    env = test_env(folder)
    store, _ = await opened(env, folder)
    yield LogSource(
        env, str(folder), SEGMENT, store, committed=lambda: committed, is_sure=lambda: is_sure, faults=faults
    )
    store.abandon()


async def test_4_6_who_may_have_forgotten_gives_no_definite_no(tmp_path: Path) -> None:
    beyond = Fetch(1, FetchKind.ENTRIES, 31, 33, ENTRIES[-1].head_crc)
    other = Fetch(2, FetchKind.ENTRIES, 5, 6, ENTRIES[3].head_crc ^ 1)
    async with source(tmp_path / "sure") as sure:
        assert (await sure.answer("n1", beyond)).status is FetchStatus.ABSENT
        assert (await sure.answer("n1", other)).status is FetchStatus.ABSENT
        assert (await sure.answer("n1", msgspec.structs.replace(other, number=ENTRIES[3].head_crc))).is_ok
    async with source(tmp_path / "unsure", is_sure=False) as unsure:
        assert (await unsure.answer("n1", beyond)).status is FetchStatus.UNSURE
        assert (await unsure.answer("n1", other)).status is FetchStatus.UNSURE


async def test_4_6_nothing_of_a_damaged_range_is_given(tmp_path: Path) -> None:
    fault = FaultyRange(5, 7, ENTRIES[3].end, ENTRIES[7].position, ENTRIES[3].head_crc, ENTRIES[6].head_crc, "a test")
    async with source(tmp_path, faults=(fault,)) as damaged:
        within = await damaged.answer("n1", Fetch(1, FetchKind.ENTRIES, 6, 9, ENTRIES[4].head_crc))
        assert within.status is FetchStatus.DAMAGED
        before = await damaged.answer("n1", Fetch(2, FetchKind.ENTRIES, 3, 9, ENTRIES[1].head_crc))
        assert before.data == ENTRIES[2].frame + ENTRIES[3].frame
        assert (await damaged.answer("n1", Fetch(3, FetchKind.MANIFEST))).status is FetchStatus.DAMAGED


async def test_4_6_another_entry_before_damage_is_no_definite_no(tmp_path: Path) -> None:
    """It may be an older copy's, and the entries that were asked for what this node had."""
    fault = FaultyRange(5, 7, ENTRIES[3].end, ENTRIES[7].position, ENTRIES[3].head_crc, ENTRIES[6].head_crc, "a test")
    async with source(tmp_path, faults=(fault,)) as damaged:
        before = await damaged.answer("n1", Fetch(1, FetchKind.ENTRIES, 3, 4, ENTRIES[1].head_crc ^ 1))
        behind = await damaged.answer("n1", Fetch(2, FetchKind.ENTRIES, 9, 9, ENTRIES[7].head_crc ^ 1))
        assert (before.status, behind.status) == (FetchStatus.UNSURE, FetchStatus.ABSENT)


async def test_4_7_only_committed_segments_are_offered(tmp_path: Path) -> None:
    async with source(tmp_path, committed=4) as few:
        answer = await few.answer("n1", Fetch(1, FetchKind.MANIFEST))
        assert [info.last_index for info in decode_manifest(answer.data).segments] == [4]
        beyond = Fetch(2, FetchKind.CHUNK, 0, 0, ENTRIES[4].end)
        assert (await few.answer("n1", beyond)).status is FetchStatus.BUSY
    async with source(tmp_path / "none", committed=0) as none:
        assert (await none.answer("n1", Fetch(1, FetchKind.MANIFEST))).status is FetchStatus.BUSY


# Repair


class Answers:
    """Peers that answer with these entries, or with a status."""

    def __init__(self, **given: list[Entry] | FetchStatus | bytes) -> None:
        self.given = given
        self.old: list[str] = []

    def sources(self) -> list[str]:
        return sorted(self.given)

    def too_old(self) -> list[str]:
        return self.old

    async def ask(self, peer: str, kind: FetchKind, first: int = 0, last: int = 0, number: int = 0) -> Answer:
        await trio.lowlevel.checkpoint()
        given = self.given[peer]
        if isinstance(given, FetchStatus):
            return Answer(given, reason="says so")
        if isinstance(given, bytes):
            return Answer(FetchStatus.OK, given)
        return Answer(FetchStatus.OK, b"".join(entry.frame for entry in given))


FAULT = FaultyRange(5, 6, ENTRIES[3].end, ENTRIES[6].position, ENTRIES[3].head_crc, ENTRIES[5].head_crc, "a test")


def a_phase(client: Answers, voters: tuple[str, ...] = ("n0", "n1", "n2")) -> RepairPhase:
    files = CrashFiles()
    files.make_dirs("/nowhere")
    return RepairPhase(
        evolve(test_env(), files=files),
        "/nowhere",
        SEGMENT,
        cast(Any, None),
        [FAULT],
        voters,
        "n0",
        cast(FetchClient, client),
        get_logger("test"),
    )


async def test_4_6_a_peers_entries_continue_what_is_there() -> None:
    wrong = other_than(ENTRIES[4])
    for given in ([wrong, ENTRIES[5]], ENTRIES[5:6], [ENTRIES[4], ENTRIES[4]]):
        found = await a_phase(Answers(n1=given))._ask_everybody(FAULT)
        assert found.supplier is None and "does not follow" in found.others["n1"]
    found = await a_phase(Answers(n1=[wrong, ENTRIES[5]], n2=ENTRIES[4:6]))._ask_everybody(FAULT)
    assert found.supplier == "n2" and found.entries == ENTRIES[4:6]


async def test_4_6_a_peers_entries_lead_to_the_intact_one_behind() -> None:
    """A whole chain, but another one: a definite no."""
    found = await a_phase(Answers(n1=[ENTRIES[4], other_than(ENTRIES[5])]))._ask_everybody(FAULT)
    assert found.supplier is None and sorted(found.absent) == ["n1"]


async def test_a_peer_that_sends_more_than_was_asked_for_says_nothing_about_the_range() -> None:
    """Least of all that it has other entries there."""
    found = await a_phase(Answers(n1=ENTRIES[4:8], n2=b"garbage"))._ask_everybody(FAULT)
    assert found.supplier is None and not found.absent
    assert "nobody asked for" in found.others["n1"] and "damaged entry" in found.others["n2"]


async def test_a_peer_of_version_1_is_named_as_no_help() -> None:
    client = Answers()
    client.old = ["n2"]
    phase = a_phase(client)
    await phase._round()
    assert "n2 runs a version that supplies nothing" in phase.waits_for


@pytest.mark.parametrize(
    ("clean", "mark", "last_written", "is_bounded"),
    [
        (True, 6, None, True),
        (True, 7, None, False),
        (False, 6, None, False),
        (False, 6, 6, True),
        (True, 6, 7, False),
    ],
)
def test_4_6_what_was_acknowledged_is_bounded_by_a_stop_in_order_or_by_the_run_itself(
    clean: bool, mark: int, last_written: int | None, is_bounded: bool
) -> None:
    phase = a_phase(Answers())
    phase._meta = cast(Any, SimpleNamespace(saved=Meta(clean=clean, durable_index=mark)))
    phase._last_written = LastEntry(last_written) if last_written is not None else None
    assert phase._ends_with_what_was_acknowledged(FAULT) is is_bounded


async def test_a_log_is_replaced_only_when_nobody_else_may_have_the_entries(autojump_clock: MockClock) -> None:
    """Who has trimmed them was reached a moment before who has them: one entry, or all of the log."""
    client = Answers(n1=FetchStatus.GONE)
    phase = a_phase(client)
    assert await phase._round() is None
    client.given["n2"] = FetchStatus.ABSENT
    assert await phase._round() is Mended.INSTALL, "nobody has them"
    assert (await a_phase(Answers(n1=FetchStatus.GONE)).run()) is Mended.INSTALL, "nor does it wait for ever"
    assert trio.current_time() > INSTALL_AFTER_SECONDS


async def test_the_operators_word_ends_the_wait_for_segments_too(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Whoever has trimmed the entries may be unable to give the segments for them."""
    cuts: list[FaultyRange] = []

    async def cut(self: RepairPhase, fault: FaultyRange, found: _Found, text: str) -> None:
        await trio.lowlevel.checkpoint()
        cuts.append(fault)

    monkeypatch.setattr(RepairPhase, "_cut", cut)
    phase = a_phase(Answers(n1=FetchStatus.GONE))
    assert await phase.run() is Mended.INSTALL and not cuts
    phase.accept_loss()
    assert await phase.run() is Mended.REOPEN and cuts == [FAULT]


async def test_the_operators_word_does_not_cut_what_the_tables_stand_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first round, when nothing is known yet."""
    monkeypatch.setattr("dledger.repair.read_checkpoint", lambda files, folder, up_to: None)
    phase = a_phase(Answers(n1=FetchStatus.DAMAGED))
    phase._first_index = 3
    phase.accept_loss()
    assert await phase._round() is None
    with pytest.raises(LedgerError, match="entries from 5 on cannot be given up: the log begins at entry 3"):
        phase.accept_loss()


@pytest.mark.parametrize(
    ("voters", "absent", "given_up"),
    [
        (("n0", "n1", "n2"), ("n1",), False),
        (("n0", "n1", "n2"), ("n1", "n2"), True),
        (("n0", "n1", "n2"), ("n0", "n1"), False),
        (("n0", "n1", "n2", "n3", "n4"), ("n1", "n2"), False),
        (("n0", "n1", "n2", "n3", "n4"), ("n1", "n2", "n3"), True),
        (("n0", "n1", "n2"), ("n1", "n8", "n9"), False),
        (("n0",), (), False),
        ((), ("n1", "n2"), False),
    ],
)
async def test_4_6_only_what_no_quorum_can_have_is_given_up(
    voters: tuple[str, ...], absent: tuple[str, ...], given_up: bool
) -> None:
    found = _Found(absent=dict.fromkeys(absent, "never had it"))
    assert a_phase(Answers(), voters)._was_never_committed(found) is given_up


async def test_4_6_a_silent_peer_is_no_definite_no() -> None:
    found = await a_phase(Answers(n1=FetchStatus.UNSURE, n2=FetchStatus.BUSY))._ask_everybody(FAULT)
    assert not found.absent and sorted(found.others) == ["n1", "n2"]


async def test_4_6_who_cuts_a_damaged_end_recovers_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in between must not leave a node that votes without what it acknowledged."""
    done: list[str] = []

    async def save_recovering(recovering: bool) -> None:
        await trio.lowlevel.checkpoint()
        done.append(f"recovering {recovering}")

    async def drop(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        done.append("cut")

    monkeypatch.setattr("dledger.repair.drop_open_fault", drop)
    phase = a_phase(Answers())
    phase._meta = cast(Any, SimpleNamespace(save_recovering=save_recovering))
    await phase._cut(FAULT, _Found(absent={"n1": "never had it"}), "cut")
    assert done == ["recovering True", "cut"]


# Installation


def pulled(covers: int, last: int = 20, base: int = 5) -> Pulled:
    info = SegmentInfo(SEGMENT, base + 1, last, 2 * SEGMENT, 77)
    manifest = Manifest(BaseRecord(base, 1, 1, SEGMENT), SEGMENT, (info,))
    return Pulled(manifest, pack_checkpoint(Checkpoint(covers, b"tables")) if covers else None)


def an_installer(own: Any = None) -> Installer:
    client = cast(FetchClient, Answers())
    return Installer(test_env(), "/nowhere", SEGMENT, client, get_logger("test"), cast(LogStore, own))


def test_4_7_segments_are_pulled_only_where_they_bring_the_node_far_enough() -> None:
    assert an_installer()._judge(pulled(10), 20) == pulled(10)
    with pytest.raises(_Failed, match="ends at entry 20, 21 are needed"):
        an_installer()._judge(pulled(10), 21)


@pytest.mark.parametrize("covers", [0, 4, 21])
def test_scenario_25_tables_with_a_gap_to_the_segments_are_not_taken(covers: int) -> None:
    with pytest.raises(_Failed, match="its checkpoint covers"):
        an_installer()._judge(pulled(covers), 20)


class Own:
    """This node's log, with the same checksum at each entry."""

    first_index, first_position = 1, 0

    def __init__(self, crc: int, last_index: int = 30) -> None:
        self.crc, self.last_index, self.written_index = crc, last_index, last_index

    def head_crc_at(self, index: int) -> int:
        return self.crc


def test_4_7_only_segments_that_end_alike_are_taken_from_the_own_log() -> None:
    manifest = pulled(10).manifest
    assert an_installer(Own(77))._common(manifest) == {SEGMENT}
    assert an_installer(Own(78))._common(manifest) == frozenset()


def test_scenario_25_segments_that_the_log_holds_already_are_not_installed() -> None:
    """camunda#4900: entries behind them may have been acknowledged, unless the log differs before."""
    manifest = pulled(10).manifest
    assert not adds_to(cast(LogStore, Own(77, 21)), manifest)
    assert not adds_to(cast(LogStore, Own(77, 20)), manifest)
    assert adds_to(cast(LogStore, Own(78, 21)), manifest)
    assert adds_to(cast(LogStore, Own(77, 19)), manifest)


# Reading


async def test_2_5_v_nothing_behind_what_is_applied_is_readable(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        offset = await toy.put(b"shown")
        group = (await toy.leader()).running
        end = group.committed_position
        assert bytes(group.read(offset, 5) or b"") == b"shown" and await group.read_cold(offset, 5) == b"shown"
        assert group.read(end - 4, 4) is not None
        assert group.read(end - 4, 5) is None
        assert group.read_cached(end - 4, 5) is None
        assert await group.read_cold(end - 4, 5) is None
