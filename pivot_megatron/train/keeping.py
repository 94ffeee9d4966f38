"""When a checkpoint may hold up training, and what the best is measured by."""

from __future__ import annotations

from dataclasses import dataclass

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.errors import UserError
from pivot_megatron.objective.build import build_objective


@dataclass
class Pace:
    """Seconds on one clock. `most`: share of the time since a save began that saving may take of it.

    What the next one will cost is taken to be what the last one did: nothing, as far as the first knows.
    """

    most: float
    since: float
    cost: float = 0.0
    put_off: int = 0

    def begun(self, now: float) -> None:
        self.since, self.cost = now, 0.0

    def blocked(self, seconds: float) -> None:
        self.cost += seconds

    def too_much(self, now: float) -> str | None:
        """Why the next save has to wait; None where it may begin."""
        gone = now - self.since
        if self.cost <= self.most * gone:
            return None
        return f"the last one held up training for {self.cost:.2g} s, over {self.most:.3g} of the {gone:.2g} s since it began"


def require_metric(config: RunConfig) -> None:
    """Raises UserError where `keep_best` names no metric of the run."""
    best = config.checkpoints.keep_best
    known = ("loss", *build_objective(config.objective).metric_names)
    if best is not None and best.metric not in known:
        raise UserError(f"checkpoints.keep_best.metric: expected one of {', '.join(known)}, found {best.metric}")
