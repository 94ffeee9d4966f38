"""The pages of the probes of encoders."""

from __future__ import annotations

import io
from collections.abc import Mapping

from pivot_megatron.probe.align import AlignmentReport
from pivot_megatron.probe.classes import CLASSIFIERS, LinearReport
from pivot_megatron.probe.score_sections import Told, score_sections, scores_told
from pivot_megatron.probe.segment import SegmentationReport
from pivot_megatron.report.facts import told
from pivot_megatron.report.intervals import Line
from pivot_megatron.report.page import Page, Picture, Pictures, Section

_CHOSEN = {
    "logistic": (
        "C is chosen on held-out training images; \u201cC on test\u201d chooses it on the test images, as published numbers do. "
        "\u201cprototypes\u201d is the nearest class mean."
    ),
    "prototypes": "Nearest is of the highest cosine; nothing is fitted or chosen.",
}


def linear_page(report: LinearReport, versions: Mapping[str, str]) -> Page:
    settings = report.settings
    text = Told(
        "accuracy",
        f"Classes read by {CLASSIFIERS[settings.classifier]} from frozen mean patch features: {report.classes} classes, "
        f"{settings.per_class} training images of each, {report.test_images} test images, the mean of {settings.draws} "
        f"{'draw' if settings.draws == 1 else 'draws'} of training images. {_CHOSEN[settings.classifier]}",
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


def segmentation_page(report: SegmentationReport, versions: Mapping[str, str]) -> Page:
    settings = report.settings
    text = Told(
        "macro recall",
        f"Which of {len(report.classes)} classes each patch of {report.test_images} test images shows, read from frozen patch "
        f"features by a small head, trained on {report.train_images} images with each of {settings.seeds} seeds: the mean recall "
        "over classes, at the epoch that is best on the test images, as published numbers are. \u201clast epoch\u201d has no "
        "such choice; precision and F1 are the best epoch\u2019s.",
        "Intervals are for other seeds and other classes alike.",
    )
    file = io.BytesIO()
    report.picture.save(file, "PNG")
    maps = Section(
        "Maps",
        [Pictures([Picture("test images", file.getvalue(), {})])],
        "The image, its mask, and the likeliest class of each patch past class 0, which is black, by each encoder\u2019s first "
        "head.",
    )
    facts = told({"encoders": [score.encoder for score in report.scores], **vars(settings)})
    sections = [*score_sections(text, report.scores), maps]
    return Page("Segmentation", scores_told(text, report.scores), sections, facts, versions)
