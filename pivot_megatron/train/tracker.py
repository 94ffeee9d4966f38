"""What a tracker is, what it follows, and what it keeps beside its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pivot_megatron.config.schema import Tracking
from pivot_megatron.errors import UserError
from pivot_megatron.train.run_folder import write_atomically

SECONDS_TO_START = 60.0
SECONDS_TO_FINISH = 30.0
"""What is not uploaded when a run has ended, or is stopped, waits for so long; it stays in the run's folder."""


@dataclass(frozen=True)
class Subject:
    """What trackers follow: a run, or reports. `folder`: where their files go. `described`: YAML or JSON texts of what it is, by
    name. `lines`: the name of its file of lines, a step each, for what is said on stderr. `done`: the last step before those to
    come. `seconds`: after which a server counts as out of reach."""

    name: str
    folder: Path
    tracking: Tracking
    described: Mapping[str, str]
    lines: str
    done: int
    seconds: float = SECONDS_TO_START


class Tracker(Protocol):
    """`held`: the last step that it has already, of this run or of one that was broken off."""

    name: str
    held: int

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """`values`: numbers, booleans, texts and paths of HTML pages by name, without those that are null. Steps only rise."""

    def close(self, failed: bool) -> None:
        """Once, after the last step. `failed`: whether the run ended by an error."""


class Held:
    """What a tracker was given, beside its own files: its run's id, and the last step."""

    def __init__(self, folder: Path, new_id: str) -> None:
        """Raises OSError where the folder cannot be made, UserError where the file is not one of these."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "held.json"
        new: dict[str, Any] = {"id": new_id, "step": 0}
        try:
            found = json.loads(self._path.read_text()) if self._path.exists() else new
            self.id, self.step = str(found["id"]), int(found["step"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"tracking: {self._path}: expected an id and a step, found something else; remove it, and the tracker begins anew"
            ) from None
        self.up_to(self.step)

    def up_to(self, step: int) -> None:
        self.step = step
        write_atomically(self._path, json.dumps({"id": self.id, "step": step}) + "\n")
