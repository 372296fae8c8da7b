"""The private admin codes for Quorate's own tools, and mqadmin's deleteExpiredCommitLog."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import trio
import trio.lowlevel

from broker.processors.raft import BACKUP_IDLE_S, BACKUP_LEASE_S
from dledger.core.membership import AddLearner, Promote, Remove
from dledger.errors import LedgerError, NotLeader
from dledger.store.checkpoint import unpack_checkpoint, write_checkpoint
from remoting.codes import RequestCode, ResponseCode
from remoting.command import Command
from tests.unit.broker.processor_rig import ProcessorRig


@pytest.fixture
def rig(tmp_path: Path) -> ProcessorRig:
    rig = ProcessorRig(tmp_path)
    rig.create_topic("T", 1)
    rig.send("T", b"one")
    return rig


async def ask(rig: ProcessorRig, code: int, body: dict[str, Any] | bytes | None = None) -> Command:
    """One request, with the job it may start."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    async with trio.open_nursery() as nursery:
        rig.broker.jobs.attach(nursery)
        answers = rig.tell(code, body=data)
    answers += rig.conn.received()
    assert len(answers) == 1
    return answers[0]


async def test_describe_tells_everything_the_group_knows_of_itself(rig: ProcessorRig) -> None:
    body = json.loads((await ask(rig, RequestCode.RAFT_DESCRIBE)).body)
    assert (body["node_id"], body["role"], body["ready"], body["state"]) == ("n0", "leader", True, "serving")
    assert body["members"] == ["n0", "n1", "n2"] and body["learners"] == ["n3"]
    assert body["addresses"] == {"n3": ["127.0.0.1", 40941]}
    assert (body["group"], body["group_uuid"]) == ("broker-a", rig.group.group_uuid)
    assert body["address"] == body["leader_address"] == "127.0.0.1:10911"
    assert body["tables"]["topics"] > 10
    assert body["commit_index"] == rig.group.commit_index and "histograms" in body and "steps_down" in body
    rig.group.follow("n1")
    rig.broker.master_address = "127.0.0.1:10921"
    body = json.loads((await ask(rig, RequestCode.RAFT_DESCRIBE)).body)
    assert (body["role"], body["leader_address"]) == ("follower", "127.0.0.1:10921")


async def test_transfer(rig: ProcessorRig) -> None:
    answer = await ask(rig, RequestCode.RAFT_TRANSFER, {"target": "n7"})
    assert (answer.code, answer.remark) == (29, "n7 is no voter of this group; the voters are n0, n1, n2")
    answer = await ask(rig, RequestCode.RAFT_TRANSFER, {"target": "n2"})
    assert (answer.code, json.loads(answer.body)) == (0, {"leader": "n2"})
    assert rig.group.asked == [("transfer", "n2")]
    rig.group.refusal = LedgerError("n2 is far behind")
    answer = await ask(rig, RequestCode.RAFT_TRANSFER)
    assert (answer.code, answer.remark) == (1, "leadership was not handed over: n2 is far behind")


@pytest.mark.parametrize(
    ("body", "change"),
    [
        ({"action": "add_learner", "node": "n3", "address": "10.0.0.3:40941"}, AddLearner("n3", ("10.0.0.3", 40941))),
        ({"action": "promote", "node": "n3"}, Promote("n3")),
        ({"action": "remove", "node": "n2"}, Remove("n2")),
    ],
)
async def test_changes_of_members(rig: ProcessorRig, body: dict[str, str], change: Any) -> None:
    answer = await ask(rig, RequestCode.RAFT_CHANGE_MEMBERS, body)
    assert (answer.code, json.loads(answer.body)) == (0, {"voters": ["n0", "n1", "n2"], "learners": ["n3"]})
    assert rig.group.asked == [(change,)]
    rig.group.refusal = LedgerError("another change is under way")
    answer = await ask(rig, RequestCode.RAFT_CHANGE_MEMBERS, body)
    assert (answer.code, answer.remark) == (1, "another change is under way")
    rig.group.refusal = NotLeader("n1")
    assert (await ask(rig, RequestCode.RAFT_CHANGE_MEMBERS, body)).code == ResponseCode.SERVICE_NOT_AVAILABLE


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"action": "add_learner", "node": "n3", "address": "nowhere"}, 29),
        ({"action": "add_learner", "node": "n3", "address": "host:70000"}, 29),
        ({"action": "promote", "node": ""}, 29),
        ({"action": "shrink", "node": "n3"}, 29),
        ({"node": "n3"}, 1),
        (b"{", 1),
    ],
)
async def test_what_is_no_change_is_refused_with_a_sentence(rig: ProcessorRig, body: Any, code: int) -> None:
    answer = await ask(rig, RequestCode.RAFT_CHANGE_MEMBERS, body)
    assert answer.code == code and answer.remark
    assert rig.group.asked == []


