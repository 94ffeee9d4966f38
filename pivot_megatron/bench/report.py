"""A comparison as JSON and as text."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_megatron.bench.peer_environment import PINS
from pivot_megatron.bench.peers import SIDES, WARM_UP, Comparison
from pivot_megatron.bench.spread import QUIET, Spread
from pivot_megatron.bench.text_table import text_table
from pivot_megatron.model.flops import Flops
from pivot_megatron.runtime.device import available_cores
from pivot_megatron.train.run_folder import installed_version

GIB = 2.0**30
GIGA = 1e9
TERA = 1e12


def as_json(found: Comparison) -> str:
    return json.dumps(as_tree(found), indent=2)


def as_tree(found: Comparison) -> dict[str, Any]:
    tree = dataclasses.asdict(found)
    for side, flops in found.flops.items():
        tree["flops"][side]["total"] = flops.total
    return {"machine": machine(), "warm_up_steps": WARM_UP, **tree}


def machine() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "torch": installed_version("torch"),
        "transformers": installed_version("transformers"),
        "megatron-core": installed_version("megatron-core"),
        "peer": list(PINS),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def as_text(found: Comparison) -> str:
    summary, setting = found.summary, found.setting
    steps = setting.steps - WARM_UP
    facts = machine()
    return "\n".join(
        [
            f"{found.shape.name}: {setting.pairs_a_step} pairs a step, {steps} timed steps, rounds: {len(found.rounds)}, fp32; "
            f"{facts['processor']}, cores: {facts['cores']}, {facts['date']}",
            "",
            *text_table(
                ["median [lowest, highest]", "pivot", PINS[0], "gain"],
                [
                    ["pairs/s", *_both(summary.pairs_a_second), _gain(summary.speed_gain)],
                    ["tokens/s", *_both(summary.tokens_a_second), ""],
                    ["peak memory, GiB", *_both(summary.peak_bytes, GIB), _gain(summary.memory_gain)],
                ],
            ),
            *_quiet(found),
            "",
            *_rates(found),
            "",
            *_flops_table(found.flops),
            "",
            f"largest relative difference over the {setting.steps} steps of every round: "
            + ", ".join(f"{name} {value:.1e}" for name, value in found.differences.items()),
        ]
    )


def _rates(found: Comparison) -> list[str]:
    """What each side does of its own operations in a second, against the best that this machine multiplies matrices at."""
    reference = (
        f"the reference pass, {found.summary.reference_seconds:.2f} s a pair, counts once in epochs: {found.epochs}"
    )
    rates = []
    for side in SIDES:
        speed = found.summary.pairs_a_second[side].median / found.setting.pairs_a_step
        rate = found.flops[side].total * speed
        rates.append(f"{side} {rate / GIGA:.0f} GFLOP/s ({rate / found.gemm_peak:.0%})")
    return [f"{', '.join(rates)} of a GEMM peak of {found.gemm_peak / GIGA:.0f} GFLOP/s; {reference}"]


def _quiet(found: Comparison) -> list[str]:
    what = f"matrix products at {QUIET:.0%} or more of their best rate before, during and after"
    if not found.summary.quiet:
        return [f"the machine was never quiet for both ({what}): these speeds say little; measure again"]
    (ours, of_ours), (theirs, of_theirs) = (found.summary.steps[side] for side in SIDES)
    return [f"speeds are of steps on a quiet machine ({what}): {ours} of {of_ours}, {theirs} of {of_theirs}"]


def _both(spreads: Mapping[str, Spread], unit: float = 1.0) -> list[str]:
    return [_spread(spreads[side], unit) for side in SIDES]


def _spread(found: Spread, unit: float = 1.0) -> str:
    return f"{found.median / unit:.3g} [{found.low / unit:.3g}, {found.high / unit:.3g}]"


def _gain(found: Spread) -> str:
    return f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def _flops_table(flops: Mapping[str, Flops]) -> list[str]:
    ours, theirs, on_gpu = flops["pivot"], flops["trl"], flops["trl_on_gpu"]
    rows = [
        [part, *(f"{getattr(side, part) / TERA:.3g}" for side in (ours, theirs, on_gpu)), ""]
        for part in (field.name for field in dataclasses.fields(Flops))
    ]
    gains = f"{theirs.total / ours.total:.2f}x, {on_gpu.total / ours.total:.2f}x on a GPU"
    totals = ["total", *(f"{side.total / TERA:.3g}" for side in (ours, theirs, on_gpu)), gains]
    return text_table(["TFLOP a step, by count", "pivot", "trl", "trl on a GPU", "gain"], [*rows, totals])
