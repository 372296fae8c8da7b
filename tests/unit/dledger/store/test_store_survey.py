"""What the survey of a log's segments says of each of them, check by check (raft.md 4.6)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dledger.store.rows import ROW_BYTES, last_row
from dledger.store.segments import Segment, open_segment, segment_name
from dledger.store.survey import Survey, row_fits_frame
from dledger.store.walk import UNPROVEN, Standing
from runtime.files import RealFiles
from tests.unit.dledger.store.store_kit import SEGMENT, copied, make_unreadable
from tests.unit.dledger.store.test_store_recovery import Logs, inflict

SUPERSEDED = Standing(is_superseded=True)
FRAMES = Standing(frames=True)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logs]:
    yield Logs(tmp_path_factory.mktemp("logs"))


class Folder:
    """A copy of a log, some files of which are another log's."""

    def __init__(self, logs: Logs, *replaced: tuple[str, int, str]) -> None:
        self._logs = logs
        self.path = copied(logs.folder / "whole", logs.folder / "surveyed")
        for sub, number, kind in replaced:
            inflict(self.path, logs, (sub, number, kind, 0, SEGMENT))
        self.segments: list[Segment] = []

    def file(self, sub: str, number: int) -> Path:
        return self.path / sub / segment_name(number * SEGMENT)

    def change(self, sub: str, number: int, offset: int, data: bytes) -> None:
        with self.file(sub, number).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def survey(self, *numbers: int, mark: int = 0) -> Survey:
        self.segments = [open_segment(RealFiles(), str(self.path), each * SEGMENT, SEGMENT) for each in numbers]
        return Survey(self.segments, mark)

    def close(self) -> None:
        for segment in self.segments:
            segment.close()


def standing(logs: Logs, *replaced: tuple[str, int, str], of: int = 2, last: int = 4, mark: int = 0) -> Standing:
    folder = Folder(logs, *replaced)
    try:
        return folder.survey(*range(last + 1), mark=mark).standing(of)
    finally:
        folder.close()


def no_rows(number: int) -> tuple[str, int, str]:
    return "rows", number, "truncate"


def pair(number: int, kind: str) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
    return ("log", number, kind), ("rows", number, kind)


def test_a_segment_that_the_next_one_goes_on_from_is_proven(logs: Logs) -> None:
    assert standing(logs) == Standing(frames=True, rows=True)
    assert standing(logs, no_rows(2)) == FRAMES
    assert standing(logs, of=4) == UNPROVEN, "nothing follows"


def test_what_lies_behind_a_lost_segment_proves_nothing(logs: Logs) -> None:
    folder = Folder(logs)
    assert folder.survey(0, 1, 3, 4).standing(1) == UNPROVEN
    folder.close()


@pytest.mark.parametrize("kind", ["stale", "foreign", "older"])
def test_a_whole_file_that_ends_otherwise_is_superseded_with_its_rows(logs: Logs, kind: str) -> None:
    number = 3 if kind == "older" else 2
    assert standing(logs, *pair(number, kind), of=number) == SUPERSEDED


def test_neither_a_damaged_file_nor_one_with_the_right_rows_is_superseded(logs: Logs) -> None:
    assert standing(logs, ("log", 2, "foreign")) == Standing(rows=True)
    folder = Folder(logs, *pair(2, "foreign"))
    folder.change("log", 2, SEGMENT - 1, b"?")
    assert folder.survey(*range(5)).standing(2) == UNPROVEN
    folder.close()


def test_frames_are_found_behind_a_damaged_one(logs: Logs) -> None:
    folder = Folder(logs, no_rows(2))
    folder.change("log", 2, 70, b"?")
    assert folder.survey(*range(5)).standing(2) == FRAMES
    folder.close()


def test_a_superseded_segment_tells_nothing_of_the_one_before_it(logs: Logs) -> None:
    assert standing(logs, *pair(2, "foreign"), of=1) == UNPROVEN


def test_a_first_frame_without_a_row_does_not_outvote_rows_before_it(logs: Logs) -> None:
    assert standing(logs, ("log", 2, "foreign"), ("log", 3, "foreign"), no_rows(3), last=3) == UNPROVEN
    assert standing(logs, ("log", 2, "foreign"), no_rows(2), ("log", 3, "foreign"), no_rows(3), last=3) == FRAMES


def test_the_last_segment_is_a_strong_witness_only_where_it_reaches_the_durable_mark(logs: Logs) -> None:
    assert standing(logs, *pair(3, "foreign"), last=3) == SUPERSEDED
    assert standing(logs, *pair(3, "foreign"), last=3, mark=1000) == UNPROVEN


def test_strength_comes_from_a_row_or_from_a_strong_witness_behind(logs: Logs) -> None:
    other = pair(2, "foreign")
    assert standing(logs, *other, no_rows(3)) == SUPERSEDED, "its frames lead to the segment behind it"
    assert standing(logs, *other, no_rows(3), no_rows(4)) == UNPROVEN, "nor has that one a row"
    assert standing(logs, *other, ("rows", 3, "foreign")) == SUPERSEDED, "rows that frames refute do not count"


def test_a_first_frame_that_side_rows_refute_is_no_witness(logs: Logs) -> None:
    others = ("log", 2, "foreign"), no_rows(2)
    assert standing(logs, *others, ("log", 3, "foreign"), last=3) == UNPROVEN
    folder = Folder(logs, *others, ("log", 3, "foreign"))
    rows = folder.file("rows", 3)
    rows.write_bytes(bytes(rows.stat().st_size - ROW_BYTES) + rows.read_bytes()[-ROW_BYTES:])
    survey = folder.survey(*range(5))
    assert survey.standing(3) == Standing(rows=True), "the last row is the one that the next segment tells of"
    assert survey.standing(2) == UNPROVEN
    folder.close()


@pytest.mark.parametrize("where", [0, SEGMENT - 100])
def test_a_file_that_cannot_be_read_whole_is_not_superseded(
    logs: Logs, monkeypatch: pytest.MonkeyPatch, where: int
) -> None:
    folder = Folder(logs, ("log", 2, "foreign"), no_rows(2))
    with monkeypatch.context() as patch:
        make_unreadable(patch, 2 * SEGMENT, where, where)
        assert folder.survey(*range(5)).standing(2) == UNPROVEN
    folder.segments[2].is_readable = False  # as somebody has found out before
    assert Survey(folder.segments, 0).standing(2) == SUPERSEDED and not folder.segments[2].is_readable
    folder.close()


def test_a_row_fits_the_very_frame_it_tells_of(logs: Logs) -> None:
    folder = Folder(logs)
    folder.survey(*range(5))
    segment = folder.segments[2]
    row = last_row(segment.rows)
    assert row is not None and row_fits_frame(segment, row)
    for wrong in (
        msgspec.structs.replace(row, head_crc=row.head_crc ^ 1),
        msgspec.structs.replace(row, index=row.index + 1),
        msgspec.structs.replace(row, position=row.position - SEGMENT),
        msgspec.structs.replace(row, position=segment.base - 5000),
        msgspec.structs.replace(row, position=segment.end - 10),
        msgspec.structs.replace(row, length=row.length - 1),
    ):
        assert not row_fits_frame(segment, wrong)
    # The same bytes in another place: a frame says itself where it lies.
    first = next(entry for entry in logs.entries if entry.position == segment.base)
    segment.file.pwrite(first.frame, 5)
    moved = msgspec.structs.replace(
        row, index=first.index, head_crc=first.head_crc, length=len(first.frame), position=segment.base + 5
    )
    assert not row_fits_frame(segment, moved)
    folder.close()
