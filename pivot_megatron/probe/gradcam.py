"""Where an image matters to a preference: the gradients of several models on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pivot_megatron.config.schema import Dpo, Sft
from pivot_megatron.convert.commands import trained_model
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Stage
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.types import Objective
from pivot_megatron.probe.features import Say, silent
from pivot_megatron.probe.gradcam_figure import Panel, write_figure
from pivot_megatron.probe.gradcam_report import (
    Column,
    GradcamReport,
    GradcamSettings,
    ObjectiveName,
    Seen,
    figure_name,
    map_name,
)
from pivot_megatron.probe.gradients import overfit, patch_gradient, put_back, with_reference
from pivot_megatron.probe.model_input import ModelInput
from pivot_megatron.probe.questions import Question, read_questions
from pivot_megatron.probe.saliency import SMALLEST, saliency_map
from pivot_megatron.report.facts import short_names
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.train.optimizer import apply_rules

_OBJECTIVES: dict[ObjectiveName, Dpo | Sft] = {"dpo": Dpo(), "sft": Sft()}


def gradcam_models(models: Sequence[Path], settings: GradcamSettings, out: Path, say: Say = silent) -> GradcamReport:
    """Maps (`[rows, columns]` float64) and figures go to `out`. Raises UserError for settings, questions and models that will not
    do, before the first model is loaded, and for a gradient that makes no map."""
    if settings.steps < 0 or settings.rate <= 0:
        raise UserError(
            f"--steps, --rate: expected 0 or more, and a rate above 0, found {settings.steps} and {settings.rate}"
        )
    questions = read_questions(settings.samples, settings.count)
    inputs = [(path, ModelInput.of(path)) for path in models]
    for path, given in inputs:
        for question in questions:
            _require_map(path, given, question)
    (out / "maps").mkdir(parents=True, exist_ok=True)
    columns: list[Column] = []
    for path, given in inputs:
        with trained_model(path) as model:
            apply_rules(model, ())
            begin_again = put_back(model)
            for name in settings.objectives:
                label = str(path) if len(settings.objectives) == 1 else f"{path}, {name}"
                seen = []
                for number, question in enumerate(questions):
                    seen.append(_seen(model, given, question, build_objective(_OBJECTIVES[name]), settings, label))
                    begin_again()
                    np.save(out / map_name(number, len(columns)), seen[-1].saliency)
                    say(f"{label}: {number + 1} of {len(questions)} samples, loss {seen[-1].losses[-1]:.4f}")
                columns.append(Column(label, tuple(seen)))
    names = short_names([column.label for column in columns])
    for number, question in enumerate(questions):
        panels = [_panel(name, column.seen[number]) for name, column in zip(names, columns, strict=True)]
        write_figure(out / figure_name(number), question, panels)
    return GradcamReport(settings, questions, columns, out)


def _require_map(path: Path, given: ModelInput, question: Question) -> None:
    given.tokens(question, branches=2)
    grid = given.grid(question)
    if min(grid.rows, grid.columns) < SMALLEST:
        raise UserError(
            f"{question.name}: expected {SMALLEST} x {SMALLEST} patches or more, since the map's border is replaced, found "
            f"{grid.rows} x {grid.columns} by {path}"
        )
    if question.box and not grid.cover(question.box).any():
        raise UserError(
            f"{question.name}: box: expected a part of the image that patches see, found its edge past the last whole patch of "
            f"{path}"
        )


def _seen(
    model: Stage, given: ModelInput, question: Question, objective: Objective, settings: GradcamSettings, label: str
) -> Seen:
    batch = given.batch(question, objective.branches).to(current_platform().device)
    # As in probes of features: TF32 is on for convolutions as torch comes.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if objective.needs_reference:
            batch = with_reference(model, batch)
        losses = overfit(model, batch, objective, settings.steps, settings.rate)
        gradient, loss = patch_gradient(model, batch, objective, settings.at)
    grid = given.grid(question)
    try:
        saliency = saliency_map(gradient, grid.rows, grid.columns)
    except ValueError as error:
        raise UserError(
            f"{label}: {question.name}: no map of its gradient ({error}); lower --rate or --steps"
        ) from None
    return Seen(saliency, grid, (*losses, loss), grid.cover(question.box) if question.box else None)


def _panel(label: str, seen: Seen) -> Panel:
    found = seen.scores
    told = f"{100 * found['energy']:.1f} % in the box (even: {100 * found['energy_chance']:.1f} %)" if found else ""
    return Panel(label, seen.saliency, seen.grid, told)
