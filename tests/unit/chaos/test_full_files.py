"""Disks of the full engine: what a process sees, what a power loss leaves, and what goes wrong on request."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random

import pytest
import trio

from chaos.sim.full.clock import VirtualTime
from chaos.sim.full.files import DIRTY_WRITES_MAX, Disk
from chaos.sim.full.machine import Dead, Process
from runtime.files import Locked
from tests.unit.chaos.full_kit import Kit, play

SEEDS = range(20)


def process_of() -> Process:
    """A process for the synchronous calls, which need no running world."""
    return Kit(VirtualTime(lambda: None)).process()


def survivors(prepare: Callable[[Process], None], seeds: range = SEEDS) -> list[Disk]:
    """The disks that power losses leave, one a seed, each after `prepare(process)`."""
    left = []
    for seed in seeds:
        process = process_of()
        prepare(process)
        process.machine.disk.lose_power(Random(seed))
        left.append(process.machine.disk)
    return left


def content(disk: Disk, path: str) -> bytes | None:
    inode = disk.find(path)
    return None if inode is None else bytes(inode.cached)


def written(process: Process, path: str, data: bytes, *, synced: bool = True) -> None:
    """A file whose name is durable, and, where asked for, its bytes."""
    file = process.env.files.open(path, create=True)
    file.pwrite(data, 0)
    if synced:
        file.sync_now()
    process.env.files.sync_dir("/d")


def test_synced_bytes_survive_a_power_loss_and_unsynced_ones_may_not() -> None:
    def prepare(process: Process) -> None:
        written(process, "/d/f", b"s" * 4096)
        process.env.files.open("/d/f").pwrite(b"u" * 4096, 4096)

    left = [content(disk, "/d/f") for disk in survivors(prepare)]
    assert all(each is not None and each[:4096] == b"s" * 4096 for each in left)
    ends = {each[4096:] for each in left if each is not None}
    assert b"" in ends and b"u" * 4096 in ends


def test_a_kill_loses_nothing() -> None:
    process = process_of()
    written(process, "/d/f", b"u", synced=False)
    process.die(power=False, rng=Random(1))
    assert content(process.machine.disk, "/d/f") == b"u"


def test_a_power_loss_may_tear_a_write_at_a_sector_and_nowhere_else() -> None:
    def prepare(process: Process) -> None:
        written(process, "/d/f", b"0" * 16_384)
        process.env.files.open("/d/f").pwrite(b"1" * 16_384, 0)

    torn = set()
    for disk in survivors(prepare, range(60)):
        image = content(disk, "/d/f")
        assert image is not None and len(image) == 16_384
        sectors = [image[at : at + 512] for at in range(0, 16_384, 512)]
        assert set(sectors) <= {b"0" * 512, b"1" * 512}
        torn.add(len(set(sectors)))
    assert torn == {1, 2}, "some are torn, some are whole"


def test_of_two_writes_to_a_page_the_later_one_never_survives_alone() -> None:
    def prepare(process: Process) -> None:
        written(process, "/d/f", b"...")
        file = process.env.files.open("/d/f")
        file.pwrite(b"1", 0)
        file.pwrite(b"2", 1)

    left = {content(disk, "/d/f") for disk in survivors(prepare, range(60))}
    assert left == {b"...", b"1..", b"12."}


def test_a_sync_covers_what_was_written_before_it_began() -> None:
    async def main(kit: Kit) -> None:
        process = kit.process()
        written(process, "/d/f", b"....")
        file = process.env.files.open("/d/f")
        file.pwrite(b"1", 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.sync)
            await trio.sleep(0.001)
            file.pwrite(b"2", 1)
        inode = process.machine.disk.find("/d/f")
        assert inode is not None and bytes(inode.durable) == b"1..." and bytes(inode.cached) == b"12.."

    play(main)


def test_a_failed_sync_is_reported_once_and_what_it_held_is_not_on_the_disk() -> None:
    process = process_of()
    written(process, "/d/f", b"old")
    file = process.env.files.open("/d/f")
    file.pwrite(b"new", 0)
    process.machine.disk.failing_syncs = 1
    with pytest.raises(OSError) as failed:
        file.sync_now()
    assert failed.value.errno == errno.EIO
    file.sync_now()  # the pages count as clean: that says nothing
    assert file.pread(3, 0) == b"new"
    file.advise("dontneed")
    assert file.pread(3, 0) == b"old"


def test_a_failing_write_changes_nothing() -> None:
    process = process_of()
    written(process, "/d/f", b"old")
    process.machine.disk.failing_writes = 1
    file = process.env.files.open("/d/f")
    with pytest.raises(OSError) as failed:
        file.pwrite(b"new", 0)
    assert failed.value.errno == errno.EIO and file.pread(3, 0) == b"old"
    file.pwrite(b"new", 0)
    assert file.pread(3, 0) == b"new"


def test_a_full_disk_takes_no_new_byte_but_lets_old_ones_be_overwritten() -> None:
    process = process_of()
    written(process, "/d/f", b"1234")
    disk = process.machine.disk
    disk.reserved = disk.quota
    file = process.env.files.open("/d/f")
    for grow in (lambda: file.pwrite(b"5", 4), lambda: file.allocate(5)):
        with pytest.raises(OSError) as full:
            grow()
        assert full.value.errno == errno.ENOSPC and file.size() == 4
    file.pwrite(b"4321", 0)
    assert process.env.files.free_space("/d") == (0, disk.quota)
    disk.reserved = 0
    before = disk.free
    file.truncate(1)
    assert disk.free == before + 3
    process.env.files.unlink("/d/f")
    assert disk.used == 0


def test_a_turned_bit_is_on_the_disk_and_in_the_cache_until_it_is_written_over() -> None:
    process = process_of()
    written(process, "/d/f", b"\x00\x00")
    disk = process.machine.disk
    disk.flip_bit("/d/f", 1, 3)
    assert process.env.files.read_bytes("/d/f") == b"\x00\x08"
    disk.lose_power(Random(1))
    assert content(disk, "/d/f") == b"\x00\x08" and disk.rotten == [("/d/f", 1, 0)]
    process.env.files.open("/d/f").pwrite(b"\x00", 1)
    assert disk.rotten == []


def test_a_stalled_disk_completes_no_sync_and_still_takes_writes() -> None:
    async def main(kit: Kit) -> None:
        process = kit.process()
        written(process, "/d/f", b"...")
        file = process.env.files.open("/d/f")
        process.machine.disk.stalled_until = kit.time.now + 5.0
        file.pwrite(b"new", 0)
        assert file.pread(3, 0) == b"new"
        before = kit.time.now
        await file.sync()
        assert 5.0 <= kit.time.now - before < 5.1

    play(main)


def test_a_slow_write_holds_the_loop_and_in_a_thread_only_the_thread() -> None:
    async def main(kit: Kit) -> None:
        process = kit.process()
        written(process, "/d/f", b"...")
        file = process.env.files.open("/d/f")
        process.machine.disk.write_seconds = 0.5
        clock = process.machine.clock
        before = clock.monotonic()
        file.pwrite(b"1", 0)
        assert clock.monotonic() == before + 0.5
        began = kit.time.now
        await process.run_in_thread(file.pwrite, b"2", 0)
        assert kit.time.now - began >= 0.5

    play(main)


def test_a_new_name_lasts_once_its_folder_is_synced() -> None:
    def unsynced(process: Process) -> None:
        process.env.files.open("/d/f", create=True).sync_now()

    def synced(process: Process) -> None:
        unsynced(process)
        process.env.files.sync_dir("/d")

    assert {content(disk, "/d/f") for disk in survivors(unsynced)} == {None, b""}
    assert {content(disk, "/d/f") for disk in survivors(synced)} == {b""}


def test_a_file_in_an_unsynced_folder_goes_with_its_folder() -> None:
    def prepare(process: Process) -> None:
        files = process.env.files
        files.make_dirs("/d/sub")
        files.open("/d/sub/f", create=True)
        files.sync_dir("/d/sub")

    left = survivors(prepare)
    assert {disk.find("/d/sub") is None for disk in left} == {True, False}
    assert all((disk.find("/d/sub") is None) == (disk.find("/d/sub/f") is None) for disk in left)


def test_a_rename_happens_as_a_whole_or_not_at_all() -> None:
    def prepare(process: Process) -> None:
        written(process, "/d/old", b"o")
        written(process, "/d/new", b"n")
        process.env.files.rename("/d/old", "/d/new")

    left = {(content(disk, "/d/old"), content(disk, "/d/new")) for disk in survivors(prepare)}
    assert left == {(b"o", b"n"), (None, b"o")}


def test_a_replaced_file_has_its_old_content_or_its_new_one() -> None:
    def prepare(process: Process) -> None:
        written(process, "/d/f", b"old")
        process.env.files.write_atomic("/d/f", b"new")

    assert {content(disk, "/d/f") for disk in survivors(prepare)} == {b"new"}, "it is durable when the call returns"


def test_a_removed_file_may_come_back_until_its_folder_is_synced() -> None:
    def prepare(process: Process) -> None:
        written(process, "/d/f", b"x")
        process.env.files.unlink("/d/f")

    def synced(process: Process) -> None:
        prepare(process)
        process.env.files.sync_dir("/d")

    assert {content(disk, "/d/f") for disk in survivors(prepare)} == {b"x", None}
    assert {content(disk, "/d/f") for disk in survivors(synced)} == {None}


def test_a_renamed_folder_takes_what_is_in_it_along() -> None:
    process = process_of()
    files = process.env.files
    files.make_dirs("/d/a/b")
    files.open("/d/a/b/f", create=True).pwrite(b"x", 0)
    files.make_dirs("/d/full/x")
    files.rename("/d/a", "/d/c")
    assert files.read_bytes("/d/c/b/f") == b"x" and not files.exists("/d/a/b/f")
    with pytest.raises(OSError) as occupied:
        files.rename("/d/c", "/d/full")
    assert occupied.value.errno == errno.ENOTEMPTY
    files.remove_tree("/d/c")
    assert files.listdir("/d") == ["full"]


def test_names_are_checked_as_a_kernel_does() -> None:
    process = process_of()
    files = process.env.files
    for call in (
        lambda: files.open("/d/none"),
        lambda: files.open("/nowhere/f", create=True),
        lambda: files.unlink("/d/none"),
        lambda: files.rename("/d/none", "/d/x"),
    ):
        with pytest.raises(FileNotFoundError):
            call()
    with pytest.raises(IsADirectoryError):
        files.open("/d")
    files.open("/d/f", create=True)
    with pytest.raises(NotADirectoryError):
        files.open("/d/f/g", create=True)
    with pytest.raises(FileExistsError):
        files.make_dirs("/d/f")


def test_a_lock_keeps_others_off_while_its_holder_lives() -> None:
    kit = Kit(VirtualTime(lambda: None))
    first = kit.process()
    second = kit.again(first.machine)
    held = first.env.files.lock("/d")
    with pytest.raises(Locked):
        second.env.files.lock("/d")
    with held:
        pass
    with second.env.files.lock("/d"):
        second.die(power=False, rng=Random(1))
        kit.again(first.machine).env.files.lock("/d")


def test_a_mapped_file_shows_writes_and_must_not_change_its_length() -> None:
    process = process_of()
    written(process, "/d/f", b"1234")
    file = process.env.files.open("/d/f")
    view = file.map()
    file.pwrite(b"9", 2)
    assert bytes(view) == b"1294"
    with pytest.raises(AssertionError, match="changes its length"):
        file.truncate(2)


def test_a_dead_process_cannot_touch_its_disk() -> None:
    process = process_of()
    written(process, "/d/f", b"1")
    file = process.env.files.open("/d/f")
    process.die(power=False, rng=Random(1))
    for call in (lambda: file.pwrite(b"2", 0), lambda: file.pread(1, 0), lambda: process.env.files.listdir("/d")):
        with pytest.raises(Dead):
            call()
    assert content(process.machine.disk, "/d/f") == b"1"


def test_a_fuse_ends_a_process_before_that_step_at_its_disk() -> None:
    process = process_of()
    written(process, "/d/f", b"...")
    process.fuse = 2
    process.on_fuse = lambda: process.die(power=False, rng=Random(1))
    file = process.env.files.open("/d/f")
    file.pwrite(b"1", 0)
    file.pwrite(b"2", 1)
    with pytest.raises(Dead):
        file.pwrite(b"3", 2)
    assert content(process.machine.disk, "/d/f") == b"12."


def test_a_kill_may_end_a_long_write_between_two_pages() -> None:
    process = process_of()
    written(process, "/d/f", bytes(5 * 4096))
    process.fuse = 0
    process.on_fuse = lambda: process.die(power=False, rng=Random(1))
    with pytest.raises(Dead):
        process.env.files.open("/d/f").pwrite(b"x" * 4 * 4096, 100)
    expected = bytes(100) + b"x" * (2 * 4096 - 100) + bytes(3 * 4096)
    assert content(process.machine.disk, "/d/f") == expected


def test_the_kernel_writes_back_by_itself_what_gets_too_much() -> None:
    process = process_of()
    written(process, "/d/f", b"0" * 8)
    file = process.env.files.open("/d/f")
    for _ in range(DIRTY_WRITES_MAX + 1):
        file.pwrite(b"1", 0)
    inode = process.machine.disk.find("/d/f")
    assert inode is not None and len(inode.dirty) <= DIRTY_WRITES_MAX and inode.durable[:1] == b"1"


def test_a_wiped_folder_is_empty_after_a_power_loss_too() -> None:
    process = process_of()
    process.env.files.make_dirs("/d/sub")
    written(process, "/d/sub/f", b"x")
    process.env.files.sync_dir("/d/sub")
    disk = process.machine.disk
    disk.flip_bit("/d/sub/f", 0, 0)
    disk.wipe("/d")
    assert process.env.files.listdir("/d") == [] and disk.used == 0 and disk.flips == []
    disk.lose_power(Random(1))
    assert disk.names_in("/d") == []
