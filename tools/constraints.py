"""Write the versions that this environment runs with into constraints.txt, and keep those of the other Python.

Only what the project and its `dev`, `dali`, `tracking` and `docs` extras need is written, so packages installed by hand
beside them stay out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "pivot-megatron"
PYTHONS = ("3.11", "3.12")
EXTRAS = ("dev", "dali", "tracking", "docs")
HEADER = """\
# Exact versions of the default environment. `make constraints` rewrites this Python's part; see docs/development.md.
"""

# CUDA libraries come with torch's CUDA build and must match it, whichever build a machine has; DALI brings decoders of its own.
_CUDA = re.compile(r"(nvidia-(?!dali|nvimgcodec|nvjpeg|nvtiff|libnvcomp)|cuda-)|triton$")
_LINE = re.compile(r'([\w.-]+)==([^\s;]+)(?:\s*;\s*python_version == "(\d+\.\d+)")?$')

Versions = dict[str, dict[str, str]]
"""Package name to Python version to package version."""


def installed(extras: Iterable[str]) -> dict[str, str]:
    """Name to version of everything the project and its `extras` need here, local suffixes such as `+cpu` cut off."""
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    todo = [(PROJECT, ""), *((PROJECT, extra) for extra in extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        distribution = metadata.distribution(name)
        if name != PROJECT:
            found[name] = distribution.version.partition("+")[0]
        for text in distribution.requires or []:
            requirement = Requirement(text)
            needed = canonicalize_name(requirement.name)
            if _CUDA.match(needed) or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
                continue
            todo += [(needed, ""), *((needed, wanted) for wanted in requirement.extras)]
    return found


def read(path: Path) -> Versions:
    versions: Versions = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if match := _LINE.match(line):
            name, version, python = match.groups()
            versions.setdefault(name, {}).update(dict.fromkeys([python] if python else PYTHONS, version))
    return versions


def text(versions: Versions) -> str:
    lines = []
    for name, by_python in sorted(versions.items()):
        if set(by_python) == set(PYTHONS) and len(set(by_python.values())) == 1:
            lines.append(f"{name}=={by_python[PYTHONS[0]]}")
        else:
            lines += [
                f'{name}=={version}; python_version == "{python}"' for python, version in sorted(by_python.items())
            ]
    return HEADER + "".join(line + "\n" for line in lines)


def main(path: Path) -> None:
    python = "{}.{}".format(*sys.version_info)
    others = {name: {p: v for p, v in by_python.items() if p != python} for name, by_python in read(path).items()}
    here = installed(EXTRAS)
    versions = {name: others.get(name, {}) | ({python: here[name]} if name in here else {}) for name in others | here}
    path.write_text(text({name: by_python for name, by_python in versions.items() if by_python}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
