"""cluster.toml: what is right is read as written, what is wrong gets one sentence: file, place and way out."""

from __future__ import annotations

import json
import tomllib

import pytest
from attrs import evolve

from cluster.config import (
    Address,
    ClusterConfig,
    ConfigError,
    default_text,
    from_plain,
    parse,
    parse_address,
    to_plain,
    with_groups,
    with_port_base,
)

TEXT = default_text()


def mistake(old: str, new: str) -> str:
    """The sentence for the default text with one change."""
    assert TEXT.count(old) >= 1, f"{old} is not in the default cluster.toml"
    with pytest.raises(ConfigError) as raised:
        parse(TEXT.replace(old, new, 1), "my.toml")
    message = str(raised.value)
    assert message.startswith("my.toml: ")
    assert "\n" not in message
    return message


@pytest.fixture
def config() -> ClusterConfig:
    return parse(TEXT, "cluster.toml")


def test_default_is_one_name_server_and_one_group_of_three(config: ClusterConfig) -> None:
    assert [(node.name, node.kind, node.group, str(node.listen)) for node in config.nodes()] == [
        ("ns0", "namesrv", None, "127.0.0.1:9876"),
        ("n0", "broker", "broker-a", "127.0.0.1:10911"),
        ("n1", "broker", "broker-a", "127.0.0.1:10921"),
        ("n2", "broker", "broker-a", "127.0.0.1:10931"),
    ]
    assert config.groups[0].flush == "async"
    assert config.namesrv_addresses() == ("127.0.0.1:9876",)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('listen = "127.0.0.1:10911"', 'lsten = "127.0.0.1:10911"', ['node "n0"', '"lsten"', 'did you mean "listen"?']),
        ("[cluster]", "[clutser]", ['"clutser"', 'did you mean "cluster"?']),
        ('name = "ns0"', 'name = "ns0"\nflush = "sync"', ['namesrv "ns0"', '"flush"', "belongs in [[group]]"]),
        ('flush = "async"', "frobnicate = 1", ['group "broker-a"', '"frobnicate"', "known are", "flush"]),
        ('flush = "async"', 'flush = "asnc"', ['"asnc"', '"async"', '"sync"']),
        ('"127.0.0.1:10911"', '"127.0.0.1:109111"', ['node "n0"', "listen", "109111", "65535"]),
        ('"127.0.0.1:10911"', '"10911"', ['node "n0"', "listen", "not an address"]),
        ('"127.0.0.1:10911"', "10911", ['node "n0"', "listen", "10911", "not an address"]),
        ('flush = "async"', 'segment_bytes = "3"', ["segment_bytes", "whole number"]),
        ('flush = "async"', "segment_bytes = true", ["segment_bytes", "whole number"]),
        ('flush = "async"', 'auto_create_topic = "no"', ["auto_create_topic", "true or false"]),
        ('flush = "async"', "segment_bytes = 1000000", ["segment_bytes", "1000000", "between"]),
        ('flush = "async"', "segment_bytes = 134217729", ["segment_bytes", "multiple of 4096"]),
        ('flush = "async"', "heartbeat_ms = 900", ["election_timeout_ms_min 1000", "heartbeat_ms 900"]),
        ('flush = "async"', "heartbeat_ms = 0", ["heartbeat_ms", "between"]),
        ('flush = "async"', "election_timeout_ms_max = 900", ["election_timeout_ms_min", "above"]),
        ('flush = "async"', "drain_s = -1", ["drain_s", "-1"]),
        ('flush = "async"', "retention_hours = 0", ["retention_hours", "between"]),
        ('flush = "async"', "delete_hour = 24", ["delete_hour 24", "-1"]),
        ('flush = "async"', "retention_bytes = 5", ["retention_bytes 5", "four log files"]),
        ('flush = "async"', "disk_watermarks = [0.9]", ["disk_watermarks", "three shares"]),
        ('flush = "async"', "disk_watermarks = [0.9, 0.8, 0.95]", ["disk_watermarks", "smaller"]),
        ('flush = "async"', 'disk_watermarks = [0.7, 0.8, "x"]', ["disk_watermarks", "not a number"]),
        ('flush = "async"', "fetch_bytes_per_second = 10", ["fetch_bytes_per_second 10", "too small"]),
        ('name = "n2"', 'name = "n2"\njoin = true', ["2 nodes", "join = true"]),
        ('name = "n2"', 'name = "n2"\nmetrics = "127.0.0.1:9876"', ["9876", "twice", "n2 (metrics)"]),
        ('name = "n2"', 'name = "n1"', ["broker-a", '"n1"', "two nodes"]),
        ('name = "n1"', 'name = "node1"', ['"node1"', '"n0"']),
        ('name = "ns0"', 'name = "n0"', ["two nodes", '"n0"']),
        ("127.0.0.1:10921", "127.0.0.1:10911", ["127.0.0.1:10911", "twice", "n0", "n1"]),
        ("127.0.0.1:10925", "localhost:9876", ["9876", "twice", "ns0", "n1"]),
        ('name = "broker-a"', 'name = "broker a"', ["broker a", "letters"]),
        ('peer = "127.0.0.1:10915"', "", ['node "n0"', '"peer" is missing']),
        ('peer = "127.0.0.1:10915"', 'peer = "10.0.0.1:10915"', ['node "n0"', "secret"]),
        ('listen = "127.0.0.1:10911"', 'listen = "0.0.0.0:10911"', ['node "n0"', "advertise"]),
        ("[[namesrv]]", "[namesrv]", ["[[namesrv]]"]),
        (
            "[[namesrv]]",
            '[[namesrv]]\nname = "ns1"\nlisten = "127.0.0.1:9877"\n[[namesrv]]',
            ['"ns1"', '"peer" is missing'],
        ),
        ('peer = "127.0.0.1:10915"', 'peer = "127.0.0.1:10915"\ndial = { n7 = "127.0.0.1:1" }', ["dial", '"n7"']),
        ("[cluster]", "[cluster", ["not valid TOML", "line"]),
    ],
)
def test_each_mistake_gets_one_sentence(old: str, new: str, parts: list[str]) -> None:
    message = mistake(old, new)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("size", [2, 4])
