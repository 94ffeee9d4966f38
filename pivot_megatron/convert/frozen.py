"""What a run left as it began: parameters compared bit for bit with those that the run started from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.schema import Model, ParameterRule
from pivot_megatron.convert.load import FreshParts, hf_source
from pivot_megatron.convert.plan import COMPONENTS, Slice, component_rows, join, part_shapes
from pivot_megatron.convert.start import fresh_parameters
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.errors import RuleError
from pivot_megatron.families.table import Row, checkpoint_place
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.freeze import rate_of


def frozen_names(arch: Architecture, rules: Sequence[ParameterRule]) -> list[str]:
    """Canonical names of the parameters that `rules` freeze."""
    return [name for name in _names(arch) if rate_of(name, rules) == "frozen"]


def freeze_layers(arch: Architecture, rules: Sequence[ParameterRule]) -> bool:
    """Whether `rules` freeze some layers of a stack and not others, so that the optimizer has a part alone of what checkpoints
    hold in one tensor."""
    frozen = set(frozen_names(arch, rules))
    training = set(_names(arch)) - frozen
    return bool({checkpoint_place(n)[0] for n in frozen} & {checkpoint_place(n)[0] for n in training})


def _names(arch: Architecture) -> list[str]:
    return [f"{component}.{row.megatron}" for component in COMPONENTS for row in component_rows(arch, component)]


def changed_parameters(checkpoint: Path, start: Model, seed: int, names: Collection[str]) -> list[str]:
    """Those of `names` whose numbers in `checkpoint` are not, bit for bit, the ones that a run began with from `start`, brought
    to the dtype that they are saved in. One parameter at a time is in memory."""
    arch = describe(checkpoint).architecture()
    saved = CheckpointParameters(checkpoint / "tensors")
    changed = []
    for component in COMPONENTS:
        rows = [row for row in component_rows(arch, component) if f"{component}.{row.megatron}" in names]
        for row, begun in zip(rows, _begun(arch, component, rows, start, seed), strict=True):
            found = join(row.transform, [saved.read(f"{component}.{row.megatron}")])
            if not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, begun, strict=True)):
                changed.append(f"{component}.{row.megatron}")
    return changed


def require_frozen(checkpoint: Path, start: Model, seed: int, rules: Sequence[ParameterRule]) -> int:
    """How many parameters `rules` freeze. Raises RuleError naming one that is not as the run began from it."""
    names = frozen_names(describe(checkpoint).architecture(), rules)
    if changed := changed_parameters(checkpoint, start, seed, set(names)):
        raise RuleError(
            f"{checkpoint}: {len(changed)} of {len(names)} frozen parameters are not what the run began from (first: "
            f"{changed[0]}); keep nothing of this run"
        )
    return len(names)


def _begun(
    arch: Architecture, component: str, rows: Sequence[Row], start: Model, seed: int
) -> Iterator[Sequence[Tensor]]:
    """The Hugging Face parts of each of `rows` as a run begins with them."""
    source, fresh = getattr(start, component), FreshParts(part_shapes(arch, component), seed)
    if source.checkpoint is not None:
        before = resolve_checkpoint(source.checkpoint)
        drawn = fresh_parameters(start, before, arch) if component == "projector" else []
        parameters = CheckpointParameters(before / "tensors")
        for row in rows:
            if (name := f"{component}.{row.megatron}") in drawn:
                yield [fresh.read(part, Slice()) for part in row.hf]
            else:
                yield join(row.transform, [parameters.read(name)])
        return
    parts = hf_source(arch, component, source.hf) if source.hf is not None else fresh
    for row in rows:
        yield [parts.read(part, Slice()) for part in row.hf]
