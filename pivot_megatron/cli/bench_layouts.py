"""`pivot bench layouts`, and what it starts for each of its runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pivot_megatron.cli.verbs import Groups, Verb

_OUT = Path("runs/bench-layouts")
_TEXTS = (
    "a run, layouts to lay over it (default: every one that fits), and overrides of both; its batch, data and model decide "
    "what is fast, its steps and folder do not matter"
)


def add(verb: Verb, group: Groups) -> None:
    p = verb(
        "layouts", _layouts, "one run at every layout that fits this machine: speed, memory, where time goes", group
    )
    p.add_argument("texts", nargs="*", metavar="RUN.yaml [LAYOUT.yaml ...] [key=value ...]", help=_TEXTS)
    p.add_argument("--shape", help="vocabulary, body or tiny: a model and pairs are made, in place of RUN.yaml")
    p.add_argument("--processes", type=int, help="default: one a GPU; on a machine without, 2")
    p.add_argument("--rounds", type=int, default=3, help="times that each layout is run, in turn (default: 3)")
    p.add_argument("--steps", type=int, default=5, help="timed steps of each (default: 5)")
    p.add_argument(
        "--no-data", action="store_true", help="the same batch in every step, so that no step waits for data"
    )
    p.add_argument(
        "--machine", type=Path, help="what `pivot bench calibrate` wrote: its plan stands beside each layout"
    )
    p.add_argument("--out", type=Path, default=_OUT, help=f"a new folder (default: {_OUT})")
    p.add_argument("--json", action="store_true")
    p.set_defaults(overrides=[])
    # Not for people: `layouts` starts it, so it stands in no list.
    job = group.add_parser("layout-run")
    job.add_argument("job", type=Path)
    job.add_argument("--processes", type=int, required=True)
    job.set_defaults(run=_layout_run, debug=False)


def _layouts(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.layout_page import layouts_page, write_plot
    from pivot_megatron.bench.layout_report import as_json, as_text
    from pivot_megatron.bench.layout_summary import summaries
    from pivot_megatron.bench.layouts import Wanted, bench_layouts
    from pivot_megatron.report.facts import told, versions
    from pivot_megatron.report.page import write_page

    files = [Path(text) for text in args.texts if "=" not in text]
    wanted = Wanted(
        files=files,
        overrides=[*(text for text in args.texts if "=" in text), *args.overrides],
        shape=args.shape,
        processes=args.processes,
        rounds=args.rounds,
        steps=args.steps,
        repeat=args.no_data,
        out=args.out,
        machine=args.machine,
    )
    found = bench_layouts(wanted, _say)
    layouts = summaries(found)
    (args.out / "layouts.json").write_text(as_json(found, layouts) + "\n")
    plot = args.out / "layouts.png"
    write_plot(layouts, plot)
    page = layouts_page(found, layouts, plot.read_bytes(), told(vars(wanted)), versions())
    write_page(page, args.out / "report.html")
    print(as_json(found, layouts) if args.json else as_text(found, layouts))
    return 0


def _layout_run(args: argparse.Namespace) -> int:
    if "RANK" not in os.environ and args.processes > 1:
        from pivot_megatron.runtime.launch import launch

        return launch(args.processes, ["bench", "layout-run", str(args.job), "--processes", str(args.processes)])
    from pivot_megatron.bench.layout_job import Job, make_job

    make_job(Job.read(args.job))
    return 0


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
