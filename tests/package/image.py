"""Pythons that stand in for an image's: one with pip alone, and one with a torch of its own, which no index has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

VERSION = "2.13.0a0+image"
"""What the stand-in's torch says it is: as in NVIDIA's images, neither constraints.txt nor an index knows it."""

# What comes with torch where its build is for CUDA.
_WITH_TORCH = re.compile(r"(torch|triton|nvidia|cuda)")


def make_image(prefix: Path) -> Path:
    """The interpreter of `make_python`, with torch too."""
    python = make_python(prefix)
    packages = _packages(python)
    for distribution in metadata.distributions():
        if _WITH_TORCH.match(distribution.metadata["Name"]):
            _link(distribution, packages)
    _rename_torch(packages)
    _bare(packages, "tensorrt", "9.9")
    return python


def make_python(prefix: Path) -> Path:
    """The interpreter of a Python below `prefix` that shares this one's standard library, and has pip alone."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(sys.base_prefix)
    python = prefix / "bin" / "python3"
    library = prefix / "lib" / version
    python.parent.mkdir(parents=True)
    library.mkdir(parents=True)
    shutil.copy(Path(sys.executable).resolve(), python)
    for shared in base.glob("lib/libpython*"):
        (prefix / "lib" / shared.name).symlink_to(shared)
    for item in (base / "lib" / version).iterdir():
        if item.name not in ("site-packages", "dist-packages", "EXTERNALLY-MANAGED"):
            (library / item.name).symlink_to(item)
    packages = _packages(python)
    assert packages.is_relative_to(prefix), packages
    packages.mkdir(parents=True, exist_ok=True)
    _link(metadata.distribution("pip"), packages)
    return python


def _packages(python: Path) -> Path:
    asked = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    return Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())


def _link(distribution: metadata.Distribution, packages: Path) -> None:
    for top in {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}:
        if not (packages / top).exists():
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))


def _rename_torch(packages: Path) -> None:
    (linked,) = packages.glob("torch-*.dist-info")
    text = (linked / "METADATA").read_text()
    linked.unlink()
    own = packages / f"torch-{VERSION}.dist-info"
    own.mkdir()
    (own / "METADATA").write_text(re.sub(r"(?m)^Version: .*$", f"Version: {VERSION}", text, count=1))


def _bare(packages: Path, name: str, version: str) -> None:
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
