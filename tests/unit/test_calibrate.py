"""What a calibration makes of its measurements, on times that are known."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from pivot_megatron.bench.calibrate import calibrate, fitted, links_from, rates_from
from pivot_megatron.bench.calibrate_rank import Sample
from pivot_megatron.cli import main
from pivot_megatron.config.schema import Precision
from pivot_megatron.errors import UserError
from pivot_megatron.plan.machine import COLLECTIVES, Roofline, read_machine

LINE = Roofline(flops=2e11, bandwidth=1.5e10, seconds=5e-6)


def gemms(noise: float = 0.0, outlier: float = 1.0) -> list[Sample]:
    """Products of `LINE`'s times, with normal noise on their logarithm; one takes `outlier` times as long."""
    draw = np.random.default_rng(0)
    found = []
    for m, n, k in itertools.product((8, 128, 1024), (64, 512, 4096), (64, 1024)):
        flops, traffic = 2.0 * m * n * k, 4.0 * (m * n + n * k + m * k)
        seconds = LINE.time(flops, traffic) * math.exp(noise * draw.standard_normal())
        found.append(Sample("gemm", f"{m}x{n}x{k}", "fp32", flops, traffic, seconds))
    found[0] = Sample(*(*list(vars(found[0]).values())[:-1], found[0].seconds * outlier))
    return found


def test_a_roofline_is_found_again() -> None:
    found = fitted(gemms())
    assert (found.flops, found.bandwidth, found.seconds) == pytest.approx((2e11, 1.5e10, 5e-6), rel=1e-3)


def test_noise_and_one_disturbed_product_move_it_little() -> None:
    found = fitted(gemms(noise=0.05, outlier=20.0))
    assert (found.flops, found.bandwidth) == pytest.approx((2e11, 1.5e10), rel=0.1)
    assert found.seconds == pytest.approx(5e-6, rel=0.5)  # of which the few smallest products alone tell


def test_links_are_found_again() -> None:
    sizes = (2e3, 7e5, 1.5e6, 2e7)
    scattered = [Sample("scatter", "", "fp32", 0.0, size, 2e-4 + size / 1.6e9) for size in sizes]
    sent = [Sample("send", "", "fp32", 0.0, size, 1e-4 + size / 9e8) for size in sizes]
    elementwise = [Sample("elementwise", "", "fp32", 0.0, 1e9, 0.1)]
    found = links_from([*scattered, *sent, *elementwise])
    assert (found.scatter.seconds, found.scatter.bandwidth) == pytest.approx((2e-4, 1.6e9), rel=1e-6)
    assert (found.send.seconds, found.send.bandwidth) == pytest.approx((1e-4, 9e8), rel=1e-6)
    assert (found.gather.seconds, found.gather.bandwidth) == (0.0, pytest.approx(1e10))


def test_rates_are_of_everything_that_was_done() -> None:
    samples = [
        *gemms(),
        Sample("attention forward", "a", "fp32", 1e9, 0.0, 0.01),
        Sample("attention forward", "b", "fp32", 4e9, 0.0, 0.01),
        Sample("attention backward", "a", "fp32", 2.5e9, 0.0, 0.05),
        Sample("elementwise", "a", "fp32", 0.0, 1e9, 0.1),
        Sample("elementwise", "b", "fp32", 0.0, 3e9, 0.1),
        Sample("update", "", "fp32", 0.0, 4e9, 0.1),
        Sample("launch", "", "fp32", 0.0, 0.0, 2e-6),
    ]
    rates = rates_from(samples, 2.2e11, "fp32")
    assert rates.attention["fp32"].forward == pytest.approx(2e11)  # the geometric mean of 1e11 and 4e11
    assert rates.attention["fp32"].backward == pytest.approx(5e10)
    assert rates.elementwise == pytest.approx(4e9 / 0.2)
    assert (rates.update, rates.launch, rates.peak) == (4e10, 2e-6, {"fp32": 2.2e11})


@pytest.mark.parametrize("processes", [(0,), (10_000,), ()])
def test_processes_that_are_not_there_are_refused(processes: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"--processes: expected numbers from 1 to \d+, found"):
        calibrate(processes, Precision(compute="fp32"), lambda _: None)


@pytest.mark.slow
def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "machine.yaml"
    assert main(["bench", "calibrate", "--processes", "1", "2", "--out", str(out)]) == 0
    machine = read_machine(out)
    assert sorted(machine.rates) == [1, 2] and machine.devices_a_node == 2
    for rates in machine.rates.values():
        line, attention = rates.gemm["fp32"], rates.attention["fp32"]
        figures = (line.flops, line.bandwidth, attention.forward, attention.backward, rates.elementwise, rates.update)
        assert all(1e8 < figure < 1e14 for figure in figures)
    assert all(1e6 < machine.node.of(kind).bandwidth < 1e12 for kind in COLLECTIVES)
    assert 1e8 < machine.process < machine.memory
    assert "fitted times against measured" in capsys.readouterr().out
