"""The configs that come with the project: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from pivot_megatron.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def shipped_config(name: str) -> Path:
    """The path of `configs/NAME`, such as `demo/2_dpo.yaml`. Raises UserError if the installation has none."""
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"configs/{name}: expected it in {_FOLDERS[0]} or {_FOLDERS[1]}, found it in neither; install again"
    )
