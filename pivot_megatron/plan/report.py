"""A plan as JSON, and as one page."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pivot_megatron.plan.dry_run import AS_PLANNED, DryRun
from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.explain import arithmetic, explained, memory_rows, mode_rows, step_lines, time_rows
from pivot_megatron.plan.limits import limited_by, spent
from pivot_megatron.plan.plan import Plan
from pivot_megatron.plan.scaling import Point, Scaling, against_ideal
from pivot_megatron.plan.subject import Planned
from pivot_megatron.plan.text import LEFT, facts, overrides, rows, weights_of
from pivot_megatron.report.page import Page, Picture, Pictures, Section, Table, write_page


@dataclass(frozen=True)
class Report:
    """`run`: the config's path. `top`: layouts that are shown. `explain`: the one whose arithmetic is."""

    run: str
    planned: Planned
    plan: Plan
    top: int
    explain: int | None = None
    scaling: Scaling | None = None
    dry_run: DryRun | None = None


def as_json(report: Report) -> str:
    return json.dumps(as_tree(report), indent=2)


def as_tree(report: Report) -> dict[str, Any]:
    """Seconds, bytes and counts; every layout that was estimated. Ranks and layers are given by the first and the last."""
    tree: dict[str, Any] = {
        "run": report.run,
        "gpus": report.plan.gpus,
        **_of_what(report.planned, report.plan),
        "said": facts(report.planned, report.plan),
        "layouts": [_layout(n, found) for n, found in enumerate(report.plan.estimates, 1)],
    }
    if report.explain is not None:
        tree["explain"] = {"rank": report.explain, **explained(report.plan.estimates[report.explain - 1])}
    if report.scaling:
        tree["scaling"] = {name: _points(getattr(report.scaling, name)) for name in ("strong", "weak")}
    if report.dry_run:
        tree["dry_run"] = _dry_tree(report.dry_run)
    return tree


def _of_what(planned: Planned, plan: Plan) -> dict[str, Any]:
    """What `facts` says in words; null is what nobody knows."""
    subject, machine, weights = planned.subject, plan.machine, weights_of(planned.subject)
    precision, (dtype, peak), sample = subject.precision, plan.best.peak, subject.samples
    return {
        "model": {"name": planned.model, "parameters": weights.count, "trained": weights.trained},
        "machine": {
            "name": machine.name,
            "source": machine.source,
            "devices_a_node": machine.devices_a_node,
            "usable_bytes": machine.memory,
            "images_a_second": machine.images_a_second,
        },
        "precision": {
            "compute": precision.compute,
            "fp8": precision.fp8 and dataclasses.asdict(precision.fp8),
            "mfu_dtype": dtype,
            "mfu_peak_flops": peak,
        },
        "samples": {
            "unit": subject.unit,
            "global_batch": subject.batch.global_size,
            "prefix_tokens": fmean(one.prefix for one in sample),
            "branch_tokens": [fmean(lengths) for lengths in zip(*(one.branches for one in sample), strict=True)],
            "lengths": planned.lengths,
        },
        "steps": subject.steps or None,
        "epochs": subject.batch.epochs,
        "epoch_samples": planned.count,
        "reference_batches": subject.reference,
    }


def _layout(rank: int, found: Estimate) -> dict[str, Any]:
    return {
        "rank": rank,
        "layout": dataclasses.asdict(found.layout),
        "data_parallel": found.data_parallel,
        "recompute": dataclasses.asdict(found.subject.recompute),
        "micro_tokens": found.subject.batch.micro_tokens,
        "micro_batches": len(found.packs),
        "fits": found.fits,
        "step_seconds": found.step_seconds,
        "loading_seconds": found.loading_seconds if found.machine.images_a_second else None,
        "spent": spent(found),
        "samples_a_second": found.samples_a_second,
        "tokens_a_second": found.tokens_a_second,
        "utilisation": found.utilisation,
        "hours": found.hours,
        "gpu_hours": None if found.hours is None else found.hours * found.gpus,
        "limited_by": limited_by(found),
        "overrides": overrides(found),
        "stages": [
            {"layers": stage.layers, "parameters": stage.parameters, "trained": stage.trained}
            | {"memory": dataclasses.asdict(stage.memory) | {"total": stage.memory.total}}
            for stage in found.stages
        ],
    }


def _dry_tree(found: DryRun) -> dict[str, Any]:
    return {
        "passed": found.passed,
        "layout": dataclasses.asdict(found.build.layout),
        "stages": [
            {
                "stage": stage.stage,
                "ranks": [stage.ranks[0], stage.ranks[-1]],
                "layers": [[chunk.layers[0], chunk.layers[-1]] for chunk in stage.chunks],
                "parameters": stage.parameters,
                "trained": stage.training,
                "weight_bytes": stage.weight_bytes,
            }
            for stage in found.stages
        ],
        "differences": list(found.differences),
    }


