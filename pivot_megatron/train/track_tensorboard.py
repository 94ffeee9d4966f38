"""TensorBoard: a run's metrics as event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pivot_megatron.train.tracking import Held


class TensorBoardTracker:
    """Numbers are in float32: TensorBoard's default server shows none in float64."""

    name = "tensorboard"

    def __init__(self, folder: Path, described: Mapping[str, str], done: int) -> None:
        """`described`: texts of what the run is, by name. `done`: the steps that the run goes on from: what was written of later
        ones is marked to be left out by whoever reads. Raises OSError where `folder` cannot be made."""
        self._state = Held(folder, "")
        self.held = min(done, self._state.step)
        self._writer = SummaryWriter(str(folder), purge_step=self.held + 1)
        for name, text in described.items():
            # Indented by four, a text is code to TensorBoard's Markdown.
            self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), self.held)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._state.up_to(step)

    def close(self, failed: bool) -> None:
        self._writer.close()
