"""The page of `pivot probe answers`: scores, and what the models said."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image

from pivot_megatron.probe.score_sections import Told, score_sections, scores_told
from pivot_megatron.recipe.held_out import HeldOut, is_right
from pivot_megatron.recipe.small_tasks import TaskReport
from pivot_megatron.report.facts import short_names, told
from pivot_megatron.report.page import Page, Picture, Pictures, Section

SHOWN_A_TASK = 3

_ANSWERS = Told(
    "answers right",
    "Greedy answers that hold the right label as a word of its own, in all and by task.",
    "Intervals are for other questions.",
)
_PAIRS = Told(
    "pairs ranked right",
    "Pairs whose chosen answer is likelier as a whole than the rejected one.",
    "Intervals are for other pairs.",
)


def answers_page(report: TaskReport, versions: Mapping[str, str]) -> Page:
    names = short_names([one.model for one in report.answered])
    sections = [
        *score_sections(_ANSWERS, report.answers()),
        *score_sections(_PAIRS, report.preferences()),
        examples_section(report.pairs, dict(zip(names, (one.texts for one in report.answered), strict=True))),
    ]
    facts = told({"models": [one.model for one in report.answered], **vars(report.settings)})
    return Page("Answers", scores_told(_ANSWERS, report.answers()), sections, facts, versions)


def shown_examples(pairs: Sequence[HeldOut]) -> list[int]:
    """Which of `pairs` a page shows: the first of each task, so that nobody chose them by their answers."""
    shown: dict[str, int] = {}
    found = []
    for n, pair in enumerate(pairs):
        shown[pair.task] = shown.get(pair.task, 0) + 1
        if shown[pair.task] <= SHOWN_A_TASK:
            found.append(n)
    return found


def examples_section(pairs: Sequence[HeldOut], texts: Mapping[str, Sequence[str]], note: str = "") -> Section:
    """What models said, beside one another. `texts`: answers to `pairs`, by model, which is neither `question` nor `chosen`."""
    pictures = []
    for n in shown_examples(pairs):
        pair, said = pairs[n], {model: answers[n] for model, answers in texts.items()}
        right = {model: is_right(text, pair.label) for model, text in said.items()}
        told = {"question": pair.question, "chosen": pair.chosen, **said}
        pictures.append(Picture(pair.task, _png(pair.image), told, right=right))
    lead = f"The first {SHOWN_A_TASK} questions of each task. Right is an answer that holds the right label."
    return Section("Examples", [Pictures(pictures, small=True)], lead, note)


def _png(image: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(file, "PNG")
    return file.getvalue()
