"""The arithmetic of one layout: where its memory and its time come from, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pivot_megatron.plan.columns import aligned
from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.hardware import GIB
from pivot_megatron.plan.layer_work import Numbers
from pivot_megatron.plan.limits import spent
from pivot_megatron.plan.memory import (
    Memory,
    copied_weights,
    encoder_in_flight,
    in_flight,
    kept_bytes,
    stage_kinds,
    weight_bytes,
)
from pivot_megatron.plan.model_work import encoder_layer, head_layer
from pivot_megatron.plan.operations import operations
from pivot_megatron.plan.plan import recomputing
from pivot_megatron.plan.step_time import Ends
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


def _kind(how: Numbers) -> str:
    return " in FP8" if how.recipe else f" in {how.dtype}"


def explained(found: Estimate) -> dict[str, Any]:
    """What `explain` says, for programs: bytes, FLOPs and seconds."""
    slow, ends = found.stages.index(found.slowest), _longest_ends(found)
    return {
        "micro_batch_tokens": [pack.tokens for pack in found.packs],
        "memory": [
            {part: {"how": how, "bytes": getattr(one.memory, part)} for part, how in _sums(found, n).items()}
            for n, one in enumerate(found.stages)
        ],
        "recompute": {
            mode: {"step_seconds": other.step_seconds, "peak_bytes": other.peak_bytes, "fits": other.fits}
            for mode, other in recomputing(found).items()
        },
        "slowest_stage": slow,
        "operations": [asdict(op) for op in operations(found, slow)],
        "sends_seconds": found.slowest.sends,
        "micro_batch_seconds": found.slowest.passage.total,
        "micro_batches_seconds": found.passages_seconds,
        "online_reference_seconds": found.forward_seconds if found.subject.online else 0.0,
        "ends_seconds": asdict(ends),
        "device_seconds": found.device_seconds,
        "loading_seconds": found.loading_seconds if found.machine.images_a_second else None,
        "step_seconds": found.step_seconds,
    }


def _longest_ends(found: Estimate) -> Ends:
    return max((stage.ends for stage in found.stages), key=lambda ends: ends.total)


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
    memory = found.stages[stage].memory
    rows = [[part, how, _gib(getattr(memory, part))] for part, how in _sums(found, stage).items()]
    return [*rows, ["total", f"of {_gib(found.machine.memory)} usable", _gib(memory.total)]]


def _sums(found: Estimate, stage: int) -> dict[str, str]:
    """How each part of a stage's memory comes about, in the order of `Memory`."""
    one, subject = found.stages[stage], found.subject
    size, replicas = weight_bytes(subject.precision), found.data_parallel
    pack = max(found.packs, key=lambda p: p.tokens)
    model, own = found.model, found.chunks_of(stage)
    head = {
        how: kept_bytes(head_layer(subject.arch.head), how, pack.tokens, pack.keys, subject.recompute.llm)
        for how in stage_kinds(model, own)
    }
    alive = in_flight(found.layout, stage, len(found.packs))
    filled = encoder_in_flight(found.layout, len(found.packs))
    images, places = pack.images(subject.arch.encoder.places)
    trains = any(w.encoder for w in one.weights)
    seen = {
        how: kept_bytes(encoder_layer(subject.arch.encoder), how, places, places, subject.recompute.encoder)
        for how, _ in model.kinds("encoder")
    }
    # A frozen encoder keeps nothing.
    seeing = _layers_of(dict(model.kinds("encoder")), seen, subject.recompute.encoder) if trains else "0 layers"
    copies = copied_weights(model, found.machine, own, trains)
    first, last = stage == 0, stage == found.layout.pipeline - 1
    how = {
        "weights": f"{one.parameters:,} parameters x {size} bytes",
        "copies": " + ".join(f"{n:,} weights of linears in FP8 x {each} bytes" for n, each in copies)
        or "nothing in FP8",
        "gradients": f"{one.trained:,} trained x 4 bytes",
        "optimizer": f"{one.trained:,} trained x {8 if size == 4 else 12} bytes / {replicas} replicas",
        "activations": f"{_layers_of(stage_kinds(model, own), head, subject.recompute.llm)} of {pack.tokens:,} tokens x "
        f"{alive:g} micro-batches in flight, and what stands between stages"
        + (", less what the last layer keeps of answers alone" if last and subject.recompute.llm != "full" else ""),
        "encoder": f"{seeing} of {images} images, {places:,} places x {filled} in flight, projector and pixels"
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
    return {field.name: how[field.name] for field in fields(Memory)}


def _layers_of(kinds: Mapping[Numbers, int], kept: Mapping[Numbers, float], mode: str) -> str:
    """How many layers keep how much, those in FP8 and others apart where there are both."""
    return " and ".join(
        f"{count} layers{_kind(how) if len(kinds) > 1 or how.recipe else ''} x {_mib(kept[how])} MiB a layer ({mode})"
        for how, count in kinds.items()
    )


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
    end = _longest_ends(found)
    stage = [stage.ends for stage in found.stages].index(end)
    hidden = found.layout.overlap_gradient_reduce or found.layout.overlap_parameter_gather
    lines += [
        f"Ends, on stage {stage}: gradients {_ms(end.gradients)} + optimizer {_ms(end.update)} + weights {_ms(end.gather)} ms"
        f"{', messages as far as nothing hides them' if hidden else ''}",
    ]
    if rate := found.machine.images_a_second:
        beside = "longer than" if found.loading_seconds > found.device_seconds else "within"
        lines.append(
            f"Data, loaded steps ahead: {found.images} images / {rate:,.0f} a second = {_ms(found.loading_seconds)} ms, "
            f"{beside} the devices' {_ms(found.device_seconds)} ms"
        )
    lines.append(f"Step: {_ms(found.step_seconds)} ms")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value else ""
