"""TensorBoard: a run's metrics, or reports, as event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pivot_megatron.train.tracker import Held, Subject


class TensorBoardTracker:
    """Numbers are in float32: TensorBoard's default server shows none in float64."""

    name = "tensorboard"

    def __init__(self, subject: Subject) -> None:
        """What was written of steps past those that the subject goes on from is marked to be left out by whoever reads. Raises
        OSError where the folder cannot be made."""
        folder = subject.folder / "tensorboard"
        self._state = Held(folder, "")
        self.held = min(subject.done, self._state.step)
        self._writer = SummaryWriter(str(folder), purge_step=self.held + 1)
        for name, text in subject.described.items():
            self._writer.add_text(name, _code(text), self.held)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, str | Path):
                text = str(value)
                self._writer.add_text(name, _code(text) if "\n" in text else text, step)
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._state.up_to(step)

    def close(self, failed: bool) -> None:
        self._writer.close()


def _code(text: str) -> str:
    """Indented by four, a text is code to TensorBoard's Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())
