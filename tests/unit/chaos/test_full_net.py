"""Connections of the full engine: order, latency, cuts that only delay, resets, half-open ends, handshakes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio

from chaos.sim.full.machine import Dead, Process
from chaos.sim.full.net import WINDOW_BYTES, SimStream
from tests.unit.chaos.full_kit import LATENCY, Kit, play

PORT = 7000
SLACK = 1e-6


class Pair:
    """Two machines with a connection from `a` to `b`."""

    def __init__(self, kit: Kit, a: Process, b: Process, near: SimStream, far: SimStream) -> None:
        self.kit, self.a, self.b, self.near, self.far = kit, a, b, near, far

    def cut(self, *, back: bool = False) -> None:
        ends = self.a.machine.host, self.b.machine.host
        self.kit.network.cut(*(reversed(ends) if back else ends))

    async def read(self, stream: SimStream, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            more = await stream.receive_some()
            assert more, f"the end after {data!r}"
            data += more
        return data


def connected(main: Callable[[Pair], Awaitable[None]]) -> None:
    """Run `main` with a fresh pair."""

    async def run(kit: Kit) -> None:
        a, b = kit.process("a"), kit.process("b")
        listener = await b.env.net.listen("0.0.0.0", PORT)
        near = await a.env.net.dial(b.machine.host, PORT)
        far = await listener.accept()
        assert isinstance(near, SimStream) and isinstance(far, SimStream)
        await main(Pair(kit, a, b, near, far))

    play(run)


def test_bytes_come_in_order_and_not_before_the_latency_of_their_link() -> None:
    async def main(pair: Pair) -> None:
        before = pair.kit.time.now
        for number in range(100):
            pair.near.send_nowait([b"%03d" % number])
        data = await pair.read(pair.far, 300)
        assert data == b"".join(b"%03d" % number for number in range(100))
        # The slowest of a hundred draws from half to one and a half times the latency holds back what is behind it.
        assert LATENCY <= pair.kit.time.now - before <= 1.5 * LATENCY + SLACK

    connected(main)


def test_a_late_delivery_delays_what_is_behind_it_and_nothing_is_lost() -> None:
    async def main(pair: Pair) -> None:
        link = pair.kit.network.link(pair.a.machine.host, pair.b.machine.host)
        link.jitter = 1.0
        before = pair.kit.time.now
        for number in range(20):
            pair.near.send_nowait([bytes([number])])
        assert await pair.read(pair.far, 20) == bytes(range(20))
        assert pair.kit.time.now - before > 1.5 * LATENCY

    connected(main)


def test_a_read_ends_at_any_byte() -> None:
    async def main(pair: Pair) -> None:
        pair.kit.network.short_reads = 1.0
        pair.near.send_nowait([b"0123456789" * 10])
        first = await pair.far.receive_some()
        assert 0 < len(first) < 100
        assert first + await pair.read(pair.far, 100 - len(first)) == b"0123456789" * 10

    connected(main)


def test_a_sender_waits_for_the_reader_of_the_other_program() -> None:
    async def main(pair: Pair) -> None:
        total = max(WINDOW_BYTES) + 1000
        sent: list[float] = []

        async def send() -> None:
            await pair.near.send_parts([bytes(total)])
            sent.append(pair.kit.time.now)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(5.0)
            assert not sent and pair.near.taken in WINDOW_BYTES
            assert await pair.read(pair.far, total) == bytes(total)
        assert sent[0] >= 5.0

    connected(main)


def test_a_cut_direction_holds_its_bytes_until_it_heals() -> None:
    async def main(pair: Pair) -> None:
        pair.cut()
        pair.near.send_nowait([b"held"])
        pair.far.send_nowait([b"back"])
        assert await pair.read(pair.near, 4) == b"back", "the other direction goes on"
        with trio.move_on_after(30.0) as waited:
            await pair.far.receive_some()
        assert waited.cancelled_caught
        pair.kit.network.heal_all()
        healed_at = pair.kit.time.now
        pair.near.send_nowait([b"late"])
        assert await pair.read(pair.far, 8) == b"heldlate", "in order, with what was sent afterwards"
        assert pair.kit.time.now - healed_at >= 0.05, "after a retransmission"

    connected(main)


def test_what_was_under_way_when_the_link_was_cut_still_arrives() -> None:
    async def main(pair: Pair) -> None:
        pair.near.send_nowait([b"under way"])
        pair.cut()
        assert await pair.read(pair.far, 9) == b"under way"

    connected(main)


def test_an_end_is_told_behind_the_last_byte() -> None:
    async def main(pair: Pair) -> None:
        pair.near.send_nowait([b"bye"])
        await pair.near.send_eof()
        assert await pair.read(pair.far, 3) == b"bye"
        assert await pair.far.receive_some() == b""
        pair.far.send_nowait([b"half closed"])
        assert await pair.read(pair.near, 11) == b"half closed"
        with pytest.raises(trio.BrokenResourceError):
            pair.near.send_nowait([b"more"])

    connected(main)


def test_closing_with_unread_bytes_is_a_reset() -> None:
    async def main(pair: Pair) -> None:
        pair.near.send_nowait([b"nobody reads this"])
        await trio.sleep(1.0)
        await pair.far.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await pair.near.receive_some()

    connected(main)


def test_a_reset_drops_what_was_not_read_and_breaks_both_calls() -> None:
    async def main(pair: Pair) -> None:
        pair.near.send_nowait([b"lost"])
        await trio.sleep(1.0)
        pair.far.reset()
        with pytest.raises(trio.BrokenResourceError):
            await pair.far.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            pair.far.send_nowait([b"x"])
        assert pair.far not in pair.kit.network.streams

    connected(main)


def test_a_killed_process_closes_its_connections_at_once() -> None:
    async def main(pair: Pair) -> None:
        pair.b.die(power=False, rng=Random(1))
        assert await pair.near.receive_some() == b""
        with pytest.raises(ConnectionRefusedError):
            await pair.a.env.net.dial(pair.b.machine.host, PORT)

    connected(main)


def test_a_machine_without_power_says_nothing_until_it_is_up_again() -> None:
    async def main(pair: Pair) -> None:
        machine = pair.b.machine
        pair.b.die(power=True, rng=Random(1))
        pair.near.send_nowait([b"anybody?"])
        with trio.move_on_after(30.0) as waited:
            await pair.near.receive_some()
        assert waited.cancelled_caught, "half open: neither end nor reset"
        with pytest.raises(trio.TooSlowError):
            await pair.a.env.net.dial(machine.host, PORT, timeout=2.0)
        pair.kit.again(machine)
        pair.near.send_nowait([b"anybody?"])
        with pytest.raises(trio.BrokenResourceError):
            await pair.near.receive_some()

    connected(main)


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_a_handshake_needs_both_directions(back: bool) -> None:
    async def main(pair: Pair) -> None:
        pair.cut(back=back)
        with pytest.raises(trio.TooSlowError):
            await pair.a.env.net.dial(pair.b.machine.host, PORT, timeout=2.0)

        async def heal() -> None:
            await trio.sleep(1.0)
            pair.kit.network.heal_all()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(heal)
            await pair.a.env.net.dial(pair.b.machine.host, PORT, timeout=2.0)

    connected(main)


def test_an_acknowledgement_does_not_get_through_a_cut_way_back() -> None:
    async def main(pair: Pair) -> None:
        pair.near.send_nowait([b"read"])
        pair.cut(back=True)
        assert await pair.read(pair.far, 4) == b"read"
        await trio.sleep(10.0)
        assert pair.near.taken == 4, "the sender's window stays full"
        pair.kit.network.heal_all()
        await trio.sleep(1.0)
        assert pair.near.taken == 0

    connected(main)


def test_a_paused_machine_takes_no_notice_until_it_goes_on() -> None:
    async def main(pair: Pair) -> None:
        got: list[float] = []

        async def read() -> None:
            await pair.read(pair.far, 5)
            got.append(pair.kit.time.now)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(0.1)
            pair.b.machine.pause(stops=False)
            pair.near.send_nowait([b"hello"])
            await trio.sleep(3.0)
            assert not got
            pair.b.machine.resume()
        assert got == [pair.kit.time.now]

    connected(main)


def test_a_port_is_taken_once_and_free_again_after_its_process() -> None:
    async def main(kit: Kit) -> None:
        process = kit.process()
        await process.env.net.listen("0.0.0.0", PORT)
        with pytest.raises(OSError, match="already in use"):
            await process.env.net.listen("0.0.0.0", PORT)
        process.die(power=False, rng=Random(1))
        with pytest.raises(Dead):
            await process.env.net.listen("0.0.0.0", PORT)
        await kit.again(process.machine).env.net.listen("0.0.0.0", PORT)

    play(main)


def test_what_is_delivered_is_told_to_the_trace() -> None:
    async def main(pair: Pair) -> None:
        pair.near.send_nowait([b"seen"])
        await pair.read(pair.far, 4)
        assert [data for _, data in pair.kit.delivered] == [b"seen"]

    connected(main)
