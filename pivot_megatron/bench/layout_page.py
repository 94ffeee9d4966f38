"""Layouts side by side as a picture and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivot_megatron.bench.layout_report import lead, tables
from pivot_megatron.bench.layout_summary import LayoutSummary
from pivot_megatron.bench.layouts import LayoutBench
from pivot_megatron.bench.plot import bar, figure_of, style
from pivot_megatron.bench.report import GIB
from pivot_megatron.bench.step_regions import SHARES
from pivot_megatron.report.page import Page, Picture, Pictures, Section, Table

_COLOURS = ("#8a8f98", "#2f6fb3", "#0f8a6a", "#d07a12", "#8a54b0", "#c9ccd1", "#e6d9a8")


def write_plot(layouts: Sequence[LayoutSummary], path: Path) -> None:
    with figure_of(3, path, height=3.0 + 0.12 * len(layouts)) as (_figure, (speed, shares, memory)):
        _marked(speed, "pairs a second", layouts)
        _stacks(shares, layouts)
        _memory(memory, layouts)


def _marked(axes: Any, title: str, layouts: Sequence[LayoutSummary]) -> None:
    for place, one in enumerate(layouts):
        bar(axes, place, one.pairs_a_second, _COLOURS[1])
    _names(axes, title, layouts)


def _stacks(axes: Any, layouts: Sequence[LayoutSummary]) -> None:
    below = [0.0] * len(layouts)
    for colour, part in zip(_COLOURS, SHARES, strict=True):
        heights = [100 * one.shares[part] for one in layouts]
        axes.bar(range(len(layouts)), heights, bottom=below, width=0.6, color=colour, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _names(axes, "share of a step's time, %", layouts)


def _memory(axes: Any, layouts: Sequence[LayoutSummary]) -> None:
    """A bar a stage."""
    for place, one in enumerate(layouts):
        width = 0.6 / len(one.peak_bytes)
        for stage, peak in enumerate(one.peak_bytes):
            axes.bar(place - 0.3 + (stage + 0.5) * width, peak / GIB, width=0.9 * width, color=_COLOURS[4])
    _names(axes, "peak memory of a rank by stage, GiB", layouts)


def _names(axes: Any, title: str, layouts: Sequence[LayoutSummary]) -> None:
    style(axes, title)
    axes.set_xticks(range(len(layouts)), [one.name for one in layouts], rotation=40, ha="right", fontsize=7)


def layouts_page(
    found: LayoutBench,
    layouts: Sequence[LayoutSummary],
    png: bytes,
    settings: Mapping[str, str],
    versions: Mapping[str, str],
) -> Page:
    sections = [
        Section(table.title, [Table(table.rows, _words(table.title))], note=_sentence(table.note))
        for table in tables(found, layouts)
    ]
    picture = Section("In pictures", [Pictures([Picture("layouts", png, {})])])
    return Page("Layouts", _sentence(lead(found)), [*sections, picture], settings, versions)


def _words(title: str) -> tuple[int, ...]:
    return (0, 1) if title == "Left out" else (0,)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""
