"""Is a checkpoint what the Hugging Face folders say? Every tensor, then a forward pass against transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.convert.commands import whole_model
from pivot_megatron.convert.gather import hf_tensors
from pivot_megatron.convert.load import hf_source
from pivot_megatron.convert.plan import COMPONENTS, Slice, component_rows
from pivot_megatron.convert.reference import reference_encoder
from pivot_megatron.convert.store import describe, load_weights, resolve_checkpoint
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.model.composition import VisionLanguageModel
from pivot_megatron.runtime.device import current_platform

FORWARD_TOLERANCE = 1e-4  # fp32 sums in another order, over up to a hundred layers


@dataclass(frozen=True)
class Check:
    """`difference`: tensors, the largest absolute one; activations, relative to the largest activation."""

    what: str
    difference: float
    passed: bool
    note: str = ""


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
    path: Path, encoder: Path | None, llm: Path | None, tolerance: float = FORWARD_TOLERANCE
) -> Verification:
    """Compares a checkpoint that should not have trained (an import, or frozen parts) with the folders it came from, those that
    are given.

    A trained checkpoint fails in the tensors that moved, which is what the table then shows.
    """
    checkpoint = resolve_checkpoint(path)
    with whole_model(describe(checkpoint)) as model:
        for name in COMPONENTS:
            load_weights(model, checkpoint, name)
        found = hf_tensors(model)
        checks: list[Check] = []
        if encoder is not None:
            checks += _tensors(model, found, "encoder", encoder)
            checks += _encoder_activations(model, encoder, tolerance)
        if llm is not None:
            checks += _tensors(model, found, "llm", llm)
            checks += _head_activations(model, llm, tolerance)
    return Verification(tuple(checks))


def _tensors(model: VisionLanguageModel, found: Mapping[str, Tensor], component: str, folder: Path) -> Iterator[Check]:
    source = hf_source(model.arch, component, folder)
    for name in (part for row in component_rows(model.arch, component) for part in row.hf):
        stored = source.read(name, Slice())
        ours = found[name].to(stored.dtype)
        if ours.shape != stored.shape:
            yield Check(f"tensor {name}", float("inf"), False, f"shape {tuple(ours.shape)}, not {tuple(stored.shape)}")
            continue
        difference = float((ours.float() - stored.float()).abs().max())
        yield Check(f"tensor {name}", difference, torch.equal(ours, stored))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _layer_outputs(layers: Iterable[torch.nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """What each of `layers` gives while `run` runs."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [output.cpu() for output in seen]


def _compared(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> Iterator[Check]:
    for i, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        difference = _relative(found.reshape(expected.shape), expected)
        yield Check(f"{what} layer {i}", difference, difference <= tolerance)


@torch.no_grad()
def _encoder_activations(model: VisionLanguageModel, folder: Path, tolerance: float) -> Iterator[Check]:
    """Every layer's output for one random image, and the features."""
    arch, encoder = model.arch, model.arch.encoder
    theirs = reference_encoder(encoder.family, folder)
    pixels, grid = _random_image(encoder)
    layers = next(
        m
        for m in theirs.model.modules()
        if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential) and len(m) == encoder.layers
    )
    outputs: list[Tensor] = []
    expected = _layer_outputs(layers, lambda: outputs.append(theirs(pixels, grid)))
    model.eval()
    found = _layer_outputs(
        model.encoder.decoder.layers,
        lambda: outputs.append(model.encoder(pixels.to(current_platform().device), [grid]).cpu()),
    )
    places = int(encoder.class_token) + math.prod(grid)
    yield from _compared("encoder", [f[:places] for f in found], expected[: len(found)], tolerance)
    if arch.final_norm:
        difference = _relative(outputs[1][:places].reshape(outputs[0].shape), outputs[0])
        yield Check("encoder final norm", difference, difference <= tolerance)


def _random_image(encoder: EncoderArchitecture) -> tuple[Tensor, tuple[int, int]]:
    """Pixels, and patches down and across: no square where the encoder need not have one."""
    draw = torch.Generator().manual_seed(0)
    if encoder.native:
        rows, columns = max(1, encoder.grid - 1), encoder.grid + 1
        return torch.randn(rows * columns, 3 * encoder.patch_size**2, generator=draw), (rows, columns)
    size = encoder.image_size
    return torch.randn(1, 3, size, size, generator=draw), (encoder.grid, encoder.grid)


@torch.no_grad()
def _head_activations(model: VisionLanguageModel, folder: Path, tolerance: float) -> Iterator[Check]:
    """Every layer's output, and log-probs, of a random text under head and transformers' own."""
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    vocabulary = model.arch.head.vocabulary
    ids = torch.randint(0, vocabulary, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    text = Tokenized("text", tuple(ids[:16]), (Branch(tuple(ids[16:]), (True,) * 32),), (), ())
    batch = pack([text], [], branches_per_sample=1, multiple=1)
    outputs: list[Any] = []
    model.eval()
    found = _layer_outputs(
        model.llm.decoder.layers, lambda: outputs.append(model(batch.to(current_platform().device)).cpu())
    )
    expected = _layer_outputs(theirs.model.layers, lambda: outputs.append(theirs(input_ids=torch.tensor([ids])).logits))
    expected[-1] = expected[-1][:, 15:-1]  # past the last layer's attention only what predicts the answer goes on
    yield from _compared("head", found, expected, tolerance)
    logprobs = outputs[1][0].log_softmax(-1)
    wanted = logprobs[15:-1].gather(1, torch.tensor(ids[16:])[:, None])[:, 0]
    difference = _relative(outputs[0], wanted)
    yield Check("head log-probs", difference, difference <= tolerance)
