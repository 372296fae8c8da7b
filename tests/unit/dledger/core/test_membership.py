"""Members, single steps between them, their bytes, and the history of CONFIG entries."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dledger.core.errors import LocalError
from dledger.core.membership import (
    MEMBERS_MAX,
    AddLearner,
    Change,
    ConfigHistory,
    Members,
    Promote,
    Remove,
    apply_change,
    check_single_step,
    decode_members,
    encode_members,
    promoted,
)
from dledger.core.quorum import majority

THREE = Members(["n0", "n1", "n2"], ["n3"], {"n3": ("host", 7)})

names = st.text("abcdefgh", min_size=1, max_size=2)


@st.composite
def any_members(draw: st.DrawFn) -> Members:
    voters = draw(st.sets(names, min_size=1, max_size=5))
    learners = draw(st.sets(names, max_size=4)) - voters
    known = draw(st.sets(st.sampled_from(sorted(voters | learners))))
    return Members(voters, learners, {name: (f"{name}.example", draw(st.integers(1, 65535))) for name in known})


@settings(max_examples=30)
@given(any_members())
def test_what_is_encoded_is_decoded(members: Members) -> None:
    assert decode_members(memoryview(encode_members(members))) == members


@settings(max_examples=30)
@given(any_members())
def test_equal_members_have_equal_bytes_and_hashes(members: Members) -> None:
    again = Members(reversed(members.voters), reversed(members.learners), dict(reversed(members.addresses.items())))
    assert again == members and hash(again) == hash(members) and encode_members(again) == encode_members(members)


@given(st.binary(max_size=40))
def test_garbage_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        decode_members(body)


@settings(max_examples=30)
@given(any_members(), st.data())
def test_no_shortened_or_lengthened_body_is_read(members: Members, data: st.DataObject) -> None:
    body = encode_members(members)
    for wrong in (body[: data.draw(st.integers(0, len(body) - 1))], body + b"\x00"):
        with pytest.raises(ValueError):
            decode_members(wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        [],
        [1, ["a"], []],
        [True, ["a"], [], []],
        [2, ["a"], [], []],
        [1, [], [], []],
        [1, [], ["a"], []],
        [1, "ab", [], []],
        [1, [1], [], []],
        [1, [""], [], []],
        [1, ["x" * 256], [], []],
        [1, ["b", "a"], [], []],
        [1, ["a", "a"], [], []],
        [1, ["a"], ["a"], []],
        [1, ["a"], [], {}],
        [1, ["a"], [], [["a", "h"]]],
        [1, ["a"], [], [["a", "h", "1"]]],
        [1, ["a"], [], [["a", "h", True]]],
        [1, ["a"], [], [["a", "h", 0]]],
        [1, ["a"], [], [["a", "h", 70_000]]],
        [1, ["a"], [], [["a", "", 1]]],
        [1, ["a"], [], [["b", "h", 1]]],
        [1, ["a"], [], [["a", "h", 1], ["a", "g", 1]]],
        [1, [f"n{i:02}" for i in range(MEMBERS_MAX + 1)], [], []],
    ],
)
def test_a_list_that_nobody_writes_is_refused(fields: object) -> None:
    with pytest.raises(ValueError):
        decode_members(cbor2.dumps(fields))


def test_the_changes() -> None:
    added = apply_change(THREE, AddLearner("n4", ("h4", 4)))
    assert added == Members(["n0", "n1", "n2"], ["n3", "n4"], {"n3": ("host", 7), "n4": ("h4", 4)})
    assert apply_change(THREE, Promote("n3")) == Members(["n0", "n1", "n2", "n3"], [], {"n3": ("host", 7)})
    assert apply_change(THREE, Remove("n3")) == Members(["n0", "n1", "n2"])
    assert apply_change(THREE, Remove("n0")).voters == ("n1", "n2")
    assert "n3" in THREE and "n4" not in THREE and THREE.all == ("n0", "n1", "n2", "n3")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (AddLearner("n1", ("h", 1)), "already a member"),
        (AddLearner("n3", ("h", 1)), "already a member"),
        (AddLearner("", ("h", 1)), "no name"),
        (AddLearner("x" * 300, ("h", 1)), "no name"),
        (AddLearner("n4", ("", 1)), "no address"),
        (AddLearner("n4", ("h", 0)), "no address"),
        (AddLearner("n4", ("h", 65_536)), "no address"),
        (Promote("n0"), "voter already"),
        (Promote("n9"), "joins as one first"),
        (Remove("n9"), "not a member"),
    ],
)
def test_changes_that_make_no_sense(change: Change, reason: str) -> None:
    with pytest.raises(LocalError, match=reason):
        apply_change(THREE, change)


def test_the_last_voter_stays_even_with_learners() -> None:
    with pytest.raises(LocalError, match="last voter"):
        apply_change(Members(["n0"], ["n1"]), Remove("n0"))


def test_the_group_is_bounded() -> None:
    full = Members([f"n{i}" for i in range(MEMBERS_MAX)])
    with pytest.raises(LocalError, match="at most"):
        apply_change(full, AddLearner("one more", ("h", 1)))


@given(any_members(), names, st.sampled_from(["add", "promote", "remove"]))
def test_every_change_is_a_single_step_whose_quorums_meet(members: Members, node: str, kind: str) -> None:
    change: Change = (
        AddLearner(node, ("h", 1)) if kind == "add" else Promote(node) if kind == "promote" else Remove(node)
    )
    try:
        after = apply_change(members, change)
    except LocalError:
        return
    check_single_step(members, after)
    both = {*members.voters, *after.voters}
    assert majority(len(members.voters)) + majority(len(after.voters)) > len(both)
    assert promoted(members, after) == (node if kind == "promote" else None)


@settings(max_examples=30)
@given(any_members(), any_members())
def test_a_step_that_is_allowed_is_one_of_the_changes(old: Members, new: Members) -> None:
    try:
        check_single_step(old, new)
    except LocalError:
        return
    changes: list[Change] = [AddLearner(node, ("h", 1)) for node in new.learners]
    changes += [Promote(node) for node in old.learners]
    changes += [Remove(node) for node in old.all]
    reachable = {(old.voters, old.learners)}
    for change in changes:
        try:
            after = apply_change(old, change)
        except LocalError:
            continue
        reachable.add((after.voters, after.learners))
    assert (new.voters, new.learners) in reachable


def test_addresses_may_change_without_a_step() -> None:
    check_single_step(THREE, Members(["n0", "n1", "n2"], ["n3"], {"n0": ("elsewhere", 9)}))


# History


def history(*indexes: int) -> ConfigHistory:
    return ConfigHistory(Members(["n0"]), [(index, Members(["n0"], [f"at{index}"])) for index in indexes])


def test_the_last_entry_is_in_force() -> None:
    assert (history().index, history().members) == (0, Members(["n0"]))
    assert (history(3, 7).index, history(3, 7).members.learners) == (7, ("at7",))


def test_a_cut_brings_back_what_was_before() -> None:
    configs = history(3, 7)
    assert not configs.cut(8) and configs.index == 7
    assert configs.cut(7) and configs.index == 3
    assert configs.cut(1) and configs.index == 0
    assert not configs.cut(1) and configs.members == Members(["n0"])


def test_what_was_in_force_at_an_index() -> None:
    configs = history(3, 7)
    assert [configs.at(index).learners for index in (0, 2, 3, 6, 7, 99)] == [
        (),
        (),
        ("at3",),
        ("at3",),
        ("at7",),
        ("at7",),
    ]
    assert [index for index, _ in configs.above(3)] == [7]


def test_what_is_settled_is_forgotten_but_for_the_last_ones() -> None:
    indexes = range(3, 103, 3)
    configs = history(*indexes)
    configs.settle(80)
    assert [index for index, _ in configs.above(-1)] == [index for index in indexes if index >= 78 - 3 * 16]
    assert configs.latest(80) == (78, configs.at(78)) and configs.latest(29) is None
    configs.settle(1000)
    assert configs.index == 102 and [index for index, _ in configs.above(-1)] == list(indexes)[-17:]


@pytest.mark.parametrize("indexes", [(3, 3), (4, 2), (0,)])
def test_entries_out_of_order_are_refused(indexes: tuple[int, ...]) -> None:
    with pytest.raises(LocalError, match="out of order"):
        history(*indexes)
