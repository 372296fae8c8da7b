"""What the driver adds to core and store, with whole groups over loopback: reads by index, members, disks that stall or
fill up, damage met at runtime."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from dledger import flusher
from dledger.core.membership import AddLearner, Change, Promote, Remove
from dledger.core.types import Role
from dledger.driver import APP_MESSAGES_MAX, INBOX_MAX, Driver
from dledger.errors import LogDamaged, Overloaded, Reopen
from dledger.store.meta import MetaFile
from runtime.files import RealFile, RealFiles
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import Boot, Node, ToyCluster, driver_of, toy_cluster

FAST = {"heartbeat_ms": 20, "election_timeout_ms_min": 150, "election_timeout_ms_max": 300}


def cluster(tmp_path: Path, size: int = 3, *names: str, **settings: Any) -> AbstractAsyncContextManager[ToyCluster]:
    return toy_cluster(tmp_path, size, *names, **{**FAST, **settings})


def meta_of(driver: Driver) -> MetaFile:
    return driver._hard_state._meta


def others(toy: ToyCluster, node: Node) -> list[Node]:
    return [each for each in toy.alive() if each is not node]


class Answer:
    """What somebody is told, once."""

    def __init__(self) -> None:
        self.answers: list[str | None] = []

    def __call__(self, reason: str | None) -> None:
        self.answers.append(reason)

    async def wait(self, limit: float = 5.0) -> str | None:
        await wait_until(lambda: self.answers, limit=limit, what="an answer")
        assert len(self.answers) == 1
        return self.answers[0]


async def change(toy: ToyCluster, wanted: Change) -> str | None:
    answer = Answer()
    driver_of(await toy.leader()).leadership.change_members(wanted, answer)
    return await answer.wait()


# Reads by index


async def test_a_leader_confirms_reads_in_one_round_and_a_follower_refuses(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        driver = driver_of(leader)
        token = driver._reads._next_token
        answers = [Answer() for _ in range(50)]
        for answer in answers:
            driver.read_index(answer)
        assert [await answer.wait() for answer in answers] == [None] * 50
        assert driver._reads._next_token == token + 1, "one round for all"
        refused = Answer()
        driver_of(others(toy, leader)[0]).read_index(refused)
        assert await refused.wait() == "this node is not the leader"


async def test_a_single_node_answers_reads_in_its_next_turn(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await toy.put(b"one")
        answer = Answer()
        driver_of(toy.nodes["n0"]).read_index(answer)
        assert await answer.wait(0.2) is None


async def test_a_leader_nobody_follows_any_more_confirms_no_read(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        for node in others(toy, leader):
            await node.kill()
        answer = Answer()
        driver_of(leader).read_index(answer)
        reason = await answer.wait()
        assert reason is not None and leader.running.role is not Role.LEADER


async def test_a_read_waits_until_its_index_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        driver = driver_of(leader)
        with monkeypatch.context() as patch:  # a turn applies so much, and a longer catch-up is spread over many
            patch.setattr(driver.applier, "apply", lambda now, *, is_sampled=False: True)
            expected = driver.store.last_index + 1
            leader.machine.put(leader.running, b"two", lambda _: None)
            await wait_until(lambda: driver.core.commit_index == expected, what="the commit of the second record")
            seen: list[int] = []

            def told(reason: str | None) -> None:
                assert reason is None
                seen.append(driver.applier.applied_index)

            driver.read_index(told)
            await wait_until(lambda: seen or driver._reads.is_settled, what="the confirmation")
            turns = driver.turns
            await wait_until(lambda: driver.turns > turns + 1, what="more turns")
            assert seen == []
        await wait_until(lambda: seen, what="the answer")
        assert seen == [expected] and leader.machine.applied[-1].startswith(b"two")


# Members


async def test_a_learner_joins_is_promoted_and_a_voter_leaves(tmp_path: Path) -> None:
    async with cluster(tmp_path, 4, founders=("n0", "n1", "n2")) as toy:
        for number in range(20):
            await toy.put(b"%d" % number)
        leader = await toy.leader()
        newcomer = toy.nodes["n3"]
        assert leader.running.statistics().members == ("n0", "n1", "n2")
        assert newcomer.running.statistics().last_index == 0, "nobody sends it anything yet"
        assert await change(toy, AddLearner("n3", toy.peers["n3"])) is None
        statistics = leader.running.statistics()
        assert statistics.learners == ("n3",) and statistics.members_index == statistics.last_index
        assert set(statistics.addresses) == {"n0", "n1", "n2", "n3"}
        await toy.level()
        assert newcomer.running.statistics().learners == ("n3",)
        assert await change(toy, Promote("n3")) is None
        assert leader.running.statistics().members == ("n0", "n1", "n2", "n3")
        gone = next(name for name in ("n0", "n1", "n2") if name != leader.node_id)
        assert await change(toy, Remove(gone)) is None
        assert set(leader.running.statistics().connected) == {"n0", "n1", "n2", "n3"} - {gone, leader.node_id}
        await toy.nodes[gone].kill()
        await toy.put(b"after")
        await toy.level()
        assert newcomer.machine.applied[-1].startswith(b"after")


async def test_changes_that_make_no_sense_are_refused_with_a_reason(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        assert await change(toy, Promote("n9")) == "n9 is not a learner; a node joins as one first"
        assert await change(toy, AddLearner("n1", ("127.0.0.1", 1))) == "n1 is already a member"
        answer = Answer()
        driver_of(others(toy, leader)[0]).leadership.change_members(Remove("n0"), answer)
        assert await answer.wait() == f"not leader; leader={leader.node_id}"
        both = [Answer(), Answer()]
        for answer, node in zip(both, others(toy, leader), strict=True):
            driver_of(leader).leadership.change_members(Remove(node.node_id), answer)
        assert await both[0].wait() is None
        reason = await both[1].wait()
        assert reason is not None and "not committed" in reason
        await toy.put(b"two")


async def test_who_asked_for_a_change_hears_that_leadership_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path) as toy:
        leader = await toy.leader()
        driver = driver_of(leader)
        monkeypatch.setattr(driver.peers, "send", lambda peer, message: None)  # nobody hears of it
        answer = Answer()
        driver.leadership.change_members(Remove(others(toy, leader)[0].node_id), answer)
        assert await answer.wait() == "leadership was lost; the outcome is unknown"


async def test_records_around_a_change_keep_their_positions(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        outcomes: list[str] = []
        answer = Answer()
        gone = others(toy, leader)[0].node_id
        leader.machine.put(leader.running, b"before", outcomes.append)
        driver_of(leader).leadership.change_members(Remove(gone), answer)
        leader.machine.put(leader.running, b"with", outcomes.append)
        assert await answer.wait() is None
        offset = leader.machine.put(leader.running, b"behind", outcomes.append)
        await wait_until(lambda: len(outcomes) == 3, what="all three")
        assert outcomes == ["applied"] * 3
        view = leader.running.read(offset, 6)
        assert view is not None and bytes(view) == b"behind"


# Transfer, recovering


async def test_a_transfer_tells_how_it_ended(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        target = others(toy, leader)[0]
        unknown = Answer()
        driver_of(leader).leadership.transfer("n9", unknown)
        assert (await unknown.wait() or "").startswith("n9 is not another")
        assert leader.running.is_ready_leader
        done, second = Answer(), Answer()
        driver_of(leader).leadership.transfer(target.node_id, done)
        driver_of(leader).turn()
        driver_of(leader).leadership.transfer(others(toy, leader)[1].node_id, second)
        assert await second.wait() == "a transfer is under way already"
        assert await done.wait() is None
        await wait_until(lambda: target.running.is_ready_leader, what="the target to lead")
        late = Answer()
        driver_of(leader).leadership.transfer(None, late)
        reason = await late.wait()
        assert reason is not None and reason.startswith("not leader")


async def test_an_operator_may_accept_what_a_power_loss_took(tmp_path: Path) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        await toy.level()
        for node in list(toy.alive()):
            await node.kill()
        toy.env = evolve(toy.env, ids=Boot(1))
        await toy.nodes["n0"].start()
        await toy.nodes["n1"].start()
        await trio.sleep(0.5)
        assert not toy.leaders(), "two that may have forgotten are no quorum"
        for name in ("n0", "n1"):
            driver_of(toy.nodes[name]).accept_loss()
        await toy.put(b"two")
        driver = driver_of(toy.nodes["n0"])
        await wait_until(lambda: not meta_of(driver).saved.recovering, what="the flag to be saved")


# Disks that stall


async def test_scenario_18_a_leader_whose_disk_stalls_gives_up_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hashicorp/raft#503: heartbeats go on while the disk hangs. Flush "sync": its own sync is what hangs."""
    sync = RealFile.sync
    stuck: list[str] = []
    released = trio.Event()

    async def hanging(file: RealFile) -> None:
        if any(file.path.startswith(folder) for folder in stuck):
            await released.wait()
        await sync(file)

    monkeypatch.setattr(RealFile, "sync", hanging)
    async with cluster(tmp_path, flush="sync", orphan_after_ms=10_000) as toy:
        await toy.put(b"one")
        old = await toy.leader()
        stuck.append(f"{old.folder}/log/")
        outcomes: list[str] = []
        started = trio.current_time()
        old.machine.put(old.running, b"two", outcomes.append)
        await wait_until(lambda: old.running.role is not Role.LEADER, limit=2.0, what="leadership to be given up")
        print(f"given up after {trio.current_time() - started:.2f} s")
        assert old.running.statistics().steps_down == {"the disk is failing or stalled": 1}
        await toy.put(b"three")
        assert (await toy.leader()) is not old
        stuck.clear()
        released.set()
        await wait_until(lambda: old.running.statistics().disk_ok, what="the disk to be well again")
        await toy.level()
        assert old.error is None and outcomes in (["applied"], ["unknown"])
        assert old.machine.applied == toy.nodes["n0"].machine.applied


