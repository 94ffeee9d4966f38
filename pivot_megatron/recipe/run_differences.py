"""In what the runs of a comparison differ: what they may, what they do, and how that is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.config.shipped import shipped_config
from pivot_megatron.errors import UserError
from pivot_megatron.probe.table import aligned
from pivot_megatron.recipe.run_once import as_decided
from pivot_megatron.report.page import Section, Table
from pivot_megatron.train.checkpoint import NOTHING

MAY_DIFFER = ("objective", "optimizer.learning_rate", "optimizer.weight_decay")
"""What a comparison is of, by config key. Rate and decay go with an objective: a rate that suits DPO starves SFT."""

Differences = Mapping[str, Mapping[str, Any]]
"""By config key, each run's value by its name; None where its objective has no such key."""


def require_alike(first_file: Path, first: RunConfig, file: Path, config: RunConfig) -> None:
    """Raises UserError where `config`, of `file`, differs from `first` in more than MAY_DIFFER."""
    one, other = _decided(first), _decided(config)
    differing = (key for key in {**one, **other} if one.get(key, NOTHING) != other.get(key, NOTHING))
    if odd := [key for key in differing if key not in MAY_DIFFER]:
        *others, last = MAY_DIFFER
        raise UserError(
            f"{file}: expected a run that differs from {first_file} in {', '.join(others)} and {last} alone, found another "
            f"{', '.join(odd)}: {other.get(odd[0], NOTHING)}, there {one.get(odd[0], NOTHING)}"
        )


def _decided(config: RunConfig) -> dict[str, str]:
    """What its result follows from, the optimizer key by key."""
    told = as_decided(config)
    del told["optimizer"]
    return told | {f"optimizer.{name}": str(value) for name, value in asdict(config.optimizer).items()}


def differences(configs: Mapping[str, RunConfig]) -> Differences:
    """Of runs that are alike but for MAY_DIFFER, by name."""
    told = {name: _variable(config) for name, config in configs.items()}
    keys = sorted(
        dict.fromkeys(key for one in told.values() for key in one), key=lambda key: key.startswith("optimizer.")
    )
    found = {key: {name: one.get(key) for name, one in told.items()} for key in keys}
    return {key: values for key, values in found.items() if len(set(values.values())) > 1}


def _variable(config: RunConfig) -> dict[str, Any]:
    """Its values of MAY_DIFFER. Where a reference's log-probs come from decides nothing."""
    objective = {key: value for key, value in asdict(config.objective).items() if key != "reference"}
    losses = {f"losses.{name}": weight for name, weight in objective.pop("losses", {}).items()}
    found = {f"objective.{key}": value for key, value in (objective | losses).items()}
    optimizer = config.optimizer
    return found | {
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.weight_decay": optimizer.weight_decay,
    }


def twin_told(name: str, config: RunConfig) -> str:
    """Of the SFT twin of the run `name`."""
    recipe = load_config(shipped_config("run/2_sft.yaml")).optimizer.learning_rate
    return (
        f"the SFT twin of {name} trains at {name}'s own learning rate, {config.optimizer.learning_rate:g}; the recipe has one "
        f"for SFT ({recipe:g}, configs/run/2_sft.yaml): to compare at that, name such a run beside it"
    )


def table_rows(found: Differences) -> list[list[str]]:
    """Heads, then a row a key."""
    names = next(iter(found.values()), {})
    rows = [[key, *map(_told, values.values())] for key, values in found.items()]
    return [["what differs", *names], *(rows or [["nothing"]])]


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_text(found: Differences, note: str) -> str:
    return "\n".join([aligned(table_rows(found), left=(0,)), *([note] if note else []), ""])


def section(found: Differences, note: str) -> Section:
    return Section(
        "What differs", [Table(table_rows(found), (0,))], "All else is the same in every run, by seed.", note
    )
