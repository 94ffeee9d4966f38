"""`pivot bench profile`, as it is called."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_kind_of_operation_has_its_share_of_a_step(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pivot_megatron.cli"]
    command += ["bench", "profile", "--shape", "tiny", "--out", str(tmp_path / "profile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds, operators = done.stdout.split("slowest operators, calls a step:")
    assert re.match(r"\d+\.\d\d s a step, 2 steps after 2\n", kinds)
    shares = {kind: float(share) for share, kind in re.findall(r"^ *([\d.]+)%  (.+)$", kinds, re.MULTILINE)}
    assert {"matrix products", "attention", "optimizer and gradient norm"} < set(shares)
    assert all(share > 0 for share in shares.values()) and sum(shares.values()) == pytest.approx(100, abs=0.3)
    slowest = re.findall(r"^ *([\d.]+)% +[\d]+  (.+)$", operators, re.MULTILINE)
    assert [float(share) for share, _ in slowest] == sorted((float(share) for share, _ in slowest), reverse=True)
    assert "aten::mm" in {name for _, name in slowest}
