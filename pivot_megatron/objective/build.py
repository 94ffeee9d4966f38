"""The objective that a config names."""

from __future__ import annotations

from pivot_megatron.config.schema import Dpo, Sft
from pivot_megatron.objective.dpo import DpoObjective
from pivot_megatron.objective.sft import SftObjective
from pivot_megatron.objective.types import Objective


def build_objective(config: Sft | Dpo) -> Objective:
    if config.kind == "sft":
        return SftObjective()
    return DpoObjective(config.beta, config.label_smoothing, config.losses)
