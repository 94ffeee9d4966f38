"""Tables for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines, columns as wide as their longest cell."""
    widths = _widths(heads, rows)
    return [
        _line(heads, widths, "  ").rstrip(),
        "  ".join("-" * width for width in widths),
        *(_line(row, widths, "  ").rstrip() for row in rows),
    ]


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same in Markdown, which reads as well in a terminal."""
    widths = _widths(heads, rows)
    rule = ["-" * width for width in widths]
    return [f"| {_line(cells, widths, ' | ')} |" for cells in (heads, rule, *rows)]


def _widths(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]


def _line(cells: Sequence[str], widths: Sequence[int], between: str) -> str:
    return between.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
