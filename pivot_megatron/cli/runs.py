"""Runs, and what stands before them: check, show, train, reference, doctor."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from pivot_megatron.cli.verbs import Verb
from pivot_megatron.errors import UserError
from pivot_megatron.requeue import StopRequests, remove_mark


def add(verb: Verb) -> None:
    p = verb("check", _check, "validate runs and schedules: every error at once")
    p.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")

    p = verb("show", _show, "a run's config as it is resolved: its bases, its file, then overrides")
    p.add_argument("config", type=Path, metavar="RUN.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--key", help="print one dotted key alone, such as out or layout.tensor")

    p = verb("train", _train, "one run; resumes by itself if its folder holds a checkpoint")
    p.add_argument("config", type=Path, metavar="RUN.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--processes", type=int, help="processes on this machine (default: one a GPU, or the layout's own)")

    p = verb("reference", _reference, "the reference log-probs of a run, once, beside its shards")
    p.add_argument("config", type=Path, metavar="RUN.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--processes", type=int, help="processes on this machine (default: one a GPU, or the layout's own)")

    p = verb("doctor", _doctor, "what this machine has, what is missing, and what that costs")
    p.add_argument("--json", action="store_true")


def _check(args: argparse.Namespace) -> int:
    wrong = 0
    for path in args.configs:
        try:
            print(f"{path}: {_checked(path)}")
        except UserError as error:
            wrong += 1
            for line in str(error).splitlines():
                print(line, file=sys.stderr)
    return 2 if wrong else 0


def _checked(path: Path) -> str:
    """Raises UserError with every mistake of the config, or else every reason why its model cannot be run so here; of a schedule
    with all that `pivot evolve` looks for before its first phase."""
    from pivot_megatron.config.load import ConfigErrors, load_config, read_tree

    if "phases" in read_tree(path):
        from pivot_megatron.recipe.ready import ready_phases
        from pivot_megatron.recipe.schedule import load_schedule

        return f"ok: {len(ready_phases(load_schedule(path), path))} phases"
    config = load_config(path)
    absent = [folder for folder in config.model.folders if not folder.exists()]
    if absent:  # an earlier run's, perhaps, that is yet to be made
        return f"ok, but for its layout, which is not held against the model: {absent[0]} does not exist"
    from pivot_megatron.train.feasible import infeasible

    try:
        found = infeasible(config)
    except UserError as error:
        found = str(error).splitlines()
    if found:
        raise ConfigErrors(path, found)
    return "ok"


def _show(args: argparse.Namespace) -> int:
    from pivot_megatron.config.load import dump_config, load_config, value_of

    config = load_config(args.config, args.overrides)
    print(value_of(config, args.key) if args.key else dump_config(config), end="\n" if args.key else "")
    return 0


def _launched(verb: str, args: argparse.Namespace, layout: Any, requests: StopRequests | None = None) -> int | None:
    """The exit code of several processes that ran `pivot VERB`; None where this process is one of them, or the only one."""
    if "RANK" not in os.environ:
        from pivot_megatron.runtime.launch import Nodes, default_processes, launch

        processes = args.processes or default_processes(layout)
        if processes > 1 or Nodes.from_environment().count > 1:
            debug = ["--debug"] if args.debug else []
            return launch(processes, [verb, *debug, str(args.config), *args.overrides], requests)
    elif args.processes:
        raise UserError(
            "--processes: this process was started by a launcher, which says how many there are; leave it out"
        )
    return None


def _reference(args: argparse.Namespace) -> int:
    from pivot_megatron.config.load import load_config

    config = load_config(args.config, args.overrides)
    if (code := _launched("reference", args, config.layout)) is not None:
        return code
    from pivot_megatron.train.trainer import make_reference

    for path in make_reference(config):
        print(path)
    return 0


def _train(args: argparse.Namespace) -> int:
    from pivot_megatron.config.load import load_config

    with StopRequests() as requests:
        config = load_config(args.config, args.overrides)
        if "RANK" not in os.environ:  # before there are processes, one of which removes it anyway
            remove_mark(config.out)
        if (code := _launched("train", args, config.layout, requests)) is not None:
            return code
        from pivot_megatron.train.progress import show_steps
        from pivot_megatron.train.trainer import train

        with show_steps(config.name) as report:
            train(config, report, requests)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from pivot_megatron.runtime.doctor import as_text, examine

    findings = examine()
    print(json.dumps([f.as_dict() for f in findings], indent=2) if args.json else as_text(findings))
    return 0
