"""A model stage's shards back to whole Hugging Face tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.convert.plan import join, rows_by_parameter
from pivot_megatron.model.composition import Stage


@torch.no_grad()
def hf_tensors(model: Stage) -> dict[str, Tensor]:
    """Every Hugging Face tensor of every component, on the host. Collective: all ranks call it, each gets all tensors.

    Needs host memory for the whole model on every rank.
    """
    rows = rows_by_parameter(model.arch)
    group = parallel_state.get_tensor_model_parallel_group()
    whole: dict[str, Tensor] = {}
    for name, parameter in parameters_by_global_name(model):
        row = rows[name]
        shards = [parameter.detach()]
        if row.transform.tp_dim is not None and group.size() > 1:
            shards = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(shards, parameter.detach().contiguous(), group=group)
        for part_name, part in zip(row.hf, join(row.transform, [s.cpu() for s in shards]), strict=True):
            whole[part_name] = part.contiguous()
    count = parallel_state.get_pipeline_model_parallel_world_size()
    if count == 1:  # sent to itself, a model would stand in memory four times over
        return whole
    stages: list[dict[str, Tensor]] = [{} for _ in range(count)]
    dist.all_gather_object(stages, whole, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in reversed(stages) for name, tensor in stage.items()}
