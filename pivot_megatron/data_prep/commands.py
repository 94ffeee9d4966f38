"""What the commands of preparation choose, from what a user gives them."""

from collections.abc import Sequence
from pathlib import Path

from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data_prep.mixture import open_llava
from pivot_megatron.data_prep.mmpr import MmprRows, PairLength, find_subsets
from pivot_megatron.data_prep.pictures import Reencoding
from pivot_megatron.data_prep.prepare import Selection
from pivot_megatron.errors import UserError


def select_mmpr(source: Path, images: Path | None, tokenizer: Path, max_tokens: int, seed: int) -> Selection:
    """MMPR as PIVOT selects it. Raises UserError."""
    if max_tokens < 1:
        raise UserError(f"--max-tokens: expected at least 1, found {max_tokens}")
    subsets = find_subsets(source, images)
    check = PairLength(load_tokenizer(tokenizer), max_tokens)
    settings = {
        "command": "mmpr",
        "source": str(source),
        "subsets": {subset.name: {"images": str(subset.images), "repeat": subset.repeat} for subset in subsets},
        "tokenizer": str(tokenizer),
        "max_tokens": max_tokens,
        "seed": seed,
    }
    notes = {
        "misplaced_image_mark": "<image> in an answer, or more than once",
        "rejected_too_long": "a check of our own: the paper measures the chosen answer alone",
    }
    return Selection(MmprRows(subsets, seed), settings, check, notes)


def select_llava(paths: Sequence[Path], images: Path | None, sampling: str, seed: int) -> Selection:
    """LLaVA's rows from tables and mixtures. Raises UserError."""
    rows = open_llava(paths, images, sampling, seed)
    settings = {
        "command": "llava",
        "sources": [str(path) for path in paths],
        "images": images and str(images),
        "sampling": sampling,
        "seed": seed,
        "parts": rows.parts,
    }
    return Selection(rows, settings)


def reencoding(quality: int | None, longest_side: int | None) -> Reencoding | None:
    """Raises UserError."""
    if quality is None and longest_side is not None:
        raise UserError("--longest-side: expected --reencode QUALITY with it, found none: scaling makes new files")
    return None if quality is None else Reencoding(quality, longest_side)
