"""Rounds of reads by index, without a group around them."""

from __future__ import annotations

from dledger.core.read_index import ReadRounds


def test_a_round_needs_later_answers_of_a_quorum() -> None:
    reads = ReadRounds()
    assert reads.waiting == 0 and not reads.is_round_due
    reads.add(1)
    reads.add(2)
    assert reads.is_round_due and reads.waiting == 2
    assert reads.finish("a", "abc", {"b": 99, "c": 99}) == (0, []), "no round has begun"
    reads.begin(40, {"b": 5, "c": 9})
    assert not reads.is_round_due and reads.waiting == 2
    assert reads.finish("a", "abc", {"b": 5, "c": 9}) == (0, [])
    assert reads.finish("a", "abcde", {"b": 6, "c": 9}) == (0, [])
    assert reads.finish("a", "abc", {"b": 6, "c": 9}) == (40, [1, 2])
    assert reads.finish("a", "abc", {"b": 6, "c": 9}) == (0, []) and reads.waiting == 0


def test_a_node_that_is_no_voter_does_not_count_itself() -> None:
    reads = ReadRounds()
    reads.add(1)
    reads.begin(40, {"b": 5, "c": 5})
    assert reads.finish("a", "bc", {"b": 6, "c": 5}) == (0, [])
    assert reads.finish("a", "bc", {"b": 6, "c": 6}) == (40, [1])


def test_a_voter_that_the_round_did_not_ask_does_not_count() -> None:
    reads = ReadRounds()
    reads.add(1)
    reads.begin(40, {"b": 5})
    assert reads.finish("a", "abcd", {"c": 9, "d": 9}) == (0, [])


def test_giving_up_returns_each_once() -> None:
    reads = ReadRounds()
    reads.add(1)
    reads.begin(40, {"b": 5})
    reads.add(2)
    assert reads.give_up() == [1, 2] and reads.waiting == 0
    assert reads.give_up() == [] and reads.finish("a", "a", {}) == (0, [])
