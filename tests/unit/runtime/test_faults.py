"""The fault file layer: what a dead process leaves on the disk, and each fault by itself."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from runtime.faults import STAGING, FaultyFiles, PlanError, parse_plan
from runtime.files import RealFile, RealFiles
from runtime.real import FAULTS_VARIABLE, fault_plan, real_env
from runtime.testing import wait_until


class Disk:
    """One faulty folder; `power_cut` is what a new process finds after kill -9: only what the real files hold."""

    def __init__(self, folder: Path, **faults: object) -> None:
        self.folder = folder / "data"
        self.folder.mkdir()
        self.plan = folder / "plan.json"
        self.change(**faults)
        self.files = FaultyFiles(str(self.plan))

    def change(self, **faults: object) -> None:
        aside = self.plan.with_suffix(".new")
        aside.write_text(json.dumps({"folders": {str(self.folder): faults}}))
        aside.rename(self.plan)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def power_cut(self) -> None:
        self.files = FaultyFiles(str(self.plan))
        with self.files.lock(self.path("lock")):
            pass

    def synced(self, name: str, content: bytes) -> None:
        file = self.files.open(self.path(name), create=True)
        file.pwrite(content, 0)
        file.sync_now()
        self.files.sync_dir(str(self.folder))
        file.close()


@pytest.fixture
def lossy(tmp_path: Path) -> Disk:
    return Disk(tmp_path, lose_unsynced=True)


def test_unsynced_bytes_are_read_and_mapped_but_lost(lossy: Disk) -> None:
    lossy.synced("log", b"durable.." + bytes(7))
    file = lossy.files.open(lossy.path("log"))
    view = file.map()
    file.pwrite(b"unsynced", 8)
    assert file.pread(16, 0) == bytes(view) == file.pread_nowait(16, 0) == b"durable.unsynced"
    assert lossy.files.read_bytes(lossy.path("log")) == b"durable.unsynced"
    lossy.power_cut()
    assert lossy.files.read_bytes(lossy.path("log")) == b"durable.." + bytes(7)


async def test_a_sync_keeps_exactly_what_was_written_before_it(lossy: Disk) -> None:
    lossy.synced("log", bytes(20))
    file = lossy.files.open(lossy.path("log"))
    file.pwritev([b"ab", b"cd"], 2)
    file.pwrite(b"z", 19)
    await file.sync()
    file.pwrite(b"lost", 8)
    lossy.power_cut()
    assert lossy.files.read_bytes(lossy.path("log")) == b"\0\0abcd" + bytes(13) + b"z"


def test_sizes_are_lost_too(lossy: Disk) -> None:
    lossy.synced("rows", b"0123456789")
    file = lossy.files.open(lossy.path("rows"))
    file.truncate(4)
    file.allocate(100)
    assert (file.size(), file.pread(10, 0)) == (100, b"0123" + bytes(6))
    lossy.power_cut()
    file = lossy.files.open(lossy.path("rows"))
    assert (file.size(), file.pread(10, 0)) == (10, b"0123456789")
    file.truncate(4)
    file.allocate(12)
    file.sync_now()
    lossy.power_cut()
    # Bytes cut off before the file grew again must not come back.
    assert lossy.files.read_bytes(lossy.path("rows")) == b"0123" + bytes(8)


def test_a_closed_file_keeps_its_unsynced_bytes_until_the_power_goes(lossy: Disk) -> None:
    lossy.synced("queue", b"old")
    file = lossy.files.open(lossy.path("queue"))
    file.pwrite(b"new", 0)
    file.close()
    assert lossy.files.read_bytes(lossy.path("queue")) == b"new"
    again = lossy.files.open(lossy.path("queue"))
    other = lossy.files.open(lossy.path("queue"))
    other.pwrite(b"NEW", 0)
    assert again.pread(3, 0) == b"NEW"
    again.sync_now()  # whoever syncs, syncs the file
    lossy.power_cut()
    assert lossy.files.read_bytes(lossy.path("queue")) == b"NEW"


def test_a_new_name_needs_its_folder_synced(lossy: Disk) -> None:
    file = lossy.files.open(lossy.path("new"), create=True)
    file.pwrite(b"x", 0)
    file.sync_now()
    assert lossy.files.exists(lossy.path("new"))
    assert lossy.files.listdir(str(lossy.folder)) == ["new"]
    lossy.power_cut()
    assert not lossy.files.exists(lossy.path("new"))
    assert lossy.files.listdir(str(lossy.folder)) == ["lock"]
    assert not (lossy.folder / STAGING).exists()
    with pytest.raises(FileNotFoundError):
        lossy.files.open(lossy.path("new"))
    file = lossy.files.open(lossy.path("new"), create=True)
    file.pwrite(b"y", 0)
    lossy.files.sync_dir(str(lossy.folder))
    lossy.power_cut()
    assert lossy.files.read_bytes(lossy.path("new")) == b""  # the name without the bytes


def test_renames_and_removals_need_their_folder_synced(lossy: Disk) -> None:
    for name in ("a", "b", "c"):
        lossy.synced(name, name.encode())
    lossy.files.rename(lossy.path("a"), lossy.path("b"))
    lossy.files.unlink(lossy.path("c"))
    assert lossy.files.listdir(str(lossy.folder)) == ["b"]
    assert lossy.files.read_bytes(lossy.path("b")) == b"a"
    with pytest.raises(FileNotFoundError):
        lossy.files.unlink(lossy.path("c"))
    lossy.power_cut()
    assert [lossy.files.read_bytes(lossy.path(name)) for name in ("a", "b", "c")] == [b"a", b"b", b"c"]
    lossy.files.rename(lossy.path("a"), lossy.path("b"))
    lossy.files.unlink(lossy.path("c"))
    lossy.files.sync_dir(str(lossy.folder))
    lossy.power_cut()
    assert lossy.files.listdir(str(lossy.folder)) == ["b", "lock"]
    assert lossy.files.read_bytes(lossy.path("b")) == b"a"


@pytest.mark.parametrize("faults", [{"lose_unsynced": True}, {}], ids=["lossy", "plain"])
def test_a_file_is_where_it_was_opened_until_it_moves_or_goes(tmp_path: Path, faults: dict[str, object]) -> None:
    disk = Disk(tmp_path, **faults)
    disk.synced("a", b"a")
    old, new = disk.files.open(disk.path("a")), disk.files.open(disk.path("new"), create=True)
    assert old.is_at(disk.path("a")) and not old.is_at(disk.path("new")) and not old.is_at(disk.path("never"))
    assert new.is_at(disk.path("new")), "also before its name is durable"
    disk.files.sync_dir(str(disk.folder))
    assert new.is_at(disk.path("new"))
    disk.files.rename(disk.path("new"), disk.path("a"))
    assert new.is_at(disk.path("a")) and not new.is_at(disk.path("new")) and not old.is_at(disk.path("a"))
    disk.files.sync_dir(str(disk.folder))
    disk.files.unlink(disk.path("a"))
    assert not new.is_at(disk.path("a"))
    for file in (old, new):
        file.close()


def test_a_rename_across_folders_needs_both_synced(lossy: Disk) -> None:
    for sub in ("one", "two"):
        lossy.files.make_dirs(lossy.path(sub))
    file = lossy.files.open(lossy.path("one/f"), create=True)
    lossy.files.sync_dir(lossy.path("one"))
    lossy.files.rename(lossy.path("one/f"), lossy.path("two/f"))
    file.pwrite(b"1", 0)
    file.sync_now()
    lossy.files.sync_dir(lossy.path("two"))
    lossy.power_cut()
    assert lossy.files.read_bytes(lossy.path("one/f")) == lossy.files.read_bytes(lossy.path("two/f")) == b"1"


def test_an_atomic_replacement_is_durable(lossy: Disk) -> None:
    lossy.files.write_atomic(lossy.path("checkpoint"), b"one")
    lossy.files.write_atomic(lossy.path("checkpoint"), b"two")
    lossy.power_cut()
    assert lossy.files.read_bytes(lossy.path("checkpoint")) == b"two"
    assert lossy.files.listdir(str(lossy.folder)) == ["checkpoint", "lock"]


def test_folders_take_their_unsynced_files_along(lossy: Disk) -> None:
    lossy.files.make_dirs(lossy.path("queue"))
    file = lossy.files.open(lossy.path("queue/0"), create=True)
    file.pwrite(b"unit", 0)
    lossy.files.sync_dir(lossy.path("queue"))
    file.pwrite(b"more", 4)
    lossy.files.rename(lossy.path("queue"), lossy.path("trash"))
    assert lossy.files.read_bytes(lossy.path("trash/0")) == b"unitmore"
    assert not lossy.files.exists(lossy.path("queue/0"))
    file.sync_now()
    assert (lossy.folder / "trash" / "0").read_bytes() == b"unitmore"
    lossy.files.remove_tree(lossy.path("trash"))
    assert not lossy.files.exists(lossy.path("trash/0"))


def test_no_descriptor_is_left_behind(lossy: Disk) -> None:
    lossy.synced("warm", b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        lossy.synced("file", b"x")
        lossy.files.write_atomic(lossy.path("other"), b"y")
        lossy.files.open(lossy.path("gone"), create=True).close()
        lossy.files.unlink(lossy.path("gone"))
        lossy.files.unlink(lossy.path("file"))
        lossy.files.sync_dir(str(lossy.folder))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list((lossy.folder / STAGING).iterdir()) == []


def test_holes_stay_holes(lossy: Disk) -> None:
    lossy.synced("segment", b"head")
    os.truncate(lossy.path("segment"), 1 << 30)
    file = lossy.files.open(lossy.path("segment"))
    assert (file.size(), file.pread(5, 0), file.pread(4, (1 << 30) - 2)) == (1 << 30, b"head\0", b"\0\0")


def test_pages_written_back_early_make_torn_tails(tmp_path: Path) -> None:
    disk = Disk(tmp_path, lose_unsynced=True, early_write_back=0.5, seed=3)
    disk.synced("log", bytes(64 * 4096))
    file = disk.files.open(disk.path("log"))
    for page in range(64):
        file.pwrite(bytes([page + 1]) * 4096, page * 4096)
    disk.power_cut()
    left = disk.files.read_bytes(disk.path("log"))
    kept = [page for page in range(64) if left[page * 4096] == page + 1]
    assert 10 < len(kept) < 54
    assert all(left[page * 4096 : page * 4096 + 4096] == bytes([left[page * 4096]]) * 4096 for page in range(64))


def test_a_killed_process_loses_what_it_did_not_sync(lossy: Disk) -> None:
    """The real thing, with the switch as a node gets it."""
    lossy.synced("log", bytes(8))
    program = f"""
