"""Which layouts a number of processes can be laid out by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pivot_megatron.config.check import problems
from pivot_megatron.config.load import decoded, merged, overridden, read_tree
from pivot_megatron.config.schema import Layout, RunConfig
from pivot_megatron.convert.start import describe_start
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.fit import misfits


@dataclass(frozen=True)
class Case:
    """A run at one layout."""

    name: str
    config: RunConfig
    data_parallel: int

    @property
    def layout(self) -> Layout:
        return self.config.layout


@dataclass(frozen=True)
class Misfit:
    """`why`: one line a reason."""

    name: str
    why: tuple[str, ...]


def cases_of_files(run: Path, files: Sequence[Path], overrides: Sequence[str]) -> list[tuple[str, RunConfig]]:
    """`run` with each of `files` laid over it, named by the file. Raises ConfigErrors for a mistake in any."""
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"bench layouts: expected files of different names, found {', '.join(twice)} more than once")
    return [(name, _config(run, overrides, read_tree(file))) for name, file in zip(names, files, strict=True)]


def cases_of_processes(run: Path, processes: int, overrides: Sequence[str]) -> list[tuple[str, RunConfig]]:
    """`run` at every layout that takes as many: tensor x pipeline x data, and each pipeline in two chunks a stage too. What else
    the run says of its layout holds for all of them, but for layers of single stages, which would be those of one pipeline."""
    config = _config(run, overrides, {})
    plain = replace(config.layout, first_stage_layers=None, last_stage_layers=None)
    found = []
    for pipeline in _divisors(processes):
        for tensor in _divisors(processes // pipeline):
            for chunks in (1, 2) if pipeline > 1 else (1,):
                layout = replace(plain, tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks)
                name = name_of(layout, processes // layout.model_parallel_size)
                found.append((name, replace(config, layout=layout)))
    return found


def name_of(layout: Layout, data_parallel: int) -> str:
    virtual = f"_vpp{layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""
    return f"tp{layout.tensor}_pp{layout.pipeline}{virtual}_dp{data_parallel}"


def sorted_out(found: Sequence[tuple[str, RunConfig]], processes: int) -> tuple[list[Case], list[Misfit]]:
    """Those that can be run, and those that cannot. Raises UserError with every reason where none can."""
    cases: list[Case] = []
    others: list[Misfit] = []
    for name, config in found:
        arch = describe_start(config.model).architecture()
        if why := _reasons(config, arch, processes):
            others.append(Misfit(name, tuple(why)))
        else:
            cases.append(Case(name, config, processes // config.layout.model_parallel_size))
    if not cases:
        told = [f"{other.name}: {line}" for other in others for line in other.why]
        raise UserError(
            "\n".join([f"bench layouts: no layout fits {processes} processes; --processes changes that", *told])
        )
    return cases, others


def _reasons(config: RunConfig, arch: Architecture, processes: int) -> list[str]:
    if processes % config.layout.model_parallel_size:
        return [
            f"layout: tensor {config.layout.tensor} x pipeline {config.layout.pipeline} does not divide "
            f"{processes} processes"
        ]
    return [*problems(config), *misfits(arch, config.layout, config.precision)]


def _config(run: Path, overrides: Sequence[str], layout: dict[str, Any]) -> RunConfig:
    return decoded(overridden(merged(read_tree(run), layout), overrides), run)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
