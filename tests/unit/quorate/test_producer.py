"""Sending against an in-memory cluster: choice of queues, retries, failover, refusals."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
from attrs import define, evolve, field
from fake_cluster import FakeCluster, fake_cluster

import quorate
from quorate import producer
from quorate.producer import by_key
from remoting.codes import RequestCode
from remoting.message import Message, host_to_bytes, offset_msg_id, parse_offset_msg_id, string_to_properties
from runtime.model import Listener, Net, Stream
from runtime.testing import test_env as make_env
from runtime.testing import wait_until


def sends(cluster: FakeCluster, group: str = "broker-a") -> list[dict[str, str]]:
    return [request.ext for _, request in cluster.groups[group].requests if request.code == RequestCode.SEND_MESSAGE_V2]


async def test_send_to_a_new_topic_creates_it_from_the_template() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        receipt = await mq.send(
            "orders", b"hello", tag="new", key="42", keys=["43"], properties={"p": "v"}, delay_level=3
        )
        assert (receipt.topic, receipt.broker_name, receipt.queue_offset) == ("orders", "broker-a", 0)
        assert (receipt.attempts, receipt.status, receipt.count) == (1, "SEND_OK", 1)
        assert 0 <= receipt.queue_id < 4, "the template has 8 queues but hands down 4"
        properties = string_to_properties(sends(cluster)[0]["i"])
        assert properties == {
            "TAGS": "new",
            "KEYS": "42 43",
            "p": "v",
            "DELAY": "3",
            "WAIT": "true",
            "UNIQ_KEY": receipt.message_id,
        }
        assert len(receipt.message_id) == 32
        assert receipt.message_id.startswith("7F000001"), "the address as the broker sees it"
        found = await mq.admin.view(receipt.message_id, topic="orders")
        assert found is not None
        assert found.body == b"hello"


async def test_a_message_is_viewed_by_its_id_when_the_node_that_stored_it_is_gone() -> None:
    """The fake brokers stamp records with an address where nobody listens; other members have the same offsets."""
    env = make_env()
    async with fake_cluster(env, groups=2) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 4
        for number in range(8):
            receipt = await mq.send("t", b"%d" % number)
        found = await mq.admin.view(receipt.offset_message_id, topic="t")
        assert found is not None
        assert found.topic == "t" and found.offset_message_id == receipt.offset_message_id
        host, port, _ = parse_offset_msg_id(receipt.offset_message_id)
        nothing = offset_msg_id(host_to_bytes(host, port), 1 << 40)
        assert await mq.admin.view(nothing, topic="t") is None


async def test_round_robin_over_all_groups_and_queues() -> None:
    env = make_env()
    async with fake_cluster(env, groups=2) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 4
        used = Counter([(await mq.send("t", b"x")).queue for _ in range(24)])
        assert set(used.values()) == {3}
        assert len(used) == 8


async def test_explicit_queue_and_selectors() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect([cluster.namesrv], env=env) as mq:
        cluster.topics["t"] = 8
        queues = await mq.pull_consumer("g").queues("t")
        assert (await mq.send("t", b"x", queue=queues[5])).queue == queues[5]
        assert (await mq.send("t", b"x", selector=lambda found, message: found[-1])).queue == queues[7]
        places = {(await mq.send("t", b"x", selector=by_key("customer-7"))).queue for _ in range(5)}
        assert len(places) == 1
        assert string_to_properties(sends(cluster)[-1]["i"])["__SHARDINGKEY"] == "customer-7"


async def test_batch_is_one_request_and_one_queue() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 4
        messages = [Message(topic="t", body=f"{n}".encode(), properties={"TAGS": "x"}) for n in range(10)]
        receipt = await mq.send_batch("t", messages)
        assert (receipt.count, receipt.queue_offset) == (10, 0)
        assert cluster.groups["broker-a"].stored("t") == [f"{n}".encode() for n in range(10)]
        assert len({message.properties["UNIQ_KEY"] for message in messages}) == 10
        with pytest.raises(ValueError, match="empty"):
            await mq.send_batch("t", [])
        with pytest.raises(ValueError, match="one topic"):
            await mq.send_batch("t", [Message(topic="u", body=b"")])
        with pytest.raises(ValueError, match="delayed"):
            await mq.send_batch("t", [Message(topic="t", body=b"", properties={"DELAY": "1"})])


async def test_oneway() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        await mq.send_oneway("t", b"x", tag="a", key="k")
        await wait_until(lambda: cluster.groups["broker-a"].stored("t") == [b"x"], what="the one-way message")
        assert [request.is_oneway for _, request in cluster.groups["broker-a"].requests if request.code == 310] == [
            True
        ]


async def test_failover_within_one_group_costs_only_the_election() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 4
        state = cluster.groups["broker-a"]
        await mq.send("t", b"before")
        await cluster.kill(state.nodes[0])

        async def elect() -> None:
            await trio.sleep(0.1)
            state.nodes[2].lead()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(elect)
            receipt = await mq.send("t", b"during", timeout=5)
        assert receipt.attempts > 1
        assert receipt.elapsed_ms < 1000
        assert state.stored("t") == [b"before", b"during"]
        keys = {string_to_properties(ext["i"])["UNIQ_KEY"] for ext in sends(cluster)[1:]}
        assert keys == {receipt.message_id}, "all attempts carry the same id"
        leader = state.nodes[2].address
        await wait_until(lambda: (r := mq.routes.known("t")) and r.leader("broker-a") == leader, what="the new route")
        assert (await mq.send("t", b"after")).attempts == 1


async def test_an_answer_lost_with_its_connection_does_not_store_twice() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        state = cluster.groups["broker-a"]
        await mq.send("t", b"0")
        count = 0

        def store_but_do_not_answer(request: object) -> bool:
            nonlocal count
            if getattr(request, "code", 0) == 310:
                count += 1
                if count == 1:
                    ext = request.ext  # type: ignore[attr-defined]
                    made = state.append("t", 0, b"1", ext["i"])
                    state.seen["t", string_to_properties(ext["i"])["UNIQ_KEY"]] = made
                    for connection in list(state.nodes[0].connections):
                        connection.close("crash before the answer")
                    return True
            return False

        state.swallow = store_but_do_not_answer
        receipt = await mq.send("t", b"1", timeout=5)
        assert receipt.attempts == 2
        assert state.stored("t") == [b"0", b"1"]


async def test_a_failed_group_is_left_for_another_without_a_pause() -> None:
    env = make_env()
    async with fake_cluster(env, groups=2) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 2
        cluster.groups["broker-a"].refuse = lambda request: (14, "no leader") if request.code == 310 else None
        receipts = [await mq.send("t", b"x") for _ in range(8)]
        assert {receipt.broker_name for receipt in receipts} == {"broker-b"}
        assert max(receipt.attempts for receipt in receipts) == 2
        for node in list(cluster.groups["broker-a"].nodes.values()):
            await cluster.kill(node)
        assert (await mq.send("t", b"x")).broker_name == "broker-b"


async def test_a_silent_leader_is_given_up_before_the_timeout() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        state = cluster.groups["broker-a"]
        frozen = state.nodes[0]
        frozen.is_frozen = True
        receipt = await mq.send("t", b"x", timeout=3)
        assert receipt.attempts == 2
        assert 900 < receipt.elapsed_ms < 2000
        frozen.is_frozen = False


async def test_a_frozen_leader_is_left_as_soon_as_another_one_leads() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        state = cluster.groups["broker-a"]
        await mq.send("t", b"before")
        frozen = state.nodes[0]
        frozen.is_frozen = True

        async def elect() -> None:
            await trio.sleep(0.3)
            state.nodes[2].lead()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(elect)
            receipt = await mq.send("t", b"x", timeout=9)
        assert receipt.attempts == 2
        assert 300 <= receipt.elapsed_ms < 800, "a third of the time-out is 3 s"
        assert state.stored("t") == [b"before", b"x"]
        frozen.is_frozen = False


async def test_a_late_answer_is_waited_for_while_the_leader_stays() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        slow = cluster.groups["broker-a"].nodes[0]
        slow.is_frozen = True

        async def answer() -> None:
            await wait_until(lambda: bool(slow.unanswered), what="the send")
            await trio.sleep(0.5)
            slow.answer_late()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            receipt = await mq.send("t", b"x", timeout=3)
        assert receipt.attempts == 1
        slow.is_frozen = False


@define
class CutOff:
    """A network that swallows all that goes to some addresses, as a partition does."""

    net: Net
    silent: set[str] = field(factory=set)

    async def dial(self, host: str, port: int, *, timeout: float = 3.0) -> Stream:
        if f"{host}:{port}" in self.silent:
            await trio.sleep(timeout)
            raise trio.TooSlowError
        return await self.net.dial(host, port, timeout=timeout)

    async def listen(self, host: str, port: int) -> Listener:
        return await self.net.listen(host, port)


async def test_a_node_that_cannot_be_dialled_is_left_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env()
    net = CutOff(env.net)
    monkeypatch.setattr(producer, "NEXT_AFTER_S", 0.1)
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=evolve(env, net=net)) as mq:
        cluster.topics["t"] = 1
        net.silent.add(cluster.groups["broker-a"].nodes[0].address)
        receipt = await mq.send("t", b"x", timeout=1.5)
        assert receipt.attempts == 2
        assert 500 <= receipt.elapsed_ms < 1_400, "a third of the time-out is 0.5 s"


@pytest.mark.parametrize("code", [13, 29, 3])
async def test_refusals_for_good_are_raised_at_once(code: int) -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.groups["broker-a"].refuse = lambda request: (
            (code, "the message is illegal") if request.code == 310 else None
        )
        with pytest.raises(quorate.SendRefused, match="the message is illegal") as refused:
            await mq.send("t", b"x")
        assert refused.value.code == code
        assert len(sends(cluster)) == 1


async def test_failures_say_whether_the_message_may_be_stored() -> None:
    env = make_env()
    async with fake_cluster(env, nodes=1) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        state = cluster.groups["broker-a"]
        state.refuse = lambda request: (14, "no leader") if request.code == 310 else None
        with pytest.raises(quorate.SendFailed, match="is not stored") as failed:
            await mq.send("t", b"x", timeout=0.3)
        assert not failed.value.maybe_stored
        assert len(failed.value.attempts) >= 2, "one group: tried again until the timeout"
        state.refuse = lambda request: (1, "outcome unknown") if request.code == 310 else None
        with pytest.raises(quorate.SendFailed) as failed:
            await mq.send("t", b"x", timeout=0.2)
        assert failed.value.maybe_stored
        state.refuse = lambda request: None
        state.swallow = lambda request: request.code == 310
        with pytest.raises(quorate.SendFailed) as failed:
            await mq.send("t", b"x", timeout=0.2)
        assert failed.value.maybe_stored
        await cluster.kill(state.nodes[0])
        with pytest.raises(quorate.SendFailed) as failed:
            await mq.send("t", b"x", timeout=0.3)
        assert not failed.value.maybe_stored


async def test_without_a_leader_nothing_is_asked_whose_answer_would_come_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node holds a send for a while before it says "not stored"; of one that is still held nobody knows the fate."""
    env = make_env()
    monkeypatch.setattr(producer, "HELD_S", 0.3)
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        state = cluster.groups["broker-a"]
        state.leader = None
        state.held_s = 0.15
        with pytest.raises(quorate.SendFailed, match="it is not stored") as failed:
            await mq.send("t", b"x", timeout=0.4)
        assert not failed.value.maybe_stored
        assert len(sends(cluster)) == 1

        async def elect() -> None:
            await wait_until(lambda: len(sends(cluster)) == 2, what="the second message to be held")
            await wait_until(lambda: not state.waiting_for_leader, what="its refusal")
            state.nodes[2].lead()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(elect)
            receipt = await mq.send("t", b"y", timeout=0.4)
        assert state.stored("t") == [b"y"]
        assert receipt.attempts == 2, "asked again as soon as there is a leader"


