"""A plan as lines of text: what was planned, its layouts in a table, and what to write into the run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from pivot_megatron.config.schema import Layout
from pivot_megatron.plan.columns import aligned
from pivot_megatron.plan.estimate import Estimate, Subject
from pivot_megatron.plan.hardware import GIB
from pivot_megatron.plan.limits import limited_by
from pivot_megatron.plan.model_work import Weights
from pivot_megatron.plan.parameters import held
from pivot_megatron.plan.plan import Plan
from pivot_megatron.plan.stages import chunks
from pivot_megatron.plan.subject import Planned


def facts(planned: Planned, plan: Plan) -> dict[str, str]:
    """What the plan is of, by name."""
    subject, machine = planned.subject, plan.machine
    weights = weights_of(subject)
    return {
        "model": f"{planned.model}: {weights.count:,} parameters, {weights.trained:,} of them trained",
        "precision": _precision(plan.best),
        "machine": f"{plan.gpus} x {machine.name}, {machine.devices_a_node} a node, {machine.memory / GIB:.1f} GiB usable",
        "source": machine.source,
        "samples": f"{subject.batch.global_size} a step, {_tokens(subject)}; {planned.lengths}",
        "steps": _steps(planned),
        "data": _data(plan.best),
    }


def as_text(planned: Planned, plan: Plan, top: int) -> str:
    told = facts(planned, plan)
    width = max(map(len, told))
    shown = plan.estimates[:top]
    lines = [f"{name:<{width}}  {value}" for name, value in told.items()]
    lines += ["", *aligned(rows(shown), LEFT), ""]
    if len(plan.estimates) > 1:
        lines.append(f"{len(plan.fitting)} of {len(plan.estimates)} layouts fit; the {len(shown)} best are shown.")
    if not plan.best.fits:
        return "\n".join([*lines, "Nothing fits; the first takes the least memory. Plan more devices, or larger ones."])
    return "\n".join([*lines, "The first, to lay over the run:", "  " + " ".join(overrides(plan.best))])


LEFT = (1, 4, 13)
"""Columns of `rows` that are words."""


def rows(estimates: Sequence[Estimate]) -> list[list[str]]:
    """The heads first. A pipeline stage's layers are the language model's."""
    memory = f"{estimates[0].machine.memory / GIB:.1f}"
    heads = ["rank", "tensor x pipeline x data", "chunks", "layers", "recompute", "micro_tokens", "step s"]
    heads += [
        f"{estimates[0].subject.unit}/s",
        "tokens/s",
        "MFU",
        f"GiB of {memory}",
        "GPU-hours",
        "time",
        "limited by",
    ]
    return [heads, *(_row(n, found) for n, found in enumerate(estimates, 1))]


def _row(rank: int, found: Estimate) -> list[str]:
    return [
        f"{rank}",
        " x ".join(map(str, (found.layout.tensor, found.layout.pipeline, found.data_parallel))),
        f"{found.layout.virtual_pipeline}",
        layers(found),
        recompute(found.subject),
        f"{found.subject.batch.micro_tokens}",
        f"{found.step_seconds:.3f}",
        f"{found.samples_a_second:.1f}",
        f"{found.tokens_a_second:,.0f}",
        f"{found.utilisation:.1%}",
        f"{found.peak_bytes / GIB:.1f}",
        "unknown" if found.hours is None else f"{found.hours * found.gpus:,.1f}",
        "unknown" if found.hours is None else _span(found.hours),
        limited_by(found),
    ]


def _span(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def layers(found: Estimate) -> str:
    """Of each stage, those in a row that are alike once: `12 16`, `3 6*24`."""
    runs = [(n, len(list(same))) for n, same in groupby(stage.layers for stage in found.stages)]
    return " ".join(f"{count}*{n}" if count > 1 else f"{n}" for n, count in runs)


def recompute(subject: Subject) -> str:
    encoder, llm = subject.recompute.encoder, subject.recompute.llm
    return llm if encoder == llm else f"{encoder}, {llm}"


def overrides(found: Estimate) -> list[str]:
    """`key=value` texts that give a run this layout."""
    layout, subject = found.layout, found.subject
    keys = ("tensor", "pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers")
    overlaps = ("overlap_gradient_reduce", "overlap_parameter_gather")
    return [
        *(f"layout.{key}={_yaml(getattr(layout, key))}" for key in (*keys, *overlaps)),
        f"recompute.encoder={subject.recompute.encoder}",
        f"recompute.llm={subject.recompute.llm}",
        f"batch.micro_tokens={subject.batch.micro_tokens}",
    ]


def _yaml(value: int | bool | None) -> str:
    return "null" if value is None else str(value).lower()


def weights_of(subject: Subject) -> Weights:
    """Of the whole model."""
    (whole,) = chunks(subject.arch.head.layers, Layout())
    return Weights.of(held(subject.arch, Layout(), whole, subject.rules))


def _precision(best: Estimate) -> str:
    precision, (dtype, peak) = best.subject.precision, best.peak
    told: str = precision.compute
    if fp8 := precision.fp8:
        parts = [name for name, on in (("the encoder", fp8.encoder), ("the language model", fp8.llm)) if on]
        told += f", linears of {' and '.join(parts)} in FP8 ({fp8.recipe})"
        if fp8.first_layers_bf16 or fp8.last_layers_bf16:
            told += f" but for the first {fp8.first_layers_bf16} and the last {fp8.last_layers_bf16} layers of each"
    return f"{told}; MFU is of {peak / 1e12:,.4g} TFLOP/s, the peak in {dtype}"


def _data(best: Estimate) -> str:
    rate = best.machine.images_a_second
    if rate is None:
        return (
            "taken as hidden: no loader was measured beside these devices; `pivot bench loader` says what a core feeds"
        )
    taken = best.images / best.step_seconds
    return f"loaders feed a device {rate:,.0f} images a second, of which the first layout takes {taken:,.1f}"


def _tokens(subject: Subject) -> str:
    samples = subject.samples
    prefix = sum(sample.prefix for sample in samples) / len(samples)
    branches = [sum(lengths) / len(samples) for lengths in zip(*(s.branches for s in samples), strict=True)]
    answers = " and ".join(f"{length:.0f}" for length in branches)
    return f"{prefix:.0f} tokens of image and prompt, {answers} of answers"


def _steps(planned: Planned) -> str:
    subject = planned.subject
    if not subject.steps:
        return "unknown: --samples says how many samples an epoch has"
    epochs = f", {subject.batch.epochs:g} epochs of {planned.count:,}" if subject.batch.epochs and planned.count else ""
    reference = f"; before them a frozen reference sees {subject.reference:.1f} batches" if subject.reference else ""
    return f"{subject.steps:,}{epochs}{reference}"
