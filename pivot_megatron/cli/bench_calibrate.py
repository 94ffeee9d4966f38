"""`pivot bench calibrate`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from pivot_megatron.cli.verbs import Groups, Verb

_OUT = Path("runs/machine.yaml")


def add(verb: Verb, group: Groups) -> None:
    p = verb("calibrate", _calibrate, "this machine as plans see it: products, attention, memory, collectives", group)
    p.add_argument(
        "--processes",
        type=int,
        nargs="+",
        help="so many at once, each on its GPU or its share of the cores (default: 1, 2 and all)",
    )
    p.add_argument("--precision", choices=("bf16", "fp32"), help="of what is timed (default: bf16 on GPUs, else fp32)")
    p.add_argument("--out", type=Path, default=_OUT, help=f"for `pivot plan --machine` (default: {_OUT})")
    p.add_argument("--json", action="store_true")


def _calibrate(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.calibrate import as_text, calibrate, default_processes
    from pivot_megatron.config.schema import Precision
    from pivot_megatron.plan.machine import write_machine
    from pivot_megatron.runtime.device import device_count

    precision = Precision(compute=args.precision or ("bf16" if device_count() else "fp32"))
    found = calibrate(args.processes or default_processes(), precision, _say)
    write_machine(found.machine, args.out)
    print(json.dumps(asdict(found), indent=2) if args.json else as_text(found))
    print(f"written to {args.out}", file=sys.stderr)
    return 0


def _say(text: str) -> None:
    print(f"bench calibrate: {text}", file=sys.stderr, flush=True)
