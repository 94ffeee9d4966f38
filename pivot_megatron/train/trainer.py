"""One run, from its config to its last checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from signal import Signals

from pivot_megatron.checkpoints.folder import step_folder, steps_in
from pivot_megatron.config.schema import Dpo, RunConfig
from pivot_megatron.convert.frozen import require_frozen
from pivot_megatron.convert.start import pinned
from pivot_megatron.data.loader import StepData
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.requeue import StopRequests, remove_mark
from pivot_megatron.runtime.distributed import from_main_process, is_main_process, on_main_process, process_groups
from pivot_megatron.runtime.watch import Patience, Watch
from pivot_megatron.train.agreement import agreed
from pivot_megatron.train.begun import fingerprint_on_all, start_of
from pivot_megatron.train.record import (
    own_share,
    record,
    record_fault,
    record_straggler,
    require_progress,
    require_sound,
)
from pivot_megatron.train.reference import ReferencePass
from pivot_megatron.train.run_folder import RunFolder, finished_path
from pivot_megatron.train.session import Session, described, prepare
from pivot_megatron.train.step import StepResult, observed, train_step
from pivot_megatron.train.stopping import Stopped, agreed_signal, as_tally, in_tally, stop_if_asked
from pivot_megatron.train.tracking import Trackers

Report = Callable[[int, int, StepResult], None]
"""Called on the main process after each step with (steps done, steps in all, result)."""


def train(config: RunConfig, report: Report = lambda *_: None, requests: StopRequests | None = None) -> int:
    """Run `config` to its end, resuming from its folder's newest checkpoint. Returns the steps this call made.

    Where any rank's `requests` ask to stop, the run ends early: saved, and marked for being started again.
    """
    requests = requests or StopRequests()
    with Trackers(config.name) as trackers, watched(config) as watch:
        if is_main_process():
            remove_mark(config.out)
        try:
            session = prepare(config, watch, trackers, before_reference_batch(watch, requests))
            if session.done < session.steps:
                on_main_process(session.folder.unmark_finished)
            stop_if_asked(requests)
        except Stopped as stopped:
            _mark(config, stopped.signal)
            return 0
        if (signal := make_steps(session, report, requests)) is not None:
            _mark(config, signal)
        elif not from_main_process(is_main_process() and finished_path(config.out).exists()):
            _require_frozen(session)  # also where an earlier call made the last step, and no more
            on_main_process(lambda: session.folder.mark_finished(session.done))
        return session.done - session.first


def make_reference(config: RunConfig) -> list[Path]:
    """The reference log-probs of `config`, beside its shards: made where they are missing, checked where they are not."""
    if not isinstance(config.objective, Dpo):
        raise UserError(f"objective.kind: {config.objective.kind} compares with no reference; only dpo does")
    with watched(config) as watch:
        start = pinned(config.model)
        _, arch, loader = described(config, start)
        begun = fingerprint_on_all(start, config.seed)
        before_batch = before_reference_batch(watch, StopRequests())
        return [file.path for file in ReferencePass(config, arch, start, begun, loader, before_batch).files(make=True)]


@contextmanager
def watched(config: RunConfig) -> Iterator[Watch]:
    """Process groups, and the watch over all that happens in them."""
    faults = config.faults
    patience = Patience(faults.seconds_silent, faults.seconds_to_hang, faults.seconds_for_files)
    with process_groups(config.layout, config.seed, patience.timeout), Watch(patience, config.out / "stacks") as watch:
        yield watch


def before_reference_batch(watch: Watch, requests: StopRequests) -> Callable[[], None]:
    def before_batch() -> None:
        watch.at("reference log-probs", files=True)
        stop_if_asked(requests)

    return before_batch


def make_steps(session: Session, report: Report, requests: StopRequests) -> Signals | None:
    """Those that are left. Returns the signal that a rank was asked to stop by, after saving, where that ended them early."""
    dropped = 0
    signal: Signals | None = None
    for data, waited in _timed_steps(session):
        started = time.perf_counter()
        session.begins("forward and backward")
        data = session.loader.with_reference(agreed(session.loader, data))
        result = _make_step(session, data, requests)
        dropped += record(session, data, result, time.perf_counter() - started + waited, waited)
        try:
            require_sound(session, result)
            if not result.applied:
                record_fault(session, data, result)
            record_straggler(session, waited)
            require_progress(session, result)
        except RunError:
            session.watch.at("saving", session.done, files=True)
            session.checkpointer.finish()  # every rank is here
            raise
        signal = in_tally(result.tally)
        _save(session, must=signal is not None or session.done == session.steps)
        if session.checkpointer.holds(session.done):
            signal = signal or agreed_signal(requests)  # one that came meanwhile; else the next step hears it
        if is_main_process():
            report(session.done, session.steps, result)
        if signal:
            break
    if dropped and is_main_process():
        print(f"{session.config.name}: {dropped} samples left out, see {session.folder.dropped}", file=sys.stderr)
    return signal if session.done < session.steps else None


def _make_step(session: Session, data: StepData, requests: StopRequests) -> StepResult:
    session.stopwatch.start()
    result = train_step(
        session.wrapped,
        session.optimization,
        session.objective,
        data.micro_batches,
        session.reference,
        session.guard.judge,
        lambda: {**own_share(data, session.flops), **as_tally(requests)},
    )
    session.objective = observed(session.objective, result)
    session.guard = session.guard.after(result.loss, result.grad_norm, result.applied)
    session.done += 1
    return result


def _timed_steps(session: Session) -> Iterator[tuple[StepData, float]]:
    """Each step's data with the seconds waited for it."""
    steps = session.loader.steps(session.done, session.steps)
    while True:
        session.begins("waiting for data")
        started = time.perf_counter()
        try:
            data = next(steps)
        except StopIteration:
            return
        yield data, time.perf_counter() - started


def _save(session: Session, must: bool) -> None:
    """Where it is due, or was and is possible now, or `must` be."""
    checkpointer = session.checkpointer
    due = session.done % session.config.checkpoints.every == 0
    if due or must or checkpointer.busy:
        session.watch.at("saving", session.done, files=True)
    state = {"objective": session.objective.state, "guard": session.guard.state}
    progress = replace(session.standing, step=session.done, **state)
    blocked = checkpointer.at_step(session.wrapped, session.optimization, progress, due=due, must=must)
    session.folder.held_up(blocked)


def _require_frozen(session: Session) -> None:
    """That what the rules freeze is saved as the run began from it, bit for bit."""
    config = session.config
    if not any(rule.rate == "frozen" for rule in config.parameters):
        return
    session.watch.at("comparing frozen parameters", files=True)

    def compare() -> None:
        start = start_of(config, session.standing)
        checkpoint = step_folder(session.folder.checkpoints, session.done)
        count = require_frozen(checkpoint, start, config.seed, config.parameters)
        print(f"{config.name}: {count} frozen parameters are as they began, bit for bit", file=sys.stderr, flush=True)

    on_main_process(compare)


def _mark(config: RunConfig, signal: Signals) -> None:
    """What is saved is saved; say so to whoever starts the run again."""
    if not is_main_process():
        return
    folder = RunFolder(config)
    saved = steps_in(folder.checkpoints)
    step = saved[-1][0] if saved else 0
    folder.mark_for_requeue(step, signal)
    print(
        f"{config.name}: {signal.name}: stopped, step {step} is saved; the same command goes on",
        file=sys.stderr,
        flush=True,
    )