@pytest.mark.parametrize("is_stored", [False, True])
async def test_a_late_answer_counts_while_others_are_tried(monkeypatch: pytest.MonkeyPatch, is_stored: bool) -> None:
    env = make_env()
    monkeypatch.setattr(producer, "NEXT_AFTER_S", 0.05)
    async with fake_cluster(env, nodes=2) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        state = cluster.groups["broker-a"]
        slow, other = state.nodes[0], state.nodes[1]
        slow.is_frozen = True
        state.refuse = lambda request: (14, "not leader") if state.requests[-1][0] == other.node_id else None

        async def answer() -> None:
            await wait_until(lambda: bool(sends(cluster)), what="the other node to be tried")
            if not is_stored:
                state.refuse = lambda request: (14, "not leader")
            slow.answer_late()
            if not is_stored:  # else nobody but the late answer can tell
                slow.is_frozen = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            if is_stored:
                receipt = await mq.send("t", b"x", timeout=0.3)
                assert (receipt.attempts >= 2, receipt.queue_offset, state.stored("t")) == (True, 0, [b"x"])
            else:
                with pytest.raises(quorate.SendFailed, match="it is not stored"):
                    await mq.send("t", b"x", timeout=0.3)


async def test_an_answer_counts_that_came_while_routes_were_asked_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = make_env()
    monkeypatch.setattr(producer, "NEXT_AFTER_S", 0.05)
    async with fake_cluster(env, nodes=1) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        slow = cluster.groups["broker-a"].nodes[0]
        slow.is_frozen = True

        async def answer() -> None:
            await wait_until(lambda: bool(slow.unanswered), what="the send")
            monkeypatch.setattr(FakeCluster, "answer_route", lambda self, request: b"")
            asked = cluster.route_requests
            await wait_until(lambda: cluster.route_requests > asked, what="the silent name server to be asked")
            slow.answer_late()
            slow.is_frozen = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            receipt = await mq.send("t", b"x", timeout=0.3)
        assert (receipt.attempts, receipt.queue_offset) == (1, 0)


