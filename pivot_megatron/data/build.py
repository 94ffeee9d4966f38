"""The loader that a run's config asks for, with the tokenizer and image processor of its model's folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pivot_megatron.config.schema import AnyRes, RunConfig
from pivot_megatron.data.images import ImageTransform, PixelSteps, read_processor
from pivot_megatron.data.loader import Loader, PairSet
from pivot_megatron.data.tokens import SampleTokenizer, Tokenized, Tokenizer, template_by_name
from pivot_megatron.data.views import ImageViews, Native, Square, Tiled
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.families.flops import encoder_flops, head_flops

PACK_MULTIPLE = 16  # tokens a tensor-parallel rank, which FP8 matrix products need and nothing else minds


def load_tokenizer(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and not needed to check a config

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # A fast tokenizer settles its padding and truncation at the first call, which must not happen in two threads at once.
        ids = tokenizer.encode("first", add_special_tokens=False)
    except Exception as error:  # the library answers files it cannot read with anything
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: expected a tokenizer, found none that loads ({detail})") from None
    if not ids:  # what it makes of a folder without one
        raise UserError(f"{folder}: expected a tokenizer, found no tokenizer.json, nor vocab.json and merges.txt")
    loaded: Tokenizer = tokenizer
    return loaded


def image_views(
    folder: Path, encoder: EncoderArchitecture, image_size: int | None, max_patches: int | None, anyres: AnyRes | None
) -> ImageViews:
    """How `encoder` sees images, by the image processor of its `folder`. `image_size`, `max_patches`: where they are not the
    processor's own. Raises UserError where the two do not go together."""
    if encoder.native:
        path, config = read_processor(folder)
        most = max_patches or config.get("max_num_patches", 256)
        if config.get("patch_size", 16) != encoder.patch_size:
            raise UserError(
                f"{path}: patch_size: expected the encoder's, {encoder.patch_size}, found {config['patch_size']}"
            )
        return Native(PixelSteps.from_config(path, config), encoder.patch_size, most)
    transform = ImageTransform.from_processor_folder(folder, image_size)
    if transform.image_size != encoder.image_size:
        raise UserError(
            f"{folder}: preprocessor_config.json resizes to {transform.image_size} pixels, config.json's encoder takes "
            f"{encoder.image_size}; say with model.encoder.image_size (--image-size) which it is"
        )
    return (
        Tiled(transform, encoder.grid, anyres.every_grid, anyres.max_tiles)
        if anyres
        else Square(transform, encoder.grid)
    )


def build_loader(
    config: RunConfig,
    llm_folder: Path,
    images: ImageViews,
    encoder: EncoderArchitecture,
    head: HeadArchitecture,
    branches: int,
    rank: int,
    size: int,
    with_images: bool,
) -> Loader:
    """The share of data-parallel `rank` of `size`. Raises UserError if files are missing or do not fit the model."""
    batch = config.batch
    tokenizer = load_tokenizer(llm_folder)
    tokenize = SampleTokenizer(
        tokenizer=tokenizer,
        template=template_by_name(config.data.template, tokenizer),
        view=images.fixed,
        sequence_length=config.data.sequence_length,
        branches=branches,
        too_long=config.data.too_long,
    )
    return Loader(
        samples=PairSet.open(config.data.shards),
        tokenize=tokenize,
        images=images,
        image_backend=config.data.image_backend,
        global_size=batch.global_size,
        flops=partial(sample_flops, encoder=encoder, head=head),
        micro_tokens=batch.micro_tokens,
        micro_images=batch.micro_images,
        seed=config.seed,
        pack_multiple=config.layout.tensor * PACK_MULTIPLE,
        rank=rank,
        size=size,
        with_images=with_images,
        skip_bad=config.data.on_bad_sample == "skip",
    )


def sample_flops(sample: Tokenized, encoder: EncoderArchitecture, head: HeadArchitecture) -> float:
    """Estimated work of one forward pass over `sample`; backward is in proportion."""
    answers = sum(sum(branch.loss) for branch in sample.branches)
    images = sum(
        encoder_flops(encoder, encoder.layers, rows * columns) for view in sample.views for rows, columns in view.grids
    )
    return images + head_flops(head, sample.segments, answers)
