"""Write the folders for a person to look at. What is damaged only later is written as it is before."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.damage import KINDS

parser = argparse.ArgumentParser(prog="python -m tests.damage", description=__doc__)
parser.add_argument("out", type=Path, help="a folder for each kind is made in it")
parser.add_argument("kinds", nargs="*", metavar="KIND", help="(default: all)")
args = parser.parse_args()
if unknown := set(args.kinds) - KINDS.keys():
    parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
for name in args.kinds or KINDS:
    kind = KINDS[name]
    kind.write(args.out / name)
    reasons = "; ".join(f"{key}: {' or '.join(told)}" for key, told in kind.bad.items())
    print(f"{name}: {kind.fate}{f' ({reasons})' if reasons else ''}")
