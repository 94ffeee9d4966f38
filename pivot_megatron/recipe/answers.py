"""An exported model in plain transformers: its greedy answers, and the log-probs it gives to known ones.

Nothing of this project's own model code takes part, so what these numbers say holds for whoever downloads the export.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from pivot_megatron.data_prep.progress import track
from pivot_megatron.recipe.held_out import HeldOut

_END = "<|im_end|>"


class ExportedModel:
    """A `LlavaForConditionalGeneration` folder with the processor saved beside it, in float32 on the host.

    `incomplete` names tensors that the folder lacks or has too many of.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        self.model = loaded[0].eval()
        self.incomplete = sorted(
            name
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for name in map(str, loaded[1][kind])
        )
        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]
        self.tokenizer: Any = self.processor.tokenizer

    def prompt(self, question: str) -> str:
        """The text up to where the answer begins, by the chat template saved with the export."""
        turns = [{"role": "user", "content": f"<image>\n{question}"}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def greedy_answers(
    exported: ExportedModel, pairs: Sequence[HeldOut], *, label: str, batch_size: int = 50, most_tokens: int = 24
) -> list[str]:
    """The model's own answer to each question, at most `most_tokens` tokens long. `label` names the progress shown."""
    end = exported.tokenizer.convert_tokens_to_ids(_END)
    answers: list[str] = []
    for batch in track(list(_batches(pairs, batch_size)), -(-len(pairs) // batch_size), label):
        inputs = exported.processor(
            images=[_image(pair) for pair in batch],
            text=[exported.prompt(pair.question) for pair in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        found = exported.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=most_tokens,
            eos_token_id=end,
            pad_token_id=exported.tokenizer.pad_token_id,
        )
        made = found[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in exported.tokenizer.batch_decode(made, skip_special_tokens=True)]
    return answers


@torch.no_grad()
def answer_logprobs(
    exported: ExportedModel, pairs: Sequence[HeldOut], *, label: str, batch_size: int = 50
) -> list[tuple[float, float]]:
    """Log-probs in nats of the chosen and of the rejected answer to each question, end mark included."""
    found: list[tuple[float, float]] = []
    for batch in track(list(_batches(pairs, batch_size)), -(-len(pairs) // batch_size), label):
        images = [_image(pair) for pair in batch]
        text = [exported.prompt(pair.question) for pair in batch]
        prompts = exported.processor(images=images, text=text)
        pixels = torch.as_tensor(exported.processor.image_processor(images=images, return_tensors="pt")["pixel_values"])
        chosen = _sums(exported, prompts["input_ids"], [pair.chosen for pair in batch], pixels)
        rejected = _sums(exported, prompts["input_ids"], [pair.rejected for pair in batch], pixels)
        found += zip(chosen, rejected, strict=True)
    return found


def _sums(
    exported: ExportedModel, prompts: Sequence[Sequence[int]], answers: Sequence[str], pixels: Tensor
) -> list[float]:
    """Summed log-prob of each answer after its prompt."""
    ends = [exported.tokenizer.encode(answer + _END, add_special_tokens=False) for answer in answers]
    rows = [torch.tensor([*prompt, *end]) for prompt, end in zip(prompts, ends, strict=True)]
    longest = max(map(len, rows))
    ids = torch.stack([pad(row, (0, longest - len(row)), value=exported.tokenizer.pad_token_id) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
    logits = exported.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, :-1].float()
    picked = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return [
        float(picked[i, len(prompt) - 1 : len(prompt) + len(end) - 1].sum())
        for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True))
    ]


def _batches(pairs: Sequence[HeldOut], size: int) -> Iterator[Sequence[HeldOut]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def _image(pair: HeldOut) -> Image.Image:
    return Image.open(io.BytesIO(pair.image)).convert("RGB")
