"""Where the demo's things lie, and which runs and models it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.recipe.demo_scale import DemoScale

RUNS = ("align", "pretrain", "sft", "dpo")
MODELS = {"base": "pretrain", "sft": "sft", "dpo": "dpo"}
"""The models that are compared, and the runs whose newest checkpoints they are."""


@dataclass(frozen=True)
class Demo:
    """`out` holds `data`, `checkpoints` (Hugging Face folders), `runs`, `export`, `features` (kept for probes), `gradcam` and
    `phases`."""

    out: Path
    processes: int
    scale: DemoScale

    @property
    def encoder(self) -> Path:
        """The encoder that everything starts from."""
        return self.checkpoint("encoder")

    @property
    def llm(self) -> Path:
        return self.checkpoint("llm")

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / name

    def data(self, kind: str) -> Path:
        return self.out / "data" / kind

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def export(self, model: str, part: str) -> Path:
        return self.out / "export" / model / part
