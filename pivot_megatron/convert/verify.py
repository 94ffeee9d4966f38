"""Is a checkpoint what the Hugging Face folders say? Every tensor, then a forward pass against transformers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pivot_megatron.convert.activations import Check, assembled_activations, encoder_activations, head_activations
from pivot_megatron.convert.assembled import take_apart
from pivot_megatron.convert.commands import whole_model
from pivot_megatron.convert.gather import hf_tensors
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.load import Source, hf_source
from pivot_megatron.convert.plan import COMPONENTS, Slice, component_rows
from pivot_megatron.convert.store import describe, load_weights, resolve_checkpoint
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import differences
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture

FORWARD_TOLERANCE = 1e-4  # fp32 sums in another order, over up to a hundred layers


@dataclass(frozen=True)
class Verification:
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def table(self) -> str:
        """One line a check that failed or compares activations; tensors that are equal are only counted."""
        shown = [c for c in self.checks if not c.passed or not c.what.startswith("tensor ")]
        equal = len(self.checks) - len(shown)
        width = max((len(c.what) for c in shown), default=0)
        lines = [
            f"{'ok  ' if c.passed else 'FAIL'} {c.what:<{width}}  {c.difference:.2e}  {c.note}".rstrip() for c in shown
        ]
        return "\n".join([f"{equal} tensors equal, bit for bit", *lines])


def verify_checkpoint(
    path: Path,
    encoder: Path | None,
    llm: Path | None,
    tolerance: float = FORWARD_TOLERANCE,
    mllm: Path | None = None,
) -> Verification:
    """Compares a checkpoint that should not have trained (an import, or frozen parts) with the folders it came from, those that
    are given; `mllm`: an assembled model's, projector and all.

    A trained checkpoint fails in the tensors that moved, which is what the table then shows. Raises UserError for a folder of
    another architecture.
    """
    checkpoint = resolve_checkpoint(path)
    description = describe(checkpoint)
    arch = description.architecture()
    for component, folder in (("encoder", encoder), ("llm", llm)):
        if folder is not None:
            _require_same(arch, component, folder)
    with tempfile.TemporaryDirectory() as scratch, whole_model(description) as model:
        for name in COMPONENTS:
            load_weights(model, checkpoint, name)
        found = hf_tensors(model)
        checks: list[Check] = []
        if encoder is not None:
            checks += _tensors(arch, found, "encoder", hf_source(arch, "encoder", encoder))
            checks += encoder_activations(model, encoder, tolerance) if _comparable(checks) else []
        if llm is not None:
            checks += _tensors(arch, found, "llm", hf_source(arch, "llm", llm))
            checks += head_activations(model, llm, tolerance) if _comparable(checks) else []
        if mllm is not None:
            theirs = take_apart(mllm, Path(scratch), description.feature_layer, description.image_size)
            if told := differences(arch, theirs.description.architecture()):
                raise UserError(f"{mllm}: expected the checkpoint's own architecture, {told}")
            for name, source in theirs.sources().items():
                checks += _tensors(arch, found, name, source)
            checks += assembled_activations(model, description, mllm, tolerance) if _comparable(checks) else []
    return Verification(tuple(checks))


def _comparable(checks: list[Check]) -> bool:
    """Nothing can be run on tensors of another shape than config.json says."""
    return all(math.isfinite(check.difference) for check in checks)


def _require_same(arch: Architecture, component: str, folder: Path) -> None:
    where = folder / "config.json"
    if component == "encoder":
        told = differences(arch.encoder, encoder_architecture(read_json(where), str(where)), but=("image_size",))
    else:
        told = differences(arch.head, head_architecture(read_json(where), str(where)))
    if told:
        raise UserError(f"{where}: expected the checkpoint's own architecture, {told}")


def _tensors(arch: Architecture, found: Mapping[str, Tensor], component: str, source: Source) -> Iterator[Check]:
    for name in (part for row in component_rows(arch, component) for part in row.hf):
        stored = source.read(name, Slice())
        ours = found[name].to(stored.dtype)
        if ours.shape != stored.shape:
            yield Check(f"tensor {name}", float("inf"), False, f"shape {tuple(ours.shape)}, not {tuple(stored.shape)}")
            continue
        difference = float((ours.float() - stored.float()).abs().max())
        yield Check(f"tensor {name}", difference, torch.equal(ours, stored))