async def test_no_name_server_at_all() -> None:
    env = make_env()
    listener = await env.net.listen("127.0.0.1", 0)
    port = listener.address[1]
    await listener.aclose()
    async with quorate.connect(f"127.0.0.1:{port}", env=env) as mq:
        with pytest.raises(quorate.SendFailed, match="no name server answers"):
            await mq.send("t", b"x", timeout=0.3)
        with pytest.raises(quorate.NoRoute):
            await mq.admin.cluster()
        with pytest.raises(quorate.NoRoute) as unknown:
            await mq.admin.route("t")
        assert not isinstance(unknown.value, quorate.NoTopic), "nobody said that there is no such topic"


async def test_a_dead_name_server_listed_first_does_not_matter() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(f"127.0.0.1:1;{cluster.namesrv}", env=env) as mq:
        assert (await mq.send("t", b"x")).attempts == 1


async def test_topic_without_template_waits_until_it_exists() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.template = False
        with pytest.raises(quorate.NoTopic):
            await mq.admin.route("t")
        with pytest.raises(quorate.SendFailed, match="no name server knows topic"):
            await mq.send("t", b"x", timeout=0.2)

        async def create() -> None:
            await trio.sleep(0.1)
            await mq.admin.create_topic("t", queues=2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            assert (await mq.send("t", b"x", timeout=3)).broker_name == "broker-a"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"key": "a b"}, "without blanks"),
        ({"tag": "a||b"}, "no tag"),
        ({"properties": {"UNIQ_KEY": "x"}}, "belongs to the protocol"),
        ({"properties": {"a": "x\x02"}}, "separates"),
        ({"properties": {"a": "x" * 40_000}}, "over the limit"),
        ({"delay_level": -1}, "1 to 18"),
    ],
)
async def test_what_no_broker_would_take_is_refused_here(arguments: dict[str, object], reason: str) -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        with pytest.raises(ValueError, match=reason):
            await mq.send("t", b"x", **arguments)  # type: ignore[arg-type]


