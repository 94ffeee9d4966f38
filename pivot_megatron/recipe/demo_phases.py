"""The demo's phases, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from pivot_megatron.data_prep.progress import track
from pivot_megatron.recipe.answers import ExportedModel, answer_logprobs, greedy_answers
from pivot_megatron.recipe.collect import examples, setting_facts
from pivot_megatron.recipe.demo_folder import MODELS, RUNS, Demo
from pivot_megatron.recipe.demo_runs import run_config, train_run
from pivot_megatron.recipe.demo_world import make_checkpoints, make_data
from pivot_megatron.recipe.encoder_probes import labelled_sets, probe_scores
from pivot_megatron.recipe.export_checks import check_encoder, check_model, export_once
from pivot_megatron.recipe.held_out import answer_scores, blind_answers, preference_scores, read_held_out
from pivot_megatron.recipe.phases import Phases
from pivot_megatron.recipe.record import AnswerScore, DemoReport, ExportCheck, PreferenceScore, ProbeScore
from pivot_megatron.recipe.run_facts import curves, environment_facts

BLIND = "blind"
"""Answers without the image: what the questions alone give away."""
_PHASES = 2 + len(RUNS) + 1 + len(MODELS) + 2

Found = Mapping[str, Any]
"""What a phase leaves in its file: plain JSON."""


def work(demo: Demo) -> DemoReport:
    """Every phase that is not finished yet, and what all of them found."""
    phases = Phases(demo.out / "phases", _PHASES)
    phases.run("data", lambda: make_data(demo))
    phases.run("checkpoints", lambda: make_checkpoints(demo))
    for name in RUNS:
        phases.run(name, partial(train_run, demo, name))
    checks: list[Found] = phases.run("exports", lambda: _exports(demo))
    judged: dict[str, Found] = {model: phases.run(f"answers {model}", partial(_judge, demo, model)) for model in MODELS}
    probes: list[Found] = phases.run("probes", lambda: _probes(demo))
    blind: Found = phases.run("blind answers", lambda: _blind(demo))
    checks = [*checks, *(judged[model]["check"] for model in MODELS)]
    return _report(demo, phases.seconds, {BLIND: blind, **judged}, probes, checks)


def _exports(demo: Demo) -> list[Found]:
    """Encoder and assembled model of every model that is compared, and the evolved encoder with its old last layer."""
    pairs = read_held_out(demo.data("held_out"))[: demo.scale.compared]
    checks: list[ExportCheck] = []
    for model, run in track(list(MODELS.items()), len(MODELS), "exports"):
        folder = demo.export(model, "encoder")
        export_once(demo.run(run), "encoder", folder)
        checks.append(check_encoder(f"{model} encoder", folder, demo.run(run), demo.encoder, pairs))
        export_once(demo.run(run), "mllm", demo.export(model, "mllm"))
    folder = demo.export("dpo", "encoder-original")
    export_once(demo.run("dpo"), "encoder", folder, demo.encoder)
    checks.append(check_encoder("dpo encoder, old last layer", folder, demo.run("dpo"), demo.encoder, pairs))
    return [asdict(check) for check in checks]


def _judge(demo: Demo, model: str) -> Found:
    """A model's answers, its preferences, and the check of its export, all in plain transformers."""
    pairs = read_held_out(demo.data("held_out"))
    folder, run = demo.export(model, "mllm"), demo.run(MODELS[model])
    exported = ExportedModel(folder)
    compared = pairs[: demo.scale.compared]
    check = check_model(f"{model} model", folder, run, [demo.encoder, demo.llm], exported, compared)
    answers = greedy_answers(exported, pairs, label="answers")
    logprobs = answer_logprobs(exported, pairs, label="preferences")
    return {
        "check": asdict(check),
        "answers": [asdict(score) for score in answer_scores(model, pairs, answers)],
        "preference": [asdict(score) for score in preference_scores(model, pairs, logprobs)],
        "texts": answers,
    }


def _blind(demo: Demo) -> Found:
    pairs = read_held_out(demo.data("held_out"))
    known = [(pair.question, pair.label) for pair in read_held_out(demo.data("pairs"))]
    answers = blind_answers(known, [pair.question for pair in pairs])
    return {"answers": [asdict(score) for score in answer_scores(BLIND, pairs, answers)], "preference": [], "texts": []}


def _probes(demo: Demo) -> list[Found]:
    """The encoder as it was made, and as every model that is compared has it."""
    encoders = {"init": demo.encoder}
    encoders |= {model: demo.export(model, "encoder") for model in MODELS}
    sets = labelled_sets(demo.scale)
    return [
        asdict(score)
        for name, encoder in track(list(encoders.items()), len(encoders), "probes")
        for score in probe_scores(name, encoder, sets, seed=demo.scale.seed)
    ]


def _report(
    demo: Demo,
    seconds: Mapping[str, float],
    judged: Mapping[str, Found],
    probes: Sequence[Found],
    checks: Sequence[Found],
) -> DemoReport:
    pairs = read_held_out(demo.data("held_out"))
    return DemoReport(
        environment=environment_facts(demo.run("pretrain")),
        settings=setting_facts(demo, {name: run_config(demo, name) for name in RUNS}),
        seconds=seconds,
        curves=curves({name: demo.run(name) for name in RUNS}),
        answers=[AnswerScore(**score) for found in judged.values() for score in found["answers"]],
        preference=[PreferenceScore(**score) for found in judged.values() for score in found["preference"]],
        probes=[ProbeScore(**score) for score in probes],
        examples=examples(pairs, {model: judged[model]["texts"] for model in MODELS}, demo.scale.examples_a_task),
        exports=[ExportCheck(**check) for check in checks],
    )
