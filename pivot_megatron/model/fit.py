"""Which layouts and formats a model can be cut and computed by, and the nearest that would do where one cannot. Pure: numbers,
no processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

from pivot_megatron.config.schema import Fp8, Layout, Precision
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture
from pivot_megatron.runtime.fp8 import WEIGHT_MULTIPLE

_PLAIN = Precision()


def require_fit(arch: Architecture, layout: Layout, precision: Precision = _PLAIN) -> None:
    """Raises UserError with every reason why `arch` cannot be cut so, and the nearest layout that it can be cut by."""
    if found := misfits(arch, layout, precision):
        raise UserError("\n".join(found))


def misfits(arch: Architecture, layout: Layout, precision: Precision = _PLAIN) -> list[str]:
    """Each as `dotted.path: what is wrong, what would do`; empty where the layout fits."""
    found = []
    uneven = _uneven(arch, layout.tensor)
    if uneven:
        found.append(
            f"layout.tensor: {', '.join(uneven)} must divide by it, found {layout.tensor}; the nearest that would do is "
            f"{_nearest_tensor(arch, layout.tensor)}"
        )
    if problem := stages_problem(arch.head.layers, layout):
        found.append(f"layout.pipeline: {problem}; the nearest that would do is {_nearest_stages(arch, layout)}")
    if precision.fp8 is not None and not uneven:
        found += _fp8_misfits(arch, layout, precision)
    return found


def _fp8_misfits(arch: Architecture, layout: Layout, precision: Precision) -> Iterator[str]:
    parts: dict[str, int] = {"encoder": arch.encoder_layers, "llm": arch.head.layers}
    for part, layers in parts.items():
        fp8 = precision.fp8_of(part)  # type: ignore[arg-type]
        if fp8 is None:
            continue
        if odd := _odd_widths(arch, part, layout.tensor):
            sizes = [n for n in range(1, 2 * layout.tensor + 1) if not (_uneven(arch, n) or _odd_widths(arch, part, n))]
            nearest = f"layout.tensor {_closest(sizes, layout.tensor)}" if sizes else f"precision.fp8.{part} false"
            yield (
                f"precision.fp8.{part}: FP8 needs widths of a tensor-parallel rank that divide by {WEIGHT_MULTIPLE}, "
                f"found {', '.join(odd)}; the nearest that would do is {nearest}"
            )
        # megatron-core counts a stage's layers as if they fell evenly.
        yield from _kept_layers(fp8, part, layers, layers // layout.pipeline if part == "llm" else layers)


def _kept_layers(fp8: Fp8, part: str, layers: int, most: int) -> Iterator[str]:
    for key in ("first_layers_bf16", "last_layers_bf16"):
        if (kept := getattr(fp8, key)) > most:
            of = "an even share of a pipeline stage" if most < layers else "all there are"
            yield f"precision.fp8.{key}: expected at most {most} of the {part}'s {layers} layers ({of}), found {kept}"
    if (kept := fp8.first_layers_bf16 + fp8.last_layers_bf16) >= layers:
        yield (
            f"precision.fp8: {kept} layers kept in bf16 leave none of the {part}'s {layers} in FP8; keep {layers - 1} at most, "
            f"or set precision.fp8.{part}: false"
        )


def _odd_widths(arch: Architecture, part: str, tensor: int) -> list[str]:
    """Sides of a rank's weights that FP8 cannot take."""
    if part == "encoder":
        encoder = arch.encoder
        heads, groups, head_dim = encoder.heads, encoder.heads, encoder.head_dim
        hidden, ffn = encoder.hidden, encoder.padded_ffn
    else:
        head = arch.head
        heads, groups, head_dim, hidden, ffn = head.heads, head.groups, head.head_dim, head.hidden, head.ffn
    widths = {
        "width": hidden,
        "query, key and value": (heads + 2 * groups) * head_dim // tensor,
        "attention": heads * head_dim // tensor,
        "FFN": ffn // tensor,
    }
    return [f"{what} {width}" for what, width in widths.items() if width % WEIGHT_MULTIPLE]


