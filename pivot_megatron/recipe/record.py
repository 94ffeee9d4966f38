"""What a demo run found, as frozen records that go to JSON and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeVar

from pivot_megatron.errors import UserError
from pivot_megatron.report.panels import Curve

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class AnswerScore:
    """How many of a model's answers to one task's held-out questions are right."""

    model: str
    task: str
    correct: int
    total: int


@dataclass(frozen=True)
class PreferenceScore:
    """How many held-out pairs of one task a model ranks right, and its mean margin: nats, chosen less rejected."""

    model: str
    task: str
    correct: int
    total: int
    mean_margin: float


@dataclass(frozen=True)
class ProbeScore:
    """A linear probe of one frozen encoder: test accuracy as a fraction, with its 95 % interval.

    `c` was chosen on held-out training samples; `accuracy_best_c_on_test` has C chosen on the test set, as in the
    paper. `total` is the number of test samples.
    """

    encoder: str
    dataset: str
    accuracy: float
    low: float
    high: float
    total: int
    c: float
    accuracy_best_c_on_test: float


@dataclass(frozen=True)
class Example:
    """One held-out question with every model's answer. The image is a PNG in base64; `right` names the models that are."""

    task: str
    image_png_base64: str
    question: str
    truth: str
    answers: Mapping[str, str]
    right: Sequence[str]


@dataclass(frozen=True)
class ExportCheck:
    """One exported encoder or whole model, read back by plain transformers.

    `max_difference` is the largest absolute difference between an encoder's features, or a whole model's log-probs of
    answers (nats), and those of the model it came from. Tensors are counted against the checkpoints that everything
    started from; `loaded`: none was missing or left over.
    """

    name: str
    folder: str
    loaded: bool
    max_difference: float
    unchanged_tensors: int
    changed_tensors: int


@dataclass(frozen=True)
class DemoReport:
    """Everything the demo reports. `seconds` is per phase; `curves` is run, then metric as named in `metrics.jsonl`."""

    environment: Mapping[str, str]
    settings: Mapping[str, str]
    seconds: Mapping[str, float]
    curves: Mapping[str, Mapping[str, Curve]]
    answers: Sequence[AnswerScore]
    preference: Sequence[PreferenceScore]
    probes: Sequence[ProbeScore]
    examples: Sequence[Example]
    exports: Sequence[ExportCheck]

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers only: what `json.loads` gives for this report."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            UserError: a field is missing or unknown.
        """
        _check_names(cls, data, "report")
        curves = {
            run: {name: tuple((int(step), float(value)) for step, value in curve) for name, curve in metrics.items()}
            for run, metrics in data["curves"].items()
        }
        return cls(
            environment=data["environment"],
            settings=data["settings"],
            seconds=data["seconds"],
            curves=curves,
            answers=_records(AnswerScore, data, "answers"),
            preference=_records(PreferenceScore, data, "preference"),
            probes=_records(ProbeScore, data, "probes"),
            examples=_records(Example, data, "examples"),
            exports=_records(ExportCheck, data, "exports"),
        )


def _records(kind: type[_Record], data: Mapping[str, Any], name: str) -> tuple[_Record, ...]:
    for index, record in enumerate(data[name]):
        _check_names(kind, record, f"report.{name}[{index}]")
    return tuple(kind(**record) for record in data[name])


def _check_names(kind: Any, data: Mapping[str, Any], where: str) -> None:
    expected = {field.name for field in fields(kind)}
    if expected != set(data):
        missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
        raise UserError(
            f"{where}: expected the fields of {kind.__name__}, found missing {missing} and unknown {unknown}; "
            "write the report again with this version"
        )
