"""The arithmetic of one layout: where its memory and its time come from, in words and numbers."""

from __future__ import annotations

from dataclasses import fields

from pivot_megatron.plan.columns import aligned
from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.hardware import GIB
from pivot_megatron.plan.limits import spent
from pivot_megatron.plan.memory import Memory, encoder_in_flight, in_flight, kept_bytes, weight_bytes
from pivot_megatron.plan.model_work import encoder_layer, head_layer, numbers_of
from pivot_megatron.plan.operations import operations
from pivot_megatron.plan.plan import recomputing
from pivot_megatron.plan.text import layers, recompute


def explain(found: Estimate) -> str:
    """In GiB and milliseconds. Memory of every stage, with the sums of the fullest; time of the slowest."""
    layout, packs = found.layout, found.packs
    title = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {found.data_parallel}"
    tokens = [pack.tokens for pack in packs]
    samples = sum(len(pack.samples) for pack in packs)
    slow = found.stages.index(found.slowest)
    return "\n".join(
        [
            f"{title}, chunks a stage {layout.virtual_pipeline}, layers {layers(found)}, recompute {recompute(found.subject)}",
            f"Micro-batches of the rank with the most work: {len(packs)}, of {sum(tokens) / len(tokens):,.0f} tokens in the mean "
            f"and {max(tokens):,} at most, {samples} of {found.subject.batch.global_size} samples.",
            "",
            "Memory of a rank, GiB, at its fullest moment",
            *aligned(memory_rows(found)),
            "",
            f"Stage {found.fullest}, the fullest",
            *aligned(arithmetic(found, found.fullest), left=(0, 1)),
            "",
            "By mode of recomputing",
            *aligned(mode_rows(found), left=(0,)),
            "",
            f"Time of the mean micro-batch on stage {slow}, the slowest",
            *aligned(time_rows(found, slow), left=(0, 1, 2)),
            "",
            *step_lines(found),
            "",
            "A step goes to",
            *aligned(
                [[what, f"{_ms(s)} ms", f"{s / found.step_seconds:.1%}"] for what, s in spent(found).items()], left=(0,)
            ),
        ]
    )


def memory_rows(found: Estimate) -> list[list[str]]:
    """A stage each, the heads first."""
    parts = [field.name for field in fields(Memory)]
    heads = ["stage", "layers", "parameters", *parts, "total"]
    rows = [
        [
            f"{n}",
            f"{s.layers}",
            f"{s.parameters:,}",
            *(_gib(getattr(s.memory, part)) for part in parts),
            _gib(s.memory.total),
        ]
        for n, s in enumerate(found.stages)
    ]
    return [heads, *rows]


