"""What a report found, to the trackers of runs: its figures, its table and its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pivot_megatron.config.schema import Tracking
from pivot_megatron.report.page import Page
from pivot_megatron.train.run_folder import write_atomically
from pivot_megatron.train.tracker import Subject
from pivot_megatron.train.tracking import Trackers

REPORTS = "reports.jsonl"


def track(name: str, tracking: Tracking, page: Path, found: Page, table: str, figures: Mapping[str, float]) -> None:
    """Tells the trackers that `tracking` asks for of the report `found`, written to the file `page`, as the next step of a run
    `name` in its folder. What they are told stands in REPORTS there, a line a step; a report like the last is not told again.

    Raises UserError where a tracker does not start.
    """
    if not tracking.asked:
        return
    file = page.parent / REPORTS
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    line = {"step": len(lines) + 1, **figures, "table": table}
    if lines and {**lines[-1], "step": line["step"]} == line:
        return
    lines.append(line)
    write_atomically(file, "".join(json.dumps(one) + "\n" for one in lines))
    described = {"settings": json.dumps(dict(found.settings)), "environment": json.dumps(dict(found.versions))}
    # Of the pages of earlier reports none is left.
    told = [*lines[:-1], {**line, "report": page}]
    with Trackers(name) as trackers:
        trackers.follow(Subject(name, page.parent, tracking, described, REPORTS, len(lines) - 1), lambda: told)
