"""`pivot compare`: trains every run of a comparison that is not finished, and probes what each left."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pivot_megatron.config.load import dump_config
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.convert.commands import export_checkpoint
from pivot_megatron.errors import UserError
from pivot_megatron.probe.classes import LinearSettings, probe_encoders
from pivot_megatron.probe.table import Score
from pivot_megatron.recipe.comparison import START, Measured, Member, as_json, as_text, members, variants
from pivot_megatron.recipe.comparison_page import comparison_page
from pivot_megatron.recipe.phases import Phases
from pivot_megatron.recipe.run_facts import environment_facts, run_told
from pivot_megatron.recipe.run_once import StoppedError, run_once
from pivot_megatron.report.facts import together, told
from pivot_megatron.report.page import write_page
from pivot_megatron.requeue import StopRequests
from pivot_megatron.train.run_folder import write_atomically


@dataclass(frozen=True)
class CompareSettings:
    """`counts`: of samples; None for all. `probe`: its seed is the first draw's, the same for every encoder."""

    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    counts: tuple[int | None, ...]
    probe: LinearSettings
    out: Path


def compare(settings: CompareSettings, processes: int | None, requests: StopRequests) -> bool:
    """Every run, its export and its probe, each once; the tables on stdout, `compare.json` in `settings.out`. False where a
    run was asked to stop, which has saved."""
    configs = variants(settings.files, settings.overrides)
    if len(set(settings.seeds)) < len(settings.seeds) or len(settings.seeds) < 2:
        raise UserError(f"--seeds: expected two or more that differ, found {', '.join(map(str, settings.seeds))}")
    if START in configs:
        raise UserError(f"name: {START} is what the encoder that all begin from is called; choose another")
    every = members(configs, settings.seeds, settings.counts, settings.out)
    phases = Phases(settings.out / "phases", len(every))
    for member in every:
        try:
            phases.run(member.name.replace(" ", "-"), partial(_train, member, processes, requests))
        except StoppedError:
            print(f"compare: stopped in {member.name}, which has saved; the same command goes on", file=sys.stderr)
            return False
    found = [_compared(settings, configs, [one for one in every if one.count == count]) for count in settings.counts]
    facts = {**vars(settings), "probe": vars(settings.probe)}
    versions = together([environment_facts(member.config.out) for member in every])
    write_atomically(settings.out / "compare.json", as_json(facts, found, versions=versions))
    page = comparison_page(found, settings.seeds, _settings_told(settings, configs), versions)
    write_page(page, settings.out / "report.html")
    print(as_text(found))
    return True


def _settings_told(settings: CompareSettings, configs: Mapping[str, RunConfig]) -> dict[str, str]:
    own = {name: value for name, value in vars(settings).items() if name != "probe"}
    probe = {f"probe {name}": value for name, value in vars(settings.probe).items()}
    return told({**own, **probe}) | {f"run {name}": run_told(config) for name, config in configs.items()}


def _train(member: Member, processes: int | None, requests: StopRequests) -> str:
    """Its run to its end, and its encoder's export. Returns the export's folder."""
    folder = member.config.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    file, encoder = folder / "run.yaml", folder / "encoder"
    write_atomically(file, dump_config(member.config))
    run_once(member.name, file, member.config, processes, requests)
    if not encoder.exists():
        export_checkpoint(member.config.out, "encoder", encoder, "drop", None)
    return str(encoder)


def _compared(settings: CompareSettings, configs: Mapping[str, RunConfig], runs: Sequence[Member]) -> Measured:
    """Of one count. One seed's encoders are probed beside one another, on the same draws for all seeds."""
    start = _start(next(iter(configs.values())))
    rows: dict[str, list[np.ndarray]] = {START: [], **{name: [] for name in configs}}
    for seed in settings.seeds:
        encoders = {run.variant: run.config.out.parent / "encoder" for run in runs if run.seed == seed}
        report = probe_encoders(
            [start, *encoders.values()], settings.probe, settings.out / "features", partial(_say, f"seed {seed}")
        )
        for name, score in zip(rows, report.scores, strict=True):
            rows[name].append(score.values.mean(axis=0))
    scores = tuple(_score(name, np.stack(values)) for name, values in rows.items())
    return Measured(runs[0].count, "encoder's accuracy", scores)


def _score(name: str, values: np.ndarray) -> Score:
    """`values` `[seeds, test images]`."""
    return Score(name, values, {}, {"seeds": values.mean(axis=1).tolist()})


def _start(config: RunConfig) -> Path:
    encoder = config.model.encoder
    found = encoder.hf or encoder.checkpoint
    if found is None:
        raise UserError(
            "model.encoder.fresh: a comparison of runs that begin from random encoders has no start to probe"
        )
    return found


def _say(name: str, told: str) -> None:
    print(f"compare: {name}: {told}", file=sys.stderr, flush=True)
