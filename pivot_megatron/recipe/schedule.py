"""What `pivot evolve` does, as frozen dataclasses: runs in a row, through which one encoder is handed on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from pivot_megatron.config.explain import explain
from pivot_megatron.config.load import ConfigErrors, overridden, read_tree
from pivot_megatron.config.schema import Component, Encoder, Projector, Strict
from pivot_megatron.probe.classes import Classifier

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = ("features", "wandb", "tensorboard", "evolution.json", "report.html", "reports.jsonl")
"""What lies in a schedule's folder and is no phase's."""


def _component(value: Any) -> Any:
    return {"hf": str(value)} if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class LinearProbe(Strict):
    """`pivot probe linear` of the encoder as each phase found it and as it left it: folders of images by class, or patterns of
    tars."""

    train: Path
    test: Path
    per_class: int = 50
    draws: int = 3
    seed: int = 777
    batch: int = 64
    classifier: Classifier = "logistic"


@dataclass(frozen=True)
class PhaseSpec(Strict):
    """`run`: a run's YAML, inside the schedule's, its `base:` relative to that file; name, out and model follow from the schedule
    (`model.anyres` alone may stand there). `head`: the language model that takes the place of the phase before's; as a text
    alone it is a Hugging Face folder. `most_fallen`: the schedule ends after this phase where the probe's accuracy has surely
    fallen by more than this share, the whole of the difference's 95 % interval lying below.
    """

    name: str
    run: Mapping[str, Any]
    head: Annotated[Component | None, BeforeValidator(_component)] = None
    most_fallen: float | None = None


@dataclass(frozen=True)
class Schedule(Strict):
    """`encoder`: what evolves, as it is to begin with; `projector`: the first phase's, fresh where it is left out. `every`:
    what the runs of all phases share, over their bases and below what each says itself. `out` holds a folder a phase.
    `most_fallen_in_all`: as a phase's `most_fallen`, after each of them, against the encoder as it is to begin with."""

    name: str
    out: Path
    encoder: Encoder
    phases: tuple[PhaseSpec, ...]
    projector: Projector = field(default_factory=Projector)
    probe: LinearProbe | None = None
    most_fallen_in_all: float | None = None
    every: Mapping[str, Any] = field(default_factory=dict)


_ADAPTER = TypeAdapter(Schedule)


def load_schedule(path: Path, overrides: Sequence[str] = ()) -> Schedule:
    """Raises ConfigErrors with every mistake of the schedule's own keys; those of its runs are found as they are resolved."""
    tree = overridden(read_tree(path), overrides)
    try:
        schedule = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ConfigErrors(path, explain(error, tree, Schedule)) from None
    if found := _problems(schedule):
        raise ConfigErrors(path, found)
    return schedule


def _problems(schedule: Schedule) -> list[str]:
    found = []
    if not schedule.phases:
        found.append("phases: expected one at least, found none")
    if len(schedule.encoder.sources) != 1:
        found.append("encoder: expected one of hf, checkpoint and fresh")
    if len(schedule.projector.sources) > 1 or schedule.projector.hf or schedule.projector.fresh:
        found.append("projector: expected a checkpoint, or nothing for a fresh one")
    if schedule.encoder.fresh is not None and schedule.probe is not None:
        found.append("probe: expected an encoder that is there to begin with (hf or checkpoint), found encoder.fresh")
    encoder = schedule.encoder
    if schedule.probe is not None and encoder.hf is not None and (encoder.image_size or encoder.max_patches):
        found.append(
            "probe: expected an encoder at its own resolution to begin with; leave image_size and max_patches out, or begin from "
            "a checkpoint that `pivot convert import --image-size` made"
        )
    found += _gate_problems("most_fallen_in_all", schedule.most_fallen_in_all, schedule)
    names = [phase.name for phase in schedule.phases]
    for n, phase in enumerate(schedule.phases):
        if not _NAME.fullmatch(phase.name) or phase.name in RESERVED:
            found.append(
                f"phases.{n}.name: expected letters, digits, dots and dashes, and none of {', '.join(RESERVED)}, "
                f"found {phase.name!r}"
            )
        if phase.name in names[:n]:
            found.append(f"phases.{n}.name: expected a name of its own, found {phase.name!r} twice")
        if phase.head is not None and len(phase.head.sources) != 1:
            found.append(f"phases.{n}.head: expected one of hf, checkpoint and fresh")
        found += _gate_problems(f"phases.{n}.most_fallen", phase.most_fallen, schedule)
    if schedule.phases and schedule.phases[0].head is None:
        found.append("phases.0.head: missing; the first phase needs a language model")
    return found


def _gate_problems(key: str, most: float | None, schedule: Schedule) -> list[str]:
    if most is None or (schedule.probe is not None and most >= 0):
        return []
    return [f"{key}: expected a share of 0 or more, and a probe: to measure it by"]
