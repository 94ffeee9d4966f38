"""NOTICE against the packages that pip installs beside this one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_names_every_dependency_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=~!;\[ ]", line, maxsplit=1)[0] for line in project["dependencies"]}
    lines = re.findall(r"^  ([\w-]+)  +(\S.*)$", (ROOT / "NOTICE").read_text(), re.MULTILINE)
    assert {"torch", "megatron-core"} <= needed == {name for name, _ in lines} and len(lines) == len(needed)