async def test_only_a_recovering_node_has_a_loss_to_accept(rig: ProcessorRig) -> None:
    answer = await ask(rig, RequestCode.RAFT_ACCEPT_LOSS)
    assert (answer.code, answer.remark) == (1, "n0 is not recovering: there is nothing to accept")
    rig.group.recovering = True
    answer = await ask(rig, RequestCode.RAFT_ACCEPT_LOSS)
    assert answer.code == 0 and json.loads(answer.body)["last_index"] == len(rig.group.entries)
    assert rig.group.asked == [("accept loss",)]


async def test_a_node_that_repairs_its_log_gives_up_what_nobody_can_supply(rig: ProcessorRig) -> None:
    rig.group.is_serving = rig.group.is_ready_leader = False
    rig.group.damaged = ((5, 7),)
    answer = await ask(rig, RequestCode.RAFT_ACCEPT_LOSS)
    assert answer.code == 0 and json.loads(answer.body)["damaged"] == [[5, 7]]
    assert rig.group.asked == [("accept loss",)]
    rig.group.refusal = LedgerError("nothing would be left")
    answer = await ask(rig, RequestCode.RAFT_ACCEPT_LOSS)
    assert (answer.code, answer.remark) == (1, "nothing would be left")


async def test_deleting_what_is_expired(rig: ProcessorRig) -> None:
    assert (await ask(rig, RequestCode.DELETE_EXPIRED_COMMITLOG)).code == 0
    assert (await ask(rig, RequestCode.RAFT_DELETE_EXPIRED)).code == 0
    answer = await ask(rig, RequestCode.RAFT_DELETE_EXPIRED, {"position": 100})
    assert json.loads(answer.body) == {"first_position": 0, "trim_position": 50}
    assert rig.group.asked == [("delete expired",), ("delete expired",), ("trim", 100)]
    rig.group.refusal = LedgerError("no closed segment before 100 can be trimmed")
    answer = await ask(rig, RequestCode.RAFT_DELETE_EXPIRED, {"position": 100})
    assert (answer.code, answer.remark) == (1, "no closed segment before 100 can be trimmed")
    rig.group.refusal = NotLeader("n1")
    for code in (RequestCode.RAFT_DELETE_EXPIRED, RequestCode.DELETE_EXPIRED_COMMITLOG):
        assert (await ask(rig, code)).code == ResponseCode.SERVICE_NOT_AVAILABLE


@pytest.mark.parametrize(
    "code",
    [
        RequestCode.RAFT_TRANSFER,
        RequestCode.RAFT_CHANGE_MEMBERS,
        RequestCode.RAFT_DELETE_EXPIRED,
        RequestCode.DELETE_EXPIRED_COMMITLOG,
    ],
)
async def test_what_only_a_leader_can_do_is_passed_on(rig: ProcessorRig, code: RequestCode) -> None:
    rig.group.follow("n1")
    assert rig.tell(code, body=b'{"action":"promote","node":"n3"}') == []
    assert [peer for peer, _payload in rig.group.sent] == ["n1"]
    assert rig.group.asked == []


