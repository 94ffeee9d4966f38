"""A schedule's phases as runs of their own: each a whole config, beginning from what the one before it left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.load import ConfigErrors, based, decoded, merged
from pivot_megatron.config.schema import AnyRes, Component, Encoder, Model, ParameterRule, Projector, RunConfig
from pivot_megatron.convert.frozen import frozen_names
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.start import describe_start
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.freeze import rate_of
from pivot_megatron.recipe.schedule import Schedule
from pivot_megatron.train.feasible import infeasible

Found = TypeVar("Found")


@dataclass(frozen=True)
class Phase:
    """`key`: its place in the schedule's file, and its name, for messages. `config`: its run, in `folder / "run"`. `projector`:
    whether the projector is handed on, or fresh. `most_fallen`: see PhaseSpec."""

    name: str
    key: str
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
    """The phases of the schedule in the file `path`. Raises ConfigErrors with every mistake that `read_phases` finds."""
    found, wrong = read_phases(schedule, path)
    if wrong:
        raise ConfigErrors(path, wrong)
    return found


def read_phases(schedule: Schedule, path: Path) -> tuple[list[Phase], list[str]]:
    """The phases that can be read, and what is wrong with any: every mistake of a run, every folder of a model that is not one,
    every layout and rule that its model cannot be trained by, every phase that would pass preferences to a new head."""
    found: list[Phase] = []
    _, no_encoder = tried("encoder", lambda: encoder_architecture(*_config_of(schedule.encoder, "encoder")))
    tiles, no_projector = tried("projector", partial(_tiles, schedule.projector))
    wrong = no_encoder + no_projector
    head, width, encoder = Component(), None, _tree(schedule.encoder)
    for n, spec in enumerate(schedule.phases):
        key, before = f"phases.{n} ({spec.name})", width
        if spec.head is not None:
            head = spec.head
            width, no_head = tried(f"{key}: head", partial(_hidden, head))
            wrong += no_head
        fits = spec.head is None or (width is not None and width == before)
        handed_on = fits if n else bool(schedule.projector.sources)
        try:
            phase = _phase(schedule, n, key, path, _model(schedule, n, encoder, handed_on), tiles)
        except ConfigErrors as error:
            wrong += [f"{key}: {line.removeprefix(f'{path}: ')}" for line in error.errors]
            continue
        found.append(phase)
        tiles = phase.config.model.anyres or tiles
        if _trains_encoder(phase.config, schedule.encoder, head):
            encoder = {"checkpoint": str(phase.config.out)}
        problems = _unaligned(phase) if spec.head is not None and (n or not handed_on) else []
        if width is not None and not no_encoder:
            run = replace(phase.config, model=Model(schedule.encoder, head, anyres=tiles))
            misfits, no_model = tried(key, partial(infeasible, run))
            wrong += no_model
            problems += misfits or []
        wrong += [f"{key}: {problem}" for problem in problems]
    return found, wrong


def tried(key: str, call: Callable[[], Found]) -> tuple[Found | None, list[str]]:
    """What `call` returned, or else the lines of the mistake that it raised, `key` before each."""
    try:
        return call(), []
    except UserError as error:
        return None, [f"{key}: {line}" for line in str(error).splitlines()]


def _trains_encoder(config: RunConfig, encoder: Encoder, head: Component) -> bool:
    """Where it cannot be told, as of folders that are not there, it may."""
    every = ParameterRule("encoder.*", "frozen")
    names, _ = tried("", lambda: frozen_names(describe_start(Model(encoder, head)).architecture(), [every]))
    return names is None or any(rate_of(name, config.parameters) != "frozen" for name in names)


def _model(schedule: Schedule, n: int, encoder: dict[str, Any], handed_on: bool) -> dict[str, Any]:
    """`encoder`: where it was last trained. A run that freezes it in bf16 has it in bf16 alone."""
    spec = schedule.phases[n]
    last = {"checkpoint": str(_folder(schedule, n - 1) / "run")}
    return {
        "encoder": encoder,
        "llm": last if spec.head is None else _tree(spec.head),
        "projector": _tree(schedule.projector) if n == 0 else last if handed_on else {},
    }


def _folder(schedule: Schedule, n: int) -> Path:
    return schedule.out / schedule.phases[n].name


def _tree(component: Component) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(component).items()}


def _phase(schedule: Schedule, n: int, key: str, path: Path, model: dict[str, Any], tiles: AnyRes | None) -> Phase:
    """`model`: where its components begin. `tiles`: as the phase before saw images."""
    spec, handed_on = schedule.phases[n], bool(model["projector"].get("checkpoint"))
    own = dict(spec.run)
    for where, tree in (("every", schedule.every), ("run", own)):
        _require_no_start(path, where, tree)
    bases = own.get("base", [])
    below = based(own, path)
    if lost := _lost(schedule, model, below, [bases] if isinstance(bases, str) else bases, path):
        raise ConfigErrors(path, lost)
    tree = merged(merged(below, schedule.every), own)
    anyres = (tree.get("model") or {}).get("anyres")
    if anyres is None and tiles is not None and not handed_on:  # a projector that is handed on brings them along
        anyres = asdict(tiles)
    tree["model"] = {**model, "anyres": anyres}
    folder = _folder(schedule, n)
    tree |= {"name": spec.name, "out": str(folder / "run")}
    return Phase(spec.name, key, folder, decoded(tree, path), handed_on, spec.most_fallen)


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


def _hidden(head: Component) -> int:
    """Its width."""
    return head_architecture(*_config_of(head, "llm")).hidden


def _config_of(component: Component, part: Literal["encoder", "llm"]) -> tuple[dict[str, Any], str]:
    """What its Hugging Face folder's config.json holds, and where that is."""
    folder = component.hf or component.fresh
    if folder is None:
        description = describe(resolve_checkpoint(component.checkpoint or Path()))
        folder = description.encoder if part == "encoder" else description.llm
    file = folder / "config.json"
    return read_json(file), str(file)


def _tiles(projector: Projector) -> AnyRes | None:
    return None if projector.checkpoint is None else describe(resolve_checkpoint(projector.checkpoint)).anyres


def _unaligned(phase: Phase) -> list[str]:
    """`phase`: one whose head no phase before it has had, nor a projector of its own."""
    kind = phase.config.objective.kind
    if kind == "sft":
        return []
    return [
        f"objective.kind: its head is new, and its projector fresh or another head's, through which no {kind} can pass; let a "
        "phase of kind sft come before it, and give the head there"
    ]
