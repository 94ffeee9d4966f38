"""Checkpoints that were damaged or cut off: seen before they are used, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.checkpoints.folder import FORMAT
from tests.checkpoints import flip
from tests.parity.changes import Change, configured, refused, written

DAMAGE: dict[str, Change] = {
    "tensors cut off": lambda f: [cut(p) for p in (f / "tensors").glob("*.distcp")],
    "tensors gone": lambda f: [p.unlink() for p in (f / "tensors").glob("*.distcp")],
    "index cut off": lambda f: cut(f / "tensors" / ".metadata"),
    "index gone": lambda f: (f / "tensors" / ".metadata").unlink(),
    "facts missing": written("model.json", f'{{"format": {FORMAT}}}'),
    "list gone": lambda f: (f / "files.json").unlink(),
    "list cut off": lambda f: cut(f / "files.json"),
    "config gone": lambda f: (f / "hf" / "encoder" / "config.json").unlink(),
}
# What the files themselves cannot tell, and what an export has no need of.
MORE_DAMAGE: dict[str, tuple[Change, str]] = {
    "tensors": (lambda f: flip(next((f / "tensors").glob("*.distcp")), -40_000), ".distcp: expected CRC-32"),
    "index": (lambda f: flip(f / "tensors" / ".metadata", 300), ".metadata: expected CRC-32"),
    "common state": (lambda f: flip(f / "tensors" / "common.pt", 100), "common.pt: expected CRC-32"),
    "common state gone": (lambda f: (f / "tensors" / "common.pt").unlink(), "common.pt: expected"),
    "facts": (lambda f: flip(f / "model.json", -20), "model.json: expected CRC-32"),
    "tokenizer": (lambda f: flip(f / "hf" / "llm" / "tokenizer.json", 1000), "tokenizer.json: expected CRC-32"),
    "an older format": (lambda f: told(f, format=4), f"checkpoint format 4, this version reads {FORMAT}"),
}


def told(folder: Path, **facts: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])


@pytest.mark.parametrize("case", MORE_DAMAGE)
def test_one_bit_of_a_checkpoint(case: str, checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    change, said = MORE_DAMAGE[case]
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    change(tmp_path / "checkpoint")
    line = refused(capsys, tmp_path / "out", "verify", tmp_path / "checkpoint", "--encoder", folders[0])
    assert said in line
    line = refused(
        capsys, tmp_path / "out", "export", tmp_path / "checkpoint", "--part", "mllm", "--out", tmp_path / "out"
    )
    assert said in line


@pytest.mark.parametrize("case", DAMAGE)
def test_a_checkpoint(case: str, checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    DAMAGE[case](tmp_path / "checkpoint")
    out = tmp_path / "out"
    line = refused(capsys, out, "export", tmp_path / "checkpoint", "--part", "encoder", "--out", out)
    assert "was the copy cut off?" in line
    line = refused(capsys, out, "verify", tmp_path / "checkpoint", "--encoder", folders[0])
    assert "was the copy cut off?" in line


def test_a_config_that_the_library_does_not_read(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """Of a checkpoint, whose own numbers are sound."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    configured(attention_dropout="much")(tmp_path / "checkpoint" / "hf" / "encoder")
    out = tmp_path / "out"
    line = refused(capsys, out, "export", tmp_path / "checkpoint", "--part", "encoder", "--out", out)
    assert "config.json: expected" in line and "bytes, found" in line  # a checkpoint knows its files
