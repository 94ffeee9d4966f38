"""Runs in a row, one encoder handed on through all of them. A rerun skips what is finished and resumes the open phase."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path

from pivot_megatron.checkpoints.folder import facts_of, resolve_checkpoint
from pivot_megatron.config.schema import ParameterRule, RunConfig, Tracking
from pivot_megatron.convert.fingerprint import folder_fingerprint
from pivot_megatron.convert.frozen import changed_parameters, frozen_names
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import RuleError, RunError, UserError
from pivot_megatron.probe.classes import probe_encoders
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.kept import made_by
from pivot_megatron.probe.opening import SEEN_BY
from pivot_megatron.probe.table import against_first
from pivot_megatron.recipe.evolution import PhaseResult, Probed, as_json, as_table, figures
from pivot_megatron.recipe.evolution_page import evolution_page
from pivot_megatron.recipe.phase_runs import Phase
from pivot_megatron.recipe.ready import probe_settings
from pivot_megatron.recipe.run_facts import run_settings
from pivot_megatron.recipe.run_once import (
    StoppedError,
    apart,
    begun,
    export_once,
    finished,
    recorded,
    require_as_asked,
    run_once,
    write_run,
)
from pivot_megatron.recipe.schedule import Schedule
from pivot_megatron.report.page import write_page
from pivot_megatron.report.tracked import track
from pivot_megatron.requeue import StopRequests
from pivot_megatron.train.begun import start_of
from pivot_megatron.train.checkpoint import progress_of
from pivot_megatron.train.run_folder import read_metrics, write_atomically
from pivot_megatron.train.tracking import require_trackers

_LAST = 0.1  # of a run's steps, over which its loss is told
_JUDGED_BY = (
    __file__,
    "pivot_megatron.convert.frozen",
    *(f"pivot_megatron.probe.{module}" for module in ("classes", "interval", "linear", "table")),
    *SEEN_BY,
    *("scikit-learn", "scipy", "numpy"),
)


class Evolution:
    """A schedule's phases, in its folder. `asked`: the file and the overrides that it was read from, as `pivot evolve` takes
    them."""

    def __init__(self, schedule: Schedule, phases: Sequence[Phase], asked: Sequence[str]) -> None:
        self.schedule = schedule
        self.phases = phases
        self._asked = asked

    def write_runs(self) -> list[Path]:
        """A file a phase that `pivot train` takes. Raises UserError where a phase has begun with other settings, or although the
        one before it is not finished."""
        for earlier, phase in pairwise(self.phases):
            if begun(phase.config) and not finished(earlier.config):
                raise UserError(
                    f"phase {phase.name}: has begun, and {earlier.name} before it is not finished; remove {phase.folder} and the "
                    "phases after it"
                )
        return [write_run(f"phase {phase.name}", phase.config) for phase in self.phases]

    def run(self, processes: int | None, requests: StopRequests) -> bool:
        """Every phase that is not finished, in `processes` on this machine (one a GPU, or the layout's own, where it is None).
        False where one was asked to stop, which has saved. Raises RuleError where an encoder has fallen past a phase's gate."""
        require_trackers(self._tracking)
        self.write_runs()
        results = []
        for n, phase in enumerate(self.phases):
            print(f"evolve: [{n + 1}/{len(self.phases)}] {phase.name}", file=sys.stderr, flush=True)
            try:
                run_once(f"phase {phase.name}", phase.config, processes, requests)
            except StoppedError:
                print(f"evolve: stopped in {phase.name}, which has saved; the same command goes on", file=sys.stderr)
                return False
            results.append(self._judged_apart(phase, requests))
            self.require_gate(results[-1])
        self._tell(results)
        print(as_table(results))
        return True

    def _judged_apart(self, phase: Phase, requests: StopRequests) -> PhaseResult:
        """In a process of its own: what it takes of a GPU it would keep while the next phase trains."""
        if not self._record_of(phase).exists():
            told = f"phase {phase.name}: its judgement"
            apart(told, ["evolve", *self._asked, "--judge", phase.name], phase.folder, requests)
            if not self._record_of(phase).exists():
                raise RunError(f"{told} is of another schedule; {self._asked[0]} has changed since this command began")
        return self._result(phase)

    def judge(self, name: str) -> PhaseResult:
        """What a phase whose run is finished did to its encoder: exported, and probed where the schedule has a probe. Raises
        UserError where that run is not the one that the schedule asks for."""
        phase = self._named(name)
        _finished(phase)
        require_as_asked(f"phase {name}", phase.config)
        return self._result(phase)

    def _result(self, phase: Phase) -> PhaseResult:
        return PhaseResult.from_json(recorded(self._record_of(phase), lambda: asdict(self._judged(phase))))

    def _record_of(self, phase: Phase) -> Path:
        """Where its judgement is kept: of the checkpoint, against the encoder before it and the first, by the probe, on the
        images and by the code that there are now."""
        told = f"{facts_of(_finished(phase))['id']} {made_by(*_JUDGED_BY)}"
        if self.schedule.probe is not None:
            encoders = (self._encoder_before(phase), _start(self.schedule))
            told += f" {' '.join(map(_name_of, encoders))} {self._probe_told}"
        return phase.folder / f"judged-{hashlib.sha256(told.encode()).hexdigest()[:8]}.json"

    @cached_property
    def _probe_told(self) -> str:
        settings = probe_settings(self.schedule)
        images = [ImageSet.opened(where).fingerprint for where in (settings.train, settings.test)]
        return json.dumps([asdict(settings), images], default=str)

    def judge_and_tell(self, name: str) -> PhaseResult:
        """As `judge`, with the table and the page, of the phases that are judged so far."""
        require_trackers(self._tracking)
        result = self.judge(name)
        judged = takewhile(lambda phase: finished(phase.config) and self._record_of(phase).exists(), self.phases)
        self._tell([self.judge(phase.name) for phase in judged])
        return result

    def require_gate(self, result: PhaseResult) -> None:
        """Raises RuleError where the encoder has fallen past the phase's gate, or that of all phases together: by more than its
        share for sure, the whole of the difference's interval lying below."""
        if (probed := result.probed) is None:
            return
        change, in_all = (probed.difference, probed.difference_interval), probed.against_the_start()
        for (difference, interval), most, fell, key in (
            (change, self._named(result.name).most_fallen, "fell", "phases: most_fallen"),
            (in_all, self.schedule.most_fallen_in_all, "has fallen since the schedule began", "most_fallen_in_all"),
        ):
            if most is not None and interval.high < -most:
                raise RuleError(
                    f"phase {result.name}: the probe's accuracy {fell} by {-100 * difference:.2f} points, by more than "
                    f"{100 * most:.2f} for sure ({key}); what it left is in {result.encoder}"
                )

    def _tell(self, results: Sequence[PhaseResult]) -> None:
        page = evolution_page(self.schedule, self.phases, results)
        runs = {phase.name: run_settings(phase.config) for phase in self.phases}
        told = as_json(self.schedule.name, results, settings=page.settings, runs=runs, versions=page.versions)
        write_atomically(self.schedule.out / "evolution.json", told)
        written = self.schedule.out / "report.html"
        write_page(page, written)
        track(self.schedule.name, self._tracking, written, page, as_table(results), figures(results))

    @property
    def _tracking(self) -> Tracking:
        """That of the first phase's run."""
        return self.phases[0].config.tracking

    def _named(self, name: str) -> Phase:
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise UserError(f"--judge: expected one of {', '.join(p.name for p in self.phases)}, found {name}")

    def _judged(self, phase: Phase) -> PhaseResult:
        checkpoint = _finished(phase)
        head = describe(checkpoint).architecture().head
        before = self._encoder_before(phase)
        encoder = phase.encoder if _encoder_changed(checkpoint, phase.config) else None
        if encoder is not None:
            export_once(checkpoint, encoder)
        probed = (
            _probed(self.schedule, before, encoder) if self.schedule.probe is not None and encoder is not None else None
        )
        lines = [line for line in read_metrics(phase.config.out) if line["applied"]]
        if not lines:
            raise RunError(
                f"phase {phase.name}: no step of its run was applied; see {phase.config.out / 'faults.jsonl'}"
            )
        last = lines[-max(1, round(_LAST * len(lines))) :]
        margins = [line["reward_margin"] for line in last if line.get("reward_margin") is not None]
        return PhaseResult(
            phase.name,
            phase.config.objective.kind,
            f"{head.family} {head.hidden}",
            phase.projector,
            lines[-1]["step"],
            sum(line["pairs"] for line in lines),
            sum(line["step_seconds"] + line["save_seconds"] for line in lines),
            sum(line["loss"] for line in last) / len(last),
            sum(margins) / len(margins) if margins else None,
            None if encoder is None else str(encoder),
            probed,
        )

    def _encoder_before(self, phase: Phase) -> Path:
        """The encoder that `phase` found: as the last phase before it that changed it left it."""
        for earlier in reversed(self.phases[: self.phases.index(phase)]):
            if earlier.encoder.exists():
                return earlier.encoder
        return _start(self.schedule)


def _start(schedule: Schedule) -> Path:
    """The encoder that it begins with."""
    encoder = schedule.encoder
    return encoder.hf or encoder.checkpoint or Path()


def _finished(phase: Phase) -> Path:
    """The last checkpoint of a run that has made all its steps."""
    if not finished(phase.config):
        raise UserError(
            f"phase {phase.name}: expected a finished run in {phase.config.out}; `pivot train {phase.run_file}` goes on"
        )
    return resolve_checkpoint(phase.config.out)


def _encoder_changed(checkpoint: Path, config: RunConfig) -> bool:
    """Whether any of its parameters is not, bit for bit, what the run began from."""
    names = frozen_names(describe(checkpoint).architecture(), [ParameterRule("encoder.*", "frozen")])
    start = start_of(config, progress_of(checkpoint))
    return bool(changed_parameters(checkpoint, start, config.seed, names))


def _name_of(encoder: Path) -> str:
    """By content."""
    if (encoder / "config.json").is_file():
        return folder_fingerprint(encoder)
    return str(facts_of(resolve_checkpoint(encoder))["id"])


def _probed(schedule: Schedule, before: Path, after: Path) -> Probed:
    start = _start(schedule)
    encoders = [before, after] if before == start else [before, after, start]
    report = probe_encoders(encoders, probe_settings(schedule), schedule.out / "features", _say)
    write_atomically(after.parent / "linear.json", report.as_json() + "\n")
    found, score, *first = report.scores
    (change,) = against_first([found, score])
    (in_all,) = against_first([*first, score]) if first else [(None, None)]
    return Probed(score.mean, score.interval, *change, *in_all)


def _say(told: str) -> None:
    print(f"probe: {told}", file=sys.stderr, flush=True)
