"""What works on this machine's GPU, and how fast: one command, one table (`tools/gpu_check.py`).

Each part runs in a process of its own with its own time limit, so that one that crashes or hangs is a line of the table and
the rest go on. `--out` gets `table.md`, `results.json`, and what each part wrote. Exit code: 0 where every part that was asked
for passed, 1 where one failed, crashed or ran out of time, 3 where none did, but one could not run here. Without a GPU the
parts that need none run small, on the CPU, which shows that they run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from tests.gpu.__main__ import CANNOT_RUN
from tests.gpu.parts import PARTS, Part, environment_of, part_by_name
from tests.gpu.rows import Row

ROOT = Path(__file__).resolve().parents[2]
Outcome = Literal["passed", "failed", "crashed", "out of time", "cannot run"]


@dataclass(frozen=True)
class Result:
    part: str
    outcome: Outcome
    seconds: float
    detail: str
    rows: tuple[Row, ...]


def run_part(part: Part, out: Path, cuda: bool = True) -> Result:
    """`cuda`: whether this machine has a GPU. Writes `PART.jsonl` and `PART.log` to `out`."""
    if part.needs_cuda and not cuda:
        return Result(part.name, "cannot run", 0.0, "needs CUDA", ())
    found, log = out / f"{part.name}.jsonl", out / f"{part.name}.log"
    found.unlink(missing_ok=True)
    began = time.monotonic()
    with log.open("w") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu", part.name, str(found.resolve())],
            cwd=ROOT,
            env=environment_of(part),
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=part.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    taken = time.monotonic() - began
    rows = tuple(Row(**json.loads(line)) for line in found.read_text().splitlines()) if found.exists() else ()
    outcome, detail = _outcome(code, rows, log, part.seconds)
    return Result(part.name, outcome, round(taken, 1), detail, rows)


def _outcome(code: int | None, rows: Sequence[Row], log: Path, limit: int) -> tuple[Outcome, str]:
    """`code`: what the process ended with, None where it had to be ended."""
    if code is None:
        return "out of time", f"ended after {limit} s, {len(rows)} rows"
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["it said nothing"]
    if code not in (0, CANNOT_RUN):
        return "crashed", f"exit code {code}: {said[-1][:200]}"
    failed = [row for row in rows if row.passed is False]
    if failed:
        return "failed", f"{len(failed)} of {len(rows)} rows, the first: {failed[0].name}: {shown(failed[0])}"
    if code == CANNOT_RUN:
        return "cannot run", said[-1]
    return "passed", f"{sum(row.passed is True for row in rows)} limits held, {len(rows)} rows"


def _end(process: subprocess.Popen[bytes]) -> None:
    """With everything that it started: a hung kernel's process does not end by itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def shown(row: Row) -> str:
    found = f"{row.found:.4g}" if isinstance(row.found, float) else str(row.found)
    return found if row.limit is None else f"{found} (at most {row.limit:g})"


def table(results: Sequence[Result]) -> str:
    """Markdown: the parts, then what each found."""
    lines = ["| part | outcome | seconds | |", "|---|---|---|---|"]
    lines += [f"| {r.part} | {r.outcome} | {r.seconds:.0f} | {_cell(r.detail)} |" for r in results]
    for result in results:
        if result.rows:
            lines += ["", f"### {result.part}: {part_by_name(result.part).about}", "", "| | found | |", "|---|---|---|"]
            marks = {True: "ok", False: "**past its limit**", None: ""}
            lines += [f"| {_cell(row.name)} | {_cell(shown(row))} | {marks[row.passed]} |" for row in result.rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def exit_code(results: Sequence[Result]) -> int:
    if any(result.outcome in ("failed", "crashed", "out of time") for result in results):
        return 1
    return 3 if any(result.outcome == "cannot run" for result in results) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What works on this machine's GPU, and how fast.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument(
        "--only", action="append", choices=[part.name for part in PARTS], help="may be given several times"
    )
    parser.add_argument("--list", action="store_true", help="the parts, and their time limits")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{part.name:<14} {part.seconds:>4} s  {part.about}" for part in PARTS))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    cuda, results = torch.cuda.is_available(), []
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        print(f"{part.name}: {part.about} (at most {part.seconds} s)", file=sys.stderr, flush=True)
        results.append(run_part(part, options.out, cuda))
        # After each part: the next may take the machine with it.
        (options.out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
        (options.out / "table.md").write_text(table(results))
    print(table(results), end="")
    return exit_code(results)
