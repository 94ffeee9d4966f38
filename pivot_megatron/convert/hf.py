"""Hugging Face folders: `config.json` and safetensors, read slice by slice, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pivot_megatron.convert.plan import Slice
from pivot_megatron.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder at {path.parent}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); was the download cut off?") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class HfTensors:
    """Tensors of a Hugging Face folder by their hub names, whichever of the known prefixes the folder's files use.

    `prefixes`: those that a name may carry or lack, such as `vision_model.`; tried after the exact name.
    """

    def __init__(self, folder: Path, prefixes: Sequence[str] = ()) -> None:
        self.folder = folder
        self._prefixes = tuple(prefixes)
        self._file_of = self._list_files()
        self._open: dict[Path, Any] = {}

    def _list_files(self) -> dict[str, Path]:
        if (self.folder / INDEX).exists():
            names = read_json(self.folder / INDEX).get("weight_map", {})
            return {name: self.folder / file for name, file in names.items()}
        single = self.folder / WEIGHTS
        if not single.exists():
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle: save it again with safe_serialization=True" if pickles else ""
            raise UserError(f"{self.folder}: expected {WEIGHTS} or {INDEX}, found neither{hint}")
        return dict.fromkeys(self._handle(single).keys(), single)

    def _handle(self, file: Path) -> Any:
        if not hasattr(self, "_open"):
            self._open = {}
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a whole safetensors file ({error}); was the copy cut off?") from None
        return self._open[file]

    def stored_name(self, name: str) -> str:
        """The name under which the folder holds `name`; raises UserError if it holds it under none."""
        candidates = [name]
        for prefix in self._prefixes:
            candidates += [name.removeprefix(prefix), prefix + name]
        for candidate in candidates:
            if candidate in self._file_of:
                return candidate
        raise UserError(
            f"{self.folder}: expected a tensor {name}, found none; is this the checkpoint that config.json says?"
        )

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.stored_name(name)
        return tuple(self._handle(self._file_of[stored]).get_slice(stored).get_shape())

    def read(self, name: str, part: Slice | None = None) -> Tensor:
        """The tensor, or only the bytes of its slice. Padding rows of the slice are not added."""
        stored = self.stored_name(name)
        handle = self._handle(self._file_of[stored])
        if part is None or part.dim is None:
            whole: Tensor = handle.get_tensor(stored)
            return whole
        index = (slice(None),) * part.dim + (slice(part.start, part.stop),)
        cut: Tensor = handle.get_slice(stored)[index]
        return cut


def write_folder(
    out: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], copied: Sequence[Path] = ()
) -> None:
    """A Hugging Face folder with one safetensors file, whole or not there at all.

    `copied`: files taken over unchanged. Raises UserError if `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already has files in it; export to a new folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors}, part / WEIGHTS, metadata={"format": "pt"})
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in copied:
        shutil.copyfile(file, part / file.name)
    if out.exists():
        out.rmdir()
    part.replace(out)
