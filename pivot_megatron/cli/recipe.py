"""The recipe: the demo, and schedules of runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pivot_megatron.cli.probe import add_classifier
from pivot_megatron.cli.tracking import add_trackers, asked_tracking
from pivot_megatron.cli.verbs import Verb
from pivot_megatron.errors import UserError
from pivot_megatron.requeue import StopRequests


def add(verb: Verb) -> None:
    p = verb("demo", _demo, "the whole recipe, small, on this machine; ends with a report")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to work in (default: runs/demo)")
    p.add_argument("--processes", type=int, default=2, help="processes to train with (default: 2)")
    add_trackers(p)

    p = verb("evolve", _evolve, "runs in a row, the encoder handed on; skips what is finished")
    p.add_argument("schedule", type=Path, metavar="SCHEDULE.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--processes", type=int, help="processes on this machine (default: one a GPU, or the layout's own)")
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--runs", action="store_true", help="train nothing: write each phase's run file, and print name and file"
    )
    which.add_argument(
        "--judge", metavar="PHASE", help="train nothing: export and probe the encoder of a phase whose run is finished"
    )

    p = verb("compare", _compare, "runs that differ in their objective, over seeds: what each does to the encoder")
    p.add_argument(
        "configs",
        type=Path,
        nargs="+",
        metavar="RUN.yaml",
        help="one alone is compared with its SFT twin; else the first",
    )
    p.add_argument("--set", nargs="*", default=[], metavar="key=value", dest="changes", help="laid over every run")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: 1 to 5)")
    p.add_argument("--samples", type=int, nargs="+", help="so many of the shards, each a comparison (default: all)")
    p.add_argument("--train", type=Path, required=True, help="the probe's images, as of `pivot probe linear`")
    p.add_argument("--test", type=Path, required=True, help="the same, of the same classes and other images")
    p.add_argument("--per-class", type=int, default=50, help="training images of each class in a draw (default: 50)")
    p.add_argument("--draws", type=int, default=3, help="times that training images are drawn (default: 3)")
    add_classifier(p)
    p.add_argument(
        "--pairs", type=Path, help="held-out pairs that the whole models answer, as of `pivot probe answers`"
    )
    p.add_argument("--processes", type=int, help="processes on this machine (default: one a GPU, or the layout's own)")
    p.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: runs/compare")


def _demo(args: argparse.Namespace) -> int:
    from pivot_megatron.recipe.demo import run_demo

    run_demo(args.out, args.processes, asked_tracking(args))
    return 0


def _require_alone(verb: str, instead: str) -> None:
    if any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE", "NNODES")):
        raise UserError(
            f"{verb}: expected to be started alone, for it starts the processes of its runs itself; on several nodes {instead}"
        )


def _compare(args: argparse.Namespace) -> int:
    _require_alone("compare", "train its runs by launch/pivot_dpo.sh and probe them by `pivot probe linear`")
    with StopRequests() as requests:
        from pivot_megatron.probe.classes import LinearSettings
        from pivot_megatron.recipe.compare import CompareSettings, compare

        probe = LinearSettings(args.train, args.test, args.per_class, args.draws, classifier=args.classifier)
        counts = tuple(args.samples) if args.samples else (None,)
        settings = CompareSettings(
            tuple(args.configs), tuple(args.changes), tuple(args.seeds), counts, probe, args.pairs, args.out
        )
        compare(settings, args.processes, requests)
    return 0


def _evolve(args: argparse.Namespace) -> int:
    _require_alone("evolve", "use launch/evolve.sh, or --runs and `pivot train` for each")
    with StopRequests() as requests:
        from pivot_megatron.recipe.evolution import as_table
        from pivot_megatron.recipe.evolve import Evolution
        from pivot_megatron.recipe.phase_runs import phases_of
        from pivot_megatron.recipe.ready import ready_phases
        from pivot_megatron.recipe.schedule import load_schedule

        schedule = load_schedule(args.schedule, args.overrides)
        phases = (phases_of if args.judge else ready_phases)(schedule, args.schedule)
        evolution = Evolution(schedule, phases, [str(args.schedule), *args.overrides])
        if args.runs:
            for phase, file in zip(evolution.phases, evolution.write_runs(), strict=True):
                print(f"{phase.name}\t{file}")
        elif args.judge:
            result = evolution.judge_and_tell(args.judge)
            print(as_table([result]))
            evolution.require_gate(result)
        else:
            evolution.run(args.processes, requests)
    return 0
