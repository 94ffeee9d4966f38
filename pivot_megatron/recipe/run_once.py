"""A run of several in a row: `pivot train` in processes of its own, to its end."""

from __future__ import annotations

from pathlib import Path

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.errors import RuleError, RunError, UserError
from pivot_megatron.requeue import StopRequests, mark_path, remove_mark
from pivot_megatron.runtime.launch import default_processes, launch


class StoppedError(Exception):
    """A run was asked to stop, and has saved."""


def run_once(name: str, file: Path, config: RunConfig, processes: int | None, requests: StopRequests) -> None:
    """`pivot train FILE`, which goes on from the run's own checkpoints, in `processes` of this machine (None: one a GPU, or the
    layout's own). `config`: what `file` holds. Raises StoppedError, and what its exit code stands for where it fails."""
    remove_mark(config.out)
    if code := launch(processes or default_processes(config.layout), ["train", str(file)], requests):
        errors = {UserError.exit_code: UserError, RuleError.exit_code: RuleError}
        raise errors.get(code, RunError)(
            f"{name}: its run ended with exit code {code}, and said why above; see {config.out}"
        )
    if mark_path(config.out).exists():
        raise StoppedError
