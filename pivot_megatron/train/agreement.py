"""What one stage of a replica could not decode is left out on all of its stages."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from pivot_megatron.data.loader import Loader, StepData


def agreed(loader: Loader, data: StepData) -> StepData:
    """Collective over the stages of a replica, where samples may be skipped and there are several."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if not loader.skip_bad or group.size() == 1:
        return data
    own = {dropped.index for dropped in data.bad}
    found: list[set[int]] = [set() for _ in range(group.size())]
    dist.all_gather_object(found, own, group=group)
    others = set[int]().union(*found) - own
    return loader.without(data, others) if others else data
