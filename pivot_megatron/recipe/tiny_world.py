"""What `configs/evolve/tiny.yaml` starts from: `python -m pivot_megatron.recipe.tiny_world FOLDER`.

Captions, instructions, pairs and labelled images, an encoder, and heads of three sizes that know the same words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pivot_megatron.convert.tiny_checkpoints import make_head, make_tokenizer
from pivot_megatron.quiet import quiet
from pivot_megatron.recipe.demo_folder import Demo
from pivot_megatron.recipe.demo_scale import DemoScale
from pivot_megatron.recipe.demo_world import corpus, make_data, make_encoder_of, make_scenes, once

HEADS = {"small": (64, 2), "medium": (96, 3), "large": (128, 4)}
"""Hidden size and layers of each."""


def make_world(out: Path, scale: DemoScale) -> None:
    """`out/data` and `out/checkpoints`; what is there already stays."""
    demo = Demo(out, 1, scale)
    make_data(demo)
    make_scenes(demo)
    make_encoder_of(demo)
    tokenizer = make_tokenizer(corpus(demo), scale.vocabulary)
    for n, (name, (hidden, layers)) in enumerate(HEADS.items()):
        head = partial(make_head, hidden_size=hidden, layers=layers, ffn=3 * hidden, seed=scale.seed + 10 + n)
        once(demo.checkpoint(name), partial(head, tokenizer=tokenizer, heads=4, kv_heads=2, tied=True))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(
            "tiny_world: expected a folder, as in: python -m pivot_megatron.recipe.tiny_world runs/tiny",
            file=sys.stderr,
        )
        return 2
    quiet()
    scale = replace(DemoScale.full(), captions=8_000, instruct=6_000, pairs=2_000, held_out=300)
    make_world(Path(arguments[0]), scale)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
