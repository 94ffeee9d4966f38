"""A schedule's phases as runs of their own: each a whole config, beginning from what the one before it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.load import ConfigErrors, based, decoded, merged
from pivot_megatron.config.schema import Component, Encoder, Model, Projector, RunConfig
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import head_architecture
from pivot_megatron.recipe.schedule import PhaseSpec, Schedule
from pivot_megatron.train.feasible import infeasible


@dataclass(frozen=True)
class Phase:
    """`config`: its run, in `folder / "run"`. `projector`: whether the projector is handed on, or fresh. `most_fallen`: see
    PhaseSpec."""

    name: str
    folder: Path
    config: RunConfig
    projector: bool
    most_fallen: float | None

    @property
    def run_file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def encoder(self) -> Path:
        """Where its encoder is exported to."""
        return self.folder / "encoder"


def phases_of(schedule: Schedule, path: Path) -> list[Phase]:
    """The phases of the schedule in the file `path`. Raises ConfigErrors with every mistake of a run, every layout that its model
    cannot be cut into, and every phase that would pass preferences through a fresh projector."""
    found: list[Phase] = []
    wrong: list[str] = []
    head = Component()
    for n, spec in enumerate(schedule.phases):
        before, head = head, spec.head or head
        handed_on = bool(schedule.projector.sources) if n == 0 else _hidden(before) == _hidden(head)
        model = _model(schedule, found[-1].config.out if found else None, spec, handed_on)
        try:
            phase = _phase(schedule, spec, path, model, handed_on)
        except ConfigErrors as error:
            wrong += [f"phases.{n}: {line.removeprefix(f'{path}: ')}" for line in error.errors]
            continue
        found.append(phase)
        wrong += [f"phases.{n}: {problem}" for problem in _misfits(schedule, phase, head)]
    if wrong:
        raise ConfigErrors(path, wrong)
    return found


def _model(schedule: Schedule, before: Path | None, spec: PhaseSpec, handed_on: bool) -> dict[str, Any]:
    """`before`: the run of the phase before."""
    last = {"checkpoint": str(before)}
    return {
        "encoder": _tree(schedule.encoder) if before is None else last,
        "llm": last if spec.head is None else _tree(spec.head),
        "projector": _tree(schedule.projector) if before is None else last if handed_on else {},
    }


def _tree(component: Component) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(component).items()}


def _phase(schedule: Schedule, spec: PhaseSpec, path: Path, model: dict[str, Any], handed_on: bool) -> Phase:
    own = dict(spec.run)
    for where, tree in (("every", schedule.every), ("run", own)):
        _require_no_start(path, where, tree)
    bases = own.get("base", [])
    below = based(own, path)
    if lost := _lost(schedule, model, below, [bases] if isinstance(bases, str) else bases, path):
        raise ConfigErrors(path, lost)
    tree = merged(merged(below, schedule.every), own)
    folder = schedule.out / spec.name
    tree["model"] = {**model, "anyres": (tree.get("model") or {}).get("anyres")}
    tree |= {"name": spec.name, "out": str(folder / "run")}
    return Phase(spec.name, folder, decoded(tree, path), handed_on, spec.most_fallen)


def _require_no_start(path: Path, where: str, tree: Mapping[str, Any]) -> None:
    model = tree.get("model") or {}
    if not isinstance(model, Mapping):
        raise ConfigErrors(path, [f"{where}.model: expected a mapping of keys, found {model!r}"])
    found = [key for key in ("name", "out") if key in tree]
    found += [f"model.{key}" for key in model if key != "anyres"]
    if found:
        raise ConfigErrors(path, [f"{where}.{found[0]}: follows from the schedule; leave it out"])


def _lost(
    schedule: Schedule, model: Mapping[str, Any], below: Mapping[str, Any], bases: Sequence[str], path: Path
) -> list[str]:
    """What the tree `below`, of the files `bases`, says of how the encoder sees or what a projector keeps, and the phase's
    `model` would not have. Where components start from is the schedule's to say, and is passed over."""
    # An encoder is as the schedule begins it, in every phase; of the projector each phase has its own.
    whose = {
        "encoder": (Encoder, _tree(schedule.encoder), "the schedule says for all phases"),
        "projector": (Projector, model["projector"], "the schedule says of its first phase alone"),
    }
    found = []
    for part, (kind, own, where) in whose.items():
        for field in fields(kind)[len(fields(Component)) :]:
            value = _said(below, part, field.name)
            if value in (None, field.default, own.get(field.name)):
                continue
            base = next(b for b in reversed(bases) if _said(based({"base": b}, path), part, field.name) is not None)
            found.append(
                f"run.base: {base} sets model.{part}.{field.name} to {value}, which {where}; take it out of {base}, and set "
                f"{part}.{field.name} in the schedule where that is meant"
            )
    return found


def _said(tree: Mapping[str, Any], part: str, key: str) -> Any:
    """The value of `model.PART.KEY`; None where it is not said."""
    for name in ("model", part):
        inner = tree.get(name)
        tree = inner if isinstance(inner, Mapping) else {}
    return tree.get(key)


def _hidden(component: Component) -> int:
    """A head's width."""
    folder = component.hf or component.fresh or describe(resolve_checkpoint(component.checkpoint or Path())).llm
    return head_architecture(read_json(folder / "config.json"), str(folder / "config.json")).hidden


def _misfits(schedule: Schedule, phase: Phase, head: Component) -> list[str]:
    """`head`: what its language model began as, before any phase."""
    config = phase.config
    found = []
    if not phase.projector and config.objective.kind != "sft":
        found.append(
            f"objective.kind: its head is new, so its projector starts fresh, through which no {config.objective.kind} can "
            "pass; let a phase of kind sft come before it, and give the head there"
        )
    try:
        found += infeasible(replace(config, model=Model(schedule.encoder, head, anyres=config.model.anyres)))
    except UserError as error:
        found += str(error).splitlines()
    return found
