"""What a calibration makes of its measurements, on times that are known."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pivot_megatron.bench import calibrate_rank
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


def test_links_are_as_measured() -> None:
    scattered = [Sample("scatter", "", "fp32", 0.0, *point) for point in ((2e6, 3e-3), (1e3, 1e-3), (4e6, 11e-3))]
    found = links_from([*scattered, Sample("elementwise", "", "fp32", 0.0, 1e9, 0.1)]).scatter
    assert [found.time(size) for size in (1e3, 2e6, 4e6)] == pytest.approx([1e-3, 3e-3, 11e-3])
    assert found.time(10.0) == 1e-3 and found.time(3e6) == pytest.approx(7e-3)
    assert found.time(6e6) == pytest.approx(19e-3)  # past the last at its rate, 4 ms a megabyte
    assert found.time(4e6, messages=2) == pytest.approx(2 * 3e-3) and found.time(0.0, 0) == 0.0


def test_a_lone_process_sends_through_its_memory() -> None:
    found = links_from([Sample("elementwise", "", "fp32", 0.0, 1e9, 0.1)])
    assert found.gather.time(1e9) == pytest.approx(0.1)


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


def test_on_a_gpu_collectives_are_timed_together_and_barriers_not(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Watch:
        def __init__(self, platform: object) -> None: ...

        def start(self) -> None:
            done.append("start")

        def stop(self) -> None:
            done.append("stop")

        def reset(self) -> float:
            return 0.5

    monkeypatch.setattr(calibrate_rank, "current_platform", lambda: SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(calibrate_rank, "Stopwatch", Watch)
    monkeypatch.setattr(calibrate_rank.dist, "barrier", lambda: done.append("barrier"))
    seconds = calibrate_rank.messages_seconds(lambda: done.append("run"))
    spans = " ".join(done).split("start")[1:]
    timed = [span.split("stop")[0].split() for span in spans]
    assert len(timed) > 3 and all(set(one) == {"run"} and len(one) > 9 for one in timed)
    assert seconds == 0.5 / len(timed[0])
    assert all("barrier" in span.split("stop")[1] for span in spans[:-1])  # and in between they meet
