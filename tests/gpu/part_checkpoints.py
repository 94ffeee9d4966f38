"""A run that stops and goes on from its checkpoint has the losses of one that did not, FP8's running statistics included."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pivot_megatron.checkpoints.folder import steps_in
from pivot_megatron.config.schema import Component, Encoder, Fp8, Layout, Model, Precision
from pivot_megatron.convert.start import describe_start
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.model.composition import Architecture
from pivot_megatron.runtime.distributed import process_groups
from pivot_megatron.train.checkpoint import Checkpointer, Progress
from pivot_megatron.train.run_folder import RunFolder
from pivot_megatron.train.step import forward_logprobs, train_step
from tests.gpu.models import Trainee, batch_of, built, offered, pairs, run_config, trainee
from tests.gpu.rows import Row, held
from tests.parity.reference import make_checkpoints

PRECISIONS: Mapping[str, Precision] = {
    "bf16": Precision("bf16"),
    "FP8 delayed": Precision("bf16", Fp8("delayed")),
    "FP8 tensorwise": Precision("bf16", Fp8("tensorwise")),
}
# The same sums in the same order, but for those of attention's and the embedding's backward passes, which run as they come.
LIMIT = 1e-3
STEPS, LEARNING_RATE = 10, 1e-3


def rows() -> Iterator[Row]:
    for name, precision in offered(PRECISIONS, "fp32").items():
        with tempfile.TemporaryDirectory() as folder, process_groups(Layout(), seed=1):
            yield _compared(name, precision, Path(folder))


def _compared(name: str, precision: Precision, folder: Path) -> Row:
    encoder, head = make_checkpoints(folder / "hf")
    description = describe_start(Model(encoder=Encoder(hf=encoder), llm=Component(hf=head)))
    arch = description.architecture()
    reference = built(arch, replace(precision, fp8=None)).eval().requires_grad_(False)
    batch = batch_of(arch, pairs(arch, 4, 8, 9, seed=3), multiple=16, seed=4)
    (known,) = forward_logprobs(reference, [batch])
    batch = replace(batch, reference=known)
    config = run_config(precision, STEPS, LEARNING_RATE, folder / "run")
    run = RunFolder(config)
    run.create(config, {})
    keeper = Checkpointer(config, run, description)

    straight = _trainee(arch, precision)
    for step, loss in enumerate(_losses(straight, batch, 3), start=1):
        run.log({"step": step, "applied": True, "loss": loss})
    keeper.at_step(straight.wrapped, straight.optimization, Progress(3, {}, {}, {}), due=True, must=True)
    (_, saved), *_ = steps_in(run.checkpoints)
    wanted = _losses(straight, batch, 2)

    resumed = _trainee(arch, precision, seed=9)
    keeper.load(saved, resumed.wrapped, resumed.optimization)
    found = _losses(resumed, batch, 2)
    return held(f"{name}: loss of two steps after resuming", max(abs(a / b - 1) for a, b in zip(found, wanted)), LIMIT)


def _trainee(arch: Architecture, precision: Precision, seed: int = 1) -> Trainee:
    return trainee(built(arch, precision, seed), precision, STEPS, LEARNING_RATE)


def _losses(run: Trainee, batch: PackedBatch, steps: int) -> list[float]:
    return [train_step(run.wrapped, run.optimization, run.objective, [batch], None).loss for _ in range(steps)]
