"""`pivot checkpoint`: those of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pivot_megatron.cli.verbs import Groups, Verb


def add(verb: Verb, verbs: Groups) -> None:
    group = verbs.add_parser("checkpoint", help="look at a run's checkpoints, and remove some").add_subparsers(
        required=True, metavar="WHAT"
    )
    p = verb("list", _list, "a run's checkpoints, oldest first", group)
    p.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    p.add_argument("--json", action="store_true")
    p = verb("inspect", _inspect, "what one holds, and whether every byte is as it was written", group)
    p.add_argument("checkpoint", type=Path, metavar="CKPT", help="a run's folder (its newest) or one checkpoint")
    p.add_argument("--json", action="store_true")
    p = verb("prune", _prune, "remove what the run's config, or these options, do not keep", group)
    p.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    p.add_argument("--keep", type=int, metavar="N", help="the newest N stay (default: the config's)")
    p.add_argument("--keep-every", type=int, metavar="N", help="so do those of every N steps (default: the config's)")
    p.add_argument("--dry-run", action="store_true", help="remove nothing; say what would go")


def _list(args: argparse.Namespace) -> int:
    from pivot_megatron.checkpoints.commands import as_lines, list_checkpoints

    found = list_checkpoints(args.folder)
    print(json.dumps([f.as_record() for f in found], indent=2) if args.json else "\n".join(as_lines(found)))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from pivot_megatron.convert.inspect import inspect_checkpoint

    found = inspect_checkpoint(args.checkpoint)
    print(json.dumps(found.as_record(), indent=2) if args.json else "\n".join(found.as_lines()))
    return 0 if found.damage is None else 1


def _prune(args: argparse.Namespace) -> int:
    from pivot_megatron.checkpoints.commands import prune_run

    for path in prune_run(args.folder, args.keep, args.keep_every, args.dry_run):
        print(f"{'would remove' if args.dry_run else 'removed'} {path}")
    return 0
