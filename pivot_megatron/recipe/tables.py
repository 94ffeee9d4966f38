"""Tables of proportions whose rows are drawn as an interval on one scale: what a paper calls a forest plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pivot_megatron.recipe.charts import nice_ticks
from pivot_megatron.recipe.findings import Comparison, Estimate, estimate, pooled, probe_estimate
from pivot_megatron.recipe.record import AnswerScore, PreferenceScore, ProbeScore

TOGETHER = "tasks together"


@dataclass(frozen=True)
class Scale:
    """The axis of a table's interval column, in percent of samples; `at` is in percent of the column's width."""

    low: float
    high: float

    @property
    def ticks(self) -> list[float]:
        return nice_ticks(self.low, self.high, most=4)

    def at(self, value: float) -> float:
        return 100 * (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Row:
    """One estimate. `value`, `low` and `high` are in percent; `slot` is its colour; `cells` fill further columns."""

    group: str
    label: str
    slot: int
    value: float
    low: float
    high: float
    cells: Sequence[str] = ()


@dataclass(frozen=True)
class IntervalTable:
    """Rows and the scale they share; rows of a group stand together. `heads` are the titles of the rows' `cells`."""

    rows: Sequence[Row]
    scale: Scale
    heads: Sequence[str]

    def spans(self) -> list[tuple[Row, int]]:
        """Every row, with the number of rows its group's cell covers: 0 where that cell stands in a row above."""
        spans = [0] * len(self.rows)
        start = 0
        for index, row in enumerate(self.rows):
            if row.group != self.rows[start].group:
                start = index
            spans[start] += 1
        return list(zip(self.rows, spans, strict=True))


def answer_table(scores: Sequence[AnswerScore], slots: Mapping[str, int]) -> IntervalTable:
    """Answer accuracy: per model over all tasks where there are several, then task by task."""
    rows = []
    for task, found in _by_task(scores).items():
        rows += [_row(task, model, slots, one, _count(one)) for model, one in found.items()]
    return _table(rows, ["correct"])


def preference_table(scores: Sequence[PreferenceScore], slots: Mapping[str, int]) -> IntervalTable:
    """Preference accuracy laid out like `answer_table`, with the mean reward margin of each task."""
    margins = {(score.task, score.model): f"{score.mean_margin:+.3f}" for score in scores}
    rows = []
    for task, found in _by_task(scores).items():
        rows += [
            _row(task, model, slots, one, _count(one), margins.get((task, model), "")) for model, one in found.items()
        ]
    return _table(rows, ["ranked right", "mean margin"])


def probe_table(scores: Sequence[ProbeScore], slots: Mapping[str, int]) -> IntervalTable:
    """Probe accuracy by dataset, with the C that was chosen and the accuracy when C is chosen on the test set."""
    rows = [
        _row(
            dataset,
            score.encoder,
            slots,
            probe_estimate(score),
            f"{score.total}",
            f"{score.c:g}",
            f"{100 * score.accuracy_best_c_on_test:.1f}",
        )
        for dataset in dict.fromkeys(score.dataset for score in scores)
        for score in scores
        if score.dataset == dataset
    ]
    return _table(rows, ["test images", "C", "best C on test"])


def change_table(changes: Sequence[Comparison]) -> IntervalTable:
    """The differences between models, in points, on a scale that shows zero."""
    rows = [
        Row(
            group=change.measure,
            label=f"{change.second} \u2212 {change.first}",
            slot=0,
            value=100 * change.change,
            low=100 * change.interval.low,
            high=100 * change.interval.high,
            cells=[change.verdict],
        )
        for change in changes
    ]
    return _table(rows, ["verdict"], zero=True)


def _by_task(scores: Sequence[AnswerScore] | Sequence[PreferenceScore]) -> dict[str, dict[str, Estimate]]:
    tasks = list(dict.fromkeys(score.task for score in scores))
    found = {TOGETHER: pooled(scores)} if len(tasks) > 1 else {}
    for task in tasks:
        found[task] = {score.model: estimate(score.correct, score.total) for score in scores if score.task == task}
    return found


def _row(group: str, label: str, slots: Mapping[str, int], found: Estimate, *cells: str) -> Row:
    low, high = 100 * found.interval.low, 100 * found.interval.high
    return Row(group, label, slots[label], 100 * found.value, low, high, cells)


def _count(found: Estimate) -> str:
    return f"{round(found.value * found.total)}/{found.total}"


def _table(rows: Sequence[Row], heads: Sequence[str], *, zero: bool = False) -> IntervalTable:
    """The scale reaches from one multiple of ten to another, around every interval and, where asked for, zero."""
    low = min([row.low for row in rows] + [0.0] * zero, default=0.0)
    high = max([row.high for row in rows] + [0.0] * zero, default=100.0)
    scale = Scale(10 * (low // 10), -10 * (-high // 10))
    if scale.low == scale.high:
        scale = Scale(scale.low - 10, scale.high + 10)
    return IntervalTable(rows, scale, heads)
