"""`pivot bench calibrate`: this machine as plans see it, from kernels and collectives that are timed on it."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch.distributed as dist
from scipy.optimize import least_squares
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from pivot_megatron.bench import calibrate_rank
from pivot_megatron.bench.calibrate_rank import Sample
from pivot_megatron.bench.gemm import device_rate
from pivot_megatron.bench.report import GIGA
from pivot_megatron.bench.report import machine as machine_facts
from pivot_megatron.config.schema import Precision
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.plan.hardware import usable_share
from pivot_megatron.plan.machine import COLLECTIVES, Attention, Link, Links, Machine, Rates, Roofline
from pivot_megatron.runtime.device import (
    available_cores,
    current_platform,
    device_count,
    device_memory,
    device_name,
    use_threads,
)

Say = Callable[[str], None]
_BETWEEN_LOOKS = 12
"""Samples after which the rate of a large product is taken again."""


@dataclass(frozen=True)
class Calibration:
    """`samples`: what was measured with so many processes at once, on the first of them. `error`: of the fitted times, the
    median and the largest ratio to those measured, by what was done."""

    machine: Machine
    samples: Mapping[int, tuple[Sample, ...]]
    error: Mapping[str, tuple[float, float]]


def default_processes() -> tuple[int, ...]:
    """One, two, and as many as this machine has GPUs, or cores where it has none."""
    most = device_count() or available_cores()
    return tuple(sorted({1, min(2, most), most}))


def calibrate(processes: Sequence[int], precision: Precision, say: Say) -> Calibration:
    """Measure with each number of `processes` at once. Raises UserError for more than this machine has devices or cores."""
    most = device_count() or available_cores()
    if not processes or min(processes) < 1 or max(processes) > most:
        raise UserError(
            f"--processes: expected numbers from 1 to {most}, found {', '.join(map(str, processes)) or 'none'}"
        )
    found: dict[int, _Measured] = {}
    for count in sorted(set(processes)):
        say(f"processes at once: {count}")
        found[count] = _measured(count, precision)
    rates = {count: rates_from(measured.samples, measured.peak, precision.compute) for count, measured in found.items()}
    widest = found[max(found)]
    node = links_from(widest.samples)
    facts = machine_facts()
    machine = Machine(
        name=device_name() or f"{facts['processor']}, cores: {facts['cores']}",
        source=f"pivot bench calibrate, {facts['date']}, torch {facts['torch']}",
        devices_a_node=max(found),
        memory=widest.memory,
        process=widest.process,
        rates=rates,
        node=node,
        network=None,  # of one machine there is no other link to measure
        logits_tile=float(current_platform().logits_tile_bytes),
        transformer_engine=current_platform().transformer_engine,
        reduction_copy=widest.reduction_copy,
    )
    return Calibration(machine, {c: m.samples for c, m in found.items()}, _errors(found, rates))


@dataclass(frozen=True)
class _Measured:
    samples: tuple[Sample, ...]
    peak: float
    process: float
    memory: float
    reduction_copy: float


def _measured(count: int, precision: Precision) -> _Measured:
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, (count, folder, precision), nprocs=count)
        except (ProcessRaisedException, ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            raise RunError(f"bench calibrate: with processes at once: {count}, one failed: {last}") from None
        tree = json.loads(Path(folder, "measured.json").read_text())
    samples = tuple(Sample(**one) for one in tree.pop("samples"))
    return _Measured(samples, **tree)


def _rank(rank: int, world: int, folder: str, precision: Precision) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    use_threads(None)
    dist.init_process_group(current_platform().backend, f"file://{folder}/store", rank=rank, world_size=world)
    dist.barrier()
    _load_what_a_run_loads()
    whole, process = device_memory()
    copied = calibrate_rank.reduction_copy() if world > 1 else 0.0
    samples, looks = [], list[float]()
    for sample in calibrate_rank.measure(precision):
        samples.append(sample)
        if len(samples) % _BETWEEN_LOOKS == 1:  # a shared machine's best, as kernels' times are their least
            dist.barrier()
            looks.append(device_rate(calibrate_rank.DTYPES[precision.compute]))
    peak = max(looks)
    if rank == 0:
        memory = usable_share() * whole if current_platform().is_cuda else whole / world
        found = {
            "samples": [asdict(s) for s in samples],
            "peak": peak,
            "process": process,
            "memory": memory,
            "reduction_copy": copied,
        }
        Path(folder, "measured.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _load_what_a_run_loads() -> None:
    """A run's own code, and the libraries that it reads tokenizers, shards and checkpoints with."""
    for module in ("pivot_megatron.train.trainer", "pyarrow.parquet", "safetensors.torch"):
        importlib.import_module(module)
    from transformers import AutoTokenizer  # noqa: F401