def test_groups_have_one_three_or_five_nodes(size: int) -> None:
    nodes = "".join(
        f'[[group.node]]\nname = "n{k}"\nlisten = "127.0.0.1:{1000 + k}"\npeer = "127.0.0.1:{2000 + k}"\n'
        for k in range(size)
    )
    with pytest.raises(ConfigError, match=f"{size} nodes; a raft group begins with 1, 3 or 5"):
        parse(f'[[namesrv]]\n[[group]]\nname = "broker-a"\n{nodes}', "my.toml")


def test_a_group_and_a_name_server_are_needed() -> None:
    with pytest.raises(ConfigError, match=r'"namesrv" is missing|no \[\[namesrv\]\]'):
        parse("[cluster]\n", "my.toml")


def test_settings_reach_their_place() -> None:
    text = TEXT.replace('flush = "async"', 'flush = "sync"\nheartbeat_ms = 100\nauto_create_topic = false\ndrain_s = 5')
    group = parse(text, "my.toml").groups[0]
    assert (group.flush, group.heartbeat_ms, group.auto_create_topic, group.drain_s) == ("sync", 100, False, 5.0)


def test_a_later_node_is_no_founder() -> None:
    later = '[[group.node]]\nname = "n3"\nlisten = "127.0.0.1:1"\npeer = "127.0.0.1:2"\njoin = true\n'
    group = parse(TEXT + later, "my.toml").groups[0]
    assert [node.name for node in group.founders] == ["n0", "n1", "n2"]
    assert len(group.nodes) == 4


def test_plain_form_is_json_and_comes_back(config: ClusterConfig) -> None:
    node = evolve(
        config.groups[0].nodes[0],
        dial={"n1": Address("127.0.0.1", 5)},
        advertise=Address("127.0.0.1", 6),
        metrics=Address("127.0.0.1", 7),
    )
    group = evolve(
        config.groups[0], nodes=(node, *config.groups[0].nodes[1:]), disk_watermarks=(0.1, 0.2, 0.3), retention_bytes=9
    )
    changed = evolve(config, groups=(group,))
    assert from_plain(json.loads(json.dumps(to_plain(changed)))) == changed


def test_port_base_keeps_all_within_a_hundred(config: ClusterConfig) -> None:
    shaped = with_port_base(with_groups(config, 9), 20000)
    ports = [node.listen.port for node in shaped.nodes()] + [node.peer.port for node in shaped.nodes() if node.peer]
    assert len(ports) == 1 + 9 * 6
    assert len(set(ports)) == len(ports)
    assert min(ports) == 20000
    assert max(ports) <= 20099
    with pytest.raises(ConfigError, match="room for"):
        with_port_base(with_groups(config, 10), 20000)
    for base in (80, 65500):
        with pytest.raises(ConfigError, match="between 1024 and"):
            with_port_base(config, base)


def test_further_groups_are_named_and_found(config: ClusterConfig) -> None:
    shaped = with_groups(config, 2)
    assert [group.name for group in shaped.groups] == ["broker-a", "broker-b"]
    assert [node.name for node in shaped.nodes()] == ["ns0", "n0", "n1", "n2", "b-n0", "b-n1", "b-n2"]
    assert shaped.find("broker-b/n1") == shaped.find("b-n1")
    assert shaped.find("broker-a/n1") == shaped.find("n1")
    assert shaped.find("n1").group == "broker-a"
    with pytest.raises(ConfigError, match=r'no node "n9".*ns0, n0'):
        shaped.find("n9")
    assert with_groups(shaped, 1).groups == config.groups
    with pytest.raises(ConfigError, match="--groups 0"):
        with_groups(config, 0)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9876", Address("127.0.0.1", 9876)),
        ("[::1]:1", Address("::1", 1)),
        ("host:65535", Address("host", 65535)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("text", ["", "9876", ":1", "host:", "host:0", "host:65536", "host:-1", "host:x", "host:¹"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|port"):
        parse_address(text)


def test_default_text_is_the_file_at_the_root() -> None:
    assert tomllib.loads(TEXT)["cluster"]["name"] == "DefaultCluster"
