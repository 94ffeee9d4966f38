"""A comparison as a picture: speed and memory of each setting, and the operations that each needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from pivot_megatron.bench.contenders import SIDES
from pivot_megatron.bench.peers import Comparison
from pivot_megatron.bench.report import GIB, TERA
from pivot_megatron.bench.spread import Spread
from pivot_megatron.model.flops import Flops

_COLOURS = ("#2f6fb3", "#d07a12", "#0f8a6a", "#8a54b0", "#b8903a", "#c2453c")


@contextmanager
def figure_of(charts: int, path: Path, height: float = 3.4) -> Iterator[tuple[Any, Any]]:
    """A figure and its charts, side by side, which is then written to `path`. `height` in inches."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, charts, figsize=(11, height), layout="constrained")
    yield figure, axes
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_plot(found: Comparison, path: Path) -> None:
    with figure_of(3, path) as (figure, (speed, memory, flops)):
        _bars(speed, "pairs a second", found, {name: one.pairs_a_second for name, one in found.results.items()})
        _bars(memory, "peak memory, GiB", found, {name: one.peak_bytes for name, one in found.results.items()}, GIB)
        _stacks(flops, found)
        figure.suptitle(
            f"{found.wanted.shape.name}, {found.wanted.shape.pairs_a_step} pairs a step, rounds: {found.wanted.rounds}",
            fontsize=10,
        )


def _bars(axes: Any, title: str, found: Comparison, spreads: Mapping[str, Spread], unit: float = 1.0) -> None:
    for place, (name, one) in enumerate(spreads.items()):
        bar(axes, place, one, _COLOURS[SIDES.index(found.contenders[name].side)], unit)
    axes.set_xticks(range(len(spreads)), spreads)
    style(axes, title)


def bar(axes: Any, place: int, found: Spread, colour: str, unit: float = 1.0) -> None:
    """At the median over rounds, with a line from the lowest to the highest."""
    low, median, high = (value / unit for value in astuple(found))
    axes.bar(place, median, width=0.6, color=colour, alpha=0.5)
    axes.plot([place, place], [low, high], color=colour, marker="_")


def _stacks(axes: Any, found: Comparison) -> None:
    names = list(found.flops)
    below = [0.0] * len(names)
    for colour, part in zip(_COLOURS, (field.name for field in fields(Flops)), strict=True):
        heights = [getattr(found.flops[name], part) / TERA for name in names]
        axes.bar(range(len(names)), heights, bottom=below, width=0.6, color=colour, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
    axes.legend(frameon=False, fontsize=7)
    style(axes, "TFLOP a step, by count")


def style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