def _points(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {
            "gpus": point.gpus,
            "global_batch": point.best and point.best.subject.batch.global_size,
            "samples_a_second": point.best and point.best.samples_a_second,
            "utilisation": point.best and point.best.utilisation,
            "of_ideal": ideal,
            "overrides": point.best and overrides(point.best),
            "why_none": point.why or None,
        }
        for point, ideal in zip(points, against_ideal(points), strict=True)
    ]


def scaling_rows(found: Scaling) -> list[list[str]]:
    """A number of devices each, the heads first."""
    unit = next((p.best.subject.unit for p in (*found.strong, *found.weak) if p.best), "samples")
    heads = ["devices"]
    for name in ("batch", "batch that grows"):
        heads += [name, "tensor x pipeline x data", f"{unit}/s", "MFU", "of ideal"]
    sides = [zip(points, against_ideal(points), strict=True) for points in (found.strong, found.weak)]
    return [heads, *([f"{one[0].gpus}", *_cells(*one), *_cells(*two)] for one, two in zip(*sides, strict=True))]


def scaling_gaps(found: Scaling) -> list[str]:
    """Why there is no layout where there is none, the first of reasons that differ in numbers alone."""
    told: dict[str, tuple[str, list[str]]] = {}
    for name, points in (("", found.strong), (" with a batch that grows", found.weak[1:])):
        for point in points:
            if point.why:
                _, counts = told.setdefault(re.sub(r"[\d,.]+", "", point.why), (point.why, []))
                counts.append(f"{point.gpus}{name}")
    return [f"No layout of {', '.join(counts)} devices: {why}" for why, counts in told.values()]


def _cells(point: Point, ideal: float | None) -> list[str]:
    best = point.best
    if best is None or ideal is None:
        return ["", "none fits", "", "", ""]
    layout = " x ".join(map(str, (best.layout.tensor, best.layout.pipeline, best.data_parallel)))
    return [
        f"{best.subject.batch.global_size:,}",
        layout,
        f"{best.samples_a_second:,.1f}",
        f"{best.utilisation:.1%}",
        f"{ideal:.0%}",
    ]


def write_report(report: Report, versions: Mapping[str, str], folder: Path) -> None:
    """`plan.json` and `report.html`, the pictures that are in `folder` in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(as_json(report) + "\n")
    write_page(_page(report, versions, folder), folder / "report.html")


def _page(report: Report, versions: Mapping[str, str], folder: Path) -> Page:
    plan, best = report.plan, report.plan.best
    lead = (
        f"{len(plan.fitting)} of {len(plan.estimates)} layouts fit on {plan.gpus} devices. "
        + (f"The fastest takes {best.step_seconds:.3f} s a step." if best.fits else "The first takes the least memory.")
        + " Predicted by count of operations, bytes and messages, not measured."
    )
    sections = [
        Section(
            "Layouts",
            [Table(rows(plan.estimates[: report.top]), LEFT), _picture(folder / "plan.png", "time and memory")],
            note="The first, to lay over the run: " + " ".join(overrides(best)) if best.fits else "",
        ),
        Section(
            "Memory of the first, GiB",
            [
                Table(memory_rows(best), ()),
                Table([["part", "how", "GiB"], *arithmetic(best, best.fullest)], (0, 1)),
            ],
            lead="Of a rank of every stage at its fullest moment; below, how the fullest stage's comes about.",
        ),
        Section("Modes of recomputing", [Table(mode_rows(best), (0,))]),
        Section(
            "Time of the first",
            [Table(time_rows(best, best.stages.index(best.slowest)), (0, 1, 2))],
            lead="Of the mean micro-batch on the slowest stage.",
            note=" ".join(f"{line}." for line in step_lines(best)),
        ),
    ]
    if report.scaling:
        sections.append(
            Section(
                "Scaling",
                [Table(scaling_rows(report.scaling), (2, 7)), _picture(folder / "scaling.png", "scaling")],
                lead="The fastest layout at each number of devices: of the run's own batch, and of one that grows with them.",
                note=" ".join(f"{line}." for line in scaling_gaps(report.scaling)),
            )
        )
    if report.dry_run:
        sections.append(_dry_section(report.dry_run))
    return Page(f"Plan of {report.run}", lead, sections, facts(report.planned, plan), versions)


def _dry_section(found: DryRun) -> Section:
    stages = Table(found.rows(), (2,))
    lead = f"A model of every stage on no device, for {found.processes}. {found.how}"
    if found.passed:
        return Section("Dry run", [stages], lead=lead, note=AS_PLANNED)
    differences = [["difference"], *([difference] for difference in found.differences)]
    return Section("Dry run", [stages, Table(differences, (0,))], lead=lead)


def _picture(path: Path, name: str) -> Pictures:
    return Pictures([Picture(name, path.read_bytes(), {})])
