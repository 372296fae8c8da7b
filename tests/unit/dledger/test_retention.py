"""What the leader trims, and how every node follows: decisions on paper first, then whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from dledger.config import GroupConfig
from dledger.core.types import EntryType, frame_entry
from dledger.retention import Closed, Plan, Situation, decide, decode_trim, encode_trim, trim_base

HOUR_MS = 3_600_000
NOW_MS = 1_700_000_000_000
SEGMENT = 65_536


def config(**settings: Any) -> GroupConfig:
    return GroupConfig(
        cluster="c", group="g", node_id="n0", peers={"n0": ("127.0.0.1", 1)}, data_dir="/nowhere", **settings
    )


def situation(ages_hours: Sequence[float | None], **changes: Any) -> Situation:
    segments = [
        Closed(number * SEGMENT, (number + 1) * SEGMENT, None if age is None else NOW_MS - int(age * HOUR_MS))
        for number, age in enumerate(ages_hours)
    ]
    known = Situation(
        now_ms=NOW_MS,
        hour=4,
        segments=segments,
        first_position=0,
        end_position=(len(ages_hours) + 3) * SEGMENT,
        floor=1 << 60,
        disk_free=50,
        disk_total=100,
    )
    return evolve(known, **changes)


def test_segments_older_than_the_retention_go_at_the_hour_of_deletion() -> None:
    now = situation([80, 73, 71, 10])
    assert decide(config(), now) == Plan(2 * SEGMENT, False, "older than 72 hours")
    assert decide(config(), evolve(now, hour=5)) is None, "at another hour they stay"
    assert decide(config(delete_hour=-1), evolve(now, hour=5)) == Plan(2 * SEGMENT, False, "older than 72 hours")
    assert decide(config(), evolve(now, hour=5), is_manual=True) == Plan(2 * SEGMENT, False, "older than 72 hours")
    assert decide(config(retention_hours=72.5), situation([72.4])) is None


def test_a_segment_whose_age_is_unknown_stays_and_so_does_all_behind_it() -> None:
    assert decide(config(), situation([80, None, 79])) == Plan(SEGMENT, False, "older than 72 hours")
    assert decide(config(), situation([None, 80])) is None


def test_above_the_first_watermark_what_is_old_enough_goes_at_any_hour() -> None:
    now = situation([80, 10], hour=12, disk_free=25)
    assert decide(config(), now) is None, "at the mark, not above it"
    assert decide(config(), evolve(now, disk_free=24)) == Plan(SEGMENT, False, "older than 72 hours")


def test_above_the_second_watermark_the_oldest_go_whatever_their_age_and_no_more_than_needed() -> None:
    total = 100 * SEGMENT
    now = situation([1, 1, 1, 1], hour=12, disk_total=total, disk_free=13 * SEGMENT, floor=0)
    plan = decide(config(), now)
    assert plan == Plan(2 * SEGMENT, True, "the disk is 87% full"), "two segments bring it back to 85 %"
    assert decide(config(), evolve(now, disk_free=15 * SEGMENT)) is None
    everything = decide(config(), evolve(now, disk_free=0))
    assert everything is not None and everything.position == 4 * SEGMENT


def test_the_size_of_the_log_is_limited_when_asked_for() -> None:
    now = situation([1, 1, 1, 1], hour=12)
    assert decide(config(), now) is None
    plan = decide(config(retention_bytes=5 * SEGMENT), now)
    assert plan == Plan(2 * SEGMENT, False, f"the log holds more than {5 * SEGMENT} bytes")
    assert decide(config(retention_bytes=7 * SEGMENT), now) is None
    aged = decide(config(retention_bytes=6 * SEGMENT), situation([80, 80, 1, 1]))
    assert aged == Plan(2 * SEGMENT, False, "older than 72 hours"), "what is old already makes it small enough"


def test_what_the_machine_needs_stays_unless_forced() -> None:
    now = situation([80, 80, 80], floor=2 * SEGMENT - 1)
    assert decide(config(), now) == Plan(SEGMENT, False, "older than 72 hours")
    assert decide(config(), evolve(now, floor=SEGMENT - 1)) is None
    assert decide(config(retention_bytes=1), evolve(now, floor=SEGMENT - 1)) is None
    forced = decide(config(), evolve(now, floor=0, disk_free=1, disk_total=100))
    assert forced is not None and forced.is_forced


def test_what_is_given_up_already_is_not_given_up_again() -> None:
    assert decide(config(), situation([80, 80], first_position=2 * SEGMENT)) is None
    assert decide(config(), situation([])) is None
    plan = decide(config(), situation([1, 1, 1], first_position=SEGMENT, disk_free=1, disk_total=100))
    assert plan is not None and plan.position == 2 * SEGMENT


def test_the_body_of_a_trim_says_where_and_whether_it_was_forced() -> None:
    body = encode_trim(0x0102030405, is_forced=True)
    assert body == bytes.fromhex("0504030201000000" + "01")
    assert decode_trim(body) == (0x0102030405, True)
    assert decode_trim(encode_trim(7, is_forced=False)) == (7, False)
    with pytest.raises(ValueError, match="8 bytes"):
        decode_trim(body[:8])


def test_a_trim_keeps_the_segment_of_its_byte_and_its_own() -> None:
    def trim(position: int) -> Any:
        return frame_entry(9, 1, 5 * SEGMENT + 100, EntryType.TRIM, 0, [encode_trim(position, is_forced=False)], 0, 0)

    assert trim_base(trim(2 * SEGMENT), SEGMENT) == 2 * SEGMENT
    assert trim_base(trim(3 * SEGMENT - 1), SEGMENT) == 2 * SEGMENT
    assert trim_base(trim(1 << 50), SEGMENT) == 5 * SEGMENT, "never past itself"
