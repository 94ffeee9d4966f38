"""What the demo starts from: shards of rendered questions, and checkpoints of random weights in Hugging Face's form."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data.chat import SYSTEM
from pivot_megatron.data.sample import Conversation
from pivot_megatron.data.shards import open_shards
from pivot_megatron.data_prep.synthetic import write_conversations, write_pairs
from pivot_megatron.recipe.demo_folder import Demo

_CORPUS_ROWS = 2000  # of captions and instructions each, for the tokenizer


def make_data(demo: Demo) -> None:
    """Captions, instructions, pairs and held-out pairs, each of a seed of its own, so that none shares an image."""
    scale, size, seed = demo.scale, demo.scale.image_size, demo.scale.seed
    once(demo.data("captions"), lambda out: write_conversations(out, scale.captions, seed, size, "caption"))
    once(demo.data("instruct"), lambda out: write_conversations(out, scale.instruct, seed + 1, size, "instruct"))
    once(demo.data("pairs"), lambda out: write_pairs(out, scale.pairs, seed + 2, size))
    once(demo.data("held_out"), lambda out: write_pairs(out, scale.held_out, seed + 3, size))


def make_checkpoints(demo: Demo) -> None:
    """`encoder` (SigLIP) and `llm` (Qwen2.5, its tokenizer trained on the data's own text)."""
    scale = demo.scale
    make_encoder_of(demo)
    tokenizer = make_tokenizer(corpus(demo), scale.vocabulary)
    once(
        demo.llm,
        lambda out: make_head(
            out,
            tokenizer,
            hidden_size=scale.hidden,
            layers=scale.head_layers,
            heads=4,
            kv_heads=2,
            ffn=scale.ffn,
            tied=True,
            seed=scale.seed + 1,
        ),
    )


def make_encoder_of(demo: Demo) -> None:
    scale = demo.scale
    once(
        demo.encoder,
        lambda out: make_encoder(
            out,
            image_size=scale.image_size,
            patch_size=scale.patch_size,
            hidden_size=scale.hidden,
            layers=scale.encoder_layers,
            heads=4,
            ffn=scale.ffn,
            seed=scale.seed,
        ),
    )


def corpus(demo: Demo) -> Iterator[str]:
    """All that is said in a part of the captions and instructions: what a tokenizer is made of."""
    for name in ("captions", "instruct"):
        reader = open_shards(demo.data(name))
        for position in range(min(_CORPUS_ROWS, len(reader))):
            sample = reader.read(position)
            if isinstance(sample, Conversation):
                yield from (turn.text for turn in sample.turns)
                # The frame of every prompt: its words become one token each.
                yield f"system\n{SYSTEM}\nuser\nassistant\n"


def once(out: Path, make: Callable[[Path], None]) -> None:
    """`out` whole or absent, also after a kill in the middle."""
    if out.exists():
        return
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    make(part)
    part.replace(out)
