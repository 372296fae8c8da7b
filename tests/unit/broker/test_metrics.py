"""A broker's measurements as a scraper reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve
from prometheus_client.parser import text_string_to_metric_families

from broker.errors import StartupError
from broker.node import BrokerNode
from runtime.testing import test_env, wait_until
from tests.unit.broker.node_rig import cluster_of
from tests.unit.broker.processor_rig import broker_config
from tests.unit.broker.test_broker_node import send_ext

Samples = dict[str, list[tuple[dict[str, str], float]]]


async def scrape(node: BrokerNode) -> Samples:
    assert node.metrics_address is not None
    stream = await node.env.net.dial(*node.metrics_address)
    await stream.send_parts([b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"])
    received = b""
    while data := await stream.receive_some():
        received += data
    await stream.aclose()
    found: Samples = {}
    for family in text_string_to_metric_families(received.partition(b"\r\n\r\n")[2].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    for name, samples in found.items():  # a scraper takes none of them where one is there twice
        assert len({frozenset(labels.items()) for labels, _ in samples}) == len(samples), name
    return found


async def test_a_leader_tells_its_log_its_peers_and_its_latencies(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as (cluster, client):
        leader = cluster.nodes[await cluster.leader()]
        await leader.stop(0)
        del cluster.nodes[leader.config.node_id]
        name = leader.config.node_id
        cluster.configs[name] = evolve(cluster.configs[name], metrics=("127.0.0.1", 0))
        restarted = await cluster.start(name)
        now_leading = cluster.nodes[await cluster.leader()]
        now_leading.group.transfer_leadership(name)
        await wait_until(lambda: restarted.group.is_ready_leader, what="the way back to the scraped node")
        await client.call(cluster.address(name), 310, send_ext(), b"body")
        found, led_term = await scrape(restarted), restarted.group.term

    labels, term = found["dledger_term"][0]
    assert labels == {"cluster": "DefaultCluster", "group": "broker-a", "node_id": name}
    assert term == led_term > 0
    assert {labels["role"] for labels, value in found["dledger_role"] if value} == {"leader"}
    assert {labels["remote_id"] for labels, _ in found["dledger_match_lag"]} == {"n0", "n1", "n2"} - {name}
    assert found["rocketmq_messages_in_total"][0][1] == 1
    assert found["dledger_commit_index"][0][1] >= 2
    assert found["dledger_elections_total"][0][1] == 1
    buckets = found["dledger_commit_latency_bucket"]
    counts = [value for _, value in buckets]
    assert buckets[-1][0]["le"] == "+Inf"
    assert counts == sorted(counts)
    assert counts[-1] == found["dledger_commit_latency_count"][0][1] > 0


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    env = test_env(tmp_path)
    taken = await env.net.listen("127.0.0.1", 0)
    config = broker_config(tmp_path, nodes=1, metrics=taken.address)
    peer_listener = await env.net.listen("127.0.0.1", 0)
    with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{taken.address[1]}"):
        await BrokerNode(env, config, peer_listener=peer_listener).run()
    await taken.aclose()
