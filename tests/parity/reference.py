"""The independent reference: plain transformers modules in one process, each branch a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, SiglipVisionModel

from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View

IMAGE_SIZE = 32
ENCODER = {"image_size": IMAGE_SIZE, "patch_size": 8, "hidden_size": 96, "layers": 4, "heads": 4, "ffn": 176}
SQUARE = View.of_patches(4, 4)
HEAD = {"hidden_size": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 128}
CORPUS = [
    "what colour is the circle",
    "the circle is red",
    "two squares and a triangle",
    "read the word in the picture",
]


def randomise(folder: Path, seed: int) -> None:
    """Give every tensor, norms and biases too, values of its own: a fresh model's zeros and ones hide mistakes."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        tensor += torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.dim() == 1 else 0.02)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_checkpoints(folder: Path, tied: bool = True) -> tuple[Path, Path]:
    """(encoder folder, head folder) of small Hugging Face checkpoints."""
    encoder, head = folder / "encoder", folder / "head"
    make_encoder(encoder, **ENCODER, seed=1)
    make_head(head, make_tokenizer(CORPUS, 300), **HEAD, tied=tied, seed=2)
    randomise(encoder, 3)
    randomise(head, 4)
    return encoder, head


def make_pairs(
    count: int, seed: int, vocabulary: int, text_only: Sequence[int] = (), views: Sequence[View] = ()
) -> list[Tokenized]:
    """Random pairs of uneven lengths; those whose index is in `text_only` have no image. `views`: of each pair's image, if they
    are not squares of 16 patches."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    pairs = []
    for n in range(count):
        before, after = ids(1, 5), ids(1, 7)
        seen = () if n in text_only else (views[n] if views else SQUARE,)
        prefix = (*before, *[0] * sum(view.tokens for view in seen), *after)
        branches = tuple(Branch(answer, (True,) * len(answer)) for answer in (ids(1, 9), ids(1, 9)))
        pairs.append(Tokenized(f"pair-{n}", prefix, branches, (len(before),) if seen else (), seen))
    return pairs


def make_pixels(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


class Reference(torch.nn.Module):
    """SigLIP up to `feature_layer`, two linears with a GELU between, Qwen2."""

    def __init__(self, encoder: Path, head: Path, projector: dict[str, Tensor], feature_layer: int = -2) -> None:
        super().__init__()
        self.encoder = SiglipVisionModel.from_pretrained(encoder, attn_implementation="eager").float()
        self.llm = AutoModelForCausalLM.from_pretrained(head, attn_implementation="eager").float()
        first, last = (projector[f"multi_modal_projector.linear_{i}.weight"] for i in (1, 2))
        self.linear_1 = torch.nn.Linear(first.shape[1], first.shape[0])
        self.linear_2 = torch.nn.Linear(last.shape[1], last.shape[0])
        self.load_state_dict({k.removeprefix("multi_modal_projector."): v for k, v in projector.items()}, strict=False)
        self.feature_layer = feature_layer

    def hidden_states(self, pixels: Tensor) -> tuple[Tensor, ...]:
        states: tuple[Tensor, ...] = self.encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states

    def image_features(self, pixels: Tensor) -> Tensor:
        features = self.hidden_states(pixels)[self.feature_layer]
        out: Tensor = self.linear_2(torch.nn.functional.gelu(self.linear_1(features)))
        return out

    def branch_logits(self, sample: Tokenized, index: int, images: Sequence[Tensor]) -> Tensor:
        """`[len(branch), vocabulary]`: logits that predict the branch's tokens, over a sequence of this branch alone.

        `images`: `[3, S, S]` for each of the sample's image places.
        """
        prefix, branch = len(sample.prefix), sample.branches[index]
        start = prefix + sum(len(b.ids) for b in sample.branches[:index])
        embeddings = self.llm.get_input_embeddings()(torch.tensor([sample.prefix + branch.ids]))
        for at, view, pixels in zip(sample.images, sample.views, images, strict=True):
            if at >= prefix:
                if not start <= at < start + len(branch.ids):
                    continue  # the other branch's
                at = prefix + at - start
            features = self.image_features(pixels[None])
            embeddings = torch.cat([embeddings[:, :at], features, embeddings[:, at + view.tokens :]], dim=1)
        logits: Tensor = self.llm(inputs_embeds=embeddings).logits[0]
        return logits[prefix - 1 : -1] if prefix else torch.cat([logits[:1] * 0, logits[:-1]])

    def branch_logprobs(self, sample: Tokenized, images: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs of each branch's loss tokens, `[tokens]` a branch."""
        out = []
        for index, branch in enumerate(sample.branches):
            logps = self.branch_logits(sample, index, images).log_softmax(-1)
            picked = logps.gather(1, torch.tensor(branch.ids)[:, None])[:, 0]
            out.append(picked[torch.tensor(branch.loss)])
        return out


def images_of(samples: Sequence[Tokenized], pixels: Sequence[Tensor] | Tensor) -> list[list[Tensor]]:
    """The images of each sample's places, taken in order from `pixels`."""
    queue = iter(pixels)
    return [[next(queue) for _ in s.images] for s in samples]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
