"""Steps shown as they happen: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pivot_megatron.train.step import StepResult

SECONDS_BETWEEN_LINES = 15.0


def _shown(result: StepResult) -> dict[str, str]:
    values = {"loss": f"{result.loss:.4f}"}
    if "reward_accuracy" in result.metrics:
        values["accuracy"] = f"{result.metrics['reward_accuracy']:.2f}"
    return values


@contextmanager
def show_steps(name: str) -> Iterator[Callable[[int, int, StepResult], None]]:
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=name, unit="step") as bar:

            def on_bar(done: int, total: int, result: StepResult) -> None:
                bar.total = total
                bar.set_postfix(_shown(result), refresh=False)
                bar.update(done - bar.n)

            yield on_bar
        return
    last = time.monotonic()

    def as_line(done: int, total: int, result: StepResult) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or done == total:
            last = time.monotonic()
            values = " ".join(f"{key} {value}" for key, value in _shown(result).items())
            print(f"{name}: step {done}/{total} {values}", file=sys.stderr, flush=True)

    yield as_line
