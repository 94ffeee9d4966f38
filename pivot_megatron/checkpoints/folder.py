"""Folders of checkpoints: which are there, what each says of itself, and how one comes and goes whole.

step-000100/  model.json    format version, what the model is beside its own files
              hf/           Hugging Face files that describe it
              tensors/      megatron-core's, by global name
              saved.json    where the run stood; an import has none
              files.json    checksums of all of these
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pivot_megatron.checkpoints.manifest import Manifest
from pivot_megatron.errors import UserError

FORMAT = 6
_STEP = re.compile(r"step-(\d+)$")
_SAVED = "saved.json"
_BULK = ".distcp"  # what tensors lie in; the files beside are small


@dataclass(frozen=True)
class Saved:
    """`saved.json`. `step`: optimizer steps done; `due`: the step after which it was to be saved, an earlier one where the save
    was put off. `at`: UTC, ISO 8601. `layout`: tensor, pipeline and world size. `metrics`: means over the steps since the
    checkpoint before."""

    step: int
    due: int
    at: str
    layout: Mapping[str, int]
    metrics: Mapping[str, float]

    def write(self, checkpoint: Path) -> None:
        (checkpoint / _SAVED).write_text(json.dumps(asdict(self), indent=2) + "\n")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints in a `checkpoints` folder, oldest first. One that a crash cut off carries another name."""
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := _STEP.search(path.name))]
    return sorted(found)


def checkpoints_of_run(path: Path) -> Path:
    """The folder that holds a run's checkpoints, from that or from the run's own. Raises UserError where there is none."""
    for folder in (path / "checkpoints", path):
        if steps_in(folder):
            return folder
    raise UserError(f"{path}: expected a checkpoint or a run's folder with one, found none; has that run saved yet?")


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from a checkpoint, a run's folder (its newest), or its `checkpoints` folder."""
    if (path / "model.json").exists():
        return path
    return steps_in(checkpoints_of_run(path))[-1][1]


def saved_of(checkpoint: Path) -> Saved | None:
    """None of an import. Raises UserError where the file is damaged."""
    path = checkpoint / _SAVED
    try:
        return Saved(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot read ({error}); was the copy cut off?") from None


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """`model.json`. Raises UserError if it was written by a version whose format this one does not know."""
    path = checkpoint / "model.json"
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); was the copy cut off?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); was the copy cut off?") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else None
        raise UserError(f"{checkpoint}: checkpoint format {found}, this version reads {FORMAT}")
    return facts


def opened(checkpoint: Path) -> Manifest:
    """What `checkpoint` should hold, once every file has its size and those beside the tensors their checksums. Raises UserError
    naming the first that has not, and for a format that this version does not know."""
    facts_of(checkpoint)
    manifest = Manifest.read(checkpoint)
    manifest.require_sizes(checkpoint)
    manifest.require_sound(checkpoint, manifest.blocks(n for n in manifest.files if not n.endswith(_BULK)))
    return manifest


def place_beside(out: Path) -> Path:
    """Where `out` is written until it is whole: a name that nobody else gives. What a killed process left of an `out` before is
    removed."""
    if out.parent.is_dir():
        for left in [path for path in out.parent.iterdir() if path.name.startswith(_beside(out))]:
            shutil.rmtree(left, ignore_errors=True)
    return _name_beside(out)


def _beside(out: Path) -> str:
    """How names of what is no `out` yet, or no longer, begin."""
    return f".{out.name}.pivot-"


def _name_beside(out: Path) -> Path:
    return out.with_name(_beside(out) + uuid.uuid4().hex[:8])


def remove(checkpoint: Path) -> None:
    """At once gone to every reader, then from the disk. What else lies beside it stays: it may be what takes its place."""
    gone = _name_beside(checkpoint)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def clear_leftovers(folder: Path) -> None:
    """What killed processes left of checkpoints that they were writing or removing."""
    for path in folder.glob(".step-*.pivot-*"):
        shutil.rmtree(path)


def appear(part: Path, out: Path) -> None:
    """`part`, whole, becomes `out`, and is so after a power cut too: its files lie on the disk before it has that name."""
    for folder, _, names in os.walk(part):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if out.exists():
        remove(out)
    part.replace(out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
