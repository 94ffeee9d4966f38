"""`pivot plan`: what a run would take on given machines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pivot_megatron.cli.verbs import Verb
from pivot_megatron.errors import UserError

if TYPE_CHECKING:
    from pivot_megatron.plan.machine import Machine


def add(verb: Verb) -> None:
    p = verb(
        "plan", _plan, "memory and time of a run on given GPUs, by layout: what fits, what is fastest, what limits it"
    )
    p.add_argument("config", type=Path, metavar="RUN.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--gpus", type=int, help="how many (default: 8)")
    p.add_argument("--nodes", type=int, help="the same, in nodes of 8, or of as many as --machine has")
    p.add_argument("--gpu", help="h100, h200, a100 or b200, from their data sheets (default: h100)")
    p.add_argument("--machine", type=Path, metavar="FILE", help="a machine as `pivot bench calibrate` wrote it")
    p.add_argument("--encoder", metavar="NAME", help="a published size in place of the run's encoder; with --head")
    p.add_argument(
        "--head", metavar="NAME", help="a published size in place of the run's language model; with --encoder"
    )
    p.add_argument("--samples", type=int, help="samples of an epoch, where the run's data are not here")
    p.add_argument("--layout", choices=("all", "own"), default="all", help="own: as the run says, alone (default: all)")
    p.add_argument("--top", type=int, default=10, help="layouts to show (default: 10)")
    p.add_argument(
        "--explain", type=int, nargs="?", const=1, metavar="RANK", help="the arithmetic of one of them (default: 1)"
    )
    p.add_argument("--scaling", action="store_true", help="also from --gpus to 1,024 devices")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="also build the first layout's model, every stage, in no memory, and compare",
    )
    p.add_argument("--out", type=Path, default=Path("runs/plan"), help="default: runs/plan")
    p.add_argument("--json", action="store_true")


def _plan(args: argparse.Namespace) -> int:
    from pivot_megatron.config.load import load_config
    from pivot_megatron.plan.commands import Request, make_report, said
    from pivot_megatron.plan.report import as_json

    for option in ("gpus", "nodes", "samples", "top", "explain"):
        if (number := getattr(args, option)) is not None and number < 1:
            raise UserError(f"--{option}: expected at least 1, found {number}")
    config = load_config(args.config, args.overrides)
    machine = _machine(args)
    request = Request(
        run=str(args.config),
        config=config,
        machine=machine,
        gpus=_gpus(args, machine),
        encoder=args.encoder,
        head=args.head,
        samples=args.samples,
        own=args.layout == "own",
        top=args.top,
        explain=args.explain,
        scaling=args.scaling,
        dry_run=args.dry_run,
    )
    report = make_report(request, args.out)
    print(as_json(report) if args.json else said(request, report))
    print(f"plan: {args.out / 'report.html'}", file=sys.stderr)
    as_planned = report.dry_run is None or report.dry_run.passed
    return 0 if report.plan.best.fits and as_planned else 1


def _machine(args: argparse.Namespace) -> Machine:
    from pivot_megatron.plan.hardware import gpu
    from pivot_megatron.plan.machine import read_machine

    if args.machine and args.gpu:
        raise UserError("pivot plan: expected one of --gpu and --machine, found both; leave one out")
    return read_machine(args.machine) if args.machine else gpu(args.gpu or "h100")


def _gpus(args: argparse.Namespace, machine: Machine) -> int:
    each = machine.devices_a_node
    if args.nodes is None:
        return int(args.gpus or 8)
    if args.gpus not in (None, args.nodes * each):
        raise UserError(
            f"--nodes: {args.nodes} nodes of {machine.name} have {args.nodes * each} devices, found --gpus {args.gpus}; leave "
            "one out"
        )
    return int(args.nodes * each)
