"""`pivot probe`: what an encoder sees."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pivot_megatron.cli.tracking import add_trackers, asked_tracking
from pivot_megatron.cli.verbs import Groups, Verb

if TYPE_CHECKING:
    from pivot_megatron.config.schema import Tracking
    from pivot_megatron.report.page import Page


def add(verb: Verb, verbs: Groups) -> None:
    group = verbs.add_parser("probe", help="what an encoder sees").add_subparsers(required=True, metavar="WHAT")
    for add_one in (_add_linear, _add_alignment, _add_segmentation, _add_gradcam, _add_answers, _add_vqa):
        add_one(verb, group)


def _add_linear(verb: Verb, group: Groups) -> None:
    p = verb("linear", _linear, "classes by a linear classifier over mean patch features", group)
    _encoders(p)
    p.add_argument(
        "--train",
        type=Path,
        required=True,
        help="folder of images a class; or folder, or quoted pattern, of tars with .cls beside each image",
    )
    p.add_argument("--test", type=Path, required=True, help="the same, of the same classes and other images")
    p.add_argument("--per-class", type=int, default=50, help="training images of each class in a draw (default: 50)")
    p.add_argument("--draws", type=int, default=3, help="times that training images are drawn (default: 3)")
    p.add_argument("--seed", type=int, default=777, help="of the first draw (default: 777)")
    add_classifier(p)
    p.add_argument("--projected", action="store_true", help="features past the projector, of a checkpoint or run")
    _features(p)
    _results(p, "linear")


def _add_alignment(verb: Verb, group: Groups) -> None:
    p = verb("alignment", _alignment, "how alike an encoder and a language model see images and their captions", group)
    _encoders(p)
    p.add_argument("--llm", type=Path, required=True, help="Hugging Face language model with its tokenizer")
    p.add_argument(
        "--captions",
        type=Path,
        required=True,
        help="tars of images with .txt beside each (a folder, or a quoted pattern), or shards of captions",
    )
    p.add_argument("--count", type=int, default=1024, help="images and captions, the first there are (default: 1024)")
    p.add_argument("--neighbours", type=int, default=10, metavar="K", help="of each sample (default: 10)")
    p.add_argument(
        "--feature-layer",
        type=int,
        help="the last layer looked at, from the original encoder's end (default: as training)",
    )
    p.add_argument("--batch", type=int, default=64, help="images or captions that pass a model at once (default: 64)")
    _results(p, "alignment")


def _add_segmentation(verb: Verb, group: Groups) -> None:
    p = verb(
        "segmentation", _segmentation, "which classes each patch shows, by a small head over patch features", group
    )
    _encoders(p)
    p.add_argument(
        "--train",
        type=Path,
        required=True,
        help="folder of images/ and annotations/; folder within such an images/; or folder, or quoted pattern, of parquet",
    )
    p.add_argument("--test", type=Path, required=True, help="the same, of the same classes and other images")
    p.add_argument("--classes", type=int, default=151, help="values of masks, from 0 on (default: 151, ADE20K's)")
    p.add_argument("--epochs", type=int, default=5, help="of training a head (default: 5)")
    p.add_argument("--seeds", type=int, default=6, help="heads that are trained for each encoder (default: 6)")
    p.add_argument("--seed", type=int, default=777, help="of the first head (default: 777)")
    _features(p)
    _results(p, "segmentation")


def _add_gradcam(verb: Verb, group: Groups) -> None:
    p = verb("gradcam", _gradcam, "where a preference's gradient falls on an image, model beside model", group)
    p.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="checkpoint or run; the first is what the others are held against",
    )
    p.add_argument(
        "--samples",
        type=Path,
        required=True,
        help="JSON lines with image, question, chosen, rejected and, in pixels, box; or a folder of shards of pairs",
    )
    p.add_argument("--count", type=int, help="samples, the first there are (default: all)")
    p.add_argument(
        "--objective",
        choices=("dpo", "sft"),
        nargs="+",
        default=["dpo"],
        help="one, or both side by side (default: dpo)",
    )
    p.add_argument("--steps", type=int, default=20, help="of overfitting to each sample first (default: 20)")
    p.add_argument("--rate", type=float, default=1e-5, help="of learning in those steps (default: 1e-5)")
    p.add_argument("--at", choices=("input", "output"), default="input", help="side of the projector (default: input)")
    _results(p, "gradcam")


def _add_answers(verb: Verb, group: Groups) -> None:
    p = verb(
        "answers", _answers, "answers to held-out questions, and preferences between two, model beside model", group
    )
    p.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="assembled Hugging Face folder, checkpoint or run; the first is what the others are held against",
    )
    p.add_argument(
        "--pairs",
        type=Path,
        required=True,
        help="shards of pairs with image, task and label, as `pivot data synthetic` makes",
    )
    p.add_argument("--count", type=int, help="pairs, the first there are (default: all)")
    _results(p, "answers")


def _add_vqa(verb: Verb, group: Groups) -> None:
    p = verb("vqa", _vqa, "the paper's table of 16 benchmarks, from lmms-eval's results", group)
    p.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="of a model each: lmms-eval's *_results.json, or its folder of them; the first is what the others are held against",
    )
    p.add_argument(
        "--benchmarks", type=Path, metavar="FILE", help="tasks and metrics (default: configs/benchmarks.yaml)"
    )
    form = p.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true")
    _results(p, "vqa", form)


def add_classifier(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--classifier",
        choices=("logistic", "prototypes"),
        default="logistic",
        help="regressions over the paper's C, or the nearest class mean, which fits nothing (default: logistic)",
    )


def _encoders(p: argparse.ArgumentParser) -> None:
    held = "the first is what the others are held against"
    p.add_argument(
        "encoders", type=Path, nargs="+", metavar="ENCODER", help=f"Hugging Face folder, checkpoint or run; {held}"
    )


def _features(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--feature-layer",
        type=int,
        help="hidden_states index, from the original encoder's end (default: as training takes it)",
    )
    p.add_argument("--batch", type=int, default=64, help="images that pass the encoder at once (default: 64)")


def _results(p: argparse.ArgumentParser, probe: str, form: argparse._ActionsContainer | None = None) -> None:
    """`form`: where `--json` belongs, beside other forms."""
    out = f"runs/probe-{probe}"
    p.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    (form or p).add_argument("--json", action="store_true")
    add_trackers(p)


def _linear(args: argparse.Namespace) -> int:
    from pivot_megatron.probe.classes import LinearSettings, probe_encoders
    from pivot_megatron.probe.pages import linear_page
    from pivot_megatron.report.facts import versions

    tracking = asked_tracking(args)
    settings = LinearSettings(
        args.train,
        args.test,
        args.per_class,
        args.draws,
        args.seed,
        args.projected,
        args.feature_layer,
        args.batch,
        args.classifier,
    )
    found = probe_encoders(args.encoders, settings, args.out / "features", _say)
    return _told(args, tracking, "linear", found, linear_page(found, versions("scikit-learn")))


def _alignment(args: argparse.Namespace) -> int:
    from pivot_megatron.probe.align import AlignmentSettings, align_encoders
    from pivot_megatron.probe.pages import alignment_page
    from pivot_megatron.report.facts import versions

    tracking = asked_tracking(args)
    settings = AlignmentSettings(args.llm, args.captions, args.count, args.neighbours, args.batch, args.feature_layer)
    found = align_encoders(args.encoders, settings, args.out / "features", _say)
    return _told(args, tracking, "alignment", found, alignment_page(found, versions()))


def _segmentation(args: argparse.Namespace) -> int:
    from pivot_megatron.probe.pages import segmentation_page
    from pivot_megatron.probe.segment import SegmentationSettings, segment_encoders
    from pivot_megatron.report.facts import versions

    tracking = asked_tracking(args)
    settings = SegmentationSettings(
        args.train, args.test, args.classes, args.epochs, args.seeds, args.seed, args.feature_layer, args.batch
    )
    found = segment_encoders(args.encoders, settings, args.out / "features", _say)
    args.out.mkdir(parents=True, exist_ok=True)
    found.picture.save(args.out / "segmentation.png")
    return _told(args, tracking, "segmentation", found, segmentation_page(found, versions()))


def _gradcam(args: argparse.Namespace) -> int:
    from pivot_megatron.probe.gradcam import gradcam_models
    from pivot_megatron.probe.gradcam_page import gradcam_page
    from pivot_megatron.probe.gradcam_report import GradcamSettings
    from pivot_megatron.report.facts import versions

    tracking = asked_tracking(args)
    settings = GradcamSettings(args.samples, args.count, tuple(args.objective), args.steps, args.rate, args.at)
    found = gradcam_models(args.models, settings, args.out, _say)
    return _told(args, tracking, "gradcam", found, gradcam_page(found, versions()))


def _answers(args: argparse.Namespace) -> int:
    from pivot_megatron.recipe.answers_page import answers_page
    from pivot_megatron.recipe.small_tasks import TaskSettings, ask_models
    from pivot_megatron.report.facts import versions

    tracking = asked_tracking(args)
    found = ask_models(args.models, TaskSettings(args.pairs, args.count))
    return _told(args, tracking, "answers", found, answers_page(found, versions()))


def _vqa(args: argparse.Namespace) -> int:
    from pivot_megatron.config.shipped import shipped_config
    from pivot_megatron.probe.vqa import vqa_report
    from pivot_megatron.probe.vqa_page import vqa_page
    from pivot_megatron.report.facts import versions

    tracking = asked_tracking(args)
    found = vqa_report(args.results, args.benchmarks or shipped_config("benchmarks.yaml"))
    shown = found.as_markdown() if args.markdown else found.as_text()
    return _told(args, tracking, "vqa", found, vqa_page(found, versions()), shown)


def _told(
    args: argparse.Namespace, tracking: Tracking, name: str, found: Any, page: Page, shown: str | None = None
) -> int:
    """`shown`: what is printed in the place of the table."""
    from pivot_megatron.report.page import write_page
    from pivot_megatron.report.tracked import track

    args.out.mkdir(parents=True, exist_ok=True)
    told = found.as_json(versions=page.versions)
    (args.out / f"{name}.json").write_text(told + "\n")
    write_page(page, args.out / "report.html")
    track(page.title, tracking, args.out / "report.html", page, found.as_text(), found.figures())
    print(told if args.json else shown or found.as_text())
    return 0


def _say(text: str) -> None:
    print(f"probe: {text}", file=sys.stderr, flush=True)
