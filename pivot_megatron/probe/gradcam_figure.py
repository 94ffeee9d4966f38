"""Maps of one image side by side, laid over it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pivot_megatron.data.images import decode_rgb
from pivot_megatron.probe.patch_grid import Box, PatchGrid, Values
from pivot_megatron.probe.questions import Question

_WIDTH = 3.2  # of a panel, in inches


@dataclass(frozen=True)
class Panel:
    """`saliency` `[rows, columns]`, from 0 to 1. `told`: a line below `label`."""

    label: str
    saliency: Values
    grid: PatchGrid
    told: str


def write_figure(path: Path, question: Question, panels: Sequence[Panel]) -> None:
    """The image, then each panel's map over it, with the box, the question and its answers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    image = decode_rgb(question.image)
    count = 1 + len(panels)
    height = _WIDTH * min(max(image.height / image.width, 0.2), 4.0) + 1.4
    figure, axes = pyplot.subplots(1, count, figsize=(_WIDTH * count, height), layout="constrained", squeeze=False)
    first, *others = axes[0]
    _show(first, image, question.box, "image")
    for place, panel in zip(others, panels, strict=True):
        _show(place, image, question.box, f"{_wrapped(panel.label, 34)}\n{panel.told}".rstrip())
        grid = panel.grid
        edges = (0.0, grid.columns * grid.width, grid.rows * grid.height, 0.0)
        place.imshow(panel.saliency, extent=edges, cmap="jet", vmin=0.0, vmax=1.0, alpha=0.5, interpolation="bilinear")
        place.set_xlim(0, image.width)
        place.set_ylim(image.height, 0)
    pair = question.pair
    lines = (pair.question, f"chosen: {pair.chosen}", f"rejected: {pair.rejected}")
    figure.suptitle("\n".join(_wrapped(line, 44 * count) for line in lines), fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    pyplot.close(figure)
    path.write_bytes(drawn.getvalue())


def _show(axes: Any, image: Image.Image, box: Box | None, title: str) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(image, extent=(0, image.width, image.height, 0))
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()
    if box is not None:
        corner, width, height = (box.left, box.top), box.right - box.left, box.bottom - box.top
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.5))


def _wrapped(text: str, width: int) -> str:
    """Of at most three lines, with signs that matplotlib would read as mathematics left as they are."""
    lines = textwrap.wrap(" ".join(text.split()), width, max_lines=3, placeholder=" ...")
    return "\n".join(lines).replace("$", r"\$")
