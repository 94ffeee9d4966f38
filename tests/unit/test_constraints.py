"""That constraints.txt pins all there is, and what writes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("constraints", ROOT / "tools/constraints.py")
assert _spec and _spec.loader
constraints = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(constraints)

PYTHON = "{}.{}".format(*sys.version_info)


def test_every_package_that_this_environment_needs_is_pinned_as_it_is() -> None:
    """Those of `make environment`: what a requirement brings in unpinned is another tomorrow."""
    pins = constraints.read(ROOT / "constraints.txt")
    here = constraints.installed(("dev",))
    assert {"torch", "pytest"} <= set(here)
    assert {name: pins.get(name, {}).get(PYTHON) for name in here} == here


def test_the_file_is_as_it_would_be_written() -> None:
    """And so no line of it is one that cannot be read, which would be dropped."""
    assert constraints.text(constraints.read(ROOT / "constraints.txt")) == (ROOT / "constraints.txt").read_text()


def test_writing_keeps_the_other_pythons_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "3.12" if PYTHON == "3.11" else "3.11"
    monkeypatch.setattr(constraints, "installed", lambda extras: {"a": "2", "b": "1"})
    file = tmp_path / "constraints.txt"
    file.write_text(f'a==1\nb==1; python_version == "{other}"\ngone==1; python_version == "{PYTHON}"\n')
    constraints.main(file)
    versions = sorted([(other, "1"), (PYTHON, "2")])
    lines = [f'a=={version}; python_version == "{python}"' for python, version in versions]
    assert file.read_text().splitlines()[1:] == [*lines, "b==1"]


@pytest.mark.parametrize("name", ["nvidia-cublas", "nvidia-nccl-cu13", "triton", "cuda-bindings"])
def test_what_torchs_build_decides_is_left_out(name: str) -> None:
    assert constraints._CUDA.match(name)


@pytest.mark.parametrize(
    "name", ["nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg2k-cu13", "torch", "nvtx"]
)
def test_all_else_is_pinned(name: str) -> None:
    assert not constraints._CUDA.match(name)
