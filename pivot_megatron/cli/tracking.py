"""Options of verbs that write a report: who is told it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pivot_megatron.config.schema import Tracking


def add_trackers(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--wandb", choices=("off", "offline", "online"), default="off", help="tell Weights & Biases the report"
    )
    p.add_argument("--project", default="pivot", help="of wandb (default: pivot)")
    p.add_argument("--tensorboard", action="store_true", help="tell TensorBoard the report")


def asked_tracking(args: argparse.Namespace) -> Tracking:
    """Raises UserError where a tracker that is asked for could not be told, before any work is done."""
    from pivot_megatron.config.check import tracking_problems
    from pivot_megatron.config.schema import Tracking
    from pivot_megatron.errors import UserError

    found = Tracking(args.wandb, args.project, args.tensorboard)
    for problem in tracking_problems(found):
        raise UserError(problem.replace("tracking.", "--", 1))
    if found.asked:
        # It takes torch, which a finished demo prints its table without.
        from pivot_megatron.train.tracking import require_trackers

        require_trackers(found)
    return found
