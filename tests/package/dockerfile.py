"""A Dockerfile without Docker: its instructions, and its build in a folder of this machine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

# Where the project's images keep what is theirs; below the folder of the build instead.
_PLACES = re.compile(r"(?<![\w./-])(/(?:opt/pivot|home/pivot|cache|work)\b)")


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """(name, argument) of each, comments cut out and continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, argument = line.partition(" ")
            yield name, argument.strip()


class Build:
    """Runs the instructions of a Dockerfile in `root`, with the files of `checkout`; users are not made.

    `arguments` go over ARG, and `environment`, which starts as the base's, over ENV; its PATH begins with the base's Python.
    """

    def __init__(
        self, root: Path, checkout: Path, environment: Mapping[str, str], arguments: Mapping[str, str]
    ) -> None:
        self.root, self.checkout, self.arguments = root, checkout, arguments
        self.given, self.environment, self.folder = environment, dict(environment), root
        self.said: list[str] = []
        tools = root / "tools"
        tools.mkdir(parents=True)
        (tools / "useradd").write_text("#!/bin/sh\n")
        (tools / "useradd").chmod(0o755)
        self.environment["PATH"] = f"{tools}:{environment['PATH']}"
        (root / "home/pivot").mkdir(parents=True)

    def run(self, dockerfile: Path) -> None:
        """Raises AssertionError with what a step that failed has said."""
        for name, argument in instructions(dockerfile):
            if step := getattr(self, f"_{name.lower()}", None):
                step(argument)

    def inside(self, text: str) -> str:
        """`text` with the image's places moved below the root."""
        return _PLACES.sub(rf"{self.root}\1", text)

    def shell(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", self.inside(command)], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _workdir(self, argument: str) -> None:
        self.folder = Path(self.inside(argument))
        self.folder.mkdir(parents=True, exist_ok=True)

    def _copy(self, argument: str) -> None:
        *sources, target = shlex.split(argument)
        for source in map(self.checkout.joinpath, sources):
            if source.is_dir():
                shutil.copytree(source, self.folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (self.folder / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, self.folder / target / source.name)

    def _env(self, argument: str) -> None:
        for setting in shlex.split(argument):
            name, _, value = setting.partition("=")
            if name == "PATH" or name not in self.given:
                value = re.sub(r"\$\{(\w+)\}", lambda match: self.environment[match[1]], value)
                self.environment[name] = self.inside(value)

    def _arg(self, argument: str) -> None:
        name, _, value = argument.partition("=")
        self.environment[name] = self.arguments.get(name, value)

    def _run(self, argument: str) -> None:
        self.said.append(self.shell(argument))


def outer_environment(folder: Path) -> dict[str, str]:
    """This process's environment for a build whose Python lies in `folder`: pip's settings, and nothing of our own Python's."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "HOME")}
    return own | {"PATH": f"{folder}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
