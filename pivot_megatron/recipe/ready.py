"""What a schedule needs, looked for before its first phase begins: models, data, images, and what its phases say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from pivot_megatron.config.load import ConfigErrors
from pivot_megatron.config.schema import Dpo, RunConfig
from pivot_megatron.convert.hf import HfTensors
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.order import mixed
from pivot_megatron.data.stock import Look, shortages, stock_of
from pivot_megatron.errors import UserError
from pivot_megatron.probe.classes import LinearSettings, require_sets
from pivot_megatron.recipe.phase_runs import Phase, read_phases, tried
from pivot_megatron.recipe.run_once import finished
from pivot_megatron.recipe.schedule import Schedule
from pivot_megatron.train.session import total_steps
from pivot_megatron.train.tracking import require_trackers


def ready_phases(schedule: Schedule, path: Path) -> list[Phase]:
    """The phases of the schedule in the file `path`. Raises ConfigErrors with every mistake of theirs and all that they lack."""
    found, wrong = read_phases(schedule, path)
    wrong += lacking(schedule, found)
    if wrong:
        raise ConfigErrors(path, wrong)
    return found


def lacking(schedule: Schedule, phases: Sequence[Phase]) -> list[str]:
    """What `phases` that are not finished would not find, or not find enough of. Raises RunError where remote shards do not
    answer."""
    to_come = [phase for phase in phases if not finished(phase.config)]
    found: list[str] = []
    if to_come and schedule.probe is not None:
        found += tried("probe", partial(require_sets, probe_settings(schedule), schedule.out / "features"))[1]
    look = cache(stock_of)  # phases share folders, and an index may be large
    for phase in to_come:
        found += tried(phase.key, partial(require_trackers, phase.config.tracking))[1]
        found += _head_problems(phase)
        found += [f"{phase.key}: {problem}" for problem in _data_problems(phase.config, look)]
    return found


def _head_problems(phase: Phase) -> list[str]:
    """Of a new head's files. That there is a model is `read_phases`' to say."""
    llm, key = phase.config.model.llm, f"{phase.key}: head"
    folder = llm.hf or llm.fresh
    if folder is None or not (folder / "config.json").exists():
        return []
    weights = [] if llm.hf is None else tried(key, partial(HfTensors, folder))[1]
    return weights + tried(key, partial(load_tokenizer, folder))[1]


def _data_problems(config: RunConfig, look: Look) -> list[str]:
    counts, wrong = shortages(config.data, isinstance(config.objective, Dpo), look)
    if wrong:
        return wrong
    try:
        total_steps(config, len(mixed(counts, config.data.shards, config.seed)))
    except UserError as error:
        return [str(error)]
    return []


def probe_settings(schedule: Schedule) -> LinearSettings:
    """Before and after a phase, features are of the layer that training takes them of."""
    probe, layer = schedule.probe, schedule.encoder.feature_layer
    if probe is None:
        raise ValueError("the schedule has no probe")
    return LinearSettings(**vars(probe), feature_layer=layer)
