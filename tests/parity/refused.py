"""What each process does in the tests of steps that are not applied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from pivot_megatron.config.schema import Dpo, Layout
from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.errors import RunError
from pivot_megatron.model.composition import Stage
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.types import Objective
from pivot_megatron.runtime.distributed import is_last_stage
from pivot_megatron.train.culprits import find_culprits, require_finite
from pivot_megatron.train.optimizer import Optimization, apply_rules, build_optimization, wrap
from pivot_megatron.train.step import forward_logprobs, train_step
from tests.parity.jobs import loaded_model, one_by_one
from tests.parity.training_jobs import Shares, filled_up, run_config

LARGEST = 3e38  # of float32, nearly
BROKEN_GRADIENT = "projector.encoder.linear_fc1.weight"


def state_of(model: Stage, optimization: Optimization) -> dict[str, Tensor]:
    """Copies of all that a step moves: weights, full-precision shards, moments, step counts, schedule."""
    found = {name: parameter.detach().clone() for name, parameter in parameters_by_global_name(model)}
    for n, optimizer in enumerate(optimization.optimizer.chained_optimizers):
        for i, parameter in enumerate(optimizer.get_parameters()):
            found[f"shard {n} {i}"] = parameter.detach().clone()
            found |= {f"{name} {n} {i}": value.clone() for name, value in optimizer.optimizer.state[parameter].items()}
        for i, group in enumerate(optimizer.param_groups):
            found[f"group {n} {i}"] = torch.tensor([group["lr"], group["weight_decay"], group.get("step", 0)])
    found["schedule"] = torch.tensor(optimization.scheduler.num_steps)
    return found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def with_broken_reference(batches: list[PackedBatch], key: str) -> list[PackedBatch]:
    """The reference's log-probs of one sample are NaN."""
    found = []
    for batch in batches:
        assert batch.reference is not None
        if key in batch.keys:
            own = batch.branch // batch.branches_per_sample == batch.keys.index(key)
            batch = replace(batch, reference=batch.reference.masked_fill(own.to(batch.reference.device), float("nan")))
        found.append(batch)
    return found


def prepared(
    layout: Layout, encoder: Path, head: Path, shares: Shares, objective: Dpo
) -> tuple[Stage, list[Any], Optimization, Objective, list[PackedBatch]]:
    """What a step is made of; the batches have reference log-probs, those of the model itself."""
    config = run_config(layout, encoder, head, objective)
    model, judge = loaded_model(layout, encoder, head), build_objective(objective)
    apply_rules(model, ())
    wrapped = wrap(model, layout)
    optimization = build_optimization(wrapped, config, steps=10)
    own = shares[parallel_state.get_data_parallel_rank()]
    batches = filled_up([pack(samples, one_by_one(pixels), judge.branches, 4) for samples, pixels in own], layout)
    known = forward_logprobs(model, batches)
    nothing = torch.zeros(0)
    batches = [replace(batch, reference=nothing if logps is None else logps) for batch, logps in zip(batches, known)]
    return model, wrapped, optimization, judge, batches


def steps(
    layout: Layout, encoder: Path, head: Path, shares: Shares, objective: Dpo, broken: tuple[str | None, ...]
) -> dict[str, Any]:
    """A step for each of `broken`: as it should be, or with the sample of that key broken, or with a gradient that is not finite
    where it says `gradient`. What each moved, and who was blamed."""
    model, wrapped, optimization, judge, batches = prepared(layout, encoder, head, shares, objective)
    results, moves, blames = [], [], []
    for key in broken:
        before = state_of(model, optimization)
        named = key not in (None, "gradient") and is_last_stage()
        given = with_broken_reference(batches, key) if named else batches  # type: ignore[arg-type]
        hooks = _breaking_a_gradient(model) if key == "gradient" else []
        results.append(train_step(wrapped, optimization, judge, given, None))
        for hook in hooks:
            hook.remove()
        if layout.overlap_parameter_gather:
            for chunk in wrapped:
                chunk.start_param_sync(force_sync=True)
        moves.append(moved(before, state_of(model, optimization)))
        blames.append(None if results[-1].applied else find_culprits(wrapped, results[-1], given))
    return {"results": results, "moved": moves, "blames": blames, "state": state_of(model, optimization)}


def _breaking_a_gradient(model: Stage) -> list[Any]:
    return [
        parameter.register_hook(lambda gradient: gradient * float("inf"))
        for name, parameter in parameters_by_global_name(model)
        if name == BROKEN_GRADIENT
    ]


def save_what_is_broken(layout: Layout, encoder: Path, head: Path, name: str) -> str:
    """The message that a save is refused with."""
    model = loaded_model(layout, encoder, head)
    apply_rules(model, ())
    wrapped = wrap(model, layout)
    optimization = build_optimization(wrapped, run_config(layout, encoder, head, Dpo()), steps=10)
    require_finite(wrapped, optimization)
    for found, parameter in parameters_by_global_name(model):
        if found == name:
            parameter.data.view(-1)[-1] = float("inf")
    try:
        require_finite(wrapped, optimization)
    except RunError as error:
        return str(error)
    raise AssertionError("nothing was found")


def overflow(
    layout: Layout, encoder: Path, head: Path, shares: Shares, weight: str, everywhere: bool = True
) -> list[tuple[tuple[str, ...], str]]:
    """Who is blamed for a step with a finite `weight` so large that what it is multiplied with overflows, on every
    tensor-parallel rank or only on the first, and for one after it is as it was."""
    model, wrapped, optimization, judge, batches = prepared(layout, encoder, head, shares, Dpo())
    changed = [parameter for name, parameter in parameters_by_global_name(model) if name == weight]
    if not (everywhere or parallel_state.get_tensor_model_parallel_rank() == 0):
        changed = []
    before = [parameter.detach().clone() for parameter in changed]
    for parameter in changed:
        parameter.data.div_(parameter.data.abs().max()).mul_(LARGEST)
    result = train_step(wrapped, optimization, judge, batches, None)
    blame = find_culprits(wrapped, result, batches)
    for parameter, value in zip(changed, before):
        parameter.data.copy_(value)
    after = train_step(wrapped, optimization, judge, batches, None)
    assert (result.refused, after.refused, blame.parameters) == ("loss nan and gradient norm nan", None, ()), (
        result,
        after,
    )
    return [(blame.modules, blame.as_text())]
