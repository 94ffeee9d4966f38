"""AdamW with the step count in the parameter group, the state layout of FusedAdam, for machines without TE or apex."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015), with decoupled weight decay (Loshchilov & Hutter 2019) where `adam_w_mode`.

    Same arguments, state names (`exp_avg`, `exp_avg_sq`) and `step` in the group as FusedAdam, so a checkpoint's optimizer
    state is one on CPU and GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable or not bias_correction:
            raise ValueError("this Adam takes part in no CUDA graph and always corrects its moments' bias")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        grads = [p.grad.to(p.dtype) for p in params if p.grad is not None]
        weight_decay = group["weight_decay"]
        if weight_decay and not self.adam_w_mode:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
        # torch's one-pass kernel: the update is bound by memory, and written out in steps it reads everything six times.
        adamw(
            params,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(group["step"] - 1, dtype=torch.float32, device=p.device) for p in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=weight_decay if self.adam_w_mode else 0.0,
            eps=group["eps"],
            maximize=False,
        )


def install() -> None:
    """Give megatron-core this Adam where it has no fused one, or cannot use it. Idempotent.

    torch's AdamW keeps `step` per parameter; the distributed optimizer saves and loads it per group, as FusedAdam does. On a
    machine without CUDA the fused ones of TE or apex would not run, where a cluster's image has them all the same.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that neither TE nor apex is here, once a module; `pivot doctor` says it better
        optimizer: Any = importlib.import_module("megatron.core.optimizer")
        distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if optimizer.USING_PYTORCH_OPTIMIZER or not torch.cuda.is_available():
        optimizer.Adam = distributed.Adam = GroupStepAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
