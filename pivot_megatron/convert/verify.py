"""Is a checkpoint what the Hugging Face folders say? Every tensor, then a forward pass against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.convert.commands import whole_model
from pivot_megatron.convert.gather import hf_tensors
from pivot_megatron.convert.load import hf_source
from pivot_megatron.convert.plan import COMPONENTS, component_rows
from pivot_megatron.convert.store import describe, load_weights, resolve_checkpoint
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
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


def verify_checkpoint(path: Path, encoder: Path, llm: Path) -> Verification:
    """Compares a checkpoint that should not have trained (an import, or frozen parts) with the folders it came from.

    A trained checkpoint fails in the tensors that moved, which is what the table then shows.
    """
    checkpoint = resolve_checkpoint(path)
    with whole_model(describe(checkpoint)) as model:
        for name in COMPONENTS:
            load_weights(model, checkpoint, name)
        checks = [*_tensors(model, encoder, llm), *_encoder_activations(model, encoder), *_head_logprobs(model, llm)]
    return Verification(tuple(checks))


def _tensors(model: VisionLanguageModel, encoder: Path, llm: Path) -> Iterator[Check]:
    found = hf_tensors(model)
    for component, folder in (("encoder", encoder), ("llm", llm)):
        source = hf_source(model.arch, component, folder)
        for name in (part for row in component_rows(model.arch, component) for part in row.hf):
            stored = source.read(name)
            ours = found[name].to(stored.dtype)
            if ours.shape != stored.shape:
                yield Check(
                    f"tensor {name}", float("inf"), False, f"shape {tuple(ours.shape)}, not {tuple(stored.shape)}"
                )
                continue
            difference = float((ours.float() - stored.float()).abs().max())
            yield Check(f"tensor {name}", difference, torch.equal(ours, stored))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _encoder_activations(model: VisionLanguageModel, folder: Path) -> Iterator[Check]:
    """Every layer's output for one random image."""
    from transformers import SiglipVisionModel

    theirs: Any = SiglipVisionModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    arch = model.arch.encoder
    pixels = torch.randn(1, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(0))
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.encoder.decoder.layers
    ]
    model.eval().encoder(pixels.to(current_platform().device))
    for hook in hooks:
        hook.remove()
    for i, hidden in enumerate(seen):
        difference = _relative(hidden.cpu().view(1, arch.tokens, arch.hidden), expected[i + 1])
        yield Check(f"encoder layer {i}", difference, difference <= FORWARD_TOLERANCE)


@torch.no_grad()
def _head_logprobs(model: VisionLanguageModel, folder: Path) -> Iterator[Check]:
    """Log-probs of a random text under head and transformers' own."""
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    vocabulary = model.arch.head.vocabulary
    ids = torch.randint(0, vocabulary, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    text = Tokenized("text", tuple(ids[:16]), (Branch(tuple(ids[16:]), (True,) * 32),), (), 0)
    batch = pack([text], [], branches_per_sample=1, image_size=model.arch.encoder.image_size, multiple=1)
    found = model.eval()(batch.to(current_platform().device)).cpu()
    logprobs = theirs(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[15:-1].gather(1, torch.tensor(ids[16:])[:, None])[:, 0]
    difference = _relative(found, expected)
    yield Check("head log-probs", difference, difference <= FORWARD_TOLERANCE)
