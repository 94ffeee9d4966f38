"""What a step leaves in the run's folder, and when what it tells must end the run."""

from __future__ import annotations

import sys
from dataclasses import asdict

from pivot_megatron.data.build import require_few_bad
from pivot_megatron.data.loader import Dropped, StepData
from pivot_megatron.errors import RuleError
from pivot_megatron.model.flops import TrainingFlops
from pivot_megatron.runtime.distributed import (
    gather_objects,
    is_first_stage,
    is_main_process,
    tensor_parallel_coordinates,
)
from pivot_megatron.runtime.memory import peak_memory
from pivot_megatron.train.culprits import find_culprits
from pivot_megatron.train.session import Session
from pivot_megatron.train.step import StepResult


def own_share(data: StepData, flops: TrainingFlops) -> dict[str, float]:
    """What this rank adds to a step's numbers: one rank of each data-parallel replica speaks for it."""
    share = {
        "flops": flops.of(data.micro_batches),
        "samples": data.samples,
        "tokens": sum(batch.length for batch in data.micro_batches),
        "padding": sum(batch.padding for batch in data.micro_batches),
        "dropped": len(data.dropped) + len(data.bad),
    }
    return {name: float(value if _speaks_for_replica() else 0) for name, value in share.items()}


def record(session: Session, data: StepData, result: StepResult, step_seconds: float, data_seconds: float) -> int:
    """A line of metrics; `peak_bytes` are the main process's own so far. Returns how many samples of the global batch were left
    out."""
    tally = {name: int(result.tally[name]) for name in ("samples", "tokens", "padding", "dropped")}
    dropped = _all_dropped(data) if tally["dropped"] else []
    session.bad |= {d.index for d in dropped if d.bad}
    if not is_main_process():
        return len(dropped)
    line = session.folder.log(
        {
            "step": session.done,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "learning_rate": result.learning_rate,
            "pairs": tally["samples"],
            "tokens": tally["tokens"],
            "flops": result.tally["flops"],
            "padding_share": tally["padding"] / max(tally["tokens"] + tally["padding"], 1),
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "peak_bytes": peak_memory(),
            "dropped": len(dropped),
            "bad": sum(d.bad for d in dropped),
            "keys": data.keys_digest,
            **result.metrics,
        }
    )
    session.trackers.log(line)
    if dropped:
        session.folder.log_dropped(session.done, dropped)
    return len(dropped)


def _all_dropped(data: StepData) -> list[Dropped]:
    own = (*data.dropped, *data.bad) if _speaks_for_replica() else ()
    return [dropped for found in gather_objects(own) for dropped in found]


def _speaks_for_replica() -> bool:
    """The first stage's first tensor-parallel rank."""
    return is_first_stage() and tensor_parallel_coordinates()[0] == 0


def record_fault(session: Session, data: StepData, result: StepResult) -> None:
    """Name who is to blame for a step that was not applied. Collective over all ranks."""
    session.watch.at("finding what is not finite", session.done)
    blame = find_culprits(session.wrapped, result, data.micro_batches)
    if not is_main_process():
        return
    session.folder.log_fault(
        {
            "step": session.done,
            "reason": result.refused,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "skipped_in_a_row": session.guard.skipped,
            **blame.as_record(),
        }
    )
    told = [f"step {session.done} is not applied: {result.refused}", blame.as_text()]
    say(session, "; ".join(filter(None, told)))


def record_straggler(session: Session, data_seconds: float) -> None:
    """Collective over all ranks."""
    found = session.stragglers.after(session.done, session.stopwatch.reset(), data_seconds)
    if found is None or not is_main_process():
        return
    session.folder.log_straggler(asdict(found))
    if found.slower >= session.config.faults.straggler_factor:
        say(session, found.as_text())


def require_sound(session: Session, result: StepResult) -> None:
    """Raises RuleError where there is no use in going on."""
    if not result.count:
        raise RuleError(
            f"step {session.done}: none of its {session.config.batch.global_size} samples is sound, so it trains nothing; "
            f"{session.folder.dropped} names them"
        )
    samples, most = len(session.loader.samples), session.config.data.max_bad_share
    require_few_bad(len(session.bad), samples, most, f"{session.folder.dropped} names them")


def require_progress(session: Session, result: StepResult) -> None:
    """Raises RuleError where too many steps in a row were not applied."""
    if session.guard.exhausted:
        raise RuleError(
            f"faults.most_skipped: step {session.done}: {result.refused}; {session.guard.skipped} steps in a row were not "
            f"applied, so the run stops without saving; {session.folder.faults} names samples and parameters, and the newest "
            f"checkpoint is in {session.folder.checkpoints}"
        )


def say(session: Session, text: str) -> None:
    print(f"{session.config.name}: {text}", file=sys.stderr, flush=True)