class Disk:
    """Stands before every write to the logs of some nodes: slow, stuck or full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: list[str] = []
        self.seconds = 0.0
        self.gate: threading.Event | None = None
        self.error: OSError | None = None
        self.in_threads = 0
        self._loop = threading.get_ident()
        pwrite, pwritev = RealFile.pwrite, RealFile.pwritev

        def write(file: RealFile, data: Any, offset: int) -> None:
            self._before(file)
            pwrite(file, data, offset)

        def write_many(file: RealFile, parts: Any, offset: int) -> None:
            self._before(file)
            pwritev(file, parts, offset)

        monkeypatch.setattr(RealFile, "pwrite", write)
        monkeypatch.setattr(RealFile, "pwritev", write_many)

    def _before(self, file: RealFile) -> None:
        if not any(file.path.startswith(f"{folder}/log/") for folder in self.folders):
            return
        if self.error is not None:
            raise self.error
        if threading.get_ident() != self._loop:
            self.in_threads += 1
            if self.gate is not None:
                assert self.gate.wait(20)
        if self.seconds:
            time.sleep(self.seconds)


async def test_after_a_slow_write_the_loop_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    async with cluster(tmp_path, segment_bytes=65_536) as toy:
        await toy.put(b"one")
        disk.folders = [str(node.folder) for node in toy.alive()]
        disk.seconds = 0.06
        await toy.put(b"two")
        disk.seconds = 0.0
        leader = await toy.leader()
        assert leader.running.statistics().is_disk_slow
        outcomes: list[str] = []
        for number in range(4000):
            leader.machine.put(leader.running, b"%d" % number, outcomes.append)
            if number % 50 == 0:
                await trio.lowlevel.checkpoint()
        await wait_until(lambda: len(outcomes) == 4000, what="all commits")
        assert set(outcomes) == {"applied"}
        # The others are a majority without it: its own writes may come to their end later.
        await wait_until(
            lambda: leader.running.statistics().counters["writes_in_thread"] > 0, what="a write in a thread"
        )
        assert disk.in_threads > 0
        await toy.level()
        await wait_until(lambda: leader.running.statistics().durable_index == leader.running.statistics().last_index)
        logs = {toy.segment_bytes(node.node_id) for node in toy.alive()}
        assert len(logs) == 1


async def test_cuts_and_writes_in_threads_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader whose writes lag behind loses its term: its tail goes, what its successor sends takes the place."""
    disk = Disk(monkeypatch)
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        await toy.level()
        before = [b"one"]
        old = await toy.leader()
        while not driver_of(old).store.is_slow or not old.running.is_ready_leader:  # on a busy machine another may lead
            old = await toy.leader()
            disk.folders, disk.seconds = [str(old.folder)], 0.06
            await toy.put(b"two")
            before.append(b"two")
        # From here to the last record nobody else's turn comes: its peers hear of none of them.
        disk.seconds, disk.gate = 0.0, threading.Event()
        try:
            peers = others(toy, old)
            for node in peers:
                assert node.scope is not None
                node.scope.cancel()
            for number in range(20):
                old.machine.put(old.running, b"lost %d" % number, lambda _: None)
                old.running.seal()
            old.running.wake()
            for node in peers:
                await node.ended.wait()
            # Silence alone takes leadership from it, too; but then it may win an election with what it has not written.
            await wait_until(
                lambda: old.running.role is not Role.LEADER and not old.running.statistics().disk_ok,
                limit=20,
                what="its end as a leader",
            )
            store = driver_of(old).store
            assert store.unwritten and store.written_index < store.last_index
            for node in peers:
                await node.start()
            await wait_until(
                lambda: any(node.running.is_ready_leader for node in toy.alive() if node is not old),
                limit=20,
                what="a successor",
            )
        finally:
            disk.gate.set()
        await toy.put(b"three")
        await toy.level()
        assert [record.rstrip(b".") for record in old.machine.applied] == [*before, b"three"]
        assert old.machine.pending == []
        assert len({toy.segment_bytes(node.node_id) for node in toy.alive()}) == 1


