"""The loader that a run's config asks for, with the tokenizer and image processor of its model's folders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from pivot_megatron.config.schema import AnyRes, Data, RunConfig
from pivot_megatron.data import dali, decoders
from pivot_megatron.data.decoders import Decoder
from pivot_megatron.data.images import ImageTransform, PixelSteps, read_processor
from pivot_megatron.data.loader import Loader, Work
from pivot_megatron.data.order import Order, mixed
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.tokens import SampleTokenizer, Tokenizer, template_by_name
from pivot_megatron.data.views import ImageViews, Native, Square, Tiled
from pivot_megatron.errors import RuleError, UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.fp8 import token_multiple

# Tokens a tensor-parallel rank, at the least: what most FP8 recipes need, so that a run with FP8 and one without see equal packs.
PACK_MULTIPLE = 16


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
        most = config.get("max_num_patches", 256) if max_patches is None else max_patches
        if config.get("patch_size", 16) != encoder.patch_size:
            raise UserError(
                f"{path}: patch_size: expected the encoder's, {encoder.patch_size}, found {config['patch_size']}"
            )
        if type(most) is not int or most < 1:
            raise UserError(f"{path}: max_num_patches: expected a whole number above 0, found {most!r}")
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


def decoder_of(config: Data, images: ImageViews) -> Callable[[], AbstractContextManager[Decoder]]:
    """Opens what decodes images as `config` says. Raises UserError where DALI is asked for and missing."""
    if config.image_backend == "dali":
        dali.require_dali()
        return partial(dali.opened, images, config.workers, current_platform().device)
    return partial(decoders.opened, images, config.image_backend, config.workers)


def build_loader(
    config: RunConfig,
    llm_folder: Path,
    images: ImageViews,
    work: Work,
    branches: int,
    rank: int,
    size: int,
    with_images: bool,
) -> Loader:
    """The share of data-parallel `rank` of `size`. `work`: what micro-batches are balanced by.

    Raises UserError if files are missing or do not fit the model.
    """
    batch, fp8 = config.batch, config.precision.fp8_of("llm")
    samples = open_samples(config.data)
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
        samples=samples,
        order=Order(mixed(samples.counts, config.data.shards, config.seed), config.seed),
        tokenize=tokenize,
        images=images,
        decoder=decoder_of(config.data, images),
        workers=config.data.workers,
        global_size=batch.global_size,
        work=work,
        micro_tokens=batch.micro_tokens,
        micro_images=batch.micro_images,
        pack_multiple=config.layout.tensor * max(PACK_MULTIPLE, token_multiple(fp8.recipe if fp8 else None)),
        micro_batch_multiple=config.layout.micro_batch_multiple,
        rank=rank,
        size=size,
        with_images=with_images,
        skip_bad=config.data.on_bad_sample == "skip",
        pinned=current_platform().is_cuda,
    )


def open_samples(data: Data) -> PairSet:
    """Raises UserError where samples are known to be broken, and they, or so many, are not to be skipped."""
    samples = PairSet.open([source.folder for source in data.shards], data.cache)
    bad = samples.known_bad
    require_sound(data, len(samples), len(bad), bad[0] if bad else None)
    return samples


def require_sound(data: Data, samples: int, broken: int, first: BadSample | None) -> None:
    """`broken`: how many of the samples are known to be, of which `first` is one. Raises UserError where none may be, RuleError
    where they are more than may be."""
    if broken and data.on_bad_sample == "stop":
        raise UserError(
            f"data.shards: {broken} of {samples} samples are broken, the first: {first}; mend or remove them, or set "
            "data.on_bad_sample: skip"
        )
    require_few_bad(broken, samples, data.max_bad_share, "`pivot data index` names them")


def require_few_bad(bad: int, samples: int, most: float, names: str) -> None:
    """Raises RuleError where more than the share `most` of all samples is broken. `names`: what tells which they are."""
    if bad > most * samples:
        raise RuleError(
            f"data.max_bad_share: {bad} of {samples} samples are broken, more than the share {most:g} that may be skipped; "
            f"{names}"
        )
