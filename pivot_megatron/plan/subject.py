"""What is to be planned, from a run's config: its model, its batch, and the lengths of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from pivot_megatron.config.schema import Dpo, RunConfig
from pivot_megatron.convert.start import describe_start
from pivot_megatron.data.build import PACK_MULTIPLE, build_loader
from pivot_megatron.data.loader import Loader
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.tokens import Tokenized
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.flops import SampleWork
from pivot_megatron.objective.build import build_objective
from pivot_megatron.plan.estimate import Subject, estimate
from pivot_megatron.plan.hardware import assumed_lengths, known_architecture
from pivot_megatron.plan.machine import Machine
from pivot_megatron.plan.prediction import Prediction, mean_of
from pivot_megatron.plan.workload import Lengths
from pivot_megatron.runtime.fp8 import token_multiple


@dataclass(frozen=True)
class Planned:
    """`model`: its parts' names. `lengths`: where the samples' lengths are from, in words; `count`: samples of an epoch, None
    where nobody knows."""

    subject: Subject
    model: str
    lengths: str
    count: int | None


def planned(config: RunConfig, encoder: str | None, head: str | None, samples: int | None) -> Planned:
    """`encoder`, `head`: names of models.yaml that stand in for the run's own, both or none. `samples`: of an epoch, where the
    run's data are not here. Raises UserError where the model is neither named nor here."""
    arch = _architecture(config, encoder, head)
    data = _data(config) if encoder is None else None  # of other models, the run's tokenizer and images say nothing
    found = lengths_of_step(data, arch, 0) if data else []
    lengths = found or _assumed(config, arch)
    count = len(data.order) if data and samples is None else samples
    told = "measured on the run's first batch" if found else "assumed in hardware.yaml, each behind one square image"
    model = f"{encoder or arch.encoder.family} + {head or arch.head.family}"
    return Planned(_subject(config, arch, lengths, count), model, told, count)


def predict(config: RunConfig, processes: int, machine: Machine, steps: Sequence[int]) -> Prediction:
    """Of the mean of `steps`, by the lengths of their own samples. Raises UserError where the run's data are not here."""
    arch = _architecture(config, None, None)
    loader = _loader(config)
    found = [
        estimate(_subject(config, arch, lengths_of_step(loader, arch, step), None), config.layout, processes, machine)
        for step in steps
    ]
    return mean_of([one.prediction for one in found])


def _subject(config: RunConfig, arch: Architecture, lengths: Sequence[Lengths], count: int | None) -> Subject:
    batch = config.batch
    online = isinstance(config.objective, Dpo) and config.objective.reference == "online"
    cached = isinstance(config.objective, Dpo) and not online
    steps = batch.steps or (int(count * (batch.epochs or 0) // batch.global_size) if count else 0)
    fp8 = config.precision.fp8_of("llm")
    return Subject(
        arch=arch,
        precision=config.precision,
        recompute=config.recompute,
        rules=config.parameters,
        batch=batch,
        samples=tuple(islice(cycle(lengths), batch.global_size)),
        steps=steps,
        reference=count / batch.global_size if cached and count else 0.0,
        online=online,
        token_multiple=max(PACK_MULTIPLE, token_multiple(fp8.recipe if fp8 else None)),
    )


def _architecture(config: RunConfig, encoder: str | None, head: str | None) -> Architecture:
    if (encoder is None) != (head is None):
        raise UserError("pivot plan: expected both of --encoder and --head or neither, found one of them")
    if encoder is not None and head is not None:
        return replace(known_architecture(encoder, head), anyres=config.model.anyres)
    try:
        return describe_start(config.model).architecture()
    except UserError as error:
        raise UserError(
            f"{error}; to plan without the model's files, name --encoder and --head, such as "
            "--encoder siglip2-so400m-patch16-384 --head qwen2.5-7b"
        ) from None


def _data(config: RunConfig) -> Loader | None:
    """None where the run's data or its tokenizer are not here."""
    try:
        return _loader(config)
    except UserError:
        return None


def _loader(config: RunConfig) -> Loader:
    branches = build_objective(config.objective).branches
    start = describe_start(config.model)
    work = SampleWork(start.architecture())  # of no matter: lengths alone are asked for
    return build_loader(config, start.llm, start.image_views(), work, branches, 0, 1, with_images=False)


def lengths_of_step(loader: Loader, arch: Architecture, step: int) -> list[Lengths]:
    """Of the samples of a step's global batch."""
    found = []
    for index in loader.order.batch(step, loader.global_size):
        try:
            found.append(lengths_of(loader.tokenized(index), arch.encoder))
        except BadSample:  # left out, as a run does or says
            continue
    return found


def lengths_of(sample: Tokenized, encoder: EncoderArchitecture) -> Lengths:
    patches = sum(rows * columns for view in sample.views for rows, columns in view.grids)
    return Lengths(
        prefix=len(sample.prefix),
        branches=tuple(len(branch.ids) for branch in sample.branches),
        scored=sum(sum(branch.loss) for branch in sample.branches),
        images=sample.sequences,
        places=patches + sample.sequences * int(encoder.class_token),
    )


def _assumed(config: RunConfig, arch: Architecture) -> Sequence[Lengths]:
    """One sample as hardware.yaml takes it, behind an image."""
    pair = build_objective(config.objective).branches == 2
    taken = assumed_lengths("pair" if pair else "caption" if config.data.template == "plain" else "conversation")
    branches = tuple(length for part, length in taken.items() if part != "prompt")
    prefix = arch.encoder.tokens + taken["prompt"]
    return [Lengths(prefix, branches, sum(branches), images=1, places=arch.encoder.places)]
