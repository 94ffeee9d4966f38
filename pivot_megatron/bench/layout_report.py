"""Layouts side by side, as JSON and as text."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pivot_megatron.bench.layout_summary import LayoutSummary
from pivot_megatron.bench.layouts import LayoutBench
from pivot_megatron.bench.report import GIB, TERA
from pivot_megatron.bench.spread import QUIET, Spread
from pivot_megatron.bench.step_regions import SHARES
from pivot_megatron.bench.text_table import text_table
from pivot_megatron.train.run_folder import machine


@dataclass(frozen=True)
class TableOf:
    """`rows`: the heads first."""

    title: str
    rows: Sequence[Sequence[str]]
    note: str


def as_json(found: LayoutBench, layouts: Sequence[LayoutSummary]) -> str:
    return json.dumps(as_tree(found, layouts), indent=2)


def as_tree(found: LayoutBench, layouts: Sequence[LayoutSummary]) -> dict[str, Any]:
    told = [
        {
            **asdict(one),
            "step_off": one.step_off,
            "step_off_at_pace": one.step_off_at_pace,
            "peak_off": one.peak_off,
            "runs": [asdict(run) for run in found.runs[one.name]],
        }
        for one in layouts
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "subject": found.subject,
        "processes": found.processes,
        "amount": asdict(found.amount),
        "gemm_peak": found.gemm_peak,
        "calibrated": found.calibrated,
        "reference_seconds": found.reference_seconds,
        "layouts": told,
        "failed": dict(found.failed),
        "misfits": [asdict(misfit) for misfit in found.misfits],
    }


def as_text(found: LayoutBench, layouts: Sequence[LayoutSummary]) -> str:
    lines = [lead(found)]
    for table in tables(found, layouts):
        lines += ["", table.title, *text_table(table.rows[0], table.rows[1:]), *filter(None, [table.note])]
    return "\n".join(lines)


def lead(found: LayoutBench) -> str:
    amount = found.amount
    data = "one batch that stands ready" if amount.repeat else "data as in training"
    steps = f"rounds: {amount.rounds}, timed steps in each: {amount.timed}, {data}"
    reference = ""
    if found.reference_seconds:
        reference = f"; the reference pass, {found.reference_seconds:.1f} s once, is no part of the steps"
    peak = f"GEMM peak {found.gemm_peak / TERA:.3g} TFLOP/s"
    return f"{found.subject}, processes: {found.processes}; {steps}; {peak}{reference}"


def tables(found: LayoutBench, layouts: Sequence[LayoutSummary]) -> list[TableOf]:
    made = [_speeds(layouts), _shares(layouts)]
    if any(one.predicted for one in layouts):
        made.append(_predictions([one for one in layouts if one.predicted]))
    if found.failed or found.misfits:
        made.append(_left_out(found))
    return made


def _speeds(layouts: Sequence[LayoutSummary]) -> TableOf:
    heads = ["layout", "pairs/s", "tokens/s", "s/step", "TFLOP/s", "MFU", "peak GiB by stage", "steps"]
    rows = [
        [
            one.name,
            _spread(one.pairs_a_second),
            f"{one.tokens_a_second.median:.0f}",
            f"{one.step_seconds.median:.3g}",
            f"{one.flops_a_second.median / TERA:.3g}",
            f"{one.mfu.median:.1%}",
            " ".join(f"{peak / GIB:.2f}" for peak in one.peak_bytes),
            f"{one.steps[0]} of {one.steps[1]}" + ("" if one.quiet else ", busy"),
        ]
        for one in layouts
    ]
    note = (
        f"medians, and of pairs/s [lowest, highest], over rounds, of the steps with matrix products at {QUIET:.0%} or more of "
        "their best rate before and after"
    )
    if not all(one.quiet for one in layouts):
        note += "; where the machine never was so (busy), over all: measure again"
    return TableOf("Speed and memory", [heads, *rows], note)


def _shares(layouts: Sequence[LayoutSummary]) -> TableOf:
    rows: list[list[str]] = [["layout", *SHARES]]
    for one in layouts:
        rows.append([one.name, *_percent(one.shares)])
        if one.pipeline > 1:
            rows += [[f"  stage {n}", *_percent(shares)] for n, shares in enumerate(one.stage_shares)]
    note = (
        "steps of their own, in which one part waits for the other to end; communication: collectives, with waiting for other "
        "ranks; idle: messages between pipeline stages, with waiting for them"
    )
    return TableOf("Share of a step's time", rows, note)


def _predictions(layouts: Sequence[LayoutSummary]) -> TableOf:
    heads = ["layout", "s/step", "predicted", "off by", "pace", "at that", "off by", "peak GiB", "predicted", "off by"]
    rows = [
        [
            one.name,
            f"{one.step_seconds.median:.3g}",
            f"{one.predicted.step_seconds:.3g}",
            f"{one.step_off:+.0%}",
            f"{one.pace:.2f}",
            f"{one.predicted.step_seconds / one.pace:.3g}",
            f"{one.step_off_at_pace:+.0%}",
            f"{max(one.peak_bytes) / GIB:.2f}",
            f"{max(one.predicted.peak_bytes) / GIB:.2f}",
            f"{one.peak_off:+.0%}",
        ]
        for one in layouts
        if one.predicted
    ]
    return TableOf("The plan's prediction", [heads, *rows], _PREDICTIONS)


_PREDICTIONS = (
    "off by: the plan's over what was measured; pace: what the machine multiplied matrices at beside these steps over what it "
    "did as it was calibrated, and the plan's step at that"
)


def _left_out(found: LayoutBench) -> TableOf:
    rows = [["layout", "why"]]
    rows += [[name, f"failed: {why}"] for name, why in found.failed.items()]
    rows += [[misfit.name, "; ".join(misfit.why)] for misfit in found.misfits]
    return TableOf("Left out", rows, "")


def _percent(shares: Any) -> list[str]:
    return [f"{shares[part]:.1%}" for part in SHARES]


def _spread(found: Spread) -> str:
    return f"{found.median:.3g} [{found.low:.3g}, {found.high:.3g}]"
