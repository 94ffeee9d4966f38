"""An environment of its own for the trainer that ours is compared with.

It sees this interpreter's packages, so torch and transformers are the very same on both sides, and adds what only the peer
needs. So the project itself does not depend on its peer.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

from pivot_megatron.errors import UserError
from pivot_megatron.user_cache import cache_folder

PINS = ("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0")
_SHARED = ("torch", "transformers")  # pinned to what this interpreter has, so that nothing puts another beside it

_MARK = "complete"  # a file that is written last


def default_cache() -> Path:
    return cache_folder("peers")


def peer_python(cache: Path) -> Path:
    """The interpreter that has the peer, made below `cache` the first time (a minute, and pip's index).

    Raises UserError where pip cannot install it.
    """
    parents = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    name = hashlib.sha256("\n".join([sys.version, *parents, *PINS]).encode()).hexdigest()[:12]
    folder = cache / name
    python = folder / "bin" / "python"
    if not (folder / _MARK).exists():
        venv.create(folder, clear=True, with_pip=True)
        _chain(folder, parents)
        _install(python)
        (folder / _MARK).write_text("\n".join(PINS) + "\n")
    return python


def _chain(folder: Path, parents: list[str]) -> None:
    """Packages of `parents` come after the environment's own."""
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "parents.pth").write_text("".join(f"{parent}\n" for parent in parents))


def _install(python: Path) -> None:
    shared = [f"{name}=={version(name)}" for name in _SHARED]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS, *shared]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = said[-1].removeprefix("ERROR: ") if said else f"pip ended with {done.returncode}"
        raise UserError(f"bench peers: cannot install {PINS[0]} ({why}); it needs a package index once")
