"""Each layer's output and answers' log-probs, ours and plain transformers', for one random image and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.processors import pinpoints
from pivot_megatron.convert.reference import reference_encoder
from pivot_megatron.convert.store import Description
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.model.composition import Architecture, VisionLanguageModel
from pivot_megatron.runtime.device import current_platform

ANSWER = 32


@dataclass(frozen=True)
class Check:
    """`difference`: tensors, the largest absolute one; activations, relative to the largest activation."""

    what: str
    difference: float
    passed: bool
    note: str = ""


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
def encoder_activations(
    model: VisionLanguageModel, folders: Architecture, folder: Path, tolerance: float
) -> Iterator[Check]:
    """Every layer's output for one random image, and the features. `folders`: the architecture of `folder`, which may have layers
    past the model's."""
    arch, encoder = model.arch, model.arch.encoder
    theirs = reference_encoder(encoder.family, folder)
    pixels, grid = _random_image(encoder)
    layers = theirs.layers(folders.encoder.layers)
    outputs: list[Tensor] = []
    expected = _layer_outputs(layers, lambda: outputs.append(theirs([pixels], [grid])))
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
def head_activations(model: VisionLanguageModel, folder: Path, tolerance: float) -> Iterator[Check]:
    """Every layer's output, and log-probs, of a random text under head and transformers' own."""
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = _random_ids(model.arch.head.vocabulary, 16 + ANSWER)
    text = Tokenized("text", tuple(ids[:16]), (Branch(tuple(ids[16:]), (True,) * ANSWER),), (), ())
    logits: list[Tensor] = []
    expected = _layer_outputs(theirs.model.layers, lambda: logits.append(theirs(input_ids=torch.tensor([ids])).logits))
    yield from _head_checks(model, text, [], expected, logits[0], tolerance)


def _random_ids(vocabulary: int, count: int) -> list[int]:
    found: list[int] = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return found


def _head_checks(
    model: VisionLanguageModel,
    sample: Tokenized,
    pixels: Sequence[Tensor],
    expected: list[Tensor],
    logits: Tensor,
    tolerance: float,
) -> Iterator[Check]:
    """`expected`: their layers' outputs, `logits` `[1, T, vocabulary]` their last ones."""
    batch = pack([sample], pixels, branches_per_sample=1, multiple=1)
    logprobs: list[Tensor] = []
    model.eval()
    found = _layer_outputs(
        model.llm.decoder.layers, lambda: logprobs.append(model(batch.to(current_platform().device)).cpu())
    )
    predicting = slice(len(sample.prefix) - 1, -1)
    expected[-1] = expected[-1][:, predicting]  # past the last layer's attention only what predicts the answer goes on
    yield from _compared("head", found, expected, tolerance)
    answer = torch.tensor(sample.branches[0].ids)[:, None]
    wanted = logits[0].log_softmax(-1)[predicting].gather(1, answer)[:, 0]
    difference = _relative(logprobs[0], wanted)
    yield Check("head log-probs", difference, difference <= tolerance)


@torch.no_grad()
def assembled_activations(
    model: VisionLanguageModel, description: Description, folder: Path, tolerance: float
) -> Iterator[Check]:
    """The same for an assembled model: an image, wider than high where it is seen as tiles, then a text. `description`: of the
    `folder`'s model, at the checkpoint's features and resolution."""
    from transformers import AutoModelForImageTextToText

    theirs: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config, arch = read_json(folder / "config.json"), model.arch
    _at_resolution(theirs, arch)
    size, tiles = arch.encoder.image_size, arch.anyres is not None
    height, width = (size, 2 * size) if tiles else (size, size)
    view: View = description.image_views().view(width, height)
    squares = torch.randn(len(view.grids), 3, size, size, generator=torch.Generator().manual_seed(0))
    image_token = config.get("image_token_id", config.get("image_token_index"))
    ids = [n if n != image_token else 0 for n in _random_ids(arch.head.vocabulary, 8 + ANSWER)]
    prefix = (*ids[:4], *[0] * view.tokens, *ids[4:8])
    sample = Tokenized("image", prefix, (Branch(tuple(ids[8:]), (True,) * ANSWER),), (4,), (view,))
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[*ids[:4], *[image_token] * view.tokens, *ids[4:]]]),
        "pixel_values": squares[None] if tiles else squares,
        "vision_feature_layer": description.feature_layer,
        **({"image_sizes": torch.tensor([[height, width]])} if tiles else {}),
    }
    logits: list[Tensor] = []
    layers = next(
        m
        for m in theirs.model.language_model.modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == arch.head.layers
    )
    expected = _layer_outputs(layers, lambda: logits.append(theirs(**inputs).logits))
    yield from _head_checks(model, sample, [squares], expected, logits[0], tolerance)


def _at_resolution(theirs: Any, arch: Architecture) -> None:
    """Has transformers' assembled model see images of the encoder's size, positions interpolated as it is called."""
    vision, size = theirs.config.vision_config, arch.encoder.image_size
    if vision.image_size == size:
        return
    tower = theirs.model.vision_tower
    tower.forward = partial(tower.forward, interpolate_pos_encoding=True)
    vision.image_size = size
    if arch.anyres is not None:
        theirs.config.image_grid_pinpoints = pinpoints(arch.anyres, size)