def arithmetic(found: Estimate, stage: int) -> list[list[str]]:
    """[part, how, GiB], each of the stage's parts."""
    one, subject = found.stages[stage], found.subject
    size, replicas = weight_bytes(subject.precision), found.data_parallel
    pack = max(found.packs, key=lambda p: p.tokens)
    numbers = numbers_of(subject.precision, "llm", found.layout.tensor, found.machine.transformer_engine)
    head = kept_bytes(head_layer(subject.arch.head), numbers, pack.tokens, pack.keys, subject.recompute.llm)
    alive = in_flight(found.layout, stage, len(found.packs))
    filled = encoder_in_flight(found.layout, len(found.packs))
    vision = numbers_of(subject.precision, "encoder", found.layout.tensor, found.machine.transformer_engine)
    images, places = pack.images(subject.arch.encoder.places)
    kept = subject.arch.encoder_layers if any(w.encoder for w in one.weights) else 0  # a frozen encoder keeps nothing
    seen = kept_bytes(encoder_layer(subject.arch.encoder), vision, places, places, subject.recompute.encoder)
    first = stage == 0
    how = {
        "weights": f"{one.parameters:,} parameters x {size} bytes",
        "gradients": f"{one.trained:,} trained x 4 bytes",
        "optimizer": f"{one.trained:,} trained x {8 if size == 4 else 12} bytes / {replicas} replicas",
        "activations": f"{one.layers} layers x {_mib(head)} MiB a layer ({subject.recompute.llm}) of {pack.tokens:,} tokens x "
        f"{alive:g} micro-batches in flight, and what stands between stages"
        + (", less what the last layer keeps of answers alone" if stage == found.layout.pipeline - 1 else ""),
        "encoder": f"{kept} layers x {_mib(seen)} MiB a layer ({subject.recompute.encoder}) of "
        f"{images} images, {places:,} places x {filled} in flight, projector and pixels"
        if first
        else "none on this stage",
        "logits": f"tiles of up to {found.machine.logits_tile / 2**20:.0f} MiB, {pack.scored:,} tokens of answers"
        if one.memory.logits
        else "none on this stage",
        "working": "one layer's backward pass, with what it makes anew",
        "reduction": "what gradients are copied to while they are reduced" if one.memory.reduction else "in place",
        "reference": "a frozen model's weights" if one.memory.reference else "none: not run within a step",
        "process": "before any model: context, libraries, buffers of collectives",
    }
    rows = [[field.name, how[field.name], _gib(getattr(one.memory, field.name))] for field in fields(Memory)]
    return [*rows, ["total", f"of {_gib(found.machine.memory)} usable", _gib(one.memory.total)]]


def mode_rows(found: Estimate) -> list[list[str]]:
    """Of the fullest stage with each mode; the heads first."""
    rows = [["recompute", "activations", "encoder", "working", "total, GiB", "step s", ""]]
    for mode, other in recomputing(found).items():
        memory = other.stages[other.fullest].memory
        parts = (memory.activations, memory.encoder, memory.working, memory.total)
        rows.append([mode, *map(_gib, parts), f"{other.step_seconds:.3f}", "fits" if other.fits else "does not fit"])
    return rows


def time_rows(found: Estimate, stage: int) -> list[list[str]]:
    """An operation each, then the stage's sum; the heads first."""
    one = found.stages[stage]
    rows = [["way", "part", "operation", "times", "GFLOP", "MiB", "ms"]]
    for op in operations(found, stage):
        sizes = (f"{op.times:,.0f}", _number(op.flops / 1e9), _number(op.traffic / 2**20), _ms(op.seconds))
        rows.append([op.way, op.part, op.name, *sizes])
    if one.sends:
        rows.append(["both", "stages", "to and from other stages", "", "", "", _ms(one.sends)])
    return [*rows, ["", "", "one micro-batch", "", "", "", _ms(one.passage.total)]]


def step_lines(found: Estimate) -> list[str]:
    slow, count = found.slowest, len(found.packs)
    work = count * slow.passage.total
    waits = "in which it waits for others, every pass played through" if found.layout.virtual_pipeline > 1 else ""
    rest = f" + {_ms(found.passages_seconds - work)} ms {waits or 'of the others, to fill and drain'}"
    lines = [
        f"Micro-batches: {count} x {_ms(slow.passage.total)} ms on the slowest stage{rest if len(found.stages) > 1 else ''}"
        f" = {_ms(found.passages_seconds)} ms"
    ]
    if found.subject.online:
        lines.append(f"Frozen reference, forward: {_ms(found.forward_seconds)} ms")
    end = max((stage.ends for stage in found.stages), key=lambda ends: ends.total)
    stage = [stage.ends for stage in found.stages].index(end)
    hidden = found.layout.overlap_gradient_reduce or found.layout.overlap_parameter_gather
    lines += [
        f"Ends, on stage {stage}: gradients {_ms(end.gradients)} + optimizer {_ms(end.update)} + weights {_ms(end.gather)} ms"
        f"{', messages as far as nothing hides them' if hidden else ''}",
        f"Step: {_ms(found.step_seconds)} ms",
    ]
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value else ""
