"""`pivot compare`: trains every run of a comparison that is not finished, and probes what each left."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pivot_megatron.checkpoints.folder import facts_of, resolve_checkpoint
from pivot_megatron.config.schema import Model, RunConfig
from pivot_megatron.convert.fingerprint import start_fingerprint
from pivot_megatron.convert.start import pinned
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.shards import open_shards
from pivot_megatron.errors import UserError
from pivot_megatron.probe.classes import LinearSettings, probe_encoders, require_sets
from pivot_megatron.probe.kept import made_by
from pivot_megatron.probe.table import Score
from pivot_megatron.recipe import run_differences
from pivot_megatron.recipe.answers_page import examples_section
from pivot_megatron.recipe.comparison import START, Measured, Member, as_json, as_text, figures_of, members, variants
from pivot_megatron.recipe.comparison_page import comparison_page
from pivot_megatron.recipe.comparison_runs import examples_told, runs_section, training_sections
from pivot_megatron.recipe.held_out import HeldOut, read_held_out
from pivot_megatron.recipe.run_facts import environment_facts, run_settings, run_told
from pivot_megatron.recipe.run_once import StoppedError, export_once, recorded, run_once, write_run
from pivot_megatron.recipe.small_tasks import TaskSettings, ask_models
from pivot_megatron.report.facts import together, told
from pivot_megatron.report.page import write_page
from pivot_megatron.report.tracked import track
from pivot_megatron.requeue import StopRequests
from pivot_megatron.train.begun import require_begun
from pivot_megatron.train.checkpoint import progress_of
from pivot_megatron.train.run_folder import write_atomically
from pivot_megatron.train.tracking import require_trackers

_ANSWERED_BY = (
    "pivot_megatron.convert.export",
    *(f"pivot_megatron.recipe.{module}" for module in ("answers", "held_out", "small_tasks")),
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class CompareSettings:
    """`counts`: of samples; None for all. `probe`: its seed is the first draw's, the same for every encoder. `pairs`: held-out
    ones that the whole models answer, too."""

    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    counts: tuple[int | None, ...]
    probe: LinearSettings
    pairs: Path | None
    out: Path


def compare(settings: CompareSettings, processes: int | None, requests: StopRequests) -> bool:
    """Every run, its export and its probe, each once; the tables on stdout, `compare.json` in `settings.out`. False where it
    was asked to stop; what is done is kept."""
    configs = variants(settings.files, settings.overrides)
    if len(set(settings.seeds)) < len(settings.seeds) or len(settings.seeds) < 2:
        raise UserError(f"--seeds: expected two or more that differ, found {', '.join(map(str, settings.seeds))}")
    if START in configs:
        raise UserError(f"name: {START} is what the encoder that all begin from is called; choose another")
    varied, note = run_differences.differences(configs), ""
    if len(settings.files) == 1:
        note = run_differences.twin_told(*next(iter(configs.items())))
        print(f"compare: {note}", file=sys.stderr, flush=True)
    require_trackers(next(iter(configs.values())).tracking)
    require_sets(settings.probe, settings.out / "features")
    held_out = [] if settings.pairs is None else read_held_out(settings.pairs)
    _require_counts(settings.counts, configs)
    start = pinned(next(iter(configs.values())).model)  # once: what it names may train on meanwhile
    configs = {name: replace(config, model=start) for name, config in configs.items()}
    encoder = _start(start)
    begun = {seed: start_fingerprint(start, seed) for seed in settings.seeds}
    every = members(configs, settings.seeds, settings.counts, settings.out)
    for member in every:
        write_run(member.name, member.config)
    for n, member in enumerate(every):
        print(f"compare: [{n + 1}/{len(every)}] {member.name}", file=sys.stderr, flush=True)
        try:
            run_once(member.name, member.config, processes, requests)
        except StoppedError:
            print(f"compare: stopped in {member.name}, which has saved; the same command goes on", file=sys.stderr)
            return False
        _require_begun(member, begun[member.seed])
        export_once(resolve_checkpoint(member.config.out), member.encoder)
    found: list[Measured] = []
    texts: dict[float, dict[str, Sequence[str]]] = {}
    try:
        for count in settings.counts:
            runs = [one for one in every if one.count == count]
            found.append(_encoders(settings, configs, runs, encoder, requests))
            if settings.pairs is not None:
                measured, texts[count or math.inf] = _models(settings, settings.pairs, configs, runs, requests)
                found += measured
    except StoppedError:
        print(
            "compare: stopped between two models; what was found is kept, and the same command goes on", file=sys.stderr
        )
        return False
    findings = _Findings(varied, note, found, held_out, texts[max(texts)] if texts else {})
    _tell(settings, configs, every, findings)
    print(findings.as_text())
    return True


@dataclass(frozen=True)
class _Findings:
    """`varied`, `twin`: in what the runs differ, and what is to be said of a twin. `texts`: answers to `held_out`, by model."""

    varied: run_differences.Differences
    twin: str
    measured: Sequence[Measured]
    held_out: Sequence[HeldOut]
    texts: Mapping[str, Sequence[str]]

    def as_text(self) -> str:
        return f"{run_differences.as_text(self.varied, self.twin)}\n{as_text(self.measured)}"


def _tell(
    settings: CompareSettings, configs: Mapping[str, RunConfig], every: Sequence[Member], found: _Findings
) -> None:
    """The JSON, the page and what trackers are told."""
    versions = together([environment_facts(member.config.out) for member in every])
    json_told = as_json(
        {**vars(settings), "probe": vars(settings.probe)},
        found.measured,
        examples=examples_told(found.held_out, found.texts) if found.texts else [],
        runs={member.name: run_settings(member.config) for member in every},
        versions=versions,
        differences=found.varied,
    )
    write_atomically(settings.out / "compare.json", json_told)
    more = [*training_sections(every), runs_section(every)]
    if found.texts:
        note = f"Of the runs with seed {settings.seeds[0]}, over the most samples."
        more.insert(0, examples_section(found.held_out, found.texts, note))
    page = comparison_page(found.measured, settings.seeds, _settings_told(settings, configs), versions, more)
    page = replace(page, sections=[run_differences.section(found.varied, found.twin), *page.sections])
    written = settings.out / "report.html"
    write_page(page, written)
    tracking = next(iter(configs.values())).tracking
    track(page.title, tracking, written, page, found.as_text(), figures_of(found.measured))


def _settings_told(settings: CompareSettings, configs: Mapping[str, RunConfig]) -> dict[str, str]:
    own = {name: value for name, value in vars(settings).items() if name != "probe"}
    probe = {f"probe {name}": value for name, value in vars(settings.probe).items()}
    return told({**own, **probe}) | {f"run {name}": run_told(config) for name, config in configs.items()}


def _require_counts(counts: Sequence[int | None], configs: Mapping[str, RunConfig]) -> None:
    """Raises UserError for a count that is none, stands twice, or is more than there are."""
    asked = [count for count in counts if count is not None]
    if len(set(asked)) < len(asked) or any(count < 1 for count in asked):
        raise UserError(f"--samples: expected counts of 1 or more that differ, found {', '.join(map(str, asked))}")
    shards = next(iter(configs.values())).data.shards
    if asked and len(shards) == 1 and max(asked) > (there := len(PairSet.open([shards[0].folder]))):
        raise UserError(f"--samples: expected at most the {there} that {shards[0].folder} has, found {max(asked)}")


def _require_begun(member: Member, begun: Mapping[str, str]) -> None:
    """Raises UserError where a finished member did not begin from what all others do, `begun`."""
    config = member.config
    try:
        require_begun(
            progress_of(resolve_checkpoint(config.out)).begun, config.model, begun, f"remove {config.out.parent}"
        )
    except UserError as error:
        raise UserError("\n".join(f"{member.name}: {line}" for line in str(error).splitlines())) from None


def _encoders(
    settings: CompareSettings,
    configs: Mapping[str, RunConfig],
    runs: Sequence[Member],
    start: Path,
    requests: StopRequests,
) -> Measured:
    """Of one count, the share of the probe's draws that had each test image right. One seed's encoders are probed on the same
    draws, and each seed has draws of its own, so that the intervals are for other draws, too."""
    layer = next(iter(configs.values())).model.encoder.feature_layer
    rows: dict[str, list[np.ndarray]] = {START: [], **{name: [] for name in configs}}
    for n, seed in enumerate(settings.seeds):
        _require_going(requests)
        probe = replace(settings.probe, seed=settings.probe.seed + n * settings.probe.draws, feature_layer=layer)
        encoders = {run.variant: run.encoder for run in runs if run.seed == seed}
        report = probe_encoders(
            [start, *encoders.values()], probe, settings.out / "features", partial(_say, f"seed {seed}")
        )
        for name, score in zip(rows, report.scores, strict=True):
            rows[name].append(score.values.mean(axis=0))
    return _measured(runs, "encoder's accuracy", rows)


def _models(
    settings: CompareSettings,
    pairs: Path,
    configs: Mapping[str, RunConfig],
    runs: Sequence[Member],
    requests: StopRequests,
) -> tuple[list[Measured], dict[str, Sequence[str]]]:
    """Of one count, which answers are right and which pairs are ranked right; and the answers of the first seed's models, by
    variant. A model's answers are kept beside it, by pairs and by the code that asked."""
    asked = f"{open_shards(pairs).fingerprint} {made_by(*_ANSWERED_BY)}"

    def ask(model: Path, folder: Path) -> dict[str, Any]:
        def answered() -> dict[str, Any]:
            _require_going(requests)
            report = ask_models([model], TaskSettings(pairs))
            scores = {"answers": report.answers(), "pairs": report.preferences()}
            right = {measure: found[0].values[0].tolist() for measure, found in scores.items()}
            return {**right, "texts": report.answered[0].texts}

        told = f"{asked} {facts_of(resolve_checkpoint(model))['id']}"
        file = folder / f"answered-{hashlib.sha256(told.encode()).hexdigest()[:8]}.json"
        found: dict[str, Any] = recorded(file, answered)
        return found

    answers = {run.name: ask(run.config.out, run.encoder.parent) for run in runs}
    whole = _start_model(next(iter(configs.values())))
    begun = None if whole is None else ask(whole, settings.out / START)

    def measure(name: str) -> Measured:
        rows: dict[str, list[np.ndarray]] = {}
        if begun is not None:
            rows[START] = [np.array(begun[name])] * len({run.seed for run in runs})
        for run in runs:
            rows.setdefault(run.variant, []).append(np.array(answers[run.name][name]))
        return _measured(runs, f"{name} right", rows)

    texts = {START: begun["texts"]} if begun is not None else {}
    texts |= {run.variant: answers[run.name]["texts"] for run in runs if run.seed == settings.seeds[0]}
    return [measure("answers"), measure("pairs")], texts


