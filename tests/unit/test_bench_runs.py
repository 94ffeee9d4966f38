"""The table of runs' speeds, from what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pivot_megatron.bench.runs import WARM_UP
from pivot_megatron.cli import main


def write_run(folder: Path, steps: int) -> Path:
    """The first steps slow, then steps of 1, 2 and 3 seconds in turn."""
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        seconds = 100.0 if step <= WARM_UP else 1.0 + step % 3
        counts = {"pairs": 12, "tokens": 600, "flops": 8e12}
        lines.append({"step": step, "step_seconds": seconds, "data_seconds": seconds / 4, **counts})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_medians_of_what_comes_after_the_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, short = write_run(tmp_path / "tp1", WARM_UP + 9), write_run(tmp_path / "short", WARM_UP)
    assert main(["bench", "runs", str(run), str(short), "--json"]) == 0
    whole, none = json.loads(capsys.readouterr().out)
    assert (whole["steps"], whole["seconds"], whole["pairs_a_second"], whole["tokens_a_second"]) == (9, 2.0, 6.0, 300.0)
    assert (whole["data_share"], whole["flops_a_second"]) == (0.25, 4e12)
    assert none["steps"] == 0
    assert main(["bench", "runs", str(run), str(short)]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "steps", "s/step", "pairs/s", "tokens/s", "TFLOP/s", "data"]
    assert first.split() == [str(run), "9", "2.000", "6.00", "300", "4", "25.0%"]
    assert second.endswith(f"fewer than {WARM_UP + 1} steps")


def test_a_folder_without_metrics_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "runs", str(tmp_path)]) == 2
    assert "expected a run's folder, found no metrics.jsonl" in capsys.readouterr().err
