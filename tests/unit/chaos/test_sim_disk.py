"""The simulated disk: what survives which end of a process, and what a recovery makes of it (raft.md 4.6)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import attrs
import pytest

from chaos.sim.disk import Gap, SimDisk, Unreadable
from chaos.sim.plan import Plan, draw_plan
from chaos.sim.properties import PropertyBroken
from chaos.sim.schedule import Fault
from chaos.sim.store_disk import StoreDisk
from chaos.sim.world import Build, World
from dledger.core.membership import Members, encode_members
from dledger.core.types import HEADER_BYTES, Entry, EntryType, HardState, frame_entry, next_position
from dledger.errors import LogDamaged

SEGMENT_BYTES = 4096


def quiet_plan(seed: int = 1, **changes: object) -> Plan:
    """A plan on which nothing happens by itself."""
    calm = {
        "real_store": False,
        "nodes": 3,
        "spares": 0,
        "sync": True,
        "threaded_writes": False,
        "segment_bytes": SEGMENT_BYTES,
        "drift": 0.0,
    }
    return attrs.evolve(draw_plan(seed), **{**calm, **changes})


def disk_with(
    entries: int, *, durable: int | None = None, plan: Plan | None = None, kind: type[SimDisk] = SimDisk
) -> SimDisk:
    """The disk of n0 with so many entries of about 600 bytes written, `durable` of them synced."""
    world = World(plan or quiet_plan(), (), Build(disk=kind))
    disk = world.nodes["n0"].disk
    for _ in range(entries):
        disk.log.append((next_entry(disk),))
    disk.written = entries
    disk.durable = disk.mark = disk.rows = entries if durable is None else durable
    return disk


def next_entry(disk: SimDisk, term: int = 1) -> Entry:
    log = disk.log
    crc = log.head_crc_at(log.last_index)
    assert crc is not None
    position = next_position(log.position_end, HEADER_BYTES + 536, SEGMENT_BYTES)
    return frame_entry(log.last_index + 1, term, position, EntryType.DATA, 1, (bytes(536),), crc, 0)


def test_a_killed_process_keeps_what_was_written_and_no_more() -> None:
    disk = disk_with(5, durable=2)
    disk.log.append((next_entry(disk),))
    disk.process_ended()
    assert disk.recover() == []
    assert (disk.log.last_index, disk.durable, disk.recovering) == (5, 5, False)


@pytest.mark.parametrize("seed", range(8))
def test_a_power_loss_keeps_what_was_durable_and_cuts_at_the_first_hole(seed: int) -> None:
    disk = disk_with(20, durable=8, plan=quiet_plan(seed))
    disk.process_ended()
    disk.lose_power()
    lost = sorted(disk.log.bad)
    assert disk.recover() == []
    assert disk.log.last_index == (lost[0] - 1 if lost else 20) >= 8
    assert not disk.log.bad and not disk.recovering


def test_a_power_loss_makes_a_node_with_asynchronous_flush_recover() -> None:
    disk = disk_with(5, durable=5, plan=quiet_plan(sync=False))
    disk.lose_power()
    disk.recover()
    assert disk.recovering


def test_damage_below_the_mark_is_a_gap_and_nothing_is_cut() -> None:
    disk = disk_with(9)
    before, behind = disk.log.head_crc_at(5), disk.log.peek(8)
    disk.damage([6, 7])
    assert before is not None and behind is not None
    disk.is_suspect = True
    assert disk.recover() == [Gap(6, 7, before, behind.prev_crc)]
    assert disk.log.last_index == 9 and disk.log.bad == {6, 7}


def test_damage_in_a_closed_segment_waits_for_a_read_unless_it_is_suspected() -> None:
    disk = disk_with(30)
    disk.damage([2])
    assert disk.recover() == []
    with pytest.raises(Unreadable):
        disk.log.entries(1, 1 << 20)
    disk.lose_rows()
    assert [gap.first for gap in disk.recover()] == [2]


def test_a_truncated_tail_that_was_durable_makes_the_node_recover() -> None:
    disk = disk_with(9)
    disk.damage([8, 9])
    assert disk.recover() == []
    assert disk.log.last_index == 7 and disk.recovering


def test_a_torn_tail_above_the_mark_is_cut_without_more_ado() -> None:
    disk = disk_with(9, durable=6)
    disk.log.bad.add(8)
    assert disk.recover() == []
    assert disk.log.last_index == 7 and not disk.recovering


def test_side_rows_are_evidence_where_the_mark_is_behind() -> None:
    disk = disk_with(9)
    disk.mark = 4
    disk.damage([6])
    disk.is_suspect = True
    assert [gap.first for gap in disk.recover()] == [6]


def test_the_mark_follows_the_sync_within_200_ms() -> None:
    disk = disk_with(3, durable=0)
    disk._synced(3)
    assert disk.synced_range == range(1, 1)
    disk._world.now = 0.25
    assert disk.synced_range == range(1, 4)


def test_after_a_failed_sync_only_the_platter_counts() -> None:
    disk = disk_with(9, durable=4, plan=quiet_plan(2))
    disk.has_failed = True
    assert disk.is_impaired
    disk.process_ended()
    disk.recover()
    assert not disk.has_failed and disk.log.last_index < 9


def test_a_cut_takes_marks_and_members_back() -> None:
    disk = disk_with(9)
    disk.note_config(4, Members(("n0", "n1")))
    disk.note_config(7, Members(("n0", "n1", "n2")))
    disk.cut(5)
    assert disk.configs() == [(4, Members(("n0", "n1")))]
    assert (disk.written, disk.durable, disk.mark, disk.rows) == (4, 4, 4, 4)


def test_what_a_dead_process_was_writing_does_not_come_with_the_end_of_the_faults() -> None:
    disk = disk_with(3, durable=3, plan=attrs.evolve(quiet_plan(), threaded_writes=True))
    disk.log.append((next_entry(disk),))
    disk.write()
    disk.process_ended()
    disk.heal()
    disk._world.run_until(1.0)
    assert (disk.log.last_index, disk.written, disk.durable) == (3, 3, 3)


def test_a_change_of_members_that_was_cut_is_none_of_a_trimmed_head() -> None:
    disk = disk_with(40)
    disk.note_config(30, Members(("n0", "n1")))
    disk.note_config(39, Members(("n0", "n1", "n2")))
    disk.cut(30)
    for _ in range(30):
        disk.log.append((next_entry(disk, term=2),))
    disk.trim(45)
    assert disk.configs() == []


def test_a_wiped_folder_has_no_log_no_vote_and_does_not_count() -> None:
    disk = disk_with(9)
    disk.saved = HardState(7, "n1")
    disk.wipe()
    assert disk.log.last_index == 0 and disk.saved == HardState() and disk.is_impaired


def test_an_entry_that_does_not_read_is_not_held() -> None:
    disk = disk_with(3)
    crc = disk.log.head_crc_at(2)
    assert crc is not None and disk.holds(2, crc, durable=True)
    disk.damage([2])
    assert not disk.holds(2, crc, durable=True)
    assert not disk.holds(2, crc, durable=False)


# The fault budget


def world_of(entries: int, **changes: object) -> World:
    """Three idle disks with the same log, all of it committed."""
    world = World(quiet_plan(**changes), ())
    for node in world.nodes.values():
        for _ in range(entries):
            node.disk.log.append((next_entry(node.disk),))
        disk = node.disk
        disk.written = disk.durable = disk.mark = disk.rows = entries
    world.properties.committed_index = entries
    return world


def test_one_copy_may_be_damaged_while_both_others_are_whole() -> None:
    world = world_of(9)
    a, b = world.nodes["n0"], world.nodes["n1"]
    assert world.nemesis._damage(a, [3])
    assert a.log.bad == {3}
    # The budget is used up until n0 has repaired itself.
    assert not world.nemesis._damage(b, [5])
    a.log.bad.clear()
    assert world.nemesis._damage(b, [5])


def test_no_copy_may_be_damaged_that_a_majority_does_not_have_besides() -> None:
    world = world_of(9)
    world.nodes["n2"].disk.cut(6)
    assert not world.nemesis._damage(world.nodes["n0"], [7])
    assert world.nemesis._damage(world.nodes["n0"], [4])


@pytest.mark.parametrize("rows, has_failed, is_applied", [(9, False, True), (9, True, False), (6, False, False)])
def test_a_file_is_not_cut_short_where_nothing_would_tell_of_its_end(
    rows: int, has_failed: bool, is_applied: bool
) -> None:
    world = world_of(9)
    node = world.nodes["n0"]
    node.disk.mark, node.disk.rows, node.disk.has_failed = 5, rows, has_failed
    assert (
        world.nemesis._truncate(Fault(number=1, at=0.0, kind="truncate", target="n0", seconds=1.0), node, Random(1))
        is is_applied
    )


def test_with_asynchronous_flush_only_a_minority_loses_power_at_a_time() -> None:
    world = world_of(3, sync=False)
    a, b = world.nodes["n0"], world.nodes["n1"]
    assert world.nemesis._may_lose_power(a)
    b.disk.recovering = True
    assert not world.nemesis._may_lose_power(a)
    assert world_of(3).nemesis._may_lose_power(a)


# The store's own recovery in the place of the model's


def both_judge(prepare: Callable[[SimDisk], None], *, seed: int = 1, **sizes: int) -> tuple[list[Gap], int, bool]:
    """What a start finds, by the model and by the store: it must be the same."""
    verdicts = []
    for kind in (SimDisk, StoreDisk):
        disk = disk_with(30, plan=quiet_plan(seed), kind=kind, **sizes)
        prepare(disk)
        verdicts.append(disk.judge())
    assert verdicts[0] == verdicts[1]
    return verdicts[1]


@pytest.mark.parametrize("seed", range(12))
def test_after_a_power_loss_the_store_finds_what_the_model_finds(seed: int) -> None:
    def power_loss(disk: SimDisk) -> None:
        disk.process_ended()
        disk.lose_power()

    gaps, end, is_open = both_judge(power_loss, seed=seed, durable=17)
    assert not gaps and end >= 17 and not is_open


@pytest.mark.parametrize("damaged", [[27], [25, 26], [24, 27], [30], [29, 30]], ids=str)
def test_of_damaged_entries_the_store_finds_what_the_model_finds(damaged: list[int]) -> None:
    gaps, end, is_open = both_judge(lambda disk: disk.damage(damaged))
    assert is_open == (30 in damaged)
    assert sum(gap.last - gap.first + 1 for gap in gaps) + (30 - end) == len(damaged)


def test_the_store_too_looks_at_closed_segments_only_when_they_are_suspect() -> None:
    assert both_judge(lambda disk: disk.damage([2])) == ([], 30, False)

    def suspected(disk: SimDisk) -> None:
        disk.damage([2])
        disk.is_suspect = True

    gaps, end, is_open = both_judge(suspected)
    assert [(gap.first, gap.last) for gap in gaps] == [(2, 2)] and (end, is_open) == (30, False)


def test_the_store_begins_behind_a_trimmed_head() -> None:
    def trimmed(disk: SimDisk) -> None:
        disk.log.trim(disk.segment_of(1).stop - 1)
        disk.damage([28])
        disk.is_suspect = True

    gaps, _, _ = both_judge(trimmed)
    assert [(gap.first, gap.last) for gap in gaps] == [(28, 28)]


def test_a_log_that_the_store_refuses_breaks_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise LogDamaged("a frame of version 9")

    monkeypatch.setattr("chaos.sim.store_disk.recover_log", refuses)
    with pytest.raises(PropertyBroken, match="recovery refuses: n0 has a frame of version 9"):
        disk_with(3, kind=StoreDisk).recover()


def test_a_front_that_a_repair_writes_brings_its_members() -> None:
    """Entries that this node may never have had."""
    disk = disk_with(9)
    world, node = disk._world, disk._node
    logs = {"n1": range(1, 6), "n2": range(1, 5)}
    for name, indexes in logs.items():
        peer = world.nodes[name]
        peer.log.append([entry for index in indexes if (entry := disk.log.peek(index)) is not None])
        peer.is_alive = True
    one, members = world.nodes["n1"], Members(("n0", "n1"))
    crc = one.log.head_crc_at(5)
    assert crc is not None
    position, body = next_position(one.log.position_end, HEADER_BYTES + 536, SEGMENT_BYTES), encode_members(members)
    one.log.append([frame_entry(6, 2, position, EntryType.CONFIG, 0, (body,), crc, 0)])
    one.disk.written = 6
    disk.damage([6, 7])
    disk.is_suspect = True
    node._repair(node.incarnation, disk.recover())
    assert disk.log.last_index == 6 and disk.recovering
    assert disk.configs() == [(6, members)]
