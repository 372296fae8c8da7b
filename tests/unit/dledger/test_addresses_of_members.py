"""The address of a new member goes into the log for all to use: it is looked at before."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio

from dledger.core.membership import AddLearner, Promote
from dledger.errors import LedgerError
from runtime.testing import wait_until
from tests.unit.dledger.dledger_toy import ToyCluster, toy_cluster


def cluster(tmp_path: Path, size: int, **settings: Any) -> AbstractAsyncContextManager[ToyCluster]:
    return toy_cluster(tmp_path, size, cluster_uuid="u" * 32, **settings)


async def test_another_members_address_is_refused_before_it_is_logged(tmp_path: Path) -> None:
    async with cluster(tmp_path, 3) as toy:
        leader = await toy.leader()
        other = next(name for name in toy.nodes if name != leader.node_id)
        with pytest.raises(LedgerError, match=f"n7 at .* is not found: it answers: .*'{other}'"):
            await leader.running.change_members(AddLearner("n7", toy.peers[other]))
        assert leader.running.members.learners == ()


async def test_what_is_no_node_of_the_group_is_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        leader = await toy.leader()
        listener = await toy.env.net.listen("127.0.0.1", 0)

        async def hang_up() -> None:
            stream = await listener.accept()
            await stream.receive_some()
            stream.abort()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up)
            with pytest.raises(LedgerError, match="no node of a raft group answers there"):
                await leader.running.change_members(AddLearner("n1", listener.address))
        await listener.aclose()
        assert leader.running.members.learners == ()


async def test_a_folder_of_another_group_is_refused_with_the_identity_it_needs(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as toy:
        leader = await toy.leader()
        toy.settings["cluster_uuid"] = "v" * 32
        await toy.add("n1")
        with pytest.raises(LedgerError, match=f'start it with --join and identity = "{"u" * 32}"'):
            await leader.running.change_members(AddLearner("n1", toy.peers["n1"]))


async def test_nobody_votes_at_an_address_where_he_is_not(tmp_path: Path) -> None:
    """The leader's own configuration knows better than the log, so the learner gets everything all the same."""
    async with cluster(tmp_path, 1, founders=("n0",)) as toy:
        founder = toy.nodes["n0"]
        listener = await toy.env.net.listen("127.0.0.1", 0)
        nowhere = listener.address
        await listener.aclose()
        await toy.add("n1")
        await founder.stop()
        toy.node_settings["n0"]["joined"] = {"n1": toy.peers["n1"]}
        await founder.start()
        await toy.put(b"one")
        await founder.running.change_members(AddLearner("n1", nowhere))
        await toy.level()
        with pytest.raises(LedgerError, match=r"n1 at .*, as the log has it, does not answer .*add it again"):
            await founder.running.change_members(Promote("n1"))
        assert founder.running.members.learners == ("n1",)
        await wait_until(lambda: founder.running.statistics().connected["n1"], what="the learner to stay connected")
