"""The tables of a demo's report."""

from collections.abc import Mapping, Sequence

from pivot_megatron.recipe.findings import Comparison, Estimate, estimate, pooled, probe_estimate
from pivot_megatron.recipe.record import AnswerScore, PreferenceScore, ProbeScore
from pivot_megatron.report.intervals import IntervalTable, Row, change_row, interval_table

TOGETHER = "tasks together"
_STEP = 10.0
"""Percent that the ends of a scale are multiples of, so that all of a report's are alike."""


def answer_table(scores: Sequence[AnswerScore], slots: Mapping[str, int]) -> IntervalTable:
    """Answer accuracy: per model over all tasks where there are several, then task by task."""
    rows = []
    for task, found in _by_task(scores).items():
        rows += [_row(task, model, slots, one, _count(one)) for model, one in found.items()]
    return interval_table(rows, ["correct"], step=_STEP)


def preference_table(scores: Sequence[PreferenceScore], slots: Mapping[str, int]) -> IntervalTable:
    """Preference accuracy laid out like `answer_table`, with the mean reward margin of each task."""
    margins = {(score.task, score.model): f"{score.mean_margin:+.3f}" for score in scores}
    rows = []
    for task, found in _by_task(scores).items():
        rows += [
            _row(task, model, slots, one, _count(one), margins.get((task, model), "")) for model, one in found.items()
        ]
    return interval_table(rows, ["ranked right", "mean margin"], step=_STEP)


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
    return interval_table(rows, ["test images", "C", "best C on test"], step=_STEP)


def change_table(changes: Sequence[Comparison]) -> IntervalTable:
    """The differences between models, in points, on a scale that shows zero."""
    rows = [
        change_row(
            change.measure,
            f"{change.second} \u2212 {change.first}",
            change.change,
            change.interval.low,
            change.interval.high,
        )
        for change in changes
    ]
    return interval_table(rows, ["verdict"], zero=True, step=_STEP)


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
