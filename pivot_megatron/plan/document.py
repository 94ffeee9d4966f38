"""docs/plan.md, whose numbers are what its commands print: `python -m pivot_megatron.plan.document docs/plan.md` runs them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_FENCE = r"^```\n(?P<commands>(?:pivot plan [^\n]+\n)+)```\n(?:(?!^```).)*?"
_PRINTED = re.compile(
    _FENCE + r"<!-- printed(?:: (?P<heads>[^>]+))? -->\n```text\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_HOURS = re.compile(_FENCE + r"<!-- hours -->\n(?P<text>(?:\|[^\n]*\n)*)", re.MULTILINE | re.DOTALL)
_HEADS = "| run | samples | steps | hours, the run's settings | MFU | hours, the plan's best | MFU |"


@dataclass(frozen=True)
class Block:
    """What stands at `span` of a page and what it follows from: its `commands`, and the first words of those of their
    paragraphs that it shows, all where there are none. A table of `hours` has a row a command."""

    commands: tuple[str, ...]
    heads: tuple[str, ...]
    hours: bool
    text: str
    span: tuple[int, int]

    def made(self, pictures: Path | None = None) -> str:
        """The text anew. `pictures`: a folder for the curves of `--scaling`."""
        if self.hours:
            return "\n".join([_HEADS, "|---|" + "---:|" * 6, *_hours(self.commands)]) + "\n"
        (command,) = self.commands
        return _shown(_printed(command, (), pictures), self.heads) + "\n"


def blocks(page: str) -> list[Block]:
    """In the order of the page: those that are marked `<!-- printed -->`, `<!-- printed: Head, Head -->` or `<!-- hours -->`."""
    found = [
        Block(
            commands=tuple(match["commands"].splitlines()),
            heads=tuple((match.groupdict().get("heads") or "").split(", ")) if match.groupdict().get("heads") else (),
            hours=kind is _HOURS,
            text=match["text"],
            span=match.span("text"),
        )
        for kind in (_PRINTED, _HOURS)
        for match in kind.finditer(page)
    ]
    return sorted(found, key=lambda block: block.span)


def rewritten(page: str, pictures: Path) -> str:
    for block in reversed(blocks(page)):
        begin, end = block.span
        page = page[:begin] + block.made(pictures) + page[end:]
    return page


def _shown(printed: str, heads: Sequence[str]) -> str:
    paragraphs = printed.strip("\n").split("\n\n")
    return "\n\n".join(one for one in paragraphs if not heads or one.lstrip().startswith(tuple(heads)))


def _printed(command: str, more: Sequence[str], pictures: Path | None = None) -> str:
    program, *words = shlex.split(command)
    with tempfile.TemporaryDirectory() as out:
        ran = subprocess.run(
            [sys.executable, "-m", "pivot_megatron.cli", *words, *more, "--out", out],
            cwd=_ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            raise SystemExit(f"{program} {shlex.join(words)}: exit code {ran.returncode}: {ran.stderr.strip()}")
        if pictures and (curves := Path(out, "scaling.png")).exists():
            shutil.copyfile(curves, pictures / "plan-scaling.png")
    return ran.stdout


def _hours(commands: Sequence[str]) -> list[str]:
    """A row a run: with its own layout, recomputing and micro-batches, and with the best of all; then their sum."""
    rows, sums = [], [0.0, 0.0]
    for command in commands:
        trees: list[dict[str, Any]] = [
            json.loads(_printed(command, more)) for more in (("--json", "--layout", "own"), ("--json",))
        ]
        best = [tree["layouts"][0] for tree in trees]
        sums = [total + one["hours"] for total, one in zip(sums, best, strict=True)]
        told = " | ".join(f"{one['hours']:.3f} | {one['utilisation']:.1%}" for one in best)
        name = Path(trees[0]["run"]).stem
        rows.append(f"| {name} | {trees[0]['epoch_samples']:,} | {trees[0]['steps']:,} | {told} |")
    return [*rows, f"| all | | | {sums[0]:.3f} | | {sums[1]:.3f} | |"]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewritten(target.read_text(), target.parent / "images"))
