"""`pivot bench layouts`: one run at every layout that fits a machine, in alternation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from pivot_megatron.bench.layout_cases import Case, Misfit, cases_of_files, cases_of_processes, sorted_out
from pivot_megatron.bench.layout_runs import Amount, LayoutRun, make_reference, run_layout
from pivot_megatron.bench.peer_job import Setting, pivot_config
from pivot_megatron.bench.shapes import shape_by_name
from pivot_megatron.bench.world import make_world, require_empty
from pivot_megatron.config.schema import Precision
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.plan.machine import Machine, read_machine, require_rates
from pivot_megatron.plan.prediction import Prediction
from pivot_megatron.plan.subject import predict
from pivot_megatron.runtime.device import device_count

WARM_UP = 2
"""Steps at a run's beginning that are not timed: they pay for the first use of everything."""
DIVIDED = 2
"""Steps at its end whose time is divided, which takes time of its own."""
_CPU_PROCESSES = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayoutBench:
    """`subject`: what was run, in words. `gemm_peak`: FLOP/s, the best of all looks at the machine. `reference_seconds`: of the
    whole reference pass, whenever it was made. `runs`: by layout's name, in the order they were made. `failed`: why, by name.
    `predicted`: by name, where a machine was given, and `calibrated`: FLOP/s that its devices multiplied matrices at then."""

    subject: str
    processes: int
    amount: Amount
    gemm_peak: float
    reference_seconds: float
    cases: Sequence[Case]
    runs: Mapping[str, Sequence[LayoutRun]]
    failed: Mapping[str, str]
    misfits: Sequence[Misfit]
    predicted: Mapping[str, Prediction]
    calibrated: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """`files`: a run's YAML, and layouts to lay over it. With `shape`, whose model and pairs are made, layouts alone. Without
    layouts, every one of `processes`: one a GPU, or two, if left out. `machine`: what a plan of each layout is made for."""

    files: Sequence[Path]
    overrides: Sequence[str]
    shape: str | None
    processes: int | None
    rounds: int
    steps: int
    repeat: bool
    out: Path
    machine: Path | None = None


def bench_layouts(wanted: Wanted, say: Say) -> LayoutBench:
    """Raises UserError for what measures nothing, an `out` that has files in it, or layouts of which none fits; RunError where
    every run fails."""
    processes = _checked_processes(wanted)
    machine = read_machine(wanted.machine) if wanted.machine else None
    run, subject = (
        (wanted.files[0], str(wanted.files[0])) if wanted.shape is None else _made(wanted.shape, wanted.out, say)
    )
    files = wanted.files[1:] if wanted.shape is None else wanted.files
    made = cases_of_files(run, files, wanted.overrides) if files else None
    cases, others = sorted_out(made or cases_of_processes(run, processes, wanted.overrides), processes)
    amount = Amount(wanted.rounds, WARM_UP, wanted.steps, DIVIDED, wanted.repeat)
    say(f"{len(cases)} layouts fit {processes} processes, {len(others)} do not")
    predicted = _predictions(cases, amount, processes, machine) if machine else {}
    calibrated = _calibrated(cases[0].config.precision, processes, machine) if machine else 0.0
    smallest = max(cases, key=lambda case: case.layout.model_parallel_size)  # of a rank's share of the model
    reference = make_reference(smallest.config, processes, wanted.out / "reference")
    peak, runs, failed = _runs(cases, amount, processes, wanted.out / "runs", say)
    return LayoutBench(subject, processes, amount, peak, reference, cases, runs, failed, others, predicted, calibrated)


def _predictions(cases: Sequence[Case], amount: Amount, processes: int, machine: Machine) -> dict[str, Prediction]:
    """What a plan for `machine` says of the timed steps, by layout's name. Raises UserError where it has no rates for them."""
    steps = [0] if amount.repeat else range(amount.warm_up, amount.warm_up + amount.timed)
    own = machine.process if device_count() else 0.0  # on a GPU a run's peak is its tensors'
    found = {}
    for case in cases:
        require_rates(machine, case.config.precision)
        one = predict(case.config, processes, machine, steps)
        found[case.name] = replace(one, peak_bytes=[int(peak - own) for peak in one.peak_bytes])
    return found


def _calibrated(precision: Precision, processes: int, machine: Machine) -> float:
    """FLOP/s of the machine's devices together, in what `layout_job` looks at them with where that was measured."""
    peak = machine.rates_of(processes).peak
    return processes * peak.get("bf16" if device_count() else "fp32", peak[precision.compute])


def in_turn(cases: Sequence[Case], number: int) -> Sequence[Case]:
    """Of one round: to and fro, so that no layout always runs before another."""
    return cases if number % 2 == 0 else cases[::-1]


def _runs(
    cases: Sequence[Case], amount: Amount, processes: int, out: Path, say: Say
) -> tuple[float, dict[str, list[LayoutRun]], dict[str, str]]:
    """The machine's best rate, what was measured, and what failed, which is not tried again."""
    runs: dict[str, list[LayoutRun]] = {case.name: [] for case in cases}
    failed: dict[str, str] = {}
    for number in range(amount.rounds):
        for case in in_turn(cases, number):
            if case.name in failed:
                continue
            told = f"round {number + 1} of {amount.rounds}: {case.name}"
            try:
                run = run_layout(case, amount, processes, out / f"{number}-{case.name}")
            except RunError as error:
                failed[case.name] = str(error)
                say(f"{told} failed: {error}")
                continue
            runs[case.name].append(run)
            say(f"{told}, steps of {', '.join(f'{step.seconds:.2f}' for step in run.steps)} s")
    if not any(runs.values()):
        raise RunError("\n".join(f"bench layouts: {name}: {why}" for name, why in failed.items()))
    return max(run.fastest for each in runs.values() for run in each), runs, failed


def _checked_processes(wanted: Wanted) -> int:
    if not wanted.files and wanted.shape is None:
        raise UserError(
            "bench layouts: expected a run's YAML or --shape, found neither; see `pivot bench layouts --help`"
        )
    if wanted.rounds < 1 or wanted.steps < 1:
        raise UserError(
            f"bench layouts: expected --rounds >= 1 and --steps >= 1, found {wanted.rounds} and {wanted.steps}"
        )
    gpus = device_count()
    processes = (gpus or _CPU_PROCESSES) if wanted.processes is None else wanted.processes
    if processes < 1 or (gpus and processes > gpus):
        most = f"1 to {gpus}, this machine's GPUs" if gpus else "1 or more"
        raise UserError(f"bench layouts: expected --processes of {most}, found {processes}")
    require_empty(wanted.out)
    return processes


def _made(name: str, out: Path, say: Say) -> tuple[Path, str]:
    """A run's YAML over a model and pairs of that shape, and what it is in words."""
    shape = shape_by_name(name)
    say(f"model and pairs of shape {shape.name}")
    world = make_world(out, shape)
    setting = Setting(steps=1, pairs_a_step=shape.pairs_a_step, precision="bf16" if device_count() else "fp32")
    run = out / "run.yaml"
    run.write_text(yaml.safe_dump(pivot_config(world, setting, out / "run")))
    return run, f"shape {shape.name}"
