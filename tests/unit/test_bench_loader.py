"""What `pivot bench loader` prints, on few images; its figures are a record, not a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pivot_megatron.bench.loader import LoaderRates, Rate, as_text
from pivot_megatron.cli import main


@pytest.mark.slow
def test_every_way_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", "--images", "32", "--rounds", "1", "--out", str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ways = {rate["what"] for rate in found["rates"]}
    assert ways >= {"reader alone", "pil pixels", "torch pixels", "whole loader, torch", "pixels to a peer"}
    assert all(0 < rate["lowest"] <= rate["median"] <= rate["highest"] for rate in found["rates"])
    # So400m and 1.5B: some ten TFLOP a pair, some 400 TFLOP/s.
    assert 20 < found["pairs_a_second"] < 60


def test_a_core_feeds_by_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    rates = LoaderRates(512, 5, 2, (Rate("torch pixels", 2, 300.0, 250.0, 310.0),), pairs_a_second=30.0)
    assert rates.feeds(rates.rates[0]) == 5.0
    assert "torch pixels                 2       300      250      310           5.0" in as_text(rates)


@pytest.mark.parametrize("options", [("--images", "8"), ("--rounds", "0")])
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str]) -> None:
    assert main(["bench", "loader", "--out", str(tmp_path / "b"), *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
