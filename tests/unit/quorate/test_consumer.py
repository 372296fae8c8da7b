"""Consuming against an in-memory cluster: membership, offsets, filters, retries, order, failover."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
from fake_cluster import FakeCluster, Parked, fake_cluster

import quorate
from quorate import attempts
from quorate.client import Client
from quorate.consumer import ReceivedMessage
from quorate.process_queue import CACHE_MESSAGES
from remoting.bodies import encode_body
from remoting.codes import RequestCode
from remoting.command import Command
from remoting.connection import Connection
from remoting.fastjson import loads
from remoting.frames import decode_frame
from remoting.message import MessageQueue
from runtime.model import Env
from runtime.testing import test_env as make_env
from runtime.testing import wait_until


def fill(cluster: FakeCluster, count: int, *, queues: int = 4, tag: str = "", group: str = "broker-a") -> None:
    cluster.topics["t"] = queues
    for number in range(count):
        properties = (f"TAGS\x01{tag}\x02" if tag else "") + f"UNIQ_KEY\x01id{number}\x02"
        cluster.groups[group].append("t", number % queues, f"{number}".encode(), properties)


def offsets(cluster: FakeCluster, name: str = "g") -> dict[int, int]:
    return {
        queue: offset
        for (group, topic, queue), offset in cluster.groups["broker-a"].offsets.items()
        if group == name and topic == "t"
    }


def parked_now(cluster: FakeCluster) -> list[Parked]:
    return [parked for node in cluster.groups["broker-a"].nodes.values() for parked in node.parked]


async def take(inbox: quorate.Inbox, count: int) -> list[bytes]:
    bodies: list[bytes] = []
    with trio.fail_after(10):
        async for message in inbox:
            bodies.append(message.body)
            if len(bodies) == count:
                break
    return bodies


async def test_consumes_everything_once_and_stores_offsets_on_leaving() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 100)
        async with mq.subscribe("t", group="g", start="first") as inbox:
            bodies = await take(inbox, 100)
            assert sorted(bodies, key=int) == [f"{number}".encode() for number in range(100)]
            for queue in range(4):
                own = [body for body in bodies if int(body) % 4 == queue]
                assert own == sorted(own, key=int), "order is kept per queue"
        assert offsets(cluster) == {0: 25, 1: 25, 2: 25, 3: 25}
        assert not any(node.members["g"] for node in cluster.groups["broker-a"].nodes.values()), "left everywhere"
        async with mq.subscribe("t", group="g") as inbox:
            await inbox.assigned.wait()
            cluster.groups["broker-a"].append("t", 2, b"new", "")
            assert await take(inbox, 1) == [b"new"]


async def test_only_steps_that_were_left_are_acknowledged() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 10, queues=1)
        with pytest.raises(RuntimeError, match="mine"):
            async with mq.subscribe("t", group="g", start="first") as inbox:
                seen = 0
                async for _message in inbox:
                    seen += 1
                    if seen == 4:
                        raise RuntimeError("mine")
        assert offsets(cluster) == {0: 4}, "three acknowledged, the fourth handed back to the broker"
        (back,) = cluster.groups["broker-a"].sent_back
        assert (back["group"], back["originTopic"], back["delayLevel"]) == ("g", "t", "0")
        assert back["maxReconsumeTimes"] == "16"


async def test_cancelled_consumer_does_not_acknowledge_the_open_message() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 5, queues=1)
        with trio.CancelScope() as scope:
            async with mq.subscribe("t", group="g", start="first") as inbox:
                seen = 0
                async for _message in inbox:
                    seen += 1
                    if seen == 3:
                        scope.cancel()
                        await trio.sleep_forever()
        assert offsets(cluster) == {0: 2}
        assert cluster.groups["broker-a"].sent_back == []


async def test_where_a_new_group_starts() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 3, queues=1)
        async with mq.subscribe("t", group="last") as inbox:
            await inbox.assigned.wait()
            cluster.groups["broker-a"].append("t", 0, b"later", "")
            assert await take(inbox, 1) == [b"later"]
        async with mq.subscribe("t", group="time", start=1_700_000_000_000) as inbox:
            assert await take(inbox, 1) == [b"1"], "the fake answers 1 to a search by time"


async def test_tag_filter_is_applied_on_both_sides() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        cluster.topics["t"] = 1
        state = cluster.groups["broker-a"]
        # Aa and BB have the same Java hash: the broker lets both pass.
        for tag in ("Aa", "BB", "other", "paid", ""):
            state.append("t", 0, tag.encode(), f"TAGS\x01{tag}\x02" if tag else "")
        async with mq.subscribe("t", group="g", filter="Aa || paid", start="first") as inbox:
            assert await take(inbox, 2) == [b"Aa", b"paid"]
        assert offsets(cluster) == {0: 5}, "what the filter leaves out counts as consumed"
        with pytest.raises(ValueError, match="no tag"):
            async with mq.subscribe("t", group="h", filter="||"):
                pass


async def test_marked_messages_are_sent_back_with_their_level() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 3, queues=1)
        async with mq.subscribe("t", group="g", start="first", max_reconsume_times=5) as inbox:
            seen = 0
            async for message in inbox:
                seen += 1
                if seen == 1:
                    message.retry(delay_level=2)
                elif seen == 2:
                    message.reject()
                else:
                    break
        back = cluster.groups["broker-a"].sent_back
        assert [ext["delayLevel"] for ext in back] == ["2", "-1"]
        assert {ext["maxReconsumeTimes"] for ext in back} == {"5"}
        assert offsets(cluster) == {0: 3}


async def test_handlers_run_side_by_side_and_failures_go_back() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 40)
        seen: Counter[bytes] = Counter()
        running = most = 0

        async def handle(message: ReceivedMessage) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await trio.lowlevel.checkpoint()
            running -= 1
            seen[message.body] += 1
            if message.body == b"7":
                raise ValueError("bad luck")

        async with mq.subscribe("t", group="g", start="first") as inbox, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: inbox.run_handler(handle, concurrency=5))
            await wait_until(lambda: sum(seen.values()) == 40 and cluster.groups["broker-a"].sent_back)
            nursery.cancel_scope.cancel()
        assert set(seen.values()) == {1}
        assert 1 < most <= 5
        assert len(cluster.groups["broker-a"].sent_back) == 1
        assert sum(offsets(cluster).values()) == 40


async def test_retried_messages_arrive_under_their_first_topic() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 0)
        cluster.topics["%RETRY%g"] = 1
        cluster.groups["broker-a"].append("%RETRY%g", 0, b"again", "RETRY_TOPIC\x01t\x02", times=2)
        async with mq.subscribe("t", group="g") as inbox:
            message = await inbox.receive(timeout=5)
            assert message is not None
            assert (message.topic, message.reconsume_times, message.queue.topic) == ("t", 2, "%RETRY%g")
            inbox.acknowledge(message)
            with pytest.raises(ValueError, match="before"):
                inbox.acknowledge(message)
            assert await inbox.receive(timeout=0.05) is None


async def test_failed_send_back_falls_back_to_a_send_and_then_to_another_try() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 1, queues=1)
        state = cluster.groups["broker-a"]
        state.refuse = lambda request: (1, "look message by offset failed") if request.code == 36 else None
        async with mq.subscribe("t", group="g", start="first") as inbox:
            message = await inbox.receive(timeout=5)
            assert message is not None
            await inbox.send_back(message)
            assert state.stored("%RETRY%g") == [b"0"]
        (sent,) = [request for _, request in state.requests if request.code == 310]
        assert "DELAY\x013\x02" in sent.ext["i"]
        assert "RETRY_TOPIC\x01t\x02" in sent.ext["i"]
        assert (sent.ext["j"], sent.ext["l"]) == ("1", "16")


async def members_share(env: Env, cluster: FakeCluster, mq: Client, topic_queues: int) -> None:
    async with mq.subscribe("t", group="g") as first:
        await first.assigned.wait()
        assert len([queue for queue in first.queues if queue.topic == "t"]) == topic_queues
        async with quorate.connect(cluster.namesrv, env=env) as other, other.subscribe("t", group="g") as second:
            await wait_until(
                lambda: (
                    [len([q for q in inbox.queues if q.topic == "t"]) for inbox in (first, second)]
                    == [topic_queues // 2, topic_queues // 2]
                ),
                what="an even split",
            )
            assert not set(first.queues) & set(second.queues)
        await wait_until(
            lambda: len([q for q in first.queues if q.topic == "t"]) == topic_queues, what="all queues back"
        )


async def test_members_share_queues_and_take_over_when_one_leaves() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 0, queues=8)
        await members_share(env, cluster, mq, 8)


async def test_nothing_is_lost_or_doubled_when_members_come_and_go() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 400, queues=4)
        seen: Counter[bytes] = Counter()

        async def consume(client: Client, count: int) -> None:
            async with client.subscribe("t", group="g", start="first", batch_size=8) as inbox:
                async for message in inbox:
                    seen[message.body] += 1
                    count -= 1
                    if count == 0:
                        break

        async with quorate.connect(cluster.namesrv, env=env) as other, trio.open_nursery() as nursery:
            nursery.start_soon(consume, mq, 10_000)
            nursery.start_soon(consume, other, 50)
            with trio.fail_after(20):
                await wait_until(lambda: len(seen) == 400, limit=15, what="all 400 messages")
            nursery.cancel_scope.cancel()
        assert sum(seen.values()) < 400 + 4 * 32, "only what was under way at a handover may come twice"


async def test_failover_of_the_leader_does_not_disturb_consuming() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 20, queues=2)
        state = cluster.groups["broker-a"]
        async with mq.subscribe("t", group="g", start="first") as inbox:
            assert len(await take(inbox, 20)) == 20
            await cluster.kill(state.nodes[0])
            state.nodes[1].lead()
            state.append("t", 0, b"after", "")
            assert await take(inbox, 1) == [b"after"]
        assert offsets(cluster) == {0: 11, 1: 10}


async def test_a_restarted_broker_learns_the_member_again() -> None:
    env = make_env()
    async with fake_cluster(env, nodes=1) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 0, queues=2)
        async with mq.subscribe("t", group="g") as inbox:
            await inbox.assigned.wait()
            node = cluster.groups["broker-a"].nodes[0]
            for connection in list(node.connections):
                connection.close("restart")
            await wait_until(lambda: mq.client_id in node.members["g"], what="the member on the new connection")


async def test_orderly_consumption_holds_locks_and_one_message_per_queue() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 40, queues=2)
        state = cluster.groups["broker-a"]
        active: set[MessageQueue] = set()
        order: dict[int, list[int]] = {0: [], 1: []}
        failed = False

        async def handle(message: ReceivedMessage) -> None:
            nonlocal failed
            assert message.queue not in active
            active.add(message.queue)
            await trio.lowlevel.checkpoint()
            active.discard(message.queue)
            if message.body == b"6" and not failed:
                failed = True
                raise ValueError("once")
            order[message.queue.queue_id].append(int(message.body))

        async with mq.subscribe("t", group="g", start="first", orderly=True) as inbox, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: inbox.run_handler(handle, concurrency=8))
            await wait_until(lambda: sum(map(len, order.values())) == 40, what="all messages")
            assert {key[2] for key in state.locks if key[1] == "t"} == {0, 1}
            nursery.cancel_scope.cancel()
        assert order == {0: list(range(0, 40, 2)), 1: list(range(1, 40, 2))}, "the failed one came again in its place"
        assert failed
        assert not state.locks, "released on leaving"
        assert state.sent_back == []


async def test_orderly_member_takes_only_what_it_can_lock() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 0, queues=2)
        cluster.groups["broker-a"].locks["g", "t", 0] = "somebody else"
        async with mq.subscribe("t", group="g", orderly=True) as inbox:
            await wait_until(lambda: [q.queue_id for q in inbox.queues if q.topic == "t"] == [1], what="the free queue")
            del cluster.groups["broker-a"].locks["g", "t", 0]
            await wait_until(lambda: [q.queue_id for q in inbox.queues if q.topic == "t"] == [0, 1], what="both")


async def test_exhausted_orderly_message_goes_to_the_dead_letter_queue() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 1, queues=1)
        async with mq.subscribe("t", group="g", start="first", orderly=True, max_reconsume_times=0) as inbox:
            message = await inbox.receive(timeout=5)
            assert message is not None
            await inbox.send_back(message)
        assert [ext["delayLevel"] for ext in cluster.groups["broker-a"].sent_back] == ["-1"]
        assert offsets(cluster) == {0: 1}


async def test_pulling_stops_when_the_cache_is_full() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, CACHE_MESSAGES + 500, queues=1)
        async with mq.subscribe("t", group="g", start="first") as inbox:
            first = await inbox.receive(timeout=5)
            assert first is not None
            state = cluster.groups["broker-a"]

            def pulled() -> int:
                return max(
                    int(r.ext["queueOffset"]) for _, r in state.requests if r.code == 11 and r.ext["topic"] == "t"
                )

            await wait_until(lambda: pulled() >= CACHE_MESSAGES - 32, what="a full cache")
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert pulled() <= CACHE_MESSAGES
            inbox.acknowledge(first)
            assert len(await take(inbox, CACHE_MESSAGES + 499)) == CACHE_MESSAGES + 499


async def test_an_offset_the_broker_does_not_have_is_corrected() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 3, queues=1)
        cluster.groups["broker-a"].offsets["g", "t", 0] = 99
        async with mq.subscribe("t", group="g") as inbox:
            await wait_until(lambda: any(waiting.key == ("t", 0) for waiting in parked_now(cluster)), what="a pull")
            cluster.groups["broker-a"].append("t", 0, b"new", "")
            assert await take(inbox, 1) == [b"new"]
        assert offsets(cluster) == {0: 4}


async def test_refused_pulls_are_repeated() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 1, queues=1)
        refusals = iter([(215, "flow control"), (14, "no leader"), (24, "no subscription"), (2, "busy")])
        cluster.groups["broker-a"].refuse = lambda r: next(refusals, None) if r.code == 11 else None
        async with mq.subscribe("t", group="g", start="first", consume_retries=False) as inbox:
            assert await take(inbox, 1) == [b"0"]


async def broker_connection(cluster: FakeCluster, client_id: str) -> Connection:
    node = cluster.groups["broker-a"].nodes[0]
    await wait_until(lambda: client_id in node.members["g"], what="the member")
    return node.members["g"][client_id]


async def test_brokers_may_ask_and_command_the_consumer() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 10, queues=1)
        async with mq.subscribe("t", group="g", start="first") as inbox:
            assert len(await take(inbox, 10)) == 10
            connection = await broker_connection(cluster, mq.client_id)
            status = await connection.request(Command(221, 0, ext={"topic": "t", "group": "g"}), 5)
            assert status.code == 0
            info = await connection.request(Command(307, 0, ext={"consumerGroup": "g", "clientId": mq.client_id}), 5)
            assert loads(info.body)["properties"]["PROP_CONSUME_TYPE"] == "CONSUME_PASSIVELY"
            queue = MessageQueue("t", "broker-a", 0)
            body = encode_body({"offsetTable": {queue: 4}})
            connection.send_oneway(Command(RequestCode.RESET_CONSUMER_CLIENT_OFFSET, 0, ext={"group": "g"}, body=body))
            assert await take(inbox, 6) == [b"4", b"5", b"6", b"7", b"8", b"9"]
            unknown = await connection.request(Command(309, 0, ext={"consumerGroup": "g"}), 5)
            assert unknown.code == 3
            other = await connection.request(Command(307, 0, ext={"consumerGroup": "nobody"}), 5)
            assert other.code == 1
            broken = await connection.request(Command(220, 0, ext={"group": "g"}, body=b"{"), 5)
            assert broken.code == 1


async def test_heartbeat_says_what_is_consumed() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 0)
        async with mq.subscribe({"t": "a||b", "u": "*"}, group="g", start="first") as inbox:
            nodes = cluster.groups["broker-a"].nodes
            await wait_until(lambda: all(node.heartbeats for node in nodes.values()), what="heartbeats to all members")
            (consumer,) = nodes[1].heartbeats[-1].consumer_data_set
            assert (consumer.group_name, consumer.consume_type) == ("g", "CONSUME_PASSIVELY")
            assert (consumer.message_model, consumer.consume_from_where) == ("CLUSTERING", "CONSUME_FROM_FIRST_OFFSET")
            assert [data.topic for data in consumer.subscription_data_set] == ["%RETRY%g", "t", "u"]
            assert consumer.subscription_data_set[1].code_set == [97, 98]
            with pytest.raises(ValueError, match="joined group g"):
                async with mq.subscribe("t", group="g"):
                    pass
            assert inbox.wants("u")


async def test_pull_consumer() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 10, queues=2, tag="x")
        consumer = mq.pull_consumer("g")
        queues = await consumer.queues("t")
        assert [queue.queue_id for queue in queues] == [0, 1]
        result = await consumer.pull(queues[0], 2, max_messages=2)
        assert (result.status, [m.body for m in result.messages]) == ("FOUND", [b"4", b"6"])
        assert (result.next_offset, result.min_offset, result.max_offset) == (4, 0, 5)
        assert (await consumer.pull(queues[0], 5)).status == "NO_NEW_MESSAGE"
        assert (await consumer.pull(queues[0], 0, filter="y")).status == "NO_MATCHED_MESSAGE"
        moved = await consumer.pull(queues[0], 77)
        assert (moved.status, moved.next_offset) == ("OFFSET_ILLEGAL", 5)
        assert await consumer.query(queues[0]) is None
        await consumer.commit(queues[0], 3)
        assert await consumer.query(queues[0]) == 3
        assert await consumer.max_offset(queues[1]) == 5
        assert await consumer.min_offset(queues[1]) == 0
        assert await consumer.search(queues[1], 5) == 1

        async def append() -> None:
            cluster.groups["broker-a"].append("t", 0, b"late", "")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(append)
            waited = await consumer.pull(queues[0], 5, suspend=5.0)
        assert [message.body for message in waited.messages] == [b"late"]


async def test_pulls_leave_a_frozen_leader_as_soon_as_another_one_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is late meanwhile: that a pull waits is no reason to ask often, but now and then."""
    env = make_env()
    monkeypatch.setattr(attempts, "PATIENT_ASK_EVERY_S", 0.1)
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 2, queues=1)
        state = cluster.groups["broker-a"]
        consumer = mq.pull_consumer("g")
        (queue,) = await consumer.queues("t")
        async with mq.subscribe("t", group="h", start="first", consume_retries=False) as inbox:
            assert await take(inbox, 2) == [b"0", b"1"]
            frozen = state.nodes[0]
            frozen.is_frozen = True
            pulled: list[bytes] = []

            def is_asked() -> bool:
                groups = [decode_frame(frame).ext.get("consumerGroup") for _, frame in frozen.unanswered]
                return "g" in groups

            async def pull() -> None:
                found = await consumer.pull(queue, 2, suspend=10.0)
                pulled.extend(message.body for message in found.messages)

            with trio.fail_after(2):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pull)
                    await wait_until(is_asked, what="the pull")
                    frozen.parked.clear()
                    state.nodes[2].lead()
                    state.append("t", 0, b"2", "")
                    assert await take(inbox, 1) == [b"2"]
            assert pulled == [b"2"]
            frozen.is_frozen = False


