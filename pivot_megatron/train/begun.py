"""What a run began from, by content: recorded in its checkpoints, and held against what lies there whenever it is used again."""

from __future__ import annotations

from collections.abc import Mapping

from pivot_megatron.config.schema import Model, RunConfig
from pivot_megatron.convert.fingerprint import start_fingerprint
from pivot_megatron.convert.start import with_checkpoints
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.distributed import from_main_process, on_main_process
from pivot_megatron.train.checkpoint import Progress

_PARTS = {
    "encoder": ("encoder", "weights"),
    "projector": ("projector", "weights"),
    "llm": ("llm", "weights"),
    "processor": ("encoder", "an image processor"),
    "tokenizer": ("llm", "a tokenizer"),
}
"""Of what a fingerprint names: the component it comes with, and what to call it."""


def fingerprint_on_all(start: Model, seed: int) -> dict[str, str]:
    """`start_fingerprint`, the same on every rank: files are read by one. Collective over all ranks."""
    found: dict[str, str] = {}
    on_main_process(lambda: found.update(start_fingerprint(start, seed)))
    told: dict[str, str] = from_main_process(found)
    return told


def require_begun(
    begun: Mapping[str, str], start: Model, found: Mapping[str, str], instead: str = "use a new `out`"
) -> None:
    """Raises UserError, a line a component, where `start`, whose fingerprint is `found` now, is not what a run has `begun` from.
    `instead`: what to do where it is not to be restored."""
    changed = []
    for name, (part, what) in _PARTS.items():
        if begun[name] != found[name]:
            component = getattr(start, part)
            source = component.sources[0] if component.sources else "fresh"
            where = getattr(component, source) or "the seed"
            changed.append(
                f"model.{part}.{source}: {where}: expected {what} {_short(begun[name])}, which the run began from, found "
                f"{_short(found[name])}; restore what was there, or {instead}"
            )
    if changed:
        raise UserError("\n".join(changed))


def _short(fingerprint: str) -> str:
    digest, *more = fingerprint.split(",", 1)
    return ",".join([digest[:16], *more])


def start_of(config: RunConfig, progress: Progress) -> Model:
    """What a run began from, as it was then. Raises UserError naming a component that is gone, or another by now."""
    start = with_checkpoints(config.model, progress.start)
    require_begun(progress.begun, start, start_fingerprint(start, config.seed))
    return start
