"""`pivot bench`: this machine, measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pivot_megatron.cli import bench_calibrate, bench_layouts
from pivot_megatron.cli.verbs import Groups, Verb
from pivot_megatron.errors import UserError


def add(verb: Verb, verbs: Groups) -> None:
    group = verbs.add_parser("bench", help="measure this machine").add_subparsers(required=True, metavar="WHAT")
    p = verb("peers", _peers, "this trainer and TRL's DPOTrainer on the same model and pairs", group)
    p.add_argument("--shape", required=True, help="vocabulary, body or tiny; on a GPU so400m_0.5b or so400m_1.5b")
    p.add_argument(
        "--settings",
        nargs="+",
        default=[],
        metavar="SIDE:PAIRS",
        help="pivot or trl with so many pairs in a forward pass (default: both with 1, and both with a step's)",
    )
    p.add_argument("--rounds", type=int, default=3, help="times that each setting is run (default: 3)")
    p.add_argument("--steps", type=int, default=4, help="steps of a run, the first of them not timed (default: 4)")
    p.add_argument("--epochs", type=int, default=1, help="epochs that share our one reference pass (default: 1)")
    p.add_argument(
        "--trl-environment",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a variable that TRL's processes alone are given, such as another allocator's (repeatable)",
    )
    p.add_argument("--out", type=Path, default=Path("runs/bench-peers"), help="default: runs/bench-peers")
    p.add_argument("--json", action="store_true")
    p = verb("profile", _profile, "where a training step's time goes, by kind of operation", group)
    p.add_argument("--shape", required=True, help="vocabulary, body or tiny")
    p.add_argument("--out", type=Path, default=Path("runs/bench-profile"), help="default: runs/bench-profile")
    p = verb("convert", _convert, "import and export of a head of true size, against a copy of its files", group)
    p.add_argument("--head", default="7b", help="7b, 0.5b or tiny (default: 7b, which needs 32 GB of disk)")
    p.add_argument("--out", type=Path, default=Path("runs/bench-convert"), help="default: runs/bench-convert")
    p.add_argument("--json", action="store_true")
    p = verb("loader", _loader, "how fast samples come, and how many GPUs a core feeds", group)
    p.add_argument("--images", type=int, default=512, help="photographs to make and read (default: 512)")
    p.add_argument("--rounds", type=int, default=5, help="times that each way is run, in turn (default: 5)")
    p.add_argument("--out", type=Path, default=Path("runs/bench-loader"), help="default: runs/bench-loader")
    p.add_argument("--json", action="store_true")
    bench_layouts.add(verb, group)
    bench_calibrate.add(verb, group)
    p = verb("runs", _runs, "how fast runs were, from their metrics: one line each", group)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    p.add_argument("--json", action="store_true")


def _peers(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.peers import Wanted, compare
    from pivot_megatron.bench.plot import write_plot
    from pivot_megatron.bench.report import as_json, as_text
    from pivot_megatron.bench.shapes import shape_by_name

    wanted = Wanted(
        shape_by_name(args.shape),
        args.settings,
        args.rounds,
        args.steps,
        args.epochs,
        _variables(args.trl_environment),
        args.out,
    )
    found = compare(wanted, _say)
    (args.out / "peers.json").write_text(as_json(found) + "\n")
    (args.out / "peers.md").write_text(as_text(found) + "\n")
    write_plot(found, args.out / "peers.png")
    print(as_json(found) if args.json else as_text(found))
    return 0


def _variables(given: Sequence[str]) -> dict[str, str]:
    parts = [text.partition("=") for text in given]
    if wrong := [text for text, (name, equals, _) in zip(given, parts, strict=True) if not (name and equals)]:
        raise UserError(f"--trl-environment: expected KEY=VALUE, found {wrong[0]}")
    return {name: value for name, _, value in parts}


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _convert(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.convert import as_json, as_text, measure_conversion

    found = measure_conversion(args.head, args.out, _say)
    print(as_json(found) if args.json else as_text(found))
    return 0 if found.exact else 1


def _loader(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.loader import as_json, as_text, measure_loader

    found = measure_loader(args.out, args.images, args.rounds, _say)
    print(as_json(found) if args.json else as_text(found))
    return 0


def _runs(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.runs import as_json, as_text, speed_of

    found = [speed_of(run) for run in args.runs]
    print(as_json(found) if args.json else as_text(found))
    return 0


def _profile(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.profile import as_text, profile_steps
    from pivot_megatron.bench.shapes import shape_by_name

    print(as_text(profile_steps(shape_by_name(args.shape), args.out)))
    return 0
