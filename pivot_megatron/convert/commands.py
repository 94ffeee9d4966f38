"""`pivot convert import` and `export`: one process, one layout (none), between folders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pivot_megatron.checkpoints.folder import facts_of, resolve_checkpoint
from pivot_megatron.config.schema import Component, Encoder, Layout, Model, Precision, Recompute
from pivot_megatron.convert.assembled import take_apart
from pivot_megatron.convert.export import (
    Trained,
    encoder_parts,
    export_encoder,
    export_mllm,
    require_assembled,
)
from pivot_megatron.convert.hf import PROCESSOR, cannot_write, read_json, write_folder
from pivot_megatron.convert.load import (
    Source,
    component_parameters,
    hf_source,
    hf_tensors_of,
)
from pivot_megatron.convert.plan import COMPONENTS
from pivot_megatron.convert.processors import mark_ids_and_processor, processor_file
from pivot_megatron.convert.reference import lacking
from pivot_megatron.convert.saving import Sums, save_whole
from pivot_megatron.convert.start import describe_start
from pivot_megatron.convert.store import (
    Description,
    describe,
    load_weights,
    saved_metadata,
)
from pivot_megatron.convert.stream import CheckpointParameters, write_parameters
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import differences
from pivot_megatron.families.registry import encoder_architecture
from pivot_megatron.model.composition import Architecture, Stage, build_model
from pivot_megatron.model.fit import require_fit
from pivot_megatron.runtime.distributed import process_groups

EXPORT_NOTE = "pivot_export.json"
"""What is told of an export beside its weights: where it is from, and which hidden state was trained through."""


@contextmanager
def whole_model(description: Description) -> Iterator[Stage]:
    """The whole model in this process, fp32: every stored dtype (bf16, fp16, fp32) passes through it unchanged."""
    arch = description.architecture()
    require_fit(arch, Layout())
    with process_groups(Layout(), seed=0):
        yield build_model(arch, Layout(), Precision("fp32"), Recompute())


@contextmanager
def trained_model(path: Path) -> Iterator[Stage]:
    """The whole model of a checkpoint, or of a run's newest, in this process, fp32."""
    checkpoint = resolve_checkpoint(path)
    with whole_model(describe(checkpoint)) as model:
        for component in COMPONENTS:
            load_weights(model, checkpoint, component)
        model.eval()
        yield model


def import_checkpoint(
    encoder: Path, llm: Path, out: Path, feature_layer: int | None, seed: int, image_size: int | None = None
) -> None:
    """Hugging Face folders into a checkpoint that any layout loads, every tensor in its own dtype; the projector starts fresh
    from `seed`."""
    start = Model(
        encoder=Encoder(hf=encoder, feature_layer=feature_layer, image_size=image_size), llm=Component(hf=llm)
    )
    description = describe_start(start)
    arch = description.architecture()
    sources = {name: hf_source(arch, name, folder) for name, folder in (("encoder", encoder), ("llm", llm))}
    write_import(description, sources, out, seed)


def import_assembled(mllm: Path, out: Path, feature_layer: int | None, image_size: int | None = None) -> None:
    """A `LlavaForConditionalGeneration` folder into a checkpoint that any layout loads."""
    with tempfile.TemporaryDirectory() as scratch:
        assembled = take_apart(mllm, Path(scratch), feature_layer, image_size)
        write_import(assembled.description, assembled.sources(), out, seed=0)  # nothing starts fresh


def write_import(description: Description, sources: Mapping[str, Source], out: Path, seed: int) -> None:
    """`sources` by component; one that has none starts fresh from `seed`. Raises UserError for tensors that are missing or of
    another shape than the configs say; then `out` is absent."""
    if out.exists():
        raise UserError(f"{out}: already exists; import to a new folder")
    arch = description.architecture()
    require_fit(arch, Layout())
    timms = "pretrained_cfg" in read_json(description.encoder / "config.json")
    if timms or (description.encoder / PROCESSOR).exists():
        description.image_views()  # that it fits is seen now, not when a run begins
    parameters = [p for name in COMPONENTS for p in component_parameters(arch, name, sources.get(name), seed)]

    def write(folder: Path) -> Sums:
        return write_parameters(parameters, folder, saved_metadata())

    with process_groups(Layout(), seed=0):
        save_whole(out, description, write)


def export_checkpoint(
    path: Path,
    part: Literal["encoder", "mllm"],
    out: Path,
    last_layer: Literal["drop", "original"],
    original: Path | None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """A checkpoint's (or a run's newest) encoder or whole model as a Hugging Face folder, whole or absent. Returns the names of
    tensors that the library's class has and neither checkpoint nor `original` holds, such as a pooler past the features.

    `dtype`: to round to; left out, nothing is rounded, so that what trained in bf16 is written as the float32 numbers behind it.
    """
    checkpoint = resolve_checkpoint(path)
    description = describe(checkpoint)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already has files in it; export to a new folder")
    arch = description.architecture()
    if part == "mllm":
        require_assembled(arch)
    if (last_layer == "drop" and original) or (part == "mllm" and last_layer != "drop"):
        raise UserError("--original: is read where --part is encoder and --last-layer original; leave it out")
    if original is not None and dtype is not None:
        raise UserError(
            "--dtype: what did not train keeps the original's own with --original; leave one of the two out"
        )
    if original is not None:
        _require_same(arch, original)
    trained, lacks = Trained(arch, CheckpointParameters(checkpoint / "tensors"), dtype), list[str]()
    facts = {
        "checkpoint": str(checkpoint),
        "id": facts_of(checkpoint)["id"],
        "part": part,
        "feature_layer": description.feature_layer,
    }
    if arch.encoder.native:
        facts["max_patches"] = description.max_patches  # none: the image processor's own
    else:
        facts["image_size"] = arch.encoder.image_size
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if part == "mllm":
                marks = mark_ids_and_processor(description, Path(scratch))
                config, named = export_mllm(description, trained, marks)
                files = [f for f in Path(scratch).iterdir() if f.is_file()]
            else:
                source = hf_tensors_of(arch, "encoder", original) if original else None
                config, named = export_encoder(description, trained, last_layer, source)
                lacks = lacking(arch.encoder.family, config, encoder_parts(arch, source))
                facts |= {"last_layer": last_layer, "original": str(original) if original else None, "lacks": lacks}
                facts["features"] = _features(description, arch, last_layer)
                processor = processor_file(description, Path(scratch))
                files = [processor] if processor else []
            _write(out, config, named, files, facts)
    except OSError as error:  # of `out` itself it is told there
        raise cannot_write(Path(tempfile.gettempdir()), error) from None
    return lacks


def _require_same(arch: Architecture, original: Path) -> None:
    where = original / "config.json"
    if told := differences(arch.encoder, encoder_architecture(read_json(where), str(where)), but=("image_size",)):
        raise UserError(f"--original: {where}: expected the encoder that the run started from, with {told}")


def _features(description: Description, arch: Architecture, last_layer: str) -> str:
    if arch.final_norm:
        return "last_hidden_state"
    return "hidden_states[-1]" if last_layer == "drop" else f"hidden_states[{description.feature_layer}]"


def _write(
    out: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], files: list[Path], facts: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / EXPORT_NOTE
        note.write_text(json.dumps(facts, indent=2) + "\n")
        write_folder(out, config, tensors, [*files, note])
