"""The recipe: the demo, and schedules of runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pivot_megatron.cli.verbs import Verb
from pivot_megatron.errors import UserError
from pivot_megatron.requeue import StopRequests


def add(verb: Verb) -> None:
    p = verb("demo", _demo, "the whole recipe, small, on this machine; ends with a report")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to work in (default: runs/demo)")
    p.add_argument("--processes", type=int, default=2, help="processes to train with (default: 2)")

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


def _demo(args: argparse.Namespace) -> int:
    from pivot_megatron.recipe.demo import run_demo

    run_demo(args.out, args.processes)
    return 0


def _evolve(args: argparse.Namespace) -> int:
    if "RANK" in os.environ or os.environ.get("NNODES", "1") != "1":
        raise UserError(
            "evolve: expected to be started alone, for it starts the processes of its runs itself; on several nodes use "
            "launch/evolve.sh, or --runs and `pivot train` for each"
        )
    with StopRequests() as requests:
        from pivot_megatron.recipe.evolution import as_table
        from pivot_megatron.recipe.evolve import Evolution
        from pivot_megatron.recipe.phase_runs import phases_of
        from pivot_megatron.recipe.schedule import load_schedule

        schedule = load_schedule(args.schedule, args.overrides)
        evolution = Evolution(schedule, phases_of(schedule, args.schedule))
        if args.runs:
            for phase, file in zip(evolution.phases, evolution.write_runs(), strict=True):
                print(f"{phase.name}\t{file}")
        elif args.judge:
            result = evolution.judge(args.judge)
            print(as_table([result]))
            evolution.require_gate(result)
        else:
            evolution.run(args.processes, requests)
    return 0
