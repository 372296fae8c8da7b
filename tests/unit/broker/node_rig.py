"""Whole broker nodes of one group in this process, over loopback, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from broker.config import BrokerConfig
from broker.node import BrokerNode
from dledger.config import GroupConfig
from remoting.pool import Client, open_client
from runtime.logs import get_logger
from runtime.model import Env
from runtime.testing import test_env, wait_until

LOG = get_logger("test")


class Cluster:
    """Nodes of one group in this process, each with its own nursery so that one can be cut down alone."""

    def __init__(self, env: Env, folder: Path, nursery: trio.Nursery, namesrv: tuple[str, ...]) -> None:
        self.env = env
        self.folder = folder
        self.namesrv = namesrv
        self._nursery = nursery
        self.nodes: dict[str, BrokerNode] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self._ended: dict[str, trio.Event] = {}
        self.configs: dict[str, BrokerConfig] = {}

    async def start_all(self, count: int) -> None:
        listeners = {f"n{k}": await self.env.net.listen("127.0.0.1", 0) for k in range(count)}
        peer_listeners = {f"n{k}": await self.env.net.listen("127.0.0.1", 0) for k in range(count)}
        for number, node_id in enumerate(listeners):
            self.configs[node_id] = BrokerConfig(
                cluster="DefaultCluster",
                broker_name="broker-a",
                node_id=node_id,
                broker_id=number,
                listen=listeners[node_id].address,
                advertised=listeners[node_id].address,
                namesrv=self.namesrv,
                group=GroupConfig(
                    cluster="DefaultCluster",
                    group="broker-a",
                    node_id=node_id,
                    peers={name: listener.address for name, listener in peer_listeners.items()},
                    data_dir=f"{self.folder}/{node_id}/raft",
                    segment_bytes=4 * 1024 * 1024,
                    format_if_empty=True,
                ),
                data_dir=f"{self.folder}/{node_id}",
            )
        for node_id in listeners:
            await self.start(node_id, listener=listeners[node_id], peer_listener=peer_listeners[node_id])

    async def start(self, node_id: str, **listeners: Any) -> BrokerNode:
        node = BrokerNode(self.env, self.configs[node_id], **listeners)
        self._ended[node_id] = trio.Event()
        self._scopes[node_id] = await self._nursery.start(self._run, node, self._ended[node_id])
        self.nodes[node_id] = node
        return node

    @staticmethod
    async def _run(node: BrokerNode, ended: trio.Event, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(node.run)
                    task_status.started(scope)
        finally:
            ended.set()

    async def kill(self, node_id: str) -> None:
        """As if the process died: nothing is written any more."""
        self._scopes.pop(node_id).cancel()
        del self.nodes[node_id]
        await self._ended.pop(node_id).wait()  # a sync that was under way takes as long as it takes

    def address(self, node_id: str) -> str:
        host, port = self.configs[node_id].listen
        return f"{host}:{port}"

    async def leader(self) -> str:
        await wait_until(lambda: any(node.group.is_ready_leader for node in self.nodes.values()), what="a leader")
        return next(name for name, node in self.nodes.items() if node.group.is_ready_leader)


@asynccontextmanager
async def cluster_of(count: int, folder: Path, namesrv: tuple[str, ...] = ()) -> AsyncIterator[tuple[Cluster, Client]]:
    env = test_env(folder)
    async with trio.open_nursery() as nursery:
        cluster = Cluster(env, folder, nursery, namesrv)
        await cluster.start_all(count)
        async with open_client(env, log=LOG) as client:
            yield cluster, client
        nursery.cancel_scope.cancel()
