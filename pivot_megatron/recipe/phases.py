"""Work done once: each phase leaves a file with its result, and a rerun reads that instead of working again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


class Phases:
    """Phases of a folder, by name. A phase is finished when its file is there; files appear whole or not at all."""

    def __init__(self, folder: Path, total: int) -> None:
        self._folder = folder
        self._total = total
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase that `run` was asked for, over all attempts that ended in any way but a kill."""
        return dict(self._seconds)

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returned, now or in an earlier process: plain JSON values."""
        number = len(self._seconds) + 1
        file = self._folder / f"{name}.json"
        if file.exists():
            stored = json.loads(file.read_text())
            self._seconds[name] = stored["seconds"]
            return stored["result"]
        unfinished = self._folder / f"{name}.unfinished"
        before = float(unfinished.read_text()) if unfinished.exists() else 0.0
        print(f"[{number}/{self._total}] {name}", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            result = work()
        except BaseException:
            _write(unfinished, repr(before + time.monotonic() - started))
            raise
        spent = before + time.monotonic() - started
        _write(file, json.dumps({"seconds": spent, "result": result}))
        unfinished.unlink(missing_ok=True)
        print(f"[{number}/{self._total}] {name}: {spent:.0f} s", file=sys.stderr, flush=True)
        self._seconds[name] = spent
        # As a later process would read it, so that both go on with the same values.
        return json.loads(json.dumps(result))

    def timed(self, name: str, work: Callable[[], Result]) -> Result:
        """What `work` returned now, of any type. It is done in every process, quickly once it has left what takes time in files
        of its own; only how long it took the first time is kept here."""
        found: list[Result] = []
        self.run(name, lambda: found.append(work()))
        return found[0] if found else work()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
