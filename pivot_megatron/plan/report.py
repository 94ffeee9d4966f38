"""A plan as JSON, and as one page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot_megatron.plan.dry_run import AS_PLANNED, DryRun
from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.explain import arithmetic, memory_rows, mode_rows, step_lines, time_rows
from pivot_megatron.plan.limits import limited_by, spent
from pivot_megatron.plan.plan import Plan
from pivot_megatron.plan.scaling import Point, Scaling, against_ideal
from pivot_megatron.plan.subject import Planned
from pivot_megatron.plan.text import LEFT, facts, overrides, rows
from pivot_megatron.report.page import Page, Picture, Pictures, Section, Table, write_page


@dataclass(frozen=True)
class Report:
    """`run`: the config's path. `top`: layouts that are shown."""

    run: str
    planned: Planned
    plan: Plan
    top: int
    scaling: Scaling | None = None
    dry_run: DryRun | None = None


def as_json(report: Report) -> str:
    return json.dumps(as_tree(report), indent=2)


def as_tree(report: Report) -> dict[str, Any]:
    """Seconds, bytes and counts; every layout that was estimated. Ranks and layers are given by the first and the last."""
    tree: dict[str, Any] = {
        "run": report.run,
        "gpus": report.plan.gpus,
        **facts(report.planned, report.plan),
        "usable_bytes": report.plan.machine.memory,
        "layouts": [_layout(n, found) for n, found in enumerate(report.plan.estimates, 1)],
    }
    if report.scaling:
        tree["scaling"] = {name: _points(getattr(report.scaling, name)) for name in ("strong", "weak")}
    if report.dry_run:
        tree["dry_run"] = _dry_tree(report.dry_run)
    return tree


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
        "spent": spent(found),
        "pairs_a_second": found.pairs_a_second,
        "tokens_a_second": found.tokens_a_second,
        "utilisation": found.utilisation,
        "hours": found.hours,
        "gpu_hours": found.hours * found.gpus,
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
            "pairs_a_second": point.best and point.best.pairs_a_second,
            "utilisation": point.best and point.best.utilisation,
            "of_ideal": ideal,
            "overrides": point.best and overrides(point.best),
        }
        for point, ideal in zip(points, against_ideal(points), strict=True)
    ]


def scaling_rows(found: Scaling) -> list[list[str]]:
    """A number of devices each, the heads first."""
    heads = ["devices"]
    for name in ("batch", "batch that grows"):
        heads += [name, "tensor x pipeline x data", "pairs/s", "MFU", "of ideal"]
    sides = [zip(points, against_ideal(points), strict=True) for points in (found.strong, found.weak)]
    return [heads, *([f"{one[0].gpus}", *_cells(*one), *_cells(*two)] for one, two in zip(*sides, strict=True))]


def _cells(point: Point, ideal: float | None) -> list[str]:
    best = point.best
    if best is None or ideal is None:
        return ["", "none fits", "", "", ""]
    layout = " x ".join(map(str, (best.layout.tensor, best.layout.pipeline, best.data_parallel)))
    return [
        f"{best.subject.batch.global_size:,}",
        layout,
        f"{best.pairs_a_second:,.1f}",
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
