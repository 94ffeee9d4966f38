"""Which steps are applied: none whose loss or gradient is not finite, and none that is a spike, by a stated rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from pivot_megatron.config.schema import Faults

_LEAST_LOSS = 0.1  # nats; a DPO loss comes near 0, where the next batch is easily many times the last


def not_finite(loss: float, norm: float) -> str | None:
    """Why a step cannot be applied, whatever a run's rules are."""
    wrong = [f"{name} {value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(value)]
    return " and ".join(wrong) or None


@dataclass(frozen=True)
class Guard:
    """`losses`, `norms`: of the last steps that were applied, for the medians. `skipped`: steps in a row that were not.

    It follows from global numbers alone, so it is the same on every rank and at every layout, and is saved with a checkpoint.
    """

    rules: Faults
    clip: float
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    skipped: int = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """Why the step is not to be applied, None where it is."""
        return not_finite(loss, norm) or self._spike(loss, norm)

    def _spike(self, loss: float, norm: float) -> str | None:
        factor = self.rules.spike_factor
        if factor is None or len(self.losses) < self.rules.spike_window:
            return None
        usual_loss, usual_norm = median(self.losses), median(self.norms)
        if loss > usual_loss + (factor - 1) * max(abs(usual_loss), _LEAST_LOSS):
            return f"loss {loss:.4g}, a spike over the median {usual_loss:.4g}"
        if norm > factor * max(usual_norm, self.clip):
            return f"gradient norm {norm:.4g}, a spike over the median {usual_norm:.4g}"
        return None

    def after(self, loss: float, norm: float, applied: bool) -> Guard:
        if not applied:
            return replace(self, skipped=self.skipped + 1)
        if self.rules.spike_factor is None:
            return replace(self, skipped=0)
        return replace(self, losses=self._kept(self.losses, loss), norms=self._kept(self.norms, norm), skipped=0)

    def _kept(self, values: Sequence[float], newest: float) -> tuple[float, ...]:
        return (*values, newest)[-self.rules.spike_window :]

    @property
    def exhausted(self) -> bool:
        return self.skipped > self.rules.most_skipped

    @property
    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms), "skipped": self.skipped}

    def restored(self, state: Mapping[str, Any]) -> Guard:
        """With another's `state`, of which a shorter window keeps the newest steps."""
        if not state:
            return self
        losses, norms = (tuple(state[name])[-self.rules.spike_window :] for name in ("losses", "norms"))
        return replace(self, losses=losses, norms=norms, skipped=state["skipped"])