async def test_pull_consumer_survives_a_failover_and_reports_refusals() -> None:
    env = make_env()
    async with fake_cluster(env) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        fill(cluster, 2, queues=1)
        state = cluster.groups["broker-a"]
        consumer = mq.pull_consumer("g")
        (queue,) = await consumer.queues("t")
        await consumer.pull(queue, 0)
        await cluster.kill(state.nodes[0])
        assert len((await consumer.pull(queue, 0)).messages) == 2, "any member answers a pull"
        state.refuse = lambda request: (16, "no permission") if request.code == 11 else None
        with pytest.raises(quorate.RequestRefused, match="no permission"):
            await consumer.pull(queue, 0)
        state.refuse = lambda request: (14, "none") if request.code in (11, 30) else None
        with pytest.raises(quorate.Unavailable):
            await consumer.pull(queue, 0, timeout=0.2)
        with pytest.raises(quorate.Unavailable):
            await consumer.max_offset(queue, timeout=0.2)


async def test_administration() -> None:
    env = make_env()
    async with fake_cluster(env, groups=2) as cluster, quorate.connect(cluster.namesrv, env=env) as mq:
        await mq.admin.create_topic("t", queues=3)
        route = await mq.admin.route("t")
        assert len(route.readable) == 6
        info = await mq.admin.cluster()
        assert sorted(info.broker_addr_table) == ["broker-a", "broker-b"]
        leader = route.leader("broker-a")
        assert leader is not None
        assert await mq.admin.broker_info(leader) == {"raftRole": "LEADER"}
        sent = await mq.send("t", b"x", keys=["k1", "k2"])
        await mq.send("t", b"y", key="k2")
        assert [message.body for message in await mq.admin.query_by_key("t", "k2")] == [b"x", b"y"]
        assert await mq.admin.query_by_key("t", "k") == []
        found = await mq.admin.view(sent.message_id, topic="t")
        assert found is not None
        assert found.body == b"x"
        with pytest.raises(ValueError, match=r"."):
            await mq.admin.view("nonsense")
        with pytest.raises(quorate.Unavailable):
            await mq.admin.broker_info("127.0.0.1:1")
        await mq.admin.delete_topic("t")
        with pytest.raises(quorate.NoRoute):
            await mq.admin.route("t")
