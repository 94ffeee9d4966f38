"""Exports read back by plain transformers and compared with the trained model, which runs on megatron-core here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.convert.commands import trained_model
from pivot_megatron.convert.hf import HfTensors
from pivot_megatron.convert.store import describe
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.chat import qwen_1_5
from pivot_megatron.data.images import ImageTransform
from pivot_megatron.data.packing import pack
from pivot_megatron.data.sample import Pair
from pivot_megatron.data.tokens import SampleTokenizer
from pivot_megatron.errors import RunError
from pivot_megatron.families.siglip import HF_PREFIX
from pivot_megatron.model.composition import Stage
from pivot_megatron.recipe.answers import ExportedModel, answer_logprobs
from pivot_megatron.recipe.held_out import HeldOut
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.train.step import forward_logprobs

_SEQUENCE_LENGTH = 512
_LLAVA_PREFIXES = {"vision_tower.": "", "language_model.": ""}


@dataclass(frozen=True)
class ExportCheck:
    """One exported encoder or whole model, read back by plain transformers.

    `max_difference` is the largest absolute difference between an encoder's features, or a whole model's log-probs of
    answers (nats), and those of the model it came from. Tensors are counted against the checkpoints that everything
    started from; `loaded`: none was missing or left over.
    """

    name: str
    folder: str
    loaded: bool
    max_difference: float
    unchanged_tensors: int
    changed_tensors: int


def check_encoder(name: str, folder: Path, run: Path, start: Path, pairs: Sequence[HeldOut]) -> ExportCheck:
    """Features of the exported encoder against those of the run's model, and its tensors against the starting ones.

    Raises RunError if a tensor that could not train differs from the starting one.
    """
    from transformers import SiglipVisionModel

    loaded: Any = SiglipVisionModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    whole = not any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = _pixels(folder, pairs)
    with trained_model(run) as model, torch.no_grad():
        arch = model.arch
        features = model.whole.encoder(pixels.to(current_platform().device)).cpu().float()
        ours = features.view(len(pairs), arch.encoder.tokens, arch.encoder.hidden)
        states = loaded[0](pixel_values=pixels, output_hidden_states=True).hidden_states
        # A dropped last layer leaves the trained features at the end.
        theirs = states[arch.encoder_layers]
        trained = f"{HF_PREFIX}encoder.layers.{{}}."
        may_change = (f"{HF_PREFIX}embeddings.", *(trained.format(layer) for layer in range(arch.encoder_layers)))
    changed, unchanged = count_changed(folder, [start])
    if wrong := [tensor for tensor in changed if not tensor.startswith(may_change)]:
        raise RunError(f"{folder}: {wrong[0]} did not train and yet differs from {start}; the export is wrong")
    difference = float((ours - theirs).abs().max())
    return ExportCheck(name, str(folder), whole, difference, len(unchanged), len(changed))


def check_model(
    name: str, folder: Path, run: Path, starts: Sequence[Path], exported: ExportedModel, pairs: Sequence[HeldOut]
) -> ExportCheck:
    """Log-probs of whole answers (nats) by the export against those by the run's model."""
    theirs = torch.tensor(answer_logprobs(exported, pairs, label=f"{name} against the trained model"))
    with trained_model(run) as model:
        ours = torch.tensor(trained_logprobs(model, run, pairs))
    changed, unchanged = count_changed(folder, starts)
    difference = float((ours - theirs).abs().max())
    return ExportCheck(name, str(folder), not exported.incomplete, difference, len(unchanged), len(changed))


def trained_logprobs(model: Stage, run: Path, pairs: Sequence[HeldOut]) -> list[tuple[float, float]]:
    """Log-probs in nats of each pair's chosen and rejected answer, as the training step computes them."""
    description = describe(resolve_checkpoint(run))
    tokenize = SampleTokenizer(
        tokenizer=load_tokenizer(description.llm),
        template=qwen_1_5,
        view=description.image_views().fixed,
        sequence_length=_SEQUENCE_LENGTH,
        branches=2,
        too_long="drop",
    )
    samples = [Pair(str(i), p.image, p.question, p.chosen, p.rejected, {}) for i, p in enumerate(pairs)]
    pixels = _pixels(description.encoder, pairs).split(1)
    batch = pack([tokenize(s) for s in samples], pixels, 2, multiple=8)
    batch = batch.to(current_platform().device)
    (logprobs,) = forward_logprobs(model, [batch])
    if logprobs is None:
        raise RunError("demo: expected the whole model in this process, found one of several pipeline stages")
    sums = torch.zeros(batch.branches, dtype=torch.float64, device=logprobs.device)
    sums.index_add_(0, batch.branch, logprobs.double())
    return [(float(chosen), float(rejected)) for chosen, rejected in sums.view(-1, 2).tolist()]


def count_changed(folder: Path, starts: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Tensors of an export that differ from those of the same name in `starts`, and those that are bitwise the same.

    What no start has (a fresh projector) counts as changed.
    """
    known: dict[str, tuple[HfTensors, str]] = {}
    for start in starts:
        source = HfTensors(start)
        known |= {_bare(name): (source, name) for name in source.names()}
    export = HfTensors(folder)
    changed: list[str] = []
    unchanged: list[str] = []
    for name in export.names():
        same = _bare(name) in known and _equal(export.read(name), known[_bare(name)])
        (unchanged if same else changed).append(name)
    return changed, unchanged


def _equal(tensor: Tensor, other: tuple[HfTensors, str]) -> bool:
    source, name = other
    return torch.equal(tensor, source.read(name))


def _bare(name: str, prefixes: Mapping[str, str] = _LLAVA_PREFIXES) -> str:
    """A tensor's name in the checkpoint of its own part."""
    for prefix, replacement in prefixes.items():
        name = name.replace(prefix, replacement, 1) if name.startswith(prefix) else name
    return name


def _pixels(processor: Path, pairs: Sequence[HeldOut]) -> Tensor:
    """`[pairs, 3, H, W]`, by Pillow as transformers does it."""
    transform = ImageTransform.from_processor_folder(processor)
    return torch.stack([transform(pair.image, "pil") for pair in pairs])
