"""A whole name server on a real socket, asked with real frames."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from namesrv.config import NamesrvConfig
from namesrv.server import NameServer
from remoting.bodies import (
    DataVersion,
    RegisterBrokerBody,
    TopicConfig,
    TopicConfigSerializeWrapper,
    decode_topic_route,
    encode_body,
    encode_register_broker,
    register_body_crc,
)
from remoting.command import Command, encode_request
from remoting.fastjson import loads
from remoting.frames import FrameReader, decode_frame
from runtime.files import Locked
from runtime.model import Env, Stream
from runtime.testing import test_env, wait_until

TRANSCRIPTS = json.loads((Path(__file__).parents[2] / "vectors" / "transcripts.json").read_text(encoding="utf-8"))
VERSION = DataVersion(counter=1, state_version=1, timestamp=1)


class Peer:
    """A client of the name server that asks one thing at a time."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._reader = FrameReader()
        self._opaque = 0

    async def ask(self, code: int, body: bytes = b"", *, version: int = 479, **ext: object) -> Command:
        self._opaque += 1
        fields = {name: str(value) for name, value in ext.items()}
        await self.stream.send_parts([encode_request(code, self._opaque, fields, body, version=version)])
        while True:
            data = await self.stream.receive_some()
            assert data, "the name server closed the connection"
            for frame in self._reader.cut(data):
                answer = decode_frame(frame)
                assert answer.opaque == self._opaque
                return answer

    async def register(
        self,
        topics: dict[str, TopicConfig] | None = None,
        *,
        version: DataVersion = VERSION,
        compressed: bool = False,
        **ext: object,
    ) -> Command:
        table = {"T": topic("T"), "U": topic("U")} if topics is None else topics
        wrapper = TopicConfigSerializeWrapper(topic_config_table=table, data_version=version)
        body = encode_register_broker(RegisterBrokerBody(topic_config_serialize_wrapper=wrapper), compressed=compressed)
        fields: dict[str, object] = {
            "brokerName": "broker-a",
            "brokerAddr": "127.0.0.1:39911",
            "clusterName": "DefaultCluster",
            "haServerAddr": "127.0.0.1:39912",
            "brokerId": 0,
            "bodyCrc32": register_body_crc(body),
            **ext,
        }
        return await self.ask(103, body, **fields)


def topic(name: str, queues: int = 4, perm: int = 6) -> TopicConfig:
    return TopicConfig(topic_name=name, read_queue_nums=queues, write_queue_nums=queues, perm=perm)


class Running:
    def __init__(self, env: Env, server: NameServer) -> None:
        self.env = env
        self.server = server
        self.peers: list[Peer] = []

    async def connect(self) -> Peer:
        assert self.server.address is not None
        peer = Peer(await self.env.net.dial(*self.server.address))
        self.peers.append(peer)
        return peer


@asynccontextmanager
async def name_server(folder: Path, env: Env | None = None) -> AsyncIterator[Running]:
    env = env or test_env(folder)
    server = NameServer(env, NamesrvConfig(listen=("127.0.0.1", 0), data_dir=str(folder / "ns0")))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        running = Running(env, server)
        try:
            yield running
        finally:
            for peer in running.peers:
                peer.stream.abort()
            nursery.cancel_scope.cancel()


def same(actual: Command, expected: dict[str, Any]) -> None:
    """Code, remark, fields and body as Apache answered, as far as values go; lists of topics in any order."""
    assert actual.code == expected["code"]
    assert actual.is_response
    if expected["remark"] not in (None, "not set any response code"):
        assert actual.remark == expected["remark"].split("\nSee <help")[0]
    assert actual.ext == {key: str(value) for key, value in (expected["extFields"] or {}).items()}
    body = loads(actual.body) if actual.body else None
    wanted = loads(expected["body"]) if "body" in expected else None
    for answer in (body, wanted):
        if isinstance(answer, dict) and "topicList" in answer:
            answer["topicList"] = sorted(answer["topicList"])
    assert body == wanted


NAME_SERVER_CODES = {100, 101, 102, 105, 106, 205, 206, 216, 219, 224, 304, 318, 319, 322, 327, 901}


