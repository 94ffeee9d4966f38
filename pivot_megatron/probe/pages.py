"""The pages of `pivot probe linear` and `pivot probe alignment`."""

from __future__ import annotations

from collections.abc import Mapping

from pivot_megatron.probe.align import AlignmentReport
from pivot_megatron.probe.classes import LinearReport
from pivot_megatron.probe.score_sections import Told, score_sections, scores_told
from pivot_megatron.report.facts import told
from pivot_megatron.report.intervals import Line
from pivot_megatron.report.page import Page


def linear_page(report: LinearReport, versions: Mapping[str, str]) -> Page:
    settings = report.settings
    text = Told(
        "accuracy",
        f"Classes read by logistic regression from frozen mean patch features: {report.classes} classes, {settings.per_class} "
        f"training images of each, {report.test_images} test images, the mean of {settings.draws} "
        f"{'draw' if settings.draws == 1 else 'draws'} of training images. C is chosen on held-out training images; "
        "\u201cC on test\u201d chooses it on the test images, as published numbers do. \u201cprototypes\u201d is the nearest "
        "class mean.",
        "Intervals are for other draws and other test images alike.",
    )
    facts = told({"encoders": [score.encoder for score in report.scores], **vars(settings)})
    return Page("Linear probe", scores_told(text, report.scores), score_sections(text, report.scores), facts, versions)


def alignment_page(report: AlignmentReport, versions: Mapping[str, str]) -> Page:
    settings = report.settings
    text = Told(
        "mutual neighbours",
        f"Of each of {settings.count} images and their captions, the share of its {settings.neighbours} nearest others that an "
        "encoder and the language model have in common, at the pair of layers that agrees best. \u201cCKA\u201d is the linear "
        "centred kernel alignment at the pair that is best by it.",
        "Intervals are for other images and captions. Chance is of one pair of layers; the best of many lies a little above.",
    )
    sections = score_sections(text, report.scores, Line("chance", 100 * report.chance))
    facts = told({"encoders": [score.encoder for score in report.scores], **vars(settings)})
    return Page("Alignment with a language model", scores_told(text, report.scores), sections, facts, versions)
