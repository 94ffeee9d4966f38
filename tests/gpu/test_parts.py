"""Every part of the GPU check as a test: each in a process of its own, every limit held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.check import run_part
from tests.gpu.parts import PARTS, Part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_part(part: Part, tmp_path: Path) -> None:
    result = run_part(part, tmp_path)
    assert result.outcome == "passed", "\n".join([result.detail, *(f"{row}" for row in result.rows if not row.passed)])