async def test_recorded_requests_get_the_answers_of_the_real_name_server(tmp_path: Path) -> None:
    """Every pair of the transcript that went to Apache's name server, in order, against the same registrations."""
    pairs = TRANSCRIPTS["default_broker"]
    first_topics = json.loads(next(pair for pair in pairs if pair["name"] == "topics by cluster")["response"]["body"])[
        "topicList"
    ]
    all_topics = json.loads(next(pair for pair in pairs if pair["name"] == "all topics")["response"]["body"])
    table = {name: topic(name) for name in first_topics} | {"TBW102": topic("TBW102", queues=8, perm=7)}
    checked = 0
    async with name_server(tmp_path) as running:
        broker, client = await running.connect(), await running.connect()
        assert (await broker.register(table)).code == 0
        version = 1
        for number, pair in enumerate(pairs):
            request = pair.get("request")
            if not isinstance(request, dict) or pair["name"].endswith("at the broker"):
                continue
            if request["code"] not in NAME_SERVER_CODES:
                continue
            if pair["name"] == "route of the new topic":
                version += 1
                table["TopicTest"] = topic("TopicTest")
                assert (await broker.register(table, version=DataVersion(counter=version))).code == 0
            if pair["name"] == "all topics":
                version += 1
                table |= {name: topic(name) for name in all_topics["topicList"] if name not in table}
                assert (await broker.register(table, version=DataVersion(counter=version))).code == 0
            answer = await client.ask(
                request["code"], request["body"].encode(), version=request["version"], **request["extFields"]
            )
            try:
                same(answer, pair["response"])
            except AssertionError as error:
                raise AssertionError(f"pair {number}, {pair['name']}") from error
            if request["code"] == 105 and answer.code == 0:
                raw = pair["response"]["body"]
                assert bytes(answer.body).decode() == raw  # clients split this text, so its form counts
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("compressed", [False, True])
async def test_registration_in_both_forms(tmp_path: Path, compressed: bool) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        assert (await peer.register(compressed=compressed)).code == 0
        route = decode_topic_route((await peer.ask(105, topic="T")).body)
        assert route.broker_datas[0].broker_addrs == {0: "127.0.0.1:39911"}
        assert route.queue_datas[0].write_queue_nums == 4


