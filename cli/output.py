"""Plain tables and figures for people. No rich: it costs a tenth of a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns two spaces apart, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(h), *(len(row[i]) for row in cells)) if cells else len(h) for i, h in enumerate(headings)]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()

    return "\n".join([line(headings), *(line(row) for row in cells)])


def _is_number(text: str) -> bool:
    return not text.strip("0123456789,.-") and text != ""


def number(value: int | float | None) -> str:
    """1,204, or a dash for what is not known."""
    return "-" if value is None else f"{value:,.0f}"


def ago(elapsed_ms: int) -> str:
    """'3 s', '12 min', '4 h' since then."""
    seconds = elapsed_ms // 1000
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h"
