"""How fast finished runs were, from the metrics that they wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from pivot_megatron.errors import UserError
from pivot_megatron.train.run_folder import read_metrics

WARM_UP = 5
"""Steps of each run that are not counted: kernels are chosen, caches fill."""


@dataclass(frozen=True)
class RunSpeed:
    """Medians over the steps counted, of all processes together; `flops_a_second` by count, see `model/flops.py`; `data_share` is
    the time waited for data. `steps` 0: the run wrote too few for a figure."""

    run: str
    steps: int
    seconds: float
    pairs_a_second: float
    tokens_a_second: float
    flops_a_second: float
    data_share: float


def speed_of(run: Path) -> RunSpeed:
    """Raises UserError where `run` is no run's folder."""
    try:
        lines = read_metrics(run)[WARM_UP:]
    except FileNotFoundError:
        raise UserError(f"{run}: expected a run's folder, found no metrics.jsonl; has it made a step?") from None
    if not lines:
        return RunSpeed(str(run), 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return RunSpeed(
        str(run),
        len(lines),
        median(line["step_seconds"] for line in lines),
        median(line["pairs"] / line["step_seconds"] for line in lines),
        median(line["tokens"] / line["step_seconds"] for line in lines),
        median(line["flops"] / line["step_seconds"] for line in lines),
        median(line["data_seconds"] / line["step_seconds"] for line in lines),
    )


def as_text(speeds: Sequence[RunSpeed]) -> str:
    width = max(len(speed.run) for speed in speeds)
    rows = [f"{'run':<{width}}{'steps':>7}{'s/step':>9}{'pairs/s':>10}{'tokens/s':>11}{'TFLOP/s':>10}{'data':>7}"]
    for speed in speeds:
        figures = (
            f"{speed.seconds:>9.3f}{speed.pairs_a_second:>10.2f}{speed.tokens_a_second:>11.0f}"
            f"{speed.flops_a_second / 1e12:>10.3g}{speed.data_share:>7.1%}"
            if speed.steps
            else f"  fewer than {WARM_UP + 1} steps"
        )
        rows.append(f"{speed.run:<{width}}{speed.steps:>7}{figures}")
    return "\n".join(rows)


def as_json(speeds: Sequence[RunSpeed]) -> str:
    return json.dumps([asdict(speed) for speed in speeds], indent=2)