def _uneven(arch: Architecture, tensor: int) -> list[str]:
    """What does not divide by `tensor` ranks."""
    uneven = [
        f"{what} ({count})"
        for what, count in (
            ("encoder heads", arch.encoder.heads),
            ("encoder FFN width", arch.encoder.padded_ffn),
            ("LLM heads", arch.head.heads),
            ("LLM FFN width", arch.head.ffn),
            ("LLM width", arch.head.hidden),
            ("LLM vocabulary, padded", arch.head.padded_vocabulary),
        )
        if count % tensor
    ]
    if arch.head.groups % tensor and tensor % arch.head.groups:
        uneven.append(f"LLM key-value groups ({arch.head.groups})")
    return uneven


def _nearest_tensor(arch: Architecture, wanted: int) -> int:
    return _closest([size for size in range(1, 2 * wanted + 1) if not _uneven(arch, size)], wanted)


def _closest(sizes: Sequence[int], wanted: int) -> int:
    return min(sizes, key=lambda size: (abs(math.log(size / wanted)), -size))


def stages_problem(layers: int, layout: Layout) -> str | None:
    """Why the LLM's layers do not fall on the stages and their chunks, None where they do."""
    stated = [n for n in (layout.first_stage_layers, layout.last_stage_layers) if n is not None]
    if layout.pipeline == 1 and (stated or layout.virtual_pipeline > 1):
        return "one stage has all layers, in one chunk"
    rest, stages = layers - sum(stated), layout.pipeline - len(stated)
    if layout.virtual_pipeline > 1 and not stages:  # megatron-core divides by the number of stages between
        return "with virtual_pipeline, one of first_stage_layers and last_stage_layers says what both stages have"
    if any(n < 1 for n in stated) or stages < 0 or (rest if not stages else rest < stages or rest % stages):
        said = {"first_stage_layers": layout.first_stage_layers, "last_stage_layers": layout.last_stage_layers}
        beside = [f"{name} {n}" for name, n in said.items() if n is not None]
        return (
            f"the LLM's {layers} layers do not fall evenly on {layout.pipeline} stages"
            f"{' with ' + ' and '.join(beside) if beside else ''}"
        )
    for count in [*stated, *([rest // stages] if stages else [])]:
        if count % layout.virtual_pipeline:
            return f"a stage's {count} LLM layers do not divide by virtual_pipeline {layout.virtual_pipeline}"
    return None


_STAGE_KEYS = ("first_stage_layers", "last_stage_layers", "virtual_pipeline", "pipeline")


def _nearest_stages(arch: Architecture, layout: Layout) -> str:
    """The fewest keys changed, and those by the least; in words."""
    layers = arch.head.layers
    for changed in range(1, len(_STAGE_KEYS) + 1):
        fitting = [
            dict(zip(keys, values, strict=True))
            for keys in combinations(_STAGE_KEYS, changed)
            for values in product(*(_values(layout, key, layers) for key in keys))
        ]
        fitting = [found for found in fitting if not stages_problem(layers, _with(layout, found))]
        if fitting:
            best = min(fitting, key=lambda found: sum(_distance(layout, k, v) for k, v in found.items()))
            return " with ".join(f"layout.{key} {'null' if n is None else n}" for key, n in best.items())
    raise AssertionError("one stage fits any model")


def _with(layout: Layout, changed: Mapping[str, Any]) -> Layout:
    return replace(layout, **changed)


def _values(layout: Layout, key: str, layers: int) -> Sequence[int | None]:
    """What `key` might be in place of what it is; layers of a stage are only moved where some were stated."""
    numbers: list[int | None] = [n for n in range(1, layers + 1) if n != getattr(layout, key)]
    if key.endswith("_stage_layers"):
        return [] if getattr(layout, key) is None else [None, *numbers]
    return numbers


def _distance(layout: Layout, key: str, value: int | None) -> float:
    found = getattr(layout, key)
    weight = 2.0 if key == "pipeline" else 1.0  # another number of GPUs
    return 1.0 if value is None or found is None else weight * abs(math.log(value / found))
