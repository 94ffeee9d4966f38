"""What turns an image and a question into an exported model's inputs: image processor, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pivot_megatron.config.schema import AnyRes
from pivot_megatron.convert.hf import PROCESSOR, cannot_write, read_json
from pivot_megatron.convert.store import Description
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.chat import QWEN_1_5_JINJA
from pivot_megatron.data.images import square_processor
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture

IMAGE, VIDEO = "<image>", "<video>"


def select_strategy(arch: Architecture) -> Literal["default", "full"]:
    """transformers' word for leaving a class token out, or having none."""
    return "default" if arch.encoder.class_token else "full"


def pinpoints(anyres: AnyRes, image_size: int) -> list[list[int]]:
    """Grids of tiles as transformers has them: height and width in pixels."""
    return [[rows * image_size, columns * image_size] for rows, columns in anyres.every_grid]


def aspect_ratio(anyres: AnyRes) -> str:
    """transformers' word for how far an image of many tiles is scaled down."""
    return f"anyres_max_{anyres.max_tiles}"


def mark_ids_and_processor(description: Description, out: Path) -> dict[str, int]:
    """Save tokenizer and processor with an `<image>` token of its own to `out`; returns the ids of the marks it has.

    They take the first free ids, which the embedding must already have rows for.
    """
    arch, anyres = description.architecture(), description.anyres
    tokenizer: Any = load_tokenizer(description.llm)
    # LLaVA-OneVision's processor asks for one of videos too, which then must be no other word's.
    marks = [IMAGE] if anyres is None else [IMAGE, VIDEO]
    tokenizer.add_tokens(marks, special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(marks)
    if max(ids) >= arch.head.vocabulary:
        raise UserError(
            f"{description.llm}: the tokenizer uses all {arch.head.vocabulary} rows of the embedding, so no id is free for "
            f"{' and '.join(marks)}; add rows to the head before training"
        )
    if description.template != "tokenizer":
        tokenizer.chat_template = QWEN_1_5_JINJA  # Qwen2.5's own would put another system prompt in front
    with tempfile.TemporaryDirectory() as scratch:
        file = processor_file(description, Path(scratch))
        if file is None:
            raise UserError(
                f"{description.encoder / PROCESSOR}: no such file; an assembled model needs the encoder's own"
            )
        processor = (
            _llava_processor(arch, _with_config(file, description, Path(scratch)), tokenizer)
            if anyres is None
            else tokenizer
        )
        try:
            processor.save_pretrained(out)
        except Exception as error:  # the library answers a disk that refuses with anything
            raise cannot_write(out, error) from None
        if anyres is not None:
            _save_onevision(anyres, arch, read_json(file), out)
    return dict(zip(marks, ids, strict=True))


def _with_config(processor: Path, description: Description, scratch: Path) -> Path:
    """A folder of the two: an image processor that does not say what it is follows from the model's type."""
    together = scratch / "together"
    together.mkdir()
    for file in (processor, description.encoder / "config.json"):
        shutil.copyfile(file, together / file.name)
    return together


def _llava_processor(arch: Architecture, image_processor: Path, tokenizer: Any) -> Any:
    from transformers import AutoImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(image_processor, local_files_only=True),
        tokenizer=tokenizer,
        patch_size=arch.encoder.patch_size,
        vision_feature_select_strategy=select_strategy(arch),
        num_additional_image_tokens=arch.encoder.places - arch.encoder.tokens,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )


def _save_onevision(anyres: AnyRes, arch: Architecture, square: Mapping[str, Any], out: Path) -> None:
    """`square`: the image processor of one square, whose steps every tile goes through.

    Written as files: the class of the processor needs torchvision, for videos.
    """
    steps = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    common = {name: square[name] for name in steps if name in square} | {"do_resize": True, "do_convert_rgb": True}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": arch.encoder.places,
        "vision_feature_select_strategy": select_strategy(arch),
        "vision_aspect_ratio": aspect_ratio(anyres),
        "image_token": IMAGE,
        "video_token": VIDEO,
    }
    tiles = {"image_grid_pinpoints": pinpoints(anyres, arch.encoder.image_size), "do_pad": True}
    for name, config in (
        (PROCESSOR, {**common, **tiles, "image_processor_type": "LlavaOnevisionImageProcessor"}),
        ("video_preprocessor_config.json", {**common, "video_processor_type": "LlavaOnevisionVideoProcessor"}),
        ("processor_config.json", processor),
    ):
        (out / name).write_text(json.dumps(config, indent=2) + "\n")


def processor_file(description: Description, scratch: Path) -> Path | None:
    """`preprocessor_config.json` that makes the pixels which the encoder trained on: its own, or one that resizes to the same
    square, or to as many patches, written to `scratch`. None where its folder has none."""
    stored = description.encoder / PROCESSOR
    if not stored.exists():
        return None
    config, encoder = read_json(stored), description.architecture().encoder
    size, most = encoder.image_size, description.max_patches
    made = scratch / PROCESSOR
    if encoder.native:
        if most in (None, config.get("max_num_patches")):
            return stored
        made.write_text(json.dumps({**config, "max_num_patches": most}, indent=2) + "\n")
        return made
    if not config.get("do_center_crop") and config.get("size") == {"height": size, "width": size}:
        return stored
    made.write_text(json.dumps(square_processor(config, size), indent=2) + "\n")
    return made
