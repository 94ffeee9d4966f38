"""A run of several: written down, `pivot train` in processes of its own to its end, and found again by a later command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pivot_megatron.checkpoints.folder import facts_of, resolve_checkpoint
from pivot_megatron.config.load import dump_config
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.convert.commands import EXPORT_NOTE, export_checkpoint
from pivot_megatron.convert.fingerprint import start_fingerprint
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.start import pinned
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.errors import RuleError, RunError, UserError
from pivot_megatron.requeue import StopRequests, mark_path, remove_mark
from pivot_megatron.runtime.launch import default_processes, launch
from pivot_megatron.train.begun import require_begun
from pivot_megatron.train.checkpoint import NOTHING, checked_progress, decided_by
from pivot_megatron.train.run_folder import finished_path, write_atomically


class StoppedError(Exception):
    """A run, or what is done with several, was asked to stop; what it has done is kept."""


def begun(config: RunConfig) -> bool:
    """Whether a run has left anything that it would go on from."""
    return (config.out / "checkpoints").exists()


def finished(config: RunConfig) -> bool:
    return finished_path(config.out).exists()


def write_run(name: str, config: RunConfig) -> Path:
    """`run.yaml` beside the run's folder, which `pivot train` takes. Raises UserError where the run has begun with other
    settings."""
    folder = config.out.parent
    file, decided = folder / "decided.json", as_decided(config)
    if file.exists() and begun(config):
        before = json.loads(file.read_text())
        for key in {**before, **decided}:
            was, value = (told.get(key, NOTHING) for told in (before, decided))
            if was != value:
                raise UserError(
                    f"{name}: {key}: begun with {was}, found {value}; restore it, or remove {folder} and what came "
                    "after it, or choose another folder"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(decided, indent=2) + "\n")
    write_atomically(folder / "run.yaml", dump_config(config))
    return folder / "run.yaml"


def as_decided(config: RunConfig) -> dict[str, str]:
    """What a run's result follows from, by config key. The fingerprint of its samples is the run's own to hold."""
    model = config.model
    start = {
        f"model.{name}.{source}": str(getattr(part, source))
        for name, part in (("encoder", model.encoder), ("llm", model.llm), ("projector", model.projector))
        for source in part.sources
    }
    return {**decided_by(config, str([source.folder for source in config.data.shards])), **start}


def require_as_asked(name: str, config: RunConfig) -> None:
    """Of a finished run. Raises UserError where it is not the one that `config` asks for: made with other settings or of other
    samples, or begun from something else than what lies there now."""
    instead = f"remove {config.out.parent} and what came after it, to make it anew"
    try:
        samples = PairSet.open([source.folder for source in config.data.shards], config.data.cache).described
        progress = checked_progress(resolve_checkpoint(config.out), decided_by(config, samples), instead)
        start = pinned(config.model)
        require_begun(progress.begun, start, start_fingerprint(start, config.seed), instead)
    except UserError as error:
        raise UserError("\n".join(f"{name}: {line}" for line in str(error).splitlines())) from None


def run_once(name: str, config: RunConfig, processes: int | None, requests: StopRequests) -> None:
    """A run that `write_run` wrote, to its end, where it is not finished; it goes on from its own checkpoints, in `processes` of
    this machine (None: one a GPU, or the layout's own). Raises StoppedError, what its exit code stands for where it fails, and
    UserError where the finished one is another."""
    if finished(config):
        require_as_asked(name, config)
        return
    remove_mark(config.out)
    file = config.out.parent / "run.yaml"
    _require_done(
        launch(processes or default_processes(config.layout), ["train", str(file)], requests),
        f"{name}: its run",
        config.out,
    )
    if mark_path(config.out).exists():
        raise StoppedError
    if not finished(config):
        raise RunError(f"{name}: its run ended without a word and is not finished; see {config.out}")


def apart(told: str, words: Sequence[str], folder: Path, requests: StopRequests) -> None:
    """`pivot WORDS` to its end in a process of its own, with which goes what it held of a GPU. It is run for the files that it
    leaves in `folder`: its stdout is dropped. `told`: what it is, for errors. Raises what its exit code stands for."""
    _require_done(launch(1, words, requests, answers=False), told, folder)


def _require_done(code: int, told: str, folder: Path) -> None:
    if code:
        errors = {UserError.exit_code: UserError, RuleError.exit_code: RuleError}
        raise errors.get(code, RunError)(f"{told} ended with exit code {code}, and said why above; see {folder}")


def export_once(
    checkpoint: Path, out: Path, part: Literal["encoder", "mllm"] = "encoder", original: Path | None = None
) -> None:
    """A part's export, where it is not there yet. `original`: where an encoder's layers past its features are taken from; without
    it they are dropped. Raises UserError where the export of another checkpoint is there."""
    if not out.exists():
        export_checkpoint(checkpoint, part, out, "original" if original else "drop", original)
    elif read_json(out / EXPORT_NOTE).get("id") != facts_of(checkpoint)["id"]:
        raise UserError(f"{out}: expected the {part} of {checkpoint}, found that of another run; remove it")


def recorded(file: Path, work: Callable[[], Any]) -> Any:
    """What `work` returned, plain JSON, now or when `file` was written."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(work()))
    return json.loads(file.read_text())
