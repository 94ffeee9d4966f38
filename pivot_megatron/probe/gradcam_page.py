"""The page of `pivot probe gradcam`: scores where samples have boxes, and the samples' figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pivot_megatron.probe.gradcam_report import GradcamReport, figure_name
from pivot_megatron.probe.score_sections import Told, score_sections, scores_told
from pivot_megatron.report.facts import short_names, told
from pivot_megatron.report.intervals import Line
from pivot_megatron.report.page import Page, Picture, Pictures, Section, Table

SHOWN = 24
"""Samples on a page, the first there are; the others' figures lie beside it."""

_HEADS = ("energy, %", "of an even map, %", "maximum")
_ENERGY = Told(
    "energy",
    "The share of each map that lies inside the sample\u2019s box.",
    "Intervals are for other samples. Chance is the box\u2019s share of what patches see; hold a model against the first on the "
    "same samples rather than against it.",
)
_POINTING = Told(
    "pointing",
    "How often a map\u2019s maximum lies inside the box.",
    "Intervals are for other samples. Chance is how often a maximum at any patch alike would lie there.",
)


def gradcam_page(report: GradcamReport, versions: Mapping[str, str]) -> Page:
    """Reads the samples' figures from the report's folder."""
    sections: list[Section] = []
    lead = f"Where a preference\u2019s gradient falls on {_count(len(report.questions), 'image')}"
    if report.boxed:
        for text, measure in ((_ENERGY, "energy"), (_POINTING, "pointing")):
            scores = report.scores(measure)  # type: ignore[arg-type]
            chance = float(np.mean([score.record["chance"] for score in scores]))
            sections += score_sections(text, scores, Line("chance", 100 * chance))
        lead += f", and how much of it in the boxes of {report.boxed}. {scores_told(_ENERGY, report.scores('energy'))}"
    else:
        lead += "."
    sections.append(_samples(report))
    models = [column.label for column in report.columns]
    return Page("Grad-CAM", lead, sections, told({"models": models, **vars(report.settings)}), versions)


def _samples(report: GradcamReport) -> Section:
    pictures = [_picture(report, number) for number in range(min(SHOWN, len(report.questions)))]
    left_out = len(report.questions) - len(pictures)
    more = (
        f" The first {SHOWN} of {len(report.questions)}; the others\u2019 figures lie beside this page."
        if left_out
        else ""
    )
    return Section(
        "Samples",
        [Pictures(pictures)],
        "The image, then each model\u2019s map over it, in the table\u2019s order: blue where the gradient is smallest, red "
        f"where it is largest. A white frame is the sample\u2019s box.{more}",
        "Loss is told before overfitting and where the gradient was taken.",
    )


def _picture(report: GradcamReport, number: int) -> Picture:
    question = report.questions[number]
    names = short_names([column.label for column in report.columns])
    rows = [["model", "loss", *(_HEADS if question.box else ())]]
    for name, column in zip(names, report.columns, strict=True):
        seen = column.seen[number]
        rows.append([name, f"{seen.losses[0]:.4f} \u2192 {seen.losses[-1]:.4f}", *_scores(seen.scores)])
    answers = {"question": question.pair.question, "chosen": question.pair.chosen, "rejected": question.pair.rejected}
    file = report.out / figure_name(number)
    return Picture(question.name, file.read_bytes(), answers, Table(rows, (0,)))


def _scores(found: Mapping[str, float]) -> list[str]:
    """As `_HEADS` has them; none of a sample without a box."""
    if not found:
        return []
    where = "inside" if found["pointing"] else "outside"
    return [f"{100 * found['energy']:.2f}", f"{100 * found['energy_chance']:.2f}", where]


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
