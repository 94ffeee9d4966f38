"""Names for the weights that a model starts from: equal weights, equal name, whatever the folder is called."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.schema import Component, Model, Projector
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.plan import COMPONENTS


def model_fingerprint(start: Model, seed: int) -> dict[str, str]:
    """A digest (hex) of each component's weights.

    Hugging Face folders are read whole, some gigabytes a second; a checkpoint carries a name of its own from when it was
    written.
    """
    return {name: _component(getattr(start, name), seed) for name in COMPONENTS}


def _component(component: Component, seed: int) -> str:
    if component.checkpoint is not None:
        found = str(read_json(resolve_checkpoint(component.checkpoint) / "model.json")["id"])
        part = isinstance(component, Projector) and component.keep == "first"
        return f"{found}, its first linear, and fresh {seed}" if part else found
    if component.hf is not None:
        return folder_fingerprint(component.hf)
    config = json.dumps(read_json(component.fresh / "config.json"), sort_keys=True) if component.fresh else ""
    return hashlib.sha256(f"fresh {seed} {config}".encode()).hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """A digest (hex) of a Hugging Face folder's config and weights."""
    return _files([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _files(paths: list[Path]) -> str:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}"

    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return hashlib.sha256("\n".join(pool.map(digest, paths)).encode()).hexdigest()