def rates_from(samples: Sequence[Sample], peak: float, dtype: str) -> Rates:
    def of(what: str) -> list[Sample]:
        return [sample for sample in samples if sample.what == what]

    return Rates(
        peak={dtype: peak},
        gemm={dtype: fitted(of("gemm"))},
        attention={
            dtype: Attention(
                geometric_mean(s.flops / s.seconds for s in of("attention forward")),
                geometric_mean(s.flops / s.seconds for s in of("attention backward")),
                0.0,
            )
        },
        elementwise=_bandwidth(of("elementwise")),
        update=_bandwidth(of("update")),
        launch=of("launch")[0].seconds,
    )


def _bandwidth(samples: Sequence[Sample]) -> float:
    """Of all of them in a row: the largest count most."""
    return sum(s.traffic for s in samples) / sum(s.seconds for s in samples)


def fitted(samples: Sequence[Sample]) -> Roofline:
    """The roofline with the least squared error of the logarithm of its times."""
    flops, traffic, seconds = (
        np.array([getattr(s, name) for s in samples]) for name in ("flops", "traffic", "seconds")
    )

    def residuals(logs: Any) -> Any:
        rate, bandwidth, start = np.exp(logs)
        return np.log((start + np.maximum(flops / rate, traffic / bandwidth)) / seconds)

    begin = np.log([float(np.max(flops / seconds)), float(np.max(traffic / seconds)), float(np.min(seconds)) / 4])
    most = [np.inf, np.inf, float(np.log(np.min(seconds)))]  # nothing starts later than it ends
    rate, bandwidth, start = np.exp(
        least_squares(residuals, begin, bounds=(-np.inf, most), loss="soft_l1", f_scale=0.1).x
    )
    return Roofline(float(rate), float(bandwidth), float(start))


def links_from(samples: Sequence[Sample]) -> Links:
    """As measured, size by size. A lone process sends nothing: its links are its memory."""
    memory = Link.of(0.0, _bandwidth([sample for sample in samples if sample.what == "elementwise"]))

    def of(kind: str) -> Link:
        sent = sorted((s.traffic, s.seconds) for s in samples if s.what == kind)
        return Link(tuple(sent)) if sent else memory

    return Links(of("gather"), of("scatter"), of("reduce"), of("send"))


def _errors(found: Mapping[int, _Measured], rates: Mapping[int, Rates]) -> dict[str, tuple[float, float]]:
    ratios: dict[str, list[float]] = {}
    for count, measured in found.items():
        for sample in (one for one in measured.samples if one.what not in COLLECTIVES):  # those are taken as they are
            ratio = _fitted_seconds(sample, rates[count]) / sample.seconds
            ratios.setdefault(sample.what, []).append(max(ratio, 1 / ratio))
    return {what: (median(each), max(each)) for what, each in ratios.items()}


def _fitted_seconds(sample: Sample, rates: Rates) -> float:
    if sample.what == "gemm":
        return rates.gemm[sample.dtype].time(sample.flops, sample.traffic)
    if sample.what.startswith("attention"):
        kernel = rates.attention[sample.dtype]
        return sample.flops / (kernel.forward if sample.what.endswith("forward") else kernel.backward)
    return {"elementwise": sample.traffic / rates.elementwise, "update": sample.traffic / rates.update}.get(
        sample.what, rates.launch
    )


def as_text(found: Calibration) -> str:
    machine = found.machine
    lines = [f"{machine.name} ({machine.source})", ""]
    for count, rates in machine.rates.items():
        for dtype, line in rates.gemm.items():
            attention = rates.attention[dtype]
            lines += [
                f"processes at once: {count}, each:",
                f"  {dtype} products: {line.flops / GIGA:.1f} GFLOP/s (a large square's {rates.peak[dtype] / GIGA:.1f}), "
                f"{line.bandwidth / GIGA:.1f} GB/s, {line.seconds * 1e6:.1f} us each",
                f"  attention: {attention.forward / GIGA:.1f} GFLOP/s forward, {attention.backward / GIGA:.1f} backward",
                f"  elementwise: {rates.elementwise / GIGA:.1f} GB/s, {rates.launch * 1e6:.1f} us each; "
                f"optimizer {rates.update / GIGA:.1f} GB/s",
            ]
    if machine.devices_a_node > 1:
        sent = {kind: machine.node.of(kind) for kind in COLLECTIVES}
        told = (
            f"{kind} {link.seconds * 1e6:.0f} us to {link.bandwidth / GIGA:.2f} GB/s" for kind, link in sent.items()
        )
        lines.append(f"messages, the smallest to the largest: {'; '.join(told)}")
    lines += ["", "fitted times against measured, factor: median, largest"]
    lines += [f"  {what:<20} {middle:.2f}, {most:.2f}" for what, (middle, most) in found.error.items()]
    return "\n".join(lines)
