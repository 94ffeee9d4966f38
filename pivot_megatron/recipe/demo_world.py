"""What the demo starts from: shards of rendered questions, images for probes, and checkpoints of random weights in Hugging
Face's form."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data.chat import SYSTEM
from pivot_megatron.data.sample import Conversation
from pivot_megatron.data.shards import open_shards
from pivot_megatron.data_prep.synthetic import (
    SCENE_CLASSES,
    scene_classes,
    scene_masks,
    write_conversations,
    write_pairs,
)
from pivot_megatron.probe.digits import digits
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.masked import IMAGES, MASKS
from pivot_megatron.recipe.demo_folder import Demo

_CORPUS_ROWS = 2000  # of captions and instructions each, for the tokenizer


def make_data(demo: Demo) -> None:
    """Captions, instructions, pairs and held-out pairs, each of a seed of its own, so that none shares an image."""
    scale, size, seed = demo.scale, demo.scale.image_size, demo.scale.seed
    once(demo.data("captions"), lambda out: write_conversations(out, scale.captions, seed, size, "caption"))
    once(demo.data("instruct"), lambda out: write_conversations(out, scale.instruct, seed + 1, size, "instruct"))
    once(demo.data("pairs"), lambda out: write_pairs(out, scale.pairs, seed + 2, size))
    once(demo.data("held_out"), lambda out: write_pairs(out, scale.held_out, seed + 3, size))


def make_scenes(demo: Demo) -> None:
    """Scenes of one large shape among small ones, a folder of images a class, to train a probe with and to test it."""
    scale = demo.scale
    for n, (split, count) in enumerate((("train", scale.probe_train), ("test", scale.probe_test))):
        images, labels = scene_classes(scale.seed + 4 + n, count, scale.image_size)
        drawn = ImageSet.of_bytes(images, np.array(labels), SCENE_CLASSES)
        once(demo.data("scenes") / split, partial(_write_classes, drawn, "jpg"))


def make_probe_data(demo: Demo) -> None:
    """Scenes of classes, scenes with masks, and handwritten digits, which nothing here is trained on."""
    scale = demo.scale
    make_scenes(demo)
    for n, (split, count) in enumerate((("train", scale.masked_train), ("test", scale.masked_test))):
        once(
            demo.data("masks") / split, partial(_write_masks, scene_masks(scale.seed + 6 + n, count, scale.image_size))
        )
    if scale.digits:
        for split, images in zip(("train", "test"), digits(scale.image_size), strict=True):
            once(demo.data("digits") / split, partial(_write_classes, images, "png"))


def _write_classes(images: ImageSet, extension: str, out: Path) -> None:
    for n, label in enumerate(images.labels):
        file = out / images.classes[label] / f"{n:05d}.{extension}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(images.read(n))


def _write_masks(pairs: list[tuple[bytes, bytes]], out: Path) -> None:
    for folder in (IMAGES, MASKS):
        (out / folder).mkdir(parents=True)
    for n, (image, mask) in enumerate(pairs):
        (out / IMAGES / f"{n:05d}.jpg").write_bytes(image)
        (out / MASKS / f"{n:05d}.png").write_bytes(mask)


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
