"""Runs that differ in one thing, over seeds and sample counts: what is compared, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import RunConfig, Sft
from pivot_megatron.errors import UserError
from pivot_megatron.probe.table import Score, against_first, as_records, as_table, figures
from pivot_megatron.recipe.run_differences import require_alike

START = "start"
"""What every run began from, in tables."""


@dataclass(frozen=True)
class Member:
    """One run of a comparison: of `variant`, with `seed`, over `count` samples; None for all."""

    variant: str
    seed: int
    count: int | None
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}" + ("" if self.count is None else f" of {self.count}")

    @property
    def encoder(self) -> Path:
        """Where its encoder is exported to."""
        return self.config.out.parent / "encoder"


def variants(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, RunConfig]:
    """By name. A run alone is compared with its SFT twin, alike in all else. Raises UserError where runs differ in more than
    they may, or share a name."""
    configs = [load_config(file, overrides) for file in files]
    if len(configs) == 1:
        (config,) = configs
        if isinstance(config.objective, Sft):
            raise UserError(
                f"{files[0]}: expected a run to hold against SFT, found SFT itself; name another run beside it"
            )
        configs.append(replace(config, name=f"{config.name}-sft", objective=Sft()))
        files = [*files, files[0]]
    found: dict[str, RunConfig] = {}
    for file, config in zip(files, configs, strict=True):
        if config.name in found:
            raise UserError(f"{file}: name: expected one of its own, found {config.name!r} twice")
        require_alike(files[0], configs[0], file, config)
        found[config.name] = config
    return found


def members(
    configs: Mapping[str, RunConfig], seeds: Sequence[int], counts: Sequence[int | None], out: Path
) -> list[Member]:
    """Every run, count by count and seed by seed. Those of one seed and count see the same samples in the same order."""
    return [
        Member(name, seed, count, _member_config(name, config, seed, count, out))
        for count in counts
        for seed in seeds
        for name, config in configs.items()
    ]


def _member_config(name: str, config: RunConfig, seed: int, count: int | None, out: Path) -> RunConfig:
    data = config.data
    if count is not None:
        if len(data.shards) != 1:
            raise UserError(f"--samples: expected runs over one folder of shards, found {len(data.shards)} in {name}")
        data = replace(data, shards=(replace(data.shards[0], most=count),))
    folder = out / ("all" if count is None else str(count)) / name / f"seed-{seed}"
    return replace(config, name=f"{name}-{seed}", seed=seed, data=data, out=folder / "run")


@dataclass(frozen=True)
class Measured:
    """One measure of one sample count: `scores` by variant, of what all began from first where that was measured. Values are
    `[seeds, samples]`."""

    count: int | None
    measure: str
    scores: tuple[Score, ...]

    @property
    def start(self) -> Score | None:
        return self.scores[0] if self.scores[0].encoder == START else None

    @property
    def variants(self) -> list[Score]:
        """Without the start; the first is what the others are held against."""
        return [score for score in self.scores if score.encoder != START]

    @property
    def samples(self) -> str:
        return "all samples" if self.count is None else f"{self.count} samples"


def as_json(settings: Mapping[str, Any], measured: Sequence[Measured], **facts: Any) -> str:
    found = [
        {
            "count": one.count,
            "measure": one.measure,
            "against_the_start": as_records(one.scores) if one.start else None,
            "against_the_first_variant": as_records(one.variants),
        }
        for one in measured
    ]
    return json.dumps({"settings": dict(settings), "measured": found, **facts}, indent=2, default=str) + "\n"


def figures_of(measured: Sequence[Measured]) -> dict[str, float]:
    """Shares for a tracker, as `figures` names them, by sample count and measure."""
    found: dict[str, float] = {}
    for one in measured:
        for scores in (one.scores, one.variants):
            found |= figures(f"{one.samples}/{one.measure}", scores)
    return found


def as_text(measured: Sequence[Measured]) -> str:
    parts = []
    for one in measured:
        first, *others = one.variants
        if one.start:
            parts += [f"{one.samples}, {one.measure}, against the start:", as_table(one.measure, one.scores)]
        parts += [f"{one.samples}, {one.measure}, against {first.encoder}:", as_table(one.measure, one.variants)]
        for score, (mean, interval) in zip(others, against_first(one.variants), strict=True):
            verdict = "inside" if 0.0 in interval else "outside"
            parts.append(f"{score.encoder} - {first.encoder}: {100 * mean:+.2f} points, {verdict} the noise")
        parts.append("")
    return "\n".join(parts).rstrip()
