from __future__ import annotations

import errno
from pathlib import Path
from unittest import mock

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from namesrv.mirror import Mirror, MirrorDamaged
from namesrv.registry import (
    COMMAND_LIMIT_BYTES,
    Command,
    CommandRefused,
    ControlState,
    LocalRegistry,
    Outcome,
    RegistryUnavailable,
)
from runtime.testing import test_env

names = st.sampled_from(["a", "b", "c", "ä"])
commands = st.one_of(
    st.tuples(st.just("kv_put"), names, names, names),
    st.tuples(st.just("kv_delete"), names, names),
    st.tuples(st.just("wipe"), names),
    st.tuples(st.just("unwipe"), names),
    st.tuples(st.just("from a newer version"), names),
)


def test_commands_change_the_state_and_its_version() -> None:
    state = ControlState()
    assert state.apply(b"1", ("kv_put", "ns", "k", "v")) == Outcome(1, True)
    assert state.apply(b"2", ("kv_put", "ns", "k", "v")) == Outcome(1, False)
    assert state.apply(b"3", ("wipe", "broker-a")) == Outcome(2, True)
    assert state.apply(b"4", ("kv_delete", "ns", "k")) == Outcome(3, True)
    assert state.apply(b"5", ("kv_delete", "ns", "k")) == Outcome(3, False)
    assert state.apply(b"6", ("kv_delete", "none", "k")) == Outcome(3, False)
    assert (state.kv, state.wiped) == ({}, {"broker-a": True})
    assert state.apply(b"7", ("unwipe", "broker-a")) == Outcome(4, True)
    assert state.wiped == {}


def test_a_request_seen_before_changes_nothing() -> None:
    state = ControlState()
    first = state.apply(b"1", ("kv_put", "ns", "k", "old"))
    state.apply(b"2", ("kv_put", "ns", "k", "new"))
    assert state.apply(b"1", ("kv_put", "ns", "k", "old")) == first
    assert state.kv == {"ns": {"k": "new"}}


def test_remembered_requests_are_bounded() -> None:
    state = ControlState()
    for number in range(3_000):
        state.apply(number.to_bytes(4, "big"), ("kv_put", "ns", "k", str(number)))
    assert len(state._requests) == 1_000


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=2), commands), max_size=30))
def test_a_snapshot_goes_on_exactly_where_the_state_was(history: list[tuple[bytes, Command]]) -> None:
    straight, hopping = ControlState(), ControlState()
    for request_id, command in history:
        expected = straight.apply(request_id, command)
        assert hopping.apply(request_id, command) == expected
        hopping = ControlState.restore(hopping.snapshot())
    assert hopping.snapshot() == straight.snapshot()


@pytest.mark.parametrize("snapshot", [b"", b"\xff", b"\xa0", b"\x01", b"\xa1gversion\x01"])
def test_what_is_no_snapshot_is_refused(snapshot: bytes) -> None:
    with pytest.raises(ValueError, match="not a control-plane snapshot"):
        ControlState.restore(snapshot)


async def started(nursery: trio.Nursery, folder: Path) -> LocalRegistry:
    env = test_env(folder)
    registry = LocalRegistry(env, Mirror(env.files, str(folder / "control.cbor")))
    await nursery.start(registry.run)
    return registry


async def test_changes_survive_a_restart(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        registry = await started(nursery, tmp_path)
        seen: list[int] = []
        registry.listen(lambda state: seen.append(state.version))
        assert await registry.propose(("kv_put", "ns", "k", "v")) == Outcome(1, True)
        assert await registry.propose(("wipe", "broker-a")) == Outcome(2, True)
        assert seen == [0, 1, 2]
        assert not registry.stale
        again = await started(nursery, tmp_path)
        assert again.state.kv == {"ns": {"k": "v"}}
        assert again.state.wiped == {"broker-a": True}
        nursery.cancel_scope.cancel()


async def test_a_failing_disk_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        registry = await started(nursery, tmp_path)
        await registry.propose(("kv_put", "ns", "k", "v"))
        with (
            mock.patch("os.fdatasync", side_effect=OSError(errno.ENOSPC, "No space left")),
            pytest.raises(RegistryUnavailable, match="No space left"),
        ):
            await registry.propose(("kv_put", "ns", "k", "w"))
        assert registry.state.kv == {"ns": {"k": "v"}}
        assert await registry.propose(("kv_put", "ns", "k", "w")) == Outcome(2, True)
        nursery.cancel_scope.cancel()


async def test_oversized_and_unknown_commands_are_refused(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        registry = await started(nursery, tmp_path)
        with pytest.raises(CommandRefused, match="over the control plane's limit"):
            await registry.propose(("kv_put", "ns", "k", "v" * COMMAND_LIMIT_BYTES))
        with pytest.raises(CommandRefused, match="unknown control-plane command"):
            await registry.propose(("kv_put", "ns", "k"))
        with mock.patch("namesrv.registry.STATE_LIMIT_BYTES", 100), pytest.raises(CommandRefused, match="would hold"):
            await registry.propose(("kv_put", "ns", "k", "v" * 100))
        assert registry.state.version == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_damaged_mirror_is_not_taken_for_an_empty_one(tmp_path: Path, place: int) -> None:
    mirror = Mirror(test_env(tmp_path).files, str(tmp_path / "control.cbor"))
    assert mirror.load() is None
    mirror.save(b"some content")
    assert mirror.load() == b"some content"
    data = bytearray((tmp_path / "control.cbor").read_bytes())
    data[place] ^= 1
    (tmp_path / "control.cbor").write_bytes(data)
    with pytest.raises(MirrorDamaged, match=r"control\.cbor is damaged"):
        mirror.load()
