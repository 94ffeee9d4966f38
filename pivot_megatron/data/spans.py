"""Which bytes of a tar are asked for together."""

from __future__ import annotations

from collections.abc import Iterable

from pivot_megatron.data.members import Span

MOST_GAP = 1 << 16
"""Bytes between two members that are read along with them: between neighbours lies a header or two, and a request for the
second would take longer than these bytes do."""


def joined(spans: Iterable[Span], most_gap: int = MOST_GAP) -> list[Span]:
    """The fewest spans that hold all of these, with at most `most_gap` bytes between any two that are read as one."""
    runs: list[Span] = []
    for span in sorted(spans, key=lambda span: span.offset):
        last = runs[-1] if runs else None
        if last is None or span.offset - last.end > most_gap:
            runs.append(span)
        else:
            runs[-1] = Span(last.offset, max(last.end, span.end) - last.offset)
    return runs