async def test_a_stuck_write_costs_leadership_also_with_async_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    async with cluster(tmp_path, orphan_after_ms=10_000) as toy:
        await toy.put(b"one")
        old = await toy.leader()
        disk.folders, disk.seconds = [str(old.folder)], 0.06
        await toy.put(b"two")
        disk.seconds, disk.gate = 0.0, threading.Event()
        try:
            old.machine.put(old.running, b"three", lambda _: None)
            await wait_until(lambda: old.running.role is not Role.LEADER, limit=2.0, what="leadership to be given up")
            assert not old.running.statistics().disk_ok
            await toy.put(b"four")
        finally:
            disk.gate.set()
        await wait_until(lambda: old.running.statistics().disk_ok, what="the disk to be well again")
        await toy.level()
        assert old.error is None


async def test_a_write_that_finds_no_room_is_made_up_for_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr(flusher, "DISK_FULL_RETRY_SECONDS", 0.05)
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        old = await toy.leader()
        disk.folders, disk.error = [str(old.folder)], OSError(errno.ENOSPC, "No space left on device")
        old.machine.put(old.running, b"two", lambda _: None)
        await wait_until(lambda: old.running.role is not Role.LEADER, limit=2.0, what="leadership to be given up")
        await toy.put(b"three")
        disk.error = None
        await toy.level()
        await wait_until(lambda: old.running.statistics().disk_ok, what="the disk to be well again")
        assert old.error is None and old.machine.stops == 0
        assert old.machine.applied[-1].startswith(b"three")