async def test_a_backup_is_the_committed_log_and_a_checkpoint(rig: ProcessorRig) -> None:
    folder = rig.config.group.data_dir
    rig.env.files.make_dirs(folder)
    write_checkpoint(rig.env.files, folder, 2, b"tables" * 10)
    manifest = json.loads((await ask(rig, RequestCode.RAFT_BACKUP_MANIFEST)).body)
    assert (manifest["segment_bytes"], manifest["segments"][0]["end_position"]) == (65_536, 128)
    assert manifest["committed_position"] == rig.group.committed_position
    checkpoint = manifest["checkpoint"]
    assert checkpoint["index"] == 2
    # A newer one is saved meanwhile: the backup goes on with its own.
    write_checkpoint(rig.env.files, folder, 3, b"newer")
    data = b""
    while len(data) < checkpoint["nbytes"]:
        where = {"checkpoint_index": 2, "offset": len(data), "nbytes": 50}
        answer = await ask(rig, RequestCode.RAFT_BACKUP_CHUNK, where)
        assert answer.code == 0 and int(answer.ext["crc32"]) == crc32(answer.body)
        data += answer.body
    assert crc32(data) == checkpoint["crc32"]
    found = unpack_checkpoint(data)
    assert found is not None and (found.index, found.blob) == (2, b"tables" * 10)
    answer = await ask(rig, RequestCode.RAFT_BACKUP_CHUNK, {"position": 64, "nbytes": 40})
    assert answer.body == rig.group._log[64:104] and int(answer.ext["crc32"]) == crc32(answer.body)


async def test_what_a_backup_has_yet_to_copy_is_held(rig: ProcessorRig) -> None:
    """For a while after each chunk: a trim takes effect for everybody else meanwhile."""
    await ask(rig, RequestCode.RAFT_BACKUP_MANIFEST)
    holder = f"backup to {rig.conn.peer_text}"
    assert rig.group.held == {holder: (rig.group.first_position, BACKUP_LEASE_S)}
    await ask(rig, RequestCode.RAFT_BACKUP_CHUNK, {"position": 64, "nbytes": 40})
    assert rig.group.held == {holder: (64, BACKUP_LEASE_S)}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"position": 0, "nbytes": 0}, 29),
        ({"position": 0, "nbytes": 1 << 21}, 29),
        ({"nbytes": 10}, 29),
        ({"position": 0, "checkpoint_index": 1, "nbytes": 10}, 29),
        ({"checkpoint_index": 1, "nbytes": 10}, 1),
        ({"position": 1 << 40, "nbytes": 10}, 1),
    ],
)
async def test_chunks_that_are_none(rig: ProcessorRig, body: dict[str, int], code: int) -> None:
    answer = await ask(rig, RequestCode.RAFT_BACKUP_CHUNK, body)
    assert answer.code == code and answer.remark


async def test_an_abandoned_backup_is_forgotten(rig: ProcessorRig, autojump_clock: Any) -> None:
    folder = rig.config.group.data_dir
    rig.env.files.make_dirs(folder)
    write_checkpoint(rig.env.files, folder, 2, b"tables")
    await ask(rig, RequestCode.RAFT_BACKUP_MANIFEST)
    where = {"checkpoint_index": 2, "nbytes": 5}
    await trio.sleep(BACKUP_IDLE_S - 1)
    rig.broker.thin_out()
    assert (await ask(rig, RequestCode.RAFT_BACKUP_CHUNK, where)).code == 0
    await trio.sleep(BACKUP_IDLE_S + 1)
    rig.broker.thin_out()
    assert (await ask(rig, RequestCode.RAFT_BACKUP_CHUNK, where)).code == 1


async def test_a_log_that_is_not_served_has_no_manifest(rig: ProcessorRig) -> None:
    rig.group.is_serving = False
    rig.group.is_ready_leader = False
    assert (await ask(rig, RequestCode.RAFT_BACKUP_MANIFEST)).code == ResponseCode.SERVICE_NOT_AVAILABLE
