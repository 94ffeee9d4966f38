"""A plan as pictures: where time and memory of its best layouts go, and how its speed grows with devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import cycle
from pathlib import Path
from typing import Any

from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.hardware import GIB
from pivot_megatron.plan.limits import spent
from pivot_megatron.plan.memory import Memory
from pivot_megatron.plan.scaling import Point, Scaling

_COLOURS = (
    "#2f6fb3",
    "#d07a12",
    "#0f8a6a",
    "#8a54b0",
    "#b8903a",
    "#c2453c",
    "#5fa3d9",
    "#7b8088",
    "#44484f",
    "#b0679b",
)


def write_plan_plot(estimates: Sequence[Estimate], path: Path) -> None:
    """Stacked bars, one a layout: seconds of a step, and memory of the fullest stage beside what is usable."""
    figure, (time, memory) = _figure(2, 3.8)
    names = [f"{n}: {e.layout.tensor} x {e.layout.pipeline} x {e.data_parallel}" for n, e in enumerate(estimates, 1)]
    _stacks(time, names, [spent(found) for found in estimates])
    _style(time, "seconds of a step")
    _stacks(memory, names, [_memory(found) for found in estimates])
    usable = estimates[0].machine.memory / GIB
    memory.axhline(usable, color="#44484f", linewidth=1, linestyle="--")
    memory.annotate(f"usable: {usable:.1f}", (len(names) - 0.5, usable), fontsize=7, ha="right", va="bottom")
    _style(memory, "GiB of a rank, on the fullest stage")
    _write(figure, path)


def write_scaling_plot(found: Scaling, path: Path) -> None:
    figure, (speed, utilisation) = _figure(2, 3.4)
    for colour, (name, points) in zip(_COLOURS, (("strong", found.strong), ("weak", found.weak)), strict=False):
        known = [(point.gpus, point.best) for point in points if point.best]
        gpus = [count for count, _ in known]
        label = {"strong": "the run's global batch", "weak": "as many samples a device"}[name]
        speed.plot(
            gpus, [best.samples_a_second for _, best in known], color=colour, marker="o", markersize=3, label=label
        )
        utilisation.plot(gpus, [100 * best.utilisation for _, best in known], color=colour, marker="o", markersize=3)
    speed.plot(*_ideal(found.strong), color="#7b8088", linestyle=":", label="ideal")
    speed.set_yscale("log")
    for axes, title in ((speed, "samples a second"), (utilisation, "MFU, per cent")):
        axes.set_xscale("log", base=2)
        counts = [point.gpus for point in found.strong]
        axes.set_xticks(counts, [f"{count}" for count in counts])
        axes.set_xlabel("devices", fontsize=8)
        _style(axes, title)
    utilisation.set_ylim(bottom=0)
    speed.legend(frameon=False, fontsize=7)
    _write(figure, path)


def _ideal(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    """As many times the first's as there are devices more."""
    first = next((point for point in points if point.best), None)
    if first is None or first.best is None:
        return [], []
    gpus = [point.gpus for point in points if point.gpus >= first.gpus]
    return gpus, [first.best.samples_a_second * count / first.gpus for count in gpus]


def _memory(found: Estimate) -> dict[str, float]:
    fullest = found.stages[found.fullest].memory
    return {field.name: getattr(fullest, field.name) / GIB for field in fields(Memory)}


def _stacks(axes: Any, names: Sequence[str], bars: Sequence[Mapping[str, float]]) -> None:
    below = [0.0] * len(bars)
    for colour, part in zip(cycle(_COLOURS), bars[0], strict=False):
        heights = [bar[part] for bar in bars]
        if any(heights):
            axes.bar(range(len(bars)), heights, bottom=below, width=0.6, color=colour, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    axes.set_xlabel("rank: tensor x pipeline x data", fontsize=8)


def _figure(columns: int, height: float) -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(10, height), layout="constrained")


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _write(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