async def test_the_scrub_finds_a_flipped_bit_and_the_peers_mend_it(tmp_path: Path) -> None:
    async with cluster(tmp_path, segment_bytes=65_536, scrub_bytes_per_second=1 << 30) as toy:
        leader = await toy.leader()
        outcomes: list[str] = []
        for number in range(6000):
            leader.machine.put(leader.running, b"%d" % number, outcomes.append)
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()
        await wait_until(lambda: len(outcomes) == 6000, what="all commits")
        await toy.level()
        follower = others(toy, leader)[0]
        await follower.kill()
        path = follower.folder / "log" / f"{65_536:020d}"
        data = bytearray(path.read_bytes())
        data[30_000] ^= 1
        path.write_bytes(data)
        await follower.start()
        await wait_until(lambda: path.read_bytes()[30_000] == data[30_000] ^ 1, what="the bit to be mended")
        await toy.put(b"after")
        await toy.level()
        assert len({toy.segment_bytes(node.node_id) for node in toy.alive()}) == 1
        assert follower.machine.applied == leader.machine.applied


async def test_a_disk_that_is_nearly_full_takes_no_client_messages_but_still_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [50]
    monkeypatch.setattr(RealFiles, "free_space", lambda self, path: (free[0], 100))
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        driver = driver_of(leader)
        free[0] = 9
        await driver.disk.look()
        with pytest.raises(Overloaded, match="the disk is 91% full"):
            leader.machine.put(leader.running, b"two", lambda _: None)
        assert leader.running.statistics().disk_ok and leader.running.statistics().disk_usage == pytest.approx(0.91)
        gone = others(toy, leader)[0].node_id
        assert await change(toy, Remove(gone)) is None, "what the group itself has to log still goes"
        free[0] = 40
        await driver.disk.look()
        await toy.put(b"three")


