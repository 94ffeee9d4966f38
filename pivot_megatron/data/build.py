"""The loader that a run's config asks for, with the tokenizer and image processor of its model's folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.data.images import ImageTransform
from pivot_megatron.data.loader import Loader, PairSet
from pivot_megatron.data.tokens import SampleTokenizer, Tokenized, Tokenizer, template_by_name
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.families.flops import encoder_flops, head_flops

PACK_MULTIPLE = 16  # tokens a tensor-parallel rank, which FP8 matrix products need and nothing else minds


def load_tokenizer(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and not needed to check a config

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: expected a tokenizer, found none that loads ({str(error).splitlines()[0]})"
        ) from None
    loaded: Tokenizer = tokenizer
    # A fast tokenizer settles its padding and truncation at the first call, which must not happen in two threads at once.
    loaded.encode("first", add_special_tokens=False)
    return loaded


def build_loader(
    config: RunConfig,
    encoder_folder: Path,
    llm_folder: Path,
    resolution: int | None,
    encoder: EncoderArchitecture,
    head: HeadArchitecture,
    branches: int,
    rank: int,
    size: int,
    with_images: bool,
) -> Loader:
    """The share of data-parallel `rank` of `size`. `resolution`: pixels a side, where they are not the image processor's own.

    Raises UserError if files are missing or do not fit the model.
    """
    batch = config.batch
    image_size, image_tokens = encoder.image_size, encoder.tokens
    tokenizer = load_tokenizer(llm_folder)
    transform = ImageTransform.from_processor_folder(encoder_folder, resolution)
    if transform.image_size != image_size:
        raise UserError(
            f"{encoder_folder}: preprocessor_config.json resizes to {transform.image_size}, config.json's encoder takes "
            f"{image_size}; make them agree"
        )
    tokenize = SampleTokenizer(
        tokenizer=tokenizer,
        template=template_by_name(config.data.template, tokenizer),
        image_tokens=image_tokens,
        sequence_length=config.data.sequence_length,
        branches=branches,
        too_long=config.data.too_long,
    )
    return Loader(
        samples=PairSet.open(config.data.shards),
        tokenize=tokenize,
        transform=transform,
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
    )


def sample_flops(sample: Tokenized, encoder: EncoderArchitecture, head: HeadArchitecture) -> float:
    """Estimated work of one forward pass over `sample`; backward is in proportion."""
    answers = sum(sum(branch.loss) for branch in sample.branches)
    images = len(sample.images) * encoder_flops(encoder, encoder.layers)
    return images + head_flops(head, sample.segments, answers)
