"""The page of `pivot evolve`: what each phase did to the encoder, and how its run went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from pivot_megatron.probe.classes import CLASSIFIERS
from pivot_megatron.probe.score_sections import DIFFERENCES, NOT_ADJUSTED
from pivot_megatron.recipe.evolution import PhaseResult, Probed, table_rows
from pivot_megatron.recipe.phase_runs import Phase
from pivot_megatron.recipe.run_facts import curves, environment_facts, run_told, settings_section
from pivot_megatron.recipe.schedule import Schedule
from pivot_megatron.report.facts import together, told
from pivot_megatron.report.intervals import Line, Row, change_row, interval_table
from pivot_megatron.report.page import Charts, Forest, Page, Section, Table
from pivot_megatron.report.panels import colours, run_panels

_CURVES = (("loss",), ("reward_margin",))


def evolution_page(schedule: Schedule, phases: Sequence[Phase], results: Sequence[PhaseResult]) -> Page:
    """Of the phases that are judged, in order. Reads their runs' folders."""
    judged = {result.name for result in results}
    runs = {phase.name: phase.config.out for phase in phases if phase.name in judged}
    slots = colours([phase.name for phase in phases])
    rows = table_rows(results)
    sections = [*_accuracy(schedule, results, slots), Section("Phases", [Table(rows, (0, 1, 2, len(rows[0]) - 1))])]
    panels = run_panels(curves(runs), slots, _CURVES)
    lead = "Over the optimizer step; beside a metric's name its first and its last value. A faint line is the metric as it was "
    sections.append(Section("Training", [Charts(panels)], f"{lead}logged, the strong one its moving mean."))
    sections.append(settings_section({phase.name: [phase.config] for phase in phases}))
    versions = together([environment_facts(run) for run in runs.values()])
    return Page(f"Evolution: {schedule.name}", _lead(phases, results), sections, _settings(schedule, phases), versions)


def _probed(results: Sequence[PhaseResult]) -> list[tuple[str, Probed]]:
    return [(result.name, result.probed) for result in results if result.probed is not None]


def _lead(phases: Sequence[Phase], results: Sequence[PhaseResult]) -> str:
    done = f"{len(results)} of {len(phases)} phases are finished. " if len(results) < len(phases) else ""
    found = _probed(results)
    if not found:
        return f"{done}No encoder was probed."
    (_, first), (name, last) = found[0], found[-1]
    start = f"{100 * (first.accuracy - first.difference):.2f}"
    return (
        f"{done}By the linear probe the encoder began at {start} %, and phase {name} left it at {100 * last.accuracy:.2f} % "
        f"(95 % interval {100 * last.interval.low:.2f} to {100 * last.interval.high:.2f})."
    )


def _accuracy(schedule: Schedule, results: Sequence[PhaseResult], slots: dict[str, int]) -> list[Section]:
    found = _probed(results)
    if not found or schedule.probe is None:
        return []
    rows = [
        Row("", name, slots[name], 100 * one.accuracy, 100 * one.interval.low, 100 * one.interval.high)
        for name, one in found
    ]
    first = found[0][1]
    start = Line("the encoder as it began", 100 * (first.accuracy - first.difference))
    changes = [
        change_row("", name, one.difference, one.difference_interval.low, one.difference_interval.high)
        for name, one in found
    ]
    lead = (
        f"A linear probe of the encoder as each phase left it, by {CLASSIFIERS[schedule.probe.classifier]}. Phases that left it "
        "as it was, bit for bit, have no row."
    )
    return [
        Section("Accuracy", [Forest(interval_table(rows, [], lines={"": start}), "phase", "accuracy, %")], lead),
        Section(
            "What each phase did",
            [Forest(interval_table(changes, ["verdict"], zero=True), "phase", "points", signed=True)],
            f"The encoder that a phase left against the one that it found, on the same draws. {DIFFERENCES}",
            NOT_ADJUSTED,
        ),
    ]


def _settings(schedule: Schedule, phases: Sequence[Phase]) -> dict[str, str]:
    facts = told({"encoder": schedule.encoder.hf or schedule.encoder.checkpoint or schedule.encoder.fresh})
    if schedule.probe is not None:
        facts |= {f"probe {name}": value for name, value in told(asdict(schedule.probe)).items()}
    return facts | {f"phase {phase.name}": run_told(phase.config) for phase in phases}