# Damage met while the log is in use


async def test_damage_hands_over_before_the_log_is_opened_anew(tmp_path: Path) -> None:
    async with cluster(tmp_path, election_timeout_ms_min=3000, election_timeout_ms_max=5000) as toy:
        await toy.put(b"one", limit=20)
        old = await toy.leader()
        term = old.running.term
        ended = trio.Event()
        reopened: list[Reopen] = []
        driver = driver_of(old)
        run = driver._hand_over

        async def noted() -> None:
            await run()
            assert driver.role is not Role.LEADER, "the successor leads before this node leaves"
            reopened.append(Reopen(driver._leaving or ""))
            ended.set()

        driver._hand_over = noted  # type: ignore[method-assign]
        started = trio.current_time()
        driver.damaged(LogDamaged("entry 1 is damaged"))
        with trio.fail_after(1):
            await ended.wait()
        assert str(reopened[0]) == "entry 1 is damaged" and driver.counters["damage_found"] == 1
        await toy.put(b"two")
        assert trio.current_time() - started < 2.0, "by a transfer, not by a timeout"
        assert toy.leaders()[0].running.term == term + 1
        await wait_until(lambda: old.running._driver not in (None, driver), what="the log to be open again")
        assert old.machine.stops == 1 and len(old.machine.restored) == 2
        await toy.level()


async def test_damage_within_a_turn_asks_the_best_peer_to_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, election_timeout_ms_min=3000, election_timeout_ms_max=5000) as toy:
        await toy.put(b"one", limit=20)
        await toy.level()
        old = await toy.leader()
        driver = driver_of(old)

        def damaged(index: int) -> int | None:
            raise LogDamaged(f"the row of entry {index} is damaged")

        monkeypatch.setattr(driver.store, "term_at", damaged)
        started = trio.current_time()
        old.machine.put(old.running, b"lost or not", lambda _: None)
        await wait_until(
            lambda: any(node.running.is_ready_leader for node in toy.alive() if node is not old), what="a successor"
        )
        assert trio.current_time() - started < 2.0
        assert driver._is_broken and driver.counters["damage_found"] == 1
        turns = driver.turns
        driver.on_message("n1", None)  # type: ignore[arg-type]
        driver.turn()
        assert driver.turns == turns and old.error is None, "a broken driver takes no turn"


# Bounds


