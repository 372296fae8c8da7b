"""Files of the log that are removed, replaced or truncated under a running node are noticed by it, and mended."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import Node
from tests.unit.dledger.test_repair import assert_identical, cluster, fill, segments


def truncate(path: Path) -> None:
    os.truncate(path, 5000)


def is_whole(node: Node) -> bool:
    return node.group is not None and node.running.is_serving and node.running.statistics().counters["reopened"] > 0


@pytest.mark.chaos
@pytest.mark.parametrize("displace", [Path.unlink, truncate])
@pytest.mark.parametrize("number", [1, -1])
async def test_scenario_10_a_file_lost_under_a_running_node_comes_back_from_its_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, displace: Callable[[Path], None], number: int
) -> None:
    """A closed one, and the one that is written to."""
    monkeypatch.setattr("dledger.store.log_reader.WATCH_EVERY_SECONDS", 0.1)
    async with cluster(tmp_path) as toy:
        await fill(toy, 20)
        await toy.level()
        leader = await toy.leader()
        node = next(node for node in toy.nodes.values() if node is not leader)
        open_files = [path for path in segments(node) if any(path.read_bytes()[:64])]  # the last one is a spare
        displace(open_files[number])
        await wait_until(lambda: is_whole(node), what="the node to serve again")
        await fill(toy, 1, b"more")
        await toy.level()
        assert_identical(toy)
        assert node.running.statistics().counters["damage_found"] == 1
        await wait_until(lambda: not node.running.statistics().recovering, what="a leader's confirmation")


async def test_lost_files_are_looked_for_without_a_scrub_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dledger.store.log_reader.WATCH_EVERY_SECONDS", 0.05)
    async with cluster(tmp_path, scrub_bytes_per_second=0) as toy:
        await fill(toy, 20)
        await toy.level()
        leader = await toy.leader()
        segments(leader)[0].unlink()
        await wait_until(lambda: is_whole(leader), what="the node to serve again")
        await toy.put(b"more")
        await toy.level()
        assert_identical(toy)
