"""Plain tables and figures for people. No rich: it costs a tenth of a second."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from runtime.processes import terminal_columns


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], columns: int | None = None) -> str:
    """Columns two spaces apart, numbers to the right. Where that is wider than `columns` (by default the terminal),
    what has no room follows below, behind the first column again.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(h), *(len(row[i]) for row in cells)) if cells else len(h) for i, h in enumerate(headings)]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headings))]

    def line(row: Sequence[str], block: Sequence[int]) -> str:
        return "  ".join(row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in block).rstrip()

    blocks = _blocks(widths, columns if columns is not None else terminal_columns())
    return "\n\n".join("\n".join([line(headings, block), *(line(row, block) for row in cells)]) for block in blocks)


def _blocks(widths: Sequence[int], columns: int | None) -> list[list[int]]:
    """Which columns stand side by side."""
    blocks: list[list[int]] = [[0]]
    for number in range(1, len(widths)):
        block = [*blocks[-1], number]
        if columns is not None and len(block) > 2 and sum(widths[i] + 2 for i in block) - 2 > columns:
            blocks.append([0, number])
        else:
            blocks[-1] = block
    return blocks


def paragraph(text: str, first: str, others: str, columns: int | None = None) -> str:
    """`text` behind `first`, broken between words where it is wider than `columns` (by default the terminal); the lines
    that follow are behind `others`.
    """
    columns = columns if columns is not None else terminal_columns()
    if columns is None:
        return first + text
    return textwrap.fill(
        text, columns, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


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
