"""The reference log-probs of a run: from files beside its shards, made where they are missing."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pivot_megatron.config.schema import Model, RunConfig
from pivot_megatron.convert.plan import COMPONENTS
from pivot_megatron.convert.start import start_weights
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.loader import Loader
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.reference import Facts, ReferenceFile, Row, is_made_with, join, write_rows
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture, Stage, build_model
from pivot_megatron.runtime.distributed import (
    from_main_process,
    gather_objects,
    is_last_stage,
    is_main_process,
    on_main_process,
    tensor_parallel_coordinates,
)
from pivot_megatron.train.agreement import agreed
from pivot_megatron.train.step import forward_logprobs

SAMPLES_A_PART = 1024  # what an interrupted pass loses at most


def frozen_model(config: RunConfig, arch: Architecture, start: Model) -> Stage:
    """The model as the run starts from it, forward only. Not in FP8: a scale that is shared over a pack would make a pair's
    log-probs depend on its neighbours, and `delayed` knows none before the first backward pass."""
    model = build_model(arch, config.layout, replace(config.precision, fp8=None), config.recompute)
    start_weights(model, start, config.seed)
    model.eval().requires_grad_(False)
    return model


@dataclass(frozen=True)
class ReferencePass:
    """Everything that decides the reference log-probs of a run. Methods are collective over all ranks.

    `begun`: the `start_fingerprint` of `start`, the same on every rank. `before_batch`: called before each batch of a pass, and
    may end it by raising, on every rank alike.
    """

    config: RunConfig
    arch: Architecture
    start: Model
    begun: Mapping[str, str]
    loader: Loader
    before_batch: Callable[[], None]

    def files(self, make: bool) -> list[ReferenceFile]:
        """One a folder of shards, in the order of the config. Those that are missing are made, or it is an error. Raises
        UserError where one was made of something else, or lacks a sample that this run may need."""
        folders = self.loader.samples.by_folder()
        facts = self._facts(folders)
        paths = [folder / f.name for folder, f in zip(self.loader.samples.beside, facts, strict=True)]
        missing = from_main_process([not path.exists() for path in paths] if is_main_process() else None)
        if any(missing) and not make:
            raise UserError(f"{paths[missing.index(True)]}: no such file; run `pivot reference` first")
        if any(missing):
            model = frozen_model(self.config, self.arch, self.start)
            for path, fact, samples, absent in zip(paths, facts, folders, missing, strict=True):
                if absent:
                    self._make(path, fact, samples, model)
        for path, *seen in zip(paths, *gather_objects([path.exists() for path in paths]), strict=True):
            if not all(seen):
                raise UserError(
                    f"{path}: there for some processes and not for others; let all nodes share this folder (data.cache.folder, "
                    "of remote shards), or set objective.reference: online"
                )
        files = [
            ReferenceFile(path, fact, samples.keys) for path, fact, samples in zip(paths, facts, folders, strict=True)
        ]
        for file, positions in zip(files, self._positions(), strict=True):
            file.require_room(positions, self.config.data.sequence_length)
        return files

    def _positions(self) -> list[npt.NDArray[np.int64]]:
        """Of each folder, the samples of an epoch."""
        entries, ends = np.unique(self.loader.order.entries), np.cumsum(self.loader.samples.counts)
        parts = np.split(entries, np.searchsorted(entries, ends[:-1]))
        return [part - first for part, first in zip(parts, [0, *ends[:-1]], strict=True)]

    def _facts(self, folders: Sequence[PairSet]) -> list[Facts]:
        """Of each folder, the same on every rank."""
        config, data = self.config, self.config.data
        model = {
            **{name: self.begun[name] for name in COMPONENTS},
            "feature_layer": str(self.arch.feature_layer),
            "image_size": str(self.arch.encoder.image_size),
            "precision": config.precision.compute,
        }
        how = {
            "processor": f"{self.loader.images.fingerprint} {data.image_backend}",
            "template": data.template,
            "tokenizer": self.begun["tokenizer"],
            # What is cut has other tokens at another length; what is dropped has none.
            "too_long": data.too_long if data.too_long == "drop" else f"cut to {data.sequence_length}",
        }
        return [Facts(model, how, samples.fingerprint, data.sequence_length) for samples in folders]

    def _make(self, path: Path, facts: Facts, samples: PairSet, model: Stage) -> None:
        """In parts, which a pass that was broken off leaves to the next. Another run that makes the same file may at any time
        have written a part, or all of it and taken the parts away."""
        loader = replace(self.loader, samples=samples)
        parts = path.with_name(facts.parts)
        _written(partial(parts.mkdir, exist_ok=True), path)
        names = []
        total = len(loader.samples)
        for first in range(0, total, SAMPLES_A_PART):
            names.append(parts / f"{first:09d}.parquet")
            if from_main_process(is_main_process() and (path.exists() or is_made_with(names[-1], facts))):
                continue
            began = time.perf_counter()
            rows = _rows(model, loader, first, min(first + SAMPLES_A_PART, total), self.before_batch)
            if is_main_process():
                print(f"reference: {min(first + SAMPLES_A_PART, total)}/{total} samples", file=sys.stderr, flush=True)
            seconds = time.perf_counter() - began
            _written(partial(write_rows, names[-1], rows, facts, seconds), path)
        _written(lambda: None if path.exists() else join(names, path, facts), path)
        if is_main_process():
            for left in path.parent.glob(f"{path.name}.*.parts"):  # of passes that were broken off, too
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()


def _rows(model: Stage, loader: Loader, first: int, last: int, before_batch: Callable[[], None]) -> list[Row]:
    """Samples `first` to `last` of the loader's folder, on the main process; nothing elsewhere."""
    found: list[Row] = []
    seen: dict[str, bytes] = {}
    for step in loader.in_order(first, last):
        before_batch()
        data = agreed(loader, step)
        found += (Row(dropped.key, bytes(16), bytes(16), None, None) for dropped in (*data.dropped, *data.bad))
        found += _scored(data.micro_batches, forward_logprobs(model, data.micro_batches))
        # Ranks that read images are not those that score what they show.
        for batch in data.micro_batches:
            seen.update(zip(batch.keys, batch.image_digests, strict=False))
    rows = {row.key: row for part in gather_objects(found) for row in part}
    images = {key: digest for part in gather_objects(seen) for key, digest in part.items()}
    if not is_main_process():
        return []
    keys = [loader.samples.key(index) for index in range(first, last)]
    return [replace(rows[key], images=images.get(key, rows[key].images)) for key in keys]


def _scored(batches: Sequence[PackedBatch], logprobs: Sequence[torch.Tensor | None]) -> Iterator[Row]:
    """Each sample's row, from one rank of those that hold the same."""
    if not is_last_stage() or tensor_parallel_coordinates()[0]:
        return
    for batch, values in zip(batches, logprobs, strict=True):
        if values is None or not batch.samples:
            continue
        counts = torch.bincount(batch.branch, minlength=batch.branches).tolist()
        answers = [part.tolist() for part in values.cpu().split(counts)]
        for n, (key, digest) in enumerate(zip(batch.keys, batch.digests, strict=True)):
            yield Row(key, digest, bytes(16), *answers[2 * n : 2 * n + 2])


def _written(write: Callable[[], object], path: Path) -> None:
    """`write()` on the main process, others waiting; a disk that refuses is one line on every rank."""

    def attempt() -> None:
        try:
            write()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and path.exists():
                return  # another run was first
            raise UserError(
                f"{path}: cannot write reference log-probs beside the shards ({error.strerror or error}); make the folder "
                "writable, or set objective.reference: online"
            ) from None

    on_main_process(attempt)