async def test_an_old_broker_sends_the_bare_table(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        body = encode_body(TopicConfigSerializeWrapper(topic_config_table={"T": topic("T"), "U": topic("U")}))
        fields = {"brokerName": "b", "brokerAddr": "1.2.3.4:1", "clusterName": "C", "haServerAddr": "", "brokerId": 0}
        assert (await peer.ask(103, body, version=36, **fields)).code == 0
        assert (await peer.ask(105, topic="T")).code == 0


async def test_followers_are_told_their_leader_and_the_order_configuration(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        await peer.ask(100, namespace="ORDER_TOPIC_CONFIG", key="T", value="broker-a:4")
        assert (await peer.register()).ext == {}
        answer = await peer.register(brokerId=1, brokerAddr="127.0.0.1:39921")
        assert answer.ext == {"haServerAddr": "127.0.0.1:39912", "masterAddr": "127.0.0.1:39911"}
        assert json.loads(bytes(answer.body)) == {"table": {"T": "broker-a:4"}}


async def test_terms_and_groups_reach_the_rules(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        first, second = await running.connect(), await running.connect()
        assert (await first.register(raftTerm=3, raftGroup="aa")).code == 0
        late = await second.register(raftTerm=2, raftGroup="aa", brokerAddr="127.0.0.1:39921")
        assert (late.code, late.remark) == (0, "term 2 is over: a leader of term 3 has registered")
        foreign = await second.register(raftTerm=9, raftGroup="bb", brokerAddr="127.0.0.1:39931")
        assert foreign.code == 1
        assert "belongs to raft group aa" in (foreign.remark or "")
        info = loads((await first.ask(106)).body)
        assert info["brokerAddrTable"]["broker-a"]["brokerAddrs"] == {0: "127.0.0.1:39911"}


async def test_a_broken_connection_removes_its_broker_at_once(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        broker, client = await running.connect(), await running.connect()
        await broker.register()
        assert (await client.ask(105, topic="T")).code == 0
        broker.stream.abort()
        await wait_until(lambda: not running.server.routes.live_brokers(), what="the broker's departure")
        assert (await client.ask(105, topic="T")).code == 17


async def test_a_silent_broker_expires_and_its_connection_is_closed(tmp_path: Path) -> None:
    (tmp_path / "ns0").mkdir()
    (tmp_path / "ns0" / "namesrv.properties").write_text("scanNotActiveBrokerInterval=20\n")
    async with name_server(tmp_path) as running:
        broker, client = await running.connect(), await running.connect()
        await broker.register(heartbeatTimeoutMillis=100)
        with trio.fail_after(5):
            assert await broker.stream.receive_some() == b""
        assert (await client.ask(105, topic="T")).code == 17


async def test_signing_off(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        await peer.register()
        fields = {"brokerName": "broker-a", "brokerAddr": "127.0.0.1:39911", "clusterName": "DefaultCluster"}
        assert (await peer.ask(104, brokerId=0, **fields)).code == 0
        assert (await peer.ask(105, topic="T")).code == 17


async def test_query_data_version(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        fields = {"brokerName": "broker-a", "brokerAddr": "127.0.0.1:39911", "clusterName": "DefaultCluster"}
        version = encode_body(VERSION)
        unknown = await peer.ask(322, version, brokerId=0, **fields)
        assert (unknown.ext, bytes(unknown.body)) == ({"changed": "true"}, b"")
        await peer.register()
        known = await peer.ask(322, version, brokerId=0, **fields)
        assert known.ext == {"changed": "false"}
        assert json.loads(bytes(known.body)) == {"counter": 1, "stateVersion": 1, "timestamp": 1}
        assert (await peer.ask(904, **fields)).code == 0


async def test_kv_configuration_and_wiped_permissions_survive_a_restart(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        assert (await peer.ask(100, namespace="ns", key="k", value="v")).code == 0
        await peer.register()
        assert (await peer.ask(205, brokerName="broker-a")).ext == {"wipeTopicCount": "2"}
        assert (await peer.ask(205, brokerName="unknown")).ext == {"wipeTopicCount": "0"}
        assert (await peer.ask(318, b"orderMessageEnable=true\nnobodyKnowsThis=1")).code == 0
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        assert (await peer.ask(101, namespace="ns", key="k")).ext == {"value": "v"}
        await peer.register()
        assert decode_topic_route((await peer.ask(105, topic="T")).body).queue_datas[0].perm == 4
        assert (await peer.ask(327, brokerName="broker-a")).ext == {"addTopicCount": "2"}
        assert decode_topic_route((await peer.ask(105, topic="T")).body).queue_datas[0].perm == 6
        text = bytes((await peer.ask(319)).body).decode()
        assert "orderMessageEnable=true\n" in text
        assert "nobodyKnowsThis" not in text
        await peer.ask(100, namespace="ORDER_TOPIC_CONFIG", key="T", value="broker-a:4")
        assert decode_topic_route((await peer.ask(105, topic="T")).body).order_topic_conf == "broker-a:4"


@pytest.mark.parametrize(
    ("body", "code", "remark"),
    [
        (b"configStorePath=/etc/passwd", 16, "configStorePath"),
        (b"scanNotActiveBrokerInterval=soon", 1, "scanNotActiveBrokerInterval='soon' is not a number"),
        (b"scanNotActiveBrokerInterval=0", 1, "above 0"),
        (b"", 1, "string2Properties error"),
    ],
)
async def test_bad_settings_change_nothing(tmp_path: Path, body: bytes, code: int, remark: str) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        before = bytes((await peer.ask(319)).body)
        answer = await peer.ask(318, body)
        assert answer.code == code
        assert remark in (answer.remark or "")
        assert bytes((await peer.ask(319)).body) == before


@pytest.mark.parametrize(
    ("code", "ext", "answer_code", "remark"),
    [
        (99999, {}, 3, " request type 99999 not supported"),
        (0, {}, 3, " request type 0 not supported"),
        (105, {}, 1, "the custom field <topic> is null"),
        (100, {"namespace": "n", "key": "k"}, 1, "the custom field <value> is null"),
        (103, {"brokerName": "b", "clusterName": "C", "brokerId": "x"}, 1, "<brokerId> is not a number"),
        (103, {"brokerName": "b", "clusterName": "C", "brokerAddr": "a", "brokerId": "-1"}, 1, "out of range"),
        (103, {"bodyCrc32": "12345"}, 1, "crc32 not match"),
        (100, {"namespace": "n", "key": "k", "value": "v" * 70_000}, 1, "over the control plane's limit"),
    ],
)
async def test_bad_requests_get_an_answer(
    tmp_path: Path, code: int, ext: dict[str, str], answer_code: int, remark: str
) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        answer = await peer.ask(code, **ext)
        assert (answer.code, remark in (answer.remark or "")) == (answer_code, True), answer.remark
        assert (await peer.ask(106)).code == 0


async def test_a_bad_body_gets_an_answer(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        fields = {"brokerName": "b", "brokerAddr": "1.2.3.4:1", "clusterName": "C", "brokerId": 0}
        for body in (b"{", b"\x78\x9cgarbage", b"[]", b'{"topicConfigSerializeWrapper":3}'):
            assert (await peer.ask(103, body, **fields)).code == 1
        assert running.server.routes.live_brokers() == []


async def test_switched_off_topic_lists(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        peer = await running.connect()
        await peer.ask(318, b"enableAllTopicList=false\nenableTopicList=false")
        for code in (206, 224, 311, 312, 313):
            answer = await peer.ask(code, cluster="C")
            assert (answer.code, answer.remark) == (1, "disable")


async def test_a_taken_port_and_a_taken_folder_are_named(tmp_path: Path) -> None:
    async with name_server(tmp_path) as running:
        assert running.server.address is not None
        env = test_env(tmp_path)
        with pytest.raises(BaseExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(NameServer(env, NamesrvConfig(running.server.address, str(tmp_path / "other"))).run)
        assert caught.group_contains(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+")
        with pytest.raises(BaseExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(NameServer(env, NamesrvConfig(("127.0.0.1", 0), str(tmp_path / "ns0"))).run)
        assert caught.group_contains(Locked, match="is in use by process")


def test_a_single_name_server_does_not_load_the_replication_library() -> None:
    program = "import sys, namesrv.server; print('pysyncobj' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