import os, signal
from runtime.real import real_env
env = real_env()
assert env.ids.boot_id.startswith("other boot/")
with env.files.lock({lossy.path("lock")!r}):
    file = env.files.open({lossy.path("log")!r})
    file.pwrite(b"kept", 0)
    file.sync_now()
    file.pwrite(b"lost", 4)
    assert file.pread(8, 0) == b"keptlost"
    os.kill(os.getpid(), signal.SIGKILL)
"""
    document = json.loads(lossy.plan.read_text()) | {"boot_id": "other boot"}
    lossy.plan.write_text(json.dumps(document))
    environment = os.environ | {FAULTS_VARIABLE: str(lossy.plan)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, cwd=Path(__file__).parents[3], check=False)
    assert ended.returncode == -9
    assert Path(lossy.path("log")).read_bytes() == b"kept" + bytes(4)


@pytest.mark.parametrize("is_lossy", [False, True])
def test_the_end_of_a_process_is_a_power_loss_where_it_takes_what_is_unsynced(tmp_path: Path, is_lossy: bool) -> None:
    plan = {"boot_id": "second", "folders": {"/a": {}, "/b": {"lose_unsynced": is_lossy}}}
    (tmp_path / "plan").write_text(json.dumps(plan))
    boots = {FaultyFiles(str(tmp_path / "plan")).boot_id for _ in range(3)}
    assert len(boots) == 3 if is_lossy else boots == {"second"}


# --- faults that come and go ---


@pytest.mark.parametrize("is_lossy", [False, True])
async def test_failing_writes_and_reads(tmp_path: Path, is_lossy: bool) -> None:
    disk = Disk(tmp_path, lose_unsynced=is_lossy)
    disk.synced("log", b"before")
    file = disk.files.open(disk.path("log"))
    disk.change(lose_unsynced=is_lossy, write_fails="EIO", read_fails="EIO")

    def fails(call: Callable[[], object], number: int) -> bool:
        try:
            call()
        except OSError as error:
            assert error.errno == number
            return True
        return False

    await wait_until(lambda: fails(lambda: file.pread(6, 0), errno.EIO))
    for call in (
        lambda: file.pwrite(b"x", 0),
        lambda: file.pwritev([b"x"], 0),
        lambda: file.truncate(1),
        lambda: file.allocate(100),
        lambda: file.pread_nowait(6, 0),
        lambda: disk.files.read_bytes(disk.path("log")),
    ):
        assert fails(call, errno.EIO)
    disk.change(lose_unsynced=is_lossy)
    await wait_until(lambda: not fails(lambda: file.pread(6, 0), errno.EIO))
    assert file.pread(6, 0) == b"before"


@pytest.mark.parametrize("is_lossy", [False, True])
async def test_a_failed_sync_loses_its_bytes_and_the_next_one_is_silent(tmp_path: Path, is_lossy: bool) -> None:
    disk = Disk(tmp_path, lose_unsynced=is_lossy)
    disk.synced("log", b"durable")
    disk.change(lose_unsynced=is_lossy, sync_fails="EIO")
    disk.files = FaultyFiles(str(disk.plan))
    file = disk.files.open(disk.path("log"))
    file.pwrite(b"unsaved", 0)
    for _ in range(2):
        with pytest.raises(OSError, match="injected") as raised:
            await file.sync()
        assert raised.value.errno == errno.EIO
    disk.change(lose_unsynced=is_lossy)

    def healed() -> bool:
        try:
            file.sync_now()
        except OSError:
            return False
        return True

    await wait_until(healed)
    assert file.pread(7, 0) == b"unsaved"
    if is_lossy:
        disk.power_cut()
        assert disk.files.read_bytes(disk.path("log")) == b"durable"


@pytest.mark.parametrize("is_lossy", [False, True])
def test_room_runs_out_and_comes_back(tmp_path: Path, is_lossy: bool) -> None:
    disk = Disk(tmp_path, lose_unsynced=is_lossy, free_bytes=1000, total_bytes=5000)
    assert disk.files.free_space(str(disk.folder)) == (1000, 5000)
    file = disk.files.open(disk.path("a"), create=True)
    file.allocate(600)
    file.pwrite(bytes(600), 0)  # allocated before
    file.pwrite(bytes(100), 600)
    assert disk.files.free_space(disk.path("a")) == (300, 5000)
    with pytest.raises(OSError, match="injected") as raised:
        file.pwrite(bytes(301), 700)
    assert raised.value.errno == errno.ENOSPC
    assert file.size() == 700
    other = disk.files.open(disk.path("b"), create=True)
    with pytest.raises(OSError, match="injected"):
        other.allocate(301)
    file.truncate(100)
    other.allocate(900)
    disk.files.unlink(disk.path("a"))
    assert disk.files.free_space(str(disk.folder)) == (100, 5000)


async def test_more_room_is_the_relief(tmp_path: Path) -> None:
    disk = Disk(tmp_path, free_bytes=0)
    assert disk.files.free_space(str(disk.folder)) == RealFiles().free_space(str(disk.folder))
    file = disk.files.open(disk.path("a"), create=True)

    def has_room(nbytes: int) -> bool:
        try:
            file.pwrite(bytes(nbytes), file.size())
        except OSError:
            return False
        return True

    assert not has_room(1)
    disk.change(free_bytes=10, total_bytes=100)
    await wait_until(lambda: disk.files.free_space(str(disk.folder)) == (10, 100))
    assert has_room(10)
    assert not has_room(1)
    disk.change()
    await wait_until(lambda: has_room(1000))


async def test_stalls_end_when_the_plan_says_so(tmp_path: Path) -> None:
    disk = Disk(tmp_path, stall_writes=True, stall_syncs=True)
    file = disk.files.open(disk.path("a"), create=True)
    done: list[str] = []

    def write() -> None:
        file.pwrite(b"x", 0)
        done.append("write")

    async def sync() -> None:
        await file.sync()
        done.append("sync")

    async with trio.open_nursery() as nursery:
        writer = threading.Thread(target=write)
        writer.start()
        nursery.start_soon(sync)
        await trio.sleep(0.1)
        assert done == []
        disk.change(stall_syncs=True)
        await wait_until(lambda: done == ["write"])
        disk.change()
    assert done == ["write", "sync"]
    writer.join()


async def test_delays(tmp_path: Path) -> None:
    disk = Disk(tmp_path, sync_delay_ms=60, write_delay_ms=30)
    file = disk.files.open(disk.path("a"), create=True)
    start = trio.current_time()
    file.pwrite(b"x", 0)
    between = trio.current_time()
    await file.sync()
    assert between - start >= 0.03
    assert trio.current_time() - between >= 0.06


def test_the_innermost_folder_counts_and_others_are_left_alone(tmp_path: Path) -> None:
    inner, outer = tmp_path / "n0" / "raft", tmp_path / "n0"
    inner.mkdir(parents=True)
    plan = tmp_path / "plan.json"
    folders = {str(outer): {"write_fails": "EIO"}, str(inner): {"write_fails": "ENOSPC"}}
    plan.write_text(json.dumps({"folders": folders}))
    files = FaultyFiles(str(plan))
    for path, number in ((inner / "f", errno.ENOSPC), (outer / "f", errno.EIO)):
        with pytest.raises(OSError, match="injected") as raised:
            files.open(str(path), create=True).pwrite(b"x", 0)
        assert raised.value.errno == number
    healthy = files.open(str(tmp_path / "n01"), create=True)
    assert type(healthy) is RealFile
    healthy.pwrite(b"x", 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "folders"),
        ('{"folders": {"/x": {"sync_delay": 3}}}', "sync_delay"),
        ('{"folders": {"/x": {"sync_fails": "EBROKEN"}}}', "EBROKEN"),
        ('{"folders": {"x": {}}}', "absolute"),
        ('{"folders": {}, "boot": "b"}', "boot"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words) as raised:
        parse_plan(text.encode(), "/tmp/plan.json")
    assert "/tmp/plan.json" in str(raised.value)


def test_off_means_the_real_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FAULTS_VARIABLE, raising=False)
    assert fault_plan() is None
    assert type(real_env().files) is RealFiles
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "plan.json"))
    assert fault_plan() == str(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"plan\.json"):
        real_env()
