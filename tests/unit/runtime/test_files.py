import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from runtime.files import Locked, RealFile
from runtime.testing import test_env


def opened(folder: Path, name: str = "file") -> RealFile:
    file = test_env(folder).files.open(str(folder / name), create=True)
    assert isinstance(file, RealFile)
    return file


def test_open_needs_create_for_a_missing_file(tmp_path: Path) -> None:
    files = test_env(tmp_path).files
    with pytest.raises(FileNotFoundError):
        files.open(str(tmp_path / "missing"))
    files.open(str(tmp_path / "missing"), create=True).close()
    assert files.exists(str(tmp_path / "missing"))


def test_pwrite_goes_on_after_a_short_write(tmp_path: Path) -> None:
    file = opened(tmp_path)
    real = os.pwrite
    calls = []

    def short(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(len(data))
        return real(descriptor, bytes(data)[:3], offset)

    with mock.patch("os.pwrite", short):
        file.pwrite(b"0123456789", 5)
        file.pwrite(memoryview(b"abcdefg"), 15)
    assert file.pread(100, 5) == b"0123456789abcdefg"
    assert calls == [10, 7, 4, 1, 7, 4, 1]


def test_pwritev_takes_more_parts_than_one_call_allows(tmp_path: Path) -> None:
    file = opened(tmp_path)
    parts = [str(number).encode() for number in range(3000)]
    file.pwritev(parts, 7)
    assert file.pread(100_000, 7) == b"".join(parts)


def test_pwritev_goes_on_after_a_short_write(tmp_path: Path) -> None:
    file = opened(tmp_path)
    with mock.patch("os.pwritev", lambda descriptor, parts, offset: os.pwrite(descriptor, parts[0][:1], offset)):
        file.pwritev([b"abc", memoryview(b"def")], 0)
    assert file.pread(10, 0) == b"abcdef"


def test_reads_stop_at_the_end_of_the_file(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.pwrite(b"abc", 0)
    assert file.pread(10, 1) == b"bc"
    assert file.pread_nowait(10, 1) == b"bc"
    assert file.pread_nowait(3, 0) == b"abc"
    assert file.pread_nowait(3, 50) == b""


def test_pread_nowait_says_none_where_the_disk_would_be_needed(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.pwrite(b"abcdef", 0)
    with mock.patch("os.preadv", side_effect=BlockingIOError):
        assert file.pread_nowait(3, 0) is None
    with mock.patch("os.preadv", return_value=2):  # only the first page is cached
        assert file.pread_nowait(6, 0) is None


def test_pread_nowait_reads_where_the_flag_is_unknown(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.pwrite(b"abc", 0)
    with mock.patch("os.preadv", side_effect=OSError(errno.EOPNOTSUPP, "no")) as preadv:
        assert file.pread_nowait(3, 0) == b"abc"
        assert file.pread_nowait(3, 0) == b"abc"
    assert preadv.call_count == 1


async def test_reading_and_syncing_in_a_thread(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.pwrite(b"abc", 0)
    await file.sync()
    assert await file.pread_in_thread(3, 0) == b"abc"


async def test_a_failing_sync_reaches_the_caller(tmp_path: Path) -> None:
    file = opened(tmp_path)
    with mock.patch("os.fdatasync", side_effect=OSError(errno.EIO, "disk")), pytest.raises(OSError, match="disk"):
        await file.sync()


@pytest.mark.parametrize("supported", [True, False])
def test_allocate_reserves_space(tmp_path: Path, supported: bool) -> None:
    file = opened(tmp_path)
    file.pwrite(b"abc", 0)
    failure = None if supported else OSError(errno.EOPNOTSUPP, "no")
    fake = os.posix_fallocate if supported else mock.Mock(side_effect=failure)
    with mock.patch("os.posix_fallocate", fake):
        file.allocate(2_500_000)
    assert file.size() == 2_500_000
    assert Path(file.path).stat().st_blocks * 512 >= 2_500_000
    assert file.pread(4, 0) == b"abc\0"


def test_allocate_tells_of_a_full_disk(tmp_path: Path) -> None:
    file = opened(tmp_path)
    with (
        mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "full")),
        pytest.raises(OSError, match="full"),
    ):
        file.allocate(100)


def test_a_map_sees_later_writes_and_outlives_the_descriptor(tmp_path: Path) -> None:
    file = opened(tmp_path)
    assert bytes(file.map()) == b""
    file.truncate(8)
    view = file.map()
    file.pwrite(b"abc", 2)
    file.close()
    file.close()
    assert bytes(view) == b"\0\0abc\0\0\0"
    assert view.readonly
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.pwrite(b"x", 0)


def test_write_atomic_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    files = test_env(tmp_path).files
    path = str(tmp_path / "meta")
    files.write_atomic(path, b"a longer first content")
    files.write_atomic(path, b"second")
    assert files.read_bytes(path) == b"second"
    assert files.listdir(str(tmp_path)) == ["meta"]


def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(tmp_path: Path) -> None:
    files = test_env(tmp_path).files
    path = str(tmp_path / "meta")
    files.write_atomic(path, b"first")
    with mock.patch("os.fdatasync", side_effect=OSError(errno.ENOSPC, "full")), pytest.raises(OSError, match="full"):
        files.write_atomic(path, b"second")
    assert files.read_bytes(path) == b"first"


def test_folders(tmp_path: Path) -> None:
    files = test_env(tmp_path).files
    folder = str(tmp_path / "a" / "b")
    assert files.listdir(folder) == []
    files.make_dirs(folder)
    files.make_dirs(folder)
    for name in ("2", "1"):
        files.open(f"{folder}/{name}", create=True).close()
    files.rename(f"{folder}/2", f"{folder}/3")
    assert files.listdir(folder) == ["1", "3"]
    files.unlink(f"{folder}/1")
    files.sync_dir(folder)
    files.remove_tree(str(tmp_path / "a"))
    files.remove_tree(str(tmp_path / "a"))
    assert files.listdir(str(tmp_path)) == []
    free, total = files.free_space(str(tmp_path))
    assert 0 <= free <= total


def test_the_lock_names_the_other_process_and_the_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from runtime.real import real_env\n"
        "with real_env().files.lock(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Locked) as caught:
            test_env(tmp_path).files.lock(str(tmp_path / "lock"))
        holder.kill()
    assert caught.value.pid == holder.pid
    assert f"{tmp_path} is in use by process {holder.pid};" in str(caught.value)
    with test_env(tmp_path).files.lock(str(tmp_path)):  # a killed holder leaves nothing to clean up
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_outside_of_the_data_extents_all_is_zero(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.allocate(1 << 22)
    for offset in (100_000, 1_500_000, 1_500_200, (1 << 22) - 1):
        file.pwrite(b"x", offset)
    content = bytearray(file.pread(1 << 22, 0))
    extents = file.data_extents(100_001)
    assert extents == sorted(extents)
    assert all(start >= 100_001 for start, _end in extents)
    for start, end in extents:
        content[start:end] = bytes(end - start)
    assert not any(content[100_001:])
    assert file.data_extents(1 << 22) == []


def test_where_the_system_cannot_tell_all_of_the_file_is_data(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.allocate(10_000)
    with mock.patch("os.lseek", side_effect=OSError(errno.EINVAL, "not here")):
        assert file.data_extents(10) == [(10, 10_000)]
    with mock.patch("os.lseek", side_effect=OSError(errno.EIO, "broken")), pytest.raises(OSError, match="broken"):
        file.data_extents(10)