async def test_what_waits_during_a_stalled_cut_is_bounded(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        await toy.put(b"one")
        node = toy.nodes["n0"]
        driver = driver_of(node)
        driver._cut = (99, ())
        try:
            for _ in range(INBOX_MAX + 10):
                driver.on_message("n1", None)  # type: ignore[arg-type]
            assert len(driver._inbox) == INBOX_MAX and driver.counters["messages_dropped"] == 10
            for number in range(APP_MESSAGES_MAX + 10):
                driver.on_app_message("n1", b"%d" % number)
            assert driver.counters["app_dropped"] == 10
        finally:
            driver._inbox.clear()
            driver._cut = None
        driver.wake()
        await wait_until(lambda: len(node.machine.messages) == APP_MESSAGES_MAX, what="the messages")
        big = bytes(8 * 1024 * 1024)
        for _ in range(9):
            driver.on_app_message("n1", big)
        assert driver.counters["app_dropped"] == 11, "their bytes are bounded, too"
        driver.turn()
        driver.on_app_message("n1", big)
        assert driver.counters["app_dropped"] == 11


# Scenarios of raft.md 6.2


async def test_scenario_28_a_proposal_that_timed_out_and_then_commits_is_there_once(tmp_path: Path) -> None:
    """quickwit#6605. The sender is told "unknown" once; the entry commits later, once; a retry is the broker's care."""
    async with cluster(
        tmp_path, orphan_after_ms=100, election_timeout_ms_min=2000, election_timeout_ms_max=4000
    ) as toy:
        await toy.put(b"one", limit=20)
        leader = await toy.leader()
        peers = others(toy, leader)
        for node in peers:
            await node.kill()
        outcomes: list[str] = []
        leader.machine.put(leader.running, b"two", outcomes.append)
        await wait_until(lambda: outcomes, what="an answer")
        assert outcomes == ["unknown"] and leader.running.statistics().counters["orphaned"] == 1
        await peers[0].start()  # not both: without the leader they would be a quorum that lacks the entry
        await wait_until(lambda: len(leader.machine.applied) == 2, limit=10, what="the commit")
        await peers[1].start()
        await toy.level()
        for node in toy.alive():
            assert [record.rstrip(b".") for record in node.machine.applied] == [b"one", b"two"]
        assert outcomes == ["unknown"] and leader.running.statistics().waiting_records == 0


async def test_scenario_29_a_timeout_is_that_of_the_batch(tmp_path: Path) -> None:
    """arcadedb#5848: many entries that wait for one quorum are given up together, not one timeout after the other."""
    async with cluster(
        tmp_path, orphan_after_ms=200, election_timeout_ms_min=4000, election_timeout_ms_max=6000
    ) as toy:
        await toy.put(b"one", limit=20)
        leader = await toy.leader()
        for node in others(toy, leader):
            await node.kill()
        outcomes: list[str] = []
        started = trio.current_time()
        for number in range(500):
            leader.machine.put(leader.running, b"%d" % number, outcomes.append)
            if number % 5 == 0:
                leader.running.seal()
        await wait_until(lambda: len(outcomes) == 500, limit=3, what="all answers")
        assert set(outcomes) == {"unknown"}
        assert trio.current_time() - started < 1.5, "100 entries, one timeout"


async def test_scenario_32_an_uncommitted_tail_is_not_applied_after_an_abnormal_restart(tmp_path: Path) -> None:
    """DLedgerCommitLog dispatched it to the queues; rocketmq#6609."""
    async with cluster(tmp_path) as toy:
        for number in range(3):
            await toy.put(b"%d" % number)
        await toy.level()
        leader = await toy.leader()
        for node in others(toy, leader):
            await node.kill()
        leader.machine.put(leader.running, b"tail", lambda _: None)
        leader.running.seal()
        leader.running.wake()
        store = driver_of(leader).store
        last_index = store.last_index
        await wait_until(lambda: store.written_index > last_index, what="the tail to be written")
        await leader.kill()
        await leader.start()
        assert leader.running.statistics().last_index == last_index + 1
        applied = [record.rstrip(b".") for record in leader.machine.applied]
        assert b"tail" not in applied and [record.rstrip(b".") for record in leader.machine.pending][-1:] == [b"tail"]
        assert leader.running.read(leader.running.committed_position, 1) is None, "nor may it be read"


async def test_a_peer_that_lags_far_behind_is_fed_without_reads_on_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path) as toy:
        await toy.put(b"one")
        leader = await toy.leader()
        follower = others(toy, leader)[0]
        await follower.kill()
        outcomes: list[str] = []
        for number in range(6000):
            leader.machine.put(leader.running, b"%d" % number, outcomes.append)
            leader.running.seal()
            if number % 500 == 0:
                await wait_until(lambda count=number: len(outcomes) >= count, what="commits")  # type: ignore[misc]
        await wait_until(lambda: len(outcomes) == 6000, what="all commits")
        driver = driver_of(leader)
        loop = threading.get_ident()
        pread = RealFile.pread

        def off_the_loop(file: RealFile, nbytes: int, offset: int) -> bytes:
            assert threading.get_ident() != loop or nbytes <= 64 or str(leader.folder) not in file.path, "on the loop"
            return pread(file, nbytes, offset)

        monkeypatch.setattr(RealFile, "pread", off_the_loop)
        await follower.start()
        await toy.level(limit=20)
        assert driver.feed.reads > 0 and leader.running.is_ready_leader
        assert follower.machine.applied == leader.machine.applied


