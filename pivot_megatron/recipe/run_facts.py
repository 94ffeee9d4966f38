"""What a page shows of runs: their curves, settings and machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pivot_megatron.config.schema import Dpo, RunConfig
from pivot_megatron.report.facts import flat
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
