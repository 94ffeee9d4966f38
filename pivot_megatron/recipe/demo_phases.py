"""The demo's phases, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.data_prep.progress import track
from pivot_megatron.probe.table import Score
from pivot_megatron.recipe.answers import ExportedModel
from pivot_megatron.recipe.demo_folder import MODELS, RUNS, Demo
from pivot_megatron.recipe.demo_probes import label_sets, probe_gradients, probe_labels, probe_masks
from pivot_megatron.recipe.demo_report import BLIND, DemoReport
from pivot_megatron.recipe.demo_runs import train_run
from pivot_megatron.recipe.demo_world import make_checkpoints, make_data, make_probe_data
from pivot_megatron.recipe.export_checks import ExportCheck, check_encoder, check_model
from pivot_megatron.recipe.held_out import HeldOut, blind_answers, read_held_out
from pivot_megatron.recipe.phases import Phases
from pivot_megatron.recipe.run_once import export_once
from pivot_megatron.recipe.small_tasks import Answered, TaskReport, TaskSettings, ask_models

Found = Mapping[str, Any]
"""What a phase leaves in its file: plain JSON."""


def work(demo: Demo) -> DemoReport:
    """Every phase that is not finished yet, and what all of them found."""
    sets = label_sets(demo)
    phases = Phases(demo.out / "phases", 2 + len(RUNS) + 1 + len(MODELS) + len(sets) + 2)
    phases.run("data", lambda: _make_data(demo))
    phases.run("checkpoints", lambda: make_checkpoints(demo))
    for name in RUNS:
        phases.run(name, partial(train_run, demo, name))
    checks: list[Found] = phases.run("exports", lambda: _exports(demo))
    asked = TaskSettings(demo.data("held_out"))
    answered = [phases.run(f"answers {model}", partial(_answered, demo, model, asked)) for model in MODELS]
    labels = {name: phases.timed(f"probe {name}", partial(probe_labels, demo, name)) for name in sets}
    masks = phases.timed("probe masks", lambda: probe_masks(demo))
    gradients = phases.timed("gradients", lambda: probe_gradients(demo))
    pairs = read_held_out(asked.pairs)
    return DemoReport(
        answers=TaskReport(asked, tuple(pairs), tuple(map(Answered.from_json, answered))),
        blind=_blind(demo, pairs),
        labels=labels,
        masks=masks,
        gradients=gradients,
        exports=[ExportCheck(**check) for check in checks],
        seconds=phases.seconds,
    )


def _make_data(demo: Demo) -> None:
    make_data(demo)
    make_probe_data(demo)


def _exports(demo: Demo) -> list[Found]:
    """Encoder and assembled model of every model that is compared, and the evolved encoder with its old last layer; each read
    back and held against the run's own model."""
    pairs = read_held_out(demo.data("held_out"))[: demo.scale.compared]
    checks: list[ExportCheck] = []
    for model, name in track(list(MODELS.items()), len(MODELS), "exports"):
        run, encoder, mllm = demo.run(name), demo.export(model, "encoder"), demo.export(model, "mllm")
        export_once(resolve_checkpoint(run), encoder)
        checks.append(check_encoder(f"{model} encoder", encoder, run, demo.encoder, pairs))
        export_once(resolve_checkpoint(run), mllm, "mllm")
        checks.append(check_model(f"{model} model", mllm, run, [demo.encoder, demo.llm], ExportedModel(mllm), pairs))
    run, whole = demo.run("dpo"), demo.export("dpo", "encoder-original")
    export_once(resolve_checkpoint(run), whole, original=demo.encoder)
    checks.append(check_encoder("dpo encoder, old last layer", whole, run, demo.encoder, pairs))
    return [asdict(check) for check in checks]


def _answered(demo: Demo, model: str, asked: TaskSettings) -> Found:
    """A model's answers and preferences, by its export in plain transformers."""
    (found,) = ask_models([demo.export(model, "mllm")], asked).answered
    return {**asdict(found), "model": model}


def _blind(demo: Demo, pairs: Sequence[HeldOut]) -> Score:
    """What questions alone give away: right answers without the image."""
    known = [(pair.question, pair.label) for pair in read_held_out(demo.data("pairs"))]
    said = Answered(BLIND, tuple(blind_answers(known, [pair.question for pair in pairs])), ())
    (found,) = TaskReport(TaskSettings(demo.data("held_out")), tuple(pairs), (said,)).answers()
    return found
