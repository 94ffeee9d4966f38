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
from pivot_megatron.probe.table import Score, against_first, as_records, as_table
from pivot_megatron.train.checkpoint import decided_by

MAY_DIFFER = ("objective", "optimizer")
"""What a comparison is of, by config key. Learning rates go with objectives: one that suits DPO starves SFT."""


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


def variants(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, RunConfig]:
    """By name. A run alone is compared with its SFT twin, alike in all else. Raises UserError where runs differ in more than
    MAY_DIFFER, or share a name."""
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
        _require_alike(files[0], configs[0], file, config)
        found[config.name] = config
    return found


def _require_alike(first_file: Path, first: RunConfig, file: Path, config: RunConfig) -> None:
    one, other = _decided(first), _decided(config)
    if odd := [key for key in one if one[key] != other[key] and key not in MAY_DIFFER]:
        raise UserError(
            f"{file}: expected a run that differs from {first_file} in {' and '.join(MAY_DIFFER)} alone, found another "
            f"{', '.join(odd)}: {other[odd[0]]}, there {one[odd[0]]}"
        )


def _decided(config: RunConfig) -> dict[str, str]:
    folders = str([source.folder for source in config.data.shards])
    return {**decided_by(config, folders), "model": str(config.model)}


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
class Compared:
    """Of one sample count: `scores` by variant, the encoder that all began from first; values `[seeds, test images]`, the
    share of the probe's draws that had an image right."""

    count: int | None
    scores: tuple[Score, ...]

    def between(self) -> list[Score]:
        """The variants alone, of which the first is what the others are held against."""
        return list(self.scores[1:])


def as_json(settings: Mapping[str, Any], compared: Sequence[Compared], **facts: Any) -> str:
    found = [
        {
            "count": one.count,
            "against_the_start": as_records(one.scores),
            "against_the_first_variant": as_records(one.between()),
        }
        for one in compared
    ]
    return json.dumps({"settings": dict(settings), "counts": found, **facts}, indent=2, default=str) + "\n"


def as_text(compared: Sequence[Compared]) -> str:
    parts = []
    for one in compared:
        name = one.between()[0].encoder
        parts.append(f"{'all samples' if one.count is None else f'{one.count} samples'}, against the start:")
        parts.append(as_table("accuracy", one.scores))
        parts.append(f"against {name}:")
        parts.append(as_table("accuracy", one.between()))
        verdicts = [
            f"{score.encoder} - {name}: {100 * mean:+.2f} points, "
            + ("inside the noise" if 0.0 in interval else "outside the noise")
            for score, (mean, interval) in zip(one.between()[1:], against_first(one.between()), strict=True)
        ]
        parts += [*verdicts, ""]
    return "\n".join(parts).rstrip()