async def test_figures_of_a_group_under_load(tmp_path: Path) -> None:
    async with cluster(tmp_path, flush="sync") as toy:
        leader = await toy.leader()
        outcomes: list[str] = []

        def is_measured() -> bool:
            leader.machine.put(leader.running, b"record", outcomes.append)
            leader.running.kick()
            histograms = leader.running.statistics().histograms
            assert list(histograms) == ["write", "fsync", "replicate", "commit", "apply"]
            return all(each.count > 0 for each in histograms.values())

        await wait_until(is_measured, what="a figure of each kind")
        await wait_until(lambda: set(outcomes) == {"applied"}, what="all commits")
        await toy.level()
        statistics = leader.running.statistics()
        assert statistics.histograms["commit"].maximum < 5
        assert set(statistics.peer_state.values()) == {"replicate"} and set(statistics.lag_seconds.values()) == {0.0}
        assert statistics.counters["elections"] >= 1 and statistics.state == "serving"
        follower = others(toy, leader)[0]
        await follower.kill()
        await toy.put(b"more")
        await wait_until(lambda: leader.running.statistics().lag_seconds[follower.node_id] > 0.0, what="a lag")
        await toy.put(b"and more")
        lag = leader.running.statistics().lag_seconds[follower.node_id]
        assert 0.0 < lag < 5.0


async def test_a_vote_for_which_there_is_no_room_is_given_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On file systems that copy on write even a slot of term and vote needs room: the node waits, and does not die."""
    monkeypatch.setattr("dledger.hard_state.NO_ROOM_RETRY_SECONDS", 0.02)
    pwrite = RealFile.pwrite
    refused: list[str] = []
    is_full = True

    def writing(self: RealFile, data: Any, offset: int) -> None:
        if is_full and self.path.endswith("/meta"):
            refused.append(self.path)
            raise OSError(errno.ENOSPC, "full")
        pwrite(self, data, offset)

    # No durable mark is saved meanwhile: what is refused is a term and a vote.
    async with cluster(tmp_path, 3, flush_interval_ms=60_000) as toy:
        leader = await toy.leader()
        await toy.put(b"before")
        monkeypatch.setattr(RealFile, "pwrite", writing)
        await leader.kill()
        rest = toy.alive()
        await wait_until(lambda: refused, what="one to stand for election; who holds back its request asks nobody")
        await trio.sleep(0.2)
        assert not toy.leaders(), "no vote leaves before it is on stable storage"
        is_full = False
        await toy.put(b"after")
        assert toy.alive() == rest
