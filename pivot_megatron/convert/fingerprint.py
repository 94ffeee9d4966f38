"""Names for what a model starts from: equal weights, equal name, whatever the folder is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.schema import Component, Model
from pivot_megatron.convert.digests import file_digest
from pivot_megatron.convert.hf import TOKENIZER_FILES, read_json
from pivot_megatron.convert.plan import COMPONENTS
from pivot_megatron.convert.start import describe_start, fresh_parameters
from pivot_megatron.convert.store import Description


def start_fingerprint(start: Model, seed: int) -> dict[str, str]:
    """Of everything that a run takes from where it starts: digests (hex) of each component's weights, by name, of how images are
    brought to the encoder (`processor`) and of what makes tokens of text (`tokenizer`).

    Large files of Hugging Face folders are read whole, once; a checkpoint carries a name of its own from when it was written.
    """
    description = describe_start(start)
    return {
        **{name: _component(start, name, seed, description) for name in COMPONENTS},
        "processor": description.image_views().fingerprint,
        "tokenizer": tokenizer_fingerprint(description.llm),
    }


def _component(start: Model, name: str, seed: int, description: Description) -> str:
    component: Component = getattr(start, name)
    if component.checkpoint is not None:
        checkpoint = resolve_checkpoint(component.checkpoint)
        found = str(read_json(checkpoint / "model.json")["id"])
        fresh = fresh_parameters(start, checkpoint, description.architecture()) if name == "projector" else []
        return f"{found}, but for {', '.join(fresh)}, fresh {seed}" if fresh else found
    if component.hf is not None:
        return folder_fingerprint(component.hf)
    config = json.dumps(read_json(component.fresh / "config.json"), sort_keys=True) if component.fresh else ""
    return hashlib.sha256(f"fresh {seed} {config}".encode()).hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """A digest (hex) of a Hugging Face folder's config and weights. Raises UserError where a file cannot be read."""
    return _files([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def tokenizer_fingerprint(folder: Path) -> str:
    """A digest (hex) of the files by which text becomes tokens, chat template and all."""
    names = sorted(set(TOKENIZER_FILES) - {"generation_config.json"})
    return _files(path for name in names if (path := folder / name).exists())


def _files(paths: Iterable[Path]) -> str:
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        told = pool.map(lambda path: f"{path.name} {file_digest(path)}", paths)
        return hashlib.sha256("\n".join(told).encode()).hexdigest()
