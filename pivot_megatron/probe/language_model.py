"""What the layers of a Hugging Face language model make of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.convert.fingerprint import folder_fingerprint
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.errors import UserError
from pivot_megatron.probe.features import Say, silent
from pivot_megatron.probe.kept import kept
from pivot_megatron.probe.opening import require_safetensors
from pivot_megatron.runtime.device import current_platform


def require_language_model(folder: Path) -> None:
    """Raises UserError where `folder` has no config or no weights that are read."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a Hugging Face language model with its tokenizer, found no config.json")
    require_safetensors(folder)


def text_features(
    folder: Path, texts: Sequence[str], batch: int = 16, cache: Path | None = None, say: Say = silent
) -> Tensor:
    """`[layers, texts, hidden]` float32 on the host: of each layer, the last of them past the final norm, the mean over a text's
    tokens. Raises UserError where `folder`
    holds no language model, or not all of it."""
    require_language_model(folder)

    def work() -> Any:
        return _layer_means(folder, texts, batch, say).numpy()

    return torch.from_numpy(kept(work, cache, f"text {folder_fingerprint(folder)} {list(texts)}"))


@torch.no_grad()
def _layer_means(folder: Path, texts: Sequence[str], batch: int, say: Say) -> Tensor:
    from transformers import AutoModel

    device = current_platform().device
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if missing := loaded[1]["missing_keys"]:  # which would be drawn at random
        raise UserError(f"{folder}: expected every weight of the language model, found no {min(missing)}")
    model = loaded[0].eval().to(device)
    found = []
    for first in range(0, len(texts), batch):
        given = tokenizer(list(texts[first : first + batch]), return_tensors="pt", padding=True).to(device)
        states = model(**given, output_hidden_states=True, use_cache=False).hidden_states[1:]
        mask = given["attention_mask"][:, :, None].float()
        found.append(torch.stack([(state * mask).sum(dim=1) / mask.sum(dim=1) for state in states]).cpu())
        say(f"{min(first + batch, len(texts))} of {len(texts)} captions")
    return torch.cat(found, dim=1)
