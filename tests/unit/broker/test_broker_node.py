"""Whole broker nodes over loopback: one alone, three together, a name server beside them, and bad beginnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

from broker.config import BrokerConfig
from broker.errors import NodeStopped, StartupError
from broker.node import BrokerNode
from broker.tables import InvariantBroken
from dledger.errors import LedgerError
from dledger.group import AddLearner, Promote, RaftGroup, Remove
from namesrv.config import NamesrvConfig
from namesrv.server import NameServer
from remoting.bodies import ClusterInfo, decode_body
from remoting.codes import PULL_SUBSCRIPTION, PULL_SUSPEND, RequestCode, ResponseCode
from remoting.command import Command
from remoting.connection import Connection
from remoting.errors import RemotingError
from remoting.message_codec import decode_stored_many
from remoting.pool import open_client
from runtime.model import Env
from runtime.testing import test_env, wait_until
from tests.unit.broker.node_rig import LOG, cluster_of


def send_ext(queue: int = 0, key: str = "", topic: str = "T") -> dict[str, Any]:
    properties = f"TAGS\x01TagA\x02UNIQ_KEY\x01{key}\x02KEYS\x01k{key}\x02" if key else "TAGS\x01TagA\x02"
    return {
        "a": "PG", "b": topic, "c": "TBW102", "d": 4, "e": queue, "f": 0, "g": 1, "h": 0, "i": properties, "j": 0,
        "k": False, "m": False,
    }  # fmt: skip


def pull_ext(offset: int, **changes: Any) -> dict[str, Any]:
    ext = {
        "consumerGroup": "CG", "topic": "T", "queueId": 0, "queueOffset": offset, "maxMsgNums": 32,
        "sysFlag": PULL_SUBSCRIPTION, "commitOffset": 0, "suspendTimeoutMillis": 0, "subscription": "*",
        "subVersion": 0, "expressionType": "TAG",
    }  # fmt: skip
    return {**ext, **changes}


async def test_one_node_stores_serves_and_remembers(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as (cluster, client):
        address = cluster.address("n0")
        for number in range(3):
            answer = await client.call(address, 310, send_ext(key=f"{number:032d}"), b"body %d" % number)
            assert answer.ext["queueOffset"] == str(number)
        pulled = await client.call(address, RequestCode.PULL_MESSAGE, pull_ext(0))
        assert [bytes(m.body) for m in decode_stored_many(bytes(pulled.body))] == [b"body 0", b"body 1", b"body 2"]
        ext = {"consumerGroup": "CG", "topic": "T", "queueId": 0, "commitOffset": 2}
        await wait_until(lambda: cluster.nodes["n0"].state.groups.get("CG"), what="the group's creation")
        await client.call(address, RequestCode.UPDATE_CONSUMER_OFFSET, ext)
        await cluster.nodes["n0"].stop(0)
        await cluster.start("n0")
        await cluster.leader()
        answer = await client.call(address, RequestCode.QUERY_CONSUMER_OFFSET, ext)
        assert answer.ext["offset"] == "2"
        key = {"topic": "T", "key": "k" + f"{1:032d}", "maxNum": 8, "beginTimestamp": 0, "endTimestamp": 9999999999999}
        found = await client.call(address, RequestCode.QUERY_MESSAGE, key)
        assert [bytes(m.body) for m in decode_stored_many(bytes(found.body))] == [b"body 1"]


async def test_a_killed_node_reads_its_log_again(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as (cluster, client):
        address = cluster.address("n0")
        sent = await client.call(address, 310, send_ext(key="x" * 32), b"kept")
        await cluster.kill("n0")
        await cluster.start("n0")
        await cluster.leader()
        offset = int(sent.ext["msgId"][16:], 16)
        answer = await client.call(address, RequestCode.VIEW_MESSAGE_BY_ID, {"offset": offset})
        assert b"kept" in bytes(answer.body)
        again = await client.call(address, 310, send_ext(key="x" * 32), b"kept")
        assert again.ext["queueOffset"] == "0", "the second send of the same message is the first one"


async def test_a_group_that_begins_again_from_its_disk_loses_nothing_and_keeps_its_clients(tmp_path: Path) -> None:
    """As after a repair: same process, same connections, tables anew."""
    async with cluster_of(1, tmp_path) as (cluster, client):
        address = cluster.address("n0")
        node = cluster.nodes["n0"]
        for number in range(3):
            await client.call(address, 310, send_ext(key=f"{number:032d}"), b"body %d" % number)
        await node.state.checkpoint()
        await client.call(address, 310, send_ext(key=f"{3:032d}"), b"body 3")
        runs = node.state.runs
        driver: Any = node.group._driver
        driver.reopen("for a test")
        await wait_until(lambda: node.state.runs == runs + 1 and node.group.is_ready_leader, what="a new run")
        answer = await client.call(address, 310, send_ext(key=f"{1:032d}"), b"body 1")
        assert answer.ext["queueOffset"] == "1", "a retry of before"
        assert (await client.call(address, 310, send_ext(), b"body 4")).ext["queueOffset"] == "4"
        pulled = await client.call(address, RequestCode.PULL_MESSAGE, pull_ext(0))
        assert [bytes(m.body) for m in decode_stored_many(bytes(pulled.body))] == [b"body %d" % n for n in range(5)]
        assert (await client.call(address, RequestCode.GET_MAX_OFFSET, {"topic": "T", "queueId": 0})).ext[
            "offset"
        ] == "5"
        await node.state.checkpoint()
        assert node.state.checkpoints.saved_index == node.state.applied_index


async def test_a_long_poll_ends_with_the_message(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as (cluster, client):
        address = cluster.address("n0")
        await client.call(address, 310, send_ext(), b"first")
        answers: list[Command] = []

        async def wait_for_it() -> None:
            ext = pull_ext(1, sysFlag=PULL_SUBSCRIPTION | PULL_SUSPEND, suspendTimeoutMillis=15_000)
            answers.append(await client.call(address, RequestCode.PULL_MESSAGE, ext, timeout=10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_it)
            await wait_until(lambda: len(cluster.nodes["n0"].broker.long_poll) == 1, what="the parked pull")
            assert not answers
            await client.call(address, 310, send_ext(), b"second")
        assert b"second" in bytes(answers[0].body)


async def test_three_nodes_and_any_of_them_will_do(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as (cluster, client):
        leader = await cluster.leader()
        for number, node_id in enumerate(sorted(cluster.nodes)):
            answer = await client.call(cluster.address(node_id), 310, send_ext(), b"by %s" % node_id.encode())
            assert answer.ext["queueOffset"] == str(number)
            _, port = cluster.configs[leader].advertised
            assert int(answer.ext["msgId"][8:16], 16) == port, "stored by the leader"
        followers = [node_id for node_id in sorted(cluster.nodes) if node_id != leader]
        await wait_until(
            lambda: all(node.state.queues.max_offset("T", 0) == 3 for node in cluster.nodes.values()),
            what="replication",
        )
        pulled = await client.call(cluster.address(followers[0]), RequestCode.PULL_MESSAGE, pull_ext(0))
        assert len(decode_stored_many(bytes(pulled.body))) == 3
        logs = {bytes(node.group.read(0, node.group.committed_position) or b"") for node in cluster.nodes.values()}
        assert len(logs) == 1, "the logs differ"


async def test_the_deletion_of_a_topic_ends_the_waits_on_followers_too(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as (cluster, client):
        leader = await cluster.leader()
        follower = next(node_id for node_id in sorted(cluster.nodes) if node_id != leader)
        node = cluster.nodes[follower]
        await client.call(cluster.address(leader), 310, send_ext(), b"m")
        await wait_until(lambda: node.state.queues.max_offset("T", 0) == 1, what="replication")
        codes: list[int] = []

        async def wait_for_more() -> None:
            ext = pull_ext(1, sysFlag=PULL_SUBSCRIPTION | PULL_SUSPEND, suspendTimeoutMillis=20_000)
            command = Command(code=RequestCode.PULL_MESSAGE, opaque=0, ext={k: str(v) for k, v in ext.items()})
            codes.append((await client.invoke(cluster.address(follower), command, 5)).code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_more)
            await wait_until(lambda: len(node.broker.long_poll) == 1, what="the pull to be held")
            await client.call(cluster.address(leader), RequestCode.DELETE_TOPIC_IN_BROKER, {"topic": "T"})
        assert codes == [ResponseCode.TOPIC_NOT_EXIST]


async def test_the_leader_dies_and_a_follower_answers_for_the_next(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as (cluster, client):
        leader = await cluster.leader()
        survivor = next(node_id for node_id in sorted(cluster.nodes) if node_id != leader)
        await client.call(cluster.address(survivor), 310, send_ext(key=f"{0:032d}"), b"before")
        await cluster.kill(leader)
        started = trio.current_time()
        answer = await client.call(cluster.address(survivor), 310, send_ext(key=f"{1:032d}"), b"after", timeout=5)
        print(f"next acknowledged send after {trio.current_time() - started:.3f} s")
        assert answer.ext["queueOffset"] == "1"
        await cluster.start(leader)
        await wait_until(lambda: cluster.nodes[leader].state.queues.max_offset("T", 0) == 2, what="catching up")


async def test_a_stop_hands_leadership_over_first(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as (cluster, client):
        leader = await cluster.leader()
        node = cluster.nodes.pop(leader)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.stop, 1.0)
            await cluster.leader()
            answer = await client.call(cluster.address(leader), 310, send_ext(), b"to the one that leaves")
            assert answer.ext["queueOffset"] == "0"


# ------------------------------------------------------------------------------------------------------- name servers


async def promoted(group: RaftGroup, node_id: str) -> None:
    with trio.fail_after(5):
        while True:
            try:
                await group.change_members(Promote(node_id))
                return
            except LedgerError:  # it has not caught up
                await trio.sleep(0.02)


async def test_exactly_one_node_is_registered_as_leader(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    async with trio.open_nursery() as outer:
        server = NameServer(env, NamesrvConfig(listen=("127.0.0.1", 0), data_dir=f"{tmp_path}/ns"))
        host, port = await outer.start(server.run)
        namesrv = f"{host}:{port}"
        async with cluster_of(3, tmp_path, (namesrv,)) as (cluster, client):

            async def addresses() -> dict[int, str]:
                answer = await client.call(namesrv, RequestCode.GET_BROKER_CLUSTER_INFO)
                info = decode_body(answer.body, ClusterInfo)
                return info.broker_addr_table["broker-a"].broker_addrs if info.broker_addr_table else {}

            async def registered(expected: dict[int, str]) -> bool:
                with trio.move_on_after(5):
                    while (found := await addresses()) != expected:
                        print(found, expected)
                        await trio.sleep(0.02)
                    return True
                return False

            def expected_of(leader: str) -> dict[int, str]:
                return {
                    0 if node_id == leader else cluster.configs[node_id].broker_id + 1: cluster.address(node_id)
                    for node_id in cluster.nodes
                }

            leader = await cluster.leader()
            assert await registered(expected_of(leader))
            for number in range(5):
                # Who was answered finds the route at once.
                await client.call(cluster.address(leader), 310, send_ext(topic=f"Sent{number}"), b"x")
                assert (await client.invoke(namesrv, client.request(105, {"topic": f"Sent{number}"}), 3)).code == 0
                ext = {"topic": f"Made{number}", "readQueueNums": 2, "writeQueueNums": 2, "perm": 6}
                await client.call(cluster.address(leader), RequestCode.UPDATE_AND_CREATE_TOPIC, ext)
                assert (await client.invoke(namesrv, client.request(105, {"topic": f"Made{number}"}), 3)).code == 0
            # Who is removed from the group is found no more, though it runs.
            gone = next(node_id for node_id in cluster.nodes if node_id != leader)
            await cluster.nodes[leader].group.change_members(Remove(gone))
            expected = expected_of(leader)
            assert expected.pop(cluster.configs[gone].broker_id + 1) == cluster.address(gone)
            assert await registered(expected)
            peer = cluster.configs[gone].group.peers[gone]
            await cluster.nodes[leader].group.change_members(AddLearner(gone, peer))
            assert await registered(expected_of(leader))
            await promoted(cluster.nodes[leader].group, gone)
            await cluster.kill(leader)
            second = await cluster.leader()
            assert await registered(expected_of(second))
            await cluster.nodes.pop(second).stop(0)
            (last,) = cluster.nodes
            assert await registered({cluster.configs[last].broker_id + 1: cluster.address(last)})
        outer.cancel_scope.cancel()


# ----------------------------------------------------------------------------------------------- clients of one node


async def test_members_hear_of_changes_and_answer_calls(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as (cluster, _):
        address = cluster.address("n0")
        await cluster.leader()
        pushed: list[int] = []

        def on_request(_conn: Connection, command: Command) -> bytes | None:
            from remoting.command import encode_response

            pushed.append(command.code)
            return encode_response(command, 0, body=b'{"properties":{"who":"c1"}}')

        heartbeat = (
            b'{"clientID":"%s","consumerDataSet":[{"groupName":"CG","consumeType":"CONSUME_PASSIVELY","messageModel":'
            b'"CLUSTERING","consumeFromWhere":"CONSUME_FROM_LAST_OFFSET","subscriptionDataSet":[{"topic":"T",'
            b'"subString":"*","subVersion":1}]}],"producerDataSet":[]}'
        )
        async with (
            open_client(cluster.env, log=LOG, on_request=on_request) as first,
            open_client(cluster.env, log=LOG) as second,
        ):
            answer = await first.call(address, RequestCode.HEART_BEAT, {}, heartbeat % b"c1")
            assert answer.version == 479
            await wait_until(lambda: cluster.nodes["n0"].state.topics.get("%RETRY%CG"), what="the retry topic")
            await wait_until(lambda: pushed == [40], what="the first notification")
            await second.call(address, RequestCode.HEART_BEAT, {}, heartbeat % b"c2")
            await wait_until(lambda: pushed == [40, 40], what="notification of the second member")
            listed = await first.call(address, RequestCode.GET_CONSUMER_LIST_BY_GROUP, {"consumerGroup": "CG"})
            assert b'["c1","c2"]' in bytes(listed.body)
            call = {"consumerGroup": "CG", "clientId": "c1", "jstackEnable": False}
            info = await second.call(address, RequestCode.GET_CONSUMER_RUNNING_INFO, call)
            assert bytes(info.body) == b'{"properties":{"who":"c1"}}'
            second.close(address)
            await wait_until(lambda: pushed == [40, 40, 307, 40], what="notification of the second one's end")


# ------------------------------------------------------------------------------------------------------ bad beginnings


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def start_once(env: Env, config: BrokerConfig) -> str:
    """The sentence with which a node refuses to start."""
    node = BrokerNode(env, config)
    with pytest.raises(StartupError) as caught:
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(node.run)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _leaf(group) from None
    return str(caught.value)


async def test_each_bad_beginning_has_its_sentence(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as (cluster, client):
        env, config = cluster.env, cluster.configs["n0"]
        assert "in use by process" in await start_once(env, config)
        elsewhere = evolve(
            config, data_dir=f"{tmp_path}/else", group=evolve(config.group, data_dir=f"{tmp_path}/else/raft")
        )
        sentence = await start_once(env, elsewhere)
        assert sentence.startswith(f"cannot listen on 127.0.0.1:{config.listen[1]}")
        free = evolve(elsewhere, listen=("127.0.0.1", 0))
        blocked = evolve(free, group=evolve(free.group, format_if_empty=False))
        assert "not formatted" in await start_once(env, blocked)
        (tmp_path / "file").write_text("in the way")
        assert "cannot write to" in await start_once(env, evolve(free, data_dir=f"{tmp_path}/file/n0"))
        foreign = evolve(
            free, data_dir=config.data_dir + "x", group=evolve(config.group, group="broker-b", cluster="Other")
        )
        assert await start_once(env, foreign)
        # None of this disturbed the node that runs.
        assert (await client.call(cluster.address("n0"), 310, send_ext(), b"still there")).code == 0


async def test_unknown_codes_and_truncated_headers(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as (cluster, client):
        address = cluster.address("n0")
        answer = await client.invoke(address, client.request(9999), 3)
        assert (answer.code, answer.remark) == (
            ResponseCode.REQUEST_CODE_NOT_SUPPORTED,
            " request type 9999 not supported",
        )
        answer = await client.invoke(address, client.request(RequestCode.GET_MIN_OFFSET, {"topic": "T"}), 3)
        assert answer.code == ResponseCode.SYSTEM_ERROR and "queueId" in (answer.remark or "")
        answer = await client.invoke(address, client.request(RequestCode.HEART_BEAT, {}, b"{not json"), 3)
        assert answer.code == ResponseCode.SYSTEM_ERROR


async def test_a_broken_invariant_stops_the_node_with_one_line(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as (cluster, _):
        await cluster.leader()
    env = test_env(tmp_path)

    def broken(*_: object) -> None:
        raise InvariantBroken("units do not add up")

    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_client(env, log=LOG) as client, trio.open_nursery() as nursery:
            node = BrokerNode(env, cluster.configs["n0"])
            node.state.on_dispatch.append(broken)
            await nursery.start(node.run)
            with pytest.raises(RemotingError):
                await client.call(cluster.address("n0"), 310, send_ext(), b"x")
    error = _leaf(caught.value)
    assert isinstance(error, NodeStopped)
    assert str(error) == "invariant broken, the node stops: units do not add up"
