"""Trackers: every line of a run's metrics.jsonl, or of reports, to wandb and TensorBoard, which can neither end nor hold up."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

from pivot_megatron.config.schema import RunConfig, Tracking
from pivot_megatron.errors import UserError
from pivot_megatron.train.run_folder import RunFolder, read_metrics
from pivot_megatron.train.tracker import SECONDS_TO_FINISH, SECONDS_TO_START, Subject, Tracker

_GRACE = 15.0  # for a tracker that keeps to its own time


def require_trackers(tracking: Tracking) -> None:
    """Raises UserError where a tracker's package or login is missing."""
    for key, wanted in (("wandb", tracking.wandb != "off"), ("tensorboard", tracking.tensorboard)):
        if wanted and importlib.util.find_spec(key) is None:
            off = "off" if key == "wandb" else "false"
            raise UserError(
                f"tracking.{key}: expected the package {key}, found none: pip install 'pivot-megatron[tracking]', "
                f"or set tracking.{key}: {off}"
            )
    if tracking.wandb == "online":
        from pivot_megatron.train.track_wandb import require_login

        require_login()


class Trackers:
    """Those that a config asks for; none until they are opened. `run`: its name, for what is said on stderr."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._followers: list[Follower] = []

    def open(self, config: RunConfig) -> None:
        """On the main process, when its folder is as the run goes on from it. Lines that a tracker lacks it is given first.

        Raises UserError where one does not start.
        """
        folder = RunFolder(config)
        seconds = min(SECONDS_TO_START, config.faults.seconds_for_files / 4)
        described, done = folder.described(), folder.last_step()
        subject = Subject(config.name, config.out, config.tracking, described, folder.metrics.name, done, seconds)
        self.follow(subject, partial(read_metrics, config.out) if folder.metrics.exists() else list)

    def follow(self, subject: Subject, lines: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """As `open` does, of any subject. `lines`: those that there are."""
        self._followers += [Follower(tracker, self._run, lines=subject.lines) for tracker in _opened(subject)]
        for line in lines() if self._followers else ():
            self.log(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """A line as metrics.jsonl has it. Returns at once."""
        for follower in self._followers:
            follower.log(line)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for follower in self._followers:
            follower.end(failed=kind is not None)
        for follower in self._followers:
            follower.wait()


def _opened(subject: Subject) -> list[Tracker]:
    """Each module is imported only where its tracker is asked for."""
    trackers: list[Tracker] = []
    try:
        if subject.tracking.wandb != "off":
            from pivot_megatron.train.track_wandb import WandbTracker

            trackers.append(WandbTracker(subject))
        if subject.tracking.tensorboard:
            from pivot_megatron.train.track_tensorboard import TensorBoardTracker

            trackers.append(TensorBoardTracker(subject))
    except OSError as error:
        raise UserError(
            f"tracking: cannot write to {error.filename} ({error.strerror}); choose another folder"
        ) from None
    return trackers


class Follower:
    """A tracker on a thread of its own. `lines`: the file that has every line whatever becomes of it."""

    def __init__(
        self,
        tracker: Tracker,
        run: str,
        seconds_to_finish: float = SECONDS_TO_FINISH + _GRACE,
        lines: str = "metrics.jsonl",
    ) -> None:
        self._file = lines
        self._tracker = tracker
        self._run = run
        self._seconds = seconds_to_finish
        self._held = tracker.held
        self._lines: SimpleQueue[Mapping[str, Any] | bool] = SimpleQueue()
        self._given = 0
        self._lost = 0
        self._thread = Thread(target=self._follow, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        if line["step"] > self._held:
            self._given += 1
            self._lines.put(line)

    def end(self, failed: bool) -> None:
        self._lines.put(failed)

    def wait(self) -> None:
        """For what is left, so long as it may take."""
        self._thread.join(self._seconds)
        if self._thread.is_alive():
            self._say(f"has not finished after {self._seconds:g} s and is left; {self._file} has every line")
        elif self._lost:
            self._say(f"{self._lost} of {self._given} lines were not taken; {self._file} has them")

    def _follow(self) -> None:
        while not isinstance(line := self._lines.get(), bool):
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            try:
                self._tracker.log(line["step"], values)
            except Exception as error:  # whatever it is: nothing is to end for it
                self._lost += 1
                if self._lost == 1:
                    self._say(f"step {line['step']} was not taken ({_told(error)}); going on")
        try:
            self._tracker.close(failed=line)
        except Exception as error:
            self._say(f"not closed ({_told(error)})")

    def _say(self, text: str) -> None:
        print(f"{self._run}: tracking.{self._tracker.name}: {text}", file=sys.stderr, flush=True)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
