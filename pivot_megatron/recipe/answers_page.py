"""The page of `pivot probe answers`: scores, and what the models said."""

from __future__ import annotations

import io
from collections.abc import Mapping

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
    sections = [
        *score_sections(_ANSWERS, report.answers()),
        *score_sections(_PAIRS, report.preferences()),
        Section(
            "Examples",
            [Pictures(_examples(report), small=True)],
            f"The first {SHOWN_A_TASK} questions of each task. A tick marks an answer that counts as right.",
        ),
    ]
    facts = told({"models": [one.model for one in report.answered], **vars(report.settings)})
    return Page("Answers", scores_told(_ANSWERS, report.answers()), sections, facts, versions)


def _examples(report: TaskReport) -> list[Picture]:
    names = short_names([one.model for one in report.answered])
    shown: dict[str, int] = {}
    pictures = []
    for n, pair in enumerate(report.pairs):
        shown[pair.task] = shown.get(pair.task, 0) + 1
        if shown[pair.task] <= SHOWN_A_TASK:
            said = {name: _marked(one.texts[n], pair) for name, one in zip(names, report.answered, strict=True)}
            pictures.append(
                Picture(pair.task, _png(pair.image), {"question": pair.question, "chosen": pair.chosen, **said})
            )
    return pictures


def _marked(answer: str, pair: HeldOut) -> str:
    return f"{answer} \u2713" if is_right(answer, pair.label) else answer


def _png(image: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(file, "PNG")
    return file.getvalue()
