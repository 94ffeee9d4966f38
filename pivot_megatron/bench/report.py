"""A comparison as JSON and as a page of text that can be pasted whole."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_megatron.bench.contenders import SIDES, Side
from pivot_megatron.bench.peer_environment import PINS
from pivot_megatron.bench.peer_summary import Ratio
from pivot_megatron.bench.peers import WARM_UP, Comparison
from pivot_megatron.bench.spread import QUIET, Spread
from pivot_megatron.bench.text_table import markdown_table
from pivot_megatron.model.flops import Flops
from pivot_megatron.runtime.device import available_cores, device_name
from pivot_megatron.train.run_folder import installed_version

GIB = 2.0**30
GIGA = 1e9
TERA = 1e12


def as_json(found: Comparison) -> str:
    return json.dumps(as_tree(found), indent=2, default=str)


def as_tree(found: Comparison) -> dict[str, Any]:
    tree = dataclasses.asdict(found)
    for side, flops in found.flops.items():
        tree["flops"][side]["total"] = flops.total
    sides = {side: _told(found, side) for side in SIDES}
    return {"machine": machine(), "warm_up_steps": WARM_UP, "sides": sides, **tree}


def machine() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": available_cores(),
        "gpu": device_name(),
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
    """Markdown."""
    return "\n".join(
        [
            *_header(found),
            "",
            *_results(found),
            "",
            *_versus(found),
            "",
            *_notes(found),
            "",
            *_flops(found.flops),
        ]
    )


def _header(found: Comparison) -> list[str]:
    wanted, facts = found.wanted, machine()
    setting = next(iter(found.contenders.values())).setting
    packages = [f"{name} {facts[name]}" for name in ("torch", "transformers", "megatron-core")]
    on = f"cores: {facts['cores']}" + (f", {facts['gpu']}" if facts["gpu"] else "")
    return [
        f"`{wanted.shape.name}`: {setting.pairs_a_step} pairs a step, timed steps a run: {setting.steps - WARM_UP}, rounds: "
        f"{wanted.rounds}, {setting.precision}, reference pass counted once in epochs: {wanted.epochs}",
        "",
        f"- {facts['processor']}, {on}, {facts['date']}; {', '.join([*packages, *facts['peer']])}",
        *(f"- {side}: {_side(found, side)}" for side in SIDES),
    ]


def _told(found: Comparison, side: Side) -> dict[str, Any]:
    """What a side says it computed with, and what it was given for that."""
    runs = [run for by_name in found.rounds for name, run in by_name.items() if found.contenders[name].side == side]
    return {
        "threads": sorted({run.threads for run in runs}),
        "attention": sorted({run.attention for run in runs}),
        "environment": dict(found.wanted.trl_environment) if side == "trl" else {},
    }


def _side(found: Comparison, side: Side) -> str:
    told = _told(found, side)
    given = "".join(f"; {name}={value}" for name, value in told["environment"].items())
    return f"threads: {_joined(told['threads'])}; attention: {_joined(told['attention'])}{given}"


def _joined(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _results(found: Comparison) -> list[str]:
    rows = []
    for name, one in found.results.items():
        steps_a_second = one.pairs_a_second.median / found.wanted.shape.pairs_a_step
        spent = found.flops[name].total * steps_a_second
        rows.append(
            [
                name,
                _spread(one.pairs_a_second),
                _spread(one.tokens_a_second),
                _spread(one.peak_bytes, GIB),
                f"{found.needed_flops * steps_a_second / found.gemm_peak:.1%}",
                f"{spent / TERA:.3g}",
                f"{spent / found.gemm_peak:.1%}",
                f"{one.steps[0]} of {one.steps[1]}" + ("" if one.quiet else ", busy"),
            ]
        )
    heads = ["setting", "pairs/s", "tokens/s", "peak GiB", "MFU", "own TFLOP/s", "of peak", "quiet steps"]
    return markdown_table(heads, rows)


def _versus(found: Comparison) -> list[str]:
    rows = [[one.title, _ratio(one.speed, _times), _ratio(one.memory, _share)] for one in found.versus]
    return markdown_table(["pivot over TRL", "speed", "peak memory"], rows)


def _notes(found: Comparison) -> list[str]:
    memory = "a GPU's tensors, as torch counts them" if device_name() else "the process's resident memory"
    passes = [f"{name} {one.reference_seconds:.3g} s" for name, one in found.results.items() if one.reference_seconds]
    differences = [f"{name} {value:.1e}" for name, value in found.differences.items()]
    return [
        "- A setting is a side and the pairs in one of its forward passes; gradients add up over a step. Medians [lowest, "
        "highest] over rounds; a ratio is of the two runs of one round.",
        f"- Speeds are of steps with matrix products at {QUIET:.0%} or more of their best rate before, during and after; of all "
        "where there were none (busy): measure again.",
        f"- The reference pass is counted in: ours is one of its own, {', '.join(passes)} a pair; TRL's is part of each step.",
        f"- Peak memory is {memory}. MFU counts what a step needs, forward and backward once, the same for all; own operations "
        f"are those of the last table. The peak is {found.gemm_peak / TERA:.3g} TFLOP/s, this machine's best matrix products.",
        f"- Largest relative difference between the sides, all settings, rounds and steps: {', '.join(differences)}.",
    ]


def _flops(flops: Mapping[str, Flops]) -> list[str]:
    least = min(one.total for name, one in flops.items() if name.startswith(SIDES[0]))
    parts = [field.name for field in dataclasses.fields(Flops)]
    rows = [
        [
            name,
            *(f"{getattr(one, part) / TERA:.3g}" for part in parts),
            f"{one.total / TERA:.3g}",
            f"{one.total / least:.2f}x",
        ]
        for name, one in flops.items()
    ]
    return markdown_table(["TFLOP a step, by count", *parts, "total", "over ours"], rows)


def _ratio(found: Ratio, told: Any) -> str:
    busy = "" if found.quiet else ", busy"
    return f"{told(found.value)} ({found.ours}, {found.theirs}{busy})"


def _times(found: Spread) -> str:
    return f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def _share(found: Spread) -> str:
    return f"{found.median:.0%} [{found.low:.0%}, {found.high:.0%}]"


def _spread(found: Spread, unit: float = 1.0) -> str:
    return f"{found.median / unit:.3g} [{found.low / unit:.3g}, {found.high / unit:.3g}]"
