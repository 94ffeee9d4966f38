"""The demo's page: its measures side by side, and below them what the probes' own pages show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pivot_megatron.config.schema import Tracking
from pivot_megatron.probe.gradcam_page import gradcam_page
from pivot_megatron.probe.pages import linear_page, segmentation_page
from pivot_megatron.probe.score_sections import DIFFERENCES, NOT_ADJUSTED
from pivot_megatron.recipe.answers_page import answers_page
from pivot_megatron.recipe.demo_folder import MODELS, RUNS, Demo
from pivot_megatron.recipe.demo_report import BLIND, INIT, Change, DemoReport
from pivot_megatron.recipe.demo_runs import run_config
from pivot_megatron.recipe.run_facts import curves, environment_facts, run_told
from pivot_megatron.report.facts import together
from pivot_megatron.report.intervals import Row, change_row, interval_table, verdicts_told
from pivot_megatron.report.page import Charts, Forest, Page, Pictures, Section, Table, write_page
from pivot_megatron.report.panels import Curve, run_panels
from pivot_megatron.report.tracked import track
from pivot_megatron.train.run_folder import write_atomically

# Metrics that share a panel.
_PANELS = (
    ("loss",),
    ("reward_accuracy",),
    ("reward_margin",),
    ("chosen_rewards", "rejected_rewards"),
    ("chosen_logps", "rejected_logps"),
)


def write_report(demo: Demo, report: DemoReport, file: Path, tracking: Tracking) -> None:
    """`report.html` beside `file`, and then `file`, the same as JSON."""
    settings = setting_facts(demo)
    versions = together([environment_facts(demo.run(name)) for name in RUNS])
    page = demo_page(report, curves({name: demo.run(name) for name in RUNS}), settings, versions)
    write_page(page, file.with_name("report.html"))
    track(page.title, tracking, file.with_name("report.html"), page, report.as_text(), report.figures())
    write_atomically(file, report.as_json(settings=settings, versions=versions))


def demo_page(
    report: DemoReport,
    runs: Mapping[str, Mapping[str, Curve]],
    settings: Mapping[str, str],
    versions: Mapping[str, str],
) -> Page:
    """`runs`: every metric of every run. Reads the figures of Grad-CAM from its report's folder."""
    pages = {
        "Answers": answers_page(report.answers, {}),
        **{f"Linear probe of {name}": linear_page(one, {}) for name, one in report.labels.items()},
        "Segmentation": segmentation_page(report.masks, {}),
        "Grad-CAM": gradcam_page(report.gradients, {}),
    }
    sections = [_overview(report), _differences(report)]
    for name, page in pages.items():
        sections += _shown(name, page)
    sections += [_training(runs), _exports(report), _time(report)]
    facts = {f"{name}: {key}": value for name, page in pages.items() for key, value in page.settings.items()}
    return Page("PIVOT demo", _lead(report), sections, {**settings, **facts}, versions)


def _lead(report: DemoReport) -> str:
    control = [_row(one) for one in report.changes() if (one.model, one.against) == ("dpo", "sft")]
    return (
        "A small encoder, pretrained through a language model, and then trained on pairs by DPO (dpo) and, as the control, by "
        f"SFT on the chosen answers alone (sft). dpo: {verdicts_told(control, 'sft')} "
        f"Everything together took {_duration(sum(report.seconds.values()))}."
    )


def _overview(report: DemoReport) -> Section:
    lead = (
        "Everything here is measured on held-out data. Answers and preferences: questions answered right, and pairs whose chosen "
        "answer is the likelier one, by the exported models in plain transformers. The others are probes of the frozen encoders: "
        "which class an image is of, and which classes (masks) its patches show."
    )
    note = (
        f"In per cent, with 95 % intervals. {BLIND}: the most frequent answer to a question, without the image. {INIT}: the "
        "encoder as it was made, untrained. base: after pretraining."
    )
    return Section("All measures", [Table(report.rows(), (0,))], lead, note)


def _differences(report: DemoReport) -> Section:
    table = interval_table([_row(one) for one in report.changes()], ["verdict"], zero=True)
    lead = f"Each model against the one it came from, and DPO against its control, sample by sample. {DIFFERENCES}"
    note = f"Intervals are for other samples (and draws, or classes), not for other seeds of training. {NOT_ADJUSTED}"
    return Section("Differences", [Forest(table, "difference", "points", "measure", signed=True)], lead, note)


def _row(one: Change) -> Row:
    return change_row(one.measure, f"{one.model} \u2212 {one.against}", one.value, one.interval.low, one.interval.high)


def _shown(name: str, page: Page) -> list[Section]:
    """Of a probe's page what does not stand at the head of this one: the intervals with all their columns, and the pictures."""
    parts = [one for one in page.sections if all(_is_shown(part) for part in one.parts)]
    return [replace(one, title=f"{name}: {one.title[:1].lower()}{one.title[1:]}") for one in parts]


def _is_shown(part: Any) -> bool:
    return isinstance(part, Pictures) or (isinstance(part, Forest) and not part.signed)


def _training(runs: Mapping[str, Mapping[str, Curve]]) -> Section:
    slots = {run: n for n, run in enumerate(MODELS.values())}
    lead = (
        "Over the optimizer step; beside a metric\u2019s name its first and its last value. A faint line is the metric as it was "
        "logged, the strong one its moving mean."
    )
    return Section("Training", [Charts(run_panels(runs, slots, _PANELS))], lead)


def _exports(report: DemoReport) -> Section:
    rows = [["export", "folder", "loads", "largest difference", "tensors changed", "unchanged"]]
    for one in report.exports:
        counts = (str(one.changed_tensors), str(one.unchanged_tensors))
        rows.append([one.name, one.folder, "yes" if one.loaded else "no", f"{one.max_difference:.1e}", *counts])
    lead = (
        "Each export read back by plain transformers and held against the trained model, which runs on megatron-core: an encoder "
        "by its features, a whole model by the log-probs (nats) of whole answers."
    )
    note = (
        "Tensors are counted against the checkpoints that everything started from; a key bias or an unseen word may stay "
        "as it was."
    )
    return Section("Exports", [Table(rows, (0, 1, 2))], lead, note)


def _time(report: DemoReport) -> Section:
    rows = [["phase", "time"], *([phase, _duration(seconds)] for phase, seconds in report.seconds.items())]
    return Section("Time", [Table(rows, (0,))])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def setting_facts(demo: Demo) -> dict[str, str]:
    """What was made, and how each run trained."""
    scale = demo.scale
    tokens = (scale.image_size // scale.patch_size) ** 2
    facts = {
        "training data": f"{scale.captions} captions, {scale.instruct} instructions, {scale.pairs} pairs",
        "held out": f"{scale.held_out} pairs, of another seed",
        "images": f"{scale.image_size} pixels a side, {tokens} tokens",
        "encoder": f"{scale.encoder_layers} layers of {scale.hidden}, {_parameters(demo.encoder)} parameters",
        "head": f"{scale.head_layers} layers of {scale.hidden}, {_parameters(demo.llm)} parameters",
        "trained layers of the encoder": f"{scale.encoder_layers - 1}; the last one is past the features that the head reads",
        "processes": str(demo.processes),
        "seed": str(scale.seed),
    }
    return facts | {f"run {name}": run_told(run_config(demo, name)) for name in RUNS}


def _parameters(folder: Path) -> str:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes: list[Any] = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return f"{sum(torch.Size(shape).numel() for shape in shapes) / 1e6:.2f} M"
