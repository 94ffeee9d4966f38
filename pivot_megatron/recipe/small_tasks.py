"""Answers of several models to held-out questions, and how they differ: the small tasks, in plain transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pivot_megatron.convert.commands import export_checkpoint
from pivot_megatron.errors import UserError
from pivot_megatron.probe.opening import require_safetensors
from pivot_megatron.probe.table import Score, as_records, as_table, figures
from pivot_megatron.recipe.answers import ExportedModel, answer_logprobs, greedy_answers
from pivot_megatron.recipe.held_out import HeldOut, answer_scores, is_right, preference_scores, read_held_out


@dataclass(frozen=True)
class TaskSettings:
    """`count`: of pairs, the first there are; None for all."""

    pairs: Path
    count: int | None = None


@dataclass(frozen=True)
class Answered:
    """Of one model: `texts`, its greedy answers; `logprobs`, in nats, of each pair's chosen and rejected one."""

    model: str
    texts: tuple[str, ...]
    logprobs: tuple[tuple[float, float], ...]

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Answered:
        """Of what `asdict` made of it, as JSON brings it back."""
        return cls(told["model"], tuple(told["texts"]), tuple((one, other) for one, other in told["logprobs"]))


@dataclass(frozen=True)
class TaskReport:
    settings: TaskSettings
    pairs: tuple[HeldOut, ...]
    answered: tuple[Answered, ...]

    def answers(self) -> list[Score]:
        """Which answers are right."""
        return [
            self._score(one, [is_right(t, p.label) for t, p in zip(one.texts, self.pairs, strict=True)])
            for one in self.answered
        ]

    def preferences(self) -> list[Score]:
        """Which pairs are ranked right; a tie is not."""
        return [self._score(one, [chosen > rejected for chosen, rejected in one.logprobs]) for one in self.answered]

    def _score(self, one: Answered, right: Sequence[bool]) -> Score:
        by_task: dict[str, list[bool]] = {}
        for pair, found in zip(self.pairs, right, strict=True):
            by_task.setdefault(pair.task, []).append(found)
        columns = {task: f"{100 * sum(found) / len(found):.2f}" for task, found in by_task.items()}
        return Score(one.model, np.array([right], dtype=np.float64), columns, {"tasks": columns}, counted=True)

    def figures(self) -> dict[str, float]:
        return figures("answers", self.answers()) | figures("pairs", self.preferences())

    def as_text(self) -> str:
        parts = (
            as_table(name, scores) for name, scores in (("answers", self.answers()), ("pairs", self.preferences()))
        )
        return "\n\n".join(parts)

    def as_json(self, **facts: Any) -> str:
        models = [
            {
                "model": one.model,
                "answers": [asdict(score) for score in answer_scores(one.model, self.pairs, one.texts)],
                "preferences": [asdict(score) for score in preference_scores(one.model, self.pairs, one.logprobs)],
                "texts": one.texts,
            }
            for one in self.answered
        ]
        told = {
            "settings": asdict(self.settings),
            **facts,
            "answers": as_records(self.answers()),
            "preferences": as_records(self.preferences()),
            "models": models,
        }
        return json.dumps(told, indent=2, default=str)


def ask_models(models: Sequence[Path], settings: TaskSettings) -> TaskReport:
    """`models`: folders of `LlavaForConditionalGeneration`, checkpoints, or runs (the newest checkpoint). Raises UserError for
    pairs without image, task or label, and a model that is not whole."""
    pairs = read_held_out(settings.pairs)[: settings.count]
    if not pairs:
        raise UserError(f"{settings.pairs}: expected pairs to ask of, found none; set --count to 1 or more")
    return TaskReport(settings, tuple(pairs), tuple(_answered(model, pairs) for model in models))


def _answered(model: Path, pairs: Sequence[HeldOut]) -> Answered:
    with _exported(model) as folder:
        exported = ExportedModel(folder)
        if exported.incomplete:
            raise UserError(
                f"{model}: expected every weight of the model, found {exported.incomplete[0]} missing or odd"
            )
        texts = greedy_answers(exported, pairs, label=f"{model}: answers")
        logprobs = answer_logprobs(exported, pairs, label=f"{model}: preferences")
    return Answered(str(model), tuple(texts), tuple(logprobs))


@contextmanager
def _exported(model: Path) -> Iterator[Path]:
    if (config := model / "config.json").is_file():
        found: Any = json.loads(config.read_text()).get("model_type")
        if found != "llava":
            raise UserError(f"{config}: expected model_type llava, an assembled model, found {found}")
        require_safetensors(model)
        yield model
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "mllm"
        export_checkpoint(model, "mllm", folder, "drop", None)
        yield folder
