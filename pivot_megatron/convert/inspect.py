"""`pivot checkpoint inspect`: where its run stood, what model it holds, and whether it is still as it was written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pivot_megatron.checkpoints.commands import layout, size
from pivot_megatron.checkpoints.folder import Saved, facts_of, resolve_checkpoint, saved_of
from pivot_megatron.checkpoints.manifest import Manifest
from pivot_megatron.convert.plan import COMPONENTS, part_shapes
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import UserError


@dataclass(frozen=True)
class Inspection:
    """`damage`: the first file that is not as it was written; where there is one, `components` are not read. `saved`: None of an
    import. `components`: of each its architecture, and `parameters`, those that Hugging Face's model would have of it."""

    checkpoint: Path
    id: str
    bytes: int
    files: int
    saved: Saved | None
    damage: str | None
    components: dict[str, dict[str, Any]]

    def as_record(self) -> dict[str, Any]:
        return asdict(self) | {"checkpoint": str(self.checkpoint)}

    def as_lines(self) -> list[str]:
        lines = [f"checkpoint   {self.checkpoint}", f"id           {self.id}"]
        if self.saved is not None:
            late = f" (due after {self.saved.due})" if self.saved.due != self.saved.step else ""
            lines += [f"step         {self.saved.step}{late}", f"saved        {self.saved.at}"]
            lines += [f"layout       {layout(self.saved)}"]
        lines += [f"size         {size(self.bytes)} in {self.files} files"]
        for name, found in self.components.items():
            told = ", ".join(f"{key} {value}" for key, value in found.items() if key != "parameters")
            lines += [f"{name:<12} {found['parameters']:,} parameters; {told}"]
        if self.saved is not None:
            lines += [f"mean         {name} {value:.6g}" for name, value in sorted(self.saved.metrics.items())]
        return [*lines, f"checksums    {self.damage or 'hold'}"]


def inspect_checkpoint(path: Path) -> Inspection:
    """Reads every byte of it. Raises UserError where it cannot be told what should be there."""
    checkpoint = resolve_checkpoint(path)
    facts, manifest = facts_of(checkpoint), Manifest.read(checkpoint)
    damage, saved, components = None, None, dict[str, dict[str, Any]]()
    try:
        manifest.require_sizes(checkpoint)
        manifest.require_sound(checkpoint, manifest.blocks(manifest.files))
        saved, components = saved_of(checkpoint), _components(checkpoint)
    except UserError as error:
        damage = str(error)
    return Inspection(checkpoint, str(facts.get("id")), manifest.bytes, len(manifest.files), saved, damage, components)


def _components(checkpoint: Path) -> dict[str, dict[str, Any]]:
    description = describe(checkpoint)
    arch = description.architecture()
    told: dict[str, dict[str, Any]] = {
        "encoder": asdict(arch.encoder) | {"feature_layer": description.feature_layer},
        "projector": {"encoder_hidden": arch.encoder.hidden, "head_hidden": arch.head.hidden},
        "llm": asdict(arch.head),
    }
    for name in COMPONENTS:
        told[name]["parameters"] = sum(math.prod(shape) for shape in part_shapes(arch, name).values())
    return told
