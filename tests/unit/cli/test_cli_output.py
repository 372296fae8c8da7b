"""Tables and figures for people."""

from __future__ import annotations

from cli.output import ago, number, paragraph, table
from cli.produce import _bodies


def test_table_aligns_text_left_and_numbers_right() -> None:
    assert table(("name", "lag"), [("n0", "1,204"), ("broker", "-")]) == "\n".join(
        ["name      lag", "n0      1,204", "broker      -"]
    )
    assert table(("name",), []) == "name"


def test_what_is_wider_than_the_terminal_is_not_cut() -> None:
    rows = [("n0", "follower", "1,204,567", "10.0.0.4:10911"), ("n1", "leader", "1,204,567", "10.0.0.5:10911")]
    shown = table(("node", "role", "last", "listen"), rows, 32)
    assert shown.splitlines() == [
        "node  role           last",
        "n0    follower  1,204,567",
        "n1    leader    1,204,567",
        "",
        "node  listen",
        "n0    10.0.0.4:10911",
        "n1    10.0.0.5:10911",
    ]
    assert table(("node", "role", "last", "listen"), rows, 41) == table(("node", "role", "last", "listen"), rows)
    assert paragraph("a few long words", "ok  ", "    ", 12).splitlines() == ["ok  a few", "    long", "    words"]
    assert paragraph("a few long words", "ok  ", "    ") == "ok  a few long words"


def test_figures() -> None:
    assert (number(None), number(1204), number(0.4)) == ("-", "1,204", "0")
    assert (ago(900), ago(121_000), ago(8_000_000)) == ("0 s", "2 min", "2 h")


def test_bodies_repeat_what_is_given_or_are_numbered_to_size() -> None:
    assert list(_bodies(("a", "b"), None, 0)) == [b"a", b"b"]
    assert list(_bodies(("a", "b"), 3, 0)) == [b"a", b"b", b"a"]
    assert list(_bodies((), 2, 4)) == [b"0 ..", b"1 .."]
