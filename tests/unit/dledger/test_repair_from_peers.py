"""Any damage to a log's files is mended from healthy copies to the byte, or refused with a sentence; never served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from dledger.core.types import HEADER_BYTES, Entry, frame_entry, parse_entry
from dledger.fetch import Answer, LogSource
from dledger.repair import Mended, RepairPhase
from dledger.store.faults import EntryDamaged, FaultyRange, add_suspects
from dledger.store.log_store import LogStore
from dledger.store.recovery import RecoveredLog
from dledger.store.rows import ROW_BYTES, row_of
from dledger.store.segments import segment_bases, segment_name
from dledger.wire import Fetch, FetchKind, FetchStatus
from runtime.logs import get_logger
from runtime.testing import test_env, wait_until
from tests.unit.dledger.store.store_kit import SEGMENT, append, copied, log_files, opened, read_all
from tests.unit.dledger.store.test_store_recovery import Logs, inflict
from tests.unit.dledger.test_repair import assert_identical, cluster, fill, frames, segments

Damage = tuple[str, int, str, int, int]
VOTERS = ("n0", "n1", "n2")
READ_BYTES = 1024


class HealthyPeers:
    """A client (`dledger.fetch.FetchClient`) of two peers with the whole log."""

    def __init__(self, folder: Path, store: LogStore, *, without: int = 0) -> None:
        """`without`: of this entry they do not answer."""
        self._without = without
        env = test_env(folder)
        self._source = LogSource(
            env, str(folder), SEGMENT, store, committed=lambda: store.last_index, is_sure=lambda: True
        )

    def sources(self) -> list[str]:
        return ["n1", "n2"]

    def too_old(self) -> list[str]:
        return []

    async def ask(self, peer: str, kind: FetchKind, first: int = 0, last: int = 0, number: int = 0) -> Answer:
        if first == self._without:
            await trio.lowlevel.checkpoint()
            return Answer(FetchStatus.BUSY, reason="no answer")
        return await self._source.answer(peer, Fetch(1, kind, first, last, number))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logs]:
    yield Logs(tmp_path_factory.mktemp("logs"))


def read_every_byte(store: LogStore) -> list[Entry]:
    """As consumers and peers do. Raises EntryDamaged."""
    for position in range(store.first_position, store.position_end, READ_BYTES):
        store.read(position, READ_BYTES)
    return read_all(store)


def a_phase(work: Path, store: LogStore, recovered: RecoveredLog, peers: HealthyPeers) -> RepairPhase:
    return RepairPhase(
        test_env(work),
        str(work),
        SEGMENT,
        store._meta,
        recovered.faults,
        VOTERS,
        "n0",
        peers,  # type: ignore[arg-type]
        get_logger("test"),
        own=store,
    )


async def served(work: Path, peers: HealthyPeers, truth: list[Entry]) -> None:
    """Open the log as a group does, with whatever phases of repair it takes, and check what it then shows."""
    env = test_env(work)
    for _ in range(20):
        store, recovered = await opened(env, work)
        try:
            if not recovered.faults:
                assert read_every_byte(store) == truth[: store.last_index], "another entry was served"
                if store.last_index < len(truth):
                    assert store._meta.saved.recovering, "it has forgotten what it acknowledged"
                    await append(store, truth[store.last_index :])
                await store.close()
                return
            phase = a_phase(work, store, recovered, peers)
            with trio.fail_after(5):
                assert await phase.run() is Mended.REOPEN
        except EntryDamaged:
            continue  # what a running node meets makes it open its log anew, too
        finally:
            store.abandon()
            store._meta.close()
    raise AssertionError("does not become whole")


def check(logs: Logs, damages: list[Damage]) -> None:
    async def run() -> None:
        work = copied(logs.folder / "whole", logs.folder / "served")
        for damage in damages:
            inflict(work, logs, damage)
        healthy, _ = await opened(test_env(logs.folder / "whole"), logs.folder / "whole")
        try:
            await served(work, HealthyPeers(logs.folder / "whole", healthy), logs.entries)
        finally:
            healthy.abandon()
            healthy._meta.close()
        add_suspects(test_env(work).files, str(work), segment_bases(test_env(work).files, str(work)))
        again, recovered = await opened(test_env(work), work)  # side rows that nobody needed are looked at so
        assert not recovered.faults and recovered.entries_walked == len(logs.entries)
        again.abandon()
        again._meta.close()
        there, wanted = log_files(work), log_files(logs.folder / "whole")
        assert [name for name in sorted({*there, *wanted}) if there.get(name) != wanted.get(name)] == []

    trio.run(run)


async def faults_of(work: Path) -> list[FaultyRange]:
    store, recovered = await opened(test_env(work), work)
    store.abandon()
    store._meta.close()
    return recovered.faults


async def test_4_6_damage_that_nobody_mends_is_no_larger_at_the_next_start(logs: Logs) -> None:
    """Where all of the last frame of a segment is lost, the side row alone tells that this is no older copy."""
    work = copied(logs.folder / "whole", logs.folder / "zeroed")
    files = test_env(work).files
    border = segment_bases(files, str(work))[2]
    last = next(entry for entry in reversed(logs.entries) if entry.position < border)
    files.open(f"{work}/log/{segment_name(border - SEGMENT)}").pwrite(
        bytes(len(last.frame)), last.position - border + SEGMENT
    )
    found = await faults_of(work)
    assert [(fault.first_index, fault.last_index) for fault in found] == [(last.index, last.index)]
    assert await faults_of(work) == found


async def test_4_6_who_mends_one_range_and_stops_finds_the_other_again(logs: Logs) -> None:
    """In a closed segment that was walked because of the damage before it, and would be taken at its word now."""
    work = copied(logs.folder / "whole", logs.folder / "stopped")
    env = test_env(work)
    border = segment_bases(env.files, str(work))[2]
    other = next(entry for entry in reversed(logs.entries) if entry.position < border)
    one = logs.entries[other.index + 2]
    for entry in (other, one):
        file = env.files.open(f"{work}/log/{segment_name(entry.position - entry.position % SEGMENT)}")
        file.pwrite(b"?", entry.position % SEGMENT + HEADER_BYTES - 1)
    store, recovered = await opened(env, work)
    damaged = [fault.first_index for fault in recovered.faults]
    assert damaged == [other.index, one.index]
    healthy, _ = await opened(test_env(logs.folder / "whole"), logs.folder / "whole")
    peers = HealthyPeers(logs.folder / "whole", healthy, without=one.index)
    phase = a_phase(work, store, recovered, peers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(phase.run)
        await wait_until(lambda: phase.repaired == 1, what="one range to be mended")
        nursery.cancel_scope.cancel()
    for each in (store, healthy):
        each.abandon()
        each._meta.close()
    assert [fault.first_index for fault in await faults_of(work)] == [one.index]


KINDS = ["flip", "flip", "truncate", "delete", "older", "stale", "foreign"]
PAIR = st.tuples(
    st.integers(0, 6),
    st.sampled_from([*KINDS, "none"]),
    st.sampled_from([*KINDS, "none"]),
    st.integers(0, SEGMENT - 1),
    st.integers(1, 3000),
)


def of_pairs(pairs: list[tuple[int, str, str, int, int]]) -> list[Damage]:
    """To segments and to their side rows."""
    return [
        (sub, number, kind, offset, length)
        for number, segment, rows, offset, length in pairs
        for sub, kind in (("log", segment), ("rows", rows))
        if kind != "none"
    ]


def both(number: int, kind: str) -> tuple[int, str, str, int, int]:
    return number, kind, kind, 100, 1


@pytest.mark.chaos
@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pairs=st.lists(PAIR, min_size=1, max_size=3, unique_by=lambda pair: pair[0]))
@example(pairs=[both(2, "stale"), both(3, "delete")])
@example(pairs=[both(2, "stale"), both(3, "stale")])
@example(pairs=[both(1, "delete"), both(2, "stale"), both(3, "delete")])
@example(pairs=[both(2, "stale"), both(3, "stale"), both(4, "delete")])
@example(pairs=[both(0, "foreign"), both(1, "delete")])
@example(pairs=[both(0, "foreign"), both(1, "foreign"), both(2, "delete")])
@example(pairs=[both(0, "delete"), both(1, "foreign"), both(2, "delete")])
@example(pairs=[both(2, "stale"), *(both(number, "delete") for number in (3, 4, 5))])
@example(pairs=[both(4, "foreign"), both(5, "delete")])
@example(pairs=[both(3, "delete"), both(4, "foreign"), both(5, "delete")])
@example(pairs=[both(0, "delete")])
@example(pairs=[both(0, "delete"), both(1, "delete")])
def test_scenario_10_any_damage_of_up_to_three_segments_is_mended_from_a_peer_to_the_byte(
    logs: Logs, pairs: list[tuple[int, str, str, int, int]]
) -> None:
    check(logs, of_pairs(pairs))


async def test_scenario_10_a_neighbour_of_another_history_is_replaced_with_the_lost_segment(tmp_path: Path) -> None:
    """The last entry before the lost segment is intact, and so is its side row; only the peers know that it is not
    theirs."""
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        leader = await toy.leader()
        node = next(node for node in toy.nodes.values() if node is not leader)
        await node.stop()
        path, lost = segments(node)[:2]
        offset, index = frames(path)[-1]
        data = bytearray(path.read_bytes())
        there = parse_entry(bytes(data), offset)
        other = frame_entry(
            index, there.term, there.position, there.type, there.count, [bytes(len(there.body))], there.prev_crc, 0
        )
        data[offset : offset + len(other.frame)] = other.frame
        path.write_bytes(data)
        rows = node.folder / "rows" / path.name
        rows.write_bytes(rows.read_bytes()[:-ROW_BYTES] + row_of(other))
        lost.unlink()
        (node.folder / "rows" / lost.name).unlink()
        await node.start()
        await toy.put(b"more")
        await toy.level()
        assert_identical(toy)
        counters = node.running.statistics().counters
        assert counters["repairs"] == 1 and counters["cut_as_damaged"] == 0, counters
