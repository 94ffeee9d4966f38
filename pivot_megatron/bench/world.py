"""What both trainers of a comparison start from: one random model in two forms, and one set of pairs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pivot_megatron.bench.shapes import Shape
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.errors import UserError

_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "po", "ri", "sa", "to", "vu")
_BLOCK = 8  # pixels a side of one colour: detail in every patch, and files of a few KB
_SAMPLES_A_SHARD = 1000


@dataclass(frozen=True)
class World:
    """`checkpoint` is this project's, `llava` the same weights as Hugging Face's `LlavaForConditionalGeneration`."""

    folder: Path

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder"

    @property
    def llm(self) -> Path:
        return self.folder / "llm"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def llava(self) -> Path:
        return self.folder / "llava"


def make_world(out: Path, shape: Shape, seed: int = 777) -> World:
    """Write `shape`'s model and pairs below `out`. Raises UserError where that has files in it already."""
    require_empty(out)
    world = World(out / "world")
    words = _words()
    make_encoder(
        world.encoder,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_size=shape.encoder_hidden,
        layers=shape.encoder_layers,
        heads=shape.encoder_heads,
        ffn=shape.encoder_ffn,
        seed=seed,
    )
    make_head(
        world.llm,
        make_tokenizer((" ".join(["", *words]) for _ in range(2)), vocab_size=512),
        hidden_size=shape.head_hidden,
        layers=shape.head_layers,
        heads=shape.head_heads,
        kv_heads=shape.head_kv_heads,
        ffn=shape.head_ffn,
        tied=True,
        seed=seed + 1,
        vocabulary=shape.vocabulary,
    )
    _write_pairs(world.pairs, shape, words, seed + 2)
    import_checkpoint(world.encoder, world.llm, world.checkpoint, feature_layer=-2, seed=seed + 3)
    export_checkpoint(world.checkpoint, "mllm", world.llava, "drop", None)
    return world


def require_empty(out: Path) -> None:
    """Raises UserError where `out` has files in it."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already has files in it; give a new folder with --out")


def _words() -> list[str]:
    """144 made-up words, each of which the tokenizer learns as one or two tokens, as with common words of real ones."""
    return [first + second for first in _SYLLABLES for second in _SYLLABLES]


def _write_pairs(folder: Path, shape: Shape, words: list[str], seed: int) -> None:
    with ShardWriter(folder, _SAMPLES_A_SHARD) as writer:
        for key, image, record in _pairs(shape, words, np.random.default_rng(seed)):
            writer.write(key, image, "png", record)


def _pairs(shape: Shape, words: list[str], draw: np.random.Generator) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    low, high = shape.words
    for index in range(shape.samples):
        lengths = [int(n) for n in draw.integers(low, high, size=3, endpoint=True)]
        question, chosen, rejected = (" ".join(draw.choice(words, size=n)) for n in (max(low // 3, 1), *lengths[1:]))
        record = {"question": question, "chosen": chosen, "rejected": rejected}
        yield f"pair-{index:06d}", _picture(shape.image_size, draw), record


def _picture(size: int, draw: np.random.Generator) -> bytes:
    """A PNG at exactly the size the model takes, so that neither side's resize has anything to do."""
    blocks = draw.integers(0, 256, size=(-(-size // _BLOCK), -(-size // _BLOCK), 3), dtype=np.uint8)
    pixels = blocks.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)[:size, :size]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
