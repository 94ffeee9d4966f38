"""`pivot convert import` and `export`: one process, one layout (none), between folders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pivot_megatron.config.schema import Component, Encoder, Layout, Model, Precision, Recompute
from pivot_megatron.convert.export import (
    encoder_files,
    export_encoder,
    export_mllm,
    image_token_and_processor,
)
from pivot_megatron.convert.gather import hf_tensors
from pivot_megatron.convert.hf import HfTensors, write_folder
from pivot_megatron.convert.load import check_layout_fits
from pivot_megatron.convert.plan import COMPONENTS
from pivot_megatron.convert.start import describe_start, start_weights
from pivot_megatron.convert.store import (
    Description,
    describe,
    load_weights,
    resolve_checkpoint,
    save_weights,
    tensor_dtype,
)
from pivot_megatron.errors import UserError
from pivot_megatron.families.siglip import HF_PREFIX
from pivot_megatron.model.composition import VisionLanguageModel, build_model
from pivot_megatron.runtime.distributed import process_groups


@contextmanager
def whole_model(description: Description) -> Iterator[VisionLanguageModel]:
    """The whole model in this process, fp32: every stored dtype (bf16, fp16, fp32) passes through it unchanged."""
    arch = description.architecture()
    check_layout_fits(arch, Layout())
    with process_groups(Layout(), seed=0):
        yield build_model(arch, Layout(), Precision("fp32"), Recompute())


def import_checkpoint(encoder: Path, llm: Path, out: Path, feature_layer: int, seed: int) -> None:
    """Hugging Face folders into a checkpoint that any layout loads; the projector starts fresh from `seed`."""
    if out.exists():
        raise UserError(f"{out}: already exists; import to a new folder")
    start = Model(encoder=Encoder(hf=encoder, feature_layer=feature_layer), llm=Component(hf=llm))
    description = describe_start(start)
    with whole_model(description) as model:
        start_weights(model, start, seed)
        save_weights(model, out, description)


def export_checkpoint(
    path: Path,
    part: Literal["encoder", "mllm"],
    out: Path,
    last_layer: Literal["drop", "original"],
    original: Path | None,
) -> None:
    """A checkpoint's (or a run's newest) encoder or whole model as a Hugging Face folder, whole or absent."""
    checkpoint = resolve_checkpoint(path)
    description = describe(checkpoint)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already has files in it; export to a new folder")
    with whole_model(description) as model:
        for name in COMPONENTS:
            load_weights(model, checkpoint, name)
        tensors = hf_tensors(model)
    facts = {"checkpoint": str(checkpoint), "part": part, "feature_layer": description.feature_layer}
    if part == "mllm":
        with tempfile.TemporaryDirectory() as scratch:
            token = image_token_and_processor(description, Path(scratch))
            config, named = export_mllm(description, tensors, token)
            _write(out, config, named, [f for f in Path(scratch).iterdir() if f.is_file()], facts)
        return
    source = HfTensors(original, prefixes=(HF_PREFIX,)) if original else None
    config, named = export_encoder(description, tensors, last_layer, source, tensor_dtype(checkpoint))
    facts |= {"last_layer": last_layer, "original": str(original) if original else None}
    facts["features"] = "hidden_states[-1]" if last_layer == "drop" else f"hidden_states[{description.feature_layer}]"
    _write(out, config, named, encoder_files(description), facts)


def _write(
    out: Path, config: dict[str, Any], tensors: dict[str, Any], files: list[Path], facts: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "pivot_export.json"
        note.write_text(json.dumps(facts, indent=2) + "\n")
        write_folder(out, config, tensors.items(), [*files, note])
