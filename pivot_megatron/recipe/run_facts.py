"""What a page shows of runs: their curves, settings and machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pivot_megatron.config.schema import Dpo, RunConfig
from pivot_megatron.report.facts import flat, together
from pivot_megatron.report.page import Fold, Section, Table
from pivot_megatron.report.panels import Curve
from pivot_megatron.train.run_folder import read_metrics

_CURVES = (
    "loss",
    "reward_accuracy",
    "reward_margin",
    "chosen_rewards",
    "rejected_rewards",
    "chosen_logps",
    "rejected_logps",
    "grad_norm",
    "learning_rate",
    "step_seconds",
)


def curves(runs: Mapping[str, Path]) -> dict[str, dict[str, Curve]]:
    """Every metric of every run, by the name that the report gives the run."""
    found: dict[str, dict[str, Curve]] = {}
    for name, folder in runs.items():
        lines = read_metrics(folder)
        found[name] = {
            metric: [(line["step"], line[metric]) for line in lines if line[metric] is not None]
            for metric in _CURVES
            if lines and metric in lines[0]
        }
    return found


def environment_facts(run: Path) -> dict[str, str]:
    """What a run recorded of the machine it trained on."""
    return flat(json.loads((run / "environment.json").read_text()))


def run_settings(config: RunConfig) -> dict[str, Any]:
    """Every key of a resolved config, dotted, with its value as JSON has it; its name and folder are none."""
    return _flat({name: value for name, value in asdict(config).items() if name not in ("name", "out")}, "")


def _flat(node: Any, path: str) -> dict[str, Any]:
    if isinstance(node, list | tuple):
        node = dict(enumerate(node)) or []
    if not isinstance(node, Mapping) or not node:
        return {path: str(node) if isinstance(node, Path) else node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= _flat(value, f"{path}.{name}" if path else str(name))
    return found


def settings_section(runs: Mapping[str, Sequence[RunConfig]]) -> Section:
    """A folded table of `run_settings`, a column each of `runs`; of several configs of one, all values that they have."""
    columns = {name: together([_texts(run_settings(one)) for one in configs]) for name, configs in runs.items()}
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [[key, *(column.get(key, "") for column in columns.values())] for key in keys]
    table = Table([["key", *columns], *rows], range(len(columns) + 1))
    return Section("Settings of the runs", [Fold(f"{len(rows)} keys", [table])], "Every key of each run's config.")


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def run_told(config: RunConfig) -> str:
    """How it trains, in a line."""
    batch, objective = config.batch, config.objective
    length = f"{batch.steps} steps" if batch.steps is not None else f"{batch.epochs:g} epochs"
    kind = _pairs_told(objective) if isinstance(objective, Dpo) else "SFT"
    layout = f"TP{config.layout.tensor} PP{config.layout.pipeline}"
    return f"{kind}; {length} of {batch.global_size}; learning rate {config.optimizer.learning_rate:g}; {layout}"


def _pairs_told(objective: Dpo) -> str:
    losses = [f"{weight:g} {name}" for name, weight in objective.losses.items()]
    own = "" if losses == ["1 sigmoid"] else f" of {' + '.join(losses)}"
    return f"DPO{own}, beta {objective.beta:g}"
