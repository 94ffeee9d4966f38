"""Loss, gradients and updated weights of a small model on this device against plain transformers and torch in fp32 on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pivot_megatron.config.schema import Dpo, Layout, Precision
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import process_groups
from tests.gpu.models import difference
from tests.gpu.rows import Row, held, told
from tests.parity import training_jobs
from tests.parity.reference import make_checkpoints
from tests.parity.test_training import reference_training, shares, worst

STEPS = 2
OBJECTIVE = Dpo(beta=0.3)


def rows() -> Iterator[Row]:
    """With whichever layers this process builds."""
    yield told("layers", "Transformer Engine's" if current_platform().transformer_engine else "megatron-core's own")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = make_checkpoints(Path(folder))
        wanted = reference_training(*checkpoints, OBJECTIVE, steps=STEPS)
        for compute in ("fp32", "bf16") if current_platform().is_cuda else ("fp32",):
            layout = Layout()
            with process_groups(layout, seed=1):
                found = training_jobs.train_steps(
                    layout, *checkpoints, shares(layout, 1), OBJECTIVE, STEPS, precision=Precision(compute)
                )
            yield from (_exact if compute == "fp32" else _rounded)(found, wanted)


def _exact(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Row]:
    """As in the parity suite: within 1e-4 of each tensor's largest entry."""
    for what in ("gradients", "weights"):
        theirs = {n: t for n, t in wanted[what].items() if n in found[what]}
        ours = {n: found[what][n].cpu() for n in theirs}
        far, name = worst(ours, theirs)
        yield held(f"fp32: {what}, {name}", far, 1e-4)
    yield from _losses("fp32", found, wanted, 1e-4, 1e-4)


def _rounded(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Row]:
    names = [n for n in wanted["gradients"] if n in found["gradients"]]
    ours, theirs = (torch.cat([run["gradients"][n].float().cpu().flatten() for n in names]) for run in (found, wanted))
    # Eight bits of mantissa, some twenty roundings deep.
    yield held("bf16: all gradients", difference(ours, theirs), 5e-2)
    yield from _losses("bf16", found, wanted, 2e-2, 5e-2)


def _losses(name: str, found: dict[str, Any], wanted: dict[str, Any], loss: float, norm: float) -> Iterator[Row]:
    for step, result in enumerate(found["results"]):
        yield held(f"{name}: loss of step {step + 1}", abs(result.loss / wanted["losses"][step] - 1), loss)
        yield held(f"{name}: gradient norm of step {step + 1}", abs(result.grad_norm / wanted["norms"][step] - 1), norm)
