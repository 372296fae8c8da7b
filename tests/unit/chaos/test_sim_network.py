"""Simulated connections: order, delay instead of loss, directed cuts, resets, half-open ends (chaos.md 5.3)."""

from __future__ import annotations

from typing import Any

import pytest

from chaos.sim.network import Conn, Network
from chaos.sim.world import World
from dledger.core.events import PeerLost, PeerUp, Receive
from dledger.core.messages import Append, AppendReply, PreVote
from dledger.core.types import EntryType, frame_entry
from tests.unit.chaos.test_sim_disk import quiet_plan


class Pair:
    """Two nodes that only listen: what would reach their cores is written down instead."""

    def __init__(self, **changes: object) -> None:
        calm: dict[str, object] = {"tcp": True, "drop": 0.0, "late": 0.0, "latency": 0.001, "bytes_per_second": 0.0}
        self.world = World(quiet_plan(**{**calm, **changes}), ())
        self.network: Network = self.world.network
        self.heard: list[tuple[str, str, Any]] = []
        for name, node in self.world.nodes.items():
            node.is_alive = True
            node.post = self._recorder(name)  # type: ignore[method-assign]  # no core is running
        for name in self.world.nodes:
            self.network.node_started(name)
        self.world.run_until(0.5)
        assert self.conn.is_up
        self.heard.clear()

    def _recorder(self, name: str) -> Any:
        def note(kind: type, *details: Any) -> None:
            self.heard.append((name, kind.__name__, details))

        return note

    @property
    def conn(self) -> Conn:
        return self.network.conns["n0", "n1"]

    def ask(self, number: int) -> None:
        self.network.send("n0", "n1", PreVote(number, 0, 0))

    def run(self, seconds: float) -> None:
        self.world.run_until(self.world.now + seconds)

    def asked(self) -> list[int]:
        return [details[1].term for name, kind, details in self.heard if kind == Receive.__name__ and name == "n1"]

    def lost(self, name: str) -> list[bool]:
        return [hard for at, kind, (peer, hard) in self.of(PeerLost.__name__) if at == name and peer in ("n0", "n1")]

    def of(self, wanted: str) -> list[tuple[str, str, Any]]:
        return [one for one in self.heard if one[1] == wanted]


def test_messages_of_a_connection_arrive_in_order_and_all_of_them_whatever_is_lost_on_the_way() -> None:
    pair = Pair(drop=0.3, buffer_messages=1000)
    for number in range(200):
        pair.ask(number)
    pair.run(10.0)
    assert pair.asked() == list(range(200))


def test_a_short_cut_only_delays() -> None:
    pair = Pair()
    pair.network.cut("n0", "n1")
    pair.ask(1)
    pair.run(1.0)
    assert pair.asked() == []
    pair.network.heal("n0", "n1")
    pair.ask(2)
    pair.run(1.0)
    assert pair.asked() == [1, 2]
    assert pair.lost("n0") == []


def test_a_long_cut_is_noticed_by_each_end_for_itself_and_ends_what_is_under_way() -> None:
    pair = Pair()
    pair.network.cut("n0", "n1")
    pair.ask(1)
    pair.run(3.0)
    assert pair.lost("n0") == [False] and pair.lost("n1") == [False]
    pair.network.heal("n0", "n1")
    pair.run(2.0)
    assert pair.conn.is_up and pair.asked() == []


def test_cut_acknowledgements_let_data_through_until_the_sender_gives_up() -> None:
    pair = Pair()
    pair.network.cut("n1", "n0")
    pair.ask(1)
    pair.run(0.5)
    assert pair.asked() == [1]
    pair.run(2.5)
    assert False in pair.lost("n0")
    pair.ask(2)
    pair.run(1.0)
    assert pair.asked() == [1]


def test_answers_go_back_on_the_connection_that_asked() -> None:
    pair = Pair()
    pair.network.reset(pair.network.conns["n1", "n0"])
    pair.network.send("n1", "n0", AppendReply(1, 1, True, 0, 0))
    pair.run(0.1)
    assert [name for name, kind, _ in pair.heard if kind == Receive.__name__] == ["n0"]


def test_a_half_open_connection_swallows_answers() -> None:
    pair = Pair()
    pair.conn.is_accepted = False
    pair.network.send("n1", "n0", AppendReply(1, 1, True, 0, 0))
    pair.run(0.1)
    assert pair.of(Receive.__name__) == []


def test_a_dead_process_refuses_and_a_dead_machine_is_silent() -> None:
    for hard in (True, False):
        pair = Pair()
        node = pair.world.nodes["n1"]
        node.is_alive, node.has_power = False, hard
        pair.network.node_gone("n1", hard=hard)
        pair.run(1.0)
        assert pair.lost("n0") == ([False, True] if hard else [])
        pair.run(2.0)
        assert pair.lost("n0") == ([False, True] if hard else [False])


def test_a_restarted_process_does_not_read_what_was_sent_before() -> None:
    pair = Pair(latency=0.03)
    pair.ask(1)
    node = pair.world.nodes["n1"]
    node.is_alive = False
    pair.network.node_gone("n1", hard=True)
    node.is_alive = True
    pair.network.node_started("n1")
    pair.run(3.0)
    assert pair.asked() == []
    assert PeerUp.__name__ in [kind for name, kind, _ in pair.heard if name == "n0"]


def test_a_full_stream_gives_up_its_oldest_entries_and_keeps_heartbeats() -> None:
    pair = Pair(buffer_messages=4)
    pair.network.cut("n0", "n1")
    entry = frame_entry(1, 1, 0, EntryType.DATA, 1, (b"x",), 0, 0)
    for seq in range(1, 7):
        pair.network.send("n0", "n1", Append(1, 0, 0, 0, 0, seq, (entry,) if seq % 2 else ()))
    pair.network.heal("n0", "n1")
    pair.run(2.0)
    received = [details[1].seq for _, kind, details in pair.heard if kind == Receive.__name__]
    assert received == [2, 4, 5, 6]


@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_a_slow_link_is_slow_in_one_direction(seconds: float) -> None:
    pair = Pair()
    pair.network.slow("n0", "n1", seconds)
    pair.ask(1)
    pair.run(seconds * 0.4)
    assert pair.asked() == []
    pair.run(seconds * 1.5)
    assert pair.asked() == [1]
