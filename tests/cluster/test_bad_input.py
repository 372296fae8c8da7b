"""Bad input, on real processes: each gets a clear error, harms nobody, and loses nothing (issue: Done when 6)."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import quorate
from cluster.config import default_text
from remoting.codes import RequestCode, ResponseCode
from remoting.command import Command, encode_request
from remoting.frames import FrameReader, decode_frame
from tests.cluster.harness import Cluster, cluster, config_with, wait_for
from tests.cluster.harness import quorate as run_quorate
from tests.cluster.workload import Promises, check_stored, read_all

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TOPIC = "known"
ANSWER_WITHIN_S = 30
BODY_BYTES_MAX = 4 << 20


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Promises]]:
    """A cluster without automatic topics and with ten acknowledged messages. At the end they are all there, alone."""
    promises = Promises()

    async def fill(running: Cluster) -> None:
        async with quorate.connect(running.namesrv) as client:
            await client.admin.create_topic(TOPIC, queues=4)
            for number in range(10):
                promises.note(f"p0-{number}", await client.send(TOPIC, b"p0-%d " % number, timeout=30))

    async def check(running: Cluster) -> None:
        async with quorate.connect(running.namesrv) as client:
            check_stored(await read_all(client, TOPIC), promises)

    config = config_with(auto_create_topic=False)
    with cluster(tmp_path_factory.mktemp("strict") / "data", config=config) as running:
        trio.run(fill, running)
        before = {name: node["process"] for name, node in running.processes().items()}
        yield running, promises
        trio.run(check, running)
        assert {name: node["process"] for name, node in running.processes().items()} == before, "a node had to restart"


@pytest.fixture
def running(strict: tuple[Cluster, Promises]) -> Cluster:
    return strict[0]


@contextmanager
def connection(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=ANSWER_WITHIN_S) as stream:
        yield stream


def ask(address: tuple[str, int], code: int, ext: dict[str, object] | None = None, body: bytes = b"") -> Command:
    """One request with a plain socket, and its answer."""
    with connection(address) as stream:
        stream.sendall(encode_request(code, 7, ext, body))
        reader = FrameReader()
        while True:
            data = stream.recv(65536)
            assert data, "connection closed without an answer"
            reader.feed(data)
            for frame in reader.take():
                answer = decode_frame(frame)
                assert (answer.opaque, answer.is_response) == (7, True)
                return answer


def send_header(topic: str, queue_id: int = 0) -> dict[str, object]:
    return {
        "producerGroup": "PG",
        "topic": topic,
        "defaultTopic": "TBW102",
        "defaultTopicQueueNums": 4,
        "queueId": queue_id,
        "sysFlag": 0,
        "bornTimestamp": 1,
        "flag": 0,
        "properties": "",
        "reconsumeTimes": 0,
        "unitMode": False,
    }


def leader_address(running: Cluster) -> tuple[str, int]:
    return running.address(running.leader(60))


@pytest.mark.parametrize("node", ["n0", "n1", "n2", "ns0"])
def test_unknown_request_code(running: Cluster, node: str) -> None:
    answer = ask(running.address(node), 31_000)
    assert answer.code == ResponseCode.REQUEST_CODE_NOT_SUPPORTED
    assert "31000" in (answer.remark or "")


@pytest.mark.parametrize(
    ("topic", "queue_id", "size", "codes", "words"),
    [
        ("stranger", 0, 10, {ResponseCode.TOPIC_NOT_EXIST}, "stranger"),
        (TOPIC, 0, BODY_BYTES_MAX + 1, {ResponseCode.MESSAGE_ILLEGAL}, ""),
        ("no spaces, please", 0, 10, {ResponseCode.INVALID_PARAMETER}, "topic"),
        ("", 0, 10, {ResponseCode.INVALID_PARAMETER, ResponseCode.SYSTEM_ERROR}, ""),
        ("x" * 128, 0, 10, {ResponseCode.INVALID_PARAMETER}, "longer"),
        (TOPIC, 99, 10, {ResponseCode.INVALID_PARAMETER}, "99"),
    ],
    ids=["unknown topic", "body over 4 MiB", "illegal topic", "empty topic", "long topic", "wrong queue"],
)
@pytest.mark.parametrize("to_leader", [True, False])
def test_sends_that_are_refused(
    running: Cluster, topic: str, queue_id: int, size: int, codes: set[int], words: str, to_leader: bool
) -> None:
    leader = leader_address(running)
    address = leader if to_leader else next(a for n in running.brokers() if (a := running.address(n)) != leader)
    answer = ask(address, RequestCode.SEND_MESSAGE, send_header(topic, queue_id), bytes(size))
    assert answer.code in codes, answer
    assert answer.remark
    assert words in answer.remark


async def test_the_client_says_what_was_refused(running: Cluster) -> None:
    async with quorate.connect(running.namesrv) as client:
        with pytest.raises(quorate.QuorateError, match="stranger"):
            await client.send("stranger", b"x", timeout=10)
        with pytest.raises(quorate.SendRefused) as raised:
            await client.send(TOPIC, bytes(BODY_BYTES_MAX + 1))
        assert raised.value.code == ResponseCode.MESSAGE_ILLEGAL


def test_missing_and_unreadable_header_fields(running: Cluster) -> None:
    header = send_header(TOPIC)
    del header["topic"]
    for bad in (header, {**send_header(TOPIC), "queueId": "zero"}):
        answer = ask(leader_address(running), RequestCode.SEND_MESSAGE, bad, b"x")
        assert answer.code == ResponseCode.SYSTEM_ERROR
        assert answer.remark


GARBAGE = {
    "TLS hello": bytes.fromhex("160301020001") + bytes(517),
    "HTTP request": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "oversized length": struct.pack(">II", 1 << 30, 10) + bytes(100),
    "negative length": struct.pack(">iI", -1, 10) + bytes(100),
    "header longer than frame": struct.pack(">II", 20, 4000) + bytes(100),
    "unknown serialization": struct.pack(">II", 20, 9 << 24 | 16) + bytes(16),
    "header that is no JSON": struct.pack(">II", 20, 16) + b"{" * 16,
    "random bytes": random.Random(7).randbytes(4096),
}


@pytest.mark.parametrize("node", ["n0", "ns0"])
@pytest.mark.parametrize("what", sorted(GARBAGE))
def test_scenario_33_garbage_closes_the_connection(running: Cluster, node: str, what: str) -> None:
    with connection(running.address(node)) as stream:
        try:
            stream.sendall(GARBAGE[what])
            rest = stream.recv(4096)
        except ConnectionResetError:
            rest = b""
    assert rest == b"", f"{what} was answered with {rest[:80]!r}"


@pytest.mark.parametrize("node", ["n0", "ns0"])
def test_scenario_33_garbage_on_a_peer_port_or_a_truncated_frame_harms_nobody(running: Cluster, node: str) -> None:
    frame = encode_request(RequestCode.SEND_MESSAGE, 7, send_header(TOPIC), b"never stored")
    with connection(running.address(node)) as stream:
        stream.sendall(frame[:-1])
        stream.shutdown(socket.SHUT_WR)
        assert stream.recv(4096) == b""
    if node != "ns0":
        host, port = running.address(node)
        with connection((host, port + 5)) as stream:  # --port-base puts peers 5 above
            try:
                stream.sendall(GARBAGE["random bytes"])
                stream.settimeout(ANSWER_WITHIN_S)
                while stream.recv(4096):
                    pass
            except ConnectionResetError:
                pass


def test_one_log_line_for_each_stranger(running: Cluster) -> None:
    log = running.data / "logs" / "n1.log"
    before = len(log.read_text().splitlines())
    with connection(running.address("n1")) as stream:
        stream.sendall(GARBAGE["HTTP request"])
        assert stream.recv(100) == b""
    lines = wait_for(lambda: log.read_text().splitlines()[before:], 30, "a log line")
    assert len(lines) == 1, lines
    assert "HTTP" in lines[0]


# --- starting ---


def refused(*arguments: str) -> str:
    ran = run_quorate("up", *arguments, check=False)
    assert ran.returncode in (1, 2), ran
    assert "Traceback" not in ran.stderr
    assert "ready" not in ran.stdout
    return ran.stderr


def test_a_port_already_taken(running: Cluster, tmp_path: Path) -> None:
    for more in ([], ["--detach"]):
        words = refused("--data", str(tmp_path / "other"), "--port-base", str(running.port_base), *more)
        assert f"port {running.port_base} (ns0) is taken by process {running.pid('ns0')}" in words
        assert "--port-base" in words


def test_a_second_up_on_the_same_folder(running: Cluster) -> None:
    for more in ([], ["--detach"]):
        words = refused("--data", str(running.data), "--port-base", str(running.port_base), *more)
        assert "in use by another `quorate up`" in words
        assert "quorate down" in words


def test_a_second_serve_on_the_same_folder(running: Cluster) -> None:
    base = str(running.port_base + 50)
    for node in ("n1", "ns0"):
        ran = run_quorate("serve", node, "--data", str(running.data), "--port-base", base, check=False)
        assert ran.returncode == 1
        assert "Traceback" not in ran.stderr
        assert "in use" in ran.stderr.splitlines()[-1]
        assert str(running.pid(node)) in ran.stderr


def test_serve_without_format_and_with_a_foreign_folder(running: Cluster, tmp_path: Path) -> None:
    base = str(running.port_base + 50)
    ran = run_quorate("serve", "n1", "--data", str(tmp_path / "empty"), "--port-base", base, check=False)
    assert ran.returncode == 1
    assert "--format" in ran.stderr.splitlines()[-1]
    # the folder of another node
    data = tmp_path / "swapped"
    with cluster(data, "--no-restart") as other:
        assert other.brokers() == ["n0", "n1", "n2"]
    (data / "n1").rename(data / "old")
    (data / "n0").rename(data / "n1")
    (data / "old").rename(data / "n0")
    words = refused("--data", str(data), "--port-base", base)
    assert "n0" in words
    assert "n1" in words
    assert "Traceback" not in words


def test_an_unwritable_or_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to data folder" in refused("--data", str(tmp_path / "file"))
    (tmp_path / "home" / "n0").mkdir(parents=True)
    (tmp_path / "home" / "n0" / "thesis.txt").write_text("years")
    assert "not a folder of quorate" in refused("--data", str(tmp_path / "home"))
    assert (tmp_path / "home" / "n0" / "thesis.txt").read_text() == "years"


def test_a_typo_in_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(default_text().replace("listen =", "lsten =", 1))
    words = refused("--config", str(path), "--data", str(tmp_path / "data"))
    assert words == f'quorate: {path}: namesrv "ns0": unknown key "lsten"; did you mean "listen"?\n'
    assert not (tmp_path / "data").exists()