def _require_going(requests: StopRequests) -> None:
    """Raises StoppedError where the command was asked to stop."""
    if requests.signal is not None:
        raise StoppedError


def _measured(runs: Sequence[Member], measure: str, rows: Mapping[str, Sequence[np.ndarray]]) -> Measured:
    scores = []
    for name, found in rows.items():
        values = np.stack(found)  # [seeds, samples]
        scores.append(Score(name, values, {}, {"seeds": values.mean(axis=1).tolist()}, counted=True))
    return Measured(runs[0].count, measure, tuple(scores))


def _start_model(config: RunConfig) -> Path | None:
    """The whole model that runs begin from; None where its parts are of several places."""
    model = config.model
    parts = {model.encoder.checkpoint, model.llm.checkpoint, model.projector.checkpoint}
    return next(iter(parts)) if len(parts) == 1 else None


def _start(model: Model) -> Path:
    encoder = model.encoder
    found = encoder.hf or encoder.checkpoint
    if encoder.hf is not None and (encoder.image_size or encoder.max_patches):
        raise UserError(
            "model.encoder: expected its own resolution, for what runs begin from is probed at that; begin from a checkpoint "
            "that `pivot convert import --image-size` made"
        )
    if found is None:
        raise UserError(
            "model.encoder.fresh: a comparison of runs that begin from random encoders has no start to probe"
        )
    return found


def _say(name: str, told: str) -> None:
    print(f"compare: {name}: {told}", file=sys.stderr, flush=True)
