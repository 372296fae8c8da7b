"""Tables and figures for people."""

from __future__ import annotations

from cli.output import ago, number, table
from cli.produce import _bodies


def test_table_aligns_text_left_and_numbers_right() -> None:
    assert table(("name", "lag"), [("n0", "1,204"), ("broker", "-")]) == "\n".join(
        ["name      lag", "n0      1,204", "broker      -"]
    )
    assert table(("name",), []) == "name"


def test_figures() -> None:
    assert (number(None), number(1204), number(0.4)) == ("-", "1,204", "0")
    assert (ago(900), ago(121_000), ago(8_000_000)) == ("0 s", "2 min", "2 h")


def test_bodies_repeat_what_is_given_or_are_numbered_to_size() -> None:
    assert list(_bodies(("a", "b"), None, 0)) == [b"a", b"b"]
    assert list(_bodies(("a", "b"), 3, 0)) == [b"a", b"b", b"a"]
    assert list(_bodies((), 2, 4)) == [b"0 ..", b"1 .."]
