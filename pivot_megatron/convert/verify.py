"""Is a checkpoint what the Hugging Face folders say? Every tensor, then a forward pass against transformers."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.convert.activations import Check, assembled_activations, encoder_activations, head_activations
from pivot_megatron.convert.assembled import take_apart
from pivot_megatron.convert.commands import whole_model
from pivot_megatron.convert.export import Trained
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.load import Source, hf_source
from pivot_megatron.convert.plan import COMPONENTS, Slice
from pivot_megatron.convert.store import describe, load_weights
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import differences
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture, VisionLanguageModel

FORWARD_TOLERANCE = 1e-4  # fp32 sums in another order, over up to a hundred layers

Activations = Callable[[VisionLanguageModel], Iterator[Check]]


@dataclass(frozen=True)
class Verification:
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def table(self) -> str:
        """One line a check that failed or compares activations; tensors that are equal are only counted, those apart that are
        equal but for the precision that the checkpoint holds them in."""
        shown = [c for c in self.checks if not c.passed or not c.what.startswith("tensor ")]
        counted = Counter(c.note for c in self.checks if c.passed and c.what.startswith("tensor "))
        equal = [f"{counted.pop('', 0)} tensors equal, bit for bit"]
        equal += [f"{count} tensors {note}" for note, count in sorted(counted.items())]
        width = max((len(c.what) for c in shown), default=0)
        lines = [
            f"{'ok  ' if c.passed else 'FAIL'} {c.what:<{width}}  {c.difference:.2e}  {c.note}".rstrip() for c in shown
        ]
        return "\n".join([*equal, *lines])


def verify_checkpoint(
    path: Path,
    encoder: Path | None,
    llm: Path | None,
    tolerance: float = FORWARD_TOLERANCE,
    mllm: Path | None = None,
) -> Verification:
    """Compares a checkpoint with folders that should hold the same, those that are given: what it came from, where it did not
    train (an import, or frozen parts), or what was exported from it. `mllm`: an assembled model, projector and all.

    Compared are the layers that the checkpoint has, at its own features and resolution. A trained checkpoint fails in the tensors
    that moved, however little, which is what the table then shows. Raises UserError for a folder of another architecture.
    """
    checkpoint = resolve_checkpoint(path)
    description = describe(checkpoint)
    arch = description.architecture()
    ours = Trained(arch, CheckpointParameters(checkpoint / "tensors"))
    compared: list[tuple[Mapping[str, Source], Activations]] = []  # what is no match is refused before a model is built
    with tempfile.TemporaryDirectory() as scratch:
        if encoder is not None:
            where = encoder / "config.json"
            found = replace(arch, encoder=encoder_architecture(read_json(where), str(where)))
            theirs = _at_our_features(arch, found, where)
            activations = partial(encoder_activations, folders=theirs, folder=encoder, tolerance=tolerance)
            compared.append(({"encoder": hf_source(theirs, "encoder", encoder)}, activations))
        if llm is not None:
            where = llm / "config.json"
            found = replace(arch, head=head_architecture(read_json(where), str(where)))
            theirs = _at_our_features(arch, found, where)
            activations = partial(head_activations, folder=llm, tolerance=tolerance)
            compared.append(({"llm": hf_source(theirs, "llm", llm)}, activations))
        if mllm is not None:
            whole = take_apart(mllm, Path(scratch), feature_layer=-1)  # where there is one in any
            theirs = _at_our_features(arch, whole.description.architecture(), mllm)
            said = replace(whole.description, feature_layer=theirs.feature_layer, image_size=arch.encoder.image_size)
            activations = partial(assembled_activations, description=said, folder=mllm, tolerance=tolerance)
            compared.append((replace(whole, description=said).sources(), activations))
        with whole_model(description) as model:
            for name in COMPONENTS:
                load_weights(model, checkpoint, name)
            checks: list[Check] = []
            for sources, run in compared:
                checks += [check for name, source in sources.items() for check in _tensors(ours, name, source)]
                # Nothing can be run on tensors of another shape than config.json says.
                checks += run(model.whole) if all(math.isfinite(check.difference) for check in checks) else []
    return Verification(tuple(checks))


def _at_our_features(arch: Architecture, theirs: Architecture, where: Path) -> Architecture:
    """`theirs` with features taken at the checkpoint's resolution, after as many layers as it has. A folder holds all the layers
    of the encoder that the checkpoint began from, or, as exports do, those up to its features.

    Raises UserError where anything else differs.
    """
    cut = theirs.encoder.layers == arch.encoder_layers
    layers = arch.encoder_layers if cut else arch.encoder.layers
    expected = replace(
        arch, encoder=replace(arch.encoder, layers=layers), feature_layer=arch.encoder_layers - layers - 1
    )
    found = replace(
        theirs,
        encoder=replace(theirs.encoder, image_size=arch.encoder.image_size),
        feature_layer=expected.feature_layer,
    )
    if _same_tiles(arch, theirs):  # they may be written out, or left to be the default
        found = replace(found, anyres=arch.anyres)
    if told := differences(expected, found):
        raise UserError(f"{where}: expected the checkpoint's own architecture, {told}")
    return expected


def _same_tiles(arch: Architecture, theirs: Architecture) -> bool:
    ours, other = arch.anyres, theirs.anyres
    if ours is None or other is None:
        return ours is other
    return (ours.every_grid, ours.max_tiles) == (other.every_grid, other.max_tiles)


def _comparable(checks: list[Check]) -> bool:
    """Nothing can be run on tensors of another shape than config.json says."""
    return all(math.isfinite(check.difference) for check in checks)


def _tensors(ours: Trained, component: str, source: Source) -> Iterator[Check]:
    for name, tensor in ours.parts(component):
        yield _compared(f"tensor {name}", tensor, source.read(name, Slice()))


def _compared(what: str, ours: Tensor, stored: Tensor) -> Check:
    """`stored`: the folder's. Equal is what has the same bits, or, where the checkpoint's dtype is the coarser, those that the
    folder's are rounded to: then it did not train. The other way round it did."""
    if ours.shape != stored.shape:
        return Check(what, float("inf"), False, f"shape {tuple(ours.shape)}, not {tuple(stored.shape)}")
    both = torch.promote_types(ours.dtype, stored.dtype)
    difference = float((ours.to(both) - stored.to(both)).abs().max())
    if torch.equal(ours.to(both), stored.to(both)):
        return Check(what, difference, True)
    if torch.equal(ours, stored.to(ours.dtype)):
        return Check(what, difference, True, f"equal once rounded to {_name(ours)}, which the checkpoint holds them in")
    if torch.equal(ours.to(stored.dtype), stored):
        return Check(what, difference, False, f"moved by less than {_name(stored)} shows, which the folder holds it in")
    return Check(what, difference, False)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
