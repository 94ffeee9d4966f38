"""What an environment on top of a Python installs, and what it must leave as that Python has it.

NVIDIA's images bring torch and all that is compiled against it as builds of their own, which no index has. An environment made
with `--system-site-packages` sees them; what is here keeps pip from putting others before them, and tells if it did.

    python packages.py record RECORD                                 the packages of this Python to keep; needs a torch among them
    python packages.py requirements PYPROJECT [EXTRAS]               a line each, for pip; EXTRAS joined by commas
    python packages.py constraints CONSTRAINTS [RECORD]              the same versions, but for those on record
    python packages.py compare RECORD                                whether this Python's packages are those on record
    python packages.py imports                                       every module of the project

Needs the standard library alone, since it runs before anything is installed. Ends with 2 and one line where it cannot go on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

KEPT = re.compile(r"(torch|pytorch|triton|nvidia-|cuda-|tensorrt|transformer-engine|flash-attn|apex$)")
"""Names, normalised, of torch and of what is compiled against it or against CUDA."""

OPTIONAL = frozenset({"wandb", "tensorboard", "datasets"})
"""What modules of the project may import that only an extra or another environment brings."""

Place = tuple[str, str]
"""A package's version, and the folder that it lies in."""


class Wrong(Exception):
    """One line that says what was expected and what was found."""


def normalised(name: str) -> str:
    """As PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def kept(distributions: Iterable[metadata.Distribution]) -> dict[str, Place]:
    """Of `distributions` those to keep, by name. The first of a name counts, as it does for imports."""
    found: dict[str, Place] = {}
    for distribution in distributions:
        name = normalised(distribution.metadata["Name"] or "")
        if KEPT.match(name):
            found.setdefault(name, (distribution.version, str(Path(str(distribution.locate_file(""))).absolute())))
    return dict(sorted(found.items()))


def requirements(pyproject: Mapping[str, object], extras: Sequence[str]) -> list[str]:
    """The project's dependencies and those of its `extras`, as `pyproject` (a parsed pyproject.toml) words them."""
    project = pyproject["project"]
    assert isinstance(project, Mapping)
    known = project.get("optional-dependencies", {})
    if unknown := sorted(set(extras) - set(known)):
        raise Wrong(f"extras: expected some of {', '.join(known)}, found {', '.join(unknown)}")
    return [*project["dependencies"], *(line for extra in extras for line in known[extra])]


def constraints(lines: Iterable[str], places: Mapping[str, Place]) -> list[str]:
    """The pins in `lines`, but the versions of `places` for what is there."""
    pins = [line for line in lines if line and not line.startswith("#")]
    own = [line for line in pins if normalised(line.partition("==")[0]) not in places]
    return own + [f"{name}=={version}" for name, (version, _) in places.items()]


def differences(before: Mapping[str, Place], after: Mapping[str, Place]) -> list[str]:
    """A line for each package that is new, gone, another version or in another folder."""

    def told(place: Place | None) -> str:
        return "none" if place is None else f"{place[0]} in {place[1]}"

    names = sorted(set(before) | set(after))
    return [
        f"{name}: expected {told(before.get(name))}, found {told(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _read(record: Path) -> dict[str, Place]:
    return {name: (version, folder) for name, (version, folder) in json.loads(record.read_text()).items()}


def _record(file: Path) -> None:
    places = kept(metadata.distributions())
    if "torch" not in places:
        raise Wrong(
            f"{sys.executable}: expected the image's torch to keep, found none; name another image, or torch from an index"
        )
    file.write_text(json.dumps(places, indent=1) + "\n")


def _compare(record: Path) -> None:
    before = _read(record)
    if found := differences(before, kept(metadata.distributions())):
        raise Wrong("the image's packages changed: " + "; ".join(found))
    torch = importlib.util.find_spec("torch")
    origin = Path(torch.origin).absolute() if torch and torch.origin else None
    folder = Path(before["torch"][1])
    if origin is None or not origin.is_relative_to(folder):
        raise Wrong(f"torch: expected it to be imported from {folder}, found {origin}")


def _imports() -> None:
    """Raises whatever an import raises, but for what only OPTIONAL packages bring."""
    package = importlib.import_module("pivot_megatron")
    for module in pkgutil.walk_packages(package.__path__, "pivot_megatron."):
        if module.name.endswith("__main__"):  # which runs when it is imported
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise


def main(verb: str, *arguments: str) -> None:
    match verb, *arguments:
        case "record", record:
            _record(Path(record))
        case "requirements", pyproject, *extras:
            wanted = [extra for extra in "".join(extras).split(",") if extra]
            print(*requirements(tomllib.loads(Path(pyproject).read_text()), wanted), sep="\n")
        case "constraints", file, *record:
            places = _read(Path(record[0])) if record else {}
            print(*constraints(Path(file).read_text().splitlines(), places), sep="\n")
        case "compare", record:
            _compare(Path(record))
        case ("imports",):
            _imports()
        case _:
            raise Wrong(f"packages.py: expected a verb and its arguments, found {' '.join((verb, *arguments))}")


if __name__ == "__main__":
    try:
        main(*(sys.argv[1:] or [""]))
    except Wrong as error:
        print(f"packages.py: {error}", file=sys.stderr)
        sys.exit(2)
