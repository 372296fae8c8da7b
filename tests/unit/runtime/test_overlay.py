"""What is done over an overlay is seen through it, and the files below stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.files import RealFiles
from runtime.model import Files
from runtime.overlay import OverlayFile, OverlayFiles


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def work(files: Files, folder: str) -> None:
    """A bit of everything."""
    files.write_atomic(f"{folder}/meta", b"new meta")
    segment = files.open(f"{folder}/log/0")
    segment.pwrite(b"X" * 10, 4090)
    segment.truncate(6000)
    segment.allocate(9000)
    files.rename(f"{folder}/log/1", f"{folder}/log/0.old")
    files.unlink(f"{folder}/log/2")
    files.make_dirs(f"{folder}/rows")
    files.open(f"{folder}/rows/0", create=True).pwritev([b"ab", b"cd"], 3)
    files.remove_tree(f"{folder}/aside")


def fill(folder: Path) -> None:
    for sub in ("log", "aside"):
        (folder / sub).mkdir(parents=True)
    (folder / "meta").write_bytes(b"old")
    for name in "012":
        (folder / "log" / name).write_bytes(name.encode() * 8192)
    (folder / "aside" / "junk").write_bytes(b"junk")


def test_nothing_below_changes_and_everything_is_seen(tmp_path: Path) -> None:
    below, twin = tmp_path / "below", tmp_path / "twin"
    fill(below)
    fill(twin)
    before = contents(below)
    overlay = OverlayFiles(RealFiles())
    work(overlay, str(below))
    work(RealFiles(), str(twin))
    assert contents(below) == before
    for sub in ("", "/log", "/rows", "/aside"):
        assert overlay.listdir(f"{below}{sub}") == sorted(name for name in RealFiles().listdir(f"{twin}{sub}")), sub
    for name, data in contents(twin).items():
        assert overlay.read_bytes(f"{below}/{name}") == data, name
    overlay.close()


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    fill(tmp_path)
    overlay = OverlayFiles(RealFiles())
    overlay.unlink(f"{tmp_path}/meta")
    for action in (overlay.open, overlay.unlink, overlay.read_bytes):
        with pytest.raises(FileNotFoundError):
            action(f"{tmp_path}/meta")
    overlay.remove_tree(f"{tmp_path}/log")
    assert not overlay.exists(f"{tmp_path}/log/0")
    overlay.close()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 20_000), st.binary(min_size=1, max_size=5000)),
        st.tuples(st.just("truncate"), st.integers(0, 20_000), st.just(b"")),
        st.tuples(st.just("allocate"), st.integers(1, 20_000), st.just(b"")),
    ),
    max_size=12,
)


@given(st.binary(max_size=10_000), steps)
def test_a_file_behaves_as_a_file(start: bytes, actions: list[tuple[str, int, bytes]]) -> None:
    below = OverlayFile("below", None)
    below.pwrite(start, 0)
    file, model = OverlayFile("file", below), bytearray(start)
    for kind, number, data in actions:
        if kind == "write":
            model.extend(bytes(max(0, number + len(data) - len(model))))
            model[number : number + len(data)] = data
            file.pwrite(data, number)
        elif kind == "truncate":
            model[:] = model[:number].ljust(number, b"\0")
            file.truncate(number)
        else:
            model.extend(bytes(max(0, number - len(model))))
            file.allocate(number)
    assert file.size() == len(model)
    assert file.pread(len(model) + 5, 0) == model
    assert file.pread(4096, 1000) == model[1000:5096]
    assert below.pread(20_000, 0) == start
