"""`pivot bench convert`: a head of true size imported and exported, against a plain copy of its files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.convert.hf import HfTensors, write_folder
from pivot_megatron.convert.plan import part_shapes
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_tokenizer
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture
from pivot_megatron.runtime.memory import peak_resident

_COMMON = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
}
# Qwen2.5's, and one that takes seconds.
HEADS: Mapping[str, Mapping[str, Any]] = {
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 576,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Conversion:
    """Bytes and seconds. `peak_*`: the process's highest resident memory, what it has mapped counted in. `exact`: every
    tensor of the export is the source's, bit for bit."""

    head: str
    bytes: int
    largest_tensor: int
    copy_seconds: float
    import_seconds: float
    export_seconds: float
    peak_import: int
    peak_export: int
    exact: bool


def measure_conversion(head: str, out: Path, say: Callable[[str], None]) -> Conversion:
    """In `out`, which must be new. At most two copies of the head stand on the disk at once."""
    if head not in HEADS:
        raise UserError(f"--head: expected one of {', '.join(HEADS)}, found {head}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already has files in it; give a new folder with --out")
    source, encoder, copy = out / "head", out / "encoder", out / "copy"
    say(f"a random head of {head}'s shape")
    digests = _make_head(head, source)
    make_encoder(encoder, image_size=32, patch_size=16, hidden_size=64, layers=2, heads=4, ffn=128, seed=1)
    files = sorted(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    say("a copy")
    copy.mkdir()
    began = time.perf_counter()
    for file in files:
        _copy_to_disk(file, copy / file.name)
    copied = time.perf_counter() - began
    shutil.rmtree(copy)
    say("import")
    checkpoint, exported = out / "checkpoint", out / "export"
    imported, peak_import = _run(
        ["convert", "import", "--encoder", str(encoder), "--llm", str(source), "--out", str(checkpoint)], out
    )
    shutil.rmtree(source)
    say("export")
    export, peak_export = _run(["convert", "export", str(checkpoint), "--part", "mllm", "--out", str(exported)], out)
    shutil.rmtree(checkpoint)
    say("comparison")
    prefixed = HfTensors(exported, lambda name: [f"language_model.{name}"])
    exact = all(_digest(prefixed.read(name)) == digest for name, (digest, _) in digests.items())
    shutil.rmtree(exported)
    largest = max(nbytes for _, nbytes in digests.values())
    return Conversion(head, size, largest, copied, imported, export, peak_import, peak_export, exact)


def _copy_to_disk(source: Path, target: Path) -> None:
    """Copied, and waited for until it lies on the disk, as a checkpoint is."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _make_head(name: str, folder: Path) -> dict[str, tuple[str, int]]:
    """Write it; each tensor's digest and bytes."""
    config = {**_COMMON, **HEADS[name]}
    vision = encoder_architecture({"model_type": "siglip", "image_size": 32, "patch_size": 16}, "the bench")
    arch = Architecture(vision, head_architecture(config, "the bench"), -2)
    found: dict[str, tuple[str, int]] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for part, shape in part_shapes(arch, "llm").items():
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
            found[part] = (_digest(tensor), tensor.nbytes)
            yield part, tensor

    write_folder(folder, config, tensors())
    make_tokenizer(["the bench"], 300).save_pretrained(folder)
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().data, digest_size=16).hexdigest()


def _run(arguments: list[str], out: Path) -> tuple[float, int]:
    """Seconds and highest resident memory of `pivot ARGUMENTS`."""
    log = out / "log.txt"
    began, peak = time.perf_counter(), 0
    with log.open("wb") as file:
        command = [sys.executable, "-m", "pivot_megatron.cli", *arguments]
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while child.poll() is None:
            peak = max(peak, peak_resident(child.pid))
            time.sleep(0.02)
    if child.returncode:
        raise RunError(f"pivot {' '.join(arguments[:2])} ended with {child.returncode}; see {log}")
    return time.perf_counter() - began, peak


def as_text(found: Conversion) -> str:
    gib = 2.0**30
    rows = [
        f"{found.head}: {found.bytes / gib:.2f} GiB of safetensors, largest tensor {found.largest_tensor / gib:.2f} GiB",
        f"copy    {found.copy_seconds:6.1f} s  {found.bytes / gib / found.copy_seconds:5.2f} GiB/s",
    ]
    for what, seconds, peak in (
        ("import", found.import_seconds, found.peak_import),
        ("export", found.export_seconds, found.peak_export),
    ):
        rows.append(
            f"{what:<6}  {seconds:6.1f} s  {found.bytes / gib / seconds:5.2f} GiB/s, {found.copy_seconds / seconds:.2f} of the "
            f"copy's speed; peak memory {peak / gib:.2f} GiB, {(peak - found.largest_tensor) / gib:.2f} beyond one tensor"
        )
    rows.append("every tensor came back bit for bit" if found.exact else "TENSORS DIFFER")
    return "\n".join(rows)


def as_json(found: Conversion) -> str:
    return json.dumps(vars(found), indent=2)
