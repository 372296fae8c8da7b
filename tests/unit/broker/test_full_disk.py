"""On a full disk the tables go on in memory, and come to the files when there is room again."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from broker.consume_queue import QueueTable
from broker.key_index import KeyIndex
from broker.records import UNIT
from broker.store_files import StoreFiles
from runtime.faults import FaultyFiles
from tests.unit.broker.state_kit import ManualClock, make_env, make_node

GREAT = 1 << 40


class _Disk(FaultyFiles):
    """One whose room a test sets: no waiting until the plan is looked at again."""

    def __init__(self, folder: Path) -> None:
        plan = folder / "plan.json"
        (folder / "data").mkdir()
        plan.write_text(json.dumps({"folders": {str(folder / "data"): {"free_bytes": GREAT}}}))
        super().__init__(str(plan))

    def set_room(self, nbytes: int) -> None:
        self._folders[0]._free = nbytes


@pytest.fixture
def disk(tmp_path: Path) -> _Disk:
    return _Disk(tmp_path)


async def run_inline(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def test_units_wait_in_memory_and_are_readable(disk: _Disk, tmp_path: Path) -> None:
    table = QueueTable(disk, str(tmp_path / "data"), file_units=50, flush_bytes=100)
    queue = table.pending_queue(b"T", 1)
    other = table.pending_queue(b"T", 2)
    for number in range(200):
        if number == 30:
            disk.set_room(0)
        table.append(queue, UNIT.pack(number * 100, 100, number))
        table.append(other, UNIT.pack(number * 100 + 50, 50, number))
    assert table.is_full
    table.flush()
    assert table.is_full
    assert b"".join(bytes(table.units("T", 1, n, 1)) for n in range(200)) == b"".join(
        UNIT.pack(number * 100, 100, number) for number in range(200)
    )
    disk.set_room(GREAT)
    table.flush()
    assert not table.is_full
    assert (len(queue.tail), len(other.tail)) == (0, 0)
    bounds = table.bounds()
    table.close()
    again = QueueTable(disk, str(tmp_path / "data"), file_units=50, flush_bytes=100)
    again.restore(bounds)
    assert UNIT.unpack(again.units("T", 2, 199, 1)) == (199 * 100 + 50, 50, 199)


def test_other_errors_of_the_disk_still_end_the_node(disk: _Disk, tmp_path: Path, monkeypatch: Any) -> None:
    table = QueueTable(disk, str(tmp_path / "data"), flush_bytes=100)
    table.append(table.pending_queue(b"T", 1), UNIT.pack(0, 1, 2))

    def fail(path: str, *, create: bool = False) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(disk, "open", fail)
    with pytest.raises(OSError, match="broken"):
        table.flush()


async def test_index_segments_wait_and_no_half_one_is_left(disk: _Disk, tmp_path: Path) -> None:
    index = KeyIndex(disk, str(tmp_path / "data"), segment_keys=16)
    disk.set_room(0)
    for number in range(16 * 80):  # more than may wait, on a disk with room
        index.extend([5], [number], number * 1000)
    with pytest.raises(OSError, match="No space left"):
        await index.persist(run_inline)
    assert disk.listdir(f"{tmp_path}/data/index") == []
    disk.set_room(GREAT)
    await index.persist(run_inline)
    assert not index.has_sealed
    snapshot = index.snapshot()
    again = KeyIndex(disk, str(tmp_path / "data"), segment_keys=16)
    assert again.restore(snapshot)
    assert again.last_physical_offset == 16 * 80 - 1


async def test_no_checkpoint_is_begun_without_room(tmp_path: Path, monkeypatch: Any) -> None:
    node = make_node(tmp_path)
    node.group.seal()
    saved: list[int] = []
    monkeypatch.setattr(node.group, "save_checkpoint", lambda index, blob: saved.append(index))
    free = [1 << 20]
    monkeypatch.setattr(node.state.env.files, "free_space", lambda path: (free[0], 1 << 40))
    node.state.applied_index = 7
    await node.state.checkpoint()
    assert saved == []
    node.state.checkpoint_soon()
    await node.state.checkpoint()
    assert saved == [7], "segments may wait for it, and be what makes room"
    free[0] = 1 << 30
    node.state.applied_index = 8
    await node.state.checkpoint()
    assert saved == [7, 8]


def test_a_node_starts_on_a_full_disk(disk: _Disk, tmp_path: Path) -> None:
    """Only a node that runs can make room."""
    disk.set_room(0)
    marks = StoreFiles(evolve(make_env(ManualClock()), files=disk), str(tmp_path / "data"))
    marks.opened()
    assert not marks.abnormal_exit and not disk.exists(f"{tmp_path}/data/abort")
    marks.closed()
