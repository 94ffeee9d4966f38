"""What `pivot plan` does, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.errors import UserError
from pivot_megatron.plan.columns import aligned
from pivot_megatron.plan.dry_run import DryRun, dry_run
from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.explain import explain
from pivot_megatron.plan.machine import Machine
from pivot_megatron.plan.plan import plan, plan_one
from pivot_megatron.plan.plot import write_plan_plot, write_scaling_plot
from pivot_megatron.plan.rehearsal import Build
from pivot_megatron.plan.report import Report, scaling_gaps, scaling_rows, write_report
from pivot_megatron.plan.scaling import scaling
from pivot_megatron.plan.subject import planned
from pivot_megatron.plan.text import as_text
from pivot_megatron.report.facts import versions


@dataclass(frozen=True)
class Request:
    """`own`: the run's layout alone, as it is. `explain`: which of the layouts, from 1 on."""

    run: str
    config: RunConfig
    machine: Machine
    gpus: int
    encoder: str | None = None
    head: str | None = None
    samples: int | None = None
    own: bool = False
    top: int = 10
    explain: int | None = None
    scaling: bool = False
    dry_run: bool = False


def make_report(request: Request, out: Path) -> Report:
    """With its files in `out`: `plan.json`, `plan.png`, `report.html`, and `scaling.png` where that was asked for. Raises
    UserError where there is nothing to plan."""
    config = request.config
    found = planned(config, request.encoder, request.head, request.samples)
    method = plan_one if request.own else plan
    made = method(found.subject, config.layout, request.gpus, request.machine)
    if request.explain is not None and request.explain > len(made.estimates):
        raise UserError(f"--explain: expected a rank from 1 to {len(made.estimates)}, found {request.explain}")
    report = Report(
        request.run,
        found,
        made,
        request.top,
        request.explain,
        scaling(found.subject, config.layout, request.gpus, request.machine) if request.scaling else None,
        dry_run(_build(made.best)) if request.dry_run else None,
    )
    write_plan_plot(made.estimates[: request.top], out / "plan.png")
    if report.scaling:
        write_scaling_plot(report.scaling, out / "scaling.png")
    write_report(report, versions(), out)
    return report


def said(request: Request, report: Report) -> str:
    parts = [as_text(report.planned, report.plan, request.top)]
    if request.explain is not None:
        parts.append(f"Rank {request.explain}: {explain(report.plan.estimates[request.explain - 1])}")
    if report.scaling:
        parts.append("\n".join([*aligned(scaling_rows(report.scaling)), *scaling_gaps(report.scaling)]))
    if report.dry_run:
        parts.append(_dry(request, report.dry_run))
    return "\n\n".join(parts)


def _dry(request: Request, found: DryRun) -> str:
    which = "the run's own layout" if request.own else "the first layout"
    return f"Dry run of {which}, a model of every stage on no device:\n{found.table()}"


def _build(found: Estimate) -> Build:
    subject = found.subject
    return Build(subject.arch, found.layout, found.gpus, subject.precision, subject.recompute, subject.rules)
