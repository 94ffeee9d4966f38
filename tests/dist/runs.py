"""Small runs for tests: checkpoints and shards made on the spot, and a config over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.start import describe_start
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.loader import Loader
from pivot_megatron.data_prep.synthetic import make_question, write_pairs
from pivot_megatron.errors import UserError
from pivot_megatron.model.flops import SampleWork
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer


def make_world(folder: Path, pairs: int = 96) -> Path:
    """Encoder, head and pair shards (a tenth of them without an image) in `folder`; returns it."""
    questions = [make_question(1, i) for i in range(200)]
    tokenizer = make_tokenizer((f"{q.question} {q.chosen}" for q in questions), 400)
    make_encoder(folder / "encoder", image_size=48, patch_size=16, hidden_size=32, layers=3, heads=4, ffn=48, seed=1)
    make_head(
        folder / "llm", tokenizer, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn=64, tied=True, seed=2
    )
    write_pairs(folder / "pairs", pairs, seed=3, image_size=48, progress=False, text_only=0.1)
    return folder


def config_tree(world: Path, out: Path) -> dict[str, Any]:
    """Nine steps of DPO in fp32."""
    return {
        "name": "test",
        "out": str(out),
        "model": {"encoder": {"hf": str(world / "encoder")}, "llm": {"hf": str(world / "llm")}},
        "objective": {"kind": "dpo", "beta": 0.5},
        "data": {"shards": [str(world / "pairs")], "sequence_length": 128},
        "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.1},
        "batch": {"global_size": 12, "micro_tokens": 256, "steps": 9},
        "precision": {"compute": "fp32"},
        "checkpoints": {"every": 4, "keep": 10},
    }


def write_config(path: Path, tree: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


def loader(
    data: Path, rank: int = 0, size: int = 1, with_images: bool = True, shards: Path | None = None, **data_keys: object
) -> Loader:
    """Of the world `data`, or of other `shards`, by the config's defaults but for `data_keys`."""
    tree = config_tree(data, data / "unused")
    tree["batch"] |= {key: data_keys.pop(key) for key in ("global_size", "micro_tokens") if key in data_keys}
    tree["model"]["encoder"] |= {"image_size": data_keys.pop("image_size", None)}
    tree["data"] |= {"shards": [str(shards or data / "pairs")], **data_keys}
    config = load_config(write_config(data / "loader.yaml", tree))
    start = describe_start(config.model)
    arch = start.architecture()
    return build_loader(
        config, data / "llm", start.image_views(), SampleWork(arch), 2, rank, size, with_images=with_images
    )


def train_at(config_file: Path, layout: Layout) -> int:
    """A worker's job: the whole run at `layout`; returns the steps it made."""
    from pivot_megatron.train.trainer import train

    return train(replace(load_config(config_file), layout=layout))


def train_error(config_file: Path, layout: Layout) -> str:
    """A worker's job: the message of the user's mistake that stops the run."""
    try:
        train_at(config_file, layout)
    except UserError as error:
        return str(error)
    raise AssertionError("the run went through")
