"""`pivot checkpoint list` and `prune`: what lies in a run's folder, and what of it goes. Torch is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pivot_megatron.checkpoints.folder import (
    Saved,
    checkpoints_of_run,
    facts_of,
    remove,
    saved_of,
    steps_in,
)
from pivot_megatron.checkpoints.manifest import Manifest
from pivot_megatron.checkpoints.policy import superfluous
from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Checkpoints
from pivot_megatron.errors import UserError


@dataclass(frozen=True)
class Listed:
    """One checkpoint of a run; `problem` where it cannot be read, and then nothing of the rest is known."""

    path: Path
    bytes: int = 0
    saved: Saved | None = None
    problem: str | None = None

    def as_record(self) -> dict[str, Any]:
        if self.problem is not None:
            return {"checkpoint": str(self.path), "problem": self.problem}
        return {"checkpoint": str(self.path), "bytes": self.bytes} | (asdict(self.saved) if self.saved else {})


def list_checkpoints(run: Path) -> list[Listed]:
    """Of a run's folder, oldest first. Checksums are not counted: `inspect` does that."""
    return [_listed(path) for _, path in steps_in(checkpoints_of_run(run))]


def _listed(path: Path) -> Listed:
    try:
        facts_of(path)
        manifest = Manifest.read(path)
        manifest.require_sizes(path)
        return Listed(path, manifest.bytes, saved_of(path))
    except UserError as error:
        return Listed(path, problem=str(error))


def as_lines(found: Sequence[Listed]) -> list[str]:
    width = max(len(str(listed.path)) for listed in found)
    return [f"{listed.path!s:<{width}}  {_told(listed)}" for listed in found]


def _told(listed: Listed) -> str:
    if listed.problem is not None or listed.saved is None:
        return listed.problem or size(listed.bytes)
    loss = listed.saved.metrics.get("loss")
    told = f"{listed.saved.at}  {size(listed.bytes):>10}  {layout(listed.saved)}"
    return told if loss is None else f"{told}  loss {loss:.4f}"


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def layout(saved: Saved) -> str:
    of = saved.layout
    return f"tensor {of['tensor']} x pipeline {of['pipeline']}, {of['world']} processes"


def prune_run(run: Path, keep: int | None, keep_every: int | None, dry_run: bool) -> list[Path]:
    """Remove what the run's own `checkpoints`, with `keep` and `keep_every` in their places there, does not keep.

    Returns what went, or would go. Raises UserError where nothing says how many stay.
    """
    folder = checkpoints_of_run(run)
    config = folder.parent / "config.yaml"
    if config.is_file():
        policy = load_config(config).checkpoints
    elif keep is not None:
        policy = Checkpoints()
    else:
        raise UserError(f"{config}: expected the run's config, which says what stays, found none; give --keep")
    for option, value in (("--keep", keep), ("--keep-every", keep_every)):
        if value is not None and value < 1:
            raise UserError(f"{option}: must be at least 1, found {value}")
    policy = replace(policy, keep=keep or policy.keep, keep_every=keep_every or policy.keep_every)
    gone = superfluous(folder, policy)
    if not dry_run:
        for path in gone:
            remove(path)
    return gone
