"""Where a conversion fails, nothing of it is left, and nobody's folder beside it is touched."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.errors import UserError
from tests.parity.imported import imported


def on_a_full_disk(most: int, *command: object) -> str:
    """What `pivot convert` says where no file may have more than `most` bytes."""
    ended = subprocess.run(
        [sys.executable, "-m", "pivot_megatron.cli", "convert", *map(str, command)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    (line,) = [text for text in ended.stderr.splitlines() if text.startswith("pivot: ")]
    return line


@pytest.mark.parametrize("most", [200_000, 3000], ids=["tensors", "tokenizer"])
def test_a_full_disk_leaves_no_import(most: int, folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = on_a_full_disk(most, "import", "--encoder", folders[0], "--llm", folders[1], "--out", out)
    assert line.startswith(f"pivot: {out}: cannot write") and str(folders[1]) not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [200_000, 3000], ids=["tensors", "tokenizer"])
def test_a_full_disk_leaves_no_export(most: int, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = on_a_full_disk(most, "export", checkpoint, "--part", "mllm", "--out", out)
    assert "cannot write (" in line and "is the disk full?" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = imported(tmp_path, *folders)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: IoError(Os { code: 28, message: No space left on device })")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_checkpoint(checkpoint, "encoder", tmp_path / "out", "drop", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_folders_that_stand_beside_the_output_stay(
    checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("import.part", "export.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    import_checkpoint(*folders, tmp_path / "import", None, 5)
    export_checkpoint(checkpoint, "encoder", tmp_path / "export", "drop", None)
    assert all((tmp_path / name / "mine").exists() for name in ("import.part", "export.part"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "export.part", "import", "import.part"]


def test_what_a_killed_export_left_is_removed(checkpoint: Path, tmp_path: Path) -> None:
    (hf.place_beside(tmp_path / "out") / "half").mkdir(parents=True)
    export_checkpoint(checkpoint, "encoder", tmp_path / "out", "drop", None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
