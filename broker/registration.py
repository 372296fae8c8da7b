"""Registering with the name servers (semantics.md 12, design 4).

Node nK registers as brokerId K + 1, and as 0 from the moment it is a *ready* leader: never before its no-op of the term
is applied. To every name server in parallel: each 30 s, and at once when the role or a topic changes or a connection is
lost. The term travels as DataVersion.stateVersion and as `raftTerm`, the group's identity as `raftGroup`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio
from attrs import define

from remoting.bodies import (
    DataVersion,
    RegisterBrokerBody,
    TopicConfigSerializeWrapper,
    encode_register_broker,
    register_body_crc,
)
from remoting.codes import MASTER_ID, VERSION, RequestCode, ResponseCode
from remoting.command import Command
from remoting.errors import RemotingError
from remoting.pool import Client

if TYPE_CHECKING:
    from broker.context import BrokerContext

REGISTER_TIMEOUT_S: Final = 3.0
UNREGISTER_TIMEOUT_S: Final = 1.0
RETRY_FIRST_S: Final = 0.1
RETRY_LAST_S: Final = 2.0
STRANGER_LOOK_S: Final = 1.0
"""How often a node that is no member of its group looks whether it has become one."""
SETTLE_S: Final = 0.002
"""Changes that come together are registered together."""
KNOWN_WAIT_S: Final = 1.0
"""How long the answer to the creation of a topic waits for the name servers."""
KNOWN_WAITS_MAX: Final = 10_000


@define(eq=False)
class _Waiting:
    """Somebody who goes on when the name servers know what is committed now."""

    addresses: dict[str, None]
    callback: Callable[[], None]
    deadline: float


class Registration:
    """One task per name server. `wake` has all of them register now."""

    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker
        self._client = Client(
            broker.env, log=broker.log, on_lost=self._connection_lost, language="JAVA", backoff_max_s=RETRY_LAST_S
        )
        self._wanted: dict[str, trio.Event] = {address: trio.Event() for address in broker.config.namesrv}
        self._stopping = False
        self._waiting: list[_Waiting] = []
        self._has_waiting = trio.Event()
        self.registered_as: dict[str, int] = {}
        """Per name server: the broker id it last accepted."""

    def wake(self) -> None:
        """Role, term, readiness or topics have changed."""
        for event in self._wanted.values():
            event.set()

    def when_registered(self, callback: Callable[[], None]) -> None:
        """Call back when every name server that answers has taken a registration made from now on, after 1 s at most.

        So a client that heard of a new topic from us finds its route, as with RocketMQ. At once where there is no name
        server to wait for.
        """
        if not self.registered_as or len(self._waiting) >= KNOWN_WAITS_MAX:
            callback()
            return
        deadline = self._broker.env.clock.monotonic() + KNOWN_WAIT_S
        self._waiting.append(_Waiting(dict.fromkeys(self.registered_as), callback, deadline))
        self._has_waiting.set()
        self.wake()

    def _settled(self, address: str, waiting: list[_Waiting]) -> None:
        """A registration that began after these started to wait is through, or has failed."""
        for one in waiting:
            one.addresses.pop(address, None)
            if not one.addresses and one in self._waiting:
                self._waiting.remove(one)
                one.callback()
        if waiting:
            self._broker.group.wake()  # what was called back may have left something to flush

    async def _end_long_waits(self) -> None:
        clock = self._broker.env.clock
        while True:
            if not self._waiting:
                self._has_waiting = trio.Event()
                await self._has_waiting.wait()
            await clock.sleep_until(self._waiting[0].deadline if self._waiting else 0.0)
            now = clock.monotonic()
            late = [one for one in self._waiting if one.deadline <= now]
            self._waiting = [one for one in self._waiting if one.deadline > now]
            for one in late:
                one.callback()
            if late:
                self._broker.group.wake()

    def _connection_lost(self, address: str, _connection: Any) -> None:
        # A name server drops a broker whose connection ends, so come back at once.
        event = self._wanted.get(address)
        if event is not None:
            event.set()

    async def run(self) -> None:
        """Runs until cancelled. Cancel-safe."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._client.run)
            nursery.start_soon(self._end_long_waits)
            for address in self._wanted:
                nursery.start_soon(self._keep_registered, address)

    async def _keep_registered(self, address: str) -> None:
        clock = self._broker.env.clock
        retry_s = RETRY_FIRST_S
        while True:
            self._wanted[address] = wanted = trio.Event()
            waiting = [one for one in self._waiting if address in one.addresses]
            is_member = self._is_member()
            if is_member:
                registered = not self._stopping and await self._register(address)
            else:
                registered = await self._sign_off(address)
            self._settled(address, waiting)
            if registered:
                retry_s = RETRY_FIRST_S
                wait_s = self._broker.config.register_interval_s if is_member else STRANGER_LOOK_S
            else:
                wait_s = retry_s
                retry_s = min(RETRY_LAST_S, retry_s * 2)
            with clock.move_on_after(wait_s):
                await wanted.wait()
                await clock.sleep(SETTLE_S)

    def _is_member(self) -> bool:
        """False for a node that was removed from its raft group, or is not added yet: clients must not find it."""
        group = self._broker.group
        return not group.is_serving or group.node_id in group.members

    async def _sign_off(self, address: str) -> bool:
        """Out of one name server where it knows this node; whether there is nothing left to do."""
        broker_id = self.registered_as.get(address)
        if broker_id is None:
            return True
        if not await self._leave(address, broker_id):
            return False
        self.registered_as.pop(address, None)
        self._broker.log.info("unregistered: no member of the raft group", namesrv=address)
        return True

    def _broker_id(self) -> int:
        broker = self._broker
        return MASTER_ID if broker.group.is_ready_leader else broker.config.broker_id + 1

    async def _register(self, address: str) -> bool:
        broker = self._broker
        command = self.registration()
        broker_id = int(command.ext["brokerId"])
        try:
            answer = await self._client.invoke(address, command, REGISTER_TIMEOUT_S)
        except RemotingError as error:
            if self.registered_as.pop(address, None) is not None:
                broker.log.warning("name server lost", namesrv=address, reason=str(error))
            return False
        if answer.code != ResponseCode.SUCCESS:
            broker.log.warning("registration refused", namesrv=address, code=answer.code, remark=answer.remark)
            return False
        if self.registered_as.get(address) != broker_id:
            broker.log.info("registered", namesrv=address, broker_id=broker_id, term=broker.group.term)
        self.registered_as[address] = broker_id
        broker.master_address = broker.address if broker_id == MASTER_ID else answer.ext.get("masterAddr", "")
        return True

    def registration(self) -> Command:
        """REGISTER_BROKER as of now."""
        broker = self._broker
        config = broker.config
        # While the log is repaired or installed the group has no term; the node's last one still orders registrations.
        term = broker.group.term or broker.state.term
        topics = broker.state.topics
        version = topics.data_version
        wrapper = TopicConfigSerializeWrapper(
            topic_config_table=topics.all(),
            data_version=DataVersion(counter=version.counter, timestamp=version.timestamp, state_version=term),
        )
        body = encode_register_broker(RegisterBrokerBody(topic_config_serialize_wrapper=wrapper))
        peer_host, peer_port = config.group.peers[config.node_id]
        ext = {
            "brokerName": config.broker_name,
            "brokerAddr": broker.address,
            "clusterName": config.cluster,
            "haServerAddr": f"{peer_host}:{peer_port}",
            "brokerId": str(self._broker_id()),
            "enableActingMaster": "false",
            "compressed": "false",
            "bodyCrc32": str(register_body_crc(body)),
            "raftTerm": str(term),
            "raftGroup": broker.group.group_uuid,
        }
        return Command(code=RequestCode.REGISTER_BROKER, opaque=0, version=VERSION, ext=ext, body=body)

    async def unregister(self) -> None:
        """On a clean stop: out of every name server at once, a second at most. No more registrations afterwards."""
        self._stopping = True
        broker = self._broker
        with broker.env.clock.move_on_after(UNREGISTER_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for address, broker_id in list(self.registered_as.items()):
                    nursery.start_soon(self._leave, address, broker_id)
        self.registered_as.clear()

    async def _leave(self, address: str, broker_id: int) -> bool:
        broker = self._broker
        ext = {
            "brokerName": broker.config.broker_name,
            "brokerAddr": broker.address,
            "clusterName": broker.config.cluster,
            "brokerId": str(broker_id),
        }
        command = Command(code=RequestCode.UNREGISTER_BROKER, opaque=0, version=VERSION, ext=ext)
        try:
            await self._client.invoke(address, command, UNREGISTER_TIMEOUT_S)
        except RemotingError as error:
            broker.log.info("not unregistered", namesrv=address, reason=str(error))
            return False
        return True