async def test_many_senders_share_one_connection_and_one_route_question() -> None:
    env = make_env()
    async with fake_cluster(env, nodes=1) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 4
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(mq.send, "t", f"{number}".encode())
        assert len(cluster.groups["broker-a"].stored("t")) == 200
        assert cluster.route_requests == 1
        assert len(cluster.groups["broker-a"].nodes[0].connections) == 1


async def test_errors_of_the_block_come_out_as_themselves() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster:
        with pytest.raises(KeyError):
            async with quorate.connect(cluster.namesrv, env=env):
                raise KeyError("mine")
        with pytest.raises(ValueError, match="host:port"):
            async with quorate.connect("nonsense", env=env):
                pass
        with pytest.raises(ValueError, match="at least one"):
            async with quorate.connect("", env=env):
                pass


async def test_producers_introduce_themselves_to_leaders_only() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env, producer_group="pg") as mq:
        cluster.topics["t"] = 1
        await mq.send("t", b"x")
        nodes = cluster.groups["broker-a"].nodes
        mq.heartbeat_soon()
        await wait_until(lambda: nodes[0].heartbeats, what="a heartbeat")
        assert [data.group_name for data in nodes[0].heartbeats[-1].producer_data_set] == ["pg"]
        assert not nodes[1].heartbeats
